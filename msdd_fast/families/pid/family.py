"""PiD, as ``families.base.Family`` asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from msdd_fast import ops
from msdd_fast.diffusion.checks import as_int, check_guidance, check_noise, check_strided
from msdd_fast.diffusion.config import Config
from msdd_fast.diffusion.noise import resolve_seeds
from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.errors import InputError
from msdd_fast.families.base import Conditions, ReleasedFormat
from msdd_fast.families.pid import sampler
from msdd_fast.families.pid.caption import load_features
from msdd_fast.families.pid.config import PiDConfig
from msdd_fast.families.pid.decoder import NoEncoder, PiDDecoder, no_encoder
from msdd_fast.families.pid.engine.network import PiDNetwork
from msdd_fast.families.pid.engine.program import PiDProgram
from msdd_fast.families.pid.engine.tables import PiDStep, pid_steps
from msdd_fast.families.pid.engine.weights import pack
from msdd_fast.families.pid.presets import PID_PRESETS
from msdd_fast.families.pid.released import RELEASED
from msdd_fast.families.pid.work import decode_work
from msdd_fast.families.work import Work
from msdd_fast.layers.linear.base import MakeLinear
from msdd_fast.ops import Ops
from msdd_fast.sampling import StageResult


class PiDFamily:
    """Latents of image generators to large images, with a caption; any size of whole patches; no encoder."""

    name: ClassVar[str] = "pid"
    config_type: ClassVar[type[Any]] = PiDConfig
    presets: ClassVar[Mapping[str, Config]] = PID_PRESETS
    released: ClassVar[ReleasedFormat | None] = RELEASED
    no_fast_tier: ClassVar[str] = "PiD's products have not been measured in 8 bits"
    condition_names: ClassVar[Mapping[str, str]] = {
        "text": "features of the caption, or a file of them (msdd_fast.families.pid.caption)",
        "sigma": "noise level of the latents",
        "height": "of the images",
        "width": "of the images",
        "null_text": "features to guide away from",
    }

    def __init__(self, config: PiDConfig) -> None:
        self.config = config

    @property
    def example(self) -> tuple[int, ...]:
        side = self.config.image_size // self.config.scale
        return self.config.latent_channels, side, side

    @property
    def model(self) -> str:
        cfg, dec = self.config, self.config.decoder
        return (
            f"PiD for {cfg.latents} latents, {dec.depth} joint layers of {dec.hidden_size}, {dec.pixel_depth} pixel "
            f"layers, x{cfg.upscale}, {cfg.image_size} px"
        )

    @property
    def constant(self) -> tuple[str, ...]:
        return (
            "all adaLN vectors of the joint layers, so that their matrices need not be kept",
            "the latents' network, its features and their half of every gate: once per image",
            "the caption's tokens, rotary tables and positions of pixels: once per image",
        )

    @property
    def no_encoder(self) -> str:
        return no_encoder(self.config)

    def describe_sampling(self, steps: int, cfg_scale: float) -> str:
        guidance = f", CFG {cfg_scale:g}" if self.config.has_null_context else ", no guidance"
        return f"{steps} step(s), {self.config.sampler}{guidance}"

    def build(self) -> tuple[NoEncoder, PiDDecoder]:
        return NoEncoder(self.config), PiDDecoder(self.config)

    def check_images(self, images: Tensor) -> None:
        raise InputError(self.no_encoder)

    # --- What a decode depends on besides the latents. ---

    def condition(
        self,
        z: Tensor,
        steps: int,
        cfg_scale: float,
        text: Tensor | str | os.PathLike[str] | None = None,
        sigma: float | Sequence[float] | Tensor = 0.0,
        height: int | None = None,
        width: int | None = None,
        null_text: Tensor | str | os.PathLike[str] | None = None,
    ) -> Conditions:
        """Text (B, T, text_width), sigma float32 (B,), and with guidance the null text, of ``decode``'s arguments.

        Args:
            text: caption features (B, T, text_width), or (1, T, text_width) or (T, text_width) for all images, or a
                file of them (``caption.save_features``). Rows from text_length on are not read.
            sigma: noise level of the latents in [0, 1], one number or one per image.
            height, width: of the images, multiples of patch_size; by default those of the latents times
                ``config.scale``. Latents are then stretched to them.
            null_text: as ``text``, what ``cfg_scale`` other than 1 guides away from.
        """
        config, batch = self.config, len(z)
        check_guidance(config, cfg_scale)
        if config.sampler != "dpm":
            sampler.distilled_times(steps)
        if text is None:
            raise InputError(
                f"text must be caption features (B, T, {config.decoder.text_width}) or a file of them; an empty "
                "caption has features, too (docs/pid.md#captions)"
            )
        tensors = [self._text("text", text, batch), _sigma(sigma, batch, z.device)]
        if cfg_scale != 1.0:
            if null_text is None:
                raise InputError(f"null_text must be given with cfg_scale={cfg_scale:g}: features to guide away from")
            tensors.append(self._text("null_text", null_text, batch))
        elif null_text is not None:
            raise InputError("null_text is for cfg_scale other than 1, got it with cfg_scale=1")
        size = tuple(
            self._side(name, given, cells)
            for name, given, cells in zip(("height", "width"), (height, width), z.shape[2:], strict=True)
        )
        return Conditions(tuple(tensors), (size[0], size[1]), sampler.count_noises(config, steps))

    def example_conditions(self) -> dict[str, Any]:
        dec = self.config.decoder
        generator = torch.Generator().manual_seed(0)
        text = torch.randn(1, dec.text_length, dec.text_width, generator=generator, dtype=torch.float32, device="cpu")
        return {"text": text, **({"null_text": -text} if self.config.sampling.cfg_scale != 1.0 else {})}

    def sample(
        self,
        decoder: PiDDecoder,
        z: Tensor,
        conditions: Conditions,
        *,
        steps: int,
        cfg_scale: float,
        seed: int | Sequence[int] | Tensor,
        noise: Sequence[Tensor] | None,
        stage_callback: Callable[[StageResult], None] | None,
    ) -> Tensor:
        text, sigma, *null_text = (t.to(z.device) for t in conditions.tensors)
        assert conditions.size is not None and conditions.noises is not None
        shape = (3, *conditions.size)
        if noise is None:
            seeds, later = resolve_seeds(seed, len(z), z.device), None
            start = ops.start_noise(seeds, shape)
        else:
            check_noise(noise, len(z), [shape] * conditions.noises)
            seeds, (start, *later) = None, (n.float() for n in noise)

        def velocity_for(text: Tensor) -> sampler.Velocity:
            return lambda x, t: decoder(x, t.to(z.device).expand(len(z)), z, text, sigma).float()

        if self.config.sampler != "dpm":
            times = sampler.distilled_times(steps)
            image, x, v = sampler.sample_distilled(velocity_for(text), start, times, self.config.sampler, seeds, later)
        else:
            null = velocity_for(null_text[0]) if null_text else None
            shift = sampler.shift_of(self.config, *conditions.size)
            image = sampler.sample_undistilled(velocity_for(text), null, cfg_scale, start, steps, shift)
            x, v = image, torch.zeros_like(image)
        if stage_callback is not None:
            stage_callback(StageResult(StageSchedule(self.config.schedule)[0], image, x, v, 0.0))
        return image

    def _text(self, name: str, text: Tensor | str | os.PathLike[str], batch: int) -> Tensor:
        """Features (batch, T, text_width), T at most text_length."""
        if isinstance(text, (str, os.PathLike)):
            text = load_features(text)
        check_strided(name, text)
        dec = self.config.decoder
        text = text[None] if text.ndim == 2 else text
        if text.ndim != 3 or text.shape[0] not in (1, batch) or text.shape[1] < 1 or text.shape[2] != dec.text_width:
            raise InputError(f"{name} must have shape ({batch}, T, {dec.text_width}), got {tuple(text.shape)}")
        if not text.is_floating_point():
            raise InputError(f"{name} must be floating point, got {text.dtype}")
        return text[:, : dec.text_length].detach().expand(batch, -1, -1)

    def _side(self, name: str, given: int | None, cells: int) -> int:
        """Pixels of the image along one side."""
        patch = self.config.decoder.patch_size
        side = cells * self.config.scale if given is None else as_int(name, given, 1)
        if side % patch:
            raise InputError(f"{name} must be a multiple of {patch}, got {side}")
        return side

    # --- The engine. ---

    def tables(self, decoder: PiDDecoder, schedule: StageSchedule, steps: int, device: torch.device) -> list[PiDStep]:
        return pid_steps(decoder, steps, device)

    def program(
        self,
        decoder: PiDDecoder,
        schedule: StageSchedule,
        tables: list[PiDStep],
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        make: MakeLinear,
    ) -> PiDProgram:
        return PiDProgram(PiDNetwork(pack(decoder, dtype, device, make, ops.swiglu), self.config, ops), tables)

    def quantizable(self, decoder: PiDDecoder) -> list[tuple[str, Tensor]]:
        return []

    def tables_memory(self, tables: list[PiDStep]) -> int:
        return sum(step.memory() for step in tables)

    def decode_work(
        self, batch: int = 1, steps: int = 1, cfg_scale: float = 1.0, itemsize: int = 2, hoisted: bool = True
    ) -> list[Work]:
        return decode_work(self.config, batch, steps, cfg_scale, itemsize, hoisted)

    def encode_work(self, batch: int = 1, itemsize: int = 2) -> list[Work]:
        raise InputError(self.no_encoder)


def _sigma(sigma: float | Sequence[float] | Tensor, batch: int, device: torch.device) -> Tensor:
    """float32 (batch,) on ``device``. Values on a GPU are taken as they are."""
    try:
        values = torch.as_tensor(sigma, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"sigma must be a number or one per image, got {sigma!r}") from e
    if values.ndim > 1 or (values.ndim == 1 and len(values) != batch):
        raise InputError(f"sigma must be a number or {batch} numbers, one per image, got shape {tuple(values.shape)}")
    if values.device.type == "cpu":
        outside = [s for s in values.view(-1).tolist() if not 0 <= s <= 1]  # NaN too
        if outside:
            raise InputError(f"sigma must be in [0, 1], got {outside[0]:g}")
    values = values.detach().to(device)
    return values.repeat(batch) if values.ndim == 0 else values
