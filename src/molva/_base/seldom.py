"""Logging trouble that may come thousands of times a second: once in a while is enough."""

import logging
from collections.abc import Mapping
from typing import Final, final

from molva._base.clock import Clock

__all__ = ["SeldomLog"]

# Seconds between two lines about the same trouble. Shorter, and a full disk is filled
# further by telling that it is full; longer, and somebody on call wonders if it still is.
_INTERVAL: Final = 5.0


@final
class SeldomLog:
    """Logs one line in five seconds, and with it how many were left out.

    Args:
        logger: Where lines go.
        clock: Where time comes from.
    """

    def __init__(self, logger: logging.Logger, clock: Clock) -> None:
        self._logger = logger
        self._clock = clock
        self._next = float("-inf")
        self._left_out = 0

    def warning(
        self, text: str, *values: object, extra: Mapping[str, object] | None = None
    ) -> None:
        """Log a warning, with the fields of ``extra``, if it is time."""
        self._log(logging.WARNING, text, values, extra=extra)

    def error(self, text: str, *values: object, trace: BaseException | None = None) -> None:
        """Log an error, with the traceback of ``trace`` if there is one."""
        self._log(logging.ERROR, text, values, trace=trace)

    def _log(
        self,
        level: int,
        text: str,
        values: tuple[object, ...],
        *,
        trace: BaseException | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        now = self._clock.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        self._next = now + _INTERVAL
        if self._left_out:
            text += " (and %d times more since the last line)"
            values = (*values, self._left_out)
            self._left_out = 0
        self._logger.log(level, text, *values, exc_info=trace, extra=extra)
