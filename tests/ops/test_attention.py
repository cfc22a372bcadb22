"""attention on every backend that runs here against its formula in float64, and what the C++ kernel adds."""

import sys
from types import ModuleType

import pytest
import torch

from msdd_fast import backends, native, ops
from msdd_fast.backends import cuda, packages
from msdd_fast.backends.cuda import CUDA as CUDA_BACKEND
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.families.msdd import mmdit
from msdd_fast.layout import is_token_major
from tests.tolerances import FLOAT32_SLACK, ROUNDING, assert_no_worse, assert_rounded_once

module = sys.modules["msdd_fast.ops.attention"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HAS_EXTENSION = backends.extension_status()[0]
CUDA_OK, CUDA_WHY = cuda.cuda_status(0) if torch.cuda.is_available() else (False, "no CUDA device")
needs_extension = pytest.mark.skipif(not HAS_EXTENSION, reason=f"msdd_fast._C {backends.extension_status()[1]}")
CPU = pytest.param("cpu", marks=needs_extension)
# (batch, queries, keys, heads, head size): one row, tails of every tile, the joint blocks, several blocks of keys and
# several tasks of queries, heads that end inside a panel or a vector, a joint block of 4096 + 300 tokens.
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 7, 3, 3, 32),
    (3, 16, 128, 12, 64),
    (2, 144, 144, 3, 64),
    (1, 200, 300, 2, 64),
    (1, 25, 1000, 1, 48),
    (1, 500, 17, 2, 128),
    (1, 1200, 20, 1, 16),
    (2, 70, 130, 2, 72),
    (1, 9, 40, 3, 20),
    (1, 26, 33, 1, 1),
    (1, 30, 4396, 2, 64),
    (1, 30, 4396, 1, 72),
]


def heads(batch, tokens, heads, size, seed, dtype=torch.float32):
    return torch.randn(batch, tokens, heads, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(shape, dtype=torch.float32):
    batch, queries, keys, count, size = shape
    return tuple(heads(batch, n, count, size, seed, dtype) for seed, n in enumerate((queries, keys, keys)))


def packed(batch, tokens, count, size, dtype, token_major):
    """q, k, v as views of one buffer."""
    if token_major:
        return heads(tokens, batch, 3 * count, size, 0, dtype).unflatten(2, (3, count)).transpose(0, 1).unbind(2)
    return heads(batch, tokens, 3 * count, size, 0, dtype).unflatten(2, (3, count)).unbind(2)


def exact(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=-1) @ v).transpose(1, 2)


def in_order_of(q, out):
    """Whether ``out`` is dense in the memory order of ``q``."""
    return (out.transpose(0, 1) if is_token_major(q) else out).is_contiguous()


def assert_near(out, q, k, v):
    """Error at most twice that of eager, by its largest element."""
    expected = exact(q, k, v)
    assert out.dtype == q.dtype and out.shape == expected.shape and in_order_of(q, out)
    if expected.numel():
        worst = (out.double() - expected).abs().max()
        assert worst <= 2 * (ops.attention(q, k, v, backend="eager").double() - expected).abs().max() + FLOAT32_SLACK


def rounds_weights(dtype):
    """Whether this machine's C++ kernel multiplies pairs of bfloat16."""
    return dtype == torch.bfloat16 and HAS_EXTENSION and backends.load_extension().attention_level().endswith("bf16")


@pytest.mark.parametrize("backend", ["eager", CPU])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(backend, dtype, shape):
    """float32 inside, rounded once; with bfloat16 products, the weights are rounded, too, as in SDPA."""
    q, k, v = qkv(shape, dtype)
    out = ops.attention(q, k, v, backend=backend)
    assert_near(out, q, k, v)
    if backend == "cpu" and rounds_weights(dtype):
        assert_no_worse(out, ops.attention(q, k, v, backend="sdpa"), exact(q, k, v), dtype)
    else:
        assert_rounded_once(out, exact(q, k, v), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sdpa(dtype):
    """PyTorch's own, with weights of the dtype."""
    q, k, v = qkv((2, 7, 130, 3, 32), dtype)
    out = ops.attention(q, k, v, backend="sdpa")
    torch.testing.assert_close(out.double(), exact(q, k, v), rtol=0, atol=2 * ROUNDING[dtype] + FLOAT32_SLACK)


@pytest.mark.parametrize("backend", ["eager", "sdpa", CPU])
@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_views_and_memory_order(backend, token_major, batch):
    """Views of a packed buffer give the bits of contiguous tensors, in the memory order of the queries."""
    q, k, v = packed(batch, 21, 2, 32, torch.float32, token_major)
    out = ops.attention(q, k, v, backend=backend)
    rows = out.transpose(0, 1) if token_major else out
    assert rows.is_contiguous() and rows.flatten(2).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out.double(), exact(q, k, v), rtol=0, atol=FLOAT32_SLACK)
    if backend == "cpu":
        assert torch.equal(out, ops.attention(*(x.contiguous() for x in (q, k, v)), backend=backend))


