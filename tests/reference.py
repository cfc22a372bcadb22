"""What an engine's images are compared with."""

from msdd_fast.backends import use_backend


def reference(tok, *args, **kwargs):
    """The decode in plain PyTorch, every op eager."""
    with use_backend("eager"):
        return tok.decode(*args, **kwargs)
