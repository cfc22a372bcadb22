"""euler_step on every backend against float64."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.errors import InputError

SCALARS = dict(dt=-0.25)


def tensors(shape, device, *dtypes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for dtype in dtypes]


def formula(x, v, dt):
    return x + dt * v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1,), (3, 1025)])
def test_against_the_formula(backend, device, assert_rounded, shape, dtype):
    args = tensors(shape, device, dtype, dtype)
    expected = formula(*(a.double() for a in args), **SCALARS).float()
    assert_rounded(ops.euler_step(*args, **SCALARS, backend=backend), expected, dtype)
    assert_rounded(ops.euler_step(*args, **SCALARS, backend="eager"), expected, dtype)


def test_mixed_dtypes_take_the_first(backend, device, assert_rounded):
    args = tensors((2, 9), device, torch.float32, torch.bfloat16)
    expected = formula(*(a.double() for a in args), **SCALARS).float()
    assert_rounded(ops.euler_step(*args, **SCALARS, backend=backend), expected, torch.float32)


def test_memory_order_follows_the_first(backend, device):
    args = tensors((2, 3, 4, 5), device, torch.float32, torch.float32)
    expected = ops.euler_step(*args, **SCALARS, backend=backend)
    last = args[0].to(memory_format=torch.channels_last)
    out = ops.euler_step(last, *args[1:], **SCALARS, backend=backend)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, expected)
    views = [a.transpose(2, 3) for a in args]
    assert torch.equal(ops.euler_step(*views, **SCALARS, backend=backend), expected.transpose(2, 3))


def test_device_scalars_and_empty_input(backend, device):
    args = tensors((2, 9), device, torch.bfloat16, torch.bfloat16)
    by_tensor = {k: torch.tensor(v, device=device) for k, v in SCALARS.items()}
    assert torch.equal(
        ops.euler_step(*args, **by_tensor, backend=backend), ops.euler_step(*args, **SCALARS, backend=backend)
    )
    assert ops.euler_step(*(a[:0] for a in args), **SCALARS, backend=backend).shape == (0, 9)


def test_eager_is_differentiable():
    args = [a.requires_grad_() for a in tensors((2, 3), "cpu", torch.float32, torch.float32)]
    ops.euler_step(*args, **SCALARS).sum().backward()
    assert all(a.grad.abs().sum() > 0 for a in args)


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=None), "x must be a tensor, got NoneType"),
        (dict(v=torch.zeros(3)), r"v must have the shape of x, \(2,\), got \(3,\)"),
        (dict(v=torch.zeros(2, dtype=torch.int32)), "v must be float32, bfloat16 or float16, got torch.int32"),
        (dict(v=torch.zeros(2, device="meta")), "v must be on the device of x, cpu, got meta"),
        (dict(dt=torch.zeros(2)), r"dt must be one number, got a tensor of shape \(2,\)"),
    ],
)
def test_bad_input_has_one_text_on_every_backend(name, change, message):
    arguments = dict(x=torch.zeros(2), v=torch.zeros(2), **SCALARS)
    with pytest.raises(InputError, match=message):
        ops.euler_step(**{**arguments, **change}, backend=name)
