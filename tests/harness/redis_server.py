"""Look into the Valkey server of a test, and freeze it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from .valkey import ValkeyProcess
from .waiting import until


class RedisServer:
    """Be a server with a connection of the test's own, which gives text.

    Args:
        process: runs.
        prefix: of every key.
    """

    def __init__(self, process: ValkeyProcess, prefix: str) -> None:
        self.url = process.url
        self.redis = Redis.from_url(self.url, decode_responses=True)
        until(self._answers, what="Valkey answers")
        self._prefix = prefix
        self._pid: int = self.redis.info("server")["process_id"]

    def _answers(self) -> bool:
        with contextlib.suppress(RedisError):
            return bool(self.redis.ping())
        return False

    def freeze(self) -> None:
        """Stop the process: its sockets stay open, nothing is answered."""
        os.kill(self._pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the process go on."""
        os.kill(self._pid, signal.SIGCONT)

    def calls(self, command: str) -> int:
        """Count how often a command was called since CONFIG RESETSTAT."""
        statistics = self.redis.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})
        return int(statistics["calls"])

    # The keys of the gateway.

    @property
    def keys(self) -> set[str]:
        """Which keys there are, without their prefix."""
        return {key.removeprefix(self._prefix) for key in self.redis.keys("*")}

    def open(self, worker: str) -> dict[str, str]:
        """Return the ids that are open in a worker, with their generations."""
        return dict(self.redis.hgetall(f"{self._prefix}w:{worker}"))

    def asking(self, worker: str) -> set[str]:
        """Return the connects that a worker asks about, as `<id> <generation>`."""
        return set(self.redis.smembers(f"{self._prefix}a:{worker}"))

    def owed(self, worker: str) -> dict[str, str]:
        """Return the ends that a worker has yet to tell: `<id> <generation>` → code, reason."""
        return dict(self.redis.hgetall(f"{self._prefix}e:{worker}"))

    def given_up(self, worker: str) -> dict[str, str]:
        """Return the connections that a worker has to close: id → generation."""
        return dict(self.redis.hgetall(f"{self._prefix}x:{worker}"))

    @property
    def stream(self) -> list[dict[str, str]]:
        """The ends that are left to the reapers, oldest first."""
        return [fields for _, fields in self.redis.xrange(f"{self._prefix}disconnects")]

    @property
    def leases(self) -> dict[str, float]:
        """Until when each worker counts as alive, in ms of the server's clock."""
        return dict(self.redis.zrange(f"{self._prefix}leases", 0, -1, withscores=True))

    @property
    def now_ms(self) -> float:
        """The server's clock."""
        seconds, microseconds = self.redis.time()
        return seconds * 1000 + microseconds / 1000


@contextlib.contextmanager
def redis_server(folder: Path, prefix: str) -> Iterator[RedisServer]:
    """Run a server; the folder's path must be short."""
    with ValkeyProcess(folder) as process:
        server = RedisServer(process, prefix)
        try:
            yield server
        finally:
            server.redis.close()
