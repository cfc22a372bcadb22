"""context_attention on every backend against its formula in float64.

Without a GPU, Triton runs in its interpreter, and the CUDA kernel's source in tests/csrc/test_context_attention.py.
"""

import sys

import pytest
import torch
import torch.nn.functional as F

from msdd_fast import backends, ops
from msdd_fast.backends import cuda, extension_status
from msdd_fast.backends.cuda import CUDA as CUDA_BACKEND
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.layout import is_token_major
from msdd_fast.native import cuda as native_cuda
from tests.conftest import HAS_GPU
from tests.tolerances import FLOAT32_SLACK, INTERPRETER_ROUNDING, ROUNDING

module = sys.modules["msdd_fast.ops.context_attention"]
HALVES = [torch.bfloat16, torch.float16]
needs_extension = pytest.mark.skipif(not extension_status()[0], reason=f"msdd_fast._C {extension_status()[1]}")
CUDA_OK, CUDA_WHY = cuda.cuda_status(0) if HAS_GPU else (False, "no CUDA device")
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not CUDA_OK, reason=f"backend 'cuda': {CUDA_WHY}")]
CUDA = pytest.param("cuda", marks=needs_cuda)
BACKENDS = ["eager", "sdpa", pytest.param("cpu", marks=needs_extension), "triton", CUDA]
# The interpreter is slow; the GPU is given everything.
SMALL = [(2, 17, 33, 2), (1, 1, 1, 1), (1, 3, 128, 1)]
LARGE = [(2, 16, 128, 12), (3, 64, 127, 3), (1, 1024, 128, 12), (5, 250, 129, 2), (64, 16, 128, 12), (2, 70, 256, 1)]
SHAPES = [*SMALL, *(pytest.param(s, marks=pytest.mark.skipif(not HAS_GPU, reason="large: for a GPU")) for s in LARGE)]


def device_of(backend):
    return torch.device("cuda" if HAS_GPU and backend != "cpu" else "cpu")


def make(shape, dtype, device, order="batch", add=False, scale=1.0):
    """q, k, v, accumulate (or None). order "packed": views of token-major buffers, as the engine has them."""
    b, n, keys, h = shape
    generator = torch.Generator().manual_seed(n + 1000 * keys)

    def heads(tokens, parts):
        if order == "packed":
            buffer = torch.randn(tokens, b, parts, h, 64, generator=generator).to(device, dtype)
            return [x.transpose(0, 1) for x in buffer.unbind(2)]
        return [torch.randn(b, tokens, h, 64, generator=generator).to(device, dtype) for _ in range(parts)]

    (q, accumulate), (k, v) = heads(n, 2), heads(keys, 2)
    return scale * q, k, v, accumulate if add else None


