"""final_step on every backend against the eager reference, and that against the pictures' own quantisation."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.diffusion.patch_rows import unpatchify_rows
from msdd_fast.errors import InputError
from msdd_fast.ops._patches import to_uint8

DT, SCALE = -0.3, 1.7
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Grid, images, channels, patch size.
SHAPES = [(4, 2, 3, 8), (3, 1, 1, 1), (3, 2, 3, 4), (2, 1, 3, 6), (1, 1, 3, 16)]


def case(shape, device, dtype=torch.float32):
    """x and the velocities of both branches in one tensor (N, 2B, F)."""
    grid, batch, channels, p = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(grid**2, batch, channels * p * p, generator=generator).to(device, dtype)
    return x, torch.randn(grid**2, 2 * batch, channels * p * p, generator=generator).to(device, dtype)


def final(x, both, p, out_dtype, guided=True, channels_last=False, backend="eager"):
    batch = x.shape[1]
    guidance = (both[:, batch:], SCALE) if guided else (None, None)
    return ops.final_step(x, both[:, :batch], DT, p, out_dtype, *guidance, channels_last=channels_last, backend=backend)


def exact_image(x, both, p, guided):
    """The formula in float64, as float32."""
    v = both.double()[:, : x.shape[1]]
    if guided:
        v_uncond = both.double()[:, x.shape[1] :]
        v = v_uncond + SCALE * (v - v_uncond)
    return unpatchify_rows(x.double() + DT * v, p).float()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(backend, device, assert_rounded, shape, channels_last):
    order = torch.channels_last if channels_last else torch.contiguous_format
    for dtype, out_dtype in zip(DTYPES, (torch.bfloat16, torch.float16, torch.float32), strict=True):
        x, both = case(shape, device, dtype)
        for guided in (False, True):
            for name in (backend, "eager"):
                out = final(x, both, shape[3], out_dtype, guided, channels_last, name)
                assert out.is_contiguous(memory_format=order)
                assert_rounded(out, exact_image(x, both, shape[3], guided), out_dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_uint8_is_that_of_the_pictures(backend, device, dtype, channels_last):
    """The same, or its neighbour where float64 is within rounding of a whole number."""
    x, both = case((4, 2, 3, 8), device, dtype)
    exact = exact_image(x, both, 8, True)
    level = (127.5 * exact + 128).cpu()
    for name in (backend, "eager"):
        out = final(x, both, 8, torch.uint8, True, channels_last, name)
        assert out.dtype == torch.uint8
        apart = (out.int() - to_uint8(exact).int()).abs().cpu()
        assert (apart <= ((level - level.round()).abs() < 1e-3)).all()
    assert (out == 0).any() and (out == 255).any()


def test_uint8_at_the_edges(backend, device):
    """v = 0, so nothing but the quantisation: exact away from whole numbers, far values and infinities clamped."""
    values = torch.arange(-300, 600) / 255.0
    x = torch.cat([values, torch.tensor([-1.0, 1.0, -1e30, 1e30, -torch.inf, torch.inf])])
    x = torch.cat([x, x.new_zeros(-len(x) % 16)]).view(1, -1, 16).to(device)
    out = ops.final_step(x, torch.zeros_like(x), 1.0, 4, torch.uint8, backend=backend)
    level = 127.5 * unpatchify_rows(x, 4).double() + 128
    expected = level.clamp(0, 255).to(torch.uint8)
    near = (level - level.round()).abs() < 1e-3
    assert torch.equal(out[~near], expected[~near]) and near.float().mean() < 0.6
    edges = torch.tensor([-1.0, 1.0, -torch.inf, torch.inf], device=device).view(1, 1, 4)
    out = ops.final_step(edges, torch.zeros_like(edges), 1.0, 2, torch.uint8, backend=backend)
    assert out.tolist() == [[[[0, 255], [0, 255]]]]


def test_nan_is_black_as_uint8(backend, device):
    x = torch.full((1, 1, 4), torch.nan, device=device)
    assert (ops.final_step(x, x, 1.0, 2, torch.uint8, backend=backend) == 0).all()
    assert ops.final_step(x, x, 1.0, 2, torch.float32, backend=backend).isnan().all()


def test_strides_change_nothing(backend, device):
    x, both = case((3, 2, 3, 4), device)
    expected = final(x, both, 4, torch.float32, backend=backend)
    batch_major = both.transpose(0, 1).contiguous().transpose(0, 1)
    features_apart = both.transpose(1, 2).contiguous().transpose(1, 2)
    gaps = x.repeat(1, 2, 1)[:, :2]
    for other_x, other in ((x, batch_major), (x, features_apart), (gaps, both)):
        assert torch.equal(final(other_x, other, 4, torch.float32, backend=backend), expected)
    whole = final(x, both, 4, torch.float32, guided=False, backend=backend)
    parts = [final(x[:, i : i + 1], both[:, i : i + 1], 4, torch.float32, False, backend=backend) for i in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_empty_input_and_device_scalars(backend, device):
    x, both = case((2, 2, 3, 4), device)
    assert final(x[:, :0], both[:, :0], 4, torch.uint8, False, backend=backend).shape == (0, 3, 8, 8)
    assert final(x[:0], both[:0], 4, torch.float16, backend=backend).shape == (2, 3, 0, 0)
    dt, scale = torch.tensor(DT, device=device), torch.tensor(SCALE, device=device)
    by_tensor = ops.final_step(x, both[:, :2], dt, 4, torch.float32, both[:, 2:], scale, backend=backend)
    assert torch.equal(by_tensor, final(x, both, 4, torch.float32, backend=backend))


ROWS = torch.zeros(4, 2, 48)
BAD = [
    (dict(x=None), "x must be a tensor, got NoneType"),
    (dict(x=torch.zeros(3, 2, 48)), r"x must be \(g\*g, B, C\*16\) for patch_size 4, got \(3, 2, 48\)"),
    (dict(v=ROWS.int()), "v must be float32, bfloat16 or float16, got torch.int32"),
    (dict(v_uncond=ROWS), "v_uncond and scale must be given together, got Tensor and none"),
    (dict(patch_size=0), "patch_size must be an int >= 1, got 0"),
    (dict(out_dtype=torch.int8), "out_dtype must be float32, bfloat16, float16 or uint8, got torch.int8"),
    (dict(dt=torch.zeros(2)), r"dt must be one number, got a tensor of shape \(2,\)"),
]


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_has_one_text_on_every_backend(name, change, message):
    arguments = dict(x=ROWS, v=ROWS, dt=-0.5, patch_size=4, out_dtype=torch.float32)
    with pytest.raises(InputError, match=message):
        ops.final_step(**{**arguments, **change}, backend=name)
