"""Asynchronous advantage actor-critic on RLlib: each runner's fragment is learned from as it comes.

This is IMPALA (Espeholt et al. 2018, arXiv:1802.01561) with A2C's loss and modules. No runner waits
for another one or for the learner: a runner that has answered gets the newest weights and plays on
while its fragment is learned from, so a fragment is always a few updates old (``policy_lag``), and
V-trace corrects for it. Requests are those of RLlib's IMPALA (its actor manager: a runner that dies
is replaced and asked again); its learner thread, aggregators, GPU loaders and state server are not
used: one learner of networks this small has nothing for them to do. There is no replay.

It differs from A3C (Mnih et al. 2016, arXiv:1602.01783), whose asynchrony it keeps:

- In A3C each actor computes gradients with its own, old weights and adds them to shared weights
  that have changed meanwhile (Hogwild); here actors send experience, and one learner computes
  gradients at the weights that it changes.
- In A3C the lag between acting and learning is ignored; here V-trace corrects returns and policy
  gradient by pi / mu, cut off at ``max_rho`` and ``max_c``.
- A3C's actors share RMSProp's moments and play one episode each, on the CPU; here each runner plays
  many side by side, and one optimiser sees all.

Shape letters: T steps of a fragment, E episodes side by side.
"""

# RLlib's annotations say None where a built object has a value, and more of the kind:
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import time
from typing import Any

import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)
from torch import Tensor

from ssl2rl_ray.algorithms.a2c import (
    A2C,
    A2CAlgorithmConfig,
    A2CTorchLearner,
    MakeEnv,
    MakeNetwork,
    Potential,
    common_settings,
)
from ssl2rl_ray.algorithms.policy_losses import mean_over
from ssl2rl_ray.algorithms.returns import next_values, v_trace
from ssl2rl_ray.algorithms.runner import Columnar
from ssl2rl_ray.config import TrainingConfig
from ssl2rl_ray.recipes import AsyncA2CConfig

_PLAY = "play"
"""Tag of the requests to runners."""
_PATIENCE_S = 0.002
"""How long to wait for all runners before looking which of them have answered."""


class AsyncA2CAlgorithmConfig(A2CAlgorithmConfig):
    """RLlib's config object, carrying ours; made by ``build`` and by nothing else."""

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        """``recipe`` and ``num_env_steps`` (of the whole run) are set by ``build``."""
        super().__init__(algo_class=algo_class or AsyncA2C)
        self.recipe: Any = AsyncA2CConfig()

    def get_default_learner_class(self) -> type[TorchLearner]:
        """The learner that belongs to this algorithm."""
        return AsyncA2CTorchLearner

    def validate(self) -> None:
        """A2C's checks, and ValueError without a runner that could be asynchronous."""
        super().validate()
        if not self.in_evaluation and not self.num_env_runners:
            raise ValueError(
                "num_env_runners: asynchronous learning needs at least 1 (training.num_env_runners "
                "of a config); to play in the learner's own process use a2c"
            )


class AsyncA2CTorchLearner(A2CTorchLearner):
    """A2C's learner with V-trace in place of generalised advantages."""

    def advantage_and_target(
        self, fragment: dict[str, Tensor], values: Tensor, logp: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(T, E) each, from columns (T, E), values (T + 1, E) and log-probabilities (T, E)."""
        recipe, value, is_move = self.config.recipe, values[:-1], fragment["is_move"]
        # rows that are no moves carry whatever was drawn there: as likely then as now
        behaviour = torch.where(is_move, fragment[Columns.ACTION_LOGP], logp)
        target, advantage = v_trace(
            logp,
            behaviour,
            fragment[Columns.REWARDS],
            value,
            next_values(value, values[-1]),
            fragment["is_terminated"],
            fragment["is_truncated"],
            fragment["discount"],
            trace_decay=recipe.trace_decay,
            max_rho=recipe.max_rho,
            max_c=recipe.max_c,
        )
        off_policy = mean_over((logp - behaviour).abs(), is_move)
        self.metrics.log_value((DEFAULT_MODULE_ID, "log_ratio"), off_policy, window=1)
        return advantage, target


class AsyncA2C(A2C):
    """Learns from whatever fragments are there, and never waits for all runners."""

    @classmethod
    def get_default_config(cls) -> AlgorithmConfig:
        """The config class that belongs to this algorithm."""
        return AsyncA2CAlgorithmConfig()

    def setup(self, config: AlgorithmConfig) -> None:
        """Builds runners and learner."""
        super().setup(config)
        self.policy_lag = 0
        """Updates between the weights that played the last fragment and those it changed."""

    def training_step(self) -> None:
        """The fragments that are there, at least one if any runner lives: an update for each."""
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            answers = self._fetch()
        for num_updates_then, fragment, result in answers:
            self.metrics.aggregate([result], key=ENV_RUNNER_RESULTS)
            self.episode_returns.extend(fragment["episode_returns"])
            self.num_env_steps += int(fragment["is_move"].sum())
            with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
                self.metrics.aggregate(self.learn(fragment), key=LEARNER_RESULTS)
            self.policy_lag = self.num_updates - num_updates_then
            self.num_updates += 1

    def _fetch(self) -> list[tuple[int, Columnar, Any]]:
        """What runners have sent; those without a request are asked first, then it is learned."""
        group = self.env_runner_group
        give_up = time.monotonic() + float(self.config.sample_timeout_s or 60.0)
        while True:
            answers = group.fetch_ready_async_reqs(tags=_PLAY, timeout_seconds=_PATIENCE_S)
            if group.num_in_flight_async_reqs(_PLAY) < group.num_healthy_remote_workers():
                with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
                    group.foreach_env_runner_async(self._request(), tag=_PLAY)
            if answers or time.monotonic() > give_up or not group.num_healthy_remote_workers():
                return [answer for _, answer in answers]

    def _request(self) -> Any:
        """For a runner without a request: to play a fragment with the newest weights."""
        state = ray.put(self.runner_state())
        return functools.partial(_play_fragment, state=state, num_updates=self.num_updates)


def _play_fragment(runner: Any, *, state: Any, num_updates: int) -> tuple[int, Columnar, Any]:
    """On the runner: the updates that its weights have seen, the fragment, what was logged."""
    runner.set_state(ray.get(state))
    return num_updates, runner.sample(), runner.get_metrics()


def build(
    config: AsyncA2CConfig,
    training: TrainingConfig,
    *,
    make_env: MakeEnv,
    make_network: MakeNetwork,
    seed: int,
    potential: Potential | None = None,
) -> AsyncA2C:
    """The algorithm; one ``train()`` is an update for each fragment that has come.

    ``ssl2rl_ray.config.check`` says which settings go together; ``config`` must have ``discount``.
    Two runs with one seed differ: which fragment comes first is a matter of time.
    """
    rllib = AsyncA2CAlgorithmConfig()
    rllib.recipe, rllib.discount = config, config.discount
    rllib.num_env_steps = training.num_env_steps
    common_settings(rllib, config, training, make_env, make_network, seed, potential)
    algorithm = rllib.build_algo()
    assert isinstance(algorithm, AsyncA2C)
    return algorithm
