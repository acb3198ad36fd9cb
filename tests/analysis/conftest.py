"""Studies that nobody measured."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("bodies", Path(__file__).with_name("bodies.py"))
assert _spec is not None and _spec.loader is not None
_bodies = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_bodies)


@pytest.fixture
def study_body() -> Any:
    """Makes the JSON of a study; arguments as `bodies.body`."""
    return _bodies.body
