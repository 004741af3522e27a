"""Hold hundreds of clients, and tell them what to do."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable

from .loop_thread import LoopThread
from .traffic_clients import Stay, TrafficClient
from .waiting import until


class Fleet:
    """Hold the clients.

    Args:
        thread: whose loop they live in.
        address: the client port.
    """

    def __init__(self, thread: LoopThread, address: tuple[str, int]) -> None:
        self._thread = thread
        self.address = address
        self.clients: dict[str, TrafficClient] = {}
        self.ends: Counter[str] = Counter()
        """How connections have ended: close code, status, or what the socket said."""
        self.answers = 0
        """Answers to messages that arrived at all clients."""
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, *names: str) -> list[TrafficClient]:
        """Create clients and connect them, not many at once; all must be let in."""
        clients = self.try_to_add(*names)
        refused = [(client.client_id, client.stay) for client in clients if not client.is_open]
        assert not refused, refused[:3]
        return clients

    def try_to_add(self, *names: str) -> list[TrafficClient]:
        """Create clients and let each try to connect once."""
        clients = [TrafficClient(self, name) for name in names]
        self.clients.update((client.client_id, client) for client in clients)
        self._thread.run(self._connect_all(clients))
        return clients

    def start(self, client: TrafficClient) -> None:
        """Let a client try to connect; to be called in the loop's thread."""
        task = asyncio.get_running_loop().create_task(client.connect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def talk(self, window: int = 1, pause_s: float = 0.0, *, padding: int = 0) -> None:
        """Let every client talk; see `TrafficClient.talk`."""

        def talk() -> None:
            for client in self.clients.values():
                client.padding = padding
                client.talk(window, pause_s)

        self._thread.call(talk)

    def fall_silent(self) -> None:
        """Let every client finish what it is saying; those that come back go on to do so."""
        self.talk(0)

    def send(self, *clients: TrafficClient) -> None:
        """Let clients send one message each."""
        self._each(clients, TrafficClient.send)

    def close(self, *clients: TrafficClient) -> None:
        """Let clients close in good order, and wait until their connections have ended."""
        self._each(clients, TrafficClient.close)
        until(lambda: all(client.stay.has_ended for client in clients), what="the end of them")

    def stop(self, *clients: TrafficClient) -> None:
        """Let clients neither send nor come back any more."""
        self._each(clients, TrafficClient.stop)

    def hang_up(self, *clients: TrafficClient, reset: bool = False) -> None:
        """Let clients end their connections without a close frame."""
        self._each(clients, lambda client: client.hang_up(reset=reset))

    def read_on(self, on: bool, *clients: TrafficClient) -> None:
        """Let clients stop reading, or go on."""
        self._each(clients, lambda client: client.read_on(on))

    @property
    def stays(self) -> list[Stay]:
        """Every connection, and every attempt, of every client."""
        return self._thread.call(
            lambda: [stay for client in self.clients.values() for stay in client.stays]
        )

    @property
    def unanswered(self) -> int:
        """Count the messages that wait for an answer on open connections."""
        return self._thread.call(
            lambda: sum(c.stay.unanswered for c in self.clients.values() if c.is_open)
        )

    @property
    def open_count(self) -> int:
        """Count the clients that are connected."""
        return self._thread.call(lambda: sum(client.is_open for client in self.clients.values()))

    def end(self) -> None:
        """End every connection that is left."""
        if not self._thread.loop.is_closed():
            self._thread.run(self._end())

    def _each(
        self, clients: Iterable[TrafficClient], action: Callable[[TrafficClient], None]
    ) -> None:
        def act() -> None:
            for client in clients:
                action(client)

        self._thread.call(act)

    async def _connect_all(self, clients: list[TrafficClient]) -> None:
        waiting = iter(clients)

        async def connect_some() -> None:
            for client in waiting:
                await client.connect()
                while not client.stay.status and not client.stay.has_ended:
                    await asyncio.sleep(0.001)

        await asyncio.gather(*(connect_some() for _ in range(64)))

    async def _end(self) -> None:
        for client in self.clients.values():
            client.stop()
        for task in list(self._tasks):
            task.cancel()
        while any(client.stays and not client.stay.has_ended for client in self.clients.values()):
            for client in self.clients.values():
                client.hang_up()
            await asyncio.sleep(0.001)
