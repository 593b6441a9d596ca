"""What a perception run learns from: a session with images, split by square, and pseudo labels.

Everything random hangs on ``config.seed``. Shape letters: N holes, H and W pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.cryoem.images import draw_images
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import BoolArray, FloatArray, HoleTable, IntArray
from ssl2rl_ray.config import PerceptionRunConfig
from ssl2rl_ray.data.folder import read_dataset
from ssl2rl_ray.data.splits import choose_labelled, split_by_square
from ssl2rl_ray.data.text import DataError
from ssl2rl_ray.perception.fit import Examples

_SAMPLE, _SPLIT, _LABELLED, _KNOWN = range(4)  # streams of random numbers of one seed


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A session with images."""

    table: HoleTable
    images: NDArray[np.uint8]
    """(N, H, W), read-only, often a memory map."""
    has_image: BoolArray
    """(N,)"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Rows of the sample by what they are for, sorted; only holes with an image."""

    labelled: IntArray
    unlabelled: IntArray
    validation: IntArray
    """With a label, not known to the posterior."""
    known: IntArray
    """In validation squares, with a label that the posterior may use."""


def sample_of(config: PerceptionRunConfig) -> Sample:
    """The dataset of the config, or its synthetic sample.

    Raises:
        DataError: no such dataset, or one without images or labels.
    """
    return _sample(config.data.dataset, config.data.preset, config.seed)


@functools.lru_cache(maxsize=2)
def _sample(path: str | None, preset: str, seed: int) -> Sample:
    if path is None:
        rng = np.random.default_rng([seed, _SAMPLE])
        table = draw_session(rng, preset)
        images = draw_images(rng, table, preset)
        return Sample(table=table, images=images, has_image=np.ones(len(table), bool))
    dataset = read_dataset(path)
    images, has_image = dataset.images, dataset.has_image
    if images is None or has_image is None or not has_image.any():
        raise DataError(
            f"{path} has no images to learn from: import it with --images DIR, or a "
            "synthetic preset such as y3-mini; kind ssl2rl learns from predictions without images "
            "by classifier.network: head"
        )
    if not (has_image & dataset.table.is_labelled).any():
        raise DataError(f"{path} has no labelled hole with an image: nothing to learn from")
    return Sample(table=dataset.table, images=images, has_image=has_image)


def split_of(config: PerceptionRunConfig, sample: Sample) -> Split:
    """Validation squares, then which labels of either part are used.

    Raises ValueError where nothing labelled is left on one of the two sides, and where the labels
    to train on are of one kind.
    """
    data, table = config.data, sample.table

    def rng(stream: int) -> np.random.Generator:
        return np.random.default_rng([config.seed, stream])

    held_out = split_by_square(table, data.validation_share, rng(_SPLIT))
    has_label = table.is_labelled & sample.has_image
    labelled = choose_labelled(
        np.flatnonzero(has_label & ~held_out), data.labelled_fraction, rng(_LABELLED)
    )
    candidates = np.flatnonzero(has_label & held_out)
    known = choose_labelled(candidates, data.known_fraction, rng(_KNOWN))
    if not len(labelled) or len(known) == len(candidates):
        raise ValueError(
            f"seed {config.seed}: the split by squares leaves {len(labelled)} labelled holes to "
            f"train on and {len(candidates) - len(known)} to validate on; take another seed or "
            "data.validation_share, or label holes of more squares"
        )
    is_low = truth_of(config, table)[labelled] == 1
    if is_low.all() or not is_low.any():
        raise ValueError(
            f"all {len(labelled)} labelled holes to train on are {'' if is_low.all() else 'not '}"
            f"low-CTF at data.low_ctf_threshold_A {data.low_ctf_threshold_A:g}: nothing to tell "
            "apart; raise data.labelled_fraction, or change the threshold"
        )
    is_unlabelled = sample.has_image & ~held_out
    is_unlabelled[labelled] = False
    return Split(
        labelled=labelled,
        unlabelled=np.flatnonzero(is_unlabelled),
        validation=np.setdiff1d(candidates, known),
        known=known,
    )


def examples_of(config: PerceptionRunConfig, sample: Sample, split: Split) -> Examples:
    """What the main fit learns from; reads the pseudo labels where the method has any."""
    truth = truth_of(config, sample.table)
    examples = Examples(
        images=sample.images,
        labelled=split.labelled,
        is_low=truth == 1,
        unlabelled=split.unlabelled,
        validation=split.validation,
        truth=truth,
    )
    if config.training.method != "finetuning":
        return examples
    assert config.training.pseudo_labels is not None
    label, confidence = read_pseudo_labels(config.training.pseudo_labels, sample.table)
    is_low = examples.is_low.copy()
    pseudo = split.unlabelled[np.isfinite(label[split.unlabelled])]
    is_low[pseudo] = label[pseudo] == 1
    return dataclasses.replace(examples, unlabelled=pseudo, is_low=is_low, confidence=confidence)


def truth_of(config: PerceptionRunConfig, table: HoleTable) -> FloatArray:
    """(N,) 1 low-CTF, 0 not, NaN not measured."""
    ctf = table.ctf_max_resolution_A
    return np.where(np.isnan(ctf), np.nan, ctf < config.data.low_ctf_threshold_A)


def read_pseudo_labels(path: str, table: HoleTable) -> tuple[FloatArray, FloatArray]:
    """(N,) label (1, 0, NaN = none) and (N,) confidence of a parquet file's holes.

    Raises DataError where it cannot be read, lacks a column, names a hole twice or one that the
    table does not have, or has a confidence below 0.
    """
    import pyarrow.parquet as pq

    columns = ("hole_name", "is_low_ctf", "confidence")
    try:
        found = pq.read_table(path, columns=list(columns)).to_pydict()
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: expected a parquet file with the columns {', '.join(columns)}: {error}"
        ) from error
    row_of = {name: row for row, name in enumerate(table.hole_name.tolist())}
    names = found["hole_name"]
    if strangers := [name for name in names if name not in row_of]:
        raise DataError(f"{path}: the session has no hole {strangers[0]!r} ({len(strangers)} rows)")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: a hole is there twice")
    if not all(value in (0, 1) for value in found["is_low_ctf"]):
        raise DataError(f"{path}: is_low_ctf: expected true or false in every row")
    label, confidence = np.full(len(table), np.nan), np.zeros(len(table))
    rows = np.array([row_of[name] for name in names], np.int64)
    label[rows] = np.array(found["is_low_ctf"], float)
    try:
        confidence[rows] = np.array(found["confidence"], float)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: confidence: expected numbers: {error}") from error
    if not (np.isfinite(confidence) & (confidence >= 0)).all():
        raise DataError(f"{path}: confidence: expected numbers of 0 or more in every row")
    return label, confidence
