"""Topologies: how sources and receivers are joined, what that costs, and what a failure takes.

    full mesh        each source has a link to each receiver          n(n−1) links   1 hop
    hub and spoke    some members are hubs, joined as a chain         n−1            up to k
    one hub          its simplest form: a hub that is no member       n              2
    queue            the same with a queue: whoever is free takes     n              2

Here n members send and receive, and a link carries both directions, but in the mesh, where
they are counted one by one. The usual shorthand for the mesh, n², counts a link of each member
to itself. All numbers are computed for whatever sources and receivers there are.

Every source sends as much as the next, evenly to all receivers but itself. In a queue nobody
is addressed: any receiver takes what comes, so a receiver that fails takes nothing with it.
"""

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final, Literal, final, get_args

from molva.queueing.errors import ParameterError

__all__ = ["KINDS", "Kind", "Links", "Node", "Role", "Topology", "kind_named"]

Kind = Literal["full-mesh", "hub-and-spoke", "one-hub", "queue"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

Role = Literal["source", "receiver", "service", "hub", "queue"]

# Members beyond which listing them takes seconds. Links grow as their square, and are counted
# by formula.
_MOST_MEMBERS: Final = 100_000


@final
@dataclass(frozen=True, slots=True)
class Node:
    """What a node carries, and what is not delivered while it is down.

    Attributes:
        name: As given, or made from its role and number.
        role: A ``service`` is source and receiver; ``hub`` and ``queue`` only pass on.
        is_hub: Whether it passes on what others send: the role says it, or a member does it too.
        load: Share of all messages that it sends, passes on or receives.
        lost: Share of all messages that is not delivered while it is down.
        lost_by_others: The part of ``lost`` that it would neither have sent nor received.
    """

    name: str
    role: Role
    is_hub: bool
    load: Fraction
    lost: Fraction
    lost_by_others: Fraction


@final
@dataclass(frozen=True, slots=True)
class Links:
    """How many links there are, by two ways of counting.

    Attributes:
        connections: Pairs of nodes that are joined, whichever way messages go.
        one_way: The same, each direction that carries messages counted.
    """

    connections: int
    one_way: int


@final
@dataclass(frozen=True, slots=True)
class Topology:
    """Sources and receivers, joined in one of four ways. A name in both is one service.

    Attributes:
        kind: How they are joined.
        sources: Their names; each sends.
        receivers: Their names.
        hubs: Members that are hubs, the first ones; of ``hub-and-spoke`` alone, else 0.
    """

    kind: Kind
    sources: tuple[str, ...]
    receivers: tuple[str, ...]
    hubs: int = 0

    def __post_init__(self) -> None:
        _require_members("source", self.sources)
        _require_members("receiver", self.receivers)
        kind_named(self.kind)
        if len(self.members) < 2:
            raise ParameterError("a topology joins at least 2 services; it is given 1")
        if len(self.receivers) == 1 and self.receivers[0] in self.sources:
            [only] = self.receivers
            raise ParameterError(f"{only!r} is the only receiver, so it has nobody to send to")
        if len(self.members) > _MOST_MEMBERS:
            raise ParameterError(f"a topology has at most {_MOST_MEMBERS} members")
        if self.kind != "hub-and-spoke":
            if self.hubs:
                raise ParameterError(f"hubs are counted in hub-and-spoke, not in {self.kind}")
        elif not 1 <= self.hubs <= len(self.members):
            raise ParameterError(
                f"of {len(self.members)} members 1 to {len(self.members)} are hubs; it is given "
                f"{self.hubs}"
            )

    @classmethod
    def of(
        cls,
        kind: Kind,
        *,
        services: int | Sequence[str] | None = None,
        sources: int | Sequence[str] | None = None,
        receivers: int | Sequence[str] | None = None,
        hubs: int | None = None,
    ) -> "Topology":
        """Return a topology of so many members, or of members with these names.

        Args:
            kind: How they are joined.
            services: Members that send and receive; or
            sources: Members that send, and
            receivers: members that receive.
            hubs: How many members are hubs, in ``hub-and-spoke``; 1 unless given.

        Example:
            >>> Topology.of("full-mesh", services=3).links
            Links(connections=3, one_way=6)
        """
        if (services is None) == (sources is None and receivers is None):
            raise ParameterError("a topology is given services, or else sources and receivers")
        if services is not None:
            senders = takers = _names("service", services)
        elif sources is None or receivers is None:
            raise ParameterError("sources need receivers, and receivers sources")
        else:
            senders, takers = _names("source", sources), _names("receiver", receivers)
        if hubs is None:
            hubs = 1 if kind == "hub-and-spoke" else 0
        return cls(kind, senders, takers, hubs)

    @property
    def members(self) -> tuple[str, ...]:
        """All sources and receivers, each once."""
        return tuple(dict.fromkeys((*self.sources, *self.receivers)))

    @property
    def links(self) -> Links:
        """How many there are."""
        both = len(set(self.sources) & set(self.receivers))
        if self.kind == "full-mesh":
            one_way = len(self.sources) * len(self.receivers) - both
            return Links(one_way - both * (both - 1) // 2, one_way)
        if self.kind == "hub-and-spoke":
            flows = list(_Chain(self).flows())
            return Links(len(self.members) - 1, sum(bool(flow) for flow in flows))
        return Links(len(self.members), len(self.sources) + len(self.receivers))

    @property
    def shorthand(self) -> str:
        """What is usually said of it, and what is meant."""
        n, links = len(self.members), self.links
        everybody = set(self.sources) == set(self.receivers)
        if self.kind == "full-mesh" and everybody:
            return (
                f"n² links and T(1): {n}² = {n * n} counts a link of each service to itself; "
                f"without, n(n−1) = {links.one_way} one way, or n(n−1)/2 = {links.connections} "
                "that carry both ways"
            )
        if self.kind == "full-mesh":
            return f"n² links and T(1): here sources × receivers = {links.one_way}"
        if self.kind == "hub-and-spoke":
            k = self.most_hops
            return f"n−1 links and T(k): n = {n} members, hubs among them, and k = {k}"
        what = "queue" if self.kind == "queue" else "hub"
        return f"n links and T(2): n = {n} members, and the {what} is none of them"

    @property
    def most_hops(self) -> int:
        """Links on the longest way from a source to a receiver."""
        if self.kind == "full-mesh":
            return 1
        return _Chain(self).most_hops() if self.kind == "hub-and-spoke" else 2

    @property
    def mean_hops(self) -> Fraction:
        """Links that a message takes in the mean."""
        if self.kind == "hub-and-spoke":
            # Each message adds its share to each link on its way.
            return sum(_Chain(self).flows(), Fraction(0))
        return Fraction(self.most_hops)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Members in their order, and the hub or queue behind them."""
        ends = _Ends(self)
        nodes = []
        chain = _Chain(self) if self.kind == "hub-and-spoke" else None
        for index, name in enumerate(self.members):
            own = ends.load(name)
            is_hub = index < self.hubs
            load = chain.load(index) if chain and is_hub else own
            lost = ends.lost_from_queue(name) if self.kind == "queue" else load
            others = ends.others_lost_from_queue(name) if self.kind == "queue" else load - own
            nodes.append(Node(name, ends.role(name), is_hub, load, lost, others))
        if self.kind in ("one-hub", "queue"):
            whole = Fraction(1)
            role: Role = "queue" if self.kind == "queue" else "hub"
            nodes.append(Node(role, role, True, whole, whole, whole))
        return tuple(nodes)

    @property
    def spokes(self) -> dict[str, tuple[str, ...]]:
        """The members at each hub of ``hub-and-spoke``, in their order; else nothing."""
        found: dict[str, list[str]] = {hub: [] for hub in self.members[: self.hubs]}
        if self.hubs:
            hub_of = _Chain(self).at
            for index in range(self.hubs, len(self.members)):
                found[self.members[hub_of[index]]].append(self.members[index])
        return {hub: tuple(names) for hub, names in found.items()}

    def edges(self) -> list[tuple[str, str]]:
        """Return every one-way link that carries messages, as (from, to).

        There may be as many as sources times receivers.
        """
        if self.kind == "full-mesh":
            return [(a, b) for a in self.sources for b in self.receivers if a != b]
        if self.kind == "hub-and-spoke":
            return _Chain(self).edges()
        middle = "queue" if self.kind == "queue" else "hub"
        return [(a, middle) for a in self.sources] + [(middle, b) for b in self.receivers]

    def text(self, width: int = 80) -> str:
        """Return the drawing for a terminal of ``width`` columns, lines without ends."""
        from molva.queueing.drawing import topology_text

        return topology_text.drawn(self, width)

    def save(self, path: str | Path) -> None:
        """Write the picture to ``path``: .png, .svg or .txt.

        Raises:
            ParameterError: The ending is none of these, the file cannot be written, or there
                are more nodes than can be seen.
            MissingLibraryError: PNG and SVG need matplotlib, the extra ``plot``.
        """
        from molva.queueing.drawing import files, topology_figure

        files.save(path, text=self.text, figure=lambda: topology_figure.drawn([self]))


def kind_named(name: str) -> Kind:
    """Return the kind of this name. Raises ParameterError, which suggests the nearest one."""
    for kind in KINDS:
        if kind == name:
            return kind
    close = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ParameterError(f"unknown topology {name!r}, known are {', '.join(KINDS)}{hint}")


def _names(role: str, given: int | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(given, int):
        return tuple(given)
    if not 1 <= given <= _MOST_MEMBERS:
        raise ParameterError(f"there are 1 to {_MOST_MEMBERS} {role}s; it is given {given}")
    return tuple(f"{role} {index}" for index in range(1, given + 1))


def _require_members(role: str, names: tuple[str, ...]) -> None:
    if not names:
        raise ParameterError(f"a topology needs at least 1 {role}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ParameterError(f"the {role} {twice!r} is named twice")
    for name in names:
        if not name.strip() or name in ("hub", "queue"):
            raise ParameterError(f"{name!r} is no name for a {role}; choose another")


class _Ends:
    """What members send and receive, whatever is between them."""

    def __init__(self, topology: Topology) -> None:
        self.sources, self.receivers = set(topology.sources), set(topology.receivers)
        self.each = Fraction(1, len(self.sources))  # what a source sends, of all
        self.both = len(self.sources & self.receivers)

    def role(self, name: str) -> Role:
        if name in self.sources:
            return "service" if name in self.receivers else "source"
        return "receiver"

    def takers(self, name: str) -> int:
        """Return how many receivers a source has: all but itself."""
        return len(self.receivers) - (name in self.receivers)

    def sent(self, name: str) -> Fraction:
        return self.each if name in self.sources else Fraction(0)

    def received(self, name: str) -> Fraction:
        if name not in self.receivers:
            return Fraction(0)
        only_sources = len(self.sources) - self.both
        others = self.both - (name in self.sources)
        from_sources = only_sources * self.each / len(self.receivers)
        from_others = others * self.each / (len(self.receivers) - 1) if others else Fraction(0)
        return from_sources + from_others

    def load(self, name: str) -> Fraction:
        return self.sent(name) + self.received(name)

    def lost_from_queue(self, name: str) -> Fraction:
        return self.sent(name) + self.others_lost_from_queue(name)

    def others_lost_from_queue(self, name: str) -> Fraction:
        """Return what stays in the queue because nobody else is there to take it."""
        if name not in self.receivers:
            return Fraction(0)
        stranded = 0
        if len(self.receivers) == 1:
            stranded = len(self.sources)
        elif len(self.receivers) == 2:
            # The other receiver, where it is a source too, does not take what it sent.
            [other] = self.receivers - {name}
            stranded = int(other in self.sources)
        return stranded * self.each


class _Chain:
    """Hubs 0 to h − 1 in a row, the other members spread evenly over them, in order."""

    def __init__(self, topology: Topology) -> None:
        self.members, self.hubs = topology.members, topology.hubs
        self.ends = _Ends(topology)
        spokes = len(self.members) - self.hubs
        # At which hub each member is.
        self.at = [
            *range(self.hubs),
            *(index * self.hubs // spokes for index in range(spokes)),
        ]
        sent, takers = [Fraction(0)] * self.hubs, [0] * self.hubs
        self.to_itself = [Fraction(0)] * self.hubs
        for name, hub in zip(self.members, self.at, strict=True):
            share = self._share(name)
            sent[hub] += share
            takers[hub] += name in self.ends.receivers
            if name in self.ends.receivers:
                self.to_itself[hub] += share
        # Sums over the hubs up to and with each one, and none before the first.
        self.sent = [Fraction(0), *itertools.accumulate(sent)]
        self.takers = [0, *itertools.accumulate(takers)]

    def _share(self, name: str) -> Fraction:
        """Return what ``name`` sends to each receiver, of all messages."""
        if name not in self.ends.sources:
            return Fraction(0)
        return self.ends.each / self.ends.takers(name)

    def load(self, hub: int) -> Fraction:
        """Return the share of messages that passes a hub, or begins or ends there."""
        sent, takers = self.sent, self.takers
        from_left = sent[hub + 1] * (takers[-1] - takers[hub])
        from_right = (sent[-1] - sent[hub]) * takers[hub + 1]
        here = (sent[hub + 1] - sent[hub]) * (takers[hub + 1] - takers[hub])
        return from_left + from_right - here - self.to_itself[hub]

    def flows(self) -> "itertools.chain[Fraction]":
        """Return the share of messages on every one-way link, 0 where none goes."""
        spokes = self.members[self.hubs :]
        up = (self.ends.sent(name) for name in spokes)
        down = (self.ends.received(name) for name in spokes)
        sent, takers = self.sent, self.takers
        right = (sent[hub] * (takers[-1] - takers[hub]) for hub in range(1, self.hubs))
        left = ((sent[-1] - sent[hub]) * takers[hub] for hub in range(1, self.hubs))
        return itertools.chain(up, down, right, left)

    def edges(self) -> list[tuple[str, str]]:
        spokes = [
            (name, self.members[hub])
            for name, hub in zip(self.members[self.hubs :], self.at[self.hubs :], strict=True)
        ]
        rows = list(itertools.pairwise(self.members[: self.hubs]))
        both = [*spokes, *((b, a) for a, b in spokes), *rows, *((b, a) for a, b in rows)]
        return [edge for edge, flow in zip(both, self.flows(), strict=True) if flow]

    def most_hops(self) -> int:
        """Return the longest way: |hub − hub'|, and a link from and to a spoke.

        A maximum of |x − y| is one of two maxima of sums, each of which takes the two best
        members from either side, because nobody sends to itself.
        """
        most = 0
        for sign in (1, -1):
            reach = {
                name: (index >= self.hubs, sign * hub)
                for index, (name, hub) in enumerate(zip(self.members, self.at, strict=True))
            }
            senders = sorted(self.ends.sources, key=lambda name: -sum(reach[name]))[:2]
            takers = sorted(self.ends.receivers, key=lambda name: reach[name][1] - reach[name][0])[
                :2
            ]
            for a, b in itertools.product(senders, takers):
                if a != b:
                    most = max(most, sum(reach[a]) + reach[b][0] - reach[b][1])
        return most
