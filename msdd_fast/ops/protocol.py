"""The ops as one typed object: what an engine's network and program call. See each op's module for what it does."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from msdd_fast.ops.norm_modulate import NORM_EPS


class Ops(Protocol):
    """Every op of ``msdd_fast.ops`` as a method, without ``backend``, which is fixed (``engine.bound_ops.bind``)."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def cfg_combine(self, v_cond: Tensor, v_uncond: Tensor, scale: float | Tensor) -> Tensor: ...

    def cfg_euler(
        self, x: Tensor, v_cond: Tensor, v_uncond: Tensor, scale: float | Tensor, dt: float | Tensor
    ) -> Tensor: ...

    def context_attention(self, q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None = None) -> Tensor: ...

    def euler_step(self, x: Tensor, v: Tensor, dt: float | Tensor) -> Tensor: ...

    def final_step(
        self,
        x: Tensor,
        v: Tensor,
        dt: float | Tensor,
        patch_size: int,
        out_dtype: torch.dtype,
        v_uncond: Tensor | None = None,
        scale: float | Tensor | None = None,
        *,
        channels_last: bool = False,
    ) -> Tensor: ...

    def gate_residual_norm_modulate(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        split: int | None = None,
        eps: float = NORM_EPS,
        rms_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def group_norm_modulate_silu(
        self,
        x: Tensor,
        groups: int,
        eps: float,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        silu: bool = True,
    ) -> Tensor: ...

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        packed: Tensor | None = None,
        swiglu: bool = False,
    ) -> Tensor: ...

    def norm_modulate(
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        split: int | None = None,
        eps: float = NORM_EPS,
        rms_weight: Tensor | None = None,
    ) -> Tensor: ...

    def pixel_block(
        self,
        x: Tensor,
        y: Tensor,
        s: Tensor,
        weight: Tensor,
        bias: Tensor,
        rms_weight: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        packed: Tensor | None = None,
        eps: float = NORM_EPS,
    ) -> Tensor: ...

    def pixel_modulate(
        self,
        x: Tensor,
        s: Tensor,
        weight: Tensor,
        bias: Tensor,
        rms_weight: Tensor,
        packed: Tensor | None = None,
        eps: float = NORM_EPS,
    ) -> Tensor: ...

    def qk_norm_rope(
        self,
        qkv: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor | None,
        split: int | None = None,
    ) -> Tensor: ...

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def renoise_upsample(
        self,
        x: Tensor,
        alpha: float | Tensor,
        beta: float | Tensor,
        seeds: Tensor,
        stage: int,
        correlation: float = -1.0 / 3.0,
    ) -> Tensor: ...

    def sde_step(
        self,
        x: Tensor,
        v: Tensor,
        t: float | Tensor,
        t_next: float | Tensor | None = None,
        seeds: Tensor | None = None,
        stage: int = 0,
        noise: Tensor | None = None,
        patch_size: int | None = None,
        clamp: bool = False,
    ) -> Tensor: ...

    def sigma_gate(
        self,
        x: Tensor,
        y: Tensor,
        offset: Tensor,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        rms_weight: Tensor | None = None,
        logit: Tensor | None = None,
        weight: Tensor | None = None,
        eps: float = NORM_EPS,
    ) -> tuple[Tensor, Tensor]: ...

    def stage_transition(
        self,
        x: Tensor,
        v: Tensor,
        dt: float | Tensor,
        alpha: float | Tensor,
        beta: float | Tensor,
        seeds: Tensor,
        stage: int,
        patch_size: int,
        correlation: float = -1.0 / 3.0,
        v_uncond: Tensor | None = None,
        scale: float | Tensor | None = None,
    ) -> Tensor: ...

    def start_noise(
        self,
        seeds: Tensor,
        shape: tuple[int, int, int],
        dtype: torch.dtype = torch.float32,
        patch_size: int | None = None,
    ) -> Tensor: ...

    def swiglu(self, a: Tensor, b: Tensor) -> Tensor: ...

    def window_attention(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor: ...
