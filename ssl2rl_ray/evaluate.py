"""Play policies on sessions and say what they earned, paired, and as a share of the exact optimum.

Shape letters: E episodes, K sessions drawn afresh, N holes, M moves of the longest episode.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from envs.cryoem.calibration import Calibration, uncalibrated_p
from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.knapsack import optimum
from envs.cryoem.planners import NAMES, make_planner
from envs.cryoem.render import draw_map
from envs.cryoem.rewards import PRESETS
from envs.cryoem.stack import Policy, SessionStack
from envs.cryoem.synthetic import draw_session, redraw_labels
from envs.cryoem.types import (
    FloatArray,
    HoleTable,
    IntArray,
    NavigationConfig,
    Preset,
    RandomEffects,
    Switch,
)
from ssl2rl_ray.data.commands import read_calibration
from ssl2rl_ray.data.folder import Dataset, read_dataset
from ssl2rl_ray.data.splits import label_marks
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.stats import paired_difference, summarize

SessionKind = Literal["redrawn", "synthetic"]
METRICS = ("episode_return", "num_low_ctf", "num_visits", "fraction_of_optimum")


@dataclass(frozen=True, kw_only=True, eq=False)
class Episodes:
    """What E episodes came to."""

    episode_return: FloatArray
    """(E,)"""
    num_low_ctf: FloatArray
    """(E,) by the truth; the start hole is free and does not count."""
    num_visits: IntArray
    """(E,) moves."""
    minutes_by_switch: FloatArray
    """(E, 4) minutes spent on moves of each ``Switch``."""
    visit_order: IntArray
    """(E, M + 1) holes from the start on, -1 after the end."""


def roll_out(
    policy: Policy,
    stack: SessionStack,
    config: NavigationConfig,
    *,
    session: IntArray,
    start_hole: IntArray,
    rng: np.random.Generator,
    on_step: Callable[[float], None] | None = None,
) -> Episodes:
    """Plays E episodes side by side to their end.

    Args:
        policy: chooses the holes.
        stack: the sessions; their outcomes are the truth where there is one.
        config: the rules.
        session: (E,) row of the stack of each episode.
        start_hole: (E,) row of the hole where it begins.
        rng: of policies that draw.
        on_step: told the share of the budget used by the slowest episode, after every step.
    """
    num_episodes = len(session)
    env = CryoEMVectorEnv(stack, config, num_episodes)
    env.reset(options={"session": session, "start_hole": start_hole})
    is_running = np.ones(num_episodes, bool)
    episode_return, num_low_ctf = np.zeros(num_episodes), np.zeros(num_episodes)
    num_visits = np.zeros(num_episodes, np.int64)
    minutes_by_switch = np.zeros((num_episodes, 4))
    visit_order = [np.asarray(start_hole)]
    while is_running.any():
        hole = policy.act(env.compact_observation(), rng)
        _, reward, terminated, truncated, info = env.step_holes(hole)
        visit_order.append(np.where(is_running, hole, -1))
        episode_return += np.where(is_running, reward, 0)
        is_over = is_running & (terminated | truncated)
        num_low_ctf[is_over] = info["num_low_ctf"][is_over]
        num_visits[is_over] = info["num_visits"][is_over]
        minutes_by_switch[is_over] = info["minutes_by_level"][is_over]
        is_running &= ~is_over
        if on_step and is_running.any():
            on_step(float(info["elapsed_min"][is_running].min() / config.budget_min))
    return Episodes(
        episode_return=episode_return,
        num_low_ctf=num_low_ctf,
        num_visits=num_visits,
        minutes_by_switch=minutes_by_switch,
        visit_order=np.stack(visit_order, axis=1),
    )


def draw_starts(num_holes: int, num_episodes: int, seed: int) -> IntArray:
    """(E,) start holes, by the rule under which the peer's figures were made."""
    return _starts_of_each([num_holes], num_episodes, seed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Contestant:
    """A policy before it knows its sessions."""

    name: str
    make: Callable[[SessionStack, NavigationConfig], Policy]
    calibration: Calibration | None
    """None: probabilities as imported."""
    preset: Preset | None = "cryorl"
    """Rules that it was trained under, None where they are no preset; planners take any."""
    num_past_steps: int = 1
    """Holes visited last that it must be shown."""
    trained_on: tuple[str, ...] = ()
    """``content_hash`` of the sessions, as it saw them, that it was trained on."""
    labels_seen: frozenset[str] = frozenset()
    """``label_marks`` of what its training, its calibration or the choice of it has read."""

    def sees(self, table: HoleTable) -> HoleTable:
        """The table with the probabilities that this policy acts on."""
        return self.calibration.apply(table) if self.calibration else table

    def play(
        self,
        truths: Sequence[HoleTable],
        config: NavigationConfig,
        *,
        session: IntArray,
        start_hole: IntArray,
        seed: int,
        on_step: Callable[[float], None] | None = None,
    ) -> Episodes:
        """``roll_out`` on the sessions as this policy sees them, rewarded by their truth."""
        stack = SessionStack.of([self.sees(truth) for truth in truths], config)
        past = max(config.num_past_steps, self.num_past_steps)
        return roll_out(
            self.make(stack, config),
            stack,
            replace(config, num_past_steps=past),
            session=session,
            start_hole=start_hole,
            rng=np.random.default_rng(seed),
            on_step=on_step,
        )


def contestant(
    name: str,
    calibration: Calibration | None = None,
    labels_seen: frozenset[str] = frozenset(),
) -> Contestant:
    """A planner by its name, or a trained policy from a run directory or an exported artefact.

    A trained policy brings its own calibration; ``calibration``, and the marks of the labels that
    it has seen, are for planners.

    Raises:
        ValueError: neither a planner nor a folder with a policy, or a policy that is damaged.
    """
    if name in NAMES:
        effects = calibration.effects if calibration else RandomEffects()
        return Contestant(
            name=name,
            make=lambda stack, config: make_planner(name, stack, config, effects),
            calibration=calibration,
            labels_seen=labels_seen,
        )
    folder = _policy_folder(name)
    from ssl2rl_ray.algorithms.policy import Artefact  # torch: only where it is needed

    artefact = Artefact.load(folder)
    return Contestant(
        name=name,
        make=artefact.make,
        calibration=artefact.calibration,
        preset=_preset_of(artefact.rules),
        num_past_steps=artefact.rules.num_past_steps,
        trained_on=artefact.table_hashes,
        labels_seen=artefact.labels_seen,
    )


def _policy_folder(name: str) -> Path:
    """The folder of the exported artefact."""
    folder = Path(name)
    if (folder / "policy.json").is_file():
        return folder
    if (folder / "manifest.json").is_file():
        run = RunDirectory.open(folder)
        if run.manifest["kind"] == "ssl2rl":
            raise ValueError(
                f"{folder}: a run of the loop has many policies; name one, such as "
                f"{folder / 'methods/METHOD/round-01/policy'}: `recommended` in its summary.json"
            )
        if run.policy is None:
            raise ValueError(f"{folder}: this run has no policy yet (status {run.status!r})")
        return run.policy
    near = difflib.get_close_matches(name, NAMES, n=1)
    raise ValueError(
        f"policy {name!r}: neither a planner ({', '.join(NAMES)}) nor a run directory nor an "
        "exported policy" + (f"; did you mean {near[0]!r}?" if near else "")
    )


def rules_of(
    chosen: Contestant, preset: Preset | None, budget_min: float
) -> tuple[Preset, NavigationConfig]:
    """The rules to play by: of ``preset``, else those that the policy was trained under.

    Raises ValueError where neither is known.
    """
    if (preset := preset or chosen.preset) is None:
        raise ValueError(f"{chosen.name} was trained under rules that are no preset: give --preset")
    config = NavigationConfig.preset(preset, budget_min=budget_min)
    past = max(config.num_past_steps, chosen.num_past_steps)
    return preset, replace(config, num_past_steps=past)


def _preset_of(rules: NavigationConfig) -> Preset | None:
    """The preset with the minutes, rewards and threshold of these rules."""

    def of(config: NavigationConfig) -> tuple[Any, ...]:
        threshold = (config.low_ctf_threshold_A, config.is_threshold_inclusive)
        return (config.minutes, config.reward, *threshold)

    return next((name for name, config in PRESETS.items() if of(config) == of(rules)), None)


def evaluate(
    policy: str,
    *,
    data: str | Path,
    preset: Preset | None = None,
    budget_min: float = 480.0,
    num_episodes: int | None = None,
    seed: int = 0,
    calibration: str | Path | None = None,
    num_sessions: int | None = None,
    session_kind: SessionKind = "redrawn",
    synthetic_preset: str = "aldolase",
    against: Sequence[str] = (),
    allow_in_sample: bool = False,
    on_step: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Plays ``policy``, and those ``against``, on the same sessions from the same starts.

    Args:
        policy: run directory, exported artefact, or a planner's name.
        data: dataset folder: the session that is evaluated.
        preset: rules of the session; None = those that ``policy`` was trained under.
        budget_min: minutes.
        num_episodes: starts in the session (default 50), or in each drawn session (default 1).
        seed: of starts, of drawn sessions, and of policies that draw.
        calibration: dataset folder of a training session, for the planners; a trained policy
            brings its own, which planners take where this is None.
        num_sessions: sessions drawn afresh instead of the one in ``data``; the unit of every
            summary is then the session, otherwise the episode.
        session_kind: ``redrawn`` keeps holes and predictions of ``data`` and draws its labels
            again from the calibration; ``synthetic`` draws all.
        synthetic_preset: what synthetic sessions are like, see ``envs.cryoem.synthetic``.
        against: policies to compare with.
        allow_in_sample: accept a calibration fitted on the evaluated session.
        on_step: told a policy's name and the share of the budget it has used.

    Returns:
        A JSON document: ``policy, data_hash, preset, budget_min``, a ``Summary`` for each of
        ``METRICS``, ``minutes_by_switch``, ``num_switches``, ``calibration`` and the like, and for
        each policy in ``against`` the same, with ``difference`` (``policy`` minus that one).

    Raises:
        ValueError: no such policy, holes that cannot be evaluated, an in-sample calibration.
    """
    dataset = read_dataset(data)
    table = dataset.table
    brought = read_calibration(calibration) if calibration else None
    seen = _labels_behind(calibration) if calibration else frozenset[str]()
    ours = contestant(policy, brought, seen)
    preset, config = rules_of(ours, preset, budget_min)
    others = [
        contestant(name, brought or ours.calibration, seen if brought else ours.labels_seen)
        for name in against
    ]
    num_starts = num_episodes or (1 if num_sessions else 50)
    if num_sessions is None:
        truths = [_with_truth(dataset)]
        in_sample = {each.name: _is_in_sample(each, dataset) for each in (ours, *others)}
        if not allow_in_sample and (found := [name for name, has in in_sample.items() if has]):
            raise ValueError(_IN_SAMPLE.format(name=found[0], data=data))
        start_hole = draw_starts(len(table), num_starts, seed)
    else:  # labels drawn afresh: no calibration has seen them
        in_sample = {}
        rngs = [np.random.default_rng(c) for c in np.random.SeedSequence(seed).spawn(num_sessions)]
        if session_kind == "synthetic":
            truths = [draw_session(rng, synthetic_preset) for rng in rngs]
        else:
            truths = redraw(table, ours.calibration, config, rngs)
        start_hole = _starts_of_each([len(truth) for truth in truths], num_starts, seed)
    session = np.repeat(np.arange(len(truths)), num_starts)
    best = optimum_of_each(truths, config, session, start_hole)

    def play(each: Contestant) -> dict[str, Any]:
        episodes = each.play(
            truths,
            config,
            session=session,
            start_hole=start_hole,
            seed=seed,
            on_step=partial(on_step, each.name) if on_step else None,
        )
        return {
            **_result(episodes, best, config, len(truths)),
            "calibration": {
                "hash": each.calibration.fitted_on if each.calibration else None,
                "is_fitted_on_this_session": in_sample.get(each.name, False),
            },
        }

    result = play(ours)
    return {
        "policy": ours.name,
        "data_hash": table.content_hash,
        "preset": preset,
        "budget_min": budget_min,
        **result,
        "optimum": summarize(_by_unit(best, len(truths))).as_json(),
        "seed": seed,
        "num_episodes": len(session),
        "num_sessions": num_sessions,
        "session_kind": session_kind if num_sessions else "measured",
        "start_hole": start_hole.tolist(),
        "against": {
            each.name: {**theirs, "difference": _difference(result, theirs)}
            for each in others
            for theirs in (play(each),)
        },
    }


def redraw(
    table: HoleTable,
    calibration: Calibration | None,
    config: NavigationConfig,
    rngs: Sequence[np.random.Generator],
) -> list[HoleTable]:
    """The session with its labels drawn again, once a generator.

    Raises ValueError where there is no model to draw them from.
    """
    if calibration is None:
        raise ValueError(
            "redrawn sessions need a model of the labels: bring one with --calibration TRAIN_DIR, "
            "or use --session-kind synthetic"
        )
    base, threshold = calibration.base_logit(table), config.low_ctf_threshold_A
    return [
        redraw_labels(table, base, calibration.effects, rng, low_ctf_threshold_A=threshold)
        for rng in rngs
    ]


def optimum_of_each(
    truths: Sequence[HoleTable], config: NavigationConfig, session: IntArray, start_hole: IntArray
) -> FloatArray:
    """(E,) the most that each episode could have earned, exact."""
    best = np.zeros(len(session))
    for row, truth in enumerate(truths):
        here = session == row
        best[here] = optimum(truth, config, start_hole[here])
    return best


def draw_tour(
    chosen: Contestant, table: HoleTable, config: NavigationConfig, seed: int = 0
) -> np.ndarray:
    """The map (H, W, 3) uint8 with the policy's tour from the best prediction."""
    seen = chosen.sees(table)
    start = np.array([int(np.argmax(seen.p_low_ctf))])
    episodes = chosen.play([seen], config, session=np.zeros(1, int), start_hole=start, seed=seed)
    order = episodes.visit_order[0]
    return draw_map(seen, config, order[order >= 0])


def _with_truth(dataset: Dataset) -> HoleTable:
    """The table rewarded by the truth everywhere."""
    is_measured = np.isfinite(dataset.table.ctf_max_resolution_A)
    if not is_measured.all():
        raise ValueError(
            f"{dataset.path}: {int((~is_measured).sum())} of {len(is_measured)} holes have no CTF "
            "value: what a visit to them earns is not known; evaluate on a session measured in "
            "full or on drawn ones (--sessions K), or make a plan for this one with `ssl2rl plan`"
        )
    return dataset.table.replace(is_labelled=is_measured)


_IN_SAMPLE = (
    "{name}: the calibration (or the training) has seen labels of the session that is evaluated, "
    "{data}, which nobody at the microscope could have done; bring a calibration or a policy from "
    "another session (--calibration TRAIN_DIR), or say --allow-in-sample and have that recorded"
)


_COINCIDENCE = 0.01
"""Share of a session's labels that another may have by chance: synthetic names come again, and Å
are rounded. Names of real holes are their own, there it is 0."""


def _labels_behind(folder: str | Path) -> frozenset[str]:
    """Marks of the labels that the calibration of a dataset folder was fitted on."""
    source = read_dataset(folder)
    if source.manifest["provenance"].get("importer") == "synthetic":
        return frozenset()  # its calibration is the model it was drawn from, not fitted on it
    if source.manifest["provenance"].get("importer") == "predict":
        return frozenset(source.manifest["provenance"]["labels_seen"])  # a classifier's
    return label_marks(source.table)


def _is_in_sample(each: Contestant, dataset: Dataset) -> bool:
    """True where the probabilities, or the training, come from labels of the session.

    Labels are compared hole by hole, so that a part of the session, or another import of it, is
    found out too; the hashes of whole tables are for policies of old that carry no marks.
    """
    if each.calibration is None or each.calibration.input == "logit_p_low_ctf":
        # It acts on the probabilities of the folder, which the import may have calibrated.
        applied = dataset.manifest["provenance"].get("calibration_applied") or {}
        if applied.get("num_shared_holes"):
            return True
    if each.calibration is None:
        return False
    table = dataset.table
    predicted = table.predicted_ctf_A
    as_imported = np.where(np.isfinite(predicted), uncalibrated_p(predicted), 0.5)
    hashes = {table.content_hash, table.replace(p_low_ctf=as_imported).content_hash}
    if each.calibration.fitted_on in hashes:
        return True
    if each.sees(dataset.table).content_hash in each.trained_on:
        return True
    marks = label_marks(_with_truth(dataset))
    return len(each.labels_seen & marks) > _COINCIDENCE * len(marks)


def _starts_of_each(num_holes: Sequence[int], num_starts: int, seed: int) -> IntArray:
    """(K * num_starts,) by the rule of ``draw_starts``, one generator over all K sessions."""
    if (fewest := min(num_holes)) < 2:
        raise ValueError(f"an episode needs at least 2 holes; this session has {fewest}")
    rng = np.random.RandomState(seed)
    return np.concatenate([rng.randint(0, n - 1, num_starts) for n in num_holes])


def _by_unit(values: FloatArray, num_sessions: int) -> FloatArray:
    """Episodes as they are on one session; on several, the mean of each session's."""
    return values if num_sessions == 1 else values.reshape(num_sessions, -1).mean(axis=1)


def _result(
    episodes: Episodes,
    best: FloatArray,
    config: NavigationConfig,
    num_sessions: int,
) -> dict[str, Any]:
    """What one contestant came to, for the JSON."""
    fraction = np.divide(
        episodes.episode_return, best, out=np.full(len(best), np.nan), where=best > 0
    )
    values: tuple[FloatArray, ...] = (
        episodes.episode_return,
        episodes.num_low_ctf,
        episodes.num_visits.astype(float),
        fraction,
    )
    minutes = episodes.minutes_by_switch.mean(axis=0)
    levels = [s.name.lower() for s in Switch]
    return {
        **{
            name: summarize(_by_unit(v, num_sessions)).as_json()
            for name, v in zip(METRICS, values, strict=True)
        },
        "minutes_by_switch": dict(zip(levels, minutes.tolist(), strict=True)),
        "num_switches": dict(zip(levels, (minutes / config.minutes).tolist(), strict=True)),
    }


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Paired difference of the returns."""
    return paired_difference(
        ours["episode_return"]["values"], theirs["episode_return"]["values"]
    ).as_json()


def format_report(report: dict[str, Any]) -> str:
    """The comparison as a table of text; the JSON of ``evaluate`` in, lines out."""
    num_sessions = report["num_sessions"]
    where = (
        f"{num_sessions} {report['session_kind']} sessions, {report['num_episodes']} episodes"
        if num_sessions
        else f"session {report['data_hash']}, {report['num_episodes']} starts"
    )
    rows = [("policy", "return", "95 %", "sd", "low-CTF", "visits", "of optimum", "minus this")]
    for name, entry in ((report["policy"], report), *report["against"].items()):
        gap = entry.get("difference")
        rows.append(
            (
                name,
                _number(entry["episode_return"]["mean"]),
                _plus_minus(entry["episode_return"]),
                _number(entry["episode_return"]["sd"]),
                _number(entry["num_low_ctf"]["mean"]),
                _number(entry["num_visits"]["mean"]),
                _number(entry["fraction_of_optimum"]["mean"], 3),
                f"{_number(gap['mean'], sign='+')} {_plus_minus(gap)} (sd {_number(gap['sd'])})"
                if gap
                else "",
            )
        )
    optimum_mean = _number(report["optimum"]["mean"])
    rows.append(
        ("exact optimum", optimum_mean, _plus_minus(report["optimum"]), "", "", "", "1", "")
    )
    lines = [
        f"preset {report['preset']}, budget {report['budget_min']:g} min, {where}, "
        f"seed {report['seed']}",
        align(rows),
        "minutes: "
        + ", ".join(f"{level} {m:.0f}" for level, m in report["minutes_by_switch"].items())
        + f" ({report['policy']})",
    ]
    if not num_sessions:
        lines.append(
            "One session is one draw of labels: the intervals are over starts only. "
            "To rank policies, pair them on many (--sessions 150 --against ...)."
        )
    if any(
        e["calibration"]["is_fitted_on_this_session"] for e in (report, *report["against"].values())
    ):
        lines.append("IN-SAMPLE: a calibration was fitted on the session that is evaluated.")
    return "\n".join(lines)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _number(value: float | None, digits: int = 1, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _plus_minus(summary: dict[str, Any]) -> str:
    low, high = summary["ci95"]
    return "" if low is None else f"±{(high - low) / 2:.1f}"
