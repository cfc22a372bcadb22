"""Every Triton kernel compiles ahead of time, within limits, for the oldest and the newest of NVIDIA's architectures.

The slow tests take all of them, and AMD's.

In a subprocess, because this test process runs Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from msdd_fast import kernels as kernels_package
from msdd_fast.bench.work.offsets import crossing_offsets
from msdd_fast.kernels._aot import AMD, NVIDIA, TARGETS

KERNELS = Path(kernels_package.__file__).parent
# These write few numbers side by side: three channels of a pixel, sums of a group. All others store 16 bytes at a time.
NARROW_STORES = {"renoise_upsample_channels_last", "final_step_channels_last", "group_norm_parts", "group_norm_merge"}
# A warp holds a row of 768 or 12 heads of 64, which takes registers; it does not need many neighbours to hide latency.
# The statistics hold a tile of 64 x 32 elements twice, the window its sums, queries and a block's weights.
REGISTERS = {"norm_modulate": 80, "gate_residual_norm_modulate": 96, "qk_norm_rope": 80, "context_attention": 224}
# Two warps hold a row of 1536, and RMSNorm has one more at hand, its weight. 64 pixels have 64 hidden channels each.
REGISTERS |= {"norm_modulate (RMS)": 120, "gate_residual_norm_modulate (RMS)": 120, "sigma_gate": 120}
REGISTERS |= {"pixel_block": 160, "sde_step": 72}
REGISTERS |= {"group_norm_parts": 96, "group_norm_apply": 80, "window_attention": 208}
# cos, sin, weight and bias of a token are read once by a warp and passed on to the lanes of all heads; K, V and the
# queries of a head (128 + 128 + 64 rows of 128 bytes, and barriers on sm_100) are operands of the tensor cores.
# The window's queries stay there, keys and values of the next blocks arrive; the norm's warps add up their sums.
SHARED = {"qk_norm_rope": 256, "context_attention": 41000, "window_attention": 96 * 1024}
# Two warps hold a row of 1536 and add up their sums; the operands of the pixel block's two products.
SHARED |= {"norm_modulate (RMS)": 64, "gate_residual_norm_modulate (RMS)": 64, "sigma_gate": 64, "pixel_block": 20480}
SHARED |= {"group_norm_parts": 512, "group_norm_merge": 64}
# Per output: of the noise one block costs about 200, sin, cos and log would cost far more; a head's few features share
# the scores of a query, and a group's few sums the loop over the parts of its image.
INSTRUCTIONS = {"renoise_upsample_channels_last": 100, "final_step_channels_last": 100, "window_attention": 300}
# Four values of erf for every output, and in float32 products without tensor cores; noise and where a pixel lies.
INSTRUCTIONS |= {"group_norm_merge": 128, "pixel_block": 320, "sde_step": 90}

# float32 products of the window run without tensor cores: a handful of values of one head size leave the registers.
SPILLS = {("window_attention", "fp32"): 16}


def compile_all(path, dtypes, targets, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [
        sys.executable,
        "-m",
        "msdd_fast.bench.work.aot",
        "--json",
        str(path),
        "--dtypes",
        *dtypes,
        "--targets",
        *targets,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def limit_of(name, variant, limits, usual):
    """Of the variant if it has one, else of the kernel, else the usual one."""
    return limits.get(f"{name} ({variant})", limits.get(name, usual))


def check(kernels):
    for f in kernels:
        where = f"{f['kernel']} {f['variant']} {f['dtype']} {f['target']}"
        name = f["kernel"].split(".")[1].removesuffix("_kernel")
        limit = partial(limit_of, name, f["variant"])
        assert f["spills"] <= SPILLS.get((name, f["dtype"]), 0), where
        assert f["wide_offsets"] > 0 and f["narrow_offsets"] == 0, where
        if f["target"] not in AMD:
            assert f["shared"] <= limit(SHARED, 0), where
            assert f["registers"] <= limit(REGISTERS, 64), where
            # Eight pixels of a line of a patch are eight bytes as uint8.
            assert f["store_bits"] == (64 if "uint8" in f["variant"] else 128) or name in NARROW_STORES, where
            assert f["instructions_per_output"] < INSTRUCTIONS.get(name, 70), where


def test_default_configurations(tmp_path):
    targets = [NVIDIA[0], NVIDIA[-1]]
    kernels = compile_all(tmp_path / "kernels.json", ["bf16"], targets)
    assert {f["target"] for f in kernels} == set(targets)
    stems = {p.stem for p in KERNELS.glob("*.py") if not p.stem.startswith("_")}
    assert {f["kernel"].split(".")[0] for f in kernels} == stems  # each file states its cases
    assert len({(f["kernel"], f["variant"], f["target"]) for f in kernels}) == len(kernels) >= 2 * 23
    check(kernels)


@pytest.mark.slow
def test_every_dtype_and_amd(tmp_path):
    check(compile_all(tmp_path / "kernels.json", ["bf16", "fp16", "fp32"], TARGETS))


@pytest.mark.slow
def test_the_oldest_triton_that_is_allowed(tmp_path):
    """Triton 3.6 beside the newest: installed into a folder that only this subprocess sees."""
    folder = tmp_path / "triton"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "triton==3.6.0"]
    got = subprocess.run(command, capture_output=True, text=True, check=False)
    if got.returncode != 0:
        pytest.skip(f"pip cannot get triton 3.6.0: {(got.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    found = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "3.6.0"
    check(compile_all(tmp_path / "kernels.json", ["bf16"], NVIDIA, PYTHONPATH=str(folder)))


def ttir(*lines):
    return "\n".join(["tt.func public @kernel(%p: !tt.ptr<f32>, %stride_x: i32, %width: i32) {", *lines, "}"])


ROW = "%row = tt.get_program_id y : i32 loc(#loc1)"
WIDE = ["%a = arith.extsi %row : i32 to i64", "%b = arith.extsi %stride_x : i32 to i64"]
WIDE += ["%c = arith.muli %a, %b : i64", "%d = tt.addptr %p, %c : !tt.ptr<f32>, i64"]
NARROW = ["%a = arith.muli %row, %width : i32 loc(#loc2)", "%b = arith.extsi %a : i32 to i64"]
NARROW += ["%c = tt.addptr %p, %b : !tt.ptr<f32>, i64"]
BOUNDED = ["%a = arith.remsi %row, %width : i32", "%b = tt.addptr %p, %a : !tt.ptr<f32>, i32"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([ROW, *WIDE], (1, 0)),
        ([ROW, *NARROW], (1, 1)),  # too late: the product may have overflowed before it was widened
        ([ROW, *BOUNDED], (0, 0)),
        (["%0 = arith.addi %stride_x, %width : i32"], (0, 1)),
        ([ROW, *WIDE[:3], "%d = arith.trunci %c : i64 to i32"], (0, 1)),
        ([ROW.replace(" y ", " x "), *NARROW], (0, 0)),  # declared to count inside an image
        ([ROW, "%q = arith.cmpi slt, %row, %width : i32", "%a = arith.muli %q, %width : i32"], (0, 0)),
        ([ROW, "%q = tt.load %p : !tt.ptr<i32>", "%a = arith.muli %q, %width : i32"], (0, 0)),
    ],
)
def test_offsets_that_may_overflow_are_found(lines, expected):
    assert crossing_offsets(ttir(*lines), ["p", "stride_x", "width"], ("x",)) == expected
