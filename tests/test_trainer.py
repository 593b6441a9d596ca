"""A run of kind perception end to end: split, fits, model, files; resume; predict."""

import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from envs.cryoem.images import draw_images
from envs.cryoem.synthetic import draw_session
from ssl2rl_ray.cli import main
from ssl2rl_ray.config import PerceptionRunConfig, load_config
from ssl2rl_ray.data.folder import read_dataset, write_dataset
from ssl2rl_ray.data.splits import marks
from ssl2rl_ray.data.text import DataError
from ssl2rl_ray.perception.classifier import ClassifierError
from ssl2rl_ray.perception.cross_fit import Training, judge, model_of
from ssl2rl_ray.perception.fit import Fit
from ssl2rl_ray.perception.model import Model, model_of_run
from ssl2rl_ray.perception.predict import predict
from ssl2rl_ray.perception.sample import read_pseudo_labels, sample_of, split_of
from ssl2rl_ray.perception.trainer import data_hashes, train_classifier
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.tensorboard import read_curves

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sample_dir(tmp_path_factory) -> Path:
    """A small session with images; every tenth hole has none, every seventh no label."""
    rng = np.random.default_rng(4)
    table = draw_session(rng, "demo")
    images = draw_images(rng, table, "demo")
    has_image = np.arange(len(table)) % 10 != 3
    images[~has_image] = 0
    is_labelled = np.arange(len(table)) % 7 != 2
    table = table.replace(is_labelled=is_labelled, p_low_ctf=np.full(len(table), 0.5))
    folder = tmp_path_factory.mktemp("data") / "session"
    write_dataset(table, folder, provenance={"notes": []}, images=images, has_image=has_image)
    return folder


def config(sample_dir: Path | None, **changes) -> PerceptionRunConfig:
    values = {
        "kind": "perception",
        "classifier.network": "cnn",
        "data.labelled_fraction": 0.5,
        "data.validation_labelled_fraction": 0.2,
        "training.method": "supervised",
        "training.num_epochs": 3,
        "training.num_folds": 2,
        "compute.num_torch_threads": 1,
        **({"data.dataset": sample_dir} if sample_dir else {}),
        **changes,
    }
    found = load_config(None, [f"{name}={value}" for name, value in values.items()])
    assert isinstance(found, PerceptionRunConfig)
    return found


def trained(path: Path, chosen: PerceptionRunConfig, **options) -> RunDirectory:
    with RunDirectory.create(path, chosen) as run:
        train_classifier(chosen, run, progress=lambda row: None, **options)
    return RunDirectory.open(path)


@pytest.fixture(scope="module")
def run(sample_dir, tmp_path_factory) -> RunDirectory:
    return trained(tmp_path_factory.mktemp("runs") / "run", config(sample_dir))


# ---- what is learned from ------------------------------------------------------------------------


def test_the_split_uses_only_holes_with_image_and_label(sample_dir):
    chosen = config(sample_dir)
    sample = sample_of(chosen)
    split, table = split_of(chosen, sample), sample.table
    for rows in (split.labelled, split.validation, split.known):
        assert sample.has_image[rows].all() and table.is_labelled[rows].all() and len(rows)
    assert sample.has_image[split.unlabelled].all()
    everything = np.concatenate([*dataclasses.astuple(split)])
    assert len(set(everything)) == len(everything)
    training = table.square_id[np.concatenate([split.labelled, split.unlabelled])]
    assert not np.isin(table.square_id[split.validation], training).any()
    share = len(split.known) / (len(split.known) + len(split.validation))
    assert share == pytest.approx(0.2, abs=0.02)


def test_each_seed_draws_its_own_sample_and_split():
    a, b = (config(None, **{"data.preset": "demo", "seed": s}) for s in (0, 1))
    assert sample_of(a).table.content_hash != sample_of(b).table.content_hash
    assert sample_of(a).images.shape[1:] == (32, 32)


