"""Sessions from files and back: importers and dataset folders (no torch, no Ray)."""

from ssl2rl_ray.data.commands import (
    import_cryorl_command,
    import_synthetic_command,
    read_calibration,
)
from ssl2rl_ray.data.cryorl import CryorlSession, import_cryorl, parse_cryorl, read_cryorl
from ssl2rl_ray.data.folder import Dataset, read_dataset, write_dataset
from ssl2rl_ray.data.images import HoleImages, read_image_folder
from ssl2rl_ray.data.text import DataError, RejectedRow

__all__ = [
    "CryorlSession",
    "DataError",
    "Dataset",
    "HoleImages",
    "RejectedRow",
    "import_cryorl",
    "import_cryorl_command",
    "import_synthetic_command",
    "parse_cryorl",
    "read_calibration",
    "read_cryorl",
    "read_dataset",
    "read_image_folder",
    "write_dataset",
]
