r"""The reward of a decision and the policy-gradient loss that raises it.

Why the loss looks the way it does. Write ``u`` for the K decisions on an image, ``s'`` for the probabilities they are
drawn with, ``R`` for the reward.

1. The goal is ``J(W) = sum_u pi_W(u | x) R(u)``. R comes out of an argmax and a count and has no gradient; ``pi`` has.
2. ``grad J = sum_u R(u) grad pi(u) = sum_u pi(u) R(u) grad log pi(u) = E_u[R(u) grad log pi(u)]``, so a single draw of
   ``u`` gives an unbiased estimate.
3. ``E_u[grad log pi(u)] = grad sum_u pi(u) = grad 1 = 0``, so any baseline that does not depend on the drawn ``u`` may
   be subtracted: ``grad J = E[(R(u) - R(greedy)) grad log pi(u)]``. Draws that beat the greedy decision are reinforced.
4. The units are independent: ``log pi(u) = sum_k u_k log s'_k + (1 - u_k) log(1 - s'_k)``, minus the binary
   cross-entropy of ``s'`` against the network's own draw. As ``u_k`` is 0 or 1, this is the same as the other usual
   form ``sum_k log(s'_k u_k + (1 - s'_k)(1 - u_k))``.
5. Autograd wants a scalar whose gradient is that estimate: ``L = -mean_b A_b sum_k m_k log pi_k(u_bk)`` with the
   advantage ``A`` and ``u`` constant and ``m`` the units the curriculum has freed. The *value* of L means nothing: it
   may be negative and need not fall. Watch the reward instead.

Draws and log-probabilities must come from the same distribution ``s'``; otherwise the estimate is biased.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.blockdrop.policy import bound

EntropyForm = Literal["bernoulli", "published"]
#: How far an answer is right: its top-1 is or is not, or by the probability it gives the label.
Credit = Literal["answer", "probability"]


def check_credit(credit: str) -> None:
    """Refuse an unknown credit."""
    if credit not in ("answer", "probability"):
        raise ValueError(f"credit must be 'answer' or 'probability', got {credit!r}")


def credit_of(scores: Tensor, y: Tensor, credit: Credit = "answer") -> Tensor:
    """How far answers are right, ``[B]``, as :func:`reward` takes it: bool, or with ``"probability"`` float32.

    The probability is the mean of the published credit of an answer drawn from the softmax. It tells images that are
    nearly wrong from safe ones, also where a network has learned its training images so well that hardly any is wrong.

    Args:
        scores: ``[B, classes]``.
        y: ``[B]`` labels, int64.
        credit: see above.

    Raises:
        ValueError: for an unknown credit, or shapes that do not fit.
    """
    check_credit(credit)
    if scores.dim() != 2 or y.shape != scores.shape[:1]:
        raise ValueError(f"scores must be [B, classes] and y [B], got {list(scores.shape)} and {list(y.shape)}")
    if credit == "answer":
        return scores.argmax(1) == y
    return scores.float().softmax(1).gather(1, y.long().unsqueeze(1)).squeeze(1)


def reward(
    correct: Tensor,
    keep: Tensor,
    gamma: float = 1.0,
    cost: Tensor | None = None,
    overhead: Tensor | float = 0.0,
) -> Tensor:
    """``1 - usage^2`` where the prediction is right, ``-gamma`` where it is wrong.

    Args:
        correct: ``[B]``, bool or 0/1 of an integer type: was the prediction under ``keep`` right? Floating: how
            probably; the reward is then the mean of both, see :func:`credit_of`.
        keep: ``[B, K]``, 0/1: the blocks that ran, those forced on by a curriculum included.
        gamma: penalty of a wrong answer; larger means more accurate and more blocks.
        cost: ``[K]``, what each block costs (multiply-adds, measured time); usage is the share of the total. Default:
            all cost the same, as published.
        overhead: what every image costs besides, the policy included, in the same unit: part of the usage and of the
            total. See :func:`effkern.blockdrop.block_costs`.

    Returns:
        ``[B]`` float32, in ``[0, 1]`` or ``-gamma``; of probabilities, between the two, in their type if that is wider.

    Raises:
        ValueError: for shapes that do not fit, or a cost that is negative or all zero.
    """
    if keep.dim() != 2 or correct.shape != keep.shape[:1]:
        raise ValueError(f"correct must be [B] and keep [B, K], got {list(correct.shape)} and {list(keep.shape)}")
    count = keep.shape[1]
    if cost is not None and (cost.shape != (count,) or bool((cost < 0).any()) or not bool(cost.sum() > 0)):
        raise ValueError(f"cost must be {count} numbers of at least 0, not all 0, got {cost.tolist()}")
    if not overhead >= 0:
        raise ValueError(f"overhead must be at least 0, got {float(overhead)}")
    cost = keep.new_ones(count, dtype=torch.float32) if cost is None else cost.to(keep.device, torch.float32)
    # A product and a sum, as autocast would round a matrix product to 16 bits.
    usage = ((keep * cost).sum(1) + overhead) / (cost.sum() + overhead)
    # torch.where, because indexing with `correct` turns into assigning rows 0 and 1 once it is an integer tensor.
    gain = 1 - usage.square()
    if correct.is_floating_point():
        return correct * gain - (1 - correct) * float(gamma)
    return torch.where(correct.bool(), gain, -float(gamma))


def log_probability(logits: Tensor, keep: Tensor, a: float = 0.8) -> Tensor:
    """``log pi_k(u_bk)`` for every unit: ``log s'`` where kept, ``log(1 - s')`` where dropped; ``[B, K]``.

    Finite for every logit, also with ``a = 1``: no difference of nearly equal numbers is taken.

    Args:
        logits: ``[B, K]``; ``s' = bound(sigmoid(logits), a)``.
        keep: ``[B, K]``.
        a: see :func:`effkern.blockdrop.bound`.
    """
    return _log_bounded(torch.where(keep.bool(), logits, -logits), a)


def _log_bounded(logits: Tensor, a: float) -> Tensor:
    return F.logsigmoid(logits) if a == 1 else bound(torch.sigmoid(logits), a).log()


def entropy(logits: Tensor, a: float = 0.8, form: EntropyForm = "bernoulli") -> Tensor:
    """Entropy of every unit in nats, ``[B, K]``, of the probabilities ``s'``.

    ``"published"`` is the half ``-s' log s'`` of the original code, kept for reproduction: it peaks at ``1/e`` and so
    pushes every block towards being dropped.
    """
    if form not in ("bernoulli", "published"):
        raise ValueError(f"form must be 'bernoulli' or 'published', got {form!r}")

    def half(logits: Tensor) -> Tensor:
        return -bound(torch.sigmoid(logits), a) * _log_bounded(logits, a)

    return half(logits) if form == "published" else half(logits) + half(-logits)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantages of several independent draws: each one's reward minus the mean of the others', ``[S, B]``.

    The baseline of a draw does not depend on it, so the estimate stays unbiased; with more draws its variance falls,
    and no greedy pass is needed.

    Args:
        rewards: ``[S, B]``, of S >= 2 draws.

    Raises:
        ValueError: for fewer than two draws.
    """
    if rewards.dim() != 2 or len(rewards) < 2:
        raise ValueError(f"rewards must be [S, B] with at least 2 draws, got {list(rewards.shape)}")
    return (rewards - rewards.mean(0)) * (len(rewards) / (len(rewards) - 1))


