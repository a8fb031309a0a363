"""An adapter: what a conversion and its training added to a transformer, in one small file beside the stock model.

A safetensors file with the new layers and those weights of converted attention modules that were trained; its metadata
hold the settings of the conversion and the config of the model that it is for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgen.assets import EMBEDDED, embedded_lit
from postgen.errors import UserError, shown
from postgen.families.own_format import read_note, without_note
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
        base, config = json.loads(said["base"]), json.loads(said["config"])
        if not base or not config or not all(isinstance(each, dict) for each in (base, config)):
            raise ValueError("no settings")
        return Adapter(path=path, transformer=said["transformer"], base=base, config=LiTConfig.from_json(config))
    except (KeyError, TypeError, ValueError, RecursionError, UserError) as error:
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
    from postgen.lit.convert import LOADER

    adapter = read_adapter(named)
    if facts.experts:
        raise UserError(f"the adapter {adapter.path} is for one network, and {facts.pipeline} here has two")
    folder = dict(facts.parts).get("transformer")
    found = small_files(facts.source)[0] / "transformer" if folder is None else Path(folder) / "transformer"
    config = optional(found / "config.json")
    adapter.check(facts.transformer, config)
    if read_note(config, LOADER) is not None:
        raise UserError(f"the adapter {adapter.path} is for a stock model, and {facts.source} is converted already")
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
        base: the stock transformer; None says that every weight of it stayed as it was, but for those that an applied
            adapter had replaced.
        dtype: of the file; None is float16, or bfloat16 where values are too large for that.

    Raises:
        UserError: it is not converted, a LoRA is attached or weights are offloaded, it is not made of this base,
            weights outside of converted attention modules were trained, values that are not finite or that the dtype
            does not hold, or a place that cannot be written.
    """
    from safetensors.torch import save_file

    from postgen.lit.convert import conversion_of, the_transformer

    place = Path(path)
    check_place(place, folder=False)
    conversion, model = conversion_of(transformer), the_transformer(transformer)
    tensors = _stored(_kept(model, None if base is None else the_transformer(base)), dtype)
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
    from postgen.lit.student import give
    from postgen.tensor_files import read_tensors

    adapter, model = read_adapter(named), the_transformer(transformer)
    inner: Any = model
    adapter.check(type(model).__name__, inner.config)
    # In memory of its own: in a file it begins anywhere, by which products on the CPU round.
    tensors = {
        name: value.clone()
        for name, value in read_tensors(adapter.path, f"the adapter {named} cannot be read").items()
    }
    if any(each.is_meta for each in model.parameters()):
        raise UserError(f"the weights of this {type(model).__name__} are offloaded: apply the adapter before that")
    report = convert(model, adapter.config)
    try:
        layers = layers_of(model)
        replaced = _checked(adapter.path, model, tensors)
        check_weights(model, replaced, "apply an adapter that replaces it")
        before: dict[str, dict[str, torch.Tensor]] = {name: {} for name in layers}
        for name in replaced:
            module = next(module for module in layers if name.startswith(f"{module}."))
            owner, _, key = name.rpartition(".")
            before[module][name.removeprefix(f"{module}.")] = getattr(model.get_submodule(owner), key)
        give(model, tensors)
        for module, layer in layers.items():
            layer.before = before[module]
    except BaseException:
        revert(model)
        raise
    return report


def check_weights(model: nn.Module, names: Collection[str], what: str) -> None:
    """See that weights of attention modules are where their names say, and that nobody computes with others.

    Args:
        model: a transformer.
        names: of the weights, without the wrappers of a LoRA.
        what: is to be done with them, for the error.

    Raises:
        UserError: somebody replaced their layer, merged a LoRA into them, fused them with others or offloaded them.
    """
    from postgen.families.linear import replaced_linears

    for owner, handle in replaced_linears(model).items():
        if taken := [name for name in names if name.rpartition(".")[0] in handle.modules]:
            raise UserError(f"cannot {what}: {owner} has replaced the layer of {taken[0]}. Take {owner} off before")
    modules = dict(model.named_modules())
    for name in names:
        owner, _, key = name.rpartition(".")
        module: Any = modules.get(owner)
        if getattr(module, "merged", False):
            raise UserError(f"cannot {what}: a LoRA is merged into {name}. Take it out before (unfuse_lora)")
        module = getattr(module, _WRAPPED, module)
        attention, _, projection = owner.rpartition(".")
        fused = projection in ("to_q", "to_k", "to_v") and getattr(modules[attention], "fused_projections", False)
        if fused or getattr(module, key, None) is None:
            raise UserError(
                f"cannot {what}: {name} is fused with other projections. Undo that before (unfuse_qkv_projections)"
            )
        if getattr(module, key).is_meta:
            raise UserError(f"cannot {what}: {name} is offloaded. Switch offloading off before")


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
        same = isinstance(now, nn.Parameter)
        setattr(module, key, nn.Parameter(value, requires_grad=now.requires_grad) if same else value)


