"""Queueing: how a station A/B/n/q behaves under load, before it is built.

``Model`` reads the notation, ``analyse`` computes the steady state and says by which road
and from which source, ``simulate`` plays it and gives every number with its interval.
``Timeline``, ``Plot`` and ``Topology`` draw: who arrives when, what load does, who is joined.
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
from molva.queueing.plot import Plot
from molva.queueing.result import Flow, SteadyState
from molva.queueing.simulate import Estimate, Simulation, events, simulate
from molva.queueing.timeline import Timeline
from molva.queueing.topology import Topology

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
    "Plot",
    "Simulation",
    "SteadyState",
    "Timeline",
    "Topology",
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
