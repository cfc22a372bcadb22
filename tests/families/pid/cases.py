"""The tensors of NVIDIA's own network (shared/fixtures/pid_*), as a config, weights and inputs."""

from __future__ import annotations

import dataclasses
import json

from safetensors import safe_open

from msdd_fast import Tokenizer
from msdd_fast.families.pid.config import LatentFeaturesConfig, PiDConfig, PiDNetworkConfig

FILES = ["pid_v1_small", "pid_v15_small", "pid_flux2_small"]
ROPES = {"original": "original", "ntk_aware": "ntk"}
GATES = {"sigma_aware_per_token_per_dim": "channel", "sigma_aware_per_token": "token"}


class Case:
    def __init__(self, path):
        with safe_open(path, framework="pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            self.settings = json.loads(f.metadata()["config"])
        self.state = {k: v for k, v in tensors.items() if k.startswith("net.")}
        self.tensors = {k.removeprefix("case."): v for k, v in tensors.items() if k.startswith("case.")}
        self.config = config_of(self.settings)

    def __getitem__(self, name):
        return self.tensors[name]

    def tokenizer(self, **changes):
        return Tokenizer.from_pid_checkpoint(self.state, variant=dataclasses.replace(self.config, **changes))

    @property
    def given(self):
        return {"text": self["text"], "sigma": self["sigma"]}

    @property
    def noises(self):
        return [self["decode.noise"], *(self[f"decode.eps.{i}"] for i in range(3))]


def config_of(settings):
    net = settings["net"]
    return PiDConfig(
        image_size=64,
        latents={16: "flux", 128: "flux2"}[net["lq_latent_channels"]],
        upscale=net["sr_scale"],
        decoder=PiDNetworkConfig(
            hidden_size=net["hidden_size"],
            heads=net["num_groups"],
            depth=net["patch_depth"],
            patch_size=net["patch_size"],
            pixel_depth=net["pixel_depth"],
            pixel_width=net["pixel_hidden_size"],
            attention_width=net["pixel_attn_hidden_size"],
            attention_heads=net["pixel_num_groups"],
            text_width=net["txt_embed_dim"],
            text_length=net["txt_max_length"],
            rope=ROPES[net["rope_mode"]],
            rope_reference=(net["rope_ref_h"], net["rope_ref_w"]),
        ),
        features=LatentFeaturesConfig(
            width=net["lq_hidden_dim"],
            blocks=net["lq_num_res_blocks"],
            padding=net["lq_conv_padding_mode"],
            unpatchify=net["lq_latent_unpatchify_factor"],
            gate=GATES[net["lq_gate_type"]],
            interval=net["lq_interval"],
            pixel_injection=net["pit_lq_inject"],
        ),
    )
