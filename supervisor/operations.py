"""Do what an operator asks of the admin port: drain, replace, profile."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Final

from ws2api.gateway import counters as c
from ws2api.gateway.profiling import KINDS, file_of, remove
from ws2api.gateway.settings import Settings

from .errors import RequestError
from .shared_state import SharedState

MOST_PROFILE_S: Final = 300.0
_WRITE_S: Final = 30.0
"""Time that a worker may take to begin with a profile and to write it."""
_POLL_S: Final = 0.1


class Operations:
    """Pass an operator's wishes on to the supervisor and the workers.

    Args:
        shared: the supervisor and the workers read there what is wanted.
        settings: the options.
    """

    def __init__(self, shared: SharedState, settings: Settings) -> None:
        self._shared = shared
        self._counters = shared.counters
        self._settings = settings
        self._supervisor = os.getppid()
        # Processes of which a profile is being made.
        self._profiled: set[int] = set()
        self._call_off_profiles()

    def _call_off_profiles(self) -> None:
        """Forget what a former admin process asked for: nobody waits for it any more."""
        counters = self._counters
        for worker in range(counters.workers):
            for which in range(c.BANKS):
                bank = counters.bank(worker, which)
                bank[c.PROFILE_MS] = 0
                remove(file_of(self._shared.profiles, bank[c.PID], bank[c.PROFILE_WANTED]))

    def set_draining(self, on: bool) -> None:
        """Let /readyz say no, or what it finds."""
        self._counters.host[c.HOST_DRAINING] = int(on)

    def reload(self) -> None:
        """Have all workers replaced, with the settings read again, as SIGHUP does."""
        self._tell(signal.SIGHUP)

    def replace(self, worker: int) -> None:
        """Have one worker replaced.

        Raises:
            RequestError: if there is none of that number, or others are being replaced.
        """
        self._check(worker)
        host = self._counters.host
        if host[c.ROLLING]:
            raise RequestError(409, "workers are being replaced already")
        host[c.REPLACE_WANTED + worker] += 1
        self._tell(signal.SIGUSR2)

    async def profile(self, worker: int, kind: str, seconds: float) -> bytes:
        """Profile a worker, and return the file.

        Args:
            kind: one of profiling.KINDS.

        Raises:
            RequestError: if that is not possible.
        """
        self._check(worker)
        if kind not in KINDS:
            raise RequestError(400, f"kind must be one of {', '.join(KINDS)}")
        if not 1 <= seconds <= MOST_PROFILE_S:
            raise RequestError(400, f"seconds must be from 1 to {MOST_PROFILE_S:g}")
        option = {"cpu": "cpuprofile", "memory": "memprofile"}[kind]
        if getattr(self._settings, option) is not None:
            raise RequestError(409, f"it is being profiled by --{option} already")
        slot = self._counters.current(worker)
        if slot[c.STATE] != c.STATE_SERVING:
            raise RequestError(503, "it does not serve")
        pid = slot[c.PID]
        if pid in self._profiled:
            raise RequestError(409, "it is being profiled already")
        self._profiled.add(pid)
        try:
            return await self._fetch_profile(slot, kind, seconds)
        finally:
            self._profiled.discard(pid)

    async def _fetch_profile(self, slot: memoryview, kind: str, seconds: float) -> bytes:
        pid = slot[c.PID]
        slot[c.PROFILE_KIND], slot[c.PROFILE_MS] = KINDS[kind], int(seconds * 1000)
        slot[c.PROFILE_WANTED] += 1
        path = file_of(self._shared.profiles, pid, slot[c.PROFILE_WANTED])
        try:
            async with asyncio.timeout(seconds + _WRITE_S):
                while not path.exists():
                    has_ended, has_failed = slot[c.PID] != pid, not slot[c.PROFILE_MS]
                    if path.exists():  # written in between
                        break
                    if has_ended:
                        raise RequestError(503, "it has ended meanwhile")
                    if has_failed:
                        raise RequestError(503, "it could not do it; the gateway's log says why")
                    await asyncio.sleep(_POLL_S)
                return await asyncio.to_thread(path.read_bytes)
        except TimeoutError:
            raise RequestError(503, "it did not write a profile in time") from None
        except OSError as error:
            raise RequestError(503, f"its profile cannot be read: {error.strerror}") from None
        finally:
            if slot[c.PID] == pid:  # else the words are another's by now
                slot[c.PROFILE_MS] = 0  # calls off what it may still be about
            remove(path)

    def _check(self, worker: int) -> None:
        if worker >= self._counters.workers:
            raise RequestError(404, "no such worker")

    def _tell(self, number: signal.Signals) -> None:
        if os.getppid() != self._supervisor:
            raise RequestError(503, "the supervisor has ended")
        os.kill(self._supervisor, number)
