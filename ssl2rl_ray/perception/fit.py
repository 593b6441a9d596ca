"""The training loop of one classifier: supervised, FixMatch, or fine-tuning on pseudo labels.

``Fit.epoch`` is the whole of it: batches, views, one joint forward pass, one loss, one step. It
runs alone, or as one of several workers that share every batch. Nothing random outlives an epoch:
what an epoch draws depends on seed, epoch and worker only, so a fit that goes on from a state is
the fit that was never stopped. Torch only, no Ray. Shape letters: N holes, B labelled, U unlabelled
images of a batch, H and W pixels.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from envs.cryoem.types import BoolArray, FloatArray, IntArray
from ssl2rl_ray.config import PerceptionTrainingConfig
from ssl2rl_ray.perception import augment
from ssl2rl_ray.perception.classifier import Classifier, predict_logits
from ssl2rl_ray.perception.losses import (
    align,
    entropy,
    finetuning_loss,
    fixmatch_loss,
    supervised_loss,
)
from ssl2rl_ray.perception.metrics import classifier_metrics

_PAPER = {  # SSL²-RL, appendix B.2: epochs and learning rate
    "supervised": (200, 0.01),
    "fixmatch": (200, 0.01),
    "finetuning": (40, 0.001),
}
_ALIGNMENT_RATE = 0.01
"""Of the running mean of predictions: about 100 batches (ReMixMatch: the last 128)."""
COLLAPSED_SHARE = 0.05
"""A classifier that calls fewer than this, or all but this share low-CTF, has collapsed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """What one classifier learns from, and what it is judged on. Rows index ``images``."""

    images: NDArray[np.uint8]
    """(N, H, W)"""
    labelled: IntArray
    """(L,) rows with a label that may be used."""
    is_low: BoolArray
    """(N,) the label at ``labelled``, the pseudo label at ``unlabelled``, else unused."""
    unlabelled: IntArray
    """(U,) rows without a label: FixMatch's, or those with a pseudo label."""
    validation: IntArray
    """(V,) rows to validate on."""
    truth: FloatArray
    """(N,) 1 low-CTF, 0 not, NaN unknown: for validation and diagnostics, never for a loss."""
    confidence: FloatArray | None = None
    """(N,) of the pseudo labels, 0 or more."""


