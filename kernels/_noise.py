"""Philox blocks, Box-Muller and block correlation inside a Triton kernel: the GPU twin of msdd_fast/diffusion/noise.py.

Integers agree bit for bit, and the polynomials are the same. tl.log, tl.sin and tl.cos are avoided: their range
reduction costs several times the instructions. Functions take tensors of any shape, one 2x2 block of pixels per lane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msdd_fast.diffusion import noise

# Globals that kernels read must be constexpr.
_SQRT_HALF_BITS = tl.constexpr(noise.SQRT_HALF_BITS)
_LN2 = tl.constexpr(noise.LN2)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (tl.constexpr(c) for c in noise.LN_POLY)
_S0, _S1, _S2, _S3 = (tl.constexpr(c) for c in noise.SIN_POLY)
_C0, _C1, _C2, _C3, _C4 = (tl.constexpr(c) for c in noise.COS_POLY)
PURPOSE_START = tl.constexpr(noise.PURPOSE_START)
PURPOSE_RENOISE = tl.constexpr(noise.PURPOSE_RENOISE)


@triton.jit
def square_root(a: tl.tensor) -> tl.tensor:
    """Square root of a >= 0 to half an ulp: the approximate 1/sqrt and one Newton step, without sqrt_rn's branches."""
    a = tl.maximum(a, 1e-30)  # 1/sqrt(0) would be infinite
    y = tl.rsqrt(a)
    r = a * y
    return r + 0.5 * y * (a - r * r)


@triton.jit
def box_muller(radius_word: tl.tensor, angle_word: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Two uint32 words to two independent fp32 normals (noise.box_muller)."""
    u = ((radius_word >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    bits = u.to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
    exponent = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    p = _L6 + f * _L7
    p = _L5 + f * p
    p = _L4 + f * p
    p = _L3 + f * p
    p = _L2 + f * p
    p = _L1 + f * p
    p = _L0 + f * p
    radius = square_root(-2.0 * (exponent * _LN2 + (f + f * f * p)))
    g = (((angle_word >> 6) & 0x7FFFFF) * 2 + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    g2 = g * g
    sin = g * (_S0 + g2 * (_S1 + g2 * (_S2 + g2 * _S3)))
    cos = _C0 + g2 * (_C1 + g2 * (_C2 + g2 * (_C3 + g2 * _C4)))
    swap = (angle_word >> 31) != 0
    x = tl.where(swap, sin, cos)
    y = tl.where(swap, cos, sin)
    # Bits 30 and 29 become the sign bits.
    x = (x.to(tl.uint32, bitcast=True) ^ ((angle_word << 1) & 0x80000000)).to(tl.float32, bitcast=True)
    y = (y.to(tl.uint32, bitcast=True) ^ ((angle_word << 2) & 0x80000000)).to(tl.float32, bitcast=True)
    return radius * x, radius * y


@triton.jit
def block_normals(
    seed: tl.tensor, block: tl.tensor, stage: tl.tensor, purpose: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four normals of each 2x2 block: seed int64, block uint32 (any shape), stage uint32."""
    zero = tl.zeros_like(block)
    w0, w1, w2, w3 = tl.philox(seed, block, (zero + stage).to(tl.uint32), zero, zero + purpose)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def correlate(
    n0: tl.tensor, n1: tl.tensor, n2: tl.tensor, n3: tl.tensor, spread: tl.tensor, common: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """spread * (n - m) + common * m with m the mean of the four (noise.correlate_blocks)."""
    m = 0.25 * (n0 + n1 + n2 + n3)
    shift = (common - spread) * m
    return spread * n0 + shift, spread * n1 + shift, spread * n2 + shift, spread * n3 + shift


@triton.jit
def interleave2(a0: tl.tensor, b0: tl.tensor, a1: tl.tensor, b1: tl.tensor) -> tl.tensor:
    """Two pixels each of two neighbouring blocks, [BLOCK] each, to rows of four, [BLOCK, 2, 2]: a0 b0 a1 b1."""
    return tl.join(tl.join(a0, a1), tl.join(b0, b1))


@triton.jit
def interleave4(
    a0: tl.tensor,
    b0: tl.tensor,
    a1: tl.tensor,
    b1: tl.tensor,
    a2: tl.tensor,
    b2: tl.tensor,
    a3: tl.tensor,
    b3: tl.tensor,
) -> tl.tensor:
    """The same for four blocks: [BLOCK, 2, 2, 2] with rows a0 b0 a1 b1 a2 b2 a3 b3. No data moves between lanes."""
    return tl.join(interleave2(a0, a1, a2, a3), interleave2(b0, b1, b2, b3))
