"""Compiles the launches of a call ahead of time, as Triton would at the first call, for a GPU that is not there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime import jit

from tests.gpu.sass import LOCAL, Function, disassemble

ARCHS = (80, 90, 100)
#: What multiplies on tensor cores, by target: warp, warp group, and tensor memory products.
TENSOR = ("HMMA", "HGMMA", "UTCHMMA")


@dataclass
class Launch:
    """One launch that a call wanted."""

    kernel: jit.JITFunction
    args: tuple
    kwargs: dict[str, Any]


@dataclass
class Compiled:
    """What became of it for one target."""

    registers: int
    local: int  # bytes of stack and local memory a thread
    shared: int
    function: Function

    def facts(self) -> dict[str, Any]:
        """What the kept table says of a kernel."""
        ops = {i.op for i in self.function.code}
        return {
            "registers": self.registers,
            "local": self.local + self.function.count(*LOCAL),
            "shared": self.shared,
            "instructions": len(self.function.code),
            "tensor": next((name for name in TENSOR if self.function.count(name)), ""),
            "wide_loads": any(re.match(r"(LDG.*|LDGSTS.*)\.128", op) for op in ops),
            "wide_stores": any(re.match(r"STG.*\.128", op) for op in ops),
        }


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside of the statement are kept and not run."""
    launches: list[Launch] = []
    before = jit.JITFunction.run

    def run(self: jit.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs))

    jit.JITFunction.run = run
    try:
        yield launches
    finally:
        jit.JITFunction.run = before


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    with recorded() as launches:
        call()
    return launches


def compiled(launch: Launch, arch: int, cuobjdump: Path, folder: Path) -> Compiled:
    """The launch compiled for sm_``arch``, specialized as Triton specializes at a call."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kwargs = launch.kwargs | {"debug": False}
    binder = jit.create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, _ = binder(*launch.args, **kwargs)
    options, signature, constants, attributes = launch.kernel._pack_args(backend, kwargs, bound, specialization, None)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    made = compile(source, target=target, options=options.__dict__)
    cubin = folder / f"{launch.kernel.__name__}.{arch}.{abs(hash(made.hash))}.cubin"
    cubin.write_bytes(made.asm["cubin"])
    usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True)
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    (function,) = disassemble(cuobjdump, cubin)
    return Compiled(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], made.metadata.shared, function)
