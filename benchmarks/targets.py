"""What this package wants to be, as numbers: every line names a piece of work, and computes its ratio from results.

A ratio is the time of the best peer over our time, minima over minima and medians over medians, within one contest; a
group of layers has the geometric mean of its layers' ratios, and names its worst. Where less is better (the share of
time left, memory per byte of weight) the line says so. A target is met when minima and medians both reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.results import Results, Row, contests, is_ours

TORCH = ("eager_contiguous", "eager_channels_last", "mkldnn_prepacked", "compile")
EAGER = TORCH[:2]
Stat = Literal["min_ms", "median_ms"]
STATS: tuple[Stat, Stat] = ("min_ms", "median_ms")
Unit = Literal["x", "+"]


@dataclass(frozen=True)
class Measure:
    """A value, and what it was measured against or at: a peer, or the worst case."""

    value: float
    against: str


Compute = Callable[[Sequence[Row], Stat], "Measure | None"]


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        work: what is done.
        reach: the value to reach.
        beyond: the value to hope for.
        compute: the measured value, None where its rows are missing.
        more_is_better: whether values above ``reach`` meet it, or values below.
        unit: ``"x"`` for a ratio, ``"+"`` for a difference.
        headline: whether the line stands in the README.
    """

    work: str
    reach: float
    beyond: float
    compute: Compute = field(compare=False)
    more_is_better: bool = True
    unit: Unit = "x"
    headline: bool = False


@dataclass(frozen=True)
class Line:
    """A target with what was measured, minima first."""

    target: Target
    minima: Measure | None
    medians: Measure | None

    @property
    def verdict(self) -> str:
        """ "beyond", "met", "missed" or "not measured"."""
        if self.minima is None or self.medians is None:
            return "not measured"
        values = (self.minima.value, self.medians.value)
        worse = min(values) if self.target.more_is_better else max(values)

        def reaches(goal: float) -> bool:
            return worse >= goal if self.target.more_is_better else worse <= goal

        return "beyond" if reaches(self.target.beyond) else "met" if reaches(self.target.reach) else "missed"


def lines(results: Results) -> list[Line]:
    """Every target with its measured values."""
    rows = results["rows"]
    return [Line(t, *(t.compute(rows, stat) for stat in STATS)) for t in targets()]


def targets() -> Iterator[Target]:
    """The lines, in order."""
    yield from _networks()
    yield from _cifar()
    yield from _dynamic()
    yield from _layers()
    yield from _pq()
    yield from _training()
    yield from _rest()


def _networks() -> Iterator[Target]:
    for name, case, batches, goals in (
        ("RepVGG-A0 deployed", "repvgg_a0", ((1, 1), (1, 2)), (1.3, 1.6)),
        ("RepVGG-A0 deployed", "repvgg_a0", ((8, 2),), (1.5, 2.0)),
        ("RepVGG-B1 deployed", "repvgg_b1", ((1, 1), (1, 2)), (1.3, 1.6)),
        ("ResNet-50", "resnet50", ((1, 1), (1, 2), (8, 1), (8, 2)), (1.1, 1.3)),
        ("MobileNetV2", "mobilenet_v2", ((1, 1), (1, 2), (8, 1), (8, 2)), (1.05, 1.3)),
    ):
        for batch, threads in batches:
            where = {"family": "networks", "op": "network", "case": case, "batch": batch, "threads": threads}
            yield Target(
                f"{name}, 224x224, batch {batch}, {_threads(threads)}",
                *goals,
                _best(where),
                headline=(batch, threads) in ((1, 1), (8, 2)),
            )
    where = {"family": "networks", "op": "network", "case": "repvgg_a0", "batch": 1, "threads": 1}
    yield Target("RepVGG-A0 against PyTorch eager, batch 1, 1 thread", 2.2, 3.0, _best(where, EAGER), headline=True)


def _cifar() -> Iterator[Target]:
    for case, name in (("resnet32", "ResNet-32"), ("resnet110", "ResNet-110")):
        for batch, engines, torch in ((1, (1.4, 2.0), (3.0, 5.0)), (64, (1.3, 1.8), (1.9, 2.5))):
            for threads in (1, 2):
                where = {"family": "cifar", "op": "network", "case": case, "batch": batch, "threads": threads}
                work = f"{name} (CIFAR), dense, batch {batch}, {_threads(threads)}"
                shown = case == "resnet110" and threads == 1
                yield Target(f"{work}: best engine", *engines, _best(where, TORCH, excluded=True), headline=shown)
                yield Target(f"{work}: best torch form", *torch, _best(where, TORCH))


