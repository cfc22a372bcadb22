"""pixel_modulate on every backend against its formula in float64."""

import pytest
import torch

from msdd_fast import backends, native, ops
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.ops.linear import pack_linear
from msdd_fast.ops.pixel_modulate import native_pixel_modulate
from tests.ops.pixels import DTYPES, LEVELS, SIZES, case, modulation, norm, packed_for

NAMES = ("x", "s", "weight", "bias", "rms_weight")


def arguments(sizes, device, dtype, pixel_dtype=None):
    x, _, *rest = case(sizes, 2, device, dtype, pixel_dtype)
    return (x, *rest[:4])


def packed(backend, weight):
    return pack_linear(weight) if backend == "cpu" else None


def exact(x, s, weight, bias, rms_weight):
    shift, scale = modulation(s, weight, bias, x.shape[1], 2, x.shape[2])
    return norm(x.double(), rms_weight) * (1 + scale) + shift


def check(assert_near, backend, args):
    out = ops.pixel_modulate(*args, packed(backend, args[2]), backend=backend)
    eager = ops.pixel_modulate(*args, backend="eager")
    assert out.is_contiguous()
    assert_near(out, eager, exact(*args), args[1].dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_against_the_formula(backend, device, assert_near, sizes, dtype):
    check(assert_near, backend, arguments(sizes, device, dtype))


def test_pixels_may_be_wider_than_features(backend, device, assert_near):
    check(assert_near, backend, arguments((5, 4, 16, 24, 64), device, torch.bfloat16, torch.float32))


def test_eps_counts_where_pixels_are_small(backend, device, assert_near):
    x, *rest = arguments((5, 4, 16, 24, 64), device, torch.float32)
    check(assert_near, backend, (1e-3 * x, *rest))


def test_tokens_do_not_depend_on_the_others(backend, device):
    """Chunks of rows give the same bits, whatever the size of the modulation that triton writes."""
    x, s, weight, bias, rms_weight = arguments((7, 4, 16, 24, 64), device, torch.float32)
    given = (weight, bias, rms_weight, packed(backend, weight))
    whole = ops.pixel_modulate(x, s, *given, backend=backend)
    parts = [ops.pixel_modulate(x[i], s[i], *given, backend=backend) for i in (slice(3), slice(3, 7))]
    tolerance = 0 if backend == "cpu" else 1e-5  # the library's matrix product may sum in another order
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=tolerance)


def test_chunks_of_the_modulation(device, monkeypatch, assert_near, backend):
    from msdd_fast.kernels import _pixels

    monkeypatch.setattr(_pixels, "CHUNK_BYTES", 3 * 4 * 4 * 2 * 16)  # three tokens
    check(assert_near, backend, arguments((7, 4, 16, 24, 64), device, torch.float32))


def test_autocast_changes_nothing(backend, device):
    from msdd_fast.kernels._pixels import modulation_chunks

    x, s, weight, bias, rms_weight = arguments((5, 4, 16, 24, 64), device, torch.float32)
    given = (x, s, weight, bias, rms_weight, packed(backend, weight))
    expected = ops.pixel_modulate(*given, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(ops.pixel_modulate(*given, backend=backend), expected)
        assert all(m.dtype == torch.float32 for _, m in modulation_chunks(s, weight, bias))


def test_strided_operands(backend, device):
    args = arguments((5, 4, 16, 24, 64), device, torch.float32)
    x, s, weight, bias, rms_weight = args
    given = (packed(backend, weight),)
    expected = ops.pixel_modulate(*args, *given, backend=backend)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([s, s], dim=1)[:, :24], weight
    strided += bias.repeat_interleave(2)[::2], rms_weight.repeat_interleave(2)[::2]
    torch.testing.assert_close(ops.pixel_modulate(*strided, *given, backend=backend), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_of_the_product(level, dtype):
    if not backends.extension_status()[0]:
        pytest.skip(backends.extension_status()[1])
    x, s, weight, bias, rms_weight = args = arguments((101, 5, 12, 33, 64), "cpu", dtype)
    weights = packed_for(weight, level)
    out = native_pixel_modulate(x, s, weights, bias, rms_weight, 1e-6, level)
    reference = native_pixel_modulate(x, s, native.pack_linear(weight, False, "plain"), bias, rms_weight, 1e-6, "plain")
    error = (out.double() - exact(*args)).abs().max()
    assert error <= 2 * (reference.double() - exact(*args)).abs().max() + 2e-6


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("sizes", [(0, 4, 16, 8, 64), (3, 0, 16, 8, 64)])
def test_empty(sizes, name):
    args = arguments(sizes, "cpu", torch.bfloat16)
    assert ops.pixel_modulate(*args, packed(name, args[2]), backend=name).shape == sizes[:3]


def test_eager_is_differentiable():
    args = [a.requires_grad_() for a in arguments((2, 3, 4, 5, 8), "cpu", torch.float64)]
    assert torch.autograd.gradcheck(ops.pixel_modulate, args)


def test_limits_of_the_kernels_have_a_reason():
    args = arguments((2, 3, 6, 5, 8), "cpu", torch.float32)
    for name in ("cpu", "triton"):
        with pytest.raises(BackendUnavailableError, match="needs a multiple of 4 channels, at most 64, got 6"):
            ops.pixel_modulate(*args, backend=name)
    args = arguments((2, 3, 8, 5, 8), "cpu", torch.float32)
    with pytest.raises(BackendUnavailableError, match=r"cpu: needs the weight in its own layout: packed=pack_linear"):
        ops.pixel_modulate(*args, backend="cpu")
    assert ops.pixel_modulate(*args).shape == (2, 3, 8)


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_bad_input_has_one_text_on_every_backend(name):
    good = dict(zip(NAMES, arguments((2, 3, 4, 5, 8), "cpu", torch.float32), strict=True))
    for change, message in (
        (dict(x=None), "x must be a tensor, got NoneType"),
        (dict(x=torch.zeros(6, 4)), r"x must be \(R, K, C\) with C at least 1, got \(6, 4\)"),
        (dict(s=torch.zeros(3, 5)), r"s must be \(2, D\), got \(3, 5\)"),
        (dict(s=torch.zeros(2, 5, device="meta")), "s must be on the device of x, cpu, got meta"),
        (dict(weight=torch.zeros(24, 6)), r"weight must be \(24, 5\) in the dtype of s, torch\.float32, got \(24, 6\)"),
        (dict(bias=torch.zeros(24).half()), r"bias must be \(24,\) in the dtype of s, .* got \(24,\) torch\.float16"),
        (dict(rms_weight=torch.zeros(5)), r"rms_weight must be \(4,\), got \(5,\)"),
        (dict(eps=float("nan")), "eps must be a finite number >= 0, got nan"),
    ):
        with pytest.raises(InputError, match=message):
            ops.pixel_modulate(**{**good, **change}, backend=name)
