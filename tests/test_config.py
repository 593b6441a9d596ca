"""The config loader: what it accepts, what it says about the rest, and round trips."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cryoem.types import ActionLevel, FeatureSet, NavigationConfig, Preset
from ssl2rl_ray.config import (
    DataConfig,
    EnvConfig,
    NavigationRunConfig,
    PerceptionRunConfig,
    SessionsConfig,
    TrainingConfig,
    check,
    describe,
    from_dict,
    load_config,
    navigation_config,
)
from ssl2rl_ray.recipes import DQNConfig
from ssl2rl_ray.schema import ConfigError, to_dict, to_yaml

TUNE_CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[1] / "tune_configs").glob("*.yaml"))
    if "\nspace:" not in path.read_text()  # sweeps: tests/test_configs.py
]


def load(tmp_path: Path, text: str | bytes, *overrides: str) -> NavigationRunConfig:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


def problems(tmp_path: Path, text: str | bytes, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, *overrides)
    assert all(problem in str(error.value) for problem in error.value.problems)
    return error.value.problems


# ------------------------------------------------------------ known answers


def test_defaults_are_valid_and_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config() == NavigationRunConfig() == load(tmp_path, "") == load(tmp_path, "# c\n")
    check(NavigationRunConfig())


def test_a_file_with_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        kind: navigation
        seed: 7
        data: {train: [a, b], validation_grids: [g1]}
        env:
          preset: cryorl
          minutes: [1, 2.5, 6, 8]
        algorithm:
          learning_rate: 1e-3
          hidden_sizes: [32]
        training:
          num_env_steps: 2e5
        sessions:
        """,
        "env.budget_min=120",
        "algorithm.final_learning_rate=1e-6",
        "sessions.pool_size=.5e2",
        "data.train=[c]",
        "env.feature_set=rates",
        "env.feature_set=",
    )
    assert config.seed == 7
    assert config.data == DataConfig(train=("c",), validation_grids=("g1",))
    expected = EnvConfig(preset="cryorl", minutes=(1.0, 2.5, 6.0, 8.0), budget_min=120.0)
    assert config.env == expected
    assert config.algorithm == DQNConfig(
        learning_rate=0.001, final_learning_rate=1e-6, hidden_sizes=(32,)
    )
    assert config.training == TrainingConfig(num_env_steps=200_000)
    assert isinstance(config.training.num_env_steps, int)
    assert config.sessions == SessionsConfig(pool_size=50)


def test_navigation_config_is_the_preset_with_changes() -> None:
    assert navigation_config(EnvConfig(preset="cryorl")) == NavigationConfig.preset("cryorl")
    changed = navigation_config(EnvConfig(preset="cryorl", budget_min=120.0, feature_set="rates"))
    assert changed == NavigationConfig.preset("cryorl", budget_min=120.0, feature_set="rates")