def _dynamic() -> Iterator[Target]:
    for batch, goals in ((1, (3.0, 5.0)), (64, (2.5, 4.0))):
        where = {"family": "block_skip", "case": "resnet110 body, keep 0.50", "batch": batch}
        yield Target(f"BlockDrop ResNet-110, keep 0.5, batch {batch}", *goals, _best(where), headline=True)
    for batch in (1, 64):
        yield Target(
            f"skip linearity, ResNet-110, batch {batch}: time left minus share kept",
            0.05,
            0.02,
            _excess({"family": "block_skip", "op": "skip_stage", "batch": batch}, "keep", "resnet110"),
            more_is_better=False,
            unit="+",
            headline=batch == 64,
        )
    for case, name in (("ds_mobilenet", "DS-Net MobileNetV1"), ("mobilenet_v1_slimmable", "MobileNetV1 of 4 widths")):
        shown = case == "ds_mobilenet"
        where = {"family": "supernet", "case": case}
        yield Target(f"{name}, batch 32 of mixed widths", 1.3, 2.0, _best({**where, "op": "mixed"}), headline=shown)
        yield Target(
            f"{name}, width linearity: time left minus multiply-adds left",
            0.07,
            0.03,
            _excess({"family": "supernet", "op": "width"}, "macs_left", case),
            more_is_better=False,
            unit="+",
            headline=shown,
        )
        yield Target(
            f"{name}, mixed batch over its classes run uniformly",
            1.05,
            1.02,
            _over({**where, "op": "ragged"}, "effkern", "effkern, classes"),
            more_is_better=False,
        )


def _layers() -> Iterator[Target]:
    for group, work, goals, shown in (
        ("3x3 stride 1", "3x3 stride 1 layers, 48 channels or more, maps of 14 or more", (1.25, 1.6), True),
        ("3x3 stride 2", "3x3 stride 2 layers and stems", (1.05, 1.2), False),
        ("512@7", "3x3 layers of 512 channels on 7x7", (1.0, 1.4), False),
        ("depthwise large", "depthwise layers, maps of 28 or more", (1.4, 2.0), True),
        ("depthwise small", "depthwise layers, maps of 14 or less", (1.8, 3.0), False),
    ):
        for batch in (1, 8):
            where = {"family": "rep_conv", "group": group, "batch": batch}
            yield Target(f"{work}, batch {batch}", *goals, _geomean(where), headline=shown and batch == 1)
            yield Target(f"{work}, by a handle, batch {batch}", *goals, _geomean(where, own="effkern_packed"))


def _pq() -> Iterator[Target]:
    for batch in (1, 8):
        cases = ("resnet18_layer1", "resnet18_layer2", "resnet18_layer3")
        where = {"family": "pq", "op": "pq_conv2d", "case": cases, "batch": batch}
        yield Target(f"PQ 3x3, d=9, K=256, batch {batch}: dense torch", 2.0, 3.0, _geomean(where, TORCH), headline=True)
    for batch in (1, 8):
        where = {"family": "pq", "op": "pq_conv2d", "case": "resnet50_layer4_conv3_large", "batch": batch}
        yield Target(f"PQ 1x1, d=8, 2048 outputs, batch {batch}: dense torch", 1.5, 1.9, _best(where, TORCH))
    where = {"family": "pq", "op": "pq_linear", "case": ("vgg_fc1", "vgg_fc2"), "batch": 1}
    yield Target("PQ GEMV, M=1, dense weight beyond L3: dense torch", 3.0, 6.0, _geomean(where, TORCH), headline=True)
    memory = {"family": "pq", "op": "resident_memory", "case": "resnet50"}
    yield Target("memory of ResNet-50's weights: dense over codes", 15.0, 19.0, _memory(memory), headline=True)


def _training() -> Iterator[Target]:
    for direction, goals in (("forward", (3.0, 5.0)), ("forward_backward", (2.5, 4.0))):
        where = {"family": "multi_branch_bn", "case": _ends_with(f"_3_branches_{direction}")}
        work = f"multi-branch BN-add-ReLU, 3 branches, {direction.replace('_', ' and ')}: PyTorch eager"
        yield Target(work, *goals, _geomean(where, "eager"), headline=True)
    yield Target("gradients of convolutions: PyTorch", 1.0, 1.0, _geomean({"family": "backward"}))


