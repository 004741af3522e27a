"""Do what the Dockerfile does, without Docker, and run what comes out as it would.

What pip would fetch is not fetched again: the packages of the tests' virtualenv serve instead.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.api import FakeApi
from harness.gateway import COMMAND, GatewayProcess
from harness.processes import find_children
from harness.waiting import until

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "scripts" / "services" / "Dockerfile").read_text()
PACKAGES = ("gateway", "supervisor")

# A child that is left behind, and tells that process 1 is its parent by now.
ORPHAN = """
import os, sys, time
if os.fork() == 0:
    while os.getppid() != 1:
        time.sleep(0.01)
    open(sys.argv[1], "w").close()
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program to its end, which must be a good one; return all that it printed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={name: v for name, v in os.environ.items() if not name.startswith("WS2API_")},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def enter_namespace() -> list[str]:
    """Return a prefix that makes a program process 1 of a namespace; skip where none is allowed."""
    prefix = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if os.geteuid() != 0:
        prefix += ["--user", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("this system lets no process be the first of a pid namespace")
    return prefix


class ContainedGateway(GatewayProcess):
    """Run an installed gateway as process 1 of a pid namespace, as a container does."""

    def __init__(self, supervisor: Path, **options: str | int) -> None:
        self._prefix = [*enter_namespace(), str(supervisor)]
        super().__init__(**options)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        return super()._spawn(self._prefix + command[len(COMMAND) :])

    @property
    def pid(self) -> int:
        """The supervisor's, as it is seen from here."""
        return find_children(self._process.pid)[0].pid

    def terminate(self) -> None:
        """Send the Dockerfile's signal to process 1, as `docker stop` does."""
        (name,) = re.findall(r"^STOPSIGNAL (\w+)$", DOCKERFILE, re.MULTILINE)
        run("kill", "-s", name.removeprefix("SIG"), str(self.pid), cwd=Path("/"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from what .dockerignore lets in."""
    folder = tmp_path_factory.mktemp("image")
    rules = (ROOT / ".dockerignore").read_text()
    for name in re.findall(r"^!(.+)$", rules, re.MULTILINE):
        source, copy = ROOT / name, folder / "source" / name
        copy.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder / "wheels", ".", cwd=folder / "source")
    (built,) = (folder / "wheels").iterdir()
    return built


@pytest.fixture(scope="module")
def venv(wheel: Path) -> Iterator[Path]:
    """Install the wheel, and nothing else, into a virtualenv without a pip."""
    venv = wheel.parents[1] / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    pip = (sys.executable, "-m", "pip", "-q", "--python", venv / "bin" / "python")
    run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=venv.parent)
    (packages,) = venv.glob("lib/python*/site-packages")
    # A folder that a .pth file names has its own .pth files ignored, so that the checkout, which is
    # installed through one, is not to be seen.
    (others,) = Path(sys.prefix).glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{others}\n")
    yield venv
    shutil.rmtree(venv)


@pytest.fixture(scope="module")
def gateway(venv: Path) -> Iterator[GatewayProcess]:
    """Run what was installed, as process 1."""
    supervisor = venv / "bin" / "ws2api-supervisor"
    with FakeApi() as api, ContainedGateway(supervisor, api=api.url) as gateway:
        yield gateway


def test_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    files = {
        f"ws2api/{file.relative_to(ROOT)}"
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("ws2api/")} == files


def test_runs_outside_of_the_checkout(venv: Path, tmp_path: Path, shared_api: FakeApi) -> None:
    where = "import ws2api.supervisor as s; print(s.__file__)"
    assert run(venv / "bin" / "python", "-c", where, cwd=tmp_path).startswith(str(venv))
    ports = [f"--{name}=127.0.0.1:0" for name in ("listen", "push-listen", "admin-listen")]
    ports.append(f"--api={shared_api.url}")
    assert run(venv / "bin" / "ws2api-supervisor", "--check", *ports, cwd=tmp_path)[:3] == "ok:"


def test_serves_as_process_1(gateway: GatewayProcess, client_id: str) -> None:
    client = gateway.connect(client_id)
    assert gateway.push_client().push(client_id, "hello").status == 200
    assert client.receive() == "hello"


def test_process_1_reaps_strangers(gateway: GatewayProcess, tmp_path: Path) -> None:
    adopted = tmp_path / "adopted"
    enter = ("nsenter", "--target", str(gateway.pid), "--pid", "--")
    run(*enter, sys.executable, "-c", ORPHAN, adopted, cwd=tmp_path)
    until(adopted.exists, what="process 1 has inherited the orphan")
    children = Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children")
    until(lambda: len(children.read_text().split()) == len(gateway.children), what="no zombie")


def test_health_check_tells_whether_it_runs(gateway: GatewayProcess, venv: Path) -> None:
    (text,) = re.findall(r"^HEALTHCHECK(?:.*\\\n)*? +CMD (.*)$", DOCKERFILE, re.MULTILINE)
    command = json.loads(text)
    assert command[0] == "python"
    command[0] = str(venv / "bin" / "python")
    host, port = gateway.admin_address
    here = [part.replace("'127.0.0.1', 7003", f"'{host}', {port}") for part in command]
    assert here != command
    run(*here, cwd=Path("/"))
    with pytest.raises(AssertionError, match="refused"):
        run(*(part.replace(str(port), "1") for part in here), cwd=Path("/"))


def test_does_the_steps_of_the_dockerfile() -> None:
    steps = re.findall(r"^RUN ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
    words = [shlex.split(step.replace("\\\n", "")) for step in steps]
    assert words == [
        [
            *("pip", "wheel", "--no-cache-dir", "--no-deps", "--wheel-dir", "/wheels", "."),
            *("&&", "python", "-m", "venv", "--without-pip", "/opt/ws2api"),
            *("&&", "pip", "--python", "/opt/ws2api/bin/python", "install"),
            *("--no-cache-dir", "/wheels/*.whl"),
        ]
    ], "the fixtures above do other things by now"
