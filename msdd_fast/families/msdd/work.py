"""FLOP and bytes of an MSDD encode or decode, op by op (families/work.py has the rules)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msdd_fast.families.msdd.config import TokenizerConfig, swiglu_hidden_size
from msdd_fast.families.msdd.embeddings import TimestepEmbedder
from msdd_fast.families.msdd.engine.context import folded_width
from msdd_fast.families.work import Work


def decode_work(
    config: TokenizerConfig,
    batch: int = 1,
    steps: int = 1,
    cfg_scale: float = 1.0,
    itemsize: int = 2,
    hoisted: bool = True,
) -> list[Work]:
    """The work of one decode of ``batch`` images, with elements of ``itemsize`` bytes.

    ``hoisted``: as the engine runs it, with adaLN vectors as constants and the context embedded once per image, folded.
    Otherwise as the eager model runs it, which computes both per image at every evaluation.
    """
    guided = cfg_scale != 1.0
    rows = 2 * batch if guided else batch
    count = _Counter(config, rows, batch if hoisted else rows, itemsize)
    work = list(count.context(0, folded=True)) if hoisted else []
    for s in range(config.schedule.num_stages):
        scale = config.stage_resolution(s)
        for i in range(steps):
            if not hoisted:
                # The eager model reads its weights once for each branch of the guidance.
                for _ in range(2 if guided else 1):
                    one = _Counter(config, batch, batch, itemsize)
                    work += [*one.time(scale), *one.context(scale, folded=False), *one.network(scale)]
            else:
                work += count.network(scale)
            work += count.sampler(scale, s == 0 and i == 0, i == steps - 1, guided)
    return work


def encode_work(config: TokenizerConfig, batch: int = 1, itemsize: int = 2) -> list[Work]:
    """The work of encoding ``batch`` images, in ops as fused as a decode's."""
    enc, n = config.encoder, config.grid_size**2
    linear = _Linears(config.image_size, batch, itemsize)
    hidden = swiglu_hidden_size(enc.hidden_size, enc.mlp_multiple_of)
    d, context = enc.hidden_size, config.num_latent_tokens
    work = [linear("patch_embed", -1, n, 3 * config.patch_size**2, d)]
    for i in range(enc.depth):
        last = i == enc.depth - 1
        work += _stream(linear, "context", i, context, d, hidden, kv_only=False)
        work += _stream(linear, "image", i, n, d, hidden, kv_only=last)
        queries = context if last else context + n
        work.append(_attention("attention", i, config.image_size, batch, queries, context + n, d, itemsize))
    return [*work, linear("head", -1, context, d, config.latent_dim)]


class _Linears(NamedTuple):
    """Counts products of so many tokens of ``batch`` images with a matrix and its bias."""

    scale: int
    batch: int
    itemsize: int

    def __call__(self, op: str, layer: int, tokens: int, inputs: int, outputs: int, bias: bool = True) -> Work:
        rows = tokens * self.batch
        return Work(
            op,
            layer,
            self.scale,
            2 * rows * inputs * outputs,
            (inputs * outputs + bias * outputs) * self.itemsize,
            rows * (inputs + outputs) * self.itemsize,
        )

    def pointwise(self, op: str, layer: int, elements: int) -> Work:
        """An op without products that moves so many elements per image."""
        return Work(op, layer, self.scale, 0, 0, elements * self.batch * self.itemsize)


def _stream(linear: _Linears, name: str, layer: int, tokens: int, d: int, hidden: int, kv_only: bool) -> Iterator[Work]:
    """One stream of one block without its attention."""
    x = tokens * d
    yield linear.pointwise(f"{name}.norm_modulate", layer, 2 * x)
    yield linear(f"{name}.qkv", layer, tokens, d, (2 if kv_only else 3) * d)
    yield linear.pointwise(f"{name}.qk_norm_rope", layer, (2 if kv_only else 4) * x)
    if kv_only:
        return
    yield linear(f"{name}.proj", layer, tokens, d, d)
    yield linear.pointwise(f"{name}.gate_residual_norm_modulate", layer, 4 * x)
    yield linear(f"{name}.gate_up", layer, tokens, d, 2 * hidden, bias=False)
    yield linear.pointwise(f"{name}.swiglu", layer, 3 * tokens * hidden)
    yield linear(f"{name}.down", layer, tokens, hidden, d, bias=False)
    yield linear.pointwise(f"{name}.gate_residual", layer, 3 * x)


