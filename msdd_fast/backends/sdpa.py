"""Backend "sdpa": torch's own fused attention, which is differentiable."""

from __future__ import annotations

from msdd_fast.backends.choice import register_backend

SDPA = register_backend("sdpa", lambda x: (True, "F.scaled_dot_product_attention"))
