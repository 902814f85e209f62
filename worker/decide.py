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
FIXED = 5  # numbers before the images: flags, threshold, clusters, vectors, and how many match


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
    numbers = _numbers(packed)
    if len(numbers) < FIXED:
        raise ValueError("a decision ends too early")
    flags, threshold, probed, compared, count = numbers[:FIXED]
    if flags >= 2 * HAS_BEST or flags & 3 >= len(KINDS):
        raise ValueError(f"no decision has the flags {flags}")
    kind = KINDS[flags & 3]
    original = kind is not VerdictKind.UNIQUE
    listed = count or int(flags & HAS_BEST > 0)
    if len(numbers) != FIXED + 2 * (listed + original):
        raise ValueError(f"a decision of {count} matches has not {len(numbers)} numbers")
    near = [Near(numbers[at], numbers[at + 1] - MICRO) for at in range(FIXED, len(numbers), 2)]
    return Decision(
        kind=kind,
        threshold_micro=threshold,
        clusters_probed=probed,
        vectors_compared=compared,
        truncated=bool(flags & TRUNCATED),
        duplicate_of=near[-1] if original else None,
        best=near[0] if listed else None,
        matches=tuple(near[:count]),
    )


def render(
    decision: Decision, event: ImageEvent, verdict_id: str, names: dict[int, str], model_id: str
) -> Verdict:
    """The message for `event`; `names` maps every sequence of the decision to its image id."""

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


def _numbers(packed: bytes) -> list[int]:
    """All unsigned LEB128 integers of `packed`. The flags, below 128, are one, too."""
    numbers = []
    number = shift = 0
    for byte in packed:
        number |= (byte & 0x7F) << shift
        if byte > 0x7F:
            shift += 7
            continue
        numbers.append(number)
        number = shift = 0
    if shift:
        raise ValueError("a decision ends within a number")
    return numbers
