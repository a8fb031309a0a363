"""Replacement of the linear layers of a model, for instance by low-precision, quantised or sparse layers.

    handle = replace_linears(pipe.transformer, lambda name, linear: Float8Linear(linear), owner="fp8")
    handle.remove()  # the model has its old layer objects again

A replacement takes the place of the old layer in the module tree, so `state_dict` and `save_pretrained` contain the
parameters of the replacement. If replacing a layer would silently give wrong results, an error names the layer and the
reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from postgen.compat import module_hooks, unwrap
from postgen.errors import UserError, shown, why_no_pattern
from postgen.families.calls import block_names
from postgen.families.installed import installed
from postgen.families.linear_checks import check_layers, check_wrappers

Role = Literal["attention", "feed_forward", "modulation", "other"]
"""Purpose of a layer: attention projection, feed-forward network, scale and shift, or anything else."""

Make = Callable[[str, nn.Linear], nn.Module | None]
"""(name, layer) -> the replacement, on the same device, or None to keep the layer."""

Originals = Literal["here", "cpu", "dropped"]
"""What happens to the old layers: they stay on their device, move to the CPU, or are dropped. Dropped layers cannot be
put back."""

_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("modulation", re.compile(r".*(norm|modulation|adaln|ada_ln|scale_shift|_gate).*")),
    ("attention", re.compile(r".*(attn|attention).*|face_adapter")),
    ("feed_forward", re.compile(r"(\w+_)?(ff|ffn|mlp|feed_forward)(_\w+)?")),
)
_IN_SINGLE_BLOCKS = re.compile(r"single_transformer_blocks\.\d+\.proj_(mlp|out)")


def role_of(name: str) -> Role:
    """Return the role of a layer by its name: the first part of the dotted name that matches a role decides.

    >>> role_of("blocks.0.attn1.to_out.0"), role_of("transformer_blocks.3.norm1.linear"), role_of("patch_embedding")
    ('attention', 'modulation', 'other')
    """
    # In single-stream blocks, one layer holds the feed-forward network and the output projection of attention.
    if _IN_SINGLE_BLOCKS.fullmatch(name):
        return "feed_forward"
    for part in name.split("."):
        for role, pattern in _ROLES:
            if pattern.fullmatch(part):
                return role
    return "other"


def find_linears(
    model: nn.Module, *, roles: Collection[Role] = ("attention", "feed_forward"), pattern: str | None = None
) -> dict[str, nn.Linear]:
    """Return linear layers of a model by name.

    For a layer that peft has wrapped, the result has the base layer, under the name of the wrapper.

    Args:
        model: a transformer, which may be wrapped (peft, compiled).
        roles: which layers of the repeated blocks: one or several of "attention" (its projections),
            "feed_forward", "modulation" and "other". Needs a class with a layout.
        pattern: a regular expression, used instead of `roles`: the result has all layers of the model whose full name
            matches. Works with any class.

    Raises:
        UserError: `model` is not a module, its class has no layout and there is no pattern, a role is unknown, the
            pattern is invalid, or no layer is found.
    """
    inner = _module(model)
    wanted = _selection(inner, roles, pattern)
    found: dict[str, nn.Linear] = {}
    for inside, module in inner.named_modules():
        name = inside.removesuffix(".base_layer")
        if isinstance(module, nn.Linear) and wanted(name) and not _is_adapter(inner, inside):
            found[name] = module
    if not found:
        asked = f"named {pattern!r}" if pattern else f"with the roles {roles}"
        raise UserError(f"{type(inner).__name__} has no linear layers {asked}")
    return found


@dataclass
class _Replaced:
    """The record of one owner's replacements, kept on the model: it is copied and pickled with the model."""

    owner: str
    originals: dict[str, nn.Linear]
    replacements: dict[str, nn.Module]
    kept: Originals
    shared: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Layer name -> names of the parameters that the old layer and its replacement share as the same objects."""
    visible: bool = True
    """Whether `postgen.summary` shows this record. A plug-in that prints its own line about its layers hides it."""

    def describe(self) -> str:
        kinds = sorted({type(module).__name__ for module in self.replacements.values()})
        return f"{len(self.replacements)} linear layers are {', '.join(kinds)}"


class LinearsHandle:
    """The replaced layers of one owner in a model. Get a handle from `replace_linears` or `replaced_linears`."""

    def __init__(self, model: nn.Module, record: _Replaced) -> None:
        self._model = model
        self._record: _Replaced | None = record

    @property
    def owner(self) -> str:
        """Name of the owner that replaced the layers."""
        return self._known().owner

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The replacements by layer name."""
        return dict(self._known().replacements)

    def remove(self) -> None:
        """Put the old layers back: the same objects with the same parameters and hooks, on the replacements' device.

        A LoRA layer that was put around a replacement afterwards wraps the old layer after the removal.

        Raises:
            UserError: the layers were already put back or were dropped, a replacement is not in the model any more,
                another owner replaced a layer inside a replacement, LoRA is fused into a replacement, or a replacement
                is fused with other projections. Nothing changes.
        """
        self.remove_some(self._known().replacements)

    def remove_some(self, names: Collection[str]) -> None:
        """Put some of the old layers back, as `remove` does. The record ends when no replacement is left.

        Args:
            names: names of replaced layers.

        Raises:
            UserError: as in `remove`. Nothing changes.
        """
        record = self._known()
        if record.kept == "dropped":
            raise UserError(f"{record.owner} dropped the old layers, so they cannot be put back: load the model again")
        going = {name: record.replacements[name] for name in names}
        places = _places(self._model, going)
        if lost := [name for name in going if name not in places]:
            raise UserError(
                f"{len(lost)} layers of {record.owner} are no longer in the model, the first is {lost[0]}: first put"
                " them back where they were replaced"
            )
        _check_removal(self._model, record, places)
        for name, new in going.items():
            _put_back(places[name], record.originals.pop(name), new, record.shared.pop(name))
            del record.replacements[name]
        if not record.replacements:
            del installed(self._model).plug_ins[_key(record.owner)]
            self._record = None

    def replace_more(self, make: Make, *, pattern: str) -> None:
        """Replace more layers of the model and keep the present replacements.

        Args:
            make: as in `replace_linears`.
            pattern: as in `find_linears`.

        Raises:
            UserError: as in `replace_linears`. Nothing changes.
        """
        record = self._known()
        _fill(self._model, record, make, (), pattern)

    def _known(self) -> _Replaced:
        # Another handle of the same owner may have put the layers back.
        record = self._record
        if record is None or all(each is not record for each in installed(self._model).plug_ins.values()):
            raise UserError("these layers were put back: replace them again")
        return record


