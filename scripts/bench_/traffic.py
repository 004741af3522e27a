"""Say when clients connect, send and close: in a closed loop, paced, or not at all."""

from __future__ import annotations

from collections import deque

from bench_.clients import Clients, Errand, Traffic, clock
from bench_.plan import OPEN
from bench_.timer import SHORTEST_NS


class ClosedLoop(Traffic):
    """Keep a number of messages in flight: an answer makes the client idle for longest send.

    Args:
        clients: who sends.
        in_flight: at most as many as there are clients.
    """

    def __init__(self, clients: Clients, in_flight: int) -> None:
        self._clients = clients
        self._ring = deque(clients.open_fds)
        self._running = True
        now = clock()
        for _ in range(min(in_flight, len(self._ring))):
            self._send(now)

    def answered(self, fd: int) -> None:
        now = clock()
        if self._clients.note_answer(fd, now):
            self._ring.append(fd)
            if self._running:
                self._send(now)

    def opened(self, fd: int) -> None:
        self._ring.append(fd)

    def stop(self) -> None:
        self._running = False

    def _send(self, now: int) -> None:
        clients, ring = self._clients, self._ring
        while ring:
            fd = ring.popleft()
            if clients.kinds[fd] == OPEN:
                clients.send(fd, now)
                return


class Paced(Traffic):
    """Let each client send at an interval, all of them evenly spaced in time.

    The loop is open: the latency counts from the time at which the message was due, so a late
    start is not hidden. A client whose last message is still unanswered is passed over, which
    counts as late: such a system has not kept up.

    Args:
        clients: who sends, in the order of opening; those that open later join in.
        interval_s: from one message of a client to its next one.
        phase: 0 to 1, so that several processes do not send at the same moments.
    """

    def __init__(self, clients: Clients, interval_s: float, phase: float) -> None:
        self._clients = clients
        self._interval_ns = interval_s * 1e9
        self._turn = 0
        self._running = True
        self._due_ns = clock() + self._gap_ns() * phase
        self._woken_ns = 0.0
        self._arrange_wake()

    def answered(self, fd: int) -> None:
        self._clients.note_answer(fd, clock())

    def tick(self) -> None:
        now = clock()
        gap_ns = self._gap_ns()
        # What was due when there were fewer clients, or none, is due sooner with those of now.
        self._due_ns = min(self._due_ns, now + gap_ns)
        if self._due_ns > now or not self._running:
            return
        clients = self._clients
        count = len(clients.open_fds)
        if not count:
            self._due_ns = now + gap_ns
        while self._due_ns <= now and count:
            self._turn = self._turn + 1 if self._turn + 1 < count else 0
            fd = clients.open_fds[self._turn]
            if clients.since_ns[fd]:
                clients.late += 1
            elif clients.kinds[fd] == OPEN:
                clients.send(fd, int(self._due_ns))
            self._due_ns += gap_ns
        self._arrange_wake()

    def stop(self) -> None:
        self._running = False
        self._clients.wake_every(0, self)

    def _gap_ns(self) -> float:
        return self._interval_ns / max(1, len(self._clients.open_fds))

    def _arrange_wake(self) -> None:
        """Follow the number of clients, but not each single one."""
        gap_ns = self._gap_ns()
        if not 0.9 < gap_ns / (self._woken_ns or 1) < 1.1:
            self._woken_ns = gap_ns
            # An idle loop still has to see soon that clients have come.
            self._clients.wake_every(min(int(gap_ns), 10_000_000), self)


class Connecting(Errand):
    """Open connections, a number of them under way at once, or at a rate, or both.

    Args:
        clients: whose numbers are used up.
        count: how many.
        at_once: connects under way at most.
        rate: connects per second; 0 for as fast as `at_once` lets them.
    """

    def __init__(self, clients: Clients, count: int, at_once: int, rate: float) -> None:
        self._clients = clients
        self._left = count
        self._at_once = at_once
        self._gap_ns = 1e9 / rate if rate else 0.0
        self._due_ns: float = clock()
        clients.wake_every(int(self._gap_ns) or SHORTEST_NS, self)

    def tick(self) -> None:
        clients, handshakes = self._clients, self._clients.handshakes
        # A storm is begun in parts, so that answers are read meanwhile.
        for _ in range(64):
            if handshakes.under_way >= self._at_once:
                return  # the next answer turns the loop
            if self._gap_ns:
                if self._due_ns > clock():
                    return
                self._due_ns += self._gap_ns
            if not self._left or not handshakes.begin():
                clients.wake_every(0, self)
                clients.errand = Errand()
                return
            self._left -= 1


class Closing(Errand):
    """Close all connections, a number of them under way at once.

    Args:
        clients: all that are open.
        at_once: closes under way at most.
    """

    def __init__(self, clients: Clients, at_once: int) -> None:
        self._clients = clients
        self._at_once = at_once
        self._fds = iter(clients.open_fds.tolist())
        del clients.open_fds[:]

    def tick(self) -> None:
        clients = self._clients
        while clients.closing < self._at_once:
            fd = next(self._fds, None)
            if fd is None:
                break
            clients.close_one(fd)
