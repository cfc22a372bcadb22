"""Adversarial losses and their adaptive weight (docs/spec.md#adversarial)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.training.loop.distributed import mean_over_processes

AdversarialLoss = Literal["hinge", "log"]


def generator_loss(fake: Tensor, kind: AdversarialLoss) -> Tensor:
    """The student's loss, from the discriminator's logits of its images, of any shape.

    "hinge": -mean(D) (the authors' code). "log": -mean(log sigmoid(D)), the paper's log loss in its
    non-saturating form.
    """
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: AdversarialLoss) -> Tensor:
    """The discriminator's loss, from its logits of real images and of the student's.

    "hinge": (mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2 (the authors' code).
    "log": -(mean log sigmoid(D(real)) + mean log(1 - sigmoid(D(fake)))) / 2 (the paper).
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def adaptive_weight(regression: Tensor, adversarial: Tensor, parameter: Tensor) -> Tensor:
    """|d regression / dW| / (|d adversarial / dW| + 1e-4), at most 1e4, with W = ``parameter``.

    Balances the gradients of the two losses at the student's final layer. Detached; the graph is kept for the backward
    pass that follows. The gradients are averaged over all processes.
    """
    (a,) = torch.autograd.grad(regression, parameter, retain_graph=True)
    (b,) = torch.autograd.grad(adversarial, parameter, retain_graph=True)
    a, b = mean_over_processes(torch.stack([a.float(), b.float()]))
    return (a.norm() / (b.norm() + 1e-4)).clamp(0.0, 1e4).detach()
