"""The CUDA kernel of context_attention, proven without a GPU.

Its source is compiled for the CPU with emulated instructions (csrc/tests/emulated_warp.h) and run, thread for thread:
the result against float64, every output written exactly once and nothing else, every read inside its tensor, no bank
conflict, no access that no barrier orders. What ptxas made of it is in tests/csrc/test_cuda_binary.py.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.tolerances import ROUNDING

COMPILER = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
if COMPILER is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

KERNEL = ROOT / "csrc/include/msdd_fast/detail/context_attention_kernel.h"
FAULTS = ("divergences", "outside", "misaligned", "conflicts", "races")
D = 64


def compile_kernel(folder: Path, source: str | None = None) -> ctypes.CDLL:
    """The emulated kernel as a library; with another text of the kernel if ``source`` is given."""
    library = folder / "emulated.so"
    overlay = folder / "include"
    if source is not None:
        (overlay / "msdd_fast/detail").mkdir(parents=True)
        (overlay / "msdd_fast/detail/context_attention_kernel.h").write_text(source)
    includes = [f"-I{p}" for p in (overlay, ROOT / "csrc/include", ROOT / "csrc/tests")]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-DMSDD_EMULATE"]
    text = ROOT / "csrc/tests/emulate_context_attention.cpp"
    subprocess.run([COMPILER, *flags, *includes, str(text), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return compile_kernel(tmp_path_factory.mktemp("kernel"))


def spaced(shape, dtype, order, generator, scale=1.0):
    """Random (B, T, H, 64) inside a larger buffer full of NaN: (view, buffer). order: "batch", "token" or "packed"."""
    b, t, h, d = shape
    if order == "packed":  # the middle part of a token-major buffer (T, B, 3, H, d)
        buffer = torch.full((t, b, 3, h, d), math.nan, dtype=dtype)
        view = buffer[:, :, 1].transpose(0, 1)
    elif order == "token":
        buffer = torch.full((t, b, h + 1, d), math.nan, dtype=dtype)
        view = buffer[:, :, :h].transpose(0, 1)
    else:
        buffer = torch.full((b, t + 2, h, d), math.nan, dtype=dtype)
        view = buffer[:, 1 : t + 1]
    view.copy_(torch.randn(shape, generator=generator) * scale)
    return view, buffer


def emulate(kernel, q, k, v, accumulate, out, splits=1, turns=0, early=False):
    """Run on (view, buffer) pairs; accumulate may be None. Returns (writes of each 16 bytes of out, faults)."""
    pairs = (q, k, v, accumulate, out)
    views = [(0, 0, 0, 0) if p is None else (p[0].data_ptr(), *p[0].stride()[:3]) for p in pairs]
    extents = [(0, 0) if p is None else (p[1].data_ptr(), p[1].numel() * 2) for p in pairs]
    writes = np.zeros(out[1].numel() // 8, dtype=np.int32)
    faults = np.full(len(FAULTS), -1, dtype=np.int64)
    arrays = [np.array(a, dtype=np.int64) for a in (views, extents)]
    (b, n, h, _), keys = q[0].shape, k[0].shape[1]
    kernel.emulate(
        *(a.ctypes.data_as(ctypes.c_void_p) for a in arrays),
        *(ctypes.c_int64(i) for i in (b, h, n, keys)),
        *(ctypes.c_int(int(i)) for i in (q[0].dtype == torch.bfloat16, splits, turns, early)),
        *(a.ctypes.data_as(ctypes.c_void_p) for a in (writes, faults)),
    )
    return writes, dict(zip(FAULTS, faults.tolist(), strict=True))


def exact(q, k, v, accumulate):
    """float64 result, and the sum of the absolute terms, which bounds the rounding of the weights."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(2, 3) / math.sqrt(D)).softmax(dim=3)
    out, terms = ((weights @ x).transpose(1, 2) for x in (v, v.abs()))
    return (out if accumulate is None else out + accumulate.double()), terms


def check(kernel, *, b=1, n=16, h=1, keys=128, dtype=torch.bfloat16, order="batch", add=False, scale=1.0, **how):
    generator = torch.Generator().manual_seed(n + 1000 * keys)
    q = spaced((b, n, h, D), dtype, order, generator, scale)
    k = spaced((b, keys, h, D), dtype, order, generator, scale)
    v = spaced((b, keys, h, D), dtype, order, generator)
    accumulate = spaced((b, n, h, D), dtype, order, generator) if add else None
    out = spaced((b, n, h, D), dtype, "token" if order == "packed" else "batch", generator)
    out[1].fill_(math.nan)
    writes, faults = emulate(kernel, q, k, v, accumulate, out, **how)
    assert faults == dict.fromkeys(FAULTS, 0)
    mine = torch.zeros(out[1].shape, dtype=torch.int32)
    mine.as_strided(out[0].shape, out[0].stride(), out[0].storage_offset()).fill_(1)
    assert np.array_equal(writes, mine.reshape(-1, 8)[:, 0].numpy())  # once each, and nothing besides
    expected, terms = exact(q[0], k[0], v[0], accumulate and accumulate[0])
    # One rounding of each weight and one of the result; float32 inside.
    limit = ROUNDING[dtype] * (terms + expected.abs()) + 1e-5
    error = (out[0].double() - expected).abs()
    assert (error <= limit).all(), (error - limit).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256])