@pytest.mark.parametrize("backend", ["eager", "sdpa", CPU])
@pytest.mark.parametrize(("batch", "queries", "count"), [(0, 5, 2), (2, 0, 2), (2, 5, 0)])
def test_empty(backend, batch, queries, count):
    q, k, v = qkv((batch, queries, 3, count, 16))
    assert ops.attention(q, k, v, backend=backend).shape == (batch, queries, count, 16)


@pytest.mark.parametrize("backend", ["eager", "sdpa", CPU])
class TestExtremeScores:
    """Whole numbers, so that the scores are exact in float32 whatever the order of the sum."""

    def integers(self, *shape, limit, seed=0):
        return torch.randint(-limit, limit + 1, shape, generator=torch.Generator().manual_seed(seed)).float()

    def test_thousands(self, backend):
        """Scores of 1e4 on both sides: rows are nearly one-hot."""
        q, k = (self.integers(1, 30, 2, 64, limit=100, seed=s) for s in (1, 2))
        v = heads(1, 30, 2, 64, 3)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8
        assert scores.max() > 1e4 and scores.min() < -1e4
        assert_rounded_once(ops.attention(q, k, v, backend=backend), exact(q, k, v), torch.float32)

    def test_large_means(self, backend):
        """A constant added to all scores of a row changes nothing."""
        q, k = (self.integers(1, 20, 1, 16, limit=2, seed=s) for s in (1, 2))
        q[..., 0], k[..., 0] = 1.0, 0.0
        v = heads(1, 20, 1, 16, 3)
        expected = exact(q, k, v)
        k[..., 0] = 2.0**15
        assert_rounded_once(ops.attention(q, k, v, backend=backend), expected, torch.float32)

    def test_all_equal(self, backend):
        """The mean of the values, and the mean does not depend on their size."""
        q, k, v = qkv((1, 5, 400, 1, 32))
        k = k[:, :1].expand_as(k)
        out = ops.attention(q, k, v + 1000, backend=backend)
        torch.testing.assert_close(out, (v + 1000).mean(dim=1, keepdim=True).expand_as(out), rtol=1e-6, atol=0)

    def test_one_hot(self, backend):
        """Query i finds key i alone: the values come back exactly, also in another block of keys than the others."""
        eye = torch.eye(16).view(1, 16, 1, 16)
        k = torch.cat([torch.zeros(1, 500, 1, 16), eye], dim=1)
        v = heads(1, 516, 1, 16, 3)
        assert torch.equal(ops.attention(eye * 1e4, k, v, backend=backend), v[:, 500:])

    def test_nan_stays_in_its_row(self, backend):
        q, k, v = qkv((1, 9, 40, 2, 16))
        q[0, 4, 1, 3] = torch.nan
        out = ops.attention(q, k, v, backend=backend)
        assert out[0, 4, 1].isnan().all() and out.isnan().sum() == 16


# --- the C++ kernel ---


