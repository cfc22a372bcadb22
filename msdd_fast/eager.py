"""The eager model in the place of an engine, for a tokenizer that the engine does not take yet."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from msdd_fast.engine.program import StageImages
from msdd_fast.models.tokenizer import Tokenizer
from msdd_fast.sampling import check_sampling, check_unguided, sample


class EagerDecoder:
    """decode and stream as a ``FastDecoder`` has them, of an SSDD tokenizer, in ``dtype``.

    ``steps`` and ``cfg_scale`` default to ``config.sampling``. Raises InputError for bad ones.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: torch.dtype, steps: int | None, cfg_scale: float | None) -> None:
        sampling = tokenizer.config.sampling
        self.steps = sampling.steps if steps is None else steps
        check_sampling(self.steps, sampling.cfg_scale if cfg_scale is None else cfg_scale)
        check_unguided(sampling.cfg_scale if cfg_scale is None else cfg_scale)
        self.schedule, self.dtype = tokenizer.schedule, dtype
        self.decoder = copy.deepcopy(tokenizer.decoder).to(dtype)

    @torch.no_grad()
    def decode(self, z: Tensor, seed: int | Sequence[int] | Tensor = 0) -> Tensor:
        """Images float32 (B, 3, H, W) of latents on any device."""
        z = z.to(next(self.decoder.parameters()).device)
        out = sample(self.decoder, z, self.schedule, steps=self.steps, seed=seed)
        assert isinstance(out, Tensor)
        return out

    def stream(self, z: Tensor, seed: int | Sequence[int] | Tensor = 0) -> Iterator[StageImages]:
        """The one stage."""
        images = self.decode(z, seed)
        yield StageImages(0, images, images)
