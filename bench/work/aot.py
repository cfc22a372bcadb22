"""Compile every Triton kernel ahead of time, without a GPU, and read off what the compiler made of it.

    python -m msdd_fast.bench.work.aot [--json FILE] [--markdown FILE] [--dtypes bf16 ...] [--targets 80 90 gfx942 ...]

Registers, spills and shared memory come from the binary, instructions from its disassembly (cuobjdump and nvdisasm come
inside Triton's wheel). Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

INTRO = """# Kernels

What the compiler makes of every Triton kernel, ahead of time and without a GPU. Generated; do not edit:

    python -m msdd_fast.bench.work.aot --dtypes bf16 fp16 fp32 --targets 80 89 90 100 gfx942 gfx950 \\
        --markdown docs/kernels.md

Spills are stack bytes plus local-memory instructions (AMD: spilled registers). "Instructions" counts the static SASS of
the whole kernel without padding, "per output" divides it by the elements that one thread writes; "widest load" and
"store" are bits of one global access. Bytes that each op moves are in its docstring (msdd_fast/ops). None of these
kernels has been timed on a GPU yet.

A 2x2 block of noise is four outputs, about 200 instructions, and at bf16 moves 10 bytes. An H200 issues at most
132 SMs x 4 warps x 32 lanes x 1.7 GHz, or 0.14 blocks a picosecond: 1.4 TB/s, less than a third of its memory
bandwidth. By this count the noise kernels are bound by instruction issue, not by memory.

"""
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "u8": 1}
DTYPES = ("bf16", "fp16", "fp32")
NVIDIA = ("80", "90", "100")
FLOAT8 = ("89", "90", "100")
AMD = ("gfx942", "gfx950")
ALL = ("80", "89", "90", "100", *AMD)
WIDTH, HEAD_DIM, HIDDEN, CONTEXT = 768, 64, 2048, 128


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched: argument types, compile-time constants, and the elements one thread writes."""

    kernel: str
    signature: Callable[[str], dict[str, str]]
    constants: Callable[[str], dict[str, Any]]
    num_warps: int
    outputs: Callable[[dict[str, Any]], int]
    """Elements that one program writes."""
    variant: str = ""
    within: tuple[str, ...] = ()
    """Axes of the grid that count inside one image or row, where indices fit in 32 bits (ops/_checks.check_blocks)."""
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    targets: tuple[str, ...] = ("80", "90", "100", "gfx942", "gfx950")
    """Those that have the instructions it needs."""

    def load(self) -> Any:
        stem, _, name = self.kernel.rpartition(".")
        return getattr(__import__(f"msdd_fast.kernels.{stem}", fromlist=[name]), name)


@dataclass(frozen=True)
class Facts:
    """What came out for one case, dtype and target; counts are static instructions of the whole kernel."""

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


