"""Returns by hand, pairing, the exact optimum, and calibrations that have seen the labels."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from envs.cryoem.planners import NAMES
from envs.cryoem.stack import SessionStack
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import HoleTable, NavigationConfig
from ssl2rl_ray.data.commands import read_calibration
from ssl2rl_ray.data.folder import read_dataset, write_dataset
from ssl2rl_ray.evaluate import (
    METRICS,
    contestant,
    draw_starts,
    evaluate,
    format_report,
    label_marks,
    roll_out,
)


def toy() -> HoleTable:
    """One grid, two squares, three patches; holes 0, 1, 3, 5 are good."""
    return HoleTable.from_names(
        hole_name=[f"h{i}" for i in range(6)],
        grid=["g"] * 6,
        square=["s0"] * 4 + ["s1"] * 2,
        patch=["p0", "p0", "p0", "p1", "p2", "p2"],
        ctf_max_resolution_A=np.array([4.0, 5.0, 9.0, 6.0, 12.0, 3.0]),
        p_low_ctf=np.array([0.9, 0.8, 0.1, 0.7, 0.2, 0.6]),
    )


def save(table: HoleTable, folder: Path, **options) -> str:
    write_dataset(table, folder, provenance={"importer": "test", "notes": []}, **options)
    return str(folder)


def test_snowball_on_the_toy_by_hand():
    # From hole 0: hole 1 in the patch (1 min, 1.0), then p1 in the square (2 min, 0.90), then the
    # other square's hole 5 (6 min, 0.61). Nothing predicted low is left at 9 min; hole 4 shares the
    # patch (1 min, 0), then hole 2 in the other square (6 min, 0): 16 minutes, all visited.
    config = NavigationConfig.preset("cryorl", budget_min=100)
    stack = SessionStack.of([toy()], config)
    episodes = roll_out(
        contestant("snowball").make(stack, config),
        stack,
        config,
        session=np.zeros(2, int),
        start_hole=np.zeros(2, int),
        rng=np.random.default_rng(0),
    )
    assert episodes.visit_order[0].tolist() == [0, 1, 3, 5, 4, 2]
    assert episodes.episode_return == pytest.approx([2.51, 2.51])
    assert episodes.num_low_ctf.tolist() == [3, 3]
    assert episodes.num_visits.tolist() == [5, 5]
    assert episodes.minutes_by_switch[0].tolist() == [2, 2, 12, 0]


def test_episodes_end_apart_and_count_nothing_after_their_end():
    config = NavigationConfig.preset("cryorl", budget_min=7)
    table = toy()
    stack = SessionStack.of([table, table.select(np.arange(3))], config)
    episodes = roll_out(
        contestant("snowball").make(stack, config),
        stack,
        config,
        session=np.array([0, 1]),
        start_hole=np.array([0, 0]),
        rng=np.random.default_rng(0),
    )
    # The first goes past 7 minutes with its third move, which counts; the second runs out of holes.
    assert episodes.visit_order.tolist() == [[0, 1, 3, 5], [0, 1, 2, -1]]
    assert episodes.episode_return == pytest.approx([2.51, 1.0])
    assert episodes.num_visits.tolist() == [3, 2]


def test_the_json_has_the_keys_that_were_promised(demo_dir):
    report = evaluate("rate-index", data=demo_dir, budget_min=60, num_episodes=4, seed=1626)
    assert {
        "policy",
        "data_hash",
        "preset",
        "budget_min",
        "minutes_by_switch",
        "num_switches",
        "seed",
        "calibration",
        *METRICS,
    } <= set(report)
    for metric in METRICS:
        assert set(report[metric]) == {"mean", "sd", "ci95", "values"}
        assert len(report[metric]["values"]) == 4
    assert set(report["calibration"]) == {"hash", "is_fitted_on_this_session"}
    table = read_dataset(demo_dir).table
    assert report["data_hash"] == table.content_hash
    starts = np.random.RandomState(1626).randint(0, len(table) - 1, 4)
    assert report["start_hole"] == starts.tolist() == draw_starts(len(table), 4, 1626).tolist()
    assert sum(report["minutes_by_switch"].values()) >= 60
    assert sum(report["num_switches"].values()) == pytest.approx(report["num_visits"]["mean"])
    json.dumps(report, allow_nan=False)


def test_nobody_beats_the_optimum_and_the_oracle_reaches_it(demo_dir):
    others = [name for name in NAMES if name != "oracle"]
    report = evaluate("oracle", data=demo_dir, budget_min=90, num_episodes=3, against=others)
    assert report["fraction_of_optimum"]["values"] == pytest.approx([1.0] * 3)
    for name in others:
        assert max(report["against"][name]["fraction_of_optimum"]["values"]) <= 1 + 1e-9, name


def test_a_policy_against_itself_differs_by_nothing(demo_dir):
    options = {"data": demo_dir, "budget_min": 60, "num_sessions": 3, "session_kind": "synthetic"}
    report = evaluate(
        "rate-index", **options, synthetic_preset="demo", against=["rate-index", "random"]
    )
    assert report["against"]["rate-index"]["difference"]["values"] == [0, 0, 0]
    assert report["against"]["random"]["difference"]["mean"] > 0
    pairs = zip(
        report["episode_return"]["values"],
        report["against"]["random"]["episode_return"]["values"],
        strict=True,
    )
    differences = report["against"]["random"]["difference"]["values"]
    assert differences == pytest.approx([a - b for a, b in pairs])
    assert "3 synthetic sessions" in format_report(report)


def test_a_drawn_session_is_the_same_whatever_their_number(demo_dir):
    options = {"data": demo_dir, "calibration": demo_dir, "budget_min": 60, "seed": 5}
    few = evaluate("rate-index", **options, num_sessions=2)
    more = evaluate("rate-index", **options, num_sessions=4)
    values = more["episode_return"]["values"]
    assert values[:2] == few["episode_return"]["values"]
    assert len(set(values)) > 1
    assert few["calibration"]["is_fitted_on_this_session"] is False


def test_several_starts_in_each_drawn_session_are_one_value(demo_dir):
    report = evaluate(
        "snowball",
        data=demo_dir,
        budget_min=30,
        num_sessions=2,
        num_episodes=3,
        session_kind="synthetic",
        synthetic_preset="demo",
    )
    assert report["num_episodes"] == 6
    assert len(report["episode_return"]["values"]) == 2


def test_redrawing_needs_a_model(demo_dir):
    with pytest.raises(ValueError, match="--calibration TRAIN_DIR"):
        evaluate("rate-index", data=demo_dir, num_sessions=2)


def test_truth_counts_also_where_it_may_not_be_trained_on(tmp_path):
    labelled = save(toy(), tmp_path / "labelled")
    hidden = save(toy().replace(is_labelled=np.zeros(6, bool)), tmp_path / "hidden")
    reports = [
        evaluate("snowball", data=d, budget_min=9, num_episodes=5) for d in (labelled, hidden)
    ]
    assert reports[0]["episode_return"] == reports[1]["episode_return"]


def test_holes_without_a_value_cannot_be_evaluated(tmp_path):
    ctf = toy().ctf_max_resolution_A.copy()
    ctf[[1, 4]] = np.nan
    table = toy().replace(ctf_max_resolution_A=ctf, is_labelled=np.isfinite(ctf))
    with pytest.raises(ValueError, match=r"2 of 6 holes have no CTF value.*ssl2rl plan"):
        evaluate("snowball", data=save(table, tmp_path / "d"))


@pytest.mark.parametrize("part", ["whole", "half", "imported otherwise"])
def test_a_calibration_that_has_seen_the_labels_is_refused(aldolase_dir, tmp_path, part):
    source = read_dataset(aldolase_dir)
    table = source.table
    if part == "half":
        table = table.select(table.grid_id < 3)
    if part == "imported otherwise":
        table = table.replace(x=np.zeros(len(table)))
    data = save(table, tmp_path / "d", calibration=source.calibration)
    options = {"data": data, "calibration": aldolase_dir, "budget_min": 10, "num_episodes": 2}
    with pytest.raises(ValueError, match=r"has seen labels.*--calibration TRAIN_DIR"):
        evaluate("rate-index", **options)
    report = evaluate("rate-index", **options, allow_in_sample=True)
    assert report["calibration"]["is_fitted_on_this_session"] is True
    assert "IN-SAMPLE" in format_report(report)


def test_probabilities_that_an_import_calibrated_on_the_same_labels_are_refused(tmp_path, demo_dir):
    provenance = {"importer": "cryorl", "calibration_applied": {"num_shared_holes": 6}}
    table = toy().replace(predicted_ctf_A=np.arange(6.0))
    write_dataset(table, tmp_path / "d", provenance=provenance)
    options = {"data": tmp_path / "d", "budget_min": 9, "num_episodes": 2}
    with pytest.raises(ValueError, match="has seen labels"):
        evaluate("rate-index", **options)
    report = evaluate("rate-index", **options, allow_in_sample=True)
    assert report["calibration"]["is_fitted_on_this_session"] is True
    # the calibration of another session takes the place of what the import wrote
    assert evaluate("rate-index", **options, calibration=demo_dir)["episode_return"]["values"]


@pytest.mark.parametrize("use", ["train", "validation_grids", "validation", "calibration"])
def test_a_policy_that_has_read_the_labels_in_any_way_is_refused(tmp_path, demo_dir, use):
    from ssl2rl_ray.algorithms.networks import make_network
    from ssl2rl_ray.algorithms.policy import Artefact
    from ssl2rl_ray.config import DataConfig, NavigationRunConfig, navigation_config
    from ssl2rl_ray.train import sessions_of

    source = read_dataset(demo_dir)
    table, first_grid = source.table, str(source.table.grid_name[0])
    train = save(table, tmp_path / "train", calibration=source.calibration)
    data = {
        "train": DataConfig(train=(train,)),
        "validation_grids": DataConfig(train=(train,), validation_grids=(first_grid,)),
        "validation": DataConfig(validation=(train,)),
        "calibration": DataConfig(calibration=train),
    }[use]
    config = NavigationRunConfig(data=data)
    sessions, rules = sessions_of(config), navigation_config(config.env)
    assert sessions.labels_seen == label_marks(table)
    artefact = Artefact(
        weights=make_network(rules, SessionStack.of([table], rules)).state_dict(),
        rules=rules,
        calibration=sessions.calibration,
        hidden_sizes=config.algorithm.hidden_sizes,
        is_dueling=None,
        is_residual=True,
        labels_seen=sessions.labels_seen,
    )
    policy = tmp_path / "policy"
    policy.mkdir()
    artefact.save(policy)
    # a part of the session, with probabilities of its own: no hash of a table is the same
    part = table.select(np.arange(40)).replace(p_low_ctf=np.full(40, 0.5))
    seen = save(part, tmp_path / "part")
    with pytest.raises(ValueError, match="has seen labels"):
        evaluate(str(policy), data=seen, budget_min=9, num_episodes=2)
    other = save(toy().replace(predicted_ctf_A=np.arange(6.0)), tmp_path / "other")
    report = evaluate(str(policy), data=other, budget_min=9, num_episodes=2, against=["snowball"])
    assert report["against"]["snowball"]["calibration"]["is_fitted_on_this_session"] is False


def test_the_model_of_synthetic_sessions_is_in_sample_where_it_was_fitted(
    aldolase_dir, demo_dir, tmp_path
):
    table = read_calibration(demo_dir).apply(read_dataset(aldolase_dir).table)
    again = save(table, tmp_path / "again")  # as an import with --calibration leaves it
    for data in (aldolase_dir, again):
        with pytest.raises(ValueError, match="has seen labels"):
            evaluate("rate-index", data=data, calibration=demo_dir, num_episodes=2)


def test_marks_tell_shared_labels_and_not_the_labels():
    marks = label_marks(toy())
    assert len(marks) == 6 and all(len(mark) == 12 for mark in marks)
    assert label_marks(toy().select(np.array([1, 4]))) < marks
    assert not label_marks(toy().replace(is_labelled=np.zeros(6, bool)))
    other = toy().replace(ctf_max_resolution_A=toy().ctf_max_resolution_A + 0.01)
    assert not label_marks(other) & marks
    moved = toy().replace(patch_name=np.array(["a", "b", "c"]))
    assert not label_marks(moved) & marks


def test_sessions_drawn_apart_share_no_more_labels_than_by_chance():
    # 40 pairs of the same preset, whose holes have the same names and Å rounded to 0.01
    tables = [draw_session(np.random.default_rng(seed), "demo") for seed in range(41)]
    marks = [label_marks(table) for table in tables]
    shared = [len(a & b) / len(b) for a, b in pairwise(marks)]
    assert max(shared) < 0.005


def test_a_calibration_of_other_holes_is_welcome(aldolase_dir, demo_dir):
    report = evaluate(
        "rate-index", data=demo_dir, calibration=aldolase_dir, budget_min=10, num_episodes=2
    )
    assert report["calibration"]["is_fitted_on_this_session"] is False
    assert report["calibration"]["hash"] == read_dataset(aldolase_dir).table.content_hash


def test_planners_act_on_the_calibrated_probabilities(aldolase_dir):
    calibration = read_calibration(aldolase_dir)
    table = read_dataset(aldolase_dir).table
    seen = contestant("rate-index", calibration).sees(table)
    np.testing.assert_array_equal(seen.p_low_ctf, calibration.apply(table).p_low_ctf)
    assert contestant("rate-index").sees(table) is table


def test_a_wrong_name_is_met_with_the_right_ones(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'snowball'"):
        contestant("snowbal")
    with pytest.raises(ValueError, match="neither a planner"):
        contestant(str(tmp_path))


def test_one_hole_is_no_session():
    with pytest.raises(ValueError, match="at least 2 holes"):
        draw_starts(1, 5, 0)


def test_one_hole_is_no_session_to_redraw_either(tmp_path, aldolase_dir):
    one = read_dataset(aldolase_dir).table.select(np.array([3]))
    options = {"data": save(one, tmp_path / "one"), "calibration": aldolase_dir}
    with pytest.raises(ValueError, match="at least 2 holes"):
        evaluate("rate-index", **options, num_sessions=2)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "cryorl", "leginon-2021"])
def test_planners_rank_as_they_should_on_the_real_session(aldolase_dir, preset):
    """In-sample on the training half: the order of the planners, not a figure."""
    report = evaluate(
        "lagrange",
        data=aldolase_dir,
        preset=preset,
        budget_min=240,
        num_episodes=5,
        calibration=aldolase_dir,
        against=["rate-index", "snowball", "random", "oracle"],
        allow_in_sample=True,
    )
    mean = {name: entry["episode_return"]["mean"] for name, entry in report["against"].items()}
    assert mean["random"] < mean["snowball"] < report["episode_return"]["mean"] < mean["oracle"]
    assert mean["random"] < mean["rate-index"] < mean["oracle"]
