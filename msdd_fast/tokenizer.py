"""The tokenizer: encoder, decoder and schedule under one roof."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msdd_fast.diffusion.checks import check_finite, check_latents
from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.errors import InputError
from msdd_fast.families.msdd.decoder import Decoder
from msdd_fast.families.msdd.encoder import Encoder
from msdd_fast.families.presets import AnyConfig, get_preset
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.families.ssdd.decoder import UViTDecoder
from msdd_fast.families.ssdd.encoder import KLEncoder
from msdd_fast.sampling import StageResult, sample


class Tokenizer(nn.Module):
    """Images to latents and back: an MSDD tokenizer, or an SSDD one if its config is an ``SSDDConfig``.

    ``encode`` and ``decode`` run the model as it is written, op by op. The fused ops take their best backend
    (``backends.use_backend``); under ``use_backend("eager")`` all is plain PyTorch, and that is the specification which
    every fast path is tested against.
    """

    encoder: Encoder | KLEncoder
    decoder: Decoder | UViTDecoder

    def __init__(self, config: AnyConfig) -> None:
        super().__init__()
        self.config = config
        if isinstance(config, SSDDConfig):
            self.encoder, self.decoder = KLEncoder(config), UViTDecoder(config)
        else:
            self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.schedule = StageSchedule(config.schedule)

    @classmethod
    def from_config(cls, config: str | AnyConfig) -> Tokenizer:
        """Random weights from a preset name ("msdd-d12", "ssdd-m-f8c4", ...) or a config. In eval mode."""
        return cls(get_preset(config) if isinstance(config, str) else config).eval()

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str]) -> Tokenizer:
        """Load a bundled name ("msdd-nano"), a directory, or a Hugging Face hub id. In eval mode, float32.

        Raises CheckpointError if there is no such checkpoint, or it is damaged or contradicts its config.
        """
        from msdd_fast import checkpoint

        return checkpoint.load_pretrained(name_or_path)

    @classmethod
    def from_authors_checkpoint(
        cls,
        path_or_state_dict: str | os.PathLike[str] | dict[str, Any],
        weights: str = "ema",
        image_size: int = 256,
        num_stages: int = 4,
    ) -> Tokenizer:
        """Import a checkpoint of the authors' code (docs/spec.md#authors-checkpoint).

        See ``families.msdd.released.import_authors``.
        """
        from msdd_fast.families.msdd.released import import_authors

        return import_authors(path_or_state_dict, weights, image_size, num_stages)

    @classmethod
    def from_ssdd_checkpoint(
        cls,
        path_or_state_dict: str | os.PathLike[str] | dict[str, Any],
        image_size: int = 256,
        steps: int = 8,
        groups: int = 32,
    ) -> Tokenizer:
        """Import SSDD's released weights (docs/spec.md#ssdd-network). See ``families.ssdd.released.import_ssdd``."""
        from msdd_fast.families.ssdd.released import import_ssdd

        return import_ssdd(path_or_state_dict, image_size, steps, groups)

    def save_pretrained(self, directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json and sharded safetensors atomically. See ``checkpoint.save_pretrained``."""
        from msdd_fast import checkpoint

        checkpoint.save_pretrained(self, directory, **kwargs)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of images (B, 3, H, W), float in [-1, 1].

        MSDD: H = W = config.image_size -> (B, num_latent_tokens, latent_dim). SSDD: sides multiples of config.factor
        -> (B, latent_channels, H/factor, W/factor), the mode of the Gaussian that ``encoder.posterior`` gives.

        Raises InputError for another shape, an integer dtype, or NaN/Inf.
        """
        check_images(images, self.config)
        check_finite("images", images)
        return self.encoder(images)

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        seed: int | Sequence[int] | Tensor = 0,
        steps: int | None = None,
        cfg_scale: float | None = None,
        noise: Sequence[Tensor] | None = None,
        stage_callback: Callable[[StageResult], None] | None = None,
    ) -> Tensor:
        """Images of latents: float32 (B, 3, H, W), nominally in [-1, 1], not clamped; shapes as in ``encode``.

        ``steps`` and ``cfg_scale`` default to ``config.sampling``; the other arguments are those of
        ``sampling.sample``. Raises InputError for a wrong shape or dtype and for NaN/Inf in z.
        """
        sampling = self.config.sampling
        check_latents(z, *self.config.latent_shape)
        check_finite("z", z)
        out = sample(
            self.decoder,
            z,
            self.schedule,
            steps=sampling.steps if steps is None else steps,
            cfg_scale=sampling.cfg_scale if cfg_scale is None else cfg_scale,
            seed=seed,
            noise=noise,
            stage_callback=stage_callback,
        )
        assert isinstance(out, Tensor)
        return out


def check_images(images: Tensor, config: AnyConfig) -> None:
    """Raise InputError unless ``images`` are floating point and of a shape that a tokenizer of ``config`` encodes."""
    shape = tuple(images.shape) if isinstance(images, Tensor) else None
    got = type(images).__name__ if shape is None else shape
    if isinstance(config, SSDDConfig):
        f = config.factor
        if shape is None or len(shape) != 4 or shape[1] != 3 or any(s < 1 or s % f for s in shape[2:]):
            raise InputError(f"images must have shape (B, 3, H, W), H and W positive multiples of {f}, got {got}")
    else:
        size = config.image_size
        if shape is None or len(shape) != 4 or shape[1:] != (3, size, size):
            raise InputError(f"images must have shape (B, 3, {size}, {size}), got {got}")
    if not images.is_floating_point():
        raise InputError(f"images must be floating point in [-1, 1], got {images.dtype}")
