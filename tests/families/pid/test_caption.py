"""Caption features with a stand-in for the language model, and with a tiny Gemma 2 where transformers is installed."""

import hashlib
from types import SimpleNamespace

import pytest
import torch

from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.families.pid.caption import ROWS, TEMPLATE, CaptionEncoder, load_features, save_features
from msdd_fast.io.packages import optional
from tests.families.pid.models import TINY, captions, latents, random_tokenizer


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
    with pytest.raises(CheckpointError, match="none is not a folder; download Gemma 2"):
        CaptionEncoder.from_pretrained(tmp_path / "none")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A folder as transformers writes it: a tiny Gemma 2 with its language head, and a tokenizer of bytes."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra [pid])")
    with optional("transformers", "pid"):
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        config = transformers.Gemma2Config(
            vocab_size=300,
            hidden_size=TINY.decoder.text_width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
        network = transformers.Gemma2ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    folder = tmp_path_factory.mktemp("gemma")
    network.bfloat16().save_pretrained(folder)
    words = ["<pad>", "<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "padding_side": "left"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters, **special).save_pretrained(folder)
    return folder


def test_a_tiny_gemma(gemma):
    encoder = CaptionEncoder.from_pretrained(gemma)
    assert encoder.model.dtype == torch.bfloat16 and not hasattr(encoder.model, "lm_head")
    features = encoder.encode(["a cat", ""])
    assert features.shape == (2, ROWS, TINY.decoder.text_width) and features.dtype == torch.bfloat16
    encoder = CaptionEncoder.from_pretrained(gemma, dtype=torch.float32)
    features = encoder.encode(["a cat", ""])
    torch.testing.assert_close(encoder.encode("a cat"), features[:1])
    # By hand: the first row, one of the template's last letter, those of the caption, padding.
    ids = torch.tensor([encoder.tokenizer(TEMPLATE + "a cat")["input_ids"]])
    assert ids[0, 0] == 2 and ids.shape[1] == len(TEMPLATE) + 6
    with torch.no_grad():
        hidden = encoder.model(ids).last_hidden_state[0]
    torch.testing.assert_close(features[0, :7], torch.cat([hidden[:1], hidden[-6:]]))
    assert not torch.equal(features[0, 2:], features[1, 2:])


def test_a_caption_is_decoded(gemma, tmp_path):
    """What docs/pid.md shows."""
    encoder = CaptionEncoder.from_pretrained(gemma)
    save_features(encoder.encode("a cat on a windowsill"), tmp_path / "cat.safetensors")
    del encoder
    tok, z = random_tokenizer(), latents(1, 4, 1, 2)
    image = tok.decode(z, text=tmp_path / "cat.safetensors", seed=0)
    assert torch.equal(image, tok.decode(z, text=load_features(tmp_path / "cat.safetensors"), seed=0))
    assert not torch.equal(image, tok.decode(z, text=captions(1), seed=0))


def test_a_folder_of_something_else(gemma, tmp_path):
    with pytest.raises(CheckpointError, match="holds no language model that transformers reads"):
        CaptionEncoder.from_pretrained(tmp_path)
