"""Several processes of one run end together, and the first process prints the reason once.

Without this, a process that waits for another one in a collective operation would wait until the launcher kills it,
which takes 30 s and more, and every process would print its own message. A process that ends with an error writes a
notice to the key-value store of the process group. A thread in each other process reads it. Such a thread works while
the main thread waits in a collective operation or for its GPU.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from postgen.errors import first_line
from postgen.files import discard_unfinished
from postgen.interrupts import terminate_children

_POLL = 0.25
"""Seconds between two looks for a notice."""
_GRACE = 2.0
"""Seconds that the main thread of a process has to end by itself after a notice of another process."""
_PATIENCE = 5.0
"""Seconds that a process waits for the first process to print the notice; then it prints the notice itself."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Parts of the messages of gloo about a process that has ended; NCCL's errors have their own class."""


@dataclass(frozen=True)
class Notice:
    """Why a process has ended."""

    rank: int
    code: int
    """Exit code."""
    text: str
    """The message, in one line."""


class Peers:
    """The processes of this launch, of which this process is one. A single process only prints its own message.

    Args:
        tell: function that prints a message.
        rank: rank of this process.
        count: number of processes.
    """

    def __init__(self, tell: Callable[[str], None], rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._tell = tell
        self._told = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Watch for notices of other processes in a thread."""
        if self.count > 1:
            # Imported here, because two threads should not import torch at the same time.
            import torch.distributed  # noqa: F401

            self._thread = threading.Thread(target=self._watch, name="postgen-peers", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()

    def end(self, code: int, text: str) -> int:
        """Record that this process ends with an error, and return its exit code.

        Of several processes, the first prints the message of the process that has failed first. The others wait until
        it has done so.

        Args:
            code: the exit code.
            text: message without line breaks.
        """
        if self.count == 1:
            self._tell(text)
            return code
        self.stop()
        store = _connected()
        first = Notice(self.rank, code, text)
        if store is not None:
            with suppress(RuntimeError):
                first = self._announce(store, first)
        self._finish(store, first, own=text)
        return code

    def follow(self, error: Exception) -> int | None:
        """Handle an exception that is not the user's error; return the exit code, or None to raise it.

        An exception of a collective operation is the consequence of another process's end: then only the notice of
        that process is printed. Of any other exception the other processes are told, and the caller should raise it.
        """
        if self.count == 1:
            return None
        self.stop()
        store = _connected()
        lost = _is_lost(error)
        first = None if store is None else _read(store)
        if first is None and lost:
            text = (
                "another process of this run has ended without a message (killed, or out of memory); the launcher"
                " says below which. Continue from the last checkpoint with --resume"
            )
            return self.end(1, text)
        if first is not None and first.rank != self.rank:
            self._finish(store, first)
            return first.code if lost else None
        if store is not None:
            text = f"{type(error).__name__}: {first_line(error)} (its traceback is in the output)"
            with suppress(RuntimeError):
                self._announce(store, Notice(self.rank, 1, text))
                if self.rank == 0:
                    store.set(_key("told"), "1")
                    time.sleep(2 * _POLL)
        return None

    def _announce(self, store: Any, own: Notice) -> Notice:
        """Write the notice of this process, unless there is an earlier one; return the first notice."""
        found = store.compare_set(_key("ended"), "", json.dumps(asdict(own)))
        return Notice(**json.loads(found))

    def _finish(self, store: Any, first: Notice, own: str = "") -> None:
        """Print the first notice in the first process; wait for that in the other processes."""
        if self.rank == 0:
            if self._told.acquire(blocking=False):
                self._tell(_worded(first, own))
            if store is not None:
                with suppress(RuntimeError):
                    store.set(_key("told"), "1")
                # The store may end with this process: the others have to read the notice before.
                time.sleep(2 * _POLL)
        elif not _await(store, _PATIENCE) and own:
            self._tell(own)

    def _watch(self) -> None:
        """Look for notices until the process ends; runs in a thread."""
        store = None
        while not self._over.wait(_POLL):
            try:
                store = store or _connected()
                first = None if store is None else _read(store)
            except RuntimeError:  # the store has ended with the first process
                return
            if first is not None and first.rank != self.rank:
                break
        else:
            return
        # The main thread may reach the same error, or an error because of the other process's end.
        if self._over.wait(_GRACE):
            return
        self._finish(store, first)
        _exit(first.code)


@contextmanager
def ending_together(tell: Callable[[str], None]) -> Iterator[Peers]:
    """Watch the other processes of a launch, which its environment variables describe, in the enclosed code.

    Args:
        tell: function that prints a message in one line.
    """
    sizes = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    rank, count = map(int, sizes) if all(text.isdigit() for text in sizes) else (0, 1)
    peers = Peers(tell, rank, count)
    peers.start()
    try:
        yield peers
    finally:
        peers.stop()


def leave(code: int) -> None:
    """Exit with a code. A failed process of several exits at once, because ending its process group could block."""
    if code in (1, 2) and os.environ.get("WORLD_SIZE", "1") != "1":
        _exit(code)
    sys.exit(code)


def _exit(code: int) -> None:
    """Exit at once, without the functions that Python calls at the end of a process."""
    discard_unfinished()
    terminate_children()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_lost(error: Exception) -> bool:
    """Return whether an exception says that another process has ended."""
    from torch import distributed

    text = str(error)
    of_gloo = isinstance(error, RuntimeError) and "/gloo/" in text and any(part in text for part in _LOST)
    return of_gloo or isinstance(error, distributed.DistError)


def _worded(first: Notice, own: str) -> str:
    return first.text if first.rank == 0 or first.text == own else f"process {first.rank}: {first.text}"


def _key(name: str) -> str:
    """Return the key of a value; a restarted launch has other keys."""
    return f"postgen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _read(store: Any) -> Notice | None:
    if not store.check([_key("ended")]):
        return None
    return Notice(**json.loads(store.get(_key("ended"))))


def _await(store: Any, seconds: float) -> bool:
    """Return whether the first process has printed the notice within some seconds."""
    end = time.monotonic() + seconds
    with suppress(RuntimeError):
        while store is not None and time.monotonic() < end:
            if store.check([_key("told")]):
                return True
            time.sleep(_POLL / 2)
    return False


def _connected() -> Any:
    """Return a client of the store of this launch; None if there is none yet.

    torchrun and accelerate keep the store in the launcher. Otherwise the first process keeps it from the beginning of
    the process group on.
    """
    from torch import distributed

    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if host is None or not port.isdigit() or not (of_launcher or distributed.is_initialized()):
        return None
    try:
        limit = timedelta(seconds=_PATIENCE)
        # TCPStore is documented, but torch's types do not export it.
        return distributed.TCPStore(host, int(port), is_master=False, timeout=limit, wait_for_workers=False)  # type: ignore[attr-defined]
    except RuntimeError:
        return None
