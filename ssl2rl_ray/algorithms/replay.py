"""Columnar replay: numpy rings over time, one column per episode stream.

Shape letters: L rows of the ring (time), S streams (episodes side by side), K pushed rows,
B batch, n = ``n_step``. Each observation is stored once: the state that a move reaches is the
next row of the same stream. An env with next-step autoreset has one row without a move between
two episodes (``is_move`` False); it holds the last observation of the episode that ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from envs.cryoem.types import BoolArray, FloatArray, IntArray

Batch = dict[str, Any]
"""``obs`` and ``next_obs`` (dicts of (B, ...)), ``action`` (B,) int64, ``reward`` (B,) float32 the
n-step return, ``discount`` (B,) float32 (0 at the end of an episode), ``weight`` (B,) float32 of
importance, ``index`` (B,) int64 to hand back to ``update_priorities``."""


class Replay:
    """A ring of ``capacity`` moves in ``num_streams`` streams, sampled in windows of n steps.

    The discount is per minute: R = sum_k gamma^(minutes before step k) r_k, and the state reached
    is discounted by gamma^(minutes of the window). Windows stop where an episode does, so the last
    moves of an episode are valid starts like all others.
    """

    def __init__(
        self,
        *,
        capacity: int,
        num_streams: int,
        n_step: int,
        discount_per_min: float,
        is_prioritized: bool = False,
        priority_exponent: float = 0.6,
    ) -> None:
        """Allocates nothing yet: the first push tells the shapes.

        Raises ValueError where the capacity cannot hold two windows in every stream.
        """
        self.num_rows = capacity // num_streams
        if self.num_rows < 2 * (n_step + 1):
            raise ValueError(
                f"buffer_capacity: {capacity} steps are {self.num_rows} rows of {num_streams} "
                f"streams; n_step {n_step} needs at least {2 * (n_step + 1) * num_streams}"
            )
        self.num_streams = num_streams
        self.n_step = n_step
        self.discount_per_min = discount_per_min
        self.is_prioritized = is_prioritized
        self.priority_exponent = priority_exponent
        shape = (self.num_rows, num_streams)
        self.observation: dict[str, np.ndarray] = {}
        self.action = np.zeros(shape, np.int32)
        self.reward = np.zeros(shape, np.float32)
        self.minutes = np.zeros(shape, np.float32)
        self.is_terminated = np.zeros(shape, np.bool_)
        self.is_truncated = np.zeros(shape, np.bool_)
        self.is_move = np.zeros(shape, np.bool_)
        self.is_linked = np.zeros(shape, np.bool_)
        """True where the next row of the stream is what this row's move led to."""
        self.is_start = np.zeros(shape, np.bool_)
        """True where a whole window begins: what may be sampled."""
        self.priority = np.zeros(shape if is_prioritized else (0, num_streams), np.float64)
        """Raised to the exponent already; 0 where no window begins."""
        self.max_priority = 1.0
        self.head = 0
        """The row that is written next."""
        self.num_pushed_rows = 0
        self._starts = np.zeros(0, np.int64)

    def __len__(self) -> int:
        """The number of moves from which a window can begin."""
        return len(self._starts)

    @property
    def payload_bytes_per_step(self) -> float:
        """Bytes that one stored step takes, everything included."""
        columns = [*self.observation.values(), *(getattr(self, name) for name in _COLUMNS)]
        return sum(column.nbytes for column in columns) / (self.num_rows * self.num_streams)

    def push(
        self,
        *,
        observation: Mapping[str, np.ndarray],
        action: IntArray,
        reward: FloatArray,
        minutes: FloatArray,
        is_terminated: BoolArray,
        is_truncated: BoolArray,
        is_move: BoolArray,
        is_continued: BoolArray,
    ) -> None:
        """Appends K rows: observations (K, S, ...), the other columns (K, S).

        ``is_continued`` (S,) is False where a stream does not go on from its last pushed row (its
        env was made anew): no window crosses that seam. Raises ValueError on a wrong shape.
        """
        num_new = len(action)
        if num_new > self.num_rows:
            raise ValueError(f"{num_new} rows do not fit a ring of {self.num_rows}")
        if action.shape != (num_new, self.num_streams):
            raise ValueError(f"action: expected (K, {self.num_streams}), found {action.shape}")
        if not self.observation:
            self.observation = {
                key: np.zeros((self.num_rows, self.num_streams, *value.shape[2:]), value.dtype)
                for key, value in observation.items()
            }
        rows = (self.head + np.arange(num_new)) % self.num_rows
        for key, column in self.observation.items():
            column[rows] = observation[key]
        self.action[rows] = action
        self.reward[rows] = reward
        self.minutes[rows] = minutes
        self.is_terminated[rows] = is_terminated
        self.is_truncated[rows] = is_truncated
        self.is_move[rows] = is_move
        self.is_start[rows] = False
        self.is_linked[rows] = True
        self.is_linked[rows[-1]] = False
        if self.num_pushed_rows:
            self.is_linked[self.head - 1] = is_continued
        self.head = (self.head + num_new) % self.num_rows
        self.num_pushed_rows += num_new
        # What may have become a whole window: the new rows and the n before them.
        num_touched = min(num_new + self.n_step, self.num_pushed_rows, self.num_rows)
        touched = (self.head - num_touched + np.arange(num_touched)) % self.num_rows
        _, is_whole = self._window(touched[:, None], np.arange(self.num_streams)[None])
        is_start = self.is_move[touched] & is_whole
        if self.is_prioritized:
            self.priority[touched] = np.where(
                is_start,
                np.where(self.is_start[touched], self.priority[touched], self.max_priority),
                0.0,
            )
        self.is_start[touched] = is_start
        self._starts = np.flatnonzero(self.is_start)

    def _window(self, row: IntArray, stream: IntArray) -> tuple[BoolArray, BoolArray]:
        """The windows that begin there: (..., n) which steps belong, (...) which are whole."""
        at = (row[..., None] + np.arange(self.n_step)) % self.num_rows, stream[..., None]
        is_terminated = self.is_terminated[at]
        has_ended = np.logical_or.accumulate(is_terminated | self.is_truncated[at], axis=-1)
        is_inside = np.ones_like(has_ended)
        is_inside[..., 1:] = ~has_ended[..., :-1]
        is_whole = (~is_inside | is_terminated | self.is_linked[at]).all(axis=-1)
        return is_inside, np.asarray(is_whole)

    def sample(
        self, batch_size: int, rng: np.random.Generator, importance_exponent: float = 1.0
    ) -> Batch:
        """Draws windows, uniformly or by priority (Schaul et al. 2016, arXiv:1511.05952, eq. 1).

        Weights are (N P(i))^-beta over their largest in the batch. Raises ValueError where nothing
        can be sampled yet.
        """
        if not len(self._starts):
            raise ValueError(f"nothing to sample: no window of {self.n_step} steps is whole yet")
        weight = np.ones(batch_size, np.float32)
        if self.is_prioritized:
            total = np.cumsum(self.priority)
            index = np.searchsorted(total, rng.random(batch_size) * total[-1], side="right")
            index = np.minimum(index, self._starts[-1])  # rounding at the very end
            probability = self.priority.ravel()[index] / total[-1]
            weight = (len(self._starts) * probability) ** -importance_exponent
            weight = (weight / weight.max()).astype(np.float32)
        else:
            index = self._starts[rng.integers(len(self._starts), size=batch_size)]
        row, stream = np.divmod(index, self.num_streams)
        is_inside, _ = self._window(row, stream)
        at = (row[:, None] + np.arange(self.n_step)) % self.num_rows, stream[:, None]
        elapsed = np.cumsum(self.minutes[at] * is_inside, axis=1, dtype=np.float64)
        discount = self.discount_per_min**elapsed
        before = np.hstack([np.ones((batch_size, 1)), discount[:, :-1]])
        reward = (before * self.reward[at] * is_inside).sum(axis=1)
        has_terminated = (self.is_terminated[at] & is_inside).any(axis=1)
        reached = (row + is_inside.sum(axis=1)) % self.num_rows
        return {
            "obs": {key: column[row, stream] for key, column in self.observation.items()},
            "next_obs": {key: column[reached, stream] for key, column in self.observation.items()},
            "action": self.action[row, stream].astype(np.int64),
            "reward": reward.astype(np.float32),
            "discount": np.where(has_terminated, 0.0, discount[:, -1]).astype(np.float32),
            "weight": weight,
            "index": index,
        }

    def update_priorities(self, index: IntArray, error: FloatArray) -> None:
        """Sets the priorities of sampled windows to (|error| + 1e-6)^exponent, both (B,)."""
        if not self.is_prioritized:
            return
        priority = (np.abs(error) + 1e-6) ** self.priority_exponent
        self.max_priority = max(self.max_priority, float(priority.max()))
        row, stream = np.divmod(index, self.num_streams)
        self.priority[row, stream] = np.where(self.is_start[row, stream], priority, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as arrays and numbers."""
        return {
            **{name: getattr(self, name) for name in _COLUMNS},
            "observation": dict(self.observation),
            "max_priority": self.max_priority,
            "head": self.head,
            "num_pushed_rows": self.num_pushed_rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The opposite of ``state_dict``; raises ValueError if the shapes are another replay's."""
        for name in _COLUMNS:
            if np.shape(state[name]) != getattr(self, name).shape:
                raise ValueError(
                    f"{name}: stored replay is {np.shape(state[name])}, this one is "
                    f"{getattr(self, name).shape}: resume with the same buffer_capacity and envs"
                )
            getattr(self, name)[:] = state[name]
        self.observation = {key: np.array(value) for key, value in state["observation"].items()}
        self.max_priority = float(state["max_priority"])
        self.head, self.num_pushed_rows = int(state["head"]), int(state["num_pushed_rows"])
        self._starts = np.flatnonzero(self.is_start)


_COLUMNS = (
    "action",
    "reward",
    "minutes",
    "is_terminated",
    "is_truncated",
    "is_move",
    "is_linked",
    "is_start",
    "priority",
)
