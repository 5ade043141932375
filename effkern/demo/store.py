"""Finished stages on disk, so that an interrupted demo goes on where it stopped.

A stage is ``<stage>.json`` with its rows and a fingerprint of what made it, and ``<stage>.<name>.safetensors`` for each
state dict. The JSON is written last and names the hashes of the others: a stage without it never finished.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from effkern.training import CheckpointError, load_json, save_json, save_weights

from .context import Row, StageResult

__all__ = ["StageStore", "code_fingerprint"]

FORMAT = 1


def code_fingerprint() -> str:
    """Hash of the installed package, libraries included: results of different code are never mixed in one report."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for suffix in ("*.py", "*.so") for path in root.rglob(suffix)):
        digest.update(f"{path.relative_to(root)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


class StageStore:
    """The folder ``stages/`` of a run.

    Args:
        folder: of the run.
        config: whatever changes a result: seed, threads, data, machine, code. A stored stage with another one is void.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder / "stages"
        self.config = {"format": FORMAT, **config}

    def weights_path(self, stage: str, name: str) -> Path:
        """Where the state dict ``name`` of ``stage`` lies."""
        return self.folder / f"{stage}.{name}.safetensors"

    def save(self, stage: str, result: StageResult, seconds: float) -> None:
        """Store a finished stage; every file appears complete or not at all."""
        for name, state in result.state.items():
            save_weights(self.weights_path(stage, name), state)
        hashes = {name: self._hash(stage, name) for name in result.state}
        record = {"config": self.config, "weights": hashes, "seconds": round(seconds, 2), **result.plain()}
        save_json(self.folder / f"{stage}.json", record)

    def load(self, stage: str) -> dict[str, Any] | None:
        """The record of a finished stage, or None if there is none that fits this run.

        Rows are plain data here, checked to be :class:`Row`.
        """
        try:
            record = load_json(self.folder / f"{stage}.json")
            if record["config"] != self.config:
                return None
            if any(self._hash(stage, name) != wanted for name, wanted in record["weights"].items()):
                return None
            for row in record["rows"]:
                Row(**row)
            return record
        except (CheckpointError, OSError, KeyError, TypeError, AttributeError):
            return None  # missing, damaged or of another age: the stage is simply run again

    def drop(self, stage: str) -> None:
        """Forget a stage, its record first."""
        for path in (self.folder / f"{stage}.json", *sorted(self.folder.glob(f"{stage}.*.safetensors"))):
            path.unlink(missing_ok=True)

    def _hash(self, stage: str, name: str) -> str:
        return hashlib.sha256(self.weights_path(stage, name).read_bytes()).hexdigest()
