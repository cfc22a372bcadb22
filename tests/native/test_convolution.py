"""Every SIMD level of the C++ convolution against float64, within bounds derived from its arithmetic."""

import functools
import random

import pytest
import torch

from msdd_fast import backends, native
from msdd_fast.errors import InputError
from tests.ops.convolutions import DTYPES, KINDS, assert_near, assert_within, exact_and_bound, operands, result_size

if not backends.extension_status()[0]:
    pytest.skip(f"msdd_fast._C {backends.extension_status()[1]}", allow_module_level=True)

LEVELS = ["plain", "plain_bf16", "avx2", "avx512", "avx512bf16"]
REFUSED = "level must be plain, plain_bf16, plain_amx, avx2, avx512, avx512bf16 or amx and run on this machine"
ORDER = ("norm_weight", "norm_bias", "scale", "shift", "added", "added_more")


def pack(level, given):
    """The weights for one level; skips where this machine cannot run it."""
    try:
        return native.pack_convolution(
            given["weight"], given["kind"], given["x"].dtype, given.get("shortcut"), level=level
        )
    except InputError as error:
        assert REFUSED in str(error)
        pytest.skip(f"this machine cannot run {level}")


def run(level, given):
    packed, features = pack(level, given), len(given["weight"])
    numbers = given["kind"], given["groups"], 1e-5, given["silu"]
    rest = *(given.get(name) for name in ORDER), "shortcut" in given, level
    return native.convolution(given["x"], given.get("more"), packed, given.get("bias"), features, *numbers, *rest)


def of_images(given, images):
    """The operands for some of the images."""
    batched = ("x", "more", "scale", "shift", "added", "added_more")
    return {n: t[images] if n in batched else t for n, t in given.items()}


@functools.cache  # for all levels
def drawn(seed, dtype=None):
    """Operands of any shape, the result in float64 and its bound.

    Channels of odd numbers and of whole panels, cells of one pixel and of all.
    """
    d = random.Random(seed)
    kind, c, more = d.choice(KINDS), d.choice([1, 3, 4, 8, 12, 32, 40]), d.choice([0, 0, 5, 8])
    cell = d.choice([1, 2, 4])
    size = (cell * d.randint(1, 5), cell * d.randint(1, 9))
    groups = d.choice([0, 1, 4 if (c + more) % 4 == 0 else c + more])
    case = dict(groups=groups, silu=d.random() < 0.5, bias=d.random() < 0.7, mean=d.choice([0.0, 3.0]))
    if groups:
        cells = (size[0] // cell, size[1] // cell)
        case |= dict(affine=d.random() < 0.5, cells=d.choice([None, (1, 1), cells, (size[0], cells[1])]))
    if d.random() < 0.3:
        case |= dict(residual=True)
    elif kind == "same" and d.random() < 0.7:
        case |= dict(shortcut=d.choice([(3,), (8, 5), (32, 1)]))
    out = d.choice([1, 3, 16, 31, 32, 33, 64, 70])
    given = operands(dtype or d.choice(DTYPES), kind, d.randint(1, 3), c, more, out, size, **case, seed=seed)
    return given, *exact_and_bound(**given)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(4))
def test_any_shape(level, seed):
    for case in range(8):
        given, exact, bound = drawn(100 * seed + case)
        out = run(level, given)
        assert out.dtype == given["x"].dtype
        assert_near(out, exact, bound)
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_are_exact(level, kind):
    """A wrong place in a panel or a line shows as another number, not as an error of rounding."""
    for dtype in DTYPES:
        given = operands(dtype, kind, 2, 3, 4, 37, (5, 14), residual=True, **({} if kind == "up" else dict(bias=True)))
        for i, t in enumerate(given.values()):
            if isinstance(t, torch.Tensor):
                t.copy_(torch.arange(t.numel()).mul(7 + i).remainder(5).sub(2).view(t.shape))
        exact, _ = exact_and_bound(**given)
        assert exact.abs().max() <= 2**8  # whole numbers of bfloat16
        assert torch.equal(run(level, given).double(), exact)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_neither_threads_nor_neighbours_change_a_bit(level, kind):
    """More threads than cores, and lines that they share unevenly."""
    before = torch.get_num_threads()
    sums = dict(shortcut=(5, 8)) if kind == "same" else dict(residual=True)
    for dtype in (torch.float32, torch.bfloat16):
        given = operands(dtype, kind, 3, 20, 12, 34, (22, 12), 4, True, (11, 3), True, **sums)
        whole = run(level, given)
        try:
            for threads in (1, 2, 5, 64):
                torch.set_num_threads(threads)
                assert torch.equal(run(level, given), whole)
        finally:
            torch.set_num_threads(before)
        for images in (slice(0, 1), slice(1, 3)):
            assert torch.equal(run(level, of_images(given, images)), whole[images])


