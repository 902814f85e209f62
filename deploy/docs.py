"""Writes the tables of the documentation that code knows best: settings and metrics.

`python -m deploy.docs` rewrites them in place, between `<!-- NAME -->` and `<!-- /NAME -->`;
`--check` only says which page is behind.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from worker import flags, metrics

ROOT = Path(__file__).parents[1]
TABLES: dict[str, Callable[[], str]] = {"settings": flags.table, "metrics": metrics.table}
PAGES = ("README.md", "deploy/ARCHITECTURE.md")


def current(page: str) -> str:
    """`page` with every marked table as the code has it now. Raises ValueError without any."""
    text = page
    found = 0
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        pattern = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        text, count = pattern.subn(block.replace("\\", r"\\"), text)
        found += count
    if not found:
        raise ValueError("the page has no marked table")
    return text


def main(argv: list[str]) -> int:
    """Rewrite the pages, or with --check fail when one is behind."""
    behind = 0
    for name in PAGES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if current(text) != text:
            behind += 1
            if "--check" in argv:
                print(f"{name} is behind the code: run python -m deploy.docs", file=sys.stderr)
            else:
                path.write_text(current(text), encoding="utf-8")
                print(f"wrote {name}")
    return 1 if behind and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