def test_pseudo_labels_are_read_by_name(sample_dir, tmp_path):
    table = read_dataset(sample_dir).table
    path = str(tmp_path / "labels.parquet")

    def write(**columns):
        pq.write_table(pa.table(columns), path)

    names = [str(table.hole_name[i]) for i in (5, 2)]
    write(hole_name=names, is_low_ctf=[True, False], confidence=[0.9, 0.4])
    label, confidence = read_pseudo_labels(path, table)
    assert (label[5], label[2], confidence[5], confidence[2]) == (1, 0, 0.9, 0.4)
    assert np.isnan(label).sum() == len(table) - 2 and confidence.sum() == pytest.approx(1.3)
    for columns, message in (
        ({"hole_name": ["no"], "is_low_ctf": [True], "confidence": [1.0]}, "no hole 'no'"),
        ({"hole_name": names[:1] * 2, "is_low_ctf": [True] * 2, "confidence": [1.0] * 2}, "twice"),
        ({"hole_name": names[:1], "is_low_ctf": [True], "confidence": [-1.0]}, "0 or more"),
        ({"hole_name": names[:1], "is_low_ctf": [True], "confidence": [float("inf")]}, "0 or more"),
        ({"hole_name": names[:1], "is_low_ctf": [True], "confidence": ["x"]}, "expected numbers"),
        ({"hole_name": names[:1], "is_low_ctf": [0.3], "confidence": [1.0]}, "true or false"),
        ({"hole_name": names[:1], "is_low_ctf": [True]}, "columns hole_name"),
    ):
        write(**columns)
        with pytest.raises(DataError, match=message):
            read_pseudo_labels(path, table)
    with pytest.raises(DataError, match="columns hole_name"):
        read_pseudo_labels(str(tmp_path / "none.parquet"), table)


# ---- a run ---------------------------------------------------------------------------------------


def test_a_run_leaves_what_its_readers_need(run, sample_dir):
    summary = run.summary
    assert summary is not None and run.status == "finished"
    for name in ("classifier", "calibrated", "posterior_blind", "posterior"):
        assert summary[name]["num_holes"] == summary["num_validation"]
        assert 0.2 < summary[name]["auc"] < 1
    rows = run.metrics()
    assert rows["epoch"].tolist() == list(range(1, 10))
    main = rows[rows["fit"] == "main"]
    for name in ("accuracy", "precision", "recall", "f1", "auc", "ece"):
        assert f"validation/{name}" in main
    assert (main["train/images_per_s"] > 0).all()
    assert rows["fold/accuracy"].notna().sum() == 2
    for name in ("reliability", "confusion", "mistakes"):
        assert (run.path / "figures" / f"{name}.png").stat().st_size > 1000


