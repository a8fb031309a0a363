"""Adapters: a small file that turns a stock transformer into a trained converted one.

An adapter is a safetensors file. It holds the new layers and the trained weights of the converted attention modules.
Its metadata hold the settings of the conversion and the config of the stock model.
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
from postgen.families.exports import NOTE
from postgen.families.own_format import read_note, without_note
from postgen.files import check_place, replacing
from postgen.lit.config import LitConfig
from postgen.reading import check_name
from postgen.tensor_files import opened

if TYPE_CHECKING:
    import torch
    from torch import nn

    from postgen.families.loading import ModelFacts
    from postgen.lit.report import Report

FORMAT = "postgen.lit.adapter"
"""Value of `format` in the metadata of an adapter file."""
ADAPTER = "adapter.safetensors"
"""File name of an adapter in a folder."""
_WRAPPED = "base_layer"
"""Name under which a PEFT layer holds the layer that it wraps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """The metadata of an adapter file."""

    path: Path
    """The file."""
    transformer: str
    """Class name of the stock transformer."""
    base: Mapping[str, Any]
    """Config of the stock transformer."""
    config: LitConfig
    """Settings of the conversion."""

    def check(self, transformer: str | None, config: Mapping[str, Any]) -> None:
        """Check that the adapter is for this model.

        Args:
            transformer: class name of the model's transformer; None for a pipeline without a transformer.
            config: config of the transformer. Entries that only one of the two configs has are not compared.

        Raises:
            UserError: the adapter is for another model.
        """
        if transformer != self.transformer:
            has = "no transformer" if transformer is None else f"a {transformer}"
            raise UserError(f"the adapter {self.path} is for a {self.transformer}, but this model has {has}")
        for name, value in without_note(config).items():
            if name.startswith("_") or name not in self.base:
                continue
            theirs, ours = (json.loads(json.dumps(each, default=str)) for each in (self.base[name], value))
            if theirs != ours:
                raise UserError(
                    f"the adapter {self.path} is for another {transformer}: it needs {name}={shown(theirs)}, this"
                    f" model has {name}={shown(ours)}"
                )

    def empty(self) -> nn.Module:
        """Create the converted transformer on the meta device, without memory for its weights."""
        import diffusers

        from postgen.lit.convert import convert
        from postgen.lit.saving import no_memory

        kind = getattr(diffusers, self.transformer)
        with no_memory():
            model: nn.Module = kind.from_config(dict(self.base))
            convert(model, dataclasses.replace(self.config, inherit="all"))
        return model


def adapter_file(named: str | Path) -> Path:
    """Return the path of an adapter file.

    Args:
        named: the file, a folder that contains it, or `embedded` for the adapter of the embedded model.

    Raises:
        UserError: the embedded adapter is missing, or the name is not a valid file name.
    """
    if str(named) == EMBEDDED:
        return embedded_lit()
    check_name(str(named), "the adapter")
    path = Path(named).expanduser()
    if path.is_dir() and not (path / ADAPTER).exists():
        converted = (path / NOTE).is_file() or (path / "model_index.json").is_file()
        hint = f"it is a model, use it with --model {named}" if converted else "give the file of the adapter"
        raise UserError(f"the folder {named} has no {ADAPTER}: {hint}")
    return path / ADAPTER if path.is_dir() else path


def read_adapter(named: str | Path) -> Adapter:
    """Read the metadata of an adapter, without its weights.

    Args:
        named: see `adapter_file`.

    Raises:
        UserError: the file is missing, damaged, or not an adapter.
    """
    path = adapter_file(named)
    with opened(path, f"the adapter {named} cannot be read", framework="numpy") as content:
        said = content.metadata() or {}
    if said.get("format") != FORMAT:
        hint = ". Pass a LoRA with --lora" if "lora" in path.name.lower() else ""
        raise UserError(f"{path} is not an adapter of postgen.lit{hint}")
    try:
        base, config = json.loads(said["base"]), json.loads(said["config"])
        if not base or not config or not all(isinstance(each, dict) for each in (base, config)):
            raise ValueError("no settings")
        return Adapter(path=path, transformer=said["transformer"], base=base, config=LitConfig.from_json(config))
    except (KeyError, TypeError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"the adapter {path} is damaged: its metadata cannot be read ({error})") from error


