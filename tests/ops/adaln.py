"""What the two adaLN ops are tested on: rows spread over tables in every way, large means, odd widths."""

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (shape of x, rows of the tables, split)
LAYOUTS = [
    ((2, 3, 96), 2, None),
    ((5, 33), 1, None),
    ((3, 2, 2, 40), 3, None),
    ((1, 7), 1, None),
    ((6, 1, 100), 2, 4),
    ((3, 2, 16), 2, 0),
    ((3, 2, 16), 2, 6),
]
LARGE = [((3, 768), 1, None), ((2, 1030), 2, 1)]


def randn(*shape, seed, mean=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean


def tables(groups, width, count, device, dtype):
    """Views of one packed table, so rows are apart."""
    return randn(groups, count * width, seed=9).to(device, dtype).chunk(count, dim=1)


def per_row(table, rows, split):
    """The row of the table that each row of x takes."""
    if split is not None:
        return torch.stack([table[0 if r < split else 1] for r in range(rows)])
    return torch.stack([table[r * len(table) // rows] for r in range(rows)])


def rms_weight(width, split, device, dtype):
    """A weight, one for each run of rows that ``split`` makes."""
    shape = (width,) if split is None else (2, width)
    return (1 + randn(*shape, seed=5)).to(device, dtype)


def formula(x, shift, scale, split, weight=None):
    """norm_modulate in float64, row by row; with a weight that of RMSNorm."""
    rows = x.double().reshape(-1, x.shape[-1])
    shift, scale = (per_row(t.double(), len(rows), split) for t in (shift, scale))
    centred = rows - rows.mean(1, keepdim=True) if weight is None else rows
    h = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    if weight is not None:
        h = h * (weight.double() if split is None else per_row(weight.double(), len(rows), split))
    return (h * (1 + scale) + shift).reshape(x.shape)


BAD_SPLITS = [
    (-1, 2, r"split must be an int in \[0, 4\], the number of rows, got -1"),
    (5, 2, r"split must be an int in \[0, 4\], the number of rows, got 5"),
    (True, 2, r"split must be an int in \[0, 4\], the number of rows, got True"),
    (2, 1, "must have 2 rows where split is given, got 1"),
    (None, 3, "must have a number of rows that divides the 4 of x, got 3"),
    (None, 0, "must have a number of rows that divides the 4 of x, got 0"),
]
bad_splits = pytest.mark.parametrize(("split", "groups", "message"), BAD_SPLITS)
