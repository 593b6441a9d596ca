"""States as files that hold tensors, numbers and strings, nothing that is unpickled."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a run saved in a checkpoint folder; raises ValueError where it is damaged."""
    try:
        return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(
            f"{checkpoint} is damaged ({reason}): remove that folder and resume again, from the "
            "checkpoint before it"
        ) from error


def write_state(state: dict[str, Any], checkpoint: Path) -> None:
    """What ``read_state`` reads, into a checkpoint folder."""
    stream = io.BytesIO()  # torch tells a full disk as a bug of its own
    torch.save(state, stream)
    (checkpoint / "state.pt").write_bytes(stream.getbuffer())


def to_tensors(state: Any) -> Any:
    """Nested values with arrays as tensors: ``torch.load(weights_only=True)`` reads them back."""
    return _map_arrays(state, np.ndarray, torch.from_numpy)


def to_arrays(state: Any) -> Any:
    """The opposite of ``to_tensors``; copies, because an optimiser writes into what it is given."""
    return _map_arrays(state, torch.Tensor, lambda value: value.numpy().copy())


def check_same_network(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raises ValueError where weights by name differ in their names or shapes."""
    shapes = [{k: np.shape(v) for k, v in weights.items()} for weights in (here, there)]
    if shapes[0] != shapes[1]:
        differing = sorted({k for k, _ in set(shapes[0].items()) ^ set(shapes[1].items())})
        raise ValueError(
            f"checkpoint is of another network: {differing[:4]} differ; resume with the "
            "config that the run was started with"
        )


def weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    """16 hex digits of SHA-256 over names and values: two runs with one seed have the same."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _map_arrays(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _map_arrays(item, kind, convert) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_arrays(item, kind, convert) for item in value)
    return value