def cases() -> list[Case]:
    """Every shipped kernel with its default launch configuration."""
    from msdd_fast.kernels import (
        _norm,
        _rows,
        final_step,
        group_norm_modulate_silu,
        qk_norm_rope,
        renoise_upsample,
        stage_transition,
        start_noise,
        swiglu,
        window_attention,
    )
    from msdd_fast.kernels import context_attention as context

    def pointwise(*operands: str, scalars: tuple[str, ...]) -> Callable[[str], dict[str, str]]:
        return lambda d: {
            **{f"p_{o}": f"*{d}" for o in operands},
            **{f"p_{s}": "*fp32" for s in scalars},
            "p_out": f"*{d}",
            "columns": "i32",
            **{f"stride_{o}": "i32" for o in operands},
        }

    def blocks(dtype: str) -> dict[str, int]:
        return {"K": 16 // (2 * BYTES[dtype]), "BLOCK": renoise_upsample.BLOCK}

    noise = {"p_alpha": "*fp32", "p_beta": "*fp32", "p_seeds": "*i64", "stage": "i32"}
    factors = {"spread": "fp32", "common": "fp32"}
    flat = lambda _: {"BLOCK": _rows.BLOCK}  # noqa: E731
    image = ("x",)

    # The ops at the end of a stage, three channels in patches of 8.
    patches = {"CHANNELS": 3, "P": 8}
    strides = {f"stride_{n}": "i32" for n in ("x", "vn", "vb", "un", "ub")}

    def end_of_stage(dtype: str, out: str) -> dict[str, str]:
        pointers = {"p_x": dtype, "p_v": dtype, "p_uncond": dtype, "p_out": out, "p_dt": "fp32", "p_scale": "fp32"}
        return {name: f"*{kind}" for name, kind in pointers.items()}

    def transition(guided: bool) -> Case:
        return Case(
            "stage_transition.stage_transition_kernel",
            lambda d: {**end_of_stage(d, d), **noise, "grid": "i32", **strides, **factors},
            lambda d: {**patches, **blocks(d), "GUIDED": guided},
            stage_transition.NUM_WARPS,
            lambda c: 4 * c["K"] * c["BLOCK"],
            "guided" if guided else "",
            image,
        )

    def final(out: str | None, variant: str) -> Case:
        def constants(dtype: str) -> dict[str, Any]:
            size = BYTES[out or dtype]
            k, span = final_step.run_and_span(patches["P"], size)
            return {**patches, "K": k, "SPAN": span, "GUIDED": True, "BLOCK": final_step.BLOCK}

        return Case(
            "final_step.final_step_kernel",
            lambda d: {**end_of_stage(d, out or d), "grid": "i32", **strides},
            constants,
            final_step.NUM_WARPS,
            lambda c: c["K"] * c["BLOCK"],
            variant,
            image,
        )

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

    # SSDD: channels-last maps with 64 channels at the finest level, heads of 40 (S) and 72 (M), windows of 15 x 15.
    tile = {"WIDTH": 64, "PIXELS": group_norm_modulate_silu.PIXELS, "CHANNELS": group_norm_modulate_silu.CHANNELS}
    groups = "group_norm_modulate_silu.group_norm_{}_kernel"

    def maps(*names: str) -> dict[str, str]:
        return {f"stride_{n}": "i32" for n in names}

    def window(size: int) -> Case:
        def constants(dtype: str) -> dict[str, Any]:
            config = window_attention.window_config(size, BYTES[dtype])
            del config["num_warps"]
            return {**config, "SCALE": size**-0.5, "WIDEN": False, "WINDOW": 8}

        return Case(
            "window_attention.window_attention_kernel",
            lambda d: {
                **{**{f"p_{n}": f"*{d}" for n in ("q", "k", "v", "out")}, "p_table": "*fp32"},
                **{n: "i32" for n in ("heads", "height", "width")},
                **maps(*(x + n for x in "qkvo" for n in "bnh"), "ty", "tx", "th"),
            },
            constants,
            window_attention.NUM_WARPS,
            lambda c: c["TILE_Y"] * c["TILE_X"] * c["SIZE"],
            f"heads of {size}",
            image,
        )

    return [
        Case(
            "start_noise.start_noise_kernel",
            lambda d: {"p_out": f"*{d}", "p_seeds": "*i64", "rows": "i32", "width": "i32"},
            blocks,
            start_noise.NUM_WARPS,
            lambda c: 4 * c["K"] * c["BLOCK"],
            within=image,
        ),
        Case(
            "start_noise.start_noise_rows_kernel",
            lambda d: {"p_out": f"*{d}", "p_seeds": "*i64", "grid_y": "i32", "grid_x": "i32", "stride_out": "i32"},
            lambda d: {**patches, **blocks(d)},
            start_noise.NUM_WARPS,
            lambda c: 4 * c["K"] * c["BLOCK"],
            within=image,
        ),
        Case(
            "renoise_upsample.renoise_upsample_kernel",
            lambda d: {"p_x": f"*{d}", "p_out": f"*{d}", **noise, "rows": "i32", "width": "i32", **factors},
            blocks,
            renoise_upsample.NUM_WARPS,
            lambda c: 4 * c["K"] * c["BLOCK"],
            within=image,
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
            within=image,
        ),
        transition(guided=False),
        transition(guided=True),
        final(None, "guided"),
        final("u8", "guided, to uint8"),
        Case(
            "final_step.final_step_channels_last_kernel",
            lambda d: {**end_of_stage(d, d), "grid": "i32", **strides},
            lambda _: {**patches, "GUIDED": True, "BLOCK": final_step.BLOCK_LAST},
            final_step.NUM_WARPS,
            lambda c: c["BLOCK"],
            "guided",
            image,
        ),
        Case(
            "euler_step.euler_step_kernel",
            pointwise("x", "v", scalars=("dt",)),
            flat,
            _rows.NUM_WARPS,
            lambda c: c["BLOCK"],
        ),
        Case(
            "cfg_combine.cfg_combine_kernel",
            pointwise("cond", "uncond", scalars=("scale",)),
            flat,
            _rows.NUM_WARPS,
            lambda c: c["BLOCK"],
        ),
        Case(
            "cfg_euler.cfg_euler_kernel",
            pointwise("x", "cond", "uncond", scalars=("scale", "dt")),
            flat,
            _rows.NUM_WARPS,
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
            within=("y", "z"),
        ),
        Case(
            "context_attention.context_attention_kernel",
            lambda d: {
                **{f"p_{n}": f"*{d}" for n in ("q", "k", "v", "accumulate", "out")},
                **{n: "i32" for n in ("heads", "queries", "keys")},
                **{f"stride_{x}{n}": "i32" for x in "qkvao" for n in "bnh"},
            },
            lambda _: {
                **{"SCALE": context.SCALE, "ACCUMULATE": True, "WIDEN": False},
                **{"BLOCK_N": context.BLOCK_N, "BLOCK_L": CONTEXT, "D": HEAD_DIM},
            },
            context.NUM_WARPS,
            lambda c: c["BLOCK_N"] * c["D"],
            dtypes=("bf16", "fp16"),
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
            within=("y",),
        ),
        Case(
            groups.format("parts"),
            lambda d: {
                **{"p_x": f"*{d}", "p_mean": "*fp32", "p_squares": "*fp32"},
                **{n: "i32" for n in ("pixels", "parts", "tiles")},
                **maps("x", "c", "p"),
            },
            lambda _: {**tile, "stride_c": 1},
            group_norm_modulate_silu.NUM_WARPS,
            lambda c: c["PIXELS"] * c["CHANNELS"],
            "channels-last",
        ),
        Case(
            groups.format("merge"),
            lambda d: {
                **{"p_mean": "*fp32", "p_squares": "*fp32", "p_norm": "*fp32"},
                **{n: "i32" for n in ("pixels", "parts", "part_pixels", "groups")},
            },
            lambda _: {"EPS": 1e-5, "PARTS": 128, "PER_GROUP": 2, "BLOCK": 2, "MERGE": group_norm_modulate_silu.MERGE},
            group_norm_modulate_silu.MERGE_WARPS,
            lambda c: c["PARTS"] * c["BLOCK"],
            within=image,
        ),
        Case(
            groups.format("apply"),
            lambda d: {
                **{**{f"p_{n}": f"*{d}" for n in ("x", "weight", "bias", "scale", "shift", "out")}, "p_norm": "*fp32"},
                **{n: "i32" for n in ("pixels", "width", "groups")},
                **{n: "i32" for n in ("cell_height", "cell_width")},
                **maps("x", "c", "p", *(t + n for t in "st" for n in "bcyx")),
            },
            lambda _: {
                **{**tile, "stride_c": 1, "stride_sc": 1, "stride_tc": 1},
                **{"PER_GROUP": 2, "WEIGHT": False, "BIAS": False, "MODULATE": True, "SILU": True},
            },
            group_norm_modulate_silu.NUM_WARPS,
            lambda c: c["PIXELS"] * c["CHANNELS"],
            "channels-last",
            within=("x", "y"),
        ),
        window(40),
        window(72),
        Case(
            "quantize_rows.quantize_rows_kernel",
            lambda d: {"p_x": f"*{d}", "p_out": "*fp8e4nv", "p_scale": "*fp32"},
            lambda _: {"WIDTH": WIDTH, "BLOCK": rows["BLOCK"]},
            rows["num_warps"],
            lambda c: c["WIDTH"],
            targets=FLOAT8,
        ),
    ]


def compile_case(case: Case, dtype: str, target: str) -> Facts:
    """Compile for "80", "89", "90", "100" (NVIDIA) or "gfx942", "gfx950" (AMD: registers and spills only)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = case.constants(dtype)
    kinds = {**case.signature(dtype), **{name: "constexpr" for name in constants}}
    function = case.load()
    names = list(function.arg_names)
    signature = {name: kinds[name] for name in names}
    # What the launcher would find at 16-byte aligned tensors with widths that are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n.startswith(("p_", "stride_")) or n in ("columns", "rows", "width")
    }
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs=aligned,
    )
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target), 32)
    kernel = triton.compile(source, target=gpu, options={"num_warps": case.num_warps, "enable_fp_fusion": True})
    outputs = case.outputs(constants) / (case.num_warps * gpu.warp_size)
    arguments = [n for n in names if n not in constants]
    offsets = crossing_offsets(kernel.asm["ttir"], arguments, case.within)
    place = (case.kernel, case.variant, dtype, target, *offsets)
    if gpu.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
        return Facts(*place, registers, spills, kernel.metadata.shared, 0, 0.0, 0, 0)
    instructions, registers, stack = disassemble(kernel.asm["cubin"])
    spills = stack + sum(i.startswith(("LDL", "STL")) for i in instructions)
    return Facts(
        *(*place, registers, spills, kernel.metadata.shared, len(instructions)),
        *(round(len(instructions) / outputs, 1), widest(instructions, "LDG"), widest(instructions, "STG")),
    )


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


def title(facts: Facts) -> str:
    """The kernel's name and variant, as the table shows it."""
    name = facts.kernel.split(".")[1].removesuffix("_kernel")
    return f"{name} ({facts.variant})" if facts.variant else name


def markdown(facts: list[Facts]) -> str:
    """Table for docs/kernels.md."""
    lines = [
        "| kernel | dtype | target | registers | spills | shared | instructions | per output | widest load | store |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for f in facts:
        lines.append(
            f"| {title(f)} | {f.dtype} | {f.target} | {f.registers} | {f.spills} "
            f"| {f.shared} | {f.instructions or '-'} | {f.instructions_per_output or '-'} "
            f"| {f.load_bits or '-'} | {f.store_bits or '-'} |"
        )
    return "\n".join(lines) + "\n"


def _compile(index: int, dtype: str, target: str) -> Facts:
    """``compile_case`` in another process: a case holds functions, which cannot be sent there."""
    return compile_case(cases()[index], dtype, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--targets", nargs="+", choices=ALL, default=list(NVIDIA))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    args = parser.parse_args()
    wanted = [
        (i, d, t)
        for i, c in enumerate(cases())
        for d in args.dtypes
        for t in args.targets
        if d in c.dtypes and t in c.targets
    ]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        facts = list(pool.map(_compile, *zip(*wanted, strict=True)))
    table = markdown(facts)
    print(table, end="")
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(f) for f in facts], indent=2) + "\n")
    if args.markdown:
        Path(args.markdown).write_text(INTRO + table)


if __name__ == "__main__":
    main()
