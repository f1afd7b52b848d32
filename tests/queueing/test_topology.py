"""Topologies: formulas against a graph that is walked, and against published counts."""

import json
import random
import re
from collections import deque
from fractions import Fraction
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from molva.queueing import ParameterError
from molva.queueing.topology import KINDS, Kind, Topology, kind_named

DATA = Path(__file__).parent.parent / "data" / "queueing_cases.json"
CASES = [case for case in json.loads(DATA.read_text())["cases"] if case["group"] == "topology"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_a_published_count_is_met(case: dict[str, Any]) -> None:
    n, values = case["params"]["n"], case["values"]
    mesh = Topology.of("full-mesh", services=n)

    assert mesh.links.one_way == values["full_mesh_directed"]
    assert mesh.links.connections == values["full_mesh_undirected"]
    assert Topology.of("one-hub", services=n).links.connections == values["hub_links"]
    star = Topology.of("hub-and-spoke", services=n)
    assert star.links.connections == values["star_with_one_member_as_hub"]
    assert Topology.of("queue", services=n).links.connections == values["queue_links"]


class Walked:
    """The same numbers from the graph alone: every message is walked along its shortest way."""

    def __init__(self, topology: Topology) -> None:
        self.kind = topology.kind
        self.sources, self.receivers = topology.sources, topology.receivers
        self.edges = set(topology.edges())
        self.next: dict[str, list[str]] = {}
        for a, b in self.edges:
            self.next.setdefault(a, []).append(b)
        self.shares = {
            (a, b): Fraction(1, len(self.sources) * len(self.takers(a)))
            for a in self.sources
            for b in self.takers(a)
        }
        self.ways = {pair: self.way(*pair) for pair in self.shares}

    def takers(self, source: str) -> list[str]:
        return [each for each in self.receivers if each != source]

    def way(self, source: str, receiver: str, without: str | None = None) -> list[str]:
        """Return the nodes of the shortest way, none where there is no way."""
        came: dict[str, str | None] = {source: None}
        ahead = deque([source])
        while ahead:
            at = ahead.popleft()
            for each in self.next.get(at, []):
                if each not in came and each != without:
                    came[each] = at
                    ahead.append(each)
        way: list[str] = []
        step: str | None = receiver if receiver in came else None
        while step is not None:
            way.append(step)
            step = came[step]
        return way

    def load(self, node: str) -> Fraction:
        return sum((w for pair, w in self.shares.items() if node in self.ways[pair]), Fraction(0))

    def lost(self, node: str) -> tuple[Fraction, Fraction]:
        """Return what is not delivered without ``node``, and the part that is not its own."""
        lost = others = Fraction(0)
        for (a, b), share in self.shares.items():
            if a == node:
                lost += share
                continue
            # In a queue any receiver that is there may take it.
            ends = self.takers(a) if self.kind == "queue" else [b]
            if any(end != node and self.way(a, end, without=node) for end in ends):
                continue
            lost += share
            others += share if b != node or self.kind == "queue" else 0
        return lost, others


def random_topology(dice: random.Random) -> Topology:
    kind = dice.choice(KINDS)
    names = [f"m{index}" for index in range(dice.randint(2, 9))]
    sources = receivers = names
    if dice.random() < 0.6:
        sources = dice.sample(names, dice.randint(1, len(names)))
        receivers = dice.sample(names, dice.randint(1, len(names)))
    members = len({*sources, *receivers})
    hubs = dice.randint(1, members) if kind == "hub-and-spoke" else None
    return Topology.of(kind, sources=sources, receivers=receivers, hubs=hubs)


def random_topologies(count: int) -> list[Topology]:
    dice = random.Random(5)
    found: list[Topology] = []
    while len(found) < count:
        try:
            found.append(random_topology(dice))
        except ParameterError:  # one member, or a source that has nobody to send to
            continue
    return found


def test_formulas_agree_with_a_graph_that_is_walked() -> None:
    for topology in random_topologies(400):
        walked = Walked(topology)

        assert topology.links.one_way == len(walked.edges), topology
        assert topology.links.connections == len(set(map(frozenset, walked.edges))), topology
        hops = {pair: len(way) - 1 for pair, way in walked.ways.items()}
        assert topology.most_hops == max(hops.values()), topology
        mean = sum((share * hops[pair] for pair, share in walked.shares.items()), Fraction(0))
        assert topology.mean_hops == mean, topology
        for node in topology.nodes:
            assert node.load == walked.load(node.name), (topology, node)
            assert (node.lost, node.lost_by_others) == walked.lost(node.name), (topology, node)


@pytest.mark.parametrize("n", [2, 7, 50, 1000])
def test_what_is_usually_said_holds_but_for_the_shorthand(n: int) -> None:
    def of(kind: Kind) -> Topology:
        return Topology.of(kind, services=n, hubs=2 if kind == "hub-and-spoke" and n > 3 else None)

    assert of("full-mesh").links.one_way == n * n - n
    assert f"{n}² = {n * n} counts a link of each service to itself" in of("full-mesh").shorthand
    assert of("full-mesh").most_hops == 1
    assert of("hub-and-spoke").links.connections == n - 1
    assert of("hub-and-spoke").most_hops == {2: 1, 7: 3}.get(n, 3)
    for kind in ("one-hub", "queue"):
        assert of(kind_named(kind)).links.connections == n
        assert of(kind_named(kind)).most_hops == 2


def test_k_is_one_more_than_the_hubs_of_a_chain() -> None:
    for hubs in range(1, 20):
        assert Topology.of("hub-and-spoke", services=60, hubs=hubs).most_hops == hubs + 1


def test_a_receiver_of_a_queue_that_fails_takes_nothing_with_it() -> None:
    nodes = {node.name: node for node in Topology.of("queue", sources=3, receivers=2).nodes}

    assert nodes["receiver 1"].lost == 0
    assert nodes["source 1"].lost == Fraction(1, 3)
    assert nodes["queue"].lost_by_others == 1


def test_links_of_many_members_are_counted_without_listing_them() -> None:
    mesh = Topology.of("full-mesh", services=100_000)

    assert mesh.links.one_way == 9_999_900_000


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "full-mesh", "services": 1}, "at least 2 services"),
        ({"kind": "full-mesh", "services": 0}, "there are 1 to 100000 services; it is given 0"),
        ({"kind": "full-mesh", "sources": 2}, "sources need receivers"),
        ({"kind": "full-mesh"}, "services, or else sources and receivers"),
        ({"kind": "queue", "services": ["a", "a"]}, "'a' is named twice"),
        ({"kind": "queue", "services": ["a", "queue"]}, "no name"),
        ({"kind": "queue", "services": ["a", ""]}, "no name"),
        ({"kind": "queue", "services": 3, "hubs": 2}, "not in queue"),
        ({"kind": "hub-and-spoke", "services": 3, "hubs": 4}, "1 to 3 are hubs; it is given 4"),
        ({"kind": "queue", "sources": ["a", "b"], "receivers": ["a"]}, "nobody to send to"),
        ({"kind": "star", "services": 3}, "unknown topology 'star'"),
        ({"kind": "ful-mesh", "services": 3}, "did you mean 'full-mesh'?"),
    ],
)
def test_what_is_no_topology_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(words)):
        Topology.of(**given)


