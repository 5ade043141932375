"""What the BlockDrop experiment runs: settings, and the names of its pieces."""

from __future__ import annotations

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
#: A baseline: for some images the best static choice of as many whole blocks as there are, for the rest of one more.
MIXTURE = "best static, mixed"
LAYERS = "without optimize"
TINY = "network.options={widths=[4,4,4],blocks=[1,1,1],stem_stride=2}"
LONG = "longer recipe, gamma "
LEARNED = "taught, gamma "
ON = "taught further, gamma "
RELAYED = "relay, run "
ALONE = "relay, policy alone by "
HALF = "half-size policy, gamma "
COPIED = "half-size policy, copied"
QUICK = [
    TINY,
    "policy.widths=[4]",
    *(f"{phase}.train.{x}" for phase in ("base", "policy", "joint") for x in ("epochs=0.2", "batch_size=64")),
]
