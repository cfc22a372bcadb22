"""The sampler: from noise to pixels, coarse to fine (docs/spec.md#sampler), or in one stage
(docs/spec.md#ssdd-schedule)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from msdd_fast import ops, profiling
from msdd_fast.diffusion.checks import check_guidance, check_latents, check_noise, check_sampling
from msdd_fast.diffusion.config import Config
from msdd_fast.diffusion.noise import resolve_seeds
from msdd_fast.diffusion.schedule import Stage, StageSchedule
from msdd_fast.errors import InputError
from msdd_fast.ops.renoise_upsample import renoise_upsample_with


class VelocityModel(Protocol):
    """A decoder of any family."""

    @property
    def config(self) -> Config: ...

    def __call__(self, x_t: Tensor, t: Tensor, z: Tensor | None) -> Tensor:
        """Velocity (B, 3, H, W) of the state x_t (B, 3, H, W) at model time t (B,) in (0, 1]; z None: null context."""
        ...


class StageResult:
    """What ``stage_callback`` receives when a stage is done.

    Attributes:
        stage: index of the stage.
        state: float32 (B, 3, H, H); still noisy at level end_t unless it is the last stage.
    """

    stage: int
    state: Tensor

    def __init__(self, stage: Stage, state: Tensor, x_t: Tensor, v: Tensor, t: float) -> None:
        self.stage, self.state = stage.index, state
        self._last_step = (x_t, v, t, stage)

    @cached_property
    def clean(self) -> Tensor:
        """Estimate of the clean image at this scale, from the stage's last evaluation; computed when asked for."""
        return clean_estimate(*self._last_step)


def sample(
    decoder: VelocityModel,
    z: Tensor,
    schedule: StageSchedule,
    *,
    steps: int = 1,
    cfg_scale: float = 1.0,
    seed: int | Sequence[int] | Tensor = 0,
    noise: Sequence[Tensor] | None = None,
    return_stages: bool = False,
    stage_callback: Callable[[StageResult], None] | None = None,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Decode latents to an image.

    Args:
        z: (B, num_latent_tokens, latent_dim) latent tokens, or for SSDD (B, latent_channels, H/factor, W/factor).
        steps: Euler steps per stage, at least 1.
        cfg_scale: 1 evaluates the network once per step; any other scale >= 0 applies
            v = v_null + cfg_scale * (v_z - v_null) (paper Eq. 4) with two evaluations. SSDD takes 1 only.
        seed: an int (image i uses seed + i) or one int per image, in [0, 2^63). Ignored with ``noise``.
        noise: one tensor per stage, (B, 3, H_s, W_s): noise[0] is the start, noise[s] the term that beta
            multiplies at the start of stage s.
        return_stages: return the list of the states at the end of every stage instead of the last one.
        stage_callback: called with a StageResult as soon as each stage is done.
        backend: of the ops; None leaves the choice to ``backends.use_backend``, MSDD_FAST_BACKEND or "auto".

    Returns float32 (B, 3, H, W), not clamped. Differentiable. Raises InputError for bad arguments.
    """
    cfg = decoder.config
    steps, cfg_scale = check_sampling(steps, cfg_scale)
    check_guidance(cfg, cfg_scale)
    check_latents(z, *cfg.latent_shape)
    if len(schedule) != cfg.schedule.num_stages:
        raise InputError(
            f"schedule must have {cfg.schedule.num_stages} stages as the decoder's config, got {len(schedule)}"
        )
    batch, device = len(z), z.device
    shapes = cfg.stage_shapes(z.shape)
    if noise is None:
        seeds = resolve_seeds(seed, batch, device)
    else:
        check_noise(noise, batch, shapes)

    states: list[Tensor] = []
    x = ops.start_noise(seeds, shapes[0], backend=backend) if noise is None else noise[0].float()
    for stage in profiling.ranges(schedule.stages, lambda i: f"scale {shapes[i][-1]}"):
        s = stage.index
        if s > 0:
            if noise is None:
                rho = schedule.config.block_correlation
                x = ops.renoise_upsample(x, stage.alpha, stage.beta, seeds, s, rho, backend=backend)
            else:
                x = renoise_upsample_with(x, stage.alpha, stage.beta, noise[s].float())
        model_times, t = schedule.time_grid(s, steps)
        for i in range(steps):
            v = velocity(decoder, x, model_times[i].to(device).expand(batch), z, cfg_scale, backend)
            dt = (t[i + 1] - t[i]).to(device)  # a tensor: torch.export reads no values
            x_before, x = x, ops.euler_step(x, v, dt, backend=backend)
        states.append(x)
        if stage_callback is not None:
            stage_callback(StageResult(stage, x, x_before, v, float(t[steps - 1])))
    return states if return_stages else x


def velocity(
    decoder: VelocityModel, x: Tensor, t: Tensor, z: Tensor, cfg_scale: float, backend: str | None = None
) -> Tensor:
    """Velocity with classifier-free guidance (docs/spec.md#cfg; paper Eq. 4); float32."""
    v = decoder(x, t, z).float()
    if cfg_scale != 1.0:
        v = ops.cfg_combine(v, decoder(x, t, None).float(), cfg_scale, backend=backend)
    return v


def clean_estimate(x_t: Tensor, v: Tensor, t: float, stage: Stage) -> Tensor:
    """The clean image of a stage seen from ``x_t`` at within-stage time ``t`` with velocity ``v``.

    The line through x_t with slope v gives both ends of the stage, S = x_t + (1-t) v at level start_t
    and E = x_t - t v at level end_t. They share one noise; in the mean over 2x2 blocks the clean image
    of both is the same, which gives it and the noise's block mean; that in turn removes the noise from
    the fine detail (docs/spec.md#clean-estimate).
    """
    s0, e = stage.start_t, stage.end_t
    start, end = x_t + (1.0 - t) * v, x_t - t * v
    if e == 0.0:
        return end
    start_mean, end_mean = F.avg_pool2d(start, 2), F.avg_pool2d(end, 2)
    # (1-s0) X + s0 m = S and (1-e) X + e m = E, by Cramer's rule.
    clean_mean = (end_mean * s0 - start_mean * e) / (s0 * (1.0 - e) - e * (1.0 - s0))
    detail = (end - _up(end_mean)) - (e / s0) * (start - _up(start_mean))
    return _up(clean_mean) + detail / (1.0 - e)


def _up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
