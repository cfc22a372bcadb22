"""Serve decodes over HTTP: POST latents, get images.

Requests that arrive together are decoded together. Ctrl-C or SIGTERM stops the listening, finishes every request that
was accepted, and ends with 0; a second one ends at once. The environment variable MSDD_FAST_SERVE_TOKEN sets the bearer
token that requests must carry. Needs the extra [serve]; docs/serving.md has the details.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from msdd_fast.commands.arguments import add_checkpoint, add_dtype, add_max_memory
from msdd_fast.io.arguments import not_negative, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add_checkpoint(parser)
    parser.add_argument("--steps", type=int, default=None, help="denoising steps per scale (default: the checkpoint's)")
    parser.add_argument(
        "--cfg-scale", type=float, default=None, help="of requests that name none (default: the checkpoint's)"
    )
    add_dtype(parser)
    add_max_memory(parser)
    # The defaults are those of integrations.serve.Settings, which is not imported here: PyTorch is behind it.
    limits: tuple[tuple[str, Callable[[str], float], float, str], ...] = (
        ("--max-batch", positive_int, 8, "images decoded together"),
        ("--max-wait-ms", not_negative, 2.0, "milliseconds that a request waits for its batch to fill"),
        ("--max-queue", positive_int, 256, "images that may wait; more are refused with 503"),
        ("--max-pixels", positive_int, 2**22, "pixels of one image"),
        ("--timeout", not_negative, 30.0, "seconds that a request may take; then 504"),
    )
    for name, kind, value, text in limits:
        parser.add_argument(name, type=kind, default=value, help=f"{text} (default: {value:g})")
    parser.add_argument(
        "--max-images", type=positive_int, help="images of one request (default: 64, or --max-queue if that is less)"
    )


def run(args: argparse.Namespace) -> None:
    from msdd_fast.commands.serving import serve

    serve(args)
