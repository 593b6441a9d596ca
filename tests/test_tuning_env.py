"""The tuning environments: the rules by hand, Gymnasium's checker, and no truth in sight."""

import dataclasses

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.crystfel.env import (
    FREE_OUTPUTS,
    CrystFELTuningEnv,
    CrystFELVectorEnv,
    IndexerBench,
    Outcome,
    Progress,
    SurrogateBench,
    num_features,
    scale_of,
    worth,
)
from envs.crystfel.indexer import Memo
from envs.crystfel.surrogate import (
    Sample,
    SurrogateIndexer,
    draw_experiments,
    nominal_experiment,
    respond,
)
from envs.crystfel.types import (
    TUNABLES,
    Frame,
    IndexingResult,
    ParameterError,
    Parameters,
    TuningConfig,
)

ALL = tuple(TUNABLES)


class Scripted:
    """Indexes by a rule of the parameters; counts the frames that it was asked for."""

    version = "scripted 1"

    def __init__(self, num_indexed):
        self.num_indexed, self.num_frames_run, self.calls = num_indexed, 0, []

    def run(self, parameters, frames):
        number = np.array([int(frame.event) for frame in frames])
        self.num_frames_run += len(frames)
        self.calls.append((parameters, len(frames)))
        is_indexed = number < self.num_indexed(parameters)
        n = len(frames)
        return IndexingResult(
            is_indexed=is_indexed, is_hit=np.ones(n, bool), num_peaks=np.full(n, 20),
            num_crystals=int(is_indexed.sum()), mean_cell=np.full(6, np.nan),
            cell_ratio=1.02 if is_indexed.any() else float("nan"), residual_px=float("nan"),
            spot_shift_px=np.full(2, np.nan), cpu_s=0.1 * n, version=self.version,
        )  # fmt: skip


FRAMES = [Frame(path="a.h5", event=str(i)) for i in range(10)]


def scripted_env(**config):
    """Indexes SNR - 3 of 10 frames."""
    indexer = Scripted(lambda p: p.min_snr - 3)
    rules = TuningConfig(tunables=("min_snr",), num_frames=10, num_steps=3, **config)
    return CrystFELTuningEnv(indexer, rules, FRAMES, Parameters(min_snr=6)), indexer


# ---- one experiment ------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["continuous", "discrete"])
def test_gymnasiums_checker_is_content(action):
    indexer = SurrogateIndexer(nominal_experiment(), num_frames=50)
    config = TuningConfig(action=action, num_frames=50, num_steps=3)
    check_env(CrystFELTuningEnv(indexer, config, indexer.frames), skip_render_check=True)


def test_an_episode_by_hand():
    env, indexer = scripted_env(max_change=1 / 3)  # a third of 3..12 is an SNR of 3
    observation, info = env.reset()
    assert observation.shape == (num_features(env.config),) == (4 * 1 + 2 * 11 + 4,)
    assert info["indexed_fraction"] == pytest.approx(0.3)
    _, reward, terminated, truncated, info = env.step(np.array([1.0]))  # SNR 9
    assert (info["parameters"].min_snr, info["indexed_fraction"]) == (9, pytest.approx(0.6))
    assert reward == pytest.approx(0.3)
    _, reward, *_, info = env.step(np.array([-1.0]))  # SNR 6 again: nothing lost, nothing gained
    assert reward == 0 and info["best_fraction"] == pytest.approx(0.6)
    assert not (terminated or truncated)
    _, reward, terminated, truncated, info = env.step(np.array([5.0]))  # cut off at 1: SNR 12
    assert info["best_parameters"].min_snr == 12 and reward == pytest.approx(0.3)
    assert terminated and not truncated
    assert indexer.num_frames_run == 30, "SNR 6 was known already"


