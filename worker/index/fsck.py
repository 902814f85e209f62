"""`python -m worker fsck`: check every invariant of the index.

Owns the command and the order of a pass; what must hold is in the `fsck_` files beside it. It reads
only. Beside workers a pass sees changes half done: what it finds counts once other passes have
found it, too, so its words say nothing that goes on changing. It must not know how the index came
to be what it is.
"""

import sys

from worker import flags
from worker.arguments import Parser, nonempty
from worker.connections import RedisSettings
from worker.index.fsck_clusters import check_clusters
from worker.index.fsck_images import check_images
from worker.index.fsck_lookups import check_lists, check_lookups
from worker.index.fsck_notes import Notes
from worker.index.fsck_roots import counters, generations, namespaces
from worker.index.keys import Keys
from worker.index.store import Store
from worker.index.strays import check_names
from worker.storage import connect

PASSES = 3
"""A finding is reported when each of so many passes has it."""


def check(store: Store, namespace: str) -> list[str]:
    """Check what answers and what is being built; [] when everything holds.

    On a namespace in use one pass may find changes in progress: only what all passes find counts.
    """
    found = _findings(store, namespace)
    for _ in range(PASSES - 1):
        if found:
            again = set(_findings(store, namespace))
            found = [each for each in found if each in again]
    return found


def _findings(store: Store, namespace: str) -> list[str]:
    roles, found = generations(store, namespace)
    for role, keys in roles.items():
        said = "being built: " if role == "building" else ""
        found += [f"{said}{problem}" for problem in _check(store, keys)]
    return found


def _check(store: Store, keys: Keys) -> list[str]:
    """One pass over one generation. Where a key is of a wrong type nothing else is looked at."""
    mistyped, strays = check_names(store, keys)
    if mistyped:
        return mistyped
    counted, problems = counters(store, keys)
    if counted is None:
        return problems
    notes = Notes(store, keys, counted)
    notes.say(*strays)
    check_clusters(notes)
    check_images(notes)
    check_lookups(notes)
    check_lists(notes)
    return notes.result()


def main(argv: list[str]) -> int:
    """Check one namespace or all; exit status 1 when something does not hold."""
    parser = Parser(
        prog="python -m worker fsck",
        description="Check every invariant of the index: each line names one that does not hold.",
    )
    parser.add_argument("--namespace", type=nonempty, help="only this one (default: all)")
    flags.add_flags(parser, RedisSettings)
    args = parser.parse_args(argv)
    store = Store(connect(flags.from_flags(RedisSettings, args)))
    names, problems = ([args.namespace], []) if args.namespace else namespaces(store)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not names:
        print("no namespace is known")
    bad = len(problems)
    for namespace in names:
        problems = check(store, namespace)
        bad += len(problems)
        for problem in problems:
            print(f"{namespace}: {problem}", file=sys.stderr)
        print(f"{namespace}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
    return 1 if bad else 0
