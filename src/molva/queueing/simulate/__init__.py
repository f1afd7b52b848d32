"""Simulation of any model of the notation: every number with the interval that it lies in.

Importing this loads no numpy; simulating does.
"""

from molva.queueing.analytic.analyse import libraries_named
from molva.queueing.model import Model
from molva.queueing.simulate.job import Fate, Job, Stretch

__all__ = ["Fate", "Job", "Stretch", "events"]


def events(model: Model | str, jobs: int, seed: int = 0) -> list[Job]:
    """Return the first ``jobs`` jobs of the run with this seed, in order of arrival.

    Each says when it arrived, was served, by which server, and left, or that it was refused
    or ran out of patience. Times are exact fractions where all times of the model are
    constant, and floats where any is drawn. A trace starts with its first instant. The run
    ends when the last job has left.

    Args:
        model: A model, or its notation.
        jobs: From 1 to 1,000,000.
        seed: The same gives the same run.

    Raises:
        ParameterError: ``jobs`` is outside its range.
        MissingLibraryError: numpy is not installed.

    Example:
        >>> first, second = events("2*D(1ms)/D(0.5ms)/1/1", jobs=2)
        >>> float(first.start), float(second.start), second.server, second.fate
        (0.0, 0.0005, 0, 'served')
    """
    with libraries_named():
        from molva.queueing.simulate import history

        return history.events(model, jobs, seed)
