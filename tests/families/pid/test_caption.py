"""Caption features with a stand-in for the language model, and with a tiny Gemma 2 where transformers is installed."""

import hashlib
from types import SimpleNamespace

import pytest
import torch

from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.families.pid.caption import ROWS, TEMPLATE, CaptionEncoder, load_features, save_features
from tests.families.pid.models import latents


class Letters:
    """A tokenizer: 2 begins a text, then one token for each letter, 0 pads."""

    padding_side = "left"

    def __call__(self, texts, max_length=None, padding=None, truncation=None, return_tensors=None):
        if isinstance(texts, str):
            return {"input_ids": [2, *texts.encode()]}
        assert self.padding_side == "right" and padding == "max_length" and truncation
        rows = [[2, *t.encode()][:max_length] for t in texts]
        ids = torch.tensor([r + [0] * (max_length - len(r)) for r in rows])
        batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        return type("Batch", (dict,), {"to": lambda self, device: self})(batch)


class Model:
    """Its hidden state is the token and its place."""

    device = torch.device("cpu")

    def __call__(self, input_ids, attention_mask):
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return SimpleNamespace(last_hidden_state=torch.stack([input_ids, place], dim=-1).float())


def test_the_template():
    assert hashlib.sha256(TEMPLATE.encode()).hexdigest().startswith("62b9ab89eebb0ac5") and len(TEMPLATE) == 1057


def test_rows():
    """The first token, and the last 299 of template and caption, padded to one length."""
    features = CaptionEncoder(Letters(), Model()).encode(["a cat", "", "x" * 500])
    assert features.shape == (3, ROWS, 2)
    assert features[0, 0].tolist() == [2, 0]
    length = len(TEMPLATE) + 1 + 298
    assert features[0, :, 1].tolist() == [0, *range(length - 299, length)]
    shown = bytes(features[0, 1:, 0].to(torch.uint8).tolist())
    assert shown.rstrip(b"\0") == b" a cat"  # one token of the template is left
    assert set(features[1, 2:, 0].tolist()) == {0.0} and features[2, -1, 0] == ord("x")


def test_features_in_files(tmp_path):
    for features in (latents(2, 5, 8), latents(5, 8).bfloat16()):
        save_features(features, tmp_path / "f.safetensors")
        loaded = load_features(tmp_path / "f.safetensors")
        assert loaded.ndim == 3 and torch.equal(loaded.view_as(features), features)
    with pytest.raises(InputError, match="features must be a floating point tensor"):
        save_features(torch.zeros(2), tmp_path / "f.safetensors")
    (tmp_path / "g.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="damaged or not a safetensors file"):
        load_features(tmp_path / "g.safetensors")


def test_nothing_is_downloaded(tmp_path):
    with pytest.raises(CheckpointError, match=r"captions need transformers|is not a folder"):
        CaptionEncoder.from_pretrained(tmp_path / "none")


def test_a_tiny_gemma(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra [pid])")
    config = transformers.Gemma2Config(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8
    )
    features = CaptionEncoder(Letters(), transformers.Gemma2Model(config).eval()).encode("a cat")
    assert features.shape == (1, ROWS, 16) and features.isfinite().all()
