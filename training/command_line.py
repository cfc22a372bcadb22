"""Command line of the training programs: ``msdd-fast train`` and ``msdd-fast distill``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from msdd_fast.checkpoint import load_config, resolve_directory
from msdd_fast.errors import ConfigError, InputError
from msdd_fast.families import get_preset
from msdd_fast.training.config import C, config_names, config_path, read_config
from msdd_fast.training.run import Command, find_spec, train


def run_command(command: Command, description: str, arguments: Sequence[str]) -> None:
    """Run the training program of ``command`` for the family that the arguments name.

    The family is that of the checkpoint ``--start``, else of ``--preset`` (train), or of ``--teacher`` (distill).
    Raises ConfigError if the first two differ.
    """
    kind = find_spec(command, _family(command, arguments)).load()
    train(parse_config(kind, f"msdd-fast {command}", description, arguments))


def _family(command: Command, arguments: Sequence[str]) -> str | None:
    checkpoint = parse_option(arguments, "start" if command == "train" else "teacher")
    family = None if checkpoint is None else load_config(resolve_directory(checkpoint)).family
    preset = parse_option(arguments, "preset") if command == "train" else None
    expected = None if preset is None else get_preset(preset).family
    if family and expected and family != expected:
        raise ConfigError(f"start must be of the family {expected}, as the preset {preset!r} is, got {checkpoint}")
    return family or expected


def parse_config(kind: type[C], program: str, description: str, arguments: Sequence[str]) -> C:
    """The configuration ``kind`` from a command line: ``--config FILE`` gives defaults, other options the fields."""
    try:
        import tyro
    except ImportError as e:
        raise InputError("training options need tyro: pip install 'msdd-fast[train]'") from e
    path, rest = parse_config_path(arguments)
    default: Any = None if path is None else read_config(kind, path, tyro.MISSING)
    text = (
        f"{description} --config FILE takes the defaults from a JSON file, such as the config.json of a run, or from "
        f"one of {', '.join(config_names())}. Under torchrun the processes share every batch."
    )
    config: C = tyro.cli(kind, prog=program, description=text, default=default, args=rest)
    return config


def parse_config_path(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of ``--config`` and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(arguments)
    return known.config, rest


def parse_option(arguments: Sequence[str], name: str) -> str | None:
    """The value of ``--name``, else that of the field in the ``--config`` file, else None."""
    path, rest = parse_config_path(arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    value = getattr(parser.parse_known_args(rest)[0], name)
    if value is None and path is not None:
        try:
            value = json.loads(config_path(path).read_text()).get(name)
        except (OSError, ValueError, AttributeError):  # read_config reports it
            value = None
    return value if isinstance(value, str) else None
