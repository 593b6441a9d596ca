"""Train a policy that chooses holes: config -> sessions -> env and network -> RLlib -> files.

Everything random hangs on ``config.seed``, except the validation, which is the same for all seeds.
Runners and learner make sessions and networks from the config, wherever they are: nothing large
travels. Shape letters: E episodes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.cryoem.calibration import Calibration, fit_calibration
from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.rates import bound_of
from envs.cryoem.rewards import highest_return
from envs.cryoem.stack import SessionStack
from envs.cryoem.synthetic import PRESETS, draw_session, redraw_labels, synthetic_calibration
from envs.cryoem.types import FloatArray, HoleTable, NavigationConfig
from ssl2rl_ray.algorithms.actor_critic import NavigationActorCritic, make_actor_critic
from ssl2rl_ray.algorithms.networks import QNetwork, Support, choose, make_network, support_of
from ssl2rl_ray.algorithms.policy import Artefact
from ssl2rl_ray.config import NavigationRunConfig, check, navigation_config
from ssl2rl_ray.data.folder import read_dataset
from ssl2rl_ray.data.splits import label_marks
from ssl2rl_ray.evaluate import contestant, draw_tour
from ssl2rl_ray.learn import Task, learn, training_row
from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.recipes import PolicyAlgorithm, RainbowConfig, ValueAlgorithm
from ssl2rl_ray.runs import RunDirectory

_VALIDATION_SEED = 20210331
_STARTS_PER_SESSION = 8
"""Episodes on each real validation session."""


# ---- sessions ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Sessions:
    """What a run trains and validates on."""

    config: NavigationRunConfig
    calibration: Calibration
    train: tuple[HoleTable, ...]
    """Real sessions, calibrated, without the validation grids."""
    validation: tuple[HoleTable, ...]
    """Real sessions and grids that nothing is learned from."""
    base_logits: tuple[FloatArray, ...]
    """(N,) each: what labels of ``train`` are redrawn from."""
    labels_seen: frozenset[str]
    """``label_marks`` of every real label that a policy of this run depends on."""

    def draw(self, rng: np.random.Generator) -> HoleTable:
        """One session to train on, by ``config.sessions``; drawn ones may be without labels."""
        table = self.draw_labelled(rng)
        share = self.config.sessions.unlabelled
        if share == 0 or any(table is real for real in self.train) or rng.random() >= share:
            return table
        return table.replace(is_labelled=np.zeros(len(table), bool))

    def draw_labelled(self, rng: np.random.Generator, *, is_real_allowed: bool = True) -> HoleTable:
        """One session with all its labels, by the weights of ``config.sessions``."""
        sessions = self.config.sessions
        weight = np.array([sessions.real, sessions.redrawn, sessions.synthetic])
        if not is_real_allowed:
            weight = weight if weight[1:].any() else np.array([0.0, 1.0, 0.0])
            weight = weight * [0, 1, 1]
        kind = rng.choice(3, p=weight / weight.sum())
        if kind == 2:
            return draw_session(rng, sessions.preset)
        which = int(rng.integers(len(self.train)))
        if kind == 0:
            return self.train[which]
        preset = PRESETS[sessions.preset]
        return redraw_labels(
            self.train[which],
            self.base_logits[which],
            self.calibration.effects,
            rng,
            effects_jitter=preset.effects_jitter,
            session_bias_sd=preset.session_bias_sd,
            low_ctf_threshold_A=navigation_config(self.config.env).low_ctf_threshold_A,
            preset=preset,
        )


@functools.lru_cache(maxsize=4)
def sessions_of(config: NavigationRunConfig) -> Sessions:
    """Reads the datasets and fits (or takes) the calibration.

    Raises ValueError for grids that are in no training session, where none would be left, and for
    a session of one hole.
    """
    rules, data = navigation_config(config.env), config.data
    train, validation = [], [read_dataset(path).table for path in data.validation]
    unknown = set(data.validation_grids)
    for path in data.train:
        table = read_dataset(path).table
        unknown -= set(table.grid_name)
        is_held_out = np.isin(table.grid_name, data.validation_grids)[table.grid_id]
        if is_held_out.all():
            raise ValueError(f"data.validation_grids: nothing of {path} is left to train on")
        train.append(table.select(~is_held_out) if is_held_out.any() else table)
        if is_held_out.any():
            validation.append(table.select(is_held_out))
    if unknown:
        raise ValueError(f"data.validation_grids: no grid {sorted(unknown)[0]!r} in data.train")
    if any(len(table) < 2 for table in (*train, *validation)):
        raise ValueError("data: a session (or its part in validation_grids) has only one hole")
    calibration, fitted_on = _calibration(config, train, rules)
    return Sessions(
        config=config,
        calibration=calibration,
        train=tuple(calibration.apply(table) for table in train),
        validation=tuple(calibration.apply(table) for table in validation),
        base_logits=tuple(calibration.base_logit(table) for table in train),
        labels_seen=frozenset().union(
            *(label_marks(table) for table in (*train, *validation, *fitted_on))
        ),
    )


def data_hashes(config: NavigationRunConfig) -> dict[str, str]:
    """``content_hash`` by path of all that a run reads; raises as ``sessions_of`` does."""
    sessions_of(config)
    data = config.data
    paths = (*data.train, *data.validation, *([data.calibration] if data.calibration else []))
    return {path: read_dataset(path).table.content_hash for path in paths}


def _calibration(
    config: NavigationRunConfig, train: list[HoleTable], rules: NavigationConfig
) -> tuple[Calibration, list[HoleTable]]:
    """Of the folder that is named, else fitted on what is trained on, else the preset's.

    And the tables on whose labels it was fitted.
    """
    if config.data.calibration is not None:
        dataset = read_dataset(config.data.calibration)
        if dataset.calibration is None:
            return fit_calibration(dataset.table, rules), [dataset.table]
        is_model = dataset.manifest["provenance"].get("importer") == "synthetic"
        return Calibration.from_json(dataset.calibration), [] if is_model else [dataset.table]
    if train:
        return fit_calibration(_together(train), rules), train
    return synthetic_calibration(config.sessions.preset), []


def _together(tables: list[HoleTable]) -> HoleTable:
    """One table of several sessions, their names told apart by a number."""
    if len(tables) == 1:
        return tables[0]

    def names(level: str) -> np.ndarray:
        return np.concatenate(
            [
                np.char.add(f"{i}/", getattr(t, f"{level}_name")[getattr(t, f"{level}_id")])
                for i, t in enumerate(tables)
            ]
        )

    columns = ("ctf_max_resolution_A", "predicted_ctf_A", "p_low_ctf", "is_labelled", "x", "y")
    return HoleTable.from_names(
        hole_name=np.concatenate([np.char.add(f"{i}/", t.hole_name) for i, t in enumerate(tables)]),
        grid=names("grid"),
        square=names("square"),
        patch=names("patch"),
        **{name: np.concatenate([getattr(t, name) for t in tables]) for name in columns},
    )


@functools.lru_cache(maxsize=4)
def session_pool(config: NavigationRunConfig) -> SessionStack | None:
    """The sessions that are replayed; None = drawn afresh every episode."""
    sessions, rules = sessions_of(config), navigation_config(config.env)
    if config.sessions.redrawn == config.sessions.synthetic == 0:
        return SessionStack.of(sessions.train, rules)
    if config.sessions.pool_size is None:
        return None
    rng = np.random.default_rng([config.seed, 2])
    return SessionStack.of([sessions.draw(rng) for _ in range(config.sessions.pool_size)], rules)


@functools.lru_cache(maxsize=4)
def validation_stack(config: NavigationRunConfig) -> SessionStack:
    """The fixed set of validation sessions: drawn ones, then real ones several times."""
    sessions = sessions_of(config)
    rng = np.random.default_rng(_VALIDATION_SEED)
    num_drawn = config.training.num_validation_sessions
    drawn = [sessions.draw_labelled(rng, is_real_allowed=False) for _ in range(num_drawn)]
    real = [table for table in sessions.validation for _ in range(_STARTS_PER_SESSION)]
    return SessionStack.of([*drawn, *real], navigation_config(config.env))


# ---- env and network -----------------------------------------------------------------------------


def training_env(config: NavigationRunConfig, *, num_envs: int, seed: int) -> CryoEMVectorEnv:
    """The env of one runner."""
    sessions = sessions_of(config)
    pool = session_pool(config)
    return CryoEMVectorEnv(
        [] if pool is None else pool,
        navigation_config(config.env),
        num_envs,
        draw_session=sessions.draw if pool is None else None,
        budget_range_min=config.sessions.budget_range_min,
        effects=sessions.calibration.effects,
        seed=seed,
    )


def network_for(
    config: NavigationRunConfig, stack: SessionStack | None, initial_noise: float | None = None
) -> QNetwork | NavigationActorCritic:
    """The network that the config asks for, on a stack of sessions; without noise it is judged."""
    algorithm = config.algorithm
    if isinstance(algorithm, PolicyAlgorithm):
        return make_actor_critic(
            navigation_config(config.env),
            stack,
            hidden_sizes=algorithm.hidden_sizes,
            is_residual=is_residual(config),
            prior_scale=algorithm.prior_scale,
        )
    return make_network(
        navigation_config(config.env),
        stack,
        hidden_sizes=algorithm.hidden_sizes,
        is_dueling=algorithm.dueling,
        is_residual=is_residual(config),
        prior_scale=algorithm.reward_scale,
        margin=algorithm.margin * algorithm.reward_scale,
        support=support_for(config),
        initial_noise=initial_noise,
    )


def training_network(config: NavigationRunConfig) -> QNetwork | NavigationActorCritic:
    """The network on the training sessions, with noise where the algorithm explores by it."""
    algorithm, noise = config.algorithm, None
    if isinstance(algorithm, RainbowConfig) and algorithm.is_noisy:
        noise = algorithm.initial_noise
    return network_for(config, session_pool(config), noise)


def support_for(config: NavigationRunConfig) -> Support | None:
    """Where returns can lie, for algorithms that learn their distribution.

    From 0 to what the largest budget can pay at best. Of a shaped reward the return is what a
    session brings beyond its bound: a wasted minute loses no more than the best minute pays, and
    luck with labels is given a quarter of that upwards. Measured on drawn sessions, in shares of
    the best: random moves -1.06 to 0.01, the planner's -0.36 to 0.11.
    """
    algorithm, rules = config.algorithm, navigation_config(config.env)
    if not isinstance(algorithm, RainbowConfig):
        return None
    budget_min = max(config.sessions.budget_range_min or (rules.budget_min,))
    highest = highest_return(rules, budget_min, algorithm.discount_per_min)
    shaped = (-highest, highest / 4)
    return support_of(algorithm, *(shaped if is_shaped(config) else (0.0, highest)))


def is_residual(config: NavigationRunConfig) -> bool:
    """Whether the network begins as the planner: as asked, else where the rows carry it."""
    asked = config.algorithm.is_residual
    return _has_rates(config) if asked is None else asked


def is_shaped(config: NavigationRunConfig) -> bool:
    """Whether the dual bound shapes the reward: as asked, else where the rows carry it."""
    asked = config.algorithm.is_shaped
    return _has_rates(config) if asked is None else asked


def _has_rates(config: NavigationRunConfig) -> bool:
    return navigation_config(config.env).feature_set == "rates"


def dual_bound(observation: dict[str, np.ndarray]) -> FloatArray:
    """(E,) bound of the reward still to come, from ``rows`` (E, C, F)."""
    return bound_of(observation["rows"])


class Validation:
    """The policy on the same sessions from the same starts, in one vectorised batch."""

    def __init__(self, config: NavigationRunConfig) -> None:
        """Stacks the sessions and makes a network of its own on them."""
        stack = validation_stack(config)
        self.num_real = len(sessions_of(config).validation) * _STARTS_PER_SESSION
        self.num_episodes = len(stack.num_holes)
        self.network = network_for(config, stack)
        self.env = CryoEMVectorEnv(
            stack,
            navigation_config(config.env),
            self.num_episodes,
            effects=sessions_of(config).calibration.effects,
        )

    def play(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        """Means over episodes: of all (``episode_return``), drawn and real ones apart."""
        self.network.load_state_dict(weights)
        returns = play(self.env, self.network)
        row = {"validation/episode_return": float(returns.mean())}
        if self.num_real:
            row["validation/real_return"] = float(returns[-self.num_real :].mean())
            row["validation/drawn_return"] = float(returns[: -self.num_real].mean())
        return row


def play(env: CryoEMVectorEnv, network: QNetwork | NavigationActorCritic) -> FloatArray:
    """(E,) returns of one episode in each of the env's sessions, in order."""
    observation, _ = env.reset(seed=_VALIDATION_SEED, options={"session": np.arange(env.num_envs)})
    returns, is_running = np.zeros(env.num_envs), np.ones(env.num_envs, bool)
    while is_running.any():
        observation, reward, terminated, truncated, _ = env.step(choose(network, observation))
        returns += reward * is_running
        is_running &= ~(terminated | truncated)
    return returns