def test_tensorboard_has_curves_against_epochs_and_the_figures(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert {"validation/accuracy", "validation/ece", "train/images_per_s"} <= set(tags["scalars"])
    assert [e.step for e in events.Scalars("validation/accuracy")] == [1, 2, 3]
    assert set(tags["images"]) == {"reliability", "confusion", "mistakes"}


def test_folds_judge_labels_that_they_did_not_see(run, sample_dir):
    """The stored logits are the folds', not those of the classifier that saw the labels."""
    model = model_of_run(run.path)
    dataset = read_dataset(sample_dir)
    split = split_of(config(sample_dir), sample_of(config(sample_dir)))
    assert set(model.cross_fitted) == set(marks(dataset.table, split.labelled))
    logit = model.logits(dataset.table, dataset.images, dataset.has_image)
    own = [model.cross_fitted[mark] for mark in marks(dataset.table, split.labelled)]
    assert logit[split.labelled] == pytest.approx(own)
    from ssl2rl_ray.perception.classifier import predict_logits

    seen = predict_logits(model.classifier, dataset.images, split.labelled).numpy()
    assert (np.abs(seen - own) > 1e-3).all()
    assert np.isnan(logit[~dataset.has_image]).all()
    assert np.isfinite(logit[dataset.has_image]).all()


def short(sample_dir, **changes) -> Training:
    """A finished training of two epochs a fit."""
    chosen = config(sample_dir, **{"training.num_epochs": 2, **changes})
    training = Training(chosen, sample_of(chosen))
    for _ in training.epochs():
        pass
    return training


def with_flipped(training: Training, rows) -> Training:
    """The same training on a sample where the labels of these rows are the other way round."""
    sample = training.sample
    ctf = sample.table.ctf_max_resolution_A.copy()
    ctf[rows] = 12.0 - ctf[rows]
    table = sample.table.replace(ctf_max_resolution_A=np.maximum(ctf, 1.0))
    other = Training(training.config, dataclasses.replace(sample, table=table))
    for _ in other.epochs():
        pass
    return other


def test_no_label_of_a_part_acts_on_the_logits_of_that_part(sample_dir):
    training = short(sample_dir, **{"training.method": "fixmatch"})
    part = training.parts["fold-1"]
    other = with_flipped(training, part)
    same = {
        name: torch.equal(training.finished[name]["logits"], other.finished[name]["logits"])
        for name in training.parts
    }
    assert same == {"main": False, "fold-0": False, "fold-1": True}


def test_no_label_of_validation_squares_acts_on_the_model(sample_dir):
    training = short(sample_dir)
    split = training.split
    other = with_flipped(training, np.union1d(split.validation, split.known))
    (model, logit), (same, again) = model_of(training), model_of(other)
    assert np.array_equal(logit, again, equal_nan=True)
    assert (model.temperature, model.posterior.effects) == (
        same.temperature,
        same.posterior.effects,
    )
    assert model.posterior.slope_within == same.posterior.slope_within
    for name, value in model.classifier.state_dict().items():
        assert torch.equal(value, same.classifier.state_dict()[name])
    # the labels known there do act on their neighbours, and on nothing else that is judged
    judged, predicted = judge(training, model, logit)
    assert set(np.flatnonzero(predicted.is_known)) == set(np.union1d(split.labelled, split.known))
    assert judged["posterior_blind"]["log_loss"] != judged["posterior"]["log_loss"]
    hidden = dataclasses.replace(split, known=split.known[:0])
    training.split = hidden
    assert judge(training, model, logit)[0]["posterior"] == pytest.approx(
        judged["posterior_blind"], nan_ok=True
    )


def test_no_image_of_validation_squares_acts_on_the_classifier(sample_dir):
    chosen = config(sample_dir)
    sample = sample_of(chosen)
    training = Training(chosen, sample)
    images = sample.images.copy()
    images[training.split.validation] = 255
    images[training.split.known] = 0
    other = Training(chosen, dataclasses.replace(sample, images=images))
    assert training.fit.classifier.mean == other.fit.classifier.mean
    assert training.fit.classifier.sd == other.fit.classifier.sd


def test_what_is_exported_is_the_average(sample_dir):
    chosen = config(sample_dir, **{"training.num_folds": 0, "data.validation_labelled_fraction": 0})
    training = Training(chosen, sample_of(chosen))
    fit = training.fit
    for _ in training.epochs():
        pass
    exported = model_of(training)[0].classifier.state_dict()
    for name, value in fit.average.state_dict().items():
        assert torch.equal(exported[name], value)
    name = "network.0.weight"
    assert not torch.equal(exported[name], fit.classifier.state_dict()[name])


def test_a_model_survives_its_files(run, tmp_path, sample_dir):
    model = model_of_run(run.path / "model")
    (tmp_path / "copy").mkdir()
    model.save(tmp_path / "copy")
    again = Model.load(tmp_path / "copy")
    dataset = read_dataset(sample_dir)
    known = dataset.table.is_labelled
    a, b = (
        m.predict(dataset.table, m.logits(dataset.table, dataset.images, dataset.has_image), known)
        for m in (model, again)
    )
    assert np.array_equal(a.p_low_ctf, b.p_low_ctf) and np.isfinite(a.p_low_ctf).all()
    assert again.validation_marks == model.validation_marks
    assert again.labels_seen == model.labels_seen


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("temperature", None),
        ("temperature", 0),
        ("temperature", float("nan")),
        ("low_ctf_threshold_A", -1),
        ("posterior", {}),
        ("posterior", 0),
        ("posterior.slope_within", "steep"),
        ("posterior.slope_patch", float("nan")),
        ("posterior.effects.sd_grid", -1),
        ("posterior.effects.sd_grid", 1e300),
        ("cross_fitted", {"a": "b"}),
        ("cross_fitted", {"a": float("inf")}),
        ("labels_seen", None),
    ],
)
def test_a_damaged_description_is_told(run, tmp_path, path, value):
    folder = shutil.copytree(run.path / "model", tmp_path / "model")
    description = json.loads((folder / "model.json").read_text())
    *above, name = path.split(".")
    section = description
    for key in above:
        section = section[key]
    section[name] = value
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(ClassifierError, match="damaged"):
        Model.load(folder)


