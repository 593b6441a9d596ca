"""The stages of a round, each a folder that is made once: classifier, policy, evaluation, labels.

What the loop (``ssl2rl``) strings together. A stage whose folder is complete is read, one that was
begun goes on, so that a run that was killed loses nothing and does nothing twice. Shape letters: N
holes of the session, T of its training squares, M roll-outs, E episodes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from envs.cryoem.calibration import Calibration
from envs.cryoem.nested import sums_of_squares
from envs.cryoem.planners import make_planner
from envs.cryoem.stack import Policy, SessionStack
from envs.cryoem.types import BoolArray, FloatArray, HoleTable, IntArray, NavigationConfig
from envs.cryoem.types import RandomEffects as Effects
from ssl2rl_ray.config import (
    EnvConfig,
    LoopConfig,
    Method,
    NavigationRunConfig,
    PerceptionRunConfig,
    SSL2RLRunConfig,
    navigation_config,
)
from ssl2rl_ray.data.folder import write_dataset
from ssl2rl_ray.data.splits import split_by_square
from ssl2rl_ray.evaluate import roll_out
from ssl2rl_ray.loop import head
from ssl2rl_ray.loop.diagnostics import mean_entropy
from ssl2rl_ray.loop.pseudo_labels import PseudoLabels
from ssl2rl_ray.loop.rollout import RollOut, roll_out_all
from ssl2rl_ray.perception.metrics import classifier_metrics
from ssl2rl_ray.perception.model import Model, model_of_run
from ssl2rl_ray.perception.sample import Split, sample_of, split_of, truth_of
from ssl2rl_ray.perception.trainer import train_classifier
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.stats import or_none
from ssl2rl_ray.train import train

_SELECTION, _STARTS, _ROLL_OUT = 10, 11, 12  # streams of random numbers of the run's seed
_ROLL_OUT_FIELDS = ("visit_order", "value", "num_switches")
_FEWEST_EPOCHS = 30
"""Of f_0 where ``loop.pretraining_steps`` would be fewer, as with all labels."""
_LARGEST_LOGIT = 9.0
Tell = Callable[[str, float], None]
"""Told what is under way and the share done."""


# ---- the data ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What all methods of a run share: a session with its images (or predictions), split in three.

    Training squares, selection squares (rounds are chosen by them), test squares (quoted only).
    """

    config: SSL2RLRunConfig
    table: HoleTable
    images: NDArray[np.uint8] | None
    """(N, H, W); None: ``classifier.network`` is ``head``."""
    has_image: BoolArray
    """(N,); with a head, has a prediction."""
    split: Split
    train: IntArray
    """(T,) rows of the training squares, labelled or not."""
    selection: IntArray
    """Rows of the selection squares, all of them; ``test`` likewise."""
    test: IntArray
    truth: FloatArray
    """(N,) 1 low-CTF, 0 not, NaN not measured."""

    @classmethod
    def of(cls, config: SSL2RLRunConfig) -> Task:
        """Draws or reads the session and splits it.

        Raises ValueError as ``sample_of`` and ``split_of``, and where a part has no labelled hole.
        """
        first = stage_config(config, config.pretraining_run())
        sample = head.sample_of(config) if _is_head(config) else sample_of(first)
        split = split_of(first, sample)
        if not len(split.unlabelled) and set(config.loop.methods) - {"supervised", "full-labels"}:
            raise ValueError(
                "data.labelled_fraction: every hole of the training squares is labelled, which "
                "leaves nothing to label for the methods of the loop; take a smaller fraction"
            )
        judged = np.concatenate([split.validation, split.known])
        squares = np.isin(sample.table.square_id, sample.table.square_id[judged])
        rows = np.flatnonzero(squares)
        if len(np.unique(sample.table.square_id[rows])) < 2:
            raise ValueError(
                f"seed {config.seed}: one square is held out, and it takes two: one to choose "
                "rounds by, one to test on; take another seed or a larger data.validation_share"
            )
        rng = np.random.default_rng([config.seed, _SELECTION])
        share = config.loop.selection_share
        is_selection = split_by_square(sample.table.select(rows), share, rng)
        selection, test = rows[is_selection], rows[~is_selection]
        for name, part in (("selection", selection), ("test", test)):
            if not np.isin(split.validation, part).any() or len(part) < 2:
                raise ValueError(
                    f"seed {config.seed}: the {name} squares have {len(part)} holes and none to "
                    "judge by; take another seed, data.validation_share or loop.selection_share"
                )
        return cls(
            config=config,
            table=sample.table,
            images=None if _is_head(config) else sample.images,
            has_image=sample.has_image,
            split=split,
            train=np.flatnonzero(~squares),
            selection=selection,
            test=test,
            truth=truth_of(first, sample.table),
        )

    @cached_property
    def is_labelled(self) -> BoolArray:
        """(N,) labels of training squares that may be used."""
        return self._mask(self.split.labelled)

    @cached_property
    def is_known(self) -> BoolArray:
        """(N,) those and the ones known in validation squares, for the posterior only."""
        return self._mask(np.concatenate([self.split.labelled, self.split.known]))

    @cached_property
    def low_share(self) -> float:
        """Of the labelled holes."""
        return float(self.truth[self.split.labelled].mean())

    def part(self, name: str) -> IntArray:
        """Rows to judge by: of ``selection`` or ``test``, with a label that nobody knows."""
        return np.intersect1d(self.split.validation, getattr(self, name))

    def describe(self) -> dict[str, Any]:
        """``sample.json``."""
        table = self.table
        ctf, shares = table.ctf_max_resolution_A, None
        levels = ("grid", "square", "patch", "hole")
        if np.isfinite(ctf).all():
            squares = sums_of_squares(table, ctf)
            shares = dict(zip(levels, (squares / squares.sum()).tolist(), strict=True))
        units = (len(table.grid_name), len(table.square_name), len(table.patch_name), len(table))
        return {
            "num_holes": len(table),
            "num_train": len(self.train),
            "num_labelled": len(self.split.labelled),
            "num_selection": len(self.selection),
            "num_test": len(self.test),
            "low_share_labelled": self.low_share,
            "anova": shares,
            "units": dict(zip(levels, units, strict=True)),
        }

    def _mask(self, rows: IntArray) -> BoolArray:
        mask = np.zeros(len(self.table), bool)
        mask[rows] = True
        return mask


