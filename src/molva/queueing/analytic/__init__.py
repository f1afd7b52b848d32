"""Analysis: a steady state by the best road that exists for a model. One file a method."""

from molva.queueing.analytic.analyse import METHODS, analyse
from molva.queueing.analytic.erlang import erlang_b, erlang_c, load_at_loss
from molva.queueing.analytic.periodic import Course, course

__all__ = ["METHODS", "Course", "analyse", "course", "erlang_b", "erlang_c", "load_at_loss"]
