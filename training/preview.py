"""Columns of the sample grids."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.sampling import StageResult
from msdd_fast.tokenizer import Tokenizer


@torch.no_grad()
def stage_columns(tokenizer: Tokenizer, images: Tensor) -> list[Tensor]:
    """Reconstruction of images (B, 3, H, W): the clean estimate of every stage but the last, then the result."""
    results: list[StageResult] = []
    out = tokenizer.decode(tokenizer.encode(images), stage_callback=results.append)
    return [*(r.clean for r in results[:-1]), out]


class TeacherColumns:
    """Reconstructions by a frozen teacher and by its student.

    Args:
        teacher: decodes the first images it gets; its result is kept.
        steps, cfg_scale: of the teacher.
        student_cfg_scale: of the student, which decodes in one step per stage.
    """

    def __init__(self, teacher: Tokenizer, steps: int, cfg_scale: float = 1.0, student_cfg_scale: float = 1.0) -> None:
        self.teacher, self.steps, self.cfg_scale = teacher, steps, cfg_scale
        self.student_cfg_scale = student_cfg_scale
        self._kept: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, student: Tokenizer, images: Tensor) -> list[Tensor]:
        z = student.encode(images)
        if self._kept is None or self._kept[0] is not images:
            self._kept = images, self.teacher.decode(z, steps=self.steps, cfg_scale=self.cfg_scale)
        return [self._kept[1], student.decode(z, steps=1, cfg_scale=self.student_cfg_scale)]
