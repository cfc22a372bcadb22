"""What an engine's images are compared with, and which backends made them."""

from collections import defaultdict
from dataclasses import replace

from msdd_fast import ops
from msdd_fast.backends import use_backend
from msdd_fast.ops import get_op


def reference(tok, *args, **kwargs):
    """The decode in plain PyTorch, every op eager."""
    with use_backend("eager"):
        return tok.decode(*args, **kwargs)


def noted_backends(monkeypatch):
    """Backends that run from now on, as a set for each op.

    ``observe`` would change how an engine calls them, and ``report`` decodes again: Triton's interpreter is slow.
    """
    found = defaultdict(set)

    def noting(function, op, backend):
        def run(*args):
            found[op].add(backend)
            return function(*args)

        return run

    for name in ops.__all__:
        op = get_op(name)
        monkeypatch.setattr(op, "eager", noting(op.eager, name, "eager"))
        for backend, made in op.implementations.items():
            noted = replace(made, function=noting(made.function, name, backend))
            monkeypatch.setitem(op.implementations, backend, noted)
    return found
