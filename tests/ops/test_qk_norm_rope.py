"""qk_norm_rope on every backend against its formula in float64."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.errors import BackendUnavailableError, InputError
from tests.ops.adaln import DTYPES, randn

# (B, N, P, heads, head_dim)
SHAPES = [(2, 3, 3, 2, 16), (1, 5, 2, 1, 64), (2, 2, 3, 3, 32), (3, 1, 2, 2, 128)]
RMS_SHAPES = [
    (2, 3, 3, 2, 64),
    (1, 5, 3, 16, 72),
    (2, 4, 2, 3, 20),
    (3, 2, 3, 1, 8),
    (1, 3, 3, 37, 12),
    (1, 2, 3, 2, 124),
]


def tables(tokens, d, entries, parts, device, dtype=torch.float32):
    weight = (1 + randn(entries, parts, d, seed=1)).to(device, dtype)
    bias = randn(entries, parts, d, seed=2).to(device, dtype)
    angle = 3 * randn(tokens, d // 2, seed=3).to(device)
    return weight, bias, angle.cos(), angle.sin()


def case(shape, device, dtype, *, token_major=False, split=None, cosine=False, mean=0.0, rms=False):
    _, n, parts, _, d = shape
    qkv = randn(*shape, seed=0, mean=mean).to(device, dtype)
    if token_major:
        qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    weight, bias, cos, sin = tables(n, d, 1 if split is None else 2, parts - 1, device, dtype)
    return qkv, weight, None if rms else bias, cos, None if cosine else sin, split


def formula(qkv, weight, bias, cos, sin, split):
    """In float64, with complex numbers for the rotation; RMSNorm without a bias."""
    n = qkv.shape[1]
    x = qkv[:, :, :-1].double()
    centred = x - x.mean(-1, keepdim=True) if bias is not None else x
    entry = [0 if split is None or i < split else 1 for i in range(n)]
    bias = torch.zeros_like(weight) if bias is None else bias
    weight, bias = (t.double()[entry][None, :, :, None] for t in (weight, bias))
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias
    cos = cos.double()[None, :, None, None]
    turn = torch.complex(cos, torch.zeros_like(cos) if sin is None else sin.double()[None, :, None, None])
    return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def check(assert_near, backend, args):
    out, eager = (ops.qk_norm_rope(*args, backend=name) for name in (backend, "eager"))
    assert out.stride() == eager.stride()
    assert_near(out, eager, formula(*args), args[0].dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(backend, device, assert_near, shape, dtype):
    check(assert_near, backend, case(shape, device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", RMS_SHAPES)
def test_rms_norm_and_other_head_sizes(backend, device, assert_near, shape, dtype):
    check(assert_near, backend, case(shape, device, dtype, rms=True))
    check(assert_near, backend, case(shape, device, dtype, token_major=True, split=1))


@pytest.mark.parametrize("d", [64, 72])
def test_rms_norm_of_two_streams_in_a_token_major_buffer(backend, device, assert_near, d):
    args = case((2, 5, 3, 3, d), device, torch.bfloat16, token_major=True, split=2, rms=True)
    assert check(assert_near, backend, args).transpose(0, 1).is_contiguous()
    qkv, weight, _, cos, sin, split = args
    out = ops.qk_norm_rope(qkv, weight.float(), None, cos, sin, split, backend=backend)
    assert torch.equal(out, ops.qk_norm_rope(*args, backend=backend))
    small = (1e-3 * qkv, *args[1:])  # where eps counts
    check(assert_near, backend, small)


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("split", [None, 0, 2, 5])
def test_streams_and_variants_in_both_memory_orders(backend, device, assert_near, token_major, cosine, split):
    args = case((2, 5, 3, 2, 16), device, torch.float32, token_major=token_major, split=split, cosine=cosine)
    out = check(assert_near, backend, args)
    assert (out.transpose(0, 1) if token_major else out).is_contiguous()


def test_many_heads(backend, device, assert_near):
    """More than one program or buffer takes, with a tail."""
    check(assert_near, backend, case((1, 2, 3, 37, 64), device, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mean_does_not_swallow_the_variance(backend, device, assert_near, dtype):
    check(assert_near, backend, case((2, 3, 3, 2, 64), device, dtype, mean=1000.0))


def test_strides_and_v_left_alone(backend, device):
    """A slice of tokens of a larger buffer, poisoned where nothing may be read; float32 weights for bfloat16 heads."""
    args = case((2, 4, 3, 2, 32), device, torch.bfloat16)
    qkv, weight, bias, *rest = args
    expected = ops.qk_norm_rope(qkv, weight, bias, *rest, backend=backend)
    buffer = torch.full((9, 2, 3, 2, 32), torch.nan, dtype=torch.bfloat16, device=device)
    view = buffer[3:7].transpose(0, 1)
    view[:, :, :2] = qkv[:, :, :2]
    out = ops.qk_norm_rope(view, weight.float(), bias.float(), *rest, backend=backend)
    assert torch.equal(out, expected) and out.transpose(0, 1).is_contiguous()
    inner = qkv.transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(ops.qk_norm_rope(inner, weight, bias, *rest, backend=backend), expected)


@pytest.mark.parametrize("shape", [(0, 3, 3, 2, 16), (2, 0, 3, 2, 16)])
@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_empty(shape, name):
    b, n, _, heads, d = shape
    assert ops.qk_norm_rope(*case(shape, "cpu", torch.float32), backend=name).shape == (b, n, 2, heads, d)


def test_eager_takes_any_multiple_of_four_and_is_differentiable():
    qkv, weight, bias, cos, sin, _ = case((1, 2, 3, 2, 12), "cpu", torch.float64, split=1)
    out = ops.qk_norm_rope(qkv, weight, bias, cos, sin, 1, backend="eager")
    torch.testing.assert_close(out, formula(qkv, weight, bias, cos, sin, 1), rtol=0, atol=1e-6)  # rotates in float32
    args = [t.requires_grad_() for t in (qkv, weight, bias)]
    ops.qk_norm_rope(*args, cos, sin, 1).square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in args)
    assert not qkv.grad[:, :, 2].any()


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_limits_of_the_kernels_have_a_reason(name):
    for shape, dtype, message in (
        ((1, 2, 3, 2, 132), torch.float32, "works with head_dim up to 128, got 132"),
        ((1, 2, 3, 2, 16), torch.float64, r"works in float32, bfloat16 and float16, got torch\.float64"),
    ):
        args = case(shape, "cpu", dtype)
        with pytest.raises(BackendUnavailableError, match=message):
            ops.qk_norm_rope(*args, backend=name)
        assert ops.qk_norm_rope(*args).shape == (1, 2, 2, *shape[3:])


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_bad_input_has_one_text_on_every_backend(name):
    names = ("qkv", "weight", "bias", "cos", "sin", "split")
    good = dict(zip(names, case((2, 3, 3, 2, 16), "cpu", torch.float32), strict=True))
    table = r"must be a float32 tensor \(3, 8\), \(tokens, head_dim / 2\), got "
    for change, message in (
        (dict(qkv=None), "qkv must be a tensor, got NoneType"),
        (
            dict(qkv=torch.zeros(2, 3, 1, 2, 16)),
            r"qkv must be \(B, N, 2 or 3, heads, head_dim\).* got \(2, 3, 1, 2, 16\)",
        ),
        (dict(qkv=torch.zeros(2, 3, 3, 2, 6)), r"head_dim a multiple of 4, got \(2, 3, 3, 2, 6\)"),
        (dict(weight=torch.zeros(2, 2, 16)), r"weight must be \(1, 2, 16\), \(entries, .* got \(2, 2, 16\)"),
        (dict(bias=torch.zeros(1, 3, 16)), r"bias must be \(1, 2, 16\), \(entries, .* got \(1, 3, 16\)"),
        (dict(split=1), r"weight must be \(2, 2, 16\), \(entries, .* got \(1, 2, 16\)"),
        (dict(split=4), r"split must be an int in \[0, 3\], the number of tokens, got 4"),
        (dict(cos=torch.zeros(3, 8).double()), f"cos {table}" + r"torch\.float64 \(3, 8\)"),
        (dict(cos=None), f"cos {table}NoneType"),
        (dict(sin=torch.zeros(2, 8)), f"sin {table}" + r"torch\.float32 \(2, 8\)"),
        (dict(sin=torch.zeros(3, 8, device="meta")), "sin must be on the device of qkv, cpu, got meta"),
    ):
        with pytest.raises(InputError, match=message):
            ops.qk_norm_rope(**{**good, **change}, backend=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("of_norm", [torch.float64, torch.float32, torch.bfloat16])
def test_eager_takes_a_norm_of_any_float_dtype(dtype, of_norm):
    """As the norm in float64, to the rounding of the narrowest dtype; the result has the dtype of the heads."""
    x = torch.randn(1, 3, 3, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, bias = (torch.full((1, 2, 16), value, dtype=of_norm) for value in (1.5, 0.25))
    cos, sin = torch.ones(3, 8), torch.zeros(3, 8)
    exact = ops.qk_norm_rope(x.to(dtype).double(), weight.double(), bias.double(), cos, sin, backend="eager")
    out = ops.qk_norm_rope(x.to(dtype), weight, bias, cos, sin, backend="eager")
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= (0.02 if dtype == torch.bfloat16 else 1e-6)
