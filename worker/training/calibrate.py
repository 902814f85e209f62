"""Propose the similarity threshold for a wanted rate of false alarms, on one's own pictures.

    python -m worker calibrate --photos photos/ --false-rate 0.001 --stored 100000 --plot out.png

Every picture asks for its nearest stranger, compared as the index compares (int8). The threshold is
where the tail of those similarities meets the wanted rate. Collections hold true copies nobody
knows of, and they sit at the very top; so the tail is fitted below them, between 80 and 95 % of the
pictures, and continued as distances to a nearest neighbour fall: by a power (Levina and Bickel,
2005). The pairs above the threshold are shown for a person to judge.
"""

import argparse
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from worker import vectors, weightfile
from worker.arguments import Parser, check_file, nonempty, share, whole, writing
from worker.embedder import MODES, Embedder, read_weights
from worker.errors import ConfigError
from worker.images import to_pixels
from worker.training import report
from worker.training.photos import Photo, check_held_out, distinct, read_photos, split
from worker.training.trial import AT_THRESHOLD

FEWEST = 200  # pictures; the 95 % point of fewer means little
LOWER, UPPER = 0.80, 0.95  # the part of the tail that is fitted
AT_ONCE = 256


@dataclass(frozen=True)
class Nearest:
    """Nearest stranger of every picture: similarity (n,) and which one (n,)."""

    similarity: NDArray[np.float64]
    stranger: NDArray[np.int64]


@dataclass(frozen=True)
class Proposal:
    """A threshold and what it rests on."""

    threshold: float
    false_rate: float  # wanted share of new pictures called duplicates of a stranger
    stored: int  # pictures in the index it is meant for
    measured: int  # pictures it was measured on
    reached: int  # of those, nearest strangers at or above the threshold


def embed(embedder: Embedder, photos: list[Photo]) -> vectors.Vectors:
    """Embed and round: int8 (n, 128)."""
    rows = []
    for at in range(0, len(photos), AT_ONCE):
        images = [photo.image for photo in photos[at : at + AT_ONCE]]
        pixels = np.stack([to_pixels(image, embedder.input_size) for image in images])
        rows.append(vectors.quantize(embedder.embed_pixels(pixels)))
    return np.concatenate(rows)


def nearest_strangers(asked: vectors.Vectors) -> Nearest:
    """Find each picture's best other picture."""
    similarity, stranger = np.empty(len(asked)), np.empty(len(asked), np.int64)
    for at in range(0, len(asked), AT_ONCE):
        scores = vectors.similarity(asked[at : at + AT_ONCE], asked)
        own = np.arange(len(scores))
        scores[own, at + own] = -2
        stranger[at : at + AT_ONCE] = scores.argmax(1)
        similarity[at : at + AT_ONCE] = scores.max(1)
    return Nearest(similarity, stranger)


def calibrated(
    embedder: Embedder, photos: list[Photo], false_rate: float, stored: int | None
) -> tuple[Proposal, Nearest]:
    """Compare distinct photos with each other and `propose` a threshold: `train`'s, too.

    Raises ConfigError as `propose` does.
    """
    nearest = nearest_strangers(embed(embedder, photos))
    return propose(nearest, false_rate, stored), nearest


def propose(nearest: Nearest, false_rate: float, stored: int | None = None) -> Proposal:
    """Continue the tail to the wanted rate; more stored pictures raise each one's chance in step.

    `stored` defaults to the number measured. Raises ConfigError for fewer than FEWEST pictures, and
    where so many false alarms are wanted that no threshold above 0 gives them.
    """
    count = len(nearest.similarity)
    if count < FEWEST:
        raise ConfigError(f"{count} pictures are too few to calibrate on; {FEWEST} is the least")
    meant = stored or count
    lower, upper = np.quantile(nearest.similarity, [LOWER, UPPER])
    far, close = math.log(max(1e-9, 1 - lower)), math.log(max(1e-9, 1 - upper))
    power = (far - close) / math.log((1 - LOWER) / (1 - UPPER))
    wanted = false_rate * count / meant
    threshold = round(1 - math.exp(close - power * math.log((1 - UPPER) / wanted)), 4)
    if threshold <= 0:
        raise ConfigError(
            f"no threshold above 0 gives as many as {false_rate:g} false alarms a picture among "
            f"{meant:,} stored; lower the rate"
        )
    reached = int((nearest.similarity >= threshold).sum())
    return Proposal(threshold, false_rate, meant, count, reached)


