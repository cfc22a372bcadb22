"""Counter-based normal noise: the one definition of the random numbers (docs/spec.md#noise).

Philox4x32-10 with key = the image's seed (64 bit) and counter = (block, stage, 0, purpose), where
``block`` is the index of a 2x2 block of pixels in logical (channel, row, column) order and ``purpose``
is 0 for the start noise and 1 for renoising. The four words of a counter make the block's four
normals (top left, top right, bottom left, bottom right), two Box-Muller pairs. An image therefore
depends on its own seed only, whatever batch, memory format or backend it rides in.

Every backend reproduces the integers bit for bit and the normals to 1e-6. The functions here are the
reference: plain torch, any device.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msdd_fast.errors import InputError

PURPOSE_START = 0
PURPOSE_RENOISE = 1
SEED_LIMIT = 2**63
INTEGER_DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)

PHILOX_ROUNDS = 10
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF

# Box-Muller constants; csrc/include/msdd_fast/philox.h states the same numbers and a test compares them.
# ln(m) = f + f^2 * P(f), f = m - 1, m in [sqrt(1/2), sqrt(2)): relative error 3e-8 (our own Remez fit).
SQRT_HALF_BITS = 0x3F3504F3
LN2 = 0.6931471805599453
LN_POLY = (
    -0.49999983098949363,
    0.3333393328718552,
    -0.25002583729967925,
    0.19963477140538022,
    -0.16551787268271428,
    0.14883682213628957,
    -0.14426883417863098,
    0.08979535850837832,
)
# sin(pi/4 f) = f * S(f^2), cos(pi/4 f) = C(f^2), f in (0, 1): errors 3e-9 and 5e-11.
SIN_POLY = (0.7853981609834083, -0.08074543483025413, 0.00249000712714321, -3.595450778985987e-05)
COS_POLY = (
    0.9999999999526005,
    -0.30842513516184394,
    0.015854325246207668,
    -0.0003259386143583289,
    3.52981134114212e-06,
)


def resolve_seeds(seed: int | Sequence[int] | Tensor, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """One seed per image as int64 (batch,).

    An int s gives image i the seed s + i; a sequence, integer tensor or integer array of length ``batch`` is taken as
    it is. Integers of NumPy are ints, too. Raises InputError unless every seed is in [0, 2^63).

    Under torch.compile and torch.export an int64 tensor passes with its values unread, which would break the graph.
    """
    if torch.compiler.is_compiling() and isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.ndim == 1:
        if len(seed) != batch:
            raise InputError(f"seed must be an int or {batch} ints, one per image, got {len(seed)}")
        return seed.to(device)
    first = _as_seed(seed)
    if first is not None:
        seeds = list(range(first, first + batch))
    else:
        given = _listed(seed)
        if given is None:
            raise InputError(f"seed must be an int or {batch} ints, got {type(seed).__name__}")
        if len(given) != batch:
            raise InputError(f"seed must be an int or {batch} ints, one per image, got {len(given)}")
        seeds = []
        for s in given:
            value = _as_seed(s)
            if value is None:
                raise InputError(f"seed must be an int or {batch} ints, got an item {s!r}")
            seeds.append(value)
    for s in seeds:
        if not 0 <= s < SEED_LIMIT:
            raise InputError(f"seed must be in [0, 2^63) for every image, got {s!r}")
    return torch.tensor(seeds, dtype=torch.int64, device=device)


def _as_seed(value: Any) -> int | None:
    """One integer; None for anything else."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if isinstance(value, Tensor) and not (value.ndim == 0 and _is_seeds(value)):
        return None
    if getattr(value, "shape", None) or str(getattr(value, "dtype", "")) == "bool":  # NumPy's index of bools is 0 or 1
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _is_seeds(x: Tensor) -> bool:
    """Whether a tensor holds integers that can be read."""
    dense = x.layout == torch.strided and not x.is_nested and x.device.type != "meta"
    return dense and x.dtype in INTEGER_DTYPES


def _listed(seed: Any) -> list[Any] | None:
    """The items of a sequence, a tensor or an array of one dimension; None for anything else."""
    if isinstance(seed, Tensor):
        if not _is_seeds(seed):
            raise InputError(f"seed must be an integer tensor, got {seed.dtype}, {seed.layout}, on {seed.device}")
        return seed.tolist() if seed.ndim == 1 else None
    if hasattr(seed, "dtype") and hasattr(seed, "tolist"):  # an array, without the import of NumPy
        return seed.tolist() if len(seed.shape) == 1 and seed.dtype.kind in "iu" else None
    is_text = isinstance(seed, (str, bytes, bytearray, memoryview))
    return list(seed) if isinstance(seed, Sequence) and not is_text else None


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10. All words are int64 tensors holding values in [0, 2^32); they broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2^64, which keeps both 32-bit halves exact.
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + PHILOX_W0) & _MASK32, (k1 + PHILOX_W1) & _MASK32
    return c0, c1, c2, c3


