"""The C++ ``convolution`` and the packing of its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.backends.extension import load_extension
from msdd_fast.errors import InputError
from msdd_fast.native._call import DTYPES, GIVEN, Native, like, optional_metadata, prepared, refused

KINDS = ("same", "down", "up")
_BY_CODE = {code: dtype for dtype, code in DTYPES.items()}


def result_size(height: int, width: int, kind: str) -> tuple[int, int]:
    """Height and width of what a convolution of this kind makes."""
    if kind == "up":
        return 2 * height, 2 * width
    return (-(-height // 2), -(-width // 2)) if kind == "down" else (height, width)


def pack_convolution(
    weight: Tensor, kind: str, dtype: torch.dtype, shortcut: Tensor | None = None, level: str = ""
) -> Tensor:
    """The weight (out, in, 3, 3) of a convolution of maps in ``dtype`` as ``convolution`` reads it, in one dimension.

    ``shortcut`` (out, also) of kind "same": the 1 x 1 convolution that is added. Sums of taps (kind "up") are made in
    float32 and rounded once. bfloat16 stays so where the machine multiplies pairs of it; all else becomes float32.
    ``level`` (convolution.h) is for tests. Raises InputError for other shapes, kinds and dtypes.
    """
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or kind not in KINDS or dtype not in DTYPES:
        got = f"{tuple(weight.shape)}, {kind!r}, {dtype}"
        raise InputError(f"weight must be (out, in, 3, 3), kind one of {', '.join(KINDS)}, dtype a float, got {got}")
    if shortcut is not None and (kind != "same" or shortcut.ndim != 2 or len(shortcut) != len(weight)):
        got = f"{tuple(shortcut.shape)}, {kind!r}"
        raise InputError(f"shortcut must be ({len(weight)}, also) of a convolution of kind 'same', got {got}")
    try:
        panel, per_word, code = load_extension().convolution_layout(DTYPES[dtype], level)
    except ValueError as error:
        raise refused("convolution_layout", error) from None
    weight = weight.detach().float()
    matrices = [_matrix(w, per_word) for w in (_folded(weight) if kind == "up" else [weight])]
    if shortcut is not None:
        (matrix,) = matrices
        matrices = [torch.cat([matrix, _even(shortcut.detach().float(), per_word)], 1)]
    packed = [_in_panels(m.to(dtype).to(_BY_CODE[code]), panel, per_word) for m in matrices]
    return torch.cat(packed)


def _folded(weight: Tensor) -> list[Tensor]:
    """The 2 x 2 convolutions (out, in, 2, 2) that make the even and odd lines, and in each the even and odd columns, of
    a convolution behind a nearest upsampling by 2. An even pixel reads the one before its own and its own, an odd one
    its own and the next.
    """

    def halves(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        a, b, c = w.unbind(dim)
        return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)

    return [w for of_lines in halves(weight, 2) for w in halves(of_lines, 3)]


def _matrix(weight: Tensor, per_word: int) -> Tensor:
    """(out, taps * channels), channels padded to whole words."""
    return _even(weight.permute(0, 2, 3, 1), per_word).flatten(1)


def _even(x: Tensor, per_word: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % per_word))


def _in_panels(matrix: Tensor, panel: int, per_word: int) -> Tensor:
    """(out, k) as (panels, words of k, panel, elements of a word), flat."""
    matrix = F.pad(matrix, (0, 0, 0, -len(matrix) % panel))
    return matrix.view(-1, panel, matrix.shape[1] // per_word, per_word).transpose(1, 2).flatten()


@Native
def convolution(
    x: Tensor,
    more: Tensor | None,
    packed: Tensor,
    bias: Tensor | None,
    features: int,
    kind: str = "same",
    groups: int = 0,
    eps: float = 0.0,
    silu: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    added: Tensor | None = None,
    added_more: Tensor | None = None,
    shortcut: bool = False,
    level: str = "",
) -> Callable[..., Tensor]:
    """convolution(norm([x, more])) + bias + what is added, (B, features, H', W'), channels-last, in x's dtype.

    x (B, C, H, W) and more (B, C', H, W), joined along the channels, channels-last, of one dtype; ``packed`` by
    ``pack_convolution`` for it. The norm, with ``groups`` not 0, is ``group_norm_modulate_silu`` with norm_weight,
    norm_bias, scale and shift; ``silu`` also goes without. ``added`` has the dtype of x and the result's height and
    width, and its channels, or with ``shortcut`` those of the 1 x 1 convolution in ``packed``, which ``added_more`` may
    be joined to.
    """
    given = {"x": x, "more": more, "packed": packed, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    given |= {"scale": scale, "shift": shift, "added": added, "added_more": added_more}
    operands = [optional_metadata(name, t) for name, t in given.items()]
    shape = tuple(x.shape)
    if len(shape) != 4 or kind not in KINDS:
        raise InputError(f"x must be (B, C, H, W) and kind one of {', '.join(KINDS)}, got {shape}, {kind!r}")
    size = result_size(shape[2], shape[3], kind)
    out = like((shape[0], features, *size), x.dtype, torch.channels_last)
    numbers = features, KINDS.index(kind), groups, silu, eps, shortcut, level
    return prepared("convolution", out, GIVEN, *operands, *numbers)
