"""Try what workers and the reaper do in Redis, and say in the user's words what is in the way.

All of it happens under keys and a channel that begin with the prefix and that nobody else uses;
they are removed in the end, and expire should this process die in between.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import urlsplit

from redis import Redis, exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from .errors import StartError
from .eviction import doubt_of, harm_of, policy_of

_TIMEOUT_S: Final = 3.0

# What is tried, one call a line; {} stands for the beginning of every key. A test holds this
# against what the scripts and the clients call.
_CALLS: Final = """
SET {}s 1 EX 60
GET {}s
MGET {}s {}none
INCRBY {}n 1
EXPIRE {}n 60
EXISTS {}s
DEL {}none
SADD {}set a b
EXPIRE {}set 60
SRANDMEMBER {}set 1
SSCAN {}set 0
SREM {}set a
HSET {}hash a 1
EXPIRE {}hash 60
HGET {}hash a
HSCAN {}hash 0
HRANDFIELD {}hash 1 WITHVALUES
HDEL {}hash a
ZADD {}zset 1 a
EXPIRE {}zset 60
ZSCORE {}zset a
ZRANGE {}zset 0 -1 WITHSCORES
ZRANGEBYSCORE {}zset 0 +inf
ZREM {}zset a
XGROUP CREATE {}stream g 0 MKSTREAM
EXPIRE {}stream 60
XADD {}stream 1-1 a 1
XLEN {}stream
XRANGE {}stream - +
XREADGROUP GROUP g c COUNT 1 STREAMS {}stream >
XPENDING {}stream g - + 1
XCLAIM {}stream g c 0 1-1
XAUTOCLAIM {}stream g c 0 0-0
XINFO CONSUMERS {}stream g
XACK {}stream g 1-1
XDEL {}stream 1-1
XTRIM {}stream MAXLEN 1
XGROUP DELCONSUMER {}stream g c
PUBLISH {}channel 1
TIME
""".strip()

_IS_CLUSTER: Final = "it is a Redis Cluster: one Redis is needed, which may have replicas"

# Parts of what Redis answers, and what they mean to whoever has to mend it.
_MEANINGS: Final = (
    (
        ("authentication required", "noauth"),
        "it demands a password: give it in the URL, redis://:PASSWORD@HOST:PORT "
        "(redis://USER:PASSWORD@… with a user of its own)",
    ),
    (
        ("without any password configured", "no password is set"),
        "it has no password, but the URL gives one: leave it out, or set one there",
    ),
    (
        ("invalid username-password", "invalid password", "wrongpass"),
        "it refuses the password, or there is no such user: see the URL",
    ),
    (
        ("readonly", "link with master is down"),
        "it is a replica, which takes no writes: name the primary",
    ),
    (
        ("moved ", "crossslot", "clusterdown", "hash slot", "keys in request"),
        _IS_CLUSTER,
    ),
    (
        ("oom ", "command not allowed when used memory"),
        "its memory is full: raise maxmemory, or see what else is in it",
    ),
    (("redis is loading", "loading"), "it is still loading its data: try again in a moment"),
)


def name_without_secrets(url: str) -> str:
    """Leave out the user, the password and the query of a URL, which may hold a password too."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check(url: str, prefix: str, scripts: Iterable[str]) -> list[str]:
    """Try everything that a gateway needs of Redis.

    Args:
        url: of Redis.
        prefix: of every key and channel.
        scripts: sources of all scripts.

    Returns:
        what is doubtful, in a sentence each.

    Raises:
        StartError: saying what is in the way, and what to do about it.
    """
    name = name_without_secrets(url)
    try:
        with Redis.from_url(
            url,
            protocol=2,  # as the workers and the reaper
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        ) as redis:
            return _Check(redis, name, prefix).run(scripts)
    # Beside its own errors: ValueError and TypeError are redis-py's for parts of a URL.
    except (exceptions.RedisError, OSError, ValueError, TypeError) as error:
        raise StartError(f"redis: cannot use {name}: {explain(error, prefix)}") from None


