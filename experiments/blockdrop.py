"""BlockDrop on CIFAR-10: fewer blocks, the baselines they are held against, and the time that is left."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
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
from effkern.report.plots import block_usage, curves, who_used_what
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
from experiments.common import Context, Cycle, Experiment, Piece, batches_of, frozen, main, spread, table

GAMMAS = (5.0, 2.0, 1.0, 7.0, 8.0, 10.0)
FIRST = 5.0  # its run trains base and policy for all
TAUGHT = (4.0,)  # penalties of taught.toml, the first one's base and policy for all
LONGER = (3.0, 2.0, 4.0)  # penalties of longer.toml, the first one's base and policy for all
# Penalties with which the first of those goes on: passes, rate of the policy.
FURTHER = {2.75: (4, 0.25), 3.0: (4, 0.15), 2.5: (5, 0.5)}
HOT = ("teacher.temperature=4.0", "teacher.weight=0.9")
_SOFT = ("joint.credit=probability",)
_SECOND = (*HOT, "joint.beta=0.02", "joint.train.lr=1e-3")
_KEPT = (*HOT, "joint.gamma=5.0", "joint.policy_lr=0.0", "joint.a=1.0")  # of the policy only batch norms move
_SGD = ("joint.train.optimizer=sgd", "joint.train.weight_decay=5e-4")
#: Joint phases of longer_taught.toml in three rounds: what each goes on from (the credit of a policy that was trained
#: alone, or a run of the round before), passes, and what it is given.
RELAY: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "1.1": ("answer", 22, ("joint.gamma=8.0", "joint.train.weight_decay=0.05")),
    "1.2": ("answer", 22, ("joint.gamma=8.0",)),
    "1.3": ("answer", 22, ("joint.gamma=5.0",)),
    "1.4": ("probability", 22, (*_SOFT, "joint.gamma=8.0", "joint.beta=0.01")),
    "1.5": ("probability", 22, (*_SOFT, "joint.gamma=4.0", "joint.beta=0.01")),
    "1.6": ("probability", 22, (*_SOFT, "joint.gamma=12.0", "joint.beta=0.02", "joint.a=0.9")),
    "1.7": ("probability", 22, (*_SOFT, "joint.gamma=4.0", "joint.beta=0.05", "joint.policy_lr=0.03")),
    "1.8": ("probability", 22, (*_SOFT, "joint.gamma=8.0", "joint.beta=0.01", *HOT)),
    "2.1": ("1.8", 50, (*_SECOND, *_SOFT, "joint.gamma=4.0")),
    "2.2": ("1.8", 50, (*_SECOND, *_SOFT, "joint.gamma=3.0")),
    "2.3": ("1.8", 50, (*_SECOND, *_SOFT, "joint.gamma=2.0")),
    "2.4": ("1.8", 50, (*_SECOND, *_SOFT, "joint.gamma=1.3")),
    "2.5": ("1.8", 50, (*_SECOND, *_SOFT, "joint.gamma=2.5", "joint.beta=0.08", "joint.policy_lr=0.2")),
    "2.6": ("1.8", 50, (*_SECOND, "joint.gamma=5.0")),
    "3.1": ("2.6", 36, (*HOT, "joint.gamma=5.0", "joint.beta=0.02", "joint.train.lr=5e-4", "joint.train.warmup=0.0")),
    "3.2": ("2.6", 36, (*HOT, "joint.gamma=7.0", "joint.beta=0.02", "joint.train.lr=1e-3")),
    "3.3": ("2.6", 36, (*_KEPT, *_SGD, "joint.train.lr=0.03")),
    "3.4": ("2.6", 36, (*_KEPT, "joint.train.lr=5e-4", "joint.train.warmup=0.0")),
    "3.5": ("2.6", 36, (*_KEPT, *_SGD, "joint.train.lr=0.01", "joint.train.warmup=0.0")),
}
CREDITS = {"answer": [], "probability": ["policy.credit=probability", "policy.beta=0.1"]}
CHOSEN = "3.5"  # of the last round, the best on held-out images
HALVED = "policy.pool=2"
#: Policies that see the image at half its size, trained alone in front of that run's network: passes, weight of the
#: entropy, by penalty.
SMALL = {5.0: (7, 0.02), 9.0: (5, 0.03)}
AT = 5.0  # penalty of the policy that is looked at in detail, and measured
BATCHES = (1, 8, 64, 256)
LARGE_BATCHES = (1, 8, 32)
USAGES = (1.0, 0.75, 0.5, 0.3)
STATISTICS = ("active", "all", "frozen")
SEEDS = (0, 1, 2)
COURSES = {
    "curriculum": ["policy.curriculum=true"],
    "all blocks from the start": ["policy.curriculum=false"],
    "curriculum, published entropy": ["policy.curriculum=true", "policy.entropy_form=published"],
}
STARTED_TEXT = (
    "Those weights were made from all training images of the original data set, the ones held out here among them, so "
    "held-out accuracy flatters; every number below is of the test images. Images that went through JPEG are harder "
    "than the original pixels, so numbers are not to be compared with a paper's."
)
#: A baseline: for some images the best static choice of as many whole blocks as there are, for the rest of one more.
MIXTURE = "best static, mixed"
#: What the experiment is to reach: points under the dense network, and share of its blocks.
MOST_LOST, MOST_USED = 1.0, 0.7
BEYOND = 0.5, 0.6  # likewise, wished for
SHOWN = 6.0  # points under the best that the plot goes down to
#: Likewise of time: how far its share may lie above that of multiply-adds, at which batch.
MOST_LATE, TIMED = 0.05, 64
LAYERS = "without optimize"
TINY = "network.options={widths=[4,4,4],blocks=[1,1,1],stem_stride=2}"
#: Pieces of results.json that no call makes again: another recipe, kept for comparison.
EARLIER = "earlier recipe, gamma "
LONG = "longer recipe, gamma "
LEARNED = "taught, gamma "
ON = "taught further, gamma "
RELAYED = "relay, run "
ALONE = "relay, policy alone by "
HALF = "half-size policy, gamma "
COPIED = "half-size policy, copied"
HALF_TEXT = (
    "A smaller policy, which sees the image at half its size (`policy.pool`) and takes a quarter of the multiply-adds, "
    "on two cores, in front of the network of run {run}, which stays as it is: trained alone by policy gradient, or as "
    "a copy, which learns the probabilities of that run's own policy (6 passes over training images):\n\n"
)
RELAY_TEXT = (
    "A relay (`longer_taught.toml`) of joint phases from the longer recipe's base ({top1:.2f} %): three rounds on one "
    "H100, each from a run of the round before, with a dense network of {teacher:.2f} % as the teacher (a repetition "
    "of the one above, whose weights were not kept, cut short by its seconds). Before the first round the policy was "
    "trained alone, {alone}. In the last round, runs 3 to 5 leave the policy's weights and train the network on its "
    "decisions, which is worth 0.1 to 0.3 points. Which runs to go on from was chosen with a look at all of this "
    "table; of the last round the one is taken that is best on held-out images. Every run ended when its seconds were "
    "spent, with the schedule played to its end: 21 to 23, 47 to 54 and 35 to 36 passes. Over static: points over the "
    "best static mixture of as many blocks on the run's own network, chosen on all held-out images; another search "
    "gives other decisions, so differences of some tenths are chance (run 2.2 is one static decision itself). All of "
    "them, like the taught ones, learned for longer than the dense network.\n\n"
)
CREDIT_TEXT = "by {} ({:.2f} % with {:.2f} blocks, {:.0f} decisions)"
TAUGHT_TEXT = (
    "With the dense network as a teacher (`taught.toml`): base and joint phase learn its answers besides the labels, "
    "which the published method does not. Trained on two cores, the networks in bfloat16. The teacher here has "
    "{teacher[top1]:.2f} % ({teacher[passes]:g} passes on two cores; the weights of the dense network above were not "
    "kept), the base {base[top1]:.2f} %, and the policy alone ends at {policy[top1]:.2f} % with {policy[blocks]:.2f} "
    "blocks and {policy[patterns]:.0f} decisions:\n\n"
)
FURTHER_TEXT = (
    "Gone on from there at a smaller penalty and learning rate: "
    + "; ".join(
        f"gamma {g:g} for {passes} passes, the policy at {rate:g} of it" for g, (passes, rate) in FURTHER.items()
    )
    + ". The last is faster than the network follows:\n\n"
)
LONGER_TEXT = (
    "A longer recipe (`longer.toml`): the base goes on from the given weights for 34 passes ({base[top1]:.2f} %), the "
    "policy alone ends at {policy[top1]:.2f} % with {policy[blocks]:.2f} blocks and {policy[patterns]:.0f} decisions, "
    "the joint phase takes 60 passes. It is worth almost a point at equal blocks, and makes of these penalties one "
    "static choice of 7 blocks or little more; which of the three ends higher is chance:\n\n"
)
EARLIER_TEXT = (
    "An earlier recipe, against the same dense network: a base trained on for 26 passes at a learning rate of 0.1 "
    "(87.98 %), the joint phase for 28 passes at 2e-3. It gave up more of what the weights held, but of what keeps to "
    "70 % of the blocks its gamma 5 is the most accurate. (Before that, a joint phase of 6 passes on two cores ended "
    "at 87.11 % with 10.03 blocks, 1.68 points under a dense network of 88.79 %.)\n\n"
)
QUICK = [
    TINY,
    "policy.widths=[4]",
    *(f"{phase}.train.{x}" for phase in ("base", "policy", "joint") for x in ("epochs=0.2", "batch_size=64")),
]


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
        found = measure({name: Cycle(one, parts) for name, one in nets.items()}, seconds=seconds)
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


# --- page ---


def headline(made: Mapping[str, Any]) -> dict[str, Any]:
    """Dense and learned, side by side."""
    result: dict[str, Any] = {}
    if "dense" in made:
        result["dense"] = {"top1": made["dense"]["top1"]}
    if "analysis" in made:
        found = made["analysis"]
        rows = {f"batch{row['batch']}": row["time_left"] for row in made.get("time", [])}
        result["dense"] |= {"blocks_used": found["of_blocks"], "macs_left": 1.0, "time_left": dict.fromkeys(rows, 1.0)}
        result["blockdrop"] = {
            "top1": found["top1"],
            "blocks_used": found["blocks_used"],
            "macs_left": found["macs"]["left"],
            "time_left": rows,
        }
    return result


def page(results: Mapping[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Everything that is there yet."""
    made = {name: piece["result"] for name, piece in results["pieces"].items()}
    parts, plots = [], {}
    gammas = _of_kind(made, "gamma ")
    if "dense" in made:
        begun = f", begun with `{made['dense']['began_with']}`" if made["dense"]["began_with"] else ""
        parts.append(
            f"The dense network, fine-tuned on these images{begun}: {made['dense']['top1']:.2f} % on the test images. "
            + (STARTED_TEXT if begun else "")
        )
    if gammas:
        rows = [
            [
                gamma,
                *(one["joint"][key] for key in ("top1", "blocks")),
                int(one["joint"]["patterns"]),
                one["policy"]["top1"],
                one["policy"]["blocks"],
                one["base"]["top1"],
            ]
            for gamma, one in sorted(gammas.items(), key=lambda item: float(item[0]))
        ]
        heads = ["gamma", "top-1 %", "blocks", "policies", "policy alone, %", "its blocks", "base, %"]
        parts.append("Penalty of a wrong answer in the joint phase:\n\n" + table(heads, rows))
        parts += _target_part(made, gammas, results["pieces"])
        points = [[row[2], row[1]] for row in rows]
        series = {"policy": points}
        for begin, name in ((LONG, "policy, longer"), (RELAYED, "policy, relay")):
            if others := _of_kind(made, begin):
                series[name] = [[one["joint"]["blocks"], one["joint"]["top1"]] for one in others.values()]
        if small := _halves(made):
            series["policy, half-size"] = [[one["policy"]["blocks"], one["policy"]["top1"]] for one in small.values()]
        static = [b for b in made.get("analysis", {}).get("baselines", []) if b["rule"].startswith("best static")]
        if own := [[b["blocks"], b["top1"]] for b in static if b["network"] == "the policy's network"]:
            series["best static"] = own
        best = max(top1 for line in series.values() for _, top1 in line)
        series = {name: sorted(point for point in line if point[1] > best - SHOWN) for name, line in series.items()}
        plots["accuracy.png"] = curves({"x": "blocks an image", "y": "top-1, %", "series": series})
        parts.append(
            f"![accuracy against blocks](accuracy.png)\n\nThe plot leaves out two recipes (taught, earlier) and what "
            f"lies more than {SHOWN:g} points under the best; the tables have all."
        )
    if "analysis" in made:
        found = made["analysis"]
        parts.append(
            f"From here on the network of run {CHOSEN} with the copied policy. It is "
            f"right on {found['top1']:.2f} % ({found['top1'] - made['dense']['top1']:+.2f} points against the dense "
            "network). "
            f"It runs {found['blocks_used']:.2f} ± {found['blocks_deviation']:.2f} of {found['of_blocks']} blocks, "
            f"{found['unique_policies']} different decisions on the test images, {100 * found['macs']['left']:.1f} % "
            "of the multiply-adds (without the policy network: "
            f"{100 * found['macs']['left_without_policy']:.1f} %). Decisions that do not look at the image, with as "
            "many blocks:\n\n"
            + table(
                ["rule", "network", "top-1 %", "blocks"],
                [[b["rule"], b["network"], b["top1"], b["blocks"]] for b in found["baselines"]],
            )
        )
        rules = {b["rule"]: b for b in reversed(found["baselines"])}
        static = rules.get(MIXTURE, rules["best static"])
        parts.append(
            f"Against the {static['rule']} on its own network the policy is {found['top1'] - static['top1']:+.2f} "
            f"points with {found['blocks_used'] - static['blocks']:+.2f} blocks"
            + ("." if static["rule"] == MIXTURE else ": a static choice runs whole blocks.")
            + _searched_before(made)
        )
        parts.append(
            "Blocks by class:\n\n"
            + table(["class", "blocks"], sorted(found["by_class"].items(), key=lambda item: item[1] or 0))
        )
        parts.append(
            "Images by the number of blocks they run:\n\n"
            + table(
                ["blocks", "images", "top-1 %"],
                [[r["blocks"], r["images"], r["top1"]] for r in found["accuracy_by_blocks"]],
            )
        )
        parts.append("![blocks](blocks.png)\n\n![images with the fewest and the most blocks](easy_and_hard.png)")
        plots["blocks.png"] = block_usage(found["by_block"])
    if "time" in made:
        left = made.get("analysis", {}).get("macs", {}).get("left")
        forms = (LAYERS, "masked", "gathered", "image by image")
        rows = [
            [
                r["batch"],
                r["ms"]["blockdrop"],
                r["time_left"],
                None if left is None else r["time_left"] - left,
                r["of_pytorch"],
                *(r["ms"].get(form) for form in forms),
            ]
            for r in made["time"]
        ]
        heads = [
            "batch",
            "ms an image",
            "time left",
            "less MACs left",
            "of dense PyTorch",
            *(f"{form}, ms" for form in forms),
        ]
        parts.append(
            "Time of `effkern.optimize(net)`, policy included, against the fastest dense form of effkern and of "
            "PyTorch. The last columns are the same decisions without `optimize`, and in plain PyTorch. "
            + results["pieces"]["time"].get("note", "")
            + "\n\n"
            + table(heads, rows)
        )
        late = {r["batch"]: r["time_left"] - left for r in made["time"]} if left is not None else {}
        if TIMED in late:
            met = "reached" if late[TIMED] <= MOST_LATE else "**missed**"
            parts.append(
                f"Asked for: at batch {TIMED}, a time left at most {MOST_LATE} above the multiply-adds left; {met}, "
                f"with {late[TIMED]:.2f}."
            )
    if "step time" in made:
        parts.append(
            f"Time of a training step. {results['pieces']['step time'].get('note', '')}\n\n"
            + table(["step", "ms"], [[r["step"], r["ms"]] for r in made["step time"]])
        )
    steps = {kind: made[f"two steps, {kind}"] for kind in STATISTICS if f"two steps, {kind}" in made}
    if steps:
        rows = [[kind, one["policy"], one["joint"], one["blocks"]] for kind, one in steps.items()]
        heads = ["batch statistics", "before, %", "after, %", "blocks"]
        note = results["pieces"][f"two steps, {next(iter(steps))}"].get("note", "")
        parts.append(f"The first two steps of the joint phase, with Adam at 1e-3. {note}\n\n" + table(heads, rows))
    parts += _course_part(made, plots)
    if "resnet101" in made:
        rows = [
            [r["batch"], r["usage"], r["macs_left"], r["time_left"], r["time_left"] - r["macs_left"]]
            for r in made["resnet101"]
        ]
        heads = ["batch", "blocks run", "MACs left", "time left", "difference"]
        parts.append(
            "ResNet-101 at 224x224, random weights and decisions, ResNet-10 policy included:\n\n" + table(heads, rows)
        )
    return "\n\n".join(parts), plots


