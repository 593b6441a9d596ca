"""``python -m ssl2rl_ray``: the command line where the entry point is not on the path."""

import sys

from ssl2rl_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
