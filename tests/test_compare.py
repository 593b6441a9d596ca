"""``ssl2rl compare`` against run directories made by hand: groups, tasks, numbers, the page."""

import csv
import html.parser
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ssl2rl_ray.cli import main
from ssl2rl_ray.config import SSL2RLRunConfig, from_dict, load_config
from ssl2rl_ray.report.compare import compare, labels
from ssl2rl_ray.report.compare_page import format_comparison, write_comparison
from ssl2rl_ray.report.results import ReportError
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.schema import apply_override

ROOT = Path(__file__).parents[1]
METRIC = "validation/episode_return"
STEPS = (0, 100, 200)


def write_run(
    folder: Path,
    *asked: str,
    seed: int = 0,
    scores: tuple[float, ...] = (1.0, 2.0, 3.0),
    steps: tuple[int, ...] = STEPS,
    wall_s: tuple[float, ...] = (0.0, 10.0, 20.0),
    status: str = "finished",
    kind: str = "navigation",
    hashes: dict[str, str] | None = None,
) -> Path:
    """A run looked at thrice; validation never chooses the first look, as it is untrained."""
    metric, step = {
        "navigation": (METRIC, "num_env_steps"),
        "crystfel": ("validation/share_of_best", "num_env_steps"),
        "perception": ("validation/accuracy", "epoch"),
    }[kind]
    values: dict[str, Any] = {"kind": kind, "seed": seed}
    for override in asked:
        apply_override(values, override)
    run = RunDirectory.create(folder, from_dict(values), data_hashes=hashes)
    for i, (at, score, wall) in enumerate(zip(steps, scores, wall_s, strict=False)):
        row = {step: at, metric: score} | ({"wall_s": wall} if i else {})
        if kind == "perception":
            row["fit"] = "main"
        else:
            run.save_checkpoint(at, lambda path: None, value=score if i else None)
        run.log(row)
    if status == "killed":  # as a process that is gone: its lock is free, its end not noted
        assert run._lock is not None
        os.close(run._lock)
        run._lock = None
    else:
        run.finish(status)
    return folder


@pytest.fixture
def two_groups(tmp_path: Path) -> Path:
    """n_step 1 ends at 1, 2, 3, 4, 5; n_step 3 at 11, 12, 13, 14, 15."""
    for seed in range(5):
        for n_step, more in ((1, 0), (3, 10)):
            end = 1.0 + seed + more
            write_run(
                tmp_path / "runs" / f"n{n_step}-{seed}",
                f"algorithm.n_step={n_step}",
                seed=seed,
                scores=(0.0, end + 1, end),
                wall_s=(0.0, 10.0 * n_step, 20.0 * n_step),
            )
    return tmp_path / "runs"


