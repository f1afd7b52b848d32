"""Tests of molva.messaging. What all drivers share is in ``conformance``."""

import pytest

pytest.register_assert_rewrite("tests.messaging.conformance")
