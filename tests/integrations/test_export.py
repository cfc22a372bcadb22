"""Exported decoders: the same images as the eager model, in a process that has no msdd-fast."""

import importlib.util
import json
import subprocess
import sys
import types

import pytest
import torch

from msdd_fast.backends import use_backend
from msdd_fast.commands import main as cli
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.integrations import export
from msdd_fast.integrations.export import Exported, export_decoder, export_network
from tests.perturbed import perturbed

NO_ONNX = importlib.util.find_spec("onnxscript") is None or importlib.util.find_spec("onnxruntime") is None
needs_onnx = pytest.mark.skipif(NO_ONNX, reason="pip install 'msdd-fast[export]'")

ELSEWHERE = """
import sys
import torch

sys.modules["msdd_fast"] = None
path, inputs, result, aot = sys.argv[1:]
z, seeds = torch.load(inputs)
load = torch._inductor.aoti_load_package if aot == "aot" else lambda p: torch.export.load(p).module()
with torch.no_grad():
    torch.save(load(path)(z, seeds), result)
assert not [name for name, module in sys.modules.items() if name.startswith("msdd_fast") and module is not None]
"""


def run_elsewhere(path, z, seeds, folder, kind="plain"):
    torch.save((z, torch.tensor(seeds)), folder / "inputs.pt")
    arguments = [str(path), str(folder / "inputs.pt"), str(folder / "images.pt"), kind]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "images.pt")


@pytest.fixture(scope="module")
def tok():
    return perturbed("tiny-ssdd")


@pytest.mark.parametrize(
    ("preset", "options", "shape"),
    [
        ("tiny", {}, (2, 16, 32)),
        ("tiny-ssdd", {"height": 32, "width": 16, "steps": 1}, (2, 4, 4, 2)),
    ],
)
@pytest.mark.slow
def test_a_process_without_msdd_fast(preset, options, shape, tmp_path):
    tok = perturbed(preset)
    done = export_decoder(tok, tmp_path / "new" / "d.pt2", batch_size=2, **options)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    assert done.inputs == {"z": shape, "seeds": (2,)} and done.error < 1e-4
    with use_backend("eager"):
        expected = tok.decode(z, [3, 2**40], steps=options.get("steps"))
    assert done.output == expected.shape
    images = run_elsewhere(tmp_path / "new" / "d.pt2", z, [3, 2**40], tmp_path)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_aot_inductor(tok, tmp_path):
    done = export_decoder(tok, tmp_path / "d.pt2", height=32, width=32, steps=1, aot=True)
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    images = run_elsewhere(tmp_path / "d.pt2", z, [3], tmp_path, "aot")
    assert 0 <= done.error < 1e-4 and (images - tok.decode(z, 3, steps=1)).abs().max() < 1e-4


@needs_onnx
@pytest.mark.slow
def test_onnx(tmp_path):
    """The network of the coarsest scale, under ONNX Runtime."""
    import onnxruntime

    tok = perturbed("tiny")
    done = export_network(tok, tmp_path / "n.onnx", stage=0, batch_size=2)
    assert done.inputs == {"x_t": (2, 3, 8, 8), "t": (2,), "z": (2, 16, 32)} and done.error < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "n.onnx"))
    generator = torch.Generator().manual_seed(3)
    x_t, z, t = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 16, 32), torch.tensor([0.9, 0.1])
    (velocity,) = session.run(["velocity"], {"x_t": x_t.numpy(), "t": t.numpy(), "z": z.numpy()})
    with torch.no_grad():
        assert (torch.from_numpy(velocity) - tok.decoder(x_t, t, z)).abs().max() < 1e-4


