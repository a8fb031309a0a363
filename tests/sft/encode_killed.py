"""Encode a folder of clips: `python -m tests.sft.encode_killed SOURCE OUT KILL`.

The process kills itself with signal 9 in the middle of writing entry number KILL; 0: never.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from postgen.sft import cache
from tests.sft.media import built, settings, tiny


def main(source: str, out: str, kill: int) -> None:
    write, done = cache.save_file, [0]

    def dying(tensors, path, metadata):
        write(tensors, path, metadata)
        done[0] += 1
        if done[0] == kill:
            with open(path, "r+b") as file:
                file.truncate(path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    cache.save_file = dying
    built(tiny(), settings(source), Path(out), main=False)
    print(f"wrote {done[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]))