class Fit:
    """One classifier in training.

    Attributes:
        classifier: the network that is stepped.
        average: the exponential average of its weights, which validates and predicts.
        num_epochs: in all.
        epochs_done: so far.
    """

    def __init__(
        self,
        training: PerceptionTrainingConfig,
        classifier: Classifier,
        examples: Examples,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        num_workers: int = 1,
    ) -> None:
        """Puts the classifier on its device; in a group of workers, weights become rank 0's.

        Raises:
            ValueError: nothing labelled, nothing unlabelled where the method needs it, pseudo
                labels without any confidence, or images of another size than the classifier's.
        """
        _check(training, classifier, examples)
        self.training = training
        self.examples = examples
        self.seed, self.rank, self.num_workers = seed, rank, num_workers
        self.device = torch.device(device)
        epochs, self.learning_rate = _PAPER[training.method]
        self.num_epochs = training.num_epochs or epochs
        self.learning_rate = training.learning_rate or self.learning_rate
        self.epochs_done = 0
        self.steps_per_epoch = max(1, len(examples.labelled) // training.batch_size)
        self.classifier = classifier.to(self.device).train()
        for parameter in self.classifier.parameters():
            if parameter.ndim == 4:  # `contiguous` would leave the strides of one input channel
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.classifier).eval().requires_grad_(False)
        self._averaged, self._stepped = _floats(self.average), _floats(self.classifier)
        kernels = [p for p in self.classifier.parameters() if p.ndim > 1]
        others = [p for p in self.classifier.parameters() if p.ndim <= 1]  # biases, normalisation
        self.optimizer = torch.optim.SGD(
            [
                {"params": kernels, "weight_decay": training.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            momentum=training.momentum,
            nesterov=training.momentum > 0,
            fused=True,  # one pass over the weights
        )
        self.mean_p = torch.tensor(0.5, device=self.device)
        """Running mean of P(low-CTF) on weak views, for the alignment."""
        self.share_low = float(examples.is_low[examples.labelled].mean())
        self.model: nn.Module = self.classifier
        if num_workers > 1:
            self.model = nn.parallel.DistributedDataParallel(
                self.classifier,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,  # running means are read from rank 0's average only
                gradient_as_bucket_view=True,
            )

    # ------------------------------------------------------------ one epoch

    def epoch(self) -> dict[str, float]:
        """Trains one epoch and says how it went (``train/...``); see ``_Sums`` for the numbers.

        Raises ValueError where the loss is not finite any more.
        """
        started = time.perf_counter()
        rng = np.random.default_rng([self.seed, self.epochs_done])  # the same for every worker
        own = np.random.SeedSequence([self.seed, self.epochs_done, self.rank])
        torch.manual_seed(int(own.generate_state(1)[0]))  # dropout's
        generator = torch.Generator(self.device).manual_seed(int(own.generate_state(2)[1]))
        self.classifier.train()
        sums = _Sums()
        for step, (labelled, unlabelled) in enumerate(self._batches(rng)):
            self._set_learning_rate(self.epochs_done * self.steps_per_epoch + step)
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = self._loss(labelled, unlabelled, generator, sums)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self._update_average(self.epochs_done * self.steps_per_epoch + step)
        self.epochs_done += 1
        row = sums.row(self.num_workers, self.device)
        if not math.isfinite(row["train/loss_supervised"]):
            raise self._diverged()
        row["train/images_per_s"] = row.pop("num_images") / (time.perf_counter() - started)
        row["train/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        return row

    def _batches(self, rng: np.random.Generator) -> Any:
        """Rows of this worker for each step: (B / workers,) labelled, (U / workers,) unlabelled."""
        size, steps = self.training.batch_size, self.steps_per_epoch
        labelled = _stream(self.examples.labelled, size * steps, rng).reshape(steps, size)
        unlabelled = np.zeros((steps, 0), np.int64)
        if self._num_unlabelled:
            count = self._num_unlabelled * steps
            drawn = (
                _stream(self.examples.unlabelled, count, rng)
                if self.training.method == "fixmatch"
                else rng.choice(self.examples.unlabelled, count, p=self._sampling())
            )
            unlabelled = drawn.reshape(steps, -1)
        own = slice(self.rank, None, self.num_workers)
        return zip(labelled[:, own], unlabelled[:, own], strict=True)

    @property
    def _num_unlabelled(self) -> int:
        """U of this epoch's steps."""
        training = self.training
        if training.method == "supervised" or self._is_warmup:
            return 0
        return training.batch_size * training.unlabelled_ratio

    @property
    def _is_warmup(self) -> bool:
        is_fixmatch = self.training.method == "fixmatch"
        return is_fixmatch and self.epochs_done < self.training.num_warmup_epochs

    def _sampling(self) -> FloatArray:
        """(U,) probability of each pseudo-labelled hole: its share of the confidence."""
        assert self.examples.confidence is not None
        confidence = self.examples.confidence[self.examples.unlabelled].astype(np.float64)
        return confidence / confidence.sum()

    def _loss(
        self, labelled: IntArray, unlabelled: IntArray, generator: torch.Generator, sums: _Sums
    ) -> Tensor:
        """One joint forward pass, so that batch normalisation sees all views at once."""
        training, rows = self.training, np.concatenate([labelled, unlabelled])
        images = torch.from_numpy(self.examples.images[rows]).to(self.device).unsqueeze(1)
        views = [_as_float(augment.weak(images, generator))]
        is_fixmatch = training.method == "fixmatch" and len(unlabelled) > 0
        if is_fixmatch:
            strength = training.augmentation_strength
            views.append(
                augment.strong(_as_float(images[len(labelled) :]), generator, strength=strength)
            )
        batch = torch.cat(views) if is_fixmatch else views[0]
        logit = self.model(batch.to(memory_format=torch.channels_last)).float()
        label = torch.from_numpy(self.examples.is_low[rows]).to(self.device, torch.float32)
        sums.add("num_images", len(batch))
        b, u = len(labelled), len(unlabelled)
        own = supervised_loss(logit[:b], label[:b])
        sums.mean("train/loss_supervised", own.detach())
        if not u:
            return own
        if not is_fixmatch:
            loss = finetuning_loss(
                logit[:b], label[:b], logit[b:], label[b:], training.unsupervised_weight
            )
            sums.mean("train/loss_unsupervised", loss.detach() - own.detach())
            return loss
        weak_logit, strong_logit = logit[b : b + u].detach(), logit[b + u :]
        aligned = weak_logit
        if training.is_aligned:
            self.mean_p.lerp_(self._mean_of_workers(torch.sigmoid(weak_logit)), _ALIGNMENT_RATE)
            share = min(max(self.share_low, 0.01), 0.99)
            aligned = align(weak_logit, share, self.mean_p.clamp(0.01, 0.99))
        other, is_accepted = fixmatch_loss(aligned, strong_logit, training.confidence_threshold)
        sums.mean("train/loss_unsupervised", other.detach())
        sums.pseudo_labels(weak_logit, aligned, is_accepted, self._truth(unlabelled))
        return own + training.unsupervised_weight * other

    def _mean_of_workers(self, values: Tensor) -> Tensor:
        """The mean over all workers' values, as many each."""
        mean = values.mean()
        if self.num_workers > 1:
            torch.distributed.all_reduce(mean)
            mean /= self.num_workers
        return mean

    def _truth(self, rows: IntArray) -> Tensor:
        return torch.from_numpy(self.examples.truth[rows].astype(np.float32)).to(self.device)

    def _set_learning_rate(self, step: int) -> None:
        """Cosine of FixMatch (Sohn et al. 2020, section 2.4): it ends at 0.2 of the start."""
        share = step / (self.num_epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * math.cos(7 * math.pi / 16 * share)

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        decay = min(self.training.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            self._averaged, self._stepped, 1 - decay
        )

    # ------------------------------------------------------------ looking at it

    def logits(self, rows: IntArray) -> FloatArray:
        """(R,) float64 logits of the averaged classifier; ValueError where one is not finite."""
        logits = predict_logits(self.average, self.examples.images, rows).double().numpy()
        if not np.isfinite(logits).all():
            raise self._diverged()
        return logits

    def _diverged(self) -> ValueError:
        return ValueError(
            f"training diverged in epoch {self.epochs_done}: numbers are not finite any more; "
            f"lower training.learning_rate (now {self.learning_rate:g})"
        )

    def validate(self) -> dict[str, float]:
        """``validation/...``: see ``metrics.classifier_metrics``; empty without validation rows."""
        rows, truth = self.examples.validation, self.examples.truth
        if len(rows) == 0:
            return {}
        p = 1 / (1 + np.exp(-self.logits(rows)))
        figures = classifier_metrics(truth[rows] == 1, p)
        return {f"validation/{name}": value for name, value in figures.items()}

    def is_collapsed(self, row: dict[str, float]) -> bool:
        """Whether nearly all holes are called one thing, though labels are of both kinds."""
        share = row.get("train/positive_share", row.get("validation/positive_share", math.nan))
        is_one_sided = share < COLLAPSED_SHARE or share > 1 - COLLAPSED_SHARE
        return is_one_sided and 2 * COLLAPSED_SHARE < self.share_low < 1 - 2 * COLLAPSED_SHARE

    # ------------------------------------------------------------ going on later

    def state(self) -> dict[str, Any]:
        """All that goes on: plain values and tensors, for ``torch.save``."""
        return {
            "epochs_done": self.epochs_done,
            "classifier": self.classifier.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean_p": self.mean_p,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of ``state``."""
        self.epochs_done = state["epochs_done"]
        self.classifier.load_state_dict(state["classifier"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mean_p.copy_(state["mean_p"])


class _Sums:
    """Numbers of an epoch, summed on the device: nothing waits for them before its end.

    - ``train/loss_supervised``, ``train/loss_unsupervised``: means over steps.
    - ``train/accepted_share``: of the unlabelled images, FixMatch's mask rate.
    - ``train/accepted_accuracy``: of the accepted pseudo labels whose truth is known.
    - ``train/positive_share``: of the unlabelled images, called low-CTF on their weak view.
    - ``train/entropy``: mean, of the predictions on weak views, nats. Both before any alignment,
      which would hide a collapse.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def mean(self, name: str, value: Tensor, count: Tensor | float = 1.0) -> None:
        self.add(name, value)
        self.add(f"{name}/count", count)

    def pseudo_labels(
        self, weak_logit: Tensor, aligned: Tensor, is_accepted: Tensor, truth: Tensor
    ) -> None:
        n, is_positive = len(weak_logit), weak_logit >= 0
        is_known = is_accepted & ~truth.isnan()
        self.mean("train/accepted_share", is_accepted.sum(), n)
        self.mean("train/positive_share", is_positive.sum(), n)
        self.mean("train/entropy", entropy(weak_logit).sum(), n)
        is_right = is_known & ((aligned >= 0) == (truth == 1))
        self.mean("train/accepted_accuracy", is_right.sum(), is_known.sum())

    def row(self, num_workers: int, device: torch.device) -> dict[str, float]:
        """Means over all workers."""
        totals = torch.stack(
            [torch.as_tensor(v, dtype=torch.float32, device=device) for v in self._sums.values()]
        )
        if num_workers > 1:
            torch.distributed.all_reduce(totals)
        values = dict(zip(self._sums, totals.tolist(), strict=True))
        return {
            name: value / values[f"{name}/count"] if values[f"{name}/count"] else math.nan
            for name, value in values.items()
            if f"{name}/count" in values
        } | {"num_images": values["num_images"]}


def _floats(module: nn.Module) -> list[Tensor]:
    """Weights and running means, which are changed in place only."""
    return [v for v in module.state_dict().values() if v.is_floating_point()]


def _as_float(images: Tensor) -> Tensor:
    return images.float().div_(255.0)


def _stream(rows: IntArray, count: int, rng: np.random.Generator) -> IntArray:
    """(count,) rows: each once in random order before any comes again."""
    rounds = -(-count // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(rounds)])[:count]


def _check(training: PerceptionTrainingConfig, classifier: Classifier, examples: Examples) -> None:
    size = examples.images.shape[1:]
    if size != (classifier.image_size_px, classifier.image_size_px):
        raise ValueError(
            f"the classifier expects images of {classifier.image_size_px} x "
            f"{classifier.image_size_px} px, found {size[0]} x {size[1]}"
        )
    if len(examples.labelled) == 0:
        raise ValueError("no labelled hole with an image: nothing to learn from")
    if training.method == "supervised":
        return
    if len(examples.unlabelled) == 0:
        raise ValueError(
            f"{training.method} needs holes without a label that have an image, found none: "
            "lower data.labelled_fraction, or set training.method supervised"
        )
    if training.method == "finetuning":
        confidence = examples.confidence
        if confidence is None or not confidence[examples.unlabelled].sum() > 0:
            raise ValueError("pseudo labels: every confidence is 0, so none can be drawn")
