"""The public CryoRL environment, driven on real data, against ours: number by number."""

from pathlib import Path

import numpy as np
import pytest

from envs.cryoem.env import CryoEMNavigationEnv, CryoEMVectorEnv
from envs.cryoem.features import hole_features
from envs.cryoem.stack import SessionStack, unpack_visited
from envs.cryoem.types import HoleTable, NavigationConfig

FOLDER = Path(__file__).parents[1].parent / "shared" / "data" / "aldolase" / "conformance"
RULES = {
    "reg_pred": {},
    "reg_pred_g": {"reward_rule": "dynamic"},
    "reg_gt_dyn": {"reward_rule": "dynamic"},
    "reg_pred_pen": {"high_ctf_penalty": 0.2},
    "cat_pred": {},
    "cat_gt": {},
}
TOTAL_REWARD = {
    "reg_pred": 116.34,
    "reg_pred_g": 131.353597,
    "reg_gt_dyn": 131.353597,
    "reg_pred_pen": 43.54,
    "cat_pred": 116.34,
    "cat_gt": 116.34,
}


def load(mode: str) -> dict[str, np.ndarray]:
    path = FOLDER / f"conformance_train_{mode}.npz"
    if not path.exists():
        pytest.skip(f"no conformance files beside the checkout ({path.parent.name})")
    with np.load(path) as file:
        return dict(file)


def table_of(run: dict[str, np.ndarray], mode: str) -> HoleTable:
    """Parents' names are the prefixes that end in gr, sq, hl; they must agree with its codes."""
    tokens = [name.split("_") for name in run["names"]]

    def parent(ending: str) -> list[str]:
        return [
            "_".join(t[: next(i for i, part in enumerate(t) if part.endswith(ending)) + 1])
            for t in tokens
        ]

    p_low = run.get("p_low")
    if mode == "cat_gt":
        p_low = (run["gt"] <= 6).astype(float)
    table = HoleTable.from_names(
        hole_name=run["names"],
        grid=parent("gr"),
        square=parent("sq"),
        patch=parent("hl"),
        ctf_max_resolution_A=run["gt"],
        predicted_ctf_A=run["pred"],
        p_low_ctf=p_low,
    )
    for level in ("grid", "square", "patch"):
        np.testing.assert_array_equal(getattr(table, f"{level}_id"), run[level])
    return table


@pytest.mark.parametrize("mode", RULES)
def test_rewards_minutes_done_and_masks_are_exact(mode: str) -> None:
    run = load(mode)
    config = NavigationConfig.preset("cryorl", feature_set="cryorl", **RULES[mode])
    table = table_of(run, mode)
    single = CryoEMNavigationEnv(table, config)
    vector = CryoEMVectorEnv([table], config, 2)
    start = int(run["start"])
    _, single_info = single.reset(options={"start_hole": start})
    vector.reset(options={"start_hole": start})
    assert single_info["elapsed_min"] == 0
    masks = dict(zip(run["frame_steps"].tolist(), run["masks"], strict=True))
    np.testing.assert_array_equal(single.action_mask(), masks[0])
    total = 0.0
    for step, action in enumerate(run["actions"].tolist(), start=1):
        _, reward, terminated, truncated, info = single.step(action)
        _, rewards, terminateds, _, infos = vector.step(np.full(2, action))
        for got, minutes, is_done in (
            (reward, info["elapsed_min"], terminated),
            (rewards[1], infos["elapsed_min"][1], terminateds[1]),
        ):
            # Exact; an exponential may differ in its last bit between maths libraries.
            last_bit = 1e-15 if config.reward_rule == "dynamic" else 0
            assert abs(got - run["rewards"][step - 1]) <= last_bit
            assert minutes == run["cum_time"][step - 1]
            assert is_done == run["done"][step - 1]
        assert not truncated
        assert info["num_low_ctf"] == run["total_lctf"][step - 1]
        assert info["num_visits"] == step
        total += float(reward)
        if step in masks:
            np.testing.assert_array_equal(single.action_mask(), masks[step])
            np.testing.assert_array_equal(vector.action_mask()[0], masks[step])
    assert total == pytest.approx(TOTAL_REWARD[mode], abs=5e-7)
    assert (info["num_visits"], info["elapsed_min"], info["num_low_ctf"]) == (296, 486, 121)


@pytest.mark.parametrize("mode", ["cat_pred", "cat_gt"])
def test_features_and_stacked_observations_to_float16_rounding(mode: str) -> None:
    run = load(mode)
    config = NavigationConfig.preset("cryorl", feature_set="cryorl")
    table = table_of(run, mode)
    stack = SessionStack.of([table], config)
    env = CryoEMVectorEnv(stack, config, 1)
    frames = dict(zip(run["frame_steps"].tolist(), run["frames"], strict=True))
    stacked = dict(zip(run["obs_steps"].tolist(), run["obs"], strict=True))
    observation, _ = env.reset(options={"start_hole": int(run["start"])})
    for step in range(max(frames) + 1):
        if step:
            observation, *_ = env.step(run["actions"][[step - 1]])
        if step not in frames and step not in stacked:
            continue
        features = hole_features(
            stack,
            observation["session"][:, 0],
            unpack_visited(observation, len(table)),
            observation["recent"][:, 0],
            observation["recent"],
            config,
        )[0]
        if step in frames:
            np.testing.assert_array_equal(features[:, -17:].astype(np.float16), frames[step])
        if step in stacked:
            np.testing.assert_array_equal(features.astype(np.float16), stacked[step])
