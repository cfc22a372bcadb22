"""Muon: momentum SGD whose matrix updates are orthogonalised (Jordan et al., 2024).

``torch.optim.Muon`` orthogonalises in bfloat16, which is several times slower than float32 on CPUs without bf16
instructions; here the dtype is what is fast (``engine.compute``). Fused projections (q, k and v stacked in rows) are
orthogonalised one square part at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from msdd_fast.engine.compute import compute_dtype
from msdd_fast.training.loop.distributed import broadcast, rank, world_size

# Quintic Newton-Schulz coefficients with the steepest slope at zero; singular values end near 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly (singular values about 0.7 to 1.2): (..., m, n), same shape."""
    x = matrices.to(compute_dtype(torch.bfloat16, matrices.device)[0])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def orthogonalize_together(matrices: Sequence[Tensor]) -> list[Tensor]:
    """``orthogonalize`` of each, which all processes have: each does its share of the work and sends its results."""
    world, out = world_size(), list(matrices)
    by_size = sorted(range(len(out)), key=lambda i: -out[i].numel())  # so that shares are of about one size
    for i in by_size[rank() :: world]:
        out[i] = orthogonalize(out[i])
    if world > 1:
        for process in range(world):
            share = by_size[process::world]
            for i, result in zip(share, broadcast([out[i] for i in share], process), strict=True):
                out[i] = result
    return out


class Muon(torch.optim.Optimizer):
    """Muon for 2-D parameters, with AdamW-sized updates (root mean square 0.2 lr per element).

    Args:
        params: matrices (out, in). If ``out`` is a multiple of ``in`` greater than one, each square block of
            rows is a separate projection and orthogonalised on its own.
        lr: learning rate, on the scale of AdamW's.
        momentum: Nesterov momentum.
        weight_decay: decoupled.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            directions = [self._direction(p, group["momentum"]) for p in params]
            for p, update in zip(params, orthogonalize_together(directions), strict=True):
                scale = 0.2 * max(update.shape[-2:]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)
        return loss

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        """Nesterov's direction for a matrix, as its projections (parts, rows, columns)."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        rows, cols = p.shape
        parts = rows // cols if rows % cols == 0 else 1
        return p.grad.lerp(state["momentum"], momentum).view(parts, -1, cols)
