"""Backends of the ops: which there are, which is asked for, which can run here, and why the others cannot."""

from msdd_fast.backends.choice import use_backend
from msdd_fast.backends.extension import build_info, extension_status, load_extension

__all__ = ["build_info", "extension_status", "load_extension", "use_backend"]
