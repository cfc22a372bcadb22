"""The text format of Prometheus: what a scraper parses."""

import re

from msdd_fast.integrations.serve.metrics import Metrics

LINE = re.compile(r'[a-z_]+(\{[a-z]+="[^"]+"\})? [0-9.e+-]+')


def test_counts_and_buckets():
    metrics = Metrics()
    for status, seconds in ((200, 0.004), (200, 0.3), (200, 99.0), (503, 0.001)):
        metrics.request(status, seconds)
    metrics.batch(1, 0.5)
    metrics.batch(8, 0.25)
    metrics.batch(500, 1.0)
    text = metrics.text(3, 256)
    lines = text.splitlines()
    assert text.endswith("\n") and all(line.startswith("# ") or LINE.fullmatch(line) for line in lines)
    for line in (
        'msdd_fast_requests_total{code="200"} 3',
        'msdd_fast_requests_total{code="503"} 1',
        'msdd_fast_request_seconds_bucket{le="0.005"} 1',
        'msdd_fast_request_seconds_bucket{le="0.5"} 2',
        'msdd_fast_request_seconds_bucket{le="+Inf"} 3',
        "msdd_fast_request_seconds_sum 99.304",
        "msdd_fast_request_seconds_count 3",
        'msdd_fast_batch_images_bucket{le="8"} 2',
        "msdd_fast_batch_images_sum 509",
        "msdd_fast_decode_seconds_total 1.75",
        "msdd_fast_queue_images 3",
        "msdd_fast_queue_limit_images 256",
    ):
        assert line in lines
    named = re.findall(r"^# TYPE (\S+) \w+$", text, re.M)
    assert len(named) == len(set(named)) == text.count("# HELP ")
