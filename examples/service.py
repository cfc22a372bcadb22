"""Ask a decoding service for a picture.

    pip install 'msdd-fast[serve]'
    msdd-fast serve &                       # the service; docs/serving.md has its options and limits
    python examples/service.py [--url http://127.0.0.1:8000] [--out decoded.png]

Sends one random latent image of the service's model and keeps what comes back.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, default=Path("decoded.png"))
    args = parser.parse_args()
    with urllib.request.urlopen(f"{args.url}/health") as answer:
        shape = [n or 32 for n in json.load(answer)["latents"]]  # null stands for a side that is free
    body = save({"latents": torch.randn(1, *shape)})
    request = urllib.request.Request(f"{args.url}/decode?image_format=png&seed=0", body)
    with urllib.request.urlopen(request) as answer:
        args.out.write_bytes(answer.read())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
