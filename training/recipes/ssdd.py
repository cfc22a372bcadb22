"""Training of SSDD tokenizers: flow matching, and distillation into one step (docs/spec.md#ssdd-training).

Both are recipes for ``trainer.Trainer``. With x the image, eps the noise and t in [0, 1] the noise level,

    x_t = (1 - t) x + t eps,   v = eps - x,   x0 = x_t - t v(x_t, t, z)

flow matching learns v at random t; distillation fixes t = 1 and learns the picture that the teacher decodes in several
steps from the same z and the same eps. Either may add a perceptual distance of x0 and the alignment of the
transformer's tokens with a given backbone's (REPA).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from msdd_fast.commands.reconstruction import reconstruction_grid
from msdd_fast.diffusion.config import SamplingConfig
from msdd_fast.diffusion.noise import start_noise
from msdd_fast.errors import ConfigError
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.families.ssdd.decoder import UViTDecoder
from msdd_fast.families.ssdd.encoder import KLEncoder
from msdd_fast.io.images import grid_image
from msdd_fast.sampling import sample
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.loop.draws import Draws, Purpose
from msdd_fast.training.loop.trainer import AdamConfig, Critic
from msdd_fast.training.losses.perceptual import Perceptual

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_COSINE_EPS = 1e-5


class Backbone(Protocol):
    """A frozen network whose patch tokens the decoder's tokens are aligned with, such as DINOv2."""

    patch_size: int
    width: int

    def __call__(self, images: Tensor) -> Tensor:
        """ImageNet-normalised (B, 3, patch_size * h, patch_size * w) to (B, h * w, width), row-major."""


@dataclass(frozen=True)
class SSDDObjective:
    """Weights of the terms. Defaults are the authors' where they are known."""

    perceptual_weight: float = 0.5
    """Of the perceptual distance of x0 and the target."""
    alignment_weight: float = 0.0
    """Of one minus the cosine with the backbone's tokens (the authors': 0.25)."""
    kl_weight: float = 1e-6
    """Of the latents' divergence from the unit normal, a sum over an image; only where the encoder learns."""
    train_encoder: bool = True
    """False: the encoder stays as it is, and its latents are still sampled. Distillation never trains it."""
    teacher_steps: int = 7
    """Euler steps of the teacher, in distillation."""

    def __post_init__(self) -> None:
        for name in ("perceptual_weight", "alignment_weight", "kl_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.teacher_steps < 1:
            raise ConfigError(f"teacher_steps must be at least 1, got {self.teacher_steps}")


class Alignment:
    """REPA: one minus the mean cosine of a learned map of the decoder's tokens and the backbone's.

    The map learns as a ``trainer.Critic``: its gradient is that of the same loss, its optimiser and clipping its own.

    Args:
        backbone: frozen; not part of any checkpoint.
        model: the tokenizer's config.
        optim: of the map.
    """

    def __init__(self, backbone: Backbone, model: SSDDConfig, optim: AdamConfig | None = None) -> None:
        channels = model.decoder.widths[-1]
        self.backbone, self.layer = backbone, min(4, model.decoder.mid_layers // 2)
        self.head = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, backbone.width))
        self.critic = Critic(self.head, self._critic_loss, optim or AdamConfig())
        self._pairs: list[tuple[int, Tensor, Tensor]] = []

    def distance(self, tokens: Tensor, images: Tensor, step: int) -> Tensor:
        """Of tokens (B, h * w, C) of a map that covers images (B, 3, 8 h, 8 w) in [-1, 1]; no gradient to the head."""
        features = self.features(images)
        self._pairs = [p for p in self._pairs if p[0] == step]
        self._pairs.append((step, tokens.detach(), features))
        with self._frozen():
            return cosine_distance(self.head(tokens), features)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The backbone's tokens, one for each of the decoder's."""
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        size = [s // 8 * self.backbone.patch_size for s in images.shape[-2:]]
        x = ((images + 1) / 2 - mean) / std
        return self.backbone(F.interpolate(x, size=size, mode="bicubic", align_corners=False))

    def _critic_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """On all micro-batches of the last step."""
        tokens, features = (torch.cat([pair[i] for pair in self._pairs]) for i in (1, 2))
        self._pairs.clear()
        return cosine_distance(self.head(tokens), features), {}

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        self.head.requires_grad_(False)
        try:
            yield
        finally:
            self.head.requires_grad_(True)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """One minus the mean cosine along the last axis."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=-1, eps=_COSINE_EPS).mean()


