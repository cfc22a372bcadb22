"""Tensors that a kernel could misread: constant rows, lazy negations, odd strides, other layouts and kinds."""

import pytest
import torch

from msdd_fast import native, ops
from msdd_fast.errors import InputError
from msdd_fast.ops._heads import kernels_fit
from msdd_fast.ops._registry import can_bypass_dispatcher, get_op, on_its_device
from msdd_fast.ops.convolution import pack_convolution
from msdd_fast.ops.linear import pack_linear
from tests.ops.test_op_layer import ARGUMENTS

VALUES = [8191.3, 1e4 + 0.1, 12345.678, -3333.37, 0.1, -7e-5, 1e-15, 3e7, 0.0]


def tables(width):
    return torch.full((1, width), 0.25), torch.full((1, width), 0.5)


# --- Constant rows: h is the shift, exactly. ---


@pytest.mark.parametrize("width", [1, 7, 96, 768, 1030, 8191])
@pytest.mark.parametrize("value", VALUES)
def test_norm_of_a_constant_row_is_its_shift(value, width):
    x, (shift, scale) = torch.full((3, width), value), tables(width)
    assert torch.equal(ops.norm_modulate(x, shift, scale, backend="cpu"), shift.expand(3, -1))
    x_new, h = ops.gate_residual_norm_modulate(x, torch.zeros_like(x), scale, shift, scale, backend="cpu")
    assert torch.equal(x_new, x) and torch.equal(h, shift.expand(3, -1))


@pytest.mark.parametrize("d", [16, 64])
@pytest.mark.parametrize("value", VALUES)
def test_a_constant_head_is_its_rotated_bias(value, d):
    qkv, weight = torch.full((1, 3, 3, 2, d), value), torch.full((1, 2, d), 2.0)
    bias, cos, sin = torch.randn(1, 2, d), torch.ones(3, d // 2), torch.zeros(3, d // 2)
    out = ops.qk_norm_rope(qkv, weight, bias, cos, sin, backend="cpu")
    assert torch.equal(out, bias[:, None, :, None].expand_as(out).squeeze(1).reshape_as(out))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (2, 6, 5, 7), (1, 96, 40, 33), (1, 3, 200, 200)])
