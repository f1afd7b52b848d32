"""Files of pictures: the ending of the name says the format."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from molva.queueing.errors import MissingLibraryError, ParameterError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ENDINGS", "new_figure", "save"]

# What can be written. Adding one here? Also docs/queueing-pictures.md.
ENDINGS: Final = (".png", ".svg", ".txt")

# Dots per inch of a PNG: sharp on a dense screen, some 100 kB a picture.
_DPI: Final = 150

# An SVG keeps its text as text, to be searched and read aloud, and is the same on each run: its
# ids are hashed with this salt, and no date is written.
_SVG: Final = {"svg.fonttype": "none", "svg.hashsalt": "molva"}

_STYLE: Final = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "hatch.linewidth": 0.6,
    # A $ in a name is a $, and begins no formula.
    "text.parse_math": False,
}


def save(path: str | Path, *, text: Callable[[], str], figure: "Callable[[], Figure]") -> None:
    """Write the picture to ``path``, as text or from a figure.

    Raises:
        ParameterError: The ending is not one of ``ENDINGS``, or the file cannot be written.
        MissingLibraryError: PNG and SVG need matplotlib.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ParameterError(
            f"a picture is written to a file that ends in {', '.join(ENDINGS)}, not to {path}"
        )
    try:
        if ending == ".txt":
            path.write_text(text() + "\n", encoding="utf-8")
            return
        _write(path, ending, figure)
    except OSError as error:
        raise ParameterError(f"{path} cannot be written: {error.strerror or error}") from error


def _write(path: Path, ending: str, figure: "Callable[[], Figure]") -> None:
    matplotlib = _matplotlib()
    with matplotlib.rc_context({**_STYLE, **_SVG}):
        made = figure()
        if ending == ".svg":
            made.savefig(path, format="svg", metadata={"Date": None})
        else:
            made.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of so many inches, which belongs to no window and no registry."""
    _matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


if TYPE_CHECKING:
    import types

    def _matplotlib() -> "types.ModuleType": ...
else:

    def _matplotlib():
        """Return matplotlib, which only pictures need."""
        try:
            import matplotlib
        except ModuleNotFoundError as error:
            raise MissingLibraryError("matplotlib", extra="plot") from error
        return matplotlib