# ------------------------------------------------------------ what is said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sede: 1", ["sede: unknown key; did you mean seed?"]),
        ("env: {budget: 3}", ["env.budget: unknown key; did you mean env.budget_min?"]),
        ("data: {zzzzz: 3}", ["data.zzzzz: unknown key; it has train, validation, "]),
        ("1: 2", ["1: unknown key"]),
        ("null: 2", ["None: unknown key"]),
        ("seed: one", ["seed: expected a whole number, found text 'one'"]),
        ("seed: 1.5", ["seed: expected a whole number, found 1.5"]),
        ("seed: true", ["seed: expected a whole number, found True"]),
        ("seed:", ["seed: expected a whole number, found nothing"]),
        ("seed: -1", ["seed: must be 0 or more and below 2**32, found -1"]),
        ("algorithm: {double_q: 1}", ["algorithm.double_q: expected true or false, found 1"]),
        (
            "env: {budget_min: .inf}",
            ["env.budget_min: expected a finite number or null, found inf"],
        ),
        (
            "env: {budget_min: .nan}",
            ["env.budget_min: expected a finite number or null, found nan"],
        ),
        ("env: 3", ["env: expected a section (preset, budget_min, "]),
        ("env: [1]", ["env: expected a section"]),
        ("data: {train: a}", ["data.train: expected a list (text each), found text 'a'"]),
        ("data: {train: [1]}", ["data.train: expected a list (text each), found a list [1]"]),
        (
            "env: {minutes: [1, 2, 3]}",
            ["env.minutes: expected a list of 4 (a finite number each) or null, found a list"],
        ),
        ("env: {preset: cryrl}", ["env.preset: expected one of paper, cryorl, leginon-2021"]),
        ("kind: crystfel\nenv: {num_steps: 0}", ["env.num_steps: must be 1 or more, found 0"]),
        (
            "kind: crystfel\nenv: {tunables: [snr]}",
            ["env.tunables: 'snr' cannot be tuned; there are min"],
        ),
        ("kind: [1]", ["kind: expected navigation, perception, ssl2rl, crystfel, found a list"]),
        (
            "algorithm: {name: sarsa}",
            [
                "algorithm.name: expected one of dqn, rainbow, a2c, async_a2c, acktr, ppo, found "
                "text 'sarsa'"
            ],
        ),
        (
            "algorithm: {name: async_a2c, max_c: 2.0}",
            [
                "training.num_env_runners: async_a2c needs at least 1 beside its learner",
                "algorithm.max_c: is above algorithm.max_rho",
            ],
        ),
        (
            "algorithm: {name: acktr, n_step: 3, trace_decay: 0.5, moment_decay: 1.0}",
            [
                "algorithm.trace_decay: is ignored by n-step returns",
                "algorithm.moment_decay: is 1, so that nothing new would count",
            ],
        ),
        (
            "seed: x\nenv: {budget: 1}\nzzzzzz: 1",
            ["seed: expected a whole number", "env.budget: unknown", "zzzzzz: unknown key; it has"],
        ),
        ("seed: 1\nseed: 2", ["line 2, column 1: the key 'seed' is there twice"]),
        ("env:\n  preset: paper\n  preset: paper", ["line 3, column 3: the key 'preset'"]),
        ("a: [1", ["line 1, column 6: "]),
        ("a: !!python/object:os.system x", ["line 1, column 4: could not determine a constructor"]),
        ("? [1]\n: 2", ["line 1, column 3: found unhashable key"]),
        ("- 1", ["expected `key: value` lines, found a list [1]"]),
        ("just text", ["expected `key: value` lines, found text 'just text'"]),
        ("seed: 2021-99-99", ["not valid YAML: month must be in 1..12"]),
        ("seed: " + "9" * 5000, ["not valid YAML: "]),
        ("seed: " + "9" * 400, ["seed: expected a whole number"]),
        ("env: {budget_min: " + "9" * 400 + "}", ["env.budget_min: expected a finite number"]),
        ("[" * 5000, ["not valid YAML: "]),
        ("seed: &a [*a]", ["seed: expected a whole number, found a list [[["]),
        (b"seed: \xff", ["not UTF-8 text (byte 6)"]),
        (b"#" * (2**20 + 1), ["larger than"]),
    ],
)
def test_each_mistake_is_named(tmp_path: Path, text: str | bytes, expected: list[str]) -> None:
    found = problems(tmp_path, text)
    assert len(found) == len(expected)
    for problem, beginning in zip(found, expected, strict=True):
        assert problem.startswith(beginning)
        assert len(problem) < 500


