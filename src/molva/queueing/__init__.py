"""Queueing: how a station A/B/n/q behaves under load, before it is built.

``Model`` reads the notation, ``analyse`` computes the steady state and says by which road
and from which source, ``simulate`` plays it and gives every number with its interval.
Importing this loads neither numpy nor scipy; what is computed numerically, or simulated, does,
when it is asked for.
"""

from molva.queueing.analytic import (
    METHODS,
    Course,
    analyse,
    course,
    erlang_b,
    erlang_c,
    load_at_loss,
)
from molva.queueing.errors import (
    MissingLibraryError,
    ModelError,
    NoAnalysisError,
    NotationError,
    ParameterError,
    TraceError,
    UnstableError,
)
from molva.queueing.model import Model
from molva.queueing.result import Flow, SteadyState
from molva.queueing.simulate import Estimate, Simulation, events, simulate

__all__ = [
    "METHODS",
    "Course",
    "Estimate",
    "Flow",
    "MissingLibraryError",
    "Model",
    "ModelError",
    "NoAnalysisError",
    "NotationError",
    "ParameterError",
    "Simulation",
    "SteadyState",
    "TraceError",
    "UnstableError",
    "analyse",
    "course",
    "erlang_b",
    "erlang_c",
    "events",
    "load_at_loss",
    "simulate",
]
