"""pixel_block on every backend against its formula in float64."""

import pytest
import torch

from msdd_fast import backends, ops
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.ops.linear import pack_linear
from msdd_fast.ops.pixel_block import native_pixel_block, split_modulation
from tests.ops.pixels import DTYPES, LEVELS, SIZES, case, modulation, norm, packed_for

NAMES = ("x", "y", "s", "weight", "bias", "rms_weight", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def packed(backend, weight):
    return pack_linear(weight) if backend == "cpu" else None


def exact(x, y, s, weight, bias, rms_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    gate1, shift, scale, gate2 = modulation(s, weight, bias, x.shape[1], 4, x.shape[2])
    x1 = x.double() + gate1 * y.double()
    h = (norm(x1, rms_weight) * (1 + scale) + shift) @ fc1_weight.double().T + fc1_bias.double()
    h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    return x1 + gate2 * (h @ fc2_weight.double().T + fc2_bias.double())


def check(assert_near, backend, args):
    out = ops.pixel_block(*args, packed(backend, args[3]), backend=backend)
    eager = ops.pixel_block(*args, backend="eager")
    assert out.is_contiguous()
    assert_near(out, eager, exact(*args), args[0].dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_against_the_formula(backend, device, assert_near, sizes, dtype):
    check(assert_near, backend, case(sizes, 4, device, dtype))


def test_pixels_may_be_wider_than_features(backend, device, assert_near):
    check(assert_near, backend, case((5, 4, 16, 24, 64), 4, device, torch.bfloat16, torch.float32))


def test_gelu_is_exact_not_tanh(backend, device):
    """The two differ by 5e-4; hidden values are spread over [-6, 6]."""
    x, y, s, weight, bias, rms_weight, fc1, b1, fc2, b2 = case((4, 4, 16, 24, 64), 4, device, torch.float32)
    args = (x, y, s, weight, bias, rms_weight, 2 * fc1, b1, fc2, b2)
    out = ops.pixel_block(*args, packed(backend, weight), backend=backend)
    assert (out.double() - exact(*args)).abs().max() < 2e-5


def test_tokens_do_not_depend_on_the_others(backend, device):
    args = case((7, 4, 16, 24, 64), 4, device, torch.float32)
    given = (*args[3:], packed(backend, args[3]))
    whole = ops.pixel_block(*args[:3], *given, backend=backend)
    parts = [ops.pixel_block(*(t[i] for t in args[:3]), *given, backend=backend) for i in (slice(3), slice(3, 7))]
    tolerance = 0 if backend == "cpu" else 1e-5  # the library's matrix product may sum in another order
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=tolerance)


def test_chunks_of_the_modulation(device, monkeypatch, assert_near, backend):
    from msdd_fast.kernels import _pixels

    monkeypatch.setattr(_pixels, "CHUNK_BYTES", 1)  # one token at a time
    check(assert_near, backend, case((5, 3, 16, 24, 64), 4, device, torch.float32))


def test_strided_operands(backend, device):
    x, y, s, weight, bias, *small = args = case((5, 4, 16, 24, 64), 4, device, torch.float32)
    given = (packed(backend, weight),)
    expected = ops.pixel_block(*args, *given, backend=backend)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, y)]
    turned += [torch.cat([s, s], dim=1)[:, :24], weight, bias.repeat_interleave(2)[::2]]
    turned += [t.repeat_interleave(2, dim=-1)[..., ::2] for t in small]
    torch.testing.assert_close(ops.pixel_block(*turned, *given, backend=backend), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_of_the_product(level, dtype):
    if not backends.extension_status()[0]:
        pytest.skip(backends.extension_status()[1])
    x, y, s, weight, bias, *small = args = case((101, 5, 12, 33, 48), 4, "cpu", dtype)

    def run(level):
        weights = packed_for(weight, level)
        return native_pixel_block(x, y, s, weights, bias, *small, 1e-6, level)

    out = run(level)
    error, allowed = ((t.double() - exact(*args)).abs().max() for t in (out, run("plain")))
    assert error <= 2 * allowed + 2e-6


def test_threads_do_not_change_bits():
    if not backends.extension_status()[0]:
        pytest.skip(backends.extension_status()[1])
    x, y, s, weight, *rest = case((203, 64, 16, 40, 64), 4, "cpu", torch.float32)
    before, weights = torch.get_num_threads(), pack_linear(weight)
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.pixel_block(x, y, s, weight, *rest, weights, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("sizes", [(0, 4, 16, 8, 64), (3, 0, 16, 8, 64)])
def test_empty(sizes, name):
    args = case(sizes, 4, "cpu", torch.bfloat16)
    assert ops.pixel_block(*args, packed(name, args[3]), backend=name).shape == sizes[:3]


def test_both_halves_of_the_released_modulation():
    """split_modulation takes the rows apart: six parts per pixel, in their order."""
    pixels, channels, features = 3, 4, 5
    weight = torch.randn(pixels * 6 * channels, features)
    bias, s = torch.randn(len(weight)), torch.randn(7, features)
    whole = torch.nn.functional.linear(s, weight, bias).view(7, pixels, 6, channels)
    (first, first_bias), (second, second_bias) = split_modulation(weight, bias, channels)
    close = torch.testing.assert_close
    close(torch.nn.functional.linear(s, first, first_bias), whole[:, :, :2].flatten(1))
    close(torch.nn.functional.linear(s, second, second_bias), whole[:, :, 2:].flatten(1))
    with pytest.raises(InputError, match=r"weight must be \(K \* 6 \* 5, D\), got \(72, 5\)"):
        split_modulation(weight, bias, 5)
    with pytest.raises(InputError, match=r"bias must be \(72,\), got \(71,\)"):
        split_modulation(weight, bias[1:], channels)


def test_eager_is_differentiable():
    args = [a.requires_grad_() for a in case((2, 2, 4, 3, 5), 4, "cpu", torch.float64)]
    assert torch.autograd.gradcheck(ops.pixel_block, args)


def test_limits_of_the_kernels_have_a_reason():
    for sizes, message in (
        ((2, 3, 68, 5, 8), "needs a multiple of 4 channels, at most 64, got 68"),
        ((2, 3, 8, 5, 257), "works with at most 256 hidden channels, got 257"),
    ):
        args = case(sizes, 4, "cpu", torch.float32)
        for name in ("cpu", "triton"):
            with pytest.raises(BackendUnavailableError, match=message):
                ops.pixel_block(*args, backend=name)
        assert ops.pixel_block(*args).shape == sizes[:3]


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_bad_input_has_one_text_on_every_backend(name):
    good = dict(zip(NAMES, case((2, 3, 4, 5, 8), 4, "cpu", torch.float32), strict=True))
    for change, message in (
        (dict(x=torch.zeros(2, 3, 0)), r"x must be \(R, K, C\) with C at least 1, got \(2, 3, 0\)"),
        (dict(y=torch.zeros(2, 3, 5)), r"y must have the shape of x, \(2, 3, 4\), got \(2, 3, 5\)"),
        (dict(weight=torch.zeros(24, 5)), r"weight must be \(48, 5\) in the dtype of s"),
        (dict(fc1_weight=torch.zeros(8, 5)), r"fc1_weight must be \(8, 4\) torch\.float32, got \(8, 5\)"),
        (dict(fc1_bias=torch.zeros(7)), r"fc1_bias must be \(8,\) torch\.float32, got \(7,\)"),
        (dict(fc2_weight=torch.zeros(4, 8).half()), r"fc2_weight must be \(4, 8\) torch\.float32, got .*float16"),
        (dict(fc2_bias=torch.zeros(4, device="meta")), "fc2_bias must be on the device of x, cpu, got meta"),
    ):
        with pytest.raises(InputError, match=message):
            ops.pixel_block(**{**good, **change}, backend=name)
