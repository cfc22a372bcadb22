"""PiD's transformer blocks (docs/spec.md#pid-network). Modules and parameters have the names of the released files.

Tokens are (B, N, D), q, k, v (B, N, heads, head_dim); of a joint block the caption's tokens come first. In the released
names "x" is the image and "y" the caption.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast import ops
from msdd_fast.diffusion.rope import RopeTable, apply_rope
from msdd_fast.families.pid.config import PiDNetworkConfig, swiglu_hidden_size

NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) over the last dimension, in float32, cast back, times a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPS)
        return self.weight * normed.to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift."""
    return x * (1 + scale) + shift


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 D) to q, k, v (B, N, heads, D / heads)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    return q, k, v


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = swiglu_hidden_size(width)
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class JointAttention(nn.Module):
    """One softmax over the tokens of both streams, each with projections and q and k norms of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_x = nn.Linear(width, 3 * width, bias=False)
        self.qkv_y = nn.Linear(width, 3 * width, bias=False)
        self.q_norm_x, self.k_norm_x = RMSNorm(width // heads), RMSNorm(width // heads)
        self.q_norm_y, self.k_norm_y = RMSNorm(width // heads), RMSNorm(width // heads)
        self.proj_x = nn.Linear(width, width)
        self.proj_y = nn.Linear(width, width)

    def forward(
        self, x: Tensor, y: Tensor, image_rope: RopeTable, text_rope: RopeTable, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Image tokens x and caption tokens y, normalised, to what is added to them before the gates.

        Keys of caption rows where ``text_mask`` (B, T) is False are seen by nobody.
        """
        qx, kx, vx = split_heads(self.qkv_x(x), self.heads)
        qy, ky, vy = split_heads(self.qkv_y(y), self.heads)
        qx, kx = apply_rope(self.q_norm_x(qx), image_rope), apply_rope(self.k_norm_x(kx), image_rope)
        qy, ky = apply_rope(self.q_norm_y(qy), text_rope), apply_rope(self.k_norm_y(ky), text_rope)
        q, k, v = torch.cat([qy, qx], dim=1), torch.cat([ky, kx], dim=1), torch.cat([vy, vx], dim=1)
        if text_mask is None:
            out = ops.attention(q, k, v)
        else:
            seen = F.pad(text_mask.bool(), (0, x.shape[1]), value=True)[:, None, None]
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
        text, image = out.flatten(2).split([y.shape[1], x.shape[1]], dim=1)
        return self.proj_x(image), self.proj_y(text)


class JointBlock(nn.Module):
    """Joint attention and a SwiGLU in both streams, under adaLN by the time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_x1, self.norm_x2 = RMSNorm(width), RMSNorm(width)
        self.norm_y1, self.norm_y2 = RMSNorm(width), RMSNorm(width)
        self.attn = JointAttention(width, heads)
        self.mlp_x, self.mlp_y = SwiGLU(width), SwiGLU(width)
        self.adaLN_modulation_img = nn.Sequential(nn.Linear(width, 6 * width))
        self.adaLN_modulation_txt = nn.Sequential(nn.Linear(width, 6 * width))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        c: Tensor,
        image_rope: RopeTable,
        text_rope: RopeTable,
        text_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens x (B, N, D), caption tokens y (B, T, D), c = SiLU(time embedding) (B, 1, D) -> x, y."""
        mx, my = self.adaLN_modulation_img(c).chunk(6, dim=-1), self.adaLN_modulation_txt(c).chunk(6, dim=-1)
        xn, yn = modulate(self.norm_x1(x), mx[0], mx[1]), modulate(self.norm_y1(y), my[0], my[1])
        ax, ay = self.attn(xn, yn, image_rope, text_rope, text_mask)
        x, y = x + mx[2] * ax, y + my[2] * ay
        x = x + mx[5] * self.mlp_x(modulate(self.norm_x2(x), mx[3], mx[4]))
        y = y + my[5] * self.mlp_y(modulate(self.norm_y2(y), my[3], my[4]))
        return x, y


class PatchAttention(nn.Module):
    """Self-attention between an image's patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: RopeTable) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads)
        q, k = apply_rope(self.q_norm(q), rope), apply_rope(self.k_norm(k), rope)
        return self.proj(ops.attention(q, k, v).flatten(2))


class PixelMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PixelBlock(nn.Module):
    """Attention between patches and an MLP on every pixel; each pixel of each patch has a modulation of its own."""

    def __init__(self, config: PiDNetworkConfig) -> None:
        super().__init__()
        width, pixels, inner = config.pixel_width, config.patch_size**2, config.attention_width
        self.adaLN_modulation = nn.Sequential(nn.Linear(config.hidden_size, 6 * width * pixels))
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.compress_to_attn = nn.Linear(pixels * width, inner)
        self.attn = PatchAttention(inner, config.attention_heads)
        self.expand_from_attn = nn.Linear(inner, pixels * width)
        self.mlp = PixelMLP(width)

    def forward(self, x: Tensor, s: Tensor, rope: RopeTable) -> Tensor:
        """Pixels x (B, N, P^2, C) of patches with tokens s (B, N, D) -> (B, N, P^2, C)."""
        m = self.adaLN_modulation(s).unflatten(-1, (x.shape[2], 6, x.shape[3])).unbind(3)
        a = self.compress_to_attn(modulate(self.norm1(x), m[0], m[1]).flatten(2))
        a = self.expand_from_attn(self.attn(a, rope)).view_as(x)
        x = x + m[2] * a
        return x + m[5] * self.mlp(modulate(self.norm2(x), m[3], m[4]))
