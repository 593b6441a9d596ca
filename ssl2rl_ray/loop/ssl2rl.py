"""SSL²-RL: classifier and policy improve each other, and what that is compared with.

Xu et al., Algorithm 1. ``play_round`` is the body of the paper's loop and reads as it does; the
methods of the tables (``config.METHODS``) differ in which f_0 they begin with and which pseudo
labels they make, and share everything else: data, f_0, starts. Every stage leaves a folder
(``stages``), a complete round its ``round.json``: a run that was killed goes on at the stage that
it was in.

    f0/<pretraining>/              the classifier before the first round
    methods/<method>/model/        the recommended classifier, ready for ``ssl2rl predict``
    methods/<method>/round-<k>/    classifier f_k, the policy trained on it, its roll-outs over all
                                   holes, the pseudo labels that f_(k+1) learns from, round.json
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ssl2rl_ray.config import METHODS, Method, SSL2RLRunConfig, check
from ssl2rl_ray.data.folder import read_dataset
from ssl2rl_ray.evaluate import align
from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.loop.diagnostics import has_fallen, is_collapsed, label_quality, tour_figures
from ssl2rl_ray.loop.pseudo_labels import Evidence, num_positive, pseudo_labels
from ssl2rl_ray.loop.rollout import RollOut
from ssl2rl_ray.loop.stages import (
    Belief,
    Task,
    Tell,
    believe,
    evaluate_policy,
    finetune,
    is_trained,
    judge_classifier,
    navigate,
    navigation_key,
    pretrain,
    pretraining_of,
    session_of,
    visit_all,
    write_labels,
    write_model,
)
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.schema import to_dict, to_yaml
from ssl2rl_ray.tensorboard import TensorBoard

CRITERIA = ("reward", "accuracy", "auc")
_ROUNDS_OF_A_FALL = 2
_LEAST_ENTROPY = 0.1
"""Of f_0's: a classifier that is surer than this has talked itself into its labels. A choice."""
_FEW_OF_A_KIND = 5


def data_hashes(config: SSL2RLRunConfig) -> dict[str, str]:
    """What tells whether the dataset is still the same; raises what is wrong with the data."""
    Task.of(config)
    if config.data.dataset is None:
        return {}
    dataset = read_dataset(config.data.dataset)
    files = {name: entry["sha256"] for name, entry in dataset.manifest["files"].items()}
    return {config.data.dataset: dataset.table.content_hash} | {
        f"{config.data.dataset}: images": files[name] for name in files if name == "images.npy"
    }


