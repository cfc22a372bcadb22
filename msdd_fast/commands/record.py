"""The record of a run that can be continued: what its results depend on, in a JSON file beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.io.files import read_json
from msdd_fast.io.json_files import write_json
from msdd_fast.tokenizer import Tokenizer


def digest(text: str, tensors: Mapping[str, Tensor] | None = None) -> str:
    """Of a text, and of the names, dtypes, shapes and bits of tensors: 16 hexadecimal digits."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted((tensors or {}).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def read_record(path: Path) -> dict[str, Any] | None:
    """None if there is none that can be read."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def decode_options(
    latents: str,
    tokenizer: Tokenizer,
    seed: int,
    steps: int,
    cfg_scale: float,
    dtype: str,
    computed_in: torch.dtype | str,
) -> dict[str, Any]:
    """Everything that pictures depend on, other than by rounding; ``latents`` is the digest of those."""
    return {
        "latents": latents,
        "model": digest(tokenizer.config.to_json(), tokenizer.decoder.state_dict()),
        "seed": seed,
        "steps": steps,
        "cfg_scale": cfg_scale,
        "dtype": dtype,
        "computed_in": str(computed_in).removeprefix("torch."),
    }


def claim(mine: dict[str, Any], file: Path, targets: list[Path], overwrite: bool) -> None:
    """Write the options down before the first picture.

    Raises InputError if pictures are there that other options, or nobody knows which, have given. With ``overwrite``
    those pictures are removed first: a run that is interrupted must not leave them to be taken for its own.
    """
    theirs = read_record(file)
    if theirs == mine:
        return
    there = [path for path in targets if path.exists()]
    if there and not overwrite:
        if theirs is not None:
            differ = [f"{k} {theirs.get(k)!r} instead of {v!r}" for k, v in mine.items() if theirs.get(k) != v]
            reason = f"was decoded with {', '.join(differ) or 'other options'}"
        else:
            reason = f"is there, and {file} does not say how it was decoded"
        raise InputError(f"{there[0]} {reason}; give --overwrite to decode again, or another --out")
    try:
        for path in there:
            path.unlink()
    except OSError as e:
        raise InputError(f"cannot write {there[0]}: {e.strerror or e}") from e
    write_json(file, mine)