def _of_kind(made: Mapping[str, Any], begin: str) -> dict[str, Any]:
    """Results by what follows ``begin`` in their pieces' names, the smallest penalty first."""
    found = {name.removeprefix(begin): made[name] for name in made if name.startswith(begin)}
    return dict(sorted(found.items(), key=lambda item: float(item[0])))


def _target_part(made: Mapping[str, Any], gammas: Mapping[str, Any], pieces: Mapping[str, Any]) -> list[str]:
    """What was asked for against what was reached, how long it was trained for, and what came before."""
    parts = []
    if "analysis" in made:
        dense, blocks = made["dense"]["top1"], made["analysis"]["of_blocks"]
        runs = {f"gamma {gamma}": one["joint"] for gamma, one in gammas.items()}
        runs |= {f"half-size policy, {name}": one["policy"] for name, one in _halves(made).items()}
        for begin in (RELAYED, LEARNED, ON, LONG, EARLIER):
            runs |= {f"{begin}{gamma}": one["joint"] for gamma, one in _of_kind(made, begin).items()}
        ends = [(name, dense - one["top1"], one["blocks"] / blocks) for name, one in runs.items()]
        said = _nearest(ends, MOST_LOST, MOST_USED)
        met = any(lost <= MOST_LOST and used <= MOST_USED for _, lost, used in ends)
        parts.append(
            f"Asked for: at most {MOST_LOST:.1f} point under the dense network with at most {100 * MOST_USED:.0f} % of "
            f"its {blocks} blocks. **{'Reached' if met else 'Missed'}**; nearest, of all recipes on this page: "
            f"{'; '.join(said)}. " + _beyond(ends)
        )
        teacher = next((one["teacher"]["top1"] for one in _of_kind(made, LEARNED).values()), None)
        taught = [
            (name, teacher - runs[name]["top1"], used) for name, _, used in ends if name.startswith((LEARNED, ON))
        ]
        said = [f"{name} ends {lost:.2f} points under it with {100 * used:.1f} %" for name, lost, used in taught]
        if said:
            own = any(lost <= MOST_LOST and used <= MOST_USED for _, lost, used in taught)
            parts.append(
                f"The taught networks began with a dense network of {teacher:.2f} %, and learned for longer than it: "
                f"{'; '.join(said)}. Held against it, the target is {'met' if own else 'missed'}."
            )
    device = pieces[f"gamma {FIRST:g}"]["machine"].get("device") if f"{FIRST:g}" in gammas else None
    if device:
        lengths = [
            f"{name} {_range([one[name]['seconds'] for one in gammas.values()])} s, "
            f"{_range([one[name]['steps'] for one in gammas.values()])} steps"
            for name in ("base", "policy", "joint")
        ]
        parts.append(
            f"Trained on one {device}, several trainings at once. Every phase ended when its seconds were spent, with "
            f"the schedule played to its end: {'; '.join(lengths)}. So a repetition takes other steps and gives other "
            "numbers; `config.toml` names the passes that were done. Base and policy are shared."
        )
    parts += _relay_part(made)
    for begin, text in ((LEARNED, TAUGHT_TEXT), (ON, FURTHER_TEXT), (LONG, LONGER_TEXT), (EARLIER, EARLIER_TEXT)):
        if found := _of_kind(made, begin):
            rows = [[gamma, *_ended(made, one["joint"]), one["joint"]["steps"]] for gamma, one in found.items()]
            heads = ["gamma", *ENDED, "joint steps"]
            parts.append(text.format(**next(iter(found.values()))) + table(heads, rows))
    return parts


