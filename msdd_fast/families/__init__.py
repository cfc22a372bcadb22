"""The families of tokenizers: one folder each, and one line here."""

from __future__ import annotations

from typing import Any

from msdd_fast.diffusion.config import Config
from msdd_fast.errors import ConfigError, InputError
from msdd_fast.families.base import Family
from msdd_fast.families.msdd.family import MSDDFamily
from msdd_fast.families.pid.family import PiDFamily
from msdd_fast.families.ssdd.family import SSDDFamily

__all__ = [
    "config_from_dict",
    "families",
    "family_name",
    "family_of",
    "get_family",
    "get_preset",
    "presets",
    "register",
]

_FAMILIES: dict[str, type[Family]] = {}


def register(family: type[Family]) -> type[Family]:
    """Make a family known; also usable as a decorator. Raises InputError if its name or a preset's is taken."""
    if family.name in _FAMILIES:
        raise InputError(f"family must have a name of its own, got {family.name!r}")
    taken = sorted(set(family.presets) & set(presets()))
    if taken:
        raise InputError(f"presets must have names of their own, got {', '.join(taken)}")
    _FAMILIES[family.name] = family
    return family


def families() -> dict[str, type[Family]]:
    """Every family by name."""
    return dict(_FAMILIES)


def get_family(name: str) -> type[Family]:
    """A family by name. Raises ConfigError that lists the names."""
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ConfigError(f"unknown family {name!r}; known: {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def family_of(config: Config) -> Family:
    """The family of ``config``, bound to it."""
    return get_family(config.family)(config)


def presets() -> dict[str, Config]:
    """Every preset of every family by name."""
    return {name: config for family in _FAMILIES.values() for name, config in family.presets.items()}


def get_preset(name: str) -> Config:
    """A preset by name. Raises ConfigError that lists the names."""
    known = presets()
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(known)}")
    return known[name]


def family_name(data: Any) -> str | None:
    """Family of a config's dict, or None if it is no config of a known family.

    A config without ``family`` is one of MSDD, which has none in its JSON; a few fields tell it from other libraries'.
    """
    if not isinstance(data, dict):
        return None
    if "family" in data:
        name = data["family"]
        return name if isinstance(name, str) and name in _FAMILIES else None
    return MSDDFamily.name if {"latent_dim", "num_latent_tokens"} <= set(data) else None


def config_from_dict(data: Any) -> Config:
    """The config that ``to_dict`` gave. Raises ConfigError for an unknown family, unknown fields and wrong types."""
    name = data["family"] if isinstance(data, dict) and "family" in data else MSDDFamily.name
    config: Config = get_family(name).config_type.from_dict(data)
    return config


register(MSDDFamily)
register(SSDDFamily)
register(PiDFamily)
