"""group_norm_modulate_silu on every backend against its formula in float64."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.errors import BackendUnavailableError, InputError
from tests.ops.adaln import DTYPES, randn

ORDERS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# (B, C, H, W), groups, (h, w): odd sizes, one pixel, one channel a group, several tiles and parts, cells of one pixel.
SHAPES = [
    ((2, 6, 3, 5), 3, (1, 1)),
    ((1, 4, 1, 1), 4, (1, 1)),
    ((2, 40, 4, 6), 8, (2, 3)),
    ((1, 33, 9, 8), 11, (9, 8)),
    ((1, 2, 40, 30), 1, (4, 30)),
]


def case(shape, cells, device, dtype, order="nhwc", mean=0.0, table_dtype=None):
    """x, weight, bias, and scale and shift as channels of one wide channels-last tensor."""
    x = randn(*shape, seed=0, mean=mean).to(device, dtype).contiguous(memory_format=ORDERS[order])
    weight, bias = randn(2, shape[1], seed=1).to(device, table_dtype or dtype)
    wide = randn(shape[0], *cells, 3 * shape[1], seed=2).to(device, table_dtype or dtype).permute(0, 3, 1, 2)
    return x, weight, bias, wide[:, : shape[1]], wide[:, shape[1] : 2 * shape[1]]


def formula(x, groups, eps, weight, bias, scale, shift, silu=True):
    """In float64, pixel by pixel of the tables."""
    b, _, height, width = x.shape
    grouped = x.double().reshape(b, groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    y = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).view(x.shape)
    if weight is not None:
        y = y * weight.double()[:, None, None] + bias.double()[:, None, None]
    if scale is not None:
        rows = torch.arange(height, device=x.device) * scale.shape[2] // height
        columns = torch.arange(width, device=x.device) * scale.shape[3] // width
        scale, shift = (t.double()[:, :, rows][..., columns] for t in (scale, shift))
        y = y * (1 + scale) + shift
    return y * y.sigmoid() if silu else y


def check(assert_near, backend, args):
    out = ops.group_norm_modulate_silu(*args, backend=backend)
    eager = ops.group_norm_modulate_silu(*args, backend="eager")
    assert out.stride() == args[0].stride()
    assert_near(out, eager, formula(*args), args[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "groups", "cells"), SHAPES)
def test_against_the_formula(backend, device, assert_near, shape, groups, cells, order, dtype):
    x, weight, bias, scale, shift = case(shape, cells, device, dtype, order)
    check(assert_near, backend, (x, groups, 1e-5, weight, bias, scale, shift))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_without_some_of_its_parts(backend, device, assert_near, order, silu):
    x, weight, bias, scale, shift = case((2, 8, 4, 4), (2, 2), device, torch.float32, order)
    for parts in ((None, None, scale, shift), (weight, bias, None, None), (None, None, None, None)):
        check(assert_near, backend, (x, 4, 1e-5, *parts, silu))


def test_float32_tables_and_many_channels(backend, device, assert_near):
    x, *tables = case((1, 320, 3, 4), (3, 4), device, torch.bfloat16, table_dtype=torch.float32)
    check(assert_near, backend, (x, 32, 1e-5, *tables))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mean_does_not_swallow_the_variance(backend, device, assert_near, dtype, order):
    x, *tables = case((1, 8, 20, 40), (1, 1), device, dtype, order, mean=1000.0)
    check(assert_near, backend, (x, 2, 1e-5, *tables))


def test_vectors_are_tables_of_one_cell(backend, device):
    x, _, _, scale, shift = case((2, 8, 4, 6), (1, 1), device, torch.bfloat16)
    cells = ops.group_norm_modulate_silu(x, 4, 1e-5, scale=scale, shift=shift, backend=backend)
    vectors = (scale[:, :, 0, 0], shift[:, :, 0, 0])
    assert torch.equal(ops.group_norm_modulate_silu(x, 4, 1e-5, None, None, *vectors, backend=backend), cells)


def test_any_strides(backend, device):
    """x is copied, the tables are read where they lie."""
    x, weight, bias, scale, shift = case((2, 8, 4, 6), (2, 3), device, torch.float32)
    expected = ops.group_norm_modulate_silu(x, 4, 1e-5, weight, bias, scale, shift, backend=backend)
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)
    tables = [t.repeat_interleave(2, dim=3)[..., ::2] for t in (scale, shift)]
    sparse = [t.repeat_interleave(2)[::2] for t in (weight, bias)]
    out = ops.group_norm_modulate_silu(strided, 4, 1e-5, *sparse, *tables, backend=backend)
    assert torch.equal(out, expected if backend == "triton" else out)
    torch.testing.assert_close(out, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_an_image_does_not_depend_on_its_batch(backend, device, order):
    x, weight, bias, scale, shift = case((3, 8, 5, 4), (5, 4), device, torch.bfloat16, order)
    whole = ops.group_norm_modulate_silu(x, 4, 1e-5, weight, bias, scale, shift, backend=backend)
    alone = ops.group_norm_modulate_silu(x[1:2], 4, 1e-5, weight, bias, scale[1:2], shift[1:2], backend=backend)
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_threads_do_not_change_a_bit(backend):
    x, *tables = case((2, 32, 60, 50), (6, 5), "cpu", torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.group_norm_modulate_silu(x, 16, 1e-5, *tables, backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_empty_batches(name):
    x, *tables = case((0, 8, 4, 4), (2, 2), "cpu", torch.bfloat16)
    assert ops.group_norm_modulate_silu(x, 4, 1e-5, *tables, backend=name).shape == x.shape


def test_eager_is_the_formula_and_differentiable():
    x, *tables = case((2, 4, 3, 4), (3, 2), "cpu", torch.float64)
    torch.testing.assert_close(
        ops.group_norm_modulate_silu(x, 2, 1e-5, *tables, backend="eager"), formula(x, 2, 1e-5, *tables)
    )
    arguments = [a.detach().clone().requires_grad_() for a in (x, *tables)]
    assert torch.autograd.gradcheck(lambda x, *t: ops.group_norm_modulate_silu(x, 2, 1e-5, *t), arguments)


def test_limits_of_the_kernels_have_a_reason():
    x = torch.zeros(1, 4097, 1, 1)
    for name in ("cpu", "triton"):
        with pytest.raises(BackendUnavailableError, match="takes at most 4096 channels, got 4097"):
            ops.group_norm_modulate_silu(x, 1, 1e-5, backend=name)
        with pytest.raises(
            BackendUnavailableError, match=r"works in float32, bfloat16 and float16, got torch\.float64"
        ):
            ops.group_norm_modulate_silu(x[:, :4].double(), 1, 1e-5, backend=name)


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_bad_input_has_one_text_on_every_backend(name):
    x, table = torch.zeros(2, 8, 4, 6), torch.zeros(2, 8, 2, 3)
    good = dict(x=x, groups=4, eps=1e-5)
    for change, message in (
        (dict(x=None), "x must be a tensor, got NoneType"),
        (dict(x=x.int()), r"x must have a floating point dtype, got torch\.int32"),
        (dict(x=x[0]), r"x must be a tensor \(B, C, H, W\), got \(8, 4, 6\)"),
        (dict(x=x[:, :, :0]), r"x must be a tensor \(B, C, H, W\), got \(2, 8, 0, 6\)"),
        (dict(groups=3), "groups must be an int that divides the 8 channels of x, got 3"),
        (dict(groups=True), "groups must be an int that divides the 8 channels of x, got True"),
        (dict(eps=-1.0), r"eps must be a finite number >= 0, got -1\.0"),
        (dict(weight=torch.zeros(7)), r"weight must be \(8,\), got \(7,\)"),
        (dict(bias=torch.zeros(8, device="meta")), "bias must be on the device of x, cpu, got meta"),
        (dict(scale=table), "scale and shift must be given or left out together"),
        (
            dict(scale=table, shift=torch.zeros(2, 8)),
            r"shift must have the shape of scale, \(2, 8, 2, 3\), got \(2, 8\)",
        ),
        (
            dict(scale=table[..., :0], shift=table),
            r"scale must be \(2, 8\) or \(2, 8, h, w\) with h and w dividing 4 and",
        ),
        (dict(scale=table[:, :7], shift=table), r"dividing 4 and 6, got \(2, 7, 2, 3\)"),
        (dict(scale=torch.zeros(2, 8, 3, 3), shift=table), r"dividing 4 and 6, got \(2, 8, 3, 3\)"),
    ):
        with pytest.raises(InputError, match=message):
            ops.group_norm_modulate_silu(**{**good, **change}, backend=name)
