"""The exported policy: the same actions, on any session, without Ray."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.stack import SessionStack, unpack_visited
from envs.cryoem.synthetic import draw_session, synthetic_calibration
from envs.cryoem.types import NavigationConfig
from ssl2rl_ray.algorithms.networks import make_network
from ssl2rl_ray.algorithms.policy import Artefact, ArtefactError

KINDS = [("paper", "hole"), ("paper", "patch"), ("cryorl", "hole"), ("rates", "hole")]


def sessions(num, config, seed=0):
    rng = np.random.default_rng(seed)
    return SessionStack.of([draw_session(rng) for _ in range(num)], config)


def artefact(feature_set, action_level="hole", seed=0):
    config = NavigationConfig.preset(
        "cryorl", feature_set=feature_set, action_level=action_level, budget_min=60
    )
    torch.manual_seed(seed)
    network = make_network(config, sessions(1, config), is_residual=False)
    return Artefact(
        weights=network.state_dict(),
        rules=config,
        calibration=synthetic_calibration(),
        hidden_sizes=(64, 64),
        is_dueling=None,
        is_residual=False,
        margin=0.25,
        table_hashes=("0123456789abcdef",),
        labels_seen=frozenset({"0123456789ab"}),
    )


def test_a_calibration_that_is_not_used_is_said(tmp_path, demo_dir, capsys):
    from ssl2rl_ray.cli import main

    (tmp_path / "policy").mkdir()
    artefact("rates").save(tmp_path / "policy")
    rules = ["--data", str(demo_dir), "--calibration", str(demo_dir), "--budget-min", "5"]
    for policy, is_said in ((str(tmp_path / "policy"), True), ("lagrange", False)):
        for words in (["evaluate", "--episodes", "2"], ["plan", "--out", str(tmp_path / "p.csv")]):
            assert main([words[0], policy, *rules, *words[1:]]) == 0
            assert ("its own calibration" in capsys.readouterr().err) == is_said


def drive(policy, stack, config, num_steps=25, num_envs=4):
    """Plays with ``policy`` and yields the env before each of its moves, with the holes chosen."""
    env = CryoEMVectorEnv(stack, config, num_envs, effects=synthetic_calibration().effects)
    env.reset(seed=3)
    for _ in range(num_steps):
        hole = policy.act(env.compact_observation(), np.random.default_rng(0))
        yield env, hole
        env.step_holes(hole)


@pytest.mark.parametrize(("feature_set", "action_level"), KINDS)
def test_a_saved_policy_chooses_the_same_unvisited_holes_on_other_sessions(
    tmp_path, feature_set, action_level
):
    made = artefact(feature_set, action_level)
    made.save(tmp_path)
    loaded = Artefact.load(tmp_path)
    assert loaded.margin == 0.25
    assert loaded.rules == made.rules and loaded.calibration == made.calibration
    assert loaded.table_hashes == made.table_hashes and loaded.labels_seen == made.labels_seen
    stack = sessions(3, made.rules, seed=9)  # others, and larger
    first, second = made.make(stack), loaded.make(stack)
    if feature_set == "rates":
        assert second.network.margin == 0.25
    for env, hole in drive(first, stack, made.rules):
        observation = env.compact_observation()
        assert np.array_equal(second.act(observation, np.random.default_rng(1)), hole)
        visited = unpack_visited(observation, stack.shape.num_holes)
        rows = np.arange(len(hole))
        assert not visited[rows, hole].any()
        assert (hole < stack.num_holes[observation["session"][:, 0]]).all()


@pytest.mark.parametrize(("feature_set", "action_level"), KINDS)
def test_it_acts_as_the_module_does_in_rllib(feature_set, action_level):
    pytest.importorskip("ray")
    from ray.rllib.core.columns import Columns

    from ssl2rl_ray.algorithms.module import NavigationModule

    made = artefact(feature_set, action_level)
    stack = sessions(2, made.rules, seed=4)
    env = CryoEMVectorEnv(stack, made.rules, 4, effects=made.calibration.effects)
    module = NavigationModule(
        observation_space=env.single_observation_space,
        action_space=env.single_action_space,
        model_config={
            "make_network": lambda: make_network(made.rules, stack, is_residual=False),
            "epsilon": (0, 0, 1),
        },
    )
    module.network.load_state_dict(made.weights)
    policy = made.make(stack)
    observation, _ = env.reset(seed=3)
    has_ended = np.zeros(4, bool)
    for _ in range(25):
        batch = {Columns.OBS: {key: torch.as_tensor(v) for key, v in observation.items()}}
        action = module.forward_inference(batch)[Columns.ACTIONS].numpy()
        hole = policy.act(env.compact_observation(), np.random.default_rng(0))
        observation, _, terminated, _, _ = env.step(action)
        reached = env.compact_observation()["recent"][:, 0]
        assert np.array_equal(reached[~has_ended], hole[~has_ended])
        has_ended = terminated  # the next step only resets these


def test_it_loads_and_acts_where_ray_is_not_installed(tmp_path):
    artefact("rates").save(tmp_path)
    program = """