# ---- the loop ------------------------------------------------------------------------------------


def train(
    config: NavigationRunConfig,
    run: RunDirectory,
    *,
    progress: Callable[[dict[str, Any]], None] | None = None,
    is_drawn: bool = False,
) -> dict[str, Any]:
    """Trains to the end, from the run's latest checkpoint if it has one.

    Args:
        config: what the run was begun with.
        run: open for writing; gets metrics, checkpoints, TensorBoard events, the best policy (by
            validation) and the summary.
        progress: told each row of metrics; None prints a line to stderr.
        is_drawn: whether TensorBoard gets a map of the best policy's tour now and then.

    Returns:
        The summary.

    Raises:
        ValueError: settings (``config.check``) or data that do not go together, by name.
        KeyboardInterrupt: after Ctrl-C, once the state is safe on disk.
    """
    from ssl2rl_ray.algorithms.registry import ALGORITHMS

    check(config)
    training = config.training
    torch.set_num_threads(training.num_torch_threads)
    sessions = sessions_of(config)
    run.write_calibration(sessions.calibration.to_json())
    with local_ray(training.num_env_runners + 1), contextlib.ExitStack() as stack:
        algorithm = ALGORITHMS[config.algorithm.name](
            config.algorithm,
            training,
            make_env=functools.partial(training_env, config),
            make_network=functools.partial(training_network, config),
            seed=config.seed,
            potential=dual_bound if is_shaped(config) else None,
        )
        stack.callback(algorithm.stop)
        validation = Validation(config)
        task = Task(
            criterion="validation/episode_return",
            best_name="best_validation_return",
            validate=validation.play,
            save_policy=lambda weights, folder: _artefact(config, weights).save(folder),
            training_row=functools.partial(training_row, algorithm, config.algorithm),
            checkpoint=_checkpoint(config, algorithm),
            progress=progress or _print_row,
            draw=functools.partial(_map_of, config) if is_drawn else None,
        )
        return learn(config, run, algorithm, task)


