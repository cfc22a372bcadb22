"""quantize_rows against its formula, written with the definition of e4m3.

Triton's interpreter does not carry when it rounds to float8 and loses NaN. So its kernel is compared by the numbers
that it would round, written as float32, and by numbers that e4m3 holds; a GPU does the whole.
"""

import math

import pytest
import torch

from msdd_fast import ops
from msdd_fast.errors import BackendUnavailableError, InputError
from tests.conftest import HAS_GPU

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (5, 33), (2, 768), (2, 1536)]
GPU = pytest.param("triton", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")])


def rows(shape, dtype, device="cpu", mean=0.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) * 3 + mean
    return x.to(device, dtype)


def e4m3(value):
    """Nearest number with 4 significant bits, exponents -6 to 8, multiples of 2^-9 below; ties to even."""
    if value == 0 or math.isnan(value):
        return value
    step = 2.0 ** (max(math.frexp(value)[1] - 1, -6) - 3)
    return math.copysign(min(round(abs(value) / step) * step, 448.0), value)


def formula(x):
    amax = x.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    largest = torch.full_like(amax, 448.0)
    scaled = x.float() * (largest / amax)
    return torch.tensor([[e4m3(v) for v in row] for row in scaled.tolist()]), amax / largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["eager", GPU])
def test_against_the_formula(backend, shape, dtype):
    x = rows(shape, dtype, "cuda" if backend == "triton" else "cpu")
    q, scale = ops.quantize_rows(x, backend=backend)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (shape[0], 1)
    expected, expected_scale = formula(x.cpu())
    assert torch.equal(q.float().cpu(), expected) and torch.equal(scale.cpu(), expected_scale)
    assert q.float().abs().amax(dim=1).eq(448).all()


@pytest.mark.parametrize("backend", ["eager", GPU])
def test_the_error_is_what_the_docstring_says(backend):
    x = torch.cat([rows((4, 4000), torch.float32), rows((4, 4000), torch.float32, mean=100.0)])
    x = torch.cat([x, x * torch.logspace(0, -9, 4000)]).to("cuda" if backend == "triton" else "cpu")
    q, scale = ops.quantize_rows(x, backend=backend)
    error, amax = (q.float() * scale - x).abs(), x.abs().amax(dim=1, keepdim=True)
    large = x.abs() > amax / 28_672
    assert ((error / x.abs())[large] <= 2**-4 * 1.001).all()
    assert ((error / amax)[~large] <= 1.001 / 458_752).all()
    assert (~large).any() and (error[large] > 0.9 * 2**-4 * x.abs()[large]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_up_to_the_conversion(shape, dtype):
    from msdd_fast.kernels._norm import row_config
    from msdd_fast.kernels.quantize_rows import quantize_rows_kernel

    device = "cuda" if HAS_GPU else "cpu"
    x = rows(shape, dtype, device)
    x[0, shape[1] // 2] = 1000.0
    scaled, scale = torch.empty(shape, device=device), torch.empty(shape[0], 1, device=device)
    quantize_rows_kernel[(shape[0],)](x, scaled, scale, WIDTH=shape[1], **row_config(shape[1]), enable_fp_fusion=True)
    q, expected_scale = ops.quantize_rows(x, backend="eager")
    assert torch.equal(scaled.to(torch.float8_e4m3fn).float(), q.float()) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_e4m3_holds(dtype):
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
    x = torch.stack([numbers, -numbers.flip(0), numbers / 2**10, numbers * 8]).to("cuda" if HAS_GPU else "cpu", dtype)
    q, scale = ops.quantize_rows(x, backend="triton")
    # float16 holds neither the smallest of them over 2^10 nor all of them times 8, but the first two rows.
    count = 2 if dtype == torch.float16 else 4
    assert torch.equal((q.float() * scale)[:count], x.float()[:count])
    assert torch.equal(q.float()[:count], ops.quantize_rows(x, backend="eager")[0].float()[:count])


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_zeros_strides_and_empty_input(backend):
    device = "cuda" if HAS_GPU and backend == "triton" else "cpu"
    q, scale = ops.quantize_rows(torch.zeros(2, 7, device=device), backend=backend)
    assert (q.float() == 0).all() and (scale > 0).all()
    x = rows((6, 10), torch.float32, device)
    for view in (x.t(), x[::2], x[:, 3:8]):
        for part, expected in zip(
            ops.quantize_rows(view, backend=backend), ops.quantize_rows(view.contiguous(), backend=backend), strict=True
        ):
            assert part.is_contiguous() and torch.equal(part.float(), expected.float())
    q, scale = ops.quantize_rows(x[:0], backend=backend)
    assert q.shape == (0, 10) and scale.shape == (0, 1)


@pytest.mark.parametrize("backend", ["eager", GPU])
def test_nan_and_inf_are_not_hidden(backend):
    x = torch.ones(3, 4, device="cuda" if backend == "triton" else "cpu")
    x[0, 1], x[1, 2] = float("nan"), float("inf")
    q, scale = ops.quantize_rows(x, backend=backend)
    bad = (q.float() * scale).sum(dim=1).isnan()
    assert bad.tolist() == [True, True, False]


def test_rows_too_wide_for_the_kernel():
    with pytest.raises(BackendUnavailableError, match="works on rows of at most 8192 elements, got 8193"):
        ops.quantize_rows(torch.zeros(1, 8193), backend="triton")


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_bad_input_has_one_text_on_every_backend(backend):
    for x, message in (
        (None, "x must be a tensor, got NoneType"),
        (torch.zeros(2, 2, dtype=torch.float64), "x must be float32, bfloat16 or float16, got torch.float64"),
        (torch.zeros(4), r"x must be \(R, D\) with D at least 1, got \(4,\)"),
        (torch.zeros(4, 0), r"x must be \(R, D\) with D at least 1, got \(4, 0\)"),
    ):
        with pytest.raises(InputError, match=message):
            ops.quantize_rows(x, backend=backend)
