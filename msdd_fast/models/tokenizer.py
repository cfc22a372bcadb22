"""The tokenizer: encoder, decoder and schedule under one roof."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msdd_fast.config import TokenizerConfig, get_preset
from msdd_fast.errors import InputError
from msdd_fast.models.decoder import Decoder
from msdd_fast.models.encoder import Encoder
from msdd_fast.sampling import StageResult, check_latents, sample
from msdd_fast.schedule import StageSchedule


class Tokenizer(nn.Module):
    """Images to latent tokens and back.

    ``encode`` and ``decode`` run the model as it is written, op by op. The fused ops take their best backend
    (``backends.use_backend``); under ``use_backend("eager")`` all is plain PyTorch, and that is the specification which
    every fast path is tested against.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.schedule = StageSchedule(config.schedule)

    @classmethod
    def from_config(cls, config: str | TokenizerConfig) -> Tokenizer:
        """Random weights from a preset name ("msdd-d12", "msdd-nano", ...) or a config. In eval mode."""
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
        """Import a checkpoint of the authors' code (SPEC A8). See ``checkpoint.import_authors``."""
        from msdd_fast import checkpoint

        return checkpoint.import_authors(path_or_state_dict, weights, image_size, num_stages)

    def save_pretrained(self, directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json and sharded safetensors atomically. See ``checkpoint.save_pretrained``."""
        from msdd_fast import checkpoint

        checkpoint.save_pretrained(self, directory, **kwargs)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latent tokens of images: (B, 3, R, R) float in [-1, 1], R = config.image_size -> (B, 128, 32).

        Raises InputError for another shape, an integer dtype, or NaN/Inf.
        """
        size = self.config.image_size
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1:] != (3, size, size):
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"images must have shape (B, 3, {size}, {size}), got {got}")
        if not images.is_floating_point():
            raise InputError(f"images must be floating point in [-1, 1], got {images.dtype}")
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
        """Images of latent tokens: (B, 128, 32) -> float32 (B, 3, R, R), nominally in [-1, 1], not clamped.

        ``steps`` and ``cfg_scale`` default to ``config.sampling``; the other arguments are those of
        ``sampling.sample``. Raises InputError for a wrong shape or dtype and for NaN/Inf in z.
        """
        sampling = self.config.sampling
        check_latents(z, self.config.num_latent_tokens, self.config.latent_dim)
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


def check_finite(name: str, x: Tensor) -> None:
    """Raise InputError that names the first item of the batch with NaN or Inf. Waits for a GPU."""
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(dim=1).nonzero()[0])
        raise InputError(f"{name} must be finite, got NaN or Inf in item {bad}")
