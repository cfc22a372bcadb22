"""window_attention on every backend against the dense, masked formula in float64."""

import sys

import pytest
import torch

from msdd_fast import ops
from msdd_fast.backends import extension_status
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.layout import is_token_major
from tests.conftest import HAS_GPU
from tests.ops.adaln import DTYPES, randn
from tests.tolerances import FLOAT32_SLACK, INTERPRETER_ROUNDING, ROUNDING

module = sys.modules["msdd_fast.ops.window_attention"]
# (height, width, heads, head size, window): grids smaller than the window, lines, odd sizes, every head size of SSDD.
SHAPES = [
    (4, 6, 2, 24, 2),
    (1, 9, 1, 40, 3),
    (9, 1, 1, 48, 3),
    (3, 9, 1, 64, 8),
    (3, 18, 2, 72, 1),
    (6, 3, 1, 96, 2),
    (2, 2, 1, 5, 3),
]


def case(shape, device, dtype, batch=2, order="batch", scale=1.0, table_dtype=torch.float32):
    """Views of one packed buffer."""
    height, width, heads, size, window = shape
    lead = (height * width, batch) if order == "token" else (batch, height * width)
    packed = scale * randn(*lead, 3, heads, size, seed=height + 10 * size)
    q, k, v = (packed.transpose(0, 1) if order == "token" else packed).to(device, dtype).unbind(2)
    table = randn(2 * window - 1, 2 * window - 1, heads, seed=5).to(device, table_dtype)
    return q, k, v, table, height, width


def exact(q, k, v, table, height, width):
    """float64 result, and the sum of the absolute terms, which bounds the rounding of the weights."""
    reach = table.shape[0] // 2
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    dy, dx = (t[:, None] - t[None, :] for t in (y.to(q.device), x.to(q.device)))
    seen = (dy.abs() <= reach) & (dx.abs() <= reach)
    bias = table.double()[dy.clamp(-reach, reach) + reach, dx.clamp(-reach, reach) + reach].permute(2, 0, 1)
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + bias
    weights = logits.masked_fill(~seen, -torch.inf).softmax(3)
    return tuple((weights @ t).transpose(1, 2) for t in (v, v.abs()))


