"""The house rules that a reader of imports can check."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE_IN_FILES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

# What each module of the stream may import of the project; nothing else, so imports go one way.
MAY_IMPORT = {
    "errors": set(),
    "wellformed": {"messages"},
    "arguments": {"errors"},
    "connections": {"wellformed"},
    "config": {"connections", "wellformed"},
    "flags": {"config", "connections", "errors"},
    "messages": {"errors"},
    "metrics": set(),
    "logs": set(),
    "health": set(),
    "offsets": set(),
    "lanes": {"offsets"},
    "reading": {"threads"},
    "threads": set(),
    "vectors": set(),
    "decide": {"messages"},
    "images": {"errors"},
    "network": set(),
    "weightfile": {"errors", "network"},
    "decoder_memory": set(),
    "decoder_child": {"decoder_memory", "errors", "images"},
    "decoder_process": {"decoder_child", "decoder_memory", "errors", "images"},
    "decoding": {"decoder_memory", "decoder_process", "errors", "images", "threads"},
    "source_policy": {"errors", "wellformed"},
    "source_network": {"errors", "source_policy"},
    "source_http": {"errors", "source_network", "source_policy"},
    "source_file": {"errors", "source_policy"},
    "sources": {"errors", "source_file", "source_http", "source_policy", "source_s3"},
    "storage": {"connections", "errors"},
    "retrying": {"errors"},
    "jobs": {"errors", "index", "messages", "offsets"},
    "resolving": {"decide", "errors", "index", "jobs", "messages", "metrics", "retrying"},
    "pipeline": {
        "errors",
        "index",
        "jobs",
        "lanes",
        "messages",
        "metrics",
        "reading",
        "resolving",
        "retrying",
        "threads",
        "vectors",
    },
    "header_names": set(),
    "inflating": {"errors", "header_names", "messages"},
    "membership": set(),
    "prefetched": {"messages"},
    "receiving": set(),
    "connecting": {"errors", "receiving"},
    "broker": {
        "config",
        "connecting",
        "errors",
        "inflating",
        "membership",
        "messages",
        "offsets",
        "prefetched",
        "topics",
    },
    "topics": set(),
    "publishing": {"broker", "config", "connecting", "connections", "errors"},
    "assignment": {"jobs", "messages", "metrics", "offsets"},
    "outbox": {
        "assignment",
        "broker",
        "config",
        "errors",
        "jobs",
        "lanes",
        "messages",
        "metrics",
        "publishing",
        "retrying",
        "threads",
    },
    "loop": {
        "assignment",
        "broker",
        "config",
        "errors",
        "messages",
        "metrics",
        "outbox",
        "pipeline",
        "retrying",
    },
}


def project_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "worker":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
            elif parts[0] in ("producer", "deploy", "tests"):
                found.add(parts[0])
    return found


def test_imports_go_one_way() -> None:
    for module, allowed in MAY_IMPORT.items():
        imported = project_imports(ROOT / "worker" / f"{module}.py")
        assert imported <= allowed, (module, imported - allowed)


def environment_reads(path: Path) -> int:
    """Mentions of the environment, but for assignments such as os.environ["X"] = "1"."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    mentions = [
        n for n in nodes if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")
    ]
    written = {
        id(n.value) for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store)
    }
    return sum(id(n) not in written for n in mentions)


def test_only_config_reads_the_environment() -> None:
    for package in ("worker", "producer"):
        for path in (ROOT / package).rglob("*.py"):
            if path != ROOT / "worker" / "config.py":
                assert environment_reads(path) == 0, path


def test_nothing_is_unpickled() -> None:
    """What a file may hold is data, never code: weights are safetensors."""
    for package in ("worker", "producer", "deploy"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text())
            assert not imported_modules(tree) & CODE_IN_FILES, path
            for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                # The trainer's own state, and torchvision's ImageNet weights.
                if ast.unparse(call.func).endswith(("torch.load", ".get_state_dict")):
                    assert given.get("weights_only") == "True", path
                assert given.get("allow_pickle", "False") == "False", path


def imported_modules(tree: ast.Module) -> set[str]:
    """The first parts of the names of all modules."""
    nodes = list(ast.walk(tree))
    found = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
    found += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in found}