def check_adapter(named: str | Path, facts: ModelFacts, size: tuple[int, int, int] | None = None) -> None:
    """Check that an adapter fits a model and a clip, before any weights are read.

    Args:
        named: see `adapter_file`.
        facts: the facts of the model.
        size: frames, height and width (in pixels) of the clip; None if they are unknown.

    Raises:
        UserError: see `read_adapter`; or the adapter is for another model, or a layer is bound to another grid.
    """
    from postgen.families.model_folder import optional, small_files
    from postgen.lit.convert import LOADER

    adapter = read_adapter(named)
    if facts.experts:
        raise UserError(
            f"the adapter {adapter.path} is for a pipeline with one transformer, but this {facts.pipeline} has two"
        )
    folder = dict(facts.parts).get("transformer")
    found = small_files(facts.source)[0] / "transformer" if folder is None else Path(folder) / "transformer"
    config = optional(found / "config.json")
    adapter.check(facts.transformer, config)
    if read_note(config, LOADER) is not None:
        raise UserError(
            f"the adapter {adapter.path} is for a stock model, but {facts.source} is converted already: use the stock"
            " model"
        )
    if size is not None:
        from postgen.lit.clips import check_layers

        check_layers(adapter.empty(), *size)


def save_adapter(
    transformer: nn.Module, path: str | Path, *, base: nn.Module | None = None, dtype: torch.dtype | None = None
) -> int:
    """Write the adapter of a converted transformer and return the size of the file in bytes.

    Args:
        transformer: the converted transformer.
        path: the file to write.
        base: the stock transformer, to find the weights that were trained. None states that no weight of the stock
            transformer was trained; weights that `apply_adapter` replaced are saved in any case.
        dtype: dtype of the file; None for float16, or bfloat16 if a value is too large for float16.

    Raises:
        UserError: the transformer is not converted, has a LoRA attached or offloaded weights, or was not converted
            from `base`; weights outside the converted attention modules were trained; a value is not finite or does
            not fit `dtype`; or the file cannot be written.
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
    """Convert a stock transformer with the settings of an adapter and load the adapter's weights, in place.

    `postgen.lit.revert` restores the stock model, bit by bit.

    Args:
        transformer: a transformer of the architecture for which the adapter is, or a pipeline with one.
        named: see `adapter_file`.

    Returns:
        The report of the conversion.

    Raises:
        UserError: see `read_adapter` and `convert`; or the adapter is for another model, or damaged. The transformer
            is unchanged in these cases.
    """
    from postgen.lit.convert import convert, layers_of, revert, the_transformer
    from postgen.lit.student import give
    from postgen.tensor_files import read_tensors

    adapter, model = read_adapter(named), the_transformer(transformer)
    inner: Any = model
    adapter.check(type(model).__name__, inner.config)
    # Clones, because tensors in the mapped file have arbitrary alignment, and CPU products round differently with it.
    tensors = {
        name: value.clone()
        for name, value in read_tensors(adapter.path, f"the adapter {named} cannot be read").items()
    }
    if any(each.is_meta for each in model.parameters()):
        raise UserError(
            f"the weights of this {type(model).__name__} are offloaded: apply the adapter before you switch offloading"
            " on"
        )
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
    """Check that the named weights of attention modules can be replaced: they are in place and the model computes with
    them.

    Args:
        model: the transformer.
        names: names of the weights in the stock transformer, without the name parts of PEFT wrappers.
        what: the operation, for error messages: "cannot {what}: ...".

    Raises:
        UserError: another plug-in replaced the layer of a weight, a LoRA is merged into the weight, or the weight is
            fused with others or offloaded.
    """
    from postgen.families.linear import replaced_linears

    for owner, handle in replaced_linears(model).items():
        if taken := [name for name in names if name.rpartition(".")[0] in handle.modules]:
            raise UserError(f"cannot {what}: {owner} has replaced the layer of {taken[0]}. Remove {owner} first")
    modules = dict(model.named_modules())
    for name in names:
        owner, _, key = name.rpartition(".")
        module: Any = modules.get(owner)
        if getattr(module, "merged", False):
            raise UserError(f"cannot {what}: a LoRA is merged into {name}. Unmerge the LoRA first (unfuse_lora)")
        module = getattr(module, _WRAPPED, module)
        attention, _, projection = owner.rpartition(".")
        fused = projection in ("to_q", "to_k", "to_v") and getattr(modules[attention], "fused_projections", False)
        if fused or getattr(module, key, None) is None:
            raise UserError(
                f"cannot {what}: {name} is fused with other projections. Unfuse them first (unfuse_qkv_projections)"
            )
        if getattr(module, key).is_meta:
            raise UserError(f"cannot {what}: {name} is offloaded. Switch offloading off first")


def put_back(attention: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    """Restore the weights that an attention module had before an adapter was applied.

    Args:
        attention: the attention module. A LoRA may wrap its projections by now.
        before: the original weights, by their names in the module at that time.
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
    """Return the tensors for the adapter of a converted transformer, by name."""
    import torch

    from postgen.lit.convert import layers_of
    from postgen.lit.student import is_new

    state, layers = dict(model.state_dict()), layers_of(model)
    if any(f".{_WRAPPED}." in name for name in state):
        raise UserError("a LoRA is attached, and an adapter cannot hold it: remove the LoRA first (unload_lora)")
    if any(value.is_meta for value in state.values()):
        raise UserError("weights are offloaded, so their values cannot be saved: switch offloading off first")
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
            f"base is another model, because {other[0]} differs: pass the stock transformer from which this one was"
            " converted, without LoRA. Either both or neither must have fused projections"
        )
    for name, value in theirs.items():
        if torch.equal(ours[name].cpu().float(), value.cpu().float()):
            continue
        if not name.startswith(tuple(f"{module}." for module in layers)):
            raise UserError(
                f"{name} was trained, but an adapter can only hold weights of converted attention modules: save the"
                " whole transformer (postgen.lit.save)"
            )
        kept[name] = ours[name]
    return kept


