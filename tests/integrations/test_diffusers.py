"""``as_vae`` in pipelines of diffusers with tiny random networks: the image is what decoding by hand gives."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn

from msdd_fast import Tokenizer, accelerate
from msdd_fast.errors import InputError
from msdd_fast.families import families, get_preset, register
from tests.families.test_third_party import MosaicConfig, MosaicFamily
from tests.perturbed import perturbed

diffusers = pytest.importorskip("diffusers", reason="pip install 'msdd-fast[diffusers]'")

from msdd_fast.integrations.diffusers import as_vae  # noqa: E402
from tests.draws import generator  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about the schedulers' configs


@pytest.fixture(scope="module")
def tok():
    return perturbed("tiny-ssdd")


@pytest.fixture(autouse=True, scope="module")
def quiet():
    diffusers.utils.logging.set_verbosity_error()


class Call(NamedTuple):
    z: torch.Tensor
    images: torch.Tensor


def tapped(vae):
    """Keeps what goes into ``decode`` and what comes out."""
    calls, decode = [], vae.decode

    def tap(z, *args, **kwargs):
        out = decode(z, *args, **kwargs)
        calls.append(Call(z, out[0]))
        return out

    vae.decode = tap
    return calls


def shown(images):
    return (images / 2 + 0.5).clamp(0, 1)


def pipeline(kind, vae, network):
    pipe = kind(**network, scheduler=diffusers.DDIMScheduler(), **vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit(vae):
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1001,
    )
    return pipeline(diffusers.DiTPipeline, {"vae": vae}, {"transformer": transformer})


def latent_diffusion(vae):
    """An image of low resolution and noise to latents; the pipeline calls its VAE ``vqvae``."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=6,
        out_channels=3,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
    )
    return pipeline(diffusers.LDMSuperResolutionPipeline, {"vqvae": vae}, {"unet": unet})


# --- Pipelines.


@pytest.mark.parametrize("make", [lambda tok: tok, accelerate], ids=["tokenizer", "engine"])
def test_dit_pipeline(tok, make):
    model = make(tok)
    vae = as_vae(model, scaling_factor=0.18215, seed=5)
    calls, pipe = tapped(vae), dit(vae)
    out = pipe([1, 2], guidance_scale=1.0, num_inference_steps=2, generator=generator(), output_type="pt").images
    (call,) = calls
    assert out.shape == (2, 3, 64, 64)
    assert torch.equal(out, shown(model.decode(call.z, seed=5)))
    assert pipe([1], num_inference_steps=1).images[0].size == (64, 64)  # with guidance, as PIL images


def test_latent_diffusion_pipeline():
    pytest.importorskip("transformers", reason="diffusers gives this pipeline only beside transformers")
    tok = perturbed(dataclasses.replace(get_preset("tiny-ssdd"), latent_channels=3))
    vae = as_vae(tok)
    calls, pipe = tapped(vae), latent_diffusion(vae)
    out = pipe(torch.rand(2, 3, 8, 8, generator=generator()), num_inference_steps=2, output_type="pil").images
    ((z, images),) = calls
    assert torch.equal(images, tok.decode(z)) and [image.size for image in out] == [(64, 64)] * 2


def conditional_unet(**more):
    """A tiny UNet with cross-attention."""
    pytest.importorskip("transformers", reason="this pipeline needs transformers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
        mid_block_type=None,
        **more,
    )


def stable_diffusion(kind, vae):
    unet = conditional_unet()
    nothing = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    return pipeline(kind, {"vae": vae}, {"unet": unet, **nothing, "requires_safety_checker": False})


def test_stable_diffusion_pipelines(tok):
    """Text to image and image to image: sizes from the factor, latents out of ``encode``, noise from the generator."""
    vae = as_vae(tok, scaling_factor=0.5)
    prompt = {"prompt_embeds": torch.randn(2, 4, 16, generator=generator()), "guidance_scale": 1.0}
    pipe = stable_diffusion(diffusers.StableDiffusionPipeline, vae)
    assert pipe.vae_scale_factor == 8
    options = {**prompt, "num_inference_steps": 2, "height": 64, "width": 96}
    z = pipe(**options, output_type="latent", generator=generator(1)).images / 0.5
    calls = tapped(vae)
    out = pipe(**options, output_type="pt", generator=generator(1)).images
    assert out.shape == (2, 3, 64, 96) and torch.equal(calls[0].z, z)
    again = pipe(**options, output_type="pt", generator=generator(1)).images
    assert torch.equal(out, again) and torch.equal(out, shown(calls[1].images))
    pipe = stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline, vae)
    image = torch.rand(2, 3, 64, 64, generator=generator())
    assert pipe(**prompt, image=image, num_inference_steps=2, output_type="pt").images.shape == (2, 3, 64, 64)


