"""Requests to stop that come as signals."""

import logging
import signal
from types import FrameType
from typing import Any

logger = logging.getLogger("trainbook")


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step; a second SIGINT interrupts at once.

    Outside the main thread signals cannot be caught and none are.
    """

    def __init__(self) -> None:
        self.received = ""
        self._previous: dict[int, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> "StopSignals":
        try:
            self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._previous)  # one that came while a worker was loading is answered now
        except ValueError:
            logger.debug("not in the main thread: signals do not stop this run")
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
