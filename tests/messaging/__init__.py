"""Tests of molva.messaging. What all drivers share is in ``conformance``."""

import pytest

# These hold assertions, and pytest explains only those of files that it collects.
pytest.register_assert_rewrite("tests.messaging.channels", "tests.messaging.servers")
