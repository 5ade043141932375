"""BlockDrop on CIFAR-10: fewer blocks, the baselines they are held against, and the time that is left."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from effkern.blockdrop import (
    BlockDropNet,
    JointTraining,
    PolicyNet,
    PolicyTraining,
    Usage,
    best_statics,
    easiest_and_hardest,
    evaluate,
    first_blocks,
    fixed_policy,
    load_first_blocks,
    random_policy,
    summary,
)
from effkern.data import BatchFeed
from effkern.demo.measuring import eager_forms
from effkern.inference import optimize
from effkern.models import create_model
from effkern.models.resnet import ResNet
from effkern.nn import skip_form
from effkern.nn.residual import set_bn_over
from effkern.recipes.blockdrop import Config
from effkern.report.plots import who_used_what
from effkern.training import (
    Recipe,
    Step,
    Supervised,
    Timing,
    count_macs,
    load_config,
    load_json,
    load_weights,
    measure,
    save_weights,
    train,
)
from experiments.blockdrop_page import headline, page
from experiments.blockdrop_runs import (
    ALONE,
    AT,
    BATCHES,
    CHOSEN,
    COPIED,
    COURSES,
    CREDITS,
    FIRST,
    FURTHER,
    GAMMAS,
    HALF,
    HALVED,
    LARGE_BATCHES,
    LAYERS,
    LEARNED,
    LONG,
    LONGER,
    MIXTURE,
    ON,
    QUICK,
    RELAY,
    RELAYED,
    SEEDS,
    SMALL,
    STATISTICS,
    TAUGHT,
    TINY,
    USAGES,
)
from experiments.common import Context, Cycle, Experiment, Piece, batches_of, frozen, keep_memory, main


def pieces(quick: bool) -> list[Piece]:
    """Trainings, then analysis, then times."""
    add = QUICK if quick else []
    gammas, seeds, batches = (GAMMAS[:2], SEEDS[:1], (1, 8)) if quick else (GAMMAS, SEEDS, BATCHES)
    dense = [TINY, "train.epochs=0.2", "train.batch_size=64"] if quick else []
    result = [Piece("dense", dense, partial(train_dense, settings=dense))]
    order = sorted(gammas, key=lambda gamma: gamma != FIRST)
    kinds = (
        ("gamma ", order, train_gamma),
        (LONG, LONGER[: len(gammas)], train_longer),
        (LEARNED, TAUGHT, train_taught),
        (ON, tuple(FURTHER)[:1] if quick else tuple(FURTHER), train_further),
    )
    for begin, some, make in kinds:
        for gamma in some:
            settings = [f"joint.gamma={gamma}", *(going_on(gamma) if begin == ON else []), *add]
            result.append(Piece(f"{begin}{gamma:g}", settings, partial(make, gamma=gamma, settings=settings)))
    wanted = _chain(CHOSEN) if quick else list(RELAY)
    for credit, own in CREDITS.items():
        settings = [*own, "joint.train.epochs=0.03", *add]
        make = partial(train_alone, credit=credit, settings=settings)
        result.append(Piece(f"{ALONE}{credit}", settings, make))
    for name in wanted:
        after, passes, given = RELAY[name]
        settings = [f"joint.train.epochs={passes}", *given, *add]
        result.append(
            Piece(f"{RELAYED}{name}", settings, partial(train_relay, name=name, after=after, settings=settings))
        )
    for gamma in (AT,) if quick else SMALL:
        settings = [*_small(gamma), *add]
        result.append(Piece(f"{HALF}{gamma:g}", settings, partial(train_small, gamma=gamma, settings=settings)))
    result.append(Piece(COPIED, add, partial(train_copy, settings=add)))
    result.append(Piece("analysis", add, partial(analyse, settings=add)))
    for kind in STATISTICS:
        settings = [*add, "joint.gamma=2.0", "joint.train.optimizer=adam", "joint.train.weight_decay=0.0"]
        settings += ["joint.train.lr=1e-3", "joint.train.schedule=constant", "joint.train.warmup=0.0"]
        settings += ["joint.policy_lr=1.0", f"joint.bn_stats={kind}"]
        result.append(Piece(f"two steps, {kind}", settings, partial(two_steps, kind=kind, settings=settings)))
    for seed, (name, course) in itertools.product(seeds, COURSES.items()):
        settings = [*course, *(f"{phase}.train.seed={seed}" for phase in ("base", "policy", "joint")), *add]
        make = partial(train_course, name=name, seed=seed, settings=settings)
        result.append(Piece(f"K = 45, {name}, seed {seed}", settings, make))
    seconds = 0.2 if quick else 40.0
    result.append(Piece("time", [add, batches], partial(times, settings=add, batches=batches, seconds=seconds)))
    result.append(Piece("step time", add, partial(step_times, settings=add, seconds=seconds)))
    large = (1,) if quick else LARGE_BATCHES
    result.append(Piece("resnet101", large, partial(large_times, batches=large, seconds=seconds)))
    return result


# --- trainings ---


def train_dense(context: Context, before: Mapping[str, Any], settings: list[str]) -> dict[str, Any]:
    """The network with every block, fine-tuned on these images."""
    init = [f"network.init={context.weights}"] if context.weights else []
    phase = context.train("dense", "stochastic-depth", "dense", [*settings, *init])["phases"]["train"]
    return {"top1": phase["test"]["top1"], "seconds": phase["seconds"], "began_with": Path(context.weights).name}


def with_dense(context: Context, settings: Sequence[str]) -> list[str]:
    """Settings of a run that begins with the dense network, and its policy with that one's first blocks."""
    dense = context.runs / "dense" / "train" / "final.safetensors"
    return [*settings, f"network.init={dense}", f"policy.weights={dense}"]


