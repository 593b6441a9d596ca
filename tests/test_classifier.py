"""Networks of the right shape, and files that bring them back or say why not."""

import json

import numpy as np
import pytest
import torch

from ssl2rl_ray.perception.classifier import (
    ClassifierError,
    load_classifier,
    make_classifier,
    predict_logits,
    save_classifier,
)


@pytest.mark.parametrize(("network", "size"), [("cnn", 32), ("cnn", 96), ("resnet18", 32)])
def test_images_in_one_logit_each_out(network, size):
    classifier = make_classifier(network, size)
    logit = classifier(torch.rand(3, 1, size, size))
    assert logit.shape == (3,) and logit.dtype == torch.float32
    logit.sum().backward()
    assert all(p.grad is not None for p in classifier.parameters())


def test_the_sizes_are_the_documented_ones():
    assert make_classifier("cnn", 32).describe()["num_parameters"] == 60_465
    small, large = make_classifier("resnet18", 32), make_classifier("resnet18", 64)
    # ResNet-18 has 11.2 million weights without its classes; the stem sees one channel
    assert small.network.conv1.weight.shape == (64, 1, 3, 3)
    assert large.network.conv1.weight.shape == (64, 1, 7, 7)
    assert large.describe()["num_parameters"] == pytest.approx(11.17e6, rel=0.001)


def test_dropout_acts_in_training_only():
    classifier = make_classifier("cnn", 32, dropout=0.5)
    images = torch.rand(4, 1, 32, 32)
    assert not torch.equal(classifier.train()(images), classifier(images))
    assert torch.equal(classifier.eval()(images), classifier(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("vgg", 32), "not one of"), (("cnn", 8), "at least 16")],
)
def test_what_cannot_be_made_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_classifier(*arguments)


def test_one_grey_value_cannot_be_standardised():
    with pytest.raises(ValueError, match="nothing to learn from"):
        make_classifier("cnn", 32).standardise_by(0.5, 0.0)


def test_predictions_come_in_the_order_of_the_rows():
    torch.manual_seed(0)
    classifier = make_classifier("cnn", 32).train()
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32), dtype=np.uint8)
    rows = np.array([7, 3, 3, 19])
    logits = predict_logits(classifier, images, rows, batch_size=3)
    assert logits.shape == (4,) and logits[1] == logits[2]
    assert classifier.training  # as it was
    expected = classifier.eval()(torch.from_numpy(images[rows])[:, None] / 255)
    torch.testing.assert_close(logits, expected.detach())
    assert predict_logits(classifier, images, []).shape == (0,)


def test_a_classifier_survives_its_files(tmp_path):
    classifier = make_classifier("cnn", 32)
    classifier.standardise_by(0.41, 0.2)
    save_classifier(classifier, tmp_path, {"extra": [1, 2]})
    again, description = load_classifier(tmp_path)
    assert description["extra"] == [1, 2] and again.mean == pytest.approx(0.41)
    images = torch.rand(5, 1, 32, 32)
    assert torch.equal(again(images), classifier.eval()(images))
    assert not again.training


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.json").unlink(), "is not a classifier"),
        (lambda f: (f / "model.json").write_text("[]"), "is of something else"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "damaged"),
    ],
)
def test_damage_is_said(tmp_path, damage, message):
    save_classifier(make_classifier("cnn", 32), tmp_path, {})
    damage(tmp_path)
    with pytest.raises(ClassifierError, match=message):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "update ssl2rl-ray"),
        ({"format": "else"}, "is not a classifier"),
        ({"network": "resnet18"}, "damaged"),
        ({"image_size_px": "big"}, "damaged"),
    ],
)
def test_a_description_that_does_not_fit_is_said(tmp_path, change, message):
    save_classifier(make_classifier("cnn", 32), tmp_path, {})
    found = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(found | change))
    with pytest.raises(ClassifierError, match=message):
        load_classifier(tmp_path)
