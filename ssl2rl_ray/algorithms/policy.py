"""A trained policy that acts with torch alone: two files, no Ray, no pickle.

policy.safetensors   the weights
policy.json          what they expect: feature set and its columns, rules, layers, calibration
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from envs.cryoem.calibration import Calibration
from envs.cryoem.stack import Observation, SessionStack, unpack_visited
from envs.cryoem.types import FeatureSet, FloatArray, IntArray, NavigationConfig
from ssl2rl_ray.algorithms.actor_critic import make_actor_critic
from ssl2rl_ray.algorithms.networks import Support, choose_and_value, make_network

FORMAT = "ssl2rl-policy"
FORMAT_VERSION = 1
_LEARNED_WITH = ("feature_set", "action_level", "num_past_steps", "num_candidates")


def _columns(feature_set: FeatureSet) -> list[str] | None:
    """What the rows of ``rates`` contain: it may differ between versions of this program."""
    from envs.cryoem.rates import FEATURES

    return list(FEATURES) if feature_set == "rates" else None


class ArtefactError(ValueError):
    """A folder is not a policy that this program can use; the message says why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Artefact:
    """Weights and all that is needed to act with them on any session."""

    weights: dict[str, Tensor]
    rules: NavigationConfig
    """As in training: feature set and action level are the policy's own."""
    calibration: Calibration
    """Turns another session's predictions into the probabilities that the policy expects."""
    hidden_sizes: tuple[int, ...]
    is_residual: bool
    has_values: bool = True
    """Of actions (networks.py); else a policy and the value of its state (actor_critic.py)."""
    is_dueling: bool | None = None
    margin: float = 0.0
    """Of action values (networks.py)."""
    support: Support | None = None
    """Of the distributions whose means are the action values, where they are (rainbow.py)."""
    table_hashes: tuple[str, ...] = ()
    """Sessions that it was trained on, as far as they were real."""
    labels_seen: frozenset[str] = frozenset()
    """``ssl2rl_ray.evaluate.label_marks`` of all that was trained, calibrated or selected on."""
    name: str = "dqn"

    def save(self, folder: Path) -> None:
        """Writes both files; the folder exists."""
        weights = {name: value.detach().cpu().contiguous() for name, value in self.weights.items()}
        # not `save_file`: it makes a file that nobody but its owner may read
        (folder / "policy.safetensors").write_bytes(save(weights))
        description = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "rules": dataclasses.asdict(self.rules),
            "calibration": self.calibration.to_json(),
            "hidden_sizes": list(self.hidden_sizes),
            "has_values": self.has_values,
            "is_dueling": self.is_dueling,
            "is_residual": self.is_residual,
            "margin": self.margin,
            "support": self.support,
            "columns": _columns(self.rules.feature_set),
            "table_hashes": list(self.table_hashes),
            "labels_seen": sorted(self.labels_seen),
            "num_parameters": sum(value.numel() for value in weights.values()),
        }
        (folder / "policy.json").write_text(json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads both files; raises ArtefactError where they are no policy of ours."""
        try:
            description: dict[str, Any] = dict(json.loads((folder / "policy.json").read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"{folder} is not an exported policy ({error}): give the `policy` folder of a run"
            ) from error
        version = description.get("format_version", 0)
        is_known = isinstance(version, int) and version <= FORMAT_VERSION
        if description.get("format") != FORMAT or not is_known:
            raise ArtefactError(
                f"{folder}: format {description.get('format')!r} version {version}; this program "
                f"reads {FORMAT!r} up to {FORMAT_VERSION}: update ssl2rl-ray"
            )
        try:
            rules: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in description["rules"].items()
            }
            rules_found = NavigationConfig(**rules)
            if description.get("columns") != _columns(rules_found.feature_set):
                raise ArtefactError(
                    f"{folder}: the policy learned from other candidate rows than this version of "
                    "ssl2rl-ray makes: train it again, or use the version that trained it"
                )
            return cls(
                weights=load_file(folder / "policy.safetensors"),
                rules=rules_found,
                calibration=Calibration.from_json(description["calibration"]),
                hidden_sizes=tuple(description["hidden_sizes"]),
                has_values=description.get("has_values", True),
                is_dueling=description["is_dueling"],
                is_residual=description["is_residual"],
                margin=description.get("margin", 0.0),
                support=None if (atoms := description.get("support")) is None else tuple(atoms),
                table_hashes=tuple(description["table_hashes"]),
                labels_seen=frozenset(description.get("labels_seen", ())),
                name=description["name"],
            )
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            if isinstance(error, ArtefactError):
                raise
            raise ArtefactError(f"{folder}: the policy is damaged: {error}") from error

    def make(self, stack: SessionStack, rules: NavigationConfig | None = None) -> TorchPolicy:
        """The policy on these sessions, whose ``p_low_ctf`` come from ``calibration``.

        ``rules`` may have other minutes, rewards and budget than in training. Raises ArtefactError
        where the weights do not fit the network that the description asks for.
        """
        learned = {name: getattr(self.rules, name) for name in _LEARNED_WITH}
        rules = dataclasses.replace(rules or self.rules, **learned)
        common: Any = {"hidden_sizes": self.hidden_sizes, "is_residual": self.is_residual}
        if self.has_values:
            network = make_network(
                rules,
                stack,
                is_dueling=self.is_dueling,
                margin=self.margin,
                support=self.support,
                **common,
            )
        else:
            network = make_actor_critic(rules, stack, **common)
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            raise ArtefactError(
                f"policy {self.name}: weights and description differ: {error}"
            ) from error
        return TorchPolicy(network.eval().requires_grad_(False), stack, rules, self)


class TorchPolicy:
    """``envs.cryoem.stack.Policy``: the greedy policy of a network."""

    def __init__(
        self, network: Any, stack: SessionStack, rules: NavigationConfig, artefact: Artefact
    ) -> None:
        """Use ``Artefact.make``."""
        self.name = artefact.name
        self.network = network
        self.stack = stack
        self.rules = rules
        self.artefact = artefact
        self.effects = artefact.calibration.effects
        self._layout: Any = None  # the sessions gathered for ``rates``, by their rows
        if (expander := getattr(network, "expander", None)) is not None:
            hashes = tuple(str(value) for value in stack.table_hash)
            assert expander.table_hash == hashes, "the expander has another stack's tables"

    def on(self, stack: SessionStack) -> TorchPolicy:
        """The same policy on other sessions."""
        return self.artefact.make(stack, self.rules)

    def act(self, observation: Observation, rng: np.random.Generator) -> IntArray:
        """(E,) the hole of the highest value; raises ValueError where ``recent`` is too short."""
        return self.decide(observation, rng)[0]

    def decide(
        self, observation: Observation, rng: np.random.Generator
    ) -> tuple[IntArray, FloatArray]:
        """``act``, and (E,) float32 the action value of that move, in one forward pass.

        NaN of a network without action values.
        """
        if self.rules.feature_set == "rates":
            return self._best_candidate(observation)[1:]
        num_needed = self.rules.num_past_steps
        if observation["recent"].shape[1] < num_needed:
            raise ValueError(
                f"policy {self.name} looks {num_needed} steps back, the observation has "
                f"{observation['recent'].shape[1]}: play with num_past_steps {num_needed}"
            )
        observation = {**observation, "recent": observation["recent"][:, :num_needed]}
        action, value = self._choose(observation)
        if self.rules.action_level == "hole":
            return action, value
        session = observation["session"][:, 0]
        slots = self.stack.slot_hole[session, action]  # (E, K), best prediction first
        visited = unpack_visited(observation, self.stack.shape.num_holes)
        is_open = (slots >= 0) & ~np.take_along_axis(visited, np.maximum(slots, 0), 1)
        return slots[np.arange(len(slots)), is_open.argmax(1)], value

    def decide_run(
        self, observation: Observation, rng: np.random.Generator
    ) -> tuple[IntArray, FloatArray]:
        """(E, R) the next holes of each episode, -1 after the end; (E,) the value of going there.

        Under ``rates`` a move is followed by all holes of its patch that are worth their minutes,
        by the planner's price, without asking the network again; else R is 1.
        """
        if self.rules.feature_set != "rates":
            hole, value = self.decide(observation, rng)
            return hole[:, None], value
        from envs.cryoem.rates import num_in_run, run_from

        row, hole, value = self._best_candidate(observation)
        left = self._minutes_left(observation)
        visited = unpack_visited(observation, self.stack.shape.num_holes)
        count = num_in_run(row, left, self.rules)
        return run_from(self.stack, observation["session"][:, 0], visited, hole, count), value

    def _choose(self, observation: Observation) -> tuple[IntArray, FloatArray]:
        action, score = choose_and_value(self.network, observation)
        return action, score if self.artefact.has_values else np.full_like(score, np.nan)

    def _minutes_left(self, observation: Observation) -> FloatArray:
        return np.maximum(self.rules.budget_min - observation["elapsed_min"][:, 0], 0)

    def _best_candidate(self, observation: Observation) -> tuple[FloatArray, IntArray, FloatArray]:
        """(E, F) the row that the network prefers, (E,) its hole and its value."""
        from envs.cryoem.belief import Layout
        from envs.cryoem.rates import candidate_rows

        session = observation["session"][:, 0]
        key = session.tobytes()
        if self._layout is None or self._layout[0] != key:
            self._layout = key, Layout.of(self.stack, session, self.effects)
        rows, hole, mask = candidate_rows(
            self.stack,
            session,
            unpack_visited(observation, self.stack.shape.num_holes),
            observation["recent"][:, 0],
            self._minutes_left(observation),
            self.rules,
            self.effects,
            layout=self._layout[1],
        )
        action, value = self._choose({"rows": rows, "action_mask": mask})
        at = np.arange(len(hole)), action
        return rows[at], hole[at], value
