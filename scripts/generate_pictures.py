"""Draws the pictures of the manual's pages on queueing, in docs/images.

    python scripts/generate_pictures.py

A test draws them again and compares what is on them.
"""

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Final

from molva.queueing.drawing import files, topology_figure
from molva.queueing.plot import Plot
from molva.queueing.timeline import Timeline
from molva.queueing.topology import KINDS, Topology

IMAGES: Final = Path(__file__).parent.parent / "docs" / "images"

# The original's adder: half a millisecond to add two numbers.
ADDERS: Final = {
    "adder-one-request": "D(1ms)/D(0.5ms)/1",
    "adder-two-requests": "2*D(1ms)/D(0.5ms)/1",
    "adder-two-servers": "2*D(1ms)/D(0.5ms)/2",
    "adder-waiting-place": "2*D(1ms)/D(0.5ms)/1/1",
}
DAY: Final = "sin(level=8/h,amplitude=4/h,period=24h)/M(1h)/10/20"
WAVES: Final = "sin(level=8/h,amplitude=U(3/h,8/h),period=U(18h,30h))/M(1h)/14/30"
HOUR: Final = 3600


def pictures() -> dict[str, Callable[[Path], None]]:
    """Return what draws each picture, by its name."""
    found: dict[str, Callable[[Path], None]] = {
        f"{name}.svg": Timeline.of(spec, duration=Fraction(4, 1000)).save
        for name, spec in ADDERS.items()
    }
    found["random.svg"] = Timeline.of("M(8/s)/M(200ms)/2/3", duration=Fraction(4), seed=6).save
    # Thousands of strokes are less as dots.
    found["waves.png"] = Timeline.of(WAVES, duration=72 * HOUR, seed=1).save
    found["load.svg"] = Plot.of("M(8/s)/M(200ms)/2/10").save
    day = Plot.of(DAY)
    found["day.svg"] = Plot(day.title, day.charts[-2:]).save
    found["topologies.svg"] = _save_topologies
    return found


def _save_topologies(path: Path) -> None:
    hubs = {"hub-and-spoke": 2}
    four = [Topology.of(kind, services=6, hubs=hubs.get(kind)) for kind in KINDS]
    files.save(path, text=str, figure=lambda: topology_figure.drawn(four))


def main(folder: Path = IMAGES) -> None:
    """Write all of them to ``folder``."""
    for name, draw in pictures().items():
        draw(folder / name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
