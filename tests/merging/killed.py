"""Merge the folders that are given, the output first, and kill the own process in the middle."""

import os
import signal
import sys

from postgen.merging import merge


def stop(done: int, total: int) -> None:
    if 50 < done < total:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    merge(sys.argv[2:], sys.argv[1], progress=stop)
