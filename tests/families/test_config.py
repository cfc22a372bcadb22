"""Configurations: presets, JSON round trip, impossible values."""

import dataclasses
import json

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.errors import ConfigError
from msdd_fast.families import config_from_dict, family_of, get_preset, presets
from msdd_fast.families.msdd.config import DecoderConfig, EncoderConfig, TokenizerConfig
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


@pytest.mark.parametrize("preset", presets())
def test_parameters_are_counted_without_building(preset):
    config = get_preset(preset)
    with torch.device("meta"):
        parts = family_of(config).build()
    assert config.num_parameters == sum(t.numel() for part in parts for t in part.state_dict().values())


def numbers(data, path=()):
    """Paths of every number in a config's dict."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(value, (dict, list, tuple)):
            yield from numbers(value, (*path, key))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield (*path, key)


@pytest.mark.parametrize("value", [10**400, 10**39, 2**63, 10**12, -1, -(10**30), float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("preset", ["tiny", "tiny-ssdd"])
def test_every_number_has_bounds(preset, value):
    paths = list(numbers(json.loads(get_preset(preset).to_json())))
    assert len(paths) > 15
    signed = {"gate_init", "position_prior"}  # which -1 suits
    for path in paths:
        data = json.loads(get_preset(preset).to_json())
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        if value == -1 and path[-1] in signed:
            config_from_dict(data)
            continue
        with pytest.raises(ConfigError):
            config_from_dict(data)
            pytest.fail(f"{path} = {value}")


def test_sizes_that_are_each_within_bounds():
    part = dict(depth=1000, hidden_size=65536, head_dim=64)
    with pytest.raises(ConfigError, match=r"the sizes must give at most 1e\+11 parameters, got"):
        TokenizerConfig(decoder=DecoderConfig(**part))


def test_weights_larger_than_this_machine():
    part = dict(depth=30, hidden_size=8192, head_dim=64)
    config = TokenizerConfig(decoder=DecoderConfig(**part), encoder=EncoderConfig(**part))
    with pytest.raises(ConfigError, match=r"config asks for [\d,]+ parameters, \d+ GB in float32, got a machine of"):
        Tokenizer.from_config(config)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="unknown preset 'msdd-xl'; known: msdd-d12, "):
        get_preset("msdd-xl")
