"""convolution on every backend against its formula in float64.

tests/native/test_convolution.py tests every SIMD level of the C++ function.
"""

import pytest
import torch
import torch.nn.functional as F

from msdd_fast import backends, ops
from msdd_fast.engine.bound_ops import bind
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.ops import observe
from msdd_fast.ops.convolution import OP, pack_convolution
from tests.ops.convolutions import DTYPES, KINDS, assert_within, exact_and_bound, operands

HAS_EXTENSION = backends.extension_status()[0]
needs_extension = pytest.mark.skipif(not HAS_EXTENSION, reason=f"msdd_fast._C {backends.extension_status()[1]}")
on_every_backend = pytest.mark.parametrize("backend", ["eager", pytest.param("cpu", marks=needs_extension)])
# One pixel, one line, one column; odd channels and sizes; more columns than a panel; groups across two maps; a cell for
# all pixels and for each.
CASES = [
    dict(c=1, out=1, size=(1, 1), bias=False),
    dict(c=3, out=5, size=(1, 7), silu=True),
    dict(c=5, out=33, size=(6, 1), groups=1, affine=True),
    dict(c=4, more=8, out=6, size=(4, 6), groups=4, affine=True, cells=(2, 3), silu=True),
    dict(c=7, out=70, size=(5, 9), groups=7, cells=(5, 9), silu=True, residual=True),
    dict(c=33, more=3, out=16, size=(8, 4), groups=3, affine=True, cells=(1, 2), silu=True, residual=True),
    dict(c=16, more=5, out=32, size=(7, 3), bias=False, residual=True),
]
SHORTCUTS = [
    dict(c=8, out=12, size=(4, 6), groups=2, affine=True, silu=True, shortcut=(3,)),
    dict(c=6, more=2, out=35, size=(3, 5), groups=2, cells=(1, 1), silu=True, shortcut=(8, 5)),
]


def run(given, backend):
    packed = None
    if backend == "cpu":
        packed = pack_convolution(given["weight"], given["kind"], given.get("shortcut"))
    return ops.convolution(**given, packed=packed, backend=backend)


def in_order(given, packed=None):
    """The arguments of the op by position."""
    names = ("x", "weight", "bias", "more", "kind", "groups", "eps", "silu", "norm_weight", "norm_bias", "scale")
    names += ("shift", "added", "added_more", "shortcut")
    return *(1e-5 if name == "eps" else given.get(name) for name in names), packed


# --- The formula. ---


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_formula(backend, kind, dtype):
    for seed, case in enumerate(CASES + (SHORTCUTS if kind == "same" else [])):
        given = operands(dtype, kind, seed=seed, **case)
        out = run(given, backend)
        assert_within(out, given, roundings=6 if backend == "eager" else 0)
        assert out.is_contiguous(memory_format=torch.channels_last)


def in_float64(given):
    return {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in given.items()}


@pytest.mark.parametrize(("kind", "case"), [("same", SHORTCUTS[1]), ("down", CASES[5]), ("up", CASES[3])])
def test_eager_is_the_formula(kind, case):
    given = operands(torch.float32, kind, **case)
    out = ops.convolution(**in_float64(given))
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, exact_and_bound(**given)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("same", dict(more=1, groups=1, affine=True, cells=(1, 2), silu=True, shortcut=(1, 1))),
        ("down", dict(more=1, silu=True, residual=True)),
        ("up", dict(groups=1, residual=True)),
    ],
)
def test_gradients_against_finite_differences(kind, case):
    given = in_float64(operands(torch.float32, kind, batch=1, c=1, out=1, size=(2, 2), **case))
    names = [n for n, t in given.items() if isinstance(t, torch.Tensor)]
    tensors = [given.pop(n).requires_grad_() for n in names]
    assert torch.autograd.gradcheck(lambda *t: ops.convolution(**dict(zip(names, t, strict=True)), **given), tensors)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [1000.0, -1e5])
def test_a_large_mean_does_not_swallow_the_variance(mean, dtype):
    mean = mean / 10 if dtype == torch.float16 else mean
    given = operands(dtype, c=4, more=8, out=4, size=(12, 10), groups=4, affine=True, silu=True, mean=mean)
    assert_within(run(given, "cpu"), given)