@pytest.mark.parametrize("at", [2, 5])
def test_an_interrupted_run_ends_as_if_it_had_not_been(run, sample_dir, tmp_path, at):
    """Interrupted in the main fit and in a fold."""
    chosen, path = config(sample_dir), tmp_path / "run"

    def interrupt(row):
        if row["epoch"] == at:
            os.kill(os.getpid(), signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(KeyboardInterrupt), RunDirectory.create(path, chosen) as first:
        train_classifier(chosen, first, progress=interrupt)
    assert RunDirectory.open(path).status == "interrupted"
    rows = []
    with RunDirectory.resume(path, chosen) as second:
        train_classifier(chosen, second, progress=rows.append)
    assert rows[0]["epoch"] == at + 1
    assert (path / "model" / "model.safetensors").read_bytes() == (
        run.path / "model" / "model.safetensors"
    ).read_bytes()
    summary = RunDirectory.open(path).summary
    assert summary == run.summary
    assert RunDirectory.open(path).metrics()["epoch"].tolist() == list(range(1, 10))


_KILLED = """
import os, signal, sys
from pathlib import Path
from ssl2rl_ray.config import load_config
from ssl2rl_ray.perception.trainer import train_classifier
from ssl2rl_ray.runs import RunDirectory

def die(row):
    if row["epoch"] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

config = load_config(None, sys.argv[3:])
with RunDirectory.create(sys.argv[1], config) as run:
    train_classifier(config, run, progress=die)
"""


def test_a_killed_run_ends_as_if_it_had_not_been(run, sample_dir, tmp_path):
    chosen, path = config(sample_dir), tmp_path / "run"
    overrides = [
        "kind=perception", "classifier.network=cnn", "data.labelled_fraction=0.5",
        "data.validation_labelled_fraction=0.2", "training.method=supervised",
        "training.num_epochs=3", "training.num_folds=2", "compute.num_torch_threads=1",
        f"data.dataset={sample_dir}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(path), "2", *overrides],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert RunDirectory.open(path).status == "interrupted"
    with RunDirectory.resume(path, chosen) as again:
        train_classifier(chosen, again, progress=lambda row: None)
    assert RunDirectory.open(path).summary == run.summary


def test_a_state_goes_over_at_any_epoch(sample_dir):
    chosen = config(sample_dir, **{"training.evaluation_interval_epochs": 2})
    whole = Training(chosen, sample_of(chosen))
    states, dues = [], []
    for row, is_due in whole.epochs():
        dues.append((row["epoch"], is_due))
        states.append(copy.deepcopy(whole.state()))
    assert [epoch for epoch, is_due in dues if is_due] == [2, 3, 5, 6, 8, 9]
    end = Training(chosen, sample_of(chosen))
    end.load_state(states[-1])
    assert end.is_over and end.epochs_done == 9 and not list(end.epochs())
    for at in (1, 4):  # within the main fit, within a fold
        again = Training(chosen, sample_of(chosen))
        again.load_state(states[at])
        assert again.epochs_done == at + 1
        assert [row["epoch"] for row, _ in again.epochs()] == list(range(at + 2, 10))
        for name in whole.parts:
            found = again.finished[name]["logits"], whole.finished[name]["logits"]
            assert torch.equal(*found), name


@pytest.fixture
def pseudo_labels(sample_dir, tmp_path) -> Path:
    table = read_dataset(sample_dir).table
    columns = {
        "hole_name": table.hole_name.tolist(),
        "is_low_ctf": (table.ctf_max_resolution_A < 6).tolist(),
        "confidence": [0.7] * len(table),
    }
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    return tmp_path / "labels.parquet"


def finetuning(sample_dir, run, pseudo_labels, **changes) -> PerceptionRunConfig:
    own = {
        "training.method": "finetuning",
        "training.pseudo_labels": pseudo_labels,
        "classifier.initial": run.path,
    }
    return config(sample_dir, **{**own, **changes})


def test_finetuning_starts_from_a_run_fold_by_fold(run, sample_dir, pseudo_labels, tmp_path):
    """A fold that began with the main weights would know the labels that it is judged on."""
    chosen = finetuning(sample_dir, run, pseudo_labels)
    training = Training(chosen, sample_of(chosen))
    before = torch.load(run.latest / "state.pt", weights_only=True)["finished"]
    for name in training.parts:
        now = training._begin(name).classifier.state_dict()
        assert all(torch.equal(value, before[name]["weights"][key]) for key, value in now.items())
    tuned = trained(tmp_path / "tuned", chosen)
    rows = tuned.metrics()
    assert (rows[rows["fit"] == "main"]["train/loss_unsupervised"] > 0).all()
    assert rows["train/learning_rate"].max() <= 0.001
    model = model_of_run(tuned.path)
    assert model.labels_seen == model_of_run(run.path).labels_seen == set(model.cross_fitted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "learned from .* of the holes that this run validates on|has not the folds"),
        ({"data.labelled_fraction": 0.4}, "has not the folds of this run"),
        ({"training.num_folds": 3}, "has not the folds of this run"),
        ({"classifier.dropout": 0.2}, "holds a cnn with dropout 0.5"),
    ],
)
def test_an_initial_run_that_would_leak_is_refused(
    run, sample_dir, pseudo_labels, changes, message
):
    chosen = finetuning(sample_dir, run, pseudo_labels, **changes)
    with pytest.raises(ValueError, match=message):
        Training(chosen, sample_of(chosen))


