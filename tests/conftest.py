"""What several tests share: few threads, and dataset folders made once."""

import os

# Before numpy and torch are imported: tests run side by side, one thread each.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


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
