"""What every opened object has: a driver, the URL it was opened by, whether it was closed."""

import os
import warnings
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Final, Protocol, Self

from molva._base.clock import Clock
from molva.messaging._tracing import Place, Tracing
from molva.messaging.driver import Capabilities
from molva.messaging.errors import ClosedError
from molva.messaging.url import BrokerURL, Kind, check_features

__all__ = ["Closing", "Opened"]


class _Driver(Protocol):
    @property
    def capabilities(self) -> Capabilities: ...

    async def close(self) -> None: ...


class Closing(ABC):
    """What is closed at the end of an ``async with``."""

    @abstractmethod
    async def close(self) -> None:
        """Release everything. Idempotent."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class Opened(Closing):
    """A topic, subscription or queue that is open.

    Args:
        driver: Does the work.
        url: What was opened.
        clock: Where time comes from.
        tracing: Told of what is sent and processed; None tells nobody.
    """

    _closed = True  # until __init__ has come to its end

    def __init__(
        self, driver: _Driver, url: BrokerURL, *, clock: Clock, tracing: Tracing | None
    ) -> None:
        self._opened: Final = driver
        self._url: Final = url
        self._clock: Final = clock
        self._tracing: Final = tracing
        self._place: Final = Place.of(url)
        self._pid: Final = os.getpid()
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """What the broker can do, with the settings it was opened with."""
        return self._opened.capabilities

    @property
    def system(self) -> str:
        """The broker's scheme: ``sqlite``."""
        return self._place.system

    @property
    def name(self) -> str:
        """Where messages go to or come from: ``mails``, ``ratings/process``."""
        return str(self._place)

    async def close(self) -> None:
        """Release the broker. Idempotent."""
        if not self._closed:
            self._closed = True
            await self._opened.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._url}>"

    def __del__(self) -> None:
        # In a fork it goes away and is not the fork's to close.
        if not self._closed and os.getpid() == self._pid:
            warnings.warn(
                f"{self!r} was never closed; what it holds comes again late",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    @property
    def _kind(self) -> Kind:
        return "topic" if self._url.queue is None else "queue"

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self._url}: the {type(self).__name__.lower()} was closed")

    def _check_can(self, feature: str) -> None:
        """Raise where it is closed, or the broker has no such feature."""
        self._check_open()
        check_features(self._url, self.capabilities, (feature,), self._kind)