@pytest.mark.parametrize("seed", range(12))
def test_the_emulated_pairs_are_those_of_the_machine(seed):
    """Both sum pairs of bfloat16. They part by the order of a sum, and where a norm falls between two bfloat16."""
    given, _, bound = drawn(seed, torch.bfloat16)
    machine, emulated = run("avx512bf16", given), run("plain_bf16", given)
    assert ((machine.double() - emulated.double()).abs() <= bound).all()
    if not given["groups"] and not given["silu"]:  # then the pairs are the same
        assert (machine != emulated).float().mean() <= 0.02


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_beside_the_result_is_written(level, kind):
    """The result lies between poisoned pixels; so do the maps, whose neighbours must not be read."""
    given = operands(torch.bfloat16, kind, 2, 5, 0, 33, (7, 6), 1, silu=True, residual=True)
    packed, x, added = pack(level, given), given["x"], given["added"]

    def between_poison(t):
        flat = torch.full((t.numel() + 128,), torch.nan).to(t.dtype)
        inner = flat[64:-64].view(t.shape[0], *t.shape[2:], t.shape[1]).permute(0, 3, 1, 2)
        return flat, inner.copy_(t)

    def operand(t):
        code = {torch.float32: 0, torch.bfloat16: 1}[t.dtype]
        return t.data_ptr(), code, tuple(t.shape), t.stride()

    flat, out = between_poison(torch.zeros(2, 33, *result_size((7, 6), kind), dtype=torch.bfloat16))
    (_, x), (_, added) = between_poison(x), between_poison(added)
    backends.load_extension().convolution(
        *(out.data_ptr(), operand(x), None, operand(packed), operand(given["bias"])),
        *(None, None, None, None, operand(added), None, 33, KINDS.index(kind), 1, True, 1e-5, False, level),
    )
    assert_within(out, given)
    assert flat[:64].isnan().all() and flat[-64:].isnan().all()


def zeros(*shape):
    return torch.zeros(shape).to(memory_format=torch.channels_last)


