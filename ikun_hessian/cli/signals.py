"""Signals that end a command. It stops soon, keeps finished work, and says how to resume."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType


class Ended(KeyboardInterrupt):
    """A signal asked this process to end. Finished work is kept, as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def end_by_signals() -> None:
    """Make SIGTERM (kill, batch systems) and SIGHUP (a closed terminal) end a command as Ctrl-C does.

    A signal that is ignored stays ignored: under nohup, a closed terminal ends nothing. After the first signal, others
    of its kind are ignored, so that they do not disturb the ending.
    """

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Ended(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def interrupted_by(error: BaseException) -> int:
    """Return the exit code of an interrupted command, as in shells: 128 plus the number of the signal."""
    return 128 + (error.number if isinstance(error, Ended) else signal.SIGINT)


def end_with(parent: int) -> None:
    """End this process soon after its parent process, whatever it does then: importing, working or waiting for work.

    Args:
        parent: Process ID of the parent.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