class _Recipe:
    """What both recipes share: the terms beside the main one."""

    def __init__(
        self,
        config: SSDDObjective,
        preview: Tensor | None = None,
        perceptual: Perceptual | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        if config.perceptual_weight > 0 and perceptual is None:
            raise ConfigError("perceptual_weight > 0 needs a perceptual distance; give its weights file")
        if config.alignment_weight > 0 and alignment is None:
            raise ConfigError("alignment_weight > 0 needs a backbone to align with")
        self.config, self.preview, self.perceptual = config, preview, perceptual
        self.alignment = alignment if config.alignment_weight > 0 else None

    @property
    def critic(self) -> Critic | None:
        """For the trainer: the head of the alignment, if there is one."""
        return None if self.alignment is None else self.alignment.critic

    def velocity(self, decoder: UViTDecoder, x_t: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """float32, and the tokens to align."""
        if self.alignment is None:
            return decoder(x_t, t, z).float(), None
        v, tokens = decoder.forward_with_tokens(x_t, t, z, self.alignment.layer)
        return v.float(), tokens

    def more_terms(
        self, x0: Tensor, target: Tensor, tokens: Tensor | None, images: Tensor, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Perceptual distance of the clean estimate to ``target``, alignment of the tokens with ``images``."""
        total, figures = x0.new_zeros(()), {}
        if self.config.perceptual_weight > 0:
            assert self.perceptual is not None
            term = self.perceptual(x0, target).mean()
            figures[self.perceptual.name] = term.detach()
            total = total + self.config.perceptual_weight * term
        if self.alignment is not None:
            assert tokens is not None
            term = self.alignment.distance(tokens, images, draws.step)
            figures["alignment"] = term.detach()
            total = total + self.config.alignment_weight * term
        return total, figures


class SSDDRecipe(_Recipe):
    """Flow matching of decoder and, unless it is frozen, encoder; ``preview`` (B, 3, H, W) appears in the pictures."""

    def loss(self, tokenizer: Tokenizer, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of images (B, 3, H, W) in [-1, 1], a mean over them, and detached figures."""
        config, images = self.config, images.float()
        encoder, decoder = parts(tokenizer)
        with torch.set_grad_enabled(config.train_encoder and torch.is_grad_enabled()):
            posterior = encoder.posterior(images)
            z = posterior.sample(draw_noise(posterior.mean, draws, Purpose.LATENT_NOISE))
        noise = draw_noise(images, draws, Purpose.NOISE)
        t = draws.normal(Purpose.TIME).sigmoid().to(images.device)
        tt = t[:, None, None, None]
        x_t = (1 - tt) * images + tt * noise
        v, tokens = self.velocity(decoder, x_t, t, z)
        mse = F.mse_loss(v, noise - images)
        more, figures = self.more_terms(x_t - tt * v, images, tokens, images, draws)
        figures["mse"] = mse.detach()
        total = mse + more
        if config.train_encoder and config.kl_weight > 0:
            kl = posterior.kl().mean()
            figures["kl"] = kl.detach()
            total = total + config.kl_weight * kl
        return total, figures

    def picture(self, tokenizer: Tokenizer) -> Image.Image | None:
        return None if self.preview is None else reconstruction_grid(tokenizer, self.preview)


class SSDDDistillation(_Recipe):
    """One step of the student learns ``teacher_steps`` of the frozen ``teacher``, from the same z and the same noise.

    Args:
        teacher: decodes without gradients; its encoder gives the mode z of the image for both.
        others: as of ``SSDDRecipe``. The perceptual distance is to the teacher's picture, alignment to the real image.
    """

    def __init__(
        self,
        config: SSDDObjective,
        teacher: Tokenizer,
        preview: Tensor | None = None,
        perceptual: Perceptual | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        super().__init__(config, preview, perceptual, alignment)
        parts(teacher)
        self.teacher = teacher.eval().requires_grad_(False)
        self._teacher_preview: Tensor | None = None

    def loss(self, tokenizer: Tokenizer, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the student on images (B, 3, H, W) in [-1, 1], and detached figures."""
        images = images.float()
        _, decoder = parts(tokenizer)
        noise = draw_noise(images, draws, Purpose.NOISE)
        with torch.no_grad():
            z = self.teacher.encoder(images)
            target = self.decode(z, noise)
        v, tokens = self.velocity(decoder, noise, torch.ones(len(images), device=images.device), z)
        x0 = noise - v
        mse = F.mse_loss(x0, target)
        more, figures = self.more_terms(x0, target, tokens, images, draws)
        return mse + more, {**figures, "mse": mse.detach()}

    def decode(self, z: Tensor, noise: Tensor) -> Tensor:
        """The teacher's picture."""
        x = sample(self.teacher.decoder, z, self.teacher.schedule, steps=self.config.teacher_steps, noise=[noise])
        assert isinstance(x, Tensor)
        return x

    @torch.no_grad()
    def picture(self, tokenizer: Tokenizer) -> Image.Image | None:
        """Original, teacher and student of the preview images, one row each."""
        if self.preview is None:
            return None
        z = tokenizer.encode(self.preview)
        if self._teacher_preview is None:
            self._teacher_preview = self.teacher.decode(z, steps=self.config.teacher_steps)
        student = tokenizer.decode(z, steps=1)
        rows = [list(row) for row in zip(self.preview, self._teacher_preview, student, strict=True)]
        return grid_image(rows, self.preview.shape[-1])


def parts(tokenizer: Tokenizer) -> tuple[KLEncoder, UViTDecoder]:
    """Encoder and decoder of an SSDD tokenizer. Raises ConfigError for one of another family."""
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    if not isinstance(encoder, KLEncoder) or not isinstance(decoder, UViTDecoder):
        raise ConfigError(f"tokenizer must be of the family ssdd, got {tokenizer.config.family}")
    return encoder, decoder


def draw_noise(like: Tensor, draws: Draws, purpose: Purpose) -> Tensor:
    """Unit normals of one seed per image; shape (B, C, H, W) and device of ``like``."""
    channels, height, width = like.shape[1:]
    # Noise comes in 2x2 blocks.
    even = start_noise(draws.seeds(purpose).to(like.device), (channels, height + height % 2, width + width % 2))
    return even[:, :, :height, :width]


def trainable(tokenizer: Tokenizer, objective: SSDDObjective) -> Tokenizer:
    """``tokenizer`` with gradients for what ``SSDDRecipe`` trains."""
    tokenizer.requires_grad_(True)
    tokenizer.encoder.requires_grad_(objective.train_encoder)
    return tokenizer


def one_step_student(teacher: Tokenizer) -> Tokenizer:
    """A copy of the teacher that decodes in one step and whose encoder is frozen."""
    student = copy.deepcopy(teacher)
    student.config = dataclasses.replace(student.config, sampling=SamplingConfig(steps=1))
    student.requires_grad_(True)
    student.encoder.requires_grad_(False)
    return student
