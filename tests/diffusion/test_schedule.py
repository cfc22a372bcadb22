"""Schedule tables for 1 to 5 stages (docs/spec.md#schedule), and time grids (docs/spec.md#time-grids)."""

import itertools

import pytest
import torch

from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.diffusion.schedule import StageSchedule, build_stages
from msdd_fast.errors import InputError

# stages -> columns of the table.
TABLES = {
    1: dict(start_t=[1.0], end_t=[0.0], t_max=[1000], t_min=[1], t_last=[1.999], alpha=[], beta=[]),
    2: dict(
        start_t=[1, 0.6667],
        end_t=[0.5, 0],
        t_max=[1000, 572],
        t_min=[572, 1],
        t_last=[572.428, 1.571],
        alpha=[0.6667],
        beta=[0.57735],
    ),
    3: dict(
        start_t=[1, 0.8002399, 0.5007496],
        end_t=[0.667, 0.334, 0],
        t_max=[1000, 744, 386],
        t_min=[744, 386, 1],
        t_last=[744.256, 386.358, 1.385],
        alpha=[0.5998800, 0.7496252],
        beta=[0.6930281, 0.4336619],
    ),
    4: dict(
        start_t=[1, 0.857143, 0.666667, 0.4],
        end_t=[0.75, 0.5, 0.25, 0],
        t_max=[1000, 825, 574, 281],
        t_min=[825, 574, 281, 1],
        t_last=[825.175, 574.251, 281.293, 1.280],
        alpha=[0.5714286, 0.6666667, 0.8],
        beta=[0.7423075, 0.5773503, 0.3464102],
    ),
    5: dict(
        start_t=[1, 0.8889, 0.75, 0.5714, 0.3333],
        end_t=[0.8, 0.6, 0.4, 0.2, 0],
        t_max=[1000, 871, 684, 457, 216],
        t_min=[871, 684, 457, 216, 1],
        t_last=[871.129, 684.187, 457.227, 216.241, 1.215],
        alpha=[0.5556, 0.625, 0.7143, 0.8333],
        beta=[0.7698, 0.6495, 0.4949, 0.2887],
    ),
}


@pytest.mark.parametrize("num_stages", TABLES)
def test_tables(num_stages):
    table, stages = TABLES[num_stages], build_stages(num_stages)
    assert len(stages) == num_stages
    assert [s.timestep_max for s in stages] == table["t_max"]
    assert [s.timestep_min for s in stages] == table["t_min"]
    assert [s.timestep_last for s in stages] == pytest.approx(table["t_last"], abs=6e-4)
    assert [s.start_t for s in stages] == pytest.approx(table["start_t"], abs=6e-5)
    assert [s.end_t for s in stages] == pytest.approx(table["end_t"], abs=1e-9)
    assert [s.alpha for s in stages[1:]] == pytest.approx(table["alpha"], abs=6e-5)
    assert [s.beta for s in stages[1:]] == pytest.approx(table["beta"], abs=6e-5)


@pytest.mark.parametrize("num_stages", range(1, 6))
def test_levels_follow_from_the_previous_end(num_stages):
    """start_t = 2e / (1 + e), and alpha keeps the mean: alpha (1 - e) = 1 - start_t."""
    stages = build_stages(num_stages)
    for before, stage in itertools.pairwise(stages):
        e = before.end_t
        assert stage.start_t == pytest.approx(2 * e / (1 + e))
        assert stage.alpha * (1 - e) == pytest.approx(1 - stage.start_t)


@pytest.mark.parametrize("steps", [1, 2, 4, 30])
def test_time_grids(steps):
    authors = StageSchedule(ScheduleConfig(time_grid="authors"))
    uniform = StageSchedule(ScheduleConfig(time_grid="uniform"))
    for s in range(4):
        for schedule in (authors, uniform):
            model_times, t = schedule.time_grid(s, steps)
            assert model_times.shape == (steps,) and t.shape == (steps + 1,)
            assert t[0] == 1 and t[-1] == 0 and (t.diff() < 0).all()
            assert model_times[0] == pytest.approx(schedule[s].timestep_max / 1000)
        if steps > 1:
            assert authors.time_grid(s, steps)[1][-2] == pytest.approx(0.001)  # the wasted step
            assert torch.allclose(uniform.time_grid(s, steps)[1].diff(), torch.tensor(-1.0 / steps))


def test_one_step_is_the_same_in_both_grids():
    grids = [StageSchedule(ScheduleConfig(time_grid=g)).time_grid(2, 1) for g in ("authors", "uniform")]
    for a, b in zip(*grids, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("num_stages", "expected"),
    [(4, [1, 0.82421875, 0.57421875, 0.279296875]), (3, [1, 0.7421875, 0.38671875])],
)
def test_bfloat16_model_times(num_stages, expected):
    """Parity with the authors' bf16 inference (docs/spec.md#time-grids)."""
    schedule = StageSchedule(ScheduleConfig(num_stages=num_stages, timestep_dtype="bfloat16"))
    assert [schedule.time_grid(s, 1)[0].item() for s in range(num_stages)] == expected


def test_zero_steps_are_refused():
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        StageSchedule(ScheduleConfig()).time_grid(0, 0)
