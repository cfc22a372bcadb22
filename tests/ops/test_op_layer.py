"""Choosing a backend, and what every registered op promises torch.compile and autograd."""

import importlib
import logging

import pytest
import torch

from msdd_fast import backends, ops
from msdd_fast.backends import choice, cpu
from msdd_fast.backends.choice import backend_names, parse_choice, use_backend
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.ops import _registry as _op
from tests.conftest import HAS_GPU

X = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
HALF = torch.tensor(0.5)


def recorded(name):
    """What an op's example makes of it: the arguments of its implementations, by position."""
    calls = []
    with ops.observe(lambda the_op, backend, args: calls.append(args)):
        getattr(ops, name)(*op(name).example(), backend="eager")
    (arguments,) = calls
    return arguments


def op(name):
    return importlib.import_module(f"msdd_fast.ops.{name}").OP


ARGUMENTS = {name: recorded(name) for name in ops.__all__}


def total(out):
    return out.sum() if isinstance(out, torch.Tensor) else sum(t.sum() for t in out)


def needs(backend):
    if backend == "cpu" and not backends.extension_status()[0]:
        pytest.skip(f"backend 'cpu': {backends.extension_status()[1]}")


@pytest.mark.parametrize("name", ops.__all__)
def test_examples_are_the_same_every_time_with_no_tensor_twice(name):
    example, again = op(name).example(), op(name).example()
    assert op(name).name == name and isinstance(example, tuple)
    for a, b in zip(example, again, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    tensors = [a for a in example if isinstance(a, torch.Tensor)]
    assert len({(t.data_ptr(), t.shape, t.stride()) for t in tensors}) == len(tensors)


REGISTERED = [(n, b) for n in ARGUMENTS for b in ("cpu", "triton") if b in op(n).implementations]


@pytest.mark.parametrize(("name", "backend"), REGISTERED)
def test_opcheck(name, backend):
    needs(backend)
    device = "cuda" if backend == "triton" and HAS_GPU else "cpu"
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in ARGUMENTS[name]]
    torch.library.opcheck(op(name).implementations[backend].overload, tuple(arguments))


@pytest.mark.parametrize(
    ("name", "backend"), [(n, b) for n in ARGUMENTS for b in ("eager", "cpu") if b in ("eager", *op(n).implementations)]
)
def test_compiles_into_one_graph_without_recompiling(name, backend):
    """fullgraph, error on recompile, and the compiled result is the same; scalars vary as tensors."""
    needs(backend)
    torch._dynamo.reset()
    the_op = op(name)
    compiled = torch.compile(lambda *a: the_op(*a, backend=backend), fullgraph=True, backend="aot_eager")
    arguments = ARGUMENTS[name]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for factor in (1, 2):
            varied = [a * factor if isinstance(a, torch.Tensor) else a for a in arguments]
            torch.testing.assert_close(compiled(*varied), the_op(*varied, backend=backend))


def test_a_compiled_function_follows_use_backend():
    needs("cpu")
    torch._dynamo.reset()
    seen = []
    implementation = op("euler_step").implementations["cpu"]
    compiled = torch.compile(
        lambda x: ops.euler_step(x, x, HALF), fullgraph=True, backend=lambda g, _: seen.append(g) or g
    )
    with use_backend("eager"):
        compiled(X)
    with use_backend("cpu"):
        compiled(X)
    targets = [{str(n.target) for n in g.graph.nodes} for g in seen]
    assert str(implementation.overload) not in targets[0] and str(implementation.overload) in targets[1]


