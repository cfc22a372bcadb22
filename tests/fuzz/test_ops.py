"""Ops with any shapes, strides and dtypes: the C++ code gives what the reference gives, or the op refuses the call."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msdd_fast import ops
from msdd_fast.backends import extension_status
from msdd_fast.ops import get_op
from msdd_fast.ops.convolution import pack_convolution
from msdd_fast.ops.linear import pack_linear
from tests.fuzz.law import obeys

if not extension_status()[0]:
    pytest.skip(f"msdd_fast._C {extension_status()[1]}", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.08, torch.float16: 0.01}


class Draw(random.Random):
    """Tensors of this example; all values are about one."""

    def size(self, most=9):
        return self.choice([0, 1, 1, 2, 3, 5, 7, most])

    def dtype(self):
        return self.choice(DTYPES)

    def values(self, shape, dtype=torch.float32):
        """A view: dense, of permuted dimensions, with gaps, or reversed by a transposition; sizes are ``shape``."""
        generator = torch.Generator().manual_seed(self.randrange(2**31))
        kind = self.randrange(5)
        if kind == 0 or not shape:
            x = torch.randn(shape, generator=generator)
        elif kind == 1:
            order = self.sample(range(len(shape)), len(shape))
            x = torch.randn([shape[d] for d in order], generator=generator)
            x = x.permute([order.index(d) for d in range(len(shape))])
        elif kind == 2:
            d = self.randrange(len(shape))
            wide = [n + 3 * (i == d) for i, n in enumerate(shape)]
            x = torch.randn(wide, generator=generator).narrow(d, self.randrange(4), shape[d])
        elif kind == 3:
            x = torch.randn([n * 2 for n in shape], generator=generator)[tuple(slice(None, None, 2) for _ in shape)]
        else:
            some = [1 if self.random() < 0.3 else n for n in shape]
            x = torch.randn(some, generator=generator).expand(shape)
        out = x.to(dtype)  # keeps dense strides
        return out if kind != 4 or dtype == torch.float32 else out.expand(shape)

    def table(self, *shape):
        return self.values(shape, self.choice([torch.float32, torch.bfloat16]))

    def scalar(self):
        return self.choice([0.5, -0.25, torch.tensor(1.5)])

    def seeds(self, count):
        return torch.tensor([self.randrange(2**63) for _ in range(count)], dtype=torch.int64)


def norm_modulate(d):
    dtype, width, rows = d.dtype(), d.choice([1, 3, 16, 33, 96]), d.choice([1, 2])
    shape = [d.size() for _ in range(d.choice([1, 2]))] + [width]
    tables = [d.values((rows, width)) for _ in range(2)]
    total = torch.Size(shape[:-1]).numel()
    return d.values(shape, dtype), *tables, d.randrange(total + 1) if rows == 2 else None


def gate_residual_norm_modulate(d):
    x, shift, scale, split = norm_modulate(d)
    return x, d.values(x.shape, x.dtype), d.values(shift.shape), shift, scale, split


def qk_norm_rope(d):
    b, n, parts, heads, size = d.size(3), d.size(), d.choice([2, 3]), d.choice([1, 2, 3]), d.choice([4, 16, 20, 64])
    split = d.choice([None, 0, n // 2, n])
    tables = [d.table(1 if split is None else 2, parts - 1, size) for _ in range(2)]
    angles = [d.values((n, size // 2)) for _ in range(2)]
    if d.random() < 0.2:
        angles[1] = None
    return d.values((b, n, parts, heads, size), d.dtype()), *tables, *angles, split


def swiglu(d):
    shape, dtype = [d.size() for _ in range(d.choice([1, 2, 3]))] + [d.choice([1, 7, 16, 65])], d.dtype()
    return d.values(shape, dtype), d.values(shape, dtype)


def geglu(d):
    return swiglu(d)


def linear(d):
    dtype, width, out, glu = d.dtype(), d.choice([1, 7, 32, 65]), d.choice([2, 6, 16, 66]), d.random() < 0.3
    weight = d.values((out, width), dtype).contiguous()
    bias = d.choice([None, d.table(out).contiguous()])
    shape = [d.size() for _ in range(d.choice([1, 2]))] + [width]
    return d.values(shape, dtype), weight, bias, pack_linear(weight, glu), glu


def heads(d, keys=True):
    b, n, m, h, size = d.size(3), d.size(30), d.choice([1, 2, 17, 40]), d.choice([1, 2]), d.choice([16, 48, 64, 128])
    dtype = d.dtype()
    return [d.values((b, k, h, size), dtype) for k in (n, m, m)]


def attention(d):
    return heads(d)


def context_attention(d):
    q, k, v = heads(d)
    return q, k, v, d.choice([None, d.values(q.shape, q.dtype)])


def window_attention(d):
    b, height, width, h, size = d.choice([1, 2]), d.choice([1, 2, 5]), d.choice([1, 3, 4]), 2, d.choice([16, 32])
    dtype, window = d.dtype(), d.choice([1, 2, 4])
    q, k, v = (d.values((b, height * width, h, size), dtype) for _ in range(3))
    return q, k, v, d.table(2 * window - 1, 2 * window - 1, h), height, width


def group_norm_modulate_silu(d):
    b, groups, each, height, width = (
        d.size(3),
        d.choice([1, 2, 3]),
        d.choice([1, 2, 5]),
        d.choice([1, 4]),
        d.choice([1, 6]),
    )
    channels, dtype = groups * each, d.dtype()
    affine = [None, None] if d.random() < 0.4 else [d.table(channels), d.table(channels)]
    cells = (b, channels, *d.choice([(), (height, width), (1, 1), (height, 1)]))
    modulation = [None, None] if d.random() < 0.4 else [d.values(cells, dtype) for _ in range(2)]
    x = d.values((b, channels, height, width), dtype)
    return x, groups, 1e-5, *affine, *modulation, d.random() < 0.5


def convolution(d):
    dtype, kind, out = d.dtype(), d.choice(["same", "down", "up"]), d.choice([1, 3, 16, 33])
    b, c, more, size = d.size(3), d.choice([1, 3, 8]), d.choice([0, 0, 4]), (d.choice([1, 3, 4]), d.choice([1, 2, 6]))
    channels, groups = c + more, d.choice([0, 1, c + more])

    def a_map(count, size=size):
        return d.values((b, count, *size), dtype)

    cells = (b, channels, *d.choice([(), size, (1, 1), (1, size[1])]))
    affine = [d.table(channels) if groups and d.random() < 0.5 else None for _ in range(2)]
    modulation = [None, None] if not groups or d.random() < 0.4 else [d.values(cells, dtype) for _ in range(2)]
    added = added_more = shortcut = None
    if d.random() < 0.3:
        added = a_map(out, {"same": size, "down": [(n + 1) // 2 for n in size], "up": [2 * n for n in size]}[kind])
    elif kind == "same" and d.random() < 0.6:
        added, added_more = a_map(5), d.choice([None, a_map(2)])
        shortcut = d.values((out, 5 if added_more is None else 7), dtype) * 0.2
    weight = d.values((out, channels, 3, 3), dtype) * (0.3 * (9 * channels) ** -0.5)
    maps = [a_map(c), weight, d.choice([None, d.table(out)]), a_map(more) if more else None]
    sums = [added, added_more, shortcut, pack_convolution(weight, kind, shortcut)]
    return *maps, kind, groups, 1e-5, d.random() < 0.5, *affine, *modulation, *sums


def euler_step(d):
    shape, dtype = [d.size() for _ in range(d.choice([1, 2, 4]))], d.dtype()
    return d.values(shape, dtype), d.values(shape, d.choice([dtype, torch.float32])), d.scalar()


def cfg_combine(d):
    x, _, dt = euler_step(d)
    return x, d.values(x.shape, x.dtype), dt


def cfg_euler(d):
    x, v, dt = euler_step(d)
    return x, v, d.values(v.shape, v.dtype), d.scalar(), dt


def renoise_upsample(d):
    x = d.values((d.size(3), d.choice([1, 3]), d.choice([1, 2, 5]), d.choice([1, 4, 9])), d.dtype())
    return x, d.scalar(), d.scalar(), d.seeds(len(x)), d.choice([0, 1, 5]), d.choice([0.0, -1 / 3, 0.3])


def patches(d):
    grid, b, channels, patch = d.choice([1, 2, 4]), d.choice([1, 2, 3]), d.choice([1, 3]), d.choice([1, 2, 4])
    dtype = d.dtype()
    return [d.values((grid * grid, b, channels * patch * patch), dtype) for _ in range(3)], patch


def stage_transition(d):
    (x, v, u), patch = patches(d)
    guided = d.choice([(None, None), (u, d.scalar())])
    return x, v, d.scalar(), d.scalar(), d.scalar(), d.seeds(x.shape[1]), d.choice([1, 2]), patch, 0.25, *guided


def final_step(d):
    (x, v, u), patch = patches(d)
    return x, v, d.scalar(), patch, d.choice([*DTYPES, torch.uint8]), *d.choice([(None, None), (u, d.scalar())])


def start_noise(d):
    return d.seeds(d.size(3)), (d.choice([1, 3]), 2 * d.choice([1, 3]), 2 * d.choice([1, 5])), d.dtype()


CASES = (
    *(norm_modulate, gate_residual_norm_modulate, qk_norm_rope, swiglu, linear, attention, context_attention),
    *(geglu, window_attention, group_norm_modulate_silu, euler_step, cfg_combine, cfg_euler, renoise_upsample),
    *(stage_transition, final_step, start_noise, convolution),
)


def example_of(name):
    """A case for an op that has no generator above: its example, which is then spoiled or not."""

    def case(d):
        return get_op(name).example()

    case.__name__ = name
    return case


WITH_CPU = [name for name in ops.__all__ if "cpu" in get_op(name).implementations]
CASES += tuple(example_of(name) for name in WITH_CPU if name not in {case.__name__ for case in CASES})
JUNK = (
    *(None, "x", 3, -1, 0.5, float("nan"), [1.0], torch.ones(2), torch.ones(0), torch.ones(1, 2, 3, 4, 5, 6)),
    *(torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.complex64), torch.ones(2, 2, device="meta")),
)


def spoiled(d, arguments):
    """One argument of another kind, dtype or shape."""
    i = d.randrange(len(arguments))
    a = arguments[i]
    if isinstance(a, torch.Tensor) and d.random() < 0.7:
        change = d.randrange(4)
        if change == 0:
            a = a.to(d.choice([*DTYPES, torch.float64, torch.int32]))
        elif change == 1 and a.ndim:
            a = a.unsqueeze(d.randrange(a.ndim))
        elif change == 2 and a.ndim:
            a = a.narrow(0, 0, max(0, a.shape[0] - 1))
        else:
            a = torch.cat([a, a], d.randrange(a.ndim)) if a.ndim else a.expand(2)
    else:
        a = d.choice(JUNK)
    return (*arguments[:i], a, *arguments[i + 1 :])


def near(a, b, rounding):
    if isinstance(a, tuple):
        return all(near(x, y, rounding) for x, y in zip(a, b, strict=True))
    assert a.shape == b.shape and a.dtype == b.dtype
    if a.dtype == torch.uint8:
        return bool(((a.int() - b.int()).abs() <= 1).all())
    rounding = max(rounding, ROUNDING[a.dtype])
    return torch.allclose(a.float(), b.float(), rtol=rounding, atol=2 * rounding, equal_nan=True)


@given(st.sampled_from(CASES), st.integers(0, 2**62), st.booleans())
def test_ops(case, seed, is_spoiled):
    d = Draw(seed)
    arguments = tuple(case(d))
    if is_spoiled:
        arguments = spoiled(d, arguments)
    op = getattr(ops, case.__name__)

    def run():
        with torch.no_grad():
            return op(*arguments, backend="cpu"), op(*arguments, backend="eager")

    # A weight and what was packed of another one contradict each other, which nobody can see.
    trusts = case in (linear, convolution) and is_spoiled
    # The reference rounds after every operation, to the dtype of whichever argument it has.
    rounding = max((ROUNDING.get(a.dtype, 0) for a in arguments if isinstance(a, torch.Tensor)), default=0)
    obeys("ops", run, lambda pair: trusts or near(*pair, rounding))
