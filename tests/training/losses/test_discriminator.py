"""The discriminator: heads, batch statistics, the frozen backbone, its file, resizing and augmentation."""

import logging
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from msdd_fast.errors import CheckpointError, ConfigError
from msdd_fast.metrics.vgg19 import Vgg19Distance
from msdd_fast.training.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss
from msdd_fast.training.losses.augment import NUM_DRAWS, augment
from msdd_fast.training.losses.dino import PatchFeatures, load_dino, random_features
from msdd_fast.training.losses.discriminator import BatchNorm, Discriminator, Head, fit
from msdd_fast.training.losses.vgg_features import VggFeatures
from msdd_fast.training.recipes.msdd_stage2 import MSDDDistillConfig
from tests.draws import generator
from tests.training.launch import spawn

# --- batch statistics


def test_batch_norm_is_torchs():
    x = torch.randn(3, 5, 7, generator=generator()) * 3 + 50
    reference = nn.BatchNorm1d(5, eps=1e-6).train()
    mine = BatchNorm(5)
    for norm in (reference, mine):
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, 5))
            norm.bias.copy_(torch.linspace(-1, 1, 5))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [n(i) for n, i in zip((reference, mine), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for out in outputs:
        out.square().mul(torch.arange(7)).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-3, atol=1e-3)


def _norm_in_a_process(x, results):
    rank = dist.get_rank()
    part = x[:1] if rank == 0 else x[1:]  # unequal shares
    part = part.clone().requires_grad_()
    out = BatchNorm(4)(part)
    out.pow(3).sum().backward()
    torch.save((out.detach(), part.grad), f"{results}/{rank}.pt")


def test_batch_norm_over_processes_on_the_cpu(tmp_path):
    """Two processes with 1 and 2 images give what one process gives with all 3, gradients too."""
    x = torch.randn(3, 4, 5, generator=generator())
    spawn(_norm_in_a_process, 2, x, tmp_path)
    whole = x.clone().requires_grad_()
    out = BatchNorm(4)(whole)
    out.pow(3).sum().backward()
    parts = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), out.detach())
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole.grad)


# --- heads and backbone


def test_size_of_the_real_one():
    """7.39 M trained parameters, five heads of 196 tokens (docs/spec.md#adversarial)."""
    discriminator = Discriminator(PatchFeatures("shapes only"))
    assert sum(p.numel() for p in discriminator.parameters()) == 7_386_245
    logits = discriminator(torch.zeros(2, 3, 256, 256), generator())
    assert logits.shape == (2, 5 * 196)


def test_heads_are_circular_and_spectrally_normal():
    head = Head(6)
    x = torch.randn(2, 6, 11, generator=generator())
    with torch.no_grad():
        for _ in range(30):  # power iterations
            head(x)
    for conv in (head.point[0], head.wide[0], head.out):
        assert float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.02)
    head.eval()  # no further power iteration
    torch.testing.assert_close(head(x.roll(4, dims=2)), head(x).roll(4, dims=1), rtol=1e-4, atol=1e-5)


def test_features_by_hand():
    """Depth 0 is the embedded patches with the class token and all positions added; the last is after all blocks."""
    model = random_features()
    x = torch.rand(2, 3, 32, 32, generator=generator()) * 2 - 1
    maps = model(x)
    assert [m.shape for m in maps] == [(2, 32, 16)] * 5
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    image = ((x + 1) / 2 - mean) / std
    patch = torch.einsum("bcyx,dcyx->bd", image[..., :8, 8:16], model.patch_embed.proj.weight)
    first = patch + model.pos_embed[:, 2] + model.cls_token[:, 0] + model.pos_embed[:, 0]
    torch.testing.assert_close(maps[0][..., 1], first + model.patch_embed.proj.bias, rtol=1e-4, atol=1e-4)

    tokens = model.patch_embed.proj(image).flatten(2).mT
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], 1) + model.pos_embed
    for block in model.blocks:  # nn.MultiheadAttention has the same layout of q, k and v
        attention = nn.MultiheadAttention(32, 2, batch_first=True)
        attention.load_state_dict(
            {
                "in_proj_weight": block.attn.qkv.weight,
                "in_proj_bias": block.attn.qkv.bias,
                "out_proj.weight": block.attn.proj.weight,
                "out_proj.bias": block.attn.proj.bias,
            }
        )
        h = block.norm1(tokens)
        tokens = tokens + attention(h, h, h)[0]
        tokens = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(maps[-1], (tokens[:, 1:] + tokens[:, :1]).mT, rtol=1e-3, atol=1e-3)


