"""``molva topology``: how members are joined, what it costs, and what a failure takes."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from molva.cli.exits import USAGE, fail
from molva.cli.options import json_option, plot_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from molva.queueing.topology import Topology

__all__ = ["topology"]


@click.command()
@click.argument("kind", metavar="[KIND]", default="all")
@click.option("--services", metavar="MEMBERS", help="Members that send and receive: 5, or a,b,c.")
@click.option("--sources", metavar="MEMBERS", help="Members that send.")
@click.option("--receivers", metavar="MEMBERS", help="Members that receive.")
@click.option("--hubs", type=int, metavar="N", help="Members that are hubs.  [default: 1]")
@plot_option
@json_option
def topology(
    kind: str,
    services: str | None,
    sources: str | None,
    receivers: str | None,
    hubs: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Count links and hops of KIND: full-mesh, hub-and-spoke, one-hub or queue.

    Without KIND all four are compared. MEMBERS are a number, or names with commas between.
    """
    from molva.queueing import ModelError
    from molva.queueing.drawing import topology_text

    try:
        found = _topologies(kind, services, sources, receivers, hubs)
        if plot is not None:
            _save(found, plot)
    except ModelError as error:
        fail(USAGE, str(error))
    if as_json:
        documents = [_document(each) for each in found]
        click.echo(json.dumps(documents[0] if kind != "all" else documents, ensure_ascii=False))
    elif kind == "all":
        click.echo(topology_text.compared(found))
    else:
        columns = shutil.get_terminal_size((80, 24)).columns
        click.echo(topology_text.described(found[0], columns))


def _topologies(
    kind: str, services: str | None, sources: str | None, receivers: str | None, hubs: int | None
) -> "list[Topology]":
    from molva.queueing.topology import KINDS, Topology, kind_named

    kinds = KINDS if kind == "all" else (kind_named(kind),)
    return [
        Topology.of(
            each,
            services=_members(services),
            sources=_members(sources),
            receivers=_members(receivers),
            hubs=hubs if each == "hub-and-spoke" or kind != "all" else None,
        )
        for each in kinds
    ]


def _members(given: str | None) -> "int | list[str] | None":
    """Return a number, or names."""
    if given is None:
        return None
    try:
        return int(given)
    except ValueError:
        return [name.strip() for name in given.split(",")]


def _save(found: "Sequence[Topology]", path: Path) -> None:
    from molva.queueing.drawing import files, topology_figure, topology_text

    files.save(
        path,
        text=lambda: "\n\n".join(topology_text.described(each) for each in found),
        figure=lambda: topology_figure.drawn(found),
    )


def _document(found: "Topology") -> dict[str, object]:
    """Return what --json prints. A new key here? Also docs/queueing.md, which a test compares."""
    links = found.links
    return {
        "kind": found.kind,
        "sources": len(found.sources),
        "receivers": len(found.receivers),
        "hubs": found.hubs,
        "links": links.connections,
        "one_way_links": links.one_way,
        "mean_hops": float(found.mean_hops),
        "most_hops": found.most_hops,
        "shorthand": found.shorthand,
        "nodes": [
            {
                "name": node.name,
                "role": node.role,
                "is_hub": node.is_hub,
                "load_share": float(node.load),
                "lost_share": float(node.lost),
                "lost_by_others_share": float(node.lost_by_others),
            }
            for node in found.nodes
        ],
    }
