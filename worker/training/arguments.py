"""What the commands check of their arguments, before any work that takes long."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from worker.errors import ConfigError


def share(least: float, most: float) -> Callable[[str], float]:
    """A parser of numbers above `least` and at most `most`."""

    def parse(text: str) -> float:
        value = float(text)
        if not least < value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not above {least:g} and at most {most:g}")
        return value

    return parse


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return parse


def check_file(path: str | None) -> None:
    """Raise ConfigError when a file that is asked for could not be written there."""
    if path is None:
        return
    folder = Path(path).parent
    if not folder.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {folder}")
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{path} cannot be written")


def check_folder(path: str | None) -> None:
    """Make a folder that is asked for. Raises ConfigError when that is impossible."""
    if path is None:
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be a folder: {error.strerror}") from error
