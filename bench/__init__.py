"""Benchmarks and their tools; the importable part is installed as msdd_fast.bench."""
