"""A session of long-video generation: a rollout, its state, and the decoder of finished groups."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError, shown
from postgen.families.padding import merged_padding
from postgen.worldweaver.chunks import ChunkDecoder, WorldWeaverChunk
from postgen.worldweaver.given import Given
from postgen.worldweaver.levels import Modality
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.plan import Plan, frames_of_latent, identity_of, rollout_again, rollout_of
from postgen.worldweaver.rollout import Group, OnStep, Rollout
from postgen.worldweaver.state import Prompts, RolloutState


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The requested output."""

    num_frames: int | None
    """Number of frames of the whole video, including given and finished frames. None: `begin` sets no end, `resume`
    keeps the end of the state."""
    output_type: str
    depth: bool


class Session:
    """Generates one long video, or a batch of them. Create it with `begin` or `resume`; iterate over `chunks`."""

    def __init__(
        self,
        model: WorldWeaverModel,
        rollout: Rollout,
        state: RolloutState,
        decoder: ChunkDecoder,
        given: Given | None = None,
    ) -> None:
        self.model = model
        self.rollout, self.state, self.decoder, self.given = rollout, state, decoder, given
        self._place = self._standing

    @classmethod
    def begin(
        cls,
        model: WorldWeaverModel,
        plan: Plan,
        prompts: Prompts,
        generators: Sequence[torch.Generator],
        wanted: Wanted,
        given: Given | None,
        device: torch.device,
    ) -> Session:
        """Return a session for a new video.

        Raises:
            UserError: a size that the model does not support, a video that is not longer than its given beginning, or
                an error of `Rollout.start` or `ChunkDecoder`.
        """
        height, width, count = plan.height, plan.width, wanted.num_frames
        time = frames_of_latent(model, height, width)
        channels, latents, *space = model.latent_shape(1 if count is None else count, height, width)
        total = None if count is None else latents
        begins = 0 if given is None else given.latents.shape[2]
        if total is not None and total <= begins:
            raise UserError(f"num_frames={count} is not more than the given image or video has: give a larger number")
        decoder = ChunkDecoder(model, depth=wanted.depth, output_type=wanted.output_type, time=time, num_latents=total)
        rollout = rollout_of(model, plan, device)
        state = rollout.start(
            (channels, space[0], space[1]),
            prompts,
            generators,
            plan.bank(len(model.modalities), len(generators)),
            num_latents=None if total is None else total - begins,
            given=None if given is None else given.latents.to(device),
            unknown=() if given is None else given.unknown,
            model={**identity_of(model), "guidance": plan.guidance, "height": height, "width": width},
        )
        state.extra = {} if given is None else dict(given.extra)
        return cls(model, rollout, state, decoder, given)

    @classmethod
    def resume(
        cls,
        model: WorldWeaverModel,
        state: RolloutState,
        prompts: Prompts,
        generators: Sequence[torch.Generator],
        wanted: Wanted,
        guidance: float,
        device: torch.device,
    ) -> Session:
        """Return a session that continues from a state. The session updates the state in place.

        Raises:
            UserError: `num_frames` is less than the frames in flight need, or an error of `ChunkDecoder.resume` or
                `RolloutState.tell`.
        """
        size = state.model["height"], state.model["width"]
        time = frames_of_latent(model, *size)
        end = state.end
        if wanted.num_frames is not None:
            end = model.latent_shape(wanted.num_frames, *size)[1]
            if end < state.next_frame:
                least = (state.next_frame - 1) * time + 1
                raise UserError(
                    f"num_frames={wanted.num_frames} ends before the frames in flight: give at least {least}"
                )
        decoder = ChunkDecoder(model, depth=wanted.depth, output_type=wanted.output_type, time=time, num_latents=end)
        decoder.resume(state, end)
        rollout = rollout_again(model, state, guidance, device)
        state.tell(prompts)  # the last statement that can fail, so an error leaves the state unchanged
        state.end, state.model["guidance"], state.generators = end, guidance, list(generators)
        return cls(model, rollout, state, decoder)

    @property
    def calls(self) -> int | None:
        """Number of remaining forward passes; None: the video has no end."""
        if self.state.end is None:
            return None
        groups, shifts = self.rollout.segments.groups, 0
        ages = [group.age for group in self.state.flight]
        more = -(-max(0, self.state.end - self.state.next_frame) // self.rollout.frames)
        while ages or more:
            if more and ages[-1:] in ([], [1]):
                ages, more = [*ages, 0], more - 1
            if ages[0] == groups:
                ages = ages[1:]
                continue
            ages, shifts = [age + 1 for age in ages], shifts + 1
        return shifts * self.rollout.segments.length

    def chunks(self, on_step: OnStep | None = None) -> Generator[WorldWeaverChunk, None, None]:
        """Yield chunks of finished frames, beginning with the given frames; see `WorldWeaverChunk.state`."""
        state, decoder = self.state, self.decoder
        if self.given is not None:
            latents = self.given.latents
            chunk = decoder.chunk(latents, self._decode_given(latents), state)
            state.extra = decoder.remembered(state.extra)
            yield chunk
        made: list[WorldWeaverChunk] = []

        def decode(group: Group) -> dict[str, Tensor]:
            # Decoding runs before the group leaves the state, so a failed or interrupted group is decoded again.
            stop = group.start_frame + group.latents.shape[2]
            clips = decoder.push(group.latents, last=stop == state.end)
            made[:] = [decoder.chunk(group.latents, clips, state)]
            return decoder.remembered(state.extra)

        groups = self.rollout.groups(state, on_step=on_step, on_group=decode)
        while self._here() and self._next(groups) is not None:
            self._place = self._standing
            yield made.pop()

    def _next(self, groups: Iterator[Group]) -> Group | None:
        # Most tokens of a prompt are padding: without merging, a small network spends a quarter of its time on them.
        with merged_padding(self.model.transformer):
            return next(groups, None)

    @property
    def _standing(self) -> tuple[int, int]:
        return self.state.calls, self.state.finished

    def _here(self) -> bool:
        """Check that no other session has advanced the state, because the decoder caches would not match the state.

        Raises:
            UserError: another session has advanced the state.
        """
        if self._standing != self._place:
            raise UserError("another stream has advanced this state: give each stream its own copy, state.branch()")
        return True

    def _decode_given(self, latents: Tensor) -> dict[Modality, Tensor]:
        """Decode in pieces of one group, so that memory use does not grow with the number of given frames."""
        parts = [self.decoder.push(part, last=False) for part in latents.split(self.rollout.frames, 2)]
        return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def check_state(model: WorldWeaverModel, state: RolloutState) -> None:
    """Check that a state belongs to a model.

    Raises:
        UserError: the state is of another model. The message names the first difference.
    """
    for name, own in identity_of(model).items():
        if (found := state.model.get(name)) != own:
            raise UserError(
                f"the state is of a model with {name} {shown(found)}, the current model has {name} {shown(own)}: load"
                " the model that the state was made with"
            )
