"""The parts that all trainers share: configuration, training loop, checkpoints, averaged weights, logs, recipes.

Public names are imported on first use. The app reads logs and checkpoints without training, and must start quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainingConfig as TrainingConfig
    from .recipe import METHODS as METHODS
    from .recipe import load_recipe as load_recipe
    from .run_state import Weights as Weights
    from .stop import Reason as Reason
    from .stop import TrainResult as TrainResult
    from .trainer import Trainer as Trainer

_HOMES = {
    "METHODS": "recipe",
    "Reason": "stop",
    "TrainResult": "stop",
    "Trainer": "trainer",
    "TrainingConfig": "config",
    "Weights": "run_state",
    "load_recipe": "recipe",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first access."""
    if name not in _HOMES:
        raise AttributeError(f"module 'postgen.training' has no attribute {name!r}")
    value = getattr(import_module(f"postgen.training.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
