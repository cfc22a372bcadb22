"""The Hugging Face hub, through huggingface_hub (extra ``[hub]``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from msdd_fast.errors import CheckpointError, InputError

_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")
_FILES = ("config.json", "model.safetensors.index.json", "model*.safetensors")


def is_repository(name: str) -> bool:
    """Whether ``name`` looks like ``owner/name``."""
    return _REPOSITORY.fullmatch(name) is not None


def check_subfolder(subfolder: str | None) -> str | None:
    """``subfolder`` without slashes at its ends. Raises InputError for a path that leaves the repository."""
    if subfolder is None:
        return None
    if not isinstance(subfolder, str) or not subfolder.strip("/") or "\0" in subfolder or "\\" in subfolder:
        raise InputError(f"subfolder must be a relative path such as 'decoder', got {subfolder!r}")
    parts = subfolder.rstrip("/").split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InputError(f"subfolder must be a relative path inside the repository, got {subfolder!r}")
    return "/".join(parts)


def download(
    repository: str,
    revision: str | None = None,
    subfolder: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The folder with the checkpoint of a repository, in the cache of huggingface_hub.

    Raises CheckpointError if it cannot be had; the message says why.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise CheckpointError(
            f"no directory {repository!r}; to load it from the Hugging Face hub: pip install 'msdd-fast[hub]'"
        ) from e
    prefix = "" if subfolder is None else f"{subfolder}/"
    try:
        snapshot = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[prefix + name for name in _FILES],
            local_files_only=local_files_only,
            token=token,
        )
    except Exception as e:  # the hub raises many types: network, authentication, missing repository
        where = "its cache does not have it" if local_files_only else "the Hugging Face hub did not give it"
        raise CheckpointError(f"no directory {repository!r}, and {where}: {e}") from e
    return Path(snapshot, subfolder or "")


def upload(
    folder: Path,
    repository: str,
    *,
    card: str | None,
    replace_card: bool,
    revision: str | None = None,
    subfolder: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    message: str = "Upload a tokenizer of msdd-fast",
) -> str:
    """Commit the checkpoint in ``folder`` to a repository, which is made if there is none; the commit's address.

    One commit adds the files and removes those of an older checkpoint in the same place. ``card`` becomes README.md,
    unless there is one and ``replace_card`` is not set.

    Raises CheckpointError if the hub does not take it; then there is no commit.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as e:
        raise CheckpointError("push_to_hub needs huggingface_hub: pip install 'msdd-fast[hub]'") from e
    api: Any = HfApi(token=token)
    prefix = "" if subfolder is None else f"{subfolder}/"
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if card is not None and (
            replace_card or not api.file_exists(repository, f"{prefix}README.md", revision=revision)
        ):
            (folder / "README.md").write_text(card, encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            path_in_repo=subfolder,
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
            # A second name of the only shard, for programs that look for it in a folder.
            ignore_patterns=["model.safetensors"],
            delete_patterns=["model*.safetensors", "model.safetensors.index.json"],
        )
    except Exception as e:
        raise CheckpointError(f"the Hugging Face hub did not take {repository!r}: {e}") from e
    return str(commit.commit_url)
