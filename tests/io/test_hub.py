"""Checkpoints on a hub: pushed and loaded again through huggingface_hub, against a server on this machine."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.families import get_preset
from msdd_fast.families.card import model_card
from tests import fake_hub
from tests.perturbed import perturbed

REPORT = {
    "set": "/home/somebody/photos/kodak24",
    "folder": "/home/somebody/photos/kodak24",
    "reconstructions": "/home/somebody/decoded",
    "count": 24,
    "unreadable": 0,
    "crop": "largest centred square, to 64 px",
    "checkpoint": "/home/somebody/runs/mine",
    "steps_per_scale": 1,
    "cfg_scale": 1.0,
    "seed": 0,
    "mean": {"psnr_db": 25.6543, "ssim": 0.754},
    "images": {"a.png": {"psnr_db": 25.0}},
}


@pytest.fixture(scope="module")
def tok():
    return perturbed()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="pip install 'msdd-fast[hub]'")
    from huggingface_hub import constants

    with fake_hub.running() as (hub, address):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def same(a, b):
    return a.config == b.config and all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def test_push_then_load(tok, hub):
    address = tok.push_to_hub("me/mine", metrics=REPORT, license="apache-2.0", private=True)
    (sha, files) = hub.repositories["me/mine"]["main"][-1]
    assert address.endswith(f"/me/mine/commit/{sha}") and hub.private["me/mine"]
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) == 1 and re.fullmatch(r"model-[0-9a-f]{16}\.safetensors", shards[0])
    assert {*files} == {".gitattributes", "README.md", "config.json", "model.safetensors.index.json", *shards}
    assert b"license: apache-2.0" in files["README.md"] and b"| 25.65 | 0.754 |" in files["README.md"]
    assert same(Tokenizer.from_pretrained("me/mine"), tok)
    asked = len(hub.requests)
    assert same(Tokenizer.from_pretrained("me/mine", local_files_only=True), tok) and len(hub.requests) == asked
    assert same(Tokenizer.from_pretrained("me/mine", revision=sha), tok)


def test_pushed_again(tok, hub):
    """One commit replaces the checkpoint; a card that is there stays, unless another one is given."""
    tok.push_to_hub("me/mine")
    before = dict(hub.files("me/mine"))
    hub.files("me/mine")["README.md"] = b"written by hand"
    hub.files("me/mine")["notes.txt"] = b"kept"
    other = perturbed(seed=1)
    other.push_to_hub("me/mine", dtype=torch.bfloat16)
    files = hub.files("me/mine")
    assert len(hub.repositories["me/mine"]["main"]) == 3 and files["notes.txt"] == b"kept"
    assert files["README.md"] == b"written by hand"
    assert not {n for n in before if n.endswith(".safetensors")} & {*files}
    loaded = Tokenizer.from_pretrained("me/mine")
    assert torch.equal(loaded.decoder.context_null, other.decoder.context_null.bfloat16().float())
    tok.push_to_hub("me/mine", card="# mine")
    assert hub.files("me/mine")["README.md"] == b"# mine"


def test_revisions_and_subfolders(tok, hub):
    other = perturbed(seed=1)
    tok.push_to_hub("me/mine")
    other.push_to_hub("me/mine", revision="v2", subfolder="student")
    assert "student/config.json" not in hub.files("me/mine") and "student/config.json" in hub.files("me/mine", "v2")
    assert same(Tokenizer.from_pretrained("me/mine", revision="v2", subfolder="student"), other)
    assert same(Tokenizer.from_pretrained("me/mine", revision="v2"), tok)
    card = hub.files("me/mine", "v2")["student/README.md"].decode()
    assert 'from_pretrained("me/mine", revision="v2", subfolder="student")' in card
    with pytest.raises(
        CheckpointError, match=r"(?s)no directory 'me/mine', and the Hugging Face hub did not give it: .*v3"
    ):
        Tokenizer.from_pretrained("me/mine", revision="v3")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no config.json"):
        Tokenizer.from_pretrained("me/mine", subfolder="teacher")


def test_a_token(tok, hub, monkeypatch):
    hub.token = "secret"
    with pytest.raises(CheckpointError, match="the Hugging Face hub did not take 'me/mine': "):
        tok.push_to_hub("me/mine")
    tok.push_to_hub("me/mine", token="secret")
    with pytest.raises(
        CheckpointError, match="no directory 'me/mine', and the Hugging Face hub did not give it: "
    ) as e:
        Tokenizer.from_pretrained("me/mine", token="wrong")
    assert "wrong" not in str(e.value)
    assert same(Tokenizer.from_pretrained("me/mine", token="secret"), tok)
    assert {token for *_, token in hub.requests} == {None, "secret", "wrong"}


def test_a_push_that_fails_commits_nothing(tok, hub):
    tok.push_to_hub("me/mine")
    commits = len(hub.repositories["me/mine"]["main"])
    hub.fails = "/preupload/|/commit/"
    with pytest.raises(CheckpointError, match=r"the Hugging Face hub did not take 'me/mine': .*403"):
        perturbed(seed=1).push_to_hub("me/mine")
    hub.fails = None
    assert len(hub.repositories["me/mine"]["main"]) == commits
    assert same(Tokenizer.from_pretrained("me/mine"), tok)


def test_what_is_not_on_the_hub_or_in_the_cache(hub):
    for options, where in (
        ({}, "the Hugging Face hub did not give it"),
        ({"local_files_only": True}, "its cache does"),
    ):
        with pytest.raises(CheckpointError, match=f"no directory 'me/gone', and {where}"):
            Tokenizer.from_pretrained("me/gone", **options)


def test_bad_arguments_are_refused_before_anything_is_sent(tok, hub, tmp_path):
    broken = perturbed()
    with torch.no_grad():
        broken.decoder.context_null.fill_(float("nan"))
    (tmp_path / "text.json").write_text("hello")
    for model, repository, options, message in (
        (tok, "mine", {}, "repository must be a hub id 'owner/name', got 'mine'"),
        (tok, 3, {}, "repository must be a hub id 'owner/name', got 3"),
        (tok, "me/mine", {"subfolder": "../x"}, "subfolder must be a relative path inside the repository"),
        (tok, "me/mine", {"metrics": {"psnr": 3}}, "metrics must be reports of `msdd-fast eval --json`, got something"),
        (tok, "me/mine", {"metrics": tmp_path / "none.json"}, "metrics must be a report .* got .*none.json: "),
        (tok, "me/mine", {"metrics": [tmp_path / "text.json"]}, "metrics must be a report .* got .*text.json: "),
        (tok, "me/mine", {"dtype": torch.int8}, "dtype must be floating point"),
        (broken, "me/mine", {}, "decoder.context_null"),
    ):
        with pytest.raises((InputError, CheckpointError), match=message):
            model.push_to_hub(repository, **options)
    assert hub.requests == []


def test_without_the_package(tok, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"push_to_hub needs huggingface_hub: pip install 'msdd-fast\[hub\]'"):
        tok.push_to_hub("me/mine")


def test_subfolders_of_directories(tok, tmp_path):
    tok.save_pretrained(tmp_path / "runs" / "student")
    assert same(Tokenizer.from_pretrained(tmp_path / "runs", subfolder="student"), tok)
    assert same(Tokenizer.from_pretrained(tmp_path, subfolder="runs/student/"), tok)
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        Tokenizer.from_pretrained(tmp_path / "runs", subfolder="teacher")
    for bad in ("../x", "/x", "a//b", "", "a\\b", 3, "."):
        with pytest.raises(InputError, match="subfolder must be a relative path"):
            Tokenizer.from_pretrained(tmp_path, subfolder=bad)


def test_another_process_with_the_environment_of_users(tok, hub, tmp_path):
    """HF_ENDPOINT and HF_HOME, as huggingface_hub documents them; nothing is patched."""
    from huggingface_hub import constants

    tok.push_to_hub("me/mine")
    code = "from msdd_fast import Tokenizer; print(Tokenizer.from_pretrained('me/mine').config.image_size)"
    environment = {**os.environ, "HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "64\n", done.stderr


# --- The card.


@pytest.mark.parametrize("preset", ["tiny", "tiny-ssdd", "msdd-d12-joint", "tiny-pid"])
def test_card(preset, tmp_path):
    """It says the configuration, and its program runs."""
    config = get_preset(preset)
    card = model_card(config, "me/mine", [REPORT])
    encodes = preset != "tiny-pid"
    is_tokenizer = "image-tokenizer, " if encodes else ""
    assert json.loads(re.search(r"```json\n(.*?)```", card, re.S)[1]) == json.loads(config.to_json())
    assert card.startswith(
        f"---\nlibrary_name: msdd-fast\ntags: [msdd-fast, {is_tokenizer}diffusion-decoder, {config.family}]\n---\n"
    )
    assert ("tok.encode" in card) == ("M, encoder and decoder |" in card) == ("image tokenizer" in card) == encodes
    assert ("\nA PiD tokenizer has no encoder: it decodes latents of the VAE of SDXL; " in card) != encodes
    assert (
        "kodak24, 24 images (crop: largest centred square, to 64 px; steps per scale: 1; cfg scale: 1.0; seed: 0):"
        in card
    )
    assert "| psnr_db | ssim |\n|---|---|\n| 25.65 | 0.754 |" in card and "somebody" not in card
    if preset.startswith("tiny"):
        Tokenizer.from_config(config).save_pretrained(tmp_path / "mine")
        program = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("me/mine", str(tmp_path / "mine"))
        scope = {}
        exec(program, scope)
        assert scope["x"].shape == (1, *config.stage_shapes(scope["z"].shape)[-1]) and scope["x"].isfinite().all()


def test_card_without_metrics():
    card = model_card(get_preset("tiny"), "me/mine")
    assert "None were given. `msdd-fast eval FOLDER --json FILE` measures some." in card
    for bad in ({}, {"mean": {}}, {"mean": {"psnr": "high"}}, 3):
        with pytest.raises(InputError, match="metrics must be reports of `msdd-fast eval --json`"):
            model_card(get_preset("tiny"), "me/mine", [bad])
