"""Staying in the consumer group: what kafka-python 3.0 gets wrong about it, put right.

Owns everything that reaches into its coordinator. Knows partitions; not records, not their work.
"""

from collections.abc import Awaitable, Callable, Collection
from typing import Any

from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import MemberState, TopicPartition

Partitions = set[TopicPartition]


class Assignor(CooperativeStickyAssignor):  # type: ignore[misc]
    """The cooperative assignor (KIP-429), but a member claims only what it holds.

    kafka-python's claims what it was given last. Who was expelled since claims what is another's,
    which is then taken from that one and given to both within a generation; or what is nobody's,
    which then stays nobody's, for the leader waits for it to be given up.
    """

    claim: Callable[[], Collection[TopicPartition]] = staticmethod(tuple)

    def metadata(self, topics: Collection[str]) -> Any:
        """What to tell the leader when joining."""
        self.member_assignment = sorted(self.claim())
        return super().metadata(topics)


class Membership:
    """The place of one KafkaConsumer in its group."""

    def __init__(
        self, consumer: Any, assignor: Assignor, lost: Callable[[Partitions], None]
    ) -> None:
        """`lost` is told what an expulsion took, on kafka-python's IO thread."""
        self._consumer = consumer
        self._lost = lost
        assignor.claim = self._claim
        coordinator = consumer._coordinator
        self._ask_to_join: Callable[[], Awaitable[bytes]] = coordinator._do_join_and_sync_async
        self._given: tuple[Any, bytes] | None = None
        coordinator._do_join_and_sync_async = self._join

    async def _join(self) -> bytes:
        """What the group gives us, encoded; on kafka-python's IO thread.

        If it comes between two polls, kafka-python throws it away and joins anew, which has all
        others join anew. The more members, the more rarely all are polling when it comes: the group
        may never get done. The Java client keeps it for the next poll, as is done here.
        """
        coordinator = self._consumer._coordinator
        if self._given is not None and coordinator.state is MemberState.REBALANCING:
            generation, given = self._given
            if generation is coordinator._generation:
                return given
        self._given = None
        given = await self._ask_to_join()
        self._given = coordinator._generation, given
        return given

    def go_on_joining(self) -> None:
        """Let the next poll finish a join that an earlier one began; to be called before each.

        Where the leader joins anew because the partitions of the topic are not those it knew, its
        reason is gone once it has assigned them. If the poll has ended by then, kafka-python sees
        nothing to join for: it never takes its assignment, sends no heartbeats and is expelled,
        unawares, for good. The Java client had this, too (KAFKA-9815).
        """
        coordinator = self._consumer._coordinator
        if coordinator._join_task is not None:
            coordinator.request_rejoin()

    def be_heard_leaving(self) -> None:
        """Let the group know at once that the consumer closes; to be called before.

        A broker answers the requests of a connection one after the other, and a JoinGroup once all
        have joined. The LeaveGroup behind it, on the connection of its own that the coordinator
        has, would be lost with that connection, and the group wait a session for who has gone.
        """
        coordinator = self._consumer._coordinator
        joining = coordinator._join_task
        if joining is not None and not joining.is_done and coordinator.coordinator_id is not None:
            node = str(coordinator.coordinator_id).removeprefix("coordinator-")
            coordinator.coordinator_id = int(node)

    def forget_answers(self) -> None:
        """Have committed offsets asked for anew; on kafka-python's IO thread.

        The answer to a question that nobody waited for any more is kept, and given to whoever
        asks the same next, however much was committed in between.
        """
        self._consumer._coordinator._offset_fetch_futures.clear()

    def forget_answers_soon(self) -> None:
        """The same, from any other thread; when it returns, it is done."""
        self._consumer._net.run(self.forget_answers)

    def _claim(self) -> Partitions:
        """What is held, on joining; after an expulsion, nothing any more.

        kafka-python itself notices an expulsion only if it comes before it begins to join. One
        that comes while it waits for the others would leave it what these have taken over.
        """
        held: Partitions = self._consumer.assignment()
        if held and self._consumer._coordinator._generation.is_lost():
            self._lost(held)
            self._consumer._subscription.assign_from_subscribed([])
            return set()
        return held
