"""Policies as files, advantages by hand, a short training with RLlib, and the comparison."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from envs.crystfel.env import Outcome, SurrogateBench
from envs.crystfel.rivals import RIVALS, Trace, tune
from envs.crystfel.surrogate import (
    Sample,
    SurrogateIndexer,
    best_fraction,
    draw_experiments,
    nominal_experiment,
    true_fraction,
)
from envs.crystfel.types import Parameters, TuningConfig
from ssl2rl_ray.tuning.compare import (
    Arena,
    _judge,
    best_of_simulated,
    compare,
    contestants,
    draw_comparison,
    format_comparison,
    real,
    simulated,
)
from ssl2rl_ray.tuning.policy import PolicyError, TuningPolicy, make_network

RULES = TuningConfig(tunables=("min_snr", "clen_offset_percent"), num_frames=30, num_steps=4)


def policy(config=RULES, seed=0):
    torch.manual_seed(seed)
    network = make_network(config, (8, 8))
    return TuningPolicy.of(network.state_dict(), config, (8, 8))


@pytest.mark.parametrize("action", ["continuous", "discrete"])
def test_a_policy_survives_its_files(tmp_path, action):
    rules = TuningConfig(tunables=RULES.tunables, action=action)
    ours = policy(rules)
    ours.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"policy.json", "policy.safetensors"}
    again = TuningPolicy.load(tmp_path)
    observation = np.random.default_rng(0).normal(size=(5, 34)).astype(np.float32)
    np.testing.assert_array_equal(again.act(observation), ours.act(observation))
    spread = [p.act(observation, np.random.default_rng(1)) for p in (ours, again)]
    np.testing.assert_array_equal(*spread)
    assert again.config == rules
    assert ours.act(observation).shape == ((5, 2) if action == "continuous" else (5,))


def test_the_spread_is_the_networks():
    """log sd = log 0.2 in every state."""
    ours = policy()
    head = ours.network[-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.3, -0.1, np.log(0.2), np.log(0.2)]))
    observation = np.zeros((4000, 34), np.float32)
    np.testing.assert_allclose(ours.act(observation[:1]), [[0.3, -0.1]], atol=1e-6)
    drawn = ours.act(observation, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.mean(0), [0.3, -0.1], atol=0.02)
    np.testing.assert_allclose(drawn.std(0), [0.2, 0.2], atol=0.02)


def test_no_spread_is_less_than_what_was_trained_with_and_a_stuck_one_is_wider():
    """log sd = -9 is cut off at -2.6; after five evaluations without a gain an sd is .12."""
    ours = policy()
    with torch.no_grad():
        ours.network[-1].weight.zero_()
        ours.network[-1].bias.copy_(torch.tensor([0.0, 0.0, -9.0, -9.0]))
    observation = np.zeros((4000, 34), np.float32)
    drawn = ours.act(observation, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.std(0), np.exp(-2.6), rtol=0.05)
    e = draw_experiments(np.random.default_rng(0), "normal", 1).select(np.zeros(2000, int))
    bench = SurrogateBench(e, Sample.draw(np.random.default_rng(1), 2000, 5))
    outcome = Outcome.of(bench.run(np.arange(2000), bench.start, 5))
    optimiser = ours.make(RULES, bench.start, outcome, np.random.default_rng(0))
    begun = optimiser.progress.best_unit[0, 1]
    for num_without, sd in ((4, np.exp(-2.6)), (5, 0.12)):
        optimiser.progress.num_since_best[:] = num_without
        spread = (optimiser.ask()[:, 1] - begun).std()
        assert spread == pytest.approx(sd * RULES.max_change, rel=0.1)


def _without(key):
    def change(text):
        found = json.loads(text)
        del found[key]
        return json.dumps(found)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: "not json", "is not an exported policy"),
        (lambda text: text.replace("ssl2rl-tuning-policy", "other"), "format 'other'"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 9'), "update ssl2rl"),
        (lambda text: text.replace('"cell_ratio"', '"cell"'), "learned from other outputs"),
        (_without("hidden_sizes"), "damaged"),
        (lambda text: text.replace('"min_snr"', '"snr"'), "damaged: tunables: 'snr'"),
        (lambda text: text.replace("8,", "9,"), "weights and description differ"),
    ],
)
def test_a_damaged_policy_is_refused_with_the_reason(tmp_path, change, says):
    policy().save(tmp_path)
    path = tmp_path / "policy.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(PolicyError, match=says):
        TuningPolicy.load(tmp_path)


def test_a_policy_tunes_what_it_learned_to_and_nothing_else():
    e = draw_experiments(np.random.default_rng(0), "normal", 3)
    bench = SurrogateBench(e, Sample.draw(np.random.default_rng(1), 3, 30))
    trace = tune(bench, RULES, policy().make, num_evaluations=7, rng=np.random.default_rng(0))
    assert trace.unit.shape == (7, 3, 2)
    with pytest.raises(PolicyError, match="policy ppo tunes min_snr, clen_offset_percent"):
        tune(bench, TuningConfig(), policy().make, num_evaluations=2, rng=np.random.default_rng(0))


def test_it_acts_without_ray(tmp_path):
    policy().save(tmp_path)
    code = (
        "import sys; from ssl2rl_ray.tuning.policy import TuningPolicy; import numpy as np\n"
        f"TuningPolicy.load({str(tmp_path)!r}).act(np.zeros((1, 34)))\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


# ---- training ------------------------------------------------------------------------------------


SMALL = [
    "kind=crystfel",
    "env.num_steps=5",
    "env.num_frames=40",
    "env.tunables=[min_snr, clen_offset_percent]",
    "experiments.pool_size=32",
    "training.num_envs=16",
    "training.num_env_steps=240",
    "training.evaluation_interval_steps=160",
    "training.num_validation_experiments=8",
    "algorithm.hidden_sizes=[16, 16]",
]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("algorithm", "action"),
    [("ppo", "continuous"), ("ppo", "discrete"), ("a2c", "continuous"), ("a2c", "discrete")],
)
def test_a_run_trains_stops_and_goes_on(tmp_path, algorithm, action):
    from ssl2rl_ray.config import load_config
    from ssl2rl_ray.launch import run_config
    from ssl2rl_ray.runs import RunDirectory

    rows = []
    config = load_config(None, [*SMALL, f"env.action={action}", f"algorithm.name={algorithm}"])

    def stop(row):
        rows.append(row)
        if row["num_env_steps"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_config(config, tmp_path / "run", progress=stop)
    assert [row["num_env_steps"] for row in rows] == [0, 160]
    summary = run_config(config, tmp_path / "run", resume=True, progress=rows.append)
    assert summary["num_env_steps"] == 240 and summary["num_updates"] == 3
    run = RunDirectory.open(tmp_path / "run")
    metrics = run.metrics()
    assert metrics["num_env_steps"].tolist() == [0, 160, 240]
    for name in ("loss", "policy_loss", "value_loss", "entropy", "learning_rate", "gradient_norm"):
        assert np.isfinite(metrics[f"train/{name}"].iloc[1:]).all()
    found = TuningPolicy.load(tmp_path / "run")
    assert (found.config, found.name) == (config.env, algorithm)
    # what was exported is what RLlib would do
    state = torch.load(run.best / "state.pt", weights_only=True)["module"]
    last = len(found.network) - 1
    torch.testing.assert_close(found.network[-1].bias, state[f"network.policy.{last}.bias"])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("action", ["continuous", "discrete"])
def test_the_exported_policy_is_rllibs(action):
    import functools

    from ray.rllib.core import DEFAULT_MODULE_ID
    from ray.rllib.core.columns import Columns

    from ssl2rl_ray.algorithms.registry import ALGORITHMS
    from ssl2rl_ray.config import load_config
    from ssl2rl_ray.local_ray import local_ray
    from ssl2rl_ray.tuning.train import network_of, policy_of, sampling, training_env

    config = load_config(None, [*SMALL, "algorithm.name=a2c", f"env.action={action}"])
    with local_ray(1):
        algorithm = ALGORITHMS["a2c"](
            config.algorithm,
            sampling(config),
            make_env=functools.partial(training_env, config),
            make_network=functools.partial(network_of, config),
            seed=0,
        )
        algorithm.train()
        assert algorithm.num_env_steps == 5 * 16  # all but the steps in which episodes begin
        observation = np.random.default_rng(0).normal(size=(6, 34)).astype(np.float32)
        module = algorithm.learner_group._learner.module[DEFAULT_MODULE_ID]
        theirs = module.forward_inference({Columns.OBS: torch.as_tensor(observation)})
        ours = policy_of(algorithm.network_state(), config)
        algorithm.stop()
    np.testing.assert_array_equal(ours.act(observation), theirs[Columns.ACTIONS].numpy())


# ---- comparison ----------------------------------------------------------------------------------


def test_contestants_by_name_and_folder(tmp_path):
    policy().save(tmp_path)
    assert list(contestants(["rules"], [str(tmp_path)])) == ["rules", "ppo"]
    assert list(contestants([], [str(tmp_path)] * 2)) == ["ppo-1", "ppo-2"]
    with pytest.raises(ValueError, match="no rival is called 'rule'"):
        contestants(["rule"])


def test_simulated_experiments_are_compared_at_equal_frames():
    arenas = simulated("normal", 6, 50, seed=3)
    found = compare(
        arenas,
        {name: RIVALS[name] for name in ("keep-initial", "rules")},
        TuningConfig(num_frames=50),
        budget_frames=1000,
        num_first_frames=20,
        best=best_of_simulated(arenas),
    )
    assert found.budgets[0] == 50 and found.budgets[-1] == 1000
    assert found.reached["rules"].shape == (6, len(found.budgets))
    start = true_fraction(arenas[0].bench.experiments, arenas[0].bench.start)
    np.testing.assert_array_equal(found.reached["keep-initial"][:, -1], start)
    assert found.reached["rules"][:, -1].mean() > 1.5 * start.mean()
    document = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert document["contestants"]["keep-initial"]["frames_to_95"] is None
    text = format_comparison(document)
    assert "keep-initial" in text and "never" in text
    assert draw_comparison(document)[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="budget_frames: 90 is spent"):
        compare(arenas, {}, TuningConfig(num_frames=50), budget_frames=90)


def test_every_seed_has_frames_and_luck_of_its_own():
    indexer = SurrogateIndexer(nominal_experiment(), num_frames=100)
    arenas = real(indexer, indexer.frames, Parameters(), num_seeds=2, num_frames=20,
                  num_judged=30, seed=1)  # fmt: skip
    first, second = (arena.bench.frames for arena in arenas)
    assert len(set(first)) == 20 and set(first) != set(second)
    same = [Arena(bench=arenas[0].bench, judge=arenas[0].judge)] * 2
    arenas[0].bench.results.clear()
    compare(same, {"random": RIVALS["random"]}, TuningConfig(num_frames=20), budget_frames=60,
            num_first_frames=None)  # fmt: skip
    tried = [parameters for parameters, _ in arenas[0].bench.results]
    assert len(set(tried)) == 1 + 2 * 2, "the start, and two tries of each seed"


def test_what_was_recommended_within_a_budget_is_judged():
    """Evaluations end at 100, 180 and 200 frames: at 150 the first one is all there is."""
    values = np.arange(3.0)[:, None, None] * np.ones((3, 1, 7))
    trace = Trace(
        unit=np.zeros((3, 1, 7)),
        best_values=values,
        best_fraction=np.zeros((3, 1)),
        num_frames=np.array([[100], [180], [200]]),
    )
    judged = _judge(lambda v: v[:, 0] / 10, trace, np.array([100, 150, 180, 199, 200, 999]))
    np.testing.assert_allclose(judged, [[0, 0, 0.1, 0.1, 0.2, 0.2]])


def test_a_real_experiment_is_judged_on_frames_that_nobody_tuned_on():
    indexer = SurrogateIndexer(nominal_experiment(), num_frames=100)
    seen = []

    class Watched:
        version = indexer.version

        def run(self, parameters, frames):
            seen.append((parameters, set(frames)))
            return indexer.run(parameters, frames)

    arenas = real(
        Watched(), indexer.frames, Parameters(min_snr=9, clen_offset_percent=3),
        num_seeds=2, num_frames=40, num_judged=50, seed=1,
    )  # fmt: skip
    found = compare(
        arenas,
        {"keep-initial": RIVALS["keep-initial"], "rules": RIVALS["rules"]},
        TuningConfig(num_frames=40),
        budget_frames=400,
        num_first_frames=None,
    )
    tuned = {frame for _, frames in seen if len(frames) == 40 for frame in frames}
    for arena in arenas:
        assert isinstance(arena, Arena)
        sample = set(arena.bench.frames)
        judges = [frames for _, frames in seen if len(frames) == 50]
        assert len(sample) == 40 and sample <= tuned
        assert any(not sample & frames for frames in judges)
    assert found.reached["rules"][:, -1].mean() > found.reached["keep-initial"][:, -1].mean()
    with pytest.raises(ValueError, match="the experiment has 100"):
        real(indexer, indexer.frames, Parameters(), num_seeds=1, num_frames=80, num_judged=30,
             seed=0)  # fmt: skip


def test_the_best_is_no_less_than_the_defaults_at_the_right_geometry():
    from envs.crystfel.surrogate import at_optimum

    e = draw_experiments(np.random.default_rng(1), "normal", 20)
    assert (best_fraction(e, 400) >= true_fraction(e, at_optimum(e), 400)).all()


def test_the_command_begins_where_it_is_told_to(tmp_path, capsys):
    """A start with a distance far off indexes nothing, and one out of bounds is refused."""
    from envs.crystfel.sfx.simulate import simulate
    from ssl2rl_ray.cli import main

    simulate("clean", 8, 3, tmp_path / "data")
    (tmp_path / "data" / "experiment.geom").rename(tmp_path / "data" / "mine.geom")
    asked = ["sfx", "compare", "--data", str(tmp_path / "data"), "--frames", "4",
             "--judge-frames", "4", "--budget-frames", "8", "--seeds", "1", "--race-frames", "0",
             "--against", "keep-initial", "--geometry", str(tmp_path / "data" / "mine.geom"),
             "--json"]  # fmt: skip
    for start, is_blind in (("clen_offset_percent=6", True), ("min_peaks=5", False)):
        assert main([*asked, "--set", start]) == 0
        found = json.loads(capsys.readouterr().out)["contestants"]["keep-initial"]["fraction"]
        assert (found[-1] == 0) == is_blind
    assert main([*asked, "--set", "min_peaks=9999"]) == 2
    assert "start: min_peaks is 9999, outside 0 to 100" in capsys.readouterr().err


def test_the_command_compares_and_says_what_is_wrong(tmp_path, capsys):
    from ssl2rl_ray.cli import main

    small = ["sfx", "compare", "--seeds", "3", "--frames", "40", "--budget-frames", "400",
             "--race-frames", "15"]  # fmt: skip
    figure = tmp_path / "curves.png"
    asked = [*small, "--against", "keep-initial,rules", "--figure", str(figure), "--json"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["contestants"]) == ["keep-initial", "rules"] and found["num_seeds"] == 3
    assert figure.read_bytes()[:4] == b"\x89PNG"
    for wrong, says in (
        (["--against", "rule"], "no rival is called 'rule'"),
        (["--policy", str(tmp_path)], "is not an exported policy"),
        (["--data", str(tmp_path), "--kind", "harder"], "--kind"),
        (["--seeds", "0"], "--seeds: must be 1 or more"),
        (["--set", "min_snr=9"], "--set: is of a data folder"),
    ):
        assert main([*small, *wrong]) == 2
        assert says in capsys.readouterr().err
