"""Command-line arguments that the commands and the benchmarks share. Does not import PyTorch before a device is asked
for, so that help is fast."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from msdd_fast.errors import InputError
from msdd_fast.io.threads import limit_threads

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")
_BYTES = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("b", 1000), ("ib", 1024))
}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number >= 0, got {text}")
    return value


def byte_size(text: str) -> int:
    """Bytes of a size such as 2GiB, 1.5 GB or 4096. KiB, MiB, GiB and TiB count in 1024, kB, MB, GB and TB in 1000."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([a-z]*)", text.strip().lower())
    size = int(Fraction(found[1]) * _BYTES[found[2]]) if found and found[2] in _BYTES else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 2GiB, 500MB or a number of bytes, got {text!r}")
    return size


def dtype_name(text: str) -> str:
    """A name in DTYPES. The short ones of version 0.1 warn."""
    if text in _SHORT:
        _warn(f"--dtype {text} is now --dtype {_SHORT[text]}")
    return _SHORT.get(text, text)


def renamed(words: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """``words`` with the options of version 0.1 under their new names, each with a warning."""
    new: list[str] = []
    for i, word in enumerate(words):
        if word == "--":
            return [*new, *words[i:]]
        name, equals, value = word.partition("=")
        if name in names:
            _warn(f"{name} is now {names[name]}")
            word = f"{names[name]}{equals}{value}"
        new.append(word)
    return new


def pick_device(name: str | None) -> torch.device:
    """The device of that name (default: cuda if there is one, else cpu); PyTorch's threads are limited to usable cores.

    Raises InputError if the device does not work here.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as e:  # a device that is unknown, absent, or holds no data
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"--device must name a torch device that works here, got {name!r}: {reason}") from e
    limit_threads()
    return device


def _warn(message: str) -> None:
    print(f"msdd-fast: warning: {message}; the old name works until 0.3", file=sys.stderr)