def _map_of(config: NavigationRunConfig, policy: Path) -> dict[str, np.ndarray]:
    """The tour of an exported policy on a real session, or on a drawn one where there is none."""
    real = [*config.data.validation, *config.data.train]
    table = (
        read_dataset(real[0]).table
        if real
        else draw_session(np.random.default_rng(0), config.sessions.preset)
    )
    return {"map": draw_tour(contestant(str(policy)), table, navigation_config(config.env))}


def _checkpoint(config: NavigationRunConfig, algorithm: Any) -> Callable[[], dict[str, Any]]:
    if isinstance(config.algorithm, ValueAlgorithm):
        return functools.partial(algorithm.checkpoint, has_replay=config.training.is_buffer_saved)
    return algorithm.checkpoint


def _artefact(config: NavigationRunConfig, weights: dict[str, torch.Tensor]) -> Artefact:
    algorithm, sessions = config.algorithm, sessions_of(config)
    of_values: dict[str, Any] = {}
    if isinstance(algorithm, ValueAlgorithm):
        of_values = {
            "is_dueling": algorithm.dueling,
            "margin": algorithm.margin * algorithm.reward_scale,
            "support": support_for(config),
        }
    return Artefact(
        weights=weights,
        rules=navigation_config(config.env),
        calibration=sessions.calibration,
        has_values=isinstance(algorithm, ValueAlgorithm),
        hidden_sizes=algorithm.hidden_sizes,
        is_residual=is_residual(config),
        table_hashes=tuple(table.content_hash for table in sessions.train),
        labels_seen=sessions.labels_seen,
        name=algorithm.name,
        **of_values,
    )


def _print_row(row: dict[str, Any]) -> None:
    parts = [f"{row['num_env_steps']:>9,} env steps"]
    parts += [f"validation {row['validation/episode_return']:.1f}"]
    if row.get("train/episode_return") is not None:
        parts += [f"training {row['train/episode_return']:.1f}"]
    if "train/env_steps_per_s" in row:
        parts += [f"{row['train/env_steps_per_s']:,.0f} steps/s"]
    print("  ".join(parts), file=sys.stderr, flush=True)
