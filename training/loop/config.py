"""Configuration of the optimisers and of the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from msdd_fast.training.loop.guard import GuardConfig
from msdd_fast.training.loop.numbers import MOST_IMAGES, MOST_STEPS, Range, check_numbers


@dataclass(frozen=True)
class AdamConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 500
    min_lr_ratio: float = 0.1
    """The cosine ends at this fraction of ``lr``."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    """Decoupled; applied to matrices only."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0: any."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            lr=Range(0, 1e3, open_low=True),
            warmup_steps=Range(0, MOST_STEPS),
            min_lr_ratio=Range(0, 1),
            betas=Range(0, 1, open_high=True),
            weight_decay=Range(0),
            grad_clip=Range(0),
        )


@dataclass(frozen=True)
class OptimConfig(AdamConfig):
    """Optimiser of the tokenizer, and the moving average of its weights."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon" orthogonalises the updates of the blocks' matrices; all other parameters stay with AdamW."""
    ema_decay: float = 0.9999
    """Upper bound; early on the decay is (1 + step) / (10 + step). 0: no averaging."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, ema_decay=Range(0, 1))


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, on which device, and what to write when."""

    steps: int = 100_000
    batch_size: int = 32
    """Images per optimiser step, over all processes."""
    micro_batch: int | None = None
    """Images per forward pass of a process; gradients accumulate over a step. Default: its share of the batch."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the blocks and recompute the rest in the backward pass: about a third more time."""
    compile: bool = False
    """torch.compile of the blocks."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16: autocast with float32 weights. On CPUs without bf16 instructions float32 is faster."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 2
    """Data-loading processes."""
    seed: int = 0
    log_every: int = 10
    """Steps between two lines of the log, which also has the first step and the last; 0: no log."""
    sample_every: int = 1000
    """Steps between two sample grids and, with a validation folder, two validations; 0: none."""
    checkpoint_every: int = 1000
    """Steps between two saved states; 0: a state is saved only when the run is stopped."""
    keep: int = 2
    """How many of the newest states to keep, besides the one with the best validation metric."""
    strict: bool = False
    """Stop at the first unreadable image instead of skipping it."""
    tensorboard: bool = False
    """Write the metrics to OUT/tensorboard, too (needs tensorboard)."""
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        check_numbers(
            self,
            steps=Range(1, MOST_STEPS),
            batch_size=Range(1, MOST_IMAGES),
            micro_batch=Range(1, MOST_IMAGES),
            workers=Range(0, 4096),
            seed=Range(0, 2**63 - 1),
            log_every=Range(0, MOST_STEPS),
            sample_every=Range(0, MOST_STEPS),
            checkpoint_every=Range(0, MOST_STEPS),
            keep=Range(1, MOST_STEPS),
        )