@pytest.mark.parametrize("value", VALUES)
def test_group_norm_of_a_constant_group_is_its_bias(value, shape, order):
    x = torch.full(shape, value)
    x[:, shape[1] // 3 : 2 * shape[1] // 3] = -value / 3
    weight, bias = torch.full((shape[1],), 1.5), torch.linspace(-1, 1, shape[1])
    out = ops.group_norm_modulate_silu(
        x.contiguous(memory_format=order), 3, 1e-6, weight, bias, silu=False, backend="cpu"
    )
    assert torch.equal(out, bias[:, None, None].expand(shape))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_constant_group_leaves_its_neighbours_bits(order):
    x = torch.randn(2, 6, 40, 40, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=order)
    expected = ops.group_norm_modulate_silu(x, 3, 1e-6, backend="cpu")
    x[:, 2:4] = 1234.567
    out = ops.group_norm_modulate_silu(x, 3, 1e-6, backend="cpu")
    assert torch.equal(out[:, :2], expected[:, :2]) and torch.equal(out[:, 4:], expected[:, 4:])
    assert not out[:, 2:4].any()


def test_rows_that_hardly_vary_are_nearer_the_truth():
    x = 1e4 + torch.randn(64, 768, generator=torch.Generator().manual_seed(0)) * 0.05
    zero = torch.zeros(1, 768)
    rows = x.double()
    centred = rows - rows.mean(1, keepdim=True)
    truth = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    error = (ops.norm_modulate(x, zero, zero, backend="cpu") - truth).abs().max()
    assert error < 0.02  # half a unit in the last place of the mean, 0.0005, over the deviation of 0.05


# --- Lazy negations. ---


def negated(x):
    """A view of -x whose memory holds x."""
    return torch._neg_view(x)


@pytest.mark.parametrize("name", [n for n in ARGUMENTS if "cpu" in get_op(n).implementations])
def test_a_lazy_negation_keeps_its_sign(name):
    arguments = ARGUMENTS[name]
    op = get_op(name)
    for i, a in enumerate(arguments):
        if not isinstance(a, torch.Tensor) or not a.is_floating_point() or not a.numel():
            continue
        lazy, plain = list(arguments), list(arguments)
        lazy[i], plain[i] = negated(a), -a
        assert lazy[i].is_neg() and not can_bypass_dispatcher(tuple(lazy))
        want = op(*plain, backend="cpu")
        got = op(*lazy, backend="cpu")
        for w, g in zip(*(r if isinstance(r, tuple) else (r,) for r in (want, got)), strict=True):
            assert torch.equal(w, g), i


def test_a_native_function_refuses_a_lazy_negation():
    with pytest.raises(InputError, match="x must hold its own values, got a lazy negation: use resolve_neg"):
        native.norm_modulate(negated(torch.ones(2, 16)), *tables(16), 2, 1e-6)


# --- Dimensions of one element, whose stride means nothing. ---


def with_odd_strides(x):
    pairs = zip(x.shape, x.stride(), strict=True)
    strides = [12345 + 7 * i if size == 1 else stride for i, (size, stride) in enumerate(pairs)]
    return torch.as_strided(x, x.shape, strides)


def rows(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CONV = rows(1, 2, 3, 3)
PLAIN = (rows(1, 1, 12), rows(1, 1, 12), torch.tensor(-0.5))
ONES = {
    "norm_modulate": (rows(1, 1, 96), *tables(96), None, 1e-6),
    "gate_residual_norm_modulate": (rows(1, 1, 96), rows(1, 1, 96), *tables(96), tables(96)[0], None, 1e-6),
    "norm_modulate of RMSNorm": (rows(1, 1, 96), *tables(96), None, 1e-6, rows(96)),
    "qk_norm_rope of RMSNorm": (rows(1, 1, 2, 1, 20), rows(1, 1, 20), None, rows(1, 10), rows(1, 10), None),
    "sigma_gate": (rows(1, 1, 96), rows(1, 1, 96), rows(1, 1, 1), *tables(96), rows(96), None, rows(96)),
    "sigma_gate of one column": (*(rows(1, 1),) * 3, *(None,) * 3, rows(1, 1), None),
    "pixel_modulate": (rows(1, 1, 4), rows(1, 1), rows(8, 1), rows(8), rows(4), pack_linear(rows(8, 1))),
    "sde_step": (rows(1, 3, 1, 4), rows(1, 3, 1, 4), torch.tensor(0.5), None, None, 0, None, None, True),
    "sde_step of pixels of tokens": (rows(1, 3, 1, 4), rows(4, 1, 1, 3), *PLAIN[2:], None, None, 0, None, 1, True),
    "swiglu": (rows(1, 1, 64), rows(1, 1, 64)),
    "swiglu of one column": (rows(3, 1), rows(3, 1)),
    "geglu": (rows(1, 1, 64), rows(1, 1, 64)),
    "geglu of one column": (rows(3, 1, 1), rows(3, 1, 1)),
    "qk_norm_rope": (rows(1, 1, 2, 1, 16), rows(1, 1, 16), rows(1, 1, 16), rows(1, 8), rows(1, 8), None),
    "attention": (rows(1, 1, 1, 16),) * 3,
    "context_attention": (rows(1, 1, 1, 16),) * 4,
    "window_attention": (*(rows(1, 1, 1, 16),) * 3, rows(1, 1, 1), 1, 1),
    "convolution": (
        *(rows(1, 1, 1, 1), CONV, rows(1), rows(1, 1, 1, 1), "same", 1, 1e-6, True, rows(2), rows(2)),
        *(*(rows(1, 2, 1, 1),) * 2, rows(1, 1, 1, 1), None, rows(1, 1), pack_convolution(CONV, shortcut=rows(1, 1))),
    ),
    "convolution of one line": (
        *(rows(1, 2, 1, 5), CONV, None, None, "up", 0, 1e-6, False),
        *(*(None,) * 7, pack_convolution(CONV, "up")),
    ),
    "group_norm_modulate_silu": (rows(1, 4, 1, 1), 1, 1e-6, rows(4), rows(4), *(rows(1, 4, 1, 1),) * 2, True),
    "group_norm_modulate_silu of one channel": (rows(1, 1, 1, 5), 1, 1e-6, rows(1), rows(1), None, None, True),
    "euler_step": (rows(1, 3, 1, 4), rows(1, 3, 1, 4), torch.tensor(-0.5)),
    "cfg_combine": (rows(1, 3, 1, 4), rows(1, 3, 1, 4), torch.tensor(1.5)),
    "cfg_euler": (*(rows(1, 1, 1, 4),) * 3, torch.tensor(1.5), torch.tensor(-0.5)),
    "renoise_upsample": (rows(1, 3, 1, 1), torch.tensor(0.7), torch.tensor(0.3), torch.tensor([3]), 1, -1 / 3),
    "stage_transition": (*PLAIN, torch.tensor(0.7), torch.tensor(0.3), torch.tensor([3]), 1, 2, -1 / 3, None, None),
    "final_step": (*PLAIN, 2, torch.float32, None, None, False),
    "final_step of one value": (rows(4, 1, 1), rows(4, 1, 1), PLAIN[2], 1, torch.float32, None, None, False),
}


@pytest.mark.parametrize("name", ONES)
def test_strides_of_single_elements_mean_nothing(name):
    arguments, op = ONES[name], get_op(name.split()[0])
    odd = tuple(with_odd_strides(a) if isinstance(a, torch.Tensor) else a for a in arguments)
    want, got = op(*arguments, backend="cpu"), op(*odd, backend="cpu")
    for w, g in zip(*(r if isinstance(r, tuple) else (r,) for r in (want, got)), strict=True):
        assert torch.equal(w, g)


def test_gpu_kernels_take_them_too():
    q = with_odd_strides(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16))
    assert kernels_fit(q, q, q) == (True, "")
    q = torch.empty(2, 3, 1, 65, dtype=torch.bfloat16)[..., :64]
    assert not kernels_fit(q, q, q)[0]


# --- Other kinds. ---


@pytest.mark.parametrize("name", [n for n in ops.__all__ if n != "start_noise"])
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_another_kind_are_refused_by_name(name):
    function = getattr(ops, name)
    arguments = get_op(name).example()
    first = arguments[0]
    kinds = [
        first.to_sparse(),
        torch.nested.nested_tensor([first[0], first[0]]),
        first.to(torch.float8_e4m3fn),
        torch.quantize_per_tensor(first.float(), 0.1, 0, torch.qint8),
        *(first.float().numpy(), None, "x", 3),
    ]
    if torch.backends.mkldnn.is_available() and first.dtype == torch.float32:
        kinds.append(first.to_mkldnn())
    for kind in kinds:
        with pytest.raises(InputError, match=r"^(x|q|qkv|a|v_cond|value) must "):
            function(kind, *arguments[1:])


@pytest.mark.parametrize("wrong", ["1", None, [1.0], 1j, torch.ones(2), torch.ones(1).to(torch.complex64)])
def test_numbers_of_another_kind_are_refused_by_name(wrong):
    x, seeds = torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InputError, match=r"^dt must be"):
        ops.euler_step(x, x, wrong)
    with pytest.raises(InputError, match=r"^scale must be"):
        ops.cfg_combine(x, x, wrong)
    with pytest.raises(InputError, match=r"^alpha must be"):
        ops.renoise_upsample(x, wrong, 0.5, seeds, 1)
    with pytest.raises(InputError, match=r"^correlation must be"):
        ops.renoise_upsample(x, 0.5, 0.5, seeds, 1, wrong)
    with pytest.raises(InputError, match=r"^eps must be"):
        ops.norm_modulate(torch.zeros(1, 16), *tables(16), None, wrong)
    with pytest.raises(InputError, match=r"^eps must be"):
        ops.group_norm_modulate_silu(x, 3, wrong)
    with pytest.raises(InputError, match=r"^shape must be"):
        ops.start_noise(seeds, (wrong, 4, 4))
    with pytest.raises(InputError, match=r"^shape must be"):
        ops.start_noise(seeds, wrong)


