"""What arriving jobs bring with them: their service time, class and patience, each by lot.

Every arrival takes one of each, also one that is refused. So the thousandth job is the same
job in all models that are played under one seed.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from molva.queueing.model import Bulk, Model, Priority
from molva.queueing.simulate.draws import Fill, Floats, fill_of
from molva.queueing.simulate.streams import Role, Streams
from molva.queueing.simulate.units import Clock

__all__ = ["Demand", "Demands", "demands_of"]

# Numbers that are drawn ahead for the random order.
_PICKS: Final = 1024

_NOTHING: Final = np.empty(0)


@dataclass(frozen=True, slots=True)
class Demand:
    """Of some jobs in a row, in units of the clock. What the model has not is empty.

    Attributes:
        services: Service times; of 0 where jobs are served in bulk.
        ranks: Classes, 0 the most urgent.
        patience: How long each waits at most.
    """

    services: Floats
    ranks: NDArray[np.int64]
    patience: Floats


class Demands:
    """Draws what jobs bring, in order of their arrival."""

    def __init__(
        self,
        service: Fill | None,
        patience: Fill | None,
        classes: Floats,
        lots: np.random.Generator,
        order: np.random.Generator,
    ) -> None:
        self._service = service
        self._patience = patience
        self._classes = classes
        self._lots = lots
        self._order = order
        self._picks: list[float] = []

    def take(self, jobs: int) -> Demand:
        """Return what the next ``jobs`` bring."""
        services = np.zeros(jobs)
        if self._service is not None:
            self._service(services)
        ranks = np.empty(0, np.int64)
        if self._classes.size:
            ranks = np.searchsorted(self._classes, self._lots.random(jobs), side="right")
        patience = _NOTHING
        if self._patience is not None:
            patience = np.empty(jobs)
            self._patience(patience)
        return Demand(services, ranks, patience)

    def order(self, size: int) -> Floats:
        """Return ``size`` uniform numbers that choose who is next."""
        return self._order.random(size)

    def picks(self) -> float:
        """Return one such number."""
        if not self._picks:
            self._picks = self._order.random(_PICKS)[::-1].tolist()
        return self._picks.pop()


def demands_of(model: Model, clock: Clock, streams: Streams) -> Demands:
    """Return what draws the demands of ``model`` in one replication."""
    discipline = model.discipline
    shares = discipline.shares if isinstance(discipline, Priority) else ()
    service = model.service
    return Demands(
        None if isinstance(service, Bulk) else fill_of(service, clock, streams.of(Role.SERVICE)),
        None
        if model.patience is None
        else fill_of(model.patience, clock, streams.of(Role.PATIENCE)),
        # The last border is left out, so that no rounding makes a class beyond the last.
        np.cumsum([float(share) for share in shares])[:-1],
        streams.of(Role.CLASS)[0],
        streams.of(Role.ORDER)[0],
    )
