"""Operands of convolutions, and the results in float64 with bounds derived from the kernel's arithmetic."""

import torch
import torch.nn.functional as F

from tests.tolerances import ROUNDING

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["same", "down", "up"]


def result_size(size, kind):
    return [{"same": n, "down": (n + 1) // 2, "up": 2 * n}[kind] for n in size]


def operands(
    dtype,
    kind="same",
    batch=2,
    c=5,
    more=0,
    out=7,
    size=(3, 5),
    groups=0,
    affine=False,
    cells=None,
    silu=False,
    bias=True,
    residual=False,
    shortcut=None,
    mean=0.0,
    seed=0,
):
    """Keyword arguments of ``ops.convolution``, all maps channels-last. ``cells`` is (h, w) of the modulation,
    ``shortcut`` the channels of the one or two maps that it reads.
    """
    generator = torch.Generator().manual_seed(seed)

    def normals(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    def a_map(channels, size, mean=0.0):
        x = torch.randn(batch, channels, *size, generator=generator) + mean
        return x.contiguous(memory_format=torch.channels_last).to(dtype)

    channels = c + more
    given = dict(x=a_map(c, size, mean), kind=kind, groups=groups, silu=silu)
    given["weight"] = (torch.randn(out, channels, 3, 3, generator=generator) * (9 * channels) ** -0.5).to(dtype)
    if more:
        given["more"] = a_map(more, size, mean)
    if bias:
        given["bias"] = normals(out, dtype=torch.float32)
    if affine:
        given |= dict(norm_weight=normals(channels), norm_bias=normals(channels, dtype=torch.float32))
    if cells:  # channels of one wide tensor, of two dtypes
        wide = normals(batch, *cells, 2 * channels).permute(0, 3, 1, 2)
        given |= dict(scale=wide[:, :channels], shift=wide[:, channels:].float())
    if residual:
        given["added"] = a_map(out, result_size(size, kind))
    if shortcut:
        given["added"] = a_map(shortcut[0], size)
        given["shortcut"] = (torch.randn(out, sum(shortcut), generator=generator) * sum(shortcut) ** -0.5).to(dtype)
        if shortcut[1:]:
            given["added_more"] = a_map(shortcut[1], size)
    return given


def per_pixel(table, size):
    """Scale or shift in float64, of every pixel."""
    table = table.double()
    if table.ndim == 2:
        return table[:, :, None, None]
    for d in (0, 1):
        table = table.repeat_interleave(size[d] // table.shape[2 + d], 2 + d)
    return table


def normalised(x, groups, eps, norm_weight, norm_bias, scale, shift):
    """The norm of x in float64, the magnitude of what is summed there, and that of the mean where it is taken off."""
    one, zero = (torch.tensor(v, dtype=torch.float64) for v in (1.0, 0.0))
    grouped = x.reshape(len(x), groups, -1)
    means = grouped.mean(2, keepdim=True)
    rstd = 1 / ((grouped - means).square().mean(2, keepdim=True) + eps).sqrt()
    y, of_mean = (t.expand_as(grouped).reshape(x.shape) for t in ((grouped - means) * rstd, means.abs() * rstd))
    weight = one if norm_weight is None else norm_weight.double()[:, None, None]
    bias = zero if norm_bias is None else norm_bias.double()[:, None, None]
    factor, offset = (zero, zero) if scale is None else (per_pixel(t, x.shape[2:]) for t in (scale, shift))
    h = (y * weight + bias) * (1 + factor) + offset
    size = (y * weight).abs() * (1 + factor).abs() + bias.abs() * (1 + factor.abs()) + offset.abs()
    return h, size, of_mean * (weight * (1 + factor)).abs()


def exact_and_bound(
    x,
    weight,
    bias=None,
    more=None,
    kind="same",
    groups=0,
    eps=1e-5,
    silu=False,
    norm_weight=None,
    norm_bias=None,
    scale=None,
    shift=None,
    added=None,
    added_more=None,
    shortcut=None,
    *,
    roundings=0,
):
    """The result in float64, and how far one that is summed in float32 and rounded once can be from it.

    What is convolved errs by some units of 2^-24 of what its norm sums (of maps with no more than some hundred pixels),
    by another of the mean, by 1e-6 of what SiLU gives, whose slope is at most 1.1, and by one rounding to the dtype. A
    sum of n products errs by at most n u / (1 - n u) of the sum of magnitudes, u = 2^-24 (Higham, 3.1). Sums of taps
    ("up") are rounded once. bfloat16 instructions take numbers below 2^-126 for zero. ``roundings``: how often more
    eager rounds, to the dtype.
    """
    dtype, rounding = x.dtype, ROUNDING[x.dtype]
    h = x.double() if more is None else torch.cat([x, more], 1).double()
    size, error = h.abs(), torch.zeros_like(h)
    if groups:
        h, size, of_mean = normalised(h, groups, eps, norm_weight, norm_bias, scale, shift)
        error = 4e-6 * size + 2.0**-23 * of_mean
    if groups or silu:
        error = error + roundings * rounding * size
    if silu:
        h, error = F.silu(h), 1.1 * error + 1e-6 * F.silu(h).abs() + 2.0**-120
    if groups or silu:
        error = error + rounding * (h.abs() + error)
    weight, step, tap = weight.double(), 2 if kind == "down" else 1, 0.0
    if kind == "up":
        h, error = (t.repeat_interleave(2, 2).repeat_interleave(2, 3) for t in (h, error))
        tap = rounding + 2.0**-22
    y = F.conv2d(h, weight, None, step, 1)
    magnitude = F.conv2d(h.abs(), weight.abs(), None, step, 1)
    error = F.conv2d(error, weight.abs() * (1 + tap), None, step, 1) + tap * magnitude
    n = weight[0].numel() + 4
    if bias is not None:
        y, magnitude = y + bias.double()[:, None, None], magnitude + bias.double().abs()[:, None, None]
    if added is not None:
        a = added.double() if added_more is None else torch.cat([added, added_more], 1).double()
        if shortcut is None:
            y, magnitude = y + a, magnitude + a.abs()
        else:
            s = shortcut.double()[:, :, None, None]
            y, magnitude, n = y + F.conv2d(a, s), magnitude + F.conv2d(a.abs(), s.abs()), n + s[0].numel()
    error = error + magnitude * (n * 2.0**-24 / (1 - n * 2.0**-24) + roundings * rounding) + n * 2.0**-126
    return y, error + rounding * (y.abs() + error) + (2.0**-25 if dtype == torch.float16 else 0)


def assert_within(actual, given, roundings=0):
    assert actual.dtype == given["x"].dtype
    assert_near(actual, *exact_and_bound(**given, roundings=roundings))


def assert_near(actual, exact, bound):
    assert actual.shape == exact.shape
    excess = (actual.double() - exact).abs() - bound
    assert (excess <= 0).all(), f"off by {excess.max().item()} more than allowed"  # false for NaN
