"""What every trainer shares: configuration, loop, checkpoints, averaged weights, logs, recipes."""

from .config import TrainingConfig
from .recipe import METHODS, load_recipe
from .stop import Reason, TrainResult
from .trainer import Trainer

__all__ = ["METHODS", "Reason", "TrainResult", "Trainer", "TrainingConfig", "load_recipe"]
