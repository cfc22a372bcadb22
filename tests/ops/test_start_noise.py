"""start_noise on every backend against the eager reference."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.diffusion import noise
from msdd_fast.diffusion.patch_rows import patchify
from msdd_fast.errors import InputError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 6, 10), (1, 2, 2), (4, 8, 66), (3, 2, 16)])
def test_against_eager(backend, device, assert_rounded, shape, dtype):
    seeds = torch.tensor([0, 5, 2**63 - 1], device=device)
    out = ops.start_noise(seeds, shape, dtype, backend=backend)
    assert out.device.type == device.type
    assert_rounded(out.cpu(), noise.start_noise(seeds.cpu(), shape), dtype)


def test_float32_to_one_millionth(backend, device):
    seeds = torch.arange(8, device=device)
    out = ops.start_noise(seeds, (3, 32, 32), backend=backend)
    torch.testing.assert_close(out.cpu(), noise.start_noise(seeds.cpu(), (3, 32, 32)), rtol=0, atol=1e-6)


def test_any_split_of_the_batch_is_identical(backend, device):
    seeds = torch.arange(5, device=device)
    whole = ops.start_noise(seeds, (3, 4, 6), torch.bfloat16, backend=backend)
    parts = [ops.start_noise(s, (3, 4, 6), torch.bfloat16, backend=backend) for s in (seeds[:2], seeds[2:])]
    assert torch.equal(torch.cat(parts), whole)
    assert ops.start_noise(seeds[:0], (3, 4, 6), backend=backend).shape == (0, 3, 4, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "p"), [((3, 8, 16), 8), ((1, 6, 4), 2), ((3, 8, 4), 4), ((2, 6, 12), 6), ((3, 16, 16), 16)]
)
def test_patch_rows_hold_the_same_numbers(backend, device, shape, p, dtype):
    seeds = torch.tensor([0, 5, 2**63 - 1], device=device)
    image = ops.start_noise(seeds, shape, dtype, backend=backend)
    for name in (backend, "eager"):
        rows = ops.start_noise(seeds, shape, dtype, patch_size=p, backend=name)
        assert rows.is_contiguous() and rows.dtype == dtype
        expected = patchify(ops.start_noise(seeds, shape, dtype, backend=name), p)
        assert torch.equal(rows, expected) and rows.shape == (image[0, 0].numel() // p**2, 3, shape[0] * p * p)
    assert ops.start_noise(seeds[:0], shape, dtype, patch_size=p, backend=backend).shape == (
        rows.shape[0],
        0,
        rows.shape[2],
    )


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shape=(3, 5, 4)), r"shape must be \(C, H, W\) with even H and W .* got \(3, 5, 4\)"),
        (dict(shape=(3, 4, 7)), r"shape must be \(C, H, W\) with even H and W .* got \(3, 4, 7\)"),
        (dict(seeds=torch.tensor(3)), r"seeds must be an int64 tensor \(B,\), got torch.int64 \(\)"),
        (dict(seeds=torch.tensor([-3])), r"seeds must be in \[0, 2\^63\), got -3"),
        (dict(seeds=[1, 2]), r"seeds must be an int64 tensor \(B,\), got list"),
        (dict(shape=(8, 2**16, 2**16)), r"shape must hold at most 2\^30 blocks of 2x2 pixels, got \(8, 65536, 65536\)"),
        (dict(patch_size=3), r"patch_size must be an even int >= 2 \(noise comes in 2x2 blocks\), got 3"),
        (dict(patch_size=8), r"shape must hold whole patches of 8x8 pixels, got \(3, 4, 4\)"),
        (dict(dtype=torch.float64), "dtype must be float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_bad_input_has_one_text_on_every_backend(name, change, message):
    arguments = dict(seeds=torch.tensor([1]), shape=(3, 4, 4), dtype=torch.float32)
    with pytest.raises(InputError, match=message):
        ops.start_noise(**{**arguments, **change}, backend=name)
