"""Serve decodes over HTTP: POST latents, get images.

Requests that arrive together are decoded together. Ctrl-C or SIGTERM stops the listening, finishes every request that
was accepted, and ends with 0; a second one ends at once. The environment variable MSDD_FAST_SERVE_TOKEN sets the bearer
token that requests must carry. Needs the extra [serve]; docs/serving.md has the details.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator

from msdd_fast.commands.arguments import add_checkpoint, add_dtype
from msdd_fast.commands.common import DTYPES, load_tokenizer
from msdd_fast.engine import FastDecoder, accelerate
from msdd_fast.errors import InputError
from msdd_fast.integrations.serve import Settings, create_app
from msdd_fast.io.arguments import positive_int

TOKEN = "MSDD_FAST_SERVE_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add_checkpoint(parser)
    parser.add_argument("--steps", type=int, default=None, help="denoising steps per scale (default: the checkpoint's)")
    parser.add_argument(
        "--cfg-scale", type=float, default=None, help="of requests that name none (default: the checkpoint's)"
    )
    add_dtype(parser)
    limits: tuple[tuple[str, Callable[[str], float], float, str], ...] = (
        ("--max-batch", positive_int, 8, "images decoded together"),
        ("--max-wait-ms", float, default.max_wait * 1e3, "milliseconds that a request waits for its batch to fill"),
        ("--max-queue", positive_int, default.max_queue, "images that may wait; more are refused with 503"),
        ("--max-images", positive_int, default.max_images, "images of one request"),
        ("--max-pixels", positive_int, default.max_pixels, "pixels of one image"),
        ("--timeout", float, default.timeout, "seconds that a request may take; then 504"),
    )
    for name, kind, value, text in limits:
        parser.add_argument(name, type=kind, default=value, help=f"{text} (default: {value:g})")


def run(args: argparse.Namespace) -> None:
    settings = Settings(
        max_wait=args.max_wait_ms / 1e3,
        max_queue=args.max_queue,
        max_images=args.max_images,
        max_pixels=args.max_pixels,
        timeout=args.timeout,
        token=os.environ.get(TOKEN),
    )
    try:
        import uvicorn
    except ImportError as e:
        raise InputError(f"the service needs more packages ({e}): pip install 'msdd-fast[serve]'") from e

    class Server(uvicorn.Server):
        """Says where it listens once it does."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(f"serving on {url} (API: {url}/docs)", flush=True)

    with _listen(args.host, args.port) as listening:
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if args.host not in LOOPBACK and settings.token is None:
            _log.warning("whoever reaches %s can decode: set %s", url, TOKEN)
        app = create_app(_engine(args), settings)
        server = Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on"))
        with _ignored(signal.SIGINT, signal.SIGTERM):
            server.run(sockets=[listening])
    if not server.started:
        raise InputError("the service did not start: the log above says why")
    print("stopped")


def _engine(args: argparse.Namespace) -> FastDecoder:
    """The engine for batches of 1, 2, 4, ... and the largest, which checks that its images are finite."""
    sizes = {min(2**i, args.max_batch) for i in range(args.max_batch.bit_length() + 1)}
    return accelerate(
        load_tokenizer(args),
        dtype=DTYPES[args.dtype],
        steps=args.steps,
        cfg_scale=args.cfg_scale,
        batch_sizes=sorted(sizes),
        validate=True,
    )


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError if the address is taken or is none of this machine."""
    if not 0 <= port < 2**16:
        raise InputError(f"--port must be 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as e:
        raise InputError(f"cannot listen on {host} port {port}: {e.strerror or e}") from e


@contextlib.contextmanager
def _ignored(*signals: int) -> Iterator[None]:
    """uvicorn handles these while it serves, and raises them again when it is done: then they must do nothing."""
    before = {s: signal.signal(s, signal.SIG_IGN) for s in signals}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
