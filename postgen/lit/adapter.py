"""An adapter: what a conversion and its training added to a transformer, in one small file beside the stock model.

A safetensors file with the new layers and those weights of converted attention modules that were trained; its metadata
hold the settings of the conversion and the config of the model that it is for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgen.assets import EMBEDDED, embedded_lit
from postgen.errors import UserError, shown
from postgen.families.own_format import without_note
from postgen.files import check_place, replacing
from postgen.lit.config import LiTConfig
from postgen.reading import check_name
from postgen.tensor_files import opened

if TYPE_CHECKING:
    import torch
    from torch import nn

    from postgen.families.loading import ModelFacts
    from postgen.lit.report import Report

FORMAT = "postgen.lit.adapter"
"""What the metadata of such a file say that it is."""
ADAPTER = "adapter.safetensors"
"""Name of the file in a folder."""
_WRAPPED = "base_layer"
"""Name that an adapter of peft gives to the layer that it is around."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What an adapter's file says of itself."""

    path: Path
    """The file."""
    transformer: str
    """Class name of the model."""
    base: Mapping[str, Any]
    """Config of the model."""
    config: LiTConfig
    """Settings of the conversion."""

    def check(self, transformer: str | None, config: Mapping[str, Any]) -> None:
        """Hold it to a model.

        Args:
            transformer: class name; None is a pipeline without one.
            config: of the model; what only one of the two says is not compared.

        Raises:
            UserError: it is for another one.
        """
        if transformer != self.transformer:
            raise UserError(f"the adapter {self.path} is for a {self.transformer}, this model has a {transformer}")
        for name, value in without_note(config).items():
            if name.startswith("_") or name not in self.base:
                continue
            theirs, ours = (json.loads(json.dumps(each, default=str)) for each in (self.base[name], value))
            if theirs != ours:
                raise UserError(
                    f"the adapter {self.path} is for another {transformer}: its {name} is {shown(theirs)}, here it is"
                    f" {shown(ours)}"
                )

    def empty(self) -> nn.Module:
        """Build the converted transformer without memory for its weights."""
        import diffusers

        from postgen.lit.convert import convert
        from postgen.lit.saving import no_memory

        kind = getattr(diffusers, self.transformer)
        with no_memory():
            model: nn.Module = kind.from_config(dict(self.base))
            convert(model, dataclasses.replace(self.config, inherit="all"))
        return model


def adapter_file(named: str | Path) -> Path:
    """Return the file that a user names: a file, a folder with one, or `embedded`, that of the embedded model.

    Raises:
        UserError: there is none, or a name that no file can have.
    """
    if str(named) == EMBEDDED:
        return embedded_lit()
    check_name(str(named), "the adapter")
    path = Path(named).expanduser()
    return path / ADAPTER if path.is_dir() else path


def read_adapter(named: str | Path) -> Adapter:
    """Read what an adapter says of itself, without its weights.

    Raises:
        UserError: there is no such file, or it is none or a damaged one.
    """
    path = adapter_file(named)
    with opened(path, f"the adapter {named} cannot be read", framework="numpy") as content:
        said = content.metadata() or {}
    if said.get("format") != FORMAT:
        hint = ": a LoRA is given with --lora" if "lora" in path.name.lower() else ""
        raise UserError(f"{path} is no adapter of postgen.lit{hint}")
    try:
        base, config = json.loads(said["base"]), LiTConfig.from_json(json.loads(said["config"]))
        return Adapter(path=path, transformer=said["transformer"], base=dict(base), config=config)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"the adapter {path} is damaged: what it says of itself cannot be read ({error})") from error


def check_adapter(named: str | Path, facts: ModelFacts, size: tuple[int, int, int] | None = None) -> None:
    """Hold an adapter to a model, and its layers to a clip, before weights are read.

    Args:
        named: as of `adapter_file`.
        facts: of the model.
        size: frames, height and width of the clip in pixels, where they are known.

    Raises:
        UserError: as `read_adapter`, it is for another model, or layers are made for another grid and bound to it.
    """
    from postgen.families.model_folder import optional, small_files

    adapter = read_adapter(named)
    if facts.experts:
        raise UserError(f"the adapter {adapter.path} is for one network, and {facts.pipeline} here has two")
    folder = dict(facts.parts).get("transformer")
    found = small_files(facts.source)[0] / "transformer" if folder is None else Path(folder) / "transformer"
    adapter.check(facts.transformer, optional(found / "config.json"))
    if size is not None:
        from postgen.lit.clips import check_layers

        check_layers(adapter.empty(), *size)


