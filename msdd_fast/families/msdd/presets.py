"""Presets of MSDD."""

from __future__ import annotations

from typing import Any

from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.families.msdd.config import DecoderConfig, EncoderConfig, RopeConfig, TokenizerConfig


def _joint(**kwargs: Any) -> TokenizerConfig:
    return TokenizerConfig(decoder=DecoderConfig(conditioning="joint"), **kwargs)


PRESETS: dict[str, TokenizerConfig] = {
    # The product: cross-attention on 128 latent tokens, 12 layers, 256 px in four stages.
    "msdd-d12": TokenizerConfig(),
    # Its counterpart to the authors' 3-stage models: patch 16.
    "msdd-d12-3scale": TokenizerConfig(patch_size=16, schedule=ScheduleConfig(num_stages=3)),
    # The paper's size and block (joint MMDiT), 4 stages, patch 8.
    "msdd-d12-joint": _joint(),
    # The authors' 3-stage models, which also use patch 16 (docs/spec.md#schedule).
    "msdd-d12-joint-3scale": _joint(patch_size=16, schedule=ScheduleConfig(num_stages=3)),
    # The paper's baseline: one stage at full resolution.
    "msdd-d12-single-scale": _joint(schedule=ScheduleConfig(num_stages=1)),
    # Small enough to train on a CPU and to ship: at most 10 M parameters.
    "msdd-nano": TokenizerConfig(
        image_size=128,
        encoder=EncoderConfig(depth=2, hidden_size=256, mlp_multiple_of=64),
        decoder=DecoderConfig(depth=4, hidden_size=256, mlp_multiple_of=64),
        # 16 patches a side: with 10000 two thirds of the frequencies would hardly turn.
        rope=RopeConfig(base=100.0),
    ),
    # Its size at 256 px: the same patch grids, of twice the patch size. A patch has three times the values of a token.
    "msdd-nano-256": TokenizerConfig(
        patch_size=16,
        encoder=EncoderConfig(depth=2, hidden_size=256, mlp_multiple_of=64),
        decoder=DecoderConfig(depth=4, hidden_size=256, mlp_multiple_of=64, prediction="image", velocity_init="zero"),
        rope=RopeConfig(base=100.0),
    ),
    # For tests.
    "tiny": TokenizerConfig(
        image_size=64,
        num_latent_tokens=16,
        encoder=EncoderConfig(depth=2, hidden_size=64, head_dim=32, mlp_multiple_of=32),
        decoder=DecoderConfig(depth=2, hidden_size=64, head_dim=32, mlp_multiple_of=32),
    ),
}
