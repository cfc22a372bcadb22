"""The int8 product: every SIMD level of the C++ kernel against its formula in float64."""

import pytest
import torch

from msdd_fast import backends, native
from msdd_fast.backends.extension import load_extension
from msdd_fast.errors import InputError
from msdd_fast.native.linear_int8 import quantize_rows
from tests.tolerances import ROUNDING

HAS_EXTENSION = backends.extension_status()[0]
pytestmark = pytest.mark.skipif(not HAS_EXTENSION, reason=f"msdd_fast._C {backends.extension_status()[1]}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = ["plain", "plain_amx", "avx512vnni", "amx"]
REFUSED = "level must be plain, plain_amx, avx512vnni or amx and run on this machine"
# (rows, in, out): one of each, tails of tiles, quads and panels, the widths of nano, no inputs.
SHAPES = [(1, 1, 2), (4, 256, 768), (7, 33, 130), (16, 31, 66), (97, 64, 18), (130, 7, 64), (5, 0, 6)]


def rounded(x):
    """Rows of -127 to 127 in float64 and their scales (R, 1), in the kernel's own arithmetic."""
    x = x.float()
    amax = torch.cat([x.abs(), torch.full((len(x), 1), 1e-12)], dim=1).amax(dim=1, keepdim=True)
    q = (x * (torch.full_like(amax, 127.0) / amax)).round()
    return q.double(), (amax / torch.full_like(amax, 127.0)).double()


def expected(x, weight, bias, swiglu, dtype):
    """The result in float64, and how far the kernel may be: the sums are exact, three roundings follow, then the last.

    SwiGLU as in test_linear.py.
    """
    (qx, sx), (qw, sw) = rounded(x), rounded(weight)
    y = (qx @ qw.T) * (sx * sw.T)
    error = 3 * 2.0**-24 * y.abs() + 2.0**-120
    if bias is not None:
        y = y + bias.double()
        error = error + 2.0**-24 * y.abs()
    if swiglu:
        (a, b), (error_a, error_b) = y.chunk(2, dim=1), error.chunk(2, dim=1)
        silu = torch.nn.functional.silu(a)
        y = silu * b
        error = 1.1 * error_a * (b.abs() + error_b) + silu.abs() * error_b + 1e-6 * y.abs()
    return y, error * 1.01 + ROUNDING[dtype] * (y.abs() + error) + (2.0**-25 if dtype == torch.float16 else 0)


def operands(rows, inputs, out, dtype, seed=0, gap=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((rows, inputs + gap), torch.nan).to(dtype)[:, :inputs]
    x.copy_(torch.randn(rows, inputs, generator=generator))
    weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((out, inputs), (out,)))
    return x, weight, bias


def run(level, x, weight, bias, swiglu, out=None):
    try:
        packed = native.pack_linear_int8(weight, swiglu, level)
    except InputError as error:
        assert REFUSED in str(error)
        pytest.skip(f"this machine cannot run {level}")
    return native.linear_int8(x, packed, bias, len(weight), swiglu, out, level)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rounded_to_the_nearest(dtype):
    x = operands(9, 130, 1, dtype, gap=2)[0]
    x[3], x[4, :5] = 0, torch.tensor([1.0, 0.5, -0.5, 1.5, -1.5]).to(dtype)
    x[4, 5:] = 127
    values, scales = quantize_rows(x)
    q, scale = rounded(x)
    assert values.shape == (9, 192) and values.dtype == torch.uint8
    assert torch.equal(values[:, :130].double() - 128, q) and torch.equal(scales.double(), scale[:, 0])
    assert (values[4, :5].int() - 128).tolist() == [1, 0, 0, 2, -2]  # ties to even
    assert (values[3] == 128).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swiglu", [False, True])
def test_every_simd_level(level, dtype, swiglu):
    """Results go into a slice of a poisoned buffer: all of it is written and nothing beside it."""
    for shape in SHAPES:
        x, weight, bias = operands(*shape, dtype, gap=3)
        for given in (bias, None):
            width = shape[2] // 2 if swiglu else shape[2]
            buffer = torch.full((shape[0] + 2, width + 5), torch.nan, dtype=dtype)
            place = buffer[1:-1, 2:-3]
            assert run(level, x, weight, given, swiglu, place) is place
            exact, bound = expected(x, weight, given, swiglu, dtype)
            assert ((place.double() - exact).abs() <= bound).all()  # false for NaN
            assert torch.equal(run(level, x, weight, given, swiglu), place)
            place.fill_(torch.nan)
            assert buffer.isnan().all()


@pytest.mark.parametrize("level", LEVELS)
def test_any_size(level):
    generator = torch.Generator().manual_seed(1)
    for case in range(12):
        rows, inputs, out = (int(torch.randint(1, n, (), generator=generator)) for n in (300, 150, 180))
        x, weight, bias = operands(rows, inputs, out, DTYPES[case % 3], seed=case)
        exact, bound = expected(x, weight, bias, False, x.dtype)
        assert ((run(level, x, weight, bias, False).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("level", LEVELS)
def test_neither_threads_nor_neighbours_change_a_bit(level):
    before = torch.get_num_threads()
    for rows, inputs, out in ((5, 600, 700), (300, 100, 70)):
        x, weight, bias = operands(rows, inputs, out, torch.bfloat16)
        whole = run(level, x, weight, bias, True)
        try:
            for threads in (1, 2, 5, 64):
                torch.set_num_threads(threads)
                assert torch.equal(run(level, x, weight, bias, True), whole)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(run(level, x[2:4], weight, bias, True), whole[2:4])


@pytest.mark.parametrize("level", LEVELS)
def test_the_largest_sums_do_not_overflow(level):
    """Of both signs, with as many inputs as are taken."""
    x, weight = torch.ones(2, 65536), torch.ones(2, 65536)
    weight[1] = -1
    assert torch.equal(run(level, x, weight, None, False), torch.tensor([65536.0, -65536.0]).repeat(2, 1))


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_finite_stays_so_in_its_row_and_column(level):
    x, weight, _ = operands(20, 33, 70, torch.float32)
    x[3, 32], x[11, 5], weight[7, 2] = torch.nan, torch.inf, torch.nan
    finite = run(level, x, weight, None, False).isfinite()
    good = torch.ones(20, 70, dtype=torch.bool)
    good[3], good[11], good[:, 7] = False, False, False
    assert torch.equal(finite, good)


def test_what_is_refused():
    x, weight, _ = operands(4, 8, 6, torch.float32)
    packed = native.pack_linear_int8(weight)
    with pytest.raises(InputError, match="in must be at most 65536, got 65537"):
        native.pack_linear_int8(torch.zeros(2, 65537))
    with pytest.raises(InputError, match="out must be even with swiglu, got 5"):
        native.pack_linear_int8(weight[:5], True)
    with pytest.raises(InputError, match="packed must be of shape"):
        native.linear_int8(x, packed[1:], None, 6)
    with pytest.raises(InputError, match="adjacent elements in a row"):
        native.pack_linear_int8(weight.t())
    with pytest.raises(InputError, match="level must be plain"):
        native.pack_linear_int8(weight, level="sse9")
    assert load_extension().linear_int8_level() in LEVELS