def one(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = (r for r in rows if all(r[name] == value for name, value in wanted.items()))
    return found


# ---- numbers -------------------------------------------------------------------------------------


def test_scores_and_pairs_by_hand(two_groups):
    document = compare([two_groups])
    assert [g["group"] for g in document["groups"]] == ["n_step=1", "n_step=3"]
    assert [g["seeds"] for g in document["groups"]] == [[0, 1, 2, 3, 4]] * 2
    final = one(document["scores"], quantity="final", group="n_step=1")
    assert (final["mean"], final["iqm"], final["n"]) == (3, 3, 5)
    assert 1 <= final["iqm_low"] < 3 < final["iqm_high"] <= 5
    best = one(document["scores"], quantity="best", group="n_step=3")
    assert best["mean"] == 14  # at the middle look, one above the last
    # the curve is 0 for the first half and end + 1 for the second
    area = one(document["scores"], quantity="area", group="n_step=1")
    assert area["mean"] == pytest.approx(4 / 2)
    pair = one(document["pairs"], quantity="final", group="n_step=3", against="n_step=1")
    assert (pair["probability"], pair["iqm_difference"]) == (1, 10)
    assert pair["is_established"] and pair["iqm_difference_low"] > 0
    other = one(document["pairs"], quantity="final", group="n_step=1", against="n_step=3")
    assert (other["probability"], other["iqm_difference"]) == (0, -10)
    assert len(document["pairs"]) == 3 * 2
    assert document["notes"] == []


def test_a_threshold_by_hand(two_groups):
    document = compare([two_groups], threshold=4)
    slow = one(document["thresholds"], group="n_step=1")
    # scores at the middle look are 2 .. 6: three of five runs reach 4 there, two never
    assert (slow["num_reached"], slow["n"], slow["steps"], slow["steps_high"]) == (3, 5, 100, None)
    quick = one(document["thresholds"], group="n_step=3")
    assert (quick["num_reached"], quick["steps"], quick["wall_s"]) == (5, 100, 30)
    said = format_comparison(document)
    assert "n_step=1  100 (100 to never), 3 of 5 runs" in said
    document = compare([two_groups], threshold=99)
    assert one(document["thresholds"], group="n_step=1")["steps"] is None
    assert "never (never to never), 0 of 5 runs" in format_comparison(document)


def test_curves_stand_until_the_next_look_and_end_with_the_first_run(tmp_path):
    write_run(tmp_path / "a", scores=(0, 2, 4), steps=(0, 100, 200))
    write_run(tmp_path / "b", seed=1, scores=(2, 4, 8), steps=(0, 150, 300))
    figure = compare([tmp_path])["figures"]["curves-steps"]
    panel = one(figure["panels"], statistic="mean")
    (line,) = panel["lines"]
    assert line["x"] == [0, 100, 150, 200]
    assert line["mean"] == [1, 2, 3, 4] and line["n"] == [2] * 4
    assert line["low"] == [0, 2, 2, 4] and line["high"] == [2, 2, 4, 4]


def test_runs_that_end_within_5_percent_end_together(tmp_path):
    write_run(tmp_path / "a", scores=(0, 2, 4), steps=(0, 100, 200))
    write_run(tmp_path / "b", seed=1, scores=(0, 2, 8), steps=(0, 100, 210))
    document = compare([tmp_path])
    (line,) = one(document["figures"]["curves-steps"]["panels"], statistic="mean")["lines"]
    assert line["x"][-2:] == [200, 210] and line["mean"][-2:] == [3, 6]
    assert not any("different lengths" in note for note in document["notes"])


def test_areas_are_over_what_all_runs_have(tmp_path):
    write_run(tmp_path / "a", scores=(0, 4, 4), steps=(0, 100, 200))
    write_run(tmp_path / "b", "algorithm.n_step=1", scores=(0, 4, 4), steps=(0, 100, 1000))
    document = compare([tmp_path])
    assert [run["area"] for run in document["runs"]] == [2, 2]
    assert any("200 and 1,000 env steps" in note for note in document["notes"])


def test_attempts_add_up_on_the_wall_clock(tmp_path):
    write_run(tmp_path / "a", scores=(0, 1), steps=(0, 100), status="interrupted")
    with RunDirectory.resume(tmp_path / "a", load_config()) as run:
        run.log({"num_env_steps": 200, METRIC: 5.0, "wall_s": 7.0})
    document = compare([tmp_path / "a"])
    assert document["runs"][0]["wall_s"] == 17
    (line,) = document["figures"]["curves-wall-clock"]["panels"][0]["lines"]
    assert line["x"] == [0, 10, 17]


def test_another_metric_may_be_asked_for(tmp_path):
    run = RunDirectory.create(tmp_path / "a", load_config())
    run.log({"num_env_steps": 0, METRIC: 1.0, "train/episode_return": None})
    run.log({"num_env_steps": 9, METRIC: 2.0, "train/episode_return": 7.5})
    run.finish("finished")
    document = compare([tmp_path], metric="train/episode_return")
    assert [(r["final"], r["last"]) for r in document["runs"]] == [(7.5, 9)]
    with pytest.raises(ReportError, match=r"no 'train/return' yet; did you mean 'train/episode"):
        compare([tmp_path], metric="train/return")


# ---- groups and their names ----------------------------------------------------------------------


def test_what_does_not_change_learning_makes_no_group(tmp_path):
    write_run(tmp_path / "a", "training.num_torch_threads=1")
    write_run(tmp_path / "b", "training.num_torch_threads=4", seed=1)
    document = compare([tmp_path])
    assert [g["group"] for g in document["groups"]] == ["dqn"]
    notes = "\n".join(document["notes"])
    assert "wall clocks do not compare" in notes and "nothing to compare it with" in notes


DQN = {"algorithm.name": "dqn", "algorithm.n_step": 3, "algorithm.lr": 1e-3, "training.steps": 9}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{}], ["dqn"]),
        ([{}, {"algorithm.n_step": 1}], ["n_step=3", "n_step=1"]),
        ([{}, {"algorithm.name": "a2c", "algorithm.x": 1}], ["dqn", "a2c"]),
        # what follows from a setting that is named already is not named too
        ([{}, {"algorithm.n_step": 1, "algorithm.lr": 1.0}], ["n_step=3", "n_step=1"]),
        # of an ablation, only what was taken away
        (
            [{}, {"algorithm.n_step": 1}, {"algorithm.lr": 1.0}],
            ["dqn", "n_step=1", "lr=1"],
        ),
        (
            [{}, {"algorithm.n_step": 1}, {"algorithm.name": "a2c"}],
            ["dqn, n_step=3", "dqn, n_step=1", "a2c"],
        ),
        # a switch rather than the numbers that go with it
        (
            [{"algorithm.z": True}, {"algorithm.n_step": 1, "algorithm.z": False}],
            ["z=true", "z=false"],
        ),
        ([{"b.steps": True}, {"b.steps": None}], ["steps=true", "steps=null"]),
        (
            [{"b.steps": [1, 2]}, {"training.steps": 1, "b.steps": [1, 3]}],
            ["steps=9", "steps=1"],
        ),
    ],
)
def test_names_of_groups(changes, expected):
    found = labels([DQN | change for change in changes], "algorithm.name")
    assert found == expected
    assert len(set(found)) == len(found)


