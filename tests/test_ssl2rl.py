"""SSL²-RL's loop: what a run leaves, what it may not know, how it ends and goes on."""

import copy
import dataclasses
import json
import math
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from envs.cryoem.images import draw_images
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import NavigationConfig, RandomEffects
from ssl2rl_ray.algorithms.policy import Artefact
from ssl2rl_ray.cli import main
from ssl2rl_ray.config import METHODS, LoopConfig, SSL2RLRunConfig, load_config
from ssl2rl_ray.data.folder import read_dataset, write_dataset
from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.loop.ssl2rl import _gone_wrong, _print_round, _warn_of_selection, kept_round, ssl2rl
from ssl2rl_ray.loop.stages import (
    Belief,
    Task,
    believe,
    env_of,
    evaluate_policy,
    judge_classifier,
    navigate,
    navigation_key,
    pretrain,
    session_of,
    whole_system,
)
from ssl2rl_ray.perception.head import Head
from ssl2rl_ray.perception.model import model_of_run
from ssl2rl_ray.recipes import NavigationAlgorithm, ValueAlgorithm
from ssl2rl_ray.report import report, write_report
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.schema import ConfigError

torch.set_num_threads(1)

LOOPED = ("iterative-fixmatch", "labelled-only", "planner", "smooth", "posterior")
NUM_ROUNDS = 2


@pytest.fixture(scope="module")
def sample_dir(tmp_path_factory) -> Path:
    """A small session with images; every tenth hole has none, every seventh no label."""
    rng = np.random.default_rng(4)
    table = draw_session(rng, "demo")
    images = draw_images(rng, table, "demo")
    has_image = np.arange(len(table)) % 10 != 3
    images[~has_image] = 0
    table = table.replace(
        is_labelled=np.arange(len(table)) % 7 != 2,
        p_low_ctf=np.full(len(table), 0.5),
        predicted_ctf_A=np.full(len(table), np.nan),
    )
    folder = tmp_path_factory.mktemp("data") / "session"
    write_dataset(table, folder, provenance={"notes": []}, images=images, has_image=has_image)
    return folder


def config(dataset: Path, **changes) -> SSL2RLRunConfig:
    values = {
        "kind": "ssl2rl",
        "seed": 2,
        "data.dataset": dataset,
        "data.labelled_fraction": 0.5,
        "data.validation_labelled_fraction": 0.2,
        "data.validation_share": 0.4,
        "classifier.network": "cnn",
        "pretraining.method": "supervised",
        "pretraining.learning_rate": 0.05,
        "pretraining.num_folds": 2,
        "loop.methods": f"[supervised, {', '.join(LOOPED)}]",
        "loop.num_rounds": NUM_ROUNDS,
        "loop.navigator": "lagrange",
        "loop.num_rollouts": 3,
        "loop.num_starts": 3,
        "loop.durations_min": "[30, 60]",
        "loop.max_fall": 1,
        "loop.pretraining_steps": 40,
        "loop.finetuning_steps": 2,
        "compute.num_torch_threads": 1,
        **changes,
    }
    found = load_config(None, [f"{name}={value}" for name, value in values.items()])
    assert isinstance(found, SSL2RLRunConfig)
    return found


HEAD = {
    "classifier.network": "head",
    "pretraining.learning_rate": "null",
    "loop.pretraining_steps": "null",
    "loop.finetuning_steps": "null",
}
RL = HEAD | {
    "loop.navigator": "algorithm",
    "loop.num_rounds": 1,
    "env.feature_set": "rates",
    "algorithm.learning_starts": 64,
    "algorithm.batch_size": 32,
    "algorithm.hidden_sizes": "[16]",
    "rl.num_env_steps": 256,
    "rl.num_envs_per_runner": 8,
    "rl.evaluation_interval_steps": 128,
    "rl.num_validation_sessions": 2,
    "rl.num_torch_threads": 1,
}
"""Heads for speed, and a policy that learns a little."""


def rl(algorithm: str) -> dict[str, Any]:
    """``RL`` by another algorithm; those that learn a policy have no replay."""
    of_replay = ("algorithm.learning_starts", "algorithm.batch_size")
    has_values = algorithm in ("dqn", "rainbow")
    kept = {name: value for name, value in RL.items() if has_values or name not in of_replay}
    runners = {"rl.num_env_runners": 1} if algorithm == "async_a2c" else {}
    return kept | {"algorithm.name": algorithm} | runners


@pytest.fixture(scope="module")
def one_ray():
    """Of all runs that train a policy."""
    with local_ray(2):
        yield


def quiet(row: dict[str, Any]) -> None:
    pass


def played(path: Path, chosen: SSL2RLRunConfig) -> Path:
    with RunDirectory.create(path, chosen) as run:
        ssl2rl(chosen, run, progress=quiet)
    return path


@pytest.fixture(scope="module")
def run(sample_dir, tmp_path_factory) -> Path:
    return played(tmp_path_factory.mktemp("runs") / "run", config(sample_dir))


def summary_of(run: Path) -> dict[str, Any]:
    found = RunDirectory.open(run).summary
    assert found is not None
    return found


def rounds(run: Path) -> list[Path]:
    return sorted(run.glob("methods/*/round-*"))


# ---- what a run leaves ---------------------------------------------------------------------------