def test_a_bomb_of_aliases_is_shown_briefly(tmp_path: Path) -> None:
    lines = ["seed: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    found = problems(tmp_path, "\n".join([*lines, "training: *a11"]))
    assert max(map(len, found)) < 500


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["seed"], "expected a.b=value"),
        (["=3"], "expected a.b=value"),
        (["env..preset=3"], "expected a.b=value"),
        (["seed.x=3"], "seed: expected a whole number"),
        (["seed=3", "seed.x=3"], "seed is not a section"),
        (["seed=[1"], "--set 'seed=[1'"),
        (["env.budgt_min=3"], "did you mean env.budget_min?"),
        (
            ["sessions.preset=aldolas"],
            "expected one of aldolase, demo, y3, y3-mini, found 'aldolas'",
        ),
        (["sessions.synthetic=0"], "all 0; one needs a positive weight"),
        (["sessions.synthetic=-1"], "sessions.synthetic: must be 0 or more, found -1.0"),
        (["sessions.real=1"], "sessions.real: is above 0 but data.train names no session"),
        (["sessions.redrawn=1"], "sessions.redrawn: is above 0 but data.train"),
        (["data.validation_grids=[a]"], "but data.train is empty"),
        (["data.train=[a]", "data.validation=[a]"], "'a' is a training session"),
        (["data.train=[a, a]"], "data.train: a name is empty or there twice"),
        (["data.train=['']"], "data.train: a name is empty or there twice"),
        (["sessions.pool_size=null"], "needs env.feature_set rates, not paper"),
        (["sessions.pool_size=0"], "sessions.pool_size: must be above 0"),
        (["sessions.budget_range_min=[480, 120]"], "expected 0 < low <= high"),
        (["sessions.budget_range_min=[0, 120]"], "expected 0 < low <= high"),
        (["env.minutes=[1, 0, 6, 8]"], "env.minutes: every move takes time"),
        (["env.reward=[1, 0, 0.5, 0.2]"], "env.reward: must be above 0"),
        (["env.budget_min=0"], "env.budget_min: must be positive"),
        (["env.num_past_steps=0"], "env.num_past_steps: at least 1"),
        (["algorithm.learning_rate=0"], "algorithm.learning_rate: must be above 0, found 0.0"),
        (["algorithm.is_shaped=true"], "the bound is in feature_set rates, not paper"),
        (["algorithm.is_residual=true"], "surplus is in feature_set rates, not paper"),
        (["algorithm.margin=0.5"], "algorithm.margin: needs the planner"),
        (["algorithm.margin=-1"], "algorithm.margin: must be 0 or more, found -1.0"),
        (["algorithm.final_learning_rate=1"], "is above algorithm.learning_rate"),
        (["algorithm.discount_per_min=1.01"], "must be at most 1, found 1.01"),
        (["algorithm.epsilon_final=0.5"], "is above algorithm.epsilon_initial"),
        (["algorithm.hidden_sizes=[]"], "at least one layer"),
        (["algorithm.hidden_sizes=[64, 0]"], "must be above 0, found [64, 0]"),
        (["algorithm.buffer_capacity=10"], "is below algorithm.batch_size"),
        (["algorithm.buffer_capacity=255"], "32 episodes side by side need at least 256"),
        (["training.rollout_length=2000"], "32 episodes side by side need at least 64000"),
        (["algorithm.priority_exponent=0.7"], "priority_exponent: is ignored by uniform replay"),
        (["algorithm.importance_exponent=1"], "importance_exponent: is ignored by uniform"),
        (["algorithm.dueling=true"], "algorithm.dueling: a row is centred"),
        (["env.low_ctf_threshold_A=4"], "sessions.synthetic: its probabilities are of 6 Å"),
        (
            ["env.low_ctf_threshold_A=4", "data.calibration=a"],
            "data.calibration: its probabilities are of 6 Å, while env.low_ctf_threshold_A is 4",
        ),
        (["algorithm.n_step=0"], "algorithm.n_step: must be above 0"),
        (["algorithm.target_update_rate=0"], "algorithm.target_update_rate: must be above 0"),
        (["training.num_env_steps=2000"], "it would never learn"),
        (["training.num_env_runners=-1"], "training.num_env_runners: must be 0 or more"),
        (["algorithm.name=a2c", "algorithm.epsilon_initial=0.1"], "epsilon_initial: unknown key"),
        (
            ["algorithm.name=a2c", "algorithm.n_step=5", "algorithm.trace_decay=0.9"],
            "algorithm.trace_decay: is ignored by n-step returns",
        ),
        (["algorithm.name=a2c", "algorithm.final_entropy_weight=1"], "is above entropy_weight"),
        (["algorithm.name=a2c", "algorithm.is_shaped=true"], "the bound is in feature_set rates"),
        (["algorithm.name=a2c", "algorithm.prior_scale=2"], "is ignored without the planner's"),
        (["algorithm.name=ppo", "training.is_buffer_saved=true"], "ppo has no replay"),
        (["algorithm.name=ppo", "algorithm.num_minibatches=300"], "has only 256 env steps"),
        (["kind=crystfel", "algorithm.num_minibatches=9999"], "has only 4864 env steps"),
        (["kind=crystfel", "algorithm.final_learning_rate=1"], "is above algorithm.learning_rate"),
        (
            ["kind=ssl2rl", "algorithm.name=a2c", "loop.methods=[q-values]"],
            "q-values need action values, and a2c learns none",
        ),
    ],
)
def test_each_contradiction_is_named(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert expected in str(error.value)


def numbers(cls: type[Any], path: str = "") -> Iterator[str]:
    """Dotted paths of every field that holds numbers."""
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers(cast(type[Any], hint), f"{name}.")
        elif re.search(r"\b(int|float)\b", str(hint)):
            yield path + name


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.train=[a]"], "data.train: unknown key"),
        (["data.preset=y4"], "expected one of aldolase, demo, y3, y3-mini, found 'y4'"),
        (["data.preset=demo", "data.dataset=a"], "data.dataset names a folder; drop one"),
        (["data.validation_share=1"], "data.validation_share: must be below 1"),
        (["data.labelled_fraction=1.5"], "data.labelled_fraction: must be at most 1"),
        (["data.labelled_fraction=1"], "1 leaves nothing unlabelled for fixmatch"),
        (
            ["data.validation_labelled_fraction=0.1", "training.num_folds=0"],
            "data.validation_labelled_fraction: is for the hierarchical posterior",
        ),
        (["data.validation_labelled_fraction=1"], "1 leaves no hole to validate on"),
        (["classifier.network=vgg"], "expected one of resnet18, cnn"),
        (["classifier.dropout=1.2"], "classifier.dropout: must be below 1"),
        (["training.ema_decay=1"], "training.ema_decay: must be below 1"),
        (["training.confidence_threshold=0.4"], "a confidence is between 0.5 and 1"),
        (["training.num_folds=1"], "1 would leave nothing to train on"),
        (["training.num_epochs=5", "training.num_warmup_epochs=5"], "is not below training.num_"),
        (["training.pseudo_labels=a"], "training.pseudo_labels: is of finetuning only"),
        (
            ["training.method=supervised", "training.unsupervised_weight=5"],
            "is of fixmatch, finetuning only, and training.method is supervised",
        ),
        (
            ["training.method=supervised", "training.confidence_threshold=0.9"],
            "training.confidence_threshold: is of fixmatch only",
        ),
        (["training.method=finetuning", "training.is_aligned=true"], "is of fixmatch only"),
        (["training.method=finetuning"], "training.pseudo_labels: finetuning needs the file"),
        (["training.method=finetuning"], "classifier.initial: finetuning needs the run"),
        (["compute.num_workers=3"], "64 cannot be shared equally by 3 workers"),
        (["compute.device=tpu"], "expected one of auto, cpu, cuda"),
    ],
)
def test_each_contradiction_of_a_perception_run_is_named(overrides, expected) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, ["kind=perception", *overrides])
    assert expected in str(error.value)


