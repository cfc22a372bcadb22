"""Packed building blocks that the engines of all families share."""
