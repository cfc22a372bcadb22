"""What FastDecoder has to know of a tokenizer's family: how to build its program, and what to say of it."""

from __future__ import annotations

from msdd_fast.families.base import Family
from msdd_fast.families.msdd.family import MSDDFamily
from msdd_fast.families.presets import AnyConfig
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.families.ssdd.family import SSDDFamily


def family_of(config: AnyConfig) -> Family:
    return SSDDFamily(config) if isinstance(config, SSDDConfig) else MSDDFamily(config)
