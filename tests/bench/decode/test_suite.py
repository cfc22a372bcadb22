"""``msdd-fast bench`` and ``profile`` on the smallest model, and their report."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from msdd_fast import Tokenizer, profiling
from msdd_fast.bench.decode import waterfall
from msdd_fast.bench.decode.cases import SUITES, DecodeCase
from msdd_fast.bench.decode.coldstart import STEPS, cold_start
from msdd_fast.bench.decode.suite import measure_case
from msdd_fast.bench.ops import suite
from msdd_fast.bench.ops.one import one_op, parse_shape
from msdd_fast.bench.report.html import page
from msdd_fast.bench.report.results import FAST, case_lines, history, metadata_lines, percentile, read, save, slug
from msdd_fast.bench.timing import profile
from msdd_fast.bench.timing.profile_table import table as profile_table
from msdd_fast.commands import main as cli
from msdd_fast.engine import accelerate
from msdd_fast.errors import InputError
from msdd_fast.families import family_of
from msdd_fast.families.work import total
from msdd_fast.layers.linear.dense import DenseLinear
from tests.bench.documents import document

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    return Tokenizer.from_config("tiny")


def test_a_case_has_every_provider_its_scales_and_its_work(tiny):
    result = measure_case(tiny, DecodeCase("tiny", batch=2, cfg_scale=2.0, seconds=0, compile_seconds=0))
    providers = {p["provider"]: p for p in result["providers"]}
    assert next(iter(providers)) == "eager-bf16" and "engine-exact" in providers
    for p in providers.values():
        assert list(p["scales"]) == ["8", "16", "32", "64"] and len(p["samples"]) == 3
        for i, whole in enumerate(p["samples"]):
            assert 0 < sum(s[i] for s in p["scales"].values()) <= whole * 1.01 + 1e-4
    assert providers["engine-exact"]["max_error"] < 1e-3
    assert result["missing"]["compile-fp32"] == "left out"
    assert result["work"]["whole"]["flops"] == total(family_of(tiny.config).decode_work(2, cfg_scale=2.0)).flops
    table = case_lines(result)
    assert (
        table[1].split()[:5] == ["img/s", "8", "px", "16", "px"]
        and max(map(len, table[: 3 + 2 * len(providers)])) <= 80
    )
    assert len(table) == 1 + 2 * (1 + len(providers)) + len(result["missing"])


def test_the_command_stores_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("msdd_fast.bench.timing.ceilings.last_level_cache", lambda _: 2**20)
    target = tmp_path / "out" / "run.json"
    command = ["bench", "--checkpoint", "tiny", "--kind", "encode", "--seconds", "0", "--no-compile", "--no-cold-start"]
    assert cli.main([*command, "--json", str(target), "--html", str(tmp_path / "r.html")]) == 0
    printed = capsys.readouterr().out
    stored = read(target)
    assert case_lines(stored["cases"][0])[0] in printed and "ceilings of this run: copy" in printed
    assert stored["machine"]["torch_threads"] == torch.get_num_threads()
    assert "tiny encode, batch 1" in (tmp_path / "r.html").read_text()


def test_the_suites():
    names = [c.name for c in SUITES["standard"]()]
    for model, batch in (("msdd-nano", 1), ("msdd-nano", 8), ("msdd-d12-joint", 1), ("msdd-d12", 1)):
        assert f"{model} decode, batch {batch}, 1 step, CFG 1" in names
    full = SUITES["full"]()
    assert [c.name for c in full if c.model.startswith("pid")] == ["pid-v15-flux decode, batch 1, 4 steps, CFG 1"]
    full = [c for c in full if c.model.startswith("msdd")]
    assert {c.batch for c in full} == {1, 8, 64} and {(c.steps, c.cfg_scale) for c in full if c.kind == "decode"} == {
        (1, 1.0),
        (1, 2.0),
        (30, 1.0),
        (30, 2.0),
    }
    gate = SUITES["gate"]()
    assert sum(c.seconds * (4 if c.kind == "decode" else 2) for c in gate) <= 40  # for each of its providers
    assert not any(c.compile_seconds for c in gate)


def test_percentiles_need_enough_rounds():
    samples = [float(i) for i in range(20)]
    assert percentile(samples, 50) == 9.5 and percentile(samples, 95) == pytest.approx(18.05)
    assert percentile(samples[:-1], 95) is None and percentile(samples, 99) is None


def test_storage_and_history(tmp_path):
    run = document()
    save(run, tmp_path / "a" / "x.json")
    assert read(tmp_path / "a" / "x.json") == run
    folder = tmp_path / slug(run)
    save({**run, "time": "2026-02-01T00:00:00Z"}, folder / "b.json")
    save(run, folder / "c.json")
    (folder / "other.json").write_text("[]")
    assert [d["time"][:7] for d in history(run, tmp_path)] == ["2026-01", "2026-02"]
    with pytest.raises(InputError, match="must be a JSON file of msdd-fast bench"):
        read(folder / "missing.json")
    assert "cold start of msdd-nano: import torch 1.50 s, load 0.50 s" in metadata_lines(run)


class Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_stands_alone_and_shows_everything():
    run = document()
    run["waterfall"] = {
        "model": "tiny",
        "results": [
            {
                "batch": 1,
                "rows": [
                    {"provider": "hoist", "images_per_second": 3.0},
                    {"provider": "engine-fast", "images_per_second": 4.0, "expected_psnr_loss": 0.0123},
                    {"provider": "compile-bf16", "images_per_second": 2.0},
                ],
                "missing": {"engine-slow": "left out"},
            }
        ],
    }
    text = page(run, [{**run, "time": "2025-12-01T00:00:00Z"}, run])
    assert "2 run(s) of " in text  # it may be stored already
    checker = Checker()
    checker.feed(text)
    assert not {"script", "link", "img", "iframe"} & set(checker.tags)
    assert (
        not [a for a in checker.attributes if a[0] in ("src", "href")] and "url(" not in text and "@import" not in text
    )
    assert ("name", "viewport") in checker.attributes and "prefers-color-scheme: dark" in text
    for heading in ("Images per second", "Latency", "Where the speed comes from", "Roofline", "Cold start", "History"):
        assert f"<h2>{heading}</h2>" in text
    assert "expected to cost 0.012 dB of PSNR" in text and "engine-slow: left out" in text
    assert "Some &lt;CPU&gt;" in text and "<CPU>" not in text
    # img/s of the whole: batch 2, medians 3.095 * 0.01 and * 0.02 s
    assert "64.6" in text and "32.3" in text
    assert not re.findall(r"\bnan\b|\binf\b", re.sub(r"<style>.*</style>", "", text, flags=re.S))


def test_profile_attributes_time_bytes_and_flop_to_scales(tiny, monkeypatch):
    monkeypatch.setattr("msdd_fast.bench.timing.ceilings.last_level_cache", lambda _: 2**20)
    engine = accelerate(tiny, dtype=torch.float32, batch_sizes=(1,))
    z = torch.randn(1, tiny.config.num_latent_tokens, tiny.config.latent_dim)
    rows, profiler = profile.rows(lambda: engine.decode(z), CPU)
    assert {r.scale for r in rows} == {"-", "8", "16", "32", "64"}
    work = family_of(tiny.config).decode_work(itemsize=4)
    for scale in (8, 16, 32, 64):
        counted = sum(r.flops for r in rows if r.scale == str(scale))
        assert counted == total(w for w in work if w.scale == scale).flops
    swiglu = next(r for r in rows if r.kernel.startswith("swiglu") and r.scale == "64")
    expected = total(w for w in work if w.op == "image.swiglu" and w.scale == 64)
    assert swiglu.calls == 2 and swiglu.bytes == expected.bytes and swiglu.seconds > 0
    names = {e.name for e in profiler.events()}
    assert {"scale 64", "layer 1", swiglu.kernel} <= names
    assert "all" in "\n".join(profile_table(rows, CPU, torch.float32, top=3))


def test_packed_weights_are_counted_as_plain_ones():
    """Linears in oneDNN's own layout, of which torch's counter knows nothing by itself."""
    linear, x = DenseLinear(torch.zeros(48, 32).bfloat16(), None), torch.zeros(5, 32).bfloat16()
    rows, _ = profile.rows(lambda: linear(x), CPU)
    name = "packed linear" if linear.packed else "mm"
    assert [(r.kernel, r.calls, r.flops) for r in rows if r.flops] == [(f"{name} 5x32x48", 1, 2 * 5 * 32 * 48)]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_the_profile_command_writes_a_trace(dtype, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("msdd_fast.bench.timing.ceilings.last_level_cache", lambda _: 2**20)
    trace = tmp_path / "new" / "trace.json"
    command = [
        "profile",
        "--checkpoint",
        "tiny",
        "--provider",
        "eager",
        "--trace",
        str(trace),
        "--memory",
        "--top",
        "5",
    ]
    assert cli.main([*command, "--dtype", dtype]) == 0
    names = {e.get("name") for e in json.loads(trace.read_text())["traceEvents"]}
    assert {"scale 8", "scale 64", "layer 0", "layer 1"} <= names
    printed = capsys.readouterr().out
    assert "% of roofline" in printed and re.search(r"peak [1-9]\d*\.\d MiB|peak 0\.[1-9] MiB", printed)
    assert not profiling.enabled()


def test_one_op_alone(capsys, monkeypatch):
    monkeypatch.setattr("msdd_fast.bench.timing.ceilings.last_level_cache", lambda _: 2**20)
    op = ["profile", "--op", "swiglu", "--shape", "2x32", "--dtype", "float32"]
    assert cli.main([*op, "--backend", "eager"]) == 0
    assert "aten::silu" in capsys.readouterr().out
    assert cli.main(["profile", "--op", "nothing"]) == 1
    assert "--op must be one of attention, " in capsys.readouterr().err
    for bad in ("8", "0x32", "axb"):
        with pytest.raises(InputError, match="--shape must be BATCHxPIXELS, such as 8x256, got"):
            parse_shape(bad)
    call = one_op("euler_step", suite.Case(32, torch.float32, 2, CPU), None)
    assert call().shape == (2, 3, 32, 32)


def test_without_nsight_its_command_is_printed(capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr("sys.argv", ["msdd-fast", "profile", "--op", "swiglu", "--ncu"])
    assert cli.main(["profile", "--op", "swiglu", "--ncu"]) == 1
    captured = capsys.readouterr()
    assert "ncu --set full" in captured.out and captured.out.strip().endswith("-m msdd_fast profile --op swiglu")
    assert "needs Nsight Compute" in captured.err


def test_ranges_cost_nothing_unless_recorded():
    assert list(profiling.ranges([1, 2], lambda i: pytest.fail("named"))) == [1, 2]
    with profiling.recording():
        for i in profiling.ranges([0, 1], lambda i: f"range {i}"):
            assert profiling.current() == (f"range {i}",)
    assert profiling.current() == () and not profiling.enabled()


def test_the_waterfall_without_the_extension(monkeypatch):
    """No bar of fused ops then, and no error at the end of a run."""
    monkeypatch.setattr(waterfall, "extension_status", lambda: (False, "was not built"))
    names = [p.name for p in waterfall.bars_of(Tokenizer.from_config("tiny"), 1, False).providers]
    assert "hoist" in names and ("fused ops" in names) == torch.cuda.is_available()


def test_the_waterfall_has_a_bar_for_every_measure_and_the_fast_tier_s_loss(tiny):
    result = waterfall.measure(tiny, batch=1, rounds=1, with_compile=False)
    rows = {r["provider"]: r for r in result["rows"]}
    assert list(rows)[:5] == ["eager-bf16", "eager-fp32", "hoist", "fused ops", "attention"]
    assert rows["attention"]["launches"] < rows["fused ops"]["launches"] < rows["hoist"]["launches"]
    text = waterfall.table(result)
    if FAST in rows:
        assert 0 <= rows[FAST]["expected_psnr_loss"] <= 0.1 and "dB of PSNR" in text
        assert rows[FAST]["bytes"] > 0
    else:
        assert f"{FAST}: {result['missing'][FAST]}" in text


@pytest.mark.slow
def test_cold_start_runs_in_a_fresh_process():
    steps = cold_start(CPU, "msdd-nano", runs=1)
    assert list(steps) == list(STEPS) and min(steps.values()) > 0
