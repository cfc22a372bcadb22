"""A family and a backend that are registered from outside decode images everywhere, and no file of ours knows them.

The family encodes by averaging 4x4 pixels and decodes by repeating them: its velocity is exact, so one Euler step gives
the image. docs/adding-a-family.md and docs/adding-a-backend.md explain this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msdd_fast import Tokenizer, accelerate, explain, families, ops
from msdd_fast.backends import use_backend
from msdd_fast.backends.choice import _backends as registered_backends
from msdd_fast.backends.choice import register_backend
from msdd_fast.commands import main as cli
from msdd_fast.diffusion.checks import shape_of
from msdd_fast.diffusion.config import Config, JsonConfig, SamplingConfig, ScheduleConfig
from msdd_fast.errors import InputError
from msdd_fast.families.base import Option, Released, ReleasedFormat, read_released
from msdd_fast.io.images import load_image, save_image, to_image, to_tensor
from msdd_fast.io.latents import load_latents
from msdd_fast.layers.request import Inputs, Request, StageImages, convert
from msdd_fast.ops.euler_step import OP as EULER_STEP

# --- The family: config, encoder, decoder, engine. ---


@dataclass(frozen=True)
class MosaicConfig(JsonConfig):
    """Latents (3, H/cell, W/cell): the mean colour of each cell."""

    image_size: int = 16
    cell: int = 4
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(num_stages=1, time_grid="power"))
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    family: str = "mosaic"

    @property
    def latent_shape(self) -> tuple[int, None, None]:
        return 3, None, None

    @property
    def has_null_context(self) -> bool:
        return False

    def stage_shapes(self, latents: Sequence[int]) -> list[tuple[int, int, int]]:
        return [(3, latents[2] * self.cell, latents[3] * self.cell)]


class MosaicEncoder(nn.Module):
    def __init__(self, config: MosaicConfig) -> None:
        super().__init__()
        self.cell = config.cell
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, self.cell) * self.gain[:, None, None]


class MosaicDecoder(nn.Module):
    """v = (x_t - image) / t, the noise minus the image of a state on the line between them."""

    def __init__(self, config: MosaicConfig) -> None:
        super().__init__()
        self.config = config
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        image = F.interpolate(z * self.gain[:, None, None], scale_factor=self.config.cell, mode="nearest")
        return (x_t - image) / t[:, None, None, None]


class MosaicWeights:
    def __init__(self, gain: Tensor) -> None:
        self.gain = gain

    def memory(self) -> int:
        return self.gain.nbytes


class MosaicNetwork:
    def __init__(self, weights: MosaicWeights, cell: int) -> None:
        self.w, self.cell = weights, cell


class MosaicProgram:
    """The engine's decode: the image is computed once, and every step uses the op ``euler_step``."""

    def __init__(self, network: MosaicNetwork, steps: list[tuple[float, Tensor]], ops: Any) -> None:
        self.network, self.steps, self.ops = network, steps, ops

    def decode(self, inputs: Inputs, request: Request, noise: Sequence[Tensor] | None = None) -> Tensor:
        z = inputs.z.float() * self.network.w.gain[:, None, None]
        image = F.interpolate(z, scale_factor=self.network.cell, mode="nearest")
        x = self.ops.start_noise(inputs.seeds, tuple(image.shape[1:])) if noise is None else noise[0].float()
        for time, dt in self.steps:
            x = self.ops.euler_step(x, (x - image) / time, dt)
        return convert(x, request.out_dtype)

    def stages(self, inputs: Inputs, request: Request) -> Iterator[Tensor]:
        yield self.decode(inputs, request._replace(out_dtype=torch.float32))

    def images(self, stage: int, end: Tensor, inputs: Inputs, request: Request) -> StageImages:
        return StageImages(stage, convert(end, request.out_dtype), end)

    def activations(self, request: Request) -> int:
        batch, _, height, width = request.shape
        return 4 * 3 * 4 * batch * height * width * self.network.cell**2


