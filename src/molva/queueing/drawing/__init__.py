"""Pictures: what was computed, as text in a terminal, as PNG and as SVG. One file a picture.

Nothing is computed here. matplotlib is loaded when a PNG or SVG is written, and by nobody
else; the extra ``plot`` installs it.
"""
