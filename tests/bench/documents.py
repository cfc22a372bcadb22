"""A small document of ``msdd-fast bench``, made up."""

from msdd_fast.bench.report.results import FORMAT


def provider(name, base, rounds=20):
    scales = {"8": 1.0, "16": 2.0}
    return {
        "provider": name,
        "dtype": "float32",
        "first_call_s": 1.0,
        "max_error": 1e-6,
        "samples": [base * (3 + 0.01 * i) for i in range(rounds)],
        "scales": {s: [base * share * (1 + 0.003 * i) for i in range(rounds)] for s, share in scales.items()},
    }


def document():
    encode = {k: v for k, v in provider("eager-fp32", 0.02).items() if k != "scales"}
    work = {"flops": 10**9, "bytes": 10**7}
    decode = {"model": "tiny", "batch": 2, "steps": 1, "cfg_scale": 1.0, "kind": "decode"}
    return {
        "format": FORMAT,
        "time": "2026-01-01T00:00:00Z",
        "device": "cpu",
        "machine": {
            "cpu": {"model": "Some <CPU>", "cores": 2, "capability": "AVX2"},
            "gpu": None,
            "torch_threads": 2,
            "packages": {"torch": "2.13.0"},
            "commit": "abc",
        },
        "ceilings": {"copy": 1e10, "float32": 1e11},
        "cases": [
            {
                "case": {"name": "tiny decode, batch 2, 1 step, CFG 1", **decode},
                "providers": [provider("eager-fp32", 0.02), provider("engine-exact", 0.01)],
                "missing": {"compile": "left out"},
                "work": {"whole": work, "8": work, "16": work},
            },
            {
                "case": {"name": "tiny encode, batch 2", **decode, "kind": "encode"},
                "providers": [encode],
                "missing": {},
                "work": {"whole": work},
            },
        ],
        "cold_start": {"import torch": 1.5, "load": 0.5},
    }
