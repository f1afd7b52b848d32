"""``python -m molva`` is the ``molva`` command."""

from molva.cli.main import main

if __name__ == "__main__":
    main()
