"""The C++ ops: rounding to every dtype, memory orders, tails, SIMD levels and threads."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from msdd_fast import backends, native
from msdd_fast.diffusion import noise
from msdd_fast.errors import InputError
from msdd_fast.native._call import operand
from msdd_fast.ops.sigma_gate import native_sigma_gate

if not backends.extension_status()[0]:
    pytest.skip(f"msdd_fast._C {backends.extension_status()[1]}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HALVES = (torch.bfloat16, torch.float16)
ALPHA, BETA = torch.tensor(0.625), torch.tensor(0.7)
SCALE, DT = torch.tensor(1.7), torch.tensor(-0.25)
# (B, C, H, W): odd sizes, empty and single batches, rows of one vector and of many.
SHAPES = [(0, 3, 4, 4), (1, 1, 1, 1), (2, 3, 3, 5), (2, 4, 17, 33), (1, 3, 5, 64), (3, 3, 2, 100)]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seeds_for(x):
    return torch.tensor([2**40 + 7 * i for i in range(len(x))], dtype=torch.int64)


def renoise(x, correlation=-1 / 3, seeds=None):
    return native.renoise_upsample(x, ALPHA, BETA, seeds_for(x) if seeds is None else seeds, 2, correlation)


def bits(x):
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.itemsize])


# --- conversions ---


def convert(x, dtype):
    """Through the extension: cfg_euler with nothing but v_cond."""
    x, out = x.contiguous(), torch.empty(x.shape, dtype=dtype)
    none, source = (0, 0, 0, 0), (x.data_ptr(), DTYPES[x.dtype], 0, x.numel())
    backends.load_extension().cfg_euler(out.data_ptr(), none, source, none, 0, 0, DTYPES[dtype], 1, x.numel())
    return out


def all_of(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_widening_is_exact_for_every_bit_pattern(dtype):
    x = all_of(dtype)
    wide, expected = convert(x, torch.float32), x.float()
    number = ~x.isnan()
    assert torch.equal(bits(wide)[number], bits(expected)[number])
    assert wide[~number].isnan().all()
    assert torch.equal(wide.signbit(), x.signbit())
    assert torch.equal(bits(convert(wide, dtype))[number], bits(x)[number])


@pytest.mark.parametrize("dtype", HALVES)
def test_narrowing_rounds_to_nearest_even_everywhere(dtype):
    """At every value, every midpoint between neighbours, and one unit of float32 to both sides."""
    low = all_of(dtype).float()
    low = low[low.isfinite()]
    high = torch.nextafter(low.to(dtype), torch.tensor(float("inf"), dtype=dtype)).float()
    middle = ((low.double() + high.double()) / 2).float()
    last = torch.tensor([65519.0, 65520.0, 65535.0, 65536.0, 3.3961775e38, 3.4028235e38, float("inf")])
    generator = torch.Generator().manual_seed(0)
    arbitrary = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32).view(torch.float32)
    points = torch.cat([low, middle[middle.isfinite()], last, -last, arbitrary[~arbitrary.isnan()], bits_near_zero()])
    points = torch.cat([points, *(torch.nextafter(points, torch.tensor(limit)) for limit in (-torch.inf, torch.inf))])
    assert torch.equal(bits(convert(points, dtype)), bits(points.to(dtype)))


def bits_near_zero():
    """float32 subnormals and the range of float16's subnormals."""
    return (
        torch.cat([torch.arange(0, 2**23, 4099), torch.arange(0x32000000, 0x39000000, 65521)]).int().view(torch.float32)
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_nan_stays_quiet_nan_of_the_same_sign(dtype):
    x = torch.tensor([0x7F800001, 0x7F801000, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32)
    x = torch.cat([x, x + torch.tensor(-(2**31), dtype=torch.int32)]).view(torch.float32)
    narrow = convert(x, dtype)
    quiet = 0x40 if dtype == torch.bfloat16 else 0x200
    assert narrow.isnan().all() and (bits(narrow) & quiet).all() and torch.equal(narrow.signbit(), x.signbit())


# --- renoise_upsample and start_noise ---


@pytest.mark.parametrize("correlation", [-1 / 3, 0.0, 1 / 3, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_renoise_upsample_in_every_dtype_and_order(shape, correlation):
    b, c, h, w = shape
    for dtype in DTYPES:
        x = randn(*shape, dtype=dtype)
        out = renoise(x, correlation)
        wide = renoise(x.float(), correlation)
        n = noise.renoise_noise(seeds_for(x), (c, 2 * h, 2 * w), 2, correlation)
        expected = ALPHA * F.interpolate(x.float(), scale_factor=2.0) + BETA * n if b else n
        torch.testing.assert_close(wide, expected, rtol=0, atol=1e-6)
        assert out.dtype == dtype and out.is_contiguous() and torch.equal(out, wide.to(dtype))
        last = renoise(x.to(memory_format=torch.channels_last), correlation)
        assert torch.equal(last, out) and (b == 0 or last.is_contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("shape", [(3, 2, 2), (1, 6, 10), (4, 34, 66), (3, 8, 64)])
def test_start_noise_is_rounded_once(shape):
    seeds = torch.tensor([0, 5, 2**63 - 1])
    wide = native.start_noise(seeds, *shape, torch.float32)
    torch.testing.assert_close(wide, noise.start_noise(seeds, shape), rtol=0, atol=1e-6)
    for dtype in HALVES:
        assert torch.equal(native.start_noise(seeds, *shape, dtype), wide.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_any_split_of_the_batch_gives_the_same_bits(dtype, order):
    x = randn(5, 3, 7, 37, dtype=dtype).contiguous(memory_format=order)
    seeds = seeds_for(x)
    whole = renoise(x)
    for cut in range(6):
        parts = [renoise(x[:cut], seeds=seeds[:cut]), renoise(x[cut:], seeds=seeds[cut:])]
        assert torch.equal(torch.cat(parts), whole)


def test_nan_and_infinity_pass_through():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]).view(1, 1, 1, 4)
    for dtype in DTYPES:
        out = renoise(x.to(dtype))[0, 0]
        assert out[:, :2].isnan().all() and (out[:, 2:4] == torch.inf).all() and (out[:, 4:6] == -torch.inf).all()
        assert out[:, 6:].isfinite().all()


# --- cfg_euler ---


def formula(x, v_cond, v_uncond):
    v = v_cond.float() if v_uncond is None else v_uncond.float() + SCALE * (v_cond.float() - v_uncond.float())
    return v if x is None else x.float() + DT * v


def cfg_euler(x, v_cond, v_uncond):
    return native.cfg_euler(x, v_cond, v_uncond, None if v_uncond is None else SCALE, None if x is None else DT)


@pytest.mark.parametrize("count", [0, 1, 33, 512, 1500])
def test_cfg_euler_with_every_mix_of_dtypes(count):
    """The same float32 operations as plain torch, so the same bits."""
    for x, v_cond, v_uncond in product([None, *DTYPES], DTYPES, [None, *DTYPES]):
        args = [t and randn(count, dtype=t, seed=i) for i, t in enumerate((x, v_cond, v_uncond))]
        out = cfg_euler(*args)
        assert out.dtype == (x or v_cond)
        assert torch.equal(out, formula(*args).to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cfg_euler_tails_and_orders(dtype):
    args = [randn(2, 3, 31, 41, dtype=dtype, seed=i) for i in range(3)]
    out = cfg_euler(*args)
    for count in (1, 15, 511, 513, 7000):
        assert torch.equal(cfg_euler(*(a.view(-1)[:count] for a in args)), out.view(-1)[:count])
    last = cfg_euler(*(a.to(memory_format=torch.channels_last) for a in args))
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, out)


X = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=X.double()), "x must be a float32, bfloat16 or float16 tensor on the CPU, got torch.float64 on cpu"),
        (dict(x=torch.zeros(2, 3, 5, 4).transpose(2, 3)), "x must be contiguous or channels-last"),
        (dict(v_cond=X[:1]), r"v_cond must have the shape of x, \(2, 3, 4, 5\), got \(1, 3, 4, 5\)"),
        (dict(v_uncond=X.to(memory_format=torch.channels_last)), "v_uncond must have .* memory order"),
        (dict(v_uncond=X.to("meta")), "v_uncond must be a float32.* on meta"),
        (dict(v_uncond=[1]), "v_uncond must be a float32.* got list"),
        (dict(scale=None), "x and dt, v_uncond and scale must be given or left out together"),
        (dict(x=None), "x and dt, v_uncond and scale must be given or left out together"),
    ],
)
def test_cfg_euler_refuses_what_would_read_wrong_memory(change, message):
    with pytest.raises(InputError, match=message):
        native.cfg_euler(**{**dict(x=X, v_cond=X, v_uncond=X, scale=SCALE, dt=DT), **change})


