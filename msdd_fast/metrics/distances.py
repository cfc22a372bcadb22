"""Distances between two sets of feature vectors, by torch-fidelity: Frechet's, and the kernel distance of KID."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.io.packages import import_package
from msdd_fast.metrics.statistics import FeatureStatistics

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
KID_SEED = 2020
"""torch-fidelity's defaults."""


class KernelDistance(NamedTuple):
    """Mean and standard deviation over ``subsets`` draws of ``subset_size`` vectors from each set."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def require_torch_fidelity() -> None:
    """Raise InputError, which says why, if the distances cannot be computed here."""
    for module in ("metric_fid", "metric_kid"):
        import_package(f"torch_fidelity.{module}", "torch-fidelity", "eval")


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet distance of two Gaussians with these means and covariances. FID if they are InceptionV3's.

    Raises InputError for different widths, fewer than two vectors, or if torch-fidelity is not installed.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"statistics must be of as many features, got {len(a.mean)} and {len(b.mean)}")
    fid = import_package("torch_fidelity.metric_fid", "torch-fidelity", "eval")
    first, second = ({"mu": s.mean.numpy(), "sigma": s.covariance().numpy()} for s in (a, b))
    result = fid.fid_statistics_to_metric(first, second, False)
    return float(result[fid.KEY_METRIC_FID])


def kernel_distance(a: Tensor, b: Tensor) -> KernelDistance:
    """Squared MMD with a cubic kernel between feature vectors (n, width) and (m, width): KID if they are InceptionV3's.

    100 subsets of 1000 vectors, or of all if there are fewer, drawn with torch-fidelity's seed. Raises InputError for
    other shapes, fewer than two vectors, or if torch-fidelity is not installed.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(f"features must be (n, width) and (m, width), got {tuple(a.shape)} and {tuple(b.shape)}")
    size = min(KID_SUBSET_SIZE, len(a), len(b))
    if size < 2:
        raise InputError(f"a kernel distance needs at least 2 images of each set, got {size}")
    kid = import_package("torch_fidelity.metric_kid", "torch-fidelity", "eval")
    result = kid.kid_features_to_metric(
        a.cpu(),
        b.cpu(),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=size,
        kid_degree=3,
        kid_gamma=None,
        kid_coef0=1,
        rng_seed=KID_SEED,
        verbose=False,
    )
    return KernelDistance(result[kid.KEY_METRIC_KID_MEAN], result[kid.KEY_METRIC_KID_STD], KID_SUBSETS, size)