def _rest() -> Iterator[Target]:
    for batch, goals in ((1, (1.7, 1.9)), (8, (1.9, 1.97))):
        where = {"family": "networks", "op": "scaling", "batch": batch}
        yield Target(
            f"two threads over one, whole networks, batch {batch} (the worst)", *goals, _scaling(where), headline=True
        )
    where = {"family": "overhead", "op": "call"}
    yield Target(
        "a call of rep_conv2d on 1x8x4x4 over one of F.conv2d",
        1.5,
        1.0,
        _over(where, "effkern rep_conv2d", EAGER),
        more_is_better=False,
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _ends_with(ending: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value.endswith(ending)


def _matching(rows: Sequence[Row], where: dict[str, object]) -> list[list[Row]]:
    """The contests all of whose rows have these values; a tuple allows several, a function says which."""

    def fits(value: object, wanted: object) -> bool:
        if callable(wanted):
            return bool(wanted(value))
        return value in wanted if isinstance(wanted, tuple) else value == wanted

    return contests(row for row in rows if all(fits(row.get(key), wanted) for key, wanted in where.items()))


def best_peer(
    contest: Sequence[Row], stat: Stat, peers: Sequence[str] | str | None = None, excluded: bool = False
) -> Row | None:
    """The fastest peer.

    Args:
        contest: rows that were timed together.
        stat: by which.
        peers: only these; a string is the beginning of their names; None allows all.
        excluded: all but these.
    """

    def wanted(name: str) -> bool:
        if peers is None:
            return True
        named = name.startswith(peers) if isinstance(peers, str) else name in peers
        return named != excluded

    allowed = [row for row in contest if not is_ours(row) and row[stat] is not None and wanted(row["impl"])]
    return min(allowed, key=lambda row: row[stat], default=None)


def our_row(contest: Sequence[Row], impl: str = "effkern", stat: Stat = "min_ms") -> Row | None:
    """The row of one of our forms; where there is none of this name, the faster of ``<impl>_<layout>``."""
    layouts = {f"{impl}_contiguous", f"{impl}_channels_last"}
    named = [row for row in contest if row["impl"] == impl] or [row for row in contest if row["impl"] in layouts]
    return min(named, key=lambda row: row[stat], default=None)


def _one(
    contest: Sequence[Row],
    stat: Stat,
    peers: Sequence[str] | str | None = None,
    excluded: bool = False,
    own: str = "effkern",
) -> Measure | None:
    ours, peer = our_row(contest, own, stat), best_peer(contest, stat, peers, excluded)
    return None if ours is None or peer is None else Measure(peer[stat] / ours[stat], peer["impl"])


def _best(where: dict[str, object], peers: Sequence[str] | str | None = None, excluded: bool = False) -> Compute:
    """The best peer over ours, of one contest."""

    def compute(rows: Sequence[Row], stat: Stat) -> Measure | None:
        found = _matching(rows, where)
        return _one(found[0], stat, peers, excluded) if len(found) == 1 else None

    return compute


def _geomean(where: dict[str, object], peers: Sequence[str] | str | None = None, own: str = "effkern") -> Compute:
    """The geometric mean over all contests, with the worst of them."""

    def compute(rows: Sequence[Row], stat: Stat) -> Measure | None:
        measured = [(_one(contest, stat, peers, own=own), contest[0]["case"]) for contest in _matching(rows, where)]
        found = [(m, case) for m, case in measured if m is not None]
        if not found or len(found) < len(measured):
            return None
        worst, case = min(found, key=lambda pair: pair[0].value)
        mean = math.exp(sum(math.log(m.value) for m, _ in found) / len(found))
        return Measure(mean, f"{len(found)} cases, worst {worst.value:.2f}x {case} ({worst.against})")

    return compute


def _excess(where: dict[str, object], share: str, network: str) -> Compute:
    """The most by which the share of time left exceeds a share of work left."""

    def compute(rows: Sequence[Row], stat: Stat) -> Measure | None:
        left = "min_time_left" if stat == "min_ms" else "time_left"
        found = [
            (row[left] - row[share], row["case"])
            for contest in _matching(rows, where)
            if (row := our_row(contest)) is not None and row["case"].startswith(network) and row[share] < 1
        ]
        if not found:
            return None
        value, case = max(found)
        return Measure(value, f"worst of {len(found)}: {case.removeprefix(network).strip(' ,')}")

    return compute


def _over(where: dict[str, object], impl: str, base: str | Sequence[str]) -> Compute:
    """Our time over the best of ``base``; less is better."""

    def compute(rows: Sequence[Row], stat: Stat) -> Measure | None:
        found = _matching(rows, where)
        if len(found) != 1:
            return None
        names = (base,) if isinstance(base, str) else base
        ours = our_row(found[0], impl)
        bases = [row for row in found[0] if row["impl"] in names]
        if ours is None or not bases:
            return None
        fastest = min(bases, key=lambda row: row[stat])
        return Measure(ours[stat] / fastest[stat], fastest["impl"])

    return compute


def _scaling(where: dict[str, object]) -> Compute:
    """The least gain from one thread to two over all networks."""

    def compute(rows: Sequence[Row], stat: Stat) -> Measure | None:
        gains = []
        for contest in _matching(rows, where):
            one, two = our_row(contest), our_row(contest, "effkern, 2 threads")
            if one is not None and two is not None:
                gains.append((one[stat] / two[stat], one["case"]))
        if not gains:
            return None
        return Measure(min(gains)[0], ", ".join(f"{case} {gain:.2f}x" for gain, case in sorted(gains)))

    return compute


def _memory(where: dict[str, object]) -> Compute:
    """Bytes of the dense network's process over those from codes."""

    def compute(rows: Sequence[Row], stat: Stat) -> Measure | None:
        bytes_of = {row["impl"]: row["resident_bytes"] for contest in _matching(rows, where) for row in contest}
        if set(bytes_of) != {"dense", "effkern"}:
            return None
        dense, codes = bytes_of["dense"], bytes_of["effkern"]
        return Measure(dense / codes, f"{dense / 1e6:.1f} MB over {codes / 1e6:.1f} MB")

    return compute