def test_names_that_hide_a_difference_say_so(tmp_path):
    write_run(tmp_path / "a", "training.num_env_steps=1000000")
    write_run(tmp_path / "b", "algorithm.name=rainbow", "training.num_env_steps=500000")
    document = compare([tmp_path])
    assert [g["group"] for g in document["groups"]] == ["dqn", "rainbow"]
    (note,) = (n for n in document["notes"] if "names do not say" in n)
    assert "training.num_env_steps" in note and "rainbow 500000, else 1000000" in note


def test_fewer_than_five_seeds_rank_nothing(two_groups):
    shutil.rmtree(two_groups / "n3-4")
    document = compare([two_groups])
    assert document["notes"][0].startswith("n_step=3: fewer than 5 seeds: this ranks nothing")
    assert not any(pair["is_established"] for pair in document["pairs"])
    assert "note: n_step=3: fewer than 5 seeds" in format_comparison(document)


# ---- which runs count ----------------------------------------------------------------------------


def test_unfinished_runs_are_said_and_left_out_or_taken_as_far_as_they_came(two_groups):
    for seed, status in enumerate(("interrupted", "failed", "killed"), start=10):
        write_run(two_groups / status, seed=seed, scores=(0, 9), status=status)
    document = compare([two_groups])
    notes = "\n".join(document["notes"])
    assert len(document["runs"]) == 10
    assert "failed (failed, 100 env steps): left out" in notes
    assert "killed (interrupted, 100 env steps): left out" in notes
    document = compare([two_groups], has_unfinished=True)
    assert len(document["runs"]) == 13
    assert one(document["runs"], run="failed")["final"] == 9
    assert any("taken as far as it came, 100 env steps" in note for note in document["notes"])


def test_where_no_run_is_finished_the_flag_is_named(tmp_path):
    for seed in range(5):
        write_run(tmp_path / f"{seed}", seed=seed, status="interrupted")
    with pytest.raises(ReportError, match=r"(?s)none of 5 runs.*and 2 more\nwait.*--unfinished"):
        compare([tmp_path])
    assert len(compare([tmp_path], has_unfinished=True)["runs"]) == 5


def test_a_run_without_a_score_or_with_damage_is_left_out_and_said(two_groups):
    RunDirectory.create(two_groups / "new", load_config(None, ["seed=9"])).finish("finished")
    (two_groups / "n1-0" / "config.yaml").write_text("kind: nonsense\n")
    document = compare([two_groups])
    notes = "\n".join(document["notes"])
    assert "new: left out: its metrics have no" in notes and "n1-0: left out" in notes
    assert len(document["runs"]) == 9


def test_runs_of_different_kinds_are_refused(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", kind="crystfel")
    with pytest.raises(ReportError, match=r"different kinds.*a is of kind navigation.*crystfel"):
        compare([tmp_path])


def test_runs_of_the_loop_are_sent_to_the_report(tmp_path):
    RunDirectory.create(tmp_path / "a", SSL2RLRunConfig()).finish("finished")
    with pytest.raises(ReportError, match="of kind ssl2rl: `ssl2rl report`"):
        compare([tmp_path / "a"])


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("navigation", "env.budget_min=120"),
        ("navigation", "env.preset=cryorl"),
        ("navigation", "sessions.preset=demo"),
        ("navigation", "training.num_validation_sessions=8"),
        ("crystfel", "env.num_frames=100"),
        ("perception", "data.labelled_fraction=0.2"),
    ],
)
def test_runs_of_different_tasks_are_refused(tmp_path, kind, setting):
    write_run(tmp_path / "a", kind=kind)
    write_run(tmp_path / "b", setting, kind=kind)
    name = setting.partition("=")[0]
    with pytest.raises(ReportError, match=rf"different tasks(?s:.*){name}.*\n.*--task {name}"):
        compare([tmp_path])