def _is_head(config: SSL2RLRunConfig) -> bool:
    return config.classifier.network == "head"


def stage_config(
    config: SSL2RLRunConfig, stage: PerceptionRunConfig, num_labelled: int | None = None
) -> PerceptionRunConfig:
    """A perception stage with the number of epochs that ``loop.*_steps`` ask for."""
    is_first = stage.classifier.initial is None
    steps = config.loop.pretraining_steps if is_first else config.loop.finetuning_steps
    if steps is None or num_labelled is None:
        return stage
    epochs = math.ceil(steps / max(1, num_labelled // stage.training.batch_size))
    epochs = max(epochs, _FEWEST_EPOCHS) if is_first else epochs
    interval = max(epochs // 10, 1) if is_first else epochs
    training = dataclasses.replace(
        stage.training, num_epochs=epochs, evaluation_interval_epochs=interval
    )
    return dataclasses.replace(stage, training=training)


# ---- the classifier ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Belief:
    """What is said of every hole of the session, (N,) each."""

    p_classifier: FloatArray
    """Of the hole's image alone, over f_0's temperature."""
    p_posterior: FloatArray | None
    """Of classifier and neighbours with the known labels, a hole's own left out; in the training
    squares of f_0 and the labels of the training squares only."""
    p_blind: FloatArray | None
    """The same without labels in validation squares."""
    effects: Effects
    """What groups share beyond p, for planners and ``rates`` features."""

    def seen_by(self, method: Method) -> FloatArray:
        """(N,) what the method's policy acts on."""
        if method.is_posterior_seen and self.p_posterior is not None:
            return self.p_posterior
        return self.p_classifier


def pretraining_of(task: Task, method: Method) -> str:
    """``supervised``, ``fixmatch`` or ``full``: how a method's f_0 is trained."""
    asked = method.pretraining
    return task.config.pretraining.method if asked == "as configured" else asked


def pretrain(task: Task, method: Method, folder: Path, tell: Tell) -> Path:
    """f_0 of a method, trained once for all that begin with it; its folder."""
    config, chosen = task.config, pretraining_of(task, method)
    here = folder / chosen
    if task.images is None:
        return head.pretrain(task, here, has_all_labels=chosen == "full")
    num_labelled = len(task.split.labelled)
    if chosen == "full":
        in_train = np.isin(np.arange(len(task.table)), task.train)
        num_labelled = int((task.table.is_labelled & task.has_image & in_train).sum())
    stage = stage_config(config, config.pretraining_run(chosen), num_labelled)
    return _classifier_run(stage, here, tell)


def finetune(task: Task, initial: Path, labels: Path | None, folder: Path, tell: Tell) -> Path:
    """f_k from f_{k-1} and a file of pseudo labels (None: on the labelled holes only)."""
    if task.images is None:
        return head.finetune(task, initial, labels, folder)
    stage = task.config.finetuning_run(str(initial), None if labels is None else str(labels))
    stage = stage_config(task.config, stage, len(task.split.labelled))
    return _classifier_run(stage, folder, tell)


def _classifier_run(config: PerceptionRunConfig, folder: Path, tell: Tell) -> Path:
    """A run of kind perception, finished."""
    if (run := _begun(folder, config)) is not None:
        with run:
            train_classifier(
                config,
                run,
                progress=lambda row: tell("classifier", row["epoch"] / row["num_epochs"]),
                is_drawn=False,
            )
    return folder


def _begun(folder: Path, config: PerceptionRunConfig | NavigationRunConfig) -> RunDirectory | None:
    """A stage's run to write to, made or gone on with; None where it is finished."""
    if not (folder / "manifest.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # killed while it was made
        return RunDirectory.create(folder, config)
    if RunDirectory.open(folder).status == "finished":
        return None
    return RunDirectory.resume(folder, config)


def believe(task: Task, first: Path, classifier: Path) -> Belief:
    """Probabilities by f_k (``classifier``), with what f_0's (``first``) folds taught.

    f_0's temperature and posterior were fitted on cross-fitted logits, which a fine-tuned
    classifier has not: its logits are brought to mean and sd of f_0's on the unlabelled training
    holes and then trusted as f_0's are, and at labelled holes f_0's cross-fitted ones stay. The
    posterior of the training squares is f_0's in every round: f_k has learned from labels there.
    """
    begun = model_of_run(first)
    begun_logit = raw = _logits(task, begun)
    if classifier != first:
        raw = _logits(task, model_of_run(classifier))
    return belief_of(task, begun, begun_logit, raw)


def _logits(task: Task, model: Model) -> FloatArray:
    """(N,) cross-fitted where the model saw the label; NaN without image (or prediction)."""
    return model.logits(task.table, task.images, task.has_image)


def belief_of(task: Task, begun: Model, begun_logit: FloatArray, raw: FloatArray) -> Belief:
    """``believe`` from logits (N,)."""
    p_classifier = expit(_filled(raw) / begun.temperature)
    if begun.posterior is None:
        return Belief(p_classifier=p_classifier, p_posterior=None, p_blind=None, effects=Effects())
    is_fitted, offset, scale = _matching(task, begun, begun_logit, raw)
    matched = np.where(is_fitted, begun_logit, offset + scale * raw)
    is_low, is_known = task.truth == 1, task.is_known | is_fitted
    is_blind = is_known.copy()
    is_blind[np.concatenate([task.selection, task.test])] = False
    unfitted = np.where(is_fitted, begun_logit, raw)
    p_blind = begun.posterior.predict(task.table, matched, is_low, is_blind)
    p_posterior = begun.posterior.predict(task.table, matched, is_low, is_known)
    # What is learned from in the training squares has their own labels only, as every other method
    # (those known in validation squares stand for a session under way there), and f_0's logits:
    # f_k was taught there what their groups share, and would have it counted twice, round by round.
    own = begun.posterior.predict(task.table, begun_logit, is_low, is_blind)[task.train]
    p_posterior[task.train] = p_blind[task.train] = own
    return Belief(
        p_classifier=expit(_filled(unfitted) / begun.temperature),
        p_posterior=p_posterior,
        p_blind=p_blind,
        effects=begun.posterior.effects,
    )


def _matching(
    task: Task, begun: Model, begun_logit: FloatArray, raw: FloatArray
) -> tuple[BoolArray, float, float]:
    """(N,) whose labels f_0 learned from; offset and scale that bring ``raw`` to f_0's logits."""
    is_learned = np.isin(np.arange(len(task.table)), task.train) & task.has_image
    is_fitted = is_learned & np.isin(task.table.hole_name, _learned(task, begun))
    others = is_learned & ~is_fitted if (is_learned & ~is_fitted).any() else is_learned
    scale = float(begun_logit[others].std() / max(raw[others].std(), 1e-6))
    return is_fitted, float(begun_logit[others].mean() - scale * raw[others].mean()), scale


def whole_system(task: Task, first: Path, classifier: Path) -> Model:
    """f_k (``classifier``) with temperature and posterior of f_0 (``first``), as ``believe`` has.

    The posterior takes logits that are matched to f_0's; offset and scale go into its slopes.
    """
    begun, model = model_of_run(first), model_of_run(classifier)
    if classifier == first:
        return begun
    begun_logit = _logits(task, begun)
    _, offset, scale = _matching(task, begun, begun_logit, _logits(task, model))
    posterior, cross_fitted = begun.posterior, model.cross_fitted
    if posterior is not None:
        slopes = ("slope_within", "slope_patch", "slope_square", "slope_grid")
        posterior = dataclasses.replace(
            posterior,
            intercept=posterior.intercept + posterior.slope_grid * offset,
            **{name: scale * getattr(posterior, name) for name in slopes},
        )
        cross_fitted = {m: (x - offset) / scale for m, x in begun.cross_fitted.items()}
    return dataclasses.replace(
        model, temperature=begun.temperature, posterior=posterior, cross_fitted=cross_fitted
    )


def write_model(task: Task, first: Path, classifier: Path, folder: Path) -> None:
    """``whole_system`` as a folder that ``ssl2rl predict`` takes, whole or not at all; once."""
    if not folder.exists():
        whole_system(task, first, classifier).save_new(folder)


def _learned(task: Task, model: Model) -> NDArray[np.str_]:
    """Names of the holes whose labels the model learned from."""
    from ssl2rl_ray.data.splits import marks

    rows = np.flatnonzero(np.isfinite(task.table.ctf_max_resolution_A))
    own = [mark in model.labels_seen for mark in marks(task.table, rows)]
    return task.table.hole_name[rows[np.array(own, bool)]]


def _filled(values: FloatArray) -> FloatArray:
    """Holes without an image take the mean of the others."""
    return np.where(np.isnan(values), np.nanmean(values), values)


def judge_classifier(task: Task, belief: Belief) -> dict[str, Any]:
    """``classifier`` and ``posterior`` of round.json: ``classifier_metrics`` of each part."""

    def figures(p: FloatArray, rows: IntArray) -> dict[str, float | None]:
        found = classifier_metrics(task.truth[rows] == 1, p[rows])
        return {name: or_none(value) for name, value in found.items()}

    selection, test = task.part("selection"), task.part("test")
    unlabelled = task.split.unlabelled[np.isfinite(task.truth[task.split.unlabelled])]
    p, posterior = belief.p_classifier, None
    # of all: a collapse is seen where none of them was measured, too
    called = p[task.split.unlabelled] >= 0.5
    positive_share = float(called.mean()) if len(called) else None
    if belief.p_posterior is not None and belief.p_blind is not None:
        posterior = {
            "selection": figures(belief.p_posterior, selection),
            "test": figures(belief.p_posterior, test),
            "test_blind": figures(belief.p_blind, test),
            "unlabelled": figures(belief.p_posterior, unlabelled),
        }
    return {
        "classifier": {
            "selection": figures(p, selection),
            "test": figures(p, test),
            # diagnostics only: nothing is chosen by it
            "unlabelled": figures(p, unlabelled)
            | {
                "positive_share": positive_share,
                "entropy": mean_entropy(p[task.split.unlabelled]),
            },
        },
        "posterior": posterior,
    }


# ---- the policy ----------------------------------------------------------------------------------


def session_of(task: Task, method: Method, belief: Belief) -> HoleTable:
    """(T,) what RL and roll-outs see: training squares, p, and the labels that may be used.

    Labels that are not known are not in it, not even hidden.
    """
    rows = np.flatnonzero(task.is_labelled) if method.is_rl_labelled_only else task.train
    table = task.table.select(rows)
    is_labelled = task.is_labelled[rows]
    return table.replace(
        p_low_ctf=belief.seen_by(method)[rows],
        predicted_ctf_A=np.full(len(rows), np.nan),
        ctf_max_resolution_A=np.where(is_labelled, table.ctf_max_resolution_A, np.nan),
        is_labelled=is_labelled,
    )


def env_of(config: SSL2RLRunConfig, method: Method) -> EnvConfig:
    """The rules under which a method's RL is trained."""
    env = config.env
    if method.duration_min is not None:
        env = dataclasses.replace(env, budget_min=method.duration_min)
    if method.is_movement_free:
        rules = navigation_config(env)
        env = dataclasses.replace(
            env, minutes=(rules.minutes[0],) * 4, reward=(rules.reward[0],) * 4
        )
    return env


@dataclass(frozen=True, kw_only=True, eq=False)
class Navigator:
    """Who navigates in a round: policies (several checkpoints) before they know their session."""

    name: str
    rules: NavigationConfig
    """As in training."""
    make: Callable[[SessionStack, NavigationConfig], list[Policy]]
    """The best one first."""


def navigation_key(task: Task, method: Method) -> str:
    """What tells apart the policies, and with them evaluation and roll-outs, of one f_0."""
    rules = navigation_config(env_of(task.config, method))
    words = [pretraining_of(task, method), method.navigator or task.config.loop.navigator]
    words += [f"{rules.budget_min:g}"]
    words += ["posterior"] * method.is_posterior_seen + ["labelled"] * method.is_rl_labelled_only
    return "-".join([*words, *["free"] * method.is_movement_free])


def is_trained(loop: LoopConfig, method: Method) -> bool:
    """True: RL navigates; False: a planner."""
    return method.navigator is None and loop.navigator == "algorithm"


def navigate(task: Task, method: Method, belief: Belief, folder: Path, tell: Tell) -> Navigator:
    """Trains RL on pseudo rewards, or takes a planner."""
    config = task.config
    env = env_of(config, method)
    rules = navigation_config(env)
    if not is_trained(config.loop, method):
        planner = method.navigator or config.loop.navigator
        return Navigator(
            name=planner,
            rules=rules,
            make=lambda stack, rules: [make_planner(planner, stack, rules, belief.effects)],
        )
    session = folder / "session"
    if not (session / "manifest.json").exists():
        shutil.rmtree(session, ignore_errors=True)
        write_dataset(
            session_of(task, method, belief),
            session,
            provenance={"importer": "ssl2rl", "notes": ["p_low_ctf is this round's"]},
            calibration=_as_it_is(belief.effects).to_json(),
        )
    stage, here = config.navigation_run(str(session), env), folder / "policy"
    if (here / "manifest.json").exists() and RunDirectory.open(here).status != "finished":
        # A policy's checkpoints leave out the episodes under way (and the replay buffer): gone on
        # with, training would end elsewhere than uninterrupted. It is begun anew.
        shutil.rmtree(here)
    if (run := _begun(here, stage)) is not None:
        steps = stage.training.num_env_steps
        with run:
            train(
                stage,
                run,
                progress=lambda row: tell("policy", min(row["num_env_steps"] / steps, 1.0)),
            )
    return Navigator(name=config.algorithm.name, rules=rules, make=_policies(here))


def _as_it_is(effects: Effects) -> Calibration:
    """The calibration that gives a table's ``p_low_ctf`` back."""
    return Calibration(
        intercept=0.0,
        slope=float(np.sqrt(1 + np.pi / 8 * effects.variance)),
        clip_A=_LARGEST_LOGIT,
        patch_mean_slope=0.0,
        effects=effects,
        fitted_on="ssl2rl",
        num_holes=0,
        log_likelihood=0.0,
        input="logit_p_low_ctf",
    )


def _policies(folder: Path) -> Callable[[SessionStack, NavigationConfig], list[Policy]]:
    """The exported policy of a run and those of its other checkpoints, as makers."""
    from ssl2rl_ray.algorithms.policy import Artefact

    run = RunDirectory.open(folder)
    best = run.best_checkpoint
    assert run.policy is not None and best is not None
    others = [
        folder / "checkpoints" / entry["name"] / "policy"
        for entry in run.checkpoints
        if entry["value"] is not None and entry["name"] != best["name"]
    ]
    artefacts = [Artefact.load(path) for path in (run.policy, *others)]
    return lambda stack, rules: [artefact.make(stack, rules) for artefact in artefacts]


def evaluate_policy(
    task: Task, method: Method, belief: Belief, navigator: Navigator, folder: Path, tell: Tell
) -> dict[str, Any]:
    """``return`` of round.json: the best policy, played for each duration, rewarded by the truth.

    The starts are the run's, the same for all methods and rounds: differences are paired.
    """
    path = folder / "return.json"
    if path.exists():
        return json.loads(path.read_text())
    tell("evaluation", 0.0)
    config, found = task.config, {}
    for name in ("selection", "test"):
        rows = task.selection if name == "selection" else task.test
        rows = rows[np.isfinite(task.truth[rows])]
        table = task.table.select(rows)
        table = table.replace(
            p_low_ctf=belief.seen_by(method)[rows],
            predicted_ctf_A=np.full(len(rows), np.nan),
            is_labelled=np.ones(len(rows), bool),
        )
        rng = np.random.default_rng([config.seed, _STARTS, int(name == "test")])
        start_hole = rng.integers(len(rows), size=config.loop.num_starts)
        found[name] = {}
        for duration in config.loop.durations_min:
            rules = dataclasses.replace(navigation_config(config.env), budget_min=duration)
            stack = SessionStack.of([table], rules)
            # A policy that was trained without movement costs does not learn of them here.
            believed = dataclasses.replace(navigator.rules, budget_min=duration)
            episodes = roll_out(
                navigator.make(stack, believed)[0],
                stack,
                rules,
                session=np.zeros(len(start_hole), np.int64),
                start_hole=start_hole,
                rng=rng,
            )
            found[name][f"{duration:g}"] = {
                "episode_return": float(episodes.episode_return.mean()),
                "num_low_ctf": float(episodes.num_low_ctf.mean()),
                "num_visits": float(episodes.num_visits.mean()),
                "episode_returns": episodes.episode_return.tolist(),
            }
    _write(path, lambda stream: stream.write(json.dumps(found, indent=1).encode()))
    return found


def visit_all(
    task: Task,
    method: Method,
    belief: Belief,
    navigator: Navigator,
    k: int,
    folder: Path,
    tell: Tell,
) -> RollOut:
    """M visit orders of all holes of the training squares."""
    path, config = folder / "roll_out.npz", task.config
    if path.exists():
        with np.load(path) as found:
            return RollOut(**{name: found.get(name) for name in _ROLL_OUT_FIELDS})
    table = session_of(task, dataclasses.replace(method, is_rl_labelled_only=False), belief)
    rules = navigator.rules
    stack = SessionStack.of([table], rules)
    rng = np.random.default_rng([config.seed, _ROLL_OUT, k])
    roll = roll_out_all(
        navigator.make(stack, rules),
        stack,
        rules,
        start_hole=rng.integers(len(table), size=config.loop.num_rollouts),
        duration_min=rules.budget_min,
        exploration=config.loop.exploration,
        effects=belief.effects,
        rng=rng,
        on_step=lambda share: tell("roll-outs", share),
    )
    fields = {name: getattr(roll, name) for name in _ROLL_OUT_FIELDS}
    kept = {name: array for name, array in fields.items() if array is not None}
    _write(path, lambda stream: np.savez_compressed(stream, **kept))
    return roll


# ---- files ---------------------------------------------------------------------------------------


def write_labels(task: Task, labels: PseudoLabels, path: Path) -> None:
    """``pseudo_labels.parquet`` of the unlabelled training holes, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    is_open = ~task.is_labelled[task.train]
    rows = task.train[is_open]
    columns = {
        "hole_name": pa.array(task.table.hole_name[rows].tolist(), pa.string()),
        "is_low_ctf": pa.array(labels.is_low[is_open]),
        "confidence": pa.array(labels.confidence[is_open]),
    }
    _write(path, lambda stream: pq.write_table(pa.table(columns), stream))


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    """A file, whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    with partial.open("wb") as stream:
        write(stream)
    partial.replace(path)
