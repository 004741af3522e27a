"""Run a Prometheus with the scrape example and the alerts of dashboards/, and ask it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from .dashboards import FOLDER
from .waiting import DEADLINE_S, until

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing (Debian: prometheus)"
)
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is missing (Debian: prometheus)"
)


def promtool(*arguments: str | Path, text: str | None = None) -> str:
    """Run promtool, which must find nothing amiss; return what it prints."""
    ended = subprocess.run(
        ["promtool", *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        check=False,
    )
    # Mere advice of its lint ends in success.
    assert (ended.returncode, ended.stderr) == (0, ""), f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout


class Prometheus:
    """Scrape one gateway twice a second, by the files of dashboards/, until the context ends.

    Args:
        folder: for its configuration and its data.
        target: host and port of the gateway's admin port.
        is_hasty: let alerts fire at once, instead of waiting whether their condition lasts.
    """

    def __init__(self, folder: Path, target: tuple[str, int], *, is_hasty: bool = False) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.target = f"{target[0]}:{target[1]}"
        rules = (FOLDER / "alerts.yml").read_text()
        config = (FOLDER / "prometheus.yml").read_text()
        assert config.count('"127.0.0.1:7003"') == 1
        config = re.sub(r"_interval: 15s", "_interval: 500ms", config)
        (folder / "prometheus.yml").write_text(config.replace("127.0.0.1:7003", self.target))
        if is_hasty:
            rules = re.sub(r"\bfor: \w+", "for: 0s", rules)
        (folder / "alerts.yml").write_text(rules)

    def __enter__(self) -> Prometheus:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._log = self._folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={self._folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
            )
        try:
            until(self._is_ready, timeout_s=2 * DEADLINE_S, what="Prometheus is ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()

    def get(self, path: str, **parameters: str) -> Any:
        """Ask its API; return the data of the answer.

        Raises:
            AssertionError: with the reason, when it does not accept the question.
        """
        query = f"?{urlencode(parameters)}" if parameters else ""
        try:
            with urllib.request.urlopen(
                f"{self._url}/api/v1/{path}{query}", timeout=DEADLINE_S
            ) as r:
                return json.load(r)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what an expression yields at this moment, an element per series."""
        data = self.get("query", query=expression)
        assert data["resultType"] == "vector", data
        result: list[dict[str, Any]] = data["result"]
        return result

    def value(self, expression: str) -> float | None:
        """Return the only value of an expression; None when there is none yet."""
        result = self.query(expression)
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules as it has loaded them."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def firing(self) -> set[str]:
        """Name the alerts that fire."""
        found = self.query('ALERTS{alertstate="firing"}')
        return {one["metric"]["alertname"] for one in found}

    def await_scrapes(self, count: int) -> None:
        """Wait until so many scrapes more have succeeded."""

        def scrapes() -> float:
            return self.value('sum(count_over_time(up{job="ws2api"}[1h]))') or 0

        goal = scrapes() + count
        until(lambda: scrapes() >= goal, what=f"{count} more scrapes")

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=DEADLINE_S):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False