def test_discrete_steps_walk_from_where_the_last_one_led():
    env, _ = scripted_env(action="discrete", reward="change")
    env.reset()
    assert env.action_space.n == 3
    values = []
    for action in (2, 2, 1):  # up, up, down
        *_, info = env.step(action)
        values.append(info["parameters"].min_snr)
    assert values == pytest.approx([6.5, 7.0, 6.5])
    *_, info = env.step(0)
    assert info["parameters"].min_snr == pytest.approx(6.5)


def test_reward_of_change_goes_down_too_and_time_costs():
    env, _ = scripted_env(max_change=1 / 9, reward="change")
    env.reset()
    rewards = [env.step(np.array([a]))[1] for a in (1.0, -1.0)]  # SNR 7, then 6 (from the best, 7)
    assert rewards == pytest.approx([0.1, -0.1])
    env, _ = scripted_env(max_change=1 / 9, time_cost=0.5)
    env.reset()
    assert env.step(np.array([1.0]))[1] == pytest.approx(0.1 - 0.5 * 0.1)


def test_the_next_episode_begins_at_the_best():
    env, _ = scripted_env()
    env.reset()
    env.step(np.array([1.0]))
    _, info = env.reset()
    assert info["parameters"].min_snr == pytest.approx(10.5)
    *_, info = env.step(np.array([-1.0]))
    assert info["parameters"].min_snr == pytest.approx(6), "worse: not where the next one begins"
    _, info = env.reset()
    assert info["parameters"].min_snr == pytest.approx(10.5)
    _, info = env.reset(options={"restart": True})
    assert info["parameters"].min_snr == 6


def test_frames_and_start_are_the_indexers_where_none_are_named(tmp_path):
    e = draw_experiments(np.random.default_rng(2), "normal", 1)
    indexer = SurrogateIndexer(e, num_frames=30)
    for backend in (indexer, Memo(indexer, tmp_path)):
        env = CrystFELTuningEnv(backend, TuningConfig(num_frames=20))
        assert env.bench.frames == indexer.frames[:20]
        assert env.reset()[1]["parameters"] == indexer.nominal
    with pytest.raises(ValueError, match="200 are asked for, and there are 0"):
        CrystFELTuningEnv(Scripted(lambda p: 0), TuningConfig())


def test_it_needs_a_reset_and_enough_frames():
    import gymnasium

    env, _ = scripted_env()
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.array([0.0]))
    with pytest.raises(ValueError, match="num_frames: 200 are asked for, and there are 10"):
        CrystFELTuningEnv(Scripted(lambda p: 0), TuningConfig(), FRAMES)
    with pytest.raises(ValueError, match="start: min_snr is 15, outside 3 to 12"):
        CrystFELTuningEnv(
            Scripted(lambda p: 0), TuningConfig(num_frames=10), FRAMES, Parameters(min_snr=15)
        )


def test_frames_known_at_a_setting_are_not_indexed_again():
    indexer = Scripted(lambda p: 5)
    bench = IndexerBench(indexer, FRAMES, Parameters())
    values = bench.start
    assert bench.run([0], values, 4).num_frames == 4
    assert bench.run([0], values, 10).is_indexed[0].tolist() == [True] * 5 + [False] * 5
    assert [n for _, n in indexer.calls] == [4, 6]
    bench.run([0], values, 10)
    assert bench.run([0], values, 4).is_indexed.tolist() == [[True] * 4]
    assert indexer.num_frames_run == 10
    assert bench.run([0], values, 7).num_frames == 7
    bench.run([0], values, 10)
    assert [n for _, n in indexer.calls] == [4, 6, 3], "nothing is forgotten"


def test_a_bench_runs_the_rows_that_it_is_asked_for_in_their_order():
    e = draw_experiments(np.random.default_rng(3), "normal", 3)
    bench = SurrogateBench(e, Sample.draw(np.random.default_rng(4), 3, 50))
    every = bench.run(np.arange(3), e.start, 50)
    rows = np.array([2, 0, 1])
    turned = bench.run(rows, e.start[rows], 50)
    np.testing.assert_array_equal(turned.num_peaks, every.num_peaks[rows])
    first = bench.run([1], e.start[1:2], 20)
    np.testing.assert_array_equal(first.is_indexed[0], every.is_indexed[1, :20])


