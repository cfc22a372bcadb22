"""Pointer arithmetic of a compiled Triton kernel: which offsets could overflow 32 bits."""

from __future__ import annotations

import re


def crossing_offsets(ttir: str, arguments: list[str], within: tuple[str, ...]) -> tuple[int, int]:
    """Pointer offsets that reach other images or rows: how many are 64 bits wide, and how many sums may overflow.

    An offset reaches them if it depends on the program's index along an axis of the grid that is not in ``within``, or
    on an argument called stride_*. Such a value must not be added, subtracted, multiplied or shifted in 32 bits, nor be
    cut to 32 bits: each operation that does so is counted. What is loaded is data, and the outcome of a comparison a
    bit: neither is an offset.
    """
    names = re.findall(r"(%\w+): ", next(line for line in ttir.splitlines() if "tt.func public" in line))
    crossing = {name for name, argument in zip(names, arguments, strict=True) if argument.startswith("stride_")}
    wide = narrow = 0
    for line in ttir.splitlines():
        found = re.match(r"\s*(%[\w:]+) = \"?([\w.]+)\"?(.*)", re.sub(r" loc\(.*", "", line))
        if not found:
            continue
        result, operation, rest = found[1].split(":")[0], found[2], found[3]
        operands, _, kind = rest.rpartition(" : ")
        used = re.findall(r"%\w+", operands)
        if operation == "tt.get_program_id":
            if operands.split()[0] not in within:
                crossing.add(result)
        elif operation == "tt.addptr":
            wide += used[1] in crossing and "i64" in kind
        elif operation not in ("tt.load", "arith.cmpi") and "!tt.ptr" not in kind and crossing & set(used):
            crossing.add(result)
            sums = ("arith.addi", "arith.subi", "arith.muli", "arith.shli")
            narrow += (operation in sums and "i64" not in kind) or operation == "arith.trunci"
    return wide, narrow
