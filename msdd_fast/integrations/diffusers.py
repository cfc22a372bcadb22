"""Tokenizers and engines as the VAE of a diffusers pipeline (docs/integrations.md; extra ``[diffusers]``)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from msdd_fast.diffusion.checks import (
    as_int,
    as_number,
    check_finite,
    check_floating_images,
    check_image_range,
    check_strided,
)
from msdd_fast.diffusion.config import Config
from msdd_fast.diffusion.noise import resolve_seeds
from msdd_fast.engine import FastDecoder
from msdd_fast.errors import InputError
from msdd_fast.families import family_of
from msdd_fast.io.packages import optional
from msdd_fast.layers.request import AnySize
from msdd_fast.tokenizer import Tokenizer, as_tokenizer

with optional("diffusers", "diffusers"):
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

SEED_LIMIT = 2**63 - 1  # of torch.randint, which excludes it


def as_vae(
    model: Tokenizer | FastDecoder | str | os.PathLike[str],
    *,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
    latents_mean: Sequence[float] | None = None,
    latents_std: Sequence[float] | None = None,
    batch_norm: Mapping[str, Any] | None = None,
    factor: int | None = None,
    seed: int = 0,
    decode_options: Mapping[str, Any] | None = None,
) -> TokenizerVAE:
    """A tokenizer, or an engine, in the shape of diffusers' ``AutoencoderKL``, for its pipelines.

    Before a pipeline decodes its latents it brings them back to the scale of the VAE, with constants that it reads from
    ``vae.config``. They belong to the generator: give those that it was trained with. The defaults change nothing.

    Args:
        model: a Tokenizer with spatial latents (B, C, h, w), an engine of one, or what ``Tokenizer.from_pretrained``
            takes. An engine encodes as well, with the encoder of its tokenizer, if that still exists.
        scaling_factor, shift_factor: the pipeline decodes latents / scaling_factor + shift_factor.
        latents_mean, latents_std: one number for each channel, for pipelines that normalise by channel.
        batch_norm: "running_mean" and "running_var", one number for each channel of the pipeline's packed latents, and
            "eps" (default 1e-5), for pipelines that read them from ``vae.bn``.
        factor: pixels per side of a latent cell that the pipeline is told, a power of two. Default: ``config.factor``,
            else what the model decodes a cell to. A model that enlarges gives larger images than the pipeline was asked
            for; if their size is what you want to ask for, give the larger factor.
        seed: image i of a call has the noise of seed + i, unless the pipeline passes its generator.
        decode_options: keyword arguments of the model's ``decode``, the same at every call.

    Raises InputError for token latents, which no pipeline of diffusers makes, and for bad constants.
    """
    if not isinstance(model, FastDecoder):
        model = as_tokenizer(model)
    config = model.config
    channels = _channels(config)
    mean = _numbers("latents_mean", latents_mean, channels)
    std = _numbers("latents_std", latents_std, channels)
    if (mean is None) != (std is None):
        raise InputError(f"latents_{'mean' if mean is None else 'std'} must be given with the other, got None")
    bn = None if batch_norm is None else _batch_norm(batch_norm, channels)
    scale, shift = _finite("scaling_factor", scaling_factor), _finite("shift_factor", shift_factor)
    if scale == 0:
        raise InputError("scaling_factor must be a finite number other than 0, got 0")
    first = as_int("seed", seed, 0)
    if decode_options is not None and not isinstance(decode_options, Mapping):
        raise InputError(f"decode_options must be a dict, got {type(decode_options).__name__}")
    vae = TokenizerVAE(
        latent_channels=channels,
        z_dim=channels,
        block_out_channels=(channels,) * _levels(config, factor),
        sample_size=config.image_size,
        scaling_factor=scale,
        shift_factor=shift,
        latents_mean=mean,
        latents_std=std,
        batch_norm_eps=None if bn is None else bn.eps,
    )
    vae.adopt(model, bn, first, decode_options or {})
    return vae


class TokenizerVAE(ModelMixin, ConfigMixin):
    """What ``as_vae`` returns. See there.

    Attributes:
        config: what pipelines read of a VAE.
        bn: BatchNorm2d with the statistics of ``batch_norm``, else None.
        dtype, device: of the model. An engine has those that it was made with, and does not move.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        z_dim: int = 4,
        block_out_channels: tuple[int, ...] = (4, 4, 4, 4),
        sample_size: int = 256,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        batch_norm_eps: float | None = None,
        force_upcast: bool = False,
        use_quant_conv: bool = False,
        use_post_quant_conv: bool = False,
    ) -> None:
        super().__init__()
        self.use_slicing, self.tile = False, 0

    def adopt(
        self, model: Tokenizer | FastDecoder, bn: nn.BatchNorm2d | None, seed: int, options: Mapping[str, Any]
    ) -> None:
        """Take the model, which is no part of the config."""
        self.engine = model if isinstance(model, FastDecoder) else None
        self.tokenizer = None if isinstance(model, FastDecoder) else model
        tokenizer = model.tokenizer() if isinstance(model, FastDecoder) else model
        # Not as a module of this one: an engine's adapter does not move, and the encoder belongs to its tokenizer.
        self._encoder = () if tokenizer is None else (tokenizer.encoder,)
        self.bn, self.seed, self.options = bn, seed, dict(options)
        self._family = family_of(model.config)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def _model(self) -> Tokenizer | FastDecoder:
        if self.engine is not None:
            return self.engine
        assert self.tokenizer is not None
        return self.tokenizer

    def to(self, *args: Any, **kwargs: Any) -> TokenizerVAE:
        """As ``nn.Module.to``: moves the tokenizer, too. An engine stays what it is; InputError if it had to move."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if self.engine is not None and device is not None:
            here = self.engine.device
            if device.type != here.type or device.index not in (None, here.index):
                raise InputError(
                    f"device must be {here}, where this engine was made, got {device}: move the Tokenizer there, and "
                    "call accelerate on it"
                )
        moved: TokenizerVAE = super().to(*args, **kwargs)
        return moved

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images (B, 3, H, W) in [-1, 1] to ``.latent_dist``, with ``.mode()`` and ``.sample(generator)``.

        Families whose encoder gives no distribution have one that is a point. Raises InputError as ``Tokenizer.encode``
        and for an engine whose tokenizer is gone.
        """
        if not self._encoder:
            raise InputError(
                "encode needs the encoder, got an engine whose Tokenizer is gone: keep it until as_vae has been called"
            )
        check_strided("x", x)
        (encoder,) = self._encoder
        parameter = next(encoder.parameters(), x)
        images = x.to(parameter.device, parameter.dtype)
        self._family.check_images(images)
        check_floating_images(x)
        check_finite("images", images)
        check_image_range(images)
        posterior = getattr(encoder, "posterior", None)
        with torch.no_grad():
            if posterior is None:
                mean = encoder(images)
                logvar = torch.zeros_like(mean)
            else:
                found = posterior(images)
                mean, logvar = found.mean, found.logvar
            latents = DiagonalGaussianDistribution(torch.cat([mean, logvar], 1), deterministic=posterior is None)
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Any:
        """Latents (B, C, h, w), of any floating dtype and on any device, to ``.sample``: float32 (B, 3, H, W).

        The noise of each image comes from ``generator``, or from one each, or from the seed that ``as_vae`` was given.
        Raises InputError as the model's ``decode``.
        """
        check_strided("z", z)
        if not z.is_floating_point():
            raise InputError(f"z must be floating point, got {z.dtype}")
        z, seeds = z.to(self.device, self.dtype), self._seeds(len(z), generator)
        options = {**self.options, "tile": self.tile} if self.tile else self.options
        if self.use_slicing and len(z) > 1:
            one_by_one = zip(z.split(1), seeds.split(1), strict=True)
            images = torch.cat([self._model.decode(part, one, **options) for part, one in one_by_one])
        else:
            images = self._model.decode(z, seeds, **options)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """The reconstruction of images."""
        latents = self.encode(sample).latent_dist
        z = latents.sample(generator) if sample_posterior else latents.mode()
        return self.decode(z, return_dict, generator)

    def enable_slicing(self) -> None:
        """Decode image by image from now on. Images stay the same up to rounding."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    @property
    def use_tiling(self) -> bool:
        return self.tile > 0

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """From now on decode images larger than about ``config.sample_size`` in overlapping tiles of that side.

        This is ``FastDecoder.decode`` with ``tile``: less memory, other images (docs/memory.md). Raises InputError for
        a Tokenizer, which decodes whole images, and for a family that has no tiles.
        """
        if not use_tiling:
            self.tile = 0
            return
        if self.engine is None:
            raise InputError("enable_tiling needs an engine: as_vae(accelerate(tokenizer))")
        if not isinstance(self.engine.program, AnySize):
            raise InputError(f"enable_tiling: {self.engine.config.family} decodes whole images only")
        least = self.engine.program.min_tile
        self.tile = max(1, self.engine.config.image_size // least) * least

    def disable_tiling(self) -> None:
        """Decode images whole again."""
        self.enable_tiling(False)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: diffusers could not load it again."""
        raise InputError(
            "a pipeline cannot be saved with a tokenizer as its VAE: save the Tokenizer with its own save_pretrained, "
            "and give as_vae of it to the pipeline's from_pretrained as vae="
        )

    def _seeds(self, batch: int, generator: Any) -> Tensor:
        if generator is None:
            return resolve_seeds(self.seed, batch)
        generators = [generator] if isinstance(generator, torch.Generator) else generator
        if not isinstance(generators, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generators):
            raise InputError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}")
        if generators is generator and len(generators) != batch:
            raise InputError(f"generator must be one, or {batch}, one per image, got {len(generators)}")
        count = 1 if generators is generator else batch
        drawn = [torch.randint(SEED_LIMIT, (count,), generator=g, device=g.device).cpu() for g in generators]
        return torch.cat(drawn) if drawn else torch.zeros(0, dtype=torch.int64)