def train_gamma(context: Context, before: Mapping[str, Any], gamma: float, settings: list[str]) -> dict[str, Any]:
    """Base, policy and both together for one penalty; base and policy of the first one serve the others."""
    return _train(context, f"gamma-{gamma:g}", f"gamma-{FIRST:g}", "config", with_dense(context, settings))


def train_longer(context: Context, before: Mapping[str, Any], gamma: float, settings: list[str]) -> dict[str, Any]:
    """The same by the longer recipe, whose base begins where the dense network began."""
    init = [f"network.init={context.weights}", f"policy.weights={context.weights}"] if context.weights else []
    return _train(context, f"longer-{gamma:g}", f"longer-{LONGER[0]:g}", "longer", [*settings, *init])


def train_taught(context: Context, before: Mapping[str, Any], gamma: float, settings: list[str]) -> dict[str, Any]:
    """The same from the dense network, which teaches base and joint phase; with what that network gives."""
    found = load_json(context.runs / "dense" / "result.json")
    teacher = {"top1": found["phases"]["train"]["test"]["top1"], "passes": found["config"]["train"]["epochs"]}
    own = with_teacher(context, settings)
    return {"teacher": teacher, **_train(context, f"taught-{gamma:g}", f"taught-{TAUGHT[0]:g}", "taught", own)}


def going_on(gamma: float) -> list[str]:
    """Settings with which the first taught network goes on."""
    passes, rate = FURTHER[gamma]
    phase = (f"train.epochs={passes}", "train.lr=4e-4", "train.warmup=0.0", f"policy_lr={rate}")
    return [f"joint.{setting}" for setting in phase]


def train_further(context: Context, before: Mapping[str, Any], gamma: float, settings: list[str]) -> dict[str, Any]:
    """What the first taught network becomes with a smaller penalty."""
    begin = context.runs / f"taught-{TAUGHT[0]:g}" / "joint" / "final.safetensors"
    own = [*with_teacher(context, settings), f"joint.init={begin}"]
    return _train(context, f"further-{gamma:g}", f"further-{gamma:g}", "taught", own)