def test_any_context_length(kernel, keys, dtype):
    check(kernel, n=17, keys=keys, dtype=dtype, add=keys % 2 == 0)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 65, 150])
@pytest.mark.parametrize("add", [False, True])
def test_any_number_of_queries(kernel, n, add):
    check(kernel, n=n, add=add)
    check(kernel, n=n, add=add, splits=-(-n // 64))


@pytest.mark.parametrize("order", ["batch", "token", "packed"])
def test_strides_images_and_heads(kernel, order):
    check(kernel, b=2, n=20, h=3, order=order, add=True)
    check(kernel, b=3, n=5, h=2, keys=77, order=order)


@pytest.mark.parametrize("turns", [0, 1])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("keys", [100, 128, 150, 200])
def test_neither_the_order_of_threads_nor_of_copies_matters(kernel, turns, early, keys):
    """150 queries in one block: three rounds, with idle warps in the last."""
    check(kernel, n=150, keys=keys, add=True, turns=turns, early=early)


@pytest.mark.parametrize("keys", [128, 192, 256])
@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_extreme_scores(kernel, keys, scale):
    """All equal, and one-hot rows whose scores differ by hundreds."""
    check(kernel, n=16, keys=keys, scale=scale)


# --- the proof itself ---


def halves(words):
    """(..., n) words to (..., 2n) bfloat16 elements, the lower half first."""
    return torch.from_numpy(words.view(np.int16).copy()).view(torch.bfloat16).double().numpy()


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def test_emulated_tensor_core_has_the_layout_of_the_ptx_isa(kernel):
    """mma.m16n8k16, from the tables of its fragments: element i of lane l lies at this row and column."""
    generator = np.random.default_rng(0)
    values = torch.from_numpy(generator.standard_normal((32, 12))).bfloat16().view(torch.int16).numpy()
    a, b = values[:, :8].copy().view(np.uint32), values[:, 8:].copy().view(np.uint32)
    c = generator.standard_normal((32, 4)).astype(np.float32)
    left, right, start = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    lane = np.arange(32)
    group, member = lane >> 2, lane & 3
    for i in range(8):
        left[group + (8 if i in (2, 3, 6, 7) else 0), member * 2 + (i & 1) + (8 if i >= 4 else 0)] = halves(a)[:, i]
    for i in range(4):
        right[member * 2 + (i & 1) + (8 if i >= 2 else 0), group] = halves(b)[:, i]
        start[group + (8 if i >= 2 else 0), member * 2 + (i & 1)] = c[:, i]
    kernel.emulate_multiply_add(pointer(a), pointer(b), pointer(c))
    product = start + left @ right
    for i in range(4):
        expected = product[group + (8 if i >= 2 else 0), member * 2 + (i & 1)]
        np.testing.assert_allclose(c[:, i], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_emulated_matrix_loads_have_the_layout_of_the_ptx_isa(kernel, transposed):
    elements = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)  # matrix, row, column
    words = np.zeros((32, 4), dtype=np.uint32)
    kernel.emulate_load_matrices(pointer(elements), ctypes.c_int(transposed), pointer(words))
    expected = elements.transpose(0, 2, 1) if transposed else elements
    for lane in range(32):
        two = expected[:, lane >> 2, 2 * (lane & 3) : 2 * (lane & 3) + 2]
        assert np.array_equal(words.view(np.uint16).reshape(32, 4, 2)[lane], two)


@pytest.mark.parametrize(
    ("text", "instead", "fault"),
    [
        ("(segment ^ row % 8)", "segment", "conflicts"),
        ("sync_warp();  // every lane has its queries: their place is free", "", "races"),
        ("wait_groups<1>();  // all but the copy of `accumulate`", "", "races"),
        ("sync_warp();  // `accumulate` is there for every lane", "", "races"),
    ],
)
def test_the_proof_notices(tmp_path, text, instead, fault):
    """A kernel without its swizzle, a barrier or a wait."""
    source = KERNEL.read_text()
    assert source.count(text) == 1
    kernel = compile_kernel(tmp_path, source.replace(text, instead))
    generator = torch.Generator().manual_seed(0)
    q, k, v, accumulate, out = (
        spaced((1, t, 1, D), torch.bfloat16, "batch", generator) for t in (150, 128, 128, 150, 150)
    )
    assert emulate(kernel, q, k, v, accumulate, out)[1][fault] > 0


# --- numerics of the softmax in chunks ---


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("chunk", [64, 128])
def test_the_softmax_in_chunks_is_the_softmax(scale, chunk):
    """The recurrence of the kernel in float64, equal to the one-pass softmax at any spread of scores."""
    generator = np.random.default_rng(1)
    scores, v = scale * generator.standard_normal((40, 256)), generator.standard_normal((256, D))
    scores[0], scores[1, 200] = 7.0, 1e9  # all equal; one far above the rest, in a later chunk
    highest, total, out = np.full((40, 1), -np.inf), np.zeros((40, 1)), np.zeros((40, D))
    for start in range(0, 256, chunk):
        part = scores[:, start : start + chunk]
        new = np.maximum(highest, part.max(1, keepdims=True))
        shrink, p = np.exp2(highest - new), np.exp2(part - new)
        total, out = total * shrink + p.sum(1, keepdims=True), out * shrink + p @ v[start : start + chunk]
        highest = new
    weights = np.exp2(scores - scores.max(1, keepdims=True))
    expected = weights @ v / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(out / total, expected, rtol=1e-12, atol=1e-13)
