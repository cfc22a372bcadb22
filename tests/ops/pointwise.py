"""What every pointwise op is held to. A test class states its op, arguments, scalars and formula, and inherits this."""

import pytest
import torch

from msdd_fast.errors import InputError
from msdd_fast.layout import row_layout


class Pointwise:
    op: staticmethod
    names: tuple[str, ...]
    """Tensor arguments in order; the result has the dtype and memory order of the first."""
    scalars: dict[str, float]
    formula: staticmethod

    def tensors(self, shape, device, *dtypes):
        generator = torch.Generator().manual_seed(0)
        dtypes = dtypes if len(dtypes) > 1 else dtypes * len(self.names)
        return [torch.randn(shape, generator=generator).to(device, d) for _, d in zip(self.names, dtypes, strict=False)]

    def exact(self, args):
        return self.formula(*(a.double() for a in args), **self.scalars).float()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1,), (3, 1025)])
    def test_against_the_formula(self, backend, device, assert_rounded, shape, dtype):
        args = self.tensors(shape, device, dtype)
        for name in (backend, "eager"):
            assert_rounded(self.op(*args, **self.scalars, backend=name), self.exact(args), dtype)

    def test_mixed_dtypes_take_the_first(self, backend, device, assert_rounded):
        args = self.tensors((2, 9), device, torch.float32, torch.bfloat16, torch.float16)
        assert_rounded(self.op(*args, **self.scalars, backend=backend), self.exact(args), torch.float32)

    def test_memory_order_follows_the_first(self, backend, device):
        args = self.tensors((2, 3, 4, 5), device, torch.float32)
        expected = self.op(*args, **self.scalars, backend=backend)
        last = args[0].to(memory_format=torch.channels_last)
        out = self.op(last, *args[1:], **self.scalars, backend=backend)
        assert out.is_contiguous(memory_format=torch.channels_last) and torch.equal(out, expected)
        others = [a.to(memory_format=torch.channels_last) for a in args[1:]]
        assert torch.equal(self.op(args[0], *others, **self.scalars, backend=backend), expected)
        views = [a.transpose(2, 3) for a in args]
        assert torch.equal(self.op(*views, **self.scalars, backend=backend), expected.transpose(2, 3))

    def test_slices_are_read_in_place(self, backend, device):
        """Halves of one tensor, as guidance makes them: rows with a stride; also rows of two dimensions."""
        for shape, columns in (((5, 4, 33), 66), ((3, 2, 700), 700), ((2, 2, 1500), 1500), ((2, 3, 2, 8), None)):
            both = self.tensors(shape, device, torch.bfloat16)
            halves = [t.chunk(2, dim=-2)[i % 2] for i, t in enumerate(both)]
            layout = row_layout(*halves)
            assert layout is not None and columns in (None, layout.columns)
            expected = self.op(*(h.contiguous() for h in halves), **self.scalars, backend=backend)
            out = self.op(*halves, **self.scalars, backend=backend)
            assert out.is_contiguous() and torch.equal(out, expected)
            mixed = [halves[0].contiguous(), *halves[1:]]
            assert row_layout(*mixed) is not None
            assert torch.equal(self.op(*mixed, **self.scalars, backend=backend), expected)
            unlike = [halves[0], *(h.transpose(0, -1).contiguous().transpose(0, -1) for h in halves[1:])]
            assert row_layout(*unlike) is None
            assert torch.equal(self.op(*unlike, **self.scalars, backend=backend), expected)

    def test_device_scalars_and_empty_input(self, backend, device):
        args = self.tensors((2, 9), device, torch.bfloat16)
        by_tensor = {k: torch.tensor(v, device=device) for k, v in self.scalars.items()}
        expected = self.op(*args, **self.scalars, backend=backend)
        assert torch.equal(self.op(*args, **by_tensor, backend=backend), expected)
        assert self.op(*(a[:0] for a in args), **self.scalars, backend=backend).shape == (0, 9)

    def test_eager_is_differentiable(self):
        args = [a.requires_grad_() for a in self.tensors((2, 3), "cpu", torch.float32)]
        self.op(*args, **self.scalars).sum().backward()
        assert all(a.grad.abs().sum() > 0 for a in args)

    @pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
    def test_bad_input_has_one_text_on_every_backend(self, name):
        first, second = self.names[:2]
        scalar = next(iter(self.scalars))
        for change, message in (
            ({first: None}, f"{first} must be a tensor, got NoneType"),
            ({second: torch.zeros(3)}, rf"{second} must have the shape of {first}, \(2,\), got \(3,\)"),
            (
                {second: torch.zeros(2, dtype=torch.int32)},
                f"{second} must be float32, bfloat16 or float16, got torch.int32",
            ),
            ({second: torch.zeros(2, device="meta")}, f"{second} must be on the device of {first}, cpu, got meta"),
            ({scalar: torch.zeros(2)}, rf"{scalar} must be one number, got a tensor of shape \(2,\)"),
        ):
            arguments = {**{n: torch.zeros(2) for n in self.names}, **self.scalars, **change}
            with pytest.raises(InputError, match=message):
                self.op(**arguments, backend=name)
