"""The pictures of the manual are what the code draws."""

import re
import struct
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import pytest

from molva.queueing import Timeline, Topology

ROOT = Path(__file__).parent.parent.parent
IMAGES = ROOT / "docs" / "images"
SVGS = sorted(path.name for path in IMAGES.glob("*.svg"))

# Ids that matplotlib numbers by itself say nothing of what is drawn.
OWN = re.compile(r"^(busy|waiting|refused|arrivals|departures|gave|link|node|present|mean|wait)")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    script = ROOT / "scripts" / "generate_pictures.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, timeout=170)
    return folder


def test_there_is_a_picture_for_each_that_is_drawn(drawn: Path) -> None:
    shown = {path.name for path in IMAGES.iterdir()} - {"page.png"}

    assert {path.name for path in drawn.iterdir()} == shown


@pytest.mark.parametrize("name", SVGS)
def test_a_picture_shows_what_the_code_draws(name: str, drawn: Path) -> None:
    assert on_it(IMAGES / name) == on_it(drawn / name), "run scripts/generate_pictures.py"


def on_it(path: Path) -> tuple[list[str], Counter[str], int]:
    """Return its words, what is drawn by the names of the marks, and how many shapes there are."""
    tree = ElementTree.parse(path)
    words = [each.text or "" for each in tree.iter() if each.tag.endswith("}text")]
    ids = [each.get("id") or "" for each in tree.iter()]
    shapes = sum(each.tag.endswith(("}path", "}use")) for each in tree.iter())
    return words, Counter(each for each in ids if OWN.match(each)), shapes


def test_a_picture_of_dots_has_the_size_that_the_code_gives_it(drawn: Path) -> None:
    sizes = [
        struct.unpack(">II", (folder / "waves.png").read_bytes()[16:24])
        for folder in (IMAGES, drawn)
    ]

    assert sizes[0] == sizes[1]


def test_drawings_in_the_manual_are_what_is_printed() -> None:
    text = (ROOT / "docs" / "queueing-pictures.md").read_text()
    blocks = re.findall(r"^```text\n(.*?)\n^```$", text, re.MULTILINE | re.DOTALL)

    adder = Timeline.of("2*D(1ms)/D(0.5ms)/1/1", duration=Fraction("0.004"))
    queue = Topology.of("queue", sources=3, receivers=["billing", "mail"])

    assert blocks == [adder.text(80), queue.text(80)]


def test_every_picture_is_in_the_manual() -> None:
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    text += (ROOT / "README.md").read_text()

    for path in IMAGES.iterdir():
        assert f"images/{path.name})" in text, path.name