#: Heads of what :func:`_ended` gives.
ENDED = ("top-1 %", "points under dense", "blocks", "policies")


def _ended(made: Mapping[str, Any], test: Mapping[str, Any]) -> list[Any]:
    """Where a training ended on the test images, beside the dense network."""
    return [test["top1"], made["dense"]["top1"] - test["top1"], test["blocks"], int(test["patterns"])]


def _nearest(ends: Sequence[tuple[str, float, float]], most_lost: float, most_used: float) -> list[str]:
    """What uses the fewest blocks of those that lost little enough, and lost least of those that use few enough."""
    near = [
        min((end for end in ends if end[1] <= most_lost), key=lambda end: end[2], default=None),
        min((end for end in ends if end[2] <= most_used), key=lambda end: end[1], default=None),
    ]
    told = [
        f"{name} ends {lost:.2f} points under it with {100 * used:.1f} %" for name, lost, used in filter(None, near)
    ]
    return list(dict.fromkeys(told))


def _beyond(ends: Sequence[tuple[str, float, float]]) -> str:
    lost, used = BEYOND
    met = any(end[1] <= lost and end[2] <= used for end in ends)
    return (
        f"Wished for beyond: at most {lost} points under it with at most {100 * used:.0f} %; "
        f"{'reached' if met else 'missed'}; nearest: {'; '.join(_nearest(ends, lost, used))}."
    )


