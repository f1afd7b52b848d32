"""Running other commands as children: what ``up``, ``serve`` and ``work`` share."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from molva.cli import exits
from molva.cli.running import PARENT_PIPE, READY_PIPE

if TYPE_CHECKING:
    from molva.ratings.deployment import Deployment
    from molva.ratings.supervisor import Child

__all__ = ["serving_children", "supervise", "worker_children"]


@contextlib.contextmanager
def serving_children(number: int, *, host: str, port: int) -> "Iterator[list[Child]]":
    """Yield so many HTTP processes to run behind one address, held for the block.

    Raises:
        AddressInUseError: Another program listens there.
    """
    from molva.ratings.supervisor import Child

    address = {"MOLVA_HOST": host, "MOLVA_PORT": str(port), "MOLVA_PROCESSES": "1"}
    if number == 1:
        yield [Child("serve", ["serve"], environment=address)]
        return
    from molva.ratings.server import hold_port
    from molva.ratings.siblings import PORT_HELD, PROCESS, PROCESS_FOLDER

    with (
        hold_port(host, port),
        # Not below --data: the path of a Unix socket may have no more than 107 bytes.
        tempfile.TemporaryDirectory(prefix="molva-") as folder,
    ):
        shared = {**address, PORT_HELD: "1", PROCESS_FOLDER: folder}
        yield [
            Child(f"serve {at}", ["serve"], environment={**shared, PROCESS: str(at)})
            for at in range(1, number + 1)
        ]


def worker_children(number: int) -> "list[Child]":
    """Return so many workers to run."""
    from molva.ratings.supervisor import Child

    return [Child(f"work {at}", ["work"]) for at in range(1, number + 1)]


def supervise(
    children: "Sequence[Child]",
    deployment: "Deployment",
    *,
    data: Path,
    environment: Mapping[str, str],
    inherit: Sequence[int] = (),
    on_ready: Callable[[], None] | None = None,
) -> int:
    """Keep children running on a deployment until a signal; return the exit code.

    ``on_ready``: called once a child that serves HTTP answers. Workers say for themselves
    that they have begun.
    """
    from molva.ratings.supervisor import Supervisor

    # The writing end stays open for as long as we live; the children watch the other.
    parent_reader, _parent_writer = os.pipe()
    ready_reader, ready_writer = os.pipe()
    serving = [child for child in children if child.arguments[0] == "serve"]
    for child in serving:
        child.inherit = (ready_writer,)
        child.environment = {**child.environment, READY_PIPE: str(ready_writer)}
    supervisor = Supervisor(
        children,
        inherit=(*inherit, parent_reader),
        # Not as arguments: a URL may hold a password, and arguments are public.
        environment={
            PARENT_PIPE: str(parent_reader),
            "MOLVA_DATA": str(data.absolute()),
            "MOLVA_BROKER": deployment.broker,
            "MOLVA_LEDGER": deployment.ledger,
            "MOLVA_CATALOG": deployment.catalog,
            **({} if deployment.capacity is None else {"MOLVA_CAPACITY": str(deployment.capacity)}),
            **_spool_environment(deployment),
            "MOLVA_WORKERS": "1",
            **environment,
        },
        fatal=frozenset({exits.USAGE, exits.IN_USE, exits.INCOMPATIBLE, exits.UNMET_PROMISE}),
    )
    return supervisor.run(
        ready=ready_reader if serving else None, on_ready=on_ready or (lambda: None)
    )


def _spool_environment(deployment: "Deployment") -> dict[str, str]:
    spool = deployment.spool
    if spool is None:
        return {"MOLVA_WHEN_BROKER_DOWN": "refuse"}
    return {
        "MOLVA_WHEN_BROKER_DOWN": "spool",
        "MOLVA_SPOOL_LIMIT": str(spool.limit),
        "MOLVA_SPOOL_HOURS": repr(spool.hours),
    }