def test_integers_are_observed_as_they_were_evaluated():
    """Half a range of 1..8 from 2 is 5.5 pixels: 6 are asked for, and 6 are observed."""
    indexer = Scripted(lambda p: p.min_pix_count)
    rules = TuningConfig(tunables=("min_pix_count",), num_frames=10, num_steps=2)
    env = CrystFELTuningEnv(indexer, rules, FRAMES, Parameters(min_pix_count=2))
    env.reset()
    observation, *_, info = env.step(np.array([1.0]))
    assert info["parameters"].min_pix_count == 6
    np.testing.assert_allclose(observation[:2], 2 * (6 - 1) / 7 - 1, atol=1e-6)


def test_tuned_parameters_change_and_no_others():
    start = np.array([[5.0, 33.0, 3, 17, 0.5, 0, 0]])
    scale = scale_of(("min_pix_count", "clen_offset_percent"))
    values = scale.values(np.array([[0.5, 1.0]]), start)
    np.testing.assert_array_equal(values, [[5.0, 33.0, 4, 17, 6.0, 0, 0]])


@given(st.lists(st.floats(0, 1), min_size=7, max_size=7))
def test_units_and_values_are_inverse_and_within_bounds(unit):
    scale = scale_of(ALL)
    values = scale.values(np.array([unit]), np.zeros((1, 7)))
    Parameters(**dict(zip(ALL, values[0].tolist(), strict=True)))  # would raise
    assert ((values >= scale.low) & (values <= scale.high)).all()
    again = scale.values(scale.unit(values), np.zeros((1, 7)))
    np.testing.assert_allclose(again, values, atol=1e-9)


@given(
    st.sampled_from(["continuous", "discrete"]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([ALL, ("min_snr",), ("clen_offset_percent", "min_peaks")]),
)
@settings(max_examples=20, deadline=None)
def test_whatever_is_done_observations_stay_in_their_space(action, seed, names):
    env = CrystFELTuningEnv(
        indexer := SurrogateIndexer(nominal_experiment(), num_frames=20, seed=seed % 7),
        TuningConfig(action=action, num_frames=20, num_steps=4, tunables=names),
        indexer.frames,
    )
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    assert observation in env.observation_space
    for _ in range(4):
        observation, reward, *_ = env.step(env.action_space.sample())
        assert observation in env.observation_space
        assert 0 <= reward <= 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_steps": 0}, "num_steps: must be 1 or more"),
        ({"max_change": 0}, "max_change: must be above 0"),
        ({"time_cost": float("nan")}, "time_cost"),
        ({"action": "both"}, "action: expected continuous or discrete"),
        ({"tunables": ("snr",)}, "tunables: 'snr' cannot be tuned"),
        ({"tunables": ()}, "at least one tunable"),
    ],
)
def test_rules_that_make_no_sense_are_refused(changes, says):
    with pytest.raises((ValueError, ParameterError), match=says):
        TuningConfig(**changes)


# ---- many experiments ----------------------------------------------------------------------------


def small(num_envs=8, **config):
    rules = TuningConfig(**({"num_frames": 40, "num_steps": 3} | config))
    return CrystFELVectorEnv(rules, num_envs, pool_size=16, seed=1)


@pytest.mark.parametrize("action", ["continuous", "discrete"])
def test_vector_episodes_end_together_and_begin_anew(action):
    env = small(action=action)
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    env.action_space.seed(0)
    observation, _ = env.reset(seed=3)
    assert observation in env.observation_space
    for step in range(1, 4):
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert terminated.all() == (step == 3) == terminated.any()
        assert not truncated.any() and (reward >= 0).all()
    begun, reward, terminated, *_ = env.step(env.action_space.sample())
    assert not terminated.any() and not reward.any()
    assert not np.array_equal(begun, observation)
    assert (begun[:, 37] == 1).all() and not begun[:, 38:].any(), "all steps are left"


