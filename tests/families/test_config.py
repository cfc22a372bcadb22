"""Configurations: presets, JSON round trip, impossible values."""

import dataclasses
import json

import pytest

from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.errors import ConfigError
from msdd_fast.families import get_preset
from msdd_fast.families.msdd.config import DecoderConfig, TokenizerConfig
from msdd_fast.families.msdd.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name):
    config = get_preset(name)
    assert TokenizerConfig.from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_size=100), r"image_size must be a multiple of patch_size \* 2\^\(num_stages-1\) = 64 .* got 100"),
        (dict(image_size=0), "image_size must be at least 1, got 0"),
        (
            dict(decoder=DecoderConfig(hidden_size=100)),
            "decoder.hidden_size must be a multiple of head_dim=64, got 100",
        ),
        (dict(decoder=DecoderConfig(depth=0)), "decoder.depth must be at least 1, got 0"),
        (dict(schedule=ScheduleConfig(num_stages=0)), "num_stages must be 1 to 10, got 0"),
        (dict(schedule=ScheduleConfig(block_correlation=-0.5)), r"block_correlation must be in \[-1/3, 1\), got -0.5"),
        (dict(schedule=ScheduleConfig(block_correlation=1.0)), r"block_correlation must be in \[-1/3, 1\), got 1.0"),
    ],
)
def test_impossible_values(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TokenizerConfig(), **change)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "config must be a mapping, got list"),
        ({"imagesize": 64}, "config has unknown field 'imagesize'; known: decoder, encoder, "),
        ({"image_size": "64"}, "config.image_size must be of type int, got '64'"),
        ({"image_size": True}, "config.image_size must be of type int, got True"),
        ({"decoder": {"conditioning": "film"}}, "config.decoder.conditioning must be one of cross, joint, got 'film'"),
        ({"schedule": {"block_correlation": float("nan")}}, "block_correlation must be finite"),
        ({"encoder": 3}, "config.encoder must be a mapping, got int"),
    ],
)
def test_bad_data(data, message):
    with pytest.raises(ConfigError, match=message):
        TokenizerConfig.from_dict(data)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="unknown preset 'msdd-xl'; known: msdd-d12, "):
        get_preset("msdd-xl")
