"""The loop on sessions that bring predictions and no images: the head, and the loop around it."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from envs.cryoem.types import RandomEffects
from ssl2rl_ray.cli import main
from ssl2rl_ray.config import PerceptionRunConfig, SSL2RLRunConfig, load_config
from ssl2rl_ray.data.folder import read_dataset, write_dataset
from ssl2rl_ray.data.text import DataError
from ssl2rl_ray.loop.head import finetune, fit_ridge, pretrain, sample_of
from ssl2rl_ray.loop.ssl2rl import ssl2rl
from ssl2rl_ray.loop.stages import Task, believe, whole_system
from ssl2rl_ray.perception.head import Head, given_logit
from ssl2rl_ray.perception.metrics import area_under_roc
from ssl2rl_ray.perception.model import Model
from ssl2rl_ray.perception.posterior import logit_parts
from ssl2rl_ray.perception.predict import predict
from ssl2rl_ray.perception.trainer import data_hashes
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.schema import ConfigError


def config(dataset: Path, **changes) -> SSL2RLRunConfig:
    values = {
        "kind": "ssl2rl",
        "classifier.network": "head",
        "data.dataset": dataset,
        "data.labelled_fraction": 0.2,
        "data.validation_labelled_fraction": 0.2,
        "data.validation_share": 0.4,
        "loop.navigator": "lagrange",
        "loop.num_rounds": 2,
        "loop.num_rollouts": 3,
        "loop.num_starts": 4,
        **changes,
    }
    found = load_config(None, [f"{name}={value}" for name, value in values.items()])
    assert isinstance(found, SSL2RLRunConfig)
    return found


def poisoned(source: Path, task: Task, target: Path) -> Path:
    """The dataset with other CTF values wherever nobody may know them."""
    table = read_dataset(source).table
    ctf = table.ctf_max_resolution_A.copy()
    secret = ~task.is_known & np.isfinite(ctf)
    ctf[secret] = np.random.default_rng(9).uniform(3, 12, int(secret.sum()))
    table = table.replace(ctf_max_resolution_A=ctf)
    write_dataset(table, target, provenance={"notes": []})
    return target


def logits_of(folder: Path, task: Task) -> np.ndarray:
    return Model.load(folder).logits(task.table, None, None)


def coefficients_of(folder: Path) -> np.ndarray:
    head = Model.load(folder).classifier
    assert isinstance(head, Head)
    return head.coefficients


def labels_file(path: Path, task: Task, rows, is_low, confidence) -> Path:
    columns = {
        "hole_name": task.table.hole_name[rows].tolist(),
        "is_low_ctf": np.asarray(is_low, bool),
        "confidence": np.broadcast_to(confidence, len(rows)).astype(float),
    }
    pq.write_table(pa.table(columns), path)
    return path


# ---- the fit -------------------------------------------------------------------------------------


def test_an_intercept_alone_is_the_logit_of_the_low_share():
    low = np.array([True, True, True, False])
    beta = fit_ridge(np.ones((1, 4)), low, np.full(4, 0.25), np.zeros(1), 1e-9)
    assert beta[0] == pytest.approx(np.log(3))


def test_weights_are_shares_of_the_loss():
    low = np.array([True, False])
    beta = fit_ridge(np.ones((1, 2)), low, np.array([0.9, 0.1]), np.zeros(1), 1e-9)
    assert beta[0] == pytest.approx(np.log(9))


def test_labels_that_are_separable_keep_finite_slopes():
    x = np.linspace(-2, 2, 20)
    beta = fit_ridge(np.stack([np.ones(20), x]), x > 0, np.full(20, 0.05), np.zeros(2), 0.1)
    assert np.isfinite(beta).all() and 0 < beta[1] < 10


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    ridge=st.floats(1e-3, 1e3),
    scale=st.floats(0.01, 30.0),
)
def test_newton_finds_the_optimum_wherever_it_begins(seed, ridge, scale):
    rng = np.random.default_rng(seed)
    design = np.vstack([np.ones(40), scale * rng.standard_normal((2, 40))])
    low, weight = rng.random(40) < 0.5, rng.dirichlet(np.ones(40))
    begin = 3 * rng.standard_normal(3)
    beta = fit_ridge(design, low, weight, begin, ridge)

    def objective(b):
        losses = np.logaddexp(0, np.where(low, -1, 1) * (b @ design))
        return weight @ losses + ridge / 2 * ((b - begin) ** 2).sum()

    slope = design @ (weight * (1 / (1 + np.exp(-(beta @ design))) - low)) + ridge * (beta - begin)
    assert np.abs(slope).max() < 1e-6 * max(1, scale, ridge)
    assert objective(beta) <= minimize(objective, begin, method="BFGS").fun + 1e-9


# ---- what a session brings -----------------------------------------------------------------------


def test_the_logit_is_of_predicted_angstroms_else_of_p(demo_dir):
    table = read_dataset(demo_dir).table
    n = len(table)
    predicted = np.full(n, np.nan)
    predicted[:3] = 4.0, 6.0, 15.0
    found = given_logit(table.replace(predicted_ctf_A=predicted))
    assert found[:3] == pytest.approx([2, 0, -3]) and np.isnan(found[3:]).all()
    p = np.full(n, 0.5)
    bare = table.replace(predicted_ctf_A=np.full(n, np.nan), p_low_ctf=p)
    assert np.isnan(given_logit(bare)).all()
    p[:3] = 0.0, 1.0, 0.75
    found = given_logit(bare.replace(p_low_ctf=p))
    assert found[:4] == pytest.approx([-5, 5, np.log(3), 0])


def test_what_a_dataset_lacks_is_said_by_name(demo_dir, tmp_path):
    table = read_dataset(demo_dir).table
    nan = np.full(len(table), np.nan)
    bare = table.replace(predicted_ctf_A=nan, p_low_ctf=np.full(len(table), 0.5))
    write_dataset(bare, tmp_path / "bare", provenance={})
    with pytest.raises(DataError, match="no predictions for"):
        sample_of(config(tmp_path / "bare"))
    nowhere = np.zeros(len(table), bool)
    write_dataset(table.replace(is_labelled=nowhere), tmp_path / "open", provenance={})
    with pytest.raises(DataError, match="no labelled hole with a prediction"):
        sample_of(config(tmp_path / "open"))
    with pytest.raises(DataError, match=r"no images to learn from.*classifier\.network: head"):
        Task.of(config(tmp_path / "bare", **{"classifier.network": "cnn"}))
    with pytest.raises(ConfigError, match=r"head is for the predictions of a data\.dataset"):
        load_config(None, ["kind=ssl2rl", "classifier.network=head"])


def test_one_held_out_square_is_too_few(demo_dir):
    with pytest.raises(ValueError, match=r"one square is held out.*data\.validation_share"):
        Task.of(config(demo_dir, **{"data.validation_share": 0.2}))


def test_holes_without_a_prediction_are_not_learned_from(demo_dir, tmp_path):
    table = read_dataset(demo_dir).table
    predicted = np.where(np.arange(len(table)) % 5 == 2, np.nan, table.predicted_ctf_A)
    write_dataset(
        table.replace(predicted_ctf_A=predicted), tmp_path / "holes", provenance={"notes": []}
    )
    task = Task.of(config(tmp_path / "holes"))
    for rows in dataclasses.astuple(task.split):
        assert np.isfinite(predicted[rows]).all()
    f_0 = pretrain(task, tmp_path / "f0", has_all_labels=False)
    logits = logits_of(f_0, task)
    assert (np.isnan(logits) == np.isnan(predicted)).all()
    belief = believe(task, f_0, f_0)
    assert belief.p_posterior is not None
    assert np.isfinite(belief.p_classifier).all() and np.isfinite(belief.p_posterior).all()


# ---- the stages ----------------------------------------------------------------------------------


def test_a_head_is_read_as_it_was_written(demo_dir, tmp_path):
    task = Task.of(config(demo_dir))
    folder = pretrain(task, tmp_path / "f0", has_all_labels=False)
    model = Model.load(folder)
    model.save_new(tmp_path / "again")
    again = (tmp_path / "again" / "model.json").read_bytes()
    assert again == (folder / "model.json").read_bytes()
    assert [path.name for path in folder.iterdir()] == ["model.json"]
    assert len(model.cross_fitted) == len(model.labels_seen) == len(task.split.labelled)
    assert model.posterior is not None and model.posterior.num_labelled == len(task.split.labelled)
    description = json.loads(again)
    for wrong in ([1, 2], [1, 2, 3, 4, None], None, [1, 2, 3, 4, float("inf")]):
        text = json.dumps(description | {"coefficients": wrong})
        (folder / "model.json").write_text(text)
        with pytest.raises(ValueError, match=r"the classifier is damaged"):
            Model.load(folder)


def test_a_finished_stage_is_not_done_again(demo_dir, tmp_path):
    task = Task.of(config(demo_dir))
    f_0 = pretrain(task, tmp_path / "f0", has_all_labels=False)
    f_1 = finetune(task, f_0, None, tmp_path / "f1")
    before = [(path / "model.json").stat().st_mtime_ns for path in (f_0, f_1)]
    pretrain(task, tmp_path / "f0", has_all_labels=False)
    finetune(task, f_0, None, tmp_path / "f1")
    assert [(path / "model.json").stat().st_mtime_ns for path in (f_0, f_1)] == before


def test_more_folds_than_labels_and_no_folds(demo_dir, tmp_path):
    task = Task.of(config(demo_dir, **{"pretraining.num_folds": 1000}))
    with pytest.raises(ValueError, match=r"pretraining\.num_folds: 1000 parts of"):
        pretrain(task, tmp_path / "f0", has_all_labels=False)
    without = {"pretraining.num_folds": 0, "data.validation_labelled_fraction": 0}
    task = Task.of(config(demo_dir, **without))
    f_0 = pretrain(task, tmp_path / "f0", has_all_labels=False)
    model, belief = Model.load(f_0), believe(task, f_0, f_0)
    assert model.posterior is None and model.temperature == 1
    assert belief.p_posterior is None and belief.effects == RandomEffects()


def test_a_hole_is_judged_by_heads_that_did_not_see_its_label(demo_dir, tmp_path):
    """Its own label turned round moves the other heads, not the logit that it is judged by."""
    task = Task.of(config(demo_dir))
    heads = []
    hole = task.split.labelled[0]
    for number in range(2):
        truth = task.truth.copy()
        truth[hole] = abs(truth[hole] - number)
        turned = dataclasses.replace(task, truth=truth)
        folder = pretrain(turned, tmp_path / f"f{number}", has_all_labels=False)
        heads.append(logits_of(folder, task))
    moved = heads[0] != heads[1]
    assert not moved[hole] and moved[task.split.unlabelled].all()
    assert 0 < moved[task.split.labelled].mean() < 1  # those of its own fold stay, too


def test_pseudo_labels_count_by_confidence_and_only_where_nothing_is_known(demo_dir, tmp_path):
    task = Task.of(config(demo_dir))
    f_0 = pretrain(task, tmp_path / "f0", has_all_labels=False)
    rng, rows = np.random.default_rng(2), task.split.unlabelled
    is_low, confidence = rng.random(len(rows)) < 0.5, rng.uniform(0.1, 0.5, len(rows))

    def tuned(name, rows, is_low, confidence):
        file = labels_file(tmp_path / f"{name}.parquet", task, rows, is_low, confidence)
        return coefficients_of(finetune(task, f_0, file, tmp_path / name))

    alone = coefficients_of(finetune(task, f_0, None, tmp_path / "alone"))
    one = tuned("one", rows, is_low, confidence)
    assert one == pytest.approx(tuned("two", rows, is_low, 2 * confidence), abs=1e-8)
    assert one != pytest.approx(alone, abs=1e-2)
    assert tuned("zero", rows, is_low, 0.0) == pytest.approx(alone)
    elsewhere = np.r_[task.split.labelled, task.split.validation, task.split.known]
    assert tuned("known", elsewhere, rng.random(len(elsewhere)) < 0.5, 1.0) == pytest.approx(alone)


def test_the_truth_as_pseudo_labels_makes_a_head_like_that_of_all_labels(demo_dir, tmp_path):
    few = {"data.labelled_fraction": 0.05, "finetuning.unsupervised_weight": 20}
    task = Task.of(config(demo_dir, **few))
    f_0 = pretrain(task, tmp_path / "few", has_all_labels=False)
    full = pretrain(task, tmp_path / "full", has_all_labels=True)
    rows = task.split.unlabelled
    file = labels_file(tmp_path / "truth.parquet", task, rows, task.truth[rows] == 1, 1.0)
    folder = f_0
    for k in range(10):
        folder = finetune(task, folder, file, tmp_path / f"f{k}")

    def loss(folder):
        sign = np.where(task.truth[rows] == 1, -1, 1)
        no_folds = dataclasses.replace(Model.load(folder), cross_fitted={})
        return np.logaddexp(0, sign * no_folds.logits(task.table, None, None)[rows]).mean()

    assert loss(folder) < loss(full) + 0.25 * (loss(f_0) - loss(full))
    assert Model.load(f_0).labels_seen == Model.load(folder).labels_seen


def test_a_head_is_drawn_to_where_it_begins(demo_dir, tmp_path):
    task = Task.of(config(demo_dir))
    begun = Model.load(pretrain(task, tmp_path / "f0", has_all_labels=False))
    assert isinstance(begun.classifier, Head)
    design = np.vstack([np.ones(len(task.table)), logit_parts(task.table, given_logit(task.table))])
    known, is_low = task.split.labelled, task.truth[task.split.labelled] == 1
    for name, shift in (("low", -2.0), ("high", 2.0)):
        start = begun.classifier.coefficients + shift
        dataclasses.replace(begun, classifier=Head(start)).save_new(tmp_path / name)
        found = coefficients_of(finetune(task, tmp_path / name, None, tmp_path / f"{name}-1"))
        # sum of losses + 4 / 2 |beta - start|², the ridge of the module's docstring
        p = expit(found @ design[:, known])
        slope = design[:, known] @ (p - is_low) + 4 * (found - start)
        np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_no_label_is_read_that_nobody_may_know(demo_dir, tmp_path):
    clean = Task.of(config(demo_dir))
    secret = Task.of(config(poisoned(demo_dir, clean, tmp_path / "poisoned")))
    open_rows = np.flatnonzero(~clean.is_known)
    assert (clean.truth != secret.truth)[open_rows].mean() > 0.2
    beliefs, heads = [], []
    for name, task in (("clean", clean), ("secret", secret)):
        f_0 = pretrain(task, tmp_path / name / "f0", has_all_labels=False)
        rows = task.split.unlabelled
        labels = tmp_path / name / "labels.parquet"
        labels_file(labels, task, rows, np.arange(len(rows)) % 2, 0.7)
        f_1 = finetune(task, f_0, labels, tmp_path / name / "f1")
        beliefs.append(believe(task, f_0, f_1))
        heads.append([json.loads((f / "model.json").read_text()) for f in (f_0, f_1)])
        del heads[-1][0]["posterior"]["fitted_on"]  # a hash of the table, CTF values included
        for model in heads[-1]:
            del model["notes"], model["validation_marks"]  # hashes too, of what is judged
    assert heads[0] == heads[1]
    for name in ("p_classifier", "p_posterior", "p_blind"):
        assert (getattr(beliefs[0], name) == getattr(beliefs[1], name)).all(), name
    full = [
        coefficients_of(pretrain(task, tmp_path / f"full{i}", has_all_labels=True))
        for i, task in enumerate((clean, secret))
    ]
    assert (full[0] != full[1]).all()  # the bound does read them


# ---- what `ssl2rl predict` makes of it -----------------------------------------------------------


@pytest.fixture(scope="module")
def run(demo_dir, tmp_path_factory) -> Path:
    """Of a session of whose holes every fifth has no prediction."""
    folder = tmp_path_factory.mktemp("head")
    table = read_dataset(demo_dir).table
    predicted = np.where(np.arange(len(table)) % 5 == 2, np.nan, table.predicted_ctf_A)
    table = table.replace(predicted_ctf_A=predicted)
    write_dataset(table, folder / "data", provenance={"notes": []})
    chosen = config(folder / "data", **{"loop.methods": "[smooth, supervised]"})
    with RunDirectory.create(folder / "run", chosen) as opened:
        ssl2rl(chosen, opened, progress=lambda row: None)
    return folder / "run"


def test_predictions_are_what_the_loop_judged(run, tmp_path):
    data = run.parent / "data"
    task, f_0 = Task.of(config(data)), run / "f0" / "fixmatch"
    judged = np.concatenate([task.selection, task.test])
    for k, classifier in enumerate([f_0, run / "methods/smooth/round-02/classifier"]):
        belief = believe(task, f_0, classifier)
        whole_system(task, f_0, classifier).save_new(tmp_path / f"model-{k}")
        for labels, expected in (("none", None), ("run", belief.p_blind)):
            out = tmp_path / f"{k}.parquet"
            said = predict(tmp_path / f"model-{k}", data, out, labels=labels)
            assert (said["input"], said["num_inputs"]) == ("a prediction", task.has_image.sum())
            assert said["num_seen"] == len(task.split.labelled)
            found = pq.read_table(out).to_pandas()
            assert found["hole_name"].tolist() == task.table.hole_name.tolist()
            assert (found["p_classifier"].isna() == ~task.has_image).all()
            own = task.has_image & ~task.is_labelled
            np.testing.assert_allclose(
                found["p_classifier"][own], belief.p_classifier[own], atol=1e-9
            )
            if expected is None:
                assert (found["p_low_ctf"] == found["p_marginal"]).all()
            else:
                assert (found["is_known"] == task.is_labelled).all()
                np.testing.assert_allclose(found["p_low_ctf"][judged], expected[judged], atol=1e-6)
    for name in ("smooth", "supervised"):
        assert Model.load(run / "methods" / name / "model").posterior is not None


def test_the_command_goes_from_a_run_to_a_plan(run, tmp_path, capsys):
    data, model = str(run.parent / "data"), str(run / "methods/smooth/model")
    out, again, plan = (str(tmp_path / name) for name in ("p.parquet", "again", "plan.csv"))
    assert main(["predict", model, "--data", data, "--out", out, "--dataset", again]) == 0
    num_given = np.isfinite(read_dataset(data).table.predicted_ctf_A).sum()
    assert f"{num_given} with a prediction" in capsys.readouterr().out
    table = read_dataset(again).table
    marginal = pq.read_table(out)["p_marginal"].to_numpy()
    np.testing.assert_allclose(table.p_low_ctf, marginal)
    words = ["plan", "lagrange", "--data", again, "--calibration", again, "--budget-min", "30"]
    assert main([*words, "--out", plan]) == 0
    assert len(Path(plan).read_text().splitlines()) > 5


def test_what_a_head_cannot_do_is_said(run, demo_dir, tmp_path, capsys):
    table = read_dataset(demo_dir).table
    nan, half = np.full(len(table), np.nan), np.full(len(table), 0.5)
    bare = table.replace(predicted_ctf_A=nan, p_low_ctf=half)
    images = np.zeros((len(table), 32, 32), np.uint8)
    write_dataset(bare, tmp_path / "bare", provenance={"notes": []}, images=images)
    words = ["predict", str(run / "methods/smooth/model"), "--data", str(tmp_path / "bare")]
    assert main([*words, "--out", str(tmp_path / "p.parquet")]) == 2
    said = capsys.readouterr().err
    assert "has no predictions" in said and "--predictions FILE" in said
    assert not (tmp_path / "p.parquet").exists()
    initial = load_config(
        None,
        [
            "kind=perception",
            "classifier.network=cnn",
            f"classifier.initial={run / 'methods/smooth/model'}",
            "data.preset=demo",
            "training.method=supervised",
            "training.num_folds=0",
        ],
    )
    assert isinstance(initial, PerceptionRunConfig)
    with pytest.raises(ValueError, match="is a head on given predictions, not a network"):
        data_hashes(initial)


# ---- the loop on real input ----------------------------------------------------------------------


def test_the_whole_loop_runs_on_the_real_session(aldolase_dir, tmp_path):
    chosen = config(
        aldolase_dir,
        **{
            "loop.methods": "[iterative-fixmatch, planner, posterior]",
            "data.labelled_fraction": 0.1,
            "loop.durations_min": "[120]",
        },
    )
    with RunDirectory.create(tmp_path / "run", chosen) as run:
        summary = ssl2rl(chosen, run, progress=lambda row: None)
    assert summary["sample"]["num_holes"] == 1197
    assert set(summary["methods"]) == {"iterative-fixmatch", "planner", "posterior"}
    table = read_dataset(aldolase_dir).table
    given = area_under_roc(table.ctf_max_resolution_A < 6, given_logit(table))
    for name, found in summary["methods"].items():
        assert len(found["rounds"]) == 3 and found["stopped"] is None
        for row in found["rounds"]:
            figures = row["classifier"]["unlabelled"]
            assert figures["auc"] > given - 0.05 and figures["accuracy"] > 0.8, (name, row["round"])
            assert row["posterior"]["unlabelled"]["auc"] > 0.85
            assert row["return"]["test"]["120"]["num_low_ctf"] > 20
        for k in range(2):
            labels = found["rounds"][k]["pseudo_labels"]
            assert labels["labels"]["accuracy"] > 0.7 and labels["num_unlabelled"] > 600
    shutil.rmtree(tmp_path / "run" / "methods")  # what is left of f_0 is a head, not a network
    assert [p.name for p in (tmp_path / "run" / "f0" / "fixmatch").iterdir()] == ["model.json"]


@pytest.mark.ray
def test_reinforcement_learning_plays_on_the_real_session(aldolase_dir, tmp_path):
    chosen = config(
        aldolase_dir,
        **{
            "loop.methods": "[ssl2rl-120]",
            "loop.navigator": "algorithm",
            "loop.num_rounds": 1,
            "loop.num_rollouts": 2,
            "loop.durations_min": "[120]",
            "loop.num_starts": 2,
            "env.feature_set": "rates",
            "algorithm.learning_starts": 64,
            "algorithm.batch_size": 32,
            "algorithm.hidden_sizes": "[16]",
            "rl.num_env_steps": 256,
            "rl.num_envs_per_runner": 8,
            "rl.evaluation_interval_steps": 128,
            "rl.num_validation_sessions": 2,
            "rl.num_torch_threads": 1,
        },
    )
    seen = []
    with RunDirectory.create(tmp_path / "run", chosen) as run:
        summary = ssl2rl(chosen, run, progress=lambda row: seen.append(row["stage"]))
    assert {"ssl2rl-120 round 0: policy", "ssl2rl-120 round 1: policy"} <= set(seen)
    first, second = summary["methods"]["ssl2rl-120"]["rounds"]
    assert first["algorithm"] == "dqn" and second["pseudo_labels"] is None
    assert first["pseudo_labels"]["labels"]["accuracy"] > 0.6
    with np.load(next((tmp_path / "run").glob("f0/*/roll_out.npz"))) as roll:
        assert (np.sort(roll["visit_order"], axis=1) == np.arange(roll["value"].shape[1])).all()
        assert np.isfinite(roll["value"]).mean() > 0.5
