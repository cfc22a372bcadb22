"""What FastDecoder has to know of a tokenizer's family: how to build its program, and what to say of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Protocol

import torch

from msdd_fast.config import AnyConfig, SSDDConfig, TokenizerConfig
from msdd_fast.engine.memory import activation_bytes, ssdd_activation_bytes, tables_memory
from msdd_fast.engine.network import Network
from msdd_fast.engine.program import DecodeProgram, Program
from msdd_fast.engine.ssdd_network import SSDDNetwork
from msdd_fast.engine.ssdd_program import SSDDProgram
from msdd_fast.engine.ssdd_tables import SSDDStep, ssdd_steps
from msdd_fast.engine.ssdd_weights import pack_ssdd
from msdd_fast.engine.tables import StageTables, stage_tables
from msdd_fast.engine.weights import MakeLinear, pack
from msdd_fast.models.tokenizer import Tokenizer, msdd_parts, ssdd_parts
from msdd_fast.sampling import check_sampling, check_unguided


class Family(Protocol):
    """Knows a config, but keeps no tokenizer. ``tables`` is whatever the family's own ``program`` takes."""

    @property
    def example(self) -> tuple[int, ...]:
        """Shape of the latents of one image of ``config.image_size``."""
        ...

    @property
    def model(self) -> str:
        """The model in a line of the report."""
        ...

    @property
    def constant(self) -> tuple[str, ...]:
        """What the engine made constant, for the report."""
        ...

    def check(self, steps: int, cfg_scale: float) -> None:
        """Raise InputError for sampling that the family does not have."""
        ...

    def tables(self, tokenizer: Tokenizer, steps: int, device: torch.device) -> Any:
        """What depends on time alone."""
        ...

    def program(
        self,
        tokenizer: Tokenizer,
        tables: Any,
        dtype: torch.dtype,
        device: torch.device,
        ops: SimpleNamespace,
        make: MakeLinear,
    ) -> DecodeProgram: ...

    def tables_memory(self, tables: Any) -> int:
        """Bytes."""
        ...

    def activation_bytes(self, itemsize: int, guided: bool, quantized: bool) -> int:
        """Upper bound for one image of ``config.image_size``."""
        ...


def family_of(config: AnyConfig) -> Family:
    return SSDDFamily(config) if isinstance(config, SSDDConfig) else MSDDFamily(config)


class MSDDFamily:
    """Token latents, several scales."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.config = config

    @property
    def example(self) -> tuple[int, ...]:
        return self.config.latent_shape

    @property
    def model(self) -> str:
        cfg, dec = self.config, self.config.decoder
        return (
            f"{dec.depth} layers of {dec.hidden_size}, {dec.conditioning}, {cfg.image_size} px, "
            f"{cfg.schedule.num_stages} scales"
        )

    @property
    def constant(self) -> tuple[str, ...]:
        cross = self.config.decoder.conditioning == "cross"
        return (
            "all adaLN vectors, so that their matrices need not be kept",
            "context keys and values: once per image" if cross else "context embedding: once per image",
            "position tables",
        )

    def check(self, steps: int, cfg_scale: float) -> None:
        check_sampling(steps, cfg_scale)

    def tables(self, tokenizer: Tokenizer, steps: int, device: torch.device) -> list[StageTables]:
        return stage_tables(msdd_parts(tokenizer)[1], tokenizer.schedule, steps, device)

    def program(
        self,
        tokenizer: Tokenizer,
        tables: list[StageTables],
        dtype: torch.dtype,
        device: torch.device,
        ops: SimpleNamespace,
        make: MakeLinear,
    ) -> Program:
        weights = pack(msdd_parts(tokenizer)[1], dtype, device, make)
        return Program(Network(weights, self.config.decoder.head_dim, ops), tables, tokenizer.schedule, self.config)

    def tables_memory(self, tables: list[StageTables]) -> int:
        return tables_memory(tables)

    def activation_bytes(self, itemsize: int, guided: bool, quantized: bool) -> int:
        return activation_bytes(self.config, itemsize, guided, quantized)


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