def test_an_exported_model_can_be_tuned_without_folds(run, sample_dir, pseudo_labels, tmp_path):
    none = {"training.num_folds": 0, "data.validation_labelled_fraction": 0}
    chosen = finetuning(sample_dir, run, pseudo_labels, **none)
    alone = {"classifier.initial": run.path / "model", "training.num_folds": 2}
    with pytest.raises(ValueError, match="has not the folds"):
        other = finetuning(sample_dir, run, pseudo_labels, **alone)
        Training(other, sample_of(other))
    tuned = trained(tmp_path / "tuned", chosen)
    assert tuned.summary is not None and "posterior" not in tuned.summary
    said = predict(tuned.path, sample_dir, tmp_path / "p.parquet")["notes"]
    assert any("these holes: theirs are too sure" in note for note in said)
    said = predict(run.path, sample_dir, tmp_path / "p.parquet")["notes"]
    assert any("theirs are predictions of classifiers that did not" in note for note in said)


def test_other_images_or_pseudo_labels_stop_a_resume(run, sample_dir, pseudo_labels, tmp_path):
    chosen = finetuning(sample_dir, run, pseudo_labels)
    before = data_hashes(chosen)
    assert len(before) == 4 and len(set(before.values())) == 4
    assert data_hashes(chosen) == before
    pseudo_labels.write_bytes(pseudo_labels.read_bytes() + b"\0")
    with pytest.raises(DataError):  # no parquet any more
        data_hashes(chosen)
    dataset = read_dataset(sample_dir)
    changed = tmp_path / "changed"
    write_dataset(
        dataset.table,
        changed,
        provenance={"notes": []},
        images=255 - np.asarray(dataset.images),
        has_image=dataset.has_image,
    )
    hashes = [list(data_hashes(config(path)).values()) for path in (sample_dir, changed)]
    assert hashes[0][0] == hashes[1][0] and hashes[0][1] != hashes[1][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.low_ctf_threshold_A": 0.1}, "are not low-CTF at .* nothing to tell apart"),
        ({"data.low_ctf_threshold_A": 1000}, "are low-CTF at .* nothing to tell apart"),
        ({"training.num_folds": 2000}, "2000 parts of"),
        ({"compute.device": "cuda"}, "torch sees no GPU"),
        ({"training.learning_rate": 1e6, "training.num_epochs": 20}, "training diverged in epoch"),
    ],
)
def test_a_run_that_cannot_succeed_says_why(sample_dir, changes, message):
    if "compute.device" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU here, and cuda works")
    chosen = config(sample_dir, **changes)
    with pytest.raises(ValueError, match=message):
        data_hashes(chosen)
        list(Training(chosen, sample_of(chosen)).epochs())


