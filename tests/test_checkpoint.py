"""Checkpoint directories: round trips, replacing, failures half-way, damaged and foreign files, the hub."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import msdd_fast
from msdd_fast import checkpoint
from msdd_fast.diffusion.config import SamplingConfig
from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.io import safetensors as safetensors_io

INDEX = "model.safetensors.index.json"
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
def old(tiny, tmp_path):
    """A checkpoint as version 0.1 wrote it: fixed names, no hashes."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(tiny.config.to_json())
    save_file(tiny.state_dict(), tmp_path / "old" / "model.safetensors")
    return tmp_path / "old"


def shards(directory):
    """The files of weights."""
    return sorted(directory.glob("model-*.safetensors"))


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
    assert sorted(os.listdir(saved)) == sorted(["config.json", INDEX, "model.safetensors", shards(saved)[0].name])
    assert (saved / "model.safetensors").samefile(shards(saved)[0])  # for other programs
    for path in (saved, str(saved)):
        loaded = load(path)
        assert_same_weights(loaded, tiny)
        assert loaded.config == tiny.config
        assert not loaded.training
        assert all(p.requires_grad and p.dtype == torch.float32 and not p.is_meta for p in loaded.parameters())
    z = torch.randn(2, 16, 32)
    assert torch.equal(loaded.decode(z, seed=3), tiny.decode(z, seed=3))


def test_loading_is_light(saved, fresh):
    """Neither Triton nor torch's symbolic machinery (seconds) is imported to load a checkpoint."""
    code = f"""if True:
        import sys, torch
        before = set(sys.modules)
        import msdd_fast
        msdd_fast.Tokenizer.from_pretrained({str(saved)!r})
        print([m for m in ("triton", "sympy", "torch._dynamo") if m in set(sys.modules) - before])
    """
    assert fresh(code, check=True).stdout == "[]\n"


def test_sharded_round_trip(tiny, sharded):
    index = json.loads((sharded / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 3
    assert sorted(os.listdir(sharded)) == sorted(["config.json", INDEX, *names])
    contents = {file: load_file(sharded / file) for file in names}
    for file, digest in index["metadata"]["sha256"].items():
        assert hashlib.sha256((sharded / file).read_bytes()).hexdigest() == digest
        assert file == "config.json" or file == f"model-{digest[:16]}.safetensors"
    assert all(name in contents[file] for name, file in index["weight_map"].items())
    for tensors in contents.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= SHARD
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in tiny.state_dict().values())
    assert_same_weights(load(sharded), tiny)


def test_bfloat16_storage(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    tensors = load_file(shards(tmp_path / "half")[0])
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
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "ckpt").iterdir()} == {0o640}


# --- replacing an older checkpoint


def test_replacing_keeps_foreign_files_and_mixes_nothing(sharded, other):
    (sharded / "README.md").write_text("mine")
    (sharded / "samples").mkdir()
    (sharded / "samples" / "a.txt").write_text("also mine")
    (sharded / "dangling").symlink_to("nowhere")
    other.save_pretrained(sharded)
    ours = ["config.json", INDEX, "model.safetensors", shards(sharded)[0].name]
    assert sorted(os.listdir(sharded)) == sorted(["README.md", "dangling", "samples", *ours])
    assert (sharded / "README.md").read_text() == "mine"
    assert (sharded / "samples" / "a.txt").read_text() == "also mine"
    assert (sharded / "dangling").is_symlink()
    assert_same_weights(load(sharded), other)
    assert os.listdir(sharded.parent) == ["sharded"]


def test_a_checkpoint_of_0_1_is_replaced(old, tiny, other):
    assert_same_weights(load(old), tiny)
    other.save_pretrained(old, max_shard_bytes=SHARD)
    assert not (old / "model.safetensors").exists()
    assert_same_weights(load(old), other)


def test_saving_twice_changes_no_file(saved, tiny):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    tiny.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


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


@pytest.mark.parametrize("config", ["same", "other"])
@pytest.mark.parametrize("first", [True, False])
def test_failure_of_any_write_leaves_a_whole_checkpoint(tiny, other, tmp_path, monkeypatch, first, config):
    """The disk is full at the k-th write, then a power cut hits there: the old checkpoint or the new, never another."""
    replace, calls = os.replace, []
    if config == "other":
        other = msdd_fast.Tokenizer.from_config(dataclasses.replace(other.config, sampling=SamplingConfig(steps=3)))

    def fail(source, target):
        if Path(target).name != "model.safetensors":  # the second name, when the checkpoint is there already
            calls.append(target)
            if len(calls) == last:
                raise error
        replace(source, target)

    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        for last in range(1, 100):
            target, calls = tmp_path / f"{type(error).__name__}{last}", []
            if not first:
                tiny.save_pretrained(target)
            monkeypatch.setattr(os, "replace", fail)
            try:
                other.save_pretrained(target, max_shard_bytes=2 * 10**6)
                done = True
            except CheckpointError as e:
                assert str(e).startswith(f"cannot write {target}: No space left on device")
                done = False
            except KeyboardInterrupt:
                done = False
            monkeypatch.undo()
            if done:
                break
            assert not [n for n in os.listdir(target) if n.startswith(".")] if target.exists() else first
            if not first:
                loaded = load(target)
                new = loaded.config == other.config if config == "other" else False
                assert_same_weights(loaded, other if new else tiny)
            else:
                assert not target.exists()
            other.save_pretrained(target)
            assert_same_weights(load(target), other)
        assert last > (3 if first else 2)


