"""Compile every Triton kernel ahead of time, without a GPU, and report what the compiler made of it.

    python -m msdd_fast.bench.work.aot [--json FILE] [--markdown FILE] [--dtypes bf16 ...] [--targets 80 90 gfx942 ...]

Each kernels/<op>.py exports its cases as ``AOT_CASES``. Registers, spills and shared memory come from the binary,
instructions from its disassembly. Do not set TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import pkgutil
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import msdd_fast.kernels
from msdd_fast.bench.report.text import markdown_table
from msdd_fast.bench.work.offsets import crossing_offsets
from msdd_fast.bench.work.sass import disassemble, widest
from msdd_fast.io.files import atomic_write, require_writable
from msdd_fast.io.json_files import write_json
from msdd_fast.io.program import run_program
from msdd_fast.kernels._aot import DTYPES, NVIDIA, TARGETS, AotCase

INTRO = """# Kernel report

What the compiler makes of every Triton kernel, ahead of time and without a GPU. **None of these kernels has run on a
GPU yet.** This file is generated; do not edit it:

    python -m msdd_fast.bench.work.aot --dtypes bf16 fp16 fp32 --targets 80 89 90 100 gfx942 gfx950 \\
        --markdown docs/kernel-report.md

| column | meaning |
|---|---|
| target | compute capability times ten (NVIDIA), or architecture (AMD) |
| registers | per thread |
| spills | stack bytes plus local-memory instructions; on AMD spilled registers |
| shared | bytes of shared memory per program |
| instructions | static SASS instructions of the whole kernel, without padding |
| per output | instructions divided by the elements that one thread writes |
| widest load, store | bits of the widest global access of one thread |

The bytes that each op moves are in its docstring (`msdd_fast/ops`).

By these counts the noise kernels are bound by instruction issue, not by memory. A 2x2 block of noise is four outputs,
takes about 200 instructions and moves 10 bytes in bfloat16. An H200 issues at most
132 SMs x 4 warps x 32 lanes x 1.7 GHz, or 0.14 blocks per picosecond, which is 1.4 TB/s: less than a third of its
memory bandwidth.

"""
HEADER = (
    *("kernel", "dtype", "target", "registers", "spills", "shared"),
    *("instructions", "per output", "widest load", "store"),
)
# Sizes that the launcher finds to be multiples of 16, besides pointers and strides.
ALIGNED = ("columns", "rows", "width")


class KernelCase(NamedTuple):
    """A case and the stem of the module that states it."""

    module: str
    case: AotCase

    @property
    def function(self) -> Any:
        return getattr(importlib.import_module(f"msdd_fast.kernels.{self.module}"), self.case.kernel)


@dataclass(frozen=True)
class CompiledKernel:
    """One case, dtype and target. Counts are static instructions of the whole kernel."""

    kernel: str
    variant: str
    dtype: str
    target: str
    wide_offsets: int
    narrow_offsets: int
    registers: int
    spills: int
    shared: int
    instructions: int
    instructions_per_output: float
    load_bits: int
    store_bits: int


def all_cases() -> list[KernelCase]:
    """The cases of every kernel, in the order of the modules' names."""
    modules = sorted(m.name for m in pkgutil.iter_modules(msdd_fast.kernels.__path__) if not m.name.startswith("_"))
    return [
        KernelCase(module, case)
        for module in modules
        for case in importlib.import_module(f"msdd_fast.kernels.{module}").AOT_CASES
    ]


def compile_case(found: KernelCase, dtype: str, target: str) -> CompiledKernel:
    """Compile for "80", "89", "90", "100" (NVIDIA) or "gfx942", "gfx950" (AMD: registers and spills only)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case, function, constants = found.case, found.function, found.case.constants_for(dtype)
    names = list(function.arg_names)
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.startswith(("p_", "stride_")) or n in ALIGNED
    }
    source = ASTSource(
        fn=function,
        signature=case.signature(names, dtype),
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs=aligned,
    )
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target), 32)
    kernel = triton.compile(source, target=gpu, options={"num_warps": case.num_warps, "enable_fp_fusion": True})
    arguments = [n for n in names if n not in constants]
    offsets = crossing_offsets(kernel.asm["ttir"], arguments, case.within)
    place = (f"{found.module}.{case.kernel}", case.variant, dtype, target, *offsets)
    if gpu.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, spills = (_metadata(text, key) for key in ("vgpr_count", "vgpr_spill_count"))
        return CompiledKernel(*place, registers, spills, kernel.metadata.shared, 0, 0.0, 0, 0)
    instructions, registers, stack = disassemble(kernel.asm["cubin"])
    spills = stack + sum(i.startswith(("LDL", "STL")) for i in instructions)
    outputs = case.outputs(constants) / (case.num_warps * gpu.warp_size)
    return CompiledKernel(
        *(*place, registers, spills, kernel.metadata.shared, len(instructions)),
        *(round(len(instructions) / outputs, 1), widest(instructions, "LDG"), widest(instructions, "STG")),
    )


def _metadata(amdgcn: str, key: str) -> int:
    """A number of the kernel's metadata in AMD's assembly."""
    found = re.search(rf"\.{key}:\s+(\d+)", amdgcn)
    if found is None:
        raise RuntimeError(f"the AMD assembly has no .{key}")
    return int(found[1])


def title(kernel: CompiledKernel) -> str:
    """The kernel's name and variant, as the table shows it."""
    name = kernel.kernel.split(".")[1].removesuffix("_kernel")
    return f"{name} ({kernel.variant})" if kernel.variant else name


def markdown(kernels: Sequence[CompiledKernel]) -> str:
    """The table of docs/kernel-report.md."""
    rows = [
        [
            *(title(k), k.dtype, k.target, str(k.registers), str(k.spills), str(k.shared)),
            *(str(n or "-") for n in (k.instructions, k.instructions_per_output, k.load_bits, k.store_bits)),
        ]
        for k in kernels
    ]
    return "\n".join(markdown_table([HEADER, *rows])) + "\n"


def _compile(index: int, dtype: str, target: str) -> CompiledKernel:
    """``compile_case`` in another process: a case holds functions, which cannot be pickled."""
    return compile_case(all_cases()[index], dtype, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["bf16"])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(NVIDIA))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    args = parser.parse_args()
    for path in (args.json, args.markdown):
        if path:
            require_writable(path)
    wanted = [
        (i, d, t)
        for i, (_, case) in enumerate(all_cases())
        for d in args.dtypes
        for t in args.targets
        if d in case.dtypes and t in case.targets
    ]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        kernels = list(pool.map(_compile, *zip(*wanted, strict=True)))
    table = markdown(kernels)
    print(table, end="")
    if args.json:
        write_json(args.json, [asdict(k) for k in kernels], indent=1)
    if args.markdown:
        with atomic_write(args.markdown) as temporary:
            temporary.write_text(INTRO + table)


if __name__ == "__main__":
    sys.exit(run_program(main))
