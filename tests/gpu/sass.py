"""What the compiler made of a kernel: its instructions, its main loop, the share of them that multiplies."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MULTIPLIES = ("HMMA", "FFMA", "FFMA2")
LOCAL = ("LDL", "STL")


@dataclass
class Instruction:
    at: int
    op: str  # with its suffixes, without the predicate
    text: str

    @property
    def name(self) -> str:
        return self.op.split(".")[0]

    @cached_property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)", self.text) if self.name == "BRA" else None
        return int(found[1], 16) if found else None


@dataclass
class Function:
    name: str
    code: list[Instruction]

    def count(self, *names: str) -> int:
        return sum(i.name in names for i in self.code)

    def loops(self) -> list[list[Instruction]]:
        """Bodies between a backward branch and its target."""
        return [
            [j for j in self.code if i.target <= j.at <= i.at]
            for i in self.code
            if i.target is not None and i.target < i.at
        ]

    def main_loop(self) -> list[Instruction]:
        """The shortest loop with a barrier in it; the walk over tiles, which holds it, has barriers too."""
        return min((body for body in self.loops() if any(i.name == "BAR" for i in body)), key=len)

    def hot_path(self) -> list[Instruction]:
        """The main loop without what most turns skip: the start of a tap, and copies of part of a chunk."""
        body = self.main_loop()
        cold: set[int] = set()
        for i in body:
            if i.target is None or i.target <= i.at:
                continue
            skipped = [j for j in body if i.at < j.at < i.target]
            partial = any(".ZFILL" in j.op for j in skipped)
            whole = any(j.name == "LDGSTS" and ".ZFILL" not in j.op for j in skipped)
            if not whole and (partial or not any(j.name in (*MULTIPLIES, "LDSM") for j in skipped)):
                cold.update(j.at for j in skipped)
        return [i for i in body if i.at not in cold]

    def turn(self) -> list[Instruction]:
        """The hot path without the NOPs that the compiler puts behind each HMMA for sm_120: padding, not work."""
        return [i for i in self.hot_path() if i.name != "NOP"]

    def share(self) -> float:
        """Multiplying instructions among those a turn of the main loop issues."""
        return sum(i.name in MULTIPLIES for i in self.turn()) / len(self.turn())

    def longest_turn(self) -> list[Instruction]:
        """The way through the main loop with most products, and of those the longest; up to the last product and from
        the barrier on, where no loop over K is left and so what stores the sums follows in the same loop."""
        way = best_way(self.main_loop(), lambda i: (i.name == "HMMA", 1))
        if any(i.name == "STS" for i in way):
            first = next(n for n, i in enumerate(way) if i.name == "BAR")
            last = max(n for n, i in enumerate(way) if i.name == "HMMA")
            way = way[first : last + 1]
        return [i for i in way if i.name != "NOP"]

    def inner_share(self) -> float:
        """Multiplying instructions among those of the shortest loop that multiplies."""
        bodies = [[i for i in body if i.name != "NOP"] for body in self.loops()]
        body = min((b for b in bodies if any(i.name in MULTIPLIES for i in b)), key=len)
        return sum(i.name in MULTIPLIES for i in body) / len(body)


def best_way(body: list[Instruction], worth: Callable[[Instruction], tuple[int, ...]]) -> list[Instruction]:
    """From a loop's first instruction to the branch back at its end, where the sum of their worth is greatest."""
    at = {i.at: n for n, i in enumerate(body)}
    best: dict[int, tuple[tuple[int, ...], int]] = {}  # the worth to the end, and what follows
    for n, i in reversed(list(enumerate(body))):
        following = []
        if i.target is None or "@" in i.text or "," in i.text:
            following.append(n + 1)
        if i.target is not None and i.target > i.at and i.target in at:
            following.append(at[i.target])
        here = worth(i)
        ways = [(best[m][0], m) for m in following if m in best] if n + 1 < len(body) else [((0,) * len(here), n + 1)]
        if ways:
            rest, m = max(ways)
            best[n] = tuple(a + b for a, b in zip(here, rest, strict=True)), m
    way, n = [], 0
    while n < len(body):
        way.append(body[n])
        n = best[n][1]
    return way


def disassemble(cuobjdump: Path, cubin: Path) -> list[Function]:
    """All kernels of a cubin."""
    # It calls nvdisasm, which lies beside it.
    environment = os.environ | {"PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [cuobjdump, "-sass", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    functions = []
    for part in text.split("Function : ")[1:]:
        name, _, rest = part.partition("\n")
        code = []
        for at, body in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", rest):
            op = re.sub(r"^@!?U?PT?\w*\s+", "", body).split()[0]
            code.append(Instruction(int(at, 16), op, body))
        functions.append(Function(name.strip(), code))
    return functions