def test_failure_inside_a_file(tiny, other, saved, monkeypatch):
    before = sorted(os.listdir(saved))

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_io, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*ckpt: No space left on device"):
        other.save_pretrained(saved)
    assert sorted(os.listdir(saved)) == before and os.listdir(saved.parent) == ["ckpt"]
    assert_same_weights(load(saved), tiny)


def test_into_the_working_directory_a_clone_and_a_mounted_disk(tiny, other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main")
    for name in (".gitattributes", "README.md", "LICENSE"):
        (tmp_path / name).write_text("foreign")
    (tmp_path / "lost+found").mkdir()
    folder = os.stat(".").st_ino
    for model in (tiny, other):
        model.save_pretrained(".")
        assert_same_weights(load("."), model)
    assert os.stat(tmp_path).st_ino == folder  # the directory itself is never replaced
    assert (tmp_path / ".git" / "HEAD").exists() and (tmp_path / "README.md").read_text() == "foreign"


def test_nothing_is_written_beside_the_directory(tiny, other, saved, monkeypatch):
    """Its parent may be read-only, or another file system."""
    touched = set()
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (touched.update({Path(a).parent, Path(b).parent}), real(a, b)))
    other.save_pretrained(saved)
    assert touched == {saved}


def test_a_directory_that_cannot_be_written(tiny, saved, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(CheckpointError, match=r"cannot write .*ckpt: Permission denied"):
        tiny.save_pretrained(saved)


def change(model, name, tensor):
    """``model.name`` becomes any tensor."""
    part, _, leaf = name.rpartition(".")
    module = model.get_submodule(part)
    del module._parameters[leaf]
    module.register_buffer(leaf, tensor)


BIAS = "decoder.final_layer.linear.bias"
FAULTS = [
    (lambda t: t.index_fill(0, torch.tensor([3]), float("nan")), "has NaN or Inf"),
    (lambda t: t.index_fill(0, torch.tensor([3]), float("-inf")), "has NaN or Inf"),
    (lambda t: t.to_sparse(), "must be dense, got torch.sparse_coo"),
    (lambda t: t.to(torch.complex64), "must be floating point, got torch.complex64"),
    (lambda t: t > 0, "must be floating point, got torch.bool"),
    (lambda t: t.to(torch.int32), "must be floating point, got torch.int32"),
    (lambda t: t.to("meta"), "has no data"),
    (lambda t: t[:-1], "the config asks for"),
    (lambda t: t.double() * 1e300 + 1e300, "too large for torch.float32"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_weights_that_would_not_load_do_not_replace_a_good_checkpoint(tiny, saved, fault, message):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    broken = make_tiny(1)
    change(broken, BIAS, fault(broken.state_dict()[BIAS]))
    with pytest.raises(CheckpointError, match=f"cannot save.*{BIAS}.*{message}"):
        broken.save_pretrained(saved)
    with pytest.raises(CheckpointError, match=f"state.*{BIAS}.*{message}"):
        msdd_fast.Tokenizer.from_stored(tiny.config, broken.state_dict(), "state")
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_values_too_large_for_the_stored_dtype(saved):
    broken = make_tiny(1)
    with torch.no_grad():
        broken.decoder.final_layer.linear.bias.fill_(1e6)
    with pytest.raises(CheckpointError, match=f"{BIAS} has 1e.06, too large for torch.float16"):
        broken.save_pretrained(saved, dtype=torch.float16)
    broken.save_pretrained(saved, dtype=torch.bfloat16)


def test_compiled_and_wrapped_models_are_saved_under_their_names(saved):
    model = make_tiny(1)
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    model.decoder = torch.compile(model.decoder)
    model.encoder = torch.nn.DataParallel(model.encoder)
    torch.compile(model).save_pretrained(saved)
    got = load(saved).state_dict()
    assert got.keys() == expected.keys() and all(torch.equal(got[n], t) for n, t in expected.items())


def test_parametrizations_are_named(tiny, saved):
    model = make_tiny(1)
    torch.nn.utils.parametrizations.weight_norm(model.decoder.final_layer.linear)
    with pytest.raises(CheckpointError, match=r"cannot save decoder\.final_layer.*remove parametrizations first"):
        model.save_pretrained(saved)
    assert_same_weights(load(saved), tiny)


def test_tied_weights(saved):
    model = make_tiny(1)
    model.encoder.blocks[0].context.q_norm.weight = model.encoder.blocks[0].context.k_norm.weight
    model.save_pretrained(saved)
    assert_same_weights(load(saved), model)


def test_readers_and_kills(tmp_path):
    """The long version: python -m tests.checkpoint_stress"""
    command = [sys.executable, "-m", "tests.checkpoint_stress", "60", "4"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_interrupted_change_of_config(tiny, saved):
    """Until config.json has been replaced, the index has its content."""
    text = (saved / "config.json").read_text()
    other = dataclasses.replace(tiny.config, sampling=SamplingConfig(steps=3))
    edit_json(saved / INDEX, lambda data: data["metadata"].update(config=other.to_dict()))
    assert load(saved).config == other and checkpoint.load_config(saved) == other
    tiny.save_pretrained(saved)
    assert load(saved).config == tiny.config and (saved / "config.json").read_text() == text


def test_a_config_edited_by_hand_counts(saved):
    edit_json(saved / "config.json", lambda c: c["sampling"].update(steps=3))
    assert load(saved).config.sampling.steps == 3


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
def test_truncated_file(saved, old, keep):
    path = shards(saved)[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-\w+\.safetensors is damaged or not a safetensors file"):
        load(saved)
    path = old / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or not a safetensors file"):
        load(old)


def test_one_changed_bit_is_noticed(saved):
    path = shards(saved)[0]
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged: its SHA-256 is not that in {INDEX}"):
        load(saved)


def test_truncated_shard(sharded):
    path = shards(sharded)[1]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        load(sharded)


def test_missing_files(saved, old, sharded):
    shard = shards(sharded)[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load(sharded)
    (old / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load(old)
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


def test_missing_and_unexpected_tensors(old):
    path = old / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.registers"]
    tensors["discriminator.weight"] = torch.zeros(2, 3)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as error:
        load(old)
    assert "missing encoder.registers (1, 16, 64); unexpected discriminator.weight (2, 3)" in str(error.value)


def test_many_mismatches_stay_readable(saved):
    edit_json(saved / "config.json", lambda c: c["decoder"].update(conditioning="joint"))
    with pytest.raises(CheckpointError, match=r"\(and \d+ more\)$") as error:
        load(saved)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_must_stay_inside(saved, sharded, name):
    outside = sharded.parent / "outside.safetensors"
    outside.write_bytes(shards(saved)[0].read_bytes())
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda data: data["weight_map"].update({n: name for n in data["weight_map"]}))
    with pytest.raises(CheckpointError, match="shard names must be plain file names, got"):
        load(sharded)


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


@pytest.mark.parametrize("case", ["stray", "lacking", "two shards"])
def test_shards_hold_what_the_index_says(sharded, case):
    first, second = shards(sharded)[:2]
    tensors, others = load_file(first), load_file(second)
    name = sorted(tensors)[0]
    if case == "stray":
        tensors["extra"] = torch.zeros(1)
        name, message = "extra", "is in it, but not in the index"
    elif case == "lacking":
        del tensors[name]
        message = "is not in it, as the index says"
    else:
        others[name] = tensors[name] + 1
        message = "is in it, but not in the index"
    save_file(tensors, first)
    save_file(others, second)
    edit_json(sharded / INDEX, lambda data: data["metadata"].pop("sha256"))
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        load(sharded)


def test_one_name_twice_in_the_index(sharded):
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{BIAS}": "other.safetensors",'))
    with pytest.raises(CheckpointError, match=f"not a safetensors index: key '{BIAS}' is there twice"):
        load(sharded)


def test_a_config_that_asks_for_more_than_the_files_have(saved, monkeypatch):
    """Refused before a module is built."""
    edit_json(saved / "config.json", lambda c: c["decoder"].update(depth=1000))
    monkeypatch.setattr(msdd_fast.Tokenizer, "from_stored", None)
    with pytest.raises(CheckpointError, match=r"which asks for [\d,]+ parameters, got 416,096"):
        load(saved)


def test_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/mine", "~/mine", "./a/b", Path("owner/name")):
        with pytest.raises(CheckpointError, match=r"no checkpoint '.*': expected a directory"):
            load(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    make_tiny(0).save_pretrained("mine")
    load("~/mine")


@pytest.mark.parametrize("name", [None, 3, b"nano", "", "a\0b", "x" * 5000, "a/" + "x" * 5000])
def test_names_that_are_none(name, tiny):
    with pytest.raises(
        (InputError, CheckpointError),
        match=r"name_or_path must (be a str or a path|not hold|name a file)|no checkpoint '",
    ):
        load(name)
    with pytest.raises(
        (InputError, CheckpointError), match=r"directory must (be a str or a path|not hold|name a file)|cannot write "
    ):
        if name == "" or not isinstance(name, str) or len(name) < 10:
            tiny.save_pretrained(name)
        else:
            tiny.save_pretrained(f"/tmp/{name}")


def test_revision(monkeypatch, saved, tiny):
    asked = []

    def snapshot_download(repo, revision, **_):
        asked.append((repo, revision))
        return str(saved)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    msdd_fast.Tokenizer.from_pretrained("owner/model", revision="v1")
    assert asked == [("owner/model", "v1")]
    with pytest.raises(InputError, match="revision is for checkpoints of the Hugging Face hub, got 'v1'"):
        msdd_fast.Tokenizer.from_pretrained(saved, revision="v1")


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

    def snapshot_download(repo, **_):
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
