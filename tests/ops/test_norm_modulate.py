"""norm_modulate on every backend against its formula in float64."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.errors import BackendUnavailableError, InputError
from tests.ops.adaln import DTYPES, LARGE, LAYOUTS, bad_splits, formula, randn, rms_weight, tables


def case(shape, groups, device, dtype, mean=0.0, table_dtype=None):
    x = randn(*shape, seed=0, mean=mean).to(device, dtype)
    return x, *tables(groups, shape[-1], 2, device, table_dtype or dtype)


def check(assert_near, backend, args, split, weight=None):
    out = ops.norm_modulate(*args, split, rms_weight=weight, backend=backend)
    eager = ops.norm_modulate(*args, split, rms_weight=weight, backend="eager")
    assert out.is_contiguous()
    assert_near(out, eager, formula(*args, split, weight), args[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups", "split"), LAYOUTS)
def test_against_the_formula(backend, device, assert_near, shape, groups, split, dtype):
    check(assert_near, backend, case(shape, groups, device, dtype), split)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups", "split"), [*LAYOUTS, *LARGE, ((4, 6, 16), 24, None)])
def test_rms_norm(backend, device, assert_near, shape, groups, split, dtype):
    weight = rms_weight(shape[-1], split, device, dtype)
    check(assert_near, backend, case(shape, groups, device, dtype), split, weight)


def test_eps_counts_where_rows_are_small(backend, device, assert_near):
    x, shift, scale = case((5, 40), 1, device, torch.float32)
    check(assert_near, backend, (1e-3 * x, shift, scale), None, rms_weight(40, None, device, torch.float32))


def test_rms_norm_keeps_the_mean_and_takes_strided_and_wider_weights(backend, device):
    x, shift, scale = case((5, 24), 1, device, torch.bfloat16, mean=3.0)
    weight = rms_weight(24, None, device, torch.float32)
    out = ops.norm_modulate(x, shift, scale, None, 1e-6, weight, backend=backend)
    strided = weight.repeat_interleave(2)[::2]
    assert torch.equal(ops.norm_modulate(x, shift, scale, None, 1e-6, strided, backend=backend), out)
    ones, zeros = torch.ones(24, device=device), torch.zeros(1, 24, device=device)
    plain = ops.norm_modulate(x, zeros, zeros, None, 1e-6, ones, backend=backend)
    assert (plain.float().mean(1) > 0.8).all()  # LayerNorm would make it 0


@pytest.mark.parametrize(("shape", "groups", "split"), LARGE)
def test_wide_rows_and_float32_tables(backend, device, assert_near, shape, groups, split):
    check(assert_near, backend, case(shape, groups, device, torch.bfloat16, table_dtype=torch.float32), split)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mean_does_not_swallow_the_variance(backend, device, assert_near, dtype):
    check(assert_near, backend, case((4, 200), 1, device, dtype, mean=1000.0), None)


def test_eager_is_the_formula_and_rows_do_not_mix():
    args = case((4, 3, 24), 4, "cpu", torch.float64)
    whole = ops.norm_modulate(*args, backend="eager")
    torch.testing.assert_close(whole, formula(*args, None))
    for b in range(4):
        alone = ops.norm_modulate(args[0][b], args[1][b : b + 1], args[2][b : b + 1], backend="eager")
        assert torch.equal(alone, whole[b])


def test_rows_do_not_depend_on_their_batch(backend, device):
    x, shift, scale = case((5, 33), 1, device, torch.bfloat16)
    whole = ops.norm_modulate(x, shift, scale, backend=backend)
    parts = [ops.norm_modulate(part, shift, scale, backend=backend) for part in (x[:2], x[2:])]
    assert torch.equal(torch.cat(parts), whole)


def test_strided_x_and_tables(backend, device):
    x, shift, scale = case((4, 3, 24), 4, device, torch.float32)
    expected = ops.norm_modulate(x, shift, scale, backend=backend)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    sparse = [t.repeat_interleave(2, dim=1)[:, ::2] for t in (shift, scale)]
    assert torch.equal(ops.norm_modulate(strided, *sparse, backend=backend), expected)


@pytest.mark.parametrize(("shape", "groups", "split"), [((0, 4, 8), 0, None), ((0, 8), 1, None), ((0, 2, 8), 2, 0)])
@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_empty_batches(shape, groups, split, name):
    assert ops.norm_modulate(*case(shape, groups, "cpu", torch.bfloat16), split, backend=name).shape == shape


def test_eager_is_differentiable():
    args = [a.requires_grad_() for a in case((2, 3, 8), 2, "cpu", torch.float64)]
    assert torch.autograd.gradcheck(ops.norm_modulate, args)
    weight = rms_weight(8, None, "cpu", torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: ops.norm_modulate(*a[:3], None, 1e-6, a[3]), [*args, weight])


def test_limits_of_the_kernels_have_a_reason():
    x, shift, scale = case((1, 8193), 1, "cpu", torch.float32)
    for name in ("cpu", "triton"):
        with pytest.raises(BackendUnavailableError, match="works on rows of at most 8192 elements, got 8193"):
            ops.norm_modulate(x, shift, scale, backend=name)
        with pytest.raises(
            BackendUnavailableError, match=r"works in float32, bfloat16 and float16, got torch\.float64"
        ):
            ops.norm_modulate(x.double(), shift, scale, backend=name)


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
@bad_splits
def test_rows_that_cannot_be_shared_out(name, split, groups, message):
    x, shift, scale = case((4, 8), groups, "cpu", torch.float32)
    with pytest.raises(InputError, match=message):
        ops.norm_modulate(x, shift, scale, split, backend=name)


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_bad_input_has_one_text_on_every_backend(name):
    good = dict(x=torch.zeros(4, 8), shift=torch.zeros(2, 8), scale=torch.zeros(2, 8))
    for change, message in (
        (dict(x=None), "x must be a tensor, got NoneType"),
        (dict(x=torch.zeros(4, 8, dtype=torch.int32)), r"x must have a floating point dtype, got torch\.int32"),
        (dict(x=torch.zeros(())), r"x must be \(\*, D\) with D at least 1, got \(\)"),
        (dict(shift=torch.zeros(2, 7)), r"shift must be \(groups, 8\), got \(2, 7\)"),
        (dict(shift=torch.zeros(8)), r"shift must be \(groups, 8\), got \(8,\)"),
        (dict(scale=torch.zeros(4, 8)), r"scale must be \(2, 8\), got \(4, 8\)"),
        (dict(scale=torch.zeros(2, 8, device="meta")), "scale must be on the device of x, cpu, got meta"),
        (dict(rms_weight=torch.zeros(7)), r"rms_weight must be \(8,\), got \(7,\)"),
        (dict(rms_weight=torch.zeros(2, 8)), r"rms_weight must be \(8,\), got \(2, 8\)"),
        (dict(rms_weight=torch.zeros(8), split=1), r"rms_weight must be \(2, 8\), got \(8,\)"),
        (dict(rms_weight=torch.zeros(8).int()), r"rms_weight must have a floating point dtype, got torch\.int32"),
    ):
        with pytest.raises(InputError, match=message):
            ops.norm_modulate(**{**good, **change}, backend=name)
