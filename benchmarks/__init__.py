"""Measurements. ``make bench`` runs all; ``make bench ARGS="service idle"`` some.

Two cores that others share measure nothing in absolute terms, so each figure that matters
is a ratio: both sides run in turns within one run, and the median of the turns is
compared. A report says on what, with which versions and settings, and goes to
``benchmarks/results/``.
"""