def main(argv: list[str]) -> int:
    """Run the command; the exit status. Raises ConfigError for a wrong argument."""
    arguments = _arguments(argv)
    check_file(arguments.write)
    if arguments.plot:
        check_file(arguments.plot)
        if Path(arguments.plot).suffix.lower() != ".png":
            raise ConfigError(f"{arguments.plot} does not end in .png, which plots are written as")
        report.pyplot()
    about = read_weights(arguments.weights).description  # before what takes long
    if arguments.held_out < 1:
        check_held_out(arguments.weights, about, arguments.held_out)
    photos = distinct(read_photos(arguments.photos))
    if arguments.held_out < 1:
        photos = split(photos, arguments.held_out)[1]
    embedder = Embedder.load(arguments.weights, mode=arguments.mode)
    proposal, nearest = calibrated(embedder, photos, arguments.false_rate, arguments.stored)
    _tell(proposal, nearest, photos, Console())
    if arguments.plot:
        with writing(Path(arguments.plot)):
            report.plot_calibration(nearest.similarity, proposal.threshold, Path(arguments.plot))
    if arguments.write:
        path = Path(arguments.write)
        weightfile.save(path, _with(proposal, embedder.weights))
        print(f"{path}: the same weights with this threshold")
    return 0


def _with(proposal: Proposal, weights: weightfile.Weights) -> weightfile.Weights:
    """The same weights with this threshold, without what was measured at the one before."""
    about = weights.description
    kept = {name: told for name, told in about.evaluation.items() if name not in AT_THRESHOLD}
    evaluation = {**kept, "calibration": asdict(proposal)}
    about = replace(about, threshold=proposal.threshold, evaluation=evaluation)
    return replace(weights, description=about)


def _tell(proposal: Proposal, nearest: Nearest, photos: list[Photo], console: Console) -> None:
    console.print(
        f"threshold [bold]{proposal.threshold:.4f}[/] for {proposal.false_rate:g} false alarms a "
        f"picture among {proposal.stored:,} stored (measured on {proposal.measured:,})",
        soft_wrap=True,
    )
    above = np.flatnonzero(nearest.similarity >= proposal.threshold)
    console.print(f"{len(above)} of these pictures reach it; the closest, to be judged by eye:")
    pairs = {  # two that are each other's nearest are one pair
        frozenset((int(place), int(nearest.stranger[place]))): float(nearest.similarity[place])
        for place in above
    }
    for pair, similarity in sorted(pairs.items(), key=lambda told: -told[1])[:20]:
        names = "  ".join(photos[place].name for place in sorted(pair))
        line = f"  {similarity:.4f}  {names}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m worker calibrate", description=_SUMMARY)
    parser.add_argument("--photos", nargs="+", required=True, help="folders or tar files")
    about = "default, imagenet or a file"
    parser.add_argument("--weights", type=nonempty, default="default", help=about)
    parser.add_argument("--mode", choices=MODES, default="auto", help="embedding mode")
    parser.add_argument(
        "--false-rate", type=share(0, 0.5), default=0.001, help="false alarms a new picture"
    )
    parser.add_argument(
        "--stored", type=whole(1), help="pictures the index will hold (default: these)"
    )
    parser.add_argument(
        "--held-out", type=share(0, 1), default=1.0, help="use the share training did not see"
    )
    parser.add_argument("--plot", help="draw the share of pictures by nearest stranger (PNG)")
    parser.add_argument("--write", help="write the weights with the new threshold to this file")
    return parser.parse_args(argv)


_SUMMARY = "Propose the threshold for a wanted rate of false alarms, on one's own pictures."
