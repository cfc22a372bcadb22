"""What the loop asks of a recipe, and the forward pass that DistributedDataParallel wraps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.config import AdamConfig
from msdd_fast.training.loop.distributed import world_size
from msdd_fast.training.loop.draws import Draws


@dataclass(frozen=True)
class Loss:
    """Loss of a micro-batch. Unpacks as ``value, metrics``, a pair that a recipe may return in its place.

    Attributes:
        value: scalar, a mean over the images.
        metrics: detached, of any shape (also empty); the log has the mean of all elements of a step.
        for_critic: whatever the critic's loss needs of this micro-batch, detached.
    """

    value: Tensor
    metrics: dict[str, Tensor]
    for_critic: Any = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.value, self.metrics))

    def __getitem__(self, index: int) -> Any:
        return (self.value, self.metrics)[index]


class Recipe(Protocol):
    """An objective."""

    def loss(self, tokenizer: Tokenizer, images: Tensor, draws: Draws) -> Loss | tuple[Tensor, dict[str, Tensor]]:
        """Loss of images (B, 3, H, W) in [-1, 1]; every random number comes from ``draws``."""
        ...

    def preview(self, tokenizer: Tokenizer, images: Tensor) -> list[Tensor]:
        """Columns of the sample grid beside the originals ``images``, each (B, 3, h, w) in [-1, 1]."""
        ...


@dataclass(frozen=True)
class Critic:
    """A second network that learns in turn with the tokenizer: one step after each of the tokenizer's."""

    module: nn.Module
    loss: Callable[[Sequence[Any]], Loss]
    """Its loss, given ``Loss.for_critic`` of every micro-batch of the step."""
    optim: AdamConfig


class Objective(nn.Module):
    """A loss as the forward pass of the module that it trains, which is what DistributedDataParallel wraps."""

    def __init__(self, module: nn.Module, loss: Callable[..., Loss | tuple[Tensor, dict[str, Tensor]]]) -> None:
        super().__init__()
        self.module, self._loss = module, loss

    def forward(self, *args: Any) -> Loss:
        loss = self._loss(*args)
        return loss if isinstance(loss, Loss) else Loss(*loss)


def distribute(objective: Objective) -> nn.Module:
    """The objective with gradients averaged over the processes, if there are several."""
    if world_size() == 1:
        return objective
    # Buffers (the vectors of spectral norms) are functions of the weights, so they are equal in all processes. torch
    # 2.13 renamed the option that synchronises them.
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
    return DistributedDataParallel(objective, **options)
