"""Sessions from files and back: importers and dataset folders (no torch, no Ray)."""

from ssl2rl_ray.data.cryorl import CryorlSession, import_cryorl, parse_cryorl, read_cryorl
from ssl2rl_ray.data.text import DataError, RejectedRow

__all__ = [
    "CryorlSession",
    "DataError",
    "RejectedRow",
    "import_cryorl",
    "parse_cryorl",
    "read_cryorl",
]
