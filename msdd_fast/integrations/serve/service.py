"""From a request to its response: limits, the queue, time-outs and clients that go away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from torch import Tensor

from msdd_fast import __version__
from msdd_fast.diffusion.checks import check_guidance, check_sampling
from msdd_fast.diffusion.noise import resolve_seeds
from msdd_fast.engine import FastDecoder
from msdd_fast.errors import InputError, MsddFastError
from msdd_fast.families.base import require_unconditioned
from msdd_fast.integrations.serve.batcher import Batcher, ClosedError, QueueFullError
from msdd_fast.integrations.serve.metrics import Metrics
from msdd_fast.integrations.serve.query import DecodeQuery
from msdd_fast.integrations.serve.settings import Settings
from msdd_fast.integrations.serve.wire import Output, TooLargeError, largest_body, prepare, read_latents, size_of

CLIENT_GONE = 499
"""nginx's status for a client that closed the connection; nobody receives it."""
WORKERS = 2
INLINE_BYTES = 2**20
"""More than that is read and written in another thread, and so are image files."""
_log = logging.getLogger(__name__)
T = TypeVar("T")


class _Job(NamedTuple):
    """Checked latents (n, ...) and seeds (n,), and how the images are wanted."""

    z: Tensor
    seeds: Tensor
    output: Output


def error(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """A response of one line of JSON."""
    return JSONResponse({"detail": detail}, status, headers)


class Service:
    """One engine, its queue, and what has been counted."""

    def __init__(self, engine: FastDecoder, settings: Settings) -> None:
        require_unconditioned(engine.family, "the service")
        self.engine, self.settings, self.metrics = engine, settings, Metrics()
        _, height, width = engine.config.stage_shapes((1, *engine.family.example))[-1]
        if None not in engine.config.latent_shape and height * width > settings.max_pixels:
            raise InputError(f"max_pixels must allow the model's {height} x {width}, got {settings.max_pixels}")
        self.batcher = Batcher(engine, settings.max_wait, settings.max_queue, self.metrics.batch)
        self.max_body = largest_body(engine, settings.max_images, settings.max_pixels)
        self._workers = ThreadPoolExecutor(WORKERS, "msdd-fast-wire")
        self._reading = 0
        self._begun = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Returns when the engine is warm."""
        await asyncio.wrap_future(self.batcher.start())

    async def close(self) -> None:
        """Decode what waits, and let every request that was accepted have its response."""
        await asyncio.get_running_loop().run_in_executor(None, self.batcher.close)
        await self._idle.wait()
        self._workers.shutdown()

    def health(self) -> dict[str, Any]:
        return {
            "status": "ok" if self.batcher.alive else "not ready",
            "version": __version__,
            "model": self.engine.family.model,
            "device": str(self.engine.device),
            "latents": list(self.engine.config.latent_shape),
            "queue_images": self.batcher.waiting,
        }

    def answered(self, response: Response, begin: float | None = None) -> Response:
        """Count a response."""
        self.metrics.request(response.status_code, 0.0 if begin is None else time.monotonic() - begin)
        return response

    async def decode(
        self, request: Request, query: DecodeQuery, shape: list[int] | None, dtype: str | None
    ) -> Response:
        """The response to latents of a request that may ask."""
        begin = time.monotonic()
        self._begun += 1
        self._idle.clear()
        try:
            response = await self._decode(request, query, shape, dtype, begin + self.settings.timeout)
        except QueueFullError as e:
            response = error(503, str(e), {"Retry-After": str(e.retry_after)})
        except ClosedError:
            response = error(503, "the server is shutting down", {"Retry-After": "1"})
        except TooLargeError as e:
            response = error(413, str(e))
        except InputError as e:
            response = error(422, " ".join(str(e).split()))
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)
        except (asyncio.TimeoutError, TimeoutError):
            response = error(504, f"no images within {self.settings.timeout:g} s")
        except Exception as e:
            _log.exception("a decode failed")
            response = error(500, f"decoding failed: {e}" if isinstance(e, MsddFastError) else "decoding failed")
        finally:
            self._begun -= 1
            if not self._begun:
                self._idle.set()
        return self.answered(response, begin)

    async def _decode(
        self, request: Request, query: DecodeQuery, shape: list[int] | None, dtype: str | None, deadline: float
    ) -> Response:
        if self._reading + self.batcher.waiting >= self.settings.max_queue:
            raise QueueFullError(self.batcher.retry_after())
        self._reading += 1
        try:
            body = await asyncio.wait_for(self._body(request), deadline - time.monotonic())
            job = await self._off_the_loop(len(body), self._job, body, query, shape, dtype)
        finally:
            self._reading -= 1
        future = self.batcher.submit(job.z, job.seeds, cfg_scale=query.cfg_scale, out_dtype=job.output.engine_dtype)
        images = await self._images(request, future, deadline)
        size = None if job.output.kind == "pil" else images.nbytes
        answer = await self._off_the_loop(size, job.output.encode, images)
        return Response(answer.body, media_type=answer.media_type, headers=answer.headers)

    async def _body(self, request: Request) -> bytearray:
        limit = f"the body must have at most {self.max_body} bytes"
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_body:
            raise TooLargeError(f"{limit}, got {length}")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_body:
                raise TooLargeError(limit)
        return body

    def _job(self, body: bytearray, query: DecodeQuery, shape: list[int] | None, dtype: str | None) -> _Job:
        z, settings = read_latents(body, shape, dtype), self.settings
        output = query.output(z.dtype)
        z = prepare(self.engine, z, query.scaling_factor, query.shift_factor, settings.max_images, settings.max_pixels)
        if output.kind == "pil" and len(z) != 1:
            raise InputError(f"output_type=pil is for one image, got {len(z)}: ask for output_type=pt")
        height, width = size_of(self.engine, z)
        for name, asked, side in (("height", query.height, height), ("width", query.width, width)):
            if asked is not None and asked != side:
                raise InputError(f"{name} must be {side} for these latents, got {asked}")
        scale = self.engine.cfg_scale if query.cfg_scale is None else query.cfg_scale
        check_guidance(self.engine.config, check_sampling(self.engine.steps, scale)[1])
        return _Job(z, resolve_seeds(query.seed, len(z)), output)

    async def _off_the_loop(self, size: int | None, work: Callable[..., T], *args: Any) -> T:
        """``work(*args)`` in another thread, unless it is about few bytes."""
        if size is not None and size <= INLINE_BYTES:
            return work(*args)
        return await asyncio.get_running_loop().run_in_executor(self._workers, work, *args)

    async def _images(self, request: Request, future: Future[Tensor], deadline: float) -> Tensor:
        """The result of ``future``, which is cancelled if the time is up or the client goes away."""
        images: asyncio.Future[Any] = asyncio.wrap_future(future)
        gone: asyncio.Future[Any] = asyncio.ensure_future(_gone(request))
        try:
            left = max(0.0, deadline - time.monotonic())
            await asyncio.wait([images, gone], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if images.done():
                return images.result()
            raise ClientDisconnect if gone.done() else asyncio.TimeoutError
        finally:
            gone.cancel()
            images.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
