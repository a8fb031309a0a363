"""WorldWeaver: long videos, streamed chunk by chunk, of RGB and depth (arXiv:2508.15720)."""

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
"""Pipelines whose networks take a noise level for each frame."""
SCALAR_BASES = ("CogVideoXPipeline",)
"""Those that take one for the clip, and need `mean_level`."""
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
NUM_FRAMES = 81
"""Of a call that says nothing."""

StepCallback = Callable[["WorldWeaverPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]
GroupCallback = Callable[["WorldWeaverPipeline", WorldWeaverChunk], None]


@dataclass
class WorldWeaverPipelineOutput(BaseOutput):
    """A whole video."""

    frames: Any
    """As of `WorldWeaverChunk`, of all chunks."""
    depth: Any = None
    """Likewise."""
    state: RolloutState | None = None
    """From which the video goes on."""


class WorldWeaverPipeline(DiffusionPipeline):
    """Makes long videos group by group, at constant memory and time per group, and hands them out as they are made.

    Made of a pipeline that is loaded by `from_pipe`, or of a folder that `save_pretrained` wrote by `from_pretrained`.

    Args:
        transformer: widened, or stock for RGB alone.
        level_embedder: for as many modalities as the transformer has.
        vae: of the base model, as the following.
        text_encoder: ...
        tokenizer: ...
        scheduler: ...
        base_pipeline: name of the diffusers class whose model this is, one of `BASES` or `SCALAR_BASES`.
        base_settings: what that class is told beside its components.
        mean_level: for a network that takes one noise level for the clip, see `WorldWeaverModel`.
        defaults: of the call, by the names of `postgen.worldweaver.plan.DEFAULTS` and `TRAINED`.
        latent_scale: of each modality, see `WorldWeaverModel`; None is that of the transformer.
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
        """Make one of a pipeline that is loaded, sharing its components; its transformer is widened in place.

        Args:
            pipeline: one of `BASES`; it makes no videos by itself any more, unless aux is empty or
                `postgen.worldweaver.widen.narrow_transformer` is called.
            adapter: folder of `save_adapter`; its settings are the defaults of the call. None: a transformer that is
                widened is taken as it is, with the level embedder and the settings of the adapter that is in it; a
                stock one is widened untrained.
            aux: what an untrained one gets beside RGB; () leaves it as it is, a model of RGB alone.
            mean_level: see the class.

        Raises:
            UserError: a pipeline of another class, or as `load_adapter` and `widen_transformer`.
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
        """Save the pipeline as any of diffusers.

        Raises:
            UserError: the transformer has a LoRA, which no folder of a model carries.
        """
        if names := [*(getattr(self.transformer, "peft_config", None) or {})]:
            raise UserError(
                f"the transformer has the LoRA {', '.join(names)}, which a saved model does not have: keep the adapter"
                " and the base model, or merge it first (transformer.fuse_lora, then unload_lora)"
            )
        super().save_pretrained(save_directory, *args, **options)

    @property
    def model(self) -> WorldWeaverModel:
        """The network with its level embedder, as rollouts and training call it; made of the components as they are.

        Raises:
            UserError: components that do not belong together.
        """
        return self._model(None)

    def load_state(self, folder: str | PathLike[str]) -> RolloutState:
        """Read a state that `state.save` wrote, onto the device of this pipeline.

        Raises:
            UserError: there is none, it is damaged, or of another model.
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
        """Yield a video chunk by chunk, as it is made; what is wrong with the arguments is said at once.

        Args:
            prompt: a text, one for each of B videos, or a schedule [(frame, text), ...] in frames of the video.
            negative_prompt: what the video should not show; needs guidance.
            image: first frame of the video, resized to it; one for all, or B.
            video: beginning of the video, which is encoded once; its frames come out first.
            depth: distances of the image or video, (H, W), (F, H, W) or (B, F, H, W); None is not known.
            height: pixels, 480 if nothing is said.
            width: pixels, 832.
            num_frames: of the whole video; None has no end, or that of the state.
            num_inference_steps: N steps of each frame, 30.
            guidance_scale: of classifier-free guidance, 5; up to 1 is none.
            causal_block_size: F, latent frames of a group, 3.
            ar_step: S, steps by which a group is behind the one before, 10; 0 makes one group after the other.
            overlap_history: frames of short memory, instead of the second of history_sizes.
            base_num_frames: frames of the window, memory and groups in flight: what is left is long memory.
            history_sizes: latent frames of long and short memory, (4, 2).
            keep_first_frame: whether the first latent frame always is in the long memory, True.
            addnoise_condition: noise on the RGB of long memory, of 1000: 120.
            memory_policy: which frames are long memory: a name or a policy of `postgen.worldweaver.selection`.
            flow_shift: shift of the noise levels; None is the scheduler's.
            generator: of the noise, one or B; one for several videos seeds one for each.
            prompt_embeds: (B, L, D) instead of a prompt.
            negative_prompt_embeds: (B, L, D), with guidance.
            output_type: np, pt, pil or latent.
            return_depth: whether chunks have their depth.
            state: go on from it, in place: with its sizes, steps and memory. Prompts, guidance, num_frames and
                generators may be others from here on; what frames come out must be as before.
            callback_on_step_end: called as (pipe, number of the call, timesteps (T,) of those in flight, tensors),
                may return other "latents".
            callback_on_step_end_tensor_inputs: of "latents" and "clean", (B, M * C, T, h, w).
            callback_on_group_end: called as (pipe, chunk) with every chunk before it is yielded.
            max_sequence_length: tokens of a prompt; None is the model's.

        Raises:
            UserError: arguments that are wrong, or contradict each other or the state.
        """
        said = dict(locals())  # every argument by its name
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
        """Make a whole video: all chunks of `stream`, to the bit.

        Args are those of `stream`, and return_dict, False for a tuple (frames, depth). num_frames is 81 if nothing is
        said; of a state, what is still to come is returned.

        Raises:
            UserError: as `stream`, or a state without end.
        """
        said = {name: value for name, value in locals().items() if name not in ("self", "return_dict", "__class__")}
        if state is None:
            said["num_frames"] = NUM_FRAMES if num_frames is None else num_frames
        elif num_frames is None and state.end is None:
            raise UserError("the video of this state has no end: give num_frames, or use stream")
        chunks = list(self.stream(**said))
        if not chunks:
            raise UserError("the video of this state is finished: give a larger num_frames")
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
                # Not around the yield: gradients are the caller's, and a stream may be left where Python ends.
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
        # A transformer of a folder does not say what its channels are, the embedder beside it does.
        sizes = self.transformer.config  # of text-to-video: what is more than the latents is placed memory
        placed = sizes["in_channels"] > (sizes["out_channels"] or sizes["in_channels"])
        wide = widened(self.transformer, MODALITIES[: self.level_embedder.config["modalities"]], placed=placed)
        if wide.embedder is not self.level_embedder:  # of a folder: another pipeline of this transformer takes it too
            wide.driven_by(self.level_embedder, self.config["defaults"])
        own = {name: self.config[name] for name in ("mean_level", "latent_scale")}
        return WorldWeaverModel(denoiser, self.level_embedder, **own)


def _base_class(name: str) -> Any:
    known = (*BASES, *SCALAR_BASES)
    if name not in known:
        raise UserError(f"base_pipeline must be one of {', '.join(known)}, got {name!r}")
    return getattr(diffusers, name)


def _base_of(pipeline: Any, mean_level: bool) -> str:
    """Return the class of a base pipeline, as diffusers names it; nothing is changed yet."""
    name = type(pipeline).__name__
    if name not in (*BASES, *SCALAR_BASES):
        raise UserError(
            f"{name} is no base of WorldWeaver: load the model as one of {', '.join(BASES)}; with mean_level=True also"
            f" {', '.join(SCALAR_BASES)}. A first frame is given to the call, as image"
        )
    transformer_of(pipeline)  # refuses two experts
    if mean_level != (name in SCALAR_BASES):
        raise UserError(
            f"{name} takes one noise level for a whole clip: give mean_level=True, and see what it costs"
            if name in SCALAR_BASES
            else f"{name} takes a noise level for each frame: leave mean_level out"
        )
    return name
