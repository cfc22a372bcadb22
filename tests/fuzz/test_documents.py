"""Configurations and other JSON: of a model, of a training run, tables of the fastest backends."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msdd_fast.backends.tuned import SHIPPED, read_table
from msdd_fast.diffusion.config import num_parameters
from msdd_fast.families import config_from_dict, presets
from msdd_fast.io.files import parse_json
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.config import config_names, config_path, read_config
from msdd_fast.training.run import RECIPES
from tests.fuzz.edits import changed, changes, edited, edits
from tests.fuzz.law import obeys

CONFIGS = [json.loads(config.to_json()) for config in presets().values()]
# Of a training run: its class and the text of a file.
RUNS = [(spec.load(), config_path(name).read_text()) for name in config_names() for spec in RECIPES.values()]
TABLE = SHIPPED.read_bytes()
SMALL = 10**6


@given(st.sampled_from(CONFIGS), changes)
def test_configs(document, edits):
    """What is accepted comes back from its own JSON, and a small model of it can be built."""

    def is_right(config):
        count = num_parameters(config)
        assert config_from_dict(json.loads(config.to_json())) == config and 0 < count < 2**40
        if count < SMALL:
            with torch.device("meta"):
                tok = Tokenizer(config)
            assert sum(p.numel() for p in tok.parameters()) == count
        return True

    document = changed(document, edits)
    obeys("configs", lambda: config_from_dict(document), is_right)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("documents") / "x.json"


@given(st.sampled_from(RUNS), changes, edits)
def test_run_configs(path, run, values, bytes_):
    kind, text = run
    data = json.dumps(changed(json.loads(text), values)).encode("utf-8", "surrogatepass")
    path.write_bytes(edited(data, [] if values else bytes_))
    obeys("run configs", lambda: read_config(kind, str(path), "missing"), dataclasses.is_dataclass)


@given(changes, edits)
def test_tuned_tables(path, values, bytes_):
    data = json.dumps(changed(json.loads(TABLE), values)).encode("utf-8", "surrogatepass")
    path.write_bytes(edited(data, [] if values else bytes_))
    obeys("tuned tables", lambda: read_table(path), lambda table: isinstance(table, dict))


@given(st.sampled_from([TABLE, json.dumps(CONFIGS[0]).encode(), b'[[[{"a": [1e9, "\\ud800"]}]]]']), edits)
def test_json(data, bytes_):
    """Raises ValueError for whatever is no JSON; what is one reads as Python's own parser reads it."""
    data = edited(data, bytes_)

    def parse():
        try:
            return parse_json(data), json.loads(data)
        except ValueError:
            return None, None

    obeys("JSON", parse, lambda pair: repr(pair[0]) == repr(pair[1]))
