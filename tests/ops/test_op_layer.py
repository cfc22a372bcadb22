"""Choosing a backend, and what every registered op promises torch.compile and autograd."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from msdd_fast import backends, ops
from msdd_fast.backends import choice, cpu
from msdd_fast.backends.choice import backend_names, parse_choice, use_backend
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.ops import _registry as _op
from msdd_fast.ops.linear import pack_linear
from tests.conftest import HAS_GPU

SEEDS = torch.tensor([3, 4])
X = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
HALF = torch.tensor(0.5)
ROWS = X.reshape(2, 3, 24)
TABLE = X.reshape(2, 72)[:, :24]
HEADS = X.expand(16, 2, 3, 4, 6).permute(1, 4, 2, 3, 0)  # (B, N, P, H, d)
NORM, ANGLE = torch.ones(1, 2, 16), torch.ones(6, 8)
QKV = torch.randn(2, 5, 3, 2, 16, generator=torch.Generator().manual_seed(1)).unbind(2)
PATCHES = torch.randn(4, 2, 48, generator=torch.Generator().manual_seed(2))  # 2x2 tokens, 2 images, patches of 4
CONTEXT = torch.randn(2, 5, 4, 2, 64, generator=torch.Generator().manual_seed(1)).bfloat16().unbind(2)
PIXELS = torch.randn(1, 4, 3, 1, 16, generator=torch.Generator().manual_seed(3)).unbind(2)  # a grid of 2 x 2, one head
CELLS = X[:, :, :2, :3]
WEIGHT = torch.randn(10, 24, generator=torch.Generator().manual_seed(4))
PACKED = pack_linear(WEIGHT) if backends.extension_status()[0] else None
S, PIXEL_WEIGHT = torch.randn(5, 6, generator=torch.Generator().manual_seed(5)), WEIGHT.repeat(7, 1)[:, :6].contiguous()
PIXEL_ROWS = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(6))
PIXEL_PACKED = [pack_linear(PIXEL_WEIGHT[:n]) if PACKED is not None else None for n in (16, 32)]
ARGUMENTS = {
    "attention": QKV,
    "window_attention": (*PIXELS, torch.linspace(-1, 1, 9).view(3, 3, 1), 2, 2),
    "group_norm_modulate_silu": (X, 3, 1e-5, X[0, :, 0, 0], X[1, :, 0, 0], CELLS, CELLS - 1, True),
    "context_attention": CONTEXT,  # q, k, v and what is added
    "start_noise": (SEEDS, 3, 4, 6, torch.float32),
    "renoise_upsample": (X, HALF, HALF, SEEDS, 2, 0.25),
    "euler_step": (X, X + 1, HALF),
    "cfg_combine": (X, X + 1, HALF),
    "cfg_euler": (X, X + 1, X - 1, HALF, HALF),
    "stage_transition": (PATCHES, PATCHES + 1, HALF, HALF, HALF, SEEDS, 2, 4, 0.25, PATCHES - 1, HALF),
    "final_step": (PATCHES, PATCHES + 1, HALF, 4, torch.float32, PATCHES - 1, HALF),
    "norm_modulate": (ROWS, TABLE, TABLE + 1, None),
    "gate_residual_norm_modulate": (ROWS, ROWS + 1, TABLE, TABLE + 1, TABLE - 1, None),
    "pixel_modulate": (PIXEL_ROWS, S, PIXEL_WEIGHT[:16], PIXEL_WEIGHT[16:32, 0].clone(), S[0, :4], PIXEL_PACKED[0]),
    "pixel_block": (
        *(PIXEL_ROWS, PIXEL_ROWS + 1, S, PIXEL_WEIGHT[:32], PIXEL_WEIGHT[32:64, 0].clone(), S[0, :4]),
        *(S.flatten()[:28].view(7, 4), S.flatten()[:7], S.flatten()[1:29].view(4, 7), S[1, :4], PIXEL_PACKED[1]),
    ),
    "sde_step": (X, X + 1, torch.tensor(0.7), torch.tensor(0.3), SEEDS, 2, None, None, True),
    "sigma_gate": (ROWS, ROWS + 1, ROWS[..., :1] - 1, TABLE, TABLE + 1, TABLE[0] - 1, None, TABLE[1] + 2),
    "qk_norm_rope": (HEADS.contiguous(), NORM, NORM + 1, ANGLE, ANGLE, None),
    "swiglu": (X, X + 1),
    "linear": (ROWS, WEIGHT, WEIGHT[:, 0].contiguous(), PACKED, False),
    "quantize_rows": (X.reshape(6, 24),),
}


def op(name):
    return __import__(f"msdd_fast.ops.{name}", fromlist=["OP"]).OP


def total(out):
    return out.sum() if isinstance(out, torch.Tensor) else sum(t.sum() for t in out)


def needs(backend):
    if backend == "cpu" and not backends.extension_status()[0]:
        pytest.skip(f"backend 'cpu': {backends.extension_status()[1]}")


def test_every_op_is_covered_here():
    assert set(ARGUMENTS) == set(ops.__all__)
    assert all(op(name).name == name for name in ARGUMENTS)


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
def test_a_wrong_environment_is_an_error(value, message):
    environment = {**os.environ, "MSDD_FAST_BACKEND": value}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_OP], env=environment, capture_output=True, text=True, check=False
    )
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
