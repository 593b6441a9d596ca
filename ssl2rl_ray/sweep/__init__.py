"""Many runs of one config: a sweep file -> trials -> run directories, side by side on Ray Tune.

    base   a config of any kind: in place, or the path of another YAML file, relative to this one
           (of a sweep, its base), or a list of these, each laid over those before it
    space  dotted name -> list of values; the trials are all their combinations. A value may be a
           section: its fields are laid over those of base, one choice of several settings. The
           name ``.`` is the whole base: sections with a ``name`` for the folders. Searches draw
           from distributions: {uniform: [a, b]}, {loguniform: [a, b]}, {randint: [a, b]}, with
           both ends, {choice: [values]}
    tune   ``TuneConfig``: what a trial may use, how many run at once, which points are tried, and
           which trials end early

A trial is a run directory ``OUT/<what it varies>/``, made by the same function as ``ssl2rl run``.
Those directories are the whole truth about a sweep: a resumed one asks them what is left to do.
Tune only hands out the places.
"""

from ssl2rl_ray.sweep.file import Sweep, TuneConfig, load_sweep, read_sweep
from ssl2rl_ray.sweep.folder import trial_status
from ssl2rl_ray.sweep.plan import plan
from ssl2rl_ray.sweep.room import Need, Room, find_room, need_of, num_concurrent
from ssl2rl_ray.sweep.trials import Event, run_sweep

__all__ = [
    "Event",
    "Need",
    "Room",
    "Sweep",
    "TuneConfig",
    "find_room",
    "load_sweep",
    "need_of",
    "num_concurrent",
    "plan",
    "read_sweep",
    "run_sweep",
    "trial_status",
]
