"""Checkpoints: our format (config.json + sharded safetensors) and the hub.

A checkpoint is a directory: ``config.json`` holds the tokenizer's config, ``model.safetensors.index.json`` says in
which file each tensor is, and ``model-HASH.safetensors`` are those files, named after their content. The index also has
the SHA-256 of every file. Directories of version 0.1 have no index, or one without hashes and files of fixed names.

Saving writes every file atomically into the directory, the index last, and then removes files of the older checkpoint.
A reader sees the old checkpoint or the new one, never a mixture: it reads again when a file is gone, or has another
hash, because the index has changed meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from msdd_fast import _moved
from msdd_fast.diffusion.config import Config, num_parameters
from msdd_fast.errors import CheckpointError, ConfigError, InputError
from msdd_fast.families import config_from_dict, family_name, family_of
from msdd_fast.families.card import model_card
from msdd_fast.io import hub, safetensors
from msdd_fast.io.files import as_path, atomic_write, parse_json, read_limited, temporary_sibling
from msdd_fast.io.safetensors import read_safetensors, read_shapes, weight_fault

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ASSETS = Path(__file__).parent / "assets"
_SHARD = r"model-[0-9a-f]{16}\.safetensors"
_WEIGHTS = re.compile(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{_SHARD}|model\.safetensors\.index\.json")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.(safetensors|json)|\.tmp\w{6}")  # ours, and those of the safetensors package
# What a directory may hold before its first checkpoint: a fresh clone, a mounted disk, or a save that was killed.
_HARMLESS = re.compile(rf"\..*|README.*|LICEN[CS]E.*|lost\+found|{_SHARD}", re.IGNORECASE)
_ATTEMPTS = 100


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


def read_pretrained(name_or_path: str | os.PathLike[str], **options: Any) -> Stored:
    """A bundled name, a local directory or a hub id; options as of ``resolve_directory``."""
    return read_directory(resolve_directory(name_or_path, **options))


def resolve_directory(
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    subfolder: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Directory of a bundled name, a local directory or a hub id ``owner/name``. See ``Tokenizer.from_pretrained``.

    What starts with ``.``, ``/`` or ``~``, or in a directory that exists here, is never asked of the hub. Raises
    CheckpointError if there is no such directory, InputError for a revision of a local one or a bad subfolder.
    """
    as_path("name_or_path", name_or_path)
    subfolder = hub.check_subfolder(subfolder)
    name = os.fspath(name_or_path)
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    try:
        local = path if path.is_dir() else ASSETS / name if name in bundled_names() else None
        is_path = (
            isinstance(name_or_path, os.PathLike) or path.exists() or (path.parent != Path() and path.parent.exists())
        )
    except OSError as e:
        raise CheckpointError(f"no checkpoint {name[:200]!r}: {e.strerror or e}") from e
    if local is not None:
        if revision is not None:
            raise InputError(f"revision is for checkpoints of the Hugging Face hub, got {revision!r} with {local}")
        return local / (subfolder or "")
    if not is_path and hub.is_repository(name):
        return hub.download(name, revision, subfolder, local_files_only, token)
    raise CheckpointError(
        f"no checkpoint {name!r}: expected a directory, a hub id 'owner/name' or a bundled name "
        f"({', '.join(bundled_names()) or 'none bundled'})"
    )


class _Index(NamedTuple):
    """Which tensor is in which file. Without an index file: all in one file of a fixed name.

    Attributes:
        files: the names of the tensors in each file; None for all that it has.
        sha256: of files of the directory; empty in checkpoints of version 0.1.
        config: while a save is writing a config.json that differs from the older one, the new one's content.
    """

    files: dict[str, list[str] | None]
    sha256: dict[str, str]
    config: Any


def read_directory(directory: Path) -> Stored:
    """The checkpoint in a directory, which somebody else may be replacing. Raises CheckpointError."""
    for _ in range(_ATTEMPTS):
        stamp = _stamp(directory)
        try:
            index = _read_index(directory)
            config, certain = _read_config(directory, index)
            tensors = _read_weights(directory, index, num_parameters(config))
        except CheckpointError:
            if _stamp(directory) == stamp:
                raise
            continue
        # Without hashes that prove it, what was read belongs together if no save has begun or ended meanwhile.
        if (certain and set(index.files) <= set(index.sha256)) or _stamp(directory) == stamp:
            return Stored(config, tensors, str(directory))
    raise CheckpointError(f"{directory} was replaced {_ATTEMPTS} times while it was read")


