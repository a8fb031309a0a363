"""Recipes: YAML with `method:` (flat or nested by part) and `--key value` options become a trainer configuration."""

import dataclasses
import difflib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast, get_args, get_origin, get_type_hints

import yaml

from postgen.errors import UserError, cut, cut_words, first_line, shown
from postgen.own_code import own_function
from postgen.reading import read_text
from postgen.shipped import recipe_file

from .bracketed import without_brackets
from .config import TrainingConfig
from .nested import check_key, flat
from .recipe_errors import setting_problem, unused_words, yaml_problem

if TYPE_CHECKING:
    from .trainer import Trainer

METHODS = {
    "autoencoder": "postgen.pretrain.autoencoder:AutoencoderTrainer",
    "class_to_image": "postgen.pretrain.class_to_image:ClassToImageTrainer",
    "dancegrpo": "postgen.grpo.trainer:DanceGRPOTrainer",
    "diffusion_nft": "postgen.grpo.nft:DiffusionNFTTrainer",
    "lit": "postgen.lit.trainer:LitTrainer",
    "quant": "postgen.quant.trainer:QuantTrainer",
    "sft": "postgen.sft.trainer:SftTrainer",
    "text_to_video": "postgen.pretrain.text_to_video:TextToVideoTrainer",
    "world_clip": "postgen.judges.world_clip:WorldClipTrainer",
    "world_depth": "postgen.worldweaver.depth_training:WorldDepthTrainer",
    "world_judge": "postgen.judges.world_judge:WorldJudgeTrainer",
    "worldweaver": "postgen.worldweaver.trainer:WorldWeaverTrainer",
}
"""Method name -> `package.module:Class` of its trainer."""

_LARGEST = 2**20
"""Maximum size of a recipe in bytes."""
_DEEPEST, _MOST = 20, 10_000
"""Maximum depth of nested values, and maximum number of values of a key."""
_WORD = 400
"""Maximum number of characters of a word in a message, more than most paths have."""


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> tuple["type[Trainer[Any]]", TrainingConfig]:
    """Return the trainer class of a recipe and its checked configuration.

    Args:
        path: a YAML file, or the name of a shipped recipe (`postgen.shipped`). The file has `method:` and fields of
            the method's configuration, flat or nested by part (`postgen.training.nested`); `env:` sets environment
            variables. Relative file names in fields of `Part.files` refer to the recipe's folder first, then to the
            current folder.
        overrides: `["--key", "value", ...]`, which replace values of the file. Relative file names refer to the
            current folder.

    Raises:
        UserError: the file cannot be read, the method or a key is unknown, or a value is invalid.
    """
    overrides = list(overrides or ())
    path = recipe_file(path)
    values = _read(path)
    method = _last_value(overrides, "method") or _method_of(values)
    if not isinstance(method, str) or not method:
        raise UserError(f"{path} names no method. Add a line 'method: NAME' with one of: {', '.join(METHODS)}.")
    trainer = find_method(method)
    known = [item.name for item in dataclasses.fields(trainer.config_class)]
    env = {"env": values.pop("env")} if "env" in values else {}
    for each in env.values():
        _check_env(each, str(path))
    values = _beside(trainer.config_class, flat(trainer.config_class, values, str(path)), path)
    lists = {name for name, hint in get_type_hints(trainer.config_class).items() if get_origin(hint) is list}
    overrides = _emptied(trainer.config_class, values, without_brackets(overrides, lists))
    for word in overrides:
        if word.startswith("--"):
            check_key(_key(word), [*known, *(f"no_{key}" for key in known)], "the command line")
    return trainer, _parse(trainer.config_class, path, {**env, **values}, overrides)


def find_method(method: str) -> "type[Trainer[Any]]":
    """Return the trainer class for a name in `METHODS`, `package.module:Class` or `file.py:Class`.

    Raises:
        UserError: the name is unknown, or the class cannot be imported or is not a trainer.
    """
    location = METHODS.get(method, method)
    if ":" not in location:
        near = difflib.get_close_matches(method, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"Unknown method {method!r}.{hint} Known: {', '.join(METHODS)}. Or give a class as 'package.module:Class'."
        )
    from .trainer import Trainer

    found = own_function(location, "method")
    if not (isinstance(found, type) and issubclass(found, Trainer)):
        raise UserError(f"method {method!r} is not a subclass of postgen.training.Trainer.")
    return found


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path, f"Recipe {path} cannot be read", most=_LARGEST)
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"Recipe {path} is not valid YAML, {yaml_problem(error)}.") from error
    except RecursionError:
        raise UserError(
            f"Recipe {path}: its values are nested too deeply; a recipe has only keys, parts and lists."
        ) from None
    except (ValueError, OverflowError) as error:
        # A value looks like, or has the tag of, a number or date, but is not a valid one.
        raise UserError(f"Recipe {path} is not valid YAML: {cut(first_line(error), 200)}.") from error
    if not isinstance(values, dict):
        kinds = {type(None): "is empty", list: "is a list"}
        raise UserError(f"Recipe {path} {kinds.get(type(values), 'is one value')}: write 'key: value' lines.")
    _check_small(values, path)
    return values


