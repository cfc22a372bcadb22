"""SSDD: distillation into one step (docs/spec.md#ssdd-training).

At t = 1 the student learns the image that the teacher decodes in several steps from the same z and the same noise.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.diffusion.config import SamplingConfig
from msdd_fast.sampling import sample
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.config import Components, replace_config
from msdd_fast.training.loop.draws import Draws, Purpose
from msdd_fast.training.loop.objective import Loss
from msdd_fast.training.losses.perceptual import Perceptual
from msdd_fast.training.preview import TeacherColumns
from msdd_fast.training.recipes.ssdd_alignment import Alignment
from msdd_fast.training.recipes.ssdd_objective import (
    SSDDObjective,
    SSDDRunConfig,
    Terms,
    draw_noise,
    load_tokenizer,
    ssdd_parts,
)


class SSDDDistillation(Terms):
    """One step of the student learns ``teacher_steps`` steps of the teacher, from the same z and the same noise.

    The perceptual distance is to the teacher's image, the alignment with the real one.

    Args:
        teacher: put into eval mode and frozen; its encoder gives z, the mode, for both.
        others: as of ``Terms``.
    """

    def __init__(
        self,
        config: SSDDObjective,
        teacher: Tokenizer,
        perceptual: Perceptual | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        super().__init__(config, perceptual, alignment)
        ssdd_parts(teacher)
        self.teacher = teacher.eval().requires_grad_(False)
        self._columns = TeacherColumns(teacher, config.teacher_steps)

    def loss(self, tokenizer: Tokenizer, images: Tensor, draws: Draws) -> Loss:
        images = images.float()
        _, decoder = ssdd_parts(tokenizer)
        noise = draw_noise(images, draws, Purpose.NOISE)
        with torch.no_grad():
            z = self.teacher.encoder(images)
            target = self.decode(z, noise)
        v, tokens = self.velocity(decoder, noise, torch.ones(len(images), device=images.device), z)
        x0 = noise - v
        mse = F.mse_loss(x0, target)
        more, metrics, aligned = self.more_terms(x0, target, tokens, images)
        return Loss(mse + more, {**metrics, "mse": mse.detach()}, aligned)

    def decode(self, z: Tensor, noise: Tensor) -> Tensor:
        """The teacher's image."""
        x = sample(
            ssdd_parts(self.teacher)[1], z, self.teacher.schedule, steps=self.config.teacher_steps, noise=[noise]
        )
        assert isinstance(x, Tensor)
        return x

    def preview(self, tokenizer: Tokenizer, images: Tensor) -> list[Tensor]:
        """Teacher and student."""
        return self._columns(tokenizer, images)


def one_step_student(teacher: Tokenizer) -> Tokenizer:
    """A copy of the teacher that decodes in one step, with a frozen encoder."""
    student = copy.deepcopy(teacher)
    replace_config(student, sampling=SamplingConfig(steps=1))
    student.requires_grad_(True)
    student.encoder.requires_grad_(False)
    return student


@dataclass(frozen=True, kw_only=True)
class SSDDDistillConfig(SSDDRunConfig):
    """Distillation of an SSDD tokenizer into one step (docs/spec.md#ssdd-training)."""

    teacher: str
    """Trained SSDD tokenizer: a directory or a hub id. The student starts as its copy and keeps its encoder."""

    def build(self) -> Components:
        teacher = load_tokenizer(self.teacher, "teacher").to(self.loop.device)
        perceptual = self.perceptual_distance(self.objective.perceptual_weight)
        recipe = SSDDDistillation(self.objective, teacher, perceptual)
        return Components(one_step_student(teacher), recipe, "distillation")
