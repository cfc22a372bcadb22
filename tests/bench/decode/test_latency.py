"""Percentiles of many decodes."""

import json

from msdd_fast.bench.decode import latency


def test_every_batch_has_its_quantiles(tmp_path, capsys):
    file = tmp_path / "latency.json"
    latency.main(["tiny", "--batch-size", "1", "2", "--decodes", "5", "--device", "cpu", "--json", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "batch" and len(lines) == 3
    for batch, result in zip((1, 2), json.loads(file.read_text())["results"], strict=True):
        times = list(result["quantiles_s"].values())
        assert result["batch"] == batch and result["decodes"] == 5
        assert 0 < times[0] <= times[1] <= times[2] <= times[3] and result["first_image_s"] > times[0]


def test_the_ratio_is_that_of_the_quantiles():
    row = {"batch": 1, "first_image_s": 0.5, "quantiles_s": {"0.5": 0.01, "0.95": 0.011, "0.99": 0.015, "1.0": 0.02}}
    assert latency.table([row]).splitlines()[1].split() == ["1", "500.00", "10.00", "11.00", "15.00", "20.00", "1.50"]
