"""Compile every Triton kernel ahead of time, without a GPU, and read off what the compiler made of it.

    python -m msdd_fast.bench.aot [--json FILE] [--markdown FILE] [--dtypes bf16 ...] [--targets 80 90 100 gfx942 ...]

Registers, spills and shared memory come from the binary, instructions from its disassembly (cuobjdump and nvdisasm come
inside Triton's wheel). Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

INTRO = """# Kernels

What the compiler makes of every Triton kernel, ahead of time and without a GPU. Generated; do not edit:

    python -m msdd_fast.bench.aot --dtypes bf16 fp16 fp32 --targets 80 90 100 gfx942 gfx950 --markdown docs/kernels.md

Spills are stack bytes plus local-memory instructions (AMD: spilled registers). "Instructions" counts the static SASS of
the whole kernel without padding, "per output" divides it by the elements that one thread writes; "widest load" and
"store" are bits of one global access. Bytes that each op moves are in its docstring (msdd_fast/ops). None of these
kernels has been timed on a GPU yet.

A 2x2 block of noise is four outputs, about 200 instructions, and at bf16 moves 10 bytes. An H200 issues at most
132 SMs x 4 warps x 32 lanes x 1.7 GHz, or 0.14 blocks a picosecond: 1.4 TB/s, less than a third of its memory
bandwidth. By this count the noise kernels are bound by instruction issue, not by memory.

"""
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
NVIDIA = ("80", "90", "100")
AMD = ("gfx942", "gfx950")
WIDTH, HEAD_DIM, HIDDEN = 768, 64, 2048


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched: argument types, compile-time constants, and the elements one thread writes."""

    kernel: str
    signature: Callable[[str], dict[str, str]]
    constants: Callable[[str], dict[str, Any]]
    num_warps: int
    outputs: Callable[[dict[str, Any]], int]
    """Elements that one program writes."""

    def load(self) -> Any:
        stem, _, name = self.kernel.rpartition(".")
        return getattr(__import__(f"msdd_fast.kernels.{stem}", fromlist=[name]), name)


@dataclass(frozen=True)
class Facts:
    """What came out for one case, dtype and target; counts are static instructions of the whole kernel."""

    kernel: str
    dtype: str
    target: str
    registers: int
    spills: int
    shared: int
    instructions: int
    instructions_per_output: float
    load_bits: int
    store_bits: int