@pytest.mark.filterwarnings("ignore:Error detected in")
@pytest.mark.parametrize("name", [n for n in ARGUMENTS if n not in ("start_noise", "quantize_rows")])
def test_gradients(name):
    """auto takes a differentiable one; a named other one refuses at once, and at backward under compile."""
    needs("cpu")
    the_op, (x, *rest) = op(name), ARGUMENTS[name]
    x = x.clone().requires_grad_()
    assert the_op.select(x, *rest) == ("sdpa" if name.endswith("attention") else "eager")
    total(the_op(x, *rest)).backward()
    assert x.grad is not None
    with pytest.raises(InputError, match=f"{name}: backend 'cpu' is for inference, but an argument requires grad"):
        the_op(x, *rest, backend="cpu")
    with torch.no_grad():
        the_op(x, *rest, backend="cpu")
    torch._dynamo.reset()
    out = torch.compile(lambda *a: the_op(*a, backend="cpu"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=f"{name}: backend 'cpu' is for inference and has no backward"):
        total(out(x, *rest)).backward()


def test_precedence(monkeypatch):
    """Argument, then use_backend, then the environment's choice, then the best."""
    needs("cpu")
    euler, x = op("euler_step"), ARGUMENTS["euler_step"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert euler.select(*x) == "cpu"
    monkeypatch.setattr(choice, "_environment", parse_choice("eager"))
    assert euler.select(*x) == "eager"
    with use_backend("eager,euler_step=cpu"):
        assert euler.select(*x) == "cpu"
        assert op("cfg_combine").select(*ARGUMENTS["cfg_combine"]) == "eager"
        assert euler.select(*x, backend="eager") == "eager"
    assert euler.select(*x) == "eager"


def test_a_block_replaces_what_is_outside(monkeypatch):
    """Also a choice for one op: use_backend goes before the environment."""
    needs("cpu")
    euler, x = op("euler_step"), ARGUMENTS["euler_step"]
    monkeypatch.setattr(choice, "_environment", parse_choice("euler_step=cpu"))
    assert euler.select(*x) == "cpu"
    with use_backend("eager"):
        assert euler.select(*x) == "eager"
        with use_backend("euler_step=cpu"):
            assert euler.select(*x) == "cpu"
        assert euler.select(*x) == "eager"
    assert euler.select(*x) == "cpu"


FIRST_OP = "import torch; from msdd_fast import ops; ops.swiglu(torch.ones(1, 2), torch.ones(1, 2))"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("euler=cpu", f"backend is chosen for the op 'euler'; known: {', '.join(sorted(ops.__all__))}"),
        (
            "fast",
            f"MSDD_FAST_BACKEND: backend must be one of {', '.join(backend_names())}, got 'fast'",
        ),
    ],
)
def test_a_wrong_environment_is_an_error(value, message, fresh):
    done = fresh(FIRST_OP, MSDD_FAST_BACKEND=value)
    assert done.returncode != 0 and message in done.stderr
    with pytest.raises(InputError, match=message.removeprefix("MSDD_FAST_BACKEND: ")), use_backend(value):
        pass


def test_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu, "extension_status", lambda: (False, "was not built: no compiler. To build it: X"))
    with pytest.raises(BackendUnavailableError) as caught:
        op("euler_step")(*ARGUMENTS["euler_step"], backend="triton")
    text = str(caught.value)
    assert text.startswith("euler_step: backend 'triton' cannot run this call. ")
    assert "; triton: needs a CUDA tensor" in text
    assert "cpu: was not built: no compiler. To build it: X" in text and "eager: ok" in text
    assert op("euler_step").select(*ARGUMENTS["euler_step"]) == "eager"


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(_op, "_logged", set())
    with caplog.at_level(logging.INFO, logger="msdd_fast.ops"):
        for _ in range(3):
            ops.euler_step(X, X, 0.5)
    chosen = op("euler_step").select(X, X, HALF)
    assert [m for m in caplog.messages if m == f"euler_step: {chosen}"] == [f"euler_step: {chosen}"]


@pytest.mark.parametrize("text", ["cuda9", "eager,euler_step=fast", ""])
def test_bad_choices(text):
    with pytest.raises(InputError, match=f"backend must be one of {', '.join(backend_names())}, got"):
        parse_choice(text)
    with pytest.raises(InputError, match="backend must be one of"):
        ops.euler_step(X, X, 0.5, backend=text)


def test_explain():
    rows = {name: (ok, reason) for name, ok, reason in op("euler_step").explain(*ARGUMENTS["euler_step"])}
    assert rows["eager"] == (True, "plain PyTorch") and {"cpu", "triton"} <= set(rows)
