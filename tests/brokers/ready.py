"""``python -m tests.brokers.ready``: get what servers are run by, where MOLVA_INSTALL=1 allows it.

What cannot be had is said and is no error: the tests that need it skip, or fail, by themselves.
"""

import sys

from tests.brokers.errors import BrokersError
from tests.brokers.server import ensure_local
from tests.brokers.table import KINDS

__all__: list[str] = []


def _main() -> None:
    for kind in KINDS.values():
        try:
            ensure_local(kind)
        except BrokersError as missing:
            print(missing, file=sys.stderr)


if __name__ == "__main__":
    _main()