def check(args, backend, slack=4 * FLOAT32_SLACK):
    """One rounding of the weights, by triton, and one of the result."""
    out, q = ops.window_attention(*args, backend=backend), args[0]
    expected, terms = exact(*args)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert (out.transpose(0, 1) if is_token_major(q) else out).is_contiguous()
    rounding = (INTERPRETER_ROUNDING if backend == "triton" and not HAS_GPU else ROUNDING)[q.dtype]
    excess = (out.double() - expected).abs() - rounding * (terms + expected.abs()) - slack
    assert out.numel() == 0 or excess.max() <= 0, float(excess.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_dense_formula(backend, device, shape, dtype):
    check(case(shape, device, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_eager(shape, dtype):
    check(case(shape, "cpu", dtype), "eager")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sdpa(shape, dtype):
    """It rounds the bias, too: by half a unit in the last place of its largest entry at most, in every logit."""
    args = case(shape, "cpu", dtype)
    rounded = (*args[:3], args[3].to(dtype).float(), *args[4:])
    check(rounded, "sdpa", slack=4 * FLOAT32_SLACK + 4 * ROUNDING[dtype])


@pytest.mark.skipif(not extension_status()[0], reason=f"msdd_fast._C {extension_status()[1]}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_grids_and_several_threads(dtype):
    """Lines longer than a block of queries, ranges of lines that begin inside an image; any threads, the same bits."""
    args = case((17, 21, 3, 40, 8), "cpu", dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            check(args, "cpu")
            results.append(ops.window_attention(*args, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_token_major_buffers(backend, device):
    args = case((4, 3, 2, 24, 2), device, torch.bfloat16, batch=3, order="token")
    assert is_token_major(args[0])
    check(args, backend)
    dense = [t.contiguous() for t in args[:3]]
    out = ops.window_attention(*args, backend=backend)
    assert torch.equal(out, ops.window_attention(*dense, *args[3:], backend=backend))


def test_a_strided_table_of_another_dtype(backend, device):
    q, k, v, table, *grid = case((4, 4, 2, 24, 2), device, torch.bfloat16)
    table = table.bfloat16()
    expected = ops.window_attention(q, k, v, table, *grid, backend=backend)
    strided = table.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(ops.window_attention(q, k, v, strided, *grid, backend=backend), expected)
    assert torch.equal(ops.window_attention(q, k, v, table.float(), *grid, backend=backend), expected)


def test_what_lies_outside_the_window_counts_for_nothing(backend, device):
    """Huge keys and values there do not reach the result."""
    q, k, v, table, height, width = case((1, 12, 1, 24, 3), device, torch.float32, batch=1)
    expected = ops.window_attention(q, k, v, table, height, width, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, 6:], v[:, 6:] = 1e18, 1e18
    out = ops.window_attention(q, k, v, table, height, width, backend=backend)
    # Pixel 3 sees pixels 1 to 5.
    torch.testing.assert_close(out[:, :4], expected[:, :4], rtol=0, atol=1e-6)


def test_the_bias_has_a_direction(backend, device):
    """A table that prefers keys one row above and two columns to the left."""
    height, width, window = 4, 5, 3
    q = k = torch.zeros(1, height * width, 1, 24, device=device)
    v = torch.arange(height * width, device=device).float().view(1, -1, 1, 1).expand(1, -1, 1, 24).contiguous()
    table = torch.zeros(2 * window - 1, 2 * window - 1, 1, device=device)
    table[1 + window - 1, 2 + window - 1] = 50.0  # qy - ky = 1, qx - kx = 2
    out = ops.window_attention(q, k, v, table, height, width, backend=backend)[0, :, 0, 0].view(height, width)
    expected = torch.arange(height * width, device=device).view(height, width)[:-1, :-2].float()
    torch.testing.assert_close(out[1:, 2:], expected)


def test_extreme_scores(backend, device):
    shape = (3, 4, 1, 24, 2)
    check(case(shape, device, torch.float32, scale=0.0), backend)
    check(case(shape, device, torch.bfloat16, scale=30.0), backend, slack=2e-4)


@pytest.mark.parametrize("name", ["eager", "sdpa", "cpu", "triton"])
def test_empty(name):
    q, k, v, *rest = case((2, 3, 2, 24, 2), "cpu", torch.bfloat16)
    assert ops.window_attention(q[:0], k[:0], v[:0], *rest, backend=name).shape == (0, 6, 2, 24)


def test_an_image_does_not_depend_on_its_batch(backend, device):
    q, k, v, *rest = case((4, 5, 2, 24, 3), device, torch.bfloat16, batch=3)
    whole = ops.window_attention(q, k, v, *rest, backend=backend)
    assert torch.equal(ops.window_attention(q[1:2], k[1:2], v[1:2], *rest, backend=backend), whole[1:2])


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_gradients_against_finite_differences(name):
    q, k, v, table, *grid = case((2, 3, 1, 5, 2), "cpu", torch.float32, batch=1)
    arguments = [t.detach().clone().requires_grad_() for t in (q, k, v, table)]
    gradients = torch.autograd.grad(ops.window_attention(*arguments, *grid, backend=name).square().sum(), arguments)
    for argument, gradient in zip(arguments, gradients, strict=True):
        direction = randn(*argument.shape, seed=3)
        with torch.no_grad():
            sums = []
            for step in (1e-2, -1e-2):
                moved = [a + step * direction if a is argument else a for a in arguments]
                sums.append(exact(*moved, *grid)[0].square().sum())
        slope = (sums[0] - sums[1]) / 2e-2
        torch.testing.assert_close((gradient * direction).sum().double(), slope, rtol=2e-3, atol=2e-3)


def test_autocast():
    q, k, v, *rest = case((2, 3, 1, 24, 2), "cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.window_attention(q, k.bfloat16(), v, *rest, backend="eager")
    assert torch.equal(out, ops.window_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), *rest, backend="eager"))


def test_limits_of_the_kernels_have_a_reason():
    q, k, v, table, *grid = case((2, 2, 1, 24, 2), "cpu", torch.float32)
    wide = torch.zeros(2, 4, 1, 136)
    sparse = torch.zeros(2, 4, 1, 48)[..., ::2]
    for name in ("cpu", "triton"):
        for arguments, message in (
            ((wide, wide, wide, table), "takes heads of at most 128, got 136"),
            ((q, k, v, torch.zeros(129, 129, 1)), r"takes windows of at most 64, got a table \(129, 129, 1\)"),
            ((q, k, v, table.double()), r"works with a table in float32, bfloat16 or float16, got torch\.float64"),
            ((q, sparse, v, table), "needs the last dimension of q, k and v to be contiguous"),
        ):
            with pytest.raises(BackendUnavailableError, match=message):
                ops.window_attention(*arguments, *grid, backend=name)


@pytest.mark.parametrize("name", ["eager", "sdpa", "cpu", "triton"])
def test_bad_input_has_one_text_on_every_backend(name):
    q, k, v, table, *_ = case((2, 3, 2, 24, 2), "cpu", torch.float32)
    good = dict(q=q, k=k, v=v, table=table, height=2, width=3)
    for change, message in (
        (dict(q=None), "q must be a tensor, got NoneType"),
        (dict(q=q.double()), r"q must be float32, bfloat16 or float16, got torch\.float64"),
        (dict(height=3), r"q must be a tensor \(B, 9, heads, head size\), got \(2, 6, 2, 24\)"),
        (dict(width=0), "width must be an int >= 1, got 0"),
        (dict(height=2.0), r"height must be an int >= 1, got 2\.0"),
        (dict(q=q[0]), r"q must be a tensor \(B, 6, heads, head size\), got \(6, 2, 24\)"),
        (dict(k=k.half()), r"k must have the dtype of q, torch\.float32, got torch\.float16"),
        (dict(v=v[:, :5]), r"v must have the shape of q, \(2, 6, 2, 24\), got \(2, 5, 2, 24\)"),
        (dict(v=torch.empty_like(v, device="meta")), "v must be on the device of q, cpu, got meta"),
        (dict(table=table[:, :2]), r"table must be \(2w - 1, 2w - 1, 2\), got \(3, 2, 2\)"),
        (dict(table=table[:2, :2]), r"table must be \(2w - 1, 2w - 1, 2\), got \(2, 2, 2\)"),
        (dict(table=table[..., :1]), r"table must be \(2w - 1, 2w - 1, 2\), got \(3, 3, 1\)"),
        (dict(table=table.int()), r"table must have a floating point dtype, got torch\.int32"),
    ):
        with pytest.raises(InputError, match=message):
            ops.window_attention(**{**good, **change}, backend=name)
