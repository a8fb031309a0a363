"""State of a server: settings, jobs, results and loaded models."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from postgen.apps.history import History
from postgen.apps.jobs import Jobs
from postgen.apps.pictures import Pictures
from postgen.apps.runs import within
from postgen.apps.settings import RESULTS, AppSettings
from postgen.compat import quiet_libraries
from postgen.errors import UserError
from postgen.families.loading import ModelFacts, inspect_model
from postgen.generate import Job, load
from postgen.interrupts import give_up_threads
from postgen.request import GenerateConfig

EMBEDDED = "embedded model"
"""Name of the model inside the package, as the page shows it."""
PICTURES = "pictures"
"""Folder of uploaded first frames, inside the folder of outputs. Sidecars name its files; the page cannot read it."""
_WEIGHTS = "*.safetensors"


class Models:
    """Loaded models. Each job borrows one; memory holds at most as many models as jobs run at the same time."""

    def __init__(self, most: int = 1) -> None:
        self._most = most
        self._idle: list[tuple[Any, Any]] = []
        self._lent = 0
        self._lock = threading.Lock()

    @contextmanager
    def lent(self, key: Any, load: Callable[[], Any]) -> Iterator[Any]:
        """Lend a model to a block: the loaded model with this key, or a new one from `load`.

        If memory is full, idle models with other keys are freed before `load` is called.

        Args:
            key: identifies the model; equal keys mean the same model, for example `Job.loading`.
            load: function that loads the model.

        Raises:
            UserError: `load` raised it.
        """
        pipe = self._taken(key)
        if pipe is None:
            with quiet_libraries():
                pipe = load()
        try:
            yield pipe
        finally:
            with self._lock:
                self._lent -= 1
                self._idle.append((key, pipe))

    def pipeline(self, job: Job) -> Any:
        """Lend the pipeline of a job of `postgen.generate`; see `lent`."""
        return self.lent(job.loading, lambda: load(job))

    def clear(self) -> None:
        """Free the models that no job uses, for example before work that loads other networks."""
        with self._lock:
            self._idle.clear()
        _give_back()

    def _taken(self, key: Any) -> Any:
        """Return an idle model with this key; otherwise free idle models to make room and return None."""
        with self._lock:
            self._lent += 1
            for number, (other, pipe) in enumerate(self._idle):
                if other == key:
                    del self._idle[number]
                    return pipe
            dropped = len(self._idle) + self._lent - self._most
            del self._idle[: max(0, dropped)]
        if dropped > 0:
            _give_back()
        return None


class App:
    """One server. It is created once and passed to every tab.

    Raises:
        UserError: the folder of outputs cannot be written.
    """

    def __init__(self, settings: AppSettings) -> None:
        self.settings = settings
        folder = Path(settings.outputs).expanduser().absolute()
        self.history = History(folder / RESULTS)
        self.pictures = Pictures(folder / PICTURES, self.history)
        self.jobs = Jobs(at_once=settings.at_once, waiting=settings.waiting)
        self.models = Models(settings.at_once)
        self.facts: Callable[[str | None], ModelFacts] = cache(self._facts)
        """Function that returns the facts of a model by its name (None: the embedded model); cached per name."""
        self.page: Any = None
        """The `gr.Blocks` of the page, for its load events."""
        self.remembered: dict[str, Any] = {}
        """Module of a tab -> `gr.BrowserState` with the values that the browser keeps for the tab. These components
        are created outside the tabs, because only components of the first tab exist when the page loads."""

    @property
    def model_names(self) -> list[str]:
        """Names of the models that the page offers; the page selects the first one at the start."""
        named = [self.settings.model or EMBEDDED, *self.settings.models, EMBEDDED]
        return list(dict.fromkeys(named))

    def model(self, name: Any) -> str | None:
        """Return the value of `GenerateConfig.model` for a model name that the page sent.

        Raises:
            UserError: the name is not in `model_names`, and the setting `any_model` is off.
        """
        if name in (None, "", EMBEDDED):
            return None
        if isinstance(name, str) and (name in self.model_names or self.settings.any_model):
            return name
        raise UserError(f"this server has no model of that name. Choose one of: {', '.join(self.model_names)}")

    def request(self, prompt: str, *, model: str | None, **fields: Any) -> GenerateConfig:
        """Return a request with the dtype, device and offloading of the server's settings.

        Args:
            prompt: description of the video.
            model: return value of the method `model`, or `AppSettings.model`.
            **fields: further fields of `GenerateConfig`.

        Raises:
            UserError: a field is invalid.
        """
        own = {name: getattr(self.settings, name) for name in ("dtype", "device", "offload")}
        return GenerateConfig(prompt=prompt, model=model, **own, **fields)

    @property
    def runs_root(self) -> Path | None:
        """Folder of the training runs, with symbolic links resolved; None if there is none."""
        root = self.settings.runs
        return None if root is None else Path(root).expanduser().resolve()

    def of_runs(self, path: Path) -> bool:
        """Whether a path, with symbolic links resolved, is inside the folder of the training runs."""
        return (root := self.runs_root) is not None and within(path, root)

    def runs(self) -> dict[str, Path]:
        """Return the folders of training runs by name; symbolic links to other places are left out."""
        found: list[Path] = []
        if (root := self.runs_root) is not None:
            with suppress(OSError):  # the folder may have been removed since the start
                found = sorted(root.iterdir())
        return {path.name: path for path in found if path.name[0] != "." and path.is_dir() and self.of_runs(path)}

    def loras(self) -> dict[str, str]:
        """Return the LoRAs of the settings and of the training runs, by their name on the page."""
        found: dict[str, str] = {}
        for text in self.settings.loras:
            place = Path(text)
            found[place.name if place.name not in found else f"{place.parent.name}/{place.name}"] = text
        for name, folder in self.runs().items():
            for file in sorted(folder.glob(f"*/{_WEIGHTS}")) + sorted(folder.glob(_WEIGHTS)):
                if "lora" in file.name.lower() and self.of_runs(file):
                    found[f"{name}/{file.parent.name}" if file.parent != folder else name] = str(file.parent)
        return found

    def lora(self, name: Any) -> str | None:
        """Return the LoRA with a name of `loras`; None if the name is None or empty.

        Raises:
            UserError: `loras` has no such name.
        """
        if name in (None, ""):
            return None
        found = self.loras().get(name) if isinstance(name, str) else None
        if found is None:
            raise UserError("this server has no LoRA of that name: reload the page and choose one from its list")
        return found

    def close(self) -> None:
        """Cancel the jobs and free the models. A job that does not end within some seconds is abandoned."""
        if not self.jobs.close():
            give_up_threads()
        self.models.clear()

    def _facts(self, model: str | None) -> ModelFacts:
        import postgen

        return inspect_model(model if model is not None else postgen.embedded_model())


def _give_back() -> None:
    """Collect garbage and return cached GPU memory to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
