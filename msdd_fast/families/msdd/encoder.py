"""Image encoder: learned registers read the image through joint attention (docs/spec.md#encoder)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast.diffusion.rope import RopeTable, image_grid_positions, latent_positions, rope_table
from msdd_fast.families.msdd.config import TokenizerConfig
from msdd_fast.families.msdd.embeddings import PatchEmbed
from msdd_fast.families.msdd.mmdit import JointBlock, Stream
from msdd_fast.families.msdd.position_prior import init_position_prior
from msdd_fast.ops.norm_modulate import NORM_EPS


class Encoder(nn.Module):
    """(B, 3, R, R) in [-1, 1] -> latent tokens (B, num_latent_tokens, latent_dim).

    The context stream holds the registers and is the output; the image stream of the last block only
    provides keys and values, since nothing reads its result.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        enc = config.encoder
        args = (enc.hidden_size, enc.head_dim, enc.mlp_multiple_of)
        self.patch_embed = PatchEmbed(config.patch_size, enc.hidden_size)
        self.registers = nn.Parameter(torch.empty(1, config.num_latent_tokens, enc.hidden_size))
        self.blocks = nn.ModuleList(
            JointBlock(Stream(*args, adaln=False), Stream(*args, adaln=False, kv_only=i == enc.depth - 1))
            for i in range(enc.depth)
        )
        self.norm = nn.LayerNorm(enc.hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.head = nn.Linear(enc.hidden_size, config.latent_dim)
        if not self.registers.is_meta:  # else a checkpoint fills it
            nn.init.normal_(self.registers, std=enc.register_std)
            init_position_prior(self.blocks, config.rope)

    def rope_tables(self, device: torch.device) -> tuple[RopeTable, RopeTable]:
        """Tables of the registers and of the image tokens."""
        cfg, grid = self.config.rope, self.config.grid_size
        rows, cols = image_grid_positions(grid, grid, cfg.image_positions, device)
        image = rope_table(rows, cols, self.config.encoder.head_dim, cfg.base, cosine_only=cfg.image_rope == "cosine")
        context = context_rope_table(self.config, self.config.encoder.head_dim, grid, device)
        return context, image

    def forward(self, images: Tensor) -> Tensor:
        image = self.patch_embed(images.to(self.patch_embed.weight.dtype))
        context = self.registers.expand(len(images), -1, -1).to(image.dtype)
        context_rope, image_rope = self.rope_tables(images.device)
        for block in self.blocks:
            context, image = block(context, image, None, context_rope, image_rope)
        z = self.head(self.norm(context))
        return F.layer_norm(z, z.shape[-1:], eps=NORM_EPS) if self.config.encoder.latent_norm else z


def context_rope_table(config: TokenizerConfig, head_dim: int, row: int, device: torch.device) -> RopeTable:
    """RoPE of the latent tokens. With "row" positions they sit at (row, j) with base 10000 * n / row."""
    cfg, n = config.rope, config.num_latent_tokens
    rows, cols = latent_positions(n, config.grid_size, cfg.context_positions, row, device)
    base = cfg.base * n / row if cfg.context_positions == "row" else cfg.base
    return rope_table(rows, cols, head_dim, base, frequency_dtype=getattr(torch, cfg.context_rope_dtype))