def _kept(model: nn.Module, base: nn.Module | None) -> dict[str, torch.Tensor]:
    """Return what an adapter of a converted transformer holds, by name."""
    import torch

    from postgen.lit.convert import layers_of
    from postgen.lit.student import is_new

    state, layers = dict(model.state_dict()), layers_of(model)
    if any(f".{_WRAPPED}." in name for name in state):
        raise UserError("a LoRA is attached, which an adapter does not hold: take it off (unload_lora)")
    if any(value.is_meta for value in state.values()):
        raise UserError("weights are offloaded, so there is nothing to save: switch offloading off before")
    replaced = {f"{module}.{name}" for module, layer in layers.items() for name in layer.before}
    kept = {name: value for name, value in state.items() if is_new(name) or name in replaced}
    if base is None:
        return kept
    begun = {name.replace(".fresh.", ".") for name in state if ".fresh." in name}
    theirs = {name: value for name, value in base.state_dict().items() if name not in begun}
    ours = {name: value for name, value in state.items() if not is_new(name)}
    other = [name for name in {**ours, **theirs} if name not in ours or name not in theirs]
    if other := other or [name for name, value in theirs.items() if value.shape != ours[name].shape]:
        raise UserError(
            f"base is another model, with another {other[0]}: give the stock transformer that this one was converted"
            " from, without LoRA, both with fused projections or none"
        )
    for name, value in theirs.items():
        if torch.equal(ours[name].cpu().float(), value.cpu().float()):
            continue
        if not name.startswith(tuple(f"{module}." for module in layers)):
            raise UserError(
                f"{name} was trained, and an adapter holds new layers and weights of their own attention modules:"
                " save the whole transformer (postgen.lit.save)"
            )
        kept[name] = ours[name]
    return kept


def _stored(kept: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return tensors as the file has them."""
    import torch

    if wrong := [name for name, value in kept.items() if not value.float().isfinite().all()]:
        raise UserError(f"{wrong[0]} has values that are not finite: nothing was saved")
    tensors: dict[str, torch.Tensor] = {}
    for kind in [torch.float16, torch.bfloat16] if dtype is None else [dtype]:
        tensors = {
            name: value.detach().cpu().to(kind if value.is_floating_point() else value.dtype).contiguous()
            for name, value in kept.items()
        }
        wrong = [name for name, value in tensors.items() if not value.float().isfinite().all()]
        if not wrong:
            return tensors
    raise UserError(f"{wrong[0]} has values that {kind} does not hold: give dtype=torch.bfloat16 or torch.float32")


def _checked(path: Path, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Hold the tensors of an adapter to a converted model; return the names of those that replace weights of the base.

    Raises:
        UserError: some are missing, are for other places, or have values that the model does not hold.
    """
    from postgen.lit.convert import layers_of
    from postgen.lit.student import is_new

    state, modules = dict(model.state_dict()), tuple(f"{module}." for module in layers_of(model))
    if missing := sorted(name for name in state if is_new(name) and name not in tensors):
        raise UserError(f"the adapter {path} is damaged: it lacks {missing[0]}")
    for name, value in tensors.items():
        if not name.startswith(modules):
            raise UserError(
                f"the adapter {path} is damaged: it holds {name}, which is of no converted attention module"
            )
        if not value.float().isfinite().all():
            raise UserError(f"the adapter {path} is damaged: {name} has values that are not finite")
        there = state.get(name)
        if there is None:
            continue  # a LoRA may be around it
        if there.is_floating_point() != value.is_floating_point():
            raise UserError(f"the adapter {path} is damaged: {name} is {value.dtype}, the layer takes {there.dtype}")
        if not value.to(there.dtype).float().isfinite().all():
            raise UserError(
                f"the adapter {path} has values in {name} that {there.dtype} does not hold: load the model in bfloat16"
                " or float32"
            )
    if around := [name for name in tensors if "{0}.base_layer.{2}".format(*name.rpartition(".")) in state]:
        raise UserError(f"a LoRA is around {around[0]}, which the adapter {path} replaces: load the LoRA afterwards")
    return [name for name in tensors if name in state and not is_new(name)]


def _config_of(model: Any) -> str:
    config = {name: value for name, value in without_note(model.config).items() if not name.startswith("_")}
    return json.dumps(config, sort_keys=True, default=str)
