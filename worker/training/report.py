"""What an evaluation looks like: a table, two plots, two contact sheets. Draws, measures nothing.

The plots need matplotlib, which the `plots` extra brings.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.markup import escape
from rich.table import Table

from worker.errors import ConfigError
from worker.training.attacks import ATTACKS, TIERS
from worker.training.reshots import LeftOut
from worker.training.trial import STRANGERS, Pair, Trial

TILE = 144  # pixels
ACROSS = 4  # pairs in a row of a contact sheet


def table(
    results: dict[str, dict[str, Any]], counts: dict[str, int], left_out: LeftOut | None
) -> Table:
    """A row a contestant for all edits together, and one for each tier; above it, of how many."""
    found = Table(title=_title(counts, left_out))
    found.add_column("")
    found.add_column("edits")
    for head in ("µAP", "R@P0.99", "R@P0.999", "R@1e-6", "strangers hit"):
        found.add_column(head, justify="right")
    for name, result in results.items():
        hit = result.get("strangers_called_duplicates")
        found.add_row(escape(name), "all", *_summary(result), "" if hit is None else f"{hit:.4f}")
        for tier in TIERS:
            found.add_row("", tier, *_summary(result["tiers"][tier]))
        found.add_section()
    return found


def _title(counts: dict[str, int], left_out: LeftOut | None) -> str:
    title = (
        f"{counts['originals']:,} originals, {counts['edits']} edits of each, "
        f"{counts['strangers']:,} strangers; {counts['stored']:,} stored"
    )
    if left_out is None:
        return title
    judge = f"{left_out.judge} ({left_out.model_id})" if left_out.model_id else left_out.judge
    return (
        f"{title}\nwithout {left_out.pairs_of_originals:,} pairs of originals and "
        f"{left_out.pairs_of_strangers:,} of strangers with stored photos "
        f"that {escape(judge)} finds at least {left_out.same_as:g} alike, untouched"
    )


def _summary(result: dict[str, Any]) -> list[str]:
    recalls = ("precision_0.99", "precision_0.999", "false_rate_1e-6")
    return [
        f"{result['micro_average_precision']:.4f}",
        *(f"{result[f'recall_at_{recall}']:.3f}" for recall in recalls),
    ]


def edits_table(results: dict[str, dict[str, Any]]) -> Table:
    """Recall by edit at precision 0.99 and 0.999, and at 1e-6 false matches, of all together."""
    figures = ("", "_at_precision_0.999", "_at_false_rate_1e-6")
    found = Table(title="Recall by edit, at each one's precision 0.99 / 0.999 / false rate 1e-6")
    found.add_column("edit")
    found.add_column("tier")
    for name in results:
        found.add_column(escape(name), justify="right")
    for attack in ATTACKS:
        shares = [
            " / ".join(f"{result[f'recall{at}_by_edit'][attack.name]:.3f}" for at in figures)
            for result in results.values()
        ]
        found.add_row(attack.name, attack.tier, *shares)
    return found


def plot_recall(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars: recall at precision 0.99 by edit."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 8), layout="constrained")
    places, height = np.arange(len(ATTACKS)), 0.8 / len(results)
    for order, (name, result) in enumerate(results.items()):
        shares = [result["recall_by_edit"][attack.name] for attack in ATTACKS]
        axes.barh(places + order * height, shares, height, label=name)
    labels = [f"{attack.name} ({attack.tier})" for attack in ATTACKS]
    axes.set_yticks(places + 0.4 - height / 2, labels)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("recall at precision 0.99")
    axes.set_xlim(0, 1)
    figure.legend(loc="outside upper center", ncols=len(results))
    _store(plt, figure, path)


def plot_scores(trial: Trial, path: Path) -> None:
    """Histograms: similarities of copies by tier, and of the strangers' nearest picture."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    bins = np.linspace(min(0.0, float(trial.true.min())), 1, 101)
    rows = trial.true.reshape(len(ATTACKS), -1)
    for tier in TIERS:
        chosen = rows[[attack.tier == tier for attack in ATTACKS]].ravel()
        axes.hist(chosen, bins, density=True, histtype="step", label=f"copies, {tier}")
    axes.hist(trial.nearest_strangers, bins, density=True, alpha=0.4, label="nearest stranger")
    if trial.threshold is not None:
        axes.axvline(trial.threshold, color="black", linestyle="--", label="threshold")
    axes.set_xlabel("similarity")
    axes.set_ylabel("density")
    axes.legend()
    _store(plt, figure, path)


def plot_calibration(similarity: NDArray[np.float64], threshold: float, path: Path) -> None:
    """Share of pictures whose nearest stranger is at least as similar, and the threshold."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    share = 1 - np.arange(len(similarity)) / len(similarity)
    axes.semilogy(np.sort(similarity), share, drawstyle="steps-pre")
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3f}")
    axes.set_xlabel("similarity of the nearest stranger")
    axes.set_ylabel("share of pictures at or above")
    axes.legend()
    _store(plt, figure, path)


def contact_sheet(pairs: Sequence[Pair], path: Path) -> None:
    """Query and stored picture side by side, edit and similarity under each pair."""
    by_name = {attack.name: attack for attack in ATTACKS}
    rows = -(-len(pairs) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * (2 * TILE + 12), rows * (TILE + 22)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, pair in enumerate(pairs):
        x, y = place % ACROSS * (2 * TILE + 12), place // ACROSS * (TILE + 22)
        query = pair.query.image
        if pair.edit != STRANGERS:
            query = by_name[pair.edit](query, pair.query.sha256)
        for offset, image in ((0, query), (TILE, pair.stored.image)):
            small = image.copy()
            small.thumbnail((TILE, TILE))
            sheet.paste(small, (x + offset, y))
        draw.text((x, y + TILE + 3), f"{pair.score:.3f}  {pair.edit}", font=font, fill="black")
    sheet.save(path)


def pyplot() -> ModuleType:
    """What draws the plots. Raises ConfigError where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install '.[plots]'") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _store(plt: ModuleType, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
