"""Analysis: a steady state by the best road that exists for a model. One file a method."""

from molva.queueing.analytic.analyse import METHODS, analyse
from molva.queueing.analytic.erlang import erlang_b, erlang_c, load_at_loss

__all__ = ["METHODS", "analyse", "erlang_b", "erlang_c", "load_at_loss"]