def load_mosaic(source: Any, cell: int = 4) -> Released:
    name, state = read_released(source)
    return Released(
        MosaicConfig(cell=cell), {f"{part}.gain": state["colour"].clone() for part in ("encoder", "decoder")}, [], name
    )


class MosaicFamily:
    """Implements ``families.base.Family``."""

    name: ClassVar[str] = "mosaic"
    config_type: ClassVar[type[Any]] = MosaicConfig
    presets: ClassVar[Mapping[str, Config]] = {"mosaic-16": MosaicConfig()}
    released: ClassVar[ReleasedFormat | None] = ReleasedFormat(
        (".mosaic.safetensors",),
        load_mosaic,
        {"cell": Option(4, "pixels per side of a cell")},
        lambda tensors: {"colour": tensors["decoder.gain"]},
    )
    no_fast_tier: ClassVar[str] = "a mosaic has no matrix products"
    no_encoder: ClassVar[str] = ""

    def __init__(self, config: MosaicConfig) -> None:
        self.config = config

    @property
    def example(self) -> tuple[int, ...]:
        side = self.config.image_size // self.config.cell
        return 3, side, side

    @property
    def model(self) -> str:
        return f"mosaic of {self.config.cell} px"

    @property
    def constant(self) -> tuple[str, ...]:
        return ("the image: once for all steps",)

    def describe_sampling(self, steps: int, cfg_scale: float) -> str:
        return f"{steps} step(s)"

    def build(self) -> tuple[nn.Module, nn.Module]:
        return MosaicEncoder(self.config), MosaicDecoder(self.config)

    def check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or images.ndim != 4 or any(s % self.config.cell for s in images.shape[2:]):
            raise InputError(f"images must have sides that are multiples of {self.config.cell}, got {shape_of(images)}")

    def tables(self, decoder: Any, schedule: Any, steps: int, device: torch.device) -> list[tuple[float, Tensor]]:
        times, t = schedule.time_grid(0, steps)
        return [(float(times[i]), torch.tensor(float(t[i + 1] - t[i]), device=device)) for i in range(steps)]

    def program(
        self,
        decoder: Any,
        schedule: Any,
        tables: Any,
        dtype: torch.dtype,
        device: torch.device,
        ops: Any,
        make: Any,
    ) -> MosaicProgram:
        weights = MosaicWeights(decoder.gain.detach().to(device, copy=True))
        return MosaicProgram(MosaicNetwork(weights, self.config.cell), tables, ops)

    def quantizable(self, decoder: Any) -> list[tuple[str, Tensor]]:
        return []

    def tables_memory(self, tables: Any) -> int:
        return sum(dt.nbytes for _, dt in tables)


@pytest.fixture
def mosaic(monkeypatch):
    """The registered family, for the time of a test."""
    monkeypatch.setattr(families, "_FAMILIES", families.families())
    families.register(MosaicFamily)
    return Tokenizer.from_config("mosaic-16")


def image():
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(x, scale_factor=4, mode="nearest")


