"""What SSDD's two recipes share: the weights of the terms, the terms beside the main one, configuration.

With x the image, eps the noise and t in [0, 1] the noise level (docs/spec.md#ssdd-training),

    x_t = (1 - t) x + t eps,   v = eps - x,   x0 = x_t - t v(x_t, t, z)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from msdd_fast.diffusion.noise import start_noise
from msdd_fast.errors import ConfigError
from msdd_fast.families.ssdd.decoder import UViTDecoder
from msdd_fast.families.ssdd.encoder import KLEncoder
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.config import RunConfig
from msdd_fast.training.loop.config import OptimConfig
from msdd_fast.training.loop.draws import Draws, Purpose
from msdd_fast.training.loop.numbers import Range, check_numbers
from msdd_fast.training.loop.objective import Critic
from msdd_fast.training.losses.perceptual import Perceptual, PerceptualName, require_perceptual
from msdd_fast.training.recipes.ssdd_alignment import Aligned, Alignment


@dataclass(frozen=True)
class SSDDObjective:
    """Weights of the terms; defaults are the authors' where they are known (docs/spec.md#ssdd-training)."""

    perceptual_weight: float = 0.5
    """Weight of the perceptual distance between x0 and the target."""
    alignment_weight: float = 0.0
    """Weight of the alignment with a backbone (the authors: 0.25)."""
    kl_weight: float = 1e-6
    """Weight of the latents' KL divergence from the unit normal, summed over an image; only if the encoder learns."""
    train_encoder: bool = True
    """If False, the encoder is frozen and its latents are still sampled. Distillation never trains it."""
    teacher_steps: int = 7
    """Euler steps of the teacher in distillation."""

    def __post_init__(self) -> None:
        weights = {name: Range(0) for name in ("perceptual_weight", "alignment_weight", "kl_weight")}
        check_numbers(self, **weights, teacher_steps=Range(1, 1000))


@dataclass(frozen=True)
class SSDDRunConfig(RunConfig):
    """Configuration of both programs; defaults are the authors' where they are known (docs/spec.md#ssdd-training)."""

    perceptual: PerceptualName = "lpips-vgg"
    """Network of the perceptual loss. "random" is untrained, for tests only."""
    objective: SSDDObjective = field(default_factory=SSDDObjective)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(grad_clip=0.1, ema_decay=0.999))


class Terms:
    """Base of both recipes: perceptual distance and alignment.

    Args:
        config: weights of the terms.
        perceptual: needed when perceptual_weight > 0.
        alignment: needed when alignment_weight > 0.

    Raises ConfigError if one of them is missing.
    """

    def __init__(
        self, config: SSDDObjective, perceptual: Perceptual | None = None, alignment: Alignment | None = None
    ) -> None:
        require_perceptual(config.perceptual_weight, perceptual)
        if config.alignment_weight > 0 and alignment is None:
            raise ConfigError("alignment_weight > 0 needs a backbone to align with")
        self.config, self.perceptual = config, perceptual
        self.alignment = alignment if config.alignment_weight > 0 else None

    @property
    def critic(self) -> Critic | None:
        """The projection of the alignment, if there is one; the trainer's ``critic``."""
        return None if self.alignment is None else self.alignment.critic

    def velocity(self, decoder: UViTDecoder, x_t: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Velocity in float32, and the tokens to align, if any."""
        if self.alignment is None:
            return decoder(x_t, t, z).float(), None
        v, tokens = decoder.forward_with_tokens(x_t, t, z, self.alignment.layer)
        return v.float(), tokens

    def more_terms(
        self, x0: Tensor, target: Tensor, tokens: Tensor | None, images: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Aligned | None]:
        """Perceptual distance of x0 to ``target`` plus alignment of ``tokens`` with ``images``, as in ``Loss``."""
        total, metrics, aligned = x0.new_zeros(()), {}, None
        if self.config.perceptual_weight > 0:
            assert self.perceptual is not None
            term = self.perceptual(x0, target).mean()
            metrics[self.perceptual.name] = term.detach()
            total = total + self.config.perceptual_weight * term
        if self.alignment is not None:
            assert tokens is not None
            term, aligned = self.alignment.distance(tokens, images)
            metrics["alignment"] = term.detach()
            total = total + self.config.alignment_weight * term
        return total, metrics, aligned


def ssdd_parts(tokenizer: Tokenizer) -> tuple[KLEncoder, UViTDecoder]:
    """Encoder and decoder. Raises ConfigError for a tokenizer of another family."""
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    if not isinstance(encoder, KLEncoder) or not isinstance(decoder, UViTDecoder):
        raise ConfigError(f"tokenizer must be of the family ssdd, got {tokenizer.config.family}")
    return encoder, decoder


def draw_noise(like: Tensor, draws: Draws, purpose: Purpose) -> Tensor:
    """Standard normal noise, one seed per image, of the shape (B, C, H, W) and device of ``like``."""
    channels, height, width = like.shape[1:]
    # Noise is drawn in 2x2 blocks.
    even = start_noise(draws.seeds(purpose).to(like.device), (channels, height + height % 2, width + width % 2))
    return even[:, :, :height, :width]


def load_tokenizer(path: str, name: str) -> Tokenizer:
    """The SSDD checkpoint at ``path``. Raises ConfigError, which calls it ``name``, if it is of another family."""
    tokenizer = Tokenizer.from_pretrained(path)
    if tokenizer.config.family != "ssdd":
        raise ConfigError(f"{name} must be of the family ssdd, got {path}")
    return tokenizer
