"""What `serve` does: listen, decode, and stop without losing a request."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator

from msdd_fast.commands.common import DTYPES, load_tokenizer
from msdd_fast.engine import FastDecoder, accelerate
from msdd_fast.errors import InputError
from msdd_fast.integrations.serve import Settings, create_app

TOKEN = "MSDD_FAST_SERVE_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_log = logging.getLogger(__name__)


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        max_wait=args.max_wait_ms / 1e3,
        max_queue=args.max_queue,
        max_images=min(Settings.max_images, args.max_queue) if args.max_images is None else args.max_images,
        max_pixels=args.max_pixels,
        timeout=args.timeout,
        token=os.environ.get(TOKEN),
    )


def serve(args: argparse.Namespace) -> None:
    settings = settings_of(args)
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
        max_memory=args.max_memory,
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
