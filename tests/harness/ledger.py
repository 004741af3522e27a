"""Settle what clients and API have seen of the same traffic: loss, duplicate and disorder show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from .traffic_api import Life
from .traffic_clients import Stay, number_of
from .traffic_pushes import PushRecord

NOT_DELIVERED = frozenset({400, 401, 404, 412, 413, 429, 503})
"""Answers to a push that say that the client did not get it."""
UNKNOWN = frozenset({0, 504})
"""Answers, or none, that leave open whether it did."""


WORKER_LOST = "worker lost"


@dataclass
class Account:
    """Hold one part of the ledger: how many of each kind, and what must not be."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def note(self, kind: str, *details: object, problem: bool = False) -> None:
        """Count one of a kind; a problem is told with its details, the first few of them."""
        self.counts[kind] += 1
        if problem and self.counts[kind] <= 5:
            self.problems.append(f"{kind}: {', '.join(map(str, details))}")

    def limit(self, kind: str, most: int) -> None:
        """Complain when there are more of a kind than there may be."""
        if self.counts[kind] > most:
            self.problems.append(f"{kind}: {self.counts[kind]}, at most {most} may be")


class Ledger:
    """Compare both sides.

    Args:
        lives: what the API was told of each connection.
        stays: what the clients saw of each.
        pushes: what the API pushed, and with which outcome.
        may_give_up: messages that the gateway may have given up, which the API never processed.
        may_repeat: messages that may have been processed twice.
        may_be_unread: pushes with 200 whose client's connection broke before it read them.
    """

    def __init__(
        self,
        lives: Iterable[Life],
        stays: Iterable[Stay],
        pushes: Iterable[PushRecord] = (),
        *,
        may_give_up: int = 0,
        may_repeat: int = 0,
        may_be_unread: int = 0,
    ) -> None:
        self._lives = {(life.client_id, life.generation): life for life in lives}
        self._stays = list(stays)
        self._records = list(pushes)
        self._may_give_up = may_give_up
        self._may_repeat = may_repeat
        self._may_be_unread = may_be_unread

    @cached_property
    def messages(self) -> Account:
        """What became of each message."""
        return self._settle_messages(self._may_give_up, self._may_repeat)

    @cached_property
    def disconnects(self) -> Account:
        """What became of each connection."""
        return self._settle_disconnects()

    @cached_property
    def pushes(self) -> Account:
        """What became of each push."""
        return self._settle_pushes(self._may_be_unread)

    @property
    def accounts(self) -> list[Account]:
        """The parts, in the order in which they are read."""
        return [self.messages, self.disconnects, self.pushes]

    @property
    def problems(self) -> list[str]:
        """What does not balance."""
        return [f"{a.name}: {problem}" for a in self.accounts for problem in a.problems]

    def assert_balanced(self) -> None:
        """Fail unless everything balances."""
        assert not self.problems, "\n".join(self.problems)

    # Messages.

    def _settle_messages(self, may_give_up: int, may_repeat: int) -> Account:
        account = Account("messages")
        for stay in self._stays:
            for violation in stay.violations:
                account.note("violation", stay.client_id, violation, problem=True)
            if stay.status == 101:
                self._settle_stay(account, stay)
        account.limit("given up", may_give_up)
        account.limit("processed twice", may_repeat)
        return account

    def _settle_stay(self, account: Account, stay: Stay) -> None:
        who = f"{stay.client_id}/{stay.generation}"
        life = self._lives.get((stay.client_id, stay.generation))
        if life is None or not life.is_accepted:
            account.note("connected without the API's consent", who, problem=True)
            return
        account.counts["sent"] += stay.sent
        account.counts["answered"] += len(stay.answered)
        seen: set[int] = set()
        for sequence, body in life.posts:
            number = number_of(body)
            if number != stay.first + sequence - 1:
                account.note("swapped or skipped", who, sequence, number, problem=True)
            if number in seen:
                account.note("processed twice")
            elif seen and number < max(seen):
                account.note("out of order", who, number, problem=True)
            seen.add(number)
        account.counts["processed"] += len(seen)
        lost = self._lost_with_connection(stay, life, seen)
        account.counts["lost with the connection"] += lost
        account.counts["given up"] += stay.sent - len(seen) - lost
        if stay.answered != sorted(set(stay.answered)):
            account.note("answers out of order", who, stay.answered[-20:], problem=True)
        if strange := set(stay.answered) - seen:
            account.note("answered, never processed", who, sorted(strange)[:5], problem=True)

    def _lost_with_connection(self, stay: Stay, life: Life, seen: set[int]) -> int:
        """Count the last messages of a connection that ended before the gateway had read them.

        What came before a close frame was read, unless the worker was lost.
        """
        is_lost = any(reason == WORKER_LOST for _, reason in life.deletes)
        if not stay.has_ended or (stay.left == "close" and not is_lost):
            return 0
        return stay.last - max(seen, default=stay.first - 1) if stay.first else 0

    # Connects and disconnects.

    def _settle_disconnects(self) -> Account:
        account = Account("connections")
        stays = {(stay.client_id, stay.generation): stay for stay in self._stays}
        youngest: dict[str, int] = {}
        for life in self._lives.values():
            if life.is_accepted:
                youngest[life.client_id] = max(life.generation, youngest.get(life.client_id, 0))
        for key, life in self._lives.items():
            who = f"{life.client_id}/{life.generation}"
            stay = stays.get(key)
            if not life.is_accepted:
                if life.deletes:
                    account.note("DELETE of one that was not accepted")
                continue
            account.counts["accepted"] += 1
            if stay is not None and stay.is_open:
                account.note("open")
                if life.deletes:
                    account.note("DELETE of an open one", who, life.deletes, problem=True)
            elif life.deletes:
                account.note("DELETE")
                account.counts["further DELETEs"] += len(life.deletes) - 1
                account.counts["worker lost"] += life.deletes[0][1] == WORKER_LOST
            elif stay is not None and stay.close_code == 4008:
                account.note("replaced (4008)")
            elif youngest[life.client_id] > life.generation:
                account.note("came back before its end was reported")
            else:
                account.note("no DELETE", who, stay, problem=True)
        return account

    # Pushes.

    def _settle_pushes(self, may_be_unread: int) -> Account:
        account = Account("pushes")
        received = Counter(number for stay in self._stays for number in stay.pushes)
        broken = {stay.client_id for stay in self._stays if stay.has_ended}
        for record in self._records:
            account.note(f"{record.status or 'no answer'}")
            count = received.pop(record.number, 0)
            if count > 1:
                account.note("received twice", record, problem=True)
            elif record.status == 200 and not count and record.client_id in broken:
                account.note("200, connection broke")
            elif record.status == 200 and not count:
                account.note("200, not received", record, problem=True)
            elif record.status in NOT_DELIVERED and count:
                account.note(f"{record.status}, but received", record, problem=True)
            elif record.status in UNKNOWN and count:
                account.note(f"{record.status or 'no answer'}, and received")
            elif record.status not in UNKNOWN | NOT_DELIVERED | {200}:
                account.note("strange answer", record, problem=True)
        for number in received:
            account.note("received, never pushed", number, problem=True)
        account.limit("200, connection broke", may_be_unread)
        return account
