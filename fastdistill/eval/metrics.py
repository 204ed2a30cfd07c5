"""Measure distances between sets of samples, in float64: Fréchet, sliced Wasserstein, nearest neighbours.

Nothing is downloaded. Every function takes plain tensors of shape (samples, dimensions) and returns Python floats. None
has state: the random directions of the sliced distance come from a fixed seed, so the same samples always give the same
number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance between the Gaussians fitted to two sets of features.

    a: (N, F) and b: (M, F), any float dtype, computed in float64, N and M >= 2. This is FID's formula on any features:
    |mean_a - mean_b|² + tr(cov_a + cov_b - 2 (cov_a^½ cov_b cov_a^½)^½).
    Equivalent to: `|m_a - m_b|**2 + trace(C_a + C_b - 2 * scipy.linalg.sqrtm(C_a @ C_b))`, from symmetric roots.
    Source: Heusel et al. 2017 (arXiv:1706.08500), its FID; the symmetric form is Dowson and Landau 1982.
    Raises ValueError for other shapes and for non-finite values.
    """
    a, b = _two_sets(a, b, smallest=2)
    root_a = _symmetric_sqrt(torch.cov(a.T))
    cross = torch.linalg.eigvalsh(root_a @ torch.cov(b.T) @ root_a)
    spread = a.var(0).sum() + b.var(0).sum() - 2 * cross.clamp(min=0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float((shift + spread).clamp(min=0))


def _symmetric_sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 256, seed: int = 0) -> float:
    """Return the sliced 2-Wasserstein distance: the root mean square of the exact 1-D distance over directions.

    a: (N, D) and b: (M, D); N and M may differ. The directions are uniform on the sphere and fixed by `seed`.
    Equivalent to: `(a @ w).sort(0).values.sub((b @ w).sort(0).values).square().mean().sqrt()` for N = M.
    Source: Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".
    Raises ValueError for other shapes, non-finite values or projections < 1.
    """
    a, b = _two_sets(a, b, smallest=1)
    if projections < 1:
        raise ValueError(f"projections: expected at least 1, got {projections}")
    directions = torch.randn(a.shape[1], projections, dtype=a.dtype, generator=torch.Generator().manual_seed(seed))
    directions = (directions / directions.norm(dim=0)).to(a.device)
    return float(_squared_wasserstein_1d(a @ directions, b @ directions).mean().sqrt())


def _squared_wasserstein_1d(a: Tensor, b: Tensor) -> Tensor:
    """Return the exact squared W2 of each column, integrated over the levels at which a quantile function jumps."""
    n, m = len(a), len(b)
    a, b = a.sort(dim=0).values, b.sort(dim=0).values
    # In units of 1/(n m), sample i of a ends at level (i + 1) m and sample j of b at (j + 1) n. These are integers, so
    # exact.
    ends_a, ends_b = torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n
    ends = torch.cat([ends_a, ends_b]).unique()
    mass = ends.diff(prepend=ends.new_zeros(1)).to(a) / (n * m)
    rows_a, rows_b = torch.searchsorted(ends_a, ends).to(a.device), torch.searchsorted(ends_b, ends).to(a.device)
    return mass @ (a[rows_a] - b[rows_b]).square()


def nearest_neighbour_ratio(generated: Tensor, train: Tensor, held_out: Tensor) -> float:
    """Compare how close generated samples lie to the training set with how close unseen real ones do.

    The result is the median distance from a generated sample to its nearest training sample, divided by the median from
    a held-out sample to its nearest training sample. Near 1 the samples are as new as unseen data. Near 0 they are
    copies of the training set; a Fréchet distance below the bootstrap's is then memorisation, not quality. All
    arguments are (samples, dimensions).
    """
    near, _ = _two_sets(generated, train, smallest=1)
    unseen, train = _two_sets(held_out, train, smallest=1)
    return float(_nearest(near, train).median() / _nearest(unseen, train).median())


def _nearest(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b).amin(dim=1)


def precision_recall(generated: Tensor, real: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Return precision (samples inside the real manifold) and recall (real ones inside the generated manifold).

    A manifold is the union of balls around its samples, each reaching to the sample's k-th nearest neighbour.
    Source: Kynkäänniemi et al. 2019 (arXiv:1904.06991); k = 3 as there.
    """
    generated, real = _two_sets(generated, real, smallest=neighbours + 1)
    return _share_inside(generated, real, neighbours), _share_inside(real, generated, neighbours)


def _share_inside(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    # One neighbour more, because each sample is its own nearest.
    radii = torch.cdist(manifold, manifold).kthvalue(neighbours + 1, dim=1).values
    return float((torch.cdist(points, manifold) <= radii).any(dim=1).double().mean())


def two_sample_accuracy(a: Tensor, b: Tensor, *, neighbours: int = 1) -> float:
    """Return how often the nearest other points tell a point's set: a classifier two-sample test (C2ST).

    a, b: (N, D) and (M, D). Each point is assigned to a set by a majority of its nearest other points from both sets.
    The result is the mean of the two sets' accuracies, so that unequal sizes don't matter. It is 0.5 if the sets can't
    be told apart, and 1 if they always can. It is clearly below 0.5 if points of one set sit on those of the other, as
    copies do.
    Source: Lopez-Paz and Oquab 2017, arXiv:1610.06545; the nearest neighbour as classifier: Xu et al. 2018,
    arXiv:1806.07755.
    Raises ValueError for other shapes, non-finite values or an even or non-positive number of neighbours.
    """
    if neighbours < 1 or neighbours % 2 == 0:
        raise ValueError(f"neighbours: expected an odd number >= 1, got {neighbours}")
    a, b = _two_sets(a, b, smallest=neighbours + 1)
    points = torch.cat([a, b])
    labels = torch.arange(len(points), device=points.device) >= len(a)
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    votes = labels[distances.topk(neighbours, largest=False).indices].double().mean(1) > 0.5
    right = (votes == labels).double()
    return float((right[: len(a)].mean() + right[len(a) :].mean()) / 2)


def _two_sets(a: Tensor, b: Tensor, *, smallest: int) -> tuple[Tensor, Tensor]:
    for name, x in (("first", a), ("second", b)):
        if x.ndim != 2 or len(x) < smallest:
            raise ValueError(f"{name} set: expected shape (samples >= {smallest}, dimensions), got {tuple(x.shape)}")
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} set: expected finite values, got NaN or infinity")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected sets of the same dimension, got {a.shape[1]} and {b.shape[1]}")
    return a.double(), b.double()
