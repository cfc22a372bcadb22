"""Models to measure, their inputs, and the plain PyTorch and torch.compile baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from msdd_fast.backends import use_backend
from msdd_fast.bench.decode.cases import DecodeCase
from msdd_fast.bench.decode.staged import StageTimer
from msdd_fast.diffusion.config import Config
from msdd_fast.errors import CheckpointError, ConfigError
from msdd_fast.families import family_of, get_preset
from msdd_fast.families.base import example_conditions
from msdd_fast.tokenizer import Tokenizer

# What a user of plain PyTorch has: its attention is SDPA (the eager reference stores all scores), and the noise is ours
# (the eager noise is a slow reference made of integer operations).
PLAIN_PYTORCH = (
    "eager,attention=sdpa,context_attention=sdpa,window_attention=sdpa,start_noise=auto,renoise_upsample=auto,"
    "sde_step=auto"
)
# bfloat16 eager differs from float32 by at most this much, on decoded values of a few units.
TOLERANCE = 1.0
# On a CPU a deeper decoder is compiled block by block: the C++ of a whole network for every scale takes minutes.
WHOLE_DEPTH = 2
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def load(name: str, device: torch.device) -> Tokenizer:
    """A checkpoint, or a preset with random weights."""
    try:
        tokenizer = Tokenizer.from_pretrained(name)
    except CheckpointError as missing:
        try:
            config = get_preset(name)
        except ConfigError:
            raise missing from None
        torch.manual_seed(0)
        tokenizer = Tokenizer.from_config(config)
        fill_zeros(tokenizer)
    return tokenizer.to(device)


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Small random values for the matrices that training starts at zero (adaLN, output layers).

    Zeros there can make the velocity zero whatever the rest calculates, and then no comparison finds an error.
    """
    for p in model.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.1 * p[0].numel() ** -0.5)


def device_of(tokenizer: Tokenizer) -> torch.device:
    return next(tokenizer.parameters()).device


def random_latents(config: Config, batch: int, device: torch.device) -> Tensor:
    """Latents (batch, ...) of images of ``config.image_size``: the same numbers in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *family_of(config).example, generator=generator).to(device)


def conditions(config: Config) -> dict[str, Any]:
    """What else a decode of random latents takes, as arguments of ``decode``."""
    return example_conditions(family_of(config))


def random_images(config: Config, batch: int, device: torch.device) -> Tensor:
    """Images (batch, 3, H, H) in [-1, 1] with H ``config.image_size``: the same numbers in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, config.image_size, config.image_size, generator=generator).to(device) * 2 - 1


def resolutions_of(config: Config) -> list[int]:
    """Pixels per side of the stages of a decode at ``config.image_size``."""
    return [shape[-1] for shape in config.stage_shapes((1, *family_of(config).example))]


def in_dtype(tokenizer: Tokenizer, dtype: torch.dtype, copy: bool = False) -> Tokenizer:
    """The tokenizer with weights of ``dtype``: itself if it has them and ``copy`` is not set."""
    parameter = next(tokenizer.parameters())
    if parameter.dtype == dtype and not copy:
        return tokenizer
    model = Tokenizer.from_config(tokenizer.config).to(parameter.device, dtype)
    model.load_state_dict(tokenizer.state_dict())
    return model


def by_block(tokenizer: Tokenizer) -> bool:
    """Whether torch.compile takes the decoder's blocks one by one: see WHOLE_DEPTH.

    Only for a decoder whose blocks are one ModuleList: they share their code, so that one compilation serves all.
    """
    blocks = getattr(tokenizer.decoder, "blocks", None)
    return device_of(tokenizer).type == "cpu" and isinstance(blocks, nn.ModuleList) and len(blocks) > WHOLE_DEPTH


def eager(tokenizer: Tokenizer, dtype: torch.dtype, compiled: bool = False) -> Callable[..., Tensor]:
    """The plain sampler and network in ``dtype``, as a function of z and the options of ``Tokenizer.decode``.

    Backends: ``PLAIN_PYTORCH``. ``compiled``: under torch.compile, by block where ``by_block`` says so.
    """
    model = in_dtype(tokenizer, dtype, copy=compiled)
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # a graph for every scale, batch and dtype of this run
        modules: Any = model.decoder.blocks if by_block(tokenizer) else [model.decoder]
        for module in modules:
            module.compile(dynamic=False)
    sampling = tokenizer.config.sampling
    defaults = {"steps": sampling.steps, "cfg_scale": sampling.cfg_scale, "seed": 0, **conditions(tokenizer.config)}

    def decode(z: Tensor, **options: Any) -> Tensor:
        with use_backend(PLAIN_PYTORCH):
            return model.decode(z.to(dtype), **{**defaults, **options})

    return decode


def eager_encode(tokenizer: Tokenizer, dtype: torch.dtype, compiled: bool = False) -> Callable[[Tensor], Tensor]:
    """The plain encoder in ``dtype``, with none of our ops."""
    model = in_dtype(tokenizer, dtype, copy=compiled)
    if compiled:
        model.encoder.compile(dynamic=False)

    def encode(images: Tensor) -> Tensor:
        with use_backend(PLAIN_PYTORCH):
            return model.encode(images.to(dtype)).float()

    return encode


def plain(
    tokenizer: Tokenizer, case: DecodeCase, dtype: torch.dtype, compiled: bool = False
) -> Callable[[StageTimer], Tensor]:
    """The case in plain PyTorch, or under ``torch.compile``; calls the stage timer after each scale."""
    config, device = tokenizer.config, device_of(tokenizer)
    if case.kind == "encode":
        images, encode = random_images(config, case.batch, device), eager_encode(tokenizer, dtype, compiled)
        return lambda _: encode(images)
    z, decode = random_latents(config, case.batch, device), eager(tokenizer, dtype, compiled)
    return lambda stage_done: decode(
        z, steps=case.steps, cfg_scale=case.cfg_scale, stage_callback=lambda _: stage_done()
    )


def compiled(case: dict[str, Any], device: str, dtype: str) -> Callable[[StageTimer], Tensor]:
    """``plain`` under torch.compile, from plain data: what the isolated process runs (timing/isolated.py)."""
    wanted = DecodeCase(**case)
    return plain(load(wanted.model, torch.device(device)), wanted, getattr(torch, dtype), compiled=True)