def test_latents_normalised_by_channel(tok):
    """As in Stable Diffusion XL's pipeline."""
    unet = conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 8
    )
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    vae = as_vae(tok, scaling_factor=0.5, latents_mean=mean, latents_std=torch.tensor(std))
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, {"vae": vae}, {"unet": unet, **nothing})
    embeds = {"prompt_embeds": torch.randn(1, 4, 16), "pooled_prompt_embeds": torch.randn(1, 8)}
    options = {**embeds, "guidance_scale": 1.0, "num_inference_steps": 2}
    latents = pipe(**options, output_type="latent", generator=generator()).images
    calls = tapped(vae)
    pipe(**options, output_type="pt", generator=generator())
    by_hand = latents * torch.tensor(std).view(1, 4, 1, 1) / 0.5 + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(calls[0].z, by_hand, rtol=0, atol=1e-6)


def test_latents_normalised_by_batch_norm(tok):
    """As in FLUX.2's pipeline: packed latents of 16 channels, statistics in ``vae.bn``."""
    pytest.importorskip("transformers", reason="this pipeline needs transformers")
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    mean, var = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    vae = as_vae(tok, batch_norm={"running_mean": mean, "running_var": var, "eps": 1e-4})
    assert vae.config.batch_norm_eps == 1e-4
    calls = tapped(vae)
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        is_distilled=True,
    )
    pipe.set_progress_bar_config(disable=True)
    packed = []
    unpack = pipe._unpack_latents_with_ids
    pipe._unpack_latents_with_ids = lambda *args: packed.append(unpack(*args)) or packed[0]
    out = pipe(prompt_embeds=torch.randn(1, 4, 12), height=64, width=64, num_inference_steps=2, output_type="pt").images
    whole = packed[0] * (var + 1e-4).sqrt().view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    torch.testing.assert_close(calls[0].z, nn.PixelShuffle(2)(whole), rtol=0, atol=1e-6)
    assert torch.equal(out, shown(tok.decode(calls[0].z)))


# --- The adapter alone.


def test_config_dtype_device(tok):
    vae = as_vae(tok, scaling_factor=0.3, shift_factor=0.1)
    assert (vae.config.scaling_factor, vae.config["shift_factor"], vae.config.latent_channels) == (0.3, 0.1, 4)
    assert 2 ** (len(vae.config.block_out_channels) - 1) == tok.config.factor and vae.config.sample_size == 64
    assert vae.dtype == torch.float32 and vae.device == torch.device("cpu")
    assert vae.to("cpu", torch.float32) is vae
    copy = as_vae(perturbed("tiny-ssdd")).to(torch.bfloat16)
    assert copy.dtype == torch.bfloat16
    images = copy.decode(torch.randn(1, 4, 8, 8, dtype=torch.float64)).sample  # cast by the adapter
    assert images.dtype == torch.float32 and images.isfinite().all()
    engine = accelerate(tok)
    assert as_vae(engine).dtype == engine.dtype and as_vae(engine).to(torch.float16).dtype == engine.dtype
    with pytest.raises(InputError, match="device must be cpu, where this engine was made, got meta: move"):
        as_vae(engine).to("meta")
    assert tok.dtype == torch.float32  # no engine's adapter touches it


def test_decode(tok):
    vae, z = as_vae(tok, seed=3), torch.randn(3, 4, 8, 12, generator=generator())
    expected = tok.decode(z, seed=3)
    assert torch.equal(vae.decode(z).sample, expected)
    assert torch.equal(vae.decode(z, return_dict=False)[0], expected)
    one = vae.decode(z, generator=generator(4)).sample
    assert torch.equal(one, vae.decode(z, generator=generator(4)).sample) and not torch.equal(one, expected)
    each = vae.decode(z, generator=[generator(i) for i in range(3)]).sample
    alone = vae.decode(z[1:2], generator=generator(1)).sample  # an image has its own generator's noise in any batch
    torch.testing.assert_close(each[1:2], alone, rtol=0, atol=1e-4)
    vae.enable_slicing()
    torch.testing.assert_close(vae.decode(z).sample, expected, rtol=0, atol=1e-4)
    vae.disable_slicing()
    assert torch.equal(vae.decode(z).sample, expected)
    assert vae.decode(z[:0]).sample.shape == (0, 3, 64, 96)
    assert torch.equal(as_vae(tok, decode_options={"steps": 1}).decode(z).sample, tok.decode(z, steps=1))


