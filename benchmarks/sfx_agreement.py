"""Does the embedded pipeline index the frames that real CrystFEL indexes?

Run: ``python benchmarks/sfx_agreement.py [--data DIR] [--memo DIR]`` with ``indexamajig`` 0.11 or
newer on PATH (about 25 minutes on one core, nearly all the real program's, whose results ``--memo``
keeps for a rerun). Both index the same HDF5 frames at 30 settings: each knob alone, from where
nothing is found to where little is, and some together. Agreement is the fraction of frames on which
both say indexed, or both not; chance agreement is not subtracted, so a table of both counts stands
beside it. A lattice of the embedded pipeline is wrong where it is more than 2 degrees from every
crystal that the simulation put into the frame, or where there is none.

Bars: mean per-frame agreement 93 %, counts correlate at 0.95, no more than 0.5 % wrong lattices.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from envs.crystfel.experiment import TRUTH_FILE, Experiment, read_experiment
from envs.crystfel.indexamajig import Indexamajig
from envs.crystfel.indexer import Indexer, Memo
from envs.crystfel.sfx.index import KnownCell, misorientation_deg
from envs.crystfel.sfx.pipeline import EmbeddedIndexer
from envs.crystfel.sfx.simulate import simulate
from envs.crystfel.types import Frame, Parameters

WRONG_DEG = 2.0
SETTINGS: tuple[dict[str, float], ...] = (
    {},
    *({"clen_offset_percent": value} for value in (-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0)),
    *({"centre_x_offset_px": value} for value in (-1.0, 1.0, 2.0)),
    {"centre_y_offset_px": 1.5},
    *({"min_snr": value} for value in (5.5, 6.0, 7.0, 8.0, 10.0)),
    {"min_peaks": 30},
    {"min_peaks": 50},
    {"min_pix_count": 3},
    {"min_pix_count": 4},
    {"threshold_adu": 40.0},
    {"threshold_adu": 80.0},
    {"min_snr": 4.5, "min_pix_count": 3},
    {"min_snr": 6.0, "threshold_adu": 10.0, "clen_offset_percent": 1.5},
    {"min_snr": 9.0, "min_peaks": 25, "clen_offset_percent": 3.0},
    {"min_snr": 4.5},
    {"min_snr": 4.0},
    {"min_pix_count": 1},
)  # the slowest of the real program last


def wrong_lattices(
    embedded: EmbeddedIndexer, experiment: Experiment, parameters: Parameters, frames: list[Frame]
) -> tuple[int, int]:
    """How many lattices are wrong, and how many there are."""
    cell = KnownCell(experiment.cell)
    with np.load(experiment.folder / TRUTH_FILE) as truth:
        owner, reciprocal = truth["crystal_frame"], truth["reciprocal_per_A"]
    number = {frame: i for i, frame in enumerate(experiment.frames)}
    wrong = found = 0
    for frame, (_, crystal) in zip(frames, embedded.crystals(parameters, frames), strict=True):
        if crystal is None:
            continue
        found += 1
        true = [np.linalg.inv(r).T for r in reciprocal[owner == number[frame]]]
        away = [misorientation_deg(crystal.basis_A, basis, cell) for basis in true]
        wrong += min(away, default=180.0) > WRONG_DEG
    return wrong, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="a simulated folder; default: simulate one")
    parser.add_argument("--preset", default="lysozyme")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument(
        "--settings", type=int, default=len(SETTINGS), help="only the first so many"
    )
    parser.add_argument("--memo", help="folder that keeps the real program's results for a rerun")
    parser.add_argument("--json", help="write all per-frame results there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.data or f"{scratch}/data")
        if not args.data:
            simulate(args.preset, args.frames, args.seed, folder)
        experiment = read_experiment(folder)
        frames = list(experiment.frames[: args.frames])
        real: Indexer = Indexamajig(experiment=experiment)
        if args.memo:
            real = Memo(real, args.memo)
        embedded = EmbeddedIndexer(experiment)
        print(f"{real.version}\n{embedded.version}\n{len(frames)} frames of {folder.name}\n")
        print(
            f"{'setting':58s} real  emb  agree  only-real only-emb  wrong   peaks-r   cpu-s  cpu-s"
        )
        rows, log = [], []
        for changes in SETTINGS[: args.settings]:
            parameters = experiment.nominal.replace(**changes)
            theirs = real.run(parameters, frames)
            begin = time.process_time()
            ours = embedded.run(parameters, frames)
            cpu_s = time.process_time() - begin
            wrong, found = wrong_lattices(embedded, experiment, parameters, frames)
            agree = float((ours.is_indexed == theirs.is_indexed).mean())
            only = [int((a & ~b).sum()) for a, b in (
                (theirs.is_indexed, ours.is_indexed), (ours.is_indexed, theirs.is_indexed)
            )]  # fmt: skip
            peaks = [theirs.num_peaks, ours.num_peaks]
            r = np.corrcoef(*peaks)[0, 1] if all(np.ptp(p) for p in peaks) else float("nan")
            rows.append((theirs.num_indexed, ours.num_indexed, agree, wrong, found))
            log.append(
                {"changes": changes}
                | {f"real_{k}": getattr(theirs, k).tolist() for k in ("is_indexed", "num_peaks")}
                | {f"embedded_{k}": getattr(ours, k).tolist() for k in ("is_indexed", "num_peaks")}
                | {"cell_ratio": [theirs.cell_ratio, ours.cell_ratio]}
                | {"residual_px": [theirs.residual_px, ours.residual_px]}
                | {"spot_shift_px": [theirs.spot_shift_px.tolist(), ours.spot_shift_px.tolist()]}
            )
            name = ", ".join(f"{k} {v:g}" for k, v in changes.items()) or "nominal"
            print(
                f"{name:58s} {theirs.num_indexed:4d} {ours.num_indexed:4d}  {100 * agree:5.1f}"
                f"  {only[0]:9d} {only[1]:8d}  {wrong:2d}/{found:<3d} {r:7.4f}"
                f"  {theirs.cpu_s:8.1f} {cpu_s:7.1f}",
                flush=True,
            )
            if args.json:
                Path(args.json).write_text(json.dumps(log))
        table = np.array(rows, dtype=float)
        r = np.corrcoef(table[:, 0], table[:, 1])[0, 1]
        print(
            f"\nmean per-frame agreement {100 * table[:, 2].mean():.1f} % (bar 93)\n"
            f"counts correlate at {r:.3f} (bar 0.95)\n"
            f"wrong lattices {table[:, 3].sum():.0f} of {table[:, 4].sum():.0f}: "
            f"{100 * table[:, 3].sum() / max(table[:, 4].sum(), 1):.2f} % (bar 0.5)"
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
