"""What every trainer shares: configuration, loop, checkpoints, averaged weights, logs, recipes."""

from .config import TrainingConfig
from .recipe import METHODS, load_recipe
from .run_state import Weights
from .stop import Reason, TrainResult
from .trainer import Trainer

__all__ = ["METHODS", "Reason", "TrainResult", "Trainer", "TrainingConfig", "Weights", "load_recipe"]
