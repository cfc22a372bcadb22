"""The tokenizer: encoder, decoder and schedule under one roof."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from msdd_fast import checkpoint
from msdd_fast.diffusion.checks import (
    check_finite,
    check_floating_images,
    check_image_range,
    check_latents,
    check_sampling,
)
from msdd_fast.diffusion.config import Config, num_parameters
from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.errors import ConfigError, InputError
from msdd_fast.families import families, family_of, get_family, get_preset
from msdd_fast.families.base import Conditioned, conditions_of
from msdd_fast.sampling import StageResult, VelocityModel, sample


def check_memory(config: Config) -> None:
    """Raise ConfigError if float32 weights of ``config`` cannot be in this machine's memory, where they would be."""
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # another system
        return
    count = num_parameters(config)
    needed = 4 * count
    if torch.get_default_device().type == "cpu" and needed > there:
        raise ConfigError(
            f"config asks for {count:,} parameters, {needed / 1e9:.0f} GB in float32, got a machine of "
            f"{there / 1e9:.0f} GB"
        )


class Tokenizer(nn.Module):
    """Images to latents and back, of the family that ``config.family`` names.

    ``encode`` and ``decode`` run the model as it is written, op by op. The fused ops take their best backend
    (``backends.use_backend``); under ``use_backend("eager")`` everything is plain PyTorch, which is the specification
    that every fast path is tested against.

    Attributes:
        config: every size and choice; ``diffusion.config.Config`` says what all families' configs have.
        encoder: images (B, 3, H, W) to latents.
        decoder: (x_t, t, z) to the velocity, of the shape of x_t.
        schedule: the stages of a decode.
    """

    encoder: nn.Module
    decoder: nn.Module
    schedule: StageSchedule

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        check_memory(config)
        try:
            self.encoder, self.decoder = family_of(config).build()
        except (MemoryError, RuntimeError) as e:
            if isinstance(e, MemoryError) or "not enough memory" in str(e) or "out of memory" in str(e):
                raise ConfigError(f"config: {num_parameters(config):,} parameters do not fit into memory") from e
            raise
        self.schedule = StageSchedule(config.schedule)

    @classmethod
    def from_config(cls, config: str | Config) -> Tokenizer:
        """Random weights from a preset name ("msdd-d12", "ssdd-m-f8c4", ...) or a config. In eval mode."""
        return cls(get_preset(config) if isinstance(config, str) else config).eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Tokenizer:
        """Load a bundled name ("msdd-nano-256"), a directory, or a Hugging Face hub id. In eval mode, float32.

        Args:
            name_or_path: what starts with ``.``, ``/`` or ``~``, or with the name of a directory that exists here, is a
                directory; otherwise a hub id is ``owner/name`` (extra ``[hub]``).
            revision: branch, tag or commit of a hub id.
            subfolder: of the directory or the repository.
            local_files_only: take a hub id from the cache and ask nobody.
            token: of the hub; None for that of ``hf auth login``, False for none. It is not sent for a directory.

        Raises CheckpointError if there is no such checkpoint, or it is damaged or contradicts its config; InputError
        for a revision of a directory or a subfolder that leaves it.
        """
        options = {"subfolder": subfolder, "local_files_only": local_files_only, "token": token}
        return cls.from_stored(*checkpoint.read_pretrained(name_or_path, revision=revision, **options))

    @classmethod
    def from_released_checkpoint(
        cls, family: str, path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any], **options: Any
    ) -> Tokenizer:
        """Weights as a family's authors publish them. In eval mode, float32. Nothing in a file is executed.

        Args:
            family: name of the family ("msdd", "ssdd", ...).
            path_or_state_dict: a .safetensors or .pt file, or a state dict.
            options: what no shape shows, as the family's ``released.load`` takes it.

        Raises CheckpointError for a foreign or damaged file and for one with a missing, unexpected or misshapen tensor;
        InputError for a family without a released format.
        """
        released = get_family(family).released
        if released is None:
            raise InputError(f"family must have a released format, got {family!r}")
        found = released.load(path_or_state_dict, **options)
        return cls.from_stored(found.config, found.tensors, found.source)

    @classmethod
    def from_authors_checkpoint(
        cls,
        path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
        weights: str = "ema",
        image_size: int = 256,
        num_stages: int = 4,
    ) -> Tokenizer:
        """A checkpoint of the MSDD authors' code (docs/spec.md#authors-checkpoint).

        ``weights`` is "ema" or "model"; ``image_size`` and ``num_stages`` are not stored in the file. Otherwise as
        ``from_released_checkpoint``.
        """
        options = {"weights": weights, "image_size": image_size, "num_stages": num_stages}
        return cls.from_released_checkpoint("msdd", path_or_state_dict, **options)

    @classmethod
    def from_ssdd_checkpoint(
        cls,
        path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
        image_size: int = 256,
        steps: int = 8,
        groups: int = 32,
    ) -> Tokenizer:
        """SSDD's released weights (docs/spec.md#ssdd-network).

        ``image_size`` is the side of the crops that the command line takes, ``steps`` what ``decode`` takes by default
        (1 for distilled weights), ``groups`` that of the decoder's GroupNorms (32 in all released weights). Otherwise
        as ``from_released_checkpoint``.
        """
        options = {"image_size": image_size, "steps": steps, "groups": groups}
        return cls.from_released_checkpoint("ssdd", path_or_state_dict, **options)

    @classmethod
    def from_pid_checkpoint(
        cls, path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any], variant: str | Config = ""
    ) -> Tokenizer:
        """PiD's released weights (docs/pid.md#weights).

        ``variant`` names them ("flux", "sd3", "v15-flux2", "v15-flux-undistilled", ...), since shapes do not show whose
        latents they decode; it may be left out where they do. A config is for networks of other sizes. Otherwise as
        ``from_released_checkpoint``.
        """
        return cls.from_released_checkpoint("pid", path_or_state_dict, variant=variant)

    @classmethod
    def from_stored(cls, config: Config, tensors: dict[str, Tensor], source: str) -> Tokenizer:
        """A tokenizer of ``config`` with ``tensors`` as its float32 weights. In eval mode.

        Raises CheckpointError that names ``source`` and what is missing, unexpected or misshapen.
        """
        # Parameters are not initialised twice: build without storage, then take the file's tensors.
        with torch.device("meta"):
            tokenizer = cls(config)
        checkpoint.load_state(tokenizer, tensors, source)
        return tokenizer.eval()

    def save_pretrained(self, directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json and sharded safetensors atomically. See ``checkpoint.save_pretrained``."""
        checkpoint.save_pretrained(self, directory, **kwargs)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Commit the checkpoint and a model card to a repository of the Hugging Face hub; returns the commit's address.

        Args:
            repository: ``owner/name``; made if there is none.
            options:
                metrics: reports of ``msdd-fast eval --json`` for the card, one or several: dicts or files.
                card: README.md, instead of the generated one, which never replaces one that is there.
                license: identifier for the card, such as "apache-2.0".
                revision: branch, made if there is none.
                subfolder: of the repository.
                private, create_pr, token, message: as ``huggingface_hub`` takes them.
                dtype, max_shard_bytes: as of ``save_pretrained``.

        One commit adds the files and removes those of an older checkpoint, so readers see one or the other. Raises
        InputError for a bad argument and CheckpointError if the weights would not load again, both before anything is
        sent, and CheckpointError if the hub does not take them.
        """
        return checkpoint.push_to_hub(self, repository, **options)

    def export_released(self, path: str | os.PathLike[str]) -> None:
        """Write one .safetensors file that the code of the family's authors loads.

        Raises InputError for a family without such an export, CheckpointError if the file cannot be written.
        """
        released = get_family(self.config.family).released
        if released is None or released.export is None:
            exporting = [name for name, f in families().items() if f.released is not None and f.released.export]
            raise InputError(f"tokenizer must be of the family {' or '.join(exporting)}, got {self.config.family}")
        checkpoint.write_safetensors(released.export(self.state_dict()), path)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def forward(self, images: Tensor, seed: int | Sequence[int] | Tensor = 0) -> Tensor:
        """The reconstruction, ``decode(encode(images), seed)``. Arguments, results and errors as of those."""
        return self.decode(self.encode(images), seed)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of images (B, 3, H, W), float in [-1, 1].

        MSDD: H = W = config.image_size -> (B, num_latent_tokens, latent_dim). SSDD: sides that are multiples of
        config.factor -> (B, latent_channels, H/factor, W/factor), the mode of the Gaussian that ``encoder.posterior``
        gives.

        Raises InputError for another shape, an integer dtype, NaN/Inf, or values beyond 1.5; warns once of images that
        are in [0, 1].
        """
        family_of(self.config).check_images(images)
        check_floating_images(images)
        check_finite("images", images)
        check_image_range(images)
        z: Tensor = self.encoder(images)
        return z

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        seed: int | Sequence[int] | Tensor = 0,
        steps: int | None = None,
        cfg_scale: float | None = None,
        noise: Sequence[Tensor] | None = None,
        stage_callback: Callable[[StageResult], None] | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Images of latents: float32 (B, 3, H, W), nominally in [-1, 1], not clamped; shapes as in ``encode``.

        ``steps`` and ``cfg_scale`` default to ``config.sampling``; the other arguments are those of
        ``sampling.sample``. ``conditions`` are what else the family's decodes depend on (PiD: text, sigma, height,
        width, null_text; docs/pid.md). Raises InputError for a wrong shape or dtype and for NaN/Inf in z.
        """
        sampling, family = self.config.sampling, family_of(self.config)
        check_latents(z, *self.config.latent_shape)
        check_finite("z", z)
        steps, cfg_scale = check_sampling(
            sampling.steps if steps is None else steps, sampling.cfg_scale if cfg_scale is None else cfg_scale
        )
        others = conditions_of(family, z, steps, cfg_scale, conditions)
        options: dict[str, Any] = {
            **{"steps": steps, "cfg_scale": cfg_scale, "seed": seed},
            **{"noise": noise, "stage_callback": stage_callback},
        }
        if isinstance(family, Conditioned):
            return family.sample(self.decoder, z, others, **options)
        out = sample(cast(VelocityModel, self.decoder), z, self.schedule, **options)
        assert isinstance(out, Tensor)
        return out


def as_tokenizer(given: Any) -> Tokenizer:
    """``given``, or what ``Tokenizer.from_pretrained`` loads if it is a name or a path.

    Raises InputError for anything else, and for a tokenizer without data.
    """
    if isinstance(given, (str, os.PathLike)):
        return Tokenizer.from_pretrained(given)
    if not isinstance(given, Tokenizer):
        raise InputError(f"tokenizer must be a Tokenizer or the name of one, got {type(given).__name__}")
    if given.device.type == "meta":
        raise InputError("tokenizer must have its weights on a CPU or a GPU, got the meta device, which has no data")
    return given
