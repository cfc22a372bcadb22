"""The record of a run that can be continued: what its results depend on, in a JSON file beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.io.files import read_json
from msdd_fast.io.json_files import write_json
from msdd_fast.io.signals import raise_if_received
from msdd_fast.tokenizer import Tokenizer

ENCODE_RECORD, EVAL_RECORD = "encode.json", "eval.json"
RECORDS = (ENCODE_RECORD, EVAL_RECORD)


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


def prepare_folder(
    folder: Path, record_file: str, record: Mapping[str, Any], overwrite: bool, *, files: str, content: str
) -> None:
    """Leave ``record`` in a folder of numbered .safetensors files, and with ``overwrite`` remove those files.

    Raises InputError, with nothing removed, if the folder holds other .safetensors files or the record of another
    command, and without ``overwrite`` if its files are of another record. Messages name ``files`` and ``content``.
    """
    # Hidden files are what a killed run was writing.
    there = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("."))
    foreign = [n for n in there if not re.fullmatch(r"\d{6,}\.safetensors", n)]
    foreign += [n for n in RECORDS if n != record_file and (folder / n).exists()]
    if foreign:
        raise InputError(f"{folder} must hold nothing but {files} of this command, got {foreign[0]}")
    if overwrite:
        raise_if_received()
        for name in there:
            (folder / name).unlink()
    elif there:
        before = read_record(folder / record_file) or {}
        plain = json.loads(json.dumps(record))  # as it comes back from the file
        differ = [name for name, value in plain.items() if before.get(name) != value]
        if differ:
            other = ", ".join(differ)
            raise InputError(
                f"{folder} holds {content} of another run (other {other}): use --overwrite, or another folder"
            )
    write_json(folder / record_file, record)


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


@contextmanager
def kept_with_results(file: Path, results: Sequence[Path]) -> Iterator[None]:
    """Remove the record ``file`` if the block writes it and fails before any of the results is there, and its folder if
    the block made that. A record that was there before stays: it may be another run's.
    """
    new, new_folder = not file.exists(), not file.parent.exists()
    try:
        yield
    except BaseException:
        if new and not any(path.exists() for path in results):
            file.unlink(missing_ok=True)
            if new_folder:
                with suppress(OSError):  # something else is in it
                    file.parent.rmdir()
        raise


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
            names = [k for k in {**mine, **theirs} if theirs.get(k) != mine.get(k)]
            differ = ", ".join(f"{k} {theirs.get(k)!r} instead of {mine.get(k)!r}" for k in names)
            reason = f"was decoded with {differ or 'other options'}"
        else:
            reason = f"is there, and {file} does not say how it was decoded"
        raise InputError(f"{there[0]} {reason}; give --overwrite to decode again, or another --out")
    raise_if_received()
    try:
        for path in there:
            path.unlink()
    except OSError as e:
        raise InputError(f"cannot write {there[0]}: {e.strerror or e}") from e
    write_json(file, mine)
