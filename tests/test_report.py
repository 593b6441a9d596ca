"""The report against run directories made by hand: cells, pairs, words, files, and the page."""

import csv
import html.parser
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ssl2rl_ray.cli import main
from ssl2rl_ray.config import METHODS, LoopConfig, PerceptionDataConfig, SSL2RLRunConfig
from ssl2rl_ray.recipes import (
    DQNConfig,
    NavigationA2CConfig,
    NavigationAlgorithm,
    RainbowConfig,
)
from ssl2rl_ray.report import check_out, format_report, report, write_report
from ssl2rl_ray.report.figures import _STYLES, points
from ssl2rl_ray.report.results import GROUPS, ReportError
from ssl2rl_ray.report.tables import NOT_AT_HAND, PAPER, number
from ssl2rl_ray.runs import RunDirectory

ROOT = Path(__file__).parents[1]
LEVELS = ("grid", "square", "patch", "hole")
NAN = float("nan")


def metrics(accuracy: float | None, **other: float | None) -> dict[str, float | None]:
    names = ("accuracy", "accuracy_at_median", "auc", "precision", "recall")
    return {"num_holes": 100.0, "ece": 0.04, **dict.fromkeys(names, accuracy), **other}


def quality(value: float) -> dict[str, float]:
    return dict.fromkeys(("accuracy", "precision", "recall", "auc", "positive_share"), value)


def round_row(
    number: int,
    *,
    test: float | None = 0.6,
    selection: float = 0.6,
    returns: dict[str, float | None] | None = None,
    selection_returns: float = 0.0,
    has_labels: bool = True,
) -> dict[str, Any]:
    """round.json; ``returns`` by duration are of the test squares."""
    returns = {"120": 40.0, "480": 100.0} if returns is None else returns

    def of(value: float | None) -> dict[str, Any]:
        return {"episode_return": value, "num_low_ctf": value, "num_visits": 9.0}

    labels = {
        "rule": "visit-order",
        "labels": quality(0.62),
        "own_ranking": quality(0.61),
        "own_threshold": quality(0.58),
        "curve": {"share": [0.1, 0.5], "labels": [0.7, 0.65], "own": [0.68, NAN]},
    }
    return {
        "round": number,
        "algorithm": "dqn",
        "classifier": {name: metrics(test) for name in ("test", "unlabelled")}
        | {"selection": metrics(selection)},
        "posterior": {
            name: metrics(None if test is None else test + 0.05)
            for name in ("selection", "test", "test_blind")
        },
        "return": {
            "test": {name: of(value) for name, value in returns.items()},
            "selection": {name: of(selection_returns) for name in returns},
        },
        "pseudo_labels": labels if has_labels else None,
        "roll_out": {
            "num_switches": dict.fromkeys(LEVELS, 10.0),
            "inconsistency": dict.fromkeys(LEVELS[:3], 0.2),
            "inconsistency_bound": dict.fromkeys(LEVELS[:3], 0.4),
        }
        if has_labels
        else None,
        "is_collapsed": False,
    }


def method(
    *rounds: dict[str, Any],
    reward: int = 0,
    accuracy: int = 0,
    stopped: str | None = None,
    **kept: int,
) -> dict[str, Any]:
    kept = {"reward": reward, "accuracy": accuracy, **kept}
    return {"rounds": list(rounds), "kept": kept, "stopped": stopped}


def write_run(
    folder: Path,
    methods: dict[str, Any],
    *,
    seed: int = 0,
    fraction: float = 0.05,
    loop: dict[str, Any] | None = None,
    share: float = 0.5,
    status: str = "finished",
    algorithm: NavigationAlgorithm | None = None,
) -> Path:
    known = tuple(name for name in methods if name in METHODS)
    options = {"methods": known or ("fixmatch",), "num_rounds": 1} | (loop or {})
    config = SSL2RLRunConfig(
        seed=seed,
        data=PerceptionDataConfig(labelled_fraction=fraction),
        loop=LoopConfig(**options),
        algorithm=algorithm or DQNConfig(),
    )
    anova = {"grid": 0.05, "square": 0.15, "patch": 0.8 - share, "hole": share}
    sample = {"num_holes": 800, "num_labelled": 40, "anova": anova}
    sample["units"] = {"grid": 3, "square": 9, "patch": 60, "hole": 800}
    run = RunDirectory.create(folder, config)
    run.write_summary({"methods": methods, "sample": sample})
    run.finish(status)
    return folder


