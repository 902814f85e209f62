"""How settings are given as flags, said in errors, and shown in the documentation.

Knows their names and descriptions, not what any of them means: that is `worker.config`.
"""

import argparse
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from worker.config import Settings
from worker.connections import ENV_PREFIX
from worker.errors import ConfigError

S = TypeVar("S", bound=BaseSettings)


def add_flags(parser: argparse.ArgumentParser, cls: type[BaseSettings]) -> None:
    """Give `parser` one flag a setting of `cls`; flags left out fall back to the environment."""
    for name, field in cls.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = ",".join(default) if isinstance(default, tuple) else default
        note = "" if shown in (None, "") else f", default {shown}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"setting_{name}",
            default=argparse.SUPPRESS,
            metavar=name.rsplit("_", 1)[-1].upper(),
            help=f"{field.description} [{ENV_PREFIX}{name.upper()}{note}]".replace("%", "%%"),
        )


def from_flags(cls: type[S], args: argparse.Namespace) -> S:
    """Read `cls` from the environment, overridden by the flags that were given.

    Raises ConfigError with one line when a value is not valid.
    """
    given = {
        name: getattr(args, f"setting_{name}")
        for name in cls.model_fields
        if hasattr(args, f"setting_{name}")
    }
    return load(cls, given)


def load(cls: type[S], given: dict[str, Any] | None = None) -> S:
    """Read `cls` from the environment and `given`; raises ConfigError with one line."""
    try:
        return cls(**(given or {}))
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _one_line(error: ValidationError) -> str:
    parts = []
    for problem in error.errors(include_url=False, include_input=False):
        name = ".".join(str(part) for part in problem["loc"])
        variable = f" ({ENV_PREFIX}{name.upper()})" if name else ""
        parts.append(
            f"{name}{variable}: {problem['msg'].removeprefix('Value error, ')}".lstrip(": ")
        )
    return "; ".join(parts)


def table() -> str:
    """The documentation's table of settings, as Markdown."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.default if field.default_factory is None else "one a core"
        shown = ",".join(default) if isinstance(default, tuple) else default
        cell = "–" if shown in (None, "") else f"`{shown}`"
        meaning = str(field.description).replace("|", "\\|")
        lines.append(f"| `{ENV_PREFIX}{name.upper()}` | {cell} | {meaning} |")
    return "\n".join(lines)
