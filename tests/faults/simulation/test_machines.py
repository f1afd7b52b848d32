"""Random operations on real queues and topics, each beside a plain model."""

import pytest

from tests.faults.simulation.machines import LeaseMachine, PathMachine, check

# The same examples each time; a memory's are cheap.
_EXAMPLES = {"memory": 30, "sqlite": 8}


@pytest.mark.parametrize("scheme", ["memory", "sqlite"])
@pytest.mark.parametrize("machine", [LeaseMachine, PathMachine])
def test_whatever_happens_the_model_agrees(
    machine: type[LeaseMachine] | type[PathMachine], scheme: str
) -> None:
    check(machine, scheme, seed=0, examples=_EXAMPLES[scheme])
