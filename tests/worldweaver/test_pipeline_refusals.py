"""Inputs that the pipeline refuses with an error of one line, before it generates anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from postgen.errors import UserError
from postgen.pipelines.worldweaver import WorldWeaverPipeline
from postgen.worldweaver.state import RolloutState
from tests.families.tiny_pipelines import cogvideox, ltx
from tests.tiny_wan import wan_components
from tests.worldweaver.tiny import SMALL, TEXT, quiet, seeded, tiny


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "the prompt schedule is empty"),
    ({"prompt": None}, "give either prompt or prompt_embeds"),
    ({"prompt": [(4, "a")]}, "begins at frame 4"),
    ({"prompt": [(0, "a"), (0, "b")]}, "give frames in rising order"),
    ({"prompt": [(0, "a"), (6, "b"), (8, "c")]}, "begins in the same latent frame as the prompt before it"),
    ({"prompt": [(0, ["a", "b"]), (5, ["a", "b", "c"])]}, "has a wrong number of texts: give one text, or 3"),
    ({"prompt": [("0", "a")]}, "must be \\(frame, text\\)"),
    ({"negative_prompt": "dark"}, "needs guidance_scale above 1"),
    ({"num_frames": 18}, "number of frames"),
    ({"height": 33}, "height must be a multiple"),
    ({"causal_block_size": 0}, "causal_block_size"),
    ({"ar_step": 9}, "ar_step"),
    ({"addnoise_condition": 1001}, "addnoise_condition"),
    ({"history_sizes": (1,)}, "must be two numbers"),
    ({"overlap_history": 5}, "set the same value"),
    ({"history_sizes": None, "base_num_frames": 5}, "give at least 29"),
    ({"memory_policy": "best"}, "best"),
    ({"output_type": "mp4"}, "output_type must be one of"),
    ({"image": Image.new("RGB", (8, 8)), "video": torch.rand(1, 9, 3, 32, 32)}, "give one of them"),
    ({"video": torch.rand(1, 17, 3, 32, 32)}, "is not more than the given image or video has"),
    ({"image": Image.new("RGB", (8, 8)), "history_sizes": (0, 0)}, "need a memory"),
    ({"image": 3}, "diffusers cannot read"),
    ({"depth": torch.ones(1, 32, 32)}, "is given without image or video"),
    ({"image": Image.new("RGB", (8, 8)), "depth": torch.ones(2, 32, 32)}, "give distances of shape \\(1, 32, 32\\)"),
    ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1 videos"),
    ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "give only names from latents, clean"),
    ({"flow_shift": 0}, "flow_shift"),
]


@pytest.mark.parametrize(("change", "says"), WRONG)
def test_wrong_arguments_are_said_before_anything_is_made(pipe: Any, change: dict[str, Any], says: str) -> None:
    words = SMALL | {"prompt": TEXT, "num_frames": 17, "guidance_scale": 1.0} | change
    with pytest.raises(UserError, match=says) as caught:
        pipe.stream(**words)
    assert "\n" not in str(caught.value)


def test_wrong_states_and_models(pipe: Any, tmp_path: Path) -> None:
    made = pipe(TEXT, generator=seeded(), num_frames=17, guidance_scale=1.0, **SMALL)
    made.state.save(tmp_path)
    other = tiny(())
    for call in (lambda: other.load_state(tmp_path), lambda: other.stream(state=RolloutState.load(tmp_path))):
        with pytest.raises(UserError, match="of a model with modalities"):
            call()
    changed = tiny()
    changed.transformer.proj_out.weight.data += 1
    with pytest.raises(UserError, match="of a model with weights"):
        changed.load_state(tmp_path)
    with pytest.raises(UserError, match="height is fixed by the state"):
        pipe.stream(state=made.state, height=32)
    with pytest.raises(UserError, match="ends before the frames in flight: give at least 17"):
        pipe.stream(state=made.state, num_frames=9, output_type="pt")
    with pytest.raises(UserError, match="made without decoding depth"):
        pipe.stream(state=made.state, num_frames=33, output_type="pt", return_depth=True)
    with pytest.raises(UserError, match="without guidance and has no negative prompt"):
        pipe.stream(state=made.state, num_frames=33, output_type="pt", guidance_scale=3.0)
    with pytest.raises(UserError, match="this model has no depth"):
        other.stream(TEXT, return_depth=True, **SMALL)
    with pytest.raises(UserError, match="give mean_level=True"):
        WorldWeaverPipeline.from_pipe(cogvideox())
    with pytest.raises(UserError, match="cannot be the base of WorldWeaver: load the model as one of LTXPipeline"):
        WorldWeaverPipeline.from_pipe(diffusers.WanImageToVideoPipeline(**wan_components()))
    with pytest.raises(UserError, match="depend on the size of a clip: give flow_shift"):
        quiet(WorldWeaverPipeline.from_pipe(ltx())).stream(TEXT, **SMALL)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError):
        pipe.load_state(tmp_path)