def test_every_round_leaves_what_its_readers_need(run, sample_dir):
    opened = RunDirectory.open(run)
    summary, task = summary_of(run), Task.of(config(sample_dir))
    assert opened.status == "finished"
    assert summary["sample"] == opened.record("sample.json") == task.describe()
    num = task.describe()
    assert num["num_train"] + num["num_selection"] + num["num_test"] == num["num_holes"]
    assert list(summary["methods"]) == ["supervised", *LOOPED]
    for name, found in summary["methods"].items():
        num_rounds = NUM_ROUNDS if METHODS[name].rule else 0
        assert len(found["rounds"]) == num_rounds + 1 and found["stopped"] is None
        for k, row in enumerate(found["rounds"]):
            folder = run / "methods" / name / f"round-{k:02d}"
            assert json.loads((folder / "round.json").read_text()) == row
            assert (row["method"], row["round"], row["seed"]) == (name, k, 2)
            assert row["labelled_fraction"] == 0.5 and row["algorithm"] == "lagrange"
            assert (folder / "classifier").is_dir() == (k > 0)
            assert set(row["wall_s"]) == {"classifier", "policy", "roll_out", "evaluation"}
            assert set(row["classifier"]) == {"selection", "test", "unlabelled"}
            assert {"selection", "test", "test_blind"} <= set(row["posterior"])
            for part in ("selection", "test"):
                assert row["classifier"][part]["num_holes"] == len(task.part(part))
                assert list(row["return"][part]) == ["30", "60"]
                for figures in row["return"][part].values():
                    returns = figures["episode_returns"]
                    assert len(returns) == 3
                    assert figures["episode_return"] == pytest.approx(np.mean(returns))
                    assert figures["num_low_ctf"] <= figures["num_visits"]
            assert (row["pseudo_labels"] is not None) == (
                k < num_rounds and METHODS[name].rule != "none"
            )
    metrics = opened.metrics()
    assert len(metrics) == 1 + len(LOOPED) * (NUM_ROUNDS + 1)
    assert not np.isnan(metrics["selection/accuracy"].to_numpy(float)).any()
    assert len(list(run.glob("tensorboard/*/events*"))) == 1 + len(LOOPED)


def test_pseudo_labels_are_of_exactly_the_unlabelled_training_holes(run, sample_dir):
    task = Task.of(config(sample_dir))
    expected = task.table.hole_name[np.setdiff1d(task.train, task.split.labelled)].tolist()
    found = summary_of(run)["methods"]
    for folder in rounds(run):
        name, k = folder.parent.name, int(folder.name[-2:])
        path, figures = folder / "pseudo_labels.parquet", found[name]["rounds"][k]["pseudo_labels"]
        assert path.exists() == (figures is not None)
        if figures is None:
            continue
        labels = pq.read_table(path).to_pydict()
        assert labels["hole_name"] == expected
        assert all(0 <= c <= 1 for c in labels["confidence"])
        assert figures["num_unlabelled"] == len(expected)
        assert figures["num_positive"] == sum(labels["is_low_ctf"])
        if METHODS[name].rule != "self":  # at N_C, but for ties of several roll-outs
            assert sum(labels["is_low_ctf"]) == pytest.approx(
                task.low_share * len(expected), rel=0.1
            )
    assert {f.parent.parent.name for f in run.glob("methods/*/*/pseudo_labels.parquet")} == {
        "iterative-fixmatch",
        "planner",
        "smooth",
        "posterior",
    }


def test_methods_share_f_0_and_each_round_goes_on_from_the_one_before(run):
    assert [p.name for p in (run / "f0").iterdir() if (p / "model").exists()] == ["supervised"]
    methods = summary_of(run)["methods"]
    first = methods["supervised"]["rounds"][0]
    for name in LOOPED:
        row = methods[name]["rounds"][0]
        assert row["classifier"] == first["classifier"]
        if not METHODS[name].is_posterior_seen:
            assert row["return"] == first["return"]
    assert methods["posterior"]["rounds"][0]["return"] != first["return"]
    for folder in rounds(run):
        name, k = folder.parent.name, int(folder.name[-2:])
        if not k:
            continue
        stage = RunDirectory.open(folder / "classifier").config
        begun = f"methods/{name}/round-{k - 1:02d}/classifier" if k > 1 else "f0/supervised"
        assert stage.classifier.initial == str(run / begun)  # type: ignore[union-attr]
        labels = run / "methods" / name / f"round-{k - 1:02d}" / "pseudo_labels.parquet"
        asked = stage.training.pseudo_labels  # type: ignore[union-attr]
        assert asked == (str(labels) if labels.exists() else None)


def test_every_round_is_judged_and_played_on_its_own_classifier(run, sample_dir):
    task, f_0 = Task.of(config(sample_dir)), run / "f0" / "supervised"
    for folder in rounds(run):
        name, k = folder.parent.name, int(folder.name[-2:])
        belief = believe(task, f_0, folder / "classifier" if k else f_0)
        row = summary_of(run)["methods"][name]["rounds"][k]
        for kind, parts in judge_classifier(task, belief).items():
            for part, figures in parts.items():
                assert row[kind][part] == pytest.approx(figures), (name, k, kind, part)
        if name in ("iterative-fixmatch", "posterior") and k < NUM_ROUNDS:
            p = belief.p_classifier if name == "iterative-fixmatch" else belief.p_posterior
            assert p is not None
            is_open = ~task.is_labelled[task.train]
            labels = pq.read_table(folder / "pseudo_labels.parquet").to_pydict()
            if name == "iterative-fixmatch":  # its rule is p >= 1/2
                assert labels["is_low_ctf"] == (p[task.train][is_open] >= 0.5).tolist()
            confidence = np.array(labels["confidence"])
            sure = np.abs(2 * p[task.train][is_open] - 1)
            np.testing.assert_allclose(confidence[confidence > 0], sure[confidence > 0], atol=1e-9)


