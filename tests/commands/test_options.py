"""One set of option names, --json and --quiet everywhere, and no traceback for a mistake, benchmarks included."""

import argparse
import importlib
import json
import subprocess
import sys
import types

import pytest
import torch

from msdd_fast.bench.report.text import COLUMNS
from msdd_fast.commands import main as cli
from msdd_fast.commands import output
from msdd_fast.commands.evaluation import options as eval_options
from msdd_fast.commands.evaluation.evaluate import _row
from msdd_fast.commands.evaluation.sources import describe_crop
from msdd_fast.commands.serving import settings_of
from msdd_fast.integrations.serve import Settings
from msdd_fast.io.arguments import byte_size, dtype_name, positive_int, renamed
from msdd_fast.io.images import RESIZE_FILTERS, save_image, to_image
from msdd_fast.io.latents import Latents, save_latents
from msdd_fast.io.program import run_program
from msdd_fast.metrics.image import SSIM_DATA_RANGES
from tests.perturbed import perturbed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, latents and a photo."""
    folder = tmp_path_factory.mktemp("options")
    perturbed().save_pretrained(folder / "tok")
    z = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    save_latents(Latents(z, ["a", "b"]), folder / "z.safetensors")
    save_image(to_image(torch.linspace(-1, 1, 3 * 64 * 64).view(3, 64, 64)), folder / "photo.png")
    return folder


def commands(folder, out):
    common = ["--checkpoint", str(folder / "tok"), "--device", "cpu"]
    return {
        "decode": ["decode", str(folder / "z.safetensors"), "-o", str(out / "decoded"), *common],
        "encode": ["encode", str(folder / "photo.png"), "-o", str(out / "z.safetensors"), *common],
        "reconstruct": ["reconstruct", str(folder / "photo.png"), "-o", str(out / "r.png"), *common],
        "env": ["env"],
    }


RESULTS = {
    "decode": {"out", "images", "written", "options"},
    "encode": {"out", "shape", "dtype", "unreadable", "shards_kept"},
    "reconstruct": {"out", "checkpoint", "images"},
    "env": {"msdd_fast", "packages", "cpu", "missing"},
}


@pytest.mark.parametrize("name", RESULTS)
def test_json_on_stdout_and_silence(name, folder, tmp_path, capsys):
    """Standard output holds the JSON and nothing else; with --quiet there is nothing else at all."""
    assert cli.main([*commands(folder, tmp_path)[name], "--json", "-"]) == 0
    said = capsys.readouterr()
    assert RESULTS[name] <= {*json.loads(said.out)}
    assert name == "env" or "wrote" in said.err
    again = [*commands(folder, tmp_path / "again")[name], "--quiet", "--json", str(tmp_path / "new" / "r.json")]
    assert cli.main(again) == 0
    assert capsys.readouterr() == ("", "") and RESULTS[name] <= {*json.loads((tmp_path / "new" / "r.json").read_text())}


def test_json_that_cannot_be_written_is_found_before_the_work(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for name in ("decode", "encode", "reconstruct"):
        assert cli.main([*commands(folder, tmp_path)[name], "--json", str(tmp_path / "file" / "r.json")]) == 1
        assert "cannot write " in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name", ["demo", "reconstruct", "encode", "decode", "eval", "convert", "export", "bench", "profile", "tune", "env"]
)
def test_every_command_has_json_and_quiet(name):
    parser = cli.build_parser(name)
    sub = next(a for a in parser._actions if a.dest == "command").choices[name]
    known = set(sub._option_string_actions)
    assert {"--json", "--quiet", "-q", "--verbose", "-v"} <= known
    assert not known & {"--output", "--model", "--batch"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["decode", "z", "--output", "x"], {"out": "x"}),
        (["encode", "p", "--output=x"], {"out": "x"}),
        (["reconstruct", "p", "--output", "x"], {"out": "x"}),
        (["bench", "--model", "a", "b", "--batch", "1", "8"], {"checkpoint": ["a", "b"], "batch_size": [1, 8]}),
        (["profile", "--model", "a", "--batch", "2", "--dtype", "bf16"], {"checkpoint": "a", "dtype": "bfloat16"}),
    ],
)
def test_the_names_of_version_0_1(old, new, monkeypatch, capsys):
    """Accepted for one release, each with a warning that names the new one."""
    asked = {}
    module = importlib.import_module(f"msdd_fast.commands.{old[0]}")
    monkeypatch.setattr(module, "run", lambda args: asked.update(vars(args)))
    assert cli.main(old) == 0
    assert new.items() <= asked.items()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len([w for w in old if w.split("=")[0] in ("--output", "--model", "--batch", "bf16")])
    assert all(
        w.startswith("msdd-fast: warning: --") and w.endswith("; the old name works until 0.3") for w in warnings
    )


def test_words_that_only_look_like_old_names(capsys):
    names = {"--batch": "--batch-size"}
    assert renamed(["--batch-size", "2", "--", "--batch"], names) == ["--batch-size", "2", "--", "--batch"]
    assert dtype_name("float32") == "float32" and positive_int("3") == 3 and capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["-v", "train"], ["train", "-v"], ["train", "--quiet"], ["distill", "-q"]])
def test_verbosity_of_commands_with_a_generated_parser(words, monkeypatch):
    rest = {}
    name = next(w for w in words if not w.startswith("-"))
    module = importlib.import_module(f"msdd_fast.commands.{name}")
    monkeypatch.setattr(module, "run", lambda args: rest.update(rest=args.rest))
    assert cli.main([*words, "--data", "x"]) == 0 and rest == {"rest": ["--data", "x"]}


# --- Progress.


def test_a_bar_is_for_terminals_and_for_what_takes_long(monkeypatch):
    class Terminal(list):
        encoding = "utf-8"

        def __init__(self, is_terminal):
            self.is_terminal = is_terminal

        def isatty(self):
            return self.is_terminal

        def write(self, text):
            self.append(text)

        def flush(self):
            pass

    def shown(is_terminal, quiet, make):
        stderr = Terminal(is_terminal)
        monkeypatch.setattr(sys, "stderr", stderr)
        make(types.SimpleNamespace(quiet=quiet))
        return "".join(stderr)

    def named(args):
        with output.steps(args, 2) as step:
            step("loading")
            step("exporting")

    def counted(args):
        with output.bar(args, 3) as bar:
            bar.update(2)

    assert "loading" in shown(True, False, named) and "exporting" in shown(True, False, named)
    assert shown(True, True, named) == shown(False, False, named) == ""
    assert shown(True, False, counted).strip() == ""  # over before 2 s
    monkeypatch.setattr(output, "DELAY", 0)
    assert "0/3" in shown(True, False, counted) and shown(True, True, counted) == shown(False, False, counted) == ""


# --- Mistakes in the benchmarks' own programs.

MISTAKES = [
    ("quality", ["no-such-checkpoint", "--set", "a=b"], "no checkpoint 'no-such-checkpoint'"),
    ("quality", ["msdd-nano", "--set", "folder"], "--set must be NAME=DIR, got 'folder'"),
    ("decode.waterfall", ["nonsense"], "no checkpoint 'nonsense'"),
    ("decode.waterfall", ["tiny", "--device", "nonsense"], "--device must name a torch device that works here"),
    ("decode.waterfall", ["tiny", "--json", "FILE/x.json"], "cannot write "),
    ("decode.trial", ["--device", "meta"], "--device must name a torch device that works here"),
    ("baselines.peers", ["--only", "nothing"], "--only must name some of"),
    ("baselines.peers", ["--from", "FILE"], "must be a JSON file of peers"),
    ("timing.op_overhead", ["--json", "FILE/x.json"], "cannot write "),
    ("work.aot", ["--json", "FILE/x.json"], "cannot write "),
    ("report.op_table", ["FILE"], "must be a JSON file of pytest-benchmark"),
    ("report.op_table", ["OBJECT"], "must be a JSON file of pytest-benchmark: it has no 'machine_info'"),
    (
        "report.screenshots",
        ["nowhere.html", "out", "--browser", "true"],
        "report must be a file of msdd-fast bench --html",
    ),
    ("training", ["measure", "--preset", "nonsense", "--device", "cpu"], "unknown preset 'nonsense'"),
    ("training", ["estimate", "stage1-cross-4scale", "--measured", "OBJECT"], "must be a file that measure wrote"),
]


@pytest.mark.parametrize(("module", "words", "message"), MISTAKES)
def test_no_traceback(module, words, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "object").write_text("{}")
    files = {"FILE": str(tmp_path / "file"), "OBJECT": str(tmp_path / "object")}
    for name, path in files.items():
        words = [word.replace(name, path) for word in words]
    program = importlib.import_module(f"msdd_fast.bench.{module}")
    monkeypatch.setattr(sys, "argv", [module, *words])
    assert run_program(program.main) == 1
    said = capsys.readouterr()
    assert said.err.startswith("msdd-fast: error: ") and said.err.count("\n") == 1 and message in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "object"]


def test_a_program_ends_with_its_code():
    """What run_program is to the modules, through the shell."""
    command = [sys.executable, "-m", "msdd_fast.bench.report.op_table", "nowhere.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(
        "msdd-fast: error: nowhere.json must be"
    )


def test_help_fits_80_columns():
    done = subprocess.run(
        [sys.executable, "-m", "msdd_fast", "--help"], capture_output=True, text=True, env={"COLUMNS": "80"}
    )
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= COLUMNS


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("512 B", 512),
        ("2GiB", 2**31),
        ("2gib", 2**31),
        (" 1.5 MiB ", 3 * 2**19),
        ("0.1kB", 100),
        ("500MB", 500 * 10**6),
        ("1TB", 10**12),
        ("1TiB", 2**40),
    ],
)
def test_byte_size(text, size):
    assert byte_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "0.0001kB", "-1", "GiB", "2G", "2 apples", "1e9", "nan", "1,5GB", "9" * 5000, "\u0663"]
)
def test_no_byte_size(text):
    with pytest.raises(
        argparse.ArgumentTypeError, match="must be a size such as 2GiB, 500MB or a number of bytes, got "
    ):
        byte_size(text)


@pytest.mark.parametrize("command", ["decode", "serve"])
def test_max_memory_reaches_the_engine(command, folder, tmp_path, capsys, monkeypatch):
    if command == "serve":
        pytest.importorskip("uvicorn", reason="needs the extra [serve]")
    words = ["z.safetensors", "-o", str(tmp_path / "out")] if command == "decode" else ["--port", "0"]
    common = ["--checkpoint", str(folder / "tok"), "--device", "cpu"]
    monkeypatch.chdir(folder)
    assert cli.main([command, *words, *common, "--max-memory", "1kB"]) == 1
    assert "max_memory must be at least " in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *words, *common, "--max-memory", "lots"])
    assert stop.value.code == 2
    assert "argument --max-memory: must be a size such as 2GiB, 500MB" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_max_memory_is_not_for_ray(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("msdd_fast.commands.bulk.options.has_ray", lambda: True)
    words = ["decode", str(folder / "z.safetensors"), "-o", str(tmp_path / "out"), "--max-memory", "1GB", "--ray"]
    assert cli.main(words) == 1
    assert capsys.readouterr().err == "msdd-fast: error: --max-memory is not for --ray\n"
    assert not (tmp_path / "out").exists()


def test_what_help_knows_without_importing_it():
    assert set(eval_options.RESIZES) == set(RESIZE_FILTERS)
    assert set(eval_options.SSIMS) == set(SSIM_DATA_RANGES)
    assert settings_of(cli.build_parser("serve").parse_args(["serve"])) == Settings()


@pytest.mark.parametrize("command", ["convert", "decode", "encode", "eval", "serve", "table"])
def test_help_of_commands_fits_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = cli.build_parser(command).format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert "(default: )" not in text


def test_a_report_fits_80_columns_and_breaks_no_path():
    assert _row("seed", 3) == "seed             3"
    crop = describe_crop("center", "auto") + ", to 128 px"
    lines = _row("crop", crop).split("\n")
    assert len(lines) == 2 and max(map(len, lines)) <= 80
    assert lines[0].startswith("crop             largest") and lines[1].startswith(" " * 17)
    assert " ".join(line[17:] for line in lines) == crop
    path = "/" + "a-b/" * 30
    assert _row("folder", path) == f"folder           {path}"


def test_limits_of_serve(capsys):
    parser = cli.build_parser("serve")
    few = settings_of(parser.parse_args(["serve", "--max-queue", "4"]))
    assert (few.max_queue, few.max_images) == (4, 4)
    for option in ("--max-wait-ms", "--timeout"):
        for value in ("-3", "nan", "inf"):
            with pytest.raises(SystemExit):
                parser.parse_args(["serve", option, value])
            said = capsys.readouterr().err
            assert f"argument {option}: must be a finite number >= 0, got {value}" in said
