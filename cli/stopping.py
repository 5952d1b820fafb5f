"""Ctrl-C and SIGTERM for a job that can go on later: once ends it well, twice at once.

Knows signals. Does not know what runs.
"""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Inside the block, the first signal only sets `signum`, and whoever works looks there; a second one raises
    KeyboardInterrupt where it hits, a third ends the process. A signal that is ignored, as in background jobs, stays
    ignored.
    """

    def __init__(self) -> None:
        self.signum = 0

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that the signal ended."""
        return 128 + (self.signum or signal.SIGINT)

    def __enter__(self) -> "StopSignals":
        self._before = {each: signal.getsignal(each) for each in SIGNALS}
        for each, handler in self._before.items():
            if handler != signal.SIG_IGN:
                signal.signal(each, self._first)
        return self

    def __exit__(self, *exception: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler if not self.signum else self._last)

    def _first(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        for each in SIGNALS:
            if signal.getsignal(each) == self._first:
                signal.signal(each, self._second)

    def _second(self, signum: int, frame: FrameType | None) -> None:
        # A second exception on top of the first would end in a traceback somewhere.
        for each in SIGNALS:
            if signal.getsignal(each) == self._second:
                signal.signal(each, self._last)
        raise KeyboardInterrupt

    def _last(self, signum: int, frame: FrameType | None) -> None:
        os._exit(self.exit_code)  # every finished row is in the journal already
