"""DS-Net: what widths learn from, what gates learn from, and the time of mixed batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from effkern.dsnet import AtWidth, Dynamic, evaluate_routing, mac_table, route_costs
from effkern.models import create_model
from effkern.nn import SwitchableBatchNorm2d
from effkern.recipes.dsnet import Config
from effkern.report.plots import curves
from effkern.training import load_config, load_weights, measure, say
from experiments.common import Context, Cycle, Experiment, Piece, batches_of, frozen, main, spread, table

SEEDS = (0, 1, 2)
WIDTHS = (16, 32, 48, 64)
LENGTHS = (0.5, 2, 6, 20)
GATED = 6  # epochs of the supernets that get gates, and of the widths trained alone
TEACHERS = {
    "bootstrapping": ["supernet.target=bootstrapping"],
    "distillation": ["supernet.target=distillation"],
    "labels": ["supernet.target=labels"],
}
#: What a gate learns from. Those with a budget end at it; the others where their losses leave them.
GATES = {
    "sgs, balanced": ["gate.sgs=balanced", "gate.task=0.0", "gate.cost=none"],
    "sgs, balanced, with Gumbel": ["gate.sgs=balanced", "gate.task=1.0", "gate.cost=relative"],
    "sgs, cheapest width": ["gate.sgs=balanced", "gate.targets=cheapest", "gate.task=0.0", "gate.cost=none"],
    "sgs, plain": ["gate.sgs=logits", "gate.task=1.0", "gate.cost=relative"],
    "sgs, published": ["gate.sgs=published", "gate.gate_smoothing=0.1", "gate.task=1.0", "gate.cost=relative"],
    "gumbel": ["gate.sgs=none", "gate.task=1.0", "gate.cost=relative"],
}
CHOSEN = "sgs, balanced"
BUDGETS = (0.3, 0.5, 0.7)
#: The supernet whose slimmest width loses more, and its gates.
APART = "network.options={stem=16,stem_stride=2,front=[[16,1,1],[32,1,2]],stages=[[[4,12,28,64],2,1]],space=[0,1,2,3]}"
APART_GATES = (CHOSEN, "sgs, published", "gumbel")
EXPECTED = "sgs, expected"
EXPECTED_FORM = [
    *("gate.sgs=expected", "gate.task=0.0", "gate.cost=relative", "gate.cost_weight=0.08"),
    *("gate.train.lr=0.5", "gate.train.epochs=15"),
]
APART_BUDGETS = (0.23,)
APART_LENGTHS = (2, 6)
CIFAR = "cifar10"  # kind of images of the gates that have a network of their own
#: Norm and learning rate of the trainings whose stability is compared, over so many passes; steps that are looked at.
STABILITY = (("batch", 0.5), ("group", 0.3), ("group", 0.5), ("group", 1.0))
STABILITY_EPOCHS, STABILITY_STEPS = 0.75, 150
CHANCE = 20.0  # %: a network that is no better at its widest has diverged
#: What is asked of the gates: diversity in nat, points over the static mixture, distance from a budget.
MOST_ALIKE, LEAST_OVER, MOST_OFF = 0.3, 0.2, 0.03
BATCHES = (1, 8, 64)
LARGE_BATCHES = (1, 8, 32)
QUICK = [
    "network.options={stem=4,front=[[8,1,1]],stages=[[[4,6,8],1,2]],space=[0,1,2]}",
    *(f"{phase}.train.{x}" for phase in ("supernet", "gate") for x in ("epochs=0.3", "batch_size=64")),
    "supernet.calibration=2",
]


def pieces(quick: bool) -> list[Piece]:
    """Supernets, networks of one width, gates, times."""
    add, seeds = (QUICK, SEEDS[:1]) if quick else ([], SEEDS)
    lengths, gated, budgets = ((0.3,), 0.3, (0.9,)) if quick else (LENGTHS, GATED, BUDGETS)
    result: list[Piece] = []
    after = "bootstrapping"
    forms = {**GATES, **{f"{CHOSEN}, budget {share}": _budget(share) for share in budgets}}
    for seed in seeds:  # a whole seed after the other: what is there after a stop is a result
        for epochs, (target, form) in itertools.product(lengths, TEACHERS.items()):
            settings = [*add, *form, *_length(epochs, seed)]
            make = partial(train_supernet, key=f"{target}-{epochs:g}-{seed}", settings=settings)
            result.append(Piece(f"supernet {target}, {epochs:g} epochs, seed {seed}", settings, make))
        for name, form in forms.items():
            settings = [*add, *TEACHERS[after], *_length(gated, seed), *_gate(name, form, seed)]
            key = _folder(f"gate {name} {seed}")
            make = partial(train_gate, key=key, after=f"{after}-{gated:g}-{seed}", settings=settings)
            result.append(Piece(f"gate {name}, seed {seed}", settings, make))
        for width in (4, 6, 8) if quick else WIDTHS:
            stage = (
                f"stem=4,front=[[8,1,1]],stages=[[[{width}],1,2]]"
                if quick
                else f"stem=16,stem_stride=2,front=[[16,1,1],[32,1,2]],stages=[[[{width}],2,1]]"
            )
            settings = [
                *add,
                f"network.options={{{stage},space=[0]}}",
                "supernet.target=labels",
                *_length(gated, seed),
            ]
            make = partial(train_supernet, key=f"alone-{width}-{seed}", settings=settings)
            result.append(Piece(f"alone {width}, seed {seed}", settings, make))
    own = {EXPECTED: EXPECTED_FORM, **{name: GATES[name] for name in APART_GATES}}
    own |= {f"{EXPECTED}, budget {b}": [*EXPECTED_FORM, f"gate.budget={b}"] for b in APART_BUDGETS}
    apart = {EXPECTED: EXPECTED_FORM} if quick else own
    for seed, epochs in itertools.product(seeds, (gated,) if quick else APART_LENGTHS):
        settings = [*([] if quick else [APART]), *add, *TEACHERS[after], *_length(epochs, seed)]
        key, when = f"apart-{after}-{epochs:g}-{seed}", f"{epochs:g} epochs, seed {seed}"
        make = partial(train_supernet, key=key, settings=settings)
        result.append(Piece(f"apart supernet {after}, {when}", settings, make))
        for target in () if quick else sorted(TEACHERS.keys() - {after}):
            bare = [APART, *add, *TEACHERS[target], *_length(epochs, seed)]
            make = partial(train_supernet, key=f"apart-{target}-{epochs:g}-{seed}", settings=bare)
            result.append(Piece(f"apart supernet {target}, {when}", bare, make))
        for name, form in apart.items():
            with_gate = [*settings, *_gate(name, form, seed)]
            make = partial(
                train_gate, key=_folder(f"apart gate {name} {epochs:g} {seed}"), after=key, settings=with_gate
            )
            result.append(Piece(f"apart gate {name}, {when}", with_gate, make))
    for seed in seeds:
        for target in [after] if quick else sorted(TEACHERS, reverse=True):
            settings = [*add, *TEACHERS[target], f"supernet.train.seed={seed}"]
            make = partial(train_supernet, key=f"cifar-{target}-{seed}", settings=settings, config="cifar")
            result.append(Piece(f"cifar supernet {target}, seed {seed}", settings, make, CIFAR))
        for name, form in {CHOSEN: GATES[CHOSEN]}.items() if quick else forms.items():
            settings = [*add, *TEACHERS[after], f"supernet.train.seed={seed}", *_gate(name, form, seed)]
            key = _folder(f"cifar gate {name} {seed}")
            make = partial(train_gate, key=key, after=f"cifar-{after}-{seed}", settings=settings, config="cifar_gate")
            result.append(Piece(f"cifar gate {name}, seed {seed}", settings, make, CIFAR))
    forms_of = itertools.product(seeds, STABILITY[-1:] if quick else STABILITY, ("bootstrapping", "distillation"))
    for seed, (norm, rate), target in forms_of:
        settings = [*add, *TEACHERS[target], f"network.options.norm='{norm}'", f"supernet.train.lr={rate}"]
        settings += _length(0.3 if quick else STABILITY_EPOCHS, seed)
        key = f"stability-{norm}-{rate}-{target}-{seed}"
        make = partial(train_watched, key=key, settings=settings)
        result.append(Piece(f"stability {norm} norm, rate {rate}, {target}, seed {seed}", settings, make))
    seconds = 0.2 if quick else 40.0
    key = _folder(f"gate {CHOSEN}, budget {budgets[-1] if quick else 0.5} {seeds[0]}")
    batches, large = ((1, 8), (1,)) if quick else (BATCHES, LARGE_BATCHES)
    result.append(
        Piece("time", [add, batches], partial(times, key=key, settings=add, batches=batches, seconds=seconds))
    )
    result.append(Piece("large networks", large, partial(large_times, batches=large, seconds=seconds)))
    return result


def _length(epochs: float, seed: int) -> list[str]:
    return [f"supernet.train.epochs={epochs}", f"supernet.train.seed={seed}"]


def _gate(name: str, form: Sequence[str], seed: int) -> list[str]:
    """Settings of a gate; without a budget it ends where its losses leave it."""
    free = [] if "budget" in name else ["gate.exact=false", "gate.budget=1.0"]
    return [*form, *free, f"gate.train.seed={seed}"]


def _folder(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


def _budget(share: float) -> list[str]:
    return ["gate.sgs=balanced", "gate.task=0.0", "gate.cost=budget", f"gate.budget={share}"]


def train_supernet(
    context: Context, before: Mapping[str, Any], key: str, settings: list[str], config: str = "supernet"
) -> dict[str, Any]:
    """A supernet, without gates."""
    settings = [s for s in settings if not s.startswith("gate.")]
    found = context.train(key, "dsnet", config, settings)["phases"]["supernet"]
    return {"top1_by_width": found["top1_by_width"], "seconds": found["seconds"]}


def train_watched(context: Context, before: Mapping[str, Any], key: str, settings: list[str]) -> dict[str, Any]:
    """A supernet whose every step is logged; it may diverge."""
    top1: list[float] | None = None
    try:
        watched = [*settings, "run.log_every=1", "run.norms=true"]
        phases = context.train(key, "dsnet", "supernet", [s for s in watched if not s.startswith("gate.")])["phases"]
        top1 = phases["supernet"]["top1_by_width"]
    except FloatingPointError as error:
        say(str(error))
    lines = (context.runs / key / "supernet" / "train.csv").read_text().splitlines()
    heads, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]
    columns = {
        name: [float(row[heads.index(name)]) for row in rows[:STABILITY_STEPS]]
        for name in ("loss_slimmest", "grad_norm", "weight_change")
    }
    found = {
        "slim_loss_deviation": stdev(columns["loss_slimmest"]) if len(rows) > 1 else math.nan,
        "grad_norm": mean(columns["grad_norm"]),
        "grad_norm_most": max(columns["grad_norm"]),
        "weight_change": mean(columns["weight_change"]),
    }
    return {
        "diverged": top1 is None or top1[-1] < CHANCE,
        "steps": len(rows),
        "top1_by_width": top1,
        **{name: value if math.isfinite(value) else None for name, value in found.items()},
    }


def train_gate(
    context: Context, before: Mapping[str, Any], key: str, after: str, settings: list[str], config: str = "config"
) -> dict[str, Any]:
    """Gates on a supernet trained before."""
    found = context.train(key, "dsnet", config, settings, after, ["supernet"])["phases"]["gate"]
    return {**found["routing"], "budget": found["budget"], "seconds": found["seconds"]}


def load(context: Context, key: str, settings: Sequence[str]) -> nn.Module:
    """A network with its gates as trained."""
    config = load_config(Config, context.config("config"), list(settings))
    shape = {"in_channels": context.data.train.images.shape[1], "num_classes": len(context.data.classes)}
    net = create_model(config.network.name, **shape, **config.network.options)
    net.load_state_dict(load_weights(context.runs / key / "gate" / "final.safetensors"))
    return net


def times(
    context: Context,
    before: Mapping[str, Any],
    key: str,
    settings: Sequence[str],
    batches: Sequence[int],
    seconds: float,
) -> list[dict[str, Any]]:
    """Milliseconds an image: every width for all, and mixed batches with the gate, against multiply-adds."""
    data = context.data
    net = frozen(load(context, key, settings))
    image = data.train.images.shape[1:]
    costs = route_costs(net, image)
    routing = evaluate_routing(net, data.batches(data.test, 250), costs)
    gate = net.gates[0]  # type: ignore[index,union-attr]
    table_of = mac_table(net, image, int(net.num_widths))  # type: ignore[arg-type]
    nets: dict[str, nn.Module] = {f"width {i}": AtWidth(net, i) for i in gate.space}  # type: ignore[union-attr]
    left = {f"width {i}": float(table_of[i] / table_of[gate.space[-1]]) for i in gate.space}  # type: ignore[union-attr]
    nets["dynamic"], left["dynamic"] = Dynamic(net), routing.mean_macs / float(table_of[gate.space[-1]])  # type: ignore[union-attr,index]
    return _linearity(nets, left, data.normalize(data.test.images), batches, seconds)


def _linearity(
    nets: Mapping[str, nn.Module],
    left: Mapping[str, float],
    images: torch.Tensor,
    batches: Sequence[int],
    seconds: float,
) -> list[dict[str, Any]]:
    """Share of time over share of multiply-adds, of the widest way."""
    widest = list(left)[-2]
    rows = []
    for size in batches:
        parts = batches_of(images, size)
        found = measure({name: Cycle(net, parts) for name, net in nets.items()}, seconds=seconds)
        for name, time in found.items():
            share = time.median_ms / found[widest].median_ms
            rows.append(
                {
                    "network": name,
                    "batch": size,
                    "ms": time.median_ms / size,
                    "macs_left": left[name],
                    "time_left": share,
                }
            )
    return rows


def large_times(
    context: Context, before: Mapping[str, Any], batches: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """MobileNetV1's and ResNet-50's supernets at 224x224 with random weights, choices spread evenly."""
    rows = []
    side = 32 if context.quick else 224
    for name in ("ds_mobilenet", "ds_resnet50"):
        net = create_model(name, num_classes=100)
        images = torch.randn(64, 3, side, side)
        _spread(net, images[:16])
        frozen(net)
        costs = route_costs(net, (3, side, side))
        choice = net.route(images)[1]  # type: ignore[operator]
        gate = net.gates[0]  # type: ignore[index,union-attr]
        table_of = mac_table(net, (3, side, side), max(gate.space) + 1)  # type: ignore[union-attr]
        nets: dict[str, nn.Module] = {f"width {i}": AtWidth(net, i) for i in gate.space}  # type: ignore[union-attr]
        most = float(table_of[-1])
        left = {f"width {i}": float(table_of[i]) / most for i in gate.space}  # type: ignore[union-attr]
        nets["dynamic"], left["dynamic"] = Dynamic(net), float(costs[choice[:, 0]].double().mean()) / most
        rows += [{"model": name, **row} for row in _linearity(nets, left, images, batches, seconds)]
    return rows


@torch.no_grad()
def _spread(net: nn.Module, images: torch.Tensor) -> None:
    """Statistics that keep a random network's signal alive, and a gate that answers differently from image to image."""
    for module in net.modules():
        if isinstance(module, SwitchableBatchNorm2d):
            module.momentum = 1.0
    for width in range(int(net.num_widths)):  # type: ignore[arg-type]
        net(images, width)
    net.eval()
    gate = net.gates[0]  # type: ignore[index,union-attr]
    z = gate.decide(net.segment(0, images, 0), 0)[1]  # type: ignore[operator,union-attr]
    gate.offset.copy_(-z.mean(0))  # type: ignore[union-attr]


