"""k-means that always ends, leaves no cluster empty and depends on the seed only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import effkern._host as _host
except ImportError:  # not built: the same steps in PyTorch
    _host = None  # type: ignore[assignment]

CHUNK = 1 << 22  # entries of the distance matrix at a time
SEEDING_ROWS = 64  # rows per centroid that k-means++ looks at


@dataclass(frozen=True)
class Clusters:
    """A clustering.

    Attributes:
        codes: ``[n]``, int64.
        book: ``[k, d]``, float32; ``k`` may be smaller than asked for.
        error: mean squared distance of a row to its centroid, in the metric asked for.
        iterations: steps taken.
    """

    codes: Tensor
    book: Tensor
    error: float
    iterations: int


def kmeans(
    x: Tensor,
    k: int,
    *,
    metric: Tensor | None = None,
    iterations: int = 50,
    init: str = "kmeans++",
    seed: int = 0,
) -> Clusters:
    """Cluster the rows of ``x`` into at most ``k`` clusters, none of them empty.

    An empty cluster takes over the row that is worst represented. With fewer distinct rows than ``k`` there are as
    many clusters as distinct rows.

    Args:
        x: ``[n, d]``, finite, ``n >= 1``.
        k: clusters wanted, at least 1.
        metric: ``[d, d]`` positive semi-definite ``H``: distances are ``(x - c)^T H (x - c)``. With inputs ``u`` of a
            layer and ``H = E[u u^T]`` this is the error of the layer's output instead of its weight. Since all rows
            share ``H``, the best centroid is still the mean; rows are compared after applying its Cholesky
            factor.
        iterations: most steps to take.
        init: ``"kmeans++"`` or ``"sample"`` (rows without replacement).
        seed: of the random choice.

    Raises:
        ValueError: for an empty or non-finite ``x``, ``k`` below 1, a metric of the wrong shape.
    """
    if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] < 1:
        raise ValueError(f"x: must be [n, d] with a row and a column at least, got shape {list(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x: must be finite, got a NaN or an infinity")
    if k < 1 or iterations < 1:
        raise ValueError(f"k and iterations: must be at least 1, got {k} and {iterations}")
    if init not in ("kmeans++", "sample"):
        raise ValueError(f"init: must be kmeans++ or sample, got {init!r}")
    x = x.detach().float().cpu().contiguous()
    z = x if metric is None else x @ _root(metric, x.shape[1])
    distinct = torch.unique(z, dim=0)
    generator = torch.Generator().manual_seed(seed)
    if distinct.shape[0] <= k:
        book = distinct
    elif init == "sample":
        book = distinct[torch.randperm(distinct.shape[0], generator=generator)[:k]]
    else:
        book = _plus_plus(distinct, k, generator)
    codes = torch.full((x.shape[0],), -1)
    taken = 0
    for taken in range(1, iterations + 1):  # noqa: B007
        fresh, distance = _assign(z, book)
        _fill_empty(fresh, distance, book.shape[0])
        book, _ = _update(z, fresh, book.shape[0])
        if torch.equal(fresh, codes):
            break
        codes = fresh
    error = float((z - book[codes]).double().square().sum(1).mean())
    means = book if metric is None else _update(x, codes, book.shape[0])[0]
    return Clusters(codes, means, error, taken)


def _root(metric: Tensor, d: int) -> Tensor:
    """Lower Cholesky factor of the metric, damped so that directions never seen still count a little."""
    if metric.shape != (d, d):
        raise ValueError(f"metric: must be [{d}, {d}], got {list(metric.shape)}")
    h = metric.detach().double().cpu()
    if not bool(torch.isfinite(h).all()):
        raise ValueError("metric: must be finite, got a NaN or an infinity")
    damping = 1e-6 * float(h.diagonal().mean()) or 1.0  # an all-zero metric becomes the plain distance
    while True:
        root, failed = torch.linalg.cholesky_ex(h + damping * torch.eye(d, dtype=h.dtype))
        if not int(failed):
            return root.float()
        damping *= 10  # rounding made it slightly indefinite; ends at the latest when the damping outweighs it


def _plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centroid is a row drawn with probability proportional to its squared distance."""
    if x.shape[0] > SEEDING_ROWS * k:
        x = x[torch.randperm(x.shape[0], generator=generator)[: SEEDING_ROWS * k]]
    first = int(torch.randint(x.shape[0], (1,), generator=generator))
    chosen = [first]
    nearest = (x - x[first]).double().square().sum(1)
    for _ in range(k - 1):
        # Rows are distinct, so some distance is positive until every row is chosen, and k rows are there.
        reach = nearest.cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * reach[-1]
        row = min(int(torch.searchsorted(reach, draw, right=True)), x.shape[0] - 1)
        chosen.append(row)
        nearest = torch.minimum(nearest, (x - x[row]).double().square().sum(1))
    return x[chosen]


def _assign(x: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of every row, and the squared distance to it."""
    if _host is not None:
        codes, distance = _host.assign(x.numpy(), book.numpy(), threads=torch.get_num_threads())
        return torch.from_numpy(codes), torch.from_numpy(distance)
    found = []
    for part in x.split(max(1, CHUNK // book.shape[0])):
        # |x - c|^2 by one matrix product a chunk; the full difference would take k times the memory of x.
        squared = part.square().sum(1, keepdim=True) - 2 * part @ book.T + book.square().sum(1)
        found.append(squared.clamp_(min=0).min(1))
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def _update(x: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean of every cluster, summed in float64, and its size."""
    if _host is not None:
        means, counts = _host.update(x.numpy(), codes.numpy(), k)
        return torch.from_numpy(means), torch.from_numpy(counts)
    counts = torch.bincount(codes, minlength=k)
    sums = torch.zeros(k, x.shape[1], dtype=torch.float64).index_add_(0, codes, x.double())
    return (sums / counts.clamp(min=1).unsqueeze(1)).float(), counts


def _fill_empty(codes: Tensor, distance: Tensor, k: int) -> None:
    """Give every empty cluster the worst represented row of a cluster that can spare one; changes ``codes``."""
    counts = torch.bincount(codes, minlength=k)
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return
    worst = iter(distance.argsort(descending=True, stable=True).tolist())
    for cluster in empty:
        row = next(row for row in worst if counts[codes[row]] > 1)  # exists: there are at least k rows
        counts[codes[row]] -= 1
        counts[cluster] = 1
        codes[row] = cluster
