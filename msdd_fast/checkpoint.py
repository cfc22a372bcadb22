"""Checkpoints: our format (config.json + sharded safetensors) and the hub.

A checkpoint is a directory. ``config.json`` holds the tokenizer's config; the weights are in
``model.safetensors``, or in ``model-0000i-of-0000n.safetensors`` with ``model.safetensors.index.json``.
Directories are written beside their destination and renamed into place, so that a reader sees the old
checkpoint or the new one, never a mixture.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from msdd_fast import _moved
from msdd_fast.diffusion.config import Config
from msdd_fast.errors import CheckpointError, ConfigError, InputError
from msdd_fast.families import config_from_dict, family_name
from msdd_fast.io.files import atomic_write, temporary_sibling
from msdd_fast.io.safetensors import read_safetensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ASSETS = Path(__file__).parent / "assets"
_OUR_FILES = re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def bundled_names() -> list[str]:
    """Names of the checkpoints shipped with the package."""
    return sorted(p.parent.name for p in ASSETS.glob(f"*/{CONFIG_FILE}"))


class Stored(NamedTuple):
    """A checkpoint as it was read: the config, the tensors as stored, and what error messages call it."""

    config: Config
    tensors: dict[str, Tensor]
    source: str


class Model(Protocol):
    """What can be saved: a module with a config."""

    @property
    def config(self) -> Config: ...

    def state_dict(self) -> dict[str, Tensor]: ...


def read_pretrained(name_or_path: str | os.PathLike[str]) -> Stored:
    """A bundled name, a local directory or a hub id. See ``Tokenizer.from_pretrained``."""
    directory = resolve_directory(name_or_path)
    return Stored(load_config(directory), read_weights(directory), str(directory))


def resolve_directory(name_or_path: str | os.PathLike[str]) -> Path:
    """Directory of a bundled name, a local directory or a hub id."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    name = str(name_or_path)
    if name in bundled_names():
        return ASSETS / name
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not path.exists():
        return _download_from_hub(name)
    raise CheckpointError(
        f"no checkpoint {name!r}: expected a directory, a hub id 'owner/name' or a bundled name "
        f"({', '.join(bundled_names()) or 'none bundled'})"
    )


def _download_from_hub(repo: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise CheckpointError(
            f"no directory {repo!r}; to load it from the Hugging Face hub: pip install 'msdd-fast[hub]'"
        ) from e
    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as e:  # the hub raises many types: network, authentication, missing repository
        raise CheckpointError(f"no directory {repo!r}, and the Hugging Face hub did not give it: {e}") from e


def load_config(directory: Path) -> Config:
    """Read and validate config.json of a checkpoint directory."""
    path = directory / CONFIG_FILE
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {CONFIG_FILE}") from e
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}") from e
    try:
        return config_from_dict(data)
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e}") from e


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory, as stored.

    An index whose metadata name a bundled checkpoint as "base" holds only what differs from it: two decoders of one
    encoder need the encoder once.
    """
    index, base = directory / INDEX_FILE, None
    if index.exists():
        try:
            data = json.loads(index.read_text())
            files = sorted({str(file) for file in data["weight_map"].values()})
            base = data.get("metadata", {}).get("base")
        except (OSError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as e:
            raise CheckpointError(f"{index} is not a safetensors index: {e}") from e
    else:
        files = [WEIGHTS_FILE]
    if base is not None and (base not in bundled_names() or ASSETS / base == directory):
        names = ", ".join(bundled_names())
        raise CheckpointError(f"{index}: base must be another bundled checkpoint ({names}), got {base!r}")
    tensors: dict[str, Tensor] = {} if base is None else read_weights(ASSETS / base)
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{index}: shard names must be plain file names, got {file!r}")
        tensors.update(read_safetensors(directory / file))
    return tensors


def load_state(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Put ``tensors`` into the model as float32. Raises CheckpointError that names what does not match."""
    expected = module.state_dict()
    problems = [f"missing {n} {tuple(expected[n].shape)}" for n in sorted(set(expected) - set(tensors))]
    problems += [f"unexpected {n} {tuple(tensors[n].shape)}" for n in sorted(set(tensors) - set(expected))]
    problems += [
        f"{n}: the config asks for {tuple(expected[n].shape)}, the weights have {tuple(tensors[n].shape)}"
        for n in sorted(set(expected) & set(tensors))
        if expected[n].shape != tensors[n].shape
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"{source}: weights do not match the config: {'; '.join(problems[:5])}{more}")
    module.load_state_dict({n: t.float() for n, t in tensors.items()}, assign=True)


def save_pretrained(
    model: Model,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 2 * 10**9,
) -> None:
    """Write a checkpoint directory, atomically; replaces an older checkpoint there, keeps foreign files.

    Raises InputError if the destination is a file or a non-empty directory that is not a checkpoint,
    CheckpointError if it cannot be written.
    """
    if not dtype.is_floating_point:
        raise InputError(f"dtype must be floating point, got {dtype}")
    target = check_destination(directory)
    staging = temporary_sibling(target)
    try:
        staging.mkdir(parents=True)
        _write_weights(model, staging, dtype, max_shard_bytes)
        (staging / CONFIG_FILE).write_text(model.config.to_json())
        _swap_directory(staging, target)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"cannot write {target}: {getattr(e, 'strerror', None) or e}") from e
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_destination(directory: str | os.PathLike[str]) -> Path:
    """The real path of a directory that may be written: new, empty, or an older checkpoint; else InputError."""
    try:
        target = Path(directory).resolve()
        if target.exists() and not target.is_dir():
            raise InputError(f"directory must be a directory, got the file {target}")
        if target.is_dir() and any(target.iterdir()) and not _is_ours(target / CONFIG_FILE):
            raise InputError(f"directory must be empty or hold an msdd-fast checkpoint, got {target} with other files")
    except OSError as e:
        raise CheckpointError(f"cannot write {directory}: {e.strerror or e}") from e
    return target


def _is_ours(config: Path) -> bool:
    """Whether this config.json was written here, by whatever version; other libraries use the name, too."""
    try:
        return family_name(json.loads(config.read_text())) is not None
    except (OSError, ValueError, RecursionError):
        return False


def _write_weights(model: Model, directory: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], directory / WEIGHTS_FILE, metadata)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, directory / file, metadata)
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    total = sum(t.nbytes for shard in shards for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _swap_directory(staging: Path, target: Path) -> None:
    """Move ``staging`` to ``target``; foreign files of an older target come along."""
    if not target.exists():
        os.rename(staging, target)
        return
    for item in target.iterdir():
        if not _OUR_FILES.fullmatch(item.name):
            if item.is_dir() and not item.is_symlink():
                shutil.copytree(item, staging / item.name, symlinks=True)
            else:
                shutil.copy2(item, staging / item.name, follow_symlinks=False)
    old = temporary_sibling(target)
    os.rename(target, old)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_safetensors(tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write one file atomically. Raises CheckpointError if it cannot be written."""
    try:
        with atomic_write(path) as temporary:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, {"format": "pt"})
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from e


def __getattr__(name: str) -> Any:
    """Functions of version 0.1 that made tokenizers."""
    return _moved.function("checkpoint", name)
