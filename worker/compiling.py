"""A network compiled ahead of time for this processor, kept on disk and loaded in moments.

Owns the folder of compiled networks and the names in it. A start that finds its network there
needs neither the compiler nor torch's tracing. Knows nothing of pictures or weights files.
"""

import hashlib
import inspect
import logging
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from worker.unlocked import CannotUnlock, Unlocked

Forward = Callable[[Tensor], Tensor]
log = logging.getLogger(__name__)

MOST_KEPT = 16  # compiled networks, some 3 MB each
COMPILERS = ("g++", "clang++")
OPTIONS = {
    "freezing": True,  # weights become constants, laid out as the kernels want them
    # All that lies between two layers in one allocation: apart, glibc's heap grows without end.
    "memory_planning": True,
    "memory_pool": "combined",
}


class CompilingFailed(Exception):
    """The network cannot be compiled here; the message is one line."""


def has_compiler() -> bool:
    """Whether a C++ compiler is installed."""
    return any(shutil.which(name) for name in COMPILERS)


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX-512 BF16, AMX, Armv8.6); Linux only."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="ascii").split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def compiled(network: nn.Module, examples: list[Tensor], folder: Path, threads: int = 1) -> Forward:
    """`network`, compiled for batches of the shapes of `examples`; takes no other shape.

    On a processor, `threads` of them may run it at once.
    Looks in `folder` first and leaves there what it compiles. Raises CompilingFailed.
    """
    try:
        with _trusted(folder) as kept, torch.inference_mode(False), torch.no_grad():
            # Names first: tracing leaves marks on the network.
            names = [f"{_fingerprint(network, each)}.pt2" for each in examples]
            packages = {
                len(each): _package(network, each, kept / name, threads)
                for each, name in zip(examples, names, strict=True)
            }
            for each in examples:
                packages[len(each)](each)
    except Exception as error:  # whatever torch, a compiler or a disk may raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise CompilingFailed(lines[0]) from error
    return lambda batch: packages[len(batch)](batch)


def _package(network: nn.Module, example: Tensor, path: Path, threads: int) -> Forward:
    if not path.exists():
        if example.device.type == "cpu" and not has_compiler():
            raise CompilingFailed("no C++ compiler")
        log.info("compiling the network for this machine, which may take a minute")
        with tempfile.TemporaryDirectory(dir=path.parent) as room:
            fresh = Path(room) / path.name
            exported = torch.export.export(network, (example,))
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(fresh), inductor_configs=dict(OPTIONS)
            )
            fresh.replace(path)  # whole or not at all, also where two workers compile at once
            _drop_oldest(path.parent)
    package: Forward = torch._inductor.aoti_load_package(str(path))
    return _unlocked(package, path, example, threads) if example.device.type == "cpu" else package


def _unlocked(package: Forward, path: Path, example: Tensor, threads: int) -> Forward:
    """The same without Python's lock, where that can be had and computes the same."""
    try:
        unlocked = Unlocked(path, threads)
    except CannotUnlock as error:
        log.info("embedding holds the interpreter's lock: %s", error)
        return package
    return unlocked if torch.equal(unlocked(example), package(example)) else package


def _drop_oldest(folder: Path) -> None:
    """Networks of weights and releases long gone would fill the disk."""
    kept = sorted(folder.glob("*.pt2"), key=lambda path: path.stat().st_mtime)
    for path in kept[:-MOST_KEPT]:
        path.unlink(missing_ok=True)


def _fingerprint(network: nn.Module, example: Tensor) -> str:
    """Hash of all that the compiled code depends on."""
    digest = hashlib.sha256()
    facts = (
        *(torch.__version__, platform.machine(), *_processor(), str(OPTIONS)),
        *(str(example.shape), str(example.device), _cores(example.device), str(network)),
        inspect.getsource(inspect.getmodule(type(network)) or type(network)),
        *(f"{k} {v}" for k, v in vars(network).items() if isinstance(v, bool | int | float | str)),
    )
    digest.update("\0".join(facts).encode())
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _cores(device: torch.device) -> str:
    """What code is made for besides: inductor writes in how many threads share a loop, or none."""
    if device.type == "cpu":
        return str(torch.get_num_threads())
    return torch.cuda.get_device_name(device)


def _processor() -> Iterator[str]:
    """What the processor is and can do: code compiled for one may not run on another."""
    yield torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    yield from sorted(
        {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    )


@contextmanager
def _trusted(folder: Path) -> Iterator[Path]:
    """`folder`, made if need be; a passing one where it cannot be written or is not ours alone.

    Code is loaded from it, so nobody else may be able to put something there.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        ours = about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if ours and os.access(folder, os.W_OK):
            yield folder
            return
    except OSError:
        pass
    with tempfile.TemporaryDirectory(prefix="dedup-compiled-") as passing:
        yield Path(passing)