def replace_linears(
    model: nn.Module,
    make: Make,
    *,
    owner: str,
    roles: Collection[Role] = ("attention", "feed_forward"),
    pattern: str | None = None,
    originals: Originals = "here",
    shown: bool = True,
) -> LinearsHandle:
    """Replace linear layers of a model by other modules.

    All layers are checked before the first call of `make`. If `make` raises, the layers replaced so far are put back,
    unless `originals` is "dropped".

    Args:
        model: a transformer, which may be wrapped (peft, compiled).
        make: returns the replacement of one layer.
        owner: name of the method that replaces the layers, for messages and `postgen.summary`.
        roles: as in `find_linears`.
        pattern: as in `find_linears`.
        originals: what happens to the old layers, see `Originals`.
        shown: whether `postgen.summary` prints a line about these layers.

    Raises:
        UserError: a layer cannot be replaced safely (the message names the layer and the reason), the owner has
            already replaced layers, there is nothing to replace, or `make` did not return a new module or None.
    """
    inner = _module(model)
    if originals not in get_args(Originals):
        raise UserError(f"originals is {originals!r}. Allowed: {', '.join(get_args(Originals))}")
    plug_ins = installed(inner).plug_ins
    if _key(owner) in plug_ins:
        raise UserError(f"{owner} has replaced linear layers of this model already: remove its layers first")
    check_wrappers(model)
    record = _Replaced(owner, {}, {}, originals, visible=shown)
    plug_ins[_key(owner)] = record
    try:
        _fill(inner, record, make, roles, pattern)
    except BaseException:
        if not record.replacements:
            plug_ins.pop(_key(owner), None)
        raise
    return LinearsHandle(inner, record)


def record_replaced(model: nn.Module, replacements: Mapping[str, nn.Module], *, owner: str) -> LinearsHandle:
    """Record layers that a loader has put into a model, as `replace_linears` does for layers that it drops.

    Args:
        model: a transformer.
        replacements: layer name -> the module of that name in the model.
        owner: name of the method that the layers belong to.
    """
    inner = _module(model)
    record = _Replaced(owner, {}, dict(replacements), "dropped")
    installed(inner).plug_ins[_key(owner)] = record
    return LinearsHandle(inner, record)


def forget_replaced(model: nn.Module, *, owner: str) -> None:
    """Remove the record of an owner whose layers are no longer in the model; without a record, nothing happens."""
    installed(_module(model)).plug_ins.pop(_key(owner), None)


def replaced_linears(model: nn.Module) -> dict[str, LinearsHandle]:
    """Return a handle for every owner that replaced layers of a model. A deep copy of a model has its own records."""
    inner = _module(model)
    records = [found for found in installed(inner).plug_ins.values() if isinstance(found, _Replaced)]
    return {record.owner: LinearsHandle(inner, record) for record in records}


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UserError(
            f"linear layers can be replaced in a torch module only, got {type(model).__name__}: give for instance"
            " pipe.transformer"
        )
    return unwrap(model)


def _selection(model: nn.Module, roles: Collection[Role], pattern: str | None) -> Callable[[str], bool]:
    if pattern is not None:
        if reason := why_no_pattern(pattern):
            raise UserError(f"pattern {shown(pattern)} is not a regular expression: {reason}")
        full = re.compile(pattern)
        return lambda name: full.fullmatch(name) is not None
    wanted = {roles} if isinstance(roles, str) else set(roles)
    if unknown := wanted.difference(get_args(Role)):
        raise UserError(f"unknown roles {', '.join(sorted(unknown))}: choose from {', '.join(get_args(Role))}")
    blocks = tuple(f"{name}." for name in block_names(model))
    return lambda name: name.startswith(blocks) and role_of(name) in wanted