def _halves(made: Mapping[str, Any]) -> dict[str, Any]:
    found = {f"gamma {gamma}": one for gamma, one in _of_kind(made, HALF).items()}
    return found | ({"copied": made[COPIED]} if COPIED in made else {})


def _relay_part(made: Mapping[str, Any]) -> list[str]:
    """Every run of the relay, and what static decisions reach on its network."""
    found = {name: made[f"{RELAYED}{name}"] for name in RELAY if f"{RELAYED}{name}" in made}
    if not found:
        return []
    named = {"answer": "right answers", "probability": "the probability given to the label (`policy.credit`)"}
    alone = {credit: made[f"{ALONE}{credit}"] for credit in CREDITS if f"{ALONE}{credit}" in made}
    if not alone:
        return []
    said = [
        CREDIT_TEXT.format(named[credit], *(one["policy"][key] for key in ("top1", "blocks", "patterns")))
        for credit, one in alone.items()
    ]
    rows = []
    for name, one in found.items():
        after, _, own = RELAY[name]
        joint = one["joint"]
        rows.append(
            [
                name,
                after,
                ", ".join(f"{key.rpartition('.')[2]} {value}" for key, _, value in (s.partition("=") for s in own)),
                *_ended(made, joint),
                one["held_out"],
                joint["top1"] - one["static"]["mixed"],
            ]
        )
    heads = ["run", "from", "settings", *ENDED, "held out, %", "over static"]
    text = RELAY_TEXT.format(
        top1=next(iter(alone.values()))["base"]["top1"],
        teacher=next(iter(found.values()))["teacher"]["top1"],
        alone=" or ".join(said),
    )
    parts = [text + table(heads, rows)]
    if small := _halves(made):
        rows = [[name, *_ended(made, one["policy"])] for name, one in small.items()]
        parts.append(HALF_TEXT.format(run=CHOSEN) + table(["trained", *ENDED], rows))
    return parts