@pytest.mark.parametrize(
    ("kind", "setting", "label"),
    [
        ("navigation", "env.feature_set=rates", "feature_set=rates"),
        ("navigation", "sessions.unlabelled=1", "unlabelled=1"),
        ("crystfel", "env.reward=change", "reward=change"),
        ("crystfel", "experiments.kind=normal", "kind=normal"),
        ("perception", "training.method=supervised", "supervised"),
    ],
)
def test_what_an_agent_may_choose_makes_a_group(tmp_path, kind, setting, label):
    write_run(tmp_path / "a", kind=kind)
    write_run(tmp_path / "b", setting, kind=kind)
    document = compare([tmp_path])
    assert label in [g["group"] for g in document["groups"]]
    assert document["x_label"] == ("epochs" if kind == "perception" else "env steps")


def test_data_are_the_same_by_content_not_by_path(tmp_path):
    asked = ("sessions.redrawn=1",)
    for name, content in (("here", "ab"), ("there", "ab"), ("else", "cd")):
        path = f"data.train=[{name}]"
        write_run(tmp_path / name, *asked, path, seed=len(name), hashes={name: content})
    assert len(compare([tmp_path / "here", tmp_path / "there"])["groups"]) == 1
    with pytest.raises(ReportError, match=r"data\.train: \['ab'\] / \['cd'\]"):
        compare([tmp_path / "here", tmp_path / "else"])


def test_one_run_does_not_count_twice(two_groups):
    document = compare([two_groups, two_groups / "n1-0", f"{two_groups}/."])
    assert len(document["runs"]) == 10
    shutil.copytree(two_groups / "n1-0", two_groups / "copy")
    with pytest.raises(ReportError, match=r"same run twice \(seed 0\)"):
        compare([two_groups])


# ---- several tasks -------------------------------------------------------------------------------


@pytest.fixture
def two_tasks(tmp_path: Path) -> Path:
    """Of 120 min the scores are a tenth of those of 480 min."""
    for budget, scale in ((120, 1.0), (480, 10.0)):
        for n_step, top in ((1, 4.0), (3, 6.0)):
            for seed in range(5):
                write_run(
                    tmp_path / "runs" / f"{budget}-{n_step}-{seed}",
                    f"env.budget_min={budget}",
                    f"algorithm.n_step={n_step}",
                    seed=seed,
                    scores=(0, 0, scale * (top + seed / 10 - 0.2)),
                )
    return tmp_path / "runs"


def test_tasks_are_strata_in_units_of_their_mean(two_tasks):
    document = compare([two_tasks], tasks=["env.budget_min"])
    assert [t["task"] for t in document["tasks"]] == ["budget_min=120", "budget_min=480"]
    assert [t["scale"] for t in document["tasks"]] == pytest.approx([5, 50])
    final = one(document["scores"], quantity="final", group="n_step=3")
    assert final["mean"] == pytest.approx(1.2) and final["n"] == 5
    assert final["mean_high"] - final["mean_low"] < 0.06  # the tasks' own difference is no spread
    alone = one(document["task_scores"], quantity="final", group="n_step=3", task="budget_min=480")
    assert (alone["mean"], alone["iqm"], alone["n"]) == (pytest.approx(60), pytest.approx(60), 5)
    page = write_comparison(document, two_tasks.parent / "out").read_text()
    assert "<td>60.00 (" in page and "<td>6.00 (" in page
    run = one(document["runs"], run="480-3-2")
    assert (run["task"], run["final"]) == ("budget_min=480", pytest.approx(60))
    pair = one(document["pairs"], quantity="final", group="n_step=3", against="n_step=1")
    assert pair["probability"] == 1
    assert len(document["figures"]["curves-steps"]["panels"]) == 4
    assert "2 tasks, each in units of its mean" in format_comparison(document)


