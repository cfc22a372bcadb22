"""Decoders of others."""