@pytest.mark.parametrize("make", [lambda tok: tok, accelerate], ids=["tokenizer", "engine"])
def test_encode(tok, make):
    vae, x = as_vae(make(tok)), torch.rand(2, 3, 64, 32, generator=generator()) * 2 - 1
    latents = vae.encode(x).latent_dist
    assert torch.equal(latents.mode(), tok.encode(x))
    found = tok.encoder.posterior(x)
    drawn = latents.sample(generator(1))
    noise = torch.randn(found.mean.shape, generator=generator(1))
    torch.testing.assert_close(drawn, found.mean + (found.logvar / 2).exp() * noise)
    assert torch.equal(vae.encode(x, return_dict=False)[0].mode(), tok.encode(x))
    assert vae(x).sample.shape == x.shape
    assert vae(x, sample_posterior=True, generator=generator()).sample.isfinite().all()


def test_an_engine_whose_tokenizer_is_gone():
    vae = as_vae(accelerate(Tokenizer.from_config("tiny-ssdd")))
    assert vae.decode(torch.zeros(1, 4, 2, 2)).sample.shape == (1, 3, 16, 16)
    with pytest.raises(InputError, match="encode needs the encoder, got an engine whose Tokenizer is gone"):
        vae.encode(torch.zeros(1, 3, 16, 16))


class EnlargedConfig(MosaicConfig):
    """Latents of cells of 4 pixels, decoded to 8 pixels per cell."""

    factor = 4


@pytest.fixture
def mosaic():
    from msdd_fast import families as registry

    register(MosaicFamily)
    yield
    del registry._FAMILIES[MosaicFamily.name]


def test_a_family_from_outside(mosaic):
    """Nothing asks which family it is; an encoder without a distribution gives a point."""
    assert MosaicFamily.name in families()
    tok, x = Tokenizer.from_config("mosaic-16"), torch.rand(1, 3, 16, 16) * 2 - 1
    vae = as_vae(tok)
    latents = vae.encode(x).latent_dist
    assert torch.equal(latents.sample(generator()), latents.mode()) and torch.equal(latents.mode(), tok.encode(x))
    assert torch.equal(vae.decode(latents.mode()).sample, tok.decode(tok.encode(x)))
    assert len(vae.config.block_out_channels) == 3


def test_a_model_that_enlarges(mosaic):
    """The pipeline is told the factor of the generator's own VAE, unless the larger one is asked for."""
    vae = as_vae(Tokenizer(EnlargedConfig(cell=8)))
    assert len(vae.config.block_out_channels) == 3 and vae.decode(torch.zeros(1, 3, 2, 2)).sample.shape[-1] == 16
    assert len(as_vae(Tokenizer(EnlargedConfig(cell=8)), factor=8).config.block_out_channels) == 4


# --- Mistakes.


def test_token_latents_are_refused():
    message = r"as_vae needs spatial latents \(B, C, h, w\), got msdd with latents \(B, 16, 32\), .*accelerate\(tokeni"
    with pytest.raises(InputError, match=message):
        as_vae(Tokenizer.from_config("tiny"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling_factor": 0}, "scaling_factor must be a finite number other than 0, got 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor must be a finite number, got nan"),
        ({"shift_factor": "a"}, "shift_factor must be a finite number, got 'a'"),
        ({"latents_mean": [0, 0, 0, 0]}, "latents_std must be given with the other"),
        ({"latents_std": [1, 1, 1, 1]}, "latents_mean must be given with the other"),
        ({"latents_mean": [0], "latents_std": [1]}, "latents_mean must have 4 numbers, one per channel, got 1"),
        ({"latents_mean": [0] * 4, "latents_std": [0] * 4}, "latents_std must have positive numbers, got 0"),
        ({"latents_mean": 3, "latents_std": [1] * 4}, "latents_mean must be a list of numbers, got int"),
        ({"batch_norm": [1]}, "batch_norm must be a dict of running_mean, running_var and perhaps eps, got list"),
        ({"batch_norm": {"running_mean": [0]}}, "batch_norm must be a dict of running_mean, .*got running_mean"),
        (
            {"batch_norm": {"running_mean": [0] * 6, "running_var": [1] * 6}},
            "batch_norm must have a multiple of 4 numbers, got 6",
        ),
        ({"factor": 12}, "factor must be a power of two, got 12"),
        ({"seed": -1}, "seed must be"),
        ({"decode_options": 3}, "decode_options must be a dict, got int"),
    ],
)
def test_bad_constants(tok, options, message):
    with pytest.raises(InputError, match=message):
        as_vae(tok, **options)


