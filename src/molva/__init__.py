"""Molva: ratings you can trust, carried by any message broker, counted exactly once.

Importing this package is cheap and opens nothing. What it holds:

    molva.messaging   one ``Topic`` and ``Subscription`` for every broker, opened by URL
    molva.ratings     a self-hosted rating service on top of it
    molva.cli         the ``molva`` command
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