@pytest.mark.parametrize("path", list(numbers(PerceptionRunConfig)))
def test_no_number_of_a_perception_run_may_be_anything(path: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(path)):
        load_config(None, ["kind=perception", f"{path}=-1"])


def test_a_perception_config_can_be_described_and_loaded_again(tmp_path: Path) -> None:
    config = load_config(None, ["kind=perception", "data.labelled_fraction=0.1"])
    assert isinstance(config, PerceptionRunConfig)
    (tmp_path / "a.yaml").write_text(describe(config))
    assert load_config(tmp_path / "a.yaml") == config
    assert "SSL²-RL" in describe(config)


@pytest.mark.parametrize("path", list(numbers(NavigationRunConfig)))
def test_no_number_may_be_anything(path: str) -> None:
    section, _, name = path.rpartition(".")
    config = NavigationRunConfig()
    default = getattr(getattr(config, section) if section else config, name)
    value = {"budget_range_min": [-1, 1], "minutes": [-1] * 4, "reward": [-1] * 4}.get(name)
    value = [-1] if isinstance(default, tuple) else value or -1
    with pytest.raises(ConfigError, match=re.escape(path)):
        load_config(None, [f"{path}={value}"])


def test_fresh_sessions_go_with_rates() -> None:
    config = load_config(None, ["sessions.pool_size=null", "env.feature_set=rates"])
    assert config.sessions.pool_size is None
    real = ["sessions.pool_size=null", "sessions.real=1", "sessions.synthetic=0", "data.train=[a]"]
    assert load_config(None, real).sessions.real == 1


def test_another_threshold_goes_with_real_and_redrawn_sessions() -> None:
    own = ["sessions.synthetic=0", "sessions.redrawn=1", "data.train=[a]"]
    assert load_config(None, ["env.low_ctf_threshold_A=4", *own]).env.low_ctf_threshold_A == 4
    weights = ["algorithm.is_prioritized=true", "algorithm.priority_exponent=0.7"]
    assert load_config(None, weights).algorithm.priority_exponent == 0.7


