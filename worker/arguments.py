"""What the commands check of their arguments, before any work that takes long.

And what they say where writing goes wrong all the same.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from worker.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without all the flags there are."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"error: {message} ({self.prog} --help tells more)\n")


def share(least: float, most: float) -> Callable[[str], float]:
    """A parser of finite numbers above `least` and at most `most`."""

    def parse(text: str) -> float:
        value = _finite(text)
        if not least < value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not above {least:g}{_up_to(most)}")
        return value

    return parse


def between(least: float, most: float) -> Callable[[str], float]:
    """A parser of finite numbers from `least` on and at most `most`."""

    def parse(text: str) -> float:
        value = _finite(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least:g}{_up_to(most)}")
        return value

    return parse


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return parse


def nonempty(text: str) -> str:
    """A parser of names, which an empty text is not, nor what is no UTF-8."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{os.fsencode(text)!r} is not UTF-8") from None
    return text


def check_file(path: str | None) -> None:
    """Raise ConfigError when a file that is asked for could not be written there."""
    if path is None:
        return
    folder = Path(path).parent
    if not folder.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {folder}")
    places = [place for place in (folder, Path(path)) if place.exists()]
    if Path(path).is_dir() or not all(os.access(place, os.W_OK) for place in places):
        raise ConfigError(f"{path} cannot be written")


def check_folder(path: str | None) -> None:
    """Make a folder that is asked for.

    Raises ConfigError when that is impossible, or nothing could be written into it.
    """
    if path is None:
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be a folder: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{path} cannot be written into")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ConfigError, which names the file, where the block cannot write it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _up_to(most: float) -> str:
    return f" and at most {most:g}" if math.isfinite(most) else ""