def of_test(*values: float | None, kept: int = 0) -> dict[str, Any]:
    """A method whose rounds have these accuracies on the test squares."""
    rows = [round_row(k, test=value) for k, value in enumerate(values)]
    return method(*rows, reward=kept, accuracy=kept)


def cell(document: dict[str, Any], table: str, part: str = "cells", **wanted: Any) -> Any:
    found = [
        c
        for c in document["tables"][table][part]
        if all(c[name] == value for name, value in wanted.items())
    ]
    assert len(found) == 1, found
    return found[0]


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.fixture
def three_seeds(tmp_path: Path) -> Path:
    """Accuracy .60 .62 .64 (ssl2rl-480), .60 .61 .62 (iterative), .50 .51 .52 (labelled-only)."""
    for seed in range(3):
        write_run(
            tmp_path / "runs" / f"seed-{seed}",
            {
                "iterative-fixmatch": of_test(0.3, 0.6 + 0.01 * seed, kept=1),
                "ssl2rl-480": of_test(0.3, 0.6 + 0.02 * seed, kept=1),
                "labelled-only": of_test(0.3, 0.5 + 0.01 * seed, kept=1),
            },
            seed=seed,
            share=0.5 + 0.01 * seed,
        )
    return tmp_path / "runs"


# ---- cells ---------------------------------------------------------------------------------------


def test_a_cell_is_mean_and_t_interval_over_data_sets(three_seeds):
    found = cell(report([three_seeds]), "table2", row="ssl2rl-480", quantity="accuracy")
    # sd .02, t(.975, 2) = 4.302653, so 4.302653 * .02 / sqrt(3) = .049683
    assert found["n"] == 3 and found["seeds"] == [0, 1, 2]
    assert found["values"] == pytest.approx([0.60, 0.62, 0.64])
    assert found["mean"] == pytest.approx(0.62)
    assert found["half_width"] == pytest.approx(0.049683, abs=1e-6)
    assert found["ci95"] == pytest.approx([0.570317, 0.669683], abs=1e-6)


def test_differences_are_paired_and_established_where_the_interval_excludes_0(three_seeds):
    document = report([three_seeds])
    where = {"row": "ssl2rl-480", "quantity": "accuracy", "part": "differences"}
    less = cell(document, "table2", against="iterative-fixmatch", **where)
    # .00 .01 .02: mean .01, sd .01, half 4.302653 * .01 / sqrt(3) = .024841
    assert less["values"] == pytest.approx([0.0, 0.01, 0.02])
    assert (less["mean"], less["half_width"]) == pytest.approx((0.01, 0.0248413), abs=1e-6)
    assert less["is_established"] is False
    less = cell(document, "table2", against="labelled-only", **where)
    # .10 .11 .12: .11 +- .0248
    assert less["mean"] == pytest.approx(0.11) and less["is_established"] is True


def test_pairs_are_of_the_same_seed_only(tmp_path):
    write_run(tmp_path / "a", {"labelled-only": of_test(0.5, 0.5)}, seed=0)
    both = {"labelled-only": of_test(0.4, 0.4), "smooth": of_test(0.6, 0.6)}
    write_run(tmp_path / "b", both, seed=1)
    write_run(tmp_path / "c", {"smooth": of_test(0.9, 0.9)}, seed=2)
    document = report([tmp_path])
    found = cell(document, "table2", row="smooth", quantity="accuracy")
    assert found["n"] == 2 and found["mean"] == pytest.approx(0.75)
    less = cell(document, "table2", part="differences", row="smooth", quantity="accuracy")
    assert (
        less["against"] == "labelled-only"
        and less["seeds"] == [1]
        and less["values"] == pytest.approx([0.2])
    )
    assert less["is_established"] is False


