"""The consistency decoder of DALL-E 3: a U-Net, evaluated twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from msdd_fast.bench.baselines.peer import SIZE, Peer


def _build() -> nn.Module:
    from diffusers import ConsistencyDecoderVAE

    return ConsistencyDecoderVAE()


def _decode(model: Any, z: Tensor) -> Tensor:
    out: Tensor = model.decode(z, torch.Generator(z.device).manual_seed(0)).sample
    return out


def _evaluate(model: Any) -> Tensor:
    out: Tensor = model.decoder_unet(torch.empty(1, 7, SIZE, SIZE), torch.zeros(1, dtype=torch.int64)).sample
    return out


CONSISTENCY = Peer("consistency decoder", _build, (4, 32, 32), _decode, lambda m: [m.decoder_unet], _evaluate)