# Drawings.


def test_a_queue_is_drawn_in_a_terminal() -> None:
    queue = Topology.of("queue", sources=3, receivers=["billing", "mail"])

    assert queue.text() == (
        "source 1 ─┐          ┌─▶ billing\nsource 2 ─┼─▶ queue ─┴─▶ mail\nsource 3 ─┘"
    )


def test_a_hub_of_services_is_drawn_with_arrows_both_ways() -> None:
    assert Topology.of("one-hub", services=["a", "b", "c"]).text() == (
        "     ┌◀▶ a\nhub ─┼◀▶ b\n     └◀▶ c"
    )


def test_hubs_are_drawn_in_a_row() -> None:
    assert Topology.of("hub-and-spoke", services=["a", "b", "c", "d", "e"], hubs=2).text() == (
        "a ─┬─ c\n │ └─ d\n │\nb ─── e"
    )


def test_a_mesh_is_drawn_as_a_matrix() -> None:
    assert Topology.of("full-mesh", services=["a", "b", "c"]).text() == (
        "   a  b  c\na  ·  ▶  ▶\nb  ▶  ·  ▶\nc  ▶  ▶  ·"
    )


def test_what_is_too_much_to_draw_is_said() -> None:
    assert Topology.of("queue", services=17).text() == "(17 members; up to 16 are drawn)"
    assert Topology.of("full-mesh", services=16).text() == "(too wide for 80 columns)"


@pytest.mark.parametrize("kind", KINDS)
def test_an_svg_holds_every_node_and_every_link(kind: Kind, tmp_path: Path) -> None:
    hubs = 2 if kind == "hub-and-spoke" else None
    topology = Topology.of(kind, services=7, hubs=hubs)
    path = tmp_path / "topology.svg"

    topology.save(path)

    ids = [each.get("id") or "" for each in ElementTree.parse(path).iter()]
    assert sum(each.startswith("node-") for each in ids) == len(topology.nodes)
    assert sum(each.startswith("link-") for each in ids) == topology.links.connections
    text = "".join(ElementTree.parse(path).getroot().itertext())
    assert all(member in text for member in topology.members)


def test_a_name_is_written_as_it_is(tmp_path: Path) -> None:
    topology = Topology.of("queue", services=["pay $now", r"$\bad{$", "<b> & co"])

    topology.save(tmp_path / "topology.svg")

    text = "".join(ElementTree.parse(tmp_path / "topology.svg").getroot().itertext())
    assert all(name in text for name in topology.members)


def test_a_picture_of_too_many_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="up to 60 members; there are 61"):
        Topology.of("queue", services=61).save(tmp_path / "topology.png")
