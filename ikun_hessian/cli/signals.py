"""Signals that end a command: it stops soon, keeps what was done, and says how to go on."""

from __future__ import annotations

import signal
from types import FrameType


class Ended(KeyboardInterrupt):
    """A signal asked this process to end; what was done is kept, as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def end_by_signals() -> None:
    """SIGTERM (kill, batch systems) and SIGHUP (a closed terminal) end a command as Ctrl-C does. What is ignored stays
    so: under nohup a closed terminal ends nothing. One is enough: a second would disturb the ending."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Ended(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def interrupted_by(error: BaseException) -> int:
    """The exit code of an interrupted command, as shells have it: 128 and the signal's number."""
    return 128 + (error.number if isinstance(error, Ended) else signal.SIGINT)