def test_the_command(tok, tmp_path, capsys, monkeypatch):
    asked = {}

    def record(tokenizer, path, **options):
        asked.update(options, size=tokenizer.config.image_size)
        return Exported({"z": (1, 4, 2, 2), "seeds": (1,)}, (1, 3, 16, 16), 1e-6)

    monkeypatch.setattr(export, "export_decoder", record)
    tok.save_pretrained(tmp_path / "tok")
    command = ["export", str(tmp_path / "tok"), "-o", str(tmp_path / "d.pt2"), "--steps", "1", "--device", "cpu"]
    assert cli.main([*command, "--height", "16", "--width", "24", "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["inputs"] == {"z": [1, 4, 2, 2], "seeds": [1]}
    assert said.err.startswith("wrote ") and "it differs from the eager model by at most 1.0e-06" in said.err
    size = {"batch_size": 1, "height": 16, "width": 24, "size": 64}
    assert asked == {**size, "steps": 1, "cfg_scale": None, "aot": False}


# --- Mistakes: one error, and nothing is written.


@pytest.mark.parametrize(
    ("function", "name", "options", "message"),
    [
        (export_decoder, "d.onnx", {}, "path must end in .pt2, got"),
        (export_network, "d.pt2", {}, "path must end in .onnx, got"),
        (
            export_decoder,
            "d.pt2",
            {"height": 20},
            "height must be a multiple of 8, the pixels of a latent cell, got 20",
        ),
        (export_decoder, "d.pt2", {"width": 0}, "width must be an integer >= 1, got 0"),
        (export_decoder, "d.pt2", {"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        (export_decoder, "d.pt2", {"steps": 0}, "steps must be an integer >= 1, got 0"),
        (export_decoder, "d.pt2", {"cfg_scale": 2.0}, "cfg_scale must be 1 for an SSDD tokenizer"),
        (export_decoder, "file/d.pt2", {}, "cannot write "),
    ],
)
def test_bad_arguments(tok, tmp_path, function, name, options, message):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=message):
        function(tok, tmp_path / name, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_command_names_both_suffixes(tmp_path, capsys):
    assert cli.main(["export", "msdd-nano", "-o", str(tmp_path / "decoder.txt")]) == 1
    assert "--out must end in .pt2 or .onnx, got " in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_size_that_is_fixed(tmp_path):
    with pytest.raises(InputError, match="height must be 64, which this model has fixed, got 32"):
        export_decoder(perturbed(), tmp_path / "d.pt2", height=32)


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    tok = perturbed()
    forward = type(tok.decoder).forward

    def depends_on_data(self, x_t, t, z):
        return forward(self, x_t, t, z) if float(z.sum()) != 0.123 else x_t

    monkeypatch.setattr(type(tok.decoder), "forward", depends_on_data)
    with pytest.raises(InputError, match="this model cannot be exported: ") as e:
        export_decoder(tok, tmp_path / "d.pt2")
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_program_that_gives_something_else_is_not_written(tok, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda model, inputs: model)
    monkeypatch.setattr(torch.export, "save", lambda program, path: path.write_bytes(b"half"))
    wrong = types.SimpleNamespace(module=lambda: lambda z, seeds: torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr(torch.export, "load", lambda path: wrong)
    with pytest.raises(InputError, match="the exported program differs from the eager model by "):
        export_decoder(tok, tmp_path / "d.pt2", height=8, width=8, steps=1)
    assert not list(tmp_path.iterdir())


def test_without_onnx(tok, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda n: None if n.startswith("onnx") else find(n))
    with pytest.raises(
        BackendUnavailableError, match=r"ONNX needs onnx and onnxscript: pip install 'msdd-fast\[export\]'"
    ):
        export_network(tok, tmp_path / "n.onnx")
    monkeypatch.undo()
    if not NO_ONNX:
        with pytest.raises(InputError, match=r"stage must be an integer in \[-1, 0\], got 1"):
            export_network(tok, tmp_path / "n.onnx", stage=1)


def test_options_that_mean_nothing(capsys, tmp_path):
    for out, option in (("n.onnx", ["--steps", "2"]), ("n.onnx", ["--aot"]), ("d.pt2", ["--stage", "0"])):
        assert cli.main(["export", "msdd-nano", "-o", str(tmp_path / out), *option]) == 1
        assert f"error: {option[0]} means nothing for " in capsys.readouterr().err