def test_check_sees_what_python_built() -> None:
    config = NavigationRunConfig(algorithm=DQNConfig(learning_rate=float("nan")))
    with pytest.raises(ConfigError, match=r"algorithm\.learning_rate"):
        check(config)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


# ------------------------------------------------------------ ways out


def test_describe_documents_every_section_and_shows_what_a_preset_means() -> None:
    text = describe(NavigationRunConfig(env=EnvConfig(preset="cryorl")))
    assert "# Where sessions come from." in text
    assert "  # Transitions.\n  buffer_capacity: 50000" in text
    assert "  minutes: null  # preset: [1, 2, 6, 8]" in text
    assert all(len(line) <= 110 for line in text.splitlines())


@pytest.mark.parametrize("path", TUNE_CONFIGS, ids=lambda path: path.name)
def test_every_config_in_the_repository_loads(path: Path) -> None:
    config = load_config(path)
    assert from_dict(to_dict(config)) == config


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8) | st.sampled_from(
    [
        "1e-3",
        "1.5e3",
        "null",
        "yes",
        "0x1f",
        "1:30",
        "~",
        "- a",
        "a: b",
        "#",
        "{",
        "2021-01-01",
        "=",
    ]
)
PATHS = st.lists(NAMES, unique=True, max_size=3).map(tuple)
POSITIVE = st.floats(1e-12, 1e12)
FOUR = st.none() | st.tuples(POSITIVE, POSITIVE, POSITIVE, POSITIVE)


@st.composite
def configs(draw: st.DrawFn) -> NavigationRunConfig:
    rates = sorted(draw(st.tuples(st.floats(1e-9, 1), st.floats(1e-9, 1))))
    epsilons = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    train = draw(st.lists(NAMES, unique=True, min_size=1, max_size=3))
    budgets = draw(st.none() | st.tuples(POSITIVE, POSITIVE))
    return NavigationRunConfig(
        seed=draw(st.integers(0, 2**32 - 1)),
        data=DataConfig(
            train=tuple(train),
            validation=tuple(v for v in draw(PATHS) if v not in train),
            validation_grids=draw(PATHS),
            calibration=draw(st.none() | NAMES),
        ),
        sessions=SessionsConfig(
            real=draw(st.floats(0.1, 3)),
            redrawn=draw(st.floats(0, 3)),
            pool_size=draw(st.integers(1, 10**6)),
            budget_range_min=None if budgets is None else (min(budgets), max(budgets)),
        ),
        env=EnvConfig(
            preset=draw(st.sampled_from(get_args(Preset))),
            budget_min=draw(st.none() | POSITIVE),
            is_threshold_inclusive=draw(st.none() | st.booleans()),
            action_level=draw(st.none() | st.sampled_from(get_args(ActionLevel))),
            feature_set=draw(st.none() | st.sampled_from(get_args(FeatureSet))),
            num_past_steps=draw(st.none() | st.integers(1, 9)),
            minutes=draw(FOUR),
            reward=draw(FOUR),
        ),
        algorithm=DQNConfig(
            learning_rate=rates[1],
            final_learning_rate=rates[0],
            epsilon_initial=epsilons[1],
            epsilon_final=epsilons[0],
            hidden_sizes=tuple(draw(st.lists(st.integers(1, 999), min_size=1, max_size=4))),
            is_prioritized=draw(st.booleans()),
        ),
        training=TrainingConfig(num_env_steps=draw(st.integers(2001, 10**12))),
    )


@settings(max_examples=200, deadline=None)
@given(config=configs())
def test_round_trips(tmp_path_factory: pytest.TempPathFactory, config: NavigationRunConfig) -> None:
    assert from_dict(to_dict(config)) == config
    folder = tmp_path_factory.mktemp("yaml")
    assert load(folder, to_yaml(config)) == config
    assert load(folder, describe(config)) == config


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
FIELDS = [f.name for f in dataclasses.fields(NavigationRunConfig)]


@settings(max_examples=300, deadline=None)
@given(values=st.dictionaries(NAMES | st.sampled_from(FIELDS), VALUES, max_size=5))
def test_any_values_are_a_config_or_a_config_error(values: dict[str, Any]) -> None:
    try:
        config = from_dict(values)
    except ConfigError as error:
        assert error.problems
    else:
        assert from_dict(to_dict(config)) == config


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "ignore"))
)
def test_any_file_is_a_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    try:
        load(tmp_path_factory.mktemp("any"), data)
    except ConfigError as error:
        assert error.problems