def load_config(directory: Path) -> Config:
    """Read and validate the config of a checkpoint directory."""
    return _read_config(directory, _read_index(directory))[0]


def _stamp(directory: Path) -> tuple[int, int, int] | None:
    """Differs between any two index files; None without one."""
    try:
        status = (directory / INDEX_FILE).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_index(directory: Path) -> _Index:
    path = directory / INDEX_FILE
    try:
        data = parse_json(read_limited(path))
        weight_map, metadata = data["weight_map"], data.get("metadata", {})
        files: dict[str, list[str] | None] = {}
        for file in sorted(set(weight_map.values())):
            files[file] = [name for name, place in weight_map.items() if place == file]
        index = _Index(files, dict(metadata.get("sha256", {})), metadata.get("config"))
    except FileNotFoundError:
        return _Index({WEIGHTS_FILE: None}, {}, None)
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as e:
        raise CheckpointError(f"{path} is not a safetensors index: {e}") from e
    for file in index.files:
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{path}: shard names must be plain file names, got {file!r}")
    return index


def _read_config(directory: Path, index: _Index) -> tuple[Config, bool]:
    """The config, and whether it is certain to be that of the index. (One that was edited by hand is not.)"""
    path = directory / CONFIG_FILE
    if index.config is not None:
        return _config(index.config, directory / INDEX_FILE), True
    try:
        text = read_limited(path)
        data = parse_json(text)
    except FileNotFoundError as e:
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {CONFIG_FILE}") from e
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}") from e
    return _config(data, path), hashlib.sha256(text).hexdigest() == index.sha256.get(CONFIG_FILE)


def _config(data: Any, path: Path) -> Config:
    try:
        return config_from_dict(data)
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e}") from e


