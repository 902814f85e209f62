"""`python -m worker audit`: compare the index with brute force on a sample, on demand.

Owns the command, and where it takes the threshold from; `auditing` does it. It must not know how an
audit runs in a worker.
"""

from worker import flags
from worker.arguments import Parser, between, nonempty, whole
from worker.config import Settings
from worker.embedder import read_weights
from worker.errors import ConfigError
from worker.index.auditing import Audit
from worker.index.keys import Keys
from worker.index.settings import index_settings
from worker.index.space import Space, serving_keys
from worker.index.store import Store
from worker.storage import connect


def main(argv: list[str]) -> int:
    """Audit one namespace; exit status 1 when recall lies below `--at-least`."""
    parser = Parser(
        prog="python -m worker audit",
        description="Compare a sample of stored images with every other one of their namespace, "
        "and tell which share of the duplicates there are the index finds.",
    )
    parser.add_argument("--namespace", type=nonempty, default="default", help="which one [default]")
    parser.add_argument("--sample", type=whole(1), default=200, help="images to compare [200]")
    parser.add_argument(
        "--at-least", type=between(0, 1), default=0.0, help="exit with 1 below this recall [0]"
    )
    flags.add_flags(parser, Settings)
    args = parser.parse_args(argv)
    settings = flags.from_flags(Settings, args)
    store = Store(connect(settings))
    keys = serving_keys(store, args.namespace)
    threshold = settings.threshold or _threshold(store, keys, settings.weights)
    space = Space(store, keys)
    result = Audit(store, space, index_settings(settings, threshold), args.sample).run()
    recall = f"recall {result.recall:.4f}" if result.duplicates else "there was nothing to find"
    print(
        f"{args.namespace}: {result.sampled} images compared with all others; "
        f"{result.duplicates} repeat an earlier one; the index finds {result.found}: {recall}"
    )
    return 1 if result.recall < args.at_least else 0  # NaN, nothing to find, is not below


def _threshold(store: Store, keys: Keys, weights: str) -> float:
    """The threshold of the weights; raises ConfigError when others filled the namespace."""
    loaded = read_weights(weights)
    filled = store.command("HGET", keys.root, f"model:{keys.generation}") or b"?"
    model = filled.decode(errors="replace")
    if model != loaded.model_id():
        raise ConfigError(
            f"namespace {keys.namespace!r} was filled by model {model}, whose threshold the "
            f"weights {weights!r} do not tell: give its own with --weights, or --threshold"
        )
    return loaded.description.threshold
