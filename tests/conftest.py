"""What several tests share: few threads, and dataset folders made once."""

import os

# Before numpy and torch are imported: tests run side by side, one thread each.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import re  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Within a Ray that lives as long as a file of tests, its own warnings are not ours to mend."""
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"))
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray with four CPUs, whose workers can import what lies beside the tests."""
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            "local",  # not any cluster that is found on this machine
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset folder of a small synthetic session."""
    from ssl2rl_ray.data.commands import import_synthetic_command

    folder = tmp_path_factory.mktemp("data") / "demo"
    import_synthetic_command("demo", 3, folder)
    return folder


@pytest.fixture(scope="session")
def aldolase_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset folder of the real training session; skips where its files are not at hand."""
    from ssl2rl_ray.data.commands import import_cryorl_command

    source = Path(__file__).parents[1].parent / "shared" / "data" / "aldolase"
    if not source.is_dir():
        pytest.skip("the Aldolase session is not beside this repository")
    folder = tmp_path_factory.mktemp("data") / "aldolase"
    import_cryorl_command(
        source / "labels.csv",
        source / "predictions_resnet50.txt",
        source / "hierarchy.csv",
        source / "timestamps.csv",
        folder,
    )
    return folder


@pytest.fixture
def loaded_by() -> Callable[..., list[str]]:
    """Which of torch and Ray a command imports, in a process of its own."""

    def loaded(*words: str) -> list[str]:
        code = (
            "import sys; from ssl2rl_ray.cli import main; code = main(sys.argv[1:]); "
            "print('loaded:', *sorted({'torch', 'ray'} & set(sys.modules))); sys.exit(code)"
        )
        root = Path(__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()[-1].removeprefix("loaded:").split()

    return loaded


@pytest.fixture
def page_widths(tmp_path: Path) -> Callable[[Path, int], tuple[int, int]]:
    """Widths, in px, of a page's content and of its window in a real browser; skips without one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser here ({', '.join(names)}): the page is not looked at")

    def look(page: Path, width: int) -> tuple[int, int]:
        probe = (
            "<script>document.title = [document.documentElement.scrollWidth, innerWidth]</script>"
        )
        probed = page.with_name(f"probed-{width}.html")
        probed.write_text(page.read_text().replace("</body>", probe + "</body>"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu"]
        flags += [f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},900"]
        done = subprocess.run(
            [browser, *flags, "--dump-dom", probed.as_uri()],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        found = re.search(r"<title>(\d+),(\d+)</title>", done.stdout)
        assert found, done.stdout[:500]
        return int(found[1]), int(found[2])

    return look
