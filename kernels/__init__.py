"""Triton kernels, one file per fused op; installed as msdd_fast.kernels."""
