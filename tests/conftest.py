"""What every test stands on: no network, two threads, real models and data where the machine has them."""

import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRATCH_HOME = tempfile.mkdtemp(prefix="qtool-tests-hf-")

# Read by huggingface_hub, datasets and OpenMP when they are imported, here and in the processes that tests start.
os.environ.update(
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HOME=SCRATCH_HOME,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="2",
    PIP_NO_INDEX="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_OFFLINE="1",
)

# Two busy cores make single examples slow now and then: that is no finding. In CI the examples are the same every time.
hypothesis.settings.register_profile(
    "qtool",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("qtool")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    left_out = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=left_out)


def pytest_unconfigure() -> None:
    shutil.rmtree(SCRATCH_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def test_models() -> Callable[[str], Path]:
    """The folder of a real model by name, such as `minilm-sst2`; the test is skipped where it was not assembled."""
    folder = Path(os.environ.get("QTOOL_TEST_MODELS") or Path.home() / ".cache" / "qtool-test-models").resolve()

    def find(name: str) -> Path:
        model = folder / name
        if not (model / "config.json").is_file():
            pytest.skip(f"no {name} in {folder}: python ../shared/models/assemble.py {name}")
        return model

    return find


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """The folder of a real data set by name, such as `sst2`; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"

    def find(name: str) -> Path:
        data = folder / name
        if not data.exists():
            pytest.skip(f"no {name} in {folder}")
        return data

    return find


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """A test that sets torch's thread count does not set it for the next one."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(2)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Fail a test that looks up or connects to anything but this machine, even where the code swallows errors."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _refuse_remote(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _refuse_remote(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_remote((host,))
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


def _refuse_remote(address: Any) -> None:
    # Anything but a tuple is the path of a Unix socket.
    if isinstance(address, tuple) and not _is_local(address[0]):
        pytest.fail(f"this test tried to reach {address[0]}; tests use no network")


def _is_local(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host or "localhost"
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
