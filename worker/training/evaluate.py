"""Measure copy detection: the attack suite against an index full of other pictures.

    python -m worker evaluate --photos held-out/ --distractors more.tar --against phash,pdq
    python -m worker evaluate --photos clothing.tar --held-out 0.08 --weights mine.safetensors

Half of the photos are originals (their edited copies are the queries, they are stored), half are
strangers (queries only); distractors are stored. The same files and weights give the same
report, whatever the files are called.

The table gives µAP, recall at precision 0.99 and 0.999, and recall where one comparison in a
million is a false hit, over all edits and by tier. A tier is ranked by itself; recall by edit is at
the thresholds of all edits together. `--json` writes all that and more; a threshold is null there
where none is precise enough (it never holds NaN or Infinity).

Collections photograph one thing twice, and such pairs count as false hits for everyone. `--same-as
0.6` leaves out those that the weights under evaluation, and no other contestant, find so similar;
the share of strangers called duplicates still counts them.
"""

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from worker.arguments import Parser, check_file, check_folder, nonempty, share, whole, writing
from worker.errors import ConfigError
from worker.training import report
from worker.training.attacks import ATTACKS
from worker.training.contestants import Contestant, Embedded, contestant
from worker.training.photos import (
    Photo,
    check_held_out,
    distinct,
    each_picture_once,
    read_photos,
    split,
    without_pictures_of,
)
from worker.training.reshots import LeftOut, without_reshots
from worker.training.trial import Pictures, Trial, figures, run_trial


def arrange(
    photos: list[Photo], distractors: list[Photo], originals: int, held_out: float
) -> Pictures:
    """Choose the roles and their order by SHA-256, so neither names nor order of the files matter.

    With `held_out` below 1 only the photos a trainer with that share set aside are asked about; the
    others are stored as distractors. Photos that show the same picture as a query under other
    bytes are left out. Raises ConfigError when too few photos or no strangers remain.
    """
    trained_on, asked = split(photos, held_out) if held_out < 1 else ([], photos)
    asked = distinct(asked)
    count = min(originals, len(asked) // 2)
    if count < 2:
        raise ConfigError(f"{len(asked)} photos are too few to evaluate on; 4 is the least")
    taken = {photo.sha256 for photo in asked}
    stored = distinct(trained_on + distractors)
    rest = [photo for photo in stored if photo.sha256 not in taken]
    known = each_picture_once(asked[:count])
    strangers = without_pictures_of(asked[count:], known)
    if not strangers:
        raise ConfigError(
            "every photo but the originals repeats one of them: no strangers are left"
        )
    return Pictures(known, strangers, without_pictures_of(rest, known + strangers))


def evaluate(who: list[Contestant], pictures: Pictures, console: Console) -> list[Trial]:
    """Run every contestant through the suite."""
    trials = []
    with Progress(console=console, transient=True) as bar:
        for each in who:
            task = bar.add_task(escape(each.name), total=len(ATTACKS) + 2)
            trials.append(run_trial(each, pictures, partial(bar.advance, task)))
    return trials


def main(argv: list[str]) -> int:
    """Run the command; the exit status. Raises ConfigError for a wrong argument."""
    arguments = _arguments(argv)
    check_file(arguments.json)
    if arguments.out:
        check_folder(arguments.out)
        report.pyplot()
    rivals = map(str.strip, arguments.against.split(","))
    who = [contestant(spec) for spec in (arguments.weights, *filter(None, rivals))]
    for each in who:
        if arguments.held_out < 1 and isinstance(each, Embedded):
            check_held_out(each.weights, each.embedder.description, arguments.held_out)
    others = read_photos(arguments.distractors) if arguments.distractors else []
    photos = read_photos(arguments.photos)
    pictures = arrange(photos, others, arguments.originals, arguments.held_out)
    left_out: LeftOut | None = None
    if arguments.same_as is not None:
        pictures, left_out = without_reshots(pictures, who[0], arguments.same_as)
    console = Console()
    trials = evaluate(who, pictures, console)
    results = {trial.name: figures(trial) for trial in trials}
    document = _document(pictures, left_out, results)
    console.print(report.table(results, document["pictures"], left_out))
    console.print(report.edits_table(results))
    if arguments.json:
        with writing(Path(arguments.json)):
            Path(arguments.json).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    if arguments.out:
        with writing(Path(arguments.out)):
            _draw(trials, results, Path(arguments.out))
    return 0


def _document(
    pictures: Pictures, left_out: LeftOut | None, results: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    counts = {
        "originals": len(pictures.originals),
        "strangers": len(pictures.strangers),
        "stored": len(pictures.stored),
        "edits": len(ATTACKS),
    }
    told = None if left_out is None else asdict(left_out)
    return {"pictures": counts, "left_out": told, "results": results}


def _draw(trials: list[Trial], results: dict[str, dict[str, Any]], folder: Path) -> None:
    report.plot_recall(results, folder / "recall-by-edit.png")
    report.plot_scores(trials[0], folder / "scores.png")
    report.contact_sheet(trials[0].misses, folder / "worst-misses.png")
    report.contact_sheet(trials[0].false_hits, folder / "worst-false-hits.png")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m worker evaluate", description=_SUMMARY)
    parser.add_argument("--photos", nargs="+", required=True, help="folders or tar files")
    parser.add_argument("--distractors", nargs="+", help="folders or tar files, stored only")
    about = "default, imagenet or a file; @MODE or @float after it"
    parser.add_argument("--weights", type=nonempty, default="default", help=about)
    parser.add_argument(
        "--against",
        default="",
        help="others, with commas: phash,dhash,pdq,efficientnet-lite0,imagenet,rotation, a file",
    )
    parser.add_argument(
        "--originals", type=whole(2), default=300, help="at most so many (default 300)"
    )
    parser.add_argument(
        "--held-out",
        type=share(0, 1),
        default=1.0,
        help="ask only about this share, as train set aside",
    )
    parser.add_argument(
        "--same-as",
        type=share(-1, 1),
        metavar="COSINE",
        help="leave out pairs of untouched photos that --weights finds at least so similar",
    )
    parser.add_argument("--json", help="write every figure to this file")
    parser.add_argument("--out", help="write plots and contact sheets into this folder")
    return parser.parse_args(argv)


_SUMMARY = "Measure copy detection: the attack suite against an index of other pictures."