def test_the_tokenizer_decodes(mosaic):
    x = image()
    z = mosaic.encode(x)
    assert z.shape == (1, 3, 4, 4)
    for steps in (1, 3):
        torch.testing.assert_close(mosaic.decode(z, steps=steps), x)
    with pytest.raises(InputError, match="cfg_scale must be 1 for an MOSAIC tokenizer"):
        mosaic.decode(z, cfg_scale=2.0)
    with pytest.raises(InputError, match="sides that are multiples of 4"):
        mosaic.encode(torch.zeros(1, 3, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_decodes(mosaic, dtype):
    z = mosaic.encode(image()).expand(3, -1, -1, -1)
    fast = accelerate(mosaic, dtype=dtype, steps=2)
    torch.testing.assert_close(fast.decode(z, seed=4), mosaic.decode(z, seed=4, steps=2))
    assert [s.stage for s in fast.stream(z)] == [0]
    report = str(fast.report())
    assert "mosaic of 4 px" in report and "the image: once for all steps" in report
    assert "euler_step" in str(explain(mosaic, steps=2))
    with pytest.raises(Exception, match="a mosaic has no matrix products"):
        accelerate(mosaic, tier="fast")


def test_files_and_the_command_line(mosaic, tmp_path, capsys):
    """Save, load, reconstruct, encode, decode, convert and export, without a word about the family."""
    x, folder, photo = image(), tmp_path / "model", tmp_path / "photo.png"
    mosaic.save_pretrained(folder)
    assert Tokenizer.from_pretrained(folder).config == mosaic.config
    save_image(to_image(x[0]), photo)
    latents, out = tmp_path / "z.safetensors", tmp_path / "decoded"
    for line in (
        f"reconstruct {photo} -o {tmp_path / 'r.png'} --checkpoint {folder}",
        f"encode {photo} -o {latents} --checkpoint {folder}",
        f"decode {latents} -o {out} --checkpoint {folder} --dtype float32",
        f"convert {folder} {tmp_path / 'theirs.safetensors'} --export",
    ):
        assert cli.main(line.split()) == 0, capsys.readouterr().err
    torch.testing.assert_close(load_latents(latents).z.float(), mosaic.encode(to_tensor(load_image(photo))[None]))
    assert torch.equal(to_tensor(load_image(out / "photo.png")), to_tensor(load_image(photo)))
    assert torch.equal(load_file(tmp_path / "theirs.safetensors")["colour"], torch.ones(3))
    save_file({"colour": torch.full((3,), 0.5)}, tmp_path / "half.safetensors")
    line = f"convert {tmp_path / 'half.safetensors'} {tmp_path / 'ours'} --family mosaic --cell 2"
    assert cli.main(line.split()) == 0, capsys.readouterr().err
    loaded = Tokenizer.from_pretrained(tmp_path / "ours")
    assert loaded.config.cell == 2 and float(loaded.decoder.gain[0]) == 0.5


def test_a_family_needs_a_name_and_presets_of_its_own(mosaic):
    with pytest.raises(InputError, match="family must have a name of its own, got 'mosaic'"):
        families.register(MosaicFamily)
    twin = type("Twin", (MosaicFamily,), {"name": "twin"})
    with pytest.raises(InputError, match="presets must have names of their own, got mosaic-16"):
        families.register(twin)


# --- The backend. ---


@pytest.fixture
def reversed_backend(monkeypatch):
    """A backend of one op, registered for the time of a test; gives the shapes that it was called with."""
    calls: list[tuple[int, ...]] = []

    def euler_step(x: Tensor, v: Tensor, dt: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return (dt * v.float() + x.float()).to(x.dtype)

    monkeypatch.setattr("msdd_fast.backends.choice._backends", dict(registered_backends))
    monkeypatch.setattr(EULER_STEP, "implementations", dict(EULER_STEP.implementations))
    backend = register_backend("reversed", lambda x: (x.device.type == "cpu", "works on CPU tensors"))
    EULER_STEP.register(backend, euler_step, differentiable=True)
    return calls


def test_a_backend_serves_ops_scopes_and_engines(mosaic, reversed_backend, tmp_path):
    x, calls = torch.ones(1, 3, 2, 2), reversed_backend
    assert torch.equal(ops.euler_step(x, x, -0.25, backend="reversed"), torch.full_like(x, 0.75)) and len(calls) == 1
    with use_backend("euler_step=reversed"):
        ops.euler_step(x, x, -0.25)
    assert len(calls) == 2
    z = mosaic.encode(image())
    fast = accelerate(mosaic, backend="auto,euler_step=reversed", dtype=torch.float32)
    torch.testing.assert_close(fast.decode(z), image())
    assert len(calls) >= 3 and "reversed" in str(fast.report())
    with pytest.raises(InputError, match=r"backend must be one of .*reversed.*, got 'backwards'"):
        ops.euler_step(x, x, -0.25, backend="backwards")
