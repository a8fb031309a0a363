"""The one place where linear layers of a model are replaced: low precision, quantised and sparse layers come in here.

    handle = replace_linears(pipe.transformer, lambda name, linear: Float8Linear(linear), owner="fp8")
    handle.remove()  # the very same layers as before

A replaced layer stands in the module tree where the old one stood, so `state_dict` and `save_pretrained` see what the
replacement defines. What cannot be replaced without going wrong silently is refused, with the layer and the reason.
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
"""What a layer serves: projections of an attention, a feed-forward, scales and shifts, or anything else."""

Make = Callable[[str, nn.Linear], nn.Module | None]
"""(name, layer) -> what takes its place, on the same device; None leaves it."""

Originals = Literal["here", "cpu", "dropped"]
"""Where the replaced layers wait: as they are, in main memory, or nowhere (then nothing can be taken off)."""

_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("modulation", re.compile(r".*(norm|modulation|adaln|ada_ln|scale_shift|_gate).*")),
    ("attention", re.compile(r".*(attn|attention).*|face_adapter")),
    ("feed_forward", re.compile(r"(\w+_)?(ff|ffn|mlp|feed_forward)(_\w+)?")),
)
_IN_SINGLE_BLOCKS = re.compile(r"single_transformer_blocks\.\d+\.proj_(mlp|out)")


def role_of(name: str) -> Role:
    """Tell the role of a layer from its name; the outermost part of it that says something decides.

    >>> role_of("blocks.0.attn1.to_out.0"), role_of("transformer_blocks.3.norm1.linear"), role_of("patch_embedding")
    ('attention', 'modulation', 'other')
    """
    # Single-stream blocks put feed-forward and output of the attention into one layer.
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
    """Return linear layers of a model by name. Where peft wrapped one, it is the layer inside, under the outer name.

    Args:
        model: a transformer, which may be wrapped (peft, compiled).
        roles: which layers of the repeated blocks: one or several of "attention" (its projections),
            "feed_forward", "modulation" and "other".
        pattern: instead of that, the layers anywhere whose name this matches in full: for any class of model.

    Raises:
        UserError: a class without a layout and no pattern, an unknown role, no module, a wrong pattern, or
            nothing is found.
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
    """What is left on the model: it is copied and pickled with it."""

    owner: str
    originals: dict[str, nn.Linear]
    replacements: dict[str, nn.Module]
    kept: Originals
    shared: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameters that a replacement took over from its layer, by the layer's name: they are one object in both."""
    visible: bool = True
    """Whether `postgen.summary` shows it; a plug-in that says more about its layers does so itself."""

    def describe(self) -> str:
        kinds = sorted({type(module).__name__ for module in self.replacements.values()})
        return f"{len(self.replacements)} linear layers are {', '.join(kinds)}"


