"""WorldWeaver: generate long videos of RGB and depth, streamed chunk by chunk (arXiv:2508.15720)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgen.errors import UserError, check_number
from postgen.families import denoiser_for
from postgen.worldweaver.adapter import carried_adapter, load_adapter
from postgen.worldweaver.call import check_transformer, session_of
from postgen.worldweaver.callbacks import check_callbacks, latents_of
from postgen.worldweaver.chunks import WorldWeaverChunk, collected
from postgen.worldweaver.levels import MODALITIES, Modality
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.plan import DEFAULTS, TRAINED, identity_of
from postgen.worldweaver.rollout import Step
from postgen.worldweaver.session import Session
from postgen.worldweaver.state import RolloutState
from postgen.worldweaver.told import Prompt
from postgen.worldweaver.widen import transformer_of, widened

BASES = ("LTXPipeline", "SkyReelsV2Pipeline", "WanPipeline")
"""Base pipelines whose networks take a noise level for each frame."""
SCALAR_BASES = ("CogVideoXPipeline",)
"""Base pipelines whose networks take one noise level for the clip; they need `mean_level`."""
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
NUM_FRAMES = 81
"""Default number of frames of a call."""

StepCallback = Callable[["WorldWeaverPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]
GroupCallback = Callable[["WorldWeaverPipeline", WorldWeaverChunk], None]


@dataclass
class WorldWeaverPipelineOutput(BaseOutput):
    """Output of a call: a whole video."""

    frames: Any
    """As in `WorldWeaverChunk`, concatenated over all chunks."""
    depth: Any = None
    """As in `WorldWeaverChunk`, concatenated over all chunks; None if depth was not requested."""
    state: RolloutState | None = None
    """State from which the video can be continued."""


class WorldWeaverPipeline(DiffusionPipeline):
    """Generates long videos group by group and streams them. Memory use and time per group are constant.

    Create it from a loaded pipeline with `from_pipe`, or from a folder of `save_pretrained` with `from_pretrained`.

    Args:
        transformer: widened, or stock for RGB only.
        level_embedder: `LevelEmbedder` with the same number of modalities as the transformer.
        vae: of the base model.
        text_encoder: of the base model.
        tokenizer: of the base model.
        scheduler: of the base model.
        base_pipeline: name of the diffusers class of the base model, one of `BASES` or `SCALAR_BASES`.
        base_settings: constructor arguments of that class beside its components.
        mean_level: for a network that takes one noise level for the clip, see `WorldWeaverModel`.
        defaults: default arguments of a call, by the names of `postgen.worldweaver.plan.DEFAULTS` and `TRAINED`.
        latent_scale: scale factor of each modality, see `WorldWeaverModel`; None: the scale of the transformer.
    """

    _callback_tensor_inputs = ("latents", "clean")

    def __init__(
        self,
        transformer: ModelMixin,
        level_embedder: ModelMixin,
        vae: ModelMixin,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: SchedulerMixin,
        base_pipeline: str = "WanPipeline",
        base_settings: dict[str, Any] | None = None,
        mean_level: bool = False,
        defaults: dict[str, Any] | None = None,
        latent_scale: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(  # type: ignore[no-untyped-call]
            transformer=transformer,
            level_embedder=level_embedder,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        self.register_to_config(  # type: ignore[no-untyped-call]
            base_pipeline=base_pipeline,
            base_settings=base_settings,
            mean_level=mean_level,
            defaults=defaults,
            latent_scale=latent_scale,
        )

    @classmethod
    def from_pipe(  # type: ignore[override]
        cls,
        pipeline: Any,
        adapter: str | PathLike[str] | None = None,
        *,
        aux: Sequence[Modality] = ("depth",),
        mean_level: bool = False,
    ) -> Self:
        """Create the pipeline from a loaded base pipeline. Components are shared; the transformer is widened in place.

        Args:
            pipeline: a pipeline of a class in `BASES`. It can no longer generate videos itself, unless aux is empty or
                until `postgen.worldweaver.widen.narrow_transformer` is called.
            adapter: folder of `save_adapter`. Its settings become the defaults of a call. None: a widened transformer
                keeps its level embedder and the settings of its loaded adapter; a stock transformer is widened and
                is untrained.
            aux: modalities to add to a stock transformer without adapter; () keeps RGB only.
            mean_level: see the class.

        Raises:
            UserError: a pipeline of another class, or an error of `load_adapter` or `widen_transformer`.
        """
        name = _base_of(pipeline, mean_level)
        loaded = carried_adapter(pipeline, tuple(aux)) if adapter is None else load_adapter(pipeline, Path(adapter))
        scale = widened(pipeline).latent_scale
        takes = inspect.signature(type(pipeline).__init__).parameters
        own = {key: value for key, value in pipeline.config.items() if key in takes and key not in pipeline.components}
        return cls(
            **{part: getattr(pipeline, part) for part in PARTS},
            level_embedder=loaded.embedder,
            base_pipeline=name,
            base_settings=own,
            mean_level=mean_level,
            defaults={key: loaded.settings[key] for key in (*DEFAULTS, *TRAINED) if key in loaded.settings},
            latent_scale=None if scale is None else list(scale),
        )

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **options: Any) -> None:
        """Save the pipeline like any diffusers pipeline.

        Raises:
            UserError: the transformer has a LoRA, which the folder of a model cannot store.
        """
        if names := [*(getattr(self.transformer, "peft_config", None) or {})]:
            raise UserError(
                f"the transformer has the LoRA {', '.join(names)}, which a saved model cannot store: keep the adapter"
                " and the base model, or merge the LoRA first (transformer.fuse_lora, then unload_lora)"
            )
        super().save_pretrained(save_directory, *args, **options)

    @property
    def model(self) -> WorldWeaverModel:
        """The model with its level embedder, for rollouts and training, made from the current components.

        Raises:
            UserError: the components do not match.
        """
        return self._model(None)

    def load_state(self, folder: str | PathLike[str]) -> RolloutState:
        """Load a state that `state.save` wrote to the device of this pipeline.

        Raises:
            UserError: there is no state, or it is damaged or of another model.
        """
        return RolloutState.load(Path(folder), model=identity_of(self.model), device=self.transformer.device)

    def stream(
        self,
        prompt: Prompt | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        video: Any = None,
        depth: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        causal_block_size: int | None = None,
        ar_step: int | None = None,
        overlap_history: int | None = None,
        base_num_frames: int | None = None,
        history_sizes: tuple[int, int] | None = None,
        keep_first_frame: bool | None = None,
        addnoise_condition: float | None = None,
        memory_policy: Any = None,
        flow_shift: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_depth: bool = False,
        state: RolloutState | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_group_end: GroupCallback | None = None,
        max_sequence_length: int | None = None,
    ) -> Iterator[WorldWeaverChunk]:
        """Yield a video chunk by chunk while it is generated. Arguments are checked at once.

        Args:
            prompt: a text, a list of B texts, or a schedule [(frame, text), ...] with frames of the video.
            negative_prompt: negative prompt; needs guidance.
            image: first frame of the video, resized to the size of the video; one for all videos, or B.
            video: beginning of the video. It is encoded once, and its frames are the first frames of the output.
            depth: distances of the image or video, (H, W), (F, H, W) or (B, F, H, W); None: unknown.
            height: height in pixels, default 480.
            width: width in pixels, default 832.
            num_frames: frames of the whole video; None: no end, or the end of the state.
            num_inference_steps: N, denoising steps of each frame, default 30.
            guidance_scale: scale of classifier-free guidance, default 5; up to 1 disables guidance.
            causal_block_size: F, latent frames of a group, default 3.
            ar_step: S, lag in steps between a group and the group before it, default 10; 0 generates one group after
                the other.
            overlap_history: frames of short memory, instead of the second number of history_sizes.
            base_num_frames: frames of the whole window: long memory, short memory and groups in flight. It sets the
                size of long memory, instead of the first number of history_sizes.
            history_sizes: latent frames of long and short memory, default (4, 2).
            keep_first_frame: whether the first latent frame is always in long memory, default True.
            addnoise_condition: noise level of RGB in long memory, times 1000, default 120.
            memory_policy: policy that selects long memory: a name or a policy of `postgen.worldweaver.selection`.
            flow_shift: shift of the noise levels; None: the shift of the scheduler.
            generator: generator of the noise, one or B. A single generator seeds one for each of several videos.
            prompt_embeds: (B, L, D) encodings instead of a prompt.
            negative_prompt_embeds: (B, L, D) encodings; required with prompt_embeds and guidance.
            output_type: np, pt, pil or latent.
            return_depth: whether chunks contain depth.
            state: state from which to continue, updated in place. Its sizes, steps and memory settings stay. Prompts,
                guidance, num_frames and generators can be changed; output_type and return_depth must need the same
                decoders as before.
            callback_on_step_end: called with (pipe, number of the forward pass, timesteps (T,) of the frames in
                flight, tensors); may return other "latents".
            callback_on_step_end_tensor_inputs: list of "latents" and "clean", each (B, M * C, T, h, w).
            callback_on_group_end: called with (pipe, chunk) for every chunk before it is yielded.
            max_sequence_length: tokens of a prompt; None: the default of the base model.

        Raises:
            UserError: wrong arguments, or arguments that contradict each other or the state.
        """
        said = dict(locals())  # all arguments by name
        check_callbacks(said, self._callback_tensor_inputs)
        with torch.no_grad():
            model = self._model(max_sequence_length)
            session = session_of(model, said, self.config["defaults"] or {}, self.transformer.device)
        return self._chunks(session, callback_on_step_end, callback_on_step_end_tensor_inputs, callback_on_group_end)

    def __call__(
        self,
        prompt: Prompt | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        video: Any = None,
        depth: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        causal_block_size: int | None = None,
        ar_step: int | None = None,
        overlap_history: int | None = None,
        base_num_frames: int | None = None,
        history_sizes: tuple[int, int] | None = None,
        keep_first_frame: bool | None = None,
        addnoise_condition: float | None = None,
        memory_policy: Any = None,
        flow_shift: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_depth: bool = False,
        return_dict: bool = True,
        state: RolloutState | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_group_end: GroupCallback | None = None,
        max_sequence_length: int | None = None,
    ) -> WorldWeaverPipelineOutput | tuple[Any, ...]:
        """Generate a whole video. The result equals all chunks of `stream`, bit by bit.

        The arguments are those of `stream` and return_dict; with return_dict=False the result is a tuple (frames,
        depth). num_frames is 81 by default. With a state, only the remaining frames are returned.

        Raises:
            UserError: as in `stream`, or a state without end and no num_frames.
        """
        said = {name: value for name, value in locals().items() if name not in ("self", "return_dict", "__class__")}
        if state is None:
            said["num_frames"] = NUM_FRAMES if num_frames is None else num_frames
        elif num_frames is None and state.end is None:
            raise UserError("the video of this state has no end: give num_frames, or use stream")
        chunks = list(self.stream(**said))
        if not chunks:
            raise UserError("the video of this state is complete: give a larger num_frames")
        frames = collected([chunk.frames for chunk in chunks], output_type)
        seen = collected([chunk.depth for chunk in chunks], output_type) if return_depth else None
        if not return_dict:
            return frames, seen
        return WorldWeaverPipelineOutput(frames=frames, depth=seen, state=chunks[-1].state)

    def _chunks(
        self,
        session: Session,
        callback: StepCallback | None,
        names: Sequence[str],
        on_group: GroupCallback | None,
    ) -> Iterator[WorldWeaverChunk]:
        scale = session.model.denoiser.timestep_scale
        calls = session.calls
        with self.progress_bar(total=math.inf if calls is None else calls) as bar:

            def after(step: Step) -> Tensor | None:
                bar.update()
                if callback is None:
                    return None
                timesteps = session.rollout.schedule.sigmas[step.index] * scale
                tensors = {name: getattr(step, name) for name in names}
                return latents_of(callback(self, step.call, timesteps, tensors))

            chunks = session.chunks(after)
            while True:
                # no_grad must not span the yield: the caller's gradient mode would change while a stream is suspended.
                with torch.no_grad():
                    chunk = next(chunks, None)
                    if chunk is None:
                        return
                    if on_group is not None:
                        on_group(self, chunk)
                yield chunk

    def _model(self, max_sequence_length: int | None) -> WorldWeaverModel:
        check_transformer(self.transformer)
        base = _base_class(self.config["base_pipeline"])
        parts = {part: getattr(self, part) for part in PARTS}
        denoiser = denoiser_for(base(**parts, **(self.config["base_settings"] or {})))
        if max_sequence_length is not None:
            check_number("max_sequence_length", max_sequence_length, 1, 2**16, whole=True)
            denoiser.max_sequence_length = max_sequence_length
        # A transformer from a folder has no record of its modalities; the config of the level embedder has it.
        sizes = self.transformer.config  # text-to-video: inputs beyond the latents are placed memory
        placed = sizes["in_channels"] > (sizes["out_channels"] or sizes["in_channels"])
        wide = widened(self.transformer, MODALITIES[: self.level_embedder.config["modalities"]], placed=placed)
        if wide.embedder is not self.level_embedder:  # loaded from a folder: record it for other pipelines too
            wide.driven_by(self.level_embedder, self.config["defaults"])
        own = {name: self.config[name] for name in ("mean_level", "latent_scale")}
        return WorldWeaverModel(denoiser, self.level_embedder, **own)


def _base_class(name: str) -> Any:
    known = (*BASES, *SCALAR_BASES)
    if name not in known:
        raise UserError(f"base_pipeline must be one of {', '.join(known)}, got {name!r}")
    return getattr(diffusers, name)


def _base_of(pipeline: Any, mean_level: bool) -> str:
    """Return the class name of a base pipeline after checking it; nothing is changed."""
    name = type(pipeline).__name__
    if name not in (*BASES, *SCALAR_BASES):
        raise UserError(
            f"{name} cannot be the base of WorldWeaver: load the model as one of {', '.join(BASES)}, or with"
            f" mean_level=True as {', '.join(SCALAR_BASES)}. Give a first frame as the argument image of the call"
        )
    transformer_of(pipeline)  # raises for two experts
    if mean_level != (name in SCALAR_BASES):
        raise UserError(
            f"{name} takes one noise level for a whole clip: give mean_level=True (see the docs for its limits)"
            if name in SCALAR_BASES
            else f"{name} takes a noise level for each frame: omit mean_level"
        )
    return name
