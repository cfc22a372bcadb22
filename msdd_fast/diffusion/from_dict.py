"""Frozen dataclasses from JSON, with checked types."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from msdd_fast.errors import ConfigError


def from_dict(cls: Any, data: Any, where: str, defaults: Mapping[str, Any] | None = None) -> Any:
    """An instance of the dataclass ``cls`` from a mapping that came out of JSON.

    Args:
        cls: a dataclass of bool, int, float, str, Literal, Optional, tuples and dataclasses.
        data: the mapping; absent fields take the dataclass's defaults.
        where: what error messages call the mapping.
        defaults: values, not checked, of absent fields without a default.

    Raises ConfigError for unknown fields, wrong types and NaN or Inf.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a mapping, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ConfigError(f"{where} has unknown field {unknown[0]!r}; known: {', '.join(sorted(hints))}")
    values = {name: _coerce(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    return cls(**{**(defaults or {}), **values})


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the annotation ``kind`` has it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _coerce(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        return _coerce_tuple(arguments, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError as e:
            raise ConfigError(f"{where} must fit into a float, got {value.bit_length()} bits") from e
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be of type {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{where} must be finite, got {value!r}")
    return value


def _coerce_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if kinds[-1] is Ellipsis:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        kinds = (kinds[0],) * len(value)
    elif not isinstance(value, (list, tuple)) or len(value) != len(kinds):
        raise ConfigError(f"{where} must be a list of {len(kinds)} values, got {value!r}")
    return tuple(_coerce(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
