"""Finding and reading published weights: local folders, files, Hub ids and addresses; never with an open pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError, first_line, shown
from postgen.tensor_files import read_tensors

State = dict[str, Tensor]
"""Name -> weight."""

_LAYOUT = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files beside `config.json`, one of which a model in the layout of transformers has."""


def find_file(model: str, file: str = "") -> Path:
    """Return the local path of a file of weights, downloading it when it is not here.

    Args:
        model: a local folder or Hub id that holds `file`; or the local path or https address of the file itself.
        file: name inside the folder or repository; unused when `model` is the file itself.

    Raises:
        UserError: it is not there, or cannot be downloaded.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if file and (path / file).is_file():
            return path / file
        raise UserError(
            f"{path} holds no {file or 'weights'}: it has {', '.join(sorted(_names(path))[:8]) or 'no file'}"
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
    """Say in one line that published weights are not on this machine and how they come here, None where they are.

    Args:
        model: as for `find_file`, or as for `pretrained`.
        file: name inside the folder or repository; "" asks for the file itself, or for the layout of transformers.
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
    """Read a network in the layout of transformers from a Hub id or a local folder, all of its weights.

    Raises:
        UserError: it cannot be found or read, or some weights are missing or of other shapes.
    """
    from safetensors import SafetensorError

    model = _place(model)
    try:
        net, info = cls.from_pretrained(model, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _not_found(model, error) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{model} lacks {len(missing)} of the weights, {missing[0]} among them: it is another model")
    return net


def tokenizer_of(model: str) -> Any:
    """Return the tokenizer of a Hub id or a local folder.

    Raises:
        UserError: it cannot be found.
    """
    from transformers import AutoTokenizer

    model = _place(model)
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise _not_found(f"the tokenizer of {model}", error) from error


def read_state(path: Path) -> State:
    """Read the weights in a .safetensors file, or in a foreign .pt, .pth or .bin file without running its pickle.

    A dictionary around them (`state_dict`, `model`, `module`) and a common prefix `module.` are taken off.

    Raises:
        UserError: it is damaged, or holds something else than weights.
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
        raise UserError(f"{path} holds no plain weights (name -> tensor)")
    return {name.removeprefix("module."): weight for name, weight in content.items()}


def fill(net: nn.Module, state: State, source: object) -> nn.Module:
    """Put weights into a small network, all of them, and return it.

    Raises:
        UserError: names or shapes do not fit.
    """
    _compare(net.state_dict(), state, source)
    net.load_state_dict(state)
    return net


def assemble(cls: Any, config: Any, state: State, source: object, **options: Any) -> Any:
    """Return a network of transformers made of these weights, all of them, without initialising any first.

    Args:
        cls: its class.
        config: its configuration.
        state: weights under the class's own names.
        source: where they are from, for the message.
        options: further arguments of the class.

    Raises:
        UserError: names or shapes do not fit.
    """
    with torch.device("meta"):
        blank = cls(config, **options)
    _compare(blank.state_dict(), state, source)
    return cls.from_pretrained(None, config=config, state_dict=state, **options)


def _compare(own: Mapping[str, Tensor], state: State, source: object) -> None:
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        told = [
            f"lacks {missing[0]} and {len(missing) - 1} more" if missing else "",
            f"has {extra[0]}" if extra else "",
        ]
        raise UserError(f"the weights of {source} are those of another model: it {' and '.join(filter(None, told))}")
    for name, weight in own.items():
        if state[name].shape != weight.shape:
            raise UserError(
                f"the weights of {source} are those of another model: {name} is {tuple(state[name].shape)}, "
                f"expected {tuple(weight.shape)}"
            )


def _place(model: str) -> str:
    """Take a Hub id as it is, and a path with its folder there."""
    path = Path(model).expanduser()
    if model.startswith(("/", ".", "~")) and not path.is_dir():
        raise UserError(f"there is no folder {path}: give a local folder or a Hub id")
    return str(path) if path.is_dir() else model


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.is_file()]


def _downloaded(url: str) -> Path:
    """Return where torch keeps what was downloaded from an address."""
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