def explain(error: Exception, prefix: str) -> str:
    """Say what an error of Redis means."""
    text = " ".join(str(error).split())
    if isinstance(error, exceptions.NoPermissionError) or text.startswith("NOPERM"):
        return (
            f"a right is missing: {text}; the user of this gateway needs "
            f"~{prefix}* &{prefix}* +@all -@dangerous +info"
        )
    if isinstance(error, exceptions.ReadOnlyError):
        text = f"READONLY {text}"  # redis-py takes the first word away
    lower = text.lower()
    for parts, meaning in _MEANINGS:
        if any(part in lower for part in parts):
            return f"{meaning} ({text})"
    if "unknown command" in lower or "unknown subcommand" in lower:
        return f"it does not know a command that is needed: Redis 6.2 or Valkey is ({text})"
    return text


class _Check:
    """Hold one connection to the Redis that is tried."""

    def __init__(self, redis: Redis, name: str, prefix: str) -> None:
        self._redis: Any = redis
        self._name = name
        self._base = f"{prefix}check:{secrets.token_hex(4)}:"

    def run(self, scripts: Iterable[str]) -> list[str]:
        self._redis.ping()
        doubts = self._look_at_kind()
        self._load(scripts)
        try:
            self._call(line.format(*[self._base] * line.count("{}")) for line in _CALLS.split("\n"))
            self._listen()
        finally:
            with contextlib.suppress(exceptions.RedisError, OSError):  # they expire
                kinds = ("s", "n", "set", "hash", "zset", "stream")
                self._redis.delete(*(self._base + kind for kind in kinds))
        return doubts

    def _look_at_kind(self) -> list[str]:
        """Refuse what cannot be, by what Redis says of itself; it need not say anything."""
        try:
            about = self._redis.info()
        except exceptions.ResponseError:  # forbidden, as some who rent out a Redis do
            return []
        mode = about.get("redis_mode") or about.get("server_mode")
        if mode == "sentinel":
            raise StartError(self._refusal("it is a Sentinel: name the Redis that it watches"))
        if mode == "cluster" or about.get("cluster_enabled") == 1:
            raise StartError(self._refusal(_IS_CLUSTER))
        if about.get("role") == "slave":
            primary = f"{about.get('master_host')}:{about.get('master_port')}"
            reason = f"it is a replica, which takes no writes: name its primary, {primary}"
            raise StartError(self._refusal(reason))
        policy = policy_of(about)
        if harm := harm_of(policy):
            raise StartError(self._refusal(harm))
        doubt = doubt_of(policy)
        return [f"redis: {self._name}: {doubt}"] if doubt else []

    def _refusal(self, reason: str) -> str:
        return f"redis: cannot use {self._name}: {reason}"

    def _load(self, scripts: Iterable[str]) -> None:
        for source in scripts:
            self._redis.script_load(source)
        digest = self._redis.script_load("return redis.call('TIME')")
        self._redis.evalsha(digest, 1, self._base)

    def _call(self, calls: Iterable[str]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.response_callbacks = {}  # whether there is an error is all that is of interest
        for call in calls:
            pipeline.execute_command(*call.split(" "))
        for reply in pipeline.execute(raise_on_error=False):
            if isinstance(reply, Exception):
                raise reply

    def _listen(self) -> None:
        """Publish, and see it come back."""
        channel = self._base + "channel"
        with self._redis.pubsub() as subscription:
            subscription.subscribe(channel)
            self._await(subscription, "subscribe")
            self._redis.publish(channel, "1")
            self._await(subscription, "message")
            subscription.unsubscribe(channel)
            self._await(subscription, "unsubscribe")

    def _await(self, subscription: Any, kind: str) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while (left_s := deadline - time.monotonic()) > 0:
            message = subscription.get_message(timeout=left_s)
            if message is not None and message["type"] == kind:
                return
        reason = "what is published there does not come back: pushes between workers would be lost"
        raise StartError(self._refusal(reason))
