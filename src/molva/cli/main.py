"""``molva``: the group of all commands. A command's module is loaded when it is called."""

import importlib
from typing import Final

import click

from molva import __version__

__all__ = ["main"]

# Command to (module, attribute, one line of help). Loading all of them to print --help
# would take longer than most commands run.
_COMMANDS: Final = {
    "up": ("molva.cli.up", "up", "Run the whole service: HTTP, workers, page."),
    "serve": ("molva.cli.serve", "serve", "Run HTTP processes."),
    "work": ("molva.cli.work", "work", "Run workers."),
    "pub": ("molva.cli.messages", "pub", "Send each line of stdin as a message."),
    "sub": ("molva.cli.messages", "sub", "Print each message of a topic as a line."),
    "import": ("molva.cli.imports", "import_", "Send the rows of a CSV file as ratings."),
    "total": ("molva.cli.ledger", "total", "Print a moving average."),
    "verify": ("molva.cli.ledger", "verify", "Recompute every number and compare."),
    "migrate": ("molva.cli.migrate", "migrate", "Make ledger and catalog, or update them."),
    "rebuild": ("molva.cli.ledger", "rebuild", "Recompute the ledger's derived tables."),
    "campaign": ("molva.cli.campaign", "campaign", "List, add and change campaigns."),
    "dead": ("molva.cli.dead", "dead", "Show ratings that could not be counted."),
    "queue": ("molva.cli.queue", "queue", "Look into a queue, empty it, replay dead letters."),
    "model": ("molva.cli.model", "model", "Compute how a station A/B/n/q behaves."),
    "simulate": ("molva.cli.simulate", "simulate", "Play how a station A/B/n/q behaves."),
    "timeline": ("molva.cli.timeline", "timeline", "Draw who arrives, waits, is served, leaves."),
    "topology": ("molva.cli.topology", "topology", "Count links, hops and what a failure takes."),
    "doctor": ("molva.cli.doctor", "doctor", "Say what is reachable and what is missing."),
}

# Commands whose options are variables with the command in the name. A MOLVA_WINDOW in the
# environment of `molva total` must not change a campaign, nor a MOLVA_KEY every message.
_PREFIXED: Final = frozenset({"put", "pub", "sub", "purge", "replay"})


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        _name_variables(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, _, help_) in _COMMANDS.items()])


def _name_variables(command: click.Command) -> None:
    """Let every option be given as a variable too: --rate-column as MOLVA_RATE_COLUMN.

    Options that several commands share have named theirs already.
    """
    prefix = f"MOLVA_{command.name}_" if command.name in _PREFIXED else "MOLVA_"
    for option in command.params:
        if isinstance(option, click.Option) and option.envvar is None:
            option.envvar = f"{prefix}{option.name}".upper()
            option.show_envvar = True
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _name_variables(inner)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="molva")
def main() -> None:
    """Ratings you can trust, through any message broker, counted exactly once."""