X, MORE, OUT, BIAS, TABLE = zeros(2, 4, 6, 8), zeros(2, 2, 6, 8), zeros(2, 3, 6, 8), torch.zeros(3), zeros(2, 4, 3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 4, 6, 8)), r"x must be channels-last, got shape \(2, 4, 6, 8\), strides"),
        (dict(x=X[..., ::2]), "x must be channels-last"),
        (dict(x=X[0]), r"x must be \(B, C, H, W\) and kind one of same, down, up, got \(4, 6, 8\), 'same'"),
        (dict(kind="left"), "kind one of same, down, up, got .* 'left'"),
        (dict(x=X.double()), r"x must be a float32, bfloat16 or float16 tensor on the CPU, got torch\.float64"),
        (dict(x=X.to("meta")), "x must be a float32.* on meta"),
        (dict(x=X.bfloat16(), level="plain_bf16"), "packed must be (of shape|bfloat16)"),
        (dict(x=X[:, :3].contiguous(memory_format=torch.channels_last)), r"packed must be of shape"),
        (dict(kind="up"), "packed must be of shape"),
        (dict(features=4), r"bias must be of shape \(4\), got \(3\)"),
        (dict(features=33, bias=None), "packed must be of shape"),
        (dict(packed=torch.zeros(5)), r"packed must be of shape \(\d+\), got \(5\)"),
        (dict(more=MORE), "packed must be of shape"),
        (dict(more=MORE[:1]), r"more must be of shape \(2, 2, 6, 8\), got \(1, 2, 6, 8\)"),
        (dict(more=MORE.half()), "more must be float32, got float16"),
        (dict(bias=BIAS[:2]), r"bias must be of shape \(3\), got \(2\)"),
        (dict(groups=3), "groups must divide channels"),
        (dict(groups=-1), "groups must divide channels"),
        (dict(groups=2, norm_weight=BIAS), r"norm_weight must be of shape \(4\), got \(3\)"),
        (dict(groups=2, norm_bias=BIAS), r"norm_bias must be of shape \(4\), got \(3\)"),
        (dict(groups=2, scale=TABLE[:, :3]), r"scale must be of shape \(2, 4, 3, 2\), got \(2, 3, 3, 2\)"),
        (dict(groups=2, scale=TABLE, shift=TABLE[..., :1]), r"shift must be of shape \(2, 4, 3, 2\)"),
        (dict(groups=2, shift=torch.zeros(2, 4, 4, 2)), "must divide height and width"),
        (dict(added=MORE), r"added must be of shape \(2, 3, 6, 8\), got \(2, 2, 6, 8\)"),
        (dict(added=OUT.bfloat16()), "added must be float32, got bfloat16"),
        (dict(added=OUT, added_more=MORE), "only a shortcut joins maps"),
        (dict(shortcut=True), "added is missing"),
        (dict(added=OUT, shortcut=True), "packed must be of shape"),
        (dict(level="sse9"), f"{REFUSED}, got sse9"),
    ],
)
def test_native_refuses_what_would_read_wrong_memory(change, message):
    packed = native.pack_convolution(torch.zeros(3, 4, 3, 3), "same", torch.float32)
    arguments = dict(x=X, more=None, packed=packed, bias=BIAS, features=3)
    with pytest.raises(InputError, match=message):
        native.convolution(**{**arguments, **change})


@pytest.mark.parametrize("kind", ["down", "up"])
def test_a_shortcut_goes_with_one_size_only(kind):
    added = zeros(2, 4, *result_size((6, 8), kind))
    one = native.pack_convolution(torch.zeros(3, 4, 3, 3), kind, torch.float32)
    panel = len(one) // ({"down": 9, "up": 16}[kind] * 4)
    packed = torch.zeros((40 if kind == "down" else 4 * 20) * panel)  # as if there were one
    with pytest.raises(InputError, match="a shortcut goes with a convolution of one size"):
        native.convolution(X, None, packed, None, 3, kind, added=added, shortcut=True)


def test_an_unaligned_weight_is_refused():
    packed = native.pack_convolution(torch.zeros(3, 4, 3, 3), "same", torch.float32)
    shifted = torch.zeros(len(packed) + 1)[1:]
    with pytest.raises(InputError, match="packed must be aligned to 64 bytes"):
        native.convolution(X, None, shifted, None, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(3, 4, 3), "same", torch.float32),
            r"weight must be \(out, in, 3, 3\), .* got \(3, 4, 3\), 'same'",
        ),
        ((torch.zeros(3, 4, 1, 1), "same", torch.float32), r"weight must be \(out, in, 3, 3\), .* got \(3, 4, 1, 1\)"),
        ((torch.zeros(3, 4, 3, 3), "left", torch.float32), "kind one of same, down, up, .* 'left'"),
        ((torch.zeros(3, 4, 3, 3), "same", torch.float64), r"dtype a float, got .* torch\.float64"),
        ((torch.zeros(3, 4, 3, 3), "up", torch.float32, torch.zeros(3, 2)), "shortcut must be .* of kind 'same', got"),
        (
            (torch.zeros(3, 4, 3, 3), "same", torch.float32, torch.zeros(2, 2)),
            r"shortcut must be \(3, also\) .* \(2, 2\)",
        ),
        ((torch.zeros(3, 4, 3, 3), "same", torch.float32, None, "sse9"), f"{REFUSED}, got sse9"),
    ],
)
def test_packing_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        native.pack_convolution(*arguments)
