"""Velocity network: noisy image, model time and latent tokens to velocity
(docs/spec.md#cross-block, docs/spec.md#joint-block)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msdd_fast.diffusion.rope import RopeTable, image_grid_positions, rope_table
from msdd_fast.diffusion.schedule import Stage, StageSchedule
from msdd_fast.errors import InputError
from msdd_fast.families.msdd.config import TokenizerConfig
from msdd_fast.families.msdd.embeddings import PatchEmbed, TimestepEmbedder, unpatchify
from msdd_fast.families.msdd.encoder import context_rope_table
from msdd_fast.families.msdd.mmdit import AdaLN, ContextKeyValue, CrossBlock, FinalLayer, JointBlock, Stream
from msdd_fast.families.msdd.position_prior import init_position_prior
from msdd_fast.ops.norm_modulate import NORM_EPS


class Decoder(nn.Module):
    """v(x_t, t, z): one network for every stage; the resolution of ``x_t`` tells the scale.

    ``conditioning="joint"``: latent tokens and image tokens flow through MMDiT double-stream blocks.
    ``conditioning="cross"``: only image tokens flow; the latent tokens are static keys and values.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config, self.schedule = config, StageSchedule(config.schedule)
        dec = config.decoder
        width, args = dec.hidden_size, (dec.hidden_size, dec.head_dim, dec.mlp_multiple_of)
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.time_embed = TimestepEmbedder(width)
        self.context_embed = nn.Linear(config.latent_dim, width)
        self.context_null = nn.Parameter(torch.empty(1, config.num_latent_tokens, config.latent_dim))
        if dec.conditioning == "joint":
            self.blocks = nn.ModuleList(
                JointBlock(Stream(*args, adaln=True, kv_only=i == dec.depth - 1), Stream(*args, adaln=True))
                for i in range(dec.depth)
            )
        else:
            self.context_norm = nn.LayerNorm(width, eps=NORM_EPS)
            self.blocks = nn.ModuleList(
                CrossBlock(Stream(*args, adaln=True), ContextKeyValue(width, dec.head_dim)) for _ in range(dec.depth)
            )
        self.final_layer = FinalLayer(width, 3 * config.patch_size**2)
        if not self.context_null.is_meta:  # else a checkpoint fills it
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Identity adaLN (gates at ``gate_init``), local attention, and the velocity of ``velocity_init``
        (docs/spec.md#initialisation).

        "passthrough": the final linear undoes an orthogonal patch embedding, so that v starts near x_t.
        """
        nn.init.normal_(self.context_null)
        for module in self.modules():
            if isinstance(module, AdaLN):
                module.init_weights(self.config.decoder.gate_init)
        init_position_prior(self.blocks, self.config.rope)
        linear = self.final_layer.linear
        nn.init.zeros_(linear.bias)
        if self.config.decoder.velocity_init == "zero":
            nn.init.zeros_(linear.weight)
            return
        embed, bias = self.patch_embed.parameters()  # (D, 3, p, p), (D,)
        nn.init.orthogonal_(embed)
        nn.init.zeros_(bias)
        # The final LayerNorm divides by the root mean square of the embedded patch, about 0.7 for x_t
        # between the noise of the first stage and the nearly clean last one.
        gain = 0.7 * min(1.0, linear.out_features / linear.in_features) ** 0.5
        linear.weight.copy_(gain * embed.permute(2, 3, 1, 0).flatten(0, 2))

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor | None, null_mask: Tensor | None = None) -> Tensor:
        """Velocity at ``x_t``.

        Args:
            x_t: (B, 3, H, H), H a multiple of the patch size and at most ``image_size``; with prediction "image" the
                resolution of a stage.
            t: (B,), model time T/1000 in (0, 1].
            z: (B, num_latent_tokens, latent_dim), or None for the null context (CFG's unconditional branch).
            null_mask: bool (B,), True where the null context replaces z (training dropout); None = nowhere.

        Returns the velocity, shape and dtype of ``x_t``. Raises InputError for wrong shapes.
        """
        self._check(x_t, t, z)
        dtype = self.patch_embed.weight.dtype
        null = self.context_null.expand(len(x_t), -1, -1)
        if z is None:
            z = null
        elif null_mask is not None:
            z = torch.where(null_mask[:, None, None], null.to(z.dtype), z)
        context = self.context_embed(z.to(dtype))
        image = self.patch_embed(x_t.to(dtype))
        c = self.time_embed(t)
        grid = x_t.shape[-1] // self.config.patch_size
        context_rope, image_rope = self.rope_tables(grid, x_t.device)
        if self.config.decoder.conditioning == "joint":
            for block in self.blocks:
                context, image = block(context, image, c, context_rope, image_rope)
        else:
            context = self.context_norm(context)
            for block in self.blocks:
                assert isinstance(block, CrossBlock)
                image = block(image, c, image_rope, block.context(context, context_rope))
        out = unpatchify(self.final_layer(image, c), self.config.patch_size).to(x_t.dtype)
        if self.config.decoder.prediction == "velocity":
            return out
        stage = self._stage_of(x_t)
        return stage.velocity_gain(stage.within_stage_time(t))[:, None, None, None].to(x_t.dtype) * (x_t - out)

    def rope_tables(self, grid: int, device: torch.device) -> tuple[RopeTable, RopeTable]:
        """Tables of the latent tokens and of a ``grid`` x ``grid`` image.

        With "row" positions the joint model's context row follows the current grid; the cross model's is
        fixed, so that context keys serve every scale (docs/spec.md#rope).
        """
        cfg, head_dim = self.config.rope, self.config.decoder.head_dim
        rows, cols = image_grid_positions(grid, self.config.grid_size, cfg.image_positions, device)
        image = rope_table(rows, cols, head_dim, cfg.base, cosine_only=cfg.image_rope == "cosine")
        row = grid if self.config.decoder.conditioning == "joint" else self.config.grid_size
        return context_rope_table(self.config, head_dim, row, device), image

    def _stage_of(self, x_t: Tensor) -> Stage:
        sizes = [self.config.stage_resolution(stage.index) for stage in self.schedule.stages]
        if x_t.shape[-1] not in sizes:
            raise InputError(f"x_t must have the resolution of a stage, one of {sizes}, got {x_t.shape[-1]}")
        return self.schedule[sizes.index(x_t.shape[-1])]

    def _check(self, x_t: Tensor, t: Tensor, z: Tensor | None) -> None:
        cfg = self.config
        if x_t.ndim != 4 or x_t.shape[1] != 3 or x_t.shape[2] != x_t.shape[3]:
            raise InputError(f"x_t must be (B, 3, H, H), got {tuple(x_t.shape)}")
        size = x_t.shape[-1]
        if size % cfg.patch_size or not 0 < size <= cfg.image_size:
            raise InputError(
                f"x_t must have a resolution that is a multiple of the patch size {cfg.patch_size} "
                f"and at most {cfg.image_size}, got {size}"
            )
        if t.shape != (len(x_t),):
            raise InputError(f"t must be ({len(x_t)},), one model time per image, got {tuple(t.shape)}")
        expected = (len(x_t), cfg.num_latent_tokens, cfg.latent_dim)
        if z is not None and z.shape != expected:
            raise InputError(f"z must be {expected}, got {tuple(z.shape)}")
