"""Python's cycle collector, in processes whose work leaves no cycles."""

import gc
from typing import Final

__all__ = ["calm_collector"]

# Objects made before the collector looks for cycles among them. A request or a rating
# makes a few dozen and leaves no cycle; at Python's own 700 the collector took 5 % of the
# time of an HTTP process under load. Cycles that do come about are still found.
_THRESHOLDS: Final = (50_000, 20, 100)


def calm_collector() -> None:
    """Let the collector run seldom. Call once, when everything is loaded and open."""
    # What stands now stays: it need not be looked at again.
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