def test_the_same_seed_gives_the_same_episodes():
    first, second = small(), small()
    a, _ = first.reset(seed=3)
    b, _ = second.reset(seed=3)
    np.testing.assert_array_equal(a, b)
    actions = np.random.default_rng(0).normal(size=(8, 7))
    for got, again in zip(first.step(actions)[:2], second.step(actions)[:2], strict=True):
        np.testing.assert_array_equal(got, again)


def test_pools_are_not_what_others_draw_from_the_same_number():
    rules = TuningConfig(num_frames=10, num_steps=1)
    pool = CrystFELVectorEnv(rules, 2, pool_size=8, seed=20210331)._pool
    validation = draw_experiments(np.random.default_rng(20210331), "normal", 8)
    assert not np.isin(pool.crystal_share, validation.crystal_share).any()


def test_every_episode_has_other_geometry_errors_and_another_start():
    """Three responses, three errors and three starts make more than three experiments."""
    rules = TuningConfig(num_frames=10, num_steps=1)
    env = CrystFELVectorEnv(rules, 200, pool_size=3, seed=1)
    env.reset()
    e = env._bench.experiments
    response, error, start = e.crystal_share, e.optimum_clen_percent, e.start[:, 0]
    for first, second in ((response, error), (response, start), (error, start)):
        assert len(set(zip(first, second, strict=True))) == 9
    pairs = set(zip(error, e.optimum_centre_px[:, 0], strict=True))
    assert len(pairs) == 3, "an error of the distance comes with its own of the centre"


def test_rewards_add_up_to_what_the_rise_is_worth():
    env = small(num_steps=6)
    env.reset(seed=5)
    begun = env._progress.best_fraction.copy()
    total = 0
    for _ in range(6):
        total = total + env.step(env.action_space.sample())[1]
    shares = [f / env._reference for f in (begun, env._progress.best_fraction)]
    np.testing.assert_allclose(total, worth(shares[1]) - worth(shares[0]))


def test_the_last_steps_to_the_best_are_worth_more_than_the_first():
    got = worth(np.array([0.0, 0.1, 0.8, 0.9, 1.05, 2.0]))
    assert got[3] - got[2] > 2 * (got[1] - got[0]) > 0
    np.testing.assert_allclose(got[-2:], -np.sqrt(0.02))


def test_what_gains_told_is_remembered_by_hand():
    """SNR 6 -> 9 (a third of the range, 10/3 typical moves) doubles the fraction of 0.3."""
    env, _ = scripted_env(max_change=1 / 3)
    env.reset()
    env.step(np.array([1.0]))
    gain = min(0.3 / 0.32, 1)
    np.testing.assert_allclose(env._progress.slope.ravel(), [gain * 10 / 3] * 2)
    observation, *_ = env.step(np.array([-1.0]))  # back to SNR 6: a third less, a loss of 0.3
    lost = 0.3 / 0.62
    expected = [0.8 * gain * 10 / 3 + lost * 10 / 3, 0.8 * gain * 10 / 3 - lost * 10 / 3]
    np.testing.assert_allclose(env._progress.slope.ravel(), expected)
    np.testing.assert_allclose(observation[-3:], [-lost, *np.clip(expected, -3, 3)], atol=1e-6)
    assert observation[-4] == pytest.approx(0.1), "one step since the best"


