"""Our decoders and those of others in one run: 256x256 images per second, parameters and FLOP.

    python -m msdd_fast.bench.peers [--batch 1] [--dtype fp32] [--only NAME ...] [--json FILE]

The others are built by diffusers (``pip install 'msdd-fast[peers]'``) at the configurations of SPEC section C with
random weights: speed does not depend on them. Same dtype, batch, timer and rounds for all; FLOP are counted by torch
while one image is decoded. A teacher of 30 steps is one step measured and multiplied, and marked so.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msdd_fast.bench.ceilings import copy_bandwidth, gemm_rate
from msdd_fast.bench.harness import Provider, compare
from msdd_fast.bench.machine import machine_info
from msdd_fast.bench.results import aligned, number
from msdd_fast.bench.roofline import decode_work, total
from msdd_fast.bench.suite import DTYPES
from msdd_fast.bench.timing import WallTimer
from msdd_fast.bench.waterfall import eager, load
from msdd_fast.engine import accelerate
from msdd_fast.errors import InputError

SIZE = 256
OURS = ("msdd-d12-joint", "msdd-d12", "msdd-nano")
TEACHER, TEACHER_STEPS = "msdd-d12-joint", 30


@dataclass(frozen=True)
class Peer:
    """``build`` makes the model on the current device; ``latent`` is the shape of one image's."""

    name: str
    build: Callable[[], nn.Module]
    latent: tuple[int, ...]
    decode: Callable[[Any, Tensor], Tensor]
    decoder: Callable[[Any], list[nn.Module]]
    evaluate: Callable[[Any], Tensor] | None = None
    """One of two evaluations, where ``decode`` cannot run without data."""


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
        _sample,
        lambda m: [m.decoder_unet],
        lambda m: m.decoder_unet(torch.empty(1, 7, SIZE, SIZE), torch.empty(1)).sample,
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


def time_one(run: Callable[[], Any], rounds: int, seconds: float) -> dict[str, Any]:
    result = compare([Provider("it", run)], lambda *_: None, WallTimer(), rounds, warmup=1, seconds=seconds)["it"]
    return {"median_s": result.median, "samples": list(result.samples)}


def measure(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    rounds: int,
    seconds: float,
    compiled: bool,
    only: Sequence[str],
) -> list[dict[str, Any]]:
    """One row a decoder. They follow one another: together they would not fit into a small memory."""
    rows = []
    for peer in PEERS:
        if only and peer.name not in only:
            continue
        row = {"name": peer.name, **facts(peer)}
        torch.manual_seed(0)
        with torch.no_grad():
            model = peer.build().eval().requires_grad_(False).to(device, dtype)
            z = torch.randn(batch, *peer.latent, device=device, dtype=dtype)
            row["eager"] = time_one(lambda p=peer, m=model, z=z: p.decode(m, z), rounds, seconds)  # type: ignore[misc]
            if compiled:
                torch.compiler.reset()
                for module in peer.decoder(model):
                    module.compile(dynamic=False)  # in place: decode calls the submodule
                row["compile"] = time_one(lambda p=peer, m=model, z=z: p.decode(m, z), rounds, seconds)  # type: ignore[misc]
        rows.append(row)
        del model
        gc.collect()
    for name in OURS:
        if only and name not in only:
            continue
        rows += _ours(name, device, dtype, batch, rounds, seconds, compiled)
    return rows


def _ours(
    name: str, device: torch.device, dtype: torch.dtype, batch: int, rounds: int, seconds: float, compiled: bool
) -> list[dict[str, Any]]:
    tokenizer = load(name, device)
    cfg = tokenizer.config
    z = torch.randn(batch, cfg.num_latent_tokens, cfg.latent_dim, device=device)
    row: dict[str, Any] = {
        "name": name if cfg.image_size == SIZE else f"{name} ({cfg.image_size} px)",
        "parameters": sum(p.numel() for p in tokenizer.decoder.parameters()),
        "flops": total(decode_work(cfg)).flops,
    }
    plain = eager(tokenizer, dtype)
    row["eager"] = time_one(lambda: plain(z), rounds, seconds)
    if compiled:
        torch.compiler.reset()
        quick = eager(tokenizer, dtype, compiled=True)
        row["compile"] = time_one(lambda: quick(z), rounds, seconds)
    engine = accelerate(tokenizer, dtype=dtype, batch_sizes=(batch,))
    engine.warmup()
    row["engine"] = time_one(lambda: engine.decode(z), rounds, seconds)
    if name != TEACHER:
        return [row]
    teacher = {"name": f"{name}, {TEACHER_STEPS} steps a scale, calculated", "parameters": row["parameters"]}
    teacher["flops"] = total(decode_work(cfg, steps=TEACHER_STEPS)).flops
    for way in ("eager", "compile", "engine"):
        if way in row:
            teacher[way] = {"median_s": TEACHER_STEPS * row[way]["median_s"], "calculated": True}
    return [row, teacher]


def table(rows: Sequence[dict[str, Any]], batch: int) -> list[str]:
    """img/s of every way to run each decoder."""
    lines = [["decoder", "M", "GFLOP", "eager img/s", "compile img/s", "engine img/s"]]
    for r in rows:
        speeds = [number(batch / r[way]["median_s"]) if way in r else "-" for way in ("eager", "compile", "engine")]
        lines.append([r["name"], f"{r['parameters'] / 1e6:.1f}", f"{r['flops'] / 1e9:.0f}", *speeds])
    return aligned(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20.0, help="per decoder, from the third round on")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    known = [p.name for p in PEERS] + list(OURS)
    if set(args.only) - set(known):
        raise InputError(f"--only must name some of {', '.join(known)}, got {', '.join(args.only)}")
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    rows = measure(device, dtype, args.batch, args.rounds, args.seconds, not args.no_compile, args.only)
    print("\n".join(table(rows, args.batch)))
    if args.json:
        ceilings = {"copy": copy_bandwidth(device), args.dtype: gemm_rate(device, dtype)}
        document = {
            "batch": args.batch,
            "dtype": args.dtype,
            "machine": machine_info(),
            "ceilings": ceilings,
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
