"""Methods that one model has in place of those of its class."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any

from torch import nn


class OwnMethod(ABC):
    """A method of one model. It does not keep the model alive, and a copy of the model gets its own."""

    def __init__(self, model: nn.Module, *values: Any) -> None:
        """Make the method.

        Args:
            model: the model.
            *values: what else the method knows; copies share it.
        """
        self._model, self.values = weakref.ref(model), values

    @property
    def model(self) -> Any:
        """The model."""
        found = self._model()
        assert found is not None, "the model of this method is gone"
        return found

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnMethod:
        model = self.model
        return type(self)(memo.get(id(model), model), *self.values)

    def __reduce__(self) -> Any:
        return type(self), (self.model, *self.values)
