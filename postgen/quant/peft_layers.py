"""LoRA layers of peft around quantised layers. They refuse what would read or change the codes like numbers.

peft chooses the class of its layers itself, and every way into peft (`add_adapter`, `load_lora_weights`,
`get_peft_model`) makes the layer by giving it the quantised layer as its `base_layer`. There it becomes a
`QuantizedLora`.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer

from postgen.errors import UserError

STARTS = ("gaussian", "eva")
"""Values of `init_lora_weights` that need no weights, beside True and False."""


class QuantizedLora(Linear):
    """The LoRA of a quantised layer. peft would add it to the codes, and compute DoRA with the norms of the codes."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to add adapters to the weight.

        Raises:
            UserError: always.
        """
        raise UserError(cannot_merge("layer"))

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            UserError: the adapter is not plain LoRA, or begins with a decomposition of the weight.
        """
        config = kwargs.get("config")
        said = {name: kwargs.get(name, getattr(config, name, None)) for name in ("use_dora", "init_lora_weights")}
        if said["use_dora"]:
            raise UserError(
                "DoRA needs the weights of a layer, and those of a quantised layer are codes: use plain LoRA"
            )
        start = said["init_lora_weights"]
        if isinstance(start, str) and start.lower() not in STARTS:
            raise UserError(
                f"init_lora_weights={start!r} needs the weights of a layer, and those of a quantised layer are codes:"
                f" use True or {' or '.join(map(repr, STARTS))}"
            )
        super().update_layer(adapter_name, *args, **kwargs)


def wrap(layer: Any) -> None:
    """Make a LoRA layer of peft, which gets a quantised layer as its base, a `QuantizedLora`.

    Layers of other methods of peft only refuse to merge.
    """
    if type(layer) is Linear:
        layer.__class__ = QuantizedLora
    elif isinstance(layer, BaseTunerLayer):
        vars(layer)["merge"] = refuse_merge


def refuse_merge(safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Refuse to add adapters to the weight, in place of the method `merge`.

    Raises:
        UserError: always.
    """
    raise UserError("the weights of this layer are quantised, so this adapter cannot be merged into them: leave it on")


def cannot_merge(what: str) -> str:
    """Return the message for a call that adds a LoRA to the weights of something quantised."""
    return (
        f"the weights of this {what} are quantised, so a LoRA cannot be added to them: call"
        " postgen.quant.merge_lora_(model), which rounds the sums, or leave the LoRA on (set_adapters sets its scale)"
    )