def test_visit_orders_are_of_all_training_holes(run, sample_dir):
    task = Task.of(config(sample_dir))
    found = sorted(run.glob("**/roll_out.npz"))
    assert len(found) == NUM_ROUNDS  # of `planner`, all rounds but the last
    for path in found:
        with np.load(path) as roll:
            order = roll["visit_order"]
        assert (np.sort(order, axis=1) == np.arange(len(task.train))).all() and len(order) == 3
    row = summary_of(run)["methods"]["planner"]["rounds"][0]
    assert sum(row["roll_out"]["num_switches"].values()) == len(task.train) - 1
    for level, rate in row["roll_out"]["inconsistency"].items():
        assert rate <= row["roll_out"]["inconsistency_bound"][level] + 1e-12


def test_the_kept_rounds_are_the_best_on_the_selection_squares(run):
    for found in summary_of(run)["methods"].values():
        returns = [row["return"]["selection"]["60"]["episode_return"] for row in found["rounds"]]
        accuracies = [row["classifier"]["selection"]["accuracy"] for row in found["rounds"]]
        assert found["kept"]["reward"] == int(np.argmax(returns))
        assert found["kept"]["accuracy"] == int(np.argmax(accuracies))
        aucs = [row["classifier"]["selection"]["auc"] for row in found["rounds"]]
        assert found["kept"]["auc"] == int(np.argmax(aucs))
        assert returns[found["kept"]["reward"]] >= returns[0]


def test_a_finished_run_is_read_not_played_again(run, sample_dir):
    before = {p: p.stat().st_mtime_ns for p in run.glob("[fm]*/**/*") if p.is_file()}
    summary = summary_of(run)
    stages: list[str] = []
    with RunDirectory.resume(run, config(sample_dir)) as resumed:
        again = ssl2rl(
            config(sample_dir), resumed, progress=lambda row: stages.append(row["stage"])
        )
    assert json.loads(json.dumps(again)) == summary
    assert not [stage for stage in stages if ":" in stage]  # no stage was under way
    now = {p: p.stat().st_mtime_ns for p in run.glob("[fm]*/**/*") if p.is_file()}
    assert {p: t for p, t in now.items() if p.name != "metrics.jsonl"} == {
        p: t for p, t in before.items() if p.name != "metrics.jsonl"
    }


# ---- what nobody may know ------------------------------------------------------------------------


def poison(source: Path, task: Task, target: Path) -> Path:
    """The dataset with other CTF values wherever nobody may know them."""
    dataset = read_dataset(source)
    table = dataset.table
    ctf = table.ctf_max_resolution_A.copy()
    secret = ~task.is_known & np.isfinite(ctf)
    ctf[secret] = np.random.default_rng(9).uniform(3, 12, int(secret.sum()))
    write_dataset(
        table.replace(ctf_max_resolution_A=ctf),
        target,
        provenance={"notes": []},
        images=None if dataset.images is None else np.array(dataset.images),
        has_image=dataset.has_image if dataset.images is not None else None,
    )
    return target


