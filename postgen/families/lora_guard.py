"""Adapters of a model whose weights were rewritten without a change of its output (folds).

A LoRA that was made for the weights before must be changed when it is loaded, and one that was trained on the present
weights must not. The field `auto_mapping` of an adapter's `peft.LoraConfig`, which LoRA files contain and which peft
uses only for models of its own, tells which: `add_adapter` of a guarded model writes a mark of its weights there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from postgen.errors import UserError
from postgen.families.own_methods import OwnMethod

FIELD = "auto_mapping"
"""The field of `peft.LoraConfig`, an object with the mark."""
_KEY = "postgen_folds"
Change = Callable[[nn.Module, str], None]
"""(model, adapter name): changes the tensors of a loaded adapter that was made for the weights before."""
Mark = Callable[[nn.Module], str]
"""Model -> text that identifies its present weights; empty if they are those of the stock model."""


def guard_loras(model: nn.Module, change: Change, mark: Mark) -> None:
    """Make `load_lora_adapter` and `add_adapter` of a diffusers model know what its adapters were made for.

    The loaders of pipelines call these methods. Copies of the model are guarded too.

    Args:
        model: the model; nothing happens for a module without these methods.
        change: called for each adapter that is loaded without the mark of the present weights.
        mark: returns this mark.
    """
    known: Any = type(model)
    if hasattr(known, "load_lora_adapter") and hasattr(known, "add_adapter"):
        own: Any = model
        own.load_lora_adapter, own.add_adapter = _Load(model, change, mark), _Add(model, change, mark)


def is_guarded(model: nn.Module) -> bool:
    """Whether the weights of a model were rewritten, so that changes of single weights do not fit."""
    found = vars(model).get("load_lora_adapter")
    return isinstance(found, _Load) and bool(found.mark(model))


def check_mark(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Check that a LoRA that was trained on folded weights is loaded into a folded model.

    Args:
        model: the model.
        settings: settings of the LoRA, as in `peft.LoraConfig`.

    Raises:
        UserError: the model has no folds.
    """
    if (said := _said(settings.get(FIELD))) and not is_guarded(model):
        raise UserError(
            f"it was trained on the folded weights of a quantised model ({said}), which this {type(model).__name__}"
            " does not have: load the quantised model"
        )


def _said(field: object) -> str:
    """Return the mark in a field of a `peft.LoraConfig`; empty without one."""
    return str(field.get(_KEY, "")) if isinstance(field, Mapping) else ""


def _write(config: Any, mark: str) -> None:
    setattr(config, FIELD, {_KEY: mark})


class _Method(OwnMethod):
    @property
    def change(self) -> Change:
        found: Change = self.values[0]
        return found

    @property
    def mark(self) -> Mark:
        found: Mark = self.values[1]
        return found


class _Load(_Method):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, mark = self.model, self.mark(self.model)
        if mark and kwargs.get("hotswap"):
            raise UserError("hotswap cannot change a LoRA for the folded weights of this model: load it without")
        before = set(getattr(model, "peft_config", ()))
        found = type(model).load_lora_adapter(model, *args, **kwargs)
        for name in set(getattr(model, "peft_config", ())) - before if mark else ():
            try:
                self._fit(model, name, mark)
            except UserError:
                model.delete_adapters(name)
                raise
        return found

    def _fit(self, model: Any, name: str, mark: str) -> None:
        config = model.peft_config[name]
        said = _said(getattr(config, FIELD, None))
        if said == mark:
            return
        if said:
            raise UserError(
                f"this LoRA was trained on folded weights ({said}), and this model has others ({mark}): load the"
                " quantised model that it was trained on"
            )
        self.change(model, name)
        _write(config, mark)


class _Add(_Method):
    def __call__(self, adapter_config: Any, adapter_name: str = "default") -> Any:
        model = self.model
        found = type(model).add_adapter(model, adapter_config, adapter_name)
        if mark := self.mark(model):
            _write(model.peft_config[adapter_name], mark)
        return found
