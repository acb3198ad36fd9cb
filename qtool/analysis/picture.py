"""Figures as PNG: the very drawings of the page, rendered by resvg, which needs no browser and no other library."""

from importlib.util import find_spec
from pathlib import Path

from qtool.errors import UnavailableError

ZOOM = 2.5
"""Pixels of a figure's unit: sharp on paper, and about 1,100 wide."""


def require_renderer() -> None:
    """Raises UnavailableError where the package that renders is missing."""
    if find_spec("resvg_py") is None:
        raise UnavailableError("--png needs the package resvg-py; pip install 'qtool[report]'")


def write_png(svg: str, path: Path) -> None:
    """Render a standalone SVG. Raises UnavailableError where it cannot be written, or the renderer is missing."""
    require_renderer()
    import resvg_py

    from qtool.artifact import writing_failed

    picture = resvg_py.svg_to_bytes(svg_string=svg, zoom=ZOOM, sans_serif_family="DejaVu Sans")
    try:
        path.write_bytes(bytes(picture))
    except OSError as error:
        raise writing_failed(path, error) from error
