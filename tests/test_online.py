"""The online mode: decisions without Ray and clocks, files that grow, crashes and restarts."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.crystfel.experiment import read_experiment
from envs.crystfel.indexer import IndexerError
from envs.crystfel.rivals import RIVALS
from envs.crystfel.sfx.formats import FormatError, read_geometry
from envs.crystfel.sfx.simulate import PRESETS, simulate
from envs.crystfel.surrogate import SurrogateIndexer, nominal_experiment
from envs.crystfel.types import Frame, IndexingResult, ParameterError, Parameters
from envs.crystfel.xwiz import parse_xwiz
from ssl2rl_ray.online.decide import (
    Failed,
    Index,
    Indexed,
    OnlineConfig,
    Processed,
    Propose,
    Proposed,
    Skipped,
    State,
    Tuner,
    Wait,
    begin,
    from_plain,
    is_significant,
    mcnemar_z,
    parameters_of,
    resumed,
    sign_p,
    step,
    to_plain,
    unit_of,
)
from ssl2rl_ray.online.run import Done, InlineWorkers, RayWorkers, Until, serve
from ssl2rl_ray.online.source import GrowingFolder, GrowingList
from ssl2rl_ray.online.store import OnlineError, Store
from ssl2rl_ray.tensorboard import TensorBoard
from ssl2rl_ray.tuning.compare import (
    Comparison,
    draw_comparison,
    format_comparison,
    log_comparison,
)

SMALL = OnlineConfig(
    num_cache_frames=8,
    num_first_frames=4,
    num_test_frames=8,
    num_looks=1,
    max_error=0.2,
    num_steps=3,
    num_drift_frames=8,
    num_control_frames=4,
    control_every=0,
    rest_frames=100,
)


def result(flags, *, cell_ratio=1.0, shift=(0.0, 0.0), version="v") -> IndexingResult:
    flags = np.array(flags, bool)
    has = flags.any()
    return IndexingResult(
        is_indexed=flags,
        is_hit=np.ones(len(flags), bool),
        num_peaks=np.full(len(flags), 30),
        num_crystals=int(flags.sum()),
        mean_cell=np.full(6, 1.0 if has else np.nan),
        cell_ratio=cell_ratio if has else np.nan,
        residual_px=0.5 if has else np.nan,
        spot_shift_px=np.array(shift) if has else np.full(2, np.nan),
        cpu_s=0.1,
        version=version,
    )


def frames(first: int, num: int) -> tuple[Frame, ...]:
    return tuple(Frame(path="/d/a.h5", event=f"//{i}") for i in range(first, first + num))


def processed(first: int, flags, version=1, **words) -> Processed:
    return Processed(
        frames=frames(first, len(flags)), result=result(flags, **words), version=version
    )


def after(config, state, *events):
    for event in events:
        state = step(config, state, event).state
    return state


BETTER = Parameters(min_snr=6.0)


def searched(config=SMALL) -> State:
    """A search whose candidate indexes all 8 cached frames, where the incumbent has none."""
    state = after(config, begin(Parameters()), processed(0, [0] * 8))
    assert isinstance(state.question, Propose)
    state = after(config, state, Proposed(parameters=BETTER))
    for half in ([1] * 4, [1] * 4):
        assert isinstance(state.question, Index) and state.question.purpose == "search"
        state = after(config, state, Indexed(result=result(half)))
    return state


def test_a_search_of_other_parameters_ends_on_a_restart():
    state = searched()
    assert resumed(SMALL, state) is state
    other = dataclasses.replace(SMALL, tunables=("min_snr",))
    again = resumed(other, state)
    assert again.search is None and isinstance(again.question, Wait)
    again = after(other, again, processed(8, [0] * 8))
    assert again.search is not None and again.search.tunables == ("min_snr",)


# ---- statistics ----------------------------------------------------------------------------------


def test_mcnemar_by_hand():
    ours = np.array([1, 1, 1, 1, 1, 0, 0, 1], bool)
    theirs = np.array([0, 0, 0, 0, 0, 1, 0, 1], bool)
    z, num = mcnemar_z(ours, theirs)
    assert num == 6 and z == pytest.approx(4 / np.sqrt(6))
    assert mcnemar_z(ours, ours) == (0.0, 0)


def test_three_discordant_frames_are_never_believed():
    three, none = np.array([1, 1, 1, 0], bool), np.zeros(4, bool)
    assert mcnemar_z(three, none)[0] > 1.645
    assert not is_significant(three, none, 1.645, 4)
    assert is_significant(np.ones(4, bool), none, 1.645, 4)


def test_the_sign_test_by_hand():
    none = np.zeros(8, bool)
    assert sign_p(np.arange(8) < 4, none) == pytest.approx(1 / 16)
    assert sign_p(none, np.arange(8) < 4) == sign_p(none, none) == 1.0
    theirs = np.array([0, 0, 0, 0, 1, 0, 0, 1], bool)  # 4 pairs won, 1 lost, 1 alike
    ours = np.array([1, 1, 1, 1, 0, 0, 0, 1], bool)
    assert sign_p(ours, theirs) == pytest.approx((5 + 1) / 32)


def test_what_all_tests_may_err_in_adds_up_to_what_was_asked_for():
    config = OnlineConfig(max_error=0.05, num_looks=1)
    assert config.level(0, 1) == pytest.approx(0.05 / 2)
    assert config.level(1, 1) == pytest.approx(0.05 / 6)
    four = OnlineConfig(max_error=0.05, num_looks=4)
    levels = [four.level(0, look) for look in (1, 2, 3, 4)]
    assert sum(levels) == pytest.approx(0.05 / 2) and sorted(levels) == levels
    # Lan and DeMets: 2 - 2 Phi(z / sqrt(1/2)) at half of the frames; z = 2.2414 has 0.0125 above it
    assert levels[0] + levels[1] == pytest.approx(0.001525, rel=2e-3)
    total = sum(config.level(k, 1) for k in range(10_000))
    assert 0.0499 < total < 0.05


# ---- steps ---------------------------------------------------------------------------------------


def test_nothing_is_asked_before_the_cache_is_full():
    state = after(SMALL, begin(Parameters()), processed(0, [1] * 7))
    assert isinstance(state.question, Wait)
    state = after(SMALL, state, processed(7, [1]))
    assert isinstance(state.question, Propose)
    assert state.search is not None and state.search.frames == frames(0, 8)
    assert state.search.incumbent_flags.tolist() == [True] * 8


def test_the_cache_is_the_latest_frames():
    state = after(SMALL, begin(Parameters()), processed(0, [0] * 5), processed(5, [1] * 6))
    assert state.search is not None
    assert state.search.frames == frames(3, 8)
    assert state.search.incumbent_flags.tolist() == [False] * 2 + [True] * 6


def test_a_candidate_that_loses_on_the_first_frames_costs_no_more():
    state = after(SMALL, begin(Parameters()), processed(0, [1] * 8))
    state = after(SMALL, state, Proposed(parameters=BETTER))
    assert isinstance(state.question, Index) and len(state.question.frames) == 4
    state = after(SMALL, state, Indexed(result=result([1, 1, 1, 0])))
    assert isinstance(state.question, Propose)
    assert state.search is not None and len(state.search.trials) == 1
    assert state.search.trials[0].gain[0] == pytest.approx(-0.25)
    assert state.num_searched == 4 and state.incumbent == Parameters()


def test_the_best_waits_for_frames_that_it_has_not_seen():
    state = searched()
    assert state.incumbent == Parameters()  # 8 discordant frames of the cache do not do
    assert isinstance(state.question, Propose)  # explores while it waits
    for _ in range(2):
        state = after(SMALL, state, Proposed(parameters=BETTER))
        state = after(SMALL, state, Indexed(result=result([0] * 4)))
    assert isinstance(state.question, Wait)  # a stalled stream: nothing changes
    state = after(SMALL, state, processed(8, [0] * 8))
    question = state.question
    assert isinstance(question, Index) and question.purpose == "test"
    assert question.frames == frames(8, 8) and question.parameters == BETTER


@pytest.mark.parametrize(
    ("flags", "is_deployed"), [([1] * 4 + [0] * 4, True), ([1] * 3 + [0] * 5, False)]
)
def test_only_a_significant_test_changes_parameters(flags, is_deployed):
    state = after(SMALL, searched(), processed(8, [0] * 8), Proposed(parameters=BETTER))
    state = after(SMALL, state, Indexed(result=result([0] * 4)))
    assert isinstance(state.question, Index) and state.question.purpose == "test"
    decision = step(SMALL, state, Indexed(result=result(flags)))
    assert (decision.state.incumbent == BETTER) == is_deployed
    assert decision.state.version == 1 + is_deployed
    (note,) = (n for n in decision.happened if n["what"] in ("deployed", "refused"))
    assert note["num_indexed"] == sum(flags) and note["num_indexed_before"] == 0
    assert note["version"] == decision.state.version
    if is_deployed:  # what is known of the new incumbent is kept, what was the old one's is not
        (batch,) = decision.state.recent
        assert batch.frames == frames(8, 8) and batch.result.num_indexed == 4


def at_test(config) -> State:
    """All fresh frames are there, and the first look of the test is asked for."""
    state = after(config, searched(config), processed(8, [0] * 40), Proposed(parameters=BETTER))
    state = after(config, state, Indexed(result=result([0] * 4)))
    assert isinstance(state.question, Index) and state.question.purpose == "test"
    return state


LOOKS = dataclasses.replace(SMALL, num_looks=3, num_steps=9)


def test_what_is_not_clear_gets_more_frames_until_it_is():
    state, seen = at_test(LOOKS), []
    for flags in ([1, 1] + [0] * 6, [1] + [0] * 7):  # z 1.41 of 2 and 1.73 of 3 frames
        seen += state.question.frames
        decision = step(LOOKS, state, Indexed(result=result(flags)))
        state = decision.state
        assert decision.happened[-1]["what"] == "looked at"
        assert state.version == 1 and isinstance(state.question, Index)
        assert not set(state.question.frames) & set(seen)
    decision = step(LOOKS, state, Indexed(result=result([1, 1] + [0] * 6)))
    assert decision.state.version == 2
    note = decision.happened[-1]
    assert (note["num_frames"], note["num_indexed"], note["num_discordant"]) == (24, 5, 5)
    assert sum(len(batch.frames) for batch in decision.state.recent) == 24


def test_the_last_look_decides_and_a_hopeless_one_comes_first():
    state = at_test(LOOKS)
    for flags in ([1] + [0] * 7,) * 3:
        state = after(LOOKS, state, Indexed(result=result(flags)))
    assert state.version == 1 and state.num_refused == 1
    config = dataclasses.replace(LOOKS, hopeless_z=0.5)
    state = after(config, at_test(config), Indexed(result=result([0] * 8)))
    assert state.num_refused == 1


def test_more_looks_ask_for_more():
    # 4 of 4 discordant frames: p 1/16, which is enough for one look (0.1), not of three (0.033)
    state = after(SMALL, at_test(SMALL), Indexed(result=result([1] * 4 + [0] * 4)))
    assert state.version == 2
    state = after(LOOKS, at_test(LOOKS), Indexed(result=result([1] * 4 + [0] * 4)))
    assert state.version == 1 and state.num_refused == 0


def test_a_test_after_one_that_changed_nothing_asks_for_more():
    answer = Indexed(result=result([1] * 4 + [0] * 4))
    state = at_test(SMALL)
    again = dataclasses.replace(state, num_refused=7, num_refused_now=1)
    assert after(SMALL, state, answer).version == 2  # p 1/16 of 0.1
    assert after(SMALL, again, answer).version == 1  # of 0.033
    assert after(SMALL, again, answer).num_refused_now == 2
    state = after(SMALL, again, Indexed(result=result([1] * 6 + [0] * 2)))  # p 1/64
    assert (state.version, state.num_refused, state.num_refused_now) == (2, 7, 0)


def test_a_refused_best_is_not_asked_about_again():
    state = after(SMALL, searched(), processed(8, [0] * 8), Proposed(parameters=BETTER))
    state = after(SMALL, state, Indexed(result=result([0] * 4)))
    state = after(SMALL, state, Indexed(result=result([0] * 8)))
    assert state.num_refused == 1 and isinstance(state.question, Propose)
    state = after(SMALL, state, Proposed(parameters=BETTER), Indexed(result=result([0] * 4)))
    assert state.search is None and state.rest_level is not None
    assert isinstance(state.question, Wait)


def test_frames_of_older_parameters_count_but_are_not_compared_with():
    state = dataclasses.replace(begin(Parameters()), version=2)
    state = after(SMALL, state, processed(0, [1] * 8, version=1))
    assert state.num_processed == 8 and state.num_indexed == 8 and not state.recent


def test_parameters_on_which_the_indexer_gives_up_are_worth_nothing():
    state = after(SMALL, begin(Parameters()), processed(0, [1] * 8), Proposed(parameters=BETTER))
    decision = step(SMALL, state, Failed(reason="too slow"))
    assert decision.happened[0]["reason"] == "too slow"
    search = decision.state.search
    assert search is not None and search.trials[0].outcome.indexed_fraction[0] == 0
    assert search.candidate is None
    # also where it gives up half-way
    state = after(SMALL, state, Indexed(result=result([1] * 4)))
    assert isinstance(state.question, Index) and len(state.question.frames) == 4
    state = step(SMALL, state, Failed(reason="too slow")).state
    assert state.search is not None and state.search.trials[0].gain[0] == pytest.approx(-0.5)


def test_answers_that_do_not_fit_are_refused():
    state = begin(Parameters())
    with pytest.raises(ValueError, match="the question is"):
        step(SMALL, state, Proposed(parameters=BETTER))
    with pytest.raises(ValueError, match="the question is"):
        step(SMALL, state, Indexed(result=result([1])))
    state = after(SMALL, state, processed(0, [1] * 8), Proposed(parameters=BETTER))
    with pytest.raises(ValueError, match="3 frames were indexed, and 4 were asked"):
        step(SMALL, state, Indexed(result=result([1] * 3)))


def test_skipped_frames_are_counted_and_named():
    decision = step(SMALL, begin(Parameters()), Skipped(frames=frames(3, 2), reason="broken"))
    assert decision.state.num_skipped == 2
    assert decision.happened[0]["frames"] == ["/d/a.h5 //3", "/d/a.h5 //4"]


def rested(config=SMALL, flags=(1,) * 8, **words) -> State:
    state = after(config, begin(Parameters()), processed(0, flags, **words))
    for _ in range(config.num_steps):
        state = after(config, state, Proposed(parameters=BETTER))
        state = after(config, state, Indexed(result=result([0] * 4)))
    assert state.search is None and isinstance(state.question, Wait)
    return state


def test_at_rest_nothing_is_asked_until_the_fraction_drops():
    state = after(SMALL, rested(), processed(8, [1] * 8), processed(16, [1] * 7 + [0]))
    assert isinstance(state.question, Wait)
    decision = step(SMALL, state, processed(24, [0] * 8))
    assert isinstance(decision.state.question, Propose)
    (note,) = (n for n in decision.happened if n["what"] == "drift")
    assert note["reason"] == "indexed fraction 1.000 -> 0.000"


@pytest.mark.parametrize("moved", [{"cell_ratio": 1.01}, {"shift": (0.6, 0.5)}])
def test_the_free_outputs_tell_of_drift_before_frames_are_lost(moved):
    config = dataclasses.replace(SMALL, num_drift_frames=16, num_cache_frames=16)
    still = after(config, rested(config, (1,) * 16), processed(16, [1] * 16))
    assert isinstance(still.question, Wait)
    state = after(config, still, processed(32, [1] * 16, **moved))
    assert isinstance(state.question, Propose)


def test_few_crystals_do_not_tell_of_drift():
    state = rested(flags=(1,) * 4 + (0,) * 4)
    state = after(SMALL, state, processed(8, [1] * 4 + [0] * 4, cell_ratio=1.05))
    assert isinstance(state.question, Wait)


def test_after_a_long_rest_there_is_another_search():
    state = rested()
    for first in range(8, 8 + SMALL.rest_frames, 10):
        assert isinstance(state.question, Wait)
        state = after(SMALL, state, processed(first, [1] * 10))
    assert isinstance(state.question, Propose) and state.num_searches == 2


def test_drift_ends_a_search_whose_cache_is_old():
    state = after(SMALL, begin(Parameters()), processed(0, [1] * 8))
    state = dataclasses.replace(state, num_refused_now=3)
    state = after(SMALL, state, processed(8, [0] * 8))
    assert state.search is not None and state.search.is_stale
    assert state.num_refused_now == 0  # what was refused says nothing of what is now
    state = after(SMALL, state, Proposed(parameters=BETTER))
    decision = step(SMALL, state, Indexed(result=result([0] * 4)))
    assert [n["what"] for n in decision.happened] == ["tried", "search ended", "search began"]
    assert decision.state.search is not None
    assert decision.state.search.frames == frames(8, 8)


def deployed(config) -> State:
    state = after(config, searched(config), processed(8, [0] * 8), Proposed(parameters=BETTER))
    state = after(config, state, Indexed(result=result([0] * 4)), Indexed(result=result([1] * 8)))
    assert state.version == 2
    return state


def at_control(tuned) -> tuple[OnlineConfig, State]:
    config = dataclasses.replace(SMALL, control_every=16, num_control_frames=12, num_steps=9)
    state = after(config, deployed(config), processed(16, tuned, version=2))
    while not (isinstance(state.question, Index) and state.question.purpose == "control"):
        worse: Proposed | Indexed = Proposed(parameters=BETTER)
        if isinstance(state.question, Index):
            worse = Indexed(result=result([0] * len(state.question.frames)))
        state = after(config, state, worse)
    assert state.question.parameters == Parameters()
    return config, state


def test_the_initial_parameters_are_looked_at_now_and_then():
    config, state = at_control([1] * 12)
    state = after(config, state, Indexed(result=result([0] * 12)))
    assert (state.num_control, state.num_control_tuned, state.num_control_initial) == (12, 12, 0)
    assert state.incumbent == BETTER and state.search is not None  # which goes on


def test_initial_parameters_that_are_better_come_back():
    config, state = at_control([0] * 12)
    decision = step(config, state, Indexed(result=result([1] * 12)))
    assert decision.state.incumbent == Parameters() and decision.state.version == 3
    assert decision.happened[1]["what"] == "reverted"


def test_another_backend_begins_anew():
    state = after(SMALL, begin(Parameters()), processed(0, [1] * 4), processed(4, [1] * 8))
    other = Processed(frames=frames(12, 8), result=result([1] * 8, version="w"), version=1)
    decision = step(SMALL, state, other)
    assert decision.happened[1]["what"] == "backend changed"
    assert decision.state.recent[0].frames == frames(12, 8)
    assert decision.state.search is not None and decision.state.search.is_stale


# ---- rules of any run ----------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_happens_parameters_change_only_by_a_believed_test_on_unseen_frames(data):
    config = dataclasses.replace(SMALL, control_every=20)
    state, at = begin(Parameters()), 0
    flags = st.lists(st.booleans(), min_size=4, max_size=9)
    for number in range(data.draw(st.integers(5, 60))):
        question = state.question
        if isinstance(question, Wait) or data.draw(st.booleans()):
            drawn = data.draw(flags)
            event = processed(at, drawn, version=state.version)
            at += len(drawn)
        elif isinstance(question, Propose):
            event = Proposed(parameters=Parameters(min_snr=3 + number / 10))
        else:
            num = len(question.frames)
            event = Indexed(
                result=result(data.draw(st.lists(st.booleans(), min_size=num, max_size=num)))
            )
        before, decision = state, step(config, state, event)
        state = from_plain(json.loads(json.dumps(to_plain(decision.state))))  # a restart
        if state.incumbent != before.incumbent:
            assert isinstance(question, Index) and isinstance(event, Indexed)
            assert question.purpose in ("test", "control")
            ours, theirs = event.result.is_indexed, question.baseline
            if question.purpose == "control":
                assert mcnemar_z(ours, theirs)[0] > config.revert_z
            else:
                assert sign_p(ours, theirs) <= config.level(before.num_refused_now, 1)
            assert state.version == before.version + 1
            if question.purpose == "test":
                assert before.search is not None
                assert not set(question.frames) & set(before.search.frames)
        else:
            assert state.version == before.version or state.incumbent == state.initial
        asked = state.question
        if isinstance(asked, Index):
            assert len(asked.frames) == len(asked.baseline) > 0
        if isinstance(asked, Propose):
            assert state.search is not None and state.search.candidate is None
    assert state.num_processed == at


def test_config_says_which_rule_is_wrong():
    with pytest.raises(ValueError, match="num_first_frames: must be below num_cache_frames 8"):
        dataclasses.replace(SMALL, num_first_frames=8)
    with pytest.raises(ValueError, match="min_z"):
        dataclasses.replace(SMALL, min_z=0.0)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="max_error: must be between 0 and 1"):
            dataclasses.replace(SMALL, max_error=share)
    with pytest.raises(ParameterError, match="tunables"):
        dataclasses.replace(SMALL, tunables=("min_sn",))


@given(st.lists(st.floats(0, 1), min_size=7, max_size=7), st.floats(-6, 6), st.floats(-6, 6))
@settings(deadline=None)
def test_units_are_relative_to_where_the_search_began_and_within_bounds(unit, clen, x):
    origin = Parameters(clen_offset_percent=clen, centre_x_offset_px=x)
    parameters = parameters_of(OnlineConfig(), origin, np.array([unit]))
    assert abs(parameters.clen_offset_percent) <= 6 and abs(parameters.centre_x_offset_px) <= 6
    assert 3 <= parameters.min_snr <= 12
    again = unit_of(OnlineConfig(), origin, parameters)
    once_more = parameters_of(OnlineConfig(), origin, again)
    for name, value in parameters.as_dict().items():
        assert getattr(once_more, name) == pytest.approx(value, abs=2e-4)


def test_an_origin_is_the_middle_of_the_geometry():
    origin = Parameters(clen_offset_percent=2.0, centre_y_offset_px=-1.0)
    unit = unit_of(OnlineConfig(), origin, origin)
    assert unit[0, 4:].tolist() == [0.5, 0.5, 0.5]


# ---- with a tuner --------------------------------------------------------------------------------

BAD = Parameters(min_snr=9.0, min_peaks=25, clen_offset_percent=3.0)
LIVE = OnlineConfig(num_cache_frames=60, num_first_frames=30, num_steps=8)


def played(config, name, indexer, num_frames, *, is_forgetful=False, start=BAD):
    """Batches of 50 and the answers to three questions, in turns; the audit and the last state."""
    tuner, state, audit = Tuner(config, RIVALS[name]), begin(start), []
    for first in range(0, num_frames, 50):
        batch = indexer.frames[first : first + 50]
        done = indexer.run(state.incumbent, batch)
        event = Processed(frames=batch, result=done, version=state.version)
        for _ in range(4):
            decision = step(config, state, event)
            audit += decision.happened
            state = decision.state
            if is_forgetful:
                state = from_plain(json.loads(json.dumps(to_plain(state))))
                tuner = Tuner(config, RIVALS[name])
            question = state.question
            if isinstance(question, Propose):
                assert state.search is not None
                event = Proposed(parameters=tuner.propose(state.search))
            elif isinstance(question, Index):
                event = Indexed(result=indexer.run(question.parameters, question.frames))
            else:
                break
        else:
            if isinstance(question, Propose):  # what was asked for is not thrown away
                decision = step(config, state, event)
                state = decision.state
    return audit, state


@pytest.mark.parametrize("name", ["rules", "gp-warm-free", "noise"])
def test_a_restart_after_every_step_changes_nothing(name):
    indexer = SurrogateIndexer(nominal_experiment(), num_frames=1000)
    audit, state = played(LIVE, name, indexer, 600)
    again, same = played(LIVE, name, indexer, 600, is_forgetful=True)
    assert audit == again
    assert json.dumps(to_plain(state)) == json.dumps(to_plain(same))


def test_a_bad_start_is_tuned_away():
    indexer = SurrogateIndexer(nominal_experiment(), num_frames=3000, seed=2)
    audit, state = played(LIVE, "rules", indexer, 2000)
    assert state.num_deployed >= 1
    unseen = indexer.frames[2000:]
    tuned = indexer.run(state.incumbent, unseen).num_indexed
    assert tuned > 2 * indexer.run(BAD, unseen).num_indexed
    assert {note["what"] for note in audit} >= {"search began", "tried", "deployed", "control"}


# ---- sources -------------------------------------------------------------------------------------


def test_a_line_of_a_list_counts_once_it_is_whole(tmp_path):
    path = tmp_path / "frames.lst"
    source = GrowingList(path)
    source.poll()
    assert source.frames == []
    path.write_text("a.h5 //0\na.h5 /")
    source.poll()
    assert [f.event for f in source.frames] == ["//0"]
    path.write_text("a.h5 //0\na.h5 //1\n")
    source.poll()
    source.poll()
    assert [str(f) for f in source.frames] == [f"{tmp_path}/a.h5 //0", f"{tmp_path}/a.h5 //1"]
    path.write_text("a.h5 //0\n")
    with pytest.raises(FormatError, match="has become shorter"):
        source.poll()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """24 clean frames in three files, with a wrong start."""
    preset = dataclasses.replace(PRESETS["clean"], hit_rate=1.0)
    folder = tmp_path_factory.mktemp("sfx") / "data"
    simulate(preset, 24, 3, folder, frames_per_file=8)
    return folder


def test_files_of_a_folder_are_taken_in_once_they_are_settled(data, tmp_path):
    geometry = data / "experiment.geom"
    incoming, log = tmp_path / "in", tmp_path / "frames.lst"
    incoming.mkdir()
    source = GrowingFolder(incoming, geometry, log)
    source.poll()
    os.link(data / "frames-000.h5", incoming / "run-001.h5")
    source.poll()
    assert source.frames == []  # seen for the first time: it may still grow
    source.poll()
    assert len(source.frames) == 8 and source.frames[3].event == "//3"
    (incoming / "run-000.h5").write_bytes(b"half a file")
    source.poll()
    source.poll()
    assert len(source.frames) == 8
    assert "cannot be opened as HDF5" in source.unreadable[f"{incoming}/run-000.h5"]
    (incoming / "run-000.h5").unlink()
    os.link(data / "frames-001.h5", incoming / "run-000.h5")
    source.poll()
    source.poll()
    assert len(source.frames) == 16 and not source.unreadable
    again = GrowingFolder(incoming, geometry, log)  # a restart keeps the order of arrival
    for _ in range(3):
        again.poll()
    assert again.frames == source.frames
    log.write_text(log.read_text() + "/half/a/li")  # a crash while writing
    cut = GrowingFolder(incoming, geometry, log)
    assert cut.frames == source.frames


def test_files_that_get_longer_give_their_new_frames(data, tmp_path):
    geometry = data / "experiment.geom"
    where = read_geometry(geometry).planes[0].data
    path = tmp_path / "run.h5"

    def write(num):
        with h5py.File(path, "w") as file:
            file.create_dataset(where, data=np.zeros((num, 4, 4), np.int16))

    source = GrowingFolder(tmp_path, geometry, tmp_path / "frames.lst")
    write(2)
    source.poll()
    source.poll()
    write(5)
    source.poll()
    source.poll()
    assert [f.event for f in source.frames] == ["//0", "//1", "//2", "//3", "//4"]


def test_a_distance_that_stands_in_the_files_is_looked_up_there(data, tmp_path):
    text = (data / "experiment.geom").read_text()
    geometry = tmp_path / "moving.geom"
    geometry.write_text(re.sub(r"(?m)^clen = .*$", "clen = /encoder m", text))
    incoming = tmp_path / "in"
    incoming.mkdir()
    source = GrowingFolder(incoming, geometry, tmp_path / "frames.lst")
    shutil.copy(data / "frames-000.h5", incoming / "a.h5")
    source.poll()
    source.poll()
    assert "/encoder" in source.unreadable[f"{incoming}/a.h5"] and not source.frames
    with h5py.File(incoming / "a.h5", "r+") as file:
        file["encoder"] = 0.12
    source.poll()
    source.poll()
    assert len(source.frames) == 8 and not source.unreadable
    geometry.write_text("no geometry")
    with pytest.raises(FormatError):
        GrowingFolder(incoming, geometry, tmp_path / "frames.lst")


def test_files_without_the_data_say_so(data, tmp_path):
    geometry = data / "experiment.geom"
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["other"] = 1
    source = GrowingFolder(tmp_path, geometry, tmp_path / "frames.lst")
    source.poll()
    source.poll()
    assert "no dataset" in source.unreadable[f"{tmp_path}/x.h5"] and not source.frames


def test_a_listed_file_stands_for_its_frames_once_it_is_there(data, tmp_path):
    path = tmp_path / "files.lst"
    path.write_text("a.h5\nb.h5 //5\n")
    source = GrowingList(path, data / "experiment.geom")
    source.poll()
    assert not source.frames and list(source.unreadable) == [f"{tmp_path}/a.h5"]
    os.link(data / "frames-000.h5", tmp_path / "a.h5")
    source.poll()
    assert [f.event for f in source.frames] == [*(f"//{i}" for i in range(8)), "//5"]
    assert not source.unreadable


# ---- the store -----------------------------------------------------------------------------------


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OnlineError, match="holds other things"):
        Store(tmp_path)


def test_one_process_at_a_time(tmp_path):
    with Store(tmp_path / "o"), pytest.raises(OnlineError, match="another process"):
        Store(tmp_path / "o")


def test_the_audit_log_is_only_added_to(tmp_path):
    with Store(tmp_path, clock=lambda: "t") as store:
        store.note({"what": "a", "x": float("nan")})
    path = tmp_path / "audit.jsonl"
    path.write_text(path.read_text() + '{"line": 2, "wh')  # a crash while writing
    with Store(tmp_path, clock=lambda: "t") as store:
        store.note({"what": "b"})
        lines = store.audit()
    assert lines[0] == {"line": 1, "time": "t", "what": "a", "x": None}
    assert lines[1] == {"what": "cut short", "text": '{"line": 2, "wh'}
    assert lines[2] == {"line": 3, "time": "t", "what": "b"}


def test_another_geometry_is_not_gone_on_with(data, tmp_path):
    experiment = read_experiment(data)
    with Store(tmp_path) as store:
        store.check_origin(experiment)
        store.check_origin(experiment)
        other = tmp_path / "other.geom"
        other.write_text(experiment.geometry_path.read_text() + "; moved\n")
        with pytest.raises(OnlineError, match="has changed since"):
            store.check_origin(read_experiment(data, geometry=other))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"is": "Frame", "path": "x"}', '{"is": "no"}'])
def test_a_damaged_state_says_what_to_do(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with Store(tmp_path) as store, pytest.raises(OnlineError, match=r"state\.json"):
        store.state()


def test_what_a_user_pastes_is_what_was_tuned(data, tmp_path):
    experiment = read_experiment(data)
    tuned = Parameters(min_snr=6.25, clen_offset_percent=1.5, centre_x_offset_px=-0.75)
    xwiz = "[indexamajig_run]\npeak_snr = 4.0 # mine\n"
    with Store(tmp_path / "o") as store:
        store.publish(experiment, tuned, xwiz)
    geometry = read_geometry(tmp_path / "o" / "tuned.geom", experiment.frames[0])
    moved = experiment.geometry.moved(tuned)
    assert geometry.clen_m == pytest.approx(moved.clen_m)
    assert geometry.corner_px == pytest.approx(moved.corner_px)
    command = (tmp_path / "o" / "command.txt").read_text()
    assert "--min-snr=6.25" in command and f"--geometry={tmp_path}/o/tuned.geom" in command
    written = (tmp_path / "o" / "xwiz.toml").read_text()
    assert parse_xwiz(written).parameters.min_snr == 6.25 and "# mine" in written
    assert parse_xwiz(written).geometry == f"{tmp_path}/o/tuned.geom"
    assert json.loads((tmp_path / "o" / "parameters.json").read_text()) == tuned.as_dict()


def test_masks_are_found_from_where_the_tuned_geometry_stands(data, tmp_path):
    geometry = tmp_path / "masked.geom"
    original = (data / "experiment.geom").read_text()
    before, _, after = original.partition("mask0_data = /entry/data/mask\n")
    geometry.write_text(f"{before}mask0_data = /mask\nmask0_file = bad.h5 ; mine\n{after}")
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        file["mask"] = np.zeros((1024, 1024), np.uint8)
    experiment = read_experiment(data, geometry=geometry)
    with Store(tmp_path / "o") as store:
        store.publish(experiment, Parameters(), None)
    written = (tmp_path / "o" / "tuned.geom").read_text()
    assert f"mask0_file = {tmp_path}/bad.h5 ; mine\n" in written
    assert read_geometry(tmp_path / "o" / "tuned.geom", experiment.frames[0]).clen_m > 0


# ---- at work -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Listed:
    frames: list
    unreadable: dict = dataclasses.field(default_factory=dict)

    def poll(self):
        pass


class Scripted(InlineWorkers):
    """Inline workers with accidents: ``accident(number)`` of the job gives a ``Done``, or None."""

    def __init__(self, indexer, accident):
        super().__init__(indexer)
        self.accident, self.number = accident, itertools.count()

    def wait(self, timeout_s):
        number = next(self.number)
        name = self._given[0][0] if self._given else ""
        if (done := self.accident(number, name)) is not None:
            self._given.pop(0)
            return [done]
        return super().wait(timeout_s)


def run(folder, indexer, num_frames, *, workers=None, stop=None, config=LIVE):
    with Store(folder, clock=lambda: "t") as store:
        return serve(
            config,
            RIVALS["rules"],
            workers or InlineWorkers(indexer),
            Listed(list(indexer.frames[:num_frames])),
            store,
            initial=BAD,
            until=Until(num_frames=num_frames),
            poll_s=0.0,
            stop=stop,
        )


@pytest.fixture(scope="module")
def surrogate():
    return SurrogateIndexer(nominal_experiment(), num_frames=800, seed=2)


@pytest.fixture(scope="module")
def whole(surrogate, tmp_path_factory):
    """A run without accidents."""
    folder = tmp_path_factory.mktemp("whole") / "o"
    return run(folder, surrogate, 800), folder


def test_a_run_tunes_and_writes_everything_down(whole):
    summary, folder = whole
    assert summary["num_processed"] == 800 and summary["num_deployed"] >= 1
    assert 0 <= summary["agent_share"] <= 1
    lines = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == list(range(1, len(lines) + 1))
    done = [line for line in lines if line["what"] == "processed"]
    assert sum(line["num_frames"] for line in done) == 800
    assert sum(line["num_indexed"] for line in done) == summary["num_indexed"]
    assert all({"version", "backend", "argv", "time"} <= set(line) for line in done)
    assert lines[0]["what"] == "started" and lines[-1]["what"] == "ended"
    # every change of version in the log is a deployment
    versions = {line["version"] for line in done}
    changed = {line["version"] for line in lines if line["what"] == "deployed"}
    assert versions <= changed | {1}


class KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [1, 7, 20, 33])
def test_a_run_that_is_killed_goes_on_where_it_was(at, whole, surrogate, tmp_path):
    def accident(number, name):
        if number == at:
            raise KilledError
        return None

    with pytest.raises(KilledError):
        run(tmp_path / "o", surrogate, 800, workers=Scripted(surrogate, accident))
    summary = run(tmp_path / "o", surrogate, 800)
    assert summary["num_processed"] == 800  # each frame once
    lines = [json.loads(line) for line in (tmp_path / "o" / "audit.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines].count("started again") == 1
    done = [line for line in lines if line["what"] == "processed"]
    seen = list(itertools.chain(*((line["first_frame"], line["last_frame"]) for line in done)))
    assert len(seen) == len(set(seen)) and sum(line["num_frames"] for line in done) == 800
    assert summary["num_deployed"] >= 1


def test_workers_that_die_are_asked_again(whole, surrogate, tmp_path):
    def accident(number, name):
        return Done(name=name, is_lost=True) if number % 3 == 1 and name else None

    summary = run(tmp_path / "o", surrogate, 800, workers=Scripted(surrogate, accident))
    assert summary["num_processed"] == 800 and summary["num_deployed"] >= 1
    text = (tmp_path / "o" / "audit.jsonl").read_text()
    assert text.count('"worker lost"') > 3


def test_workers_that_die_again_and_again_end_the_run_with_a_reason(surrogate, tmp_path):
    def accident(number, name):
        return Done(name=name, is_lost=True) if name == "pipeline" else None

    with pytest.raises(IndexerError, match="died 5 times in a row over"):
        run(tmp_path / "o", surrogate, 100, workers=Scripted(surrogate, accident))


def test_frames_that_cannot_be_read_are_skipped_after_three_tries(surrogate, tmp_path):
    def accident(number, name):
        return Done(name=name, error="no such file") if number < 3 else None

    summary = run(tmp_path / "o", surrogate, 200, workers=Scripted(surrogate, accident))
    assert summary["num_skipped"] == 50 and summary["num_processed"] == 150
    text = (tmp_path / "o" / "audit.jsonl").read_text()
    assert text.count('"pipeline failed"') == 3 and text.count('"skipped"') == 1


def test_a_stream_that_stalls_is_waited_for_and_then_ended(surrogate, tmp_path):
    clock = itertools.count()  # a second at each look
    source = Listed(list(surrogate.frames[:130]))
    with Store(tmp_path / "o") as store:
        summary = serve(
            LIVE,
            RIVALS["keep-initial"],
            InlineWorkers(surrogate),
            source,
            store,
            initial=BAD,
            until=Until(idle_s=50.0),
            poll_s=0.0,
            clock=lambda: float(next(clock)),
        )
    assert summary["num_processed"] == 130  # the last, short batch as well
    assert summary["num_deployed"] == 0 and summary["num_searches"] == 1


def test_files_that_cannot_be_read_yet_are_noted_once(surrogate, tmp_path):
    source = Listed(list(surrogate.frames[:100]), {"/d/b.h5": "/d/b.h5: cannot be read yet"})
    with Store(tmp_path / "o") as store:
        serve(
            LIVE,
            RIVALS["keep-initial"],
            InlineWorkers(surrogate),
            source,
            store,
            initial=BAD,
            until=Until(num_frames=100),
            poll_s=0.0,
        )
        notes = [line for line in store.audit() if line["what"] == "unreadable"]
    assert [note["file"] for note in notes] == ["/d/b.h5"]


def test_keeping_the_initial_parameters_changes_nothing(surrogate, tmp_path):
    with Store(tmp_path / "o") as store:
        summary = serve(
            LIVE,
            RIVALS["keep-initial"],
            InlineWorkers(surrogate),
            Listed(list(surrogate.frames)),
            store,
            initial=BAD,
            until=Until(num_frames=800),
            poll_s=0.0,
        )
    assert summary["version"] == 1 and summary["changed"] == {}


# ---- with Ray, and from the command line ---------------------------------------------------------


class Mortal:
    """Dies the first time that it is asked; a file remembers."""

    version = "mortal"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, parameters, frames):
        mark = self.folder / "died"
        if not mark.exists():
            mark.touch()
            os._exit(1)
        return result([1] * len(frames), version="mortal")


@pytest.mark.ray
def test_a_ray_worker_that_dies_comes_back(tmp_path):
    from ray import cloudpickle

    from ssl2rl_ray.local_ray import local_ray

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see the tests
    with local_ray(2):
        workers = RayWorkers(Mortal(tmp_path))
        with Store(tmp_path / "o") as store:
            summary = serve(
                SMALL,
                RIVALS["keep-initial"],
                workers,
                Listed(list(frames(0, 12))),
                store,
                initial=Parameters(),
                until=Until(num_frames=12),
                batch_frames=6,
                poll_s=0.1,
            )
            lost = [line for line in store.audit() if line["what"] == "worker lost"]
        workers.close()
    assert len(lost) == 1 and summary["num_processed"] == 12 and summary["num_skipped"] == 0


def online_command(data, out, *words):
    small = ("num_cache_frames=8", "num_first_frames=4", "num_test_frames=8", "num_steps=2")
    rules = [
        word
        for rule in (*small, "control_every=8", "num_control_frames=8")
        for word in ("--rule", rule)
    ]
    return ["sfx", "online", "--data", str(data), "--out", str(out), "--tuner", "rules",
            "--no-ray", "--poll-s", "0.001", "--batch", "4", *rules, *words]  # fmt: skip


def test_folders_that_are_not_there_are_not_waited_for(data, tmp_path, capsys):
    from ssl2rl_ray.cli import main

    for folder, words in ((tmp_path / "no", ()), (data, ("--watch", str(tmp_path / "no")))):
        assert main(online_command(folder, tmp_path / "out", *words)) != 0
        assert "no: there is no such folder" in capsys.readouterr().err


def test_from_the_command_line(data, tmp_path, capsys):
    from ssl2rl_ray.cli import main

    toml = tmp_path / "mine.toml"
    toml.write_text("[indexamajig_run]\npeak_snr = 60\npeak_threshold = 20\n")
    words = ["--max-frames", "24", "--xwiz", str(toml), "--json", str(tmp_path / "r.json")]
    assert main(online_command(data, tmp_path / "o", *words)) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    out, told = capsys.readouterr()
    assert "note: start: min_snr is 60, outside 3 to 12 where it is tuned" in told
    lines = map(json.loads, (tmp_path / "o" / "audit.jsonl").read_text().splitlines())
    begun = next(line for line in lines if "parameters" in line)
    assert begun["parameters"]["min_snr"] == 60
    assert found["num_processed"] == 24 and found["version"] >= 2
    assert found["parameters"]["min_snr"] < 12  # 60 kept nothing
    assert f"--min-snr={found['parameters']['min_snr']:g}" in out and "tuned.geom" in out
    tuned = parse_xwiz((tmp_path / "o" / "xwiz.toml").read_text())
    assert tuned.parameters.min_snr == pytest.approx(found["parameters"]["min_snr"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "o" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"online/indexed_fraction", "parameters/min_snr", "test/candidate"} <= tags
    # once more: nothing is left to do
    assert main(online_command(data, tmp_path / "o", *words)) == 0
    assert json.loads((tmp_path / "r.json").read_text())["num_processed"] == 24


def test_a_watched_folder_from_the_command_line(data, tmp_path):
    from ssl2rl_ray.cli import main

    words = ["--watch", str(data), "--idle-s", "0.01", "--json", str(tmp_path / "r.json")]
    assert main(online_command(data, tmp_path / "o", *words)) == 0
    assert json.loads((tmp_path / "r.json").read_text())["num_processed"] == 24
    assert len((tmp_path / "o" / "frames.lst").read_text().splitlines()) == 24


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--tuner", "magic"), "neither a folder nor one of"),
        (("--rule", "speed=3"), "no such rule"),
        (("--rule", "num_steps"), "expected NAME=NUMBER"),
        (("--batch", "0"), "--batch"),
        (("--list", "/nowhere.lst", "--idle-s", "0.01"), "no frame has come"),
    ],
)
def test_mistakes_are_told(data, tmp_path, capsys, words, says):
    from ssl2rl_ray.cli import main

    assert main([*online_command(data, tmp_path / "o"), *words]) == 2
    assert says in capsys.readouterr().err


# ---- a band over initialisations -----------------------------------------------------------------


def test_policies_of_several_trainings_make_a_band(tmp_path):
    reached = {
        "keep-initial": np.full((2, 2), 0.1),
        "ppo-1": np.array([[0.2, 0.4], [0.4, 0.6]]),
        "ppo-2": np.array([[0.2, 0.8], [0.4, 1.0]]),
    }
    found = Comparison(
        budgets=np.array([200, 400]),
        reached=reached,
        best=np.ones(2),
        agent_s=dict.fromkeys(reached, 0.0),
        num_evaluations=dict.fromkeys(reached, 2.0),
        policies=("ppo-1", "ppo-2"),
    ).as_json()
    assert found["band"]["of"] == ["ppo-1", "ppo-2"]
    assert found["band"]["mean"] == pytest.approx([0.3, 0.7])
    assert found["band"]["rms"] == pytest.approx([0.0, 0.2])
    assert "2 policies end at 0.700 ± 0.200" in format_comparison(found)
    assert draw_comparison(found).startswith(b"\x89PNG")
    with TensorBoard(tmp_path) as board:
        log_comparison(found, board)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    upper = [(event.step, event.value) for event in events.Scalars("band/upper")]
    assert upper == [(200, pytest.approx(0.3)), (400, pytest.approx(0.9))]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


# ---- as a process that is ended ------------------------------------------------------------------


def started(*words) -> subprocess.Popen[str]:
    """``ssl2rl`` in a process group of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "ssl2rl_ray", *words],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_lines(process, folder: Path, num: int) -> None:
    """Until the audit log of a run has so many lines, or the run has ended."""
    path = folder / "audit.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < num:
        try:
            process.wait(timeout=0.002)
        except subprocess.TimeoutExpired:
            continue
        return


