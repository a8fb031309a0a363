"""The embedded model, and the table of optional offline files that tests and demos use.

Files of optional packages are found without importing the package: several of them import things we do not want, or
break on current libraries.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from postgen.errors import UserError

TINY_WAN = "tiny-wan"
WORLD_WEAVER = "world-weaver"
TINY_WAN_LIT = "tiny-wan-lit"

EMBEDDED = "embedded"
"""Word of recipes and of exports for the embedded model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asset:
    """One file of an optional package."""

    package: str
    """Name for pip."""
    version: str
    """The one version that was checked."""
    module: str
    """Name of the folder the package installs."""
    file: str
    """Path of the file inside that folder."""
    sha256: str
    """First 12 hexadecimal digits."""
    licence: str
    """Licence of the file, which may differ from the package's."""
    note: str
    """What it is and what it may be used for."""


def _table() -> dict[str, Asset]:
    rows = json.loads(Path(__file__).with_name("table.json").read_text(encoding="utf-8"))
    return {row.pop("name"): Asset(**row) for row in rows}


ASSETS = _table()
"""Name -> file. The names are what `locate`, `verify` and `explain` take."""


def embedded_model() -> Path:
    """Return the folder of the embedded text-to-video model, a plain diffusers `WanPipeline` folder.

    Raises:
        UserError: the folder is not there.
    """
    folder = Path(__file__).resolve().parent / TINY_WAN
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"the embedded model is missing from {folder}: reinstall postgen, or train it with the recipes in recipes/"
        )
    return folder


def model_folder(named: str) -> Path:
    """Return the folder that a recipe names: `embedded` is the embedded model, also beside a folder of this name.

    Raises:
        UserError: the embedded model is named, and not there.
    """
    return embedded_model() if named == EMBEDDED else Path(named)


def embedded_adapter() -> Path | None:
    """Return the folder of the embedded model's adapter for long videos; None where there is none."""
    folder = Path(__file__).resolve().parent / WORLD_WEAVER
    return folder if folder.is_dir() else None


def embedded_lit() -> Path:
    """Return the file of the embedded model's adapter for hybrid linear attention, for `--lit embedded`.

    Raises:
        UserError: there is none in this version.
    """
    file = Path(__file__).resolve().parent / TINY_WAN_LIT / "adapter.safetensors"
    if not file.is_file():
        raise UserError(
            f"this version ships no adapter of linear attention for the embedded model (there is no {file}): train one"
            " with the recipe lit-tiny-wan and name its file, OUT/export/adapter.safetensors"
        )
    return file


def locate(name: str) -> Path:
    """Return the path of an installed asset, without importing its package.

    Raises:
        UserError: unknown name, or the package is not installed (the message tells how to install it).
    """
    asset = _asset(name)
    # find_spec of a top-level name reads no code of the package.
    spec = find_spec(asset.module)
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root) / asset.file
        if path.is_file():
            return path
    raise UserError(f"{name} needs the package {asset.package}: {_install(asset)}")


def verify(name: str) -> Path:
    """Return the path of an asset after checking its bytes against the table.

    Raises:
        UserError: as `locate`, or the file is not the one that was checked.
    """
    asset, path = _asset(name), locate(name)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[: len(asset.sha256)]
    if found != asset.sha256:
        raise UserError(
            f"{path} is not the file we know as {name}: sha256 starts with {found}, expected {asset.sha256}; "
            f"reinstall it: {_install(asset)}"
        )
    return path


def explain(name: str) -> str:
    """Say in a few lines what an asset is, under which licence, and how to install it.

    Raises:
        UserError: unknown name.
    """
    asset = _asset(name)
    return (
        f"{name}: {asset.note}\n"
        f"file: {asset.file} of {asset.package} {asset.version}, sha256 {asset.sha256}...\n"
        f"licence: {asset.licence}\n"
        f"install: {_install(asset)}"
    )


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise UserError(f"unknown asset {name!r}: known are {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def _install(asset: Asset) -> str:
    return f"pip install --no-deps {asset.package}=={asset.version}"