def test_the_round_is_kept_by_selection_and_quoted_on_test(tmp_path):
    rounds = (
        round_row(0, test=0.9, selection=0.5, returns={"480": 300.0}, selection_returns=10),
        round_row(1, test=0.6, selection=0.7, returns={"480": 200.0}, selection_returns=20),
        round_row(2, test=0.8, selection=0.6, returns={"480": 250.0}, selection_returns=30),
    )
    found = {"ssl2rl-480": method(*rounds, reward=2, accuracy=1)}
    document = report([write_run(tmp_path / "run", found, loop={"num_rounds": 2})])
    one = cell(document, "table1", row="ssl2rl-480", quantity="return-480")
    assert (one["mean"], one["n"], one["half_width"]) == (250.0, 1, None)
    assert cell(document, "table2", row="ssl2rl-480", quantity="accuracy")["mean"] == 0.6
    for kept_by, earned, accuracy in (("reward", 250.0, 0.8), ("accuracy", 200.0, 0.6)):
        row = f"ssl2rl-480/dqn/{kept_by}"
        assert cell(document, "table4", row=row, quantity="return-480")["mean"] == earned
        assert cell(document, "table4", row=row, quantity="accuracy")["mean"] == accuracy
    # the run has not noted which round its AUC would keep
    assert cell(document, "table7", row="ssl2rl-480", quantity="accuracy")["mean"] is None
    found = {"ssl2rl-480": method(*rounds, reward=0, accuracy=1, auc=2)}
    later = report([write_run(tmp_path / "later", found, loop={"num_rounds": 2})])
    assert cell(later, "table7", row="ssl2rl-480", quantity="accuracy")["mean"] == 0.8
    # table 6 is of the last round, which no criterion need have kept
    found = {"ssl2rl-480": method(*rounds, reward=0, accuracy=1)}
    other = report([write_run(tmp_path / "other", found, loop={"num_rounds": 2})])
    assert cell(other, "table6", row="ssl2rl-480", quantity="accuracy")["mean"] == 0.8
    assert cell(other, "table6", row="ssl2rl-480", quantity="return-480")["mean"] == 250.0
    (line,) = (
        line
        for panel in document["figures"]["figure7-paper"]["panels"]
        if panel["y_label"] == "accuracy"
        for line in panel["lines"]
    )
    assert line["mean"] == [0.5, 0.7, 0.6]  # selection, round by round
    assert line["kept_share"] == [0, 1, 0]


def test_what_is_not_defined_is_not_counted(tmp_path):
    for seed, value in enumerate((0.5, None, NAN, 0.7)):
        write_run(tmp_path / str(seed), {"smooth": of_test(value, value)}, seed=seed)
    path = tmp_path / "2" / "summary.json"
    path.write_text(path.read_text().replace('"accuracy": null', '"accuracy": NaN'))
    document = report([tmp_path])
    found = cell(document, "table2", row="smooth", quantity="accuracy")
    assert found["seeds"] == [0, 3] and found["mean"] == pytest.approx(0.6)
    json.dumps(document, allow_nan=False)
    rows = points(document["figures"]["calibration"])
    assert {row["n"] for row in rows} == {4}


def test_the_whole_system_stands_beside_the_classifier_of_full_labels(tmp_path):
    for seed in range(2):
        full = method(round_row(0, test=0.65, returns={"480": 100.0}, has_labels=False))
        ours = round_row(0, test=0.62, returns={"480": 96.0 + seed})
        found = {"full-labels": full, "posterior": method(ours, ours | {"round": 1})}
        write_run(tmp_path / str(seed), found, seed=seed, fraction=0.1)
    document = report([tmp_path])
    system = {"quantity": "system-accuracy-test"}
    assert cell(document, "table5", row="posterior", **system)["mean"] == pytest.approx(0.67)
    assert cell(document, "table5", row="full-labels", **system)["mean"] == pytest.approx(0.65)
    less = cell(document, "table5", part="differences", row="posterior", **system)
    assert less["values"] == pytest.approx([0.02, 0.02]) and less["is_established"]
    ratio = cell(document, "table5", row="posterior", quantity="return-480-ratio")
    assert ratio["values"] == pytest.approx([0.96, 0.97])
    # sd .00707107, t(.975, 1) = 12.7062: .00707107 * 12.7062 / sqrt(2)
    assert ratio["half_width"] == pytest.approx(0.0635310, abs=1e-6)


