"""SSDD for the engine."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from msdd_fast.diffusion.checks import check_sampling, check_unguided
from msdd_fast.errors import InputError
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.families.ssdd.decoder import UViTDecoder
from msdd_fast.families.ssdd.engine.memory import ssdd_activation_bytes
from msdd_fast.families.ssdd.engine.network import SSDDNetwork
from msdd_fast.families.ssdd.engine.program import SSDDProgram
from msdd_fast.families.ssdd.engine.tables import SSDDStep, ssdd_steps
from msdd_fast.families.ssdd.engine.weights import pack_ssdd
from msdd_fast.layers.linear.dense import MakeLinear
from msdd_fast.tokenizer import Tokenizer


def ssdd_parts(tokenizer: Tokenizer) -> tuple[SSDDConfig, UViTDecoder]:
    """The same for an SSDD tokenizer."""
    config, decoder = tokenizer.config, tokenizer.decoder
    if not isinstance(config, SSDDConfig) or not isinstance(decoder, UViTDecoder):
        raise InputError(f"tokenizer must be of the family ssdd, got {config.family}")
    return config, decoder


class SSDDFamily:
    """Spatial latents of any height and width, one scale, no guidance, no fast tier."""

    def __init__(self, config: SSDDConfig) -> None:
        self.config = config

    @property
    def example(self) -> tuple[int, ...]:
        side = self.config.image_size // self.config.factor
        return self.config.latent_channels, side, side

    @property
    def model(self) -> str:
        cfg, dec = self.config, self.config.decoder
        return (
            f"SSDD, U-Net of {', '.join(map(str, dec.widths))} with {dec.mid_layers} layers of attention in windows of "
            f"{2 * dec.window - 1}, {cfg.image_size} px, f{cfg.factor}"
        )

    @property
    def constant(self) -> tuple[str, ...]:
        return (
            "time: weight and bias of each residual block's second norm, so that its matrices need not be kept",
            "all modulations by the latents: two matrix products once per image, never brought to full resolution",
            "the latents' part of the first convolution: once per image",
        )

    def check(self, steps: int, cfg_scale: float) -> None:
        check_sampling(steps, cfg_scale)
        check_unguided(cfg_scale)

    def tables(self, tokenizer: Tokenizer, steps: int, device: torch.device) -> list[SSDDStep]:
        return ssdd_steps(ssdd_parts(tokenizer)[1], tokenizer.schedule, steps, device)

    def program(
        self,
        tokenizer: Tokenizer,
        tables: list[SSDDStep],
        dtype: torch.dtype,
        device: torch.device,
        ops: SimpleNamespace,
        make: MakeLinear,
    ) -> SSDDProgram:
        weights, dec = pack_ssdd(ssdd_parts(tokenizer)[1], dtype, device), self.config.decoder
        return SSDDProgram(SSDDNetwork(weights, dec.groups, dec.heads, self.config.factor, ops), tables)

    def tables_memory(self, tables: list[SSDDStep]) -> int:
        return sum(t.nbytes for step in tables for norm in step.norms for t in norm)

    def activation_bytes(self, itemsize: int, guided: bool, quantized: bool) -> int:
        return ssdd_activation_bytes(self.config, itemsize)