@needs_extension
@pytest.mark.parametrize("level", ["plain", "plain_bf16", "avx2", "avx512", "avx512bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_simd_level(level, shape):
    for dtype in DTYPES:
        q, k, v = qkv(shape, dtype)
        try:
            out = native.attention(q, k, v, level=level)
        except InputError as e:
            assert "level must be plain, plain_bf16, avx2, avx512 or avx512bf16 and run on this machine" in str(e)
            pytest.skip(f"this machine cannot run {level}")
        assert_near(out, q, k, v)


@needs_extension
def test_accuracy_is_that_of_sdpa():
    """At most twice its root mean square error against float64, for the sizes of the joint blocks."""
    for dtype in DTYPES:
        for tokens in (144, 384):
            q, k, v = packed(1, tokens, 4, 64, dtype, True)
            error = {
                b: (ops.attention(q, k, v, backend=b).double() - exact(q, k, v)).square().mean()
                for b in ("cpu", "sdpa")
            }
            assert error["cpu"] <= 4 * error["sdpa"]


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_neighbours_change_a_bit(dtype):
    q, k, v = qkv((2, 450, 700, 3, 32), dtype)
    whole = native.attention(q, k, v)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 64):
            torch.set_num_threads(threads)
            assert torch.equal(native.attention(q, k, v), whole)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(native.attention(q[1:], k[1:], v[1:]), whole[1:])
    assert torch.equal(native.attention(q[:, :, 1:2], k[:, :, 1:2], v[:, :, 1:2]), whole[:, :, 1:2])
    for begin, end in ((0, 1), (3, 50), (449, 450)):
        assert torch.equal(native.attention(q[:, begin:end], k, v), whole[:, begin:end])


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("token_major", [False, True])
def test_accumulate(dtype, token_major):
    """Added before the one rounding; any strides; alone it changes nothing."""
    q, k, v = packed(2, 30, 3, 16, dtype, token_major)
    base = packed(2, 30, 3, 16, dtype, not token_major)[0]
    level = "avx2" if rounds_weights(dtype) else ""
    out = native.attention(q, k, v, base, level=level)
    assert in_order_of(q, out)
    assert_rounded_once(out, exact(q, k, v) + base.double(), dtype)
    assert torch.equal(native.attention(q, k, v, torch.zeros_like(base)), native.attention(q, k, v))


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(2, 3, 2, 129)), r"attention: head size must be in \[1, 128\], got 129"),
        (dict(q=torch.zeros(2, 3, 2, 144)), r"attention: head size must be in \[1, 128\], got 144"),
        (dict(k=torch.zeros(2, 0, 2, 16), v=torch.zeros(2, 0, 2, 16)), "there must be a key, got 0"),
        (dict(v=torch.zeros(2, 4, 2, 16)), r"v must be of shape \(2, 5, 2, 16\), got \(2, 4, 2, 16\)"),
        (dict(accumulate=torch.zeros(2, 5, 2, 16)), r"accumulate must be of shape \(2, 3, 2, 16\)"),
        (dict(k=torch.zeros(2, 5, 2, 32)[..., ::2]), "k must be contiguous in its last dimension"),
        (dict(v=torch.zeros(2, 5, 2, 16).bfloat16()), "v must be float32, got bfloat16"),
        (dict(q=torch.zeros(2, 3, 2, 16, device="meta")), "q must be a float32.* on meta"),
        (dict(level="sse9"), "level must be plain, plain_bf16, .* and run on this machine, got sse9"),
    ],
)
def test_native_refuses_what_would_read_wrong_memory(change, message):
    arguments = dict(q=torch.zeros(2, 3, 2, 16), k=torch.zeros(2, 5, 2, 16), v=torch.zeros(2, 5, 2, 16))
    arguments.update(change)
    if "q" in change and change["q"].device.type == "cpu":
        size = change["q"].shape[3]
        arguments.update({n: torch.zeros(2, 5, 2, size) for n in ("k", "v")})
    with pytest.raises(InputError, match=message):
        native.attention(**arguments)


# --- the op ---


@pytest.mark.parametrize("backend", ["eager", "sdpa", CPU])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=None), "q must be a tensor, got NoneType"),
        (dict(k=[1]), "k must be a tensor, got list"),
        (dict(q=torch.zeros(2, 3, 16)), r"q must be a tensor \(B, N, heads, head size\), got \(2, 3, 16\)"),
        (dict(v=torch.zeros(2, 5, 2, 16).int()), "v must be float32, bfloat16, float16 or float64, got torch.int32"),
        (dict(k=torch.zeros(2, 5, 2, 16).half()), "k must have the dtype of q, torch.float32, got torch.float16"),
        (dict(k=torch.zeros(1, 5, 2, 16)), r"k must have the shape \(2, 5, 2, 16\), got \(1, 5, 2, 16\)"),
        (dict(v=torch.zeros(2, 6, 2, 16)), r"v must have the shape \(2, 5, 2, 16\), got \(2, 6, 2, 16\)"),
        (dict(v=torch.zeros(2, 5, 2, 16, device="meta")), "v must be on the device of q, cpu, got meta"),
        (
            dict(k=torch.zeros(2, 0, 2, 16), v=torch.zeros(2, 0, 2, 16)),
            r"k must hold at least one key, got the shape \(2, 0, 2, 16\)",
        ),
    ],
)
def test_bad_input_has_one_text_on_every_backend(backend, change, message):
    arguments = dict(q=torch.zeros(2, 3, 2, 16), k=torch.zeros(2, 5, 2, 16), v=torch.zeros(2, 5, 2, 16))
    with pytest.raises(InputError, match=message):
        ops.attention(**{**arguments, **change}, backend=backend)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("flash-attn", "pip install flash-attn --no-build-isolation"),
        ("xformers", "pip install 'xformers>=0.0.35'"),
    ],
)
def test_a_missing_backend_says_how_to_get_it(name, command, monkeypatch):
    monkeypatch.setattr(packages, "_find_module", lambda name: False)
    q, k, v = qkv((1, 2, 3, 1, 130))
    with pytest.raises(BackendUnavailableError) as caught:
        ops.attention(q, k, v, backend=name)
    text = str(caught.value)
    assert text.startswith(f"attention: backend '{name}' cannot run this call. sdpa: ok; cpu: ")
    assert f"{name}: {name} is not installed: {command}" in text and "eager: ok" in text


