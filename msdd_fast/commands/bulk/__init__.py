"""Bulk work on Ray: what ``--ray`` does (docs/bulk.md)."""