def exact(q, k, v, accumulate):
    """float64 result, and the sum of the absolute terms, which bounds the rounding of the weights."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(2, 3) / 8).softmax(dim=3)
    out, terms = ((weights @ x).transpose(1, 2) for x in (v, v.abs()))
    return (out if accumulate is None else out + accumulate.double()), terms


def check(out, arguments, backend):
    """One rounding of the weights and one of the result; sdpa has one more before the sum."""
    q, dtype = arguments[0], arguments[0].dtype
    expected, terms = exact(*arguments)
    assert out.shape == q.shape and out.dtype == dtype
    assert (out.transpose(0, 1) if is_token_major(q) else out).is_contiguous()
    rounding = (INTERPRETER_ROUNDING if backend == "triton" and not HAS_GPU else ROUNDING)[dtype]
    parts = terms + expected.abs() + (0 if arguments[3] is None else terms + arguments[3].double().abs())
    excess = (out.double() - expected).abs() - rounding * parts - 2 * FLOAT32_SLACK
    assert out.numel() == 0 or excess.max() <= 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(backend, dtype, add, shape):
    arguments = make(shape, dtype, device_of(backend), add=add)
    check(ops.context_attention(*arguments, backend=backend), arguments, backend)


@pytest.mark.parametrize("backend", ["eager", "sdpa", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("size", [16, 40, 64])
def test_float32_and_other_heads(backend, size):
    if backend == "cpu" and size % 16:
        pytest.skip("heads of multiples of 16")
    q, k, v, accumulate = (x[..., :size].contiguous() for x in make((2, 9, 11, 2), torch.float32, "cpu", add=True))
    expected = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    out = ops.context_attention(q, k, v, accumulate, backend=backend)
    torch.testing.assert_close(out.double(), expected + accumulate, rtol=0, atol=2 * FLOAT32_SLACK)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_views_of_packed_token_major_buffers(backend, batch):
    """Read where they lie; the result is in the order of the queries, so that its rows are a view."""
    arguments = make((batch, 18, 20, 2), torch.bfloat16, device_of(backend), order="packed", add=True)
    assert not arguments[1].is_contiguous()
    out = ops.context_attention(*arguments, backend=backend)
    check(out, arguments, backend)
    if batch > 1:
        assert out.transpose(0, 1).flatten(2).data_ptr() == out.data_ptr()
    if backend in ("cuda", "triton", "cpu"):
        assert torch.equal(out, ops.context_attention(*(x.contiguous() for x in arguments), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_context_for_all_images(backend):
    """Expanded keys and values, stride 0."""
    q, k, v, _ = make((3, 5, 7, 2), torch.bfloat16, device_of(backend))
    arguments = (q, k[:1].expand_as(k), v[:1].expand_as(v), None)
    check(ops.context_attention(*arguments, backend=backend), arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [16, 200])
def test_extreme_scores(backend, keys):
    """All equal, one-hot rows with scores of hundreds, and large means that cancel in the softmax."""
    q, k, v, _ = make((1, 16, keys, 1), torch.bfloat16, device_of(backend))
    for arguments in ((q * 0, k, v, None), (q * 100, k, v, None), (q, k + 30, v + 100, None)):
        check(ops.context_attention(*arguments, backend=backend), arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "queries", "heads"), [(0, 5, 2), (2, 0, 2), (2, 5, 0)])
def test_empty(backend, batch, queries, heads):
    arguments = make((batch, queries, 4, heads), torch.bfloat16, device_of(backend), add=True)
    assert ops.context_attention(*arguments, backend=backend).shape == (batch, queries, heads, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_does_not_depend_on_its_batch(backend):
    if backend == "sdpa":
        pytest.skip("PyTorch promises no such thing")
    q, k, v, _ = make((3, 17, 20, 2), torch.bfloat16, device_of(backend))
    whole = ops.context_attention(q, k, v, backend=backend)
    alone = ops.context_attention(q[1:2], k[1:2], v[1:2], backend=backend)
    assert torch.equal(whole[1:2], alone)


def test_gradients_against_finite_differences():
    arguments = [x.requires_grad_() for x in make((1, 2, 3, 1), torch.float32, "cpu", add=True)]
    expected = torch.autograd.grad(ops.context_attention(*arguments, backend="sdpa").sum(), arguments)
    for mine, other in zip(
        torch.autograd.grad(ops.context_attention(*arguments, backend="eager").sum(), arguments), expected, strict=True
    ):
        torch.testing.assert_close(mine, other)
    with pytest.raises(InputError, match="is for inference, but an argument requires grad"):
        ops.context_attention(*(a.bfloat16() for a in arguments), backend="triton")


@needs_extension
def test_compiles_for_any_number_of_tokens():
    """auto, with its predicates, in one graph for all sizes of a kind."""
    torch._dynamo.reset()
    compiled = torch.compile(ops.context_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with backends.use_backend("context_attention=cpu"):
        for tokens in (20, 30):
            q, k, v, accumulate = make((2, tokens, 9, 2), torch.bfloat16, "cpu", add=True)
            torch.testing.assert_close(compiled(q, k, v, accumulate), ops.context_attention(q, k, v, accumulate))


def test_autocast_casts_as_sdpa_does():
    q, k, v, accumulate = make((1, 5, 6, 2), torch.float32, "cpu", add=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.context_attention(q, k.bfloat16(), v, accumulate, backend="eager")
    assert torch.equal(out, ops.context_attention(*(x.bfloat16() for x in (q, k, v, accumulate)), backend="eager"))


@pytest.mark.parametrize("backend", ["eager", "sdpa", "cpu", "triton", "cuda"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=None), "q must be a tensor, got NoneType"),
        (dict(k=[1]), "k must be a tensor, got list"),
        (dict(q=torch.zeros(2, 3, 64)), r"q must be a tensor \(B, N, heads, head size\), got \(2, 3, 64\)"),
        (dict(k=torch.zeros(5, 2, 64)), r"k must be a tensor \(B, N, heads, head size\), got \(5, 2, 64\)"),
        (dict(v=torch.zeros(2, 5, 2, 64).int()), "v must be float32, bfloat16 or float16, got torch.int32"),
        (dict(q=torch.zeros(2, 3, 2, 64).double()), "q must be float32, bfloat16 or float16, got torch.float64"),
        (dict(k=torch.zeros(2, 5, 2, 64).half()), "k must have the dtype of q, torch.float32, got torch.float16"),
        (dict(k=torch.zeros(1, 5, 2, 64)), r"k must have the shape \(2, 5, 2, 64\), got \(1, 5, 2, 64\)"),
        (dict(v=torch.zeros(2, 6, 2, 64)), r"v must have the shape \(2, 5, 2, 64\), got \(2, 6, 2, 64\)"),
        (dict(v=torch.zeros(2, 5, 2, 64, device="meta")), "v must be on the device of q, cpu, got meta"),
        (dict(accumulate=torch.zeros(2, 4, 2, 64)), r"accumulate must have the shape \(2, 3, 2, 64\), got \(2, 4, 2"),
        (dict(accumulate=torch.zeros(2, 3, 2, 64).half()), "accumulate must have the dtype of q, torch.float32"),
        (
            dict(k=torch.zeros(2, 0, 2, 64), v=torch.zeros(2, 0, 2, 64)),
            r"k must hold at least one context token, got the shape \(2, 0, 2, 64\)",
        ),
    ],
)
def test_bad_input_has_one_text_on_every_backend(backend, change, message):
    arguments = dict(q=torch.zeros(2, 3, 2, 64), k=torch.zeros(2, 5, 2, 64), v=torch.zeros(2, 5, 2, 64))
    with pytest.raises(InputError, match=message):
        ops.context_attention(**{**arguments, **change}, backend=backend)


def reasons(*arguments):
    return {name: reason for name, _, reason in module.OP.explain(*arguments)}


def test_reasons(monkeypatch):
    """What the kernels do not take is told from metadata, and sdpa takes it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(CUDA_BACKEND, "can_use", lambda x: (True, "CUDA 13.0, sm_90"))
    q, k, v, _ = make((1, 4, 5, 2), torch.bfloat16, "cpu")
    wide = torch.zeros(1, 5, 2, 65, dtype=torch.bfloat16)[..., :64]
    for arguments, reason in (
        ((q, k, v, None), "CUDA 13.0, sm_90"),
        ((q.float(), k.float(), v.float(), None), "works in bfloat16 and float16, got torch.float32"),
        ((q[..., :32], k[..., :32], v[..., :32], None), "needs a head size of 64, got 32"),
        ((q, *[torch.zeros(1, 257, 2, 64).bfloat16()] * 2, None), "takes at most 256 keys, got 257"),
        (
            (q, wide, v, None),
            "needs contiguous heads at multiples of 16 bytes, got k with strides (650, 130, 65, 1), offset 0",
        ),
    ):
        assert reasons(*arguments)["cuda"] == reason
        if reason != "CUDA 13.0, sm_90":
            assert reasons(*arguments)["triton"] == reason
            assert ops.context_attention(*arguments, backend="sdpa").shape == arguments[0].shape
            with pytest.raises(BackendUnavailableError, match="context_attention: backend 'triton' cannot run"):
                ops.context_attention(*arguments, backend="triton")


