"""PiD's velocity network: a transformer of image and caption tokens, then blocks on every pixel
(docs/spec.md#pid-network).

The latents condition the image's tokens through a convolutional network and gates that close as the latents get noisier
(``sigma``). Modules and parameters have the names of the released files.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast.diffusion.checks import shape_of
from msdd_fast.errors import InputError
from msdd_fast.families.pid.blocks import JointBlock, PixelBlock, RMSNorm
from msdd_fast.families.pid.config import TIME_WIDTH, LatentFeaturesConfig, PiDConfig
from msdd_fast.families.pid.latents import LATENTS
from msdd_fast.families.pid.rope import image_rope, text_rope

# The time that the network sees is 1000 times the noise level, and the longest period of its sinusoids is 10.
TIME_SCALE = 1000.0
MAX_PERIOD = 10.0
POSITION_BASE = 10000.0
GROUPS = 4


class LatentFeatures(NamedTuple):
    """What the network reads of the latents: each (B, N, D); ``pixel`` is None without an injection there."""

    joint: list[Tensor]
    pixel: Tensor | None


def time_features(t: Tensor) -> Tensor:
    """Model times t (B,) in [0, 1] to cosines, then sines, of 1000 t: float32 (B, 256).

    The angles reach 1000, where float32 has a spacing of 6e-5: the order of the operations is part of the definition.
    """
    j = torch.arange(TIME_WIDTH // 2, dtype=torch.float32, device=t.device)
    angle = (TIME_SCALE * t).float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * j / (TIME_WIDTH // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def pixel_positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sines, then cosines, of the pixels along one side: float64 (length, width), ``width`` half a pixel's channels."""
    j = torch.arange(width // 2, dtype=torch.float64, device=device)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * POSITION_BASE ** (-2 * j / width)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def to_patches(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) to patches in row-major order: (B, N, C, P, P)."""
    b, c, height, width = x.shape
    x = x.view(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def from_pixels(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Pixels (B, N, P^2, C) of patches in row-major order to (B, C, H, W)."""
    x = x.unflatten(1, grid).unflatten(3, (patch, patch)).permute(0, 5, 1, 3, 2, 4)
    return x.flatten(4, 5).flatten(2, 3)


class PatchEmbedder(nn.Module):
    """A linear layer called ``proj``."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class TextEmbedder(PatchEmbedder):
    """A linear layer and its norm."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class TimeEmbedder(nn.Module):
    """Model time t (B,) in [0, 1] -> (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        weight: Tensor = self.mlp[0].weight  # type: ignore[assignment]
        return self.mlp(time_features(t).to(weight.dtype))


class ResBlock(nn.Module):
    """x + conv(SiLU(GN(conv(SiLU(GN(x)))))), stride 1."""

    def __init__(self, width: int, padding: Literal["zeros", "replicate"]) -> None:
        super().__init__()
        norms = [nn.GroupNorm(GROUPS, width, eps=1e-5) for _ in range(2)]
        convs = [nn.Conv2d(width, width, 3, padding=1, padding_mode=padding) for _ in range(2)]
        self.block = nn.Sequential(norms[0], nn.SiLU(), convs[0], norms[1], nn.SiLU(), convs[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class SigmaGate(nn.Module):
    """s + g F with g = sigmoid(L [s; F] - e^log_alpha sigma), of one number or of one per channel."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.content_proj = nn.Linear(2 * width, outputs)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(5.0)))

    def forward(self, s: Tensor, features: Tensor, sigma: Tensor) -> Tensor:
        """Tokens s and features F (B, N, D), sigma (B,) -> (B, N, D)."""
        closing = (self.log_alpha.exp() * sigma.to(s.dtype))[:, None, None]
        gate = torch.sigmoid(self.content_proj(torch.cat([s, features], dim=-1)) - closing)
        return s + gate * features


class LatentProjection(nn.Module):
    """Latents to features of every patch, one set for each injection, and the gates of these."""

    def __init__(self, width: int, channels: int, injections: int, config: LatentFeaturesConfig) -> None:
        super().__init__()
        self.unpatchify = config.unpatchify
        g, padding = config.width, config.padding
        self.latent_proj = nn.Sequential(
            nn.Conv2d(channels // config.unpatchify**2, g, 3, padding=1, padding_mode=padding),
            nn.SiLU(),
            nn.Conv2d(g, g, 3, padding=1, padding_mode=padding),
            *(ResBlock(g, padding) for _ in range(config.blocks)),
        )
        outputs = width if config.gate == "channel" else 1
        self.output_heads = nn.ModuleList(nn.Linear(g, width) for _ in range(injections))
        self.gate_modules = nn.ModuleList(SigmaGate(width, outputs) for _ in range(injections))
        self.pit_head = nn.Linear(g, width) if config.pixel_injection else None

    def forward(self, z: Tensor, grid: tuple[int, int]) -> LatentFeatures:
        """Of latents (B, Z, h, w), brought to the grid of patches by nearest neighbour."""
        z = F.interpolate(F.pixel_shuffle(z, self.unpatchify), size=grid, mode="nearest")
        tokens = self.latent_proj(z).flatten(2).transpose(1, 2)
        pixel = None if self.pit_head is None else self.pit_head(tokens)
        return LatentFeatures([head(tokens) for head in self.output_heads], pixel)


class FinalLayer(nn.Module):
    """Norm and linear layer on every pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class PiDDecoder(nn.Module):
    """v(x_t, t, z) of a PiD decoder: the noise minus the image, as in all of this library."""

    def __init__(self, config: PiDConfig) -> None:
        super().__init__()
        self.config = config
        dec, width = config.decoder, config.decoder.hidden_size
        outputs = width if config.features.gate == "channel" else 1
        self.y_pos_embedding = nn.Parameter(torch.empty(1, dec.text_length, width))
        self.pixel_embedder = PatchEmbedder(3, dec.pixel_width)
        self.s_embedder = PatchEmbedder(3 * dec.patch_size**2, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = TextEmbedder(dec.text_width, width)
        self.patch_blocks = nn.ModuleList(JointBlock(width, dec.heads) for _ in range(dec.depth))
        self.pixel_blocks = nn.ModuleList(PixelBlock(dec) for _ in range(dec.pixel_depth))
        self.final_layer = FinalLayer(dec.pixel_width)
        self.lq_proj = LatentProjection(width, config.latent_channels, config.injections, config.features)
        self.pit_lq_gate = SigmaGate(width, outputs) if config.features.pixel_injection else None
        if not self.y_pos_embedding.is_meta:  # else a checkpoint fills it
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linears Xavier, convolutions He, biases 0; gates begin almost open, modulations and the output at zero."""
        nn.init.normal_(self.y_pos_embedding, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SigmaGate):
                nn.init.zeros_(module.content_proj.weight)
                nn.init.constant_(module.content_proj.bias, 2.0)
            elif isinstance(module, JointBlock):
                zeroed: tuple[nn.Module, ...] = (module.adaLN_modulation_img[0], module.adaLN_modulation_txt[0])
                for linear in zeroed:
                    nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
            elif isinstance(module, PixelBlock):
                nn.init.zeros_(module.adaLN_modulation[0].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def blocks(self) -> list[nn.Module]:
        """The units in which training may recompute activations."""
        return [*self.patch_blocks, *self.pixel_blocks]

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        z: Tensor | None,
        text: Tensor | None = None,
        sigma: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity at ``x_t``.

        Args:
            x_t: (B, 3, H, W), sides multiples of ``config.decoder.patch_size``.
            t: (B,), noise level in [0, 1].
            z: (B, latent_channels, h, w), normalised. None, the null context of other families, is an error.
            text: caption features (B, T, text_width); rows from text_length on are not read.
            sigma: (B,), noise level of z; None for zeros.
            text_mask: (B, T), False for caption rows that no token should see. The released weights never saw one.

        Returns the velocity, shape and dtype of ``x_t``. Raises InputError for wrong shapes.
        """
        z, text, sigma = self._check(x_t, t, z, text, sigma)
        dec, device, dtype = self.config.decoder, x_t.device, self.y_pos_embedding.dtype
        grid = (x_t.shape[2] // dec.patch_size, x_t.shape[3] // dec.patch_size)
        features = self.lq_proj(z.to(dtype), grid)
        s = self.s_embedder(to_patches(x_t.to(dtype), dec.patch_size).flatten(2))
        te = self.t_embedder(t)[:, None]
        c = F.silu(te)
        y = self.embed_text(text.to(dtype))
        ropes = (
            image_rope(dec, grid, dec.hidden_size // dec.heads, device),
            text_rope(y.shape[1], dec.hidden_size // dec.heads, device),
        )
        mask = None if text_mask is None else text_mask[:, : dec.text_length]
        for i, block in enumerate(self.patch_blocks):
            k, between = divmod(i, self.config.features.interval)
            if between == 0:
                s = self.lq_proj.gate_modules[k](s, features.joint[k], sigma)
            s, y = block(s, y, c, *ropes, mask)
        s = F.silu(te + s)
        if self.pit_lq_gate is not None:
            s = self.pit_lq_gate(s, features.pixel, sigma)
        x = self.embed_pixels(x_t.to(dtype))
        rope = image_rope(dec, grid, dec.attention_width // dec.attention_heads, device)
        for block in self.pixel_blocks:
            x = block(x, s, rope)
        return from_pixels(self.final_layer(x), grid, dec.patch_size).to(x_t.dtype)

    def embed_text(self, text: Tensor) -> Tensor:
        """Caption features (B, T, text_width) to tokens (B, min(T, text_length), D)."""
        text = text[:, : self.config.decoder.text_length]
        return self.y_embedder(text) + self.y_pos_embedding[:, : text.shape[1]]

    def embed_pixels(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to pixels with their positions, (B, N, P^2, C)."""
        patch, width = self.config.decoder.patch_size, self.config.decoder.pixel_width
        column, row = (pixel_positions(n, width // 2, x.device).to(x.dtype) for n in (x.shape[3], x.shape[2]))
        shape = (x.shape[2], x.shape[3], width // 2)
        position = torch.cat([column.expand(shape), row[:, None].expand(shape)], dim=-1)
        pixels = self.pixel_embedder(x.permute(0, 2, 3, 1)) + position
        return to_patches(pixels.permute(0, 3, 1, 2), patch).flatten(3).transpose(2, 3)

    def _check(
        self, x_t: Tensor, t: Tensor, z: Tensor | None, text: Tensor | None, sigma: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z, text and sigma, after all arguments are found to have the right shapes."""
        dec, batch, channels = self.config.decoder, len(x_t), self.config.latent_channels
        if x_t.ndim != 4 or x_t.shape[1] != 3 or any(s < 1 or s % dec.patch_size for s in x_t.shape[-2:]):
            raise InputError(f"x_t must be (B, 3, H, W), sides multiples of {dec.patch_size}, got {tuple(x_t.shape)}")
        if t.shape != (batch,):
            raise InputError(f"t must be ({batch},), one time per image, got {tuple(t.shape)}")
        if z is None:
            raise InputError("z must be a torch.Tensor (PiD has no null latents), got None")
        if z.ndim != 4 or z.shape[:2] != (batch, channels):
            raise InputError(f"z must be ({batch}, {channels}, h, w), got {tuple(z.shape)}")
        if text is None or text.ndim != 3 or text.shape[0] != batch or text.shape[2] != dec.text_width:
            raise InputError(f"text must be ({batch}, T, {dec.text_width}) caption features, got {shape_of(text)}")
        if sigma is None:
            return z, text, torch.zeros(batch, device=x_t.device)
        if sigma.shape != (batch,):
            raise InputError(f"sigma must be ({batch},), one noise level per image, got {tuple(sigma.shape)}")
        return z, text, sigma


class NoEncoder(nn.Module):
    """PiD decodes the latents of other models; this says whose."""

    def __init__(self, config: PiDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, images: Tensor) -> Tensor:
        raise InputError(no_encoder(self.config))


def no_encoder(config: PiDConfig) -> str:
    """What ``encode`` says."""
    return (
        f"a PiD tokenizer has no encoder: it decodes latents of {LATENTS[config.latents].vae}; encode with that model "
        "and normalise its latents (families.pid.latents.normalise)"
    )
