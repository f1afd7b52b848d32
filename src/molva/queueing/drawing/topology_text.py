"""A topology for a terminal: who is joined to whom, and what each node carries.

source 1 ─┐           ┌─▶ receiver 1
source 2 ─┼─▶ queue ──┤
source 3 ─┘           └─▶ receiver 2
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Final, Literal

from molva.queueing.topology import Node, Topology

__all__ = ["compared", "described", "drawn"]

# Members that are drawn. Of more, the numbers say more than the lines.
_MOST_DRAWN: Final = 16

_NARROWEST: Final = 40


def drawn(topology: Topology, width: int) -> str:
    """Return the drawing, at most ``width`` columns wide where names are no longer than that."""
    members = len(topology.members)
    if members > _MOST_DRAWN:
        return f"({members} members; up to {_MOST_DRAWN} are drawn)"
    if topology.kind == "full-mesh":
        rows = _matrix(topology)
    elif topology.kind == "hub-and-spoke":
        rows = _trees(topology)
    else:
        rows = _star(topology)
    if max(map(len, rows)) > max(width, _NARROWEST):
        return f"(too wide for {width} columns)"
    return "\n".join(rows)


def described(topology: Topology, width: int = 80) -> str:
    """Return the drawing and all numbers."""
    links = topology.links
    facts = [
        ("links", f"{links.connections}, or {links.one_way} one way"),
        ("hops", _hops(topology)),
        ("usually", topology.shorthand),
    ]
    head = ("", "load", "lost when down", "of that, others'")
    nodes = [
        (name, _percent(node.load), _percent(node.lost), _percent(node.lost_by_others))
        for name, node in _grouped(topology.nodes)
    ]
    title = f"{topology.kind}: {_members(topology)}"
    table = "\n".join(f"{name:<9}{value}" for name, value in facts)
    return "\n\n".join([title, drawn(topology, width), table, _table([head, *nodes])])


def compared(topologies: Sequence[Topology]) -> str:
    """Return a table with a line for each, all of the same members."""
    rows = [("", "links", "one way", "hops", "worst failure", "of that, others'")]
    for topology in topologies:
        worst = max(topology.nodes, key=lambda node: (node.lost, node.lost_by_others))
        lost, others = _percent(worst.lost), _percent(worst.lost_by_others)
        both, one = map(str, (topology.links.connections, topology.links.one_way))
        rows.append((topology.kind, both, one, _hops(topology), lost, others))
    said = "\n".join(f"{each.kind}: {each.shorthand}" for each in topologies)
    return "\n\n".join([_members(topologies[0]), _table(rows), said])


def _members(topology: Topology) -> str:
    sources, receivers = len(topology.sources), len(topology.receivers)
    if set(topology.sources) == set(topology.receivers):
        return f"{sources} services, each sends evenly to all others"
    many = ("source", "sources")[sources > 1], ("receiver", "receivers")[receivers > 1]
    return f"{sources} {many[0]}, {receivers} {many[1]}"


def _hops(topology: Topology) -> str:
    most, mean = topology.most_hops, topology.mean_hops
    return str(most) if mean == most else f"up to {most}, {float(mean):.3g} in the mean"


def _percent(share: Fraction) -> str:
    return f"{100 * float(share):.3g} %"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _grouped(nodes: Sequence[Node]) -> Iterator[tuple[str, Node]]:
    """Join neighbours of the same numbers, as ``service 1 … service 9``."""
    for _, group in itertools.groupby(nodes, key=lambda node: dataclasses.replace(node, name="")):
        same = list(group)
        node = same[0]
        name = node.name if len(same) == 1 else f"{node.name} … {same[-1].name}"
        is_member = node.role not in ("hub", "queue")
        yield f"{name} (hub)" if node.is_hub and is_member else name, node


def _matrix(topology: Topology) -> list[str]:
    """Return a row for each source, a column for each receiver, ▶ where one sends to the other."""
    wide = max(map(len, topology.sources)) + 2
    rows = [" " * wide + "  ".join(topology.receivers)]
    for source in topology.sources:
        cells = ("·" if source == receiver else "▶" for receiver in topology.receivers)
        padded = (
            cell.center(len(receiver))
            for cell, receiver in zip(cells, topology.receivers, strict=True)
        )
        rows.append(f"{source:<{wide}}{'  '.join(padded)}".rstrip())
    return rows


def _trees(topology: Topology) -> list[str]:
    """Return the hubs one below the other, the spokes of each to the right of it."""
    spokes = topology.spokes
    hubs = list(spokes)
    wide = max(map(len, hubs)) + 1
    rows = []
    for hub in hubs:
        mine = spokes[hub]
        rail = " " if hub == hubs[-1] else "│"
        for index, spoke in enumerate(mine):
            first, last = index == 0, index == len(mine) - 1
            left = hub.ljust(wide, " ") if first else f" {rail}".ljust(wide)
            joint = ("─" if last else "┬") if first else ("└" if last else "├")
            rows.append(f"{left}{'─' if first else ' '}{joint}─ {spoke}")
        if not mine:
            rows.append(hub)
        if hub != hubs[-1]:
            rows.append(" │")
    return rows


def _star(topology: Topology) -> list[str]:
    """Return sources on the left, receivers on the right, services there with arrows both ways."""
    middle = "queue" if topology.kind == "queue" else "hub"
    services = [name for name in topology.sources if name in topology.receivers]
    left = [name for name in topology.sources if name not in services]
    right = [f"─▶ {name}" for name in topology.receivers if name not in services]
    right += [f"◀▶ {name}" for name in services]
    height = max(len(left), len(right))
    centre = (height - 1) // 2
    wide = max(map(len, left), default=0)
    blank = " " * (len(middle) + 2)
    rows = []
    for row, (ins, outs) in enumerate(
        zip(_comb(left, height, centre, "left"), _comb(right, height, centre, "right"), strict=True)
    ):
        (name, joint), (other, branch) = ins, outs
        start = f"{name:<{wide}} {'─' if name else ' '}{joint}" if left else ""
        arrow = ("─▶ " if row == centre else "   ") if left else ""
        hub = f"{middle} ─" if row == centre else blank
        rows.append(f"{start}{arrow}{hub}{branch}{other}".rstrip())
    return rows


def _comb(
    names: Sequence[str], height: int, centre: int, side: Literal["left", "right"]
) -> list[tuple[str, str]]:
    """Return for each row its name, or none, and the joint that leads it to row ``centre``."""
    first = (height - len(names)) // 2
    last = first + len(names) - 1
    top, bottom = min(first, centre), max(last, centre)
    rows = []
    for row in range(height):
        named, middle = first <= row <= last, row == centre
        up, down = top < row <= bottom, top <= row < bottom
        left, right = (named, middle) if side == "left" else (middle, named)
        name = names[row - first] if named else ""
        rows.append((name, _JOINTS.get((left, right, up, down), " ")))
    return rows


# A joint by whether it leads left, right, up and down.
_JOINTS: Final = {
    (True, True, False, False): "─",
    (True, True, False, True): "┬",
    (True, True, True, False): "┴",
    (True, True, True, True): "┼",
    (True, False, False, True): "┐",
    (True, False, True, False): "┘",
    (True, False, True, True): "┤",
    (False, True, False, True): "┌",
    (False, True, True, False): "└",
    (False, True, True, True): "├",
    (False, False, True, True): "│",
}
