"""The pytest plugin: what the suite of all drivers needs of pytest.

Imported by pytest wherever Molva is installed, so it imports nothing of Molva until it is used.
"""

import pytest

__all__: list[str] = []

# The suite's asserts show what they compared, as those of a test file do.
pytest.register_assert_rewrite("molva.messaging.conformance")