# --- threads ---


def test_threads_change_nothing():
    x, v = randn(200_001), randn(200_001, seed=1)
    expected = native.cfg_euler(x, v, None, None, DT)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(native.cfg_euler(x, v, None, None, DT), expected)
    finally:
        torch.set_num_threads(before)


def work(threads):
    """A checksum of work for several threads."""
    out, x, seeds = torch.zeros(4, 3, 128, 128), torch.ones(4, 3, 64, 64), torch.arange(4)
    alpha, beta = torch.tensor(0.5), torch.tensor(1.0)
    backends.load_extension().renoise_upsample(
        *(out.data_ptr(), operand(x), alpha.data_ptr(), beta.data_ptr(), (seeds.data_ptr(), len(seeds))),
        *(False, 1, 0.0, threads),
    )
    return out


def test_callers_at_the_same_time():
    expected = work(1)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(work, [1, 2, 3, 4] * 8))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() on this platform")
def test_a_forked_child_makes_threads_of_its_own():
    """In a process of its own and with one thread in torch, whose OpenMP does not survive a fork."""
    source = f"""
import os, sys, torch
sys.path.insert(0, {str(ROOT / "tests/native")!r})
from test_cpu_ops import work
torch.set_num_threads(1)
expected = work(4)
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(work(4), expected) for _ in range(20)) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)


# --- SIMD levels ---

LEVELS = [
    "x86-64",
    pytest.param("x86-64-v3", marks=pytest.mark.slow),
    pytest.param("x86-64-v4", marks=pytest.mark.slow),
]


def supports(level):
    """Whether this machine can run code of that level."""
    info = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", info.read_text())) if info.exists() else set()
    needed = {"x86-64": set(), "x86-64-v3": {"avx2", "fma", "f16c", "bmi2"}}
    return "sse2" in flags and needed.get(level, {f"avx512{part}" for part in ("f", "bw", "cd", "dq", "vl")}) <= flags


def strange_rows(dtype, width):
    """x and y (8, width), gate, shift, scale and weight (width,): sums and results that are NaN, infinite or subnormal
    are among them."""
    x, y = randn(8, width, dtype=dtype), randn(8, width, dtype=dtype, seed=1)
    gate, shift, scale, weight = (randn(width, dtype=dtype, seed=i) for i in range(2, 6))
    x[1, 0], x[2, -1], y[3, 0] = math.nan, math.inf, -math.inf
    x[4], y[4] = 1.5, 0.0  # h is shift
    x[5] = y[5] = 0.0
    shift[0], x[5, -1] = 1e-39, -3e-39
    x[6] *= 1e-38
    y[6] *= 1e-39
    x[7] *= 1e30
    return x, y, gate, shift, scale, weight


@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level_gives_the_same_bits(level, tmp_path, monkeypatch):
    """The sources built for one level against the extension, which took the best level of this machine."""
    assert backends.load_extension().linear_level()  # the extension has read the variable now, at the latest
    monkeypatch.setenv("MSDD_FAST_CPU_LEVEL", "plain")  # of the sources built here
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler or not supports(level):
        pytest.skip(f"needs g++ and an x86 CPU of level {level}")
    (options,) = re.findall(r"-Wall -Wextra (-f[^>]*)>", (ROOT / "CMakeLists.txt").read_text())
    library = tmp_path / "one_level.so"
    ops = ("renoise_upsample", "stage_transition", "final_step", "cfg_euler", "sde_step", "sigma_gate")
    names = (*ops, "runtime/dtype", "runtime/levels", "runtime/parallel")
    folders = [*(ROOT / "csrc/cpu/norm_modulate").glob("*.cpp"), *(ROOT / "csrc/cpu/qk_norm_rope").glob("*.cpp")]
    sources = [*(ROOT / f"csrc/cpu/{name}.cpp" for name in names), *folders, ROOT / "csrc/tests/one_level.cpp"]
    options += f" -O3 -std=c++17 -fPIC -pthread -march={level} -DMSDD_SIMD_CLONES= -I{ROOT / 'csrc/include'}"
    objects = {source: tmp_path / f"{source.parent.name}-{source.stem}.o" for source in sources}
    jobs = [[compiler, *options.split(), "-c", str(s), "-o", str(o)] for s, o in objects.items()]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: subprocess.run(job, check=True, timeout=300), jobs))
    link = ["-shared", "-pthread", "-Wl,--no-undefined", *map(str, objects.values()), "-o", str(library)]
    subprocess.run([compiler, *link], check=True, timeout=300)
    one = ctypes.CDLL(str(library))
    pointer, i64, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    one.renoise_upsample.argtypes = [pointer, pointer, ctypes.c_int, ctypes.c_int, pointer, *[i64] * 4]
    one.renoise_upsample.argtypes += [f32, f32, i64, ctypes.c_double]
    one.stage_transition.argtypes = [*[pointer] * 4, ctypes.c_int, pointer, *[i64] * 4]
    one.final_step.argtypes = [*[pointer] * 4, ctypes.c_int, ctypes.c_int, *[i64] * 4]
    one.sde_step.argtypes = [*[pointer] * 3, ctypes.c_int, pointer, *[i64] * 5]
    one.sigma_gate.argtypes = [*[pointer] * 9, ctypes.c_int, i64, i64]
    one.norm_modulate.argtypes = [*[pointer] * 8, ctypes.c_int, i64, i64]
    one.qk_norm_rope.argtypes = [*[pointer] * 6, ctypes.c_int, i64, i64, i64, ctypes.c_int]
    one.cfg_euler.argtypes = [*[pointer] * 4, ctypes.c_int, i64, f32, f32]
    for dtype, code in DTYPES.items():
        for order, last in ((torch.contiguous_format, 0), (torch.channels_last, 1)):
            x = randn(3, 3, 17, 75, dtype=dtype).contiguous(memory_format=order)
            seeds, expected = seeds_for(x), renoise(x)
            out = torch.empty_like(expected)
            arguments = (code, last, seeds.data_ptr(), *x.shape, ALPHA.item(), BETA.item(), 2, -1 / 3)
            one.renoise_upsample(out.data_ptr(), x.data_ptr(), *arguments)
            assert torch.equal(bits(out), bits(expected))
        args = [randn(25, 2, 3 * 64, dtype=dtype, seed=i) for i in range(3)]  # lines of 40 pixels
        seeds, scalars = seeds_for(args[0][0]), (DT, ALPHA, BETA)
        expected = native.stage_transition(*args[:2], *scalars, seeds, 2, 8, -1 / 3, args[2], SCALE)
        out = torch.empty_like(expected)
        one.stage_transition(*(a.data_ptr() for a in (out, *args)), code, seeds.data_ptr(), 5, 2, 3, 8)
        assert torch.equal(bits(out), bits(expected))
        for pixel, pixel_code in {**DTYPES, torch.uint8: 3}.items():
            expected = native.final_step(*args[:2], DT, 8, pixel, args[2], SCALE, False)
            out = torch.empty_like(expected)
            one.final_step(*(a.data_ptr() for a in (out, *args)), code, pixel_code, 5, 2, 3, 8)
            assert torch.equal(bits(out), bits(expected))
        x, v = randn(2, 3, 12, 68, dtype=dtype), randn(3 * 17, 2, 16, 3, dtype=dtype, seed=1)
        expected = native.sde_step(x, v, torch.tensor(0.866), torch.tensor(0.634), seeds, 2, None, 4, False)
        out = torch.empty_like(expected)
        one.sde_step(*(a.data_ptr() for a in (out, x, v)), code, seeds.data_ptr(), 2, 3, 12, 68, 4)
        assert torch.equal(bits(out), bits(expected))
        shapes = ((5, 70), (5, 70), (5, 1), (1, 70), (1, 70), (70,), (70,))
        args = [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
        expected = native_sigma_gate(*args[:6], None, args[6], 5, 1e-6)
        out = [torch.empty_like(e) for e in expected]
        one.sigma_gate(*(a.data_ptr() for a in (*out, *args)), code, 5, 70)
        assert all(torch.equal(bits(o), bits(e)) for o, e in zip(out, expected, strict=True))
        for width, rms in product((1, 16, 70, 256), (False, True)):
            x, y, gate, shift, scale, weight = args = strange_rows(dtype, width)
            expected = native.gate_residual_norm_modulate(
                x, y, gate[None], shift[None], scale[None], len(x), 1e-6, weight if rms else None
            )
            out = [torch.empty_like(e) for e in expected]
            given = [*(t.data_ptr() for t in (*out, *args[:5])), weight.data_ptr() if rms else None]
            one.norm_modulate(*given, code, *x.shape)
            assert all(torch.equal(bits(o), bits(e)) for o, e in zip(out, expected, strict=True)), (width, rms)
        for size, rms, turned in product((4, 16, 20, 64, 72, 128), (False, True), (True, False)):
            qkv = strange_rows(dtype, 3 * 2 * size)[0].view(2, 4, 3, 2, size)
            weight, bias, angles = randn(1, 2, size), randn(1, 2, size, seed=1), randn(4, size // 2, seed=2)
            tables = weight, None if rms else bias, angles.cos(), angles.sin() if turned else None
            expected = native.qk_norm_rope(qkv, *tables, 4, 1e-6)
            out = torch.empty_like(expected)
            given = [None if t is None else t.data_ptr() for t in (out, qkv, *tables)]
            one.qk_norm_rope(*given, code, 2, 4, 2, size)
            assert torch.equal(bits(out), bits(expected)), (size, rms, turned)
        args = [randn(12_345, dtype=dtype, seed=i) for i in range(3)]
        args[0][:3] = torch.tensor([math.nan, math.inf, -math.inf])
        out = torch.empty_like(args[0])
        one.cfg_euler(*(a.data_ptr() for a in (out, *args)), code, len(out), SCALE.item(), DT.item())
        assert torch.equal(bits(out), bits(cfg_euler(*args)))