def test_returns_are_divided_by_full_labels_of_the_same_fraction(tmp_path):
    for fraction, whole in ((0.05, 100.0), (0.1, 50.0)):
        full = method(round_row(0, returns={"480": whole}, has_labels=False))
        ours = round_row(0, returns={"480": 45.0})
        found = {"full-labels": full, "smooth": method(ours, ours | {"round": 1})}
        write_run(tmp_path / str(fraction), found, fraction=fraction)
    document = report([tmp_path])
    for fraction, ratio in ((0.05, 0.45), (0.1, 0.9)):
        where = {"quantity": "return-480-ratio", "labelled_fraction": fraction}
        assert cell(document, "table5", row="smooth", **where)["values"] == pytest.approx([ratio])


def test_runs_that_split_their_squares_otherwise_are_not_one_cell(tmp_path):
    for seed, share in enumerate((0.4, 0.6)):
        loop = {"selection_share": share}
        write_run(tmp_path / str(seed), {"smooth": of_test(0.5, 0.6)}, seed=seed, loop=loop)
    with pytest.raises(ReportError, match=r"differ in loop\.selection_share"):
        report([tmp_path])


def test_anova_counts_samples_not_runs(three_seeds):
    again = {"labelled-only": of_test(0.5, 0.5)}
    write_run(three_seeds / "again", again, seed=0, fraction=0.1, share=0.5)  # seed 0's sample
    found = cell(report([three_seeds]), "table3", level="hole", quantity="share")
    assert found["n"] == 3 and found["mean"] == pytest.approx(0.51)
    assert found["paper"] == 0.5363


def test_the_paper_is_quoted_where_it_is_at_hand_and_nowhere_else(tmp_path):
    single = {name: of_test(0.6) for name in ("supervised", "fixmatch", "full-labels")}
    for fraction in (0.05, 0.2):
        write_run(tmp_path / str(fraction), {**single, "smooth": of_test(1, 1)}, fraction=fraction)
    document = report([tmp_path])

    def paper(row: str, fraction: float, table: str = "table2", quantity: str = "accuracy") -> Any:
        return cell(document, table, row=row, labelled_fraction=fraction, quantity=quantity)[
            "paper"
        ]

    assert paper("supervised", 0.05) == 0.571 and paper("supervised", 0.2) == 0.630
    assert paper("full-labels", 0.05) == paper("full-labels", 0.2) == 0.652
    assert paper("fixmatch", 0.05) == 0.623 and paper("fixmatch", 0.2) == NOT_AT_HAND
    assert paper("smooth", 0.05) is None  # the paper has no such row
    assert paper("fixmatch", 0.05, "table1", "return-480") == NOT_AT_HAND
    assert len(PAPER["accuracy"]) == 5


# ---- which runs count ----------------------------------------------------------------------------


def test_a_run_under_way_counts_with_the_methods_that_are_done(tmp_path):
    unfinished = of_test(0.9)  # one round of two
    done = {"labelled-only": of_test(0.5, 0.6, kept=1), "smooth": unfinished}
    stopped = method(round_row(0, test=0.7), stopped="nearly all holes are called one thing")
    done |= {"supervised": of_test(0.4), "ranking": stopped}
    run = write_run(tmp_path / "run", done, status="interrupted", loop={"num_rounds": 1})
    begun = run / "methods" / "posterior" / "round-00" / "round.json"
    begun.parent.mkdir(parents=True)
    begun.write_text(json.dumps(round_row(0)))
    document = report([run])
    assert document["methods"] == ["supervised", "labelled-only", "ranking"]
    assert cell(document, "table2", row="ranking", quantity="accuracy")["mean"] == 0.7
    notes = "\n".join(document["notes"])
    assert "run (interrupted): smooth left out" in notes and "posterior left out" in notes
    assert "ranking: the loop ended early on 1 of 1" in notes and "called one thing" in notes


def test_a_run_without_any_result_is_named(tmp_path):
    write_run(tmp_path / "run", {}, status="interrupted")
    with pytest.raises(ReportError, match=r"none of 1 runs has a finished method"):
        report([tmp_path / "run"])