def _attention(op: str, layer: int, scale: int, batch: int, queries: int, keys: int, d: int, itemsize: int) -> Work:
    """q k^T and the weighted sum of v; reads q, k, v and writes the result."""
    return Work(op, layer, scale, 4 * batch * queries * keys * d, 0, batch * 2 * (queries + keys) * d * itemsize)


class _Counter:
    """The decoder for ``rows`` images (twice the batch when guided), of which ``patched`` have patches of their own."""

    def __init__(self, config: TokenizerConfig, rows: int, patched: int, itemsize: int) -> None:
        dec = config.decoder
        self.config, self.rows, self.patched, self.itemsize = config, rows, patched, itemsize
        self.d, self.depth, self.joint = dec.hidden_size, dec.depth, dec.conditioning == "joint"
        self.hidden = swiglu_hidden_size(dec.hidden_size, dec.mlp_multiple_of)
        self.features = 3 * config.patch_size**2

    def tokens(self, scale: int) -> int:
        return (scale // self.config.patch_size) ** 2

    def context(self, scale: int, folded: bool) -> Iterator[Work]:
        """Embedding of the latents, and the cross blocks' keys and values; ``folded``: as engine/context.py has it."""
        linear, n, d = _Linears(scale, self.rows, self.itemsize), self.config.num_latent_tokens, self.d
        width = folded_width(d, self.config.latent_dim) if folded and not self.joint else d
        yield linear("context_embed", -1, n, self.config.latent_dim, width)
        if not self.joint:
            yield linear.pointwise("context_norm", -1, 2 * n * width)
            for i in range(self.depth):
                yield linear("context.kv", i, n, width, 2 * d)
                yield linear.pointwise("context.qk_norm_rope", i, 2 * n * d)

    def time(self, scale: int) -> Iterator[Work]:
        """Time embedding and adaLN, per image, as the eager model computes them."""
        linear, d = _Linears(scale, self.rows, self.itemsize), self.d
        yield linear("time_embed", -1, 1, TimestepEmbedder.num_features, d)
        yield linear("time_embed", -1, 1, d, d)
        for i in range(self.depth):
            if self.joint:
                yield linear("context.adaln", i, 1, d, (2 if i == self.depth - 1 else 6) * d)
            yield linear("image.adaln", i, 1, d, 6 * d)
        yield linear("final.adaln", -1, 1, d, 2 * d)

    def network(self, scale: int) -> Iterator[Work]:
        """One evaluation without time and context."""
        n, context = self.tokens(scale), self.config.num_latent_tokens
        linear = _Linears(scale, self.rows, self.itemsize)
        yield _Linears(scale, self.patched, self.itemsize)("patch_embed", -1, n, self.features, self.d)
        for i in range(self.depth):
            last = i == self.depth - 1
            yield from _stream(linear, "image", i, n, self.d, self.hidden, kv_only=False)
            if self.joint:
                yield from _stream(linear, "context", i, context, self.d, self.hidden, kv_only=last)
                queries, keys = (n if last else n + context), n + context
                yield _attention("attention", i, scale, self.rows, queries, keys, self.d, self.itemsize)
            else:
                yield _attention("attention", i, scale, self.rows, n, n, self.d, self.itemsize)
                yield _attention("context_attention", i, scale, self.rows, n, context, self.d, self.itemsize)
        yield linear("final", -1, n, self.d, self.features)
        if self.config.decoder.prediction == "image":  # from the image to the velocity
            yield linear.pointwise("euler_step", -1, 3 * n * self.features)

    def sampler(self, scale: int, starts: bool, ends: bool, guided: bool) -> Iterator[Work]:
        """Noise, Euler step, and the transition to the next scale, whose state has four times the pixels."""
        state = 3 * scale * scale
        one = _Linears(scale, self.rows // 2 if guided else self.rows, self.itemsize)
        reads = (3 if guided else 2) * state
        if starts:
            yield one.pointwise("start_noise", -1, state)
        if not ends:
            yield one.pointwise("euler_step", -1, reads + state)
        elif scale == self.config.image_size:
            yield one.pointwise("final_step", -1, reads + state)
        else:
            yield one.pointwise("stage_transition", -1, reads + 4 * state)
