"""The blocks of every layout row, with tiny models of the real classes: order, data between blocks, replays."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Block, BlockGroup, Blocks, Layout, blocks_of, layout_of, registry
from postgen.families.recording import Recording, capture, replay
from tests.families.tiny_models import BLOCK_BUILDERS, BUILDERS, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

MORE_LAYERS = {"WanVACE": 3}
"""Number of layers; with 3, two of the control blocks run."""


def same(one: Any, other: Any) -> bool:
    """Whether two outputs are bitwise equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@dataclasses.dataclass
class Runs:
    """Two recorded runs of a model: one unchanged, and one with noise on the input of the first block ("shaken")."""

    layout: Layout
    blocks: tuple[Block, ...]
    order: list[str]
    plain: Recording
    shaken: Recording

    def link(self, before: Block, after: Block) -> bool:
        """Whether the latents and the text are all that passes from one block to the next.

        The second block receives the shaken output of the first one, and its other inputs are those of the plain run.
        Its output then equals that of the shaken run only if nothing else passes between the two.
        """
        hidden, text = before.outputs(self.shaken[before.name][0].output())
        try:
            output = replay(after, self.plain[after.name][0], hidden=hidden, text=text)
        except RuntimeError:
            return False  # other shapes: the model regroups latents and text, or joins them to one sequence
        return same(output, self.shaken[after.name][0].output())