def save_adapter(
    transformer: nn.Module, path: str | Path, *, base: nn.Module | None = None, dtype: torch.dtype | None = None
) -> int:
    """Write the adapter of a converted transformer; return its bytes.

    Args:
        transformer: converted.
        path: the file.
        base: the stock transformer; None says that every weight of it stayed as it was.
        dtype: of the file; None is float16, or bfloat16 where values are too large for that.

    Raises:
        UserError: it is not converted, weights outside of converted attention modules were trained, values that the
            dtype does not hold, or a place that cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    from postgen.lit.convert import conversion_of, the_transformer
    from postgen.lit.student import is_new

    place = Path(path)
    check_place(place, folder=False)
    conversion, model = conversion_of(transformer), the_transformer(transformer)
    state = dict(model.state_dict())
    kept = {name: value for name, value in state.items() if is_new(name)}
    modules = tuple(f"{each.module}." for each in conversion.converted)
    for name, value in ({} if base is None else base.state_dict()).items():
        ours = state.get(name)
        if ours is None or torch.equal(ours.cpu().float(), value.cpu().float()):
            continue
        if not name.startswith(modules):
            raise UserError(
                f"{name} was trained, and an adapter holds new layers and weights of their own attention modules:"
                " save the whole transformer (postgen.lit.save)"
            )
        kept[name] = ours
    tensors: dict[str, torch.Tensor] = {}
    for kind in [torch.float16, torch.bfloat16] if dtype is None else [dtype]:
        tensors = {
            name: value.detach().cpu().to(kind if value.is_floating_point() else value.dtype).contiguous()
            for name, value in kept.items()
        }
        if all(value.isfinite().all() for value in tensors.values()):
            break
    if wrong := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise UserError(f"{wrong[0]} has values that {kind} does not hold: give dtype=torch.bfloat16 or torch.float32")
    said = {"format": FORMAT, "transformer": type(model).__name__, "base": _config_of(model)}
    said["config"] = json.dumps(conversion.config.as_json(), sort_keys=True)
    with replacing(place) as part:
        save_file(tensors, part, metadata=said)
    return place.stat().st_size


def apply_adapter(transformer: Any, named: str | Path) -> Report:
    """Convert a stock transformer as an adapter says and give it the adapter's weights, in place.

    `postgen.lit.revert` gives the stock model back, bit by bit.

    Args:
        transformer: of the architecture that the adapter is for, or a pipeline with it.
        named: as of `adapter_file`.

    Returns:
        What was done, as a table.

    Raises:
        UserError: as `read_adapter` and `convert`, it is for another model, or damaged; nothing is changed then.
    """
    from postgen.lit.convert import convert, layers_of, revert, the_transformer
    from postgen.lit.student import give, is_new
    from postgen.tensor_files import read_tensors

    adapter, model = read_adapter(named), the_transformer(transformer)
    inner: Any = model
    adapter.check(type(model).__name__, inner.config)
    tensors = read_tensors(adapter.path, f"the adapter {named} cannot be read")
    if wrong := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise UserError(f"the adapter {adapter.path} is damaged: {wrong[0]} has values that are not finite")
    report = convert(model, adapter.config)
    try:
        new = {name for name in model.state_dict() if is_new(name)}
        if missing := sorted(new - tensors.keys()):
            raise UserError(f"the adapter {adapter.path} is damaged: it lacks {missing[0]}")
        layers = layers_of(model)
        before: dict[str, dict[str, torch.Tensor]] = {name: {} for name in layers}
        for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            module = next((module for module in layers if name.startswith(f"{module}.")), None)
            if module is not None and name in tensors and name not in new:
                before[module][name.removeprefix(f"{module}.")] = value
        give(model, tensors)
        for module, layer in layers.items():
            layer.before = before[module]
    except BaseException:
        revert(model)
        raise
    return report


def put_back(attention: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    """Give an attention module the weights that it had before an adapter came.

    Args:
        attention: perhaps with a LoRA around its projections meanwhile.
        before: by their names at that time.
    """
    from torch import nn

    for name, value in before.items():
        owner, _, key = name.rpartition(".")
        module = attention.get_submodule(owner)
        module = getattr(module, _WRAPPED, module)
        now = getattr(module, key)
        value = value.to(now.device, now.dtype)
        setattr(module, key, nn.Parameter(value, requires_grad=now.requires_grad))


def _config_of(model: Any) -> str:
    config = {name: value for name, value in without_note(model.config).items() if not name.startswith("_")}
    return json.dumps(config, sort_keys=True, default=str)