import sys
from pathlib import Path
for name in ("ray", "gymnasium.wrappers"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np
from envs.cryoem.stack import SessionStack
from envs.cryoem.synthetic import draw_session
from ssl2rl_ray.algorithms.policy import Artefact
loaded = Artefact.load(Path(sys.argv[1]))
table = draw_session(np.random.default_rng(1))
stack = SessionStack.of([table], loaded.rules)
visited = np.zeros((1, len(table)), bool)
visited[0, 5] = True
hole = loaded.make(stack).act(
    {
        "visited": np.packbits(visited, axis=1, bitorder="little"),
        "recent": np.array([[5, -1, -1, -1]], np.int32),
        "elapsed_min": np.zeros((1, 1), np.float32),
        "session": np.zeros((1, 1), np.int32),
    },
    np.random.default_rng(0),
)
assert hole.shape == (1,) and hole[0] != 5
print("hole", hole[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hole ")


def test_it_plays_by_the_rules_of_the_evaluation():
    made = artefact("paper")
    other = NavigationConfig.preset("paper", budget_min=30, num_past_steps=9)
    rules = made.make(sessions(1, made.rules), other).rules
    assert rules.minutes == other.minutes and rules.budget_min == 30
    assert (rules.feature_set, rules.num_past_steps) == ("paper", made.rules.num_past_steps)


def test_too_short_a_past_is_said():
    made = artefact("paper")
    stack = sessions(1, made.rules)
    short = NavigationConfig.preset("cryorl", num_past_steps=1, feature_set="paper")
    env = CryoEMVectorEnv(stack, short, 2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="looks 4 steps back, the observation has 1"):
        made.make(stack).act(env.compact_observation(), np.random.default_rng(0))


def test_rows_of_another_version_are_refused(tmp_path):
    artefact("rates").save(tmp_path)
    path = tmp_path / "policy.json"
    description = json.loads(path.read_text())
    for columns in (description["columns"][::-1], None):
        path.write_text(json.dumps({**description, "columns": columns}))
        with pytest.raises(ArtefactError, match=r"other candidate rows .* train it again"):
            Artefact.load(tmp_path)


def test_damaged_and_foreign_folders_are_told_apart(tmp_path):
    with pytest.raises(ArtefactError, match="not an exported policy"):
        Artefact.load(tmp_path)
    artefact("paper").save(tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())

    def written(**changes):
        (tmp_path / "policy.json").write_text(json.dumps({**description, **changes}))
        return tmp_path

    with pytest.raises(ArtefactError, match="update ssl2rl-ray"):
        Artefact.load(written(format_version=99))
    with pytest.raises(ArtefactError, match="version one"):
        Artefact.load(written(format_version="one"))
    with pytest.raises(ArtefactError, match="is damaged"):
        Artefact.load(written(rules={"minutes": [1, 2, 3, 4]}))
    loaded = Artefact.load(written(hidden_sizes=[8]))
    with pytest.raises(ArtefactError, match="weights and description differ"):
        loaded.make(sessions(1, loaded.rules))
    for text in ("[]", "[1]", "7", '"x"', "null"):
        (tmp_path / "policy.json").write_text(text)
        with pytest.raises(ArtefactError):
            Artefact.load(tmp_path)
    written()
    assert (tmp_path / "policy.safetensors").stat().st_mode & 0o077  # others may read it
    (tmp_path / "policy.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtefactError):
        Artefact.load(tmp_path)
