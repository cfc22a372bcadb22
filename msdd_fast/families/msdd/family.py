"""MSDD, as ``families.base.Family`` asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from msdd_fast.diffusion.checks import shape_of
from msdd_fast.diffusion.config import Config
from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.errors import InputError
from msdd_fast.families.base import ReleasedFormat
from msdd_fast.families.msdd.config import TokenizerConfig
from msdd_fast.families.msdd.decoder import Decoder
from msdd_fast.families.msdd.encoder import Encoder
from msdd_fast.families.msdd.engine.memory import tables_memory
from msdd_fast.families.msdd.engine.network import Network
from msdd_fast.families.msdd.engine.program import Program
from msdd_fast.families.msdd.engine.tables import StageTables, stage_tables
from msdd_fast.families.msdd.engine.weights import pack
from msdd_fast.families.msdd.mmdit import CrossBlock
from msdd_fast.families.msdd.presets import PRESETS
from msdd_fast.families.msdd.released import RELEASED
from msdd_fast.families.msdd.work import decode_work, encode_work
from msdd_fast.families.work import Work
from msdd_fast.layers.linear.base import MakeLinear
from msdd_fast.ops import Ops


class MSDDFamily:
    """Token latents, several scales."""

    name: ClassVar[str] = "msdd"
    config_type: ClassVar[type[Any]] = TokenizerConfig
    presets: ClassVar[Mapping[str, Config]] = PRESETS
    released: ClassVar[ReleasedFormat | None] = RELEASED
    no_fast_tier: ClassVar[str] = ""
    no_encoder: ClassVar[str] = ""

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

    def describe_sampling(self, steps: int, cfg_scale: float) -> str:
        return f"{steps} step(s) per scale, CFG {cfg_scale:g}"

    def build(self) -> tuple[Encoder, Decoder]:
        return Encoder(self.config), Decoder(self.config)

    def check_images(self, images: Tensor) -> None:
        size = self.config.image_size
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise InputError(f"images must have shape (B, 3, {size}, {size}), got {shape_of(images)}")

    def tables(self, decoder: Decoder, schedule: StageSchedule, steps: int, device: torch.device) -> list[StageTables]:
        return stage_tables(decoder, schedule, steps, device)

    def program(
        self,
        decoder: Decoder,
        schedule: StageSchedule,
        tables: list[StageTables],
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        make: MakeLinear,
    ) -> Program:
        weights = pack(decoder, dtype, device, make, ops.swiglu)
        return Program(Network(weights, self.config.decoder, ops), tables, schedule, self.config)

    def quantizable(self, decoder: Decoder) -> list[tuple[str, Tensor]]:
        """The blocks' linears, but those that only see the time, and those that are folded (engine/context.py)."""
        modules = decoder.blocks.named_modules(prefix="decoder.blocks")
        folded = [b.context.kv for b in decoder.blocks if isinstance(b, CrossBlock)]
        linears = [(n, m) for n, m in modules if isinstance(m, nn.Linear) and m not in folded]
        return [(n, m.weight) for n, m in linears if "adaln" not in n.split(".")]

    def tables_memory(self, tables: list[StageTables]) -> int:
        return tables_memory(tables)

    def decode_work(
        self, batch: int = 1, steps: int = 1, cfg_scale: float = 1.0, itemsize: int = 2, hoisted: bool = True
    ) -> list[Work]:
        return decode_work(self.config, batch, steps, cfg_scale, itemsize, hoisted)

    def encode_work(self, batch: int = 1, itemsize: int = 2) -> list[Work]:
        return encode_work(self.config, batch, itemsize)
