"""Tensors as rows of contiguous elements: how the pointwise kernels read slices such as ``v[:, :batch]`` in place."""

from __future__ import annotations
