"""The embedded model."""

from pathlib import Path

from postgen.errors import UserError


def embedded_model() -> Path:
    """Return the folder of the embedded text-to-video model, a plain diffusers `WanPipeline` folder.

    Raises:
        UserError: the folder is not there.
    """
    folder = Path(__file__).resolve().parent / "tiny-wan"
    if not (folder / "model_index.json").is_file():
        raise UserError(f"the embedded model is missing from {folder}: reinstall postgen, or train it with recipes/")
    return folder
