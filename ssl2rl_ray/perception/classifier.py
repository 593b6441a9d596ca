"""The network that guesses from a hole's image whether its micrograph will be good.

Two sizes: torchvision's ResNet-18 (the paper's), and a CNN of 60,000 weights that a CPU trains in
minutes. Shape letters: B batch, H and W pixels.

model.safetensors   the weights
model.json          what they expect: network, image size, dropout

Of a head on given predictions (``perception.head``) the second file is all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ssl2rl_ray.perception.head import Head

NetworkName = Literal["cnn", "resnet18"]

FORMAT = "ssl2rl-classifier"
FORMAT_VERSION = 1
SMALL_IMAGE_PX = 64
"""Below it, ResNet's stem would leave 1 pixel in 32 of an image that has few."""
_CHANNELS = (16, 32, 64, 64)


class ClassifierError(ValueError):
    """A folder is not a classifier that this program can use; the message says why."""


class Classifier(nn.Module):
    """Image to logit of P(low-CTF).

    Attributes:
        network: (B, 1, H, W) float32, standardised -> (B, 1).
        mean, sd: grey value and its spread over the training images, in [0, 1]. Buffers: one map
            for all images, as an image's own mean grey value carries its ice thickness.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, name: NetworkName, image_size_px: int, dropout: float) -> None:
        """Use ``make_classifier``."""
        super().__init__()
        self.name: NetworkName = name
        self.image_size_px = image_size_px
        self.dropout = dropout
        self.network = _cnn(dropout) if name == "cnn" else _resnet18(image_size_px, dropout)
        self.register_buffer("mean", torch.tensor(0.5))
        self.register_buffer("sd", torch.tensor(0.25))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) float32 grey values in [0, 1] -> (B,) logit of P(low-CTF)."""
        return self.network((images - self.mean) / self.sd)[:, 0]

    def standardise_by(self, mean: float, sd: float) -> None:
        """Sets the map of grey values, (0, 1) scale; raises ValueError where ``sd`` is not > 0."""
        if not sd > 0:
            raise ValueError("all images have one and the same grey value: nothing to learn from")
        self.mean.fill_(mean)
        self.sd.fill_(sd)

    def describe(self) -> dict[str, Any]:
        """What ``make_classifier`` needs to build it again, as JSON."""
        return {
            "network": self.name,
            "image_size_px": self.image_size_px,
            "dropout": self.dropout,
            "num_parameters": sum(p.numel() for p in self.parameters()),
        }


def make_classifier(network: NetworkName, image_size_px: int, dropout: float = 0.5) -> Classifier:
    """A classifier with random weights (torch's global generator).

    Args:
        network: ``cnn`` or ``resnet18`` (He et al. 2016, arXiv:1512.03385; as in SSL²-RL, B.2),
            with one input channel; below 64 px its stem is a 3x3 convolution without pooling.
        image_size_px: H = W.
        dropout: before the last layer.

    Raises:
        ValueError: unknown network, image too small.
    """
    if network not in get_args(NetworkName):
        raise ValueError(f"network: {network!r} is not one of {get_args(NetworkName)}")
    if image_size_px < 16:
        raise ValueError(f"image_size_px: at least 16, found {image_size_px}")
    return Classifier(network, image_size_px, dropout)


def _cnn(dropout: float) -> nn.Module:
    """Four 3x3 convolutions, each but the last halving the image; its mean at the end.

    Strides, not pooling, which takes four times as long.
    """
    layers: list[nn.Module] = []
    for num_in, num_out in zip((1, *_CHANNELS), _CHANNELS, strict=False):
        stride = 1 if num_in == num_out else 2
        layers += [
            nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(_CHANNELS[-1], 1),
    )


def _resnet18(image_size_px: int, dropout: float) -> nn.Module:
    from torchvision.models import resnet18

    network = resnet18(num_classes=1)
    if image_size_px < SMALL_IMAGE_PX:
        network.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    else:
        network.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.fc = nn.Sequential(  # pyright: ignore[reportAttributeAccessIssue]
        nn.Dropout(dropout), nn.Linear(512, 1)
    )
    return network


def save_classifier(classifier: Classifier | Head, folder: Path, notes: dict[str, Any]) -> None:
    """Writes both files into a folder that exists; ``notes`` (JSON) are kept with them."""
    if isinstance(classifier, Classifier):
        weights = {k: v.detach().cpu().contiguous() for k, v in classifier.state_dict().items()}
        # not `save_file`: it makes a file that nobody but its owner may read
        (folder / "model.safetensors").write_bytes(save(weights))
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **classifier.describe(),
        **notes,
    }
    (folder / "model.json").write_text(json.dumps(description, indent=1, allow_nan=False) + "\n")


def load_classifier(folder: Path) -> tuple[Classifier | Head, dict[str, Any]]:
    """The classifier, ready to predict, and its description with the notes.

    Raises ClassifierError where the folder holds none, a newer one, or a damaged one.
    """
    try:
        description: dict[str, Any] = dict(json.loads((folder / "model.json").read_text()))
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise ClassifierError(
            f"{folder} is not a classifier ({error}): give a run of kind perception"
        ) from error
    if description.get("format") != FORMAT:
        raise ClassifierError(f"{folder} is not a classifier: its model.json is of something else")
    version = description.get("format_version", 0)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ClassifierError(
            f"{folder} has format version {version}, this program reads up to {FORMAT_VERSION}: "
            "update ssl2rl-ray"
        )
    try:
        if description["network"] == "head":
            return Head.from_description(description), description
        classifier = make_classifier(
            description["network"], description["image_size_px"], description["dropout"]
        )
        classifier.load_state_dict(load_file(folder / "model.safetensors"))
        for name, value in classifier.state_dict().items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} has a value that is not finite")
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ClassifierError(f"{folder}: the classifier is damaged: {reason}") from error
    return classifier.eval().requires_grad_(False), description


@torch.no_grad()
def predict_logits(
    classifier: nn.Module, images: Any, rows: Iterable[int], *, batch_size: int = 512
) -> Tensor:
    """(R,) logits of the given rows of uint8 images (N, H, W), in evaluation mode.

    ``images`` may be a memory map: ``batch_size`` rows at a time are read, to the device where the
    classifier is.
    """
    import numpy as np

    rows = np.asarray(list(rows), dtype=np.int64)
    device = next(classifier.parameters()).device
    was_training = classifier.training
    classifier.eval()
    logits = [
        classifier(as_batch(np.asarray(images[rows[i : i + batch_size]]), device)).cpu()
        for i in range(0, len(rows), batch_size)
    ]
    classifier.train(was_training)
    return torch.cat(logits) if logits else torch.zeros(0)


def as_batch(images: Any, device: torch.device | str = "cpu") -> Tensor:
    """(B, H, W) uint8 array -> (B, 1, H, W) float32 in [0, 1] on the device."""
    return torch.from_numpy(images).to(device).unsqueeze(1).float().div_(255.0)
