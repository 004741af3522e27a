"""Let clients and the API do at random what they do in real life, all the time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from harness.traffic_clients import TrafficClient

from soak_.world import World

MESSAGES_PER_S: Final = 2.0
"""Of each client, on average, as long as it gets answers."""
MOST_UNANSWERED: Final = 8
MOST_UNSENT_BYTES: Final = 65_536
PUSHERS: Final = 8
PUSH_PAUSE_S: Final = 0.02
_STUCK_S: Final = 3.0
"""A client that has had no answer for so long says something all the same."""
_LONGEST_DEAFNESS_S: Final = 8.0
_PAST: Final = 200
"""Ids of clients that have left, to which is pushed now and then."""


@dataclass(frozen=True)
class Habit:
    """Say how often a client does something instead of sending a message."""

    name: str
    chance: float


HABITS: Final = (
    Habit("close", 0.004),
    Habit("hang up", 0.003),
    Habit("reset", 0.003),
    Habit("be deaf", 0.002),
)


class Crowd:
    """Keep clients talking, coming and going, and push to them.

    Args:
        world: in which they live.
        seed: makes the same decisions again, as far as timing allows.
    """

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._fleet = world.traffic.fleet
        self._thread = world.traffic.thread
        self._random = random.Random(f"crowd {seed}")
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_resting = False
        self._clients: list[TrafficClient] = []
        self.habits: Counter[str] = Counter()
        """What clients have done beside talking."""

    def enter(self, name: str, count: int) -> None:
        """Connect so many clients; every other one comes back under another id each time."""
        self._clients = self._fleet.add(*(f"{name}-{number}" for number in range(count)))
        for number, client in enumerate(self._clients):
            client.comes_back = True
            client.renames = number // 2 % 2 == 0

    def begin(self) -> None:
        """Let all of them live."""
        self._is_resting = False
        self._thread.call(self._begin)

    def rest(self) -> None:
        """Let nobody begin anything any more; who has left still comes back."""
        self._is_resting = True
        self._thread.run(self._rest())

    def say_one_thing(self) -> None:
        """Let every client that is connected send one more message."""
        self._fleet.send(*(client for client in self._clients if client.is_open))

    def leave(self) -> None:
        """Let everybody go for good."""
        self._fleet.stop(*self._clients)
        self._fleet.close(*(client for client in self._clients if client.is_open))

    def _begin(self) -> None:
        for client in self._clients:
            self._start(self._live(client))
        for _ in range(PUSHERS):
            self._start(self._push_on())

    def _start(self, life: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(life)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _rest(self) -> None:
        await asyncio.gather(*self._tasks)

    # Clients.

    async def _live(self, client: TrafficClient) -> None:
        loop = asyncio.get_running_loop()
        said_at = loop.time()
        while not self._is_resting:
            await asyncio.sleep(self._random.expovariate(MESSAGES_PER_S))
            if self._is_resting or not client.is_open or client.stay.left:
                continue
            habit = self._choose_habit()
            if habit:
                self.habits[habit] += 1
                await self._follow(client, habit)
            elif self._may_speak(client, loop.time() - said_at):
                client.send()
                said_at = loop.time()

    def _choose_habit(self) -> str:
        chance = self._random.random()
        for habit in HABITS:
            chance -= habit.chance
            if chance < 0:
                return habit.name
        return ""

    async def _follow(self, client: TrafficClient, habit: str) -> None:
        if habit == "close":
            client.close()
        elif habit == "be deaf":
            client.read_on(False)
            await asyncio.sleep(self._random.uniform(0.5, _LONGEST_DEAFNESS_S))
            client.read_on(True)
        else:
            client.hang_up(reset=habit == "reset")

    def _may_speak(self, client: TrafficClient, silent_s: float) -> bool:
        if client.unsent_bytes > MOST_UNSENT_BYTES:
            return False
        return client.stay.unanswered < MOST_UNANSWERED or silent_s > _STUCK_S

    # Pushes.

    async def _push_on(self) -> None:
        pusher = self._world.traffic.pusher
        past: list[str] = []
        while not self._is_resting:
            await asyncio.sleep(self._random.expovariate(1 / PUSH_PAUSE_S))
            client = self._random.choice(self._clients)
            if past and self._random.random() < 0.02:
                client_id = self._random.choice(past)
            else:
                client_id = client.client_id
            await pusher.push(self._choose_port(client), client_id)
            past = [*past, client_id][-_PAST:]

    def _choose_port(self, client: TrafficClient) -> tuple[str, int]:
        """Choose any worker, or the one that the client was last at."""
        life = self._world.traffic.api.lives.get((client.client_id, client.stay.generation))
        if life is None or self._random.random() < 0.7:
            return self._world.gateway.pushes_address
        url = urlsplit(life.push_url)
        return url.hostname or "", url.port or 0
