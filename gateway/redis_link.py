"""Hold one connection to Redis: pipelined commands with callbacks, or a subscription.

redis-py costs 90 µs a command here; hiredis on an asyncio.Protocol 1 µs. Commands of one tick of
the loop are written together. A lost connection fails what is under way at once, and is opened
again with backoff by the one task that the link has.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, cast

import hiredis
import redis.asyncio
import structlog
from redis.asyncio.connection import parse_url

from .dial import Destination
from .errors import RedisNotAsked, RedisUnavailable
from .sweeper import Sweeper

REPLY_TIMEOUT_S: Final = 5.0
_PING_INTERVAL_S: Final = 2.0
STEADY_S: Final = 2.0
"""A connection that has held for so long is no try any more."""
_CONNECT_TIMEOUT_S: Final = 5.0
_MIN_BACKOFF_S: Final = 0.05
_MAX_BACKOFF_S: Final = 2.0
_MAX_UNANSWERED: Final = 100_000
_SCAN_BATCH: Final = 500

_NOT_ENOUGH: Final = object()
# Of SO_LINGER: a close that resets the connection and drops what the kernel has yet to send.
_NO_LINGER: Final = struct.pack("ii", 1, 0)
# What Redis answers instead of carrying a command out; other errors may come out of the middle of a
# script.
_REFUSALS: Final = ("NOSCRIPT", "LOADING", "BUSY", "NOAUTH", "MASTERDOWN", "FENCED")

Argument = str | int | float | bytes | memoryview
Reply = Any
Callback = Callable[[Reply], None]
"""Take a reply: bytes, int, list or None as RESP has it, or an exception."""

_log = structlog.get_logger()


class Script:
    """Be a Lua script that a link loads on connect and calls by its digest.

    Args:
        source: the script; KEYS[1] is the prefix of all keys.
    """

    __slots__ = ("digest", "source")

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest().encode()


class RedisLink(asyncio.Protocol):
    """Keep one connection to Redis open.

    Args:
        url: redis, rediss or unix URL.
        name: what the connection is for; CLIENT LIST shows it.
        on_up: called after each connect, before anything that is sent then is answered.
        on_down: called when the connection is lost.
        on_message: called with each published message; makes this a subscribing connection.
        scripts: what `call` may call.
    """

    def __init__(
        self,
        url: str,
        name: str,
        loop: asyncio.AbstractEventLoop,
        sweeper: Sweeper,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        on_message: Callable[[bytes], None] | None = None,
        scripts: Sequence[Script] = (),
    ) -> None:
        self._options: dict[str, Any] = dict(parse_url(url))
        self._name = name
        self._loop = loop
        self._sweeper = sweeper
        self._on_up = on_up
        self._on_down = on_down
        self._on_message = on_message
        self._scripts = scripts
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(notEnoughData=_NOT_ENOUGH)
        self._waiting: deque[Callback] = deque()
        self._outgoing: list[bytes] = []
        self._lost = asyncio.Event()
        self._heard_at = 0.0
        self._pinged_at = 0.0
        self._is_late = False
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        # Attempts to connect since a connection last held.
        self._attempt = 0
        self._up_at = 0.0
        self.is_up = False
        sweeper.every_tick(self._on_tick)

    def start(self) -> None:
        """Connect, and keep on connecting until `stop`."""
        self._task = self._loop.create_task(self._keep_connected())

    async def stop(self, timeout_s: float = 1.0) -> None:
        """Write what is still to be written and close for good."""
        self._stopping = True
        self._flush()
        if self._transport is not None:
            self._transport.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), timeout_s)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def reset(self) -> None:
        """Drop the connection, so that a new one takes its place."""
        transport = self._transport
        if transport is None:
            return
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            # What is in the kernel's buffer would be carried out whenever the network lets it.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        transport.abort()

    def send(self, callback: Callback, *command: Argument) -> None:
        """Send one command; its reply, or an exception, goes to `callback`.

        While the connection is down, or when too much is unanswered, `callback` gets a
        RedisNotAsked before this returns. When the connection is lost it gets a RedisNotAsked if
        the command was not written, else a RedisUnavailable: nobody knows what became of it.
        """
        if len(self._waiting) >= _MAX_UNANSWERED:
            self.reset()  # what is refused now must be made good, as after any loss
        elif self.is_up:
            self._append(callback, command)
            return
        callback(RedisNotAsked("Redis is away"))

    def call(self, callback: Callback, script: Script, *arguments: bytes | int) -> None:
        """Call a script; the first argument is the prefix of all keys."""
        self.send(callback, b"EVALSHA", script.digest, 1, *arguments)

    def _append(self, callback: Callback, command: tuple[Argument, ...]) -> None:
        # First, so that a command that cannot be packed leaves no callback waiting for a reply.
        wire = hiredis.pack_command(command)  # type: ignore[arg-type]  # the stub forgets the ellipsis
        if not self._waiting:
            self._heard_at = self._sweeper.now
        self._waiting.append(callback)
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(wire)

    def _flush(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return  # `connection_lost` tells what was not written
        outgoing, self._outgoing = self._outgoing, []
        if outgoing:
            transport.write(outgoing[0] if len(outgoing) == 1 else b"".join(outgoing))

    # The socket.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start with a clean parser."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._reader = hiredis.Reader(notEnoughData=_NOT_ENOUGH)
        self._heard_at = self._pinged_at = self._sweeper.now
        self._lost.clear()

    def data_received(self, data: bytes) -> None:
        """Hand each reply to the callback of its command."""
        self._heard_at = self._sweeper.now
        reader = self._reader
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not _NOT_ENOUGH:
                if self.is_up:
                    self._judge(reply)
                if self._on_message is not None and isinstance(reply, list):
                    self._on_push(reply)
                elif self._waiting:
                    self._waiting.popleft()(reply)
        except hiredis.ProtocolError as error:
            _log.error("Redis sent what is no RESP", error=str(error))
            self.reset()

    def _judge(self, reply: Reply) -> None:
        """Take an error reply to a command that cannot be wrong for a lost connection.

        Scripts were flushed, memory is full, a failover left a replica at this address: what
        helps is to connect again, load the scripts and enter the clients.
        """
        if not isinstance(reply, hiredis.ReplyError):
            # Not at the first answer: a Redis that is full answers some commands, and refuses those
            # that the clients are entered with.
            if self._attempt and self._sweeper.now - self._up_at >= STEADY_S:
                self._attempt = 0
        elif self._transport is not None and not self._transport.is_closing():
            _log.warning("Redis refuses a command", link=self._name, error=str(reply))
            self.reset()

    def _on_push(self, reply: list[Any]) -> None:
        """Sort the lists that a subscribed connection gets (RESP2)."""
        assert self._on_message is not None
        if reply[0] == b"message":
            self._on_message(reply[2])
        elif self._waiting:  # subscribe, pong
            self._waiting.popleft()(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what is under way; the task connects again."""
        self._transport = None
        was_up, self.is_up = self.is_up, False
        waiting, self._waiting = self._waiting, deque()
        written = len(waiting) - len(self._outgoing)
        self._outgoing = []
        self._lost.set()
        for _ in range(written):
            waiting.popleft()(RedisUnavailable("the connection to Redis was lost"))
        for callback in waiting:
            callback(RedisNotAsked("the connection to Redis was lost"))
        if was_up and not self._stopping:
            _log.warning("Redis is away", link=self._name)
            self._on_down()

    def _on_tick(self, now: float) -> None:
        """Notice a Redis that hangs: it owes an answer, or does not answer a ping."""
        if self._transport is None or not self.is_up:
            return
        if self._waiting:
            if now - self._heard_at <= REPLY_TIMEOUT_S:
                self._is_late = False
            elif not self._is_late:
                self._is_late = True  # if it was this process that stood still, the next look tells
            else:
                _log.warning("Redis does not answer", link=self._name)
                self.reset()
        elif now - self._pinged_at > _PING_INTERVAL_S:
            self._pinged_at = now
            self._append(ignore, (b"PING",))

    # Connecting.

    async def _keep_connected(self) -> None:
        while not self._stopping:
            if self._attempt:
                delay_s = min(_MAX_BACKOFF_S, _MIN_BACKOFF_S * 2.0 ** min(self._attempt, 16))
                await asyncio.sleep(delay_s * (0.5 + random.random() / 2))
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    await self._connect()
                    await self._introduce()
            except (OSError, TimeoutError, RedisUnavailable, hiredis.HiredisError) as error:
                if self._transport is not None:
                    self.reset()
                    await self._lost.wait()
                if self._attempt == 0:
                    cause = str(error) or type(error).__name__
                    _log.warning("cannot connect to Redis", link=self._name, error=cause)
                self._attempt += 1
                continue
            self._attempt += 1  # until the connection has held for a while
            self._up_at = self._sweeper.now
            self.is_up = True
            self._on_up()
            await self._lost.wait()

    async def _connect(self) -> None:
        options = self._options
        if "path" in options:
            await self._loop.create_unix_connection(lambda: self, options["path"])
            return
        tls = None
        if options.get("connection_class") is redis.asyncio.SSLConnection:
            tls = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
            if options.get("ssl_cert_reqs") == "none":
                tls.check_hostname = False
                tls.verify_mode = ssl.CERT_NONE
        host, port = options.get("host", "localhost"), int(options.get("port", 6379))
        await Destination(host, port, tls).connect(self._loop, lambda: self)

    async def _introduce(self) -> None:
        options = self._options
        if password := options.get("password"):
            user = options.get("username")
            await self.ask(*((b"AUTH", user, password) if user else (b"AUTH", password)))
        if database := int(options.get("db", 0) or 0):
            await self.ask(b"SELECT", database)
        # For people who look at CLIENT LIST; some who rent out a Redis forbid it.
        with contextlib.suppress(hiredis.ReplyError):
            await self.ask(b"CLIENT", b"SETNAME", self._name)
        for script in self._scripts:
            await self.ask(b"SCRIPT", b"LOAD", script.source)

    async def ask(self, *command: Argument) -> Reply:
        """Send one command and wait for its reply: for the control plane, not for the hot path.

        Raises:
            RedisUnavailable: if the connection is lost meanwhile.
            hiredis.ReplyError: if Redis answers with an error.
        """
        future: asyncio.Future[Reply] = self._loop.create_future()

        def settle(reply: Reply) -> None:
            if future.done():
                return
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)

        if self._transport is None:
            raise RedisUnavailable("Redis is away")
        self._append(settle, command)
        return await future


async def scan(link: RedisLink, command: bytes, key: bytes) -> AsyncIterator[list[bytes]]:
    """Yield what a key holds, in batches.

    Args:
        command: HSCAN or SSCAN.

    Raises:
        RedisUnavailable: if the connection is lost meanwhile.
    """
    cursor = b"0"
    while True:
        cursor, entries = await link.ask(command, key, cursor, b"COUNT", _SCAN_BATCH)
        yield entries
        if cursor == b"0":
            return


def has_no_effect(error: Exception) -> bool:
    """Tell whether it is certain that Redis has not carried out a command, and will not."""
    if isinstance(error, hiredis.ReplyError):
        return str(error).startswith(_REFUSALS)
    return isinstance(error, RedisNotAsked)


def ignore(reply: Reply) -> None:
    """Take a reply that tells nothing."""
