"""Torch wrappers of the C++ functions: check what protects memory here, pass addresses and sizes there.

CPU tensors only. The ops of the same names (msdd_fast.ops) state formulas and check values for every backend.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msdd_fast.backends import load_extension
from msdd_fast.errors import InputError
from msdd_fast.ops._heads import attention_result
from msdd_fast.ops._rows import RowLayout, row_layout

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/include/msdd_fast/dtype.h


_PIXEL_TYPES = {**_DTYPES, torch.uint8: 3}  # as in csrc/include/msdd_fast/patch_rows.h


def start_noise(
    seeds: Tensor, channels: int, height: int, width: int, dtype: torch.dtype, patch_size: int | None = None
) -> Tensor:
    """White unit normals (B, C, H, W) for int64 seeds (B,), H and W even, dtype float32, bfloat16 or float16.

    With ``patch_size`` the same numbers as patch rows (H/p * W/p, B, C*p*p), p even.
    Raises InputError on anything else, BackendUnavailableError if the extension is missing, as all functions here.
    """
    seeds = _check_seeds(seeds)
    if dtype not in _DTYPES:
        raise InputError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if min(channels, height, width) < 0:
        raise InputError(f"channels, height and width must not be negative, got {(channels, height, width)}")
    sizes = (len(seeds), channels, height, width)
    if patch_size is None:
        out = torch.empty(sizes, dtype=dtype, device="cpu")
        _call("start_noise", out.data_ptr(), _DTYPES[dtype], seeds.data_ptr(), *sizes)
        return out
    if patch_size < 2 or patch_size % 2 or height % patch_size or width % patch_size:
        raise InputError(f"patch_size must be an even divisor of {height} and {width}, got {patch_size}")
    tokens = height // patch_size * (width // patch_size)
    out = torch.empty(tokens, len(seeds), channels * patch_size**2, dtype=dtype, device="cpu")
    _call("start_noise_rows", out.data_ptr(), _DTYPES[dtype], seeds.data_ptr(), *sizes, patch_size)
    return out


def renoise_upsample(x: Tensor, alpha: Tensor, beta: Tensor, seeds: Tensor, stage: int, correlation: float) -> Tensor:
    """alpha * nearest_x2(x) + beta * noise, (B, C, 2H, 2W), in the dtype and memory order of x.

    x (B, C, H, W), contiguous or channels-last; alpha and beta of one element; seeds int64 (B,).
    """
    order = _check("x", x)
    seeds = _check_seeds(seeds)
    if x.ndim != 4 or len(seeds) != len(x):
        raise InputError(f"x must be (B, C, H, W) with one seed per image, got {tuple(x.shape)}, {len(seeds)} seeds")
    b, c, h, w = x.shape
    out = torch.empty(b, c, 2 * h, 2 * w, dtype=x.dtype, device="cpu", memory_format=order)
    last = order is torch.channels_last
    addresses = (out.data_ptr(), x.data_ptr(), _DTYPES[x.dtype], last, seeds.data_ptr())
    _call("renoise_upsample", *addresses, *x.shape, alpha.item(), beta.item(), stage, correlation)
    return out


def cfg_euler(
    x: Tensor | None, v_cond: Tensor, v_uncond: Tensor | None, scale: Tensor | None, dt: Tensor | None
) -> Tensor:
    """x + dt * v, or v if x and dt are None; v = v_uncond + scale * (v_cond - v_uncond), or v_cond if those are None.

    Tensors of one shape and memory order (contiguous or channels-last), scalars of one element. Contiguous ones may
    also be views whose rows are apart (``rows.row_layout``). The result has the dtype of the first tensor, and no gaps.
    """
    if (x is None) != (dt is None) or (v_uncond is None) != (scale is None):
        raise InputError("x and dt, v_uncond and scale must be given or left out together")
    given = {n: t for n, t in (("x", x), ("v_cond", v_cond), ("v_uncond", v_uncond)) if t is not None}
    for name, t in given.items():
        _check_cpu(name, t)
    name, first = next(iter(given.items()))
    for other, t in given.items():
        if t.shape != first.shape:
            raise InputError(f"{other} must have the shape of {name}, {tuple(first.shape)}, got {tuple(t.shape)}")
    layout = row_layout(*given.values())
    if layout is None:
        memory = _check(name, first)
        for other, t in given.items():
            if not t.is_contiguous(memory_format=memory):
                raise InputError(f"{other} must have the memory order {memory} of {name}, got strides {t.stride()}")
        layout = RowLayout(1, first.numel(), (0,) * len(given))
    order = torch.contiguous_format if layout.rows > 1 else torch.preserve_format
    out = torch.empty_like(first, memory_format=order)
    strides = dict(zip(given, layout.strides, strict=True))
    operands = [
        (given[n].data_ptr(), _DTYPES[given[n].dtype], strides[n]) if n in given else (0, 0, 0)
        for n in ("x", "v_cond", "v_uncond")
    ]
    scalars = [0.0 if s is None else s.item() for s in (scale, dt)]
    if out.numel():  # the address of an empty tensor is 0, which would mean a missing one
        _call("cfg_euler", out.data_ptr(), _DTYPES[out.dtype], *operands, layout.rows, layout.columns, *scalars)
    return out


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, run: int, eps: float) -> Tensor:
    """LayerNorm over the last dimension of x, contiguous, then * (1 + scale) + shift; row r takes min(r // run, G - 1).

    Tables (G, D), the elements of a row adjacent.
    """
    h = _like(x)
    _norm_modulate(h, None, x, None, None, shift, scale, run, eps)
    return h


def gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, run: int, eps: float
) -> tuple[Tensor, Tensor]:
    """x_new = x + gate * y and norm_modulate(x_new); y like x, but of any dtype."""
    x_new, h = _like(x), _like(x)
    _norm_modulate(h, x_new, x, y, gate, shift, scale, run, eps)
    return x_new, h


def _norm_modulate(
    h: Tensor,
    x_new: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    run: int,
    eps: float,
) -> None:
    width = x.shape[-1]
    if y is not None:
        _check_contiguous("y", y)
        if y.shape != x.shape:
            raise InputError(f"y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    tables = []
    for name, t in (("gate", gate), ("shift", shift), ("scale", scale)):
        if t is not None:
            _check_cpu(name, t)
            if t.shape != (len(shift), width) or t.stride(1) != 1:
                raise InputError(
                    f"{name} must be {(len(shift), width)} with adjacent elements in a row, "
                    f"got {tuple(t.shape)}, strides {t.stride()}"
                )
        tables.append((0, 0, 0) if t is None else (*_operand(t), t.stride(0)))
    if x.numel():
        out = 0 if x_new is None else x_new.data_ptr()
        y_operand = (0, 0) if y is None else _operand(y)
        sizes = (x.numel() // width, width, run, len(shift), eps)
        _call("norm_modulate", h.data_ptr(), out, _operand(x), y_operand, *tables, *sizes)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b for a and b (R, I) of one dtype, the elements of a row adjacent; contiguous."""
    for name, x in (("a", a), ("b", b)):
        _check_cpu(name, x)
        if x.shape != a.shape or x.dtype != a.dtype or x.ndim != 2 or x.stride(1) != 1:
            expected = "(R, I), of the shape and dtype of a, with adjacent elements in a row"
            raise InputError(f"{name} must be {expected}, got {x.dtype} {tuple(x.shape)}, strides {x.stride()}")
    out = torch.empty(a.shape, dtype=a.dtype, device="cpu")
    addresses = (out.data_ptr(), a.data_ptr(), b.data_ptr(), _DTYPES[a.dtype])
    _call("swiglu", *addresses, *a.shape, a.stride(0), b.stride(0))
    return out


def qk_norm_rope(
    out: Tensor,
    qkv: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor | None,
    split: int,
    eps: float,
) -> None:
    """Fill ``out`` (B, N, P - 1, H, d), dense in (B, N) or (N, B) order, from the leading parts of qkv (B, N, P, H, d).

    The inner (P, H, d) of qkv is contiguous; weight and bias float32 (S, P - 1, d), cos and sin float32 (N, d / 2), all
    contiguous; S is 2 if ``split`` < N.
    """
    _check_cpu("qkv", qkv)
    b, n, parts, heads, d = qkv.shape
    token_major = not out.is_contiguous()
    fits = out.shape == (b, n, parts - 1, heads, d) and out.dtype == qkv.dtype
    if not fits or not (out.transpose(0, 1) if token_major else out).is_contiguous():
        raise InputError(f"out must be {(b, n, parts - 1, heads, d)} {qkv.dtype}, dense, got {tuple(out.shape)}")
    if qkv.stride()[2:] != (heads * d, d, 1):
        raise InputError(f"qkv must be contiguous in (P, H, d), got strides {qkv.stride()}")
    entries = 1 if split >= n else 2
    for name, t, shape in (
        ("weight", weight, (parts - 1, d)),
        ("bias", bias, (parts - 1, d)),
        ("cos", cos, (n, d // 2)),
        ("sin", sin, (n, d // 2)),
    ):
        if t is not None:
            _check_contiguous(name, t)
            rows = (entries,) if t.ndim == 3 else ()
            if t.dtype != torch.float32 or t.shape[-2:] != shape or (rows and len(t) < entries):
                raise InputError(f"{name} must be float32 {(*rows, *shape)}, got {t.dtype} {tuple(t.shape)}")
    addresses = [0 if t is None else t.data_ptr() for t in (weight, bias, cos, sin)]
    strides = (qkv.stride(0), qkv.stride(1), token_major, split, eps)
    sizes = (b, n, parts - 1, heads, d)
    _call("qk_norm_rope", out.data_ptr(), qkv.data_ptr(), _DTYPES[qkv.dtype], *addresses, *sizes, *strides)


def attention(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None = None, level: str = "") -> Tensor:
    """softmax(q k^T / sqrt(d)) v, plus ``accumulate``, rounded once; memory order of ``attention_result(q)``.

    q (B, Nq, H, d), k and v (B, Nk, H, d), accumulate like q: one dtype, any strides but the last, which is 1. Nothing
    is copied. Nk >= 1; d a multiple of 16 up to 128. ``level`` (attention.h) is for tests.
    """
    operands = {"q": q, "k": k, "v": v} if accumulate is None else {"q": q, "k": k, "v": v, "accumulate": accumulate}
    for name, x in operands.items():
        _check_cpu(name, x)
        if x.ndim != 4 or x.dtype != q.dtype or (x.stride(3) != 1 and x.numel()):
            expected = f"(B, N, H, d) in q's dtype, {q.dtype}, with the last dimension contiguous"
            raise InputError(f"{name} must be {expected}, got {x.dtype} {tuple(x.shape)}, strides {x.stride()}")
        shape = q.shape if name == "accumulate" else (q.shape[0], k.shape[1], *q.shape[2:])
        if name != "q" and x.shape != shape:
            raise InputError(f"{name} must have the shape {tuple(shape)}, got {tuple(x.shape)}")
    out = attention_result(q)
    views = [(0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3]) for x in (out, q, k, v, accumulate)]
    b, n, h, d = q.shape
    _call("attention", *views, _DTYPES[q.dtype], b, n, k.shape[1], h, d, level)
    return out


def group_norm_modulate_silu(
    x: Tensor,
    groups: int,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """GroupNorm of x (B, C, H, W), contiguous or channels-last, affine, modulation and SiLU, in x's dtype and order.

    weight and bias (C,), contiguous; scale and shift (B, C, h, w) with any strides, h and w dividing H and W.
    """
    order = _check("x", x)
    if x.ndim != 4:
        raise InputError(f"x must be (B, C, H, W), got {tuple(x.shape)}")
    b, c, _, _ = x.shape
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _check_contiguous(name, t)
            if t.shape != (c,):
                raise InputError(f"{name} must be ({c},), got {tuple(t.shape)}")
    rows, columns = (1, 1) if scale is None else scale.shape[2:]
    for name, t in (("scale", scale), ("shift", shift)):
        if t is not None:
            _check_cpu(name, t)
            if t.shape != (b, c, rows, columns):
                raise InputError(f"{name} must be {(b, c, rows, columns)}, got {tuple(t.shape)}")
    out = torch.empty_like(x, memory_format=order)
    if out.numel():
        vectors = [(0, 0) if t is None else _operand(t) for t in (weight, bias)]
        cells = [(0, 0, (0, 0, 0, 0)) if t is None else (*_operand(t), t.stride()) for t in (scale, shift)]
        sizes = (x.shape, groups, rows, columns, order is torch.channels_last, silu, eps)
        _call("group_norm_modulate_silu", out.data_ptr(), *_operand(x), *vectors, *cells, *sizes)
    return out


def window_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """Attention over the window round each of height * width pixels; memory order of ``attention_result(q)``.

    q, k, v (B, N, heads, d): one dtype, any strides but the last, which is 1. table (2w - 1, 2w - 1, heads), any
    strides.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_cpu(name, x)
        fits = x.ndim == 4 and x.shape == q.shape and x.shape[1] == height * width and x.dtype == q.dtype
        if not fits or (x.stride(3) != 1 and x.numel()):
            expected = f"(B, {height * width}, heads, d) in q's dtype and shape with the last dimension contiguous"
            raise InputError(f"{name} must be {expected}, got {x.dtype} {tuple(x.shape)}, strides {x.stride()}")
    _check_cpu("table", table)
    span = table.shape[0]
    if table.shape != (span, span, q.shape[2]) or span % 2 == 0:
        raise InputError(f"table must be (2w - 1, 2w - 1, {q.shape[2]}), got {tuple(table.shape)}")
    out = attention_result(q)
    if out.numel():
        views = [(x.data_ptr(), *x.stride()[:3]) for x in (out, q, k, v)]
        sizes = (q.shape[0], height, width, *q.shape[2:], (span + 1) // 2)
        _call("window_attention", *views, (*_operand(table), table.stride()), _DTYPES[q.dtype], *sizes)
    return out


def stage_transition(
    x: Tensor,
    v: Tensor,
    dt: Tensor,
    alpha: Tensor,
    beta: Tensor,
    seeds: Tensor,
    stage: int,
    patch_size: int,
    correlation: float,
    v_uncond: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """Patch rows (4N, B, C*p*p) of the next stage's start, in x's dtype, from those of this one's end, (N, B, C*p*p).

    The last dimension of every tensor must be contiguous; scalars of one element; seeds int64 (B,); p even.
    """
    operands, shape = _patch_operands(x, v, v_uncond, scale, patch_size)
    seeds = _check_seeds(seeds)
    if len(seeds) != x.shape[1] or patch_size % 2:
        raise InputError(f"one seed per image and an even patch_size are needed, got {len(seeds)} and {patch_size}")
    out = torch.empty(4 * x.shape[0], *x.shape[1:], dtype=x.dtype, device="cpu")
    if out.numel():
        euler = (dt.item(), 0.0 if scale is None else scale.item())
        noise = (seeds.data_ptr(), alpha.item(), beta.item(), stage, correlation)
        _call("stage_transition", out.data_ptr(), *operands, shape, *euler, *noise)
    return out


def final_step(
    x: Tensor,
    v: Tensor,
    dt: Tensor,
    patch_size: int,
    out_dtype: torch.dtype,
    v_uncond: Tensor | None,
    scale: Tensor | None,
    channels_last: bool,
) -> Tensor:
    """The last Euler step of patch rows (N, B, C*p*p), as an image (B, C, H, H) of a float dtype or uint8."""
    operands, shape = _patch_operands(x, v, v_uncond, scale, patch_size)
    if out_dtype not in _PIXEL_TYPES:
        raise InputError(f"out_dtype must be float32, bfloat16, float16 or uint8, got {out_dtype}")
    grid, batch, channels, _ = shape
    order = torch.channels_last if channels_last else torch.contiguous_format
    side = grid * patch_size
    out = torch.empty(batch, channels, side, side, dtype=out_dtype, device="cpu", memory_format=order)
    if out.numel():
        euler = (dt.item(), 0.0 if scale is None else scale.item())
        _call("final_step", out.data_ptr(), _PIXEL_TYPES[out_dtype], channels_last, *operands, shape, *euler)
    return out


_PatchOperand = tuple[int, int, int, int]


def _patch_operands(
    x: Tensor, v: Tensor, v_uncond: Tensor | None, scale: Tensor | None, patch_size: int
) -> tuple[list[_PatchOperand], tuple[int, int, int, int]]:
    """(address, dtype, strides) of the three, and (grid, batch, channels, patch). Raises InputError."""
    if (v_uncond is None) != (scale is None):
        raise InputError("v_uncond and scale must be given or left out together")
    operands: list[_PatchOperand] = []
    for name, t in (("x", x), ("v", v), ("v_uncond", v_uncond)):
        if t is None:
            operands.append((0, 0, 0, 0))
            continue
        _check_cpu(name, t)
        if t.ndim != 3 or t.shape != x.shape or (t.shape[2] > 1 and t.stride(2) != 1):
            expected = f"(N, B, C*p*p) of {tuple(x.shape)} with contiguous features"
            raise InputError(f"{name} must be {expected}, got {tuple(t.shape)}, strides {t.stride()}")
        operands.append((t.data_ptr(), _DTYPES[t.dtype], t.stride(0), t.stride(1)))
    tokens, batch, features = x.shape
    grid = math.isqrt(tokens)
    if patch_size < 1 or grid**2 != tokens or features % patch_size**2:
        raise InputError(f"x must be (g*g, B, C*p*p) with p = {patch_size}, got {tuple(x.shape)}")
    return operands, (grid, batch, features // patch_size**2, patch_size)


def _call(name: str, *args: Any) -> None:
    """Run a function of the extension on as many threads as torch uses; what it refuses becomes an InputError."""
    function = getattr(load_extension(), name)
    try:
        function(*args, threads=torch.get_num_threads())
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None


def _check(name: str, x: Tensor) -> torch.memory_format:
    """Memory order of a CPU tensor that is dense and of a dtype that the extension knows. Raises InputError."""
    _check_cpu(name, x)
    if x.is_contiguous():
        return torch.contiguous_format
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    raise InputError(f"{name} must be contiguous or channels-last, got shape {tuple(x.shape)}, strides {x.stride()}")


def _check_cpu(name: str, x: Tensor) -> None:
    """A CPU tensor of a dtype that the extension knows."""
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.dtype not in _DTYPES:
        got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} must be a float32, bfloat16 or float16 tensor on the CPU, got {got}")


def _check_contiguous(name: str, x: Tensor) -> None:
    _check_cpu(name, x)
    if not x.is_contiguous():
        raise InputError(f"{name} must be contiguous, got shape {tuple(x.shape)}, strides {x.stride()}")


def _like(x: Tensor) -> Tensor:
    """An empty tensor like ``x``, which must be contiguous."""
    _check_contiguous("x", x)
    return torch.empty_like(x)


def _operand(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), _DTYPES[x.dtype]


def _check_seeds(seeds: Tensor) -> Tensor:
    """int64 (B,) on the CPU, made contiguous."""
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1 or seeds.device.type != "cpu":
        is_tensor = isinstance(seeds, Tensor)
        got = f"{seeds.dtype} {tuple(seeds.shape)} on {seeds.device}" if is_tensor else type(seeds).__name__
        raise InputError(f"seeds must be an int64 tensor (B,) on the CPU, got {got}")
    return seeds.contiguous()
