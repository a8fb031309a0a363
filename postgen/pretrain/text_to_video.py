"""Method `text_to_video`: trains a Wan denoiser and its text encoder by flow matching on encoded clips of the world.

Flow matching: x = (1 - sigma) x0 + sigma eps with the target eps - x0 (arXiv:2210.02747); sigma is logit-normal and
shifted (arXiv:2403.03206, eq. 19 and section 5.3.2).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postgen import world
from postgen.assets import model_folder
from postgen.errors import UserError
from postgen.families.installed import processor_stack
from postgen.families.wan import WanDenoiser
from postgen.training import Trainer, TrainingConfig, Weights
from postgen.training.sharding import uncut
from postgen.training.tokenizers import tokenize, train_tokenizer, word_tokenizer
from postgen.world.scenes import FIRST_TRAINING_SEED, draw_scenes
from postgen.world.wording import world_words

from .fast_step import GraphedCall, RowRotaryAttention
from .joint_pass import JointPass
from .latents import LatentPool, build_pool
from .levels import draw_kind, draw_sigma, error_by_level, flow_error, noised
from .other_patch import take_over
from .pipeline_folder import make_pipeline, new_transformer, sample_sheet, write_pipeline
from .text import PaddedCrossAttention, encode_text, new_text_encoder

NAME = "text_to_video"
"""Name of the claim on the processor stack during training."""


@dataclass(kw_only=True)
class TextToVideoConfig(TrainingConfig):
    """Settings of the method.

    Raises:
        UserError: a value outside its range, or a missing autoencoder.
    """

    autoencoder: str
    """Folder of a trained autoencoder: the export of method `autoencoder`, or a pipeline with a `vae` folder;
    `embedded` is the autoencoder of the embedded model."""

    size: int = 96
    """Height and width of the clips in pixels, a multiple of 16."""

    lengths: list[int] = field(default_factory=lambda: [17, 9, 25, 33])
    """Clip lengths for training, each 4n+1; the first is the default of the exported model."""

    length_weights: list[float] = field(default_factory=lambda: [0.6, 0.1, 0.15, 0.15])
    """Relative frequency of each length, and its share of the pool."""

    sizes: list[int] = field(default_factory=list)
    """Height and width of the clips of each length, the first one `size`; [] uses `size` for all."""

    even_cost: bool = False
    """Use more clips in batches of smaller clips, so that all batches have about the same number of latents."""

    noise_shares: list[float] = field(default_factory=lambda: [1.0, 0.0, 0.0])
    """Shares of batches with one noise level per clip, with a clean first latent, with one level per latent frame."""

    pool_clips: int = 32768
    """Number of encoded clips kept on the device, over all lengths."""

    captions_per_clip: int = 4
    """Number of differently worded captions per clip."""

    pool_round: int = 0
    """Index of the pool; another index renders other clips, for a run that continues from an export."""

    patch: int = 2
    """Side of a token of the denoiser in latent pixels, 1 or 2."""

    blocks_from: str = ""
    """Folder of a trained pipeline from which denoiser and text encoder are initialised, possibly with another patch
    size (`postgen.pretrain.other_patch`); `embedded` is the embedded model, empty uses random weights."""

    num_layers: int = 6
    """Number of transformer blocks of the denoiser."""

    num_heads: int = 4
    """Number of attention heads of the denoiser."""

    head_dim: int = 64
    """Width of an attention head."""

    ffn_dim: int = 576
    """Width of the feed-forward layers."""

    text_width: int = 192
    """Width of the text encoder."""

    text_layers: int = 2
    """Layers of the text encoder."""

    text_length: int = 39
    """Largest number of tokens of a training caption; longer captions are truncated."""

    vocabulary: int = 640
    """Largest number of tokens in the tokenizer's vocabulary."""

    whole_words: bool = False
    """Use a tokenizer of the whole words of the world, and no others, instead of subwords; `vocabulary` is unused."""

    synonym_share: float = 0.0
    """Probability that a synonym replaces a colour, shape or verb of a caption, in [0, 1]."""

    unknown_share: float = 0.0
    """Probability of an additional unknown word in a caption, in [0, 1]; needs `whole_words`."""

    shift: float = 2.0
    """Shift of sigma in training, and of the exported scheduler; at least 1."""

    caption_dropout: float = 0.1
    """Share of captions replaced by "", for classifier-free guidance."""

    bodies: list[float] = field(default_factory=lambda: [0.5, 0.4, 0.1])
    """Shares of scenes with one, two and three bodies."""

    pair_share: float = 0.0
    """Share of scenes with several bodies that must show a collision or a body passing behind another, in addition to
    scenes in which the world draws such an event anyway; in [0, 1]."""

    compile: bool = False
    """Compile the blocks of the denoiser."""

    cuda_graphs: bool = False
    """Replay forward and backward passes as CUDA graphs; needs gradient_accumulation_steps 1. On several GPUs both
    models then form one module: `init_from` accepts exports, and checkpoints of such a run only."""

    eval_prompts: int = 16
    """Number of prompts that the evaluation samples and checks."""

    eval_num_inference_steps: int = 20
    """Sampling steps of the evaluation, and default of the exported model."""

    eval_guidance_scale: float = 4.0
    """Guidance scale of the evaluation, and default of the exported model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes = self.sizes or [self.size] * len(self.lengths)
        self.require(self.size >= 16 and self.size % 16 == 0, "size", "a multiple of 16")
        self.require(
            bool(self.lengths) and all(n >= 5 and n % 4 == 1 for n in self.lengths), "lengths", "4n+1, at least 5"
        )
        for name in ("length_weights", "sizes"):
            self.require(len(getattr(self, name)) == len(self.lengths), name, "as many numbers as lengths")
        weights, shares = self.length_weights, self.noise_shares
        self.require(min(weights) >= 0 < sum(weights), "length_weights", "at least 0, not all 0")
        fit = self.sizes[0] == self.size and all(n >= 16 and n % 16 == 0 for n in self.sizes)
        self.require(fit, "sizes", "multiples of 16, the first one size")
        self.require(len(shares) == 3 and min(shares) >= 0 < sum(shares), "noise_shares", "three shares, not all 0")
        self.require(self.pool_clips >= len(self.lengths), "pool_clips", "at least one per length")
        self.require(len(self.bodies) == 3 and min(self.bodies) >= 0 < sum(self.bodies), "bodies", "three shares")
        self.require(self.shift >= 1, "shift", "at least 1")
        self.require(0 <= self.caption_dropout < 1, "caption_dropout", "in [0,1)")
        self.require(self.patch in (1, 2), "patch", "1 or 2")
        self.require(self.head_dim % 2 == 0 and self.head_dim >= 12, "head_dim", "even, at least 12")
        self.require(self.vocabulary >= 300, "vocabulary", "at least 300")
        self.require(0 <= self.pair_share <= 1, "pair_share", "in [0,1]")
        self.require(0 <= self.synonym_share <= 1, "synonym_share", "in [0,1]")
        self.require(0 <= self.unknown_share <= 1, "unknown_share", "in [0,1]")
        self.require(self.whole_words or not self.unknown_share, "unknown_share", "0 without whole_words")
        self.require(self.eval_prompts >= 0, "eval_prompts", "at least 0")
        needed = bool(self.merge_metric or self.evaluate_only)  # with eval_steps, 0 switches evaluations off
        self.require(self.eval_prompts > 0 or not needed, "eval_prompts", "at least 1 to evaluate")
        self.require(1 <= self.text_length <= 511, "text_length", "in 1..511")
        self.require(not self.torch_compile, "torch_compile", "false: the setting of this method is compile")
        if self.cuda_graphs:
            alone = self.gradient_accumulation_steps == 1
            self.require(alone, "gradient_accumulation_steps", "1 with cuda_graphs, whose gradients cannot add up")
            self.require(not self.fully_shard, "fully_shard", "false with cuda_graphs")
        begun = model_folder(self.blocks_from) if self.blocks_from else None
        if begun is not None and not (begun / "transformer").is_dir():
            raise UserError(f"blocks_from: {self.blocks_from} is not a pipeline folder with a transformer. Give one.")
        folder = model_folder(self.autoencoder)
        if not (folder / "config.json").is_file() and not (folder / "vae").is_dir():
            raise UserError(
                f"autoencoder: {self.autoencoder} has no autoencoder. Train one with recipes/tiny-autoencoder.yaml."
            )


def load_autoencoder(folder: str) -> Any:
    """Load the autoencoder of an export, of a pipeline folder or of the embedded model, in float32."""
    from diffusers import AutoencoderKLWan

    path = model_folder(folder)
    return AutoencoderKLWan.from_pretrained(path / "vae" if (path / "vae").is_dir() else path)


class TextToVideoTrainer(Trainer[TextToVideoConfig]):
    """Trains denoiser and text encoder together and exports a plain `WanPipeline` folder."""

    config_class: ClassVar[type[TrainingConfig]] = TextToVideoConfig

    def build(self) -> Mapping[str, nn.Module]:
        """Build denoiser and text encoder, with random or given weights; also encode the clips for training."""
        args = self.args
        if args.cuda_graphs and self.device.type != "cuda":
            raise UserError(f"cuda_graphs needs a GPU, not {self.device.type}. Leave it out.")
        self.vae = load_autoencoder(args.autoencoder).to(self.device).requires_grad_(False)
        self.tokenizer = _tokenizer(args)
        self.text_encoder = new_text_encoder(len(self.tokenizer), args.text_width, args.text_layers, 4)
        self.transformer = new_transformer(args, self.vae.config.z_dim)
        if args.blocks_from:
            take_over(self.transformer, self.text_encoder, self.tokenizer, model_folder(args.blocks_from))
        self.denoiser = WanDenoiser(make_pipeline(self.components(), args.shift))
        self.cross_attention, self.self_attention = PaddedCrossAttention(), RowRotaryAttention()
        self._claim()
        if args.compile:
            self.transformer.compile_repeated_blocks(dynamic=True)
        self.empty = tokenize(self.tokenizer, [""], args.text_length).to(self.device)
        self.pools = [self._pool(i) for i in range(len(args.lengths))]
        self.predict: Callable[..., Tensor] = self._predict
        if self._joint():
            return {"joint": self._joint_pass()}
        if args.cuda_graphs:
            self.predict = GraphedCall(self._predict, {"transformer": self.transformer, "text": self.text_encoder})
        return {"transformer": self.transformer, "text_encoder": self.text_encoder}

    def _joint(self) -> bool:
        """Whether both models form one module, whose graphs are recorded before processes average gradients."""
        return self.args.cuda_graphs and self.accelerator.num_processes > 1

    def _joint_pass(self) -> JointPass:
        if self.accelerator.is_fsdp2:
            raise UserError("cuda_graphs cannot record a model that is sharded over processes. Leave one of them out.")
        joint = JointPass(self._velocity, self.transformer, self.text_encoder, graphs=self.args.cuda_graphs)
        self.predict = lambda *inputs: self.models["joint"](*inputs)
        if self.args.cuda_graphs:
            joint.to(self.device).train()
            with self.accelerator.autocast():
                joint.record(self._samples())
        return joint

    def _samples(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield inputs of every shape that occurs in training steps."""
        for index, pool in enumerate(self.pools):
            batch = self._batch(index)
            x = torch.zeros((batch, *pool.latents.shape[1:]), device=self.device)
            ids, sigma = self.empty.repeat(batch, 1), x.new_full((batch, x.shape[2]), 0.5)
            if self.args.noise_shares[0]:
                yield x, sigma[:, 0].contiguous(), ids
            if any(self.args.noise_shares[1:]):
                yield x, sigma, ids

    def _pool(self, index: int) -> LatentPool:
        args, frames = self.args, self.args.lengths[index]
        share = args.length_weights[index] / sum(args.length_weights)
        count = max(1, round(args.pool_clips * share))
        part = args.pool_round * self.accelerator.num_processes + self.accelerator.process_index
        first = FIRST_TRAINING_SEED + 200_000 * (part * max(5, len(args.lengths)) + index)
        scenes = draw_scenes(
            first,
            count,
            frames,
            captions=args.captions_per_clip,
            bodies=tuple(args.bodies),
            pair_share=args.pair_share,
            synonym_share=args.synonym_share,
            unknown_share=args.unknown_share,
        )
        tokens, size = args.text_length, args.sizes[index]
        return build_pool(scenes, self.vae, self.tokenizer, size, tokens, self.device, bf16=args.bf16)

    def _batch(self, index: int) -> int:
        """Return the number of clips in a batch of a length."""
        args = self.args
        if not args.even_cost:
            return args.per_device_train_batch_size
        costs = [(1 + (n - 1) // 4) * size**2 for n, size in zip(args.lengths, args.sizes, strict=True)]
        return max(1, args.per_device_train_batch_size * costs[0] // costs[index])

    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the flow-matching loss of one batch.

        Metrics: `loss_noisy` and `loss_clean`, the mean error of clips above and below noise level 0.75, for batches
        with one level per clip; with mixed levels also `loss_<kind>` for each of `levels.KINDS`.
        """
        args = self.args
        # All processes draw the same kind of batch, so that none waits for another.
        chance = random.Random(f"kind-{args.seed}-{self.global_step}")
        index = chance.choices(range(len(self.pools)), args.length_weights)[0]
        kind, batch = draw_kind(args.noise_shares, chance), self._batch(index)
        x0, ids = self.pools[index].draw(batch, self.generator)
        dropped = torch.rand(batch, 1, generator=self.generator, device=self.device) < args.caption_dropout
        ids = torch.where(dropped, self.empty, ids)
        noise = torch.randn(x0.shape, generator=self.generator, device=self.device)
        sigma = draw_sigma(kind, batch, x0.shape[2], args.shift, self.generator, self.device)
        prediction = self.predict(noised(x0, noise, sigma), sigma, ids)
        error = flow_error(prediction, x0, noise, sigma)
        metrics = error_by_level(error, sigma) if kind == "one" else {}
        if any(args.noise_shares[1:]):
            metrics[f"loss_{kind}"] = error.detach().mean()
        return error.mean(), metrics

    def _predict(self, x: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        # Each model enters its own autocast: a cached cast that outlives it would be recorded into a graph.
        return self._velocity(self.models["transformer"], self.models["text_encoder"], x, sigma, ids)

    def _velocity(self, transformer: Any, text_encoder: Any, x: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        hidden, offset = encode_text(text_encoder, ids)
        self.cross_attention.set(offset, torch.bfloat16 if self.args.bf16 else torch.float32)
        timestep = self.denoiser.network_timestep(self.denoiser.timestep(sigma), x)
        return transformer(  # type: ignore[no-any-return]
            hidden_states=x, timestep=timestep, encoder_hidden_states=hidden, return_dict=False
        )[0]

    def _claim(self) -> None:
        """Claim all attention modules for training: rotation by rows, and text padding represented by one key."""
        own, text = (partial(_compute_by, each) for each in (self.self_attention, self.cross_attention))
        blocks = range(len(self.transformer.blocks))
        computes = {f"blocks.{n}.{name}": fn for n in blocks for name, fn in (("attn1", own), ("attn2", text))}
        processor_stack(self.transformer).claim(NAME, computes)

    @contextmanager
    def stock_attention(self) -> Iterator[None]:
        """Use diffusers' own attention processors inside the block, for samples and for the export."""
        processor_stack(self.transformer).release(NAME)
        try:
            yield
        finally:
            self._claim()

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of `sample_sheet` on samples of the evaluation prompts; empty without prompts."""
        if not self.args.eval_prompts:
            return {}
        # Compiling the blocks for these few calls would take longer than the calls.
        with self.stock_attention(), torch.compiler.set_stance("force_eager"):
            return sample_sheet(self.components(), self.args, self.device)

    def export(self, folder: Path, weights: Weights) -> None:
        """Write the trained networks as a pipeline folder, with their default settings in `postgen.json`."""
        parts = self.components()
        for name in parts.keys() & weights.keys():
            parts[name] = uncut(parts[name], weights[name])
        with self.stock_attention():
            write_pipeline(folder, parts, self.args)

    def components(self) -> dict[str, Any]:
        """Return the components of the pipeline by their names."""
        return {
            "vae": self.vae,
            "transformer": self.transformer,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
        }


def _compute_by(processor: Any, inner: Callable[..., Any], attention: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the given processor in the compute slot of a module instead of the module's own."""
    return processor(attention, *args, **kwargs)


def _tokenizer(args: TextToVideoConfig) -> Any:
    """Return the tokenizer. It does not depend on the pool, so the weights stay usable with another pool."""
    if args.whole_words:
        return word_tokenizer(world_words())
    specs = ((seed, world.sample(seed, split="all")) for seed in range(3000))
    texts = [text for seed, spec in specs for text in (world.caption(spec, seed), world.simple_caption(spec))]
    return train_tokenizer(texts, args.vocabulary)
