"""Colours and hatches of all pictures. What means something differs in lightness or shape too.

Printed in grey, or seen without colours, a busy bar is dark, the one beside it middle, a wait
white and hatched, a refusal a cross.
"""

from typing import Final

__all__ = [
    "BUSY",
    "GRID",
    "INK",
    "MARK",
    "PALE",
    "REFUSED",
    "SECOND",
    "WAITING",
]

# From dark to light: relative luminance 0.09, 0.36, 0.85.
BUSY: Final = ("#2f5d8c", "#8fb3d9")  # two neighbours in turn
PALE: Final = "#e8eef5"

WAITING: Final = "#7a6a3a"
REFUSED: Final = "#b3261e"
SECOND: Final = "#d9822b"  # the second line of a chart, dashed as well
MARK: Final = "#111111"  # the present point
INK: Final = "#222222"
GRID: Final = "#d5d9de"