def _read_weights(directory: Path, index: _Index, expected: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory, as stored; ``expected`` is the number of parameters of its config.

    Headers and sizes are compared before any tensor is read.
    """
    tensors: dict[str, Tensor] = {}
    count = 0
    for file, names in index.files.items():
        shapes = read_shapes(directory / file)
        count += sum(torch.Size(shape).numel() for shape in shapes.values())
        if names is not None and set(names) != set(shapes):
            stray = sorted(set(names) ^ set(shapes))[0]
            where = "is not in it, as the index says" if stray in names else "is in it, but not in the index"
            raise CheckpointError(f"{directory / file}: {stray} {where}")
    if expected > 2 * count:  # less of a difference is told name by name, when the model has been built
        raise CheckpointError(
            f"{directory}: weights do not match the config, which asks for {expected:,} parameters, got {count:,}"
        )
    for file in index.files:
        if file in index.sha256 and _sha256(directory / file) != index.sha256[file]:
            raise CheckpointError(f"{directory / file} is damaged: its SHA-256 is not that in {INDEX_FILE}")
        tensors.update(read_safetensors(directory / file))
    return tensors


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while block := f.read(2**20):
                digest.update(block)
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} is missing") from e
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from e
    return digest.hexdigest()


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put ``tensors`` into the model as float32 on the CPU. Raises CheckpointError that names what does not match, or
    is not dense, floating point and finite."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    _check(expected, tensors, source, torch.float32)
    module.load_state_dict({n: t.detach().to("cpu", torch.float32) for n, t in tensors.items()}, assign=True)


def _check(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], source: str, dtype: torch.dtype
) -> None:
    """Raise CheckpointError that names tensors that are missing, unexpected, misshapen, or no weights."""
    problems = [f"missing {n} {tuple(expected[n])}" for n in sorted(set(expected) - set(tensors))]
    problems += [f"unexpected {n} {_shape(tensors[n])}" for n in sorted(set(tensors) - set(expected))]
    problems += [
        f"{n}: the config asks for {tuple(expected[n])}, the weights have {_shape(tensors[n])}"
        for n in sorted(set(expected) & set(tensors))
        if _shape(tensors[n]) != tuple(expected[n])
    ]
    if problems:
        raise CheckpointError(f"{source}: weights do not match the config: {_some(problems)}")
    faults = [f"{n} {fault}" for n, t in tensors.items() if (fault := weight_fault(t, dtype)) is not None]
    if faults:
        raise CheckpointError(f"{source}: {_some(faults)}")


def _shape(tensor: object) -> object:
    """For messages; weights may be anything that a file held."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return "nested" if tensor.is_nested else tuple(tensor.shape)


def _some(problems: list[str]) -> str:
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return f"{'; '.join(problems[:5])}{more}"


def save_pretrained(
    model: Model,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 2 * 10**9,
) -> None:
    """Write a checkpoint into a directory, which is made if needed; replaces an older checkpoint, keeps foreign files.

    Readers see the old checkpoint or the new one at every moment, and so does whoever comes after a crash. Names that
    ``torch.compile`` and ``DistributedDataParallel`` lengthen are stored without their additions.

    Raises InputError if the destination is a file or holds other files and no checkpoint; CheckpointError if the
    weights would not load again, in which case nothing is touched, or if it cannot be written.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype must be floating point, got {dtype}")
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes must be a positive integer, got {max_shard_bytes!r}")
    target = check_destination(directory)
    weights = _weights_of(model, dtype)
    try:
        is_new = not target.exists()
        target.mkdir(parents=True, exist_ok=True)
        with _only_writer(target):
            _write(model.config, weights, target, dtype, max_shard_bytes, is_new)
    except (OSError, InputError) as e:
        cause = e.__cause__ or e
        raise CheckpointError(f"cannot write {target}: {getattr(cause, 'strerror', None) or cause}") from e


def push_to_hub(
    model: Model,
    repository: str,
    *,
    metrics: str | os.PathLike[str] | Mapping[str, Any] | Sequence[str | os.PathLike[str] | Mapping[str, Any]] = (),
    card: str | None = None,
    license: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    message: str = "Upload a tokenizer of msdd-fast",
    **saving: Any,
) -> str:
    """Commit ``model`` to a repository of the Hugging Face hub, as ``save_pretrained`` writes it; the commit's address.

    See ``Tokenizer.push_to_hub``. The checkpoint is checked and written to a temporary folder before anything is sent.
    """
    if not isinstance(repository, str) or not hub.is_repository(repository):
        raise InputError(f"repository must be a hub id 'owner/name', got {repository!r}")
    subfolder = hub.check_subfolder(subfolder)
    reports = [_report(m) for m in metrics] if isinstance(metrics, (list, tuple)) else [_report(metrics)]
    places = {"revision": revision, "subfolder": subfolder}
    text = model_card(model.config, repository, reports, license=license, **places) if card is None else card
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, **saving)
        return hub.upload(
            Path(folder),
            repository,
            card=text,
            replace_card=card is not None,
            private=private,
            create_pr=create_pr,
            token=token,
            message=message,
            **places,
        )


def _report(metrics: Any) -> Any:
    """What ``msdd-fast eval --json`` has written, or such a report itself."""
    if not isinstance(metrics, (str, os.PathLike)):
        return metrics
    try:
        return parse_json(read_limited(metrics))
    except (OSError, ValueError) as e:
        raise InputError(f"metrics must be a report of `msdd-fast eval --json`, got {os.fspath(metrics)}: {e}") from e


def check_destination(directory: str | os.PathLike[str]) -> Path:
    """The real path of a directory that may be written, else InputError.

    It may be new, hold an older checkpoint, or hold nothing but hidden files, a README and a LICENSE.
    """
    as_path("directory", directory)
    try:
        target = Path(directory).resolve()
        if target.exists() and not target.is_dir():
            raise InputError(f"directory must be a directory, got the file {target}")
        foreign = target.is_dir() and any(not _HARMLESS.fullmatch(p.name) for p in target.iterdir())
        if foreign and not _is_ours(target / CONFIG_FILE):
            raise InputError(f"directory must be empty or hold an msdd-fast checkpoint, got {target} with other files")
    except OSError as e:
        raise CheckpointError(f"cannot write {directory}: {e.strerror or e}") from e
    return target


def _is_ours(config: Path) -> bool:
    """Whether this config.json was written here, by whatever version; other libraries use the name, too."""
    try:
        return family_name(parse_json(read_limited(config))) is not None
    except (OSError, ValueError):
        return False


def _weights_of(model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of ``model`` under the names that a model of its config has. Raises CheckpointError."""
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        plain = ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))
        if plain in weights:
            raise CheckpointError(f"cannot save: {plain} is there twice, once as {name}")
        if "parametrizations" in name.split("."):
            raise CheckpointError(
                f"cannot save {name}: remove parametrizations first "
                "(torch.nn.utils.parametrize.remove_parametrizations)"
            )
        weights[plain] = tensor
    with torch.device("meta"):
        parts = zip(("encoder", "decoder"), family_of(model.config).build(), strict=True)
    expected = {f"{part}.{name}": t.shape for part, module in parts for name, t in module.state_dict().items()}
    _check(expected, weights, "cannot save", dtype)
    return weights


@contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    """Waits until no other process or thread saves into ``directory``, where the file system can tell."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(
    config: Config, weights: dict[str, Tensor], target: Path, dtype: torch.dtype, max_shard_bytes: int, is_new: bool
) -> None:
    before, committed = {p.name for p in target.iterdir()}, False
    text = config.to_json().encode()
    sha256 = {CONFIG_FILE: hashlib.sha256(text).hexdigest()}
    weight_map: dict[str, str] = {}
    metadata = {"total_size": sum(t.numel() for t in weights.values()) * dtype.itemsize, "sha256": sha256}
    try:
        for names in _shards(weights, dtype, max_shard_bytes):
            file, digest = _write_shard({name: weights[name].detach().to("cpu", dtype) for name in names}, target)
            sha256[file] = digest
            weight_map.update(dict.fromkeys(names, file))
        if CONFIG_FILE not in before:
            _write_bytes(text, target / CONFIG_FILE)
        elif (target / CONFIG_FILE).read_bytes() != text:
            # Two files cannot be replaced in one step: until config.json is, the index has its content.
            _write_index(weight_map, {**metadata, "config": config.to_dict()}, target)
            committed = True
            _write_bytes(text, target / CONFIG_FILE)
        _write_index(weight_map, metadata, target)
        committed = True
    finally:
        if not committed:
            for file in ({*sha256} - before) | ({CONFIG_FILE} - before):
                (target / file).unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):
                    target.rmdir()
    for path in target.iterdir():
        stale = _WEIGHTS.fullmatch(path.name) and path.name not in {*sha256, INDEX_FILE}
        if stale or _TEMPORARY.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()
    if len(set(weight_map.values())) == 1:
        _link(target / next(iter(weight_map.values())), target / WEIGHTS_FILE)


def _link(shard: Path, alias: Path) -> None:
    """A second name for the only shard, which other programs look for; nothing here reads it beside an index."""
    temporary = temporary_sibling(alias)
    try:
        os.link(shard, temporary)
        os.replace(temporary, alias)
    except OSError:  # some file systems have no hard links
        pass
    finally:
        temporary.unlink(missing_ok=True)


def _shards(weights: Mapping[str, Tensor], dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    """The names in each file, in the model's order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        nbytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _write_shard(tensors: Mapping[str, Tensor], directory: Path) -> tuple[str, str]:
    """Name and SHA-256 of the file."""
    unnamed = temporary_sibling(directory / WEIGHTS_FILE)
    try:
        safetensors.write_safetensors(tensors, unnamed, {"format": "pt"})
        digest = _sha256(unnamed)
        file = f"model-{digest[:16]}.safetensors"
        os.replace(unnamed, directory / file)
    finally:
        unnamed.unlink(missing_ok=True)
    return file, digest


def _write_index(weight_map: Mapping[str, str], metadata: Mapping[str, Any], directory: Path) -> None:
    index = {"metadata": metadata, "weight_map": weight_map}
    _write_bytes((json.dumps(index, indent=2, sort_keys=True) + "\n").encode(), directory / INDEX_FILE)


def _write_bytes(data: bytes, path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_safetensors(tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write one file atomically. Raises CheckpointError if it cannot be written."""
    try:
        safetensors.write_safetensors(tensors, path, {"format": "pt"})
    except InputError as e:
        raise CheckpointError(str(e)) from e


def __getattr__(name: str) -> Any:
    """Functions of version 0.1 that made tokenizers."""
    return _moved.function("checkpoint", name)
