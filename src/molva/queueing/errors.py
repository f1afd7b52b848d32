"""Every error that a model can cause, arranged by what the caller does next.

    ModelError
    ├── NotationError          correct the text, at the position that it names
    ├── ParameterError         correct a number: no such time, rate or moment exists
    ├── TraceError             correct the file
    ├── UnstableError          more servers, a smaller load, or a bounded waiting room
    ├── NoAnalysisError        simulate, or change what is named
    └── MissingLibraryError    install the extra

All are ``ValueError`` too. Each message is one sentence for whoever wrote the model.
"""

from typing import final

__all__ = [
    "MissingLibraryError",
    "ModelError",
    "NoAnalysisError",
    "NotationError",
    "ParameterError",
    "TraceError",
    "UnstableError",
]


class ModelError(ValueError):
    """A model that cannot be read or has no answer."""


@final
class NotationError(ModelError):
    """The text is no model.

    Attributes:
        text: What was read.
        position: Index into it where the trouble starts, from 0.
    """

    def __init__(self, text: str, position: int, problem: str) -> None:
        super().__init__(f"{text!r}, character {position + 1}: {problem}")
        self.text = text
        self.position = position
        self.problem = problem


@final
class ParameterError(ModelError):
    """A number that no such process or station can have."""


@final
class TraceError(ModelError):
    """A file of instants or times that cannot be used."""


@final
class UnstableError(ModelError):
    """More arrives than can be served, and all of it waits: there is no steady state.

    Attributes:
        utilisation: Offered load for each server, at least 1.
        growth_per_second: Jobs by which the line grows each second, in the long run.
    """

    def __init__(self, model: str, *, arrival_rate: float, capacity: float) -> None:
        self.utilisation = arrival_rate / capacity
        self.growth_per_second = arrival_rate - capacity
        grows = (
            f"the line grows by {self.growth_per_second:.6g} jobs/s"
            if self.growth_per_second > 0
            else "the line grows without bound, like the square root of time"
        )
        super().__init__(
            f"{model} is unstable: {arrival_rate:.6g} jobs/s arrive and {capacity:.6g} can be "
            f"served ({self.utilisation:.6g} times as many), so {grows}"
        )


@final
class NoAnalysisError(ModelError):
    """Nothing here computes this model, or not by the method that was asked for."""


@final
class MissingLibraryError(ModelError):
    """The model, or a picture of it, needs a library that is not installed."""

    def __init__(self, library: str, *, extra: str = "queueing") -> None:
        what = "a picture" if extra == "plot" else "this model"
        super().__init__(f"{what} needs {library}: pip install 'molva[{extra}]'")
