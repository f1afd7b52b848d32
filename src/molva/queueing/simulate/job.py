"""A job of a run: when it came, who served it when, and how it left."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, final

__all__ = ["Fate", "Job", "Stretch", "Time"]

Fate = Literal["served", "refused", "abandoned"]

# Seconds: exact where every time of the model is constant, else a float.
Time = Fraction | float


@final
@dataclass(frozen=True, slots=True)
class Stretch:
    """A time that a job spends on a server. Only an interrupted job has more than one.

    Attributes:
        begin: Seconds since the start of the run.
        end: The same.
        server: Its number, from 0. Of the free servers the lowest number works first.
    """

    begin: Time
    end: Time
    server: int


@final
@dataclass(frozen=True, slots=True)
class Job:
    """One job of a run.

    Attributes:
        index: In order of arrival, from 0.
        arrival: Seconds since the start of the run.
        fate: ``served``, ``refused`` where there was no place, or ``abandoned``.
        departure: When it left, served or not; None where it was refused.
        stretches: Its service, of one piece unless it was interrupted; empty without any.
        rank: Its class where the model has priorities, 0 the most urgent.
    """

    index: int
    arrival: Time
    fate: Fate
    departure: Time | None
    stretches: tuple[Stretch, ...] = ()
    rank: int = 0

    @property
    def start(self) -> Time | None:
        """When its service began; None where it never did."""
        return self.stretches[0].begin if self.stretches else None

    @property
    def server(self) -> int | None:
        """Who served it, at the end; None where nobody did."""
        return self.stretches[-1].server if self.stretches else None

    @property
    def wait(self) -> Time | None:
        """Seconds in which it was not served; None where it was refused."""
        if self.departure is None:
            return None
        return self.departure - self.arrival - sum(s.end - s.begin for s in self.stretches)
