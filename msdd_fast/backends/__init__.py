"""Backends of the ops: which exist, which is asked for, which can run here, and why the others cannot."""

from msdd_fast.backends.choice import Backend, register_backend, use_backend
from msdd_fast.backends.extension import build_info, extension_status, load_extension

__all__ = ["Backend", "build_info", "extension_status", "load_extension", "register_backend", "use_backend"]
