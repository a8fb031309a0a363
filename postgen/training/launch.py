"""How a run was started: what `accelerate launch` asks for is heeded, or refused with the setting that does it here.

The launcher speaks through environment variables. Of them the recipe decides about numbers (precision, compilation,
accumulation) and the launcher about processes and devices; where both speak, they must agree.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from accelerate.state import is_initialized
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from postgen.errors import UserError

from .config import TrainingConfig
from .logging import available_trackers
from .precision import OwnPrecision

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where a launcher (torchrun, then three of MPI) says how many processes there are."""

_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed (ZeRO) cannot be used: its engine owns the optimiser and the weights, which are averaged, "
        "swapped and written here. Cut them with FSDP2: recipes/accelerate/fsdp2.yaml, or --fully_shard true"
    ),
    "ACCELERATE_USE_MEGATRON_LM": (
        "Megatron-LM cannot be used: it has models of its own. Cut the weights with FSDP2: "
        "recipes/accelerate/fsdp2.yaml, or --fully_shard true"
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "accelerate's parallelism_config (tensor, context and sequence parallelism) cannot be used: leave it out. "
        "Weights are cut with FSDP2: recipes/accelerate/fsdp2.yaml, or --fully_shard true"
    ),
}
"""Ways to spread a model that this trainer has none of."""


def check_launch(args: TrainingConfig) -> None:
    """Look at what `accelerate launch` asks for, before accelerate does, and whether weights to start from are there.

    Args:
        args: the configuration.

    Raises:
        UserError: DeepSpeed, Megatron-LM, FSDP 1, FSDP on a CPU and the like; a precision, a compilation or an
            accumulation that the configuration does not have; one process where several were asked for; a device that
            is absent, or another one.
    """
    for name, told in _OTHERS.items():
        if _asked(name):
            raise UserError(told)
    if args.init_from is not None and not Path(args.init_from).is_dir():
        raise UserError(f"init_from: {args.init_from} is no folder. Give one with safetensors weights.")
    _check_numbers(args)
    _check_processes()
    if args.device == "cuda" and _asked("ACCELERATE_USE_CPU"):
        raise UserError("accelerate launch says --cpu, device is cuda: change one of the two")
    check_device(args.device)
    if _asked("ACCELERATE_USE_FSDP"):
        _check_fsdp(args.device)


def ignore_mixed_norms() -> None:
    """Ignore torch's warning that a norm of bfloat16 numbers and float32 weights is not the fused one.

    Trained weights stay float32, which is meant: nobody could heed it.
    """
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


def check_device(device: str) -> None:
    """Look whether a device is there.

    Raises:
        UserError: it is "cuda", and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no CUDA device. Use device: auto or cpu.")


def make_accelerator(args: TrainingConfig) -> OwnPrecision:
    """Return the accelerator of a run; `check_launch` has passed.

    Several processes without a GPU average their gradients through gloo, also where `device` is auto. Trainers of one
    process may differ in `bf16`. With it torch's warning is ignored from here on that a norm of bfloat16 numbers and
    float32 weights is not the fused one.

    Raises:
        UserError: the processes of the launch did not come together, the device is another one than `device` says or
            has no bfloat16, or this process has had an accelerator for another device, for fp16 or fp8.
    """
    asked = _processes_asked()
    cpu = args.device == "cpu" or (args.device == "auto" and asked > 1 and not torch.accelerator.is_available())
    again = is_initialized()
    if args.bf16:
        ignore_mixed_norms()
    try:
        made = OwnPrecision(
            bf16=args.bf16,
            # Accumulation is ours: accelerate counts micro-batches in a state that all trainers of a process share.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            cpu=cpu,
            log_with=available_trackers(args.report_to) or None,
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.output_dir),
        )
    except ValueError as error:
        if not again:
            raise
        raise UserError(
            "this process has had an Accelerator for another device, fp16 or fp8 before, and accelerate keeps that "
            f"for all ({error}): start a process for each of the two"
        ) from error
    if asked > 1 and made.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for (WORLD_SIZE or MPI), and this one stands alone: start them with "
            "accelerate launch or torchrun, or, for a single process, without WORLD_SIZE"
        )
    if args.device not in ("auto", made.device.type):
        raise UserError(f"device is {args.device}, but accelerate was told {made.device}: change one of the two")
    return made


def _check_numbers(args: TrainingConfig) -> None:
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", _precision(args)):
        how = (
            "set bf16: true in the recipe (--bf16 true)"
            if precision == "bf16"
            else "there is bfloat16 only, bf16: true in the recipe"
        )
        raise UserError(
            f"accelerate launch asks for mixed_precision {precision}, but the recipe's bf16 decides, which is "
            f"{str(args.bf16).lower()}: {how}, or launch with --mixed_precision no"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise UserError(
            f"accelerate launch asks for dynamo_backend {backend}, but the recipe decides what is compiled "
            "(torch_compile): launch with --dynamo_backend no"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if steps.isdigit() and int(steps) not in (1, args.gradient_accumulation_steps):
        raise UserError(
            f"accelerate was told {steps} gradient_accumulation_steps, the recipe says "
            f"{args.gradient_accumulation_steps} and decides: set it there (--gradient_accumulation_steps {steps})"
        )


def _check_processes() -> None:
    """Find that accelerate started one process of several: on CPUs it leaves the others to MPI, without a word."""
    if "ACCELERATE_USE_CPU" not in os.environ or "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return
    if not any(name in os.environ for name in ("LOCAL_RANK", "RANK", *_SIZES)):
        raise UserError(
            f"several processes were asked for (MASTER_ADDR is {os.environ['MASTER_ADDR']}), and accelerate launch has"
            " started one: for one process unset MASTER_ADDR, which another program has left, and say"
            " --num_processes 1; for several on CPUs use --config_file recipes/accelerate/ddp_cpu.yaml (or --multi_gpu"
            " --num_processes N instead of --cpu, and device: cpu in the recipe)"
        )


def _check_fsdp(device: str) -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP 1 cannot be used: write fsdp_version: 2 into the file for accelerate")
    if device == "cpu" or not torch.cuda.is_available():
        raise UserError(
            "accelerate's FSDP does nothing on CPUs: use recipes/accelerate/ddp_cpu.yaml with --fully_shard true"
        )
    if _asked("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError("fsdp_activation_checkpointing is the recipe's gradient_checkpointing here: set it there")


def _processes_asked() -> int:
    found = [os.environ.get(name, "") for name in _SIZES]
    return max((int(text) for text in found if text.isdigit()), default=1)


def _precision(args: TrainingConfig) -> str:
    return "bf16" if args.bf16 else "no"


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes", "y", "on", "t")  # as accelerate reads it
