"""Topologies as a figure: circles for members, a square for a hub, a box with places for a queue.

Members who send and receive stand around; sources stand on the left and receivers on the right
where nobody is both. Each node of an SVG has the id ``node-…``, each link ``link-…``.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from molva.queueing.drawing import colours
from molva.queueing.drawing.files import new_figure
from molva.queueing.errors import ParameterError
from molva.queueing.topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["drawn"]

# Inches of one picture.
_WIDTH: Final = 4.4
_HEIGHT: Final = 4.6

# Members of one picture. Beyond, circles touch; names are written for fewer still.
_MOST_DRAWN: Final = 60
_MOST_NAMED: Final = 16

# Half the side of a picture, where members stand at 1 from the middle and names beyond.
_EDGE: Final = 1.55

# Height of the title inside the picture, from 0 to 1: above it, it would be cut off, because a
# picture of equal sides leaves no margin.
_TITLE: Final = 0.91

# How far above and below a row of hubs their spokes stand.
_SPOKE: Final = 0.68

# Names beside each other that fit a row; more stand upright.
_MOST_LEVEL: Final = 4

_Place = tuple[float, float]


def drawn(topologies: Sequence[Topology]) -> "Figure":
    """Return the figure, one picture beside the other.

    Raises:
        ParameterError: There are more members than can be seen.
    """
    for topology in topologies:
        if len(topology.members) > _MOST_DRAWN:
            raise ParameterError(
                f"a picture shows up to {_MOST_DRAWN} members; there are {len(topology.members)}"
            )
    figure = new_figure(_WIDTH * len(topologies), _HEIGHT)
    for index, topology in enumerate(topologies, start=1):
        _draw(figure.add_subplot(1, len(topologies), index), topology)
    return figure


def _draw(axes: "Axes", topology: Topology) -> None:
    places = _places(topology)
    edges = topology.edges()
    directed = set(edges)
    size = _size(len(places))
    for a, b in edges:
        two_ways = (b, a) in directed
        if two_ways and a > b:
            continue
        _link(axes, a, b, places, two_ways=two_ways, size=size)
    for node in topology.nodes:
        _node(axes, node.name, places[node.name], node.role, is_hub=node.is_hub, size=size)
    if len(topology.members) <= _MOST_NAMED:
        heights = Counter(y for _, y in places.values())
        for name, place in places.items():
            _label(axes, name, place, topology, heights[place[1]])
    links = topology.links
    hops = f"{topology.most_hops} hop" + "s" * (topology.most_hops > 1)
    most = "up to " if topology.mean_hops != topology.most_hops else ""
    axes.set_title(
        f"{topology.kind}\n{links.connections} links ({links.one_way} one way), {most}{hops}",
        loc="center",
        y=_TITLE,
    )
    axes.set_aspect("equal")
    axes.set_xlim(-_EDGE, _EDGE)
    axes.set_ylim(-_EDGE, _EDGE)
    axes.axis("off")


def _size(nodes: int) -> float:
    """Return the diameter of a node in points."""
    return 20.0 if nodes <= 8 else 13.0 if nodes <= 20 else 7.0


# Where nodes stand.


def _places(topology: Topology) -> dict[str, _Place]:
    if topology.kind == "hub-and-spoke":
        return _hubs_and_spokes(topology)
    centre = {"one-hub": "hub", "queue": "queue"}.get(topology.kind)
    middle = {} if centre is None else {centre: (0.0, 0.0)}
    if set(topology.sources) & set(topology.receivers):
        return _around(topology.members) | middle
    left, right = _column(topology.sources, -1.0), _column(topology.receivers, 1.0)
    return left | right | middle


def _around(names: Sequence[str]) -> dict[str, _Place]:
    turn = 2 * math.pi / len(names)
    return {
        name: (math.sin(index * turn), math.cos(index * turn)) for index, name in enumerate(names)
    }


def _column(names: Sequence[str], x: float) -> dict[str, _Place]:
    gap = 2 / len(names)
    return {name: (x, 1 - gap * (index + 0.5)) for index, name in enumerate(names)}


def _hubs_and_spokes(topology: Topology) -> dict[str, _Place]:
    """Put one hub in the middle; or several in a row, spokes of each above and below it."""
    members, count = topology.members, topology.hubs
    if count == 1:
        return {members[0]: (0.0, 0.0)} | _around(members[1:])
    slot = 2 / count
    hubs = {hub: (-1 + slot * (index + 0.5), 0.0) for index, hub in enumerate(members[:count])}
    places = dict(hubs)
    for hub, mine in topology.spokes.items():
        x, _ = hubs[hub]
        above = (len(mine) + 1) // 2
        for row, y in ((mine[:above], _SPOKE), (mine[above:], -_SPOKE)):
            for index, spoke in enumerate(row):
                places[spoke] = (x + slot * ((index + 0.5) / len(row) - 0.5), y)
    return places


# What they look like.


def _link(
    axes: "Axes", a: str, b: str, places: dict[str, _Place], *, two_ways: bool, size: float
) -> None:
    from matplotlib.patches import FancyArrowPatch

    arrow = FancyArrowPatch(
        places[a],
        places[b],
        arrowstyle="<|-|>" if two_ways else "-|>",
        mutation_scale=9 if size > 10 else 5,
        shrinkA=size / 2 + 3,
        shrinkB=size / 2 + 3,
        linewidth=1.0 if size > 10 else 0.5,
        color=colours.INK if size > 10 else "#777777",
    )
    arrow.set_gid(f"link-{a}-{b}".replace(" ", "-"))
    axes.add_patch(arrow)


def _node(axes: "Axes", name: str, place: _Place, role: str, *, is_hub: bool, size: float) -> None:
    shape = "s" if role in ("hub", "queue") else "o"
    [node] = axes.plot(
        [place[0]],
        [place[1]],
        marker=shape,
        markersize=size * (1.3 if role in ("hub", "queue") else 1.0),
        color=colours.BUSY[0] if is_hub else colours.BUSY[1],
        markeredgecolor=colours.INK,
        markeredgewidth=1.0,
        linestyle="none",
        zorder=3,
    )
    node.set_gid(f"node-{name}".replace(" ", "-"))
    if role == "queue" and size > _STROKED:
        # Places of the line, as strokes in the box.
        axes.plot(
            [place[0]], [place[1]], marker=_STROKES, markersize=size * 1.0, color="white", zorder=4
        )


# Three upright strokes, a marker of matplotlib's own syntax, and the size from which they show.
_STROKES: Final = "$|||$"
_STROKED: Final = 10


def _label(axes: "Axes", name: str, place: _Place, topology: Topology, level: int) -> None:
    """Write the name beside, above or below the node; of a node with links around, at its corner.

    ``level`` is how many nodes stand at its height.
    """
    x, y = place
    in_row = topology.kind == "hub-and-spoke" and topology.hubs > 1
    upright = in_row and level > (_MOST_LEVEL if y else 2)
    sideways, upwards = math.copysign(14.0, x), math.copysign(14.0, y)
    if in_row and y == 0:
        offset, horizontal, vertical = (9.0, -9.0), "left", "top"
    elif x == y == 0:
        offset, horizontal, vertical = (6.0, 17.0), "left", "bottom"
    elif in_row or abs(x) < _MIDDLE:
        offset, horizontal, vertical = (0.0, upwards), "center", "bottom" if y > 0 else "top"
    else:
        offset, horizontal, vertical = (sideways, 0.0), "left" if x > 0 else "right", "center"
    axes.annotate(
        name,
        place,
        offset,
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        rotation=(-45 if y == 0 else 90) if upright else 0,
        rotation_mode="anchor" if upright and y == 0 else "default",
        fontsize=9,
    )


# Nodes that stand nearer to the middle, from side to side, have their names above or below.
_MIDDLE: Final = 0.1