class LinearsHandle:
    """Replaced layers as they stand in a model. Get it from `replace_linears` or `replaced_linears`."""

    def __init__(self, model: nn.Module, record: _Replaced) -> None:
        self._model = model
        self._record: _Replaced | None = record

    @property
    def owner(self) -> str:
        """Who replaced them."""
        return self._known().owner

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What stands in the model now, by the name of the layer."""
        return dict(self._known().replacements)

    def remove(self) -> None:
        """Put the old layers back: the same objects with the same parameters and hooks, on the device of the new ones.

        LoRA that was put around a replaced layer meanwhile is put around the old one.

        Raises:
            UserError: removed already, the old layers were dropped, somebody took a new layer out of the model, or
                changed what is inside one (another owner, LoRA fused into it) or fused it with others. Nothing
                changes then.
        """
        self.remove_some(self._known().replacements)

    def remove_some(self, names: Collection[str]) -> None:
        """Put some of the old layers back, as `remove` does; with the last of them it is removed.

        Args:
            names: of layers that it replaced.

        Raises:
            UserError: as `remove`; nothing changes then.
        """
        record = self._known()
        if record.kept == "dropped":
            raise UserError(f"{record.owner} dropped the layers it replaced: load the model again")
        going = {name: record.replacements[name] for name in names}
        places = _places(self._model, going)
        if lost := [name for name in going if name not in places]:
            raise UserError(
                f"{len(lost)} layers of {record.owner} are no longer in the model, the first is {lost[0]}: undo what"
                " replaced them before"
            )
        _check_removal(self._model, record, places)
        for name, new in going.items():
            _put_back(places[name], record.originals.pop(name), new, record.shared.pop(name))
            del record.replacements[name]
        if not record.replacements:
            del installed(self._model).plug_ins[_key(record.owner)]
            self._record = None

    def replace_more(self, make: Make, *, pattern: str) -> None:
        """Replace further layers; those that are replaced stay as they are.

        Args:
            make: as in `replace_linears`.
            pattern: as in `find_linears`.

        Raises:
            UserError: as `replace_linears`; nothing changes then.
        """
        record = self._known()
        _fill(self._model, record, make, (), pattern)

    def _known(self) -> _Replaced:
        # Another handle may have put them back.
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
    """Put other modules in the place of linear layers.

    Everything is checked before `make` is called for the first time; if `make` fails, the layers made so far are put
    back, unless they are to be dropped.

    Args:
        model: a transformer, which may be wrapped (peft, compiled).
        make: makes one replacement.
        owner: who asks, a word for messages and `postgen.summary`.
        roles: as in `find_linears`.
        pattern: as in `find_linears`.
        originals: where the old layers wait.
        shown: whether `postgen.summary` has a line about them.

    Raises:
        UserError: a layer that cannot be replaced safely, named with the reason; nothing to replace; `make` gave
            something that is no new module.
    """
    inner = _module(model)
    if originals not in get_args(Originals):
        raise UserError(f"originals is {originals!r}. Allowed: {', '.join(get_args(Originals))}")
    plug_ins = installed(inner).plug_ins
    if _key(owner) in plug_ins:
        raise UserError(f"{owner} has replaced linear layers of this model already: remove them first")
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


def replaced_linears(model: nn.Module) -> dict[str, LinearsHandle]:
    """Return a handle for every owner that replaced layers of a model; a deep copy of a model has its own."""
    inner = _module(model)
    records = [found for found in installed(inner).plug_ins.values() if isinstance(found, _Replaced)]
    return {record.owner: LinearsHandle(inner, record) for record in records}


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UserError(
            f"linear layers are replaced in a module, got {type(model).__name__}: give pipe.transformer, say"
        )
    return unwrap(model)


def _selection(model: nn.Module, roles: Collection[Role], pattern: str | None) -> Callable[[str], bool]:
    if pattern is not None:
        if reason := why_no_pattern(pattern):
            raise UserError(f"pattern {shown(pattern)} is no regular expression: {reason}")
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
    """Replace layers and write them down; what fails leaves those that stood before."""
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
                    f"{record.owner} made a module for {name} that the model has already: make one for each layer"
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
        raise UserError(f"{record.owner} made {type(new).__name__} for {name}: a new torch module is needed, or None")
    new.train(linear.training)
    setattr(*place, new)
    record.replacements[name] = new
    if record.kept == "dropped":
        return
    record.originals[name] = linear
    taken = dict(new.named_parameters(recurse=False))
    record.shared[name] = tuple(key for key, each in linear.named_parameters() if taken.get(key) is each)
    # A wrapper may go on using the layer itself.
    if record.kept == "cpu" and not any(part is linear.weight for part in new.parameters()):
        linear.to("cpu")


def _put_back(place: tuple[nn.Module, str], original: nn.Linear, new: nn.Module, shared: tuple[str, ...]) -> None:
    for key in shared:  # perhaps other objects by now: load_state_dict(assign=True)
        setattr(original, key, getattr(new, key))
    device = next((tensor.device for tensor in (*new.parameters(), *new.buffers())), original.weight.device)
    if original.weight.device != device:
        original.to(device)
    original.train(new.training)
    setattr(*place, original)


def _places(model: nn.Module, wanted: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Find modules wherever they are by now: (parent, name of the child) by the key of `wanted`."""
    keys = {id(module): key for key, module in wanted.items()}
    return {
        keys[id(child)]: (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if id(child) in keys
    }


def _check_removal(model: nn.Module, record: _Replaced, places: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Refuse to lose what others did to the new layers since."""
    fused = [module for module in model.modules() if getattr(module, "fused_projections", False)]
    copied = {id(inside) for module in fused for inside in module.modules()}
    for name in places:
        new = record.replacements[name]
        # Merged, LoRA is in the weight of the new layer, and would later be subtracted from the old one: unless both
        # have one weight.
        merged = getattr(places[name][0], "merged", False) and places[name][1] == "base_layer"
        if merged and "weight" not in record.shared[name]:
            raise UserError(f"LoRA is fused into {name} of {record.owner}: unfuse or unload it before taking that off")
        if id(new) in copied:
            raise UserError(
                f"the projections are fused from {name} of {record.owner}, and would go on computing with it:"
                " unfuse_qkv_projections() first"
            )
        if hooks := module_hooks(new, itself=True):
            raise UserError(f"{hooks} is on {name} of {record.owner}: switch offloading off before taking that off")
        inside = {id(module) for module in new.modules()}
        for other in replaced_linears(model).values():
            if other.owner != record.owner and any(id(module) in inside for module in other.modules.values()):
                raise UserError(f"{other.owner} replaced what is inside {name}: remove it before {record.owner}")


def _is_adapter(model: nn.Module, name: str) -> bool:
    """Whether a layer belongs to peft: something inside a wrapped layer that is not the layer itself."""
    parents = name.split(".")
    return any(
        hasattr(model.get_submodule(".".join(parents[:count])), "base_layer") and parents[count] != "base_layer"
        for count in range(1, len(parents))
    )


def _check_claims(model: nn.Module, owner: str, roles: Collection[Role], pattern: str | None) -> None:
    """Refuse what another owner holds, also where what stands there now is no linear layer."""
    wanted = _selection(model, roles, pattern)
    for found in replaced_linears(model).values():
        for name in found.modules:
            if wanted(name):
                raise UserError(f"{name} is replaced by {found.owner} already: remove that before {owner}")
