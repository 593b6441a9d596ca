"""The real TensorBoard page of some runs as a picture: headless Chromium, nothing else.

    python benchmarks/tensorboard_page.py runs/side-by-side --out page.png --tags criterion

``--tab`` is one of TensorBoard's own (``timeseries``, ``scalars``, ``hparams``, ``custom_scalars``,
``images``, ``text``). The server listens on the loopback only and ends with the picture.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
START_S = 120


@contextmanager
def served(logdir: Path) -> Iterator[str]:
    """TensorBoard on a free port of the loopback, once it has read the runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--logdir", str(logdir), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"{address}/data/runs", timeout=10) as answer:
                    if answer.read().strip() != b"[]":
                        break
            except (urllib.error.URLError, OSError):
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"TensorBoard shows no runs of {logdir}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def page(address: str, tab: str, query: dict[str, str]) -> str:
    """The page's address: what is filtered, coloured and smoothed stands in it."""
    return f"{address}/?{urllib.parse.urlencode(query)}#{tab}"


def picture(url: str, out: Path, size: tuple[int, int]) -> None:
    """What a browser's window shows of it."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no browser here ({', '.join(BROWSERS)})")
    with tempfile.TemporaryDirectory() as own:
        flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"]
        flags += [f"--user-data-dir={own}", f"--window-size={size[0]},{size[1]}"]
        flags += ["--virtual-time-budget=60000", f"--screenshot={out.resolve()}", url]
        subprocess.run([browser, *flags], check=True, capture_output=True, timeout=300)
    Image.open(out).convert("RGB").quantize(200).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logdir", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--tab", default="timeseries")
    parser.add_argument("--tags", default="", help="regular expression")
    parser.add_argument("--runs", default="", help="regular expression")
    parser.add_argument("--colours", default="", help="expression whose groups share a colour")
    parser.add_argument("--size", default="1600x1000", metavar="WxH")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    # without a GPU, curves drawn by WebGL in a worker come too late for the picture
    query = {"forceSVG": "true", "tagFilter": args.tags, "runFilter": args.runs, "smoothing": "0"}
    if args.colours:
        query["runColorGroup"] = f"regex:{args.colours}"
    with served(args.logdir) as address:
        picture(page(address, args.tab, query), args.out, (width, height))
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
