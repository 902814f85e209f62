"""Train the embedder: photos in, weights out.

    python -m worker train --photos clothing.tar photos/ --out weights.safetensors --minutes 60
    python -m worker train --photos DIR --out w.safetensors --steps 2000 --objective rotation

Stop it at any time; the same command with --resume goes on from the last checkpoint, and without
it refuses to overwrite that. With --steps an interrupted run ends with the same weights as an
uninterrupted one; with --minutes the schedule follows the clock. The photos set aside
calibrate the threshold and measure the result.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from worker.arguments import Parser, check_file, nonempty, share, whole, writing
from worker.embedder import pick_device, read_weights
from worker.errors import ConfigError
from worker.training.calibrate import FEWEST, calibrated
from worker.training.contestants import Embedded
from worker.training.evaluate import arrange
from worker.training.lookalikes import look_alikes
from worker.training.photos import (
    Photo,
    check_held_out,
    distinct,
    fingerprint,
    read_photos,
    split,
)
from worker.training.run import Recipe, Run
from worker.training.settling import settle
from worker.training.trial import figures, run_trial
from worker.training.views import Views, batches
from worker.weightfile import save

FALSE_RATE = 0.001  # strangers called duplicates, which the threshold is set for
STORED = 10_000  # pictures in the index, likewise
CURVE_EVERY = 50  # steps


def main(argv: list[str]) -> int:
    """Run the command; the exit status. Raises ConfigError for a wrong argument."""
    arguments = vars(_arguments(argv))
    out = Path(arguments["out"])
    check_file(arguments["out"])
    checkpoint = beside(out, ".checkpoint")
    for path in (checkpoint, beside(out, ".curve.jsonl")):
        check_file(str(path))
    if arguments["resume"] and not checkpoint.is_file():
        raise ConfigError(f"there is no {checkpoint} to resume from")
    if not arguments["resume"] and checkpoint.exists():
        raise ConfigError(
            f"{checkpoint} of an earlier run is there: --resume goes on with it; "
            "to begin anew, remove it or choose another --out"
        )
    device = pick_device(arguments["device"])
    start = None if arguments["start"] is None else read_weights(arguments["start"])
    if start is not None:
        check_held_out(arguments["start"], start.description, arguments["held_out"])
    kept, held_out = split(read_photos(arguments["photos"]), arguments["held_out"])
    held_out = distinct(held_out)
    settings = {field.name: arguments[field.name] for field in fields(Recipe)}
    known = {"start": start and start.model_id(), "photos": fingerprint(kept)}
    recipe = Recipe(**{**settings, **known})
    check_numbers(kept, held_out, recipe.batch)
    run = Run(recipe, device)
    if start is not None:
        run.start_from(start)
    if arguments["resume"]:
        run.load(checkpoint)
    views = Views(kept, recipe.size, recipe.seed, recipe.objective, recipe.reshots)
    follow(run, views, out, arguments["processes"], arguments["save_every"])
    settle(run, views, kept)
    finish(run, held_out, out)
    return 0


def beside(out: Path, suffix: str) -> Path:
    """Another file of the run that writes the weights `out`, in the same folder."""
    # What follows a dot may be part of the name, as in model-1.0.
    stem = out.stem if out.suffix == ".safetensors" else out.name
    return out.with_name(stem + suffix)


def check_numbers(kept: list[Photo], held_out: list[Photo], batch: int) -> None:
    """Raise ConfigError where photos are too few."""
    if len(kept) < batch or len(held_out) < FEWEST:
        raise ConfigError(
            f"{len(kept)} photos to train on and {len(held_out)} held out are too few: "
            f"{batch} (a batch) and {FEWEST} (to calibrate) are the least"
        )


def follow(run: Run, views: Views, out: Path, processes: int, save_every: int) -> None:
    """Run to the end of the schedule, with a progress bar, a curve and checkpoints.

    A run that was taken up continues its curve from the checkpoint on, another one begins the file
    anew. Raises ConfigError where a file cannot be written.
    """
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    curve, checkpoint = beside(out, ".curve.jsonl"), beside(out, ".checkpoint")
    told = curve.read_text().splitlines(keepends=True) if curve.is_file() else []
    _append(curve, "".join(told[: run.step // CURVE_EVERY]), "w")
    with Progress(*columns) as bar:
        task = bar.add_task("train", total=1.0)
        for loss, rate in steps(run, views, processes):
            about = f"step {run.step}  loss {loss:.3f}  {rate:.0f} views/s"
            bar.update(task, completed=run.progress(), description=about)
            if run.step % CURVE_EVERY == 0:
                point = {"step": run.step, "seconds": run.seconds, "loss": loss, "rate": rate}
                _append(curve, json.dumps(point) + "\n")
            if run.step % save_every == 0:
                run.save(checkpoint)
    run.save(checkpoint)


def _append(path: Path, text: str, mode: str = "a") -> None:
    with writing(path), path.open(mode) as stream:
        stream.write(text)


def steps(run: Run, views: Views, processes: int) -> Iterator[tuple[float, float]]:
    """Yield (loss, views per second) after every step, until the schedule ends."""
    while run.progress() < 1:
        views.resize(run.size())
        if run.due():
            run.know(look_alikes(run, views.photos))
        views.bring_together(run.near, run.recipe.alike)
        stream = batches(views, run.recipe.batch, run.step, processes)
        while run.progress() < 1 and run.size() == views.size and not run.due():
            started = time.monotonic()
            pixels, labels = next(stream)
            loss = run.train(pixels, labels)
            seconds = time.monotonic() - started
            run.seconds += seconds
            yield loss, pixels.shape[0] * pixels.shape[1] / seconds


def finish(
    run: Run, held_out: list[Photo], out: Path, training: dict[str, Any] | None = None
) -> None:
    """Calibrate and evaluate on the photos set aside, and write the weights.

    `training` says how they came about, where that was not by this run's steps.

    The threshold is the one `calibrate --held-out --stored` proposes for these photos. Nothing is
    at `out` before all is measured. Raises ConfigError where it cannot be written.
    """
    draft = beside(out, ".draft")  # measured as it is read: rounded
    try:
        save(draft, run.weights(1.0, {}, training))
        who = Embedded("held out", str(draft), "fp32", rounded=True)
    finally:
        draft.unlink(missing_ok=True)
    proposal, _ = calibrated(who.embedder, held_out, FALSE_RATE, STORED)
    who.threshold = proposal.threshold
    found = figures(run_trial(who, arrange(held_out, [], 300, 1.0), lambda: None))
    measured = {"calibration": asdict(proposal), **found}
    save(out, run.weights(proposal.threshold, measured, training))
    score = found["micro_average_precision"]
    print(f"{out}: threshold {proposal.threshold}, held-out µAP {score:.4f}")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m worker train", description=_SUMMARY)
    parser.add_argument("--photos", nargs="+", required=True, help="folders or tar files")
    parser.add_argument("--out", required=True, help="weights file; checkpoint and curve beside it")
    parser.add_argument(
        "--start", type=nonempty, help="fine-tune these weights: default, imagenet or a file"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--processes", type=whole(0), default=1, help="processes that make views")
    parser.add_argument(
        "--save-every", type=whole(1), default=100, help="steps between checkpoints"
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=whole(1), help="length of the run in steps")
    length.add_argument("--minutes", type=share(0, math.inf), help="length of the run by the clock")
    choices = ("contrastive", "rotation")
    parser.add_argument("--objective", choices=choices, default="contrastive", help="what to learn")
    for option in (field for field in fields(Recipe) if field.metadata):
        flag = "--" + option.name.replace("_", "-")
        parser.add_argument(flag, default=option.default, **option.metadata)
    return parser.parse_args(argv)


_SUMMARY = "Train the embedder: photos in, weights out."