def test_a_backend_of_another_kind_is_refused():
    x = torch.zeros(1, 3, 4, 4)
    for wrong in (3, ["cpu"], b"cpu"):
        with pytest.raises(InputError, match=r"^backend must be a name"):
            ops.euler_step(x, x, 0.5, backend=wrong)


# --- The device guard of every kernel. ---


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    class OnSecond:
        device, is_cuda = torch.device("cuda:1"), True

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    assert on_its_device(lambda x: current[0])(OnSecond()) == 1
    assert current[0] == 0
    for name in ops.__all__:
        for backend, implementation in get_op(name).implementations.items():
            guarded = implementation.function.__wrapped__ if not implementation.differentiable else None
            assert implementation.differentiable or guarded, (name, backend)


# --- Tracing. ---


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_records_plain_pytorch():
    x, (shift, scale) = torch.randn(3, 64), tables(64)
    traced = torch.jit.trace(lambda x: ops.norm_modulate(x, shift, scale), (x,))
    other = torch.randn(3, 64)
    assert torch.allclose(traced(other), ops.norm_modulate(other, shift, scale), atol=1e-6)
    with pytest.raises(InputError, match=r"norm_modulate: torch\.jit\.trace cannot record backend 'cpu'"):
        torch.jit.trace(lambda x: ops.norm_modulate(x, shift, scale, backend="cpu"), (x,))
