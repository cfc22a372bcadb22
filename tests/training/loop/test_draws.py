"""Random numbers by seed, step and global sample index."""

import torch

from msdd_fast.training.loop.draws import Draws, Purpose, hash_seed


def draws(first=0, count=1000, seed=0, step=0):
    return Draws(seed, step, torch.arange(first, first + count))


def everything(d):
    numbers = [d.uniform(Purpose.AUGMENT_FAKE, 7), d.normal(Purpose.TIME, 1)[None], d.seeds(Purpose.NOISE)[None]]
    return [*numbers, d.order(Purpose.STAGE, 4)[None]]


def test_a_sample_has_its_numbers_in_every_batch():
    whole = everything(draws(0, 40, step=3))
    parts = [everything(draws(first, 8, step=5)) for first in range(0, 40, 8)]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts], dim=1), expected)
    for other in (draws(0, 40, seed=1), draws(2**40, 40)):
        assert all(not torch.equal(a, b) for a, b in zip(whole, everything(other), strict=True))


def test_distributions():
    u, n = draws(count=20000).uniform(Purpose.TIME, 5), draws(count=20000).normal(Purpose.TIME)
    assert u.shape == (5, 20000) and u.min() >= 0 and u.max() < 1
    assert (u.mean(dim=1) - 0.5).abs().max() < 0.01 and (u.std(dim=1) - 12**-0.5).abs().max() < 0.01
    assert torch.corrcoef(u).triu(1).abs().max() < 0.03
    assert abs(float(n.mean())) < 0.03 and abs(float(n.std()) - 1) < 0.03
    seeds = draws().seeds(Purpose.NOISE)
    assert seeds.min() >= 0 and seeds.max() < 2**62 and len(set(seeds.tolist())) == 1000
    assert not torch.equal(seeds, draws().seeds(Purpose.NOISE, 1))


def test_order_is_a_permutation_of_every_block():
    labels = draws(count=2000).order(Purpose.STAGE, 5).view(-1, 5)
    assert (labels.sort(dim=1).values == torch.arange(5)).all()
    assert (labels.float().mean(dim=0) - 2).abs().max() < 0.25  # no place prefers an element


def test_what_a_step_shares():
    a, b = draws(0, 4, step=7), draws(100, 4, step=7)
    assert torch.equal(*(torch.rand(3, generator=d.shared(Purpose.CRITIC_CROP)) for d in (a, b)))
    assert torch.equal(*(torch.rand(3, generator=a.shared(Purpose.CRITIC_CROP)) for _ in range(2)))
    others = [draws(0, 4, step=8).shared(Purpose.CRITIC_CROP), a.shared(Purpose.GENERATOR_CROP)]
    assert len({float(torch.rand((), generator=g)) for g in (a.shared(Purpose.CRITIC_CROP), *others)}) == 3


def test_hash_seed_is_stable():
    assert hash_seed(0, 1) == hash_seed(0, 1) != hash_seed(1, 0)
    assert 0 <= hash_seed(123, 456) < 2**63
