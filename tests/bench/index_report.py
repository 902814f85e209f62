"""The figures of one size, and how they are shown: a table in Markdown and a picture."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Measured:
    """One row of the table."""

    stored: int
    clusters: int
    largest_cluster: int
    median_cluster: int
    threshold: float
    planted: int
    recall: float
    recall_of_verdicts: float
    compared: float
    compared_share: float
    probes: float
    truncated: float
    p50_seconds: float
    p99_seconds: float
    p50_seconds_of_edits: float
    p99_seconds_of_edits: float
    worker_core_seconds: float
    redis_core_seconds: float
    redis_bytes_per_image: float
    faiss_p50_seconds: float
    faiss_lists: int
    faiss_probes: int
    faiss_recall: float
    bruteforce_p50_seconds: float
    seconds_to_fill: float = field(default=0.0)


def table(results: list[Measured]) -> str:
    """The results as Markdown."""
    head = (
        "| stored | clusters (median, largest) | probes | compared | of all | recall | verdicts | "
        "truncated | storing: ms an image p50, p99 | checking edits: p50, p99 | "
        "core-ms worker + Redis | bytes an image | faiss ms (probes of lists) | brute force ms |"
    )
    lines = [head, "|" + "---|" * head.count(" |")]
    for r in results:
        lines.append(
            f"| {r.stored:,} | {r.clusters:,} ({r.median_cluster}, {r.largest_cluster}) | "
            f"{r.probes:.1f} | {r.compared:,.0f} | {r.compared_share:.2%} | {r.recall:.4f} | "
            f"{r.recall_of_verdicts:.4f} | {r.truncated:.1%} | {r.p50_seconds * 1e3:.2f}, "
            f"{r.p99_seconds * 1e3:.2f} | {r.p50_seconds_of_edits * 1e3:.2f}, "
            f"{r.p99_seconds_of_edits * 1e3:.2f} | {r.worker_core_seconds * 1e3:.2f} + "
            f"{r.redis_core_seconds * 1e3:.2f} | {r.redis_bytes_per_image:.0f} | "
            f"{r.faiss_p50_seconds * 1e3:.3f} ({r.faiss_probes} of {r.faiss_lists}) | "
            f"{r.bruteforce_p50_seconds * 1e3:.2f} |"
        )
    return "\n".join(lines)


def plot(results: list[Measured], path: Path) -> None:
    """Recall, share compared and time over size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    sizes = [r.stored for r in results]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4))
    left.semilogx(sizes, [r.recall for r in results], "o-", label="planted duplicates found")
    left.axhline(0.995, color="grey", linestyle=":", label="wanted")
    left.set(title="Recall against brute force", ylim=(0.95, 1.002))
    middle.loglog(sizes, [r.compared_share * 100 for r in results], "o-", label="compared")
    middle.set(title="Share of all vectors compared, %")
    for name, values in (
        ("index, shared in Redis", [r.p50_seconds for r in results]),
        ("faiss IVF-Flat, in process", [r.faiss_p50_seconds for r in results]),
        ("numpy brute force", [r.bruteforce_p50_seconds for r in results]),
    ):
        right.loglog(sizes, [value * 1e3 for value in values], "o-", label=name)
    right.set(title="ms an image, batches of 64")
    for panel in (left, middle, right):
        panel.set_xlabel("images stored")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
