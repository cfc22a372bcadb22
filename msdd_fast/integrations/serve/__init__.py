"""A decoding service over HTTP (docs/serving.md). Needs the extra ``[serve]``: FastAPI and uvicorn."""

from msdd_fast.integrations.serve.app import create_app
from msdd_fast.integrations.serve.batcher import Batcher
from msdd_fast.integrations.serve.settings import Settings

__all__ = ["Batcher", "Settings", "create_app"]
