"""The model card of a checkpoint: README.md of a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from msdd_fast.diffusion.config import Config, num_parameters
from msdd_fast.errors import InputError
from msdd_fast.families import family_of
from msdd_fast.families.base import Conditioned, example_conditions

# Of a report of `msdd-fast eval --json`: results, and what does not belong to the conditions.
_NO_CONDITION = ("mean", "images", "checkpoint", "set", "count", "unreadable", "folder", "reconstructions", "name")


def model_card(
    config: Config,
    repository: str,
    metrics: Sequence[Mapping[str, Any]] = (),
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    license: str | None = None,
) -> str:
    """Markdown with the config, the metrics with the conditions under which they were measured, and usage.

    ``metrics`` are reports of ``msdd-fast eval --json``. Raises InputError for anything else.
    """
    family = family_of(config)
    conditions = example_conditions(family)
    told = family.condition_names if isinstance(family, Conditioned) else {}
    stages = config.stage_shapes((1, *family.example))
    tags = ["msdd-fast", *([] if family.no_encoder else ["image-tokenizer"]), "diffusion-decoder", config.family]
    options = "".join(f', {k}="{v}"' for k, v in (("revision", revision), ("subfolder", subfolder)) if v is not None)
    latents = ", ".join(map(str, ("B", *("any" if n is None else n for n in config.latent_shape))))
    kind, parts = ("A", "decoder") if family.no_encoder else ("An image tokenizer with a", "encoder and decoder")
    rows = [
        ("family", config.family),
        ("model", family.model),
        ("latents", f"({latents})"),
        ("images", " → ".join(f"{h} x {w}" for _, h, w in stages)),
        ("parameters", f"{num_parameters(config) / 1e6:.1f} M, {parts}"),
        ("sampling", family.describe_sampling(config.sampling.steps, config.sampling.cfg_scale)),
    ]
    encoded = "" if family.no_encoder else ", or from tok.encode(images)"
    advice = "" if family.no_encoder else " `msdd-fast eval FOLDER --json FILE` measures some."
    given = "".join(f", {name}={name}" for name in conditions)
    return "\n".join(
        [
            "---",
            *([] if license is None else [f"license: {license}"]),
            "library_name: msdd-fast",
            f"tags: [{', '.join(tags)}]",
            "---",
            "",
            f"# {repository.split('/')[-1]}",
            "",
            f"{kind} diffusion decoder, in the format of msdd-fast.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "## Use",
            "",
            "```python",
            "import msdd_fast",
            "import torch",
            "",
            f'tok = msdd_fast.Tokenizer.from_pretrained("{repository}"{options})',
            f"z = torch.randn{(1, *family.example)}  # or from your generator{encoded}",
            *(f"{name} = torch.randn{tuple(x.shape)}  # or {told[name]}" for name, x in conditions.items()),
            f"x = msdd_fast.accelerate(tok).decode(z, seed=0{given})  # (B, 3, H, W), nominally in [-1, 1]",
            "```",
            *(["", f"{family.no_encoder[:1].upper()}{family.no_encoder[1:]}."] if family.no_encoder else []),
            "",
            "## Metrics",
            "",
            *(_measured(metrics) or [f"None were given.{advice}"]),
            "",
            "## Configuration",
            "",
            "```json",
            config.to_json().rstrip(),
            "```",
            "",
        ]
    )


def _measured(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for report in metrics:
        mean = report.get("mean") if isinstance(report, Mapping) else None
        if not isinstance(mean, Mapping) or not mean or not all(isinstance(v, (int, float)) for v in mean.values()):
            raise InputError("metrics must be reports of `msdd-fast eval --json`, got something without 'mean'")
        images = PurePath(str(report.get("set", "?"))).name  # not the folders above it: they are nobody's business
        conditions = "; ".join(
            f"{name.replace('_', ' ')}: {value}"
            for name, value in report.items()
            if name not in _NO_CONDITION and isinstance(value, (str, int, float))
        )
        lines += [
            *([""] if lines else []),
            f"{images}, {report.get('count', '?')} images{f' ({conditions})' if conditions else ''}:",
            "",
            "| " + " | ".join(mean) + " |",
            "|" + "---|" * len(mean),
            "| " + " | ".join(f"{v:.4g}" for v in mean.values()) + " |",
        ]
    return lines