def test_the_single_environment_and_the_vector_play_alike():
    """One simulated experiment, once by the Indexer protocol, once in the batch."""
    e = draw_experiments(np.random.default_rng(2), "normal", 1)
    indexer = SurrogateIndexer(e, num_frames=60, seed=9)
    config = TuningConfig(num_frames=60)
    env = CrystFELTuningEnv(indexer, config, indexer.frames, indexer.start)
    observation, _ = env.reset()
    bench = SurrogateBench(e, indexer._sample)
    progress = Progress(config, e.start, Outcome.of(bench.run([0], e.start, 60)))
    np.testing.assert_allclose(observation, progress.observation()[0], atol=1e-6)
    rng = np.random.default_rng(1)
    for _ in range(5):
        action = rng.uniform(-1, 1, 7)
        observation, reward, *_ = env.step(action)
        values = progress.scale.values(progress.propose(action[None]), e.start)
        unit = progress.scale.unit(values)
        outcome = Outcome.of(bench.run([0], values, 60))
        gain = outcome.indexed_fraction - progress.best_fraction
        assert progress.update(unit, outcome, gain)[0] == pytest.approx(reward)
        np.testing.assert_allclose(observation, progress.observation()[0], atol=1e-5)


# ---- no truth in sight ---------------------------------------------------------------------------


def _moved(e, clen, x, y):
    """The same experiment under a geometry file that is wrong in another way."""
    return dataclasses.replace(
        e,
        optimum_clen_percent=e.optimum_clen_percent + clen,
        optimum_centre_px=e.optimum_centre_px + np.array([x, y]),
    )


def test_the_truth_does_not_leak():
    """Shift the truth and the proposal alike: nothing that is measured changes.

    An observation depends on the user's start and on what was measured, never on where the right
    geometry is: with the start held equal, an experiment whose truth lies elsewhere looks the same
    until a measurement tells. A policy that learned "go to the middle" would have nothing to gain:
    the middle is the start.
    """
    e = draw_experiments(np.random.default_rng(12), "normal", 40)
    e = dataclasses.replace(e, optimum_clen_percent=np.clip(e.optimum_clen_percent, -2, 2))
    sample = Sample.draw(np.random.default_rng(13), 40, 100)
    moved = _moved(e, 1.5, -1.0, 2.0)
    values = e.start.copy()
    shifted = values.copy()
    shifted[:, 4:] += [1.5, -1.0, 2.0]
    a = respond(e, sample, values)
    # chaos depends on the values themselves; without it the two are the same measurement
    calm = [dataclasses.replace(x, chaos=np.zeros(40)) for x in (e, moved)]
    a, b = respond(calm[0], sample, values), respond(calm[1], sample, shifted)
    np.testing.assert_array_equal(a.is_indexed, b.is_indexed)
    np.testing.assert_allclose(a.cell_ratio, b.cell_ratio)
    np.testing.assert_allclose(a.spot_shift_px, b.spot_shift_px)
    # an observation is a function of start, units and outcomes only
    config = TuningConfig()
    first = Progress(config, e.start, Outcome.of(a)).observation()
    second = Progress(config, moved.start, Outcome.of(a)).observation()
    np.testing.assert_array_equal(first, second)


def test_every_episode_starts_in_the_middle_of_its_own_geometry():
    env = small(num_envs=256)
    observation, _ = env.reset(seed=0)
    geometry = [i for i, name in enumerate(ALL) if TUNABLES[name].is_geometry]
    assert (observation[:, geometry] == 0).all() and (observation[:, 7:14][:, geometry] == 0).all()
    truth = env._bench.experiments.optimum_clen_percent
    nothing = observation[:, 14 + FREE_OUTPUTS.index("has_crystal")] == 0
    assert nothing.sum() > 20
    # where nothing is indexed, no linear readout of the observation knows the truth
    x = np.column_stack([observation[nothing], np.ones(nothing.sum())])
    half = nothing.sum() // 2
    weights, *_ = np.linalg.lstsq(x[:half], truth[nothing][:half], rcond=1e-6)
    error = np.abs(x[half:] @ weights - truth[nothing][half:]).mean()
    assert error > 0.8 * np.abs(truth[nothing][half:] - truth[nothing].mean()).mean()


def test_only_the_fraction_is_seen_where_that_is_asked_for():
    env = small(is_free_seen=False)
    observation, _ = env.reset(seed=0)
    free = observation[:, 14 : 14 + len(FREE_OUTPUTS)]
    assert free[:, 0].any() and not free[:, 1:].any()
