"""What ptxas made of csrc/cuda in the built extension: registers, spills, instructions (no GPU needed).

Read from msdd_fast._C itself with the cuobjdump and nvdisasm of Triton's wheel.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from msdd_fast import backends
from tests.conftest import ROOT

HAS_EXTENSION, WHY = backends.extension_status()
INFO = backends.build_info()
if not HAS_EXTENSION or not INFO.get("cuda"):
    why = WHY if not HAS_EXTENSION else f"was built without CUDA: {INFO.get('cuda_reason')}"
    pytest.skip(f"msdd_fast._C {why}", allow_module_level=True)
triton = pytest.importorskip("triton", reason="its wheel holds cuobjdump and nvdisasm")

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BINARY = Path(backends.load_extension().__file__)
ARCHS = INFO["cuda_archs"]
# Kernels by (dtype, chunks of 64 keys, masked), as in csrc/cuda/context_attention.cu.
VARIANTS = [(d, *v) for d in ("BFloat16", "Float16") for v in ((2, False), (2, True), (3, False), (3, True), (4, True))]
NAME = re.compile(r"context_attention_kernelINS_\d+(\w+?)ELi(\d)ELb([01])E")


def tool(name: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True, cwd=cwd).stdout


def variant(mangled: str) -> tuple[str, int, bool] | None:
    found = NAME.search(mangled)
    return (found[1], int(found[2]), found[3] == "1") if found else None


@pytest.fixture(scope="module")
def resources() -> dict:
    """(arch, variant) to the numbers of --dump-resource-usage."""
    facts, arch, name = {}, "", None
    for line in tool("cuobjdump", "--dump-resource-usage", BINARY).splitlines():
        if line.startswith("arch = sm_"):
            arch = line.removeprefix("arch = sm_")
        elif line.startswith(" Function "):
            name = variant(line)
        elif name and "REG:" in line:
            facts[arch, name] = {key: int(value) for key, value in re.findall(r"(\w+(?:\[0\])?):(\d+)", line)}
    return facts


@pytest.fixture(scope="module")
def sass(tmp_path_factory) -> dict:
    """(arch, variant) to how often each instruction occurs."""
    folder = tmp_path_factory.mktemp("cubins")
    tool("cuobjdump", "--extract-elf", "all", BINARY, cwd=folder)
    counts = {}
    for cubin in folder.glob("*.cubin"):
        arch = re.search(r"sm_(\d+)", cubin.name)[1]
        for section in re.split(r"^\s*\.section\s+", tool("nvdisasm", "-c", cubin), flags=re.M):
            name = variant(section.partition(",")[0]) if section.startswith(".text.") else None
            if name:
                pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)"
                counts[arch, name] = Counter(re.findall(pattern, section, re.M))
    return counts


def total(counts: Counter, prefix: str) -> int:
    return sum(n for name, n in counts.items() if name.startswith(prefix))


def test_every_variant_is_there_for_every_architecture(resources, sass):
    assert set(resources) == set(sass) == {(a, v) for a in ARCHS for v in VARIANTS}
    ptx = re.findall(r"sm_(\d+)\.ptx", tool("cuobjdump", "--list-ptx", BINARY))
    assert ptx == [max(ARCHS, key=int)]  # for the GPUs to come


def test_registers_and_occupancy(resources):
    """Nothing spills. 16 warps a multiprocessor up to 128 keys, 12 above, where it has the shared memory.

    And 12 for fewer than 128 keys from sm_100 on.
    """
    for (arch, (_, chunks, masked)), facts in resources.items():
        assert facts["STACK"] == facts["LOCAL"] == 0, arch
        assert facts["SHARED"] in (0, 1024), arch  # from sm_90 on, the part that the system takes is shown
        threads, blocks = 128, 4 if chunks == 2 and not (masked and int(arch) >= 100) else 3
        registers = -(-facts["REG"] // 8) * 8  # allotted in eights
        assert registers * threads * blocks <= 65536, (arch, facts)
        # K, V and 16 rows for each of 4 warps, 128 bytes a row, and 1 KiB that the system takes of each block.
        shared = 128 * (2 * 64 * chunks + 4 * 16) + 1024
        memory = {"80": 164, "90": 228}.get(arch)
        if memory and (chunks == 2 or arch == "90"):
            assert shared * blocks <= memory * 1024, (arch, shared)


OTHER_ARCHS = ["86", "89", "100", "120"]


@pytest.fixture(scope="module")
def compiling(tmp_path_factory):
    """nvcc for each of OTHER_ARCHS, all at once."""
    folder = tmp_path_factory.mktemp("archs")
    source, include = ROOT / "csrc/cuda/context_attention.cu", ROOT / "csrc/include"
    command = ["nvcc", "-std=c++17", f"-I{include}", "-cubin", "-Xptxas=-v", source]
    with ExitStack() as stack:
        yield {
            arch: stack.enter_context(
                subprocess.Popen(
                    [*command, f"-arch=sm_{arch}", "-o", folder / f"{arch}.cubin"], stderr=subprocess.PIPE, text=True
                )
            )
            for arch in OTHER_ARCHS
        }


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the PATH")
@pytest.mark.parametrize("arch", OTHER_ARCHS)
def test_nothing_spills_on_architectures_that_are_not_built_by_default(compiling, arch):
    _, printed = compiling[arch].communicate()
    assert compiling[arch].returncode == 0, printed
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", printed)
    assert len(spills) == len(VARIANTS) and set(spills) == {("0", "0", "0")}, printed


def test_instructions(sass):
    """Tensor cores and asynchronous copies in the counts that the tile walk implies, and no local memory."""
    for (arch, (dtype, chunks, masked)), counts in sass.items():
        where = (arch, dtype, chunks, masked, counts)
        unrolled = chunks if chunks == 2 else 1  # the loop over 3 or 4 chunks is rolled
        hmma = "HMMA.16816.F32.BF16" if dtype == "BFloat16" else "HMMA.16816.F32"
        # A chunk: 8 key tiles x 4 steps of 16 features, and 4 steps of 16 keys x 8 feature tiles.
        assert counts[hmma] == total(counts, "HMMA") == 64 * unrolled, where
        # Queries 4; a chunk: 8 key tiles x 2, and transposed 4 steps of keys x 4.
        assert counts["LDSM.16.M88.4"] == 4 + 16 * unrolled and counts["LDSM.16.MT88.4"] == 16 * unrolled, where
        # 16 bytes of K and V for each of 128 threads, 4 for a tile: two places for queries, one for `accumulate`.
        copies = 2 * chunks * 4 + 3 * 4
        assert total(counts, "LDGSTS.E.BYPASS.LTC128B.128") == total(counts, "LDGSTS") == copies, where
        assert counts["STG.E.128"] == total(counts, "STG") == 4, where
        assert total(counts, "LDL") == total(counts, "STL") == total(counts, "LDG.") == 0, where
        assert total(counts, "MUFU.EX2") in range(32 * unrolled, 32 * unrolled + 4), where


def test_the_binary_needs_no_cuda_library_and_no_driver():
    """It imports and answers on a machine without either: the runtime is linked in and looks for the driver later."""
    needed = subprocess.run(["ldd", BINARY], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in needed
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {str(BINARY)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "libcuda" not in open("/proc/self/maps").read()  # not by importing
print(*module.cuda_versions())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    driver, runtime = map(int, said.split())
    assert runtime >= 11000 and (driver == 0 or driver >= 11000)


def test_the_extension_itself_refuses_what_it_cannot_do():
    """Before it touches a device: there may be none here."""
    call = backends.load_extension().context_attention

    def heads(images=1, tokens=1, heads=1, size=64, strides=(64, 64, 64, 1), address=16, dtype=1):
        return address, dtype, (images, tokens, heads, size), strides

    def every(keys=128, tokens=1, **of):
        q, k = heads(tokens=tokens, **of), heads(tokens=keys, **of)
        return dict(q=q, k=k, v=k, accumulate=None, out=q, stream=0, device=0)

    aligned = "must have rows at multiples of 16 bytes, got address"
    for arguments, message in (
        (every(dtype=0), "dtype must be bfloat16 or float16"),
        (every(keys=0), "keys must be 1 to 256, got 0"),
        (every(keys=257), "keys must be 1 to 256, got 257"),
        (every(images=2**20, heads=2**10), r"images \* heads and queries must be below 2\^24"),
        (every() | dict(q=heads(address=8)), f"q {aligned} 8, strides 64, 64, 64"),
        (every() | dict(v=heads(tokens=128, strides=(64, 4, 64, 1))), f"v {aligned} 16, strides 64, 4, 64"),
        (every() | dict(accumulate=heads(strides=(1, 64, 64, 1))), f"accumulate {aligned} 16"),
        (every() | dict(v=heads(tokens=127)), r"v must be of shape \(1, 128, 1, 64\), got \(1, 127, 1, 64\)"),
        (every() | dict(v=heads(tokens=128, dtype=2)), "v must be bfloat16, got float16"),
        (every() | dict(out=heads(strides=(64, 64, 64, 2))), "out must be contiguous in its last dimension"),
        (every() | dict(out=heads(address=0)), "out is missing"),
        (every(size=32), r"q must be of shape \(1, 1, 1, 64\), got \(1, 1, 1, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)
    call(**every(tokens=0))  # nothing to do


def test_blocks_of_an_image_and_head():
    """Every multiprocessor has work first; then a block takes up to 4 times 64 queries, to read K and V less often."""
    splits = backends.load_extension().context_attention_splits
    assert [splits(12, n, 128, 132) for n in (1, 16, 64, 65, 256, 1024)] == [1, 1, 1, 2, 4, 16]
    assert [splits(96, n, 128, 132) for n in (256, 1024)] == [4, 8]
    assert [splits(768, n, 128, 132) for n in (16, 64, 256, 1024)] == [1, 1, 1, 4]
    for pairs in (1, 12, 100, 5000):
        for queries in (1, 63, 64, 65, 1000, 4096):
            most = -(-queries // 64)
            assert 1 <= splits(pairs, queries, 128, 132) <= most
