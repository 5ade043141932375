"""Training of the gates of a supernet as a method of the training loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.dsnet.gate_loss import (
    GateCrossEntropy,
    Hopeless,
    SgsForm,
    Targets,
    expected_right,
    gumbel_noise,
    gumbel_softmax,
    sgs_targets,
)
from effkern.dsnet.route import configuration, expected_cost, finish, route_costs, routed, uniform_routes
from effkern.dsnet.routing import Routing, entropy_of, evaluate_routing
from effkern.nn.gate import DoubleHeadedGate
from effkern.training import Batches, Method, RowCache, Step

__all__ = ["CostForm", "GateTraining"]

CostForm = Literal["budget", "hinge", "relative", "published", "none"]
_NOISE = 1  # stream; one more for each gate


class GateTraining(Method):
    """The gates learn; the supernet stays as it is, batch norm in eval mode (DS-Net, arXiv 2103.13258).

    The loss is ``task * CE(scores, y) + sgs_weight * SGS + cost``:

    * The task's gradient reaches the gates through straight-through Gumbel choices: channels past a choice are zero and
      batch norm is that of the choice, so the result is the sliced network's. ``task=1`` alone is the Gumbel baseline.
    * SGS (sandwich gate sparsification) is cross-entropy of the noise-free logits towards :func:`sgs_targets`, the mean
      over the gates; see :class:`GateCrossEntropy` for its forms. ``"expected"`` has no targets: it is minus
      :func:`expected_right`, every choice of a gate standing for the ways of one width that take it.
    * The cost ``C`` is the batch's mean of every sample's own multiply-adds, through the same choices; with
      ``sgs="expected"`` and no task, its mean over all choices (of later gates, at the choice drawn before them).

    Args:
        net: see `effkern.dsnet.Routed`; everything but its gates is frozen.
        image: ``(C, H, W)``, for counting.
        sgs: form of SGS; ``"expected"``, not of the paper, runs every width behind the gates. It wants a cost, and has
            no use for ``targets``, ``hopeless`` and ``gate_smoothing``.
        targets: see :func:`sgs_targets`; ``"cheapest"`` costs a forward behind the gates for every width.
        hopeless: see :func:`sgs_targets`.
        task: weight of the task's loss; at 0 the network behind the last gate runs for the labels alone.
        sgs_weight: weight of SGS.
        cost: ``"relative"``: ``(C / C_max)^2``. ``"hinge"``: ``max(C / budget - 1, 0)``. ``"budget"``: ``p C / C_max``
            with a pressure ``p``, of either sign, that grows while inference would cost more than the budget and
            falls while it costs less. ``"published"``: ``(C / 1e9)^2``, for a MobileNet nearly no force. ``"none"``.
        cost_weight: of the cost; for ``"budget"`` how far the pressure moves a step, an error of 1 given.
        budget: multiply-adds an image as a share of the widest way's.
        tau: temperature of the choices.
        label_smoothing: of the task's loss.
        gate_smoothing: of the gates' targets; the released code has 0.1.
        heads: ``"slim"`` trains the slimming heads alone, which leaves every width as it was; ``"both"`` the whole
            gate, attention and all, as published.
        entropy: of ``sgs="expected"``, see :func:`expected_right`.
        cache: bytes for what the part in front of the first gate, which is frozen, makes of each image, kept for the
            epochs to come; of use where images are not augmented.
    """

    score = "top1"
    pressure: Tensor

    def __init__(
        self,
        net: nn.Module,
        image: Sequence[int],
        sgs: SgsForm = "balanced",
        targets: Targets = "ends",
        hopeless: Hopeless = "widest",
        task: float = 1.0,
        sgs_weight: float = 1.0,
        cost: CostForm = "relative",
        cost_weight: float = 0.5,
        budget: float | None = None,
        tau: float = 1.0,
        label_smoothing: float = 0.1,
        gate_smoothing: float = 0.0,
        heads: Literal["slim", "both"] = "both",
        cache: float = 0.0,
        entropy: float = 0.05,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("sgs", sgs, get_args(SgsForm)),
            ("targets", targets, get_args(Targets)),
            ("hopeless", hopeless, get_args(Hopeless)),
            ("cost", cost, get_args(CostForm)),
            ("heads", heads, ("slim", "both")),
        ):
            if value not in known:
                raise ValueError(f"{name}: must be one of {', '.join(known)}, got {value!r}")
        if not tau > 0:
            raise ValueError(f"tau: must be positive, got {tau}")
        if not 0 <= entropy < math.inf:
            raise ValueError(f"entropy: must be at least 0 and finite, got {entropy}")
        self.net, self.cache = net, RowCache(cache)
        self.costs = route_costs(net, image)
        self.most = float(self.costs.max())
        if cost in ("budget", "hinge") and budget is None:
            raise ValueError(f"budget: must be given with cost={cost!r}")
        least = float(self.costs.min()) / self.most
        if budget is not None and not least <= budget <= 1:
            raise ValueError(f"budget: must be in [{least:.4g}, 1] of the widest way, got {budget}")
        self.sgs, self.targets, self.hopeless, self.task, self.sgs_weight = sgs, targets, hopeless, task, sgs_weight
        self.cost, self.cost_weight, self.budget, self.tau = cost, cost_weight, budget, tau
        self.label_smoothing, self.entropy = label_smoothing, entropy
        net.requires_grad_(False).eval()
        for gate in self.gates:
            (gate if heads == "both" else gate.slim).requires_grad_(True)
        forms = [] if sgs == "expected" else [GateCrossEntropy(len(g.space), sgs, gate_smoothing) for g in self.gates]
        self.sgs_losses = nn.ModuleList(forms)
        self.register_buffer("pressure", torch.zeros((), dtype=torch.float64))
        self.routing: Routing | None = None

    @property
    def gates(self) -> list[DoubleHeadedGate]:
        """The gates of the network."""
        return routed(self.net).gates

    def losses(self, x: Tensor, y: Tensor, at: Step) -> Iterable[Tensor]:
        """One loss."""
        net, gates = routed(self.net), self.gates
        with torch.no_grad():
            x = self.cache(lambda images: net.segment(0, images, 0), x, at.rows)
        logits: list[Tensor] = []
        noises: list[Tensor] = []
        drawn: list[Tensor] = []
        before: int | Tensor = 0
        scores, right = None, None
        for k, gate in enumerate(gates):
            x, z = gate.decide(x, before)
            if k == 0 and self.sgs != "none":
                right = self._right(x.detach(), y)
            noise = gumbel_noise(at.uniform(len(z), z.size(1), stream=_NOISE + k, device=z.device))
            choice = gumbel_softmax(z, noise, self.tau)
            logits.append(z)
            noises.append(noise)
            drawn.append(choice)
            if k + 1 < len(gates) or self.task:
                width = configuration(net, k + 1, _weights(choice, gate.space), before)
                x, before = net.segment(k + 1, x, width, before), width
        loss = x.new_zeros(())
        if self.task:
            scores = x
            loss = loss + self.task * F.cross_entropy(scores, y, label_smoothing=self.label_smoothing)
        if right is not None:
            loss = loss + self.sgs_weight * self._sgs(logits, noises, right, at)
        best = [gate.choose(z.detach()) for gate, z in zip(gates, logits, strict=True)]
        # Without draws in the loss the mean cost is exact as well: behind a first gate, given the choices drawn there.
        priced = [z.float().softmax(1) for z in logits] if self.sgs == "expected" and not self.task else drawn
        loss = loss + self._cost(priced, best)
        at.metrics["macs_left"] = self._spent(best) / self.most
        at.metrics["diversity"] = sum(entropy_of(b, z.size(1)) for b, z in zip(best, logits, strict=True)) / len(gates)
        yield loss

    @torch.no_grad()
    def _right(self, x: Tensor, y: Tensor) -> Tensor:
        """Which of the ways of one width are right, ``[N, P]``; those the targets do not look at are not run."""
        net = routed(self.net)
        ways = uniform_routes(net)
        looked_at = range(len(ways))
        if self.targets == "ends" and self.sgs != "expected":
            looked_at = [0] if self.hopeless == "widest" else sorted({0, len(ways) - 1})  # type: ignore[assignment]
        right = torch.zeros(len(x), len(ways), dtype=torch.bool, device=x.device)
        for p in looked_at:
            widths = [gate.space[i] for gate, i in zip(net.gates, ways[p], strict=True)]
            right[:, p] = finish(net, x, widths).argmax(1) == y
        return right

    def _sgs(self, logits: list[Tensor], noises: list[Tensor], right: Tensor, at: Step) -> Tensor:
        ways = torch.tensor(uniform_routes(routed(self.net)), device=right.device)
        if self.sgs == "expected":
            taken = [F.one_hot(ways[:, k], z.size(1)).float() for k, z in enumerate(logits)]
            shares = [right.float() @ taking / taking.sum(0).clamp_min(1) for taking in taken]
            losses = [-expected_right(z, share, self.entropy) for z, share in zip(logits, shares, strict=True)]
        else:
            place = sgs_targets(right, self.hopeless, self.targets)
            losses = [
                loss(z, ways[place, k], noise, self.tau)
                for k, (loss, z, noise) in enumerate(zip(self.sgs_losses, logits, noises, strict=True))
            ]
        total = torch.stack(losses).mean()
        at.metrics.update(easy=right[:, 0].double().mean(), sgs=total.detach())
        return total

    def _cost(self, drawn: list[Tensor], best: list[Tensor]) -> Tensor:
        if self.cost == "none":
            return drawn[0].new_zeros(())
        mean = expected_cost(self.costs, drawn).mean()
        if self.cost == "published":
            return (self.cost_weight * (mean / 1e9).square()).float()
        if self.cost == "relative":
            return (self.cost_weight * (mean / self.most).square()).float()
        assert self.budget is not None
        allowed = self.budget * self.most
        if self.cost == "hinge":
            return (self.cost_weight * F.relu(mean / allowed - 1)).float()
        if self.training:  # what inference would spend, not what the noise draws
            self.pressure += self.cost_weight * (self._spent(best) / allowed - 1)
        return (float(self.pressure) * mean / self.most).float()

    def _spent(self, best: list[Tensor]) -> float:
        return float(self.costs[tuple(choice.cpu() for choice in best)].double().mean())

    def evaluate(self, batches: Batches) -> dict[str, float]:
        """Accuracy, multiply-adds and diversity of the choices, each image computed at its own width."""
        self.routing = evaluate_routing(self.net, batches, self.costs)
        found = self.routing
        return {
            "top1": found.top1,
            "macs_left": found.macs_left,
            "gate_diversity": found.diversity,
            "over_mixture": found.top1 - found.static_mixture,
        }

    def report(self) -> dict[str, Any]:
        """Of the last evaluation: every width, histogram, oracle and mixtures."""
        return {} if self.routing is None else {"routing": self.routing.plain(), "budget": self.budget}

    def result(self) -> nn.Module:
        """The network with its gates."""
        return self.net

    def train(self, mode: bool = True) -> GateTraining:
        """The network stays in eval mode: batch norm keeps its statistics, dropout is off."""
        self.training = mode
        self.sgs_losses.train(mode)
        return self


def _weights(choice: Tensor, space: Sequence[int]) -> Tensor:
    """One-hot choices ``[N, G]`` as weights of the widths up to the widest of the space, ``[N, M]``."""
    columns = torch.tensor(space, device=choice.device)
    return choice.new_zeros(len(choice), int(space[-1]) + 1).index_copy(1, columns, choice)