# --- page ---

GATES_TEXT = (
    "Gates, against two ways to deal widths out blindly at as many multiply-adds: each width as often as the gate "
    "chooses it (same shares), and the best mixture of any two widths (static mixture). The oracle knows a width that "
    "is right:\n\n"
)
APART_TEXT = (
    "Where the slimmest width has 4 channels of 64 it loses enough for choices to matter, the more the shorter the "
    "training. `expected` learns the share of right answers itself, over every width, at a price (`gate.sgs`; not of "
    "the paper). Top-1 in % of every width:\n\n"
)
CIFAR_TEXT = (
    "A supernet whose widths lie further apart, 24 passes in batches of 1024 (`cifar.toml`, `cifar_gate.toml`): so few "
    "steps leave a teacher weak, and what learns from one far behind. Not run: the other two seeds of "
    "distillation, and some budgets. Top-1 in % of every width:\n\n"
)


def _grouped(made: Mapping[str, Any], kind: str) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for name, result in made.items():
        if name.startswith(f"{kind} "):
            groups.setdefault(name.removeprefix(f"{kind} ").rpartition(", seed ")[0], []).append(result)
    return groups


def headline(made: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the seeds."""
    result: dict[str, Any] = {}
    gates = _grouped(made, "gate")
    gates = {EXPECTED: _grouped(made, "apart gate").get(f"{EXPECTED}, {APART_LENGTHS[0]:g} epochs", []), **gates}
    for key, name in (("sgs", CHOSEN), ("gumbel", "gumbel"), ("published", "sgs, published"), ("expected", EXPECTED)):
        if gates.get(name):
            wanted = ("top1", "gate_diversity", "macs_left", "static_mixture")
            result[key] = {field: mean(one[field] for one in gates[name]) for field in wanted}
    result["widths"] = [
        {
            "trained": name,
            "top1_by_width": [mean(column) for column in zip(*(one["top1_by_width"] for one in group), strict=True)],
        }
        for kind in ("supernet", "alone")
        for name, group in _grouped(made, kind).items()
    ]
    return result


def page(results: Mapping[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Everything that is there yet."""
    made = {name: piece["result"] for name, piece in results["pieces"].items()}
    parts, plots = [], {}
    supernets, alone, gates = (_grouped(made, kind) for kind in ("supernet", "alone", "gate"))
    supernets = dict(sorted(supernets.items(), key=lambda item: float(item[0].split()[1])))  # shorter ones first
    if supernets:
        rows = [[name, len(group), *_columns(group)] for name, group in supernets.items()]
        count = len(rows[0]) - 2
        heads = ["what all but the widest learn, length", "seeds", *(f"width {i}" for i in range(count))]
        if alone:
            columns = [spread([g["top1_by_width"][0] for g in group]) for group in alone.values()]
            rows.append([f"each width trained alone, {GATED} epochs", min(map(len, alone.values())), *columns])
        parts.append("Top-1 in % of every width:\n\n" + table(heads, rows))
        slimmest = _slimmest(made, "supernet")
        series = {
            target: [[epochs, mean(by_seed.values())] for epochs, by_seed in sorted(by_length.items())]
            for target, by_length in slimmest.items()
        }
        plots["length.png"] = curves({"x": "epochs", "y": "top-1 of the slimmest, %", "series": series})
        parts.append("![against the length of training](length.png)")
        parts += _crossover_part(slimmest)
    parts += _stability_part(made)
    if gates:
        parts.append(GATES_TEXT + _gate_table(gates))
        best = gates.get(CHOSEN) or next(iter(gates.values()))
        at = [mean(column) for column in zip(*(g["top1_at"] for g in best), strict=True)]
        widest = best[0]["macs_at"][-1]
        points = {"one width for all": [[m / widest, t] for m, t in zip(best[0]["macs_at"], at, strict=True)]}
        for name, group in gates.items():
            if len(group) == len(best):  # else the networks under it are not those of the curve
                points[name] = [[mean(g["macs_left"] for g in group), mean(g["top1"] for g in group)]]
        plots["gates.png"] = curves({"x": "share of multiply-adds", "y": "top-1, %", "series": points})
        parts.append("Means over the seeds, of the gates that have all:\n\n![gates](gates.png)")
        parts += _asked_part(gates, made)
    parts += _apart_part(made)
    parts += _cifar_part(made)
    for name, title in (
        ("time", "Time of the trained network"),
        ("large networks", "Supernets at 224x224, random weights, even choices"),
    ):
        if name in made:
            rows = [
                [
                    r.get("model", "trained"),
                    r["network"],
                    r["batch"],
                    r["ms"],
                    r["macs_left"],
                    r["time_left"],
                    r["time_left"] - r["macs_left"],
                ]
                for r in made[name]
            ]
            heads = ["network", "way", "batch", "ms an image", "MACs left", "time left", "difference"]
            parts.append(f"{title}, gate included, against the widest way:\n\n" + table(heads, rows))
    return "\n\n".join(parts), plots


def _gate_table(gates: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    heads = ["gate", "seeds", "top-1 %", "over same shares", "over static mixture", "oracle", "MACs asked"]
    heads += ["MACs left, %", "diversity, nat", "wide if hard", "wide if easy"]
    rows = []
    for name, group in gates.items():

        def of(field: str, group: Sequence[Mapping[str, Any]] = group) -> list[float]:
            return [g[field] for g in group if g[field] is not None]

        rows.append(
            [
                name,
                len(group),
                spread(of("top1")),
                *(spread(over) for over in _over(group)),
                spread(of("oracle")),
                group[0]["budget"] if "budget" in name else None,
                spread([100 * m for m in of("macs_left")]),
                *(spread(of(field)) for field in ("gate_diversity", "wide_given_hard", "wide_given_easy")),
            ]
        )
    return table(heads, rows)


def _over(group: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Points over the same shares of the widths dealt out blindly, and over the best mixture at as many MACs."""
    same, best = ([g["top1"] - g[blind] for g in group] for blind in ("same_histogram", "static_mixture"))
    return same, best


def _apart_part(made: Mapping[str, Any]) -> list[str]:
    """Gates on widths that lie further apart, the package's own form among them."""
    supernets, gates = (
        dict(
            sorted(_grouped(made, f"apart {kind}").items(), key=lambda item: float(item[0].split(", ")[-1].split()[0]))
        )
        for kind in ("supernet", "gate")
    )
    if not supernets:
        return []
    rows = [[name, len(group), *_columns(group)] for name, group in supernets.items()]
    heads = ["what all but the widest learn", "seeds", *(f"width {i}" for i in range(len(rows[0]) - 2))]
    parts = [
        "## Widths further apart\n\n" + APART_TEXT + table(heads, rows),
        *_crossover_part(_slimmest(made, "apart supernet")),
    ]
    if gates:
        parts.append(
            "Their gates. Those of `expected` train for 15 passes at a rate of 0.5, the balanced ones for 10 "
            "at 0.05. Wide means the widest, which `expected` never chose. Not run: `gumbel` and `sgs, published`, the "
            "budget after 2 epochs, seed 2 at 6 epochs:\n\n" + _gate_table(gates)
        )
    for name, group in gates.items():
        if name.startswith((EXPECTED, CHOSEN)):
            said = [*_verdicts(group), *_budget_verdicts({name: group})]
            parts.append(f"Asked for, of {name}: {'; '.join(said)}.")
    return parts


def _cifar_part(made: Mapping[str, Any]) -> list[str]:
    """The same gates where the slimmest width loses more."""
    parts, gates = [], _grouped(made, "cifar gate")
    supernets = _grouped(made, "cifar supernet")
    if supernets:
        rows = [[name, len(group), *_columns(group)] for name, group in supernets.items()]
        heads = ["what all but the widest learn", "seeds", *(f"width {i}" for i in range(len(rows[0]) - 2))]
        parts.append("## CIFAR-10\n\n" + CIFAR_TEXT + table(heads, rows))
    if gates:
        parts.append("Gates on the bootstrapped ones:\n\n" + _gate_table(gates))
        if CHOSEN in gates:
            parts.append(f"Asked for, of {CHOSEN}: {'; '.join(_verdicts(gates[CHOSEN]))}.")
    return parts


def _slimmest(made: Mapping[str, Any], kind: str) -> dict[str, dict[float, dict[str, float]]]:
    """Accuracy of the slimmest width by what is learned, epochs and seed."""
    found: dict[str, dict[float, dict[str, float]]] = {}
    for name, result in made.items():
        if name.startswith(f"{kind} "):
            target, length, seed = name.removeprefix(f"{kind} ").split(", ")
            by_length = found.setdefault(target, {})
            by_length.setdefault(float(length.split()[0]), {})[seed] = result["top1_by_width"][0]
    return found


def _crossover_part(slimmest: Mapping[str, Mapping[float, Mapping[str, float]]]) -> list[str]:
    """The teacher that the method proposes against the others, by length, over the seeds that both have."""
    lines = []
    for other in ("distillation", "labels"):
        said, ahead, longest = [], False, 0.0
        for epochs, own in sorted(slimmest.get("bootstrapping", {}).items()):
            theirs = slimmest.get(other, {}).get(epochs, {})
            pairs = [own[seed] - theirs[seed] for seed in own if seed in theirs]
            if pairs:
                by, longest = mean(pairs), epochs
                ahead = ahead or by > 0
                said.append(f"{by:+.2f} after {epochs:g} epochs" + (" (one seed)" if len(pairs) == 1 else ""))
        if said:
            never = "" if ahead else f"; not ahead at any length: no crossover up to {longest:g} epochs"
            lines.append(f"Bootstrapping against {other}, slimmest width, points: {', '.join(said)}{never}.")
    if lines:
        lines.append("Differences within the spread of the seeds tell nothing.")
    return [" ".join(lines)] if lines else []


def _verdict(met: bool) -> str:
    return "reached" if met else "**missed**"


def _verdicts(group: Sequence[Mapping[str, Any]]) -> list[str]:
    diverse = mean(g["gate_diversity"] for g in group)
    same, best = (mean(over) for over in _over(group))
    return [
        f"a diversity above {MOST_ALIKE} nat, {_verdict(diverse > MOST_ALIKE)} with {diverse:.2f}",
        f"{LEAST_OVER:+} points over the same shares of widths, {_verdict(same >= LEAST_OVER)} with {same:+.2f}",
        f"{LEAST_OVER:+} points over the best static mixture, {_verdict(best >= LEAST_OVER)} with {best:+.2f}",
    ]


def _budget_verdicts(gates: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    said = []
    for name, group in gates.items():
        if "budget" in name:
            off = max(abs(g["macs_left"] / g["budget"] - 1) for g in group)
            said.append(
                f"the multiply-adds of {name} within {100 * MOST_OFF:.0f} %, {_verdict(off <= MOST_OFF)} with "
                f"{100 * off:.1f} % at most"
            )
    return said


def _asked_part(gates: Mapping[str, Sequence[Mapping[str, Any]]], made: Mapping[str, Any]) -> list[str]:
    """What was asked of the gates against what was reached, and what is missing."""

    said = [*(_verdicts(gates[CHOSEN]) if CHOSEN in gates else []), *_budget_verdicts(gates)]
    wanted = [*GATES, *(f"{CHOSEN}, budget {share}" for share in BUDGETS)]
    absent = [
        *(f"gate {name}" for name in wanted if name not in gates),
        *(name for name in ("time", "large networks") if name not in made),
    ]
    lines = [f"Asked for, of {CHOSEN}: {'; '.join(said)}."] if said else []
    return [*lines, *([f"Not on this page yet: {'; '.join(absent)}."] if absent else [])]


def _stability_part(made: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, group in _grouped(made, "stability").items():
        ends = [g["top1_by_width"] for g in group if not g["diverged"]]
        rows.append(
            [
                name,
                f"{sum(g['diverged'] for g in group)} of {len(group)}",
                *(spread([top1[i] for top1 in ends]) for i in (0, -1)),
                *(
                    spread([g[field] for g in group if g[field] is not None])
                    for field in ("slim_loss_deviation", "grad_norm", "grad_norm_most", "weight_change")
                ),
            ]
        )
    if not rows:
        return []
    heads = ["norm, learning rate, teacher", "diverged", "slimmest, %", "widest, %", "slim loss, deviation"]
    heads += ["gradient, mean norm", "largest", "change of weights a step"]
    return [
        f"Stability over the first {STABILITY_STEPS} steps; a run has diverged if a number was not finite or the "
        f"widest network ended below {CHANCE:g} %:\n\n" + table(heads, rows)
    ]


def _columns(group: Sequence[Mapping[str, Any]]) -> list[str]:
    return [spread(column) for column in zip(*(one["top1_by_width"] for one in group), strict=True)]


EXPERIMENT = Experiment("dsnet", "DS-Net: a width for every image", "fashion-mnist", pieces, headline, page)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
