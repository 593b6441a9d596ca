"""Whatever a program called indexamajig does, the adapter ends in a result or a clear error.

Run: ``python benchmarks/sfx_adapter_fuzz.py [--runs 10000]`` (about 20 ms a run, Linux). Each run
calls a stand-in, a shell script, that leaves damaged files (a true stream, log and harvest file
with bytes flipped, cut, doubled or mixed up), ends with some status or by some signal, and in
one run of four leaves a process behind that would live for an hour, and files in its folder.
Counted are exceptions that are no IndexerError (crashes), processes and folders that are left, and
results whose frames are not those asked for. Bar: all 0.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import stat
import tempfile
import time
import traceback
import uuid
from pathlib import Path

import numpy as np

from envs.crystfel.experiment import read_experiment
from envs.crystfel.indexamajig import Indexamajig
from envs.crystfel.indexer import IndexerError
from envs.crystfel.types import Parameters

MARK = "SFX_ADAPTER_FUZZ"
NUM_FRAMES = 5
STANDIN = """#!/bin/sh
here=$(dirname "$0")
for a in "$@"; do case "$a" in
  --version) echo "CrystFEL: 0.12.0"; exit 0;;
  --output=*) out=${a#--output=};;
  --harvest-file=*) harvest=${a#--harvest-file=};;
  --temp-dir=*) dir=${a#--temp-dir=};;
esac; done
. "$here/deeds"
"""
GEOMETRY = """photon_energy = 9300 eV
clen = 0.120 m
res = 10000
p0/min_fs = 0
p0/max_fs = 511
p0/min_ss = 0
p0/max_ss = 511
p0/corner_x = -256
p0/corner_y = -256
"""
CELL = """CrystFEL unit cell file version 1.0

lattice_type = tetragonal
centering = P
unique_axis = c
a = 79.2 A
b = 79.2 A
c = 38.0 A
al = 90 deg
be = 90 deg
ga = 90 deg
"""
CHUNK = """----- Begin chunk -----
Image filename: {path}
Event: //{n}
Image serial number: {serial}
hit = 1
indexed_by = asdf
n_indexing_tries = 1
photon_energy_eV = 9300.000000
beam_divergence = 0.00e+00 rad
beam_bandwidth = 1.00e-08 (fraction)
average_camera_length = 0.120000 m
num_peaks = 2
peak_resolution = 1.875034 nm^-1 or 5.333237 A
Peaks from peak search
  fs/px   ss/px (1/d)/nm^-1   Intensity  Panel
  21.00   21.01       2.00     1206.28   p0
  61.00   21.00       1.84     1202.71   p0
End of peak list
--- Begin crystal
Cell parameters 7.92460 7.92460 3.79908 nm, 90.00000 90.00000 90.00000 deg
astar = -0.0476995 -0.0568604 -0.1020558 nm^-1
bstar = -0.0702827 +0.1020218 -0.0239922 nm^-1
cstar = +0.1946609 +0.0996493 -0.1465014 nm^-1
lattice_type = tetragonal
centering = P
unique_axis = c
profile_radius = 0.00559 nm^-1
predict_refine/final_residual = 9.476787 (3.129942 3.382501 2.964344)
predict_refine/det_shift x = 0.000 y = 0.000 mm
No integrated reflections.
--- End crystal
----- End chunk -----
"""
FINAL = (
    "Final: {n} images processed, {n} hits (100.0%), {n} indexable (100.0% of hits, "
    "100.0% overall), {n} crystals.\n"
)
HARVEST = b"""{"peaksearch": {"min_snr": 5, "threshold_adu": 20, "min_pixel_count": 2,
"max_pixel_count": 200, "local_bg_radius_px": 3, "min_res_px": 0, "max_res_px": 1200},
"hitfinding": {"min_num_peaks": 2}}"""
WORDS = (
    b"----- Begin chunk -----\n", b"----- End chunk -----\n", b"--- Begin crystal\n", b"nan",
    b"--- End crystal\n", b"1e999", b"99999999999999999999", b"\0", b"\xff\xfe", b"//", b"-1",
    b"hit = 1\n", b"[" * 5000, b"Peaks from peak search\n", b"End of peak list\n", b"inf",
    b"astar = 0 0 0 nm^-1\n", b"compiled without ", b"Final: ",
)  # fmt: skip


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one to four accidents."""
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        a, b = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        match rng.integers(7):
            case 0:
                data = data[:a]
            case 1:
                data = data[:a] + rng.bytes(int(rng.integers(1, 9))) + data[a:]
            case 2:
                data = data[:a] + data[b:]
            case 3:
                data = data[:b] + data[a:]
            case 4:
                data = data[:a] + WORDS[rng.integers(len(WORDS))] + data[a:]
            case 5:
                lines = data.splitlines(keepends=True)
                data = b"".join(lines[i] for i in rng.permutation(len(lines)))
            case 6:
                numbers = list(re.finditer(rb"[0-9.]+", data))
                if numbers:
                    at = numbers[rng.integers(len(numbers))]
                    word = WORDS[rng.integers(len(WORDS))]
                    data = data[: at.start()] + word + data[at.end() :]
    return data


def deeds(rng: np.random.Generator) -> str:
    """What the stand-in does: shell."""
    lines = []
    if rng.random() < 0.25:
        lines += ["sleep 3600 & mkdir -p $dir/indexamajig.$$/worker.0; echo x > $dir/left"]
    if rng.random() < 0.97:
        lines += ['cat "$here/stream" > "$out"']
    if rng.random() < 0.9:
        lines += ['cat "$here/harvest" > "$harvest"']
    lines += ['cat "$here/log"', 'cat "$here/words" >&2']
    if rng.random() < 0.01:
        lines += ["sleep 3600"]
    elif rng.random() < 0.05:
        lines += [f"kill -{rng.choice(['SEGV', 'KILL', 'TERM', 'ABRT', 'INT'])} $$"]
    code = int(rng.choice([0, 0, 0, 0, 0, 0, 0, 0, 1, 5, 64, 77, 255]))
    return "\n".join([*lines, f"exit {code}", ""])


def left_processes() -> list[int]:
    """Processes with our mark in their environment, this one apart."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = MARK.encode() in (folder / "environ").read_bytes()
        except OSError:
            continue
        if is_ours and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    os.environ[MARK] = uuid.uuid4().hex
    ends: collections.Counter[str] = collections.Counter()
    crashes = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        home, scratch = Path(folder) / "home", Path(folder) / "scratch"
        home.mkdir(), scratch.mkdir()
        (home / "experiment.geom").write_text(GEOMETRY)
        (home / "reference.cell").write_text(CELL)
        (home / "frames.lst").write_text("".join(f"run.h5 //{n}\n" for n in range(NUM_FRAMES)))
        program = home / "indexamajig"
        program.write_text(STANDIN)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        experiment = read_experiment(home)
        path = experiment.frames[0].path
        stream = (
            "CrystFEL stream format 2.3\nGenerated by CrystFEL 0.12.0\n----- Begin geometry file "
            f"-----\n{GEOMETRY}----- End geometry file -----\n----- Begin unit cell -----\n{CELL}"
            "----- End unit cell -----\n"
        ) + "".join(CHUNK.format(path=path, n=n, serial=n + 1) for n in range(NUM_FRAMES))
        final = FINAL.format(n=NUM_FRAMES)
        adapter = Indexamajig(
            experiment=experiment, executable=str(program), scratch=str(scratch), start_s=2.0,
            frame_s=0.0,
        )  # fmt: skip
        parameters = Parameters(min_peaks=2)
        begin = time.monotonic()
        for number in range(args.runs):
            parts = {"stream": stream.encode(), "log": b"", "words": final.encode()}
            parts["harvest"] = HARVEST
            victims = ("stream", "stream", "stream", "log", "words", "harvest")
            chosen = {victims[i] for i in rng.integers(0, len(victims), rng.integers(0, 3))}
            for name, data in parts.items():
                (home / name).write_bytes(damaged(data, rng) if name in chosen else data)
            (home / "deeds").write_text("exit 0\n" if number == 0 else deeds(rng))
            try:
                result = adapter.run(parameters, experiment.frames)
            except IndexerError as error:
                ends[re.sub(r"[0-9]+|'.*", "#", str(error).splitlines()[0])[:44]] += 1
                continue
            except Exception:
                crashes += 1
                traceback.print_exc()
                continue
            ends["a result"] += 1
            wrong += result.num_frames != NUM_FRAMES or result.num_hits > NUM_FRAMES
        seconds = time.monotonic() - begin
        left = left_processes()
        folders = list(scratch.iterdir())
    print(f"{args.runs} runs in {seconds:.0f} s, {1e3 * seconds / args.runs:.0f} ms each")
    for end, count in ends.most_common(25):
        print(f"{count:7d}  {end}")
    print(
        f"crashes {crashes}, wrong results {wrong}, left processes {len(left)}, "
        f"left folders {len(folders)} (bar: all 0)"
    )


if __name__ == "__main__":
    main()
