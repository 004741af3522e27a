"""Play the workers' part in Redis, and look at what scripts and reapers make of it."""

from __future__ import annotations

from typing import Any, Final, cast

from redis import Redis
from ws2api.gateway.disconnects import DROPPED, LEASES, PARK, RENEW, STREAM, TAKE_OVER, WORKER_LOST
from ws2api.gateway.redis_link import Script

BOUND: Final = 1_000_000
LEASE_MS: Final = 60_000
BORN: Final = 1_700_000_000_000_000
"""A generation: µs since 1970."""

End = tuple[str, int, int, str]
"""Client id, generation, close code, reason."""


class Store:
    """Enter into Redis what workers enter, and call the scripts.

    Args:
        redis: an empty server.
        prefix: of every key.
    """

    def __init__(self, redis: Redis, prefix: str = "ws2api:") -> None:
        self.redis = redis
        self.prefix = prefix

    def key(self, *parts: object) -> str:
        """Name a key, as in `key("w:", worker)`."""
        return self.prefix + "".join(map(str, parts))

    def call(self, script: Script, *arguments: object) -> Any:
        """Run a script."""
        return self.redis.eval(script.source, 1, self.prefix, *cast(tuple[str, ...], arguments))

    def renew(self, worker: str, lease_ms: int = LEASE_MS, epoch: int = 1) -> bool:
        """Renew a lease; tell whether clients of the worker were given up for lost."""
        return bool(self.call(RENEW, worker, epoch, lease_ms)[0])

    def expire(self, worker: str) -> None:
        """Let a lease run out."""
        self.redis.zadd(self.key(LEASES), {worker: 1})

    def open(self, worker: str, client_id: str, generation: int = BORN) -> None:
        """Enter a connection that is open."""
        self.redis.set(self.key("c:", client_id), f"{worker} {generation}")
        self.redis.hset(self.key("w:", worker), client_id, str(generation))

    def ask(self, worker: str, client_id: str, generation: int = BORN) -> None:
        """Enter a connect that the API is being asked about."""
        self.redis.set(self.key("p:", client_id), f"{worker} {generation}")
        self.redis.sadd(self.key("a:", worker), f"{client_id} {generation}")

    def end(self, worker: str, end: End) -> None:
        """Enter a connection that has ended."""
        client_id, generation, code, reason = end
        self.redis.hset(self.key("e:", worker), f"{client_id} {generation}", f"{code} {reason}")

    def park(self, worker: str, end: End, bound: int = BOUND, epoch: int = 1) -> None:
        """Leave an end to the reapers."""
        self.call(PARK, worker, epoch, *end, bound)

    def take_over(
        self, worker: str, *, known: bool = False, bound: int = BOUND, hold_ms: int = 0
    ) -> list[int] | None:
        """Take one batch over; return moved, reconnected, and whether there is more, or None."""
        reply = self.call(TAKE_OVER, worker, bound, int(known), hold_ms)
        return cast("list[int] | None", reply)

    def take_over_all(self, worker: str, *, known: bool = False) -> tuple[int, int]:
        """Take everything over; return moved and reconnected."""
        moved = reconnected = 0
        while (batch := self.take_over(worker, known=known)) is not None:
            moved += batch[0]
            reconnected += batch[1]
            if not batch[2]:
                break
        return moved, reconnected

    @property
    def owed(self) -> list[End]:
        """What stands in the stream, in its order."""
        entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", self.redis.xrange(self.stream))
        return [
            (f[b"id"].decode(), int(f[b"generation"]), int(f[b"code"]), f[b"reason"].decode())
            for _, f in entries
        ]

    def given_up(self, worker: str) -> set[tuple[str, int]]:
        """What a worker has to close; client ids and generations."""
        entries = cast("set[bytes]", self.redis.smembers(self.key("x:", worker)))
        pairs = (entry.decode().split(" ") for entry in entries)
        return {(client_id, int(generation)) for client_id, generation in pairs}

    @property
    def stream(self) -> str:
        """The key of the stream."""
        return self.key(STREAM)

    @property
    def dropped(self) -> int:
        """How many entries fell off the stream."""
        return int(cast("bytes | None", self.redis.get(self.key(DROPPED))) or 0)

    def keys_of(self, worker: str) -> set[str]:
        """What Redis still holds of a worker."""
        found = {self.key(kind, worker) for kind in ("a:", "w:", "e:", "x:")}
        kept = {key for key in found if self.redis.exists(key)}
        return kept | {LEASES} if self.redis.zscore(self.key(LEASES), worker) else kept


def lost(client_id: str, generation: int = BORN) -> End:
    """Return the end of a connection whose worker died."""
    return client_id, generation, 1006, WORKER_LOST