def _first(name: str) -> str:
    """Credit of the policy that a run of the relay began with."""
    return RELAY[_chain(name)[0]][0]


def _chain(name: str) -> list[str]:
    """A run of the relay and those it goes on from, the first one first."""
    return [*_chain(RELAY[name][0]), name] if name in RELAY else []


def train_alone(context: Context, before: Mapping[str, Any], credit: str, settings: list[str]) -> dict[str, Any]:
    """The longer recipe's base and the policy alone, by one kind of credit; the joint phase is none."""
    init = [f"network.init={context.weights}", f"policy.weights={context.weights}"] if context.weights else []
    first = f"alone-{next(iter(CREDITS))}"
    key = f"alone-{credit}"
    shared = [] if key == first else ["base"]
    phases = context.train(key, "blockdrop", "longer", [*settings, *init], first, shared)["phases"]
    return {name: {"seconds": phases[name]["seconds"], **phases[name]["test"]} for name in ("base", "policy")}


def train_relay(
    context: Context, before: Mapping[str, Any], name: str, after: str, settings: list[str]
) -> dict[str, Any]:
    """A joint phase that goes on from another, or from a policy that was trained alone."""
    source = f"relay-{after}/joint" if after in RELAY else f"alone-{after}/policy"
    own = [*with_teacher(context, settings), f"joint.init={context.runs / source / 'final.safetensors'}"]
    found = load_json(context.runs / "dense" / "result.json")
    key = f"relay-{name}"
    trained = _train(context, key, key, "longer_taught", own)
    net, data = load(context, settings, name)[0], context.data
    usage = usage_of(net, context)
    held_out = evaluate(net.backbone, net.policy, data.batches(data.val, 250)).top1
    static = against_static(net.backbone, usage, list(data.batches(data.val, 250)), data.batches(data.test, 250))
    teacher = {"top1": found["phases"]["train"]["test"]["top1"]}
    return {**trained, "teacher": teacher, "held_out": held_out, "static": static}


def _small(gamma: float) -> list[str]:
    passes, beta = SMALL[gamma]
    alone = (f"gamma={gamma}", f"beta={beta}", f"train.epochs={passes}", "train.batch_size=256", "train.lr=2e-3")
    return [HALVED, *(f"policy.{one}" for one in alone), "joint.train.epochs=0.02", "joint.train.lr=1e-6"]


def train_small(context: Context, before: Mapping[str, Any], gamma: float, settings: list[str]) -> dict[str, Any]:
    """A policy of its own in front of the chosen network; the joint phase is none."""
    key, source = f"small-{gamma:g}", context.runs / f"relay-{CHOSEN}" / "joint" / "final.safetensors"
    weights = {n.removeprefix("backbone."): t for n, t in load_weights(source).items() if n.startswith("backbone.")}
    save_weights(context.runs / f"{key}.safetensors", weights)
    own = [*with_teacher(context, settings), f"network.init={context.runs / f'{key}.safetensors'}"]
    phases = context.train(key, "blockdrop", "longer_taught", own)["phases"]
    return {"policy": {**phases["policy"]["test"], "seconds": phases["policy"]["seconds"]}}