def policy_loss(
    logits: Tensor,
    keep: Tensor,
    advantage: Tensor,
    a: float = 0.8,
    free: Tensor | None = None,
    beta: float = 0.0,
    entropy_form: EntropyForm = "bernoulli",
) -> Tensor:
    """The scalar whose gradient is minus the policy gradient; the head of this file derives it.

    Args:
        logits: ``[B, K]`` of the policy; the only input that gets a gradient.
        keep: ``[B, K]``, a draw with the probabilities ``s'`` they give.
        advantage: ``[B]``, reward of the draw minus the baseline.
        a: bound of the probabilities, see :func:`effkern.blockdrop.bound`.
        free: ``[K]`` bool, units under training; the others get exactly no gradient, also not from the entropy.
            Default: all are free.
        beta: weight of the entropy bonus.
        entropy_form: see :func:`entropy`.

    Returns:
        A scalar. Both terms are means over the batch, so their weight does not change with its size.

    Raises:
        ValueError: for shapes that do not fit; the advantage is one number a sample.
    """
    if logits.dim() != 2 or keep.shape != logits.shape or advantage.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and keep must be [B, K] and advantage [B], got {list(logits.shape)}, {list(keep.shape)} and "
            f"{list(advantage.shape)}"
        )
    if free is not None and free.shape != logits.shape[1:]:
        raise ValueError(f"free must be [{logits.shape[1]}], got {list(free.shape)}")
    gain = advantage.detach().unsqueeze(1) * log_probability(logits, keep, a)
    if beta:
        gain = gain + beta * entropy(logits, a, entropy_form)
    if free is not None:
        gain = torch.where(free.to(gain.device), gain, 0.0)
    return -gain.sum(1).mean()