def ssl2rl(
    config: SSL2RLRunConfig,
    run: RunDirectory,
    *,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Plays all methods of the config to their end, from where the run was.

    Args:
        config: what the run was begun with.
        run: open for writing.
        progress: told ``stage``, in words, its ``stage_share`` and the ``share`` of the whole run
            that is done; None prints a line for each round to stderr.

    Returns:
        The summary: ``sample``, and for each method its ``rounds``, the round that each criterion
        ``kept`` by the selection squares, why it ``stopped`` early, and what is ``recommended``:
        the folders, in the run, of classifier and policy of the round that ``loop.selection`` keeps
        (the policy's is None where a planner navigates), and ``model``, that classifier with the
        temperature and the posterior that the loop judged it with.

    Raises:
        ValueError: settings (``config.check``) or data that do not go together, by name.
        KeyboardInterrupt: after Ctrl-C; what is complete is on disk.
    """
    check(config)
    progress = progress or _print_round
    task = Task.of(config)
    run.write_record("sample.json", task.describe())
    _warn_of_selection(task)
    summary: dict[str, Any] = {}
    methods: dict[str, Any] = {}
    needs_ray = any(is_trained(config.loop, METHODS[name]) for name in config.loop.methods)
    with local_ray(config.rl.num_env_runners + 1) if needs_ray else nullcontext():
        for i, name in enumerate(config.loop.methods):

            def tell(row: dict[str, Any], i: int = i) -> None:
                progress({**row, "share": (i + row["share"]) / len(config.loop.methods)})

            methods[name] = _play_method(task, name, run, tell)
            summary = {"sample": task.describe(), "methods": methods}
            run.write_summary(summary)  # a report on a run under way reads what is done
    return summary


def _warn_of_selection(task: Task) -> None:
    """Where the selection squares can hardly tell one round from another."""
    is_low = task.truth[task.part("selection")] == 1
    if min(is_low.sum(), (~is_low).sum()) < _FEW_OF_A_KIND:
        print(
            f"warning: {is_low.sum()} of {len(is_low)} selection holes are low-CTF: rounds are "
            "hardly told apart by them; take another seed, or a larger loop.selection_share or "
            "data.validation_share",
            file=sys.stderr,
        )


def _play_method(
    task: Task, name: str, run: RunDirectory, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The rounds of one method, until it has had them all or goes wrong."""
    method, loop = METHODS[name], task.config.loop
    num_rounds = loop.num_rounds if method.rule else 0
    rounds: list[dict[str, Any]] = []
    stopped = None
    records = [f"methods/{name}/round-{k:02d}/round.json" for k in range(num_rounds + 1)]
    num_done = sum(run.record(record) is not None for record in records)
    with TensorBoard(run.path / "tensorboard" / name, first_step=num_done) as board:
        for k, record in enumerate(records):
            if (row := run.record(record)) is None:
                if not k:
                    board.begin({"method": name, **to_dict(task.config)}, to_yaml(task.config))

                def tell(what: str, share: float, k: int = k) -> None:
                    stage = f"{name} round {k}: {what}"
                    done = k / (num_rounds + 1)
                    progress({"stage": stage, "stage_share": share, "share": done})

                row = play_round(task, name, k, run.path, tell=tell, is_last=k == num_rounds)
                flat = scalars(row)
                board.log({**flat, **_criterion([*rounds, row], task, method)}, k)
                if not _is_logged(run, name, k):  # it may have been killed between the two
                    run.log({"method": name, "round": k, **flat})
                run.write_record(record, row)
            rounds.append(row)
            progress(
                {
                    "stage": f"{name} round {k}",
                    "stage_share": 1.0,
                    "share": (k + 1) / (num_rounds + 1),
                    "accuracy": row["classifier"]["selection"]["accuracy"],
                    "auc": row["classifier"]["selection"]["auc"],
                    "episode_return": row["return"]["selection"][_duration(task, method)][
                        "episode_return"
                    ],
                }
            )
            if (stopped := _gone_wrong(task, rounds)) is not None and k < num_rounds:
                print(f"warning: {name} ends after round {k}: {stopped}", file=sys.stderr)
                break
    kept = {criterion: kept_round(rounds, criterion, task, method) for criterion in CRITERIA}
    recommended = _recommended(task, name, kept[loop.selection])
    first = run.path / "f0" / pretraining_of(task, method)
    write_model(task, first, run.path / recommended["classifier"], run.path / recommended["model"])
    return {
        "rounds": rounds,
        "kept": kept,
        "stopped": stopped if len(rounds) <= num_rounds else None,
        "recommended": recommended,
    }


def _is_logged(run: RunDirectory, name: str, k: int) -> bool:
    rows = run.metrics()
    return bool(len(rows) and ((rows["method"] == name) & (rows["round"] == k)).any())


def _recommended(task: Task, name: str, k: int) -> dict[str, Any]:
    """Where, in the run, classifier, whole system and policy of the round are that is kept."""
    method, here = METHODS[name], f"methods/{name}/round-{k:02d}"
    policy = f"{here}/policy" if k else f"f0/{navigation_key(task, method)}/policy"
    return {
        "round": k,
        "classifier": f"{here}/classifier" if k else f"f0/{pretraining_of(task, method)}",
        "model": f"methods/{name}/model",
        "policy": policy if is_trained(task.config.loop, method) else None,
    }


def play_round(
    task: Task, name: str, k: int, run: Path, *, tell: Tell, is_last: bool
) -> dict[str, Any]:
    """Round k of a method: SSL²-RL, Algorithm 1, lines of its loop in their order.

    Returns:
        ``round.json``.
    """
    method = METHODS[name]
    before, here = (run / "methods" / name / f"round-{i:02d}" for i in (k - 1, k))
    # Before any pseudo label, methods differ in little: what is equal is done once.
    shared = here if k else run / "f0" / navigation_key(task, method)
    for folder in (here, shared):
        folder.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    with clock("classifier"):
        f_0 = pretrain(task, method, run / "f0", tell)
        f_k = f_0
        if k:
            labels = None if method.rule == "none" else before / "pseudo_labels.parquet"
            f_before = before / "classifier" if k > 1 else f_0
            f_k = finetune(task, f_before, labels, here / "classifier", tell)
        belief = believe(task, f_0, f_k)
    with clock("policy"):
        navigator = navigate(task, method, belief, shared, tell)
    with clock("evaluation"):
        row = judge_classifier(task, belief)
        row["return"] = evaluate_policy(task, method, belief, navigator, shared, tell)
    with clock("roll_out"):
        row |= {"pseudo_labels": None, "roll_out": None}
        if method.rule and not is_last:
            roll = None
            if method.rule in ("visit-order", "q-values"):
                roll = visit_all(task, method, belief, navigator, k, shared, tell)
            row |= _label(task, method, belief, roll, here)
    config = task.config
    return {
        "method": name,
        "round": k,
        "seed": config.seed,
        "labelled_fraction": config.data.labelled_fraction,
        "algorithm": navigator.name,
        **row,
        "is_collapsed": is_collapsed(row["classifier"]["unlabelled"], task.low_share),
        "wall_s": clock.seconds,
    }


def _label(
    task: Task, method: Method, belief: Belief, roll: RollOut | None, here: Path
) -> dict[str, Any]:
    """Writes the labels that f_(k+1) learns from, and says how good they are."""
    assert method.rule is not None
    rows = task.train
    evidence = Evidence(
        table=session_of(task, Method(), belief),
        p_low_ctf=belief.p_classifier[rows],
        is_low=(task.truth == 1)[rows] & task.is_labelled[rows],
        is_labelled=task.is_labelled[rows],
        visit_order=None if roll is None else roll.visit_order,
        value=None if roll is None else roll.value,
        p_posterior=None if belief.p_posterior is None else belief.p_posterior[rows],
        truth=task.truth[rows] if method.rule == "truth" else None,
    )
    cutoff = task.config.loop.positive_cutoff
    found: dict[str, Any] = {}
    if roll is not None:
        found["roll_out"] = tour_figures(
            evidence.table, roll.visit_order, evidence.is_labelled, num_positive(evidence, cutoff)
        )
    labels = pseudo_labels(method.rule, evidence, cutoff)
    if labels is not None:
        found["pseudo_labels"] = label_quality(
            method.rule,
            labels,
            task.truth[rows],
            belief.p_classifier[rows],
            np.flatnonzero(~evidence.is_labelled),
        )
        write_labels(task, labels, here / "pseudo_labels.parquet")
    return found


def kept_round(rounds: list[dict[str, Any]], criterion: str, task: Task, method: Method) -> int:
    """The best round by the selection squares, the first of equals; f_0 is one of them."""
    values = [_value(row, criterion, task, method) for row in rounds]
    return values.index(max(values))


def _value(row: dict[str, Any], criterion: str, task: Task, method: Method) -> float:
    """Of a round, by which it is kept or not."""
    if criterion == "reward":
        return row["return"]["selection"][_duration(task, method)]["episode_return"]
    found = row["classifier"]["selection"][criterion]
    return -math.inf if found is None else found  # the AUC of labels of one kind


def _criterion(rounds: list[dict[str, Any]], task: Task, method: Method) -> dict[str, float]:
    """For TensorBoard: what every kind of run is compared by, under one name."""
    values = [_value(row, task.config.loop.selection, task, method) for row in rounds]
    return {"criterion/last": values[-1], "criterion/best": max(values)}


def _duration(task: Task, method: Method) -> str:
    """The duration by whose returns a method's rounds are chosen: its own, else the longest."""
    durations = task.config.loop.durations_min
    own = method.duration_min
    return f"{own if own in durations else max(durations):g}"


def _gone_wrong(task: Task, rounds: list[dict[str, Any]]) -> str | None:
    """Why a method had better end here; None = it goes well."""
    if rounds[-1]["is_collapsed"] and not rounds[0]["is_collapsed"]:  # a timid f_0 may be mended
        return "nearly all holes are called one thing (collapse)"
    first, last_one = (rounds[k]["classifier"]["unlabelled"].get("entropy") for k in (0, -1))
    if first is not None and last_one is not None and last_one < _LEAST_ENTROPY * first:
        return f"its predictions have become certain: entropy {last_one:.3f}, of f_0 {first:.3f}"
    accuracies = [row["classifier"]["selection"]["accuracy"] for row in rounds]
    max_fall = task.config.loop.max_fall
    last = range(len(accuracies) - _ROUNDS_OF_A_FALL + 1, len(accuracies) + 1)
    if last[0] > 1 and all(has_fallen(accuracies[:end], max_fall) for end in last):
        return (
            f"accuracy on the selection squares has fallen from {max(accuracies):.3f} to "
            f"{accuracies[-1]:.3f}"
        )
    return None


def scalars(row: dict[str, Any]) -> dict[str, float | bool]:
    """What TensorBoard and metrics.jsonl have of a round."""
    flat: dict[str, Any] = {"is_collapsed": row["is_collapsed"]}
    for part in ("selection", "test"):
        for name in ("accuracy", "precision", "recall", "auc", "ece"):
            flat[f"{part}/{name}"] = row["classifier"][part][name]
            if row["posterior"]:
                flat[f"{part}_posterior/{name}"] = row["posterior"][part][name]
        for minutes, found in row["return"][part].items():
            flat[f"{part}/return_{minutes}"] = found["episode_return"]
            flat[f"{part}/num_low_ctf_{minutes}"] = found["num_low_ctf"]
    if labels := row["pseudo_labels"]:
        for name in ("accuracy", "precision", "recall", "auc"):
            flat[f"pseudo_labels/{name}"] = labels["labels"][name]
            flat[f"pseudo_labels/own_ranking_{name}"] = labels["own_ranking"][name]
    if roll := row["roll_out"]:
        for what in ("num_switches", "inconsistency", "inconsistency_bound"):
            flat |= {f"roll_out/{what}_{level}": v for level, v in roll[what].items()}
    flat["unlabelled/entropy"] = row["classifier"]["unlabelled"]["entropy"]
    flat["unlabelled/positive_share"] = row["classifier"]["unlabelled"]["positive_share"]
    flat |= {f"wall_s/{name}": seconds for name, seconds in row["wall_s"].items()}
    return flat


def format_summary(summary: dict[str, Any]) -> str:
    """The methods of a run side by side, as text; a run is one data set and ranks nothing."""
    durations = list(next(iter(summary["methods"].values()))["rounds"][0]["return"]["test"])
    rows = [("method", "round", "accuracy", "AUC", "posterior's", *(f"{d} min" for d in durations))]
    for name, found in summary["methods"].items():
        for criterion in CRITERIA:
            k = found["kept"][criterion]
            row = found["rounds"][k]
            judged = [row["classifier"]["test"]]
            judged += [row["posterior"]["test"]] if row["posterior"] else []
            aucs = [_text(figures["auc"], 3) for figures in judged]
            rows.append(
                (
                    f"{name}, by {criterion}",
                    str(k),
                    _text(judged[0]["accuracy"], 3),
                    aucs[0],
                    aucs[-1] if len(aucs) > 1 else "-",
                    *(_text(row["return"]["test"][d]["episode_return"], 1) for d in durations),
                )
            )
    sample = summary["sample"]
    return "\n".join(
        [
            f"{sample['num_labelled']} labels of {sample['num_train']} training holes; rounds kept "
            f"by {sample['num_selection']} selection holes, judged on {sample['num_test']} others",
            align(rows),
            *(
                f"{n}: ended early, {m['stopped']}"
                for n, m in summary["methods"].items()
                if m["stopped"]
            ),
        ]
    )


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def _print_round(row: dict[str, Any]) -> None:
    if "accuracy" in row:
        print(
            f"{row['share']:>4.0%}  {row['stage']}  selection: accuracy {_text(row['accuracy'], 3)}"
            f"  AUC {_text(row['auc'], 3)}  return {row['episode_return']:.1f}",
            file=sys.stderr,
            flush=True,
        )
