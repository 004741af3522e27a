"""Share one gateway and one API among the tests that can; start others on demand."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness.api import FakeApi
from harness.gateway import GatewayProcess
from harness.valkey import ValkeyProcess

StartGateway = Callable[..., GatewayProcess]

_numbers = itertools.count()


@pytest.fixture(scope="session")
def shared_api() -> Iterator[FakeApi]:
    """Serve every test that keeps the API running; the client ids keep the tests apart."""
    with FakeApi() as api:
        yield api


@pytest.fixture(scope="session")
def shared_gateway(shared_api: FakeApi) -> Iterator[GatewayProcess]:
    """Run one worker, so that a disturbance by one client would show at any other."""
    with GatewayProcess(api=shared_api.url, api_timeout="10s") as gateway:
        yield gateway


@pytest.fixture
def api(shared_api: FakeApi) -> Iterator[FakeApi]:
    """Use the shared API, and find it asked in proper HTTP only."""
    yield shared_api
    assert not shared_api.violations


@pytest.fixture
def own_api() -> Iterator[FakeApi]:
    """Use an API that the test may take away."""
    with FakeApi() as api:
        yield api
    assert not api.violations


@pytest.fixture
def gateway(shared_gateway: GatewayProcess) -> Iterator[GatewayProcess]:
    """Use the shared gateway, and leave it alive and without a complaint in its log."""
    yield shared_gateway
    shared_gateway.disconnect_all()
    assert shared_gateway.is_running
    assert not shared_gateway.complaints


@pytest.fixture
def start_gateway() -> Iterator[StartGateway]:
    """Start gateways with options of the test's own; each is stopped and must end cleanly."""
    with ExitStack() as running:
        yield lambda **options: running.enter_context(GatewayProcess(**options))


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[ValkeyProcess]:
    """Run a Valkey server that the test may take away."""
    with ValkeyProcess(tmp_path) as server:
        yield server


@pytest.fixture
def client_id(request: pytest.FixtureRequest) -> str:
    """Name a client that no other test uses."""
    name = re.sub(r"[^\w.~-]+", "-", request.node.name.removeprefix("test_"), flags=re.ASCII)
    return f"{name[:200]}-{next(_numbers)}"
