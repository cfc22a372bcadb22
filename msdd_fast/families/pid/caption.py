"""Caption features for PiD: the last hidden state of Gemma 2 (2B, instruction-tuned) over a template and the caption.

The model is optional (``pip install 'msdd-fast[pid]'``) and never downloaded here: give a folder that holds it. It is
needed once per caption; ``save_features`` keeps the result, so that decoding needs neither model nor transformers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.io.files import as_path
from msdd_fast.io.packages import optional
from msdd_fast.io.safetensors import read_safetensors, write_safetensors

KEY = "text"
ROWS = 300
# What the weights were trained with: the instruction of SANA's pipeline in diffusers (Apache-2.0), with double quotes
# in its first line.
TEMPLATE = "\n".join(
    (
        'Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions suitable for '
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    )
)


class CaptionEncoder:
    """Captions to features (B, 300, width). Run it once, save what it gives, and drop it to free its memory.

    Args:
        tokenizer, model: of transformers: a Gemma 2 tokenizer and the ``Gemma2Model`` without its language head.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.tokenizer.padding_side = "right"

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> CaptionEncoder:
        """The model of a folder as ``save_pretrained`` of transformers writes it; no network is used.

        Raises InputError if transformers is not installed, CheckpointError if the folder does not hold such a model.
        """
        as_path("folder", folder)
        if not Path(folder).is_dir():
            raise CheckpointError(f"{folder} is not a folder; download Gemma 2 (2B, instruction-tuned) into one first")
        with optional("transformers", "pid"):
            from transformers import AutoModel, AutoTokenizer
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
        except (OSError, ValueError, ImportError) as e:
            raise CheckpointError(f"{folder} holds no language model that transformers reads: {e}") from e
        return cls(tokenizer, model.eval().to(device))

    @torch.no_grad()
    def encode(self, captions: str | Sequence[str]) -> Tensor:
        """Features (B, 300, width) in the model's dtype: the first token's row, and the last 299.

        Each text is padded to one length. The padding's rows are part of the features: PiD knows no mask.
        """
        texts = [TEMPLATE + c for c in ([captions] if isinstance(captions, str) else captions)]
        length = len(self.tokenizer(TEMPLATE)["input_ids"]) + ROWS - 2
        tokens = self.tokenizer(
            texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.model.device)
        hidden: Tensor = self.model(**tokens).last_hidden_state
        return torch.cat([hidden[:, :1], hidden[:, 1 - ROWS :]], dim=1)


def save_features(features: Tensor, path: str | os.PathLike[str]) -> None:
    """Write caption features (T, width) or (B, T, width) to a safetensors file. Raises InputError if it cannot."""
    if not isinstance(features, Tensor) or features.ndim not in (2, 3) or not features.is_floating_point():
        raise InputError("features must be a floating point tensor (T, width) or (B, T, width)")
    write_safetensors({KEY: features}, path)


def load_features(path: str | os.PathLike[str]) -> Tensor:
    """Caption features (B, T, width) of a file that ``save_features`` wrote.

    Raises InputError for a missing, damaged or foreign file.
    """
    as_path(KEY, path)
    try:
        tensors = read_safetensors(Path(path))
    except CheckpointError as e:
        raise InputError(f"text: {e}") from e
    features = tensors.get(KEY)
    if features is None or features.ndim not in (2, 3) or not features.is_floating_point():
        raise InputError(f"{path} must hold caption features {KEY!r}, (T, width) or (B, T, width)")
    return features[None] if features.ndim == 2 else features
