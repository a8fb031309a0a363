"""Checks of the options of `accelerate launch`: each is obeyed, or refused with the setting to use instead.

The launcher passes its options in environment variables. The recipe decides about numerics (precision, compilation,
accumulation), the launcher about processes and devices. If both set the same thing, they must agree.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from accelerate.state import is_initialized
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from postgen.errors import UserError

from .block_offload import ONE_PROCESS
from .config import TrainingConfig
from .logging import available_trackers
from .optimizers import check_optim
from .precision import OwnPrecision

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables with the number of processes, set by torchrun and by three MPI launchers."""

_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed (ZeRO) cannot be used: its engine owns the optimiser and the weights, but this trainer averages, "
        "swaps and saves the weights. Shard them with FSDP2: recipes/accelerate/fsdp2.yaml, or --fully_shard true"
    ),
    "ACCELERATE_USE_MEGATRON_LM": (
        "Megatron-LM cannot be used: it needs its own model classes. Shard the weights with FSDP2: "
        "recipes/accelerate/fsdp2.yaml, or --fully_shard true"
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "accelerate's parallelism_config (tensor, context and sequence parallelism) cannot be used: leave it out. "
        "Shard the weights with FSDP2: recipes/accelerate/fsdp2.yaml, or --fully_shard true"
    ),
}
"""Kinds of parallelism that this trainer does not support, by accelerate's environment variable, with the message."""


def check_launch(args: TrainingConfig) -> None:
    """Check the options of `accelerate launch` before accelerate reads them, and that the folder `init_from` exists.

    Args:
        args: the configuration.

    Raises:
        UserError: the optimiser or `offload_blocks` cannot be used; the launcher requests unsupported parallelism
            (DeepSpeed, Megatron-LM, FSDP 1, FSDP on a CPU, ...); its precision, compilation or accumulation differs
            from the configuration; it started one process instead of several; the device is absent, or launcher and
            configuration name different devices; or `init_from` is not a folder.
    """
    for name, message in _OTHERS.items():
        if _asked(name):
            raise UserError(message)
    if args.init_from is not None and not Path(args.init_from).is_dir():
        raise UserError(f"init_from: {args.init_from} is not a folder. Give a folder with safetensors weights.")
    check_optim(args, sharded=args.fully_shard or _asked("ACCELERATE_USE_FSDP"))
    if getattr(args, "offload_blocks", 0) and (_processes_asked() > 1 or _asked("ACCELERATE_USE_FSDP")):
        raise UserError(ONE_PROCESS)
    _check_numbers(args)
    _check_processes()
    if args.device == "cuda" and _asked("ACCELERATE_USE_CPU"):
        raise UserError("accelerate launch has --cpu, but device is cuda: change one of the two")
    check_device(args.device)
    if _asked("ACCELERATE_USE_FSDP"):
        _check_fsdp(args.device)


def ignore_mixed_norms() -> None:
    """Ignore torch's warning that a norm with bfloat16 inputs and float32 weights does not use the fused kernel.

    Trained weights stay float32 on purpose, so users could not act on this warning.
    """
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


def check_device(device: str) -> None:
    """Check that a device exists.

    Raises:
        UserError: the device is "cuda", and torch finds no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA device. Use device: auto or cpu.")


def make_accelerator(args: TrainingConfig) -> OwnPrecision:
    """Return the accelerator of a run. Call `check_launch` first.

    Several processes without a GPU train on CPUs and average gradients through gloo, also with `device` "auto".
    Several trainers in one process may have different values of `bf16`. With `bf16`, torch's warning about norms with
    mixed dtypes is ignored from here on (`ignore_mixed_norms`).

    Raises:
        UserError: the launched processes did not form a group, the device differs from `device` or has no bfloat16, or
            this process already has an accelerator with another device, with fp16 or with fp8.
    """
    asked = _processes_asked()
    cpu = args.device == "cpu" or (args.device == "auto" and asked > 1 and not torch.accelerator.is_available())
    again = is_initialized()
    if args.bf16:
        ignore_mixed_norms()
    try:
        made = OwnPrecision(
            bf16=args.bf16,
            # The trainer accumulates gradients itself, because accelerate counts micro-batches in a state that all
            # trainers of a process share.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            cpu=cpu,
            log_with=available_trackers(args.report_to) or None,
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.output_dir),
        )
    except ValueError as error:
        if not again:
            raise
        raise UserError(
            "this process already has an Accelerator with another device, fp16 or fp8, and accelerate uses the same "
            f"settings for all accelerators of a process ({error}): use a separate process for each of them"
        ) from error
    if asked > 1 and made.num_processes != asked:
        raise UserError(
            f"the environment (WORLD_SIZE or MPI) asks for {asked} processes, but this process is alone: start them "
            "with accelerate launch or torchrun, or unset WORLD_SIZE for a single process"
        )
    if args.device not in ("auto", made.device.type):
        raise UserError(f"device is {args.device}, but accelerate uses {made.device}: change one of the two")
    return made


def _check_numbers(args: TrainingConfig) -> None:
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", _precision(args)):
        how = (
            "set bf16: true in the recipe (--bf16 true)"
            if precision == "bf16"
            else "only bfloat16 is supported, with bf16: true in the recipe"
        )
        raise UserError(
            f"accelerate launch asks for mixed_precision {precision}, but the recipe decides, and its bf16 is "
            f"{str(args.bf16).lower()}: {how}, or launch with --mixed_precision no"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise UserError(
            f"accelerate launch asks for dynamo_backend {backend}, but the recipe decides about compilation "
            "(torch_compile): launch with --dynamo_backend no"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if steps.isdigit() and int(steps) not in (1, args.gradient_accumulation_steps):
        raise UserError(
            f"accelerate launch asks for {steps} gradient_accumulation_steps, but the recipe decides and has "
            f"{args.gradient_accumulation_steps}: set it there (--gradient_accumulation_steps {steps})"
        )


def _check_processes() -> None:
    """Detect that accelerate started one process instead of several: on CPUs it silently leaves the others to MPI."""
    if "ACCELERATE_USE_CPU" not in os.environ or "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return
    if not any(name in os.environ for name in ("LOCAL_RANK", "RANK", *_SIZES)):
        raise UserError(
            f"MASTER_ADDR is {os.environ['MASTER_ADDR']}, which asks for several processes, but accelerate launch has"
            " started only one: for one process unset MASTER_ADDR and use --num_processes 1; for several processes on"
            " CPUs use --config_file recipes/accelerate/ddp_cpu.yaml (or --multi_gpu --num_processes N instead of"
            " --cpu, and device: cpu in the recipe)"
        )


def _check_fsdp(device: str) -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP 1 cannot be used: set fsdp_version: 2 in accelerate's config file")
    if device == "cpu" or not torch.cuda.is_available():
        raise UserError(
            "accelerate's FSDP does nothing on CPUs: use recipes/accelerate/ddp_cpu.yaml with --fully_shard true"
        )
    if _asked("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            "fsdp_activation_checkpointing cannot be used: set gradient_checkpointing: true in the recipe instead"
        )


def _processes_asked() -> int:
    found = [os.environ.get(name, "") for name in _SIZES]
    return max((int(text) for text in found if text.isdigit()), default=1)


def _precision(args: TrainingConfig) -> str:
    return "bf16" if args.bf16 else "no"


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes", "y", "on", "t")  # as accelerate parses it