def train_copy(context: Context, before: Mapping[str, Any], settings: list[str]) -> dict[str, Any]:
    """A small policy that learns the probabilities of the chosen run's own one, on training images."""
    begin, data = time.monotonic(), context.data
    net, dense = load(context, settings, CHOSEN)
    small = _shaped(context, [HALVED, *settings], dense.num_blocks).to(
        context.device, memory_format=torch.channels_last
    )
    if not context.quick:
        load_first_blocks(small, dense.state_dict())
    large = net.policy.to(context.device).eval()

    def loss(policy: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = torch.sigmoid(large(x))
        return nn.functional.binary_cross_entropy_with_logits(policy(x), wanted)

    size = 64 if context.quick else 256
    recipe = Recipe(6.0, 3e-3, "adam", weight_decay=0.0, schedule="cosine", batch_size=size)
    train(Supervised(small, loss), BatchFeed(data, data.train, size, 0, True, 4), recipe)
    both = BlockDropNet(net.backbone, skip_form(small))
    save_weights(context.runs / "small-copied.safetensors", both.state_dict())
    test = evaluate(both.backbone, both.policy, data.batches(data.test, 250))
    own = {"top1": test.top1, "blocks": test.blocks, "patterns": test.patterns, "seconds": time.monotonic() - begin}
    return {"policy": own, "held_out": evaluate(both.backbone, both.policy, data.batches(data.val, 250)).top1}


def with_teacher(context: Context, settings: Sequence[str]) -> list[str]:
    """As `with_dense`, and the dense network teaches."""
    dense = context.runs / "dense" / "train" / "final.safetensors"
    return [*with_dense(context, settings), f"teacher.init={dense}"]


def _train(context: Context, key: str, after: str, config: str, settings: list[str]) -> dict[str, Any]:
    """Length of every phase, and what it gave on the test images."""
    shared = [] if key == after else ["base", "policy"]
    phases = context.train(key, "blockdrop", config, settings, after, shared)["phases"]
    length = ("seconds", "steps", "planned")
    return {name: {**{k: phase[k] for k in length}, **phase["test"]} for name, phase in phases.items()}


def two_steps(context: Context, before: Mapping[str, Any], kind: str, settings: list[str]) -> dict[str, Any]:
    """The first two steps of the joint phase at a high rate: what the kind of batch statistics alone does."""
    batch = load_config(Config, context.config("config"), settings).joint.train.batch_size
    length = f"joint.train.epochs={2.2 / (len(context.data.train) // batch)}"
    key, after = f"two-steps-{kind}", f"gamma-{FIRST:g}"
    found = context.train(
        key, "blockdrop", "config", with_dense(context, [*settings, length]), after, ["base", "policy"]
    )
    phases = found["phases"]
    return {
        "steps": phases["joint"]["steps"],
        **{name: phases[name]["test"]["top1"] for name in ("policy", "joint")},
        "blocks": phases["joint"]["test"]["blocks"],
    }


def train_course(
    context: Context, before: Mapping[str, Any], name: str, seed: int, settings: list[str]
) -> dict[str, Any]:
    """The policy alone over 45 blocks, with and without curriculum, on one base a seed."""
    key, after = f"k45-{name.replace(', ', '-').replace(' ', '_')}-{seed}", f"k45-curriculum-{seed}"
    shared = [] if key == after else ["base"]
    found = context.train(key, "blockdrop", "curriculum", settings, after, shared)["phases"]
    log = (context.runs / key / "policy" / "eval.csv").read_text().splitlines()
    heads, rows = log[0].split(","), [line.split(",") for line in log[1:]]
    wanted = [heads.index(head) for head in ("step", "top1", "blocks", "patterns")]
    return {
        "base": found["base"]["test"]["top1"],
        "policy": found["policy"]["test"],
        "course": [[float(row[i]) for i in wanted] for row in rows],
    }


# --- networks as trained ---


def _shaped(context: Context, settings: Sequence[str], blocks: int) -> PolicyNet:
    """A policy network of the configured form."""
    chosen = load_config(Config, context.config("longer_taught"), list(settings)).policy
    torch.manual_seed(chosen.train.seed)
    channels = context.data.train.images.shape[1]
    return PolicyNet(blocks, channels, chosen.widths, chosen.stem_stride, chosen.pool, chosen.init, chosen.large)


def load(context: Context, settings: Sequence[str], run: str = "") -> tuple[BlockDropNet, ResNet]:
    """The network of a run of the relay, or the chosen one with the copied policy, in skipping form; the dense one."""
    config = load_config(Config, context.config("longer_taught"), list(settings))
    shape = {"in_channels": context.data.train.images.shape[1], "num_classes": len(context.data.classes)}
    dense = cast(ResNet, create_model(config.network.name, **shape, **config.network.options))
    dense.load_state_dict(load_weights(context.runs / "dense" / "train" / "final.safetensors"))
    backbone = create_model(config.network.name, **shape, **config.network.options)
    policy = _shaped(context, settings if run else [HALVED, *settings], dense.num_blocks)
    net = BlockDropNet(skip_form(backbone), skip_form(policy))
    file = f"relay-{run}/joint/final.safetensors" if run else "small-copied.safetensors"
    net.load_state_dict(load_weights(context.runs / file))
    return net.to(memory_format=torch.channels_last), dense.to(memory_format=torch.channels_last).eval()  # type: ignore[return-value]


def usage_of(net: BlockDropNet, context: Context, split: str = "test") -> Usage:
    """The learned policy on a split."""
    return evaluate(net.backbone, net.policy, context.data.batches(getattr(context.data, split), 250))


def macs_of(net: BlockDropNet, dense: ResNet, usage: Usage, size: Sequence[int]) -> dict[str, float]:
    """Multiply-adds of an image: dense, of what ran, of the policy, and the shares."""
    always, each = dense.block_macs(size)
    every = float(always + sum(each))
    run = always + sum(share * macs for share, macs in zip(usage.by_block, each, strict=True))
    policy = count_macs(net.policy, torch.zeros(1, *size))
    return {
        "dense": every,
        "run": run,
        "policy": policy,
        "left": (run + policy) / every,
        "left_without_policy": run / every,
    }


# --- analysis ---


def against_static(
    net: nn.Module, usage: Usage, held_out: Sequence[tuple[Tensor, Tensor]], test: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Accuracy of the best static decisions with as many blocks as a policy uses, rounded down and up and mixed."""
    count, most_used = len(usage.by_block), torch.tensor(usage.by_block).argsort(descending=True, stable=True)
    low, high = math.floor(usage.blocks), math.ceil(usage.blocks)
    popular = [torch.zeros(count, dtype=torch.bool).index_fill(0, most_used[:blocks], True) for blocks in (low, high)]
    shown = list(test)
    found = best_statics(net, held_out, (low, high), popular)
    ends = {blocks: evaluate(net, fixed_policy(keep), shown).top1 for blocks, keep in found.items()}
    mixed = ends[high] + (high - usage.blocks) * (ends[low] - ends[high])
    return {"down": ends[low], "up": ends[high], "mixed": max(mixed, ends[low])}


def analyse(context: Context, before: Mapping[str, Any], settings: list[str]) -> dict[str, Any]:
    """The chosen policy against decisions that do not look at the image, on its own network and on its base."""
    net, dense = load(context, settings)
    usage = usage_of(net, context)
    base = skip_form(dense).to(memory_format=torch.channels_last)
    trained = load_weights(context.runs / f"alone-{_first(CHOSEN)}" / "policy" / "final.safetensors")
    base.load_state_dict({n.removeprefix("backbone."): t for n, t in trained.items() if n.startswith("backbone.")})
    data, low, high = context.data, math.floor(usage.blocks), math.ceil(usage.blocks)
    rows = []
    for where, network, images in (
        ("the policy's network", net.backbone, data.val),
        ("its base", base, data.val[:1000]),
    ):
        static = against_static(network, usage, list(data.batches(images, 250)), data.batches(data.test, 250))
        rules: dict[str, Callable[[Tensor], Tensor]] = {
            "random": random_policy(dense.num_blocks, usage.blocks, torch.Generator().manual_seed(0)),
            "first blocks": fixed_policy(first_blocks(dense.num_blocks, usage.blocks)),
            "all blocks": fixed_policy(torch.ones(dense.num_blocks, dtype=torch.bool)),
        }
        for name, rule in rules.items():
            found = evaluate(network, rule, data.batches(data.test, 250))
            rows.append({"rule": name, "network": where, "top1": found.top1, "blocks": found.blocks})
        for name, kind, blocks in (
            ("best static", "up", high),
            ("best static, rounded down", "down", low),
            (MIXTURE, "mixed", usage.blocks),
        ):
            rows.append({"rule": name, "network": where, "top1": static[kind], "blocks": blocks})
    easy, hard = easiest_and_hardest(usage, 6)
    shown = torch.cat([easy, hard.flip(0)])
    x = context.data.normalize(context.data.test[shown].images)
    with torch.inference_mode():
        predicted = net(x).argmax(1).tolist()
    plot = who_used_what(
        [
            {"index": i, "predicted": p, "keep": usage.keep[n].int().tolist()}
            for i, (n, p) in enumerate(zip(shown.tolist(), predicted, strict=True))
        ],
        context.data.test[shown].images,
        context.data.test[shown].labels,
        context.data.classes,
    )
    context.out.mkdir(parents=True, exist_ok=True)
    (context.out / "easy_and_hard.png").write_bytes(plot)  # shows images, which the result file does not hold
    return {
        **summary(usage, context.data.classes),
        "of_blocks": dense.num_blocks,
        "macs": macs_of(net, dense, usage, context.data.train.images.shape[1:]),
        "baselines": rows,
    }


# --- times ---


def times(
    context: Context, before: Mapping[str, Any], settings: list[str], batches: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Milliseconds an image, all interleaved: the policy's network (policy included), dense effkern, dense PyTorch.

    ``optimize`` folds both stems and leaves the stages, which skip; the dense forms get it as well.
    """
    keep_memory()
    net, dense = load(context, settings)
    images = context.data.normalize(context.data.test.images)
    eager = eager_forms(dense, fold=True)
    skipping = frozen(skip_form(dense).to(memory_format=torch.channels_last))
    policy = _shaped(context, [HALVED, *settings], dense.num_blocks)  # plain: it skips nothing, and is one call then
    policy.load_state_dict(net.policy.state_dict())
    deployed = BlockDropNet(net.backbone, policy.to(memory_format=torch.channels_last)).eval()
    nets: dict[str, Any] = {
        "blockdrop": frozen(optimize(deployed, images[:1])),
        LAYERS: frozen(net),
        "dense, skip ops": skipping,
        "dense, skip ops, optimized": frozen(optimize(skipping)),
        "dense, optimized": optimize(dense),
    }
    nets |= {f"PyTorch, {name}": form for name, form in eager.items()}
    # What else can be done with a decision in plain PyTorch: compute all and choose, gather, or go image by image.
    nets["masked"] = BlockDropNet(dense, net.policy).eval()
    gathering = copy.deepcopy(dense)
    set_bn_over(gathering, "kept")
    nets["gathered"] = BlockDropNet(gathering, net.policy).eval()
    nets["image by image"] = partial(_image_by_image, nets["masked"])
    rows = []
    for size in batches:
        parts = batches_of(images, size)
        found = measure({name: Cycle(one, parts) for name, one in nets.items()}, seconds=seconds, settle=1)
        rows.append({"batch": size, **_left({name: time.per(size) for name, time in found.items()})})
    return rows


def _image_by_image(net: BlockDropNet, x: Tensor) -> Tensor:
    keep, scores = net.decide(x).tolist(), []
    for image, decision in zip(x.split(1), keep, strict=True):
        state = net.backbone.stem(image)  # type: ignore[operator]
        for block, runs in zip(net.backbone.blocks(), decision, strict=True):  # type: ignore[operator]
            state = block(state) if runs else block.shortcut(state)
        scores.append(net.backbone.head(state))  # type: ignore[operator]
    return torch.cat(scores)


def _left(found: Mapping[str, Timing]) -> dict[str, Any]:
    """Times and their ratios to the faster dense form of each side."""
    own = found["blockdrop"].median_ms
    dense = min(time.median_ms for name, time in found.items() if name.startswith("dense"))
    torch_ms = min(time.median_ms for name, time in found.items() if name.startswith("PyTorch"))
    return {
        "ms": {name: time.median_ms for name, time in found.items()},
        "time_left": own / dense,
        "of_pytorch": own / torch_ms,
    }


def step_times(
    context: Context, before: Mapping[str, Any], settings: list[str], seconds: float
) -> list[dict[str, Any]]:
    """A step of each phase with the skip ops in its passes without gradient, and with every block computed."""
    data = context.data
    size = 64 if context.quick else 256
    x, y = data.normalize(data.train.images[:size]), data.train.labels[:size]
    functions: dict[str, Callable[[], None]] = {}
    for name in ("skip ops", "every block"):
        net, dense = load(context, settings)
        if name == "every block":
            dense.load_state_dict(net.backbone.state_dict())
            net = BlockDropNet(dense, net.policy)
        phase_a = PolicyTraining(net, curriculum=False).train()
        functions[f"policy alone, {name}"] = partial(_method_step, phase_a, x, y)
        other, dense = load(context, settings)
        if name == "every block":
            dense.load_state_dict(other.backbone.state_dict())
            other = BlockDropNet(dense, other.policy)
        statistics = "active" if name == "skip ops" else "all"
        phase_b = JointTraining(other, AT, bn_stats=statistics).train()  # type: ignore[arg-type]
        functions[f"both, {name}"] = partial(_method_step, phase_b, x, y)
    found = measure(functions, seconds=seconds)
    return [{"step": name, "ms": time.median_ms} for name, time in found.items()]


def _method_step(method: Any, x: Tensor, y: Tensor) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        method.zero_grad()
        for loss in method.losses(x, y, Step(0)):
            loss.backward()


def large_times(
    context: Context, before: Mapping[str, Any], batches: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """ResNet-101 with random weights: time left against multiply-adds left at several usages, policy included."""
    keep_memory()
    options: dict[str, Any] = {"widths": (4, 4, 8, 8), "blocks": (1, 1, 2, 1)} if context.quick else {}
    dense = cast(ResNet, create_model("resnet101", **options)).to(memory_format=torch.channels_last).eval()
    widths, side = ((4, 4, 8, 8), 64) if context.quick else ((64, 128, 256, 512), 224)
    policy = PolicyNet(dense.num_blocks, 3, widths, pool=2, large=True).to(memory_format=torch.channels_last).eval()
    own = count_macs(policy, torch.zeros(1, 3, side, side))
    backbone = skip_form(dense).to(memory_format=torch.channels_last)
    keep = torch.ones(1, dense.num_blocks, dtype=torch.bool)
    skipping = frozen(optimize(backbone, (torch.zeros(1, 3, side, side), keep)))
    whole, decide = frozen(optimize(backbone)), optimize(policy, torch.zeros(1, 3, side, side))
    always, each = dense.block_macs((3, side, side))
    rows = []
    for size in batches:
        x = torch.randn(size, 3, side, side).to(memory_format=torch.channels_last)
        functions: dict[str, Callable[[], Any]] = {"dense": partial(whole, x)}
        for usage in USAGES:
            keep = random_policy(dense.num_blocks, usage * dense.num_blocks, torch.Generator().manual_seed(0))(x)
            functions[f"usage {usage}"] = partial(_decided, decide, skipping, x, keep)
        found = measure(functions, seconds=seconds)
        for usage in USAGES:
            keep = random_policy(dense.num_blocks, usage * dense.num_blocks, torch.Generator().manual_seed(0))(x)
            run = always + float(keep.double().mean(0) @ torch.tensor(each, dtype=torch.float64)) + own
            left = found[f"usage {usage}"].median_ms / found["dense"].median_ms
            rows.append({"batch": size, "usage": usage, "macs_left": run / (always + sum(each)), "time_left": left})
    return rows


def _decided(policy: nn.Module, backbone: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """The policy runs, and a decision of known usage is taken."""
    policy(x)
    return backbone(x, keep)


EXPERIMENT = Experiment(
    "blockdrop", "BlockDrop: a policy for every image", "cifar10:data/cifar10.npz", pieces, headline, page
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
