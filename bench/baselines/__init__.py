"""Decoders of other projects, measured beside ours."""