def decided(folder: Path) -> dict[str, Any]:
    """All that a run has decided, by file; what it has measured left out."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.parent.name == "model" and path.parents[2].name == "methods":
            continue  # of the round that the selection squares keep: that is measured
        if path.name == "model.json":
            model = model_of_run(path.parent)
            posterior = model.posterior
            head = model.classifier
            found[name] = (
                head.coefficients.tolist() if isinstance(head, Head) else None,
                model.temperature,
                sorted(model.cross_fitted.items()),
                sorted(model.labels_seen),
                posterior and dataclasses.replace(posterior, fitted_on=""),
            )
        elif path.name in ("model.safetensors", "policy.safetensors", "holes.parquet"):
            found[name] = path.read_bytes()
        elif path.name == "pseudo_labels.parquet":
            found[name] = pq.read_table(path).to_pydict()
        elif path.name == "roll_out.npz":
            with np.load(path) as roll:
                found[name] = {key: roll[key].tobytes() for key in roll}
    return found


def test_labels_that_nobody_may_know_change_only_what_is_measured(run, sample_dir, tmp_path):
    task = Task.of(config(sample_dir))
    secret = config(poison(sample_dir, task, tmp_path / "poisoned"))
    other = played(tmp_path / "run", secret)
    a, b = decided(run), decided(other)
    assert a.keys() == b.keys()
    kinds = {Path(name).name for name in a}
    assert {"model.json", "model.safetensors", "pseudo_labels.parquet", "roll_out.npz"} <= kinds
    assert [name for name in a if a[name] != b[name]] == []
    clean, dirty = summary_of(run)["methods"], summary_of(other)["methods"]
    for name in clean:
        for ours, theirs in zip(clean[name]["rounds"], dirty[name]["rounds"], strict=True):
            assert ours["classifier"]["test"]["auc"] != theirs["classifier"]["test"]["auc"]
            assert ours["is_collapsed"] == theirs["is_collapsed"]
            assert ours["roll_out"] == theirs["roll_out"]


def test_no_session_shows_a_label_that_nobody_may_know(run, sample_dir, tmp_path):
    tasks = [Task.of(config(sample_dir))]
    tasks.append(Task.of(config(poison(sample_dir, tasks[0], tmp_path / "poisoned"))))
    f_0 = run / "f0" / "supervised"
    beliefs = [believe(task, f_0, f_0) for task in tasks]
    task = tasks[0]
    for field in dataclasses.fields(Belief):
        a, b = (getattr(belief, field.name) for belief in beliefs)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
    for method in METHODS.values():
        seen = [session_of(t, method, b) for t, b in zip(tasks, beliefs, strict=True)]
        assert seen[0].content_hash == seen[1].content_hash
        rows = np.flatnonzero(np.isin(task.table.hole_name, seen[0].hole_name))
        assert np.isin(rows, task.train).all()
        assert (np.isfinite(seen[0].ctf_max_resolution_A) == task.is_labelled[rows]).all()
        assert len(seen[0]) == len(
            task.split.labelled if method.is_rl_labelled_only else task.train
        )


def test_the_posterior_of_validation_holes_reads_the_known_labels_only(run, sample_dir):
    task, f_0 = Task.of(config(sample_dir)), run / "f0" / "supervised"
    belief = believe(task, f_0, f_0)
    assert belief.p_posterior is not None and belief.p_blind is not None
    judged = np.concatenate([task.selection, task.test])
    assert (belief.p_posterior != belief.p_blind)[judged].mean() > 0.5
    truth = task.truth.copy()
    truth[task.split.known] = 1 - truth[task.split.known]
    turned = believe(dataclasses.replace(task, truth=truth), f_0, f_0)
    assert turned.p_posterior is not None and turned.p_blind is not None
    assert (turned.p_blind == belief.p_blind)[judged].all()
    assert (turned.p_posterior != belief.p_posterior)[judged].any()


def test_the_bounds_do_read_the_labels(demo_dir, tmp_path):
    """Else the tests above would prove nothing."""
    changes = HEAD | {"loop.methods": "[full-labels, true-labels]", "loop.num_rounds": 1}
    clean = config(demo_dir, **changes)
    secret = config(poison(demo_dir, Task.of(clean), tmp_path / "poisoned"), **changes)
    runs = [decided(played(tmp_path / name, c)) for name, c in (("a", clean), ("b", secret))]
    assert runs[0].keys() == runs[1].keys()
    differing = {name for name in runs[0] if runs[0][name] != runs[1][name]}
    assert differing == {
        "f0/full/model.json",
        "methods/true-labels/round-00/pseudo_labels.parquet",
        "methods/true-labels/round-01/classifier/model.json",
    }


@pytest.mark.ray
def test_policies_learn_nothing_from_labels_that_nobody_may_know(tmp_path, demo_dir, one_ray):
    changes = RL | {"loop.methods": "[labelled-rl, q-values]", "env.budget_min": 60}
    clean = config(demo_dir, **changes)
    secret = config(poison(demo_dir, Task.of(clean), tmp_path / "poisoned"), **changes)
    a, b = (decided(played(tmp_path / n, c)) for n, c in (("a", clean), ("b", secret)))
    assert a.keys() == b.keys()
    kinds = {Path(name).name for name in a}
    assert {"policy.safetensors", "holes.parquet", "roll_out.npz"} <= kinds
    assert [name for name in a if a[name] != b[name]] == []


# ---- how a method ends ---------------------------------------------------------------------------


def rows_of(*accuracies: float, is_collapsed: bool = False) -> list[dict[str, Any]]:
    return [
        {
            "classifier": {"selection": {"accuracy": accuracy}, "unlabelled": {"entropy": 0.6}},
            "return": {"selection": {"60": {"episode_return": 100 * accuracy}}},
            "is_collapsed": is_collapsed and k == len(accuracies) - 1,
        }
        for k, accuracy in enumerate(accuracies)
    ]


def task_of(**loop: Any) -> Task:
    chosen = SSL2RLRunConfig(loop=LoopConfig(**loop))
    return types.SimpleNamespace(config=chosen)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("accuracies", "is_over"),
    [
        ((0.6,), False),
        ((0.6, 0.5), False),  # one bad round may be an accident
        ((0.6, 0.5, 0.5), True),
        ((0.6, 0.58, 0.58, 0.58), False),  # within max_fall
        ((0.6, 0.56, 0.6, 0.56), False),  # it came back
        ((0.6, 0.56, 0.56), True),
        ((0.6, 0.65, 0.61, 0.62), True),  # below the best, not below f_0 alone
        ((0.6, 0.65, 0.61, 0.63), False),
        ((0.6, 0.61, 0.62, 0.63), False),
    ],
)
def test_a_fall_of_two_rounds_ends_a_method(accuracies, is_over):
    found = _gone_wrong(task_of(max_fall=0.03), rows_of(*accuracies))
    assert (found is not None) == is_over
    if found:
        assert f"from {max(accuracies):.3f} to {accuracies[-1]:.3f}" in found


def test_a_collapse_ends_a_method_at_once_unless_f_0_was_no_better():
    rows = rows_of(0.6, 0.6, is_collapsed=True)
    found = _gone_wrong(task_of(), rows)
    assert found is not None and "collapse" in found
    assert _gone_wrong(task_of(), rows[1:]) is None
    assert _gone_wrong(task_of(), rows[1:] * 2) is None


def test_predictions_that_become_certain_end_a_method():
    rows = rows_of(0.6, 0.6)
    rows[1]["classifier"]["unlabelled"]["entropy"] = 0.061
    assert _gone_wrong(task_of(), rows) is None
    rows[1]["classifier"]["unlabelled"]["entropy"] = 0.059
    assert "certain: entropy 0.059, of f_0 0.600" in str(_gone_wrong(task_of(), rows))


def test_a_round_that_cannot_be_judged_is_told_all_the_same(capsys):
    row = {"share": 0.5, "stage": "planner round 1", "accuracy": 0.61, "auc": None}
    _print_round(row | {"episode_return": 12.3})
    assert "planner round 1  selection: accuracy 0.610  AUC -" in capsys.readouterr().err


def test_the_first_of_equal_rounds_is_kept():
    task = task_of(durations_min=(30.0, 60.0))
    for criterion in ("reward", "accuracy"):
        for accuracies, best in (((0.6, 0.6, 0.6), 0), ((0.5, 0.6, 0.6), 1), ((0.6, 0.5), 0)):
            assert kept_round(rows_of(*accuracies), criterion, task, METHODS["planner"]) == best


def test_a_round_without_an_auc_is_not_kept_by_it():
    rows = rows_of(0.6, 0.6, 0.6)
    for row, auc in zip(rows, (None, 0.4, 0.5), strict=True):
        row["classifier"]["selection"]["auc"] = auc
    assert kept_round(rows, "auc", task_of(durations_min=(60.0,)), METHODS["planner"]) == 2


def test_a_collapse_is_said_and_the_method_ends_there(demo_dir, tmp_path, capsys, monkeypatch):
    from ssl2rl_ray.loop import ssl2rl as loop

    real = loop.play_round

    def spoilt(task, name, k, *args, **kwargs):
        row = real(task, name, k, *args, **kwargs)
        return row | {"is_collapsed": True} if k == 1 else row

    monkeypatch.setattr(loop, "play_round", spoilt)
    changes = {"loop.methods": "[iterative-fixmatch]", "loop.num_rounds": 3}
    chosen = config(demo_dir, **HEAD, **changes)
    found = summary_of(played(tmp_path / "run", chosen))["methods"]["iterative-fixmatch"]
    assert len(found["rounds"]) == 2 and "collapse" in found["stopped"]
    assert "iterative-fixmatch ends after round 1" in capsys.readouterr().err


# ---- how a run goes on ---------------------------------------------------------------------------


def without_time(summary: dict[str, Any]) -> dict[str, Any]:
    out = copy.deepcopy(summary)
    for found in out["methods"].values():
        for row in found["rounds"]:
            del row["wall_s"]
    return out


def interrupted_at(boundaries: Callable[[dict[str, Any]], str | None]):
    """A ``progress`` that breaks off at every boundary that it has not met before."""
    met: set[str] = set()

    def progress(row: dict[str, Any]) -> None:
        key = boundaries(row)
        if key is not None and key not in met:
            met.add(key)
            raise KeyboardInterrupt(key)

    return met, progress


def play_brokenly(path: Path, chosen: SSL2RLRunConfig, at_end: bool) -> set[str]:
    """Plays a run, interrupted once in every stage; the stages."""

    def boundary(row: dict[str, Any]) -> str | None:
        return row["stage"] if not at_end or math.isclose(row["stage_share"], 1) else None

    met, progress = interrupted_at(boundary)
    RunDirectory.create(path, chosen).finish("interrupted")
    while True:
        try:
            with RunDirectory.resume(path, chosen) as resumed:
                ssl2rl(chosen, resumed, progress=progress)
            return met
        except KeyboardInterrupt:
            assert RunDirectory.open(path).status == "interrupted"


def assert_ended_alike(broken: Path, whole: Path) -> None:
    a, b = summary_of(broken), summary_of(whole)
    assert without_time(a)["methods"] == {
        name: found for name, found in without_time(b)["methods"].items() if name in a["methods"]
    }
    ours, theirs = decided(broken), decided(whole)
    assert ours.keys() <= theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert not RunDirectory.open(broken).metrics().duplicated(["method", "round"]).any()


@pytest.mark.parametrize("at_end", [False, True], ids=["as a stage begins", "as it ends"])
def test_a_run_broken_off_at_every_stage_ends_as_if_it_had_not_been(
    run, sample_dir, tmp_path, at_end
):
    chosen = config(sample_dir, **{"loop.methods": "[iterative-fixmatch, planner]"})
    met = play_brokenly(tmp_path / "run", chosen, at_end)
    assert {"iterative-fixmatch round 1: classifier", "planner round 1: roll-outs"} <= met
    assert_ended_alike(tmp_path / "run", run)


@pytest.mark.ray
@pytest.mark.parametrize("algorithm", ["dqn", "rainbow", "ppo"])
def test_so_does_a_run_broken_off_while_a_policy_is_trained(demo_dir, tmp_path, one_ray, algorithm):
    chosen = config(demo_dir, **rl(algorithm), **{"loop.methods": "[ssl2rl-120]"})
    whole = played(tmp_path / "whole", chosen)
    met = play_brokenly(tmp_path / "broken", chosen, False)
    assert {f"ssl2rl-120 round {k}: policy" for k in range(2)} <= met
    assert_ended_alike(tmp_path / "broken", whole)


def test_other_settings_do_not_go_on_with_a_run(run, sample_dir):
    with pytest.raises(ValueError, match="was begun with another config"):
        RunDirectory.resume(run, config(sample_dir, **{"loop.num_rounds": 3}))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop.methods": "[q-values]"}, "q-values are of trained policies"),
        (
            {
                "loop.methods": "[posterior]",
                "pretraining.num_folds": 0,
                "data.validation_labelled_fraction": 0,
            },
            "the posterior needs",
        ),
        ({"data.low_ctf_threshold_A": 5}, "what is labelled and what is rewarded"),
    ],
)
def test_what_would_fail_rounds_later_is_said_at_once(sample_dir, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(sample_dir, **changes)


@pytest.mark.parametrize("name", ["posterior", "ssl2rl-posterior"])
def test_a_policy_that_sees_the_posterior_needs_one(sample_dir, name):
    changes = {"pretraining.num_folds": 0, "data.validation_labelled_fraction": 0}
    with pytest.raises(ConfigError, match="the posterior needs"):
        config(sample_dir, **changes, **{"loop.methods": f"[{name}]"})


def test_exploration_needs_the_folds_that_find_its_spread(sample_dir):
    changes = {"pretraining.num_folds": 0, "data.validation_labelled_fraction": 0}
    changes |= {"loop.methods": "[planner]"}
    with pytest.raises(ConfigError, match=r"loop.exploration: the spread is what pretraining"):
        config(sample_dir, **changes, **{"loop.exploration": 0.3})
    for said_nothing_or_none in ({}, {"loop.exploration": 0}):
        config(sample_dir, **changes, **said_nothing_or_none)


def test_a_file_of_pseudo_labels_that_went_missing_is_an_error_not_a_control(
    sample_dir, run, tmp_path
):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "methods" / "smooth" / "round-01")
    (again / "methods" / "smooth" / "round-00" / "pseudo_labels.parquet").unlink()
    with (
        RunDirectory.resume(again, config(sample_dir)) as opened,
        pytest.raises(ValueError, match=r"pseudo_labels\.parquet"),
    ):
        ssl2rl(config(sample_dir), opened, progress=quiet)


def test_selection_squares_of_one_kind_are_said(demo_dir, capsys):
    task = Task.of(config(demo_dir, **HEAD))
    rows = task.part("selection")
    for num_low, is_said in ((0, True), (4, True), (5, False), (len(rows), True)):
        truth = task.truth.copy()
        truth[rows] = np.arange(len(rows)) < num_low
        _warn_of_selection(dataclasses.replace(task, truth=truth))
        said = capsys.readouterr().err
        assert (f"{num_low} of {len(rows)} selection holes are low-CTF" in said) == is_said


# ---- a user's own session: all labels that there are, and holes without any ----------------------


def only_some_measured(source: Path, target: Path, share: float) -> Path:
    """The dataset with the CTF of a share of its holes, drawn at random."""
    dataset = read_dataset(source)
    table = dataset.table
    is_measured = np.random.default_rng(3).random(len(table)) < share
    ctf = np.where(is_measured, table.ctf_max_resolution_A, np.nan)
    table = table.replace(ctf_max_resolution_A=ctf, is_labelled=is_measured)
    write_dataset(table, target, provenance={"notes": []})
    return target


def test_all_labels_of_a_session_may_be_used_and_the_rest_is_labelled(demo_dir, tmp_path):
    mine = only_some_measured(demo_dir, tmp_path / "mine", 0.3)
    changes = HEAD | {"data.labelled_fraction": 1, "loop.num_rounds": 1}
    chosen = config(mine, **changes, **{"loop.methods": "[smooth, planner]"})
    task = Task.of(chosen)
    assert not np.isfinite(task.truth[task.split.unlabelled]).any()
    found = summary_of(played(tmp_path / "run", chosen))["methods"]
    for method in found.values():
        first = method["rounds"][0]
        figures = first["classifier"]["unlabelled"]
        assert figures["num_holes"] == 0 and figures["accuracy"] is None
        assert 0 < figures["positive_share"] < 1  # a collapse would be seen
        labels = first["pseudo_labels"]
        assert labels["num_unlabelled"] == len(task.train) - len(task.split.labelled) > 0
        assert labels["labels"]["accuracy"] is None


def test_a_session_that_is_labelled_throughout_leaves_nothing_to_label(demo_dir, tmp_path):
    whole = HEAD | {"data.labelled_fraction": 1}
    with pytest.raises(ValueError, match="every hole of the training squares is labelled"):
        Task.of(config(demo_dir, **whole, **{"loop.methods": "[smooth]"}))
    found = played(
        tmp_path / "run", config(demo_dir, **whole, **{"loop.methods": "[supervised, full-labels]"})
    )
    first = summary_of(found)["methods"]["supervised"]["rounds"][0]
    assert first["classifier"]["unlabelled"]["positive_share"] is None


# ---- what a method's RL is trained under ---------------------------------------------------------


def test_a_policy_is_trained_for_its_methods_own_session(sample_dir, tmp_path):
    task = Task.of(config(sample_dir, **{"env.budget_min": 200}))
    p = np.full(len(task.table), 0.5)
    belief = Belief(p_classifier=p, p_posterior=None, p_blind=None, effects=RandomEffects())
    for name, minutes in (("ssl2rl-120", 120), ("ssl2rl-480", 480), ("planner", 200)):
        assert env_of(task.config, METHODS[name]).budget_min == minutes
        navigator = navigate(task, METHODS[name], belief, tmp_path, lambda *_: None)
        assert navigator.rules.budget_min == minutes
    keys = {name: navigation_key(task, method) for name, method in METHODS.items()}
    alike = {"ssl2rl-480", "q-values"}  # what shares a key shares policy, returns and roll-outs
    assert keys["ranking"] == keys["iterative-fixmatch"] and "200" in keys["ranking"]
    for name in ("ssl2rl-120", "ssl2rl-480", "posterior", "labelled-rl", "no-movement-cost"):
        others = {key for other, key in keys.items() if other not in {name, *alike}}
        others -= {keys["ssl2rl-posterior"]} if name == "posterior" else set()
        assert keys[name] not in others


def test_a_round_is_kept_by_sessions_as_long_as_its_rl_was_trained_for():
    task = task_of(durations_min=(120.0, 480.0))
    rows = [
        {"return": {"selection": {"120": {"episode_return": a}, "480": {"episode_return": b}}}}
        for a, b in ((1.0, 2.0), (3.0, 1.0))
    ]
    for name, best in (("ssl2rl-120", 1), ("ssl2rl-480", 0), ("iterative-fixmatch", 0)):
        assert kept_round(rows, "reward", task, METHODS[name]) == best


def test_labels_come_from_different_starts_and_draws_in_every_round(run):
    orders = []
    for k in range(NUM_ROUNDS):
        path = run / "f0" / "supervised-lagrange-480" / "roll_out.npz"
        path = path if not k else run / "methods" / "planner" / f"round-{k:02d}" / "roll_out.npz"
        with np.load(path) as roll:
            orders.append(roll["visit_order"])
    assert all(len({tuple(row) for row in order.tolist()}) == 3 for order in orders)
    starts = [tuple(order[:, 0].tolist()) for order in orders]
    assert len(set(starts)) == NUM_ROUNDS and all(len(set(start)) > 1 for start in starts)


# ---- any algorithm -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_by(demo_dir, tmp_path_factory, one_ray) -> Callable[[str], Path]:
    """A run of one data set by the named algorithm, played where it is first asked for."""
    folder = tmp_path_factory.mktemp("by")

    def run(algorithm: str) -> Path:
        path = folder / algorithm
        chosen = config(demo_dir, **rl(algorithm), **{"loop.methods": "[ssl2rl-120]"})
        return path if path.exists() else played(path, chosen)

    return run


@pytest.mark.ray
@pytest.mark.parametrize("algorithm", [a.name for a in get_args(NavigationAlgorithm)])
def test_the_loop_plays_with_every_algorithm(run_by, algorithm):
    run = run_by(algorithm)
    chosen = RunDirectory.open(run).config
    assert isinstance(chosen, SSL2RLRunConfig)
    task = Task.of(chosen)
    found = summary_of(run)["methods"]["ssl2rl-120"]
    assert [row["algorithm"] for row in found["rounds"]] == [algorithm] * 2
    assert found["rounds"][0]["pseudo_labels"]["num_positive"] > 0
    policies = [run / "f0/supervised-algorithm-120/policy"]
    policies += [run / "methods/ssl2rl-120/round-01/policy"]
    assert run / found["recommended"]["policy"] in policies
    weights = []
    for folder in policies:
        opened = RunDirectory.open(folder)
        assert opened.status == "finished" and opened.policy is not None
        artefact = Artefact.load(opened.policy)
        assert artefact.name == algorithm
        assert artefact.has_values == isinstance(chosen.algorithm, ValueAlgorithm)
        weights.append(artefact.weights)
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])
    with np.load(policies[0].parent / "roll_out.npz") as roll:
        order = roll["visit_order"]
        assert (np.sort(order, axis=1) == np.arange(len(task.train))).all() and len(order) == 3
        assert ("value" in roll) == isinstance(chosen.algorithm, ValueAlgorithm)


@pytest.mark.ray
def test_the_report_has_algorithms_side_by_side(run_by, tmp_path):
    runs = {name: run_by(name) for name in ("dqn", "a2c")}
    firsts = [summary_of(run)["methods"]["ssl2rl-120"]["rounds"][0] for run in runs.values()]
    assert firsts[0]["classifier"] == firsts[1]["classifier"]  # f_0 knows nothing of them
    document = report(list(runs.values()))
    assert document["navigator"] == "dqn"
    table = document["tables"]["table4"]
    assert [row["row"] for row in table["rows"]] == [
        f"ssl2rl-120/{name}/{kept_by}" for name in runs for kept_by in ("reward", "accuracy")
    ]
    for name, run in runs.items():
        found = summary_of(run)["methods"]["ssl2rl-120"]
        kept = found["rounds"][found["kept"]["reward"]]
        (cell,) = (
            cell
            for cell in table["cells"]
            if (cell["row"], cell["quantity"]) == (f"ssl2rl-120/{name}/reward", "return-60")
        )
        assert (cell["n"], cell["paper"]) == (1, "not at hand")
        assert cell["mean"] == pytest.approx(kept["return"]["test"]["60"]["episode_return"])
    assert any(d["row"] == "ssl2rl-120/a2c/reward" for d in table["differences"])
    assert "SSL²-RL 120, a2c, kept by reward" in write_report(document, tmp_path).read_text()


@pytest.mark.parametrize("algorithm", ["a2c", "ppo"])
def test_q_values_are_of_algorithms_that_learn_them(sample_dir, algorithm):
    with pytest.raises(
        ConfigError, match=rf"{algorithm} learns none: .*dqn or rainbow.*ssl2rl-480"
    ):
        config(sample_dir, **rl(algorithm), **{"loop.methods": "[fixmatch, q-values]"})


# ---- a policy without movement costs -------------------------------------------------------------


def test_a_policy_without_movement_costs_does_not_learn_of_them_when_it_is_judged(
    run, sample_dir, tmp_path
):
    task, f_0 = Task.of(config(sample_dir)), run / "f0" / "supervised"
    belief = believe(task, f_0, f_0)
    seen: list[NavigationConfig] = []
    for name in ("planner", "no-movement-cost"):
        navigator = navigate(task, METHODS[name], belief, tmp_path / name, lambda *_: None)

        def make(stack, rules, made=navigator.make):
            seen.append(rules)
            return made(stack, rules)

        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        watched = dataclasses.replace(navigator, make=make)
        found = evaluate_policy(
            task, METHODS[name], belief, watched, tmp_path / name, lambda *_: None
        )
        # whoever plays, the microscope takes its time
        assert found["test"]["60"]["num_visits"] < 30
    paper = NavigationConfig.preset("paper")
    assert [rules.minutes for rules in seen] == [paper.minutes] * 4 + [(2.0,) * 4] * 4
    assert [rules.budget_min for rules in seen] == [30.0, 60.0] * 4


# ---- what TensorBoard has ------------------------------------------------------------------------


def test_tensorboard_has_the_figures_of_every_round_by_method(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, found in summary_of(run)["methods"].items():
        events = EventAccumulator(str(run / "tensorboard" / name), {"scalars": 0})
        events.Reload()
        assert {
            "selection/accuracy",
            "selection/auc",
            "test/accuracy",
            "test_posterior/auc",
            "selection/return_60",
            "test/num_low_ctf_30",
            "wall_s/classifier",
        } <= set(events.Tags()["scalars"])
        for tag, part, figure in (
            ("selection/accuracy", "selection", "accuracy"),
            ("test/auc", "test", "auc"),
        ):
            logged = {e.step: e.value for e in events.Scalars(tag)}
            expected = [row["classifier"][part][figure] for row in found["rounds"]]
            assert logged == pytest.approx(dict(enumerate(expected)))
        earned = [e.value for e in events.Scalars("selection/return_60")]
        assert earned == pytest.approx(
            [row["return"]["selection"]["60"]["episode_return"] for row in found["rounds"]]
        )
        has_labels = "pseudo_labels/accuracy" in events.Tags()["scalars"]
        assert has_labels == (METHODS[name].rule not in (None, "none"))
        if has_labels:  # of every round but the last
            steps = [e.step for e in events.Scalars("pseudo_labels/accuracy")]
            assert steps == list(range(NUM_ROUNDS))
        assert ("roll_out/num_switches_patch" in events.Tags()["scalars"]) == (name == "planner")


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_run_of_the_loop_is_no_classifier_and_no_policy(run, sample_dir, capsys, command):
    words = [command, str(run), "--data", str(sample_dir)]
    words += ["--out", "unused.parquet"] if command == "predict" else []
    assert main(words) != 0
    said = capsys.readouterr().err
    assert "name one, such as" in said and "methods/METHOD/" in said


def test_the_recommended_model_predicts_what_the_loop_judged(run, sample_dir, tmp_path):
    task = Task.of(config(sample_dir))
    dataset = read_dataset(sample_dir)
    assert dataset.images is not None and dataset.has_image is not None
    f_0 = run / "f0" / "supervised"
    classifiers = {run / f"methods/{name}/round-02/classifier" for name in ("smooth", "posterior")}
    for name, found in summary_of(run)["methods"].items():
        chosen = found["recommended"]
        assert chosen["model"] == f"methods/{name}/model"
        classifier = run / chosen["classifier"]
        classifiers.add(classifier)
        ours, theirs = model_of_run(run / chosen["model"]), whole_system(task, f_0, classifier)
        assert ours.posterior == theirs.posterior and ours.temperature == theirs.temperature
    for classifier in classifiers:
        belief, model = believe(task, f_0, classifier), whole_system(task, f_0, classifier)
        logit = model.logits(task.table, dataset.images, dataset.has_image)
        assert belief.p_posterior is not None
        # Where logits are very large, they are clipped before or after they are matched.
        judged = np.concatenate([task.selection, task.test])
        said = model.predict(task.table, logit, task.is_known)
        np.testing.assert_allclose(said.p_low_ctf[judged], belief.p_posterior[judged], atol=0.01)
        own = dataset.has_image & ~task.is_labelled
        np.testing.assert_allclose(said.p_classifier[own], belief.p_classifier[own], atol=1e-6)
        # The training squares teach by f_0, which has not learned there, and by their own labels.
        assert (belief.p_posterior == believe(task, f_0, f_0).p_posterior)[task.train].all()
    begun = model_of_run(f_0)
    logit = begun.logits(task.table, dataset.images, dataset.has_image)
    said = begun.predict(task.table, logit, task.is_labelled)
    p_first = believe(task, f_0, f_0).p_posterior
    assert p_first is not None
    np.testing.assert_allclose(said.p_low_ctf[task.train], p_first[task.train], atol=1e-9)
    model = run / summary_of(run)["methods"]["smooth"]["recommended"]["model"]
    words = ["predict", str(model), "--data", str(sample_dir), "--out", str(tmp_path / "p.parquet")]
    assert main(words) == 0
    assert len(pq.read_table(tmp_path / "p.parquet")) == len(task.table)


def test_f_0_is_made_once(run, sample_dir):
    told: list[str] = []
    task = Task.of(config(sample_dir))
    found = pretrain(
        task, METHODS["iterative-fixmatch"], run / "f0", lambda what, share: told.append(what)
    )
    assert found == run / "f0" / "supervised" and not told
