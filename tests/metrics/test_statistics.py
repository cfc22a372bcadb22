"""Mean and covariance in parts."""

import numpy as np
import pytest
import torch

from msdd_fast.errors import InputError
from msdd_fast.metrics.distances import frechet_distance, kernel_distance
from msdd_fast.metrics.statistics import FeatureStatistics


def vectors(count, width, seed, offset=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + offset


def of(*batches):
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def assert_same(a, b):
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(a.scatter, b.scatter, rtol=1e-11, atol=1e-10)


def test_is_numpys():
    x = vectors(50, 7, 0, offset=1000.0)  # a large mean: sums of squares would lose eight digits
    s = of(x)
    assert s.count == 50 and s.mean.dtype == s.covariance().dtype == torch.float64
    np.testing.assert_allclose(s.mean.numpy(), x.double().numpy().mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(s.covariance().numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_parts_merged_are_the_whole():
    x = vectors(101, 16, 1, offset=3.0)
    whole = of(x)
    assert_same(of(*x.split(7)), whole)
    parts = [of(*part.split(5)) for part in x.split([40, 1, 60])]
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = FeatureStatistics(16)
        for i in order:
            merged.merge(parts[i])
        assert_same(merged, whole)
    merged.merge(FeatureStatistics(16))
    merged.update(x[:0])
    assert_same(merged, whole)


def test_a_part_left_out_is_noticed():
    x = vectors(101, 16, 1, offset=3.0)
    with pytest.raises(AssertionError):
        assert_same(of(x[:100]), of(x))


def test_bad_features():
    s = FeatureStatistics(4)
    for bad in (torch.zeros(3, 5), torch.zeros(4), torch.zeros(3, 4, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"features must be floating point \(n, 4\), got"):
            s.update(bad)
    with pytest.raises(InputError, match="features must be finite"):
        s.update(torch.full((2, 4), float("nan")))
    with pytest.raises(InputError, match="statistics must be of 4 features, got 5"):
        s.merge(FeatureStatistics(5))
    s.update(torch.zeros(1, 4))
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        s.covariance()


def test_frechet_distance_of_known_gaussians():
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    x = vectors(400, 5, 2)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])
    assert frechet_distance(of(x), of(x)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(of(x), of(x + shift)) == pytest.approx(float(shift.square().sum()), rel=1e-5)
    # Covariances s and 4 s: trace(s + 4 s - 2 * 2 s) = trace(s).
    centred = x - x.mean(dim=0)
    trace = float(of(centred).covariance().trace())
    assert frechet_distance(of(centred), of(2 * centred)) == pytest.approx(trace, rel=1e-5)
    with pytest.raises(InputError, match="as many features, got 5 and 6"):
        frechet_distance(of(x), FeatureStatistics(6))


def test_kernel_distance():
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    x, y = vectors(60, 8, 3), vectors(60, 8, 4)
    near, far = kernel_distance(x, y), kernel_distance(x, y + 1)
    assert (near.subsets, near.subset_size) == (100, 60)
    assert abs(near.mean) < 0.2 < far.mean
    a, b = x.double(), y.double()

    def kernel(p, q):
        return (p @ q.T / 8 + 1) ** 3

    n = 60
    inner = sum((kernel(p, p).sum() - kernel(p, p).diagonal().sum()) / (n * (n - 1)) for p in (a, b))
    assert near.mean == pytest.approx(float(inner - 2 * kernel(a, b).mean()), abs=1e-5)
    with pytest.raises(InputError, match=r"features must be \(n, width\) and \(m, width\)"):
        kernel_distance(x, y[:, :7])
    with pytest.raises(InputError, match="at least 2 images"):
        kernel_distance(x, y[:1])