def test_bad_calls(tok, tmp_path):
    vae, z = as_vae(tok), torch.zeros(2, 4, 8, 8)
    for bad, message in (
        (torch.zeros(2, 5, 8, 8), r"z must have shape \(B, 4, h, w\), got \(2, 5, 8, 8\)"),
        (z.int(), "z must be floating point, got torch.int32"),
        ("z", "z must be a torch.Tensor, got str"),
        (z * float("nan"), "z must be finite|NaN"),
    ):
        with pytest.raises(InputError, match=message):
            vae.decode(bad)
    for bad, message in (
        ([generator()], "generator must be one, or 2, one per image, got 1"),
        (3, "generator must be a torch.Generator or a list of them, got int"),
        ([1, 2], "generator must be a torch.Generator or a list of them, got list"),
    ):
        with pytest.raises(InputError, match=message):
            vae.decode(z, generator=bad)
    with pytest.raises(InputError, match=r"images must have shape \(B, 3, H, W\)"):
        vae.encode(torch.zeros(1, 3, 60, 64))
    with pytest.raises(InputError, match=r"images must be in \[-1, 1\]"):
        vae.encode(torch.full((1, 3, 64, 64), 200.0))
    with pytest.raises(InputError, match="tokenizer must be a Tokenizer"):
        as_vae(3)
    with pytest.raises(InputError, match=r"enable_tiling needs an engine: as_vae\(accelerate\(tokenizer\)\)"):
        vae.enable_tiling()
    vae.disable_tiling()
    with pytest.raises(InputError, match="a pipeline cannot be saved with a tokenizer as its VAE"):
        dit(vae).save_pretrained(tmp_path / "pipe")


def test_without_diffusers(fresh):
    code = (
        "import sys\nsys.modules['diffusers'] = None\n"
        "from msdd_fast.errors import InputError\n"
        "try:\n    import msdd_fast.integrations.diffusers\nexcept InputError as e:\n    print(e)\n"
    )
    out = fresh(code, check=True).stdout
    assert out.startswith("diffusers is not installed (") and out.endswith("): pip install 'msdd-fast[diffusers]'\n")


def test_tiling_is_the_engines(tok):
    engine = accelerate(tok, dtype=torch.float32)
    vae = as_vae(engine)
    z = torch.randn(2, 4, 8, 24, generator=generator())
    whole, tiled = engine.decode(z, 0), engine.decode(z, 0, tile=128)
    assert not torch.equal(whole, tiled)
    vae.enable_tiling()
    assert vae.use_tiling and vae.tile == 128  # tiny-ssdd has images of 64 px; 128 is the least
    assert torch.equal(vae.decode(z).sample, tiled)
    assert torch.equal(vae.decode(z[..., :16]).sample, engine.decode(z[..., :16], 0))  # no larger than a tile
    vae.enable_slicing()
    assert (vae.decode(z).sample - tiled).abs().max() < 3e-5
    vae.disable_slicing()
    vae.disable_tiling()
    assert torch.equal(vae.decode(z).sample, whole)


def test_no_tiling_where_there_are_no_tiles(monkeypatch):
    monkeypatch.setattr("msdd_fast.families._FAMILIES", families())
    register(MosaicFamily)
    vae = as_vae(accelerate(Tokenizer.from_config(MosaicConfig()), dtype=torch.float32))
    with pytest.raises(InputError, match="enable_tiling: mosaic decodes whole images only"):
        vae.enable_tiling()
    vae.disable_tiling()
