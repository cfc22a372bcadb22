"""Transformer blocks: the MMDiT double stream ("joint") and decoupled cross-attention ("cross").

Both share the same parts: pre-LayerNorm, adaLN modulation from the time embedding, per-head LayerNorm
on q and k, two-axis RoPE, SwiGLU. Shapes: tokens (B, N, D), q, k, v (B, N, heads, head_dim).
Equations: docs/spec.md#joint-block, docs/spec.md#cross-block. Between the matrix products are the fused ops
(msdd_fast/ops), plain PyTorch where a gradient is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast import ops
from msdd_fast.diffusion.rope import RopeTable
from msdd_fast.families.msdd.config import swiglu_hidden_size
from msdd_fast.ops.norm_modulate import NORM_EPS


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, N, heads, head_dim), scale head_dim^-1/2 -> (B, N, heads * head_dim)."""
    return ops.attention(q, k, v).flatten(2)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, hidden_size: int, multiple_of: int) -> None:
        super().__init__()
        inner = swiglu_hidden_size(hidden_size, multiple_of)
        self.w1 = nn.Linear(hidden_size, inner, bias=False)
        self.w3 = nn.Linear(hidden_size, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(ops.swiglu(self.w1(x), self.w3(x)))


class AdaLN(nn.Module):
    """SiLU then Linear from the time embedding (B, D) to ``chunks`` vectors (B, D) each (docs/spec.md#adaln)."""

    def __init__(self, hidden_size: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(hidden_size, chunks * hidden_size)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(c)).chunk(self.chunks, dim=1)

    @torch.no_grad()
    def init_weights(self, gate_init: float = 0.0) -> None:
        """Zero output but for the gates (chunks 2 and 5 of 6), which start at ``gate_init``."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if self.chunks == 6:
            bias = self.linear.bias.view(6, -1)
            bias[2] = gate_init
            bias[5] = gate_init


class HeadNorm(nn.LayerNorm):
    """Affine LayerNorm over head_dim (docs/spec.md#qk-norm)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, eps=NORM_EPS)


def norm_rope(
    qkv: Tensor, q_norm: HeadNorm | None, k_norm: HeadNorm, rope: RopeTable
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(B, N, 3 D), or (B, N, 2 D) without ``q_norm``, to q (None without), k, v: each (B, N, heads, head_dim)."""
    norms = [norm for norm in (q_norm, k_norm) if norm is not None]
    parts = qkv.unflatten(-1, (len(norms) + 1, -1, k_norm.normalized_shape[0]))
    weight, bias = (torch.stack([getattr(norm, name) for norm in norms])[None] for name in ("weight", "bias"))
    qk = ops.qk_norm_rope(parts, weight, bias, rope.cos, rope.sin)
    return None if q_norm is None else qk[:, :, 0], qk[:, :, -1], parts[:, :, -1]


class Stream(nn.Module):
    """One of the two token streams of a joint block, with its own weights.

    ``adaln=True`` (decoder): LayerNorms without affine, modulated by the time embedding.
    ``adaln=False`` (encoder): affine LayerNorms, no modulation.
    ``kv_only=True``: the stream ends here; its tokens are attended to but not updated, so there are
    no queries, no output projection and no MLP (the last block of either network).
    """

    def __init__(
        self, hidden_size: int, head_dim: int, mlp_multiple_of: int, *, adaln: bool, kv_only: bool = False
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.kv_only = kv_only
        self.adaln = AdaLN(hidden_size, 2 if kv_only else 6) if adaln else None
        self.norm1 = None if adaln else nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.k_norm = HeadNorm(head_dim)
        if kv_only:
            self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        else:
            self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
            self.q_norm = HeadNorm(head_dim)
            self.proj = nn.Linear(hidden_size, hidden_size)
            self.norm2 = None if adaln else nn.LayerNorm(hidden_size, eps=NORM_EPS)
            self.mlp = SwiGLU(hidden_size, mlp_multiple_of)

    def modulation(self, c: Tensor | None) -> tuple[Tensor, ...]:
        """shift_msa, scale_msa[, gate_msa, shift_mlp, scale_mlp, gate_mlp]; empty without adaLN."""
        return () if self.adaln is None else self.adaln(c)

    def qkv_heads(self, x: Tensor, mod: tuple[Tensor, ...], rope: RopeTable) -> tuple[Tensor | None, Tensor, Tensor]:
        """q (None when kv_only), k, v: each (B, N, heads, head_dim), normalised and rotated."""
        h = ops.norm_modulate(x, mod[0], mod[1]) if self.norm1 is None else self.norm1(x)
        if self.kv_only:
            return norm_rope(self.kv(h), None, self.k_norm, rope)
        return norm_rope(self.qkv(h), self.q_norm, self.k_norm, rope)

    def update(self, x: Tensor, attn: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
        """Residual update from this stream's rows of the attention output."""
        out = self.proj(attn)
        if self.norm2 is not None:
            x = x + out
            return x + self.mlp(self.norm2(x))
        _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = mod
        x, h = ops.gate_residual_norm_modulate(x, out, gate_msa, shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * self.mlp(h)


class JointBlock(nn.Module):
    """MMDiT double-stream block: one softmax over [context, image] tokens (docs/spec.md#joint-block)."""

    def __init__(self, context: Stream, image: Stream) -> None:
        super().__init__()
        self.context = context
        self.image = image

    def forward(
        self, context: Tensor, image: Tensor, c: Tensor | None, context_rope: RopeTable, image_rope: RopeTable
    ) -> tuple[Tensor, Tensor]:
        context_mod, image_mod = self.context.modulation(c), self.image.modulation(c)
        cq, ck, cv = self.context.qkv_heads(context, context_mod, context_rope)
        iq, ik, iv = self.image.qkv_heads(image, image_mod, image_rope)
        k, v = torch.cat([ck, ik], dim=1), torch.cat([cv, iv], dim=1)
        q = torch.cat([x for x in (cq, iq) if x is not None], dim=1)
        attn = attention(q, k, v)
        rows = 0 if cq is None else context.shape[1]
        if cq is not None:
            context = self.context.update(context, attn[:, :rows], context_mod)
        if iq is not None:
            image = self.image.update(image, attn[:, rows:], image_mod)
        return context, image


class ContextKeyValue(nn.Module):
    """Keys and values of the static latent context for one cross block (docs/spec.md#cross-block).

    They depend on z alone: an engine computes them once per image.
    """

    def __init__(self, hidden_size: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.k_norm = HeadNorm(head_dim)

    def forward(self, context: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor]:
        _, k, v = norm_rope(self.kv(context), None, self.k_norm, rope)
        return k, v


class CrossBlock(nn.Module):
    """Image tokens attend to themselves and, by a second softmax with the same q, to the context.

    The two results are summed before one output projection (decoupled cross-attention, docs/spec.md#cross-block).
    """

    def __init__(self, image: Stream, context: ContextKeyValue) -> None:
        super().__init__()
        self.image = image
        self.context = context

    def forward(self, image: Tensor, c: Tensor, image_rope: RopeTable, context_kv: tuple[Tensor, Tensor]) -> Tensor:
        mod = self.image.modulation(c)
        q, k, v = self.image.qkv_heads(image, mod, image_rope)
        assert q is not None  # an image stream always has queries
        return self.image.update(image, attention(q, k, v) + attention(q, *context_kv), mod)


class FinalLayer(nn.Module):
    """LayerNorm without affine, adaLN, Linear to patch rows: (B, N, D) -> (B, N, out_features)."""

    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.adaln = AdaLN(hidden_size, 2)
        self.linear = nn.Linear(hidden_size, out_features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaln(c)
        return self.linear(ops.norm_modulate(x, shift, scale))
