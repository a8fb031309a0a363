"""What a server of the app holds: its settings, its jobs, its results, and the models it may use."""

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
"""What the page calls the model that comes along."""
PICTURES = "pictures"
"""Folder of the first frames that were uploaded, beside it: results name them, the page reads none of them."""
_WEIGHTS = "*.safetensors"


class Models:
    """Loaded models: as many in memory as jobs run at a time, each lent to one job."""

    def __init__(self, most: int = 1) -> None:
        self._most = most
        self._idle: list[tuple[Any, Any]] = []
        self._lent = 0
        self._lock = threading.Lock()

    @contextmanager
    def lent(self, key: Any, load: Callable[[], Any]) -> Iterator[Any]:
        """Lend a loaded model to a block: one that was loaded before under the same key, else what `load` returns.

        A model of another key leaves memory before another one is loaded.

        Args:
            key: equal for models that are the same, such as `Job.loading`.
            load: loads it.

        Raises:
            UserError: whatever `load` raises.
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
        """As `lent`, for the pipeline of a job of `postgen.generate`."""
        return self.lent(job.loading, lambda: load(job))

    def clear(self) -> None:
        """Take the models that nobody uses out of memory, as for work that loads its own."""
        with self._lock:
            self._idle.clear()
        _give_back()

    def _taken(self, key: Any) -> Any:
        """Return an idle model of a key, or make room and return None."""
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
    """One server: made once, handed to every tab.

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
        """What is known of a model by its name, None for the embedded one; read once."""
        self.page: Any = None
        """The `gr.Blocks` that is being built, for events of the page itself."""
        self.remembered: dict[str, Any] = {}
        """What the browser keeps for each tab, a `gr.BrowserState` by the tab's module. They stand outside of the
        tabs: when the page loads, only what is in the first tab is there."""

    @property
    def model_names(self) -> list[str]:
        """What the page offers, the first one first chosen."""
        named = [self.settings.model or EMBEDDED, *self.settings.models, EMBEDDED]
        return list(dict.fromkeys(named))

    def model(self, name: Any) -> str | None:
        """Return the model of a name that the page sent: what `GenerateConfig.model` takes.

        Raises:
            UserError: it is not among `model_names`, and the server was not started with `any_model`.
        """
        if name in (None, "", EMBEDDED):
            return None
        if isinstance(name, str) and (name in self.model_names or self.settings.any_model):
            return name
        raise UserError(f"this server has no model of that name. It has: {', '.join(self.model_names)}")

    def request(self, prompt: str, *, model: str | None, **fields: Any) -> GenerateConfig:
        """Return a request that runs as the server's settings say.

        Args:
            prompt: what the video shows.
            model: from `model`, or `AppSettings.model`.
            **fields: further fields of `GenerateConfig`.

        Raises:
            UserError: a wrong one.
        """
        own = {name: getattr(self.settings, name) for name in ("dtype", "device", "offload")}
        return GenerateConfig(prompt=prompt, model=model, **own, **fields)

    @property
    def runs_root(self) -> Path | None:
        """Folder of the training runs, without links on the way; None for none."""
        root = self.settings.runs
        return None if root is None else Path(root).expanduser().resolve()

    def of_runs(self, path: Path) -> bool:
        """Whether a path leads, through all links, into the folder of the training runs."""
        return (root := self.runs_root) is not None and within(path, root)

    def runs(self) -> dict[str, Path]:
        """Return the folders of training runs by the name that the page shows; links that lead out are no runs."""
        found: list[Path] = []
        if (root := self.runs_root) is not None:
            with suppress(OSError):  # removed meanwhile
                found = sorted(root.iterdir())
        return {path.name: path for path in found if path.name[0] != "." and path.is_dir() and self.of_runs(path)}

    def loras(self) -> dict[str, str]:
        """Return the LoRAs that the page offers, by the name that it shows: those of the settings, and of the runs."""
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
        """Return what a name of `loras` stands for; None for none.

        Raises:
            UserError: it is not among them.
        """
        if name in (None, ""):
            return None
        found = self.loras().get(name) if isinstance(name, str) else None
        if found is None:
            raise UserError("this server has no LoRA of that name: reload the page for the present list")
        return found

    def close(self) -> None:
        """End the jobs and free the models. A job that does not end soon is given up."""
        if not self.jobs.close():
            give_up_threads()
        self.models.clear()

    def _facts(self, model: str | None) -> ModelFacts:
        import postgen

        return inspect_model(model if model is not None else postgen.embedded_model())


def _give_back() -> None:
    """Return memory of what is gone to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
