"""Tests of molva.messaging. What all drivers share is in ``conformance``."""
