"""The engine's dense linear, in the layouts that it has for its weights."""

import pytest
import torch

from msdd_fast.layers.linear.dense import DenseLinear

BF16_PACKS = DenseLinear(torch.zeros(16, 16, dtype=torch.bfloat16), None).packed
CASES = [
    pytest.param(torch.float32, False, id="float32"),
    pytest.param(
        torch.bfloat16,
        True,
        id="bfloat16",
        marks=pytest.mark.skipif(not BF16_PACKS, reason="oneDNN packs no bfloat16 weights on this processor"),
    ),
]


@pytest.mark.parametrize(("dtype", "packed"), CASES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 129])
def test_rows_times_the_weight(rows, with_bias, dtype, packed):
    """Rows at a distance, and results into a slice of a larger buffer, as qkv is written."""
    generator = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(48, 40, generator=generator).to(dtype), torch.randn(48, generator=generator).to(dtype)
    x = torch.randn(rows, 100, generator=generator).to(dtype)[:, :40]
    given = bias if with_bias else None
    linear = DenseLinear(weight, given)
    assert linear.packed == packed and linear.out_features == 48
    assert linear.memory() == weight.nbytes + (bias.nbytes if with_bias else 0)
    exact = torch.nn.functional.linear(x.double(), weight.double(), given.double() if with_bias else None)
    plain = torch.nn.functional.linear(x, weight, given)
    buffer = torch.full((rows, 100), 3.0, dtype=dtype)
    for out in (linear(x), linear(x, buffer[:, 20:68])):
        assert out.dtype == dtype and out.shape == (rows, 48)
        if rows:
            error, usual = ((y.double() - exact).abs().max() for y in (out, plain))
            assert error <= 2 * usual + 1e-6
    assert (buffer[:, :20] == 3).all() and (buffer[:, 68:] == 3).all()


def test_weights_without_data_are_not_packed():
    """explain() builds such linears."""
    assert not DenseLinear(torch.zeros(4, 4, dtype=torch.bfloat16, device="meta"), None).packed