def test_a_collapse_that_lasts_is_said_once(sample_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Fit, "is_collapsed", lambda self, row: self.epochs_done > 3)
    changes = {"training.num_epochs": 20, "training.num_folds": 0}
    chosen = config(sample_dir, **{**changes, "data.validation_labelled_fraction": 0})
    run = trained(tmp_path / "run", chosen)
    said = capsys.readouterr().err
    assert said.count("collapse") == 1 and "now 13, nearly all holes" in said
    assert run.summary is not None and run.summary["is_collapsed"]


def test_a_mistake_in_the_data_leaves_no_run(sample_dir, tmp_path, capsys):
    words = ["run", "tune_configs/fixmatch.yaml", "--run-dir", str(tmp_path / "run")]
    words += ["--set", f"data.dataset={sample_dir}", "--set", "data.low_ctf_threshold_A=0.1"]
    assert main(words) == 2
    assert "nothing to tell apart" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dataset_without_images_is_said(demo_dir, tmp_path):
    table = read_dataset(demo_dir).table
    write_dataset(table, tmp_path / "plain", provenance={"notes": []})
    with pytest.raises(DataError, match="has no images to learn from"):
        sample_of(config(tmp_path / "plain"))


# ---- predict -------------------------------------------------------------------------------------


def test_predict_writes_what_the_model_says(run, sample_dir, tmp_path):
    out = tmp_path / "p.parquet"
    result = predict(run.path, sample_dir, out)
    found, table = pq.read_table(out).to_pandas(), read_dataset(sample_dir).table
    assert found["hole_name"].tolist() == table.hole_name.tolist()
    assert found["p_low_ctf"].between(0, 1).all() and found["p_marginal"].between(0, 1).all()
    assert found["logit"].isna().sum() == (np.arange(len(table)) % 10 == 3).sum()
    assert result["num_known"] == table.is_labelled.sum() == found["is_known"].sum()
    assert result["num_seen"] == found["is_seen"].sum() > 0
    assert result["posterior"]["num_holes"] > 0  # labels that were neither trained nor validated on


def test_whose_labels_count_is_as_asked(run, sample_dir, tmp_path):
    numbers = {
        labels: predict(run.path, sample_dir, tmp_path / "p.parquet", labels=labels)["num_known"]
        for labels in ("data", "run", "none")
    }
    assert numbers["none"] == 0 < numbers["run"] < numbers["data"]
    found = pq.read_table(tmp_path / "p.parquet").to_pandas()
    assert np.allclose(found["p_low_ctf"], found["p_marginal"])  # no label known: the same


