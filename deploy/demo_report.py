"""Shows the demo's results: a table in the terminal and one self-contained HTML page.

Owns what is counted and how it looks; must not know how the results came about.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from string import Template

from PIL import Image
from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.table import Table

from deploy.demo_photos import Kind, Sample
from deploy.demo_results import Outcome, Results, judge
from worker.errors import EventError
from worker.images import ImageLimits, open_rgb

THUMBNAIL_PIXELS = 220
MISTAKES_PRINTED = 10
MOST_SHOWN = 300  # of each section, or the page of a large folder could not be opened
PAGE = Path(__file__).parent / "demo_report.html"


@dataclass
class Report:
    """What happened, where the files are, and the truth where it is known.

    `said` is what processes logged that did not do all they had to.
    """

    results: Results
    paths: Mapping[str, Path]
    truth: Mapping[str, Sample] | None
    said: str = ""
    thumbnails: dict[str, str] = field(default_factory=dict)

    @cached_property
    def mistakes(self) -> dict[str, str]:
        """Image id → what is wrong with its outcome; empty without a truth."""
        if self.truth is None:
            return {}
        judged = {i: judge(o, self.truth) for i, o in self.results.outcomes.items()}
        return {image_id: mistake for image_id, mistake in judged.items() if mistake}

    def kind(self, image_id: str) -> str:
        """What was done to the image, where that is known."""
        return str(self.truth[image_id].kind) if self.truth else ""

    def original_of(self, outcome: Outcome) -> str | None:
        """The image to show beside it: what it repeats by verdict, else by truth, else by look."""
        if outcome.duplicate_of is not None:
            return outcome.duplicate_of
        sample = self.truth.get(outcome.image_id) if self.truth else None
        if self.truth and sample and sample.kind not in (Kind.ORIGINAL, Kind.NEW):
            for image_id, other in self.truth.items():
                if other.photo == sample.photo and other.kind is Kind.ORIGINAL:
                    return image_id
        return outcome.best_match


def summary(report: Report) -> list[tuple[str, str]]:
    """The rows of the table: name and value."""
    results = report.results
    rows = [("events", str(results.events))]
    rows += [(f"verdict {name}", str(count)) for name, count in sorted(results.verdicts.items())]
    rows += [
        (f"dead letter {name}", str(count)) for name, count in sorted(results.dead_letters.items())
    ]
    if results.missing:
        rows.append(("no answer", str(results.missing)))
    if results.surplus:
        rows.append(("answers repeated", str(results.surplus)))
    if report.truth is not None:
        right = len(results.outcomes) - len(report.mistakes)
        rows += [("right", str(right)), ("wrong", str(len(report.mistakes)))]
    return [
        *rows,
        ("images a second", f"{results.rate():.0f}"),
        ("event to verdict, p50", f"{results.latency(0.5):.2f} s"),
        ("event to verdict, p99", f"{results.latency(0.99):.2f} s"),
    ]


def by_kind(report: Report) -> list[tuple[str, int, int]]:
    """For each kind of edit: its name, how many were judged right, and how many there were."""
    if report.truth is None:
        return []
    rows = []
    for kind in Kind:
        ids = [i for i in report.results.outcomes if report.truth[i].kind is kind]
        rows.append((str(kind), sum(i not in report.mistakes for i in ids), len(ids)))
    return rows


def print_table(report: Report, console: Console) -> None:
    """Print the summary, what each kind of edit gave, and each mistake in a line."""
    table = Table(title="What the stream held", show_header=False, box=box.SQUARE)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for row in summary(report):
        table.add_row(*row)
    tables = [table]
    if report.truth is not None:
        kinds = Table(title="Right by the known truth", box=box.SQUARE)
        for name in ("what it was", "right", "of"):
            kinds.add_column(name, justify="left" if name.startswith("what") else "right")
        for name, right, count in by_kind(report):
            kinds.add_row(name, str(right), str(count))
        tables.append(kinds)
    console.print(Columns(tables, padding=(0, 2)))
    mistakes = sorted(report.mistakes.items())
    if mistakes:
        console.print("Not as they should be:")
    for image_id, mistake in mistakes[:MISTAKES_PRINTED]:
        line = f"{image_id}: {mistake}"
        console.print(line, markup=False, style="yellow", highlight=False, soft_wrap=True)
    if len(mistakes) > MISTAKES_PRINTED:
        console.print(f"and {len(mistakes) - MISTAKES_PRINTED} more, all in the report")
    if report.said:
        console.print(report.said, markup=False, highlight=False, style="yellow", soft_wrap=True)


def write_report(report: Report, path: Path) -> None:
    """Write the page; thumbnails are data URIs, so the file stands alone."""
    outcomes = report.results.outcomes.values()
    mistaken = [o for o in outcomes if o.image_id in report.mistakes]
    repeats = sorted(
        (o for o in outcomes if o.duplicate_of and o.image_id not in report.mistakes),
        key=lambda o: (o.similarity or 0.0, o.image_id),
    )
    near = sorted(
        (o for o in outcomes if o.verdict == "unique" and o.best_match is not None),
        key=lambda o: -o.matches[o.best_match or ""],
    )
    near = [o for o in near if o.image_id not in report.mistakes][:12]
    sections = [
        _section(
            "Mistakes",
            "What the known truth says otherwise.",
            _pairs(report, mistaken),
            "None: every answer agrees with the known truth." if report.truth else "",
        ),
        _section(
            "Repeats found",
            "Left what was there first, right what came later; the least similar first.",
            _pairs(report, repeats),
            "None.",
        ),
        _section(
            "Near, yet judged unique",
            "The most similar pairs below the threshold.",
            _pairs(report, near),
            "",
        ),
        _dead_letters([o for o in outcomes if o.reason]),
    ]
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        tiles="".join(_tile(name, value) for name, value in summary(report)),
        kinds=_kinds(report),
        sections="".join(sections),
    )
    path.write_text(page, encoding="utf-8")


def _tile(name: str, value: str) -> str:
    tone = {"wrong": "bad", "no answer": "bad", "right": "good"}.get(name, "")
    return f'<div class="tile {tone}"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def _kinds(report: Report) -> str:
    return "".join(
        f'<div class="kind"><span>{escape(name)}</span>'
        f'<i><i style="width:{100 * right / count:.1f}%"></i></i><b>{right}/{count}</b></div>'
        for name, right, count in by_kind(report)
        if count
    )


def _section(title: str, about: str, cards: str, empty: str) -> str:
    if not cards and not empty:
        return ""
    body = f'<p class="about">{about}</p><div class="pairs">{cards}</div>' if cards else ""
    return f"<section><h2>{title}</h2>{body or f'<p class=about>{empty}</p>'}</section>"


def _pairs(report: Report, outcomes: Sequence[Outcome]) -> str:
    cards = "".join(_pair(report, outcome) for outcome in outcomes[:MOST_SHOWN])
    return cards + _further(len(outcomes))


def _further(count: int) -> str:
    return f"<p>and {count - MOST_SHOWN} more</p>" if count > MOST_SHOWN else ""


def _pair(report: Report, outcome: Outcome) -> str:
    other = report.original_of(outcome)
    mistake = report.mistakes.get(outcome.image_id, "")
    similarity = outcome.matches.get(other, outcome.similarity) if other else None
    shown = "not among the matches" if similarity is None else f"{similarity:.3f}"
    notes = [outcome.verdict or outcome.reason, report.kind(outcome.image_id)]
    label = " · ".join(escape(note) for note in notes if note)
    width = max(0.0, min(1.0, similarity or 0.0)) * 100
    return (
        f'<article class="{"bad" if mistake else ""}"><div class="two">'
        f"{_picture(report, other)}{_picture(report, outcome.image_id)}</div>"
        f'<div class="meter"><i style="width:{width:.1f}%"></i>'
        f'<u style="left:{outcome.threshold * 100:.1f}%"></u></div>'
        f"<p><b>{shown}</b> <span>{label}</span></p>"
        + (f'<p class="mistake">{escape(mistake)}</p>' if mistake else "")
        + "</article>"
    )


def _picture(report: Report, image_id: str | None) -> str:
    if image_id is None:
        return '<figure><div class="none">no match</div></figure>'
    if image_id not in report.thumbnails:
        report.thumbnails[image_id] = _thumbnail(report.paths.get(image_id))
    source = report.thumbnails[image_id]
    image = f'<img src="{source}" alt="" loading="lazy">' if source else '<div class="none">?</div>'
    name = escape(image_id.rpartition("/")[2])
    return f'<figure>{image}<figcaption title="{escape(image_id)}">{name}</figcaption></figure>'


def _thumbnail(path: Path | None) -> str:
    """A small JPEG as a data URI; empty for a file that cannot be shown."""
    if path is None or not path.is_file():
        return ""
    try:
        image = open_rgb(path.read_bytes(), ImageLimits(), THUMBNAIL_PIXELS)
    except EventError:
        return ""
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    small = io.BytesIO()
    image.save(small, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()


def _dead_letters(outcomes: Sequence[Outcome]) -> str:
    rows = "".join(
        f"<tr><td>{escape(o.image_id)}</td><td>{escape(o.reason)}</td>"
        f"<td>{escape(o.detail)}</td></tr>"
        for o in sorted(outcomes, key=lambda o: o.image_id)[:MOST_SHOWN]
    )
    if not rows:
        return ""
    head = "<tr><th>image</th><th>reason</th><th>detail</th></tr>"
    table = f"<table>{head}{rows}</table>"
    return f"<section><h2>Dead letters</h2>{table}{_further(len(outcomes))}</section>"
