"""From what the index found to a decision, and from a decision to bytes and back. Pure.

A decision is stored packed beside its image, so that a redelivered event gets its first verdict
again, the same but for when it was decided. Every verdict, the first one too, is rendered from the
packed form.
"""

from dataclasses import dataclass
from typing import Protocol

from worker.messages import ImageEvent, Match, Verdict, VerdictKind, now_rfc3339

MICRO = 1_000_000  # similarities are kept, shown and packed to 6 digits
KINDS = (VerdictKind.UNIQUE, VerdictKind.DUPLICATE, VerdictKind.EXACT)
TRUNCATED, HAS_BEST = 4, 8  # flag bits above the two of the kind


class Neighbour(Protocol):
    """An earlier image and its similarity, as the index names it."""

    @property
    def sequence(self) -> int: ...
    @property
    def similarity(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Near:
    """An earlier image by sequence, its similarity in millionths."""

    sequence: int
    micro: int


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict without what the event itself brings along."""

    kind: VerdictKind
    threshold_micro: int
    clusters_probed: int
    vectors_compared: int
    truncated: bool
    duplicate_of: Near | None
    best: Near | None
    matches: tuple[Near, ...]

    def sequences(self) -> set[int]:
        """The images a rendering must name."""
        near = (self.duplicate_of, self.best, *self.matches)
        return {image.sequence for image in near if image is not None}


def near(neighbour: Neighbour) -> Near:
    """Round to what is shown and stored."""
    return Near(neighbour.sequence, round(neighbour.similarity * MICRO))


def pack(decision: Decision) -> bytes:
    """A decision in about 10 bytes (unique) to 60 (five matches)."""
    flags = KINDS.index(decision.kind)
    flags |= TRUNCATED * decision.truncated | HAS_BEST * (decision.best is not None)
    out = bytearray([flags])
    for number in (decision.threshold_micro, decision.clusters_probed, decision.vectors_compared):
        _put(out, number)
    _put(out, len(decision.matches))
    for image in decision.matches or ((decision.best,) if decision.best else ()):
        _put_near(out, image)
    if decision.kind is not VerdictKind.UNIQUE:
        assert decision.duplicate_of is not None
        _put_near(out, decision.duplicate_of)
    return bytes(out)


def unpack(packed: bytes) -> Decision:
    """The inverse of `pack`. Raises ValueError for what it would not have made."""
    reader = _Reader(packed)
    flags = reader.byte()
    if flags >= 2 * HAS_BEST or flags & 3 >= len(KINDS):
        raise ValueError(f"no decision has the flags {flags}")
    kind = KINDS[flags & 3]
    threshold, probed, compared, count = (reader.number() for _ in range(4))
    matches = tuple(reader.near() for _ in range(count))
    best = matches[0] if matches else reader.near() if flags & HAS_BEST else None
    duplicate_of = reader.near() if kind is not VerdictKind.UNIQUE else None
    reader.end()
    return Decision(
        kind, threshold, probed, compared, bool(flags & TRUNCATED), duplicate_of, best, matches
    )


def render(
    packed: bytes, event: ImageEvent, verdict_id: str, names: dict[int, str], model_id: str
) -> Verdict:
    """The message for `event`; `names` maps every sequence of the decision to its image id."""
    decision = unpack(packed)

    def match(image: Near) -> Match:
        return Match(image_id=names[image.sequence], similarity=image.micro / MICRO)

    duplicate = match(decision.duplicate_of) if decision.duplicate_of else None
    return Verdict(
        verdict_id=verdict_id,
        image_id=event.image_id,
        namespace=event.namespace,
        verdict=decision.kind,
        duplicate_of=duplicate.image_id if duplicate else None,
        similarity=duplicate.similarity if duplicate else None,
        best_match=match(decision.best) if decision.best else None,
        matches=[match(image) for image in decision.matches],
        threshold=decision.threshold_micro / MICRO,
        model_id=model_id,
        clusters_probed=decision.clusters_probed,
        vectors_compared=decision.vectors_compared,
        truncated=decision.truncated,
        occurred_at=event.occurred_at,
        decided_at=now_rfc3339(),
        attributes=event.attributes,
    )


def _put(out: bytearray, number: int) -> None:
    """Append an unsigned LEB128 variable-length integer."""
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)


def _put_near(out: bytearray, image: Near) -> None:
    _put(out, image.sequence)
    _put(out, image.micro + MICRO)  # a cosine may be negative


class _Reader:
    def __init__(self, packed: bytes) -> None:
        self._packed = packed
        self._at = 0

    def byte(self) -> int:
        if self._at == len(self._packed):
            raise ValueError("a decision ends too early")
        self._at += 1
        return self._packed[self._at - 1]

    def number(self) -> int:
        number = shift = 0
        while True:
            byte = self.byte()
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7

    def near(self) -> Near:
        return Near(self.number(), self.number() - MICRO)

    def end(self) -> None:
        if self._at < len(self._packed):
            raise ValueError("a decision goes on behind its end")
