"""What a CUDA binary holds, by the disassemblers in Triton's wheel: registers, stack and instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path


def disassemble(cubin: bytes) -> tuple[list[str], int, int]:
    """SASS instructions (NOP padding left out), registers per thread, stack bytes."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", f.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([tools / "nvdisasm", "-c", f.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {usage.stdout}{usage.stderr}")
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)"
    instructions = [i for i in re.findall(pattern, sass.stdout, re.M) if i != "NOP"]
    return instructions, int(found[1]), int(found[2])


def widest(instructions: list[str], kind: str) -> int:
    """Bits of the widest global load ("LDG") or store ("STG"); 0 if there is none."""
    widths = [
        32 if not (m := re.search(r"\.(8|16|64|128)\b|\.[US](8|16)\b", i)) else int(m[1] or m[2])
        for i in instructions
        if i.startswith(kind)
    ]
    return max(widths, default=0)
