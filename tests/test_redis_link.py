"""Hold links to a real Valkey server, and take it away, stop it and bring it back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import hiredis
import pytest
import structlog
from harness.certificates import Certificate, make_certificate
from harness.looping import Clock, holds, in_loop
from harness.names import ALIVE, NAME, SILENT, NamingLoop, silence
from harness.valkey import ValkeyProcess
from harness.waiting import until
from redis import Redis
from redis.exceptions import RedisError
from ws2api.gateway import redis_link
from ws2api.gateway.errors import RedisNotAsked, RedisUnavailable
from ws2api.gateway.redis_link import REPLY_TIMEOUT_S, RedisLink, Reply, Script
from ws2api.gateway.sweeper import Sweeper

DEADLINE_S = 20.0
PING_INTERVAL_S = 2.0
TICK_S = 0.1

ECHO = Script("return {KEYS[1], ARGV[1]}")


class Server:
    """Be a Valkey server, with a connection of its own to look into it."""

    def __init__(self, process: ValkeyProcess) -> None:
        self.process = process
        self.url = process.url
        self.redis = Redis.from_url(self.url)
        until(self._answers, what="Valkey answers")
        self._pid = self.redis.info("server")["process_id"]

    def _answers(self) -> bool:
        with contextlib.suppress(RedisError):
            return bool(self.redis.ping())
        return False

    def freeze(self) -> None:
        """Stop the process: its sockets stay open, nothing is answered."""
        os.kill(self._pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def names(self) -> list[str]:
        return [client["name"] for client in self.redis.client_list()]

    def set_password(self, password: str) -> None:
        self.redis.config_set("requirepass", password)


@contextlib.contextmanager
def server_in(folder: Path) -> Iterator[Server]:
    with ValkeyProcess(folder) as process:
        server = Server(process)
        try:
            yield server
        finally:
            server.redis.close()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server_in(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    """Use the shared server, empty."""
    shared_server.redis.flushall()
    return shared_server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """Use a server that the test may take away."""
    with server_in(tmp_path) as server:
        yield server


class Link:
    """Hold a link, and what it has told."""

    def __init__(
        self,
        url: str,
        *,
        name: str = "test",
        subscribes: bool = False,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.clock = Clock()
        sweeper = Sweeper(cast(Any, self.clock))
        self.ups = self.downs = 0
        self.replies: list[Reply] = []
        self.messages: list[bytes] = []
        self.link = RedisLink(
            url,
            name,
            loop or asyncio.get_running_loop(),
            sweeper,
            self._on_up,
            self._on_down,
            self.messages.append if subscribes else None,
            () if subscribes else (ECHO,),
        )
        sweeper.start()

    def _on_up(self) -> None:
        assert self.link.is_up
        self.ups += 1

    def _on_down(self) -> None:
        assert not self.link.is_up
        self.downs += 1

    def send(self, *command: str | int | bytes) -> None:
        self.link.send(self.replies.append, *command)

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def is_up(self, times: int = 1) -> None:
        await holds(lambda: self.link.is_up and self.ups >= times)

    async def is_down(self) -> None:
        await holds(lambda: not self.link.is_up)

    async def has_messages(self, count: int) -> None:
        await holds(lambda: len(self.messages) >= count)

    async def has_replies(self, count: int) -> list[Reply]:
        await holds(lambda: len(self.replies) >= count)
        return self.replies


@contextlib.asynccontextmanager
async def started(url: str, *, name: str = "test", subscribes: bool = False) -> AsyncIterator[Link]:
    """Start a link, and stop it in the end."""
    link = Link(url, name=name, subscribes=subscribes)
    link.link.start()
    try:
        yield link
    finally:
        await link.link.stop()


@contextlib.asynccontextmanager
async def connected(
    url: str, *, name: str = "test", subscribes: bool = False
) -> AsyncIterator[Link]:
    """Start a link, and wait until it is up."""
    async with started(url, name=name, subscribes=subscribes) as link:
        await link.is_up()
        yield link


def is_loss(reply: Reply) -> bool:
    return isinstance(reply, RedisUnavailable)


@in_loop
async def test_name_is_optional(server: Server) -> None:
    rights = ("on", ">secret", "allkeys", "allchannels", "+@all", "-client")
    server.redis.execute_command("ACL", "SETUSER", "nameless", *rights)
    url = server.url.replace("unix://", "unix://nameless:secret@")
    async with connected(url, name="unseen") as link:
        assert await link.link.ask("ECHO", "hello") == b"hello"
        assert "unseen" not in [each["name"] for each in server.redis.client_list()]
        assert link.ups == 1


# Commands.


@in_loop
async def test_replies_come_in_the_order_of_the_commands(server: Server) -> None:
    async with connected(server.url) as link:
        for number in range(1000):
            link.send("RPUSH" if number % 2 else "ECHO", *(["l"] if number % 2 else []), number)
        replies = await link.has_replies(1000)
        expected = [(n + 1) // 2 if n % 2 else b"%d" % n for n in range(1000)]
        assert replies == expected


@in_loop
async def test_replies_are_what_redis_says(server: Server) -> None:
    async with connected(server.url) as link:
        link.send("SET", "a", b"\xff\r\n")
        link.send("GET", "a")
        link.send("GET", "nothing")
        link.send("STRLEN", "a")
        link.send("MGET", "a", "nothing")
        ok, value, nothing, length, both = await link.has_replies(5)
        assert (ok, value, nothing, length) == (b"OK", b"\xff\r\n", None, 3)
        assert both == [b"\xff\r\n", None]


@in_loop
async def test_command_that_redis_refuses_is_answered_and_the_link_starts_over(
    server: Server,
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with connected(server.url) as link:
            link.send("NONSENSE")
            (error,) = await link.has_replies(1)
            assert isinstance(error, hiredis.ReplyError)
            await link.is_up(times=2)
            assert link.downs == 1
            assert await link.link.ask("ECHO", "again") == b"again"
    assert [log["event"] for log in logs] == ["Redis refuses a command", "Redis is away"]


@in_loop
async def test_scripts_that_were_flushed_are_loaded_again(server: Server) -> None:
    with structlog.testing.capture_logs():
        async with connected(server.url) as link:
            server.redis.script_flush()
            link.link.call(link.replies.append, ECHO, b"p", b"first")
            (error,) = await link.has_replies(1)
            assert isinstance(error, hiredis.ReplyError)
            await link.is_up(times=2)
            link.link.call(link.replies.append, ECHO, b"p", b"second")
            assert (await link.has_replies(2))[1] == [b"p", b"second"]


@pytest.mark.parametrize("takes", [0, 3])
@in_loop
async def test_server_that_refuses_commands_is_not_stormed(
    server: Server, monkeypatch: pytest.MonkeyPatch, takes: int
) -> None:
    class Hopeful(Link):
        def _on_up(self) -> None:
            super()._on_up()
            for _ in range(takes):  # as a Redis whose memory is full does
                self.send("ECHO", "fine")
            self.send("NONSENSE")

    delays = 0

    def jitter() -> float:
        nonlocal delays
        delays += 1
        return 0.0

    monkeypatch.setattr(redis_link.random, "random", jitter)
    with structlog.testing.capture_logs():
        link = Hopeful(server.url)
        link.link.start()
        await link.is_up(times=3)
        await link.link.stop()
    assert delays == 2, "each attempt but the first is put off"


@in_loop
async def test_commands_of_one_tick_are_written_together(server: Server) -> None:
    def reads() -> int:
        return int(server.redis.info("stats")["total_reads_processed"])

    async with connected(server.url) as link:
        own = reads() - reads()
        before = reads()
        for number in range(500):
            link.send("ECHO", number)
        await link.has_replies(500)
        assert reads() - before + own == 1


@in_loop
async def test_scripts_are_called_by_their_digest(server: Server) -> None:
    async with connected(server.url) as link:
        link.link.call(link.replies.append, ECHO, b"prefix:", b"argument")
        assert await link.has_replies(1) == [[b"prefix:", b"argument"]]


@in_loop
async def test_callback_may_send_the_next_command(server: Server) -> None:
    async with connected(server.url) as link:
        link.link.send(lambda reply: link.send("ECHO", reply + b"!"), "ECHO", "first")
        assert await link.has_replies(1) == [b"first!"]


@in_loop
async def test_asks_and_waits(server: Server) -> None:
    async with connected(server.url) as link:
        assert await link.link.ask("ECHO", "x") == b"x"
        with pytest.raises(hiredis.ReplyError):
            await link.link.ask("NONSENSE")


@in_loop
async def test_ask_that_is_given_up_does_not_shift_the_replies(server: Server) -> None:
    async with connected(server.url) as link:
        asking = asyncio.ensure_future(link.link.ask("ECHO", "given up"))
        await asyncio.sleep(0)
        asking.cancel()
        assert await link.link.ask("ECHO", "next") == b"next"


# Connecting.


@in_loop
async def test_server_knows_what_the_link_is_for(server: Server) -> None:
    async with connected(server.url, name="ws2api-3-commands"):
        assert "ws2api-3-commands" in server.names()


@in_loop
async def test_what_is_sent_on_coming_up_is_answered(server: Server) -> None:
    class Eager(Link):
        def _on_up(self) -> None:
            super()._on_up()
            self.send("ECHO", "first")

    link = Eager(server.url)
    link.link.start()
    assert await link.has_replies(1) == [b"first"]
    await link.link.stop()


@in_loop
async def test_command_before_the_first_connect_fails_at_once(server: Server) -> None:
    async with started(server.url) as link:
        link.send("PING")
        (reply,) = link.replies
        assert is_loss(reply)
        with pytest.raises(RedisUnavailable):
            await link.link.ask("PING")


@in_loop
async def test_server_that_comes_later_is_found(tmp_path: Path) -> None:
    process = ValkeyProcess(tmp_path)
    with structlog.testing.capture_logs() as logs:
        async with started(process.url) as link:
            await holds(lambda: logs)
            with process:
                await link.is_up()
            await link.is_down()
    assert [log["event"] for log in logs][:1] == ["cannot connect to Redis"]


@in_loop
async def test_failure_to_connect_is_logged_once(tmp_path: Path) -> None:
    attempts = 0

    class Counting(RedisLink):
        async def _connect(self) -> None:
            nonlocal attempts
            attempts += 1
            await super()._connect()

    link = Link(ValkeyProcess(tmp_path).url)
    link.link.__class__ = Counting
    with structlog.testing.capture_logs() as logs:
        link.link.start()
        await holds(lambda: attempts == 3)
        await link.link.stop()
    assert [log["event"] for log in logs] == ["cannot connect to Redis"]
    assert (link.ups, link.downs) == (0, 0)


@pytest.mark.parametrize("password", ["s3cret", "p@ss/w:rd%?#"])
@in_loop
async def test_password(own_server: Server, password: str) -> None:
    own_server.set_password(password)
    own_server.redis.auth(password)
    quoted = "".join(f"%{byte:02x}" for byte in password.encode())
    path = own_server.url.removeprefix("unix://")
    async with connected(f"unix://:{quoted}@{path}") as link:
        assert await link.link.ask("ECHO", "in") == b"in"


@in_loop
async def test_user_and_password(own_server: Server) -> None:
    own_server.redis.execute_command("ACL SETUSER gateway on >s3cret ~* &* +@all")
    path = own_server.url.removeprefix("unix://")
    async with connected(f"unix://gateway:s3cret@{path}") as link:
        assert await link.link.ask("ACL", "WHOAMI") == b"gateway"


@in_loop
async def test_wrong_password_is_tried_until_it_is_right(own_server: Server) -> None:
    own_server.set_password("other")
    own_server.redis.auth("other")
    path = own_server.url.removeprefix("unix://")
    with structlog.testing.capture_logs() as logs:
        async with started(f"unix://:s3cret@{path}") as link:
            await holds(lambda: logs)
            assert not link.link.is_up
            own_server.set_password("s3cret")
            await link.is_up()
    assert "WRONGPASS" in logs[0]["error"]
    assert "s3cret" not in str(logs)


@in_loop
async def test_database_is_selected(server: Server) -> None:
    async with connected(f"{server.url}?db=3") as link:
        await link.link.ask("SET", "where", "here")
        assert server.redis.get("where") is None
        assert server.redis.info("keyspace")["db3"]["keys"] == 1


@in_loop
async def test_tcp(own_server: Server) -> None:
    own_server.redis.config_set("bind", "127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own_server.redis.config_set("port", port)
    own_server.set_password("s3cret")
    own_server.redis.auth("s3cret")
    async with connected(f"redis://:s3cret@127.0.0.1:{port}/2") as link:
        await link.link.ask("SET", "a", "b")
        assert own_server.redis.info("keyspace")["db2"]["keys"] == 1


@in_loop
async def test_address_that_is_silent_does_not_hide_one_that_is_not(own_server: Server) -> None:
    own_server.redis.config_set("bind", ALIVE)
    with silence() as port:
        own_server.redis.config_set("port", port)
        link = Link(f"redis://{NAME}:{port}/0", loop=cast(Any, NamingLoop(SILENT, ALIVE)))
        link.link.start()
        await link.is_up()
        assert await link.link.ask("PING") == b"PONG"
        await link.link.stop()


# Losing the server.


@in_loop
async def test_loss_fails_what_is_under_way_and_the_link_comes_back(own_server: Server) -> None:
    async with connected(own_server.url) as link:
        link.send("BLPOP", "nothing", 0)
        for _ in range(10):
            link.send("PING")
        waiting = asyncio.ensure_future(link.link.ask("PING"))
        await holds(lambda: int(own_server.redis.info("clients")["blocked_clients"]))
        own_server.process.stop()
        replies = await link.has_replies(11)
        assert len(replies) == 11
        assert all(map(is_loss, replies))
        with pytest.raises(RedisUnavailable):
            await waiting
        assert (link.ups, link.downs) == (1, 1)
        own_server.process.start()
        await link.is_up(times=2)
        assert await link.link.ask("ECHO", "back") == b"back"
        assert (link.ups, link.downs) == (2, 1)


@in_loop
async def test_scripts_are_loaded_again_into_a_new_server(own_server: Server) -> None:
    async with connected(own_server.url) as link:
        own_server.process.stop()
        own_server.process.start()
        await link.is_up(times=2)
        link.link.call(link.replies.append, ECHO, b"p", b"again")
        assert await link.has_replies(1) == [[b"p", b"again"]]


@in_loop
async def test_commands_while_the_server_is_away_fail_at_once(own_server: Server) -> None:
    async with connected(own_server.url) as link:
        own_server.process.stop()
        await link.is_down()
        link.send("PING")
        assert len(link.replies) == 1
        assert is_loss(link.replies[0])


@in_loop
async def test_callback_of_a_lost_command_may_send_another(own_server: Server) -> None:
    async with connected(own_server.url) as link:
        link.link.send(lambda reply: link.send("PING"), "BLPOP", "nothing", 0)
        own_server.process.stop()
        assert all(map(is_loss, await link.has_replies(1)))


@in_loop
async def test_connection_that_is_killed_is_opened_again(server: Server) -> None:
    async with connected(server.url, name="victim") as link:
        (client,) = [each for each in server.redis.client_list() if each["name"] == "victim"]
        server.redis.execute_command("CLIENT", "KILL", "ID", client["id"])
        await link.is_up(times=2)
        assert await link.link.ask("ECHO", "back") == b"back"


@in_loop
async def test_what_was_written_is_told_from_what_was_not(own_server: Server) -> None:
    async with connected(own_server.url) as link:
        own_server.freeze()
        link.send("SET", "written", "1")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        link.send("SET", "not written", "1")
        link.link.reset()
        await link.is_down()
        link.send("SET", "too late", "1")
        assert [type(reply) for reply in link.replies] == [
            RedisUnavailable,
            RedisNotAsked,
            RedisNotAsked,
        ]
        own_server.thaw()
        await link.is_up(times=2)
        assert own_server.redis.keys() == [b"written"], "nobody knew"


@in_loop
async def test_what_is_sent_right_after_a_reset_is_not_written(server: Server) -> None:
    async with connected(server.url) as link:
        link.link.reset()
        link.send("SET", "a", "1")
        await asyncio.sleep(0)
        await link.is_down()
        assert [type(reply) for reply in link.replies] == [RedisNotAsked]
        await link.is_up(times=2)
        assert not server.redis.exists("a")


@pytest.mark.parametrize(
    ("reply", "is_certain"),
    [
        (RedisNotAsked("Redis is away"), True),
        (RedisUnavailable("the connection to Redis was lost"), False),
        (hiredis.ReplyError("NOSCRIPT No matching script. Please use EVAL."), True),
        (hiredis.ReplyError("LOADING Redis is loading the dataset in memory"), True),
        (hiredis.ReplyError("FENCED the worker was given up"), True),
        (hiredis.ReplyError("READONLY You can't write against a read only replica. script"), False),
        (hiredis.ReplyError("ERR anything else"), False),
    ],
)
def test_which_commands_have_no_effect(reply: Exception, is_certain: bool) -> None:
    assert redis_link.has_no_effect(reply) is is_certain


# A server that hangs.


@in_loop
async def test_server_that_owes_an_answer_is_given_up(own_server: Server) -> None:
    async with connected(own_server.url) as link:
        own_server.freeze()
        link.send("PING")
        link.advance(REPLY_TIMEOUT_S - 2 * TICK_S)
        assert link.link.is_up
        link.advance(4 * TICK_S)
        assert all(map(is_loss, await link.has_replies(1)))
        assert (link.link.is_up, link.downs) == (False, 1)
        own_server.thaw()
        await link.is_up(times=2)
        assert await link.link.ask("ECHO", "back") == b"back"


@in_loop
async def test_server_that_hangs_while_nothing_is_asked_is_noticed(own_server: Server) -> None:
    async with connected(own_server.url) as link:
        own_server.freeze()
        link.advance(PING_INTERVAL_S + REPLY_TIMEOUT_S + 4 * TICK_S)
        await link.is_down()
        own_server.thaw()
        await link.is_up(times=2)


@in_loop
async def test_server_that_is_well_is_kept(server: Server) -> None:
    async with connected(server.url) as link:
        for _ in range(20):
            link.advance(PING_INTERVAL_S)
            assert await link.link.ask("ECHO", "x") == b"x"
        assert (link.ups, link.downs) == (1, 0)
        assert link.replies == []


@in_loop
async def test_time_that_the_worker_stood_still_is_not_held_against_the_server(
    server: Server,
) -> None:
    async with connected(server.url) as link:
        link.send("ECHO", "answered long ago")
        link.clock.now += 2 * REPLY_TIMEOUT_S
        link.advance(TICK_S)
        assert await link.has_replies(1) == [b"answered long ago"]
        assert link.downs == 0


@in_loop
async def test_slow_answers_are_waited_for_while_others_come(server: Server) -> None:
    async with connected(server.url) as link:
        for number in range(5):
            link.send("BLPOP", "list", 0)
            link.advance(REPLY_TIMEOUT_S - 1)
            server.redis.rpush("list", number)
            await link.has_replies(number + 1)
        assert link.downs == 0


@in_loop
async def test_no_more_is_unanswered_than_allowed(
    own_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_link, "_MAX_UNANSWERED", 10)
    async with connected(own_server.url) as link:
        own_server.freeze()
        for number in range(10):
            link.send("ECHO", number)
        assert link.replies == []
        for _ in range(3):
            link.send("ECHO", "too many")
            assert is_loss(link.replies.pop())
            assert link.replies == [], "those before are not answered for it"
        await link.is_down()
        # Else nobody would make good what was refused.
        assert link.downs == 1
        assert [is_loss(reply) for reply in link.replies] == [True] * 10
        link.replies.clear()
        own_server.thaw()
        await link.is_up(times=2)
        link.send("ECHO", "hello")
        assert await link.has_replies(1) == [b"hello"]


@in_loop
async def test_as_many_as_allowed_are_answered(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_link, "_MAX_UNANSWERED", 10)
    async with connected(server.url) as link:
        for first in range(0, 30, 10):
            for number in range(first, first + 10):
                link.send("ECHO", number)
            await link.has_replies(first + 10)
        assert link.replies == [b"%d" % number for number in range(30)]
        assert link.downs == 0


@in_loop
async def test_stop_waits_for_as_long_as_it_may(own_server: Server) -> None:
    async with connected(own_server.url) as hasty, connected(own_server.url) as patient:
        own_server.freeze()
        for link in (hasty, patient):
            link.send("ECHO", b"x" * (32 << 20))  # more than the sockets hold
        stops = [
            asyncio.ensure_future(hasty.link.stop(0.01)),
            asyncio.ensure_future(patient.link.stop(DEADLINE_S)),
        ]
        await stops[0]
        was_patient = not stops[1].done()
        own_server.thaw()
        await stops[1]
        assert was_patient


# A subscription.


@in_loop
async def test_messages_arrive_in_order(server: Server) -> None:
    async with connected(server.url, subscribes=True) as link:
        link.send("SUBSCRIBE", "channel")
        assert await link.has_replies(1) == [[b"subscribe", b"channel", 1]]
        for number in range(100):
            server.redis.publish("channel", number)
        server.redis.publish("other", "not for us")
        await link.has_messages(100)
        assert link.messages == [b"%d" % number for number in range(100)]


@in_loop
async def test_pings_of_a_subscription_are_no_messages(server: Server) -> None:
    async with connected(server.url, subscribes=True) as link:
        link.send("SUBSCRIBE", "channel")
        await link.has_replies(1)
        for number in range(5):
            link.advance(PING_INTERVAL_S + 2 * TICK_S)
            server.redis.publish("channel", number)
            await link.has_messages(number + 1)
        assert link.messages == [b"0", b"1", b"2", b"3", b"4"]
        assert (len(link.replies), link.downs) == (1, 0)


@in_loop
async def test_subscription_that_hangs_is_noticed(own_server: Server) -> None:
    async with connected(own_server.url, subscribes=True) as link:
        link.send("SUBSCRIBE", "channel")
        await link.has_replies(1)
        own_server.freeze()
        link.advance(PING_INTERVAL_S + REPLY_TIMEOUT_S + 4 * TICK_S)
        await link.is_down()
        own_server.thaw()


@in_loop
async def test_large_message_arrives_whole(server: Server) -> None:
    async with connected(server.url, subscribes=True) as link:
        link.send("SUBSCRIBE", "channel")
        await link.has_replies(1)
        message = bytes(range(256)) * 8192
        server.redis.publish("channel", message)
        await link.has_messages(1)
        assert link.messages == [message]


# The end.


@in_loop
async def test_stop_writes_what_is_still_to_be_written(server: Server) -> None:
    async with connected(server.url) as link:
        link.send("SET", "last", "words")
        await link.link.stop()
        assert server.redis.get("last") == b"words"
        assert (link.ups, link.downs) == (1, 0)


@in_loop
async def test_stop_is_for_good(server: Server) -> None:
    async with connected(server.url, name="stopped") as link:
        await link.link.stop()
        await holds(lambda: "stopped" not in server.names())
        link.send("PING")
        assert is_loss(link.replies[-1])
        assert not link.link.is_up


@in_loop
async def test_stop_while_the_server_is_away(tmp_path: Path) -> None:
    async with started(ValkeyProcess(tmp_path).url) as link:
        await asyncio.sleep(0)
        await link.link.stop()
        assert link.ups == 0


@in_loop
async def test_stop_before_the_start(server: Server) -> None:
    await Link(server.url).link.stop()


# Servers that are none.


class FakeServer:
    """Answer each command with what the test says."""

    def __init__(self, *replies: bytes) -> None:
        self.replies = list(replies)
        self.connections = 0
        self.ends: list[Exception | None] = []
        """How each connection has ended; None in good order."""

    def __call__(self) -> asyncio.Protocol:
        return FakeConnection(self)


class FakeConnection(asyncio.Protocol):
    def __init__(self, server: FakeServer) -> None:
        self._server = server
        self._reader = hiredis.Reader()
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._server.connections += 1
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while self._reader.gets():
            replies = self._server.replies
            self._transport.write(replies.pop(0) if replies else b"+OK\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.ends.append(exc)


@contextlib.asynccontextmanager
async def fake_server(server: FakeServer, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Serve on loopback; the value is host and port."""
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(server, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()


@in_loop
async def test_connection_that_is_given_up_is_reset() -> None:
    """A close would let the kernel send what it has, whenever the network comes back."""
    server = FakeServer()
    with structlog.testing.capture_logs():
        async with fake_server(server) as address, connected(f"redis://{address}") as link:
            link.link.reset()
            await link.is_up(times=2)
            await holds(lambda: server.ends)
            assert isinstance(server.ends[0], ConnectionResetError)
        await holds(lambda: len(server.ends) == 2)
    assert server.ends[1] is None


@in_loop
async def test_answer_that_is_no_resp_ends_the_connection() -> None:
    server = FakeServer(b"+OK\r\n", b"+digest\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with structlog.testing.capture_logs() as logs:
        async with fake_server(server) as address, connected(f"redis://{address}") as link:
            link.send("PING")
            assert all(map(is_loss, await link.has_replies(1)))
            await link.is_up(times=2)
            assert server.connections == 2
    assert logs[0]["event"] == "Redis sent what is no RESP"


@in_loop
async def test_answer_that_is_no_resp_to_the_introduction() -> None:
    server = FakeServer(b"garbage\r\n")
    with structlog.testing.capture_logs():
        async with fake_server(server) as address, connected(f"redis://{address}"):
            assert server.connections == 2


@in_loop
async def test_script_that_cannot_be_loaded_is_tried_again() -> None:
    server = FakeServer(b"+OK\r\n", b"-LOADING Redis is loading the dataset in memory\r\n")
    with structlog.testing.capture_logs() as logs:
        async with fake_server(server) as address, connected(f"redis://{address}"):
            assert server.connections == 2
    assert "LOADING" in logs[0]["error"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"), "redis")


@pytest.mark.parametrize("query", ["ssl_ca_certs={}", "ssl_cert_reqs=none"])
@in_loop
async def test_tls(certificate: Certificate, query: str) -> None:
    query = query.format(certificate.certificate)
    async with (
        fake_server(FakeServer(), certificate.server_context()) as address,
        connected(f"rediss://{address}?{query}") as link,
    ):
        assert await link.link.ask("PING") == b"OK"


@in_loop
async def test_certificate_is_verified(certificate: Certificate) -> None:
    with structlog.testing.capture_logs() as logs:
        async with (
            fake_server(FakeServer(), certificate.server_context()) as address,
            started(f"rediss://{address}") as link,
        ):
            await holds(lambda: logs)
            assert link.ups == 0
    assert "CERTIFICATE_VERIFY_FAILED" in logs[0]["error"]
