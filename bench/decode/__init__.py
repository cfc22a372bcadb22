"""Benchmarks of whole decodes."""