def block_words(seeds: Tensor, num_blocks: int, stage: int, purpose: int) -> tuple[Tensor, ...]:
    """The four Philox words of blocks 0 .. num_blocks-1 of every image: each int64 (B, num_blocks)."""
    block = torch.arange(num_blocks, dtype=torch.int64, device=seeds.device).expand(len(seeds), -1)
    zero = torch.zeros_like(block)
    key = (seeds[:, None] & _MASK32, (seeds[:, None] >> 32) & _MASK32)
    return philox((block, zero + stage, zero, zero + purpose), key)


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit words (int64 tensors) to two independent float32 normals.

    Radius from u = ((w >> 8) + 1) / 2^24 in (0, 1]. The angle word chooses an octant (bit 31 swaps sine
    and cosine, bits 30 and 29 are their signs) and a place in it, f = (2 * bits[28:6] + 1) / 2^24.
    """
    u = ((radius_word >> 8) + 1).float() * 2.0**-24
    bits = u.view(torch.int32) - SQRT_HALF_BITS
    exponent = (bits >> 23).float()
    f = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32) - 1.0
    ln_u = exponent * LN2 + (f + f * f * _horner(LN_POLY, f))
    # float32 torch.sqrt may miss the nearest value by one unit (vectorised on the CPU); through float64 it cannot.
    radius = torch.sqrt((-2.0 * ln_u).double()).float()
    f = (((angle_word >> 6) & 0x7FFFFF) * 2 + 1).float() * 2.0**-24
    sin, cos = f * _horner(SIN_POLY, f * f), _horner(COS_POLY, f * f)
    swap = (angle_word >> 31).bool()
    x, y = torch.where(swap, sin, cos), torch.where(swap, cos, sin)
    x = torch.where(((angle_word >> 30) & 1).bool(), -x, x)
    y = torch.where(((angle_word >> 29) & 1).bool(), -y, y)
    return radius * x, radius * y


def block_normals(seeds: Tensor, shape: tuple[int, int, int], stage: int, purpose: int) -> Tensor:
    """Standard normals in 2x2 blocks: float32 (B, C, H/2, W/2, 4) for an image of ``shape`` (C, H, W).

    The last axis is top left, top right, bottom left, bottom right. H and W must be even.
    """
    c, h, w = shape
    if h % 2 or w % 2:
        raise InputError(f"shape must have even height and width (noise comes in 2x2 blocks), got {h}x{w}")
    w0, w1, w2, w3 = block_words(seeds, c * (h // 2) * (w // 2), stage, purpose)
    eps = torch.stack([*box_muller(w0, w1), *box_muller(w2, w3)], dim=-1)
    return eps.view(len(seeds), c, h // 2, w // 2, 4)


def correlate_blocks(eps: Tensor, correlation: float) -> Tensor:
    """Unit normals (..., 4) to unit normals with the given correlation inside each group of four.

    n = sqrt(1 - rho) * (eps - m) + sqrt(1 + 3 rho) * m with m the mean of the four: exact for every
    rho in [-1/3, 1) (docs/spec.md#renoise). rho = 0 returns ``eps`` itself.
    """
    if correlation == 0.0:
        return eps
    mean = eps.mean(dim=-1, keepdim=True)
    a, b = correlation_factors(correlation)
    return a * (eps - mean) + b * mean


def correlation_factors(correlation: float) -> tuple[float, float]:
    """sqrt(1 - rho) and sqrt(1 + 3 rho), the latter exactly 0 at rho = -1/3."""
    if not -1.0 / 3.0 - 1e-6 <= correlation < 1.0:
        raise InputError(f"correlation must be in [-1/3, 1), got {correlation}")
    return math.sqrt(1.0 - correlation), math.sqrt(max(0.0, 1.0 + 3.0 * correlation))


def assemble_blocks(blocks: Tensor) -> Tensor:
    """(B, C, H/2, W/2, 4) to (B, C, H, W)."""
    b, c, h, w, _ = blocks.shape
    return blocks.view(b, c, h, w, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(b, c, 2 * h, 2 * w)


def start_noise(seeds: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The state that a decode starts from: white, float32 (B, C, H, W)."""
    return assemble_blocks(block_normals(seeds, shape, 0, PURPOSE_START))


def renoise_noise(seeds: Tensor, shape: tuple[int, int, int], stage: int, correlation: float) -> Tensor:
    """The term that beta multiplies at the start of ``stage``: unit variance, correlated in 2x2 blocks."""
    return assemble_blocks(correlate_blocks(block_normals(seeds, shape, stage, PURPOSE_RENOISE), correlation))


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        result = result * x + c
    return result
