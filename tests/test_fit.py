"""The training loop: it learns, repeats, resumes exactly, samples as it says, tells collapse."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from ssl2rl_ray.config import PerceptionTrainingConfig
from ssl2rl_ray.perception.classifier import make_classifier
from ssl2rl_ray.perception.fit import Examples, Fit

N, LABELLED = 700, 128


@pytest.fixture(scope="module")
def examples() -> Examples:
    """Noise, with a square in the middle where low-CTF."""
    rng = np.random.default_rng(0)
    is_low = rng.random(N) < 0.5
    images = rng.normal(110, 30, (N, 32, 32))
    images[is_low, 12:20, 12:20] += 45
    truth = is_low.astype(float)
    return Examples(
        images=images.clip(0, 255).astype(np.uint8),
        labelled=np.arange(LABELLED),
        is_low=is_low,
        unlabelled=np.arange(LABELLED, 500),
        validation=np.arange(500, N),
        truth=truth,
    )


def fit(examples, method="supervised", seed=0, **settings) -> Fit:
    torch.manual_seed(seed)
    settings = {"num_epochs": 12, "learning_rate": 0.05, **settings}
    training = PerceptionTrainingConfig(method=method, **settings)
    classifier = make_classifier("cnn", 32)
    classifier.standardise_by(0.43, 0.13)
    return Fit(training, classifier, examples, seed=seed)


def run(fit: Fit, num_epochs: int | None = None) -> list[dict]:
    return [fit.epoch() for _ in range(num_epochs or fit.num_epochs)]


def weights(fit: Fit) -> dict[str, torch.Tensor]:
    return fit.average.state_dict()


def assert_same(a: Fit, b: Fit):
    for name, value in weights(a).items():
        assert torch.equal(value, weights(b)[name]), name


@pytest.mark.parametrize("method", ["supervised", "fixmatch"])
def test_it_learns_what_can_be_seen(examples, method):
    learner = fit(examples, method, num_epochs=15, batch_size=16)
    rows = run(learner)
    assert rows[-1]["train/loss_supervised"] < 0.5 < rows[0]["train/loss_supervised"]
    figures = learner.validate()
    assert figures["validation/num_holes"] == N - 500
    assert figures["validation/accuracy"] > 0.85 and figures["validation/auc"] > 0.93
    assert not learner.is_collapsed(rows[-1] | figures)
    if method == "fixmatch":
        assert 0.5 < rows[-1]["train/accepted_share"] <= 1
        assert rows[-1]["train/accepted_accuracy"] > 0.9
        assert 0.3 < rows[-1]["train/positive_share"] < 0.7
        assert rows[-1]["train/entropy"] < rows[0]["train/entropy"] <= math.log(2)


@pytest.mark.parametrize("method", ["supervised", "fixmatch", "finetuning"])
def test_a_fit_that_goes_on_is_the_fit_that_never_stopped(examples, method, tmp_path):
    examples = dataclasses.replace(examples, confidence=np.ones(N))
    settings = {"num_epochs": 4, "is_aligned": method == "fixmatch"}
    whole = fit(examples, method, **settings)
    rows = run(whole)
    first = fit(examples, method, **settings)
    run(first, 2)
    torch.save(first.state(), tmp_path / "state.pt")
    torch.randn(7)  # what others draw in between is of no account
    second = fit(examples, method, **settings)
    second.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.epochs_done == 2
    later = run(second, 2)
    assert_same(whole, second)
    for a, b in zip(rows[2:], later, strict=True):
        assert {k: v for k, v in a.items() if "per_s" not in k} == {
            k: v for k, v in b.items() if "per_s" not in k
        }


def test_a_seed_decides_everything(examples):
    fits = [fit(examples, "fixmatch", seed, num_epochs=2) for seed in (1, 1, 2)]
    for one in fits:
        run(one)
    assert_same(fits[0], fits[1])
    assert not torch.equal(*(weights(f)["network.0.weight"] for f in fits[1:]))


def test_truth_of_unlabelled_holes_is_never_learned_from(examples):
    """Only the figures that watch it may change with it."""
    blind = dataclasses.replace(
        examples,
        truth=np.where(np.arange(N) < LABELLED, examples.truth, np.nan),
        is_low=examples.is_low & (np.arange(N) < LABELLED),
    )
    seeing, without = fit(examples, "fixmatch"), fit(blind, "fixmatch")
    last = run(seeing, 5)[-1], run(without, 5)[-1]
    assert_same(seeing, without)
    assert last[0]["train/accepted_accuracy"] > 0.5
    assert math.isnan(last[1]["train/accepted_accuracy"])


def test_every_labelled_hole_comes_once_an_epoch(examples):
    learner = fit(examples, "fixmatch", batch_size=32)
    batches = list(learner._batches(np.random.default_rng(0)))
    assert len(batches) == learner.steps_per_epoch == LABELLED // 32
    labelled = np.concatenate([b for b, _ in batches])
    assert np.array_equal(np.sort(labelled), examples.labelled)
    unlabelled = np.concatenate([u for _, u in batches])
    assert len(unlabelled) == 4 * LABELLED
    counts = np.bincount(unlabelled, minlength=N)[examples.unlabelled]
    assert set(counts) <= {1, 2}  # 512 of 372: each once before any comes again


def test_one_step_by_hand(examples):
    """The gradient that SGD takes is that of l_sup + lambda l_U, over one joint forward pass."""
    few = dataclasses.replace(examples, labelled=np.arange(8), unlabelled=np.arange(200, 232))
    moved = {}
    for weight in (0.0, 1.0, 5.0):
        learner = fit(
            few, "fixmatch", batch_size=8, num_epochs=1, momentum=0.0, weight_decay=0.0,
            learning_rate=1.0, unsupervised_weight=weight, confidence_threshold=0.5,
        )  # fmt: skip
        batches = []
        learner.model.register_forward_pre_hook(lambda _, args, kept=batches: kept.append(args[0]))
        before = [p.detach().clone() for p in learner.classifier.parameters()]
        run(learner)
        assert [tuple(batch.shape) for batch in batches] == [(8 + 32 + 32, 1, 32, 32)]
        after = learner.classifier.parameters()
        moved[weight] = torch.cat([(b - a).flatten() for a, b in zip(after, before, strict=True)])
    unsupervised = moved[1.0] - moved[0.0]
    assert unsupervised.abs().max() > 1e-3
    torch.testing.assert_close(moved[5.0], moved[0.0] + 5 * unsupervised, rtol=1e-3, atol=1e-5)


def test_weight_decay_is_of_kernels_only(examples):
    groups = fit(examples, weight_decay=0.1).optimizer.param_groups
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [
        (0.1, {2, 4}),
        (0.0, {1}),
    ]


def test_alignment_acts_and_does_not_hide_a_collapse(examples):
    plain, aligned = (fit(examples, "fixmatch", is_aligned=value) for value in (False, True))
    for learner in (plain, aligned):
        run(learner, 3)
    name = "network.0.weight"
    assert not torch.equal(weights(plain)[name], weights(aligned)[name])
    assert 0 < aligned.mean_p < 1 and aligned.mean_p != 0.5 and plain.mean_p == 0.5
    with torch.no_grad():
        aligned.classifier.network[-1].bias.fill_(-30)
    aligned.optimizer.param_groups[0]["lr"] = 0
    aligned.learning_rate = 1e-9
    assert aligned.is_collapsed(aligned.epoch())


def test_a_loss_that_is_not_finite_ends_the_fit(examples):
    with pytest.raises(
        ValueError, match=r"training diverged in epoch .*learning_rate \(now 1e\+09\)"
    ):
        run(fit(examples, learning_rate=1e9), 30)


def test_workers_share_a_batch_without_overlap(examples):
    one, *shares = (fit(examples, "fixmatch") for _ in range(3))
    for rank, share in enumerate(shares):
        share.rank, share.num_workers = rank, 2
    rows = [list(f._batches(np.random.default_rng(0))) for f in (one, *shares)]
    for whole, left, right in zip(*rows, strict=True):
        for i in (0, 1):
            assert len(left[i]) == len(right[i])
            assert sorted([*left[i], *right[i]]) == sorted(whole[i])


def test_pseudo_labels_are_drawn_in_proportion_to_their_confidence(examples):
    confidence = np.zeros(N)
    confidence[200:300], confidence[300:400] = 0.5, 1.0
    learner = fit(dataclasses.replace(examples, confidence=confidence), "finetuning")
    drawn = np.concatenate(
        [u for e in range(40) for _, u in learner._batches(np.random.default_rng(e))]
    )
    assert drawn.min() >= 200 and drawn.max() < 400
    share = (drawn >= 300).mean()
    assert share == pytest.approx(2 / 3, abs=5 * math.sqrt(2 / 9 / len(drawn)))


def test_finetuning_follows_its_pseudo_labels(examples):
    """With right ones it gains, with wrong ones at a high weight it loses: they do act."""
    start = fit(examples, num_epochs=3)
    run(start)
    found = {}
    for name, flip in (("right", False), ("wrong", True)):
        is_low = examples.is_low.copy()
        is_low[examples.unlabelled] ^= flip
        data = dataclasses.replace(examples, is_low=is_low, confidence=np.ones(N))
        training = PerceptionTrainingConfig(
            method="finetuning", num_epochs=10, learning_rate=0.02, unsupervised_weight=2.0
        )
        learner = Fit(training, copy.deepcopy(start.classifier), data, seed=0)
        run(learner)
        found[name] = learner.validate()["validation/accuracy"]
    assert found["right"] > 0.9 and found["wrong"] < 0.6


def test_the_learning_rate_is_fixmatchs_cosine(examples):
    learner = fit(examples, num_epochs=10, learning_rate=0.01)
    rates = [row["train/learning_rate"] for row in run(learner)]
    steps = 10 * learner.steps_per_epoch
    assert rates[0] == pytest.approx(0.01 * math.cos(7 * math.pi / 16 * 1 / steps))
    assert rates[-1] == pytest.approx(0.01 * math.cos(7 * math.pi / 16 * (steps - 1) / steps))


def test_defaults_are_the_papers(examples):
    for method, epochs, rate in (("supervised", 200, 0.01), ("finetuning", 40, 0.001)):
        data = dataclasses.replace(examples, confidence=np.ones(N))
        learner = fit(data, method, num_epochs=None, learning_rate=None)
        assert (learner.num_epochs, learner.learning_rate) == (epochs, rate)


def test_warmup_epochs_are_supervised(examples):
    learner = fit(examples, "fixmatch", num_warmup_epochs=2)
    rows = run(learner, 3)
    assert ["train/accepted_share" in row for row in rows] == [False, False, True]


def test_collapse_is_told_from_one_sided_labels(examples):
    learner = fit(examples)
    assert learner.is_collapsed({"validation/positive_share": 0.01})
    assert learner.is_collapsed({"train/positive_share": 0.99, "validation/positive_share": 0.5})
    assert not learner.is_collapsed({"validation/positive_share": 0.4})
    assert not learner.is_collapsed({})
    rare = dataclasses.replace(examples, is_low=np.arange(N) < 6)
    assert not fit(rare).is_collapsed({"validation/positive_share": 0.01})


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("supervised", {"labelled": np.zeros(0, int)}, "no labelled hole"),
        ("fixmatch", {"unlabelled": np.zeros(0, int)}, "needs holes without a label"),
        ("finetuning", {"confidence": np.zeros(N)}, "every confidence is 0"),
        ("supervised", {"images": np.zeros((N, 40, 40), np.uint8)}, "expects images of 32 x 32"),
    ],
)
def test_what_cannot_be_trained_is_said(examples, method, change, message):
    with pytest.raises(ValueError, match=message):
        fit(dataclasses.replace(examples, **change), method)


def test_few_labels_fill_a_batch(examples):
    learner = fit(dataclasses.replace(examples, labelled=np.array([3, 4])), num_epochs=1)
    assert run(learner)[0]["train/loss_supervised"] > 0 and learner.steps_per_epoch == 1
