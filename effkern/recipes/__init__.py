"""Training runs ready to start: ``effkern train NAME``, one folder each, with its configurations as files.

A folder has a module with ``Config`` (a dataclass) and ``phases(config, data, outcome)``, which puts networks and
methods together, and its ``*.toml``. Adding a run is adding a folder.
"""

from effkern.recipes._runner import Phase, RecipeError, config_path, names, run_recipe
from effkern.recipes._shared import DataConfig, NetworkConfig, RunConfig

__all__ = ["DataConfig", "NetworkConfig", "Phase", "RecipeError", "RunConfig", "config_path", "names", "run_recipe"]