def test_gradients_go_through_the_backbone_to_the_image():
    discriminator = Discriminator(random_features())
    x = torch.zeros(2, 3, 64, 64, requires_grad=True)
    with discriminator.frozen():
        discriminator(x, generator()).pow(2).mean().backward()
    assert float(x.grad.abs().sum()) > 0
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.requires_grad for p in discriminator.parameters())
    assert not any(p.requires_grad for p in discriminator._features[0].parameters())


@pytest.fixture
def vgg_file(tmp_path):
    """Random weights in the layout of the genuine file."""
    state = {}
    for key, n_in, n_out, kernel in Vgg19Distance._LAYERS:
        conv = torch.nn.Conv2d(n_in, n_out, kernel)
        state |= {f"{key}.{name}": p.detach() for name, p in conv.named_parameters()}
    torch.save(state, tmp_path / "vgg.pth")
    return tmp_path / "vgg.pth"


def test_vgg_backbone(vgg_file):
    torch.manual_seed(0)
    discriminator = Discriminator(VggFeatures(vgg_file)).eval()  # the spectral norms stay as they are
    assert discriminator.name == "vgg19"
    images = torch.rand(2, 3, 96, 96, generator=generator()) * 2 - 1
    small = fit(images, 64, generator())
    maps = Vgg19Distance(vgg_file).activations(small)
    expected = [head(m.flatten(2)) for head, m in zip(discriminator.heads, maps[1:], strict=True)]
    x = images.clone().requires_grad_()
    with discriminator.frozen():
        logits = discriminator(x, generator())
        logits.sum().backward()
    assert logits.shape == (2, 32 * 32 + 16 * 16) and x.grad.abs().sum() > 0
    torch.testing.assert_close(logits, torch.cat(expected, dim=1), rtol=1e-3, atol=1e-4)
    assert not any(name.startswith("_features") for name, _ in discriminator.named_parameters())


def test_vgg_backbone_of_a_run(vgg_file, tmp_path):
    config = dict(data=(), out=str(tmp_path), teacher="msdd-nano", discriminator="vgg19", perceptual="random")
    with pytest.raises(ConfigError, match="discriminator 'vgg19' needs the file vgg19, got none: the VGG-19 features"):
        MSDDDistillConfig(**config).build()
    critic = MSDDDistillConfig(**config, vgg19=str(vgg_file)).build().critic
    assert critic.module.name == "vgg19" and len(critic.module.heads) == 2


def test_bfloat16_autocast_does_not_reach_it():
    discriminator = Discriminator(random_features())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert discriminator(torch.zeros(1, 3, 32, 32), generator()).dtype == torch.float32


def test_it_learns_to_tell_pictures_from_noise():
    torch.manual_seed(0)
    discriminator = Discriminator(random_features())
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)
    real = torch.linspace(-1, 1, 32).expand(4, 3, 32, 32) * torch.linspace(-1, 1, 4).view(4, 1, 1, 1)
    losses = []
    for seed in range(25):
        fake = torch.randn(real.shape, generator=generator(seed))
        loss = discriminator_loss(discriminator(real, generator()), discriminator(fake, generator()), "hinge")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0]  # 1 is a coin's


# --- its file


@pytest.fixture(scope="module")
def state():
    """The shapes of DINO's file, with random weights."""
    torch.manual_seed(0)
    model = PatchFeatures("shapes")
    state = {n: torch.randn(p.shape) * 0.02 for n, p in model.named_parameters()}
    return {**state, "norm.weight": torch.ones(384), "norm.bias": torch.zeros(384)}


def test_dino_files(state, tmp_path):
    torch.save(state, tmp_path / "dino.pth")
    save_file(state, tmp_path / "dino.safetensors")
    for name in ("dino.pth", "dino.safetensors"):
        model = load_dino(str(tmp_path / name))
        assert model.name == "dino-vit-s16"
        assert torch.equal(model.blocks[11].mlp.fc2.weight, state["blocks.11.mlp.fc2.weight"])


def test_wrong_dino_files(state, tmp_path):
    path = tmp_path / "w.pth"
    shallow = {k: v for k, v in state.items() if not k.startswith("blocks.11.")}
    wide = {**state, "cls_token": torch.zeros(1, 1, 768)}
    for data, message in (
        ([1], r"expected cls_token of shape \(1, 1, 384\), got nothing of the kind"),
        (shallow, r"expected blocks\.11\.norm1\.weight of shape \(384,\), got nothing"),
        (wide, r"expected cls_token of shape \(1, 1, 384\), got \(1, 1, 768\)"),
        ({**state, "head.weight": torch.zeros(1000, 384)}, "it has a classifier"),
    ):
        torch.save(data, path)
        with pytest.raises(CheckpointError, match=rf"w\.pth is not DINO's ViT-S/16: .*{message}"):
            load_dino(str(path))
    path.write_text("hello")
    with pytest.raises(CheckpointError, match=r"w\.pth is damaged"):
        load_dino(str(path))


