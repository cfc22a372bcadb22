"""Checkpoint directories: round trips, replacing, failures half-way, damaged and foreign files, the hub."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import msdd_fast
from msdd_fast import checkpoint
from msdd_fast.diffusion.config import SamplingConfig
from msdd_fast.errors import CheckpointError, InputError

SHARD = 100_000  # bytes; the tiny model then takes several files


def make_tiny(seed):
    torch.manual_seed(seed)
    return msdd_fast.Tokenizer.from_config("tiny")


@pytest.fixture(scope="module")
def tiny():
    return make_tiny(0)


@pytest.fixture(scope="module")
def other():
    return make_tiny(1)


@pytest.fixture
def saved(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "ckpt")
    return tmp_path / "ckpt"


@pytest.fixture
def sharded(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "sharded", max_shard_bytes=SHARD)
    return tmp_path / "sharded"


def load(directory):
    return msdd_fast.Tokenizer.from_pretrained(directory)


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# --- what goes in comes out


def test_round_trip(tiny, saved):
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
    for path in (saved, str(saved)):
        loaded = load(path)
        assert_same_weights(loaded, tiny)
        assert loaded.config == tiny.config
        assert not loaded.training
        assert all(p.requires_grad and p.dtype == torch.float32 and not p.is_meta for p in loaded.parameters())
    z = torch.randn(2, 16, 32)
    assert torch.equal(loaded.decode(z, seed=3), tiny.decode(z, seed=3))


def test_loading_is_light(saved):
    """Neither Triton nor torch's symbolic machinery (seconds) is imported to load a checkpoint."""
    code = f"""if True:
        import sys, torch
        before = set(sys.modules)
        import msdd_fast
        msdd_fast.Tokenizer.from_pretrained({str(saved)!r})
        print([m for m in ("triton", "sympy", "torch._dynamo") if m in set(sys.modules) - before])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_sharded_round_trip(tiny, sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert sorted(os.listdir(sharded)) == sorted(["config.json", "model.safetensors.index.json", *shards])
    contents = {file: load_file(sharded / file) for file in shards}
    assert all(name in contents[file] for name, file in index["weight_map"].items())
    for tensors in contents.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= SHARD
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in tiny.state_dict().values())
    assert_same_weights(load(sharded), tiny)


def test_bfloat16_storage(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    loaded = load(tmp_path / "half").state_dict()
    for name, tensor in tiny.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.bfloat16().float()), name


def test_integer_dtype_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"dtype must be floating point, got torch.int8"):
        tiny.save_pretrained(tmp_path / "ckpt", dtype=torch.int8)
    assert not any(tmp_path.iterdir())


def test_permissions_follow_umask(tiny, tmp_path):
    before = os.umask(0o027)
    try:
        tiny.save_pretrained(tmp_path / "ckpt")
    finally:
        os.umask(before)
    assert (tmp_path / "ckpt").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "ckpt" / "config.json").stat().st_mode & 0o777 == 0o640


# --- replacing an older checkpoint


def test_replacing_keeps_foreign_files_and_mixes_nothing(sharded, other):
    (sharded / "README.md").write_text("mine")
    (sharded / "samples").mkdir()
    (sharded / "samples" / "a.txt").write_text("also mine")
    (sharded / "dangling").symlink_to("nowhere")
    other.save_pretrained(sharded)
    assert sorted(os.listdir(sharded)) == ["README.md", "config.json", "dangling", "model.safetensors", "samples"]
    assert (sharded / "README.md").read_text() == "mine"
    assert (sharded / "samples" / "a.txt").read_text() == "also mine"
    assert (sharded / "dangling").is_symlink()
    assert_same_weights(load(sharded), other)
    assert os.listdir(sharded.parent) == ["sharded"]


def test_one_file_replaced_by_shards(saved, other):
    other.save_pretrained(saved, max_shard_bytes=SHARD)
    assert not (saved / "model.safetensors").exists()
    assert_same_weights(load(saved), other)


def test_saving_through_a_symlink(saved, other):
    link = saved.parent / "latest"
    link.symlink_to(saved, target_is_directory=True)
    other.save_pretrained(link)
    assert link.is_symlink()
    assert_same_weights(load(saved), other)
    assert sorted(os.listdir(saved.parent)) == ["ckpt", "latest"]


def test_saving_into_an_empty_directory(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    assert_same_weights(load(tmp_path), tiny)


@pytest.mark.parametrize("shard_bytes", [SHARD, 10**9])
def test_failure_while_saving_leaves_the_old_checkpoint(tiny, other, saved, monkeypatch, shard_bytes):
    calls = []

    def full_disk(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3 or shard_bytes > SHARD:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*ckpt: No space left on device"):
        other.save_pretrained(saved, max_shard_bytes=shard_bytes)
    assert calls
    assert os.listdir(saved.parent) == ["ckpt"]
    assert_same_weights(load(saved), tiny)


def test_failure_of_the_last_rename_restores_the_old_checkpoint(tiny, other, saved, monkeypatch):
    rename = os.rename

    def fail(source, target):
        if (source / "model.safetensors").exists() and target == saved and source != old:
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    def remember(source, target):
        nonlocal old
        if source == saved:
            old = target
        fail(source, target)

    old = None
    monkeypatch.setattr(os, "rename", remember)
    with pytest.raises(CheckpointError, match="resource busy"):
        other.save_pretrained(saved)
    assert old is not None
    assert os.listdir(saved.parent) == ["ckpt"]
    assert_same_weights(load(saved), tiny)


def test_interrupt_while_saving_leaves_no_litter(tiny, other, saved, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(saved)
    assert os.listdir(saved.parent) == ["ckpt"]
    assert_same_weights(load(saved), tiny)


def test_refused_destinations(tiny, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(InputError, match="directory must be a directory, got the file"):
        tiny.save_pretrained(file)
    with pytest.raises(CheckpointError, match=r"cannot write .*file/x: Not a directory"):
        tiny.save_pretrained(file / "x")
    with pytest.raises(CheckpointError, match="cannot write /proc/msdd: "):
        tiny.save_pretrained("/proc/msdd")
    assert os.listdir(tmp_path) == ["file"]
    assert file.read_text() == "x"


@pytest.mark.parametrize("config", [None, '{"model_type": "bert"}', "[]", "{"])
def test_foreign_directory_is_not_overwritten(tiny, tmp_path, config):
    (tmp_path / "model.safetensors").write_text("somebody else's")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="directory must be empty or hold an msdd-fast checkpoint"):
        tiny.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "somebody else's"


# --- damaged and contradictory checkpoints


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_file(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or not a safetensors file"):
        load(saved)


def test_truncated_shard(sharded):
    path = sorted(sharded.glob("model-00002-*"))[0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        load(sharded)


def test_missing_files(saved, sharded):
    shard = sorted(sharded.glob("model-00002-*"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load(sharded)
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"ckpt is not a checkpoint: it has no config\.json"):
        load(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "config must be a mapping, got list"),
        ('{"imagesize": 64}', "config has unknown field 'imagesize'; known: decoder, "),
        ('{"image_size": "64"}', "config.image_size must be of type int, got '64'"),
        ('{"decoder": {"depth": 2.0}}', "config.decoder.depth must be of type int, got 2.0"),
        ('{"image_size": 100}', "image_size must be a multiple of .* got 100"),
    ],
)
def test_bad_config(saved, text, message):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.json.* {message}"):
        load(saved)


def test_binary_config(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        load(saved)


def test_unreadable_config(saved):
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: Is a directory"):
        load(saved)


def test_config_that_contradicts_the_weights(saved):
    edit_json(saved / "config.json", lambda c: c.update(latent_dim=16))
    with pytest.raises(CheckpointError, match="weights do not match the config") as error:
        load(saved)
    message = str(error.value)
    assert "encoder.head.weight: the config asks for (16, 64), the weights have (32, 64)" in message
    assert str(saved) in message


def test_missing_and_unexpected_tensors(saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.registers"]
    tensors["discriminator.weight"] = torch.zeros(2, 3)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as error:
        load(saved)
    assert "missing encoder.registers (1, 16, 64); unexpected discriminator.weight (2, 3)" in str(error.value)


def test_many_mismatches_stay_readable(saved):
    edit_json(saved / "config.json", lambda c: c["decoder"].update(conditioning="joint"))
    with pytest.raises(CheckpointError, match=r"\(and \d+ more\)$") as error:
        load(saved)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_must_stay_inside(saved, sharded, name):
    outside = sharded.parent / "outside.safetensors"
    outside.write_bytes((saved / "model.safetensors").read_bytes())
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda data: data["weight_map"].update({n: name for n in data["weight_map"]}))
    with pytest.raises(CheckpointError, match="shard names must be plain file names, got"):
        load(sharded)


@pytest.mark.parametrize("base", ["msdd-huge", "../msdd-nano", 3])
def test_base_must_be_bundled(sharded, base):
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda data: data["metadata"].update(base=base))
    with pytest.raises(CheckpointError, match=r"base must be another bundled checkpoint .*msdd-nano.*, got"):
        load(sharded)


def test_base_lends_what_is_missing(tmp_path):
    """A directory of one tensor and a base is the base with that tensor replaced."""
    nano = load("msdd-nano")
    name = "decoder.final_layer.linear.bias"
    save_file({name: torch.ones_like(nano.state_dict()[name])}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"metadata": {"base": "msdd-nano"}, "weight_map": {name: "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(nano.config.to_json())
    got, expected = load(tmp_path).state_dict(), nano.state_dict()
    assert (got.pop(name) == 1).all() and expected.pop(name) is not None
    assert all(torch.equal(got[n], expected[n]) for n in expected)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["x"]}}'])
def test_bad_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is not a safetensors index|is missing"):
        load(sharded)


# --- names


def test_unknown_name_lists_the_bundled_ones(monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'nope'.*\(none bundled\)"):
        load("nope")
    tiny.save_pretrained(tmp_path / "tiny-1")
    tiny.save_pretrained(tmp_path / "tiny-2")
    with pytest.raises(CheckpointError, match=r"no checkpoint 'nope': expected a .*\(tiny-1, tiny-2\)"):
        load("nope")
    assert_same_weights(load("tiny-2"), tiny)


def test_bundled_checkpoints_load():
    for name in checkpoint.bundled_names():
        z = load(name).encode(torch.zeros(1, 3, *[load(name).config.image_size] * 2))
        assert z.isfinite().all()


@pytest.mark.parametrize("path", ["./missing", "../missing", "/missing/dir", "a/b/c"])
def test_paths_are_not_mistaken_for_hub_ids(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=f"no checkpoint '{path}': expected a directory"):
        load(path)


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"no directory 'some-body/msdd\.1'.*pip install 'msdd-fast\[hub\]'"):
        load("some-body/msdd.1")


def test_hub(monkeypatch, saved, tiny):
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append(repo)
        if repo == "owner/gone":
            raise ConnectionError("no network")
        return str(saved)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert_same_weights(load("owner/model"), tiny)
    with pytest.raises(CheckpointError, match=r"no directory 'owner/gone', and the .* hub did not give it: no network"):
        load("owner/gone")
    assert asked == ["owner/model", "owner/gone"]


def test_a_local_directory_wins_over_the_hub(monkeypatch, saved, tiny):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(saved.parent.parent)
    assert_same_weights(load(f"{saved.parent.name}/{saved.name}"), tiny)


def test_config_survives(tmp_path):
    """Fields away from their defaults come back, floats exactly."""
    tok = make_tiny(0)
    config = dataclasses.replace(
        tok.config,
        rope=dataclasses.replace(tok.config.rope, base=123.4),
        schedule=dataclasses.replace(tok.config.schedule, block_correlation=1 / 3),
        sampling=SamplingConfig(steps=3, cfg_scale=1.7),
    )
    msdd_fast.Tokenizer.from_config(config).save_pretrained(tmp_path / "ckpt")
    assert load(tmp_path / "ckpt").config == config
