"""One replication: a run with streams of its own, cut into cells of equal length.

A cell is the smallest stretch that is kept apart. When there are too many, neighbours are
joined, so that memory does not grow with the run, however long.
"""

from typing import Final

from molva.queueing.model import Model, Priority
from molva.queueing.simulate.arrivals import source_of
from molva.queueing.simulate.demands import demands_of
from molva.queueing.simulate.station import station_of
from molva.queueing.simulate.streams import Streams
from molva.queueing.simulate.tally import Sum, Tally
from molva.queueing.simulate.units import Clock

__all__ = ["CHUNK", "Replication"]

# Jobs that are drawn and played at a time. Their arrays stay in the cache of a core: four
# times as many take a fifth longer, a quarter as many lose it in calls.
CHUNK: Final = 16_384

# Cells of a replication, from which on neighbours are joined.
_MOST_CELLS: Final = 32


class Replication:
    """A run that can be continued.

    Attributes:
        jobs_each: Mean jobs in one unit of the measure, which is jobs or periods.
        cells: What was counted after the warm-up, in order.
        jobs: Arrivals played, those of the warm-up among them.
        warm_up: Arrivals of the warm-up.
        compiled: Whether by the compiled kernels.
        stopped: Set from another thread to end the run within a chunk; it is then of no use.
    """

    def __init__(
        self, model: Model, clock: Clock, seed: int, number: int, *, compiled: bool
    ) -> None:
        streams = Streams(seed, number)
        self._source = source_of(model, clock, streams, moved=True)
        self._demands = demands_of(model, clock, streams)
        self._station = station_of(model, clock, self._demands, compiled=compiled)
        discipline = model.discipline
        self._classes = len(discipline.shares) if isinstance(discipline, Priority) else 0
        self.jobs_each = self._source.jobs_each
        self.cells: list[Tally] = []
        self.jobs = 0
        self.warm_up = 0
        self.cell_size = 0
        self.stopped = False
        self.compiled = compiled

    def warm(self, measure: int) -> None:
        """Play the beginning, and forget it."""
        if measure:
            self._play(measure)
        self.warm_up = self.jobs

    def extend(self, cells: int, cell_size: int) -> None:
        """Go on until there are ``cells`` of ``cell_size``; join neighbours if that is many.

        Args:
            cells: Wanted in all; even where it is more than before.
            cell_size: Of the first call; later ones are as long as those that are there.
        """
        self.cell_size = self.cell_size or cell_size
        while len(self.cells) < cells and not self.stopped:
            self.cells.append(self._play(self.cell_size))
        while len(self.cells) > _MOST_CELLS and len(self.cells) % 2 == 0:
            for first, second in zip(self.cells[::2], self.cells[1::2], strict=True):
                first.add(second)
            self.cells = self.cells[::2]
            self.cell_size *= 2

    def _play(self, measure: int) -> Tally:
        tally = Tally(self._classes)
        while measure > 0 and not self.stopped:
            gaps, done = self._source.take(measure, CHUNK)
            if gaps.size:
                self._station.play(gaps, self._demands.take(gaps.size), tally)
            measure -= done
        self.jobs += int(tally.sums[Sum.ARRIVED])
        return tally