def test_missing_dino(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"neither a file nor a timm model .* not installed.*dl\.fbaipublicfiles"):
        load_dino("nowhere/dino.pth")


def test_timm_name_reads_the_local_cache_only(state, tmp_path, monkeypatch):
    """No call that could download: only a look into the cache."""
    save_file(state, tmp_path / "model.safetensors")
    asked = []

    def look(repo, file):
        asked.append((repo, file))
        return str(tmp_path / file) if repo.endswith("vit_small_patch16_224.dino") else None

    hub, errors = type(sys)("huggingface_hub"), type(sys)("huggingface_hub.errors")
    hub.try_to_load_from_cache, errors.HFValidationError = look, ValueError
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    assert torch.equal(load_dino("vit_small_patch16_224.dino").cls_token, state["cls_token"])
    with pytest.raises(
        CheckpointError, match=r"'other' is neither a file nor a timm model in the local cache\. It takes"
    ):
        load_dino("other")
    assert asked == [("timm/vit_small_patch16_224.dino", "model.safetensors"), ("timm/other", "model.safetensors")]


def test_the_random_backbone_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        model = random_features()
    assert "for tests only" in caplog.text and model.name == "random-vit"


# --- what it sees


def test_fit():
    x = torch.arange(64.0 * 64).view(1, 1, 64, 64).expand(2, 3, -1, -1)
    assert fit(x, 64, generator()) is x
    seen = set()
    for seed in range(20):
        y = fit(x, 32, generator(seed))
        assert y.shape == (2, 3, 32, 32)
        step = float(y[0, 0, 0, 1] - y[0, 0, 0, 0])
        seen.add(step)
        if step == 1:  # a crop: one place for both images
            assert torch.equal(y[0], y[1]) and float(y[0, 0, 1, 0] - y[0, 0, 0, 0]) == 64
        else:
            torch.testing.assert_close(y, torch.nn.functional.avg_pool2d(x, 2))
    assert seen == {1.0, 2.0}
    assert fit(x, 96, generator()).shape == (2, 3, 96, 96)


def test_augmentation():
    x = torch.rand(4, 3, 32, 32, generator=generator()).requires_grad_()
    one, other = (torch.rand(NUM_DRAWS, 4, generator=generator(seed)) for seed in (1, 2))
    y = augment(x, one)
    assert y.shape == x.shape and torch.equal(y, augment(x, one)) and not torch.equal(y, augment(x, other))
    y.sum().backward()
    assert x.grad.isfinite().all() and float(x.grad.abs().sum()) > 0
    empty = (y == 0).all(dim=1).float().mean(dim=(1, 2))
    assert (empty > 0.05).all() and (empty < 0.7).all()  # cut-out and translation, different for every image
    assert len({round(float(e), 4) for e in empty}) == 4


def test_shift_moves_each_image_by_its_own():
    from msdd_fast.training.losses.augment import _shift

    x = torch.rand(2, 3, 8, 8, generator=generator()) + 1
    y = _shift(x, torch.tensor([2, -1]).view(2, 1, 1, 1), torch.tensor([0, 3]).view(2, 1, 1, 1))
    assert torch.equal(y[0, :, 2:], x[0, :, :-2]) and (y[0, :, :2] == 0).all()
    assert torch.equal(y[1, :, :-1, 3:], x[1, :, 1:, :-3]) and (y[1, :, -1] == 0).all() and (y[1, :, :, :3] == 0).all()


# --- losses


def test_adversarial_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx(0.5 * (0.5 + 1.0))
    assert float(generator_loss(fake, "hinge")) == 1.0
    log = torch.log
    p, q = real.sigmoid(), fake.sigmoid()
    expected = -0.5 * (log(p).mean() + log(1 - q).mean())
    assert float(discriminator_loss(real, fake, "log")) == pytest.approx(float(expected), rel=1e-5)
    assert float(generator_loss(fake, "log")) == pytest.approx(float(-log(q).mean()), rel=1e-5)
    assert discriminator_loss(1e4 * real - 1, 1e4 * fake, "log").isfinite()


def test_adaptive_weight():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    a, b = (3 * w).sum(), (w * torch.tensor([0.0, 0.5])).sum()
    assert float(adaptive_weight(a, b, w)) == pytest.approx(3 * 2**0.5 / 0.5001)
    assert float(adaptive_weight(1e9 * a, b, w)) == 1e4
    (a + b).backward()  # the graph is still there
