"""Run a training recipe: `accelerate launch -m postgen.train RECIPE [--key value] [--resume] [--dry-run]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from postgen.commands.errors import forget_standing, tell, tell_stopped, when_stopped
from postgen.errors import UserError
from postgen.files import discard_unfinished
from postgen.interrupts import Stop, stoppable
from postgen.training.peers import ending_together, leave

if TYPE_CHECKING:
    from postgen.training import TrainingConfig

USAGE = """usage: postgen train RECIPE [--key value ...] [--resume [auto]] [--dry-run]

  RECIPE         a name that `postgen recipes` lists, or a YAML file with 'method:' and the fields of the method's
                 configuration, flat or nested by part
  --key value    replace a value of the recipe; give the values of a list one after the other: --key 0 2
  --resume       continue from the newest checkpoint in output_dir; --resume auto starts a new run if there is none,
                 --resume runs/x/checkpoint-50 continues from that checkpoint
  --dry-run      load the model, print an estimate of memory and cost, and exit (dancegrpo,
                 diffusion_nft, sft)

`postgen recipes show NAME` prints a recipe with its keys; docs/configuration.md describes the keys of all methods.
Example: postgen train fast-tiny --output_dir runs/a --max_steps 20
"""


def main(argv: list[str] | None = None) -> int:
    """Run the recipe named by `argv` (default: the command line) and return the exit code.

    Exit codes: 0 done, 1 the loss is not finite, 2 wrong input (one line on stderr), 130 interrupted after saving a
    checkpoint (143 for SIGTERM, 129 for SIGHUP). Of several processes, the first prints the message, and all end.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print(USAGE, end="")
        return 0 if words else 2
    forget_standing()
    with stoppable() as stop, ending_together(lambda text: tell(f"postgen: error: {text}")) as peers:
        try:
            return _run(words)
        except (UserError, FloatingPointError) as error:
            # FloatingPointError: training has diverged, which is not a bug of postgen, so there is no traceback.
            stop.end()  # a launcher sends signals to the other processes as soon as one has ended
            return peers.end(2 if isinstance(error, UserError) else 1, str(error))
        except (KeyboardInterrupt, Exception) as error:
            if isinstance(error, Exception) and not stop.number:
                stop.end()
                if (code := peers.follow(error)) is None:
                    raise
                return code
            # An interrupt, or an exception that a library raised because of the interrupt.
            stop.end()
            discard_unfinished()
            tell_stopped()
            return stop.code


def _run(words: list[str]) -> int:
    recipes = [word for word in words[:1] if not word.startswith("--")]
    if not recipes:
        raise UserError("The recipe comes first: postgen train RECIPE [--key value ...] [--resume].")
    overrides = _spelt_out([word for word in words[1:] if word != "--dry-run"])

    from postgen.training import Reason, load_recipe

    trainer_class, config = load_recipe(recipes[0], overrides)
    if "--dry-run" in words:
        if not hasattr(config, "dry_run"):
            raise UserError(
                f"--dry-run: method {config.method!r} has no cost estimate, only dancegrpo, diffusion_nft and sft have"
                " one."
            )
        trainer_class, config = load_recipe(recipes[0], [*overrides, "--dry_run", "true"])
    with when_stopped(lambda: _standing(config)):
        result = trainer_class.from_config(config).train()
    if result.reason is not Reason.INTERRUPTED:
        return 0
    if os.environ.get("RANK", "0") == "0":  # all processes stop after the same step
        tell(f"postgen: interrupted after step {result.global_step}; continue with --resume")
    return Stop(result.signal).code


def _standing(config: TrainingConfig) -> str:
    """Return the message after an interrupt that did not write a checkpoint."""
    from postgen.training.checkpoint import find

    try:
        complete = find(Path(config.output_dir))
    except OSError:
        complete = []
    if not complete:
        return "there is no checkpoint yet: start the run again"
    return f"the newest checkpoint, {complete[-1]}, is unchanged; continue with --resume"


def _spelt_out(words: list[str]) -> list[str]:
    """Return the words with `--resume [WHICH]` replaced by the setting `--resume_from_checkpoint`."""
    found: list[str] = []
    for word, after in zip(words, [*words[1:], "--"], strict=False):
        if word.startswith("--resume="):
            found.append(word.replace("--resume", "--resume_from_checkpoint", 1))
        elif word == "--resume":
            found += ["--resume_from_checkpoint", *(["latest"] if after.startswith("--") else [])]
        else:
            found.append(word)
    return found


if __name__ == "__main__":
    leave(main())
