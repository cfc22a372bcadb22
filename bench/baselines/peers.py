"""Our decoders and those of others in one run: 256x256 images per second, parameters and FLOP.

    python -m msdd_fast.bench.baselines.peers [--batch 1] [--dtype fp32] [--only NAME ...] [--json FILE]

The others are built by diffusers (``pip install 'msdd-fast[peers]'``) at the configurations below, with
random weights: speed does not depend on them. Same dtype, batch and timer for all. The ways to run one decoder take
turns, and each has at least one call after its first; the decoders come one after the other, since together they would
not fit into a small memory. FLOP are counted by torch while one image is decoded.

What would take too long is marked: a teacher of 30 steps is one step measured and multiplied; torch.compile runs in a
process of its own, which is ended where its first call is not back after ``--compile-seconds``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msdd_fast.bench.decode.suite import by_block
from msdd_fast.bench.decode.waterfall import eager, load
from msdd_fast.bench.ops.suite import DTYPES
from msdd_fast.bench.report.results import aligned, number
from msdd_fast.bench.timing.ceilings import copy_bandwidth, gemm_rate
from msdd_fast.bench.timing.clock import WallTimer
from msdd_fast.bench.timing.harness import Check, Provider, WrongResultError, compare
from msdd_fast.bench.timing.isolated import Isolated, IsolatedError, isolated
from msdd_fast.bench.timing.machine import machine_info
from msdd_fast.bench.work.roofline import decode_work, total
from msdd_fast.bench.work.ssdd_roofline import ssdd_decode_work
from msdd_fast.engine import accelerate
from msdd_fast.errors import InputError
from msdd_fast.families import family_of
from msdd_fast.families.ssdd.config import SSDDConfig

SIZE = 256
OURS = ("msdd-d12-joint", "msdd-d12", "msdd-nano", "ssdd-s-f8c4", "ssdd-m-f8c4")
TEACHER, TEACHER_STEPS = "msdd-d12-joint", 30
WAYS = ("eager", "compile", "engine")


@dataclass(frozen=True)
class Peer:
    """``build`` makes the model on the current device; ``latent`` is the shape of one image's."""

    name: str
    build: Callable[[], nn.Module]
    latent: tuple[int, ...]
    decode: Callable[[Any, Tensor], Tensor]
    decoder: Callable[[Any], list[nn.Module]]
    evaluate: Callable[[Any], Tensor] | None = None
    """One of two evaluations, where ``decode`` cannot run on tensors without data."""


def _dc_ae(latent: int, vits: int, channels: Sequence[int], scaling: float) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from diffusers import AutoencoderDC

        blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * vits
        two = (2,) * vits
        return AutoencoderDC(
            latent_channels=latent,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=tuple(channels),
            decoder_block_out_channels=tuple(channels),
            encoder_layers_per_block=(0, 4, 8, *two),
            decoder_layers_per_block=(0, 5, 10, *two),
            encoder_qkv_multiscales=((),) * (3 + vits),
            decoder_qkv_multiscales=((),) * (3 + vits),
            decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * vits,
            decoder_act_fns=("relu",) * 3 + ("silu",) * vits,
            scaling_factor=scaling,
        )

    return build


def _sd_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=SIZE,
        scaling_factor=0.18215,
    )


def _taesd() -> nn.Module:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny()


def _consistency() -> nn.Module:
    from diffusers import ConsistencyDecoderVAE

    return ConsistencyDecoderVAE()