def test_folders_are_searched_two_levels_deep_and_each_run_counts_once(three_seeds):
    deep = three_seeds / "sweep"
    write_run(deep / "trial", {"labelled-only": of_test(0.5, 0.5)}, seed=7)
    write_run(deep / "too" / "deep", {"labelled-only": of_test(0.5, 0.5)}, seed=8)
    inner = RunDirectory.create(three_seeds / "seed-0" / "methods" / "x", SSL2RLRunConfig())
    inner.finish("finished")
    document = report([three_seeds, three_seeds / "seed-1", f"{three_seeds}/."])
    assert [run["seed"] for run in document["runs"]] == [0, 1, 2, 7]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no run of kind ssl2rl in"),
        (lambda folder: (folder / "file").touch(), "no run of kind ssl2rl in"),
        (lambda folder: folder.rmdir(), "is not a folder"),
    ],
)
def test_where_there_is_no_run_the_folder_is_named(tmp_path, make, message):
    folder = tmp_path / "empty"
    folder.mkdir()
    make(folder)
    with pytest.raises(ReportError, match=rf"{message}|{folder.name}.*{message}"):
        report([folder])


def test_a_run_of_another_kind_is_refused_by_name(tmp_path):
    from ssl2rl_ray.config import PerceptionRunConfig

    RunDirectory.create(tmp_path / "run", PerceptionRunConfig()).finish("finished")
    with pytest.raises(ReportError, match="of kind perception"):
        report([tmp_path / "run"])


def test_a_damaged_run_is_left_out_and_said(three_seeds):
    (three_seeds / "seed-2" / "summary.json").write_text("{")
    document = report([three_seeds])
    assert cell(document, "table2", row="ssl2rl-480", quantity="accuracy")["n"] == 2
    assert any("seed-2: left out" in note and "damaged" in note for note in document["notes"])


def test_one_data_set_does_not_count_twice(three_seeds):
    write_run(three_seeds / "copy", {"labelled-only": of_test(0.5, 0.5)}, seed=1)
    with pytest.raises(ReportError, match=r"(?s)seed-1.*hold the same data set.*labelled-only"):
        report([three_seeds])


def test_runs_that_differ_in_more_than_the_seed_are_not_mixed(three_seeds):
    write_run(three_seeds / "x", {"smooth": of_test(1, 1)}, seed=9, loop={"num_rollouts": 3})
    with pytest.raises(ReportError, match=r"loop\.num_rollouts: 5 / 3"):
        report([three_seeds])


def test_other_navigators_stand_in_table_4_alone(three_seeds):
    found = {"ssl2rl-480": of_test(0.9, 0.9)}
    write_run(three_seeds / "planned", found, seed=0, loop={"navigator": "lagrange"})
    document = report([three_seeds])
    assert document["navigator"] == "dqn"
    assert cell(document, "table2", row="ssl2rl-480", quantity="accuracy")["n"] == 3
    row = "ssl2rl-480/lagrange/reward"
    assert cell(document, "table4", row=row, quantity="accuracy")["mean"] == 0.9
    less = cell(
        document, "table4", part="differences", row=row, quantity="accuracy",
        against="ssl2rl-480/dqn/reward",
    )  # fmt: skip
    assert less["seeds"] == [0] and less["values"] == pytest.approx([0.3])
    assert "rainbow, a2c" in document["tables"]["table4"]["caption"]
    assert any("lagrange stand in Table 4" in note for note in document["notes"])


def test_algorithms_stand_side_by_side_in_table_4(three_seeds):
    for seed in range(2):
        found = {
            "iterative-fixmatch": of_test(0.7, 0.7),
            "ssl2rl-480": of_test(0.3, 0.72 + 0.01 * seed, kept=1),
        }
        write_run(
            three_seeds / f"rainbow-{seed}", found, seed=seed, algorithm=RainbowConfig(n_step=1)
        )
    document = report([three_seeds])
    table, accuracy = document["tables"]["table4"], {"quantity": "accuracy"}
    assert [row["row"] for row in table["rows"]] == [
        *(f"ssl2rl-480/{n}/{k}" for n in ("dqn", "rainbow") for k in ("reward", "accuracy")),
        "iterative-fixmatch/dqn/reward",
        "labelled-only/dqn/reward",
        "iterative-fixmatch/rainbow/reward",
    ]
    row = "ssl2rl-480/rainbow/reward"
    found = cell(document, "table4", row=row, **accuracy)
    assert (found["n"], found["mean"]) == (2, pytest.approx(0.725))
    assert found["paper"] == NOT_AT_HAND
    assert (
        cell(document, "table4", row="iterative-fixmatch/dqn/reward", **accuracy)["paper"] is None
    )
    # with DQN on the same data sets, and with the baseline of the same algorithm
    for other, values in (
        ("ssl2rl-480/dqn", [0.12, 0.11]),
        ("iterative-fixmatch/rainbow", [0.02, 0.03]),
    ):
        less = cell(
            document, "table4", "differences", row=row, against=f"{other}/reward", **accuracy
        )
        assert less["seeds"] == [0, 1] and less["values"] == pytest.approx(values)
    with pytest.raises(AssertionError):
        cell(document, "table4", "differences", row=row, against="iterative-fixmatch/dqn/reward")
    assert table["against"][-1] == "iterative-fixmatch/rainbow/reward"
    assert "without a run here: a2c" in table["caption"]
    assert not any("do not differ in the algorithm alone" in note for note in document["notes"])
    page = write_report(document, three_seeds / "out").read_text()
    assert "less iterative FixMatch, rainbow" in page