def test_a_task_that_a_group_never_ran_is_left_out_and_said(two_tasks):
    for path in two_tasks.glob("120-3-*"):
        shutil.rmtree(path)
    document = compare([two_tasks], tasks=["env.budget_min"])
    assert [t["task"] for t in document["tasks"]] == ["budget_min=480"]
    assert "task budget_min=120 left out: without runs of n_step=3" in document["notes"]
    for path in two_tasks.glob("480-1-*"):
        shutil.rmtree(path)
    with pytest.raises(ReportError, match="no task was run by every group"):
        compare([two_tasks], tasks=["env.budget_min"])


def test_mistakes_in_the_options_are_named(two_tasks):
    with pytest.raises(ReportError, match=r"env\.budget: no run .*did you mean 'env.budget_min'"):
        compare([two_tasks], tasks=["env.budget"])
    with pytest.raises(ReportError, match="a threshold is of one task"):
        compare([two_tasks], tasks=["env.budget_min"], threshold=3)
    with pytest.raises(ReportError, match="--threshold: expected a number, found nan"):
        compare([two_tasks], tasks=["env.budget_min"], threshold=float("nan"))


# ---- files and the command -----------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a page asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.loads += [of[name] or "" for name in ("src", "srcset", "data") if name in of]
        self.links += [of["href"] or ""] if "href" in of else []
        self.ids |= {of["id"] or ""} if "id" in of else set()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_page_csv_and_json_say_the_same(two_groups, tmp_path):
    document = compare([two_groups], threshold=4)
    out = tmp_path / "out"
    text = write_comparison(document, out).read_text()
    page = Page(text)
    assert page.loads and all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not re.search(r"https?:|@import|url\(|@font-face|<script|<link", text)
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    files = {link for link in page.links if not link.startswith("#")}
    assert files >= {"scores.csv", "pairs.csv", "runs.csv", "thresholds.csv", "compare.json"}
    assert all((out / file).is_file() for file in files)
    assert "1.00 (no overlap)" in text and "established" in text
    written = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(document))
    assert sorted(written["files"]) == sorted(path.name for path in out.iterdir())
    final = one(read_csv(out / "scores.csv"), quantity="final", group="n_step=3")
    assert float(final["iqm"]) == 13 and final["n"] == "5"
    curve = read_csv(out / "curves-steps.csv")
    last = one(curve, group="n_step=1", statistic="mean", x="200.0")
    assert (float(last["value"]), last["n"]) == (3, "5") and float(last["ci95_low"]) < 3
    assert len(read_csv(out / "runs.csv")) == 10


def test_the_same_runs_give_the_same_bytes_and_an_earlier_comparison_gives_way(
    two_groups, tmp_path
):
    for name in ("a", "b"):
        write_comparison(compare([two_groups], threshold=4), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    (tmp_path / "a" / "mine.txt").write_text("mine")
    write_comparison(compare([two_groups]), tmp_path / "a")
    assert not (tmp_path / "a" / "thresholds.csv").exists()
    assert (tmp_path / "a" / "mine.txt").exists()


def test_names_are_text_never_markup(tmp_path):
    name = "<script>alert(1)</script>&$x_1$"
    write_run(tmp_path / name.replace("/", "-"))
    write_run(tmp_path / "b", seed=1)
    page = write_comparison(compare([tmp_path]), tmp_path / "out").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_command_prints_a_table_and_where_the_page_is(two_groups, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["compare", str(two_groups), "--out", str(out)]
    assert main([*words, "--threshold", "4"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^n_step=3 +5 +13\.00 \(1\d\.\d\d to 1\d\.\d\d\) ", said, re.MULTILINE)
    assert re.search(r"^n_step=3 > n_step=1 +1\.00 \(no overlap\) +\+10\.00 ", said, re.MULTILINE)
    assert f"{out / 'compare.html'}: open it in a browser" in said
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "compare.json").read_text())
    assert main(["compare", str(out), "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ssl2rl compare: no run of kind") and "Traceback" not in error
    assert not (tmp_path / "new").exists()
    assert main(["compare", str(two_groups), "--out", str(two_groups)]) == 2
    assert "holds no earlier comparison" in capsys.readouterr().err


def test_neither_torch_nor_ray_is_loaded(two_groups, loaded_by, tmp_path):
    assert loaded_by("compare", str(two_groups), "--out", str(tmp_path / "out")) == []


@pytest.mark.slow
def test_a_browser_shows_the_page_without_overflow(two_tasks, page_widths, tmp_path):
    page = write_comparison(compare([two_tasks], tasks=["env.budget_min"]), tmp_path / "out")
    for width in (1200, 500):
        content, window = page_widths(page, width)
        assert content <= window <= width