def _rae() -> nn.Module:
    from diffusers.models.autoencoders import autoencoder_rae

    return autoencoder_rae.RAEDecoder(
        hidden_size=768,
        decoder_hidden_size=1152,
        decoder_num_hidden_layers=28,
        decoder_num_attention_heads=16,
        decoder_intermediate_size=4096,
        patch_size=16,
        image_size=SIZE,
        num_patches=(SIZE // 16) ** 2,
    )


def _sample(model: Any, z: Tensor) -> Tensor:
    out: Tensor = model.decode(z).sample
    return out


def _decoder(model: Any) -> list[nn.Module]:
    return [m for m in (model.decoder, getattr(model, "post_quant_conv", None)) if m is not None]


PEERS = (
    Peer("SD-VAE f8d4", _sd_vae, (4, 32, 32), _sample, _decoder),
    Peer("DC-AE f32c32", _dc_ae(32, 3, (128, 256, 512, 512, 1024, 1024), 0.3189), (32, 8, 8), _sample, _decoder),
    Peer(
        "DC-AE f64c128", _dc_ae(128, 4, (128, 256, 512, 512, 1024, 1024, 2048), 0.2889), (128, 4, 4), _sample, _decoder
    ),
    Peer("TAESD", _taesd, (4, 32, 32), _sample, _decoder),
    Peer("RAE ViT-XL", _rae, (256, 768), lambda m, z: m(z).logits, lambda m: [m]),
    Peer(
        "consistency decoder",
        _consistency,
        (4, 32, 32),
        lambda m, z: m.decode(z, torch.Generator(z.device).manual_seed(0)).sample,
        lambda m: [m.decoder_unet],
        lambda m: m.decoder_unet(torch.empty(1, 7, SIZE, SIZE), torch.zeros(1, dtype=torch.int64)).sample,
    ),
)


def count(run: Callable[[], Any]) -> int:
    """FLOP of one call: products, convolutions, attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def facts(peer: Peer) -> dict[str, Any]:
    """Parameters of the decoder and FLOP of one image, on tensors without data."""
    with torch.device("meta"):
        model = peer.build().eval().requires_grad_(False)
        evaluate = peer.evaluate
        if evaluate is not None:
            flops = 2 * count(lambda: evaluate(model))
        else:
            flops = count(lambda: peer.decode(model, torch.empty(1, *peer.latent)))
    parameters = sum(p.numel() for module in peer.decoder(model) for p in module.parameters())
    return {"parameters": parameters, "flops": flops}


@dataclass(frozen=True)
class Options:
    """What all decoders of a run share; ``compile_seconds`` 0 leaves torch.compile out."""

    device: torch.device
    dtype: torch.dtype
    batch: int = 1
    rounds: int = 20
    seconds: float = 10.0
    compile_seconds: float = 60.0


def in_turns(name: str, ways: Mapping[str, Callable[[], Tensor]], options: Options) -> dict[str, dict[str, Any]]:
    """Every way to run the decoder ``name``, and torch.compile of it in a process of its own: one call each, in turns.

    {"median_s", "samples", "first_s", "max_error"} of each, the error being the difference from the first way;
    {"missing": the reason} for "compile" if it could not be had.
    """
    providers = [Provider(way, run) for way, run in ways.items()]
    with contextlib.ExitStack() as stack:
        call, reason = _compile(stack, name, options)
        if call is not None:
            other = call
            providers.append(Provider("compile", lambda: other.result, lambda: sum(other.laps())))
        measured = compare(providers, _like_the_first(), WallTimer(), options.rounds, 0, options.seconds, min_rounds=1)
    timed: dict[str, dict[str, Any]] = {
        way: {"median_s": m.median, "samples": m.samples, "first_s": m.first_s, "max_error": m.max_error}
        for way, m in measured.items()
    }
    if call is None:
        timed["compile"] = {"missing": reason}
    else:
        timed["compile"]["first_s"] = call.first_s
    return timed


def _compile(stack: contextlib.ExitStack, name: str, options: Options) -> tuple[Isolated | None, str]:
    """``compiled(name, ...)`` in a process that lives as long as ``stack``, or the reason why there is none."""
    if not options.compile_seconds:
        return None, "left out"
    arguments = {
        "name": name,
        "device": str(options.device),
        "dtype": str(options.dtype).removeprefix("torch."),
        "batch": options.batch,
    }
    try:
        return stack.enter_context(
            isolated("msdd_fast.bench.baselines.peers:compiled", arguments, options.compile_seconds)
        ), ""
    except IsolatedError as error:
        return None, f"torch.compile {error}"


def _like_the_first() -> Check:
    """A check for ``compare``: the largest difference from the first result, of the same shape; all finite."""
    seen: list[Tensor] = []

    def check(name: str, result: Tensor) -> float:
        seen.append(result.float().cpu())
        if seen[-1].shape != seen[0].shape or not seen[-1].isfinite().all():
            raise WrongResultError(f"{name} must give finite numbers of the shape {tuple(seen[0].shape)}")
        return float((seen[-1] - seen[0]).abs().max())

    return check


def compiled(name: str, device: str, dtype: str, batch: int) -> Callable[[Callable[[], None]], Tensor]:
    """The decoder ``name`` under torch.compile: what the process of ``time_compiled`` runs."""
    where, kind = torch.device(device), getattr(torch, dtype)
    if name in OURS:
        tokenizer = load(name, where)
        decode = eager(tokenizer, kind, compiled=True, by_block=by_block(tokenizer))
        latents = _latents(tokenizer, batch)
        return lambda _: decode(latents, steps=1)
    peer = next(p for p in PEERS if p.name == name)
    model, z = build(peer, where, kind, batch)
    for module in peer.decoder(model):
        module.compile(dynamic=False)  # in place: decode calls the submodule

    def run(_: Callable[[], None]) -> Tensor:
        with torch.no_grad():
            return peer.decode(model, z)

    return run


def build(peer: Peer, device: torch.device, dtype: torch.dtype, batch: int) -> tuple[nn.Module, Tensor]:
    """The decoder with random weights, and latents."""
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of a cast that changes nothing
    torch.manual_seed(0)
    model = peer.build().eval().requires_grad_(False).to(device, dtype)
    return model, torch.randn(batch, *peer.latent, device=device, dtype=dtype)


def measure(
    options: Options, only: Sequence[str] = (), progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """One row a decoder: name, parameters, flops, and for each way to run it what ``in_turns`` gives."""
    rows: list[dict[str, Any]] = []
    for peer in PEERS:
        if not only or peer.name in only:
            progress(peer.name)
            rows.append(_theirs(peer, options))
            gc.collect()
    for name in OURS:
        if not only or name in only:
            progress(name)
            rows += _ours(name, options)
            gc.collect()
    return rows


@torch.no_grad()
def _theirs(peer: Peer, options: Options) -> dict[str, Any]:
    model, z = build(peer, options.device, options.dtype, options.batch)
    return {"name": peer.name, **facts(peer), **in_turns(peer.name, {"eager": lambda: peer.decode(model, z)}, options)}


def _latents(tokenizer: Any, batch: int) -> Tensor:
    cfg, device = tokenizer.config, next(tokenizer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *family_of(cfg).example, generator=generator).to(device)


def _ours(name: str, options: Options) -> list[dict[str, Any]]:
    """One step a scale; of ``TEACHER`` the teacher's row too."""
    tokenizer = load(name, options.device)
    cfg, z = tokenizer.config, _latents(tokenizer, options.batch)
    row: dict[str, Any] = {
        "name": name if cfg.image_size == SIZE else f"{name} ({cfg.image_size} px)",
        "parameters": sum(p.numel() for p in tokenizer.decoder.parameters()),
        # SSDD as its eager model does it: FLOP of the others are counted on theirs, too.
        "flops": total(ssdd_decode_work(cfg, hoisted=False) if isinstance(cfg, SSDDConfig) else decode_work(cfg)).flops,
    }
    plain = eager(tokenizer, options.dtype)
    engine = accelerate(tokenizer, dtype=options.dtype, batch_sizes=(options.batch,), steps=1)
    row |= in_turns(name, {"eager": lambda: plain(z, steps=1), "engine": lambda: engine.decode(z)}, options)
    if by_block(tokenizer):
        row["compile"]["note"] = "by block"
    if name != TEACHER or isinstance(cfg, SSDDConfig):
        return [row]
    teacher = {"name": f"{name}, {TEACHER_STEPS} steps a scale", "parameters": row["parameters"]}
    teacher["flops"] = total(decode_work(cfg, steps=TEACHER_STEPS)).flops
    for way in WAYS:
        if "median_s" in row[way]:
            seconds = TEACHER_STEPS * row[way]["median_s"]
            teacher[way] = {"median_s": seconds, "note": f"calculated: {TEACHER_STEPS} times one step"}
    return [row, teacher]


def table(rows: Sequence[dict[str, Any]], batch: int) -> list[str]:
    """img/s of every way to run each decoder; a mark after a number refers to a note below."""
    lines = [["decoder", "M", "GFLOP", *(f"{way} img/s" for way in WAYS)]]
    notes: list[str] = []
    for r in rows:
        cells = []
        for way in WAYS:
            note = _note(r.get(way, {}))
            if note and note not in notes:
                notes.append(note)
            speed = number(batch / r[way]["median_s"]) if "median_s" in r.get(way, {}) else "-"
            cells.append(speed + (f" [{notes.index(note) + 1}]" if note else ""))
        lines.append([r["name"], f"{r['parameters'] / 1e6:.1f}", f"{r['flops'] / 1e9:.0f}", *cells])
    return [*aligned(lines), *(f"[{i}] {note}" for i, note in enumerate(notes, 1))]


def _note(timed: dict[str, Any]) -> str | None:
    return timed.get("missing") or timed.get("note")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10.0, help="per decoder and way (default: %(default)s)")
    parser.add_argument("--compile-seconds", type=float, default=60.0, help="0 leaves it out (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="measure nothing: print a stored table"
    )
    args = parser.parse_args(arguments)
    if args.source:
        document = json.loads(args.source.read_text())
        print("\n".join(table(document["rows"], document["batch"])))
        return
    known = [p.name for p in PEERS] + list(OURS)
    if set(args.only) - set(known):
        raise InputError(f"--only must name some of {', '.join(known)}, got {', '.join(args.only)}")
    options = Options(
        torch.device(args.device), DTYPES[args.dtype], args.batch, args.rounds, args.seconds, args.compile_seconds
    )
    rows = measure(options, args.only, lambda name: print(f"measuring {name}", file=sys.stderr, flush=True))
    print("\n".join(table(rows, args.batch)))
    if args.json:
        ceilings = {"copy": copy_bandwidth(options.device), args.dtype: gemm_rate(options.device, options.dtype)}
        document = {
            "batch": args.batch,
            "dtype": args.dtype,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine_info(),
            "ceilings": ceilings,
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
