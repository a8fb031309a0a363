"""Finding and reading published weights: local folders, files, Hub ids and addresses; pickles are never executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError, first_line, shown
from postgen.tensor_files import read_tensors

State = dict[str, Tensor]
"""State dict: name -> weight."""

_LAYOUT = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Weight files of transformers' layout; a model has one of these next to its `config.json`."""


def find_file(model: str, file: str = "") -> Path:
    """Return the local path of a file of weights; download the file if it is not on this machine.

    Args:
        model: a local folder or Hub id that contains `file`; or the local path or https address of the file itself.
        file: name in the folder or repository; unused if `model` is the file itself.

    Raises:
        UserError: the file does not exist or cannot be downloaded.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if file and (path / file).is_file():
            return path / file
        raise UserError(
            f"{path} does not contain {file or 'weights'}: it has {', '.join(sorted(_names(path))[:8]) or 'no file'}"
        )
    if model.startswith("https://"):
        return _download(model)
    if not file:
        raise UserError(f"there is no file {model}: give a local path or an https address")
    _place(model)
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model, file))
    except (OSError, ValueError) as error:
        raise _not_found(f"{file} of {model}", error) from error


def absent(model: str, file: str = "") -> str | None:
    """Return one line on how to get published weights that are not on this machine; None if they are.

    Args:
        model: see `find_file` or `pretrained`.
        file: name in the folder or repository; "" checks the file itself, or the layout of transformers.
    """
    path = Path(model).expanduser()
    if path.exists() or model.startswith(("/", ".", "~")):
        wanted = path / file if path.is_dir() and file else path
        return None if wanted.exists() else f"there is no {wanted.name} in the folder that was named"
    if model.startswith("https://"):
        name = _downloaded(model)
        return None if name.is_file() else f"{name.name} is not here: the first use with a network downloads it"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    choices = [(file,)] if file else [("config.json", weights) for weights in _LAYOUT]
    try:
        for names in choices:
            if all(isinstance(try_to_load_from_cache(model, name), str) for name in names):
                return None
    except HFValidationError:
        return f"{shown(model)} is neither a folder nor a Hub id"
    return f"{model} is not here: with a network, once, hf download {' '.join([model, file]).strip()}"


def pretrained(cls: Any, model: str, **options: Any) -> Any:
    """Load a network in the layout of transformers from a Hub id or a local folder; all weights must be there.

    Raises:
        UserError: the model cannot be found or read, or weights are missing or have other shapes.
    """
    from safetensors import SafetensorError

    model = _place(model)
    try:
        net, info = cls.from_pretrained(model, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_found(model, error) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{model} lacks {len(missing)} weights, for example {missing[0]}: it is another model")
    return net


def tokenizer_of(model: str) -> Any:
    """Load the tokenizer from a Hub id or a local folder.

    Raises:
        UserError: the tokenizer cannot be found.
    """
    from transformers import AutoTokenizer

    model = _place(model)
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise _not_found(f"the tokenizer of {model}", error) from error


def read_state(path: Path) -> State:
    """Read the weights in a .safetensors file, or in a .pt, .pth or .bin file without executing its pickle.

    A dictionary around the weights (`state_dict`, `model`, `module`) and the prefix `module.` of names are removed.

    Raises:
        UserError: the file is damaged, or contains something other than weights.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path, f"{path} cannot be read as weights")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise UserError(f"{path} cannot be read as weights: {first_line(error)}") from error
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} does not contain plain weights (name -> tensor)")
    return {name.removeprefix("module."): weight for name, weight in content.items()}


def fill(net: nn.Module, state: State, source: object) -> nn.Module:
    """Load a state dict into a small network and return the network; all weights must be there.

    Raises:
        UserError: names or shapes do not match.
    """
    _compare(net.state_dict(), state, source)
    net.load_state_dict(state)
    return net


def assemble(cls: Any, config: Any, state: State, source: object, **options: Any) -> Any:
    """Build a network of transformers from a state dict, without initialising weights first; all must be there.

    Args:
        cls: class of the network.
        config: configuration of the network.
        state: state dict with the names of the class.
        source: origin of the weights, for error messages.
        options: further arguments of the class.

    Raises:
        UserError: names or shapes do not match.
    """
    with torch.device("meta"):
        blank = cls(config, **options)
    _compare(blank.state_dict(), state, source)
    return cls.from_pretrained(None, config=config, state_dict=state, **options)


def _compare(own: Mapping[str, Tensor], state: State, source: object) -> None:
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        told = [
            f"lack {missing[0]} and {len(missing) - 1} more" if missing else "",
            f"have {extra[0]}" if extra else "",
        ]
        raise UserError(f"the weights of {source} are those of another model: they {' and '.join(filter(None, told))}")
    for name, weight in own.items():
        if state[name].shape != weight.shape:
            raise UserError(
                f"the weights of {source} are those of another model: {name} is {tuple(state[name].shape)}, "
                f"expected {tuple(weight.shape)}"
            )


def _place(model: str) -> str:
    """Return a Hub id unchanged, or the path of a folder after checking that the folder exists."""
    path = Path(model).expanduser()
    if model.startswith(("/", ".", "~")) and not path.is_dir():
        raise UserError(f"the folder {path} does not exist: give a local folder or a Hub id")
    return str(path) if path.is_dir() else model


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.is_file()]


def _downloaded(url: str) -> Path:
    """Return the path at which torch stores a download from this address."""
    from urllib.parse import unquote, urlparse

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(unquote(urlparse(url).path)).name


def _download(url: str) -> Path:
    path = _downloaded(url)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise _not_found(url, error) from error
    return path


def _not_found(what: str, error: Exception) -> UserError:
    told = first_line(error).rstrip(".")
    return UserError(f"cannot load {what}: {told}. Give a local folder or file, or download it once with a network.")
