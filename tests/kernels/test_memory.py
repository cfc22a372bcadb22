"""The fused ops need no memory but for their inputs and their output: no noise tensor, no copy, no intermediate.

Proven for the C++ kernels by a limit on the process's address space, which binds every allocator; for the Triton
kernels by what their launchers allocate and pass on (a kernel itself cannot allocate; that it spills nothing is in
test_aot.py), and on a GPU by the peak of PyTorch's allocator.
"""

import importlib
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msdd_fast import ops
from msdd_fast.backends import extension_status

MEBIBYTE = 2**20


def case(name, batch, grid, device="cpu", dtype=torch.float32):
    """The op's positional arguments, the guiding velocities being the halves of one tensor."""
    x = torch.ones(grid**2, batch, 192, dtype=dtype, device=device)
    v, v_uncond = torch.ones(grid**2, 2 * batch, 192, dtype=dtype, device=device).split(batch, dim=1)
    seeds, half = torch.arange(batch, device=device), torch.tensor(0.5, device=device)
    image = x.view(batch, 3, 8 * grid, 8 * grid)
    return {
        "renoise_upsample": (image, half, half, seeds, 1, -1 / 3),
        "stage_transition": (x, v, half, half, half, seeds, 1, 8, -1 / 3, v_uncond, half),
        "final_step": (x, v, half, 8, torch.float32, v_uncond, half),
        "cfg_euler": (x, v, v_uncond, half, half),
        "cfg_combine": (v, v_uncond, half),
        "euler_step": (x, v, half),
    }[name]


NAMES = ["renoise_upsample", "stage_transition", "final_step", "cfg_euler", "cfg_combine", "euler_step"]


@contextmanager
def address_space_for(size):
    """Only ``size`` bytes more may be allocated inside; resident memory says less, as malloc may reuse what it kept."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def refused(fresh):
    """``refused(setup, call, size)``: ``call`` needs more than ``size`` bytes.

    In a fresh process: the malloc of this one may have kept enough to reuse.
    """
    need_a_limit()

    def check(setup, call, size):
        code = f"""
from tests.kernels.test_memory import *
torch.set_num_threads(1)
{setup}
with address_space_for({size}), pytest.raises(RuntimeError, match="alloc"):
    {call}
"""
        fresh(code, check=True)

    return check


def need_a_limit():
    if not sys.platform.startswith("linux"):
        pytest.skip("the limit on the address space is read and set as on Linux")


@pytest.mark.parametrize("name", NAMES)
def test_the_cpu_kernels_need_memory_for_their_output_only(name):
    """Tensors of 48 MiB and more, for which malloc asks the system each time."""
    if not extension_status()[0]:
        pytest.skip(f"backend 'cpu': {extension_status()[1]}")
    need_a_limit()
    arguments = case(name, 64, 32)
    size = getattr(ops, name)(*arguments, backend="cpu").nbytes  # and all threads have begun
    assert size >= 48 * MEBIBYTE
    with address_space_for(size + 4 * MEBIBYTE):
        out = getattr(ops, name)(*arguments, backend="cpu")
    assert out.nbytes == size


def window(grid, batch=1, heads=4):
    """q, k, v of an SSDD-S block, and its table, at 8 * grid pixels."""
    q, k, v = torch.ones(batch, grid**2, 3, heads, 40).unbind(2)
    return q, k, v, torch.ones(15, 15, heads), grid, grid


@pytest.mark.parametrize("grid", [32, 64])
def test_window_attention_needs_memory_for_its_output_only(grid, refused):
    """At 256 and 512 px; the dense reference needs at least heads N^2 floats, 16 and 256 MiB an image."""
    if not extension_status()[0]:
        pytest.skip(f"backend 'cpu': {extension_status()[1]}")
    need_a_limit()
    arguments = window(grid, batch=64 * 1024 // grid**2)
    size = ops.window_attention(*arguments, backend="cpu").nbytes  # and all threads have begun and have their buffers
    assert size >= 40 * MEBIBYTE
    with address_space_for(size + 4 * MEBIBYTE):
        out = ops.window_attention(*arguments, backend="cpu")
    assert out.nbytes == size
    refused(f"arguments = window({grid}, 1)", "ops.window_attention(*arguments, backend='eager')", 4 * grid**4 * 4)


def test_group_norm_modulate_silu_needs_memory_for_its_output_only(refused):
    """Neither scale and shift at the size of x nor steps in between; statistics are 1/256 of x."""
    if not extension_status()[0]:
        pytest.skip(f"backend 'cpu': {extension_status()[1]}")
    need_a_limit()
    x = torch.ones(1, 64, 512, 512).to(memory_format=torch.channels_last)
    scale, shift = torch.ones(1, 128, 64, 64).chunk(2, dim=1)

    def run(backend):
        return ops.group_norm_modulate_silu(x, 32, 1e-5, scale=scale, shift=shift, backend=backend)

    size = run("cpu").nbytes
    with address_space_for(size + size // 256 + 4 * MEBIBYTE):
        out = run("cpu")
    assert out.nbytes == size
    setup = "x = torch.ones(1, 64, 512, 512); scale, shift = torch.ones(1, 128, 64, 64).chunk(2, dim=1)"
    call = "ops.group_norm_modulate_silu(x, 32, 1e-5, scale=scale, shift=shift, backend='eager')"
    refused(setup, call, size + size // 256 + 4 * MEBIBYTE)


def test_the_limit_shows_a_noise_tensor(refused):
    """The same measurement of plain PyTorch, which has one: so the test above could fail."""
    need_a_limit()
    call = "renoise_upsample_with(x, alpha, beta, torch.randn(64, 3, 512, 512))"
    setup = "from msdd_fast.ops.renoise_upsample import renoise_upsample_with\n"
    refused(setup + "x, alpha, beta, *_ = case('renoise_upsample', 64, 32)", call, 4 * 64 * 3 * 512**2 + 4 * MEBIBYTE)


class Allocations(TorchDispatchMode):
    """Results of all operations that make a tensor with memory of its own."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.made.append((str(func), out.shape))
        return out


class Recorder:
    """Stands for a Triton kernel and keeps the tensors that it is launched with."""

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **options):
        self.tensors = [a for a in args if isinstance(a, torch.Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_triton_launchers_allocate_their_output_only(name, monkeypatch):
    kernel = Recorder()
    monkeypatch.setattr(importlib.import_module(f"msdd_fast.kernels.{name}"), f"{name}_kernel", kernel)
    arguments = case(name, 2, 2)
    with Allocations() as allocations:
        out = importlib.import_module(f"msdd_fast.ops.{name}")._triton(*arguments)
    assert [shape for _, shape in allocations.made] == [out.shape], allocations.made
    mine = {a.data_ptr() for a in (*arguments, out) if isinstance(a, torch.Tensor)}
    assert {t.data_ptr() for t in kernel.tensors} <= mine


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_peak_on_the_gpu_is_the_output(name, dtype):
    arguments = case(name, 64, 32, "cuda", dtype)
    getattr(ops, name)(*arguments, backend="triton")  # compiled
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = getattr(ops, name)(*arguments, backend="triton")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= out.nbytes + MEBIBYTE
