"""The authors' own tensors, through the public API: z, every velocity, whole decodes (fp32, 1e-5)."""

import json

import pytest
import torch
from safetensors import safe_open

import msdd_fast
from msdd_fast.diffusion.schedule import build_stages

TOLERANCE = 1e-5
FILES = ["authors_d2_64px_3stage", "authors_d2_64px_4stage"]


class Case:
    def __init__(self, path):
        with safe_open(path, framework="pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            self.config = json.loads(f.metadata()["config"])
        self.tensors = {k.removeprefix("case."): v for k, v in tensors.items() if k.startswith("case.")}
        state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        self.num_stages = self.config["num_stages"]
        self.tokenizer = msdd_fast.Tokenizer.from_authors_checkpoint(
            state, image_size=self.config["image_size"], num_stages=self.num_stages
        )


@pytest.fixture(scope="module", params=FILES)
def case(request, shared_dir):
    return Case(shared_dir / "fixtures" / f"{request.param}.safetensors")


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_encoder(case):
    assert_near(case.tokenizer.encode(case.tensors["image"]), case.tensors["z"])


@torch.no_grad()
def test_velocities(case):
    for s in range(case.num_stages):
        x, t = case.tensors[f"velocity.{s}.x"], case.tensors[f"velocity.{s}.t"]
        assert_near(case.tokenizer.decoder(x, t, case.tensors["z"]), case.tensors[f"velocity.{s}.v"])
        assert_near(case.tokenizer.decoder(x, t, None), case.tensors[f"velocity.{s}.v_null"])


@pytest.mark.parametrize(("steps", "cfg"), [(1, 1), (3, 2)])
def test_decodes(case, steps, cfg):
    noise = [case.tensors[f"decode.noise.{s}"] for s in range(case.num_stages)]
    z, tok = case.tensors["z"], case.tokenizer
    with torch.no_grad():
        states = msdd_fast.sampling.sample(
            tok.decoder, z, tok.schedule, steps=steps, cfg_scale=cfg, noise=noise, return_stages=True
        )
    for s, state in enumerate(states):
        assert_near(state, case.tensors[f"decode.steps{steps}_cfg{cfg}.{s}"])
    assert_near(tok.decode(z, steps=steps, cfg_scale=cfg, noise=noise), states[-1])


def test_schedule_numbers(case):
    stages = build_stages(case.num_stages)
    for name, actual in (
        ("start_t", [s.start_t for s in stages]),
        ("end_t", [s.end_t for s in stages]),
        ("timesteps_first", [s.timestep_max for s in stages]),
        ("timesteps_last", [s.timestep_last for s in stages]),
    ):
        # The authors' numbers went through float32 (spacing 6e-5 at 1000).
        assert actual == pytest.approx(case.config[name], rel=1e-7, abs=2e-5), name