def test_a_plan_follows_from_images(run, sample_dir, tmp_path, capsys):
    out, again = tmp_path / "p.parquet", tmp_path / "session"
    words = ["predict", str(run.path), "--data", str(sample_dir), "--out", str(out)]
    assert main([*words, "--dataset", str(again)]) == 0
    dataset = read_dataset(again)
    found = pq.read_table(out).to_pandas()
    assert np.array_equal(dataset.table.p_low_ctf, found["p_marginal"])
    assert dataset.calibration is not None and dataset.images is not None
    plan = ["plan", "lagrange", "--data", str(again), "--calibration", str(again)]
    assert main([*plan, "--budget-min", "60", "--out", str(tmp_path / "plan.csv")]) == 0
    assert "expected low-CTF" in capsys.readouterr().out
    assert main([*words, "--dataset", str(again)]) == 2  # there already
    assert "--force" in capsys.readouterr().err


def test_the_models_calibration_gives_its_probabilities_back(run, sample_dir, tmp_path):
    predict(run.path, sample_dir, tmp_path / "p.parquet", dataset=tmp_path / "again")
    calibration = model_of_run(run.path).calibration()
    table = read_dataset(tmp_path / "again").table
    assert calibration.apply(table).p_low_ctf == pytest.approx(table.p_low_ctf, abs=1e-3)


def test_labels_behind_a_classifier_are_refused_where_they_are_evaluated(run, tmp_path, capsys):
    """And only there: its probabilities of another session are what a user would have."""
    rng = np.random.default_rng(11)
    other = draw_session(rng, "demo")
    write_dataset(
        other, tmp_path / "b", provenance={"notes": []}, images=draw_images(rng, other, "demo")
    )
    own = run.config.data.dataset
    measured = read_dataset(own)
    full = measured.table.replace(is_labelled=np.ones(len(measured.table), bool))
    write_dataset(
        full,
        tmp_path / "a",
        provenance={"notes": []},
        images=measured.images,
        has_image=measured.has_image,
    )
    for name in "ab":
        places = tmp_path / name, tmp_path / "p.parquet"
        predict(run.path, *places, dataset=tmp_path / f"{name}-p")
    words = ["evaluate", "lagrange", "--budget-min", "30", "--episodes", "2", "--data"]
    a, b = str(tmp_path / "a-p"), str(tmp_path / "b-p")
    assert main([*words, a]) == 2  # the posterior's labels are of this session
    assert main([*words, a, "--calibration", b]) == 2
    assert main([*words, b]) == 0
    assert main([*words, b, "--calibration", b]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "nowhere", "--data", "{data}", "--out", "{out}"], "not a run directory"),
        (["predict", "{run}", "--data", "{demo}", "--out", "{out}"], "has no images"),
        (["predict", "{run}", "--data", "{data}", "--out", "-"], "not for the terminal"),
        (["predict", "{run}", "--data", "{data}", "--out", "{data}/p"], "lies in the dataset"),
        (["predict", "{run}", "--data", "{data}", "--out", "{tmp}"], "is a folder"),
    ],
)
def test_mistakes_are_said_in_one_line(run, sample_dir, demo_dir, tmp_path, capsys, words, message):
    plain = tmp_path / "plain"
    write_dataset(read_dataset(demo_dir).table, plain, provenance={"notes": []})
    places = {
        "run": run.path, "data": sample_dir, "demo": plain, "tmp": tmp_path,
        "out": tmp_path / "o.parquet",
    }  # fmt: skip
    assert main([word.format(**places) for word in words]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and "Traceback" not in err


def test_images_of_another_size_are_said(run, sample_dir, tmp_path):
    dataset = read_dataset(sample_dir)
    write_dataset(
        dataset.table,
        tmp_path / "large",
        provenance={"notes": []},
        images=np.zeros((len(dataset.table), 48, 48), np.uint8),
    )
    with pytest.raises(ValueError, match="--image-size 32"):
        predict(run.path, tmp_path / "large", tmp_path / "p.parquet")


# ---- Ray Train -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_of_our_own():
    """One local Ray for all tests below."""
    from ssl2rl_ray.local_ray import local_ray

    with local_ray(3):
        yield


def model_bytes(path: Path) -> bytes:
    return (path / "model" / "model.safetensors").read_bytes()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_worker_of_ray_train_gives_the_weights_of_this_process(
    run, sample_dir, tmp_path, ray_of_our_own
):
    chosen = config(sample_dir, **{"compute.num_workers": 1})
    rows = []
    with RunDirectory.create(tmp_path / "run", chosen) as other:
        train_classifier(chosen, other, progress=rows.append)
    assert [row["epoch"] for row in rows] == list(range(1, 10))
    assert model_bytes(tmp_path / "run") == model_bytes(run.path)
    assert RunDirectory.open(tmp_path / "run").summary == run.summary
    ours, theirs = (read_curves(path / "tensorboard") for path in (run.path, tmp_path / "run"))
    assert ours.keys() == theirs.keys()  # epoch by epoch, from the driver
    for tag in ("train/loss_supervised", "validation/accuracy"):
        assert ours[tag].step.tolist() == theirs[tag].step.tolist()
        assert ours[tag].value.tolist() == theirs[tag].value.tolist()
    left = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert left == {entry.name for entry in run.path.iterdir()}  # nothing of Train's own


@pytest.fixture(scope="module")
def two_workers(sample_dir, tmp_path_factory, ray_of_our_own) -> RunDirectory:
    changes = {"training.method": "fixmatch", "training.is_aligned": True}
    chosen = config(sample_dir, **{"compute.num_workers": 2, **changes})
    return trained(tmp_path_factory.mktemp("runs") / "two", chosen)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM, "worker killed"])