def _key(owner: str) -> str:
    return f"linear layers ({owner})"


def _fill(model: nn.Module, record: _Replaced, make: Make, roles: Collection[Role], pattern: str | None) -> None:
    """Replace layers and add them to the record. On an error, the layers of this call are put back."""
    _check_claims(model, record.owner, roles, pattern)
    layers = find_linears(model, roles=roles, pattern=pattern)
    check_layers(model, layers)
    before = set(record.replacements)
    places, known = _places(model, layers), {id(module) for module in model.modules()}
    try:
        for name, linear in layers.items():
            new = make(name, linear)
            if new is not None and id(new) in known:
                raise UserError(
                    f"{record.owner} made a module for {name} that the model already has: make one for each layer"
                )
            _replace(places[name], record, name, linear, new)
            known.add(id(new))
        if len(record.replacements) == len(before):
            raise UserError(f"{record.owner} replaced none of {len(layers)} linear layers")
    except BaseException:
        made = record.replacements.keys() - before
        if made and record.kept != "dropped":
            LinearsHandle(model, record).remove_some(made)
        raise


def _replace(place: tuple[nn.Module, str], record: _Replaced, name: str, linear: nn.Linear, new: Any) -> None:
    if new is None:
        return
    if not isinstance(new, nn.Module) or new is linear:
        raise UserError(f"{record.owner} made {type(new).__name__} for {name}: make a new torch module, or None")
    new.train(linear.training)
    setattr(*place, new)
    record.replacements[name] = new
    if record.kept == "dropped":
        return
    record.originals[name] = linear
    taken = dict(new.named_parameters(recurse=False))
    record.shared[name] = tuple(key for key, each in linear.named_parameters() if taken.get(key) is each)
    # A replacement that wraps the old layer still needs its weight on the device.
    if record.kept == "cpu" and not any(part is linear.weight for part in new.parameters()):
        linear.to("cpu")


def _put_back(place: tuple[nn.Module, str], original: nn.Linear, new: nn.Module, shared: tuple[str, ...]) -> None:
    for key in shared:  # load_state_dict(assign=True) may have exchanged the parameter objects since
        setattr(original, key, getattr(new, key))
    device = next((tensor.device for tensor in (*new.parameters(), *new.buffers())), original.weight.device)
    if original.weight.device != device:
        original.to(device)
    original.train(new.training)
    setattr(*place, original)


def _places(model: nn.Module, wanted: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Return the present places of modules in the model: key of `wanted` -> (parent module, name of the child)."""
    keys = {id(module): key for key, module in wanted.items()}
    return {
        keys[id(child)]: (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if id(child) in keys
    }


def _check_removal(model: nn.Module, record: _Replaced, places: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Refuse a removal that would lose changes which others have made to the replacements."""
    fused = [module for module in model.modules() if getattr(module, "fused_projections", False)]
    copied = {id(inside) for module in fused for inside in module.modules()}
    for name in places:
        new = record.replacements[name]
        # A merged LoRA is part of the replacement's weight. Unmerging would later subtract it from the old layer,
        # which is right only if both layers share one weight.
        merged = getattr(places[name][0], "merged", False) and places[name][1] == "base_layer"
        if merged and "weight" not in record.shared[name]:
            raise UserError(f"LoRA is fused into {name} of {record.owner}: unfuse or unload it before the removal")
        if id(new) in copied:
            raise UserError(
                f"{name} of {record.owner} is part of fused projections, which would still compute with it: call"
                " unfuse_qkv_projections() first"
            )
        if hooks := module_hooks(new, itself=True):
            raise UserError(f"{hooks} is on {name} of {record.owner}: switch offloading off before the removal")
        inside = {id(module) for module in new.modules()}
        for other in replaced_linears(model).values():
            if other.owner != record.owner and any(id(module) in inside for module in other.modules.values()):
                raise UserError(f"{other.owner} replaced a layer inside {name}: remove it before {record.owner}")


def _is_adapter(model: nn.Module, name: str) -> bool:
    """Whether a layer belongs to peft: it is inside a peft wrapper, but is not the wrapper's base layer."""
    parents = name.split(".")
    return any(
        hasattr(model.get_submodule(".".join(parents[:count])), "base_layer") and parents[count] != "base_layer"
        for count in range(1, len(parents))
    )


def _check_claims(model: nn.Module, owner: str, roles: Collection[Role], pattern: str | None) -> None:
    """Refuse layers that another owner has replaced, also if the replacement is not an `nn.Linear`."""
    wanted = _selection(model, roles, pattern)
    for found in replaced_linears(model).values():
        for name in found.modules:
            if wanted(name):
                raise UserError(f"{name} is already replaced by {found.owner}: remove its layers before {owner}")
