"""The transformers of a model without weights, from its small files: names and shapes of layers before loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError, first_line, shown
from postgen.families.loading import ModelFacts
from postgen.families.model_folder import small_files
from postgen.families.own_format import empty_noted
from postgen.reading import read_json

if TYPE_CHECKING:
    from torch import nn


def transformer_configs(facts: ModelFacts) -> dict[str, dict[str, Any]]:
    """Return the configs of a model's transformers, by the name of the component; weights are not read.

    Args:
        facts: the facts of the model, from `inspect_model`.
    """
    places = {"": facts.source, **{name: place for name, place in facts.parts if name.startswith("transformer")}}
    found: dict[str, dict[str, Any]] = {}
    for name, place in places.items():
        folder, _ = small_files(place)
        for path in sorted(folder.glob(f"{name or 'transformer*'}/config.json")):
            config = read_json(path, f"cannot read {path}")
            found[path.parent.name] = config if isinstance(config, dict) else {}
    return found


def empty_transformer(config: Mapping[str, Any]) -> nn.Module:
    """Build a transformer from its config, with weights on the meta device, which take no memory.

    Raises:
        UserError: see `network_from`; or this version lacks the package that the config's note names.
    """
    import torch

    if (noted := empty_noted(config)) is not None:
        made: nn.Module = noted
        return made
    with torch.device("meta"):
        return network_from(config)


def network_from(config: Mapping[str, Any]) -> nn.Module:
    """Build a network of diffusers from its config, with new weights on torch's default device.

    Raises:
        UserError: the installed diffusers cannot build it.
    """
    import diffusers

    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if kind is None or not hasattr(kind, "from_config"):
        raise UserError(f"diffusers {diffusers.__version__} has no transformer {shown(name)}")
    try:
        found: nn.Module = kind.from_config(dict(config))
    except Exception as error:  # wrong values in a config can raise anything
        raise UserError(
            f"cannot create a {name} from its config.json ({type(error).__name__}: {first_line(error)}): the file is"
            " damaged, or another version of diffusers wrote it"
        ) from error
    return found