def test_algorithms_on_other_data_are_no_pairs_and_other_settings_are_said(three_seeds):
    found = {"ssl2rl-480": of_test(0.9, 0.9)}
    other = {"seed": 0, "algorithm": NavigationA2CConfig()}
    run = write_run(three_seeds / "a2c", found, loop={"num_rollouts": 3}, **other)
    notes = report([three_seeds])["notes"]
    assert any(
        "a2c and dqn were run with different loop.num_rollouts: their rows" in note
        for note in notes
    )
    shutil.rmtree(run)
    write_run(three_seeds / "a2c", found, loop={"selection_share": 0.5}, **other)
    with pytest.raises(ReportError, match=r"loop\.selection_share.*pairs algorithms on the same"):
        report([three_seeds])


def test_rows_of_the_paper_without_a_run_are_named(three_seeds):
    document = report([three_seeds])
    assert "No run of: SL (supervised), FixMatch" in document["tables"]["table2"]["caption"]
    assert cell(document, "table2", row="supervised", quantity="accuracy")["n"] == 0
    found = cell(document, "table2", row="true-labels", quantity="accuracy")
    assert (found["n"], found["mean"], found["is_run"]) == (0, None, False)
    text = write_report(document, three_seeds / "out").read_text()
    row = r'<th scope="row">true labels \(bound\)</th><td class="none">no run</td></tr>'
    assert re.search(row, text)


# ---- words ---------------------------------------------------------------------------------------


def test_one_seed_ranks_nothing_and_says_so(tmp_path):
    run = write_run(tmp_path / "run", {"smooth": of_test(0.5, 0.6, kept=1)})
    document = report([run])
    assert any("ranks nothing" in note for note in document["notes"])
    page = write_report(document, tmp_path / "out").read_text()
    assert re.search(r"<td>0\.600<small>n=1: ranks nothing</small></td>", page)
    assert "± " not in re.sub(r"<header>.*</header>", "", page, flags=re.DOTALL)
    assert re.search(r"^smooth +0\.600 \(n=1\)$", format_report(document), re.MULTILINE)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "+0.123"), (-0.0004, "0.000"), (-0.5, "−0.500"), (None, "–"), (0.0, "0.000")],
)
def test_numbers_as_printed(value, text):
    assert number(value, 3, sign=True) == text


def test_every_method_has_its_row_and_its_own_look():
    known = [name for methods in GROUPS.values() for name in methods]
    assert set(METHODS) <= set(known) <= set(_STYLES)
    assert len({_STYLES[name][2] for name in known}) == len(known)


# ---- files ---------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a page asks for, and the text of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.alts: list[str | None] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.tags.add(tag)
        self.loads += [of[name] or "" for name in ("src", "srcset", "data") if name in of]
        self.ids |= {of["id"] or ""} if "id" in of else set()
        if tag == "img":
            self.alts.append(of.get("alt"))
        if tag == "a":
            self.links.append(of["href"] or "")


