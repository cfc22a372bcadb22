"""A decoding service over HTTP (docs/serving.md). Needs the extra ``[serve]``: FastAPI and uvicorn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msdd_fast.engine import FastDecoder
from msdd_fast.errors import InputError
from msdd_fast.integrations.serve.batcher import Batcher
from msdd_fast.integrations.serve.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["Batcher", "Settings", "create_app"]


def create_app(engine: FastDecoder, settings: Settings | None = None) -> FastAPI:
    """An ASGI application that decodes with ``engine``. It warms the engine up when it starts.

    Make the engine with ``validate=True``: without it images with NaN or Inf are served as if they were good.

    Raises InputError if the extra ``[serve]`` is not installed, or the limits exclude every image of the model.
    """
    try:
        from msdd_fast.integrations.serve.app import build_app
    except ImportError as e:
        raise InputError(f"the service needs more packages ({e}): pip install 'msdd-fast[serve]'") from e
    return build_app(engine, settings or Settings())
