"""Run a training recipe: `accelerate launch -m postgen.train RECIPE [--key value] [--resume] [--dry-run]`."""

import sys

from postgen.commands.errors import tell, tell_error
from postgen.errors import UserError
from postgen.files import discard_unfinished
from postgen.interrupts import Stop, stoppable

USAGE = """usage: postgen train RECIPE [--key value ...] [--resume [auto]] [--dry-run]

  RECIPE         a name that `postgen recipes` lists, or a file: YAML with 'method:' and the fields of that method's
                 configuration, flat or nested by part
  --key value    replaces a value of the recipe; the values of a list follow one another: --key 0 2
  --resume       go on from the newest checkpoint of output_dir; --resume auto begins where there is none,
                 --resume runs/x/checkpoint-50 goes on from that one
  --dry-run      load the model, print what the run would need and cost, and end (dancegrpo, diffusion_nft)
"""


def main(argv: list[str] | None = None) -> int:
    """Run the recipe named by `argv` (default: the command line) and return the exit code.

    0 done, 2 wrong input (one line on stderr), 130 interrupted (by SIGTERM 143) after saving a checkpoint.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print(USAGE, end="")
        return 0 if words else 2
    with stoppable() as stop:
        try:
            return _run(words)
        except UserError as error:
            return tell_error(error) or 2
        except FloatingPointError as error:  # it has diverged, which is no defect of ours
            tell(f"postgen: error: {error}")
            return 1
        except (KeyboardInterrupt, Exception) as error:
            if isinstance(error, Exception) and not stop.number:
                raise
            # An interrupt, or what became of one inside a library.
            stop.end()
            discard_unfinished()
            print("interrupted before a checkpoint could be written", file=sys.stderr)
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
            raise UserError(f"--dry-run: method {config.method!r} gives no estimate, dancegrpo and diffusion_nft do.")
        trainer_class, config = load_recipe(recipes[0], [*overrides, "--dry_run", "true"])
    result = trainer_class.from_config(config).train()
    if result.reason is not Reason.INTERRUPTED:
        return 0
    print(f"interrupted after step {result.global_step}; go on with --resume", file=sys.stderr)
    return Stop(result.signal).code


def _spelt_out(words: list[str]) -> list[str]:
    """Return the words with `--resume [WHICH]` as the setting that it stands for."""
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
    sys.exit(main())
