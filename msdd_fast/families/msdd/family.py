"""MSDD for the engine."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from msdd_fast.diffusion.checks import check_sampling
from msdd_fast.errors import InputError
from msdd_fast.families.msdd.config import TokenizerConfig
from msdd_fast.families.msdd.decoder import Decoder
from msdd_fast.families.msdd.engine.memory import activation_bytes, tables_memory
from msdd_fast.families.msdd.engine.network import Network
from msdd_fast.families.msdd.engine.program import Program
from msdd_fast.families.msdd.engine.tables import StageTables, stage_tables
from msdd_fast.families.msdd.engine.weights import pack
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.families.ssdd.decoder import UViTDecoder
from msdd_fast.layers.linear.dense import MakeLinear
from msdd_fast.tokenizer import Tokenizer


def msdd_parts(tokenizer: Tokenizer) -> tuple[TokenizerConfig, Decoder]:
    """Config and decoder of an MSDD tokenizer, for what takes no other. Raises InputError for one of another family."""
    config, decoder = tokenizer.config, tokenizer.decoder
    if isinstance(config, SSDDConfig) or isinstance(decoder, UViTDecoder):
        raise InputError(f"tokenizer must be of the family msdd, got {config.family}")
    return config, decoder


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