def _check_env(env: Any, path: str) -> None:
    if not isinstance(env, dict):
        raise UserError(f"env in {path} is {shown(env)}, it must be a mapping of environment variables.")
    for name, value in env.items():
        if not isinstance(name, str) or not name or {"=", "\0"} & set(name):
            raise UserError(
                f"env in {path} has the name {shown(name)}, it must be a valid name of an environment variable."
            )
        if not isinstance(value, str | int | float) or "\0" in str(value):
            raise UserError(f"env in {path}: {name} is {shown(value)}, it must be a text or a number.")


def _check_small(values: dict[Any, Any], path: Path) -> None:
    """Check the size of values. YAML aliases can make a value infinite or extremely large.

    Raises:
        UserError: a value contains itself, is nested more than `_DEEPEST` times, or has more than `_MOST` elements.
    """
    sizes: dict[int, int] = {}

    def size(value: Any, above: tuple[int, ...]) -> int:
        if not isinstance(value, dict | list | set | tuple):
            return 1
        if id(value) in above or len(above) > _DEEPEST:
            raise UserError(f"Recipe {path}: a value contains itself or is nested more than {_DEEPEST} times.")
        if id(value) not in sizes:
            inner = list(value.values()) if isinstance(value, dict) else list(value)
            sizes[id(value)] = 1 + sum(size(each, (*above, id(value))) for each in inner)
        return sizes[id(value)]

    for key, value in values.items():
        if size(value, ()) > _MOST:
            raise UserError(f"Recipe {path}: {shown(key)} has too many values, more than {_MOST:,}.")


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys and integers in other bases.

    PyYAML keeps only the last of two equal keys, so the first settings of a part that is written twice would be lost.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            # Keys may override those of a merged mapping ("<<").
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Parse an integer. Refuse 1:30 and 010, which YAML 1.1 reads as 90 and 8, contrary to what users expect."""
        text = str(self.construct_scalar(node)).lstrip("+-")
        if ":" in text or (text.startswith("0") and text[1:].replace("_", "").isdigit()):
            message = (
                f"YAML reads {text} in base {60 if ':' in text else 8}: write a decimal number, or put it in quotes"
            )
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _method_of(values: dict[str, Any]) -> Any:
    method = values.get("method")
    return method.get("name") if isinstance(method, dict) else method


def _beside(config_class: type[TrainingConfig], values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the values, with paths of files next to the recipe made independent of the recipe's folder.

    A path is relative to the current folder if the file lies inside it, so that a run can be moved together with this
    folder. Otherwise the path is absolute.
    """
    found = dict(values)
    for name in config_class.named_in("files"):
        if isinstance(value := values.get(name), str) and os.path.isfile(place := path.parent / value):
            whole, here = Path(os.path.abspath(place)), Path.cwd()
            found[name] = str(whole.relative_to(here) if whole.is_relative_to(here) else whole)
    return found


def _key(word: str) -> str:
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def _emptied(config_class: type[TrainingConfig], values: dict[str, Any], overrides: list[str]) -> list[str]:
    """Apply `--key []` (empty list) and `--key null` (None) of the command line to `values`; return the other words.

    TrlParser has no syntax for an empty list or None.
    """
    hints = get_type_hints(config_class)
    spelt = {name: "[]" for name, hint in hints.items() if get_origin(hint) is list}
    spelt |= {name: "null" for name, hint in hints.items() if type(None) in get_args(hint)}
    groups: list[list[str]] = []
    for word in overrides:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    kept: list[list[str]] = []
    for group in groups:
        key = _key(group[0])
        empty = spelt.get(key)
        if empty is not None and _last_value(group, key) == empty and group[-1].endswith(empty):
            values[key] = [] if empty == "[]" else None
            kept = [each for each in kept if _key(each[0]) != key]
        else:
            kept.append(group)
    return [word for group in kept for word in group]


def _last_value(overrides: list[str], key: str) -> str | None:
    found = None
    for position, word in enumerate(overrides):
        if word.startswith("--") and _key(word) == key:
            found = word.partition("=")[2] if "=" in word else "".join(overrides[position + 1 : position + 2])
    return found


def _parse(
    config_class: type[TrainingConfig], path: Path, values: dict[str, Any], overrides: list[str]
) -> TrainingConfig:
    try:
        from trl.scripts.utils import TrlParser
    except ImportError as error:
        raise UserError("Recipes are read with trl, which is not installed: pip install 'postgen[train]'.") from error

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            # argparse's messages have the form "argument --key/--other-key: problem".
            named = message.removeprefix("argument ").partition("/")[0].partition(":")[0]
            given = any(word.startswith("--") and f"--{_key(word)}" == named for word in overrides)
            raise UserError(f"{setting_problem(cut_words(message, _WORD), None if given else str(path))}.")

    parser = Parser(dataclass_types=cast(Any, config_class), allow_abbrev=False, add_help=False)
    config: TrainingConfig
    try:
        with tempfile.TemporaryDirectory() as folder:
            # The parser reads a file, and does not support nested parts: write the flat values to one.
            file = Path(folder) / path.name
            file.write_text(yaml.safe_dump(values), encoding="utf-8")
            (config,) = parser.parse_args_and_config(["--config", str(file), *overrides])
    except UserError:
        raise
    except ValueError as error:
        # The parser found a word that is neither a key nor a value.
        raise UserError(f"{unused_words(error)}. Settings are given as --key value.") from error
    return config