@needs_extension
@pytest.mark.parametrize("value", [8191.3, -3333.37, 1e-15, 3e7, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_constant_groups_give_exactly_the_sum_of_their_biases(kind, value):
    """The norm of a constant group, here one of both maps, is its bias; with whole numbers every sum is exact."""
    given = operands(torch.float32, kind, c=4, more=5, out=5, size=(40, 6), groups=3, bias=False, residual=True)
    given["x"][:, :3], given["x"][:, 3], given["more"][:, :2], given["more"][:, 2:] = value, -value, -value, value / 7
    weight = torch.arange(5 * 9 * 9).remainder(7).sub(3.0).view(5, 9, 3, 3)
    given |= dict(weight=weight, norm_bias=torch.arange(9.0), added=given["added"].round())
    h = torch.arange(9.0)[:, None, None].expand(2, 9, 40, 6)
    h = F.interpolate(h, scale_factor=2) if kind == "up" else h
    expected = F.conv2d(h, weight, None, 2 if kind == "down" else 1, 1) + given["added"]
    assert torch.equal(run(given, "cpu"), expected)


@on_every_backend
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_reach_of_its_pixel(backend, kind, silu):
    for dtype in DTYPES:
        given = operands(dtype, kind, c=4, more=3, out=37, size=(9, 8), silu=silu, residual=True)
        given["x"][0, 1, 4, 3] = given["more"][1, 2, 8, 7] = given["more"][1, 0, 0, 0] = torch.nan
        reached = torch.cat([given["x"], given["more"]], 1).isnan().any(1, keepdim=True).double()
        reached = F.interpolate(reached, scale_factor=2) if kind == "up" else reached
        reached = F.conv2d(reached, torch.ones(1, 1, 3, 3).double(), None, 2 if kind == "down" else 1, 1) > 0
        assert torch.equal(run(given, backend).isnan(), reached.expand(-1, 37, -1, -1))


@on_every_backend
def test_nan_in_a_group_norm_stays_in_its_image(backend):
    given = operands(torch.bfloat16, batch=3, c=6, out=4, size=(6, 5), groups=3, silu=True)
    clean = run(given, backend)
    given["x"][1, 2, 3, 4] = torch.nan
    out = run(given, backend)
    assert out[1].isnan().any() and torch.equal(out[::2], clean[::2])


# --- Layouts. ---


@on_every_backend
def test_any_strides(backend):
    """Maps are copied, the tables are read where they lie, and so are weights."""
    given = operands(torch.float32, **SHORTCUTS[1], affine=True)
    expected = run(given, backend)
    apart = dict(given)
    for name in ("x", "more", "added", "added_more"):
        apart[name] = given[name].repeat_interleave(2, 3)[..., ::2]
        assert not apart[name].is_contiguous(memory_format=torch.channels_last)
    for name in ("bias", "norm_weight", "norm_bias", "scale", "shift", "shortcut"):
        apart[name] = given[name].repeat_interleave(2, 0)[::2]
    apart["weight"] = given["weight"].transpose(0, 3).contiguous().transpose(0, 3)
    out = run(apart, backend)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=0, atol=0 if backend == "cpu" else 1e-5)
    nchw = {**given, "x": given["x"].contiguous(), "more": given["more"].contiguous()}
    torch.testing.assert_close(run(nchw, backend), expected, rtol=0, atol=0 if backend == "cpu" else 1e-5)


@on_every_backend
def test_vectors_are_tables_of_one_cell(backend):
    given = operands(torch.bfloat16, c=8, size=(4, 6), groups=4, cells=(1, 1), silu=True)
    vectors = {name: given[name][:, :, 0, 0] for name in ("scale", "shift")}
    assert torch.equal(run({**given, **vectors}, backend), run(given, backend))


@on_every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches(backend, kind):
    given = operands(torch.bfloat16, kind, 0, 8, 0, 7, (3, 4), 4, True, (3, 2), True, residual=True)
    out = run(given, backend)
    assert out.shape == given["added"].shape and out.dtype == torch.bfloat16


@needs_extension
def test_a_bound_op_copies_nothing_that_lies_right():
    given = operands(torch.float32, **SHORTCUTS[1], affine=True)
    args = in_order(given, pack_convolution(given["weight"], "same", given["shortcut"]))
    prepare = OP.implementations["cpu"].prepare
    again = operands(torch.float32, **SHORTCUTS[1], affine=True, seed=1)
    other = in_order(again, pack_convolution(again["weight"], "same", again["shortcut"]))
    tensors = [a for a in other if isinstance(a, torch.Tensor)]
    assert torch.equal(prepare(*args)(*tensors), run(again, "cpu"))
    assert prepare(args[0].contiguous(), *args[1:]) is None
    bound, seen = bind("cpu").convolution, []
    with observe(lambda op, backend, args: seen.append(backend)):
        bound(*args)
    bound(*args)
    assert seen == ["cpu"] and torch.equal(bound(*other), run(again, "cpu"))


# --- The choice, and what is refused. ---


@needs_extension
def test_auto_takes_what_is_packed():
    given = operands(torch.float32)
    packed = pack_convolution(given["weight"])
    assert OP.select(*in_order(given, packed)) == "cpu"
    assert OP.select(*in_order(given)) == "eager"
    with pytest.raises(
        BackendUnavailableError, match="cpu: needs the weight in its own layout: packed=pack_convolution"
    ):
        ops.convolution(**given, backend="cpu")
    given["weight"].requires_grad_()
    assert OP.select(*in_order(given, packed)) == "eager"


@needs_extension
def test_limits_of_the_kernel_have_a_reason():
    given = dict(x=torch.zeros(1, 4096, 1, 1), weight=torch.zeros(1, 4097, 3, 3), more=torch.zeros(1, 1, 1, 1))
    with pytest.raises(BackendUnavailableError, match="takes at most 4096 channels, got 4097"):
        ops.convolution(**given, packed=torch.zeros(1), backend="cpu")
    wide = dict(added=torch.zeros(1, 4097, 1, 1), shortcut=torch.zeros(1, 4097))
    given = dict(x=torch.zeros(1, 1, 1, 1), weight=torch.zeros(1, 1, 3, 3), **wide)
    with pytest.raises(BackendUnavailableError, match="takes at most 4096 channels, got 4097"):
        ops.convolution(**given, packed=torch.zeros(1), backend="cpu")
    given = in_float64(operands(torch.float32))
    with pytest.raises(BackendUnavailableError, match=r"works in float32, bfloat16 and float16, got torch\.float64"):
        ops.convolution(**given, packed=torch.zeros(1), backend="cpu")


@needs_extension
def test_what_is_packed_of_another_weight_is_refused_by_its_size():
    given = operands(torch.float32, c=4, out=6)
    for packed in (pack_convolution(torch.zeros(6, 5, 3, 3)), pack_convolution(given["weight"], "up"), torch.zeros(5)):
        with pytest.raises(InputError, match=r"convolution: packed must be of shape"):
            ops.convolution(**given, packed=packed, backend="cpu")
    with pytest.raises(InputError, match=r"packed must be a float32, bfloat16 or float16 tensor on the CPU, got str"):
        ops.convolution(**given, packed="x", backend="cpu")


X, W = torch.zeros(2, 4, 6, 8), torch.zeros(3, 4, 3, 3)
TABLE, OUT = torch.zeros(2, 4, 3, 2), torch.zeros(2, 3, 6, 8)
SHORTCUT = dict(added=X, shortcut=torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=None), "x must be a tensor, got NoneType"),
        (dict(x=X.int()), r"x must have a floating point dtype, got torch\.int32"),
        (dict(x=X[0]), r"x must be a tensor \(B, C, H, W\), got \(4, 6, 8\)"),
        (dict(x=X[:, :, :0]), r"x must be a tensor \(B, C, H, W\), got \(2, 4, 0, 8\)"),
        (dict(kind="Up"), "kind must be one of same, down, up, got 'Up'"),
        (dict(kind=None), "kind must be one of same, down, up, got None"),
        (dict(weight=W[..., 0]), r"weight must be \(out, 4, 3, 3\) in the dtype of x, torch.float32, got \(3, 4, 3\)"),
        (dict(weight=W[:, :3]), r"weight must be \(out, 4, 3, 3\) .* got \(3, 3, 3, 3\)"),
        (dict(weight=W[:0]), r"weight must be \(out, 4, 3, 3\) .* got \(0, 4, 3, 3\)"),
        (dict(weight=W.half()), r"weight must be \(out, 4, 3, 3\) .* torch.float32, got .* torch.float16"),
        (dict(weight=W.to("meta")), "weight must be on the device of x, cpu, got meta"),
        (dict(more=X), r"weight must be \(out, 8, 3, 3\)"),
        (dict(more=X[:1]), r"more must be \(2, C, 6, 8\) in the dtype of x, torch.float32, got \(1, 4, 6, 8\)"),
        (dict(more=X[..., :7]), r"more must be \(2, C, 6, 8\) .* got \(2, 4, 6, 7\)"),
        (dict(more=X[:, :0]), r"more must be a tensor \(B, C, H, W\), got \(2, 0, 6, 8\)"),
        (dict(more=X.bfloat16()), r"more must be \(2, C, 6, 8\) .* got \(2, 4, 6, 8\) torch.bfloat16"),
        (dict(bias=torch.zeros(4)), r"bias must be \(3,\), got \(4,\)"),
        (dict(bias=torch.zeros(3).int()), "bias must have a floating point dtype"),
        (dict(groups=3), "groups must be an int that divides the 4 channels of x, got 3"),
        (dict(more=X, weight=W.repeat(1, 2, 1, 1), groups=3), "divides the 8 channels of x and more, got 3"),
        (dict(groups=-1), "groups must be an int that divides the 4 channels of x, got -1"),
        (dict(groups=torch.zeros(2)), r"groups must be an int that divides the 4 channels of x, got tensor\(\[0"),
        (dict(groups=False), "groups must be an int that divides the 4 channels of x, got False"),
        (dict(eps=-1.0), r"eps must be a finite number >= 0, got -1\.0"),
        (dict(silu=1), "silu must be"),
        (dict(norm_weight=torch.zeros(4)), "norm_weight needs a norm: groups must be at least 1, got 0"),
        (dict(scale=TABLE, shift=TABLE), "scale needs a norm: groups must be at least 1, got 0"),
        (dict(groups=2, norm_weight=torch.zeros(3)), r"norm_weight must be \(4,\), got \(3,\)"),
        (
            dict(groups=2, norm_bias=torch.zeros(4, device="meta")),
            "norm_bias must be on the device of x, cpu, got meta",
        ),
        (dict(groups=2, scale=TABLE), "scale and shift must be given or left out together"),
        (dict(groups=2, scale=TABLE[..., :1], shift=TABLE), r"shift must have the shape of scale, \(2, 4, 3, 1\)"),
        (dict(groups=2, scale=torch.zeros(2, 4, 4, 2), shift=TABLE), "scale must be .* dividing 6 and 8"),
        (dict(added=OUT[:, :2]), r"added must be \(2, 3, 6, 8\) in the dtype of x, torch.float32, got \(2, 2, 6, 8\)"),
        (dict(added=OUT, kind="down"), r"added must be \(2, 3, 3, 4\) .* got \(2, 3, 6, 8\)"),
        (dict(added=OUT, kind="up"), r"added must be \(2, 3, 12, 16\) .* got \(2, 3, 6, 8\)"),
        (dict(added=OUT.double()), r"added must be .* torch.float32, got \(2, 3, 6, 8\) torch.float64"),
        (dict(added_more=OUT), "added_more needs a map: added is missing"),
        (dict(added=OUT, added_more=OUT), "added_more needs a shortcut"),
        (dict(shortcut=torch.zeros(3, 4)), "shortcut needs a map: added is missing"),
        (dict(**SHORTCUT, kind="down"), "shortcut needs a convolution of kind 'same', got 'down'"),
        (dict(**SHORTCUT, added_more=X), r"shortcut must be \(3, 8\) in the dtype of x, .* got \(3, 4\)"),
        (dict(SHORTCUT, shortcut=torch.zeros(2, 4)), r"shortcut must be \(3, 4\) in the dtype of x, .* got \(2, 4\)"),
        (dict(SHORTCUT, shortcut=torch.zeros(3, 4).half()), r"shortcut must be \(3, 4\) .* got \(3, 4\) torch.float16"),
        (dict(SHORTCUT, added=X[..., :4]), r"added must be \(2, C, 6, 8\) .* got \(2, 4, 6, 4\)"),
        (dict(**SHORTCUT, added_more=X[:1]), r"added_more must be \(2, C, 6, 8\) .* got \(1, 4, 6, 8\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(InputError, match=message):
        ops.convolution(**{**dict(x=X, weight=W), **change})
