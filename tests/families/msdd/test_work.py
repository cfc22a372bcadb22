"""FLOP and bytes by formula: against torch's counter on the real network, and against a second calculation."""

from dataclasses import replace

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.backends import use_backend
from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.families.msdd.config import DecoderConfig, EncoderConfig
from msdd_fast.families.msdd.presets import PRESETS
from msdd_fast.families.msdd.work import decode_work, encode_work
from msdd_fast.families.work import total
from tests.families.flops import counted

# Calculated apart from this code: GFLOP of one evaluation per scale, and in all; of the encoder.
EXPECTED_JOINT = {32: 24.05, 64: 32.83, 128: 69.63, 256: 244.03}
EXPECTED_TOTALS = {"msdd-d12-joint": 370.5, "msdd-d12-joint-3scale": 127.1, "msdd-d12-single-scale": 244.0}


TINY = PRESETS["tiny"]
CONFIGS = {
    "cross": TINY,
    "joint": replace(TINY, decoder=replace(TINY.decoder, conditioning="joint", depth=3)),
    "other sizes": replace(
        TINY,
        patch_size=16,
        num_latent_tokens=24,
        latent_dim=8,
        schedule=ScheduleConfig(num_stages=3),
        encoder=EncoderConfig(depth=1, hidden_size=96, head_dim=48),
        decoder=DecoderConfig(depth=1, hidden_size=48, head_dim=24, conditioning="joint"),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("batch", "steps", "cfg_scale"), [(1, 1, 1.0), (2, 2, 2.0)])
def test_flops_are_those_of_torch_s_counter(name, batch, steps, cfg_scale):
    config = CONFIGS[name]
    tokenizer = Tokenizer(config).requires_grad_(False)
    z = torch.randn(batch, config.num_latent_tokens, config.latent_dim)
    work = decode_work(config, batch, steps, cfg_scale, hoisted=False)
    images = torch.zeros(batch, 3, config.image_size, config.image_size)
    with use_backend("sdpa"):
        assert total(work).flops == counted(lambda: tokenizer.decode(z, 0, steps, cfg_scale))
        assert total(encode_work(config, batch)).flops == counted(lambda: tokenizer.encode(images))


def test_image_prediction_takes_one_more_pass():
    """From the image to the velocity, at every evaluation: two reads and a write of the state, of each branch."""
    config = replace(TINY, decoder=replace(TINY.decoder, prediction="image"))
    for steps, cfg_scale, rows in ((1, 1.0, 2), (3, 2.0, 4)):
        plain, image = (total(decode_work(c, 2, steps, cfg_scale)) for c in (TINY, config))
        states = sum(3 * TINY.stage_resolution(s) ** 2 for s in range(4))
        assert image.flops == plain.flops
        assert image.activation_bytes - plain.activation_bytes == steps * rows * 3 * states * 2


def test_flops_of_spec_e():
    """Without the queries of the last block's context, which nothing reads: within 1 %."""
    work = decode_work(PRESETS["msdd-d12-joint"], hoisted=False)
    for scale, gflop in EXPECTED_JOINT.items():
        assert total(w for w in work if w.scale == scale).flops / 1e9 == pytest.approx(gflop, rel=0.01)
    for name, gflop in EXPECTED_TOTALS.items():
        assert total(decode_work(PRESETS[name], hoisted=False)).flops / 1e9 == pytest.approx(gflop, rel=0.01)
    assert total(encode_work(PRESETS["msdd-d12-joint"])).flops / 1e9 == pytest.approx(244.9 - 15.7, rel=0.01)
    # Hoisted, without what folding the context saves: 640 of 768 inputs of its keys and values, and of its embedding.
    folded = 2 * 128 * (768 - 128) * (12 * 2 * 768 + 32) / 1e9
    assert total(decode_work(PRESETS["msdd-d12"])).flops / 1e9 == pytest.approx(284 - folded, rel=0.01)


def test_parts_of_spec_e():
    work = [w for w in decode_work(PRESETS["msdd-d12-joint"], hoisted=False) if w.scale == 256]
    context = [w for w in work if w.op.startswith("context.") and not w.op.endswith("adaln")]
    image = [w for w in work if w.op.startswith("image.") and not w.op.endswith("adaln")]
    assert total([*context, *image]).flops / 1e9 == pytest.approx(194.33, rel=0.01)
    assert total(context).flops / 1e9 == pytest.approx(20.38, rel=0.01)
    assert total(w for w in work if w.op == "attention").flops / 1e9 == pytest.approx(48.92, rel=0.01)
    assert total(w for w in work if "adaln" in w.op or w.op == "time_embed").flops / 1e9 == pytest.approx(
        0.169, rel=0.01
    )


def test_bytes_of_spec_e():
    config = PRESETS["msdd-d12-joint"]
    hoisted = [w for w in decode_work(config) if w.scale == 256 or w.op == "context_embed"]
    assert total(hoisted).weight_bytes / 1e6 == pytest.approx(329.9, rel=0.01)
    eager = total(w for w in decode_work(config, hoisted=False) if w.scale == 256)
    assert eager.weight_bytes / 1e6 == pytest.approx(499.2, rel=0.01)
    layer = {w.op: w.activation_bytes / 1e6 for w in hoisted if w.layer == 0}
    residual, joint_tokens = 1024 * 768 * 2 / 1e6, 1152 / 1024
    assert residual == pytest.approx(1.57, rel=0.01)
    assert layer["image.qkv"] - residual + layer["context.qkv"] - residual / 8 == pytest.approx(5.3, rel=0.01)
    assert layer["image.gate_up"] - residual + layer["context.gate_up"] - residual / 8 == pytest.approx(9.4, rel=0.01)
    assert layer["attention"] / 4 == pytest.approx(1.8, rel=0.02)
    assert layer["image.norm_modulate"] * joint_tokens == pytest.approx(2 * residual * joint_tokens)


def test_batch_and_floor():
    config = PRESETS["msdd-d12-joint"]
    one, eight = (total(decode_work(config, batch=b)) for b in (1, 8))
    assert eight.flops == 8 * one.flops and eight.weight_bytes == one.weight_bytes
    # Ideal floors at batch 1 on an H100: per scale the larger of weights / 3.35 TB/s and FLOP / 989 TFLOP/s.
    scales = [total(w for w in decode_work(config) if w.scale == s) for s in EXPECTED_JOINT]
    weights_only = sum(max(t.weight_bytes / 3.35e12, t.flops / 989e12) for t in scales)
    assert weights_only * 1e3 == pytest.approx(0.54, rel=0.02)
    assert sum(t.floor(989e12, 3.35e12) for t in scales) > weights_only