def _stored(kept: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return the tensors in the dtype of the file, on the CPU."""
    import torch

    if wrong := [name for name, value in kept.items() if not value.float().isfinite().all()]:
        raise UserError(f"{wrong[0]} has values that are not finite, so no adapter was saved: check the training")
    tensors: dict[str, torch.Tensor] = {}
    for kind in [torch.float16, torch.bfloat16] if dtype is None else [dtype]:
        tensors = {
            name: value.detach().cpu().to(kind if value.is_floating_point() else value.dtype).contiguous()
            for name, value in kept.items()
        }
        wrong = [name for name, value in tensors.items() if not value.float().isfinite().all()]
        if not wrong:
            return tensors
    raise UserError(f"{wrong[0]} has values too large for {kind}: set dtype=torch.bfloat16 or torch.float32")


def _checked(path: Path, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Check the tensors of an adapter against a converted model; return the names that replace weights of the base.

    Raises:
        UserError: tensors are missing, belong to other modules, or have values that the model cannot hold.
    """
    from postgen.lit.convert import layers_of
    from postgen.lit.student import is_new

    state, modules = dict(model.state_dict()), tuple(f"{module}." for module in layers_of(model))
    if missing := sorted(name for name in state if is_new(name) and name not in tensors):
        raise UserError(f"the adapter {path} is damaged: it lacks {missing[0]}")
    for name, value in tensors.items():
        if not name.startswith(modules):
            raise UserError(
                f"the adapter {path} is damaged: it holds {name}, which belongs to no converted attention module"
            )
        if not value.float().isfinite().all():
            raise UserError(f"the adapter {path} is damaged: {name} has values that are not finite")
        there = state.get(name)
        if there is None:
            continue  # a LoRA may wrap the layer; checked below
        if there.is_floating_point() != value.is_floating_point():
            raise UserError(f"the adapter {path} is damaged: {name} is {value.dtype}, but the model has {there.dtype}")
        if not value.to(there.dtype).float().isfinite().all():
            raise UserError(
                f"the adapter {path} has values in {name} that are too large for {there.dtype}: load the model in"
                " bfloat16 or float32"
            )
    if around := [name for name in tensors if "{0}.base_layer.{2}".format(*name.rpartition(".")) in state]:
        raise UserError(
            f"a LoRA wraps {around[0]}, which the adapter {path} replaces: apply the adapter first, then load the LoRA"
        )
    return [name for name in tensors if name in state and not is_new(name)]


def _config_of(model: Any) -> str:
    config = {name: value for name, value in without_note(model.config).items() if not name.startswith("_")}
    return json.dumps(config, sort_keys=True, default=str)