def _searched_before(made: Mapping[str, Any]) -> str:
    """The same network's other search for static decisions."""
    before = made.get(f"{RELAYED}{CHOSEN}")
    if before is None:
        return ""
    over = before["joint"]["top1"] - before["static"]["mixed"]
    return f" (An earlier search found better ones: {over:+.2f} for this network with its large policy.)"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def _course_part(made: Mapping[str, Any], plots: dict[str, bytes]) -> list[str]:
    rows, series = [], {}
    for name in COURSES:
        found = [one for key, one in made.items() if key.startswith(f"K = 45, {name}, seed")]
        if not found:
            continue
        rows.append(
            [
                name,
                len(found),
                *(spread([one["policy"][key] for one in found]) for key in ("top1", "blocks", "patterns")),
                spread([one["base"] for one in found]),
            ]
        )
        steps = zip(*(one["course"] for one in found), strict=False)
        series[name] = [[step[0][0], mean(row[1] for row in step)] for step in steps]
    if not rows:
        return []
    plots["curriculum.png"] = curves({"x": "step", "y": "top-1 on held-out images, %", "series": series})
    heads = ["45 blocks, policy alone", "seeds", "top-1 %", "blocks", "policies", "base, %"]
    return [table(heads, rows) + "\n\n![curriculum](curriculum.png)"]


EXPERIMENT = Experiment(
    "blockdrop", "BlockDrop: a policy for every image", "cifar10:data/cifar10.npz", pieces, headline, page
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