def cases() -> list[Case]:
    """Every shipped kernel with its default launch configuration."""
    from msdd_fast.kernels import _elementwise, _norm, qk_norm_rope, renoise_upsample, start_noise, swiglu

    def pointwise(*pointers: str, scalars: tuple[str, ...]) -> Callable[[str], dict[str, str]]:
        return lambda d: {
            **{p: f"*{d}" for p in pointers},
            **{s: "*fp32" for s in scalars},
            "p_out": f"*{d}",
            "n": "i32",
        }

    def blocks(dtype: str) -> dict[str, int]:
        return {"K": 16 // (2 * BYTES[dtype]), "BLOCK": renoise_upsample.BLOCK}

    noise = {"p_alpha": "*fp32", "p_beta": "*fp32", "p_seeds": "*i64", "stage": "i32"}
    factors = {"spread": "fp32", "common": "fp32"}
    flat = lambda _: {"BLOCK": _elementwise.BLOCK}  # noqa: E731

    # The transformer's ops at the sizes of msdd-d12, with float32 tables, as an engine has them.
    rows = _norm.row_config(WIDTH)
    norm = {"WIDTH": WIDTH, "EPS": 1e-6, "BLOCK": rows["BLOCK"]}
    hidden = swiglu.block_config(HIDDEN)
    heads = qk_norm_rope.heads_config(WIDTH // HEAD_DIM, HEAD_DIM)
    attention = {"PARTS": 2, "HEADS": WIDTH // HEAD_DIM, "DIM": HEAD_DIM, "EPS": 1e-6}

    def tables(*names: str) -> dict[str, str]:
        return {f"p_{n}": "*fp32" for n in names}

    def runs(*names: str) -> dict[str, str]:
        return {"run": "i32", "last": "i32", **{f"stride_{n}": "i32" for n in names}}

    return [
        Case(
            "start_noise.start_noise_kernel",
            lambda d: {"p_out": f"*{d}", "p_seeds": "*i64", "rows": "i32", "width": "i32"},
            blocks,
            start_noise.NUM_WARPS,
            lambda c: 4 * c["K"] * c["BLOCK"],
        ),
        Case(
            "renoise_upsample.renoise_upsample_kernel",
            lambda d: {"p_x": f"*{d}", "p_out": f"*{d}", **noise, "rows": "i32", "width": "i32", **factors},
            blocks,
            renoise_upsample.NUM_WARPS,
            lambda c: 4 * c["K"] * c["BLOCK"],
        ),
        Case(
            "renoise_upsample.renoise_upsample_channels_last_kernel",
            lambda d: {
                **{"p_x": f"*{d}", "p_out": f"*{d}", **noise},
                **{"channels": "i32", "height": "i32", "width": "i32", **factors},
            },
            lambda _: {"BLOCK": renoise_upsample.BLOCK},
            renoise_upsample.NUM_WARPS,
            lambda c: 4 * c["BLOCK"],
        ),
        Case(
            "euler_step.euler_step_kernel",
            lambda d: {"p_x": f"*{d}", "p_v": f"*{d}", "p_dt": "*fp32", "p_out": f"*{d}", "n": "i32"},
            flat,
            _elementwise.NUM_WARPS,
            lambda c: c["BLOCK"],
        ),
        Case(
            "cfg_combine.cfg_combine_kernel",
            pointwise("p_cond", "p_uncond", scalars=("p_scale",)),
            flat,
            _elementwise.NUM_WARPS,
            lambda c: c["BLOCK"],
        ),
        Case(
            "cfg_euler.cfg_euler_kernel",
            pointwise("p_x", "p_cond", "p_uncond", scalars=("p_scale", "p_dt")),
            flat,
            _elementwise.NUM_WARPS,
            lambda c: c["BLOCK"],
        ),
        Case(
            "norm_modulate.norm_modulate_kernel",
            lambda d: {"p_x": f"*{d}", **tables("shift", "scale"), "p_out": f"*{d}", **runs("shift", "scale")},
            lambda _: norm,
            rows["num_warps"],
            lambda c: c["WIDTH"],
        ),
        Case(
            "gate_residual_norm_modulate.gate_residual_norm_modulate_kernel",
            lambda d: {
                **{"p_x": f"*{d}", "p_y": f"*{d}", **tables("gate", "shift", "scale")},
                **{"p_sum": f"*{d}", "p_out": f"*{d}", **runs("gate", "shift", "scale")},
            },
            lambda _: norm,
            rows["num_warps"],
            lambda c: 2 * c["WIDTH"],
        ),
        Case(
            "qk_norm_rope.qk_norm_rope_kernel",
            lambda d: {
                **{"p_x": f"*{d}", "p_weight": f"*{d}", "p_bias": f"*{d}", **tables("cos", "sin"), "p_out": f"*{d}"},
                **{"inner": "i32", "stride_outer": "i32", "stride_inner": "i32", "split": "i32"},
            },
            lambda _: {**attention, "TOKEN_MAJOR": True, "COSINE": False, "BLOCK": heads["BLOCK"]},
            heads["num_warps"],
            lambda c: c["HEADS"] * c["DIM"],
        ),
        Case(
            "swiglu.swiglu_kernel",
            lambda d: {
                **{"p_a": f"*{d}", "p_b": f"*{d}", "p_out": f"*{d}"},
                **{"width": "i32", "stride_a": "i32", "stride_b": "i32"},
            },
            lambda _: {"BLOCK": hidden["BLOCK"]},
            hidden["num_warps"],
            lambda c: c["BLOCK"],
        ),
    ]


def compile_case(case: Case, dtype: str, target: str) -> Facts:
    """Compile for "80", "90", "100" (NVIDIA) or "gfx942", "gfx950" (AMD: registers and spills only)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = case.constants(dtype)
    signature = {**case.signature(dtype), **{name: "constexpr" for name in constants}}
    names = list(signature)
    # What the launcher would find at 16-byte aligned tensors with widths that are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n.startswith(("p_", "stride_")) or n in ("n", "rows", "width")
    }
    source = ASTSource(
        fn=case.load(),
        signature=signature,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs=aligned,
    )
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target), 32)
    kernel = triton.compile(source, target=gpu, options={"num_warps": case.num_warps, "enable_fp_fusion": True})
    outputs = case.outputs(constants) / (case.num_warps * gpu.warp_size)
    if gpu.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
        return Facts(case.kernel, dtype, target, registers, spills, kernel.metadata.shared, 0, 0.0, 0, 0)
    instructions, registers, stack = disassemble(kernel.asm["cubin"])
    spills = stack + sum(i.startswith(("LDL", "STL")) for i in instructions)
    return Facts(
        *(case.kernel, dtype, target, registers, spills, kernel.metadata.shared, len(instructions)),
        *(round(len(instructions) / outputs, 1), widest(instructions, "LDG"), widest(instructions, "STG")),
    )


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


def markdown(facts: list[Facts]) -> str:
    """Table for docs/kernels.md."""
    lines = [
        "| kernel | dtype | target | registers | spills | shared | instructions | per output | widest load | store |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for f in facts:
        lines.append(
            f"| {f.kernel.split('.')[1].removesuffix('_kernel')} | {f.dtype} | {f.target} | {f.registers} | {f.spills} "
            f"| {f.shared} | {f.instructions or '-'} | {f.instructions_per_output or '-'} "
            f"| {f.load_bits or '-'} | {f.store_bits or '-'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=BYTES, default=["bf16"])
    parser.add_argument("--targets", nargs="+", choices=(*NVIDIA, *AMD), default=list(NVIDIA))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    args = parser.parse_args()
    facts = [compile_case(c, d, t) for c in cases() for d in args.dtypes for t in args.targets]
    table = markdown(facts)
    print(table, end="")
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(f) for f in facts], indent=2) + "\n")
    if args.markdown:
        Path(args.markdown).write_text(INTRO + table)


if __name__ == "__main__":
    main()
