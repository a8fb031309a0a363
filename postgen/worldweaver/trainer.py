"""Method `worldweaver`: fine-tune a video model to depth, a noise level for every frame, and memory.

The trainer runs flow matching on windows (`postgen.worldweaver.windows`) of clips that are encoded before the first
step. WorldWeaver (arXiv:2508.15720) publishes neither code nor settings, so the recipe is our own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import Condition, Denoiser
from postgen.families.exports import write_note
from postgen.families.linear_checks import check_not_quantized
from postgen.sampling.schedule import chosen_schedule
from postgen.sampling.seeds import seed_of
from postgen.training import Trainer, TrainingConfig, Weights
from postgen.training.logging import say
from postgen.training.lora import add_adapters
from postgen.training.modes import checkpoint_gradients
from postgen.training.policy import frozen, load_model, park_text_encoders
from postgen.training.updates import decay_groups

from .adapter import EMBEDDER, save_adapter
from .clips import ClipBatch, ClipPool
from .embedding import LevelEmbedder
from .latent_scale import Scale, measured_scale
from .model import WorldWeaverModel
from .placed_rollout import check_streams
from .texts import Texts
from .train_config import WorldWeaverConfig
from .video_clips import video_pool
from .widen import Widened, narrow_transformer, transformer_of, widen_transformer, widened
from .window_loss import WindowLoss
from .windows import Layout, Window, Windows
from .world_clips import world_pool

_MODEL = "worldweaver"


class WorldWeaverTrainer(Trainer[WorldWeaverConfig]):
    """Fine-tunes a text-to-video model on windows of several modalities with memory.

    Args:
        args: the configuration.
        model: pipeline, folder or Hub id of the base model; None: `args.model`, or the embedded model without it.
        callbacks: list of `transformers.TrainerCallback`.

    Raises:
        UserError: a model that cannot be widened or is not a flow model, clips that are too short, or clips without
            depth.
    """

    config_class: ClassVar[type[TrainingConfig]] = WorldWeaverConfig

    def __init__(self, args: WorldWeaverConfig, model: Any = None, **words: Any) -> None:
        super().__init__(args, **words)
        self.source = args.model if model is None else model
        self.eval_pool: ClipPool | None = None
        self._micro = 0

    # Set-up.

    def build(self) -> Mapping[str, nn.Module]:
        """Load and widen the base model, render or read the clips, and encode clips and texts."""
        args = self.args
        self.pipe, defaults = load_model(self.source, args, self.device)
        self.guidance = None if defaults is None else defaults.guidance_scale
        self.denoiser: Denoiser = frozen(self.pipe, args)
        self._check_model()
        loss = WindowLoss(self.denoiser, self._widened(), args.loss_weights)
        self._model = loss.model
        # Check the settings before the clips are made, because making them takes long.
        shape = self._model.latent_shape(args.num_frames, *args.size)
        cpu = torch.device("cpu")
        schedule = chosen_schedule("linspace", self.denoiser, self.pipe, args.num_inference_steps, shape, cpu)
        self.windows = Windows(args, schedule, shape[1])
        self._read_clips(loss.model)
        self._model.latent_scale = args.latent_scale or self._measured_scale()
        return {_MODEL: loss}

    def _check_model(self) -> None:
        if self.denoiser.prediction_type != "flow":
            raise UserError(
                f"{type(self.pipe).__name__} predicts {self.denoiser.prediction_type}: method worldweaver needs a flow"
                " model (Wan, LTX, SkyReels-V2, HunyuanVideo)"
            )
        if getattr(self.denoiser, "takes_image", False):
            raise UserError(
                f"{type(self.pipe).__name__} is an image-to-video model, but windows have no image condition: give a"
                " text-to-video model"
            )
        weights = transformer_of(self.pipe).parameters()
        kinds = {parameter.dtype for parameter in weights} & {torch.float16, torch.bfloat16}
        if self.sharded:
            raise UserError("method worldweaver needs the whole weights in each process: omit fully_shard and FSDP")
        if torch.float16 in kinds and self.args.use_peft:
            # Autocast to bfloat16 supports weights in float32 and bfloat16 only.
            raise UserError(
                "the model's weights are torch.float16, but trained weights are float32: set dtype: float32, or"
                " dtype: bfloat16 with bf16: true"
            )
        if kinds and not self.args.bf16:
            raise UserError(
                f"the model's weights are {', '.join(map(str, kinds))}, but trained weights are float32: set"
                " bf16: true or dtype: float32"
            )

    def _widened(self) -> LevelEmbedder:
        """Widen the transformer, add the LoRA, and return the level embedder."""
        args, model = self.args, transformer_of(self.pipe)
        if args.aux:
            # "zero": with the skip connection zero outputs are the linear guess, a better start than the RGB rows.
            widen_transformer(self.pipe, tuple(args.modalities[1:]), "zero", placed=args.placed_memory)
        wide: Widened = widened(self.pipe, args.modalities)
        add_adapters(self.pipe, self.denoiser, args)
        if not args.use_peft:
            check_not_quantized(model, "be trained as a whole: train a LoRA, or load the exact model")
            model.requires_grad_(True).float()
        for name in (wide.widths.first, wide.widths.last):
            model.get_submodule(name).requires_grad_(True).float()
        if args.gradient_checkpointing:
            checkpoint_gradients(model)
        self._new = (f"transformer.{wide.widths.first}.", f"transformer.{wide.widths.last}.", f"{EMBEDDER}.")
        made: LevelEmbedder = LevelEmbedder.for_transformer(
            self.pipe, skip=bool(args.aux), refine=args.refine if args.aux else 0
        )
        return made

    def _read_clips(self, model: WorldWeaverModel) -> None:
        args = self.args
        self.texts = Texts(self.denoiser, self.device)
        wrong = args.corrupt_share > 0 and sum(args.history_sizes) > 0
        if args.placed_memory:
            check_streams(self.pipe.vae)
        if args.train_dataset is None:
            cameras, placing = args.memory_policy == "camera", args.placing()
            scenes = partial(world_pool, args, model, self.texts, cameras=cameras, placing=placing, bf16=args.bf16)
            self.pool = scenes(part=self.accelerator.process_index, wrong=wrong)
            self.eval_pool = scenes(evaluation=True, wrong=False) if args.eval_clips else None
        else:
            one, all_of_them = self.accelerator.process_index, self.accelerator.num_processes
            videos = partial(video_pool, args, model, self.texts, bf16=args.bf16, part=one, parts=all_of_them)
            self.pool = videos(args.train_dataset, "train_dataset", wrong=wrong)
            self.eval_pool = videos(args.eval_dataset, "eval_dataset", wrong=False) if args.eval_dataset else None
        park_text_encoders(self.pipe)
        if self.accelerator.is_main_process:
            said = " + ".join(model.modalities)
            say(
                f"{len(self.pool)} clips of {self.pool.texts.shape[1]} latent frames ({said}), {len(self.texts)} texts"
            )

    def _measured_scale(self) -> Scale:
        return measured_scale(self.pool.latents, lambda sums: self._summed(sums.float().to(self.device)))

    def _summed(self, values: Tensor) -> Tensor:
        found: Tensor = self.accelerator.reduce(values, "sum")
        return found

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the new layers and of the adapted weights, each with its learning rate."""
        args = self.args
        new: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.trained().items():
            (new if name.removeprefix(f"{_MODEL}.").startswith(self._new) else rest).append(parameter)
        groups = decay_groups(rest, lr=args.learning_rate)
        return groups + decay_groups(new, lr=args.learning_rate_new or args.learning_rate)

    # Steps.

    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Draw a window from some clips and return its loss.

        All processes use the same layout in a step, so that none waits for another. Metrics: `<modality>_loss`.
        """
        args, micro = self.args, self._micro
        self._micro += 1
        chance = torch.Generator().manual_seed(seed_of(args.seed, "window", micro))
        layout = self.windows.layout(chance)
        own = self.progress() >= args.own_from and float(torch.rand((), generator=chance)) < args.own_share
        rank = self.accelerator.process_index
        rows = torch.Generator().manual_seed(seed_of(args.seed, "window", micro, 1 + rank))
        batch = self._batch(self.pool, layout, rows, args.per_device_train_batch_size)
        if own:
            self._remember_own(layout, batch, rows)
        window = self.windows.draw(
            layout, batch.latents, rows, corrupted=batch.wrong, poses=batch.poses, sights=batch.sights
        )
        return self._compare(self.models[_MODEL], window, batch.texts, self.generator)

    def _compare(
        self, network: nn.Module, window: Window, texts: list[int], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        noise = torch.randn(window.clean.shape, generator=generator, device=self.device)
        z, target = window.noised(noise), window.target(noise)
        told = self._told(window, texts, generator)
        loss, terms = network(z, window.levels, told, target, window.counted)
        return loss, terms

    def _told(self, window: Window, texts: list[int], generator: torch.Generator) -> Condition:
        told = self.texts.of(texts)
        return told if window.placed is None else {**told, "placed": window.placed.noised(generator)}

    def _batch(self, pool: ClipPool, layout: Layout, rows: torch.Generator, count: int) -> ClipBatch:
        """Draw some clips of a pool, with their texts."""
        clips = torch.randint(len(pool), (count,), generator=rows)
        draw = torch.rand(count, 2, generator=rows)
        later = (draw[:, 0] >= self.args.start_caption).long() * layout.start
        texts = pool.texts[clips, later]
        texts = torch.where(draw[:, 1] < self.args.caption_dropout, 0, texts)
        return ClipBatch(
            latents=self._model.scaled(pool.joint(clips, self.device)),
            wrong=pool.wrong(clips, self.device),
            poses=None if pool.poses is None else pool.poses[clips],
            texts=texts.tolist(),
            sights=pool.seen(clips, self.device),
        )

    @torch.no_grad()
    def _remember_own(self, layout: Layout, batch: ClipBatch, rows: torch.Generator) -> None:
        """Replace the latents of the group before the window by those that the model generates in one rollout shift.

        Nothing changes if there is no such group, or in windows that fill, whose memory is given to the rollout.
        """
        args, windows = self.args, self.windows
        size, start = args.causal_block_size, layout.start - args.causal_block_size
        if start < 0 or layout.ages[0] != args.groups - 1 or not sum(args.history_sizes):
            return
        before = Layout(ages=layout.ages, start=start)
        level = torch.rand(len(batch.latents), generator=rows) * args.mem_noise_max
        steps = windows.segments.length
        network, device = self.unaveraged(_MODEL), self.device
        window = windows.at(before, batch.latents, 0, level, batch.poses, batch.sights)
        told = self._told(window, batch.texts, self.generator)
        z = window.noised(torch.randn(window.clean.shape, generator=self.generator, device=device))
        for step in range(steps):
            after = windows.at(before, batch.latents, (step + 1) / steps, level, batch.poses, batch.sights)
            velocity, _ = network(z, window.levels, told)
            change = (after.levels.sigma - window.levels.sigma)[:, None, :, :1, None]
            # Memory has the same level before and after the step, so its latents do not change.
            z, window = z + change * velocity, after
        memory = z.shape[2] - len(layout.ages) * size
        own = z[:, :, memory : memory + size].to(batch.latents.dtype)
        batch.put(own, start)

    def evaluate(self) -> dict[str, float]:
        """Return the mean loss and its terms on held-out clips, with the same windows in every evaluation.

        The term of a modality is a mean over the windows in which the modality counts. Without such windows it is
        omitted.
        """
        if self.eval_pool is None:
            return {}
        args, found = self.args, dict[str, list[Tensor]]()
        count = min(args.per_device_train_batch_size, len(self.eval_pool))
        for number in range(-(-len(self.eval_pool) // count)):
            rows = torch.Generator().manual_seed(seed_of(args.seed, "eval", number))
            batch = self._batch(self.eval_pool, layout := self.windows.layout(rows), rows, count)
            window = self.windows.draw(layout, batch.latents, rows, poses=batch.poses, sights=batch.sights)
            noise = torch.Generator(self.device).manual_seed(seed_of(args.seed, "eval", number, 1))
            loss, terms = self._compare(self.unaveraged(_MODEL), window, batch.texts, noise)
            known = [True, *window.counted.flatten(0, 1).any(0).tolist()]
            for name in compress(("loss", *terms), known):
                found.setdefault(name, []).append(torch.as_tensor(loss if name == "loss" else terms[name]))
        return {name: float(torch.stack(values).mean()) for name, values in found.items()}

    # Checkpoints and export.

    def state_dict(self) -> dict[str, Any]:
        """Return the number of micro-batches so far, the measured latent scale, and whether there is a skip."""
        skip = self._model.embedder.config["skip"]
        return {"micro": self._micro, "latent_scale": list(self._model.latent_scale), "skip": skip}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self._micro = int(state["micro"])
        self._model.embedder.register_to_config(skip=state.get("skip", False))  # type: ignore[no-untyped-call]
        if self.args.latent_scale is None:  # checkpoints of older versions have no entry; their scale is 1
            self._model.latent_scale = state.get("latent_scale", [1.0] * len(self._model.modalities))

    def export(self, folder: Path, weights: Weights) -> None:
        """Write the adapter for `load_adapter`. If all weights are trained, also write the base model."""
        own = weights[_MODEL]
        parts = {
            name: {key.removeprefix(f"{name}."): value for key, value in own.items() if key.startswith(f"{name}.")}
            for name in ("transformer", EMBEDDER)
        }
        args = self.args
        own_shift = self.pipe.scheduler.config.get("flow_shift", self.pipe.scheduler.config.get("shift"))
        settings = {**args.rollout_settings(), "flow_shift": own_shift}
        settings |= dict(zip(("height", "width"), args.size, strict=True))
        guidance = self.guidance if args.guidance_scale is None else args.guidance_scale
        if guidance is not None:
            settings["guidance_scale"] = guidance
        loss: Any = self.unwrap(_MODEL)
        dtype = getattr(torch, args.export_dtype)
        base = None if args.use_peft else narrow_transformer(copy.deepcopy(transformer_of(self.pipe)))
        save_adapter(self.pipe, folder, loss.level_embedder, weights=parts, settings=settings, dtype=dtype)
        if base is not None:
            base.to(dtype).save_pretrained(folder / "transformer")
            write_note(folder, self.pipe, ["transformer"])
