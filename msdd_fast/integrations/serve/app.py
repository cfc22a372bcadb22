"""The HTTP application: one engine behind ``POST /decode``."""

from __future__ import annotations

import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline

from msdd_fast import __version__
from msdd_fast.engine import FastDecoder
from msdd_fast.errors import InputError
from msdd_fast.integrations.serve.metrics import CONTENT_TYPE
from msdd_fast.integrations.serve.query import DecodeQuery
from msdd_fast.integrations.serve.service import Service, error
from msdd_fast.integrations.serve.settings import Settings

_BODY = {
    "required": True,
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "application/x-safetensors": {"schema": {"type": "string", "format": "binary"}},
    },
}
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_MEDIA = ("image/png", "image/jpeg", "image/webp", "application/octet-stream")
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The image, or the raw tensor with its shape and dtype in headers.",
        "content": {media: _BINARY for media in _MEDIA},
    },
    401: {"description": "The bearer token is missing or wrong."},
    413: {"description": "The body, the number of images or their size is over a limit."},
    422: {"description": "The parameters or the latents are not what the model takes."},
    500: {"description": "The engine failed on these latents."},
    503: {"description": "The queue is full; Retry-After says for how many seconds."},
    504: {"description": "The images were not ready in time."},
}


def build_app(engine: FastDecoder, settings: Settings) -> FastAPI:
    """See ``create_app``."""
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPIOffline(  # its page /docs asks no other host for scripts
        title="msdd-fast",
        version=__version__,
        description=f"Decodes latents to images: {engine.family.model}.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = service

    def refuses(request: Request) -> Response | None:
        """The answer to a request without the token, if there is one."""
        token = service.settings.token
        if token is None:
            return None
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode()):
            return None
        return error(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})

    # For the page /docs, which then asks for the token; ``refuses`` checks it.
    token = [] if settings.token is None else [Depends(HTTPBearer(auto_error=False))]

    @app.post(
        "/decode",
        response_class=Response,
        responses=_RESPONSES,
        openapi_extra={"requestBody": _BODY},
        dependencies=token,
    )
    async def decode(
        request: Request,
        query: Annotated[DecodeQuery, Query()],
        shape: Annotated[str | None, Header(description="As the parameter, in JSON: [1, 128, 32].")] = None,
        dtype: Annotated[str | None, Header(description="As the parameter.")] = None,
    ) -> Response:
        """Decode latents.

        The body is the raw tensor (C order, little-endian) whose `shape` and `dtype` are given, the convention of
        `diffusers.utils.remote_decode`; without both it is a safetensors file with a tensor `latents`.
        """
        refused = refuses(request)
        if refused is not None:
            return service.answered(refused)
        try:
            sides = _sides(shape) if query.shape is None else query.shape
        except InputError as e:
            return service.answered(error(422, str(e)))
        return await service.decode(request, query, sides, query.dtype or dtype)

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while latents are decoded; 503 before the engine is warm and after it ended."""
        return JSONResponse(service.health(), 200 if service.batcher.alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=token)
    async def metrics(request: Request) -> Response:
        """Counters in the text format of Prometheus."""
        text = service.metrics.text(service.batcher.waiting, service.settings.max_queue)
        return refuses(request) or Response(text, media_type=CONTENT_TYPE)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, e: RequestValidationError) -> Response:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"][1:]))  # after "query" or "header"
        found = error(422, f"{where}: {first['msg']}, got {first.get('input')!r}"[:500])
        return service.answered(refuses(request) or found) if request.url.path == "/decode" else found

    return app


def _sides(header: str | None) -> list[int] | None:
    if header is None:
        return None
    try:
        sides = json.loads(header)
    except (ValueError, RecursionError):
        sides = None
    if not isinstance(sides, list) or not all(type(s) is int for s in sides):
        raise InputError(f"the header shape must be a JSON list of integers, got {header[:100]!r}")
    return sides
