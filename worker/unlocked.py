"""A compiled package run without holding Python's lock.

torch's own loader keeps the interpreter locked while a package runs: milliseconds in which no
other thread polls Kafka, talks to Redis or feeds a decoder. Called through ctypes, the same library
runs beside them. Its entry points are the C interface of AOTInductor
(torch/csrc/inductor/aoti_runtime/interface.h). Knows nothing of networks.
"""

import ctypes
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._C import _aoti

_Handle = ctypes.c_void_p
_Handles = ctypes.POINTER(ctypes.c_void_p)


class CannotUnlock(Exception):
    """This package, or this torch, has not what is needed."""


class Unlocked:
    """One network with one input and one output, on the processor; `threads` may run it at once."""

    def __init__(self, package: Path, threads: int = 1) -> None:
        """One thread more waits for another to end. Raises CannotUnlock."""
        try:
            library = _library(package)
            create = library.AOTInductorModelContainerCreateWithDevice
            self._run = library.AOTInductorModelContainerRun
            self._delete = library.aoti_torch_delete_tensor_object  # torch's, which it depends on
        except (OSError, AttributeError, ValueError) as error:
            raise CannotUnlock(str(error)) from error
        create.argtypes = [_Handles, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_char_p]
        number = ctypes.c_size_t
        self._run.argtypes = [_Handle, _Handles, number, _Handles, number, _Handle, _Handle]
        self._delete.argtypes = [_Handle]
        self._container = _Handle()
        if create(ctypes.byref(self._container), threads, b"cpu", None):
            raise CannotUnlock("the container cannot be made")
        self._open, self._make = _capsules()

    def __call__(self, batch: Tensor) -> Tensor:
        """Run it. The library takes over the input's handle, we the output's."""
        capsule = _aoti.unsafe_alloc_void_ptr_from_tensor(batch)
        inputs, outputs = (_Handle * 1)(self._open(capsule, None)), (_Handle * 1)()
        if self._run(self._container, inputs, 1, outputs, 1, None, None):
            raise RuntimeError("a compiled network failed")  # it has told stderr why
        result: Tensor = _aoti.alloc_tensor_by_stealing_from_void_ptr(
            self._make(outputs[0], None, None)
        )
        self._delete(outputs[0])  # in spite of its name, the call above took a share of it
        return result


def _library(package: Path) -> ctypes.CDLL:
    """The shared library inside a package; once loaded, its file is not needed."""
    room = tempfile.TemporaryDirectory(prefix="dedup-library-")
    with room as folder, zipfile.ZipFile(package) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".so"))
        return ctypes.CDLL(archive.extract(name, folder))


def _capsules() -> tuple[Callable[..., int], Callable[..., Any]]:
    """What opens and makes the capsules torch passes handles in."""
    opened = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    made = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    api = ctypes.pythonapi
    return opened(("PyCapsule_GetPointer", api)), made(("PyCapsule_New", api))
