"""A run of kind perception end to end: split, fits, model, files; resume; predict."""

import dataclasses
import json
import os
import re
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
from ssl2rl_ray.perception.model import Model, model_of_run
from ssl2rl_ray.perception.predict import predict
from ssl2rl_ray.perception.trainer import (
    Training,
    read_pseudo_labels,
    sample_of,
    split_of,
    train_classifier,
)
from ssl2rl_ray.runs import RunDirectory

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
        ({"hole_name": names[:1], "is_low_ctf": [True], "confidence": [-1.0]}, "below 0"),
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
    description = json.loads((tmp_path / "copy" / "model.json").read_text())
    del description["temperature"]
    (tmp_path / "copy" / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="damaged"):
        Model.load(tmp_path / "copy")


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
        states.append(whole.state())
    assert [epoch for epoch, is_due in dues if is_due] == [2, 3, 5, 6, 8, 9]
    end = Training(chosen, sample_of(chosen))
    end.load_state(states[-1])
    assert end.is_over and end.epochs_done == 9 and not list(end.epochs())


def test_finetuning_starts_from_a_run(run, sample_dir, tmp_path):
    table = read_dataset(sample_dir).table
    path = tmp_path / "labels.parquet"
    pq.write_table(
        pa.table(
            {
                "hole_name": table.hole_name.tolist(),
                "is_low_ctf": (table.ctf_max_resolution_A < 6).tolist(),
                "confidence": [0.7] * len(table),
            }
        ),
        path,
    )
    chosen = config(
        sample_dir,
        **{
            "training.method": "finetuning",
            "training.pseudo_labels": path,
            "classifier.initial": run.path,
            "training.num_folds": 0,
            "data.validation_labelled_fraction": 0,
        },
    )
    training = Training(chosen, sample_of(chosen))
    start = model_of_run(run.path).classifier.state_dict()
    now = training.fit.classifier.state_dict()
    assert all(torch.equal(start[name], now[name]) for name in start)
    tuned = trained(tmp_path / "tuned", chosen)
    assert tuned.summary is not None and "posterior" not in tuned.summary
    rows = tuned.metrics()
    assert (rows["train/loss_unsupervised"] > 0).all()
    assert rows["train/learning_rate"].max() <= 0.001


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "nowhere", "--data", "{data}", "--out", "{out}"], "not a run directory"),
        (["predict", "{run}", "--data", "{demo}", "--out", "{out}"], "px|has no images"),
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
    left = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert left == {entry.name for entry in run.path.iterdir()}  # nothing of Train's own


@pytest.fixture(scope="module")
def two_workers(sample_dir, tmp_path_factory, ray_of_our_own) -> RunDirectory:
    chosen = config(sample_dir, **{"compute.num_workers": 2, "training.method": "fixmatch"})
    return trained(tmp_path_factory.mktemp("runs") / "two", chosen)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("what", ["interrupted", "worker killed"])
def test_two_workers_end_as_if_nothing_had_happened(two_workers, sample_dir, tmp_path, what):
    import psutil

    chosen, path, rows, killed = two_workers.config, tmp_path / "run", [], []

    def disturb(row):
        rows.append(row)
        if len(rows) > 1:
            return
        if what == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
            return
        for process in psutil.process_iter(["cmdline"]):
            if "ray::RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                process.kill()
                killed.append(process.pid)
                return

    if what == "interrupted":
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
