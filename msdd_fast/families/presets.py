"""Configuration: frozen dataclasses, presets, and their JSON form.

A ``TokenizerConfig`` (MSDD) or an ``SSDDConfig`` is everything needed to build a tokenizer apart from its weights; it
is what ``config.json`` beside a checkpoint holds, and its ``family`` says which of the two it is. Where MSDD's paper
and its authors' code disagree, the two choices are values of one field (docs/spec.md).
``authors_choices`` lists the values that reproduce the authors' published network.
"""

from __future__ import annotations

from typing import Any

from msdd_fast.errors import ConfigError
from msdd_fast.families.msdd.config import TokenizerConfig
from msdd_fast.families.msdd.presets import PRESETS
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.families.ssdd.presets import SSDD_PRESETS

AnyConfig = TokenizerConfig | SSDDConfig


def config_from_dict(data: Any) -> AnyConfig:
    """The config that ``to_dict`` of either family gave. Raises ConfigError for unknown fields and wrong types."""
    ssdd = isinstance(data, dict) and data.get("family") == "ssdd"
    return SSDDConfig.from_dict(data) if ssdd else TokenizerConfig.from_dict(data)


def get_preset(name: str) -> AnyConfig:
    """A preset by name. Raises ConfigError that lists the names."""
    presets: dict[str, AnyConfig] = {**PRESETS, **SSDD_PRESETS}
    if name not in presets:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(presets)}")
    return presets[name]
