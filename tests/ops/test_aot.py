"""Every Triton kernel compiled ahead of time for sm_80, 90 and 100, and what came out (no GPU needed).

In a subprocess, because this test process runs Triton's interpreter.
"""

import json
import os
import subprocess
import sys

import pytest

from msdd_fast.bench.aot import AMD, NVIDIA

SIXTEEN_BYTES = {
    *("start_noise", "renoise_upsample", "euler_step", "cfg_combine", "cfg_euler"),
    *("norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "swiglu"),
}
# A warp holds a row of 768 or 12 heads of 64, which takes registers; it does not need many neighbours to hide latency.
REGISTERS = {"norm_modulate": 80, "gate_residual_norm_modulate": 96, "qk_norm_rope": 80}
# cos, sin, weight and bias of a token are read once by a warp and passed on to the lanes of all heads.
SHARED = {"qk_norm_rope": 256}


def compile_all(path, dtypes, targets):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "msdd_fast.bench.aot",
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


def check(facts):
    for f in facts:
        where = f"{f['kernel']} {f['dtype']} {f['target']}"
        name = f["kernel"].split(".")[1].removesuffix("_kernel")
        assert f["spills"] == 0, where
        if f["target"] in NVIDIA:
            assert f["shared"] <= SHARED.get(name, 0), where
            assert f["registers"] <= REGISTERS.get(name, 64), where
            assert f["store_bits"] == 128 or name not in SIXTEEN_BYTES, where
            # A 2x2 block of noise costs about 200 instructions; sin, cos and log would cost far more.
            assert f["instructions_per_output"] < (100 if "channels_last" in name else 70), where


def test_default_configurations(tmp_path):
    facts = compile_all(tmp_path / "facts.json", ["bf16"], NVIDIA)
    assert {f["target"] for f in facts} == set(NVIDIA) and len(facts) == 3 * 10
    check(facts)


@pytest.mark.slow
def test_every_dtype_and_amd(tmp_path):
    check(compile_all(tmp_path / "facts.json", ["bf16", "fp16", "fp32"], [*NVIDIA, *AMD]))
