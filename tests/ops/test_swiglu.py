"""swiglu on every backend against its formula in float64."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.errors import BackendUnavailableError, InputError
from tests.ops.adaln import DTYPES, randn


def formula(a, b):
    a, b = a.double(), b.double()
    return a / (1 + torch.exp(-a)) * b


def check(assert_near, backend, a, b):
    out = ops.swiglu(a, b, backend=backend)
    assert out.is_contiguous()
    assert_near(out, ops.swiglu(a, b, backend="eager"), formula(a, b), a.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 40), (1,), (3, 1025), (7, 1)])
def test_against_the_formula(backend, device, assert_near, shape, dtype):
    check(assert_near, backend, *(randn(*shape, seed=i).to(device, dtype) for i in range(2)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_one_tensor(backend, device, assert_near, dtype):
    packed = randn(2, 3, 66, seed=0).to(device, dtype)
    check(assert_near, backend, *packed.chunk(2, dim=-1))
    check(assert_near, backend, packed[..., ::2], packed.transpose(0, 1).contiguous().transpose(0, 1)[..., 1::2])


def test_the_whole_range_of_the_exponential(backend, device):
    """To 5e-7 relative where e^-a is finite; beyond, 0 or a itself."""
    a = torch.cat([torch.linspace(-87, 100, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38])]).to(device)
    out = ops.swiglu(a, torch.ones_like(a), backend=backend).double()
    exact = formula(a, torch.ones_like(a))
    assert (out - exact).abs().le(5e-7 * exact.abs()).all()
    a = torch.tensor([-88.0, -90.0, -1000.0, -3e38], device=device)
    assert ops.swiglu(a, torch.ones_like(a), backend=backend).abs().max() < 1e-35


def test_nan_and_infinity_as_in_eager(backend, device):
    a = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 0.0], device=device)
    b = torch.tensor([1.0, 1.0, 1.0, torch.nan, torch.inf], device=device)
    expected = ops.swiglu(a, b, backend="eager")
    assert torch.equal(ops.swiglu(a, b, backend=backend).nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_empty(shape, name):
    assert ops.swiglu(torch.zeros(shape), torch.zeros(shape), backend=name).shape == shape


def test_eager_is_differentiable():
    args = [randn(2, 5, seed=i).double().requires_grad_() for i in range(2)]
    assert torch.autograd.gradcheck(ops.swiglu, args)


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_bad_input_has_one_text_on_every_backend(name):
    good = dict(a=torch.zeros(2, 8), b=torch.zeros(2, 8))
    like_a = r"b must have the shape \(\*, I\) and dtype of a, \(2, 8\) torch\.float32, got "
    for change, message in (
        (dict(a=None), "a must be a tensor, got NoneType"),
        (dict(a=torch.zeros(2, 8, dtype=torch.int32)), r"a must have a floating point dtype, got torch\.int32"),
        (dict(b=torch.zeros(2, 7)), like_a + r"\(2, 7\) torch\.float32"),
        (dict(b=torch.zeros(2, 8, dtype=torch.float16)), like_a + r"\(2, 8\) torch\.float16"),
        (dict(b=torch.zeros(2, 8, device="meta")), "b must be on the device of a, cpu, got meta"),
    ):
        with pytest.raises(InputError, match=message):
            ops.swiglu(**{**good, **change}, backend=name)


def test_float64_is_for_eager():
    a = torch.zeros(2, 8, dtype=torch.float64)
    for name in ("cpu", "triton"):
        with pytest.raises(
            BackendUnavailableError, match=r"works in float32, bfloat16 and float16, got torch\.float64"
        ):
            ops.swiglu(a, a, backend=name)
    assert ops.swiglu(a, a).dtype == torch.float64
