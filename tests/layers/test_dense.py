"""The engine's dense linear, in the layouts that it has for its weights."""

import pytest
import torch

from msdd_fast import backends
from msdd_fast.errors import InputError
from msdd_fast.layers.linear.dense import DenseLinear
from msdd_fast.layers.linear.native import NativeLinear, products

needs_extension = pytest.mark.skipif(
    not backends.extension_status()[0], reason=f"msdd_fast._C {backends.extension_status()[1]}"
)
BF16_PACKS = DenseLinear(torch.zeros(16, 16, dtype=torch.bfloat16), None, taken={"torch"}).packed
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
    linear = DenseLinear(weight, given, taken={"torch"})
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


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 129])
def test_rows_times_the_weight_by_the_extension(rows, with_bias, dtype):
    """As torch's product, to twice its error; weights in no other layout. A second call repeats the first."""
    generator = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(48, 40, generator=generator).to(dtype), torch.randn(48, generator=generator).to(dtype)
    x = torch.randn(rows, 100, generator=generator).to(dtype)[:, :40]
    given = bias if with_bias else None
    linear = DenseLinear(weight, given, taken={"cpu"})
    assert linear.weight is None and linear.native.memory() == linear.memory() >= 48 * 40 * dtype.itemsize
    exact = torch.nn.functional.linear(x.double(), weight.double(), given.double() if with_bias else None)
    plain = torch.nn.functional.linear(x, weight, given)
    buffer = torch.full((rows, 100), 3.0, dtype=dtype)
    for out in (linear(x), linear(x), linear(x, buffer[:, 20:68]), linear(x, buffer[:, 20:68])):
        assert out.dtype == dtype and out.shape == (rows, 48)
        if rows:
            error, usual = ((y.double() - exact).abs().max() for y in (out, plain))
            assert error <= 2 * usual + 1e-6
    assert (buffer[:, :20] == 3).all() and (buffer[:, 68:] == 3).all()


@needs_extension
def test_the_product_is_chosen_by_the_number_of_rows(monkeypatch):
    """By the table: both layouts where it depends on the rows, torch's where nothing was measured."""
    table = {"8x6": {4: "cpu", 64: "torch"}, "8x5": {4: "cpu", 64: "cpu"}, "8x4": {4: "torch"}}

    def measured(op, device, dtype, size):
        assert (op, device.type, dtype) == ("linear", "cpu", torch.float32)
        return set(table.get(size, {}).values())

    monkeypatch.setattr("msdd_fast.backends.tuned.measured", measured)
    monkeypatch.setattr("msdd_fast.backends.tuned.fastest", lambda *a: table[a[3]][4 if a[4] <= 4 else 64])
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "auto")
    monkeypatch.setattr("msdd_fast.layers.linear.native.MEASURED_LEVELS", ())  # where it is the faster untested
    linear = DenseLinear(torch.ones(6, 8), None)
    assert linear.native is not None and linear.weight is not None
    taken = []
    monkeypatch.setattr(NativeLinear, "__call__", lambda self, x, out=None: taken.append(len(x)) or x)
    for rows in (3, 4, 5, 200, 4):
        linear(torch.zeros(rows, 8))
    assert taken == [3, 4, 4]
    assert DenseLinear(torch.ones(5, 8), None).weight is None
    for out in (4, 3):
        assert DenseLinear(torch.ones(out, 8), None).native is None


@needs_extension
def test_the_switch(monkeypatch):
    weight = torch.ones(6, 8)
    for choice, taken in (("0", {"torch"}), ("1", {"cpu"})):
        monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", choice)
        assert products(weight)[0] == taken
    for other in (weight.half(), weight.to("meta"), torch.nn.Parameter(weight)):
        assert products(other)[0] == {"torch"}
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "yes")
    with pytest.raises(InputError, match="MSDD_FAST_NATIVE_LINEAR must be auto, 0 or 1, got 'yes'"):
        products(weight)


def test_weights_without_data_are_not_packed():
    """explain() builds such linears."""
    assert not DenseLinear(torch.zeros(4, 4, dtype=torch.bfloat16, device="meta"), None).packed
