"""Mean and covariance of features as they come, in float64; parts of a set are measured apart and merged."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.errors import InputError


class FeatureStatistics:
    """Count, mean and scatter of feature vectors.

    Feed batches to ``update``; ``merge`` adds what another object, in another process perhaps, has seen. Every order
    gives the same result up to the rounding of float64.

    Args:
        width: numbers per vector.

    Attributes:
        count: vectors so far.
        mean: float64 (width,), 0 if there are none.
        scatter: float64 (width, width), the sum of outer products of the differences from the mean.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add vectors, (n, width) of any floating dtype and device. Raises InputError for another shape, NaN or Inf."""
        width = len(self.mean)
        if features.ndim != 2 or features.shape[1] != width or not features.is_floating_point():
            raise InputError(
                f"features must be floating point (n, {width}), got {tuple(features.shape)} of {features.dtype}"
            )
        if not len(features):
            return
        x = features.detach().to("cpu", torch.float64)
        if not x.isfinite().all():
            raise InputError("features must be finite, got NaN or Inf")
        mean = x.mean(dim=0)
        x = x - mean
        self._add(len(x), mean, x.T @ x)

    def merge(self, other: FeatureStatistics) -> None:
        """Add what ``other`` has seen. Raises InputError if its vectors have another width."""
        if other.mean.shape != self.mean.shape:
            raise InputError(f"statistics must be of {len(self.mean)} features, got {len(other.mean)}")
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Chan, Golub and LeVeque's update, which subtracts no large numbers."""
        total = self.count + count
        difference = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(difference, difference) * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """The unbiased estimate, float64 (width, width). Raises InputError for fewer than two vectors."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)
