"""Average two trainings of one network: weights in, weights out.

    python -m worker average FIRST SECOND --share 0.5 --photos photos/ --out w.safetensors

A training that goes on from other weights, against harder strangers or on other photos, forgets
some of what those did well. Half way between the two lies a network that often does better than
either (Wortsman et al., 2022, "Robust fine-tuning of zero-shot models"), at the price of one.
Statistics and whitening are measured anew on the photos, and the ones set aside calibrate and
measure the result, as at the end of `train`.
"""

import argparse
from pathlib import Path

from torch import Tensor

from worker.arguments import Parser, check_file, nonempty, share, whole
from worker.embedder import pick_device, read_weights
from worker.errors import ConfigError
from worker.training.photos import check_held_out, distinct, read_photos, split
from worker.training.run import Recipe, Run
from worker.training.settling import settle
from worker.training.train import check_numbers, finish
from worker.training.views import Views
from worker.weightfile import Weights


def main(argv: list[str]) -> int:
    """Run the command; the exit status. Raises ConfigError for a wrong argument."""
    arguments = _arguments(argv)
    check_file(arguments.out)
    first, second = read_weights(arguments.first), read_weights(arguments.second)
    if first.description.input_size != second.description.input_size:
        raise ConfigError("weights for pictures of different sizes have no average")
    check_held_out(arguments.first, first.description, arguments.held_out)
    check_held_out(arguments.second, second.description, arguments.held_out)
    recipe = Recipe(
        size=second.description.input_size, held_out=arguments.held_out, seed=arguments.seed
    )
    kept, held_out = split(read_photos(arguments.photos), recipe.held_out)
    held_out = distinct(held_out)
    check_numbers(kept, held_out, 1)
    run = Run(recipe, pick_device(arguments.device))
    run.start_from(averaged(first, second, arguments.share))
    settle(run, Views(kept, recipe.size, recipe.seed, recipe.objective, recipe.reshots), kept)
    parents = {weights.model_id(): weights.description.training for weights in (first, second)}
    training = {"average_of": parents, "share": arguments.share, "held_out": recipe.held_out}
    finish(run, held_out, Path(arguments.out), training)
    return 0


def averaged(first: Weights, second: Weights, share_of_second: float) -> Weights:
    """Every number between those of two weights; 0 is the first, 1 the second."""

    def between(name: str) -> Tensor:
        return first.tensors[name].lerp(second.tensors[name], share_of_second)

    return Weights({name: between(name) for name in first.tensors}, second.description)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m worker average", description=_SUMMARY)
    about = "default, imagenet or a file"
    parser.add_argument("first", type=nonempty, help=about)
    from_where = f"{about}; begun with the first, or with what it began with"
    parser.add_argument("second", type=nonempty, help=from_where)
    parser.add_argument("--share", type=share(0, 1), default=0.5, help="of the second")
    parser.add_argument("--photos", nargs="+", required=True, help="folders or tar files")
    parser.add_argument("--out", required=True, help="weights file")
    parser.add_argument("--held-out", type=share(0, 1), default=0.08, help="set aside, by SHA-256")
    parser.add_argument("--seed", type=whole(0), default=0, help="decides views to measure on")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    return parser.parse_args(argv)


_SUMMARY = "Average two trainings of one network."
