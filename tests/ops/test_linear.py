"""linear: the op, and every SIMD level of the C++ kernel against float64 within bounds derived from its arithmetic."""

import pytest
import torch

from msdd_fast import backends, native, ops
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.ops.linear import OP, pack_linear
from tests.tolerances import ROUNDING

HAS_EXTENSION = backends.extension_status()[0]
needs_extension = pytest.mark.skipif(not HAS_EXTENSION, reason=f"msdd_fast._C {backends.extension_status()[1]}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = ["plain", "plain_bf16", "plain_amx", "avx2", "avx512", "avx512bf16", "amx"]
REFUSED = "level must be plain, plain_bf16, plain_amx, avx2, avx512, avx512bf16 or amx and run on this machine"
# (rows, in, out): one of each, tails of tiles and panels, rows for one and for several blocks, the widths of nano.
SHAPES = [(1, 1, 2), (4, 256, 768), (7, 33, 130), (16, 31, 66), (97, 64, 18), (130, 7, 64), (5, 0, 6)]


def operands(rows, inputs, out, dtype, seed=0, gap=0):
    """x, weight and bias; rows of x and of the weight `gap` NaNs apart."""
    generator = torch.Generator().manual_seed(seed)

    def rows_of(*shape):
        buffer = torch.full((shape[0], shape[1] + gap), torch.nan).to(dtype)
        view = buffer[:, : shape[1]]
        view.copy_(torch.randn(shape, generator=generator))
        return view

    return rows_of(rows, inputs), rows_of(out, inputs), torch.randn(out, generator=generator).to(dtype)


def exact_and_bound(x, weight, bias, swiglu, dtype):
    """The result in float64, and how far a sum in float32 with one rounding can be from it.

    A sum of n products and a bias, in any order, errs by at most g = n u / (1 - n u) of the sum of magnitudes, with
    u = 2^-24 and n counting the roundings on the longest way (Higham, 3.1): here in + 2. The slope of silu is at most
    1.1; its exponential is good to 1e-7, and the quotient and two products round too. bfloat16 instructions take
    numbers below 2^-126 for zero.
    """
    x, weight = x.double(), weight.double()
    b = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    n = x.shape[1] + 2
    y = x @ weight.T + b
    error = (x.abs() @ weight.abs().T + b.abs()) * (n * 2.0**-24 / (1 - n * 2.0**-24)) + n * 2.0**-126
    if swiglu:
        (a, b), (error_a, error_b) = y.chunk(2, dim=1), error.chunk(2, dim=1)
        silu = torch.nn.functional.silu(a)
        y = silu * b
        error = 1.1 * error_a * (b.abs() + error_b) + silu.abs() * error_b + 1e-6 * y.abs() + 2.0**-120
    return y, error + ROUNDING[dtype] * (y.abs() + error) + (2.0**-25 if dtype == torch.float16 else 0)


def assert_within(out, x, weight, bias, swiglu):
    exact, bound = exact_and_bound(x, weight, bias, swiglu, out.dtype)
    assert out.shape == exact.shape
    assert ((out.double() - exact).abs() <= bound).all()  # false for NaN


def run(level, x, weight, bias, swiglu, out=None):
    """The kernel at one level; skips where this machine cannot run it."""
    try:
        packed = native.pack_linear(weight, swiglu, level)
    except InputError as error:
        assert REFUSED in str(error)
        pytest.skip(f"this machine cannot run {level}")
    return native.linear(x, packed, bias, len(weight), swiglu, out, level)


# --- the C++ kernel ---


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swiglu", [False, True])
def test_every_simd_level(level, dtype, swiglu):
    for shape in SHAPES:
        x, weight, bias = operands(*shape, dtype, gap=3)
        for given in (bias, None):
            assert_within(run(level, x, weight, given, swiglu), x, weight, given, swiglu)


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(4))
def test_any_size_any_stride(level, seed):
    """Results go into a slice of a poisoned buffer: all of it is written and nothing beside it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for case in range(6):
        rows, inputs, out = draw(1, 300), draw(1, 150), 2 * draw(1, 90)
        swiglu, dtype = bool(draw(0, 1)), DTYPES[draw(0, 2)]
        x, weight, bias = operands(rows, inputs, out, dtype, seed=case, gap=draw(0, 5))
        width, left, right = out // 2 if swiglu else out, draw(0, 9), draw(0, 9)
        buffer = torch.full((rows + 2, left + width + right), torch.nan, dtype=DTYPES[draw(0, 2)])
        place = buffer[1:-1, left : left + width]
        result = run(level, x, weight, bias, swiglu, place)
        assert result is place
        assert_within(place, x, weight, bias, swiglu)
        place.fill_(torch.nan)
        assert buffer.isnan().all()


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
def test_neither_threads_nor_neighbours_change_a_bit(level):
    """More threads than cores; split by columns (few rows) and by rows (few columns)."""
    before = torch.get_num_threads()
    for rows, inputs, out in ((5, 600, 700), (300, 100, 70), (64, 256, 192)):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, bias = operands(rows, inputs, out, dtype)
            whole = run(level, x, weight, bias, True)
            try:
                for threads in (1, 2, 5, 64):
                    torch.set_num_threads(threads)
                    assert torch.equal(run(level, x, weight, bias, True), whole)
            finally:
                torch.set_num_threads(before)
            for begin, end in ((0, 1), (rows // 2, rows)):
                assert torch.equal(run(level, x[begin:end], weight, bias, True), whole[begin:end])


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(level, dtype):
    x, weight, bias = operands(20, 33, 70, dtype)
    weight.abs_().add_(1)
    x[3, 32], x[11, 5], x[12, 32] = torch.nan, torch.inf, -torch.inf
    out = run(level, x, weight, bias, False)
    assert out[3].isnan().all() and (out[11] == torch.inf).all() and (out[12] == -torch.inf).all()
    assert out.isfinite().sum() == 17 * 70


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
def test_swiglu_of_every_size(level):
    """From where e^-a overflows to where it is nothing, in float32: a column of x W1^T is a, one of x W3^T is 3."""
    a = torch.tensor(
        [0.0, -0.0, *(s * m for m in (1e-30, 1e-4, 0.3, 5, 40, 87, 88, 90, 126, 1e4, 1e30) for s in (1, -1))]
    )
    x, weight = torch.stack([a, torch.ones_like(a)], dim=1), torch.tensor([[1.0, 0], [0, 3]])
    out = run(level, x, weight, None, True)
    exact = 3 * torch.nn.functional.silu(a.double())[:, None]
    # float32 runs out of exponents at -126 ln 2; from there on any next to nothing will do.
    assert ((out - exact).abs() <= 1e-6 * exact.abs() + 2.0**-118 * (1 + a.abs()[:, None])).all()
    assert run(level, torch.full((1, 2), torch.nan), weight, None, True).isnan().all()
    # However large the other factor is, nothing times it is nothing; and infinity times nothing is no number.
    x = torch.tensor([[-1e20, 1e20], [-1e30, 1e20], [-1e38, 1.0]])
    assert (run(level, x, weight, None, True) == 0).all()
    assert run(level, torch.tensor([[-torch.inf, 1.0]]), torch.tensor([[1.0, 0], [0, 3]]), None, True).isnan().all()


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
def test_whole_numbers_are_exact(level):
    """A wrong place in a panel shows as another number, not as an error of rounding."""
    for dtype in DTYPES:
        x = torch.arange(40).remainder(7).sub(3).repeat(9, 1).add(torch.arange(9)[:, None]).to(dtype)
        weight = torch.arange(74 * 40).remainder(5).sub(2).view(74, 40).to(dtype)
        bias = torch.arange(74).sub(30).to(dtype)
        expected = x.double() @ weight.double().T + bias.double()
        assert torch.equal(run(level, x, weight, bias, False, torch.empty(9, 74)).double(), expected)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3, 9)), r"packed must be of shape \(.*\), got"),
        (dict(x=torch.zeros(3, 8).bfloat16()), r"packed must be (of shape \(.*\)|bfloat16|float32), got"),
        (dict(x=torch.zeros(3, 16)[:, ::2]), "x must be contiguous in its last dimension"),
        (dict(x=torch.zeros(24)), r"x must be \(R, in\), got \(24,\)"),
        (dict(x=torch.zeros(3, 8, device="meta")), "x must be a float32.* on meta"),
        (dict(bias=torch.zeros(5)), r"bias must be of shape \(6\), got \(5\)"),
        (dict(out=torch.zeros(3, 5)), r"out must be of shape \(3, 6\), got \(3, 5\)"),
        (dict(out=torch.zeros(6, 3).T), "out must be contiguous in its last dimension"),
        (dict(out=torch.zeros(3, 6).int()), "out must be a float32.* got torch.int32"),
        (dict(packed=torch.zeros(5)), r"packed must be of shape"),
        (dict(level="sse9"), f"{REFUSED}, got sse9"),
        (dict(features=7, swiglu=True), "out must be even with swiglu, got 7"),
    ],
)
def test_native_refuses_what_would_read_wrong_memory(change, message):
    packed = native.pack_linear(torch.zeros(6, 8))
    arguments = dict(x=torch.zeros(3, 8), packed=packed, bias=torch.zeros(6), features=6)
    with pytest.raises(InputError, match=message):
        native.linear(**{**arguments, **change})


@needs_extension
@pytest.mark.parametrize(
    ("weight", "swiglu", "message"),
    [
        (torch.zeros(6), False, r"weight must be \(out, in\) with adjacent elements in a row, got \(6,\)"),
        (torch.zeros(8, 6).T, False, r"weight must be \(out, in\) .* strides \(1, 6\)"),
        (torch.zeros(6, 8).int(), False, "weight must be a float32.* got torch.int32"),
        (torch.zeros(5, 8), True, "out must be even with swiglu, got 5"),
    ],
)
def test_packing_refuses(weight, swiglu, message):
    with pytest.raises(InputError, match=message):
        native.pack_linear(weight, swiglu)


# --- the op ---


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swiglu", [False, True])
def test_against_the_formula(backend, dtype, swiglu):
    x, weight, bias = operands(12, 40, 30, dtype)
    packed = pack_linear(weight, swiglu) if backend == "cpu" else None
    for rows in (x.view(3, 4, 40), x.view(2, 6, 40).transpose(0, 1), x.view(12, 2, 20)[..., ::2].flatten(1)):
        w = weight[:, : rows.shape[-1]].contiguous()
        pack = packed if w.shape == weight.shape or packed is None else pack_linear(w, swiglu)
        out = ops.linear(rows, w, bias, packed=pack, swiglu=swiglu, backend=backend)
        assert out.shape == (*rows.shape[:-1], 15 if swiglu else 30) and out.dtype == dtype
        exact, bound = exact_and_bound(rows.flatten(0, -2), w, bias, swiglu, dtype)
        if backend == "eager":  # rounds after every operation
            bound = bound + 6 * ROUNDING[dtype] * (exact.abs() + 10)
        assert ((out.double().flatten(0, -2) - exact).abs() <= bound).all()


@needs_extension
def test_auto_takes_what_is_packed():
    x, weight, bias = operands(3, 8, 6, torch.float32)
    packed = pack_linear(weight)
    assert OP.select(x, weight, bias, packed, False) == "cpu"
    assert OP.select(x, weight, bias, None, False) == "eager"
    with pytest.raises(BackendUnavailableError, match=r"cpu: needs the weight in its own layout: packed=pack_linear"):
        ops.linear(x, weight, bias, backend="cpu")
    assert OP.select(x, weight.requires_grad_(), bias, packed, False) == "eager"


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("backend", ["eager", pytest.param("cpu", marks=needs_extension)])
def test_empty(shape, backend):
    weight = torch.zeros(6, 8)
    packed = pack_linear(weight) if backend == "cpu" else None
    assert ops.linear(torch.zeros(shape), weight, packed=packed, backend=backend).shape == (*shape[:-1], 6)


def test_gradients_against_finite_differences():
    x, weight, bias = (t.double().requires_grad_() for t in operands(3, 4, 6, torch.float32))
    for swiglu in (False, True):
        assert torch.autograd.gradcheck(lambda *a, s=swiglu: ops.linear(*a, swiglu=s), (x, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=None), "x must be a tensor, got NoneType"),
        (dict(x=torch.zeros(3, 8).int()), "x must have a floating point dtype, got torch.int32"),
        (dict(weight=torch.zeros(6, 9)), r"weight must be \(out, 8\) in the dtype of x, torch.float32, got \(6, 9\)"),
        (dict(weight=torch.zeros(6, 8).half()), r"weight must be .* got \(6, 8\) torch.float16"),
        (dict(weight=torch.zeros(6, 8, device="meta")), "weight must be on the device of x, cpu, got meta"),
        (dict(bias=torch.zeros(5)), r"bias must be \(6,\) torch.float32, got \(5,\) torch.float32"),
        (dict(weight=torch.zeros(5, 8), bias=None, swiglu=True), "an even number of rows with swiglu, .* got 5"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(x=torch.zeros(3, 8), weight=torch.zeros(6, 8), bias=torch.zeros(6))
    with pytest.raises(InputError, match=message):
        ops.linear(**{**arguments, **change})