def test_two_workers_end_as_if_nothing_had_happened(two_workers, sample_dir, tmp_path, what):
    import psutil

    chosen, path, rows, killed = two_workers.config, tmp_path / "run", [], []

    def disturb(row):
        rows.append(row)
        if len(rows) > 1:
            return
        if what != "worker killed":
            os.kill(os.getpid(), what)
            return
        for process in psutil.process_iter(["cmdline"]):
            if "ray::RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                process.kill()
                killed.append(process.pid)
                return

    if what != "worker killed":
        with pytest.raises(KeyboardInterrupt), RunDirectory.create(path, chosen) as first:
            train_classifier(chosen, first, progress=disturb)
        begun = RunDirectory.open(path).checkpoints[-1]["step"]
        assert 1 <= begun < 9
        with RunDirectory.resume(path, chosen) as second:
            train_classifier(chosen, second, progress=rows.append)
    else:
        with RunDirectory.create(path, chosen) as first:
            train_classifier(chosen, first, progress=disturb)
        assert killed
    assert [row["epoch"] for row in rows] == list(range(1, 10))
    assert model_bytes(path) == model_bytes(two_workers.path)
    assert RunDirectory.open(path).summary == two_workers.summary


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_mistake_in_a_worker_is_told_as_it_was_made(sample_dir, tmp_path, ray_of_our_own):
    chosen = config(sample_dir, **{"compute.num_workers": 1})

    def loop(task):
        raise ValueError("row 7 is not a hole")

    from ssl2rl_ray.perception.distributed import run_workers

    with pytest.raises(ValueError, match="row 7 is not a hole"):
        run_workers(
            loop,
            {},
            folder=tmp_path,
            num_workers=chosen.compute.num_workers,
            num_cpus=1,
            is_on_gpu=False,
            on_report=lambda content, state: None,
            is_stopping=lambda: False,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
def test_a_group_without_room_is_refused_at_once(sample_dir, tmp_path, ray_of_our_own):
    chosen = config(sample_dir, **{"compute.num_workers": 64})
    with (
        RunDirectory.create(tmp_path / "run", chosen) as other,
        pytest.raises(ValueError, match="64 workers need 64 CPU"),
    ):
        train_classifier(chosen, other)