def _channels(config: Config) -> int:
    """Channels of spatial latents. Raises InputError for others."""
    shape = config.latent_shape
    if len(shape) != 3 or shape[0] is None or shape[1:] != (None, None):
        latents = ", ".join(map(str, shape))
        raise InputError(
            f"as_vae needs spatial latents (B, C, h, w), got {config.family} with latents (B, {latents}), which no "
            "pipeline of diffusers makes: decode them with accelerate(tokenizer).decode(z), or tokenizer.decode(z)"
        )
    return shape[0]


def _levels(config: Config, factor: int | None) -> int:
    """Entries of ``block_out_channels`` from which a pipeline computes ``factor``."""
    if factor is None:
        decoded = config.stage_shapes((1, _channels(config), 1, 1))[-1][-1]
        factor = getattr(config, "factor", decoded)
    factor = as_int("factor", factor, 1)
    if factor & (factor - 1):
        raise InputError(f"factor must be a power of two, got {factor}")
    return factor.bit_length()


def _finite(name: str, value: Any) -> float:
    number = as_number(name, value, "a finite number")
    if not math.isfinite(number):
        raise InputError(f"{name} must be a finite number, got {value!r}")
    return number


def _numbers(name: str, values: Any, count: int | None) -> list[float] | None:
    if values is None:
        return None
    try:
        numbers = [_finite(name, v) for v in (values.tolist() if hasattr(values, "tolist") else values)]
    except TypeError as e:
        raise InputError(f"{name} must be a list of numbers, got {type(values).__name__}") from e
    if count is not None and len(numbers) != count:
        raise InputError(f"{name} must have {count} numbers, one per channel, got {len(numbers)}")
    if name.endswith(("std", "var")) and min(numbers, default=0) <= 0:
        raise InputError(f"{name} must have positive numbers, got {min(numbers, default=0)!r}")
    return numbers


def _batch_norm(given: Mapping[str, Any], channels: int) -> nn.BatchNorm2d:
    """The module that pipelines read the statistics from."""
    names = {"running_mean", "running_var", "eps"}
    if not isinstance(given, Mapping) or not names - {"eps"} <= set(given) <= names:
        got = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise InputError(f"batch_norm must be a dict of running_mean, running_var and perhaps eps, got {got}")
    mean = _numbers("batch_norm's running_mean", given["running_mean"], None) or []
    var = _numbers("batch_norm's running_var", given["running_var"], len(mean)) or []
    if not mean or len(mean) % channels:
        raise InputError(f"batch_norm must have a multiple of {channels} numbers, got {len(mean)}")
    bn = nn.BatchNorm2d(len(mean), eps=_finite("batch_norm's eps", given.get("eps", 1e-5)), affine=False)
    bn.running_mean, bn.running_var = torch.tensor(mean), torch.tensor(var)
    return bn
