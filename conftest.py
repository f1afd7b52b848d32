"""Lets tests that measure time run by themselves: scripts/run-tests does."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--timed``."""
    parser.addoption(
        "--timed",
        choices=("with", "without", "only"),
        default="with",
        help="what becomes of the tests that measure time",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for."""
    if config.option.timed == "with":
        return
    only = config.option.timed == "only"
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        (chosen if (item.get_closest_marker("timed") is not None) == only else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen
