"""geglu on every backend against its formula in float64."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.ops.geglu import _native_arguments
from tests.ops.adaln import DTYPES, randn


def formula(value, gate):
    """By erfc, which keeps the digits of small results."""
    value, gate = value.double(), gate.double()
    return value * gate * torch.special.erfc(-gate * 0.5**0.5) / 2


def check(assert_near, backend, value, gate):
    out = ops.geglu(value, gate, backend=backend)
    assert out.is_contiguous()
    assert_near(out, ops.geglu(value, gate, backend="eager"), formula(value, gate), value.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 40), (1,), (3, 1025), (7, 1)])
def test_against_the_formula(backend, device, assert_near, shape, dtype):
    check(assert_near, backend, *(randn(*shape, seed=i).to(device, dtype) for i in range(2)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_one_tensor(backend, device, assert_near, dtype):
    packed = randn(2, 3, 66, seed=0).to(device, dtype)
    check(assert_near, backend, *packed.chunk(2, dim=-1))
    check(assert_near, backend, *packed[0].chunk(2, dim=-1))
    check(assert_near, backend, packed[..., ::2], packed.transpose(0, 1).contiguous().transpose(0, 1)[..., 1::2])
    check(assert_near, backend, packed[:1].expand(2, 3, 66), packed[:, 1:2].expand(2, 3, 66))


@pytest.mark.parametrize("shape", [(3, 12), (2, 3, 12), (1, 2, 1, 3, 12)])
def test_the_halves_are_not_copied(shape):
    """What the extension receives are the tensors' own addresses."""
    halves = randn(*shape, seed=0).chunk(2, dim=-1)
    assert [t.data_ptr() for t in _native_arguments(*halves)] == [t.data_ptr() for t in halves]


def test_the_whole_range_of_the_error_function(backend, device):
    """To 3e-7 of the gate, which is the rounding of 1 + erf; beyond, 0 or the gate itself."""
    gate = torch.linspace(-14, 14, 40001)
    gate = torch.cat([gate, torch.logspace(-37, 0, 500), -torch.logspace(-37, 0, 500), torch.tensor([0.0, -0.0])])
    gate = gate.to(device)
    one = torch.ones_like(gate)
    out = ops.geglu(one, gate, backend=backend)
    assert (out.double() - formula(one, gate)).abs().le(3e-7 * gate.double().abs()).all()
    assert (out.signbit() == gate.signbit()).all()
    gate = torch.tensor([6.0, 100.0, 1e20, 3e38], device=device)
    assert torch.equal(ops.geglu(torch.ones_like(gate), gate, backend=backend), gate)
    gate = -torch.tensor([14.0, 100.0, 1e20, 3e38], device=device)
    assert ops.geglu(torch.ones_like(gate), gate, backend=backend).abs().max() < 1e-35


def test_gelu_is_exact_not_tanh(backend, device):
    """The two differ by 5e-4."""
    gate = torch.linspace(-6, 6, 1001, device=device)
    out = ops.geglu(torch.ones_like(gate), gate, backend=backend)
    assert (out - torch.nn.functional.gelu(gate)).abs().max() < 2e-6
    assert (out - torch.nn.functional.gelu(gate, approximate="tanh")).abs().max() > 1e-4


def test_nan_and_infinity(backend, device):
    """As in eager in float64. In float32 eager is oneDNN's GELU, which makes NaN of infinity."""
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -1.0, 0.0], device=device)
    value = torch.tensor([1.0, 1.0, 1.0, torch.nan, torch.inf, torch.inf], device=device)
    expected = ops.geglu(value.double(), gate.double(), backend="eager").float()
    assert expected.isnan().tolist() == [True, False, True, True, False, True]
    assert torch.equal(ops.geglu(value, gate, backend=backend).nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 5)])
@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_empty(shape, name):
    assert ops.geglu(torch.zeros(shape), torch.zeros(shape), backend=name).shape == shape


def test_eager_is_what_ssdd_calculates():
    """Bit for bit the two calls that it replaces."""
    for dtype in DTYPES:
        value, gate = randn(4, 48, seed=0).to(dtype).chunk(2, dim=1)
        assert torch.equal(ops.geglu(value, gate, backend="eager"), torch.nn.functional.gelu(gate).mul_(value))


def test_eager_is_differentiable():
    args = [randn(2, 5, seed=i).double().requires_grad_() for i in range(2)]
    assert torch.autograd.gradcheck(ops.geglu, args)


@pytest.mark.parametrize("name", ["cpu"])
def test_threads_change_nothing(name):
    value, gate = randn(40, 2100, seed=0).chunk(2, dim=1)
    expected = ops.geglu(value, gate, backend=name)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ops.geglu(value, gate, backend=name), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_bad_input_has_one_text_on_every_backend(name):
    good = dict(value=torch.zeros(2, 8), gate=torch.zeros(2, 8))
    like_value = r"gate must have the shape \(\*, I\) and dtype of value, \(2, 8\) torch\.float32, got "
    for change, message in (
        (dict(value=None), "value must be a tensor, got NoneType"),
        (dict(value=torch.zeros(2, 8, dtype=torch.int32)), r"value must have a floating point dtype, got torch\.int32"),
        (dict(gate=torch.zeros(2, 7)), like_value + r"\(2, 7\) torch\.float32"),
        (dict(gate=torch.zeros(2, 8, dtype=torch.float16)), like_value + r"\(2, 8\) torch\.float16"),
        (dict(gate=torch.zeros(2, 8, device="meta")), "gate must be on the device of value, cpu, got meta"),
    ):
        with pytest.raises(InputError, match=message):
            ops.geglu(**{**good, **change}, backend=name)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_float64_is_for_eager(name):
    value = torch.zeros(2, 8, dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match=r"works in float32, bfloat16 and float16, got torch\.float64"):
        ops.geglu(value, value, backend=name)
    assert ops.geglu(value, value).dtype == torch.float64