@functools.cache
@torch.no_grad()
def runs(name: str) -> Runs:
    tiny = tiny_model(name, batch=2, layers=MORE_LAYERS.get(name, 2))
    blocks, order = blocks_of(tiny.transformer), []

    def note(block: str, module: Any, args: Any) -> None:
        order.append(block)

    hooks = [block.module.register_forward_pre_hook(functools.partial(note, block.name)) for block in blocks]
    plain = capture(tiny.transformer, blocks, tiny)
    for hook in hooks:
        hook.remove()
    first = blocks[0]

    def shake(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, _ = first.inputs(args, kwargs)
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        return first.fed(args, kwargs, hidden + 0.1 * noise)

    hook = first.module.register_forward_pre_hook(shake, with_kwargs=True)
    shaken = capture(tiny.transformer, blocks, tiny)
    hook.remove()
    return Runs(layout_of(tiny.transformer), blocks, order, plain, shaken)


@pytest.mark.parametrize("name", [*BUILDERS, *BLOCK_BUILDERS])
def test_blocks_run_in_their_order(name: str) -> None:
    ran = runs(name)
    assert ran.order == [block.name for block in ran.blocks]
    groups = ran.layout.blocks.groups
    assert all(members(group, ran.blocks) for group in groups)


def members(group: BlockGroup, blocks: tuple[Block, ...]) -> list[Block]:
    return [block for block in blocks if re.fullmatch(group.names, block.name)]


@pytest.mark.parametrize("name", [*BUILDERS, *BLOCK_BUILDERS])
@torch.no_grad()
def test_each_block_replays_bitwise(name: str) -> None:
    ran = runs(name)
    for block in ran.blocks:
        (call,) = ran.plain[block.name]
        output = replay(block, call)
        assert same(output, call.output())
        hidden, text = block.inputs(*call.inputs())
        hidden_out, text_out = block.outputs(output)
        assert isinstance(hidden, Tensor)
        assert isinstance(hidden_out, Tensor)
        assert (hidden_out.shape[0], hidden_out.dim()) == (hidden.shape[0], hidden.dim())
        # The last block of some models returns None for the text, because nothing uses it afterwards.
        assert text_out is None or text_out.shape == text.shape


@pytest.mark.parametrize("name", [*BUILDERS, *BLOCK_BUILDERS])
@torch.no_grad()
def test_what_follows_follows_and_what_does_not_does_not(name: str) -> None:
    ran = runs(name)
    links = {after.name: ran.link(before, after) for before, after in zip(ran.blocks, ran.blocks[1:], strict=False)}
    assert not ran.blocks[0].follows
    assert all(links[block.name] for block in ran.blocks if block.follows)
    for place, group in enumerate(ran.layout.blocks.groups):
        inside = members(group, ran.blocks)
        if group.enters:
            assert place > 0
            assert not links[inside[0].name], f"nothing but the output of the block before enters {inside[0].name}"
        if group.breaks:
            assert not all(links[block.name] for block in inside[1:]), f"the blocks {group.names} are a chain"
    assert ran.layout.blocks.chain == all(block.follows for block in ran.blocks[1:])


@pytest.mark.parametrize("name", [*BUILDERS, *BLOCK_BUILDERS])
@torch.no_grad()
def test_a_chain_is_the_models_own_sequence(name: str) -> None:
    """Replaying the blocks one by one, from the shaken output of the first block, ends in the output of the model."""
    ran = runs(name)
    if not ran.layout.blocks.chain:
        assert ran.layout.blocks.broken
        return
    before, *others = ran.blocks
    output = ran.shaken[before.name][0].output()
    for block in others:
        hidden, text = before.outputs(output)
        output, before = replay(block, ran.plain[block.name][0], hidden=hidden, text=text), block
    assert same(output, ran.shaken[before.name][0].output())
    assert not same(output, ran.plain[before.name][0].output())


def test_who_is_a_chain() -> None:
    """The list is repeated here, so that a change of a layout row fails this test."""
    broken = {name for name in (*BUILDERS, *BLOCK_BUILDERS) if not runs(name).layout.blocks.chain}
    assert broken == {
        *("ConsisID", "Kandinsky 6", "LTX-2", "Latte", "Motif", "WanAnimate", "WanVACE"),
        *("AuraFlow", "Chroma", "Flux 2", "HunyuanDiT", "Lumina 2", "Z-Image"),
        *("AnimateDiff", "I2VGen-XL", "ModelScope", "Stable Diffusion", "Stable Video Diffusion"),
    }


def test_the_page_says_the_same() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    for name, row in registry._layouts.items():
        tokens = "no" if row.video is None else row.video.token_order
        if row.image is not None:
            tokens = row.image.token_order.replace("video", "picture")
        chain = "yes" if row.blocks.chain else f"no: {'; '.join(row.blocks.broken)}"
        assert f"| `{name}` | {tokens} | {chain} |\n" in page
    assert page.count("\n| `") == len(registry._layouts)


def test_running_order_is_not_that_of_the_modules() -> None:
    latte = [block.name for block in runs("Latte").blocks]
    assert latte == [f"{kind}transformer_blocks.{layer}" for layer in (0, 1) for kind in ("", "temporal_")]
    vace = [block.name for block in runs("WanVACE").blocks]
    assert vace == ["vace_blocks.0", "vace_blocks.1", "blocks.0", "blocks.1", "blocks.2"]


def test_where_latents_and_text_are() -> None:
    expected: Mapping[str, list[tuple[Any, ...]]] = {
        "CogVideoX 1.0": [("hidden_states", "encoder_hidden_states", 0, 1)],
        "Flux": [("hidden_states", "encoder_hidden_states", 1, 0)],
        "Kandinsky 5": [("visual_embed", "text_embed", None, None)],
        "DiT": [("hidden_states", None, None, None)],
        "WanVACE": [
            ("control_hidden_states", "encoder_hidden_states", 1, None),
            ("hidden_states", "encoder_hidden_states", None, None),
        ],
        # The first and the last block have no cross-attention.
        "Stable Diffusion": [
            ("hidden_states", None, 0, None),
            ("hidden_states", "encoder_hidden_states", 0, None),
            ("hidden_states", "encoder_hidden_states", None, None),
            ("hidden_states", None, None, None),
        ],
    }
    for name, wanted in expected.items():
        found = [(block.hidden, block.text, block.hidden_out, block.text_out) for block in runs(name).blocks]
        assert list(dict.fromkeys(found)) == wanted


def test_a_stale_row_is_an_error() -> None:
    tiny = tiny_model("Wan")
    with pytest.raises(UserError, match=r"WanTransformer3DModel has no blocks named 'layers.*out of date"):
        Blocks(groups=(BlockGroup(names=r"layers\.\d+"),)).find(tiny.transformer)
    (first, *_) = Blocks(groups=(BlockGroup(names=r"blocks\.\d+", hidden="latents"),)).find(tiny.transformer)
    with pytest.raises(UserError, match=r"the forward of blocks.0, a WanTransformerBlock, has no argument latents"):
        first.inputs((torch.zeros(1),), {})
    with pytest.raises(UserError, match=r"block blocks.0 was called without hidden_states"):
        dataclasses.replace(first, hidden="hidden_states").inputs((), {})


def test_arguments_by_place_and_by_name() -> None:
    (block, *_) = blocks_of(tiny_model("Wan").transformer)
    assert block.inputs((1,), {"encoder_hidden_states": 2}) == (1, 2)
    assert block.inputs((1,), {}) == (1, None)
    assert block.fed((1, 2, 3), {}, 4, 5) == ((4, 5, 3), {})
    assert block.fed((1,), {"temb": 3}, text=5) == ((1,), {"temb": 3, "encoder_hidden_states": 5})
    assert block.fed((), {"hidden_states": 1}, 4) == ((), {"hidden_states": 4})