def check_nothing_is_lost_or_twice(folder: Path, num_frames: int) -> list[dict]:
    """The lines of the log that count add up to the state; all lines."""
    lines = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    assert [line.get("line", at) for at, line in enumerate(lines, 1)] == [*range(1, len(lines) + 1)]
    uncounted = {at for line in lines for at in line.get("uncounted", ())}
    counted = [line for line in lines if line.get("line") not in uncounted]
    done = [line for line in counted if line["what"] == "processed"]
    first = [line["first_frame"] for line in done]
    assert len(first) == len(set(first))
    assert sum(line["num_frames"] for line in done) == num_frames
    versions = [line["version"] for line in counted if line["what"] in ("deployed", "reverted")]
    assert versions == [*range(2, len(versions) + 2)]  # each change once
    ended = counted[-1]
    assert ended["what"] == "ended" and ended["version"] == len(versions) + 1
    assert ended["num_processed"] == num_frames
    assert ended["num_indexed"] == sum(line["num_indexed"] for line in done)
    tried = [line for line in counted if line["what"] == "tried"]
    assert len({(line["search"], json.dumps(line["parameters"])) for line in tried}) == len(tried)
    return lines


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_loses_nothing(data, tmp_path):
    words = online_command(data, tmp_path / "o", "--max-frames", "24", "--set", "min_snr=60")
    num_killed = 0
    for num_lines in (1, 3, 6, 10, 15, 21):
        process = started(*words)
        wait_for_lines(process, tmp_path / "o", num_lines)
        process.kill()
        said, _ = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), said
        num_killed += process.returncode != 0
    assert num_killed >= 3
    last = started(*words)
    said, _ = last.communicate()
    assert last.returncode == 0, said
    lines = check_nothing_is_lost_or_twice(tmp_path / "o", 24)
    assert [line["what"] for line in lines].count("started again") >= num_killed - 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_asked_to_end_does_and_goes_on_later(data, tmp_path, number):
    words = online_command(data, tmp_path / "o", "--set", "min_snr=60")  # without an end
    process = started(*words)
    wait_for_lines(process, tmp_path / "o", 6)
    os.kill(process.pid, number)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "frames processed" in said and "to paste" in said
    text = (tmp_path / "o" / "audit.jsonl").read_text()
    first = [json.loads(line) for line in text.splitlines()]
    assert first[-1]["what"] == "ended"
    last = started(*words, "--max-frames", "24")
    said, _ = last.communicate()
    assert last.returncode == 0, said
    lines = check_nothing_is_lost_or_twice(tmp_path / "o", 24)
    again = next(line for line in lines if line["what"] == "started again")
    assert again["uncounted"] == []  # an end that was asked for is a clean one
    assert again["num_processed"] == first[-1]["num_processed"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_with_ray_a_driver_that_ends_leaves_no_process_and_goes_on(data, tmp_path, number):
    import ray  # noqa: F401  (brings psutil)
    import psutil  # isort: skip

    words = online_command(data, tmp_path / "o", "--set", "min_snr=60")
    words.remove("--no-ray")
    process = started(*words)
    wait_for_lines(process, tmp_path / "o", 6)
    assert process.poll() is None, process.communicate()[0]
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    said, _ = process.communicate()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0), said
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    last = started(*words, "--max-frames", "24")
    said, _ = last.communicate()
    assert last.returncode == 0, said
    check_nothing_is_lost_or_twice(tmp_path / "o", 24)
