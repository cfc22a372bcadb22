"""NVIDIA's own tensors, through the public API: features, velocities, taps, decodes of every sampler (float32)."""

import dataclasses

import pytest
import torch

from msdd_fast.families.pid.decoder import time_features
from msdd_fast.families.pid.sampler import TIMES
from tests.families.pid.cases import FILES, Case

TOLERANCE, TAPS, TEACHER = 1e-5, 2e-5, 1e-3


@pytest.fixture(scope="module", params=FILES)
def case(request, shared_dir):
    return Case(shared_dir / "fixtures" / f"{request.param}.safetensors")


@pytest.fixture(scope="module")
def v1(shared_dir):
    return Case(shared_dir / "fixtures" / "pid_v1_small.safetensors")


@pytest.fixture(scope="module")
def v15(shared_dir):
    return Case(shared_dir / "fixtures" / "pid_v15_small.safetensors")


@pytest.fixture(scope="module")
def tok(case):
    return case.tokenizer()


def assert_near(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def velocity(tok, case, of="velocity.0", **given):
    """The files have 1000 times the time; in float64 the division loses nothing."""
    x, t = case[f"{of}.x"], case[f"{of}.t"].double() / 1000
    with torch.no_grad():
        return tok.decoder(x, t, case["z"], **{**case.given, **given})


@torch.no_grad()
def test_latent_features(case, tok):
    found = tok.decoder.lq_proj(case["z"], tuple(case.settings["patch_grid"]))
    assert len(found.joint) == case.settings["num_lq_outputs"] == tok.config.injections
    for k, features in enumerate(found.joint):
        assert_near(features, case[f"lq.{k}"])
    if tok.config.features.pixel_injection:
        assert_near(found.pixel, case["lq.pit"])
    else:
        assert found.pixel is None


@pytest.mark.parametrize("i", [0, 1])
def test_velocities(case, tok, i):
    assert_near(velocity(tok, case, f"velocity.{i}"), case[f"velocity.{i}.v"])


def test_taps(case, tok):
    """What the blocks see and give on the way, through hooks on the public modules."""
    dec, seen = tok.decoder, {}
    t = case["velocity.0.t"].double() / 1000
    assert_near(time_features(t), case["tap.t_features"], TAPS)

    def keep(name, pick):
        return lambda module, inputs, output: seen.__setitem__(name, pick(inputs, output))

    last = len(dec.patch_blocks) - 1
    hooks = [
        dec.t_embedder.register_forward_hook(keep("t_emb", lambda _, out: out)),
        dec.patch_blocks[0].register_forward_hook(keep("tokens_in", lambda given, _: given[0])),
        dec.patch_blocks[0].register_forward_hook(keep("text_in", lambda given, _: given[1])),
        dec.patch_blocks[last].register_forward_hook(keep("text_out_before_last_block", lambda given, _: given[1])),
        dec.pixel_blocks[0].register_forward_hook(keep("s_cond", lambda given, _: given[1].flatten(0, 1))),
        *(b.register_forward_hook(keep(f"tokens.{i}", lambda _, out: out[0])) for i, b in enumerate(dec.patch_blocks)),
        *(
            b.register_forward_hook(keep(f"pixels.{i}", lambda _, out: out[:, 1]))
            for i, b in enumerate(dec.pixel_blocks)
        ),
    ]
    velocity(tok, case)
    for hook in hooks:
        hook.remove()
    taps = {k.removeprefix("tap.") for k in case.tensors if k.startswith("tap.")}
    assert taps - {"t_features"} == set(seen)
    for name, actual in seen.items():
        assert_near(actual, case[f"tap.{name}"], TAPS)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_decodes(case, tok, steps):
    if f"decode.steps{steps}" not in case.tensors:
        pytest.skip("the fixture has no decode of this many steps")
    images = tok.decode(case["z"], steps=steps, noise=case.noises[:steps], **case.given)
    assert_near(images, case[f"decode.steps{steps}"])


def test_ode(v15):
    tok = v15.tokenizer(sampler="ode")
    assert_near(tok.decode(v15["z"], noise=v15.noises[:1], **v15.given), v15["decode.ode4"])


def test_undistilled(v15):
    """DPM-Solver++ with guidance; the reference divides by 1.7e-4 at its first time."""
    settings = v15.settings["teacher"]
    tok = v15.tokenizer(sampler="dpm", shift=settings["shift"])
    images = tok.decode(
        v15["z"],
        steps=settings["steps"],
        cfg_scale=settings["cfg_scale"],
        noise=v15.noises[:1],
        null_text=v15["teacher.null_text"],
        **v15.given,
    )
    assert_near(images, v15["teacher.out"], TEACHER)


def test_other_rope(v1):
    extra = v1.settings["extra"]["rope_ntk"]["net"]
    decoder = dataclasses.replace(
        v1.config.decoder, rope="ntk", rope_reference=(extra["rope_ref_h"], extra["rope_ref_w"])
    )
    assert_near(velocity(v1.tokenizer(decoder=decoder), v1), v1["rope_ntk.v"])


def test_long_and_masked_texts(v1):
    tok = v1.tokenizer()
    assert_near(velocity(tok, v1, text=v1["longtext.text"]), v1["longtext.v"])
    assert_near(velocity(tok, v1, text_mask=v1["masked.mask"]), v1["masked.v"])


def test_other_sigmas(case, tok):
    for name in ("sigma_high", "sigma_zero"):
        if f"{name}.v" in case.tensors:
            sigma = case.tensors.get(f"{name}.sigma")
            assert_near(velocity(tok, case, sigma=sigma), case[f"{name}.v"])


def test_settings(case):
    assert list(TIMES) == case.settings["t_list"]