def test_the_wrapper_refuses_what_would_read_wrong_memory():
    q, k, v, _ = make((1, 4, 5, 2), torch.bfloat16, "cpu")
    with pytest.raises(InputError, match=r"q must be a bfloat16 or float16 tensor on a GPU, got torch\.bfloat16 on"):
        native_cuda.context_attention(q, k, v)


# --- what only a GPU can show ---

GPU_SHAPES = [(b, n, 128, 12) for b in (1, 8, 64) for n in (16, 64, 256, 1024)]


@pytest.mark.parametrize("backend", [CUDA])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_error_is_at_most_twice_that_of_sdpa(backend, dtype, shape):
    arguments = make(shape, dtype, "cuda", order="packed")
    expected, _ = exact(*arguments)
    mine, sdpa = (
        (ops.context_attention(*arguments, backend=b).double() - expected).abs().max() for b in (backend, "sdpa")
    )
    assert mine <= 2 * sdpa + FLOAT32_SLACK


@pytest.mark.parametrize("backend", [CUDA])
def test_opcheck_of_the_cuda_backend(backend):
    arguments = make((2, 5, 7, 2), torch.bfloat16, "cuda", order="packed", add=True)
    torch.library.opcheck(module.OP.implementations[backend].overload, arguments)


@pytest.mark.parametrize("backend", [CUDA])
def test_every_context_length_on_the_gpu(backend):
    for keys in range(1, 257):
        arguments = make((2, 33, keys, 2), torch.bfloat16, "cuda", add=True)
        check(ops.context_attention(*arguments, backend=backend), arguments, backend)


@pytest.mark.parametrize("backend", [CUDA])
@pytest.mark.parametrize("keys", [100, 128, 200])
def test_a_graph_replays_with_new_inputs(backend, keys):
    arguments = make((2, 70, keys, 3), torch.bfloat16, "cuda", add=True)
    ops.context_attention(*arguments, backend=backend)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.context_attention(*arguments, backend=backend)
    for factor in (1.0, -0.5):
        arguments[0].mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        check(out, arguments, backend)


@pytest.mark.parametrize("backend", [CUDA])
def test_two_streams(backend):
    """Each call runs on the stream that is current: after what is already there."""
    first, second = (make((8, 256, 128, 12), torch.bfloat16, "cuda") for _ in range(2))
    expected = [ops.context_attention(*a, backend=backend) for a in (first, second)]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], [[], []]
    for _ in range(20):
        for i, (stream, arguments) in enumerate(zip(streams, (first, second), strict=True)):
            with torch.cuda.stream(stream):
                late = [None if a is None else torch.zeros_like(a) for a in arguments]
                torch.cuda._sleep(100_000)
                for target, source in zip(late, arguments, strict=True):
                    if target is not None:
                        target.copy_(source)
                results[i].append((late, ops.context_attention(*late, backend=backend)))
    torch.cuda.synchronize()
    for got, right in zip(results, expected, strict=True):
        assert all(torch.equal(out, right) for _, out in got)