def test_reasons():
    """One line per backend; head sizes, dtypes and strides are read from metadata alone."""
    reasons = {n: why for n, ok, why in module.OP.explain(*qkv((1, 2, 3, 1, 130))) if not ok}
    assert reasons["cpu"] == "needs a head size up to 128, got 130"
    assert reasons["triton"] == "attention has no such implementation"
    strided = [torch.zeros(1, 2, 1, 32)[..., ::2]] * 3
    assert "last dimension" in {n: why for n, _, why in module.OP.explain(*strided)}["cpu"]
    assert ops.attention(*strided).shape == (1, 2, 1, 16)
    with pytest.raises(BackendUnavailableError, match=r"cpu: works in .* got torch.float64"):
        ops.attention(*(x.double() for x in qkv((1, 2, 3, 1, 16))), backend="cpu")


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize(
    ("function", "package", "call"),
    [("_xformers", "xformers.ops", "memory_efficient_attention"), ("_flash_attn", "flash_attn", "flash_attn_func")],
)
def test_other_libraries_are_called_with_their_layout(function, package, call, token_major, monkeypatch):
    """Both take and return (B, N, heads, head size), batch-major; here by stand-ins."""
    q, k, v = packed(2, 5, 3, 16, torch.float32, token_major)
    for name in {package, package.partition(".")[0]}:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    setattr(sys.modules[package], call, lambda *args: exact(*args).float().contiguous())
    out = getattr(module, function)(q, k, v)
    assert in_order_of(q, out)
    assert torch.equal(out, exact(q, k, v).float())


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_gradients_against_finite_differences(backend):
    arguments = [x.double().requires_grad_() for x in qkv((2, 3, 4, 2, 5))]
    assert torch.autograd.gradcheck(lambda *a: ops.attention(*a, backend=backend), arguments)


def test_autocast_casts_as_sdpa_does():
    q, k, v = qkv((1, 5, 6, 2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


@needs_extension
def test_compiles_for_any_number_of_tokens():
    """auto, with the lookup in the table, in one graph for all sizes of a kind."""
    torch._dynamo.reset()
    compiled = torch.compile(ops.attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (20, 30):
        q, k, v = qkv((2, tokens, tokens + 3, 2, 64))
        torch.testing.assert_close(compiled(q, k, v), ops.attention(q, k, v))


def test_the_model_attends_through_the_op():
    q, k, v = qkv((2, 5, 6, 2, 16))
    with backends.use_backend("attention=eager"):
        out = mmdit.attention(q, k, v)
    assert out.shape == (2, 5, 32) and torch.equal(out, ops.attention(q, k, v, backend="eager").flatten(2))


def test_what_the_cuda_kernel_takes(monkeypatch):
    """That of context_attention: what it refuses is read from metadata, so this runs anywhere."""
    monkeypatch.setattr(CUDA_BACKEND, "can_use", lambda x: (True, "CUDA 13.0, sm_90"))

    def reason(tokens, size=64, dtype=torch.bfloat16):
        return {n: why for n, _, why in module.OP.explain(*qkv((1, tokens, tokens, 2, size), dtype))}["cuda"]

    assert reason(144) == reason(192) == reason(256) == "CUDA 13.0, sm_90"
    assert reason(384) == "takes at most 256 keys, got 384"
    assert reason(144, size=32) == "needs a head size of 64, got 32"
    assert reason(144, dtype=torch.float32) == "works in bfloat16 and float16, got torch.float32"


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA_OK, reason=f"backend 'cuda': {CUDA_WHY}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 129, 144, 191, 192, 193, 256])
def test_joint_attention_by_the_cuda_kernel(tokens, token_major, dtype):
    """Views of the packed buffer of a joint block; error at most twice that of SDPA."""
    q, k, v = (x.cuda() for x in packed(3, tokens, 2, 64, dtype, token_major))
    out = ops.attention(q, k, v, backend="cuda")
    assert in_order_of(q, out)
    assert_no_worse(out, ops.attention(q, k, v, backend="sdpa"), exact(q, k, v), dtype)
