"""A CUDA device that is not there (csrc/tests/runtime): the CUDA library's host code as it ships, its kernels in the
harness, and torch's own device type `cuda` in a torch that was built without.

It has to be there before torch and effkern are imported, so it has a Python of its own:
``python -m tests.gpu.stub LIBRARY FILE`` runs a file of tests on it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "effkern_runtime"
_LIBRARY: ctypes.CDLL | None = None


def build(folder: Path) -> Path:
    """Compiles the library."""
    import torch

    from tests.gpu import host_library
    from tests.gpu.harness import WORKERS

    runtime = host_library.CHECKOUT / "csrc" / "tests" / "runtime"
    root = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "g++")
    shipped = [*host_library.FLAGS, "-DEFFKERN_RUNTIME", f"-I{runtime}", f"-isystem{root / 'include'}"]
    plain = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-DEFFKERN_SIMT"]
    torchs = [f"-isystem{root / 'include' / p}" for p in ("", "torch/csrc/api/include")]
    jobs = [([*plain, *torchs], runtime / "device.cpp"), ([*plain, "-O1"], runtime / "runtime.cpp")]
    jobs += [(shipped, source) for source in host_library.sources()]

    def one(job: tuple[int, tuple[list[str], Path]]) -> Path:
        number, (flags, source) = job
        target = folder / f"{number}_{source.stem}.o"
        subprocess.run([compiler, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(WORKERS) as pool:
        objects = list(pool.map(one, enumerate(jobs)))
    library = folder / f"{NAME}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, "-shared", *objects, *libraries, "-o", library], check=True)
    return library


def load(library: Path) -> None:
    """In place of the package's own CUDA library, and torch.cuda as far as tests call it."""
    global _LIBRARY
    assert not {"torch", "effkern"} & sys.modules.keys(), "the device must be there first"
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    for name in ("libtorch_cpu.so", "libtorch.so", str(library)):
        _LIBRARY = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name), ctypes.RTLD_GLOBAL)
    assert _LIBRARY is not None

    import torch

    real = torch.ops.load_library
    torch.ops.load_library = lambda path: None if Path(path).stem == "_C_cuda" else real(path)
    _LIBRARY.stub_log.restype = ctypes.c_char_p
    _LIBRARY.stub_calls.restype = _LIBRARY.stub_blocks.restype = ctypes.c_int64
    _LIBRARY.stub_fail.argtypes = [ctypes.c_int64]
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda device=None: "a device that is not there"
    torch.cuda.synchronize = torch.accelerator.synchronize
    torch.random.fork_rng = _no_fork
    of_the_host = torch.Tensor.__deepcopy__
    # Without a storage of the device's own, which torch cannot make here.
    torch.Tensor.__deepcopy__ = lambda t, memo: t.detach().clone() if t.is_cuda else of_the_host(t, memo)
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture  # type: ignore[misc,assignment]


def loaded() -> bool:
    """Whether the device is there."""
    return _LIBRARY is not None


@contextmanager
def _no_fork(devices: object = None) -> Iterator[None]:
    """In place of `torch.random.fork_rng`, which would ask the device for the state of its random numbers."""
    import torch

    before = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before)


class Graph:
    """What was called while it was captured, to be done when it is replayed."""

    def replay(self) -> None:
        assert _LIBRARY is not None
        _LIBRARY.stub_replay()


@contextmanager
def capture(graph: Graph) -> Iterator[None]:
    """One graph at a time: the next one takes its place."""
    assert _LIBRARY is not None
    _LIBRARY.stub_capture(True)
    try:
        yield
    finally:
        _LIBRARY.stub_capture(False)


@dataclass(frozen=True)
class Call:
    """One call of the runtime, or of one of torch's operators."""

    call: str
    device: int
    kernel: int = 0
    grid: int = 0
    threads: int = 0
    shared: int = 0
    stream: int = 0
    op: str = ""


class Runtime:
    """The state of the device."""

    def __init__(self) -> None:
        assert _LIBRARY is not None, "no library was loaded"
        self._library = _LIBRARY

    def begin(self, *, running: bool, waits: bool) -> None:
        """Forget what was called. Whether kernels run, and whether the host may wait for them."""
        self._library.stub_begin(running, waits)

    def fail(self, call: int) -> None:
        """Make the runtime's call of this number, from the beginning on, fail: out of memory."""
        self._library.stub_fail(call)

    def calls(self) -> int:
        """How many calls there were that can fail."""
        return int(self._library.stub_calls())

    def log(self) -> list[Call]:
        return [Call(**call) for call in json.loads(self._library.stub_log())]

    def launches(self) -> list[Call]:
        return [call for call in self.log() if call.call == "launch"]

    def last_error(self) -> int:
        """0 if no error was left behind."""
        return int(self._library.stub_last_error())

    def leave_error(self) -> None:
        """As someone does whose own call failed and who did not ask."""
        self._library.stub_leave_error()

    def take_error(self) -> int:
        """As someone does who asks."""
        return int(self._library.stub_take_error())

    def blocks(self) -> int:
        """Pieces of memory in use."""
        return int(self._library.stub_blocks())

    def device(self, processors: int, most_shared: int) -> None:
        """Be a device of so many multiprocessors, whose blocks may have so much shared memory."""
        self._library.stub_device(processors, most_shared)


def main(arguments: list[str]) -> Any:
    import pytest

    load(Path(arguments[0]))
    return pytest.main(["-q", "-rs", "-p", "no:cacheprovider", *arguments[1:]])


if __name__ == "__main__":
    from tests.gpu import stub  # not as __main__: tests look at the state of the module

    sys.exit(stub.main(sys.argv[1:]))