def test_the_page_needs_nothing_beside_it(three_seeds, tmp_path):
    out = tmp_path / "out"
    text = write_report(report([three_seeds]), out).read_text()
    page = Page(text)
    assert page.loads and all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert all(page.alts) and not page.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|@import|url\(|@font-face", text)
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    files = {link for link in page.links if not link.startswith("#")}
    assert anchors <= page.ids and "table4" in anchors
    assert files and all((out / file).is_file() for file in files)
    assert NOT_AT_HAND in text and "paper-note" in page.ids


def test_names_are_text_never_markup(tmp_path):
    name = "<script>alert(1)</script>&$x_1$"
    run = write_run(tmp_path / "run", {name: of_test(0.5, 0.6)})
    text = write_report(report([run]), tmp_path / "out").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;&amp;$x_1$" in text


def test_csv_and_json_hold_what_the_page_shows(three_seeds, tmp_path):
    document = report([three_seeds])
    write_report(document, tmp_path / "out")
    rows = read_csv(tmp_path / "out" / "table2.csv")
    (found,) = (r for r in rows if r["row"] == "ssl2rl-480" and r["quantity"] == "auc")
    assert float(found["mean"]) == pytest.approx(0.62) and found["n"] == "3"
    assert float(found["ci95_low"]) == pytest.approx(0.570317, abs=1e-6)
    assert [float(v) for v in found["values"].split()] == pytest.approx([0.60, 0.62, 0.64])
    (none,) = (r for r in rows if r["row"] == "supervised" and r["quantity"] == "auc")
    assert none["mean"] == none["ci95_low"] == "" and none["n"] == "0"
    written = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(document))
    assert sorted(written["files"]) == sorted(p.name for p in (tmp_path / "out").iterdir())
    drawn = read_csv(tmp_path / "out" / "figure4-5pct.csv")
    (point,) = (r for r in drawn if r["panel"].startswith("(f)") and float(r["x"]) == 0.1
                and r["line"] == "SSL²-RL 480")  # fmt: skip
    assert float(point["mean"]) == pytest.approx(0.7) and point["n"] == "3"


def test_the_same_runs_give_the_same_bytes(three_seeds, tmp_path):
    for name in ("a", "b"):
        write_report(report([three_seeds]), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_an_earlier_report_gives_way_and_nothing_else_does(three_seeds, tmp_path):
    out = tmp_path / "out"
    write_report(report([three_seeds]), out)
    (out / "mine.txt").write_text("mine")
    assert (out / "figure7-controls.png").exists()
    alone = write_run(tmp_path / "alone", {"fixmatch": of_test(0.5)})
    write_report(report([alone]), out)
    assert not (out / "figure7-controls.png").exists()  # of the earlier report
    assert (out / "mine.txt").read_text() == "mine"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    check_out(foreign)  # empty
    (foreign / "report.json").write_text('{"format": "another", "files": ["mine.txt"]}')
    with pytest.raises(ReportError, match=r"not empty \('report\.json'\).*--force"):
        check_out(foreign)
    check_out(foreign, force=True)
    with pytest.raises(ReportError, match="is a file, not a folder"):
        check_out(out / "mine.txt")


def test_a_report_never_removes_what_lies_outside_its_folder(three_seeds, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    outside = tmp_path / "outside.txt"
    outside.write_text("stays")
    names = ["../outside.txt", str(outside)]
    (out / "report.json").write_text(json.dumps({"format": "ssl2rl-report", "files": names}))
    write_report(report([three_seeds]), out, force=True)
    assert outside.read_text() == "stays"


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_where_the_page_is(three_seeds, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["report", str(three_seeds), "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert re.search(r"^SSL²-RL 480 +0\.620 ± 0\.050 \(n=3\)$", said, re.MULTILINE)
    assert f"{out / 'report.html'}: open it in a browser" in said
    assert main([*words, "--json"]) == 0  # again: its own folder is written anew
    assert json.loads(capsys.readouterr().out) == json.loads((out / "report.json").read_text())
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ssl2rl report: no run of kind ssl2rl in") and "Traceback" not in error
    assert not (tmp_path / "new").exists()
    assert main([*words[:2], "--out", str(three_seeds)]) == 2
    assert "--force" in capsys.readouterr().err


def test_neither_torch_nor_ray_is_loaded(three_seeds, loaded_by, tmp_path):
    assert loaded_by("report", str(three_seeds), "--out", str(tmp_path / "out")) == []


@pytest.mark.slow
def test_a_browser_shows_the_page_without_overflow(three_seeds, page_widths, tmp_path):
    page = write_report(report([three_seeds]), tmp_path / "out")
    for width in (1200, 500):
        content, window = page_widths(page, width)
        assert content <= window <= width
