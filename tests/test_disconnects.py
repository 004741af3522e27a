"""Run the scripts of the disconnects in a real Valkey: nothing is lost, and nothing comes twice."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, cast

import pytest
from harness.disconnect_store import BORN, LEASE_MS, Store, lost
from harness.valkey import ValkeyProcess
from harness.waiting import until
from redis import Redis
from redis.exceptions import ResponseError
from ws2api.gateway.disconnects import BACK_S, LEASES, OWE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    with ValkeyProcess(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def store(server: ValkeyProcess) -> Iterator[Store]:
    with Redis.from_url(server.url) as redis:
        redis.flushall()
        yield Store(redis)


class TestWhoIsDead:
    def test_a_worker_whose_lease_has_run_out(self, store: Store) -> None:
        store.open("w-1", "ann")
        store.expire("w-1")
        assert store.take_over("w-1") == [1, 0, 0]
        assert store.owed == [lost("ann")]

    def test_a_worker_that_is_known_to_be(self, store: Store) -> None:
        store.renew("w-1")
        store.open("w-1", "ann")
        assert store.take_over("w-1", known=True) == [1, 0, 0]
        assert store.owed == [lost("ann")]
        assert not store.keys_of("w-1")

    def test_a_worker_that_has_ended(self, store: Store) -> None:
        store.redis.zadd(store.key(LEASES), {"w-1": 0})
        store.end("w-1", ("ann", BORN, 1001, "going away"))
        assert store.take_over("w-1") == [1, 0, 0]
        assert store.owed == [("ann", BORN, 1001, "going away")]
        assert not store.keys_of("w-1")

    def test_not_one_that_lives(self, store: Store) -> None:
        store.renew("w-1")
        store.open("w-1", "ann")
        assert store.take_over("w-1") is None
        assert not store.owed
        assert store.redis.exists(store.key("c:ann"))

    def test_not_one_that_has_no_lease(self, store: Store) -> None:
        """Another reaper was faster; if the worker lives, it is about to take its lease again."""
        store.open("w-1", "ann")
        assert store.take_over("w-1") is None
        assert not store.owed

    def test_not_one_that_renews_in_between(self, store: Store) -> None:
        for number in range(1000):
            store.open("w-1", f"client-{number}")
        store.expire("w-1")
        first = store.take_over("w-1")
        assert first is not None
        assert first[2] == 1
        assert store.renew("w-1")
        assert store.take_over("w-1") is None
        assert len(store.owed) == first[0]
        assert store.redis.hlen(store.key("w:w-1")) == 1000 - first[0]
        assert store.redis.scard(store.key("x:w-1")) == first[0]


class TestWhatIsLeft:
    def test_everything_is_taken(self, store: Store) -> None:
        store.open("w-1", "ann", BORN)
        store.ask("w-1", "bob", BORN + 1)
        store.end("w-1", ("cid", BORN + 2, 4000, "bye"))
        store.expire("w-1")
        assert store.take_over("w-1") == [3, 0, 0]
        assert sorted(store.owed) == [
            lost("ann"),
            lost("bob", BORN + 1),
            ("cid", BORN + 2, 4000, "bye"),
        ]
        assert not store.redis.exists(store.key("c:ann"), store.key("p:bob"))
        assert not store.redis.zscore(store.key(LEASES), "w-1")

    def test_of_others_nothing(self, store: Store) -> None:
        store.open("w-1", "ann")
        store.open("w-10", "bob")
        store.ask("w-10", "cid")
        store.renew("w-10")
        store.take_over("w-1", known=True)
        assert store.owed == [lost("ann")]
        assert store.redis.exists(store.key("c:bob"), store.key("p:cid")) == 2
        assert store.keys_of("w-10") == {store.key("w:w-10"), store.key("a:w-10"), LEASES}

    def test_of_nothing_only_the_lease(self, store: Store) -> None:
        store.expire("w-1")
        assert store.take_over("w-1") == [0, 0, 0]
        assert not store.redis.keys("*")

    @pytest.mark.parametrize("client_id", ["a%20b", "%c3%BC", "~._-", "x" * 255, "%%", "0"])
    def test_ids_stay_as_they_are(self, store: Store, client_id: str) -> None:
        store.open("w-1", client_id, BORN)
        store.ask("w-1", client_id, BORN + 1)
        store.end("w-1", (client_id, BORN - 1, 1000, "earlier"))
        store.take_over("w-1", known=True)
        assert sorted(store.owed) == [
            (client_id, BORN - 1, 1000, "earlier"),
            lost(client_id, BORN),
            lost(client_id, BORN + 1),
        ]

    @pytest.mark.parametrize(
        "reason",
        ["", " ", "two words", "  more  of them ", "1000 looks like a code", "größer 🎉", "é" * 61],
    )
    def test_reasons_stay_as_they_are(self, store: Store, reason: str) -> None:
        taken, parked = ("ann", BORN, 3999, reason), ("bob", BORN, 1000, reason)
        store.end("w-1", taken)
        store.take_over("w-1", known=True)
        store.park("w-2", parked)
        assert store.owed == [taken, parked]

    @pytest.mark.parametrize("count", [10_000, 100_000])
    def test_many_come_in_batches(self, store: Store, count: int) -> None:
        """Large enough for a batch to meet the gaps that the batches before have left."""
        for start in range(0, count, 10_000):
            numbers = range(start, start + 10_000)
            ids = {f"client-{number}": BORN + number for number in numbers}
            store.redis.hset(store.key("w:w-1"), mapping=ids)
        store.redis.mset({store.key(f"c:client-{n}"): f"w-1 {BORN + n}" for n in range(10_000)})
        for number in range(300):
            store.ask("w-1", f"asking-{number}")
            store.end("w-1", (f"ended-{number}", BORN, 1000, ""))
        store.expire("w-1")
        assert store.take_over_all("w-1") == (count + 600, 0)
        kinds = Counter(client_id.partition("-")[0] for client_id, _, _, _ in store.owed)
        assert kinds == {"client": count, "asking": 300, "ended": 300}
        assert len({client_id for client_id, _, _, _ in store.owed}) == count + 600
        assert not store.redis.keys(store.key("c:*"))

    def test_two_at_once_never_take_one_twice(self, server: ValkeyProcess, store: Store) -> None:
        ids = {f"client-{number}": BORN + number for number in range(10_000)}
        store.redis.hset(store.key("w:w-1"), mapping=ids)
        store.expire("w-1")
        together = threading.Barrier(4)

        def take(_: int) -> int:
            with Redis.from_url(server.url) as redis:
                together.wait()
                return Store(redis).take_over_all("w-1")[0]

        with ThreadPoolExecutor(4) as threads:
            moved = list(threads.map(take, range(4)))
        assert sum(moved) == 10_000
        assert {(client_id, generation) for client_id, generation, _, _ in store.owed} == set(
            ids.items()
        )
        assert len(store.owed) == 10_000


class TestDeciding:
    """The API may still be at work on a connect when the worker that asked it dies."""

    HOLD_MS: Final = 500

    def test_is_left_until_the_api_must_have_decided(self, store: Store) -> None:
        now_s, now_us = cast("tuple[int, int]", store.redis.time())
        young = now_s * 1_000_000 + now_us
        store.ask("w-1", "ann", young)
        store.ask("w-1", "bob", BORN)
        store.open("w-1", "cid", young)
        store.expire("w-1")
        assert store.take_over("w-1", known=True, hold_ms=self.HOLD_MS) == [2, 0, 1]
        assert store.take_over("w-1", known=True, hold_ms=self.HOLD_MS) == [0, 0, 0]
        assert sorted(store.owed) == [lost("bob"), lost("cid", young)]
        assert store.redis.zscore(store.key(LEASES), "w-1") == 0
        until(lambda: store.take_over("w-1", hold_ms=self.HOLD_MS) == [1, 0, 0])
        assert lost("ann", young) in store.owed
        assert not store.keys_of("w-1")

    def test_not_of_a_worker_that_may_live(self, store: Store) -> None:
        """Then its lease decides again later, and a renewal still saves it."""
        now_s, now_us = cast("tuple[int, int]", store.redis.time())
        store.ask("w-1", "ann", now_s * 1_000_000 + now_us)
        store.expire("w-1")
        assert store.take_over("w-1", hold_ms=60_000) == [0, 0, 0]
        assert store.redis.zscore(store.key(LEASES), "w-1") == 1
        store.renew("w-1")
        assert store.take_over("w-1", hold_ms=0) is None
        assert not store.owed


class TestWorkersThatMayComeBack:
    def test_its_connections_are_told_from_those_that_never_were(self, store: Store) -> None:
        store.open("w-1", "ann")
        store.ask("w-1", "bob")
        store.end("w-1", ("cid", BORN, 1000, "bye"))
        store.expire("w-1")
        store.take_over("w-1")
        assert sorted(store.redis.keys(store.key("g:*"))) == [b"ws2api:g:ann", b"ws2api:g:bob"]
        assert store.redis.get(store.key("g:ann")) == f"w-1 {BORN}".encode()
        assert BACK_S - 60 < cast(int, store.redis.ttl(store.key("g:ann"))) <= BACK_S

    def test_clients_that_are_known_to_be_elsewhere_are_not(self, store: Store) -> None:
        """A connect that was cut off in the middle, and made again at another host."""
        store.ask("w-1", "ann")
        store.open("w-2", "ann", BORN + 1)
        store.expire("w-1")
        assert store.take_over("w-1") == [0, 1, 0]
        assert not store.redis.exists(store.key("g:ann"))
        assert store.renew("w-1"), "but its worker has to let go of it"

    def test_those_of_a_worker_that_is_dead_are_gone(self, store: Store) -> None:
        store.open("w-1", "ann")
        store.renew("w-1")
        store.take_over("w-1", known=True)
        store.open("w-2", "bob")
        store.redis.zadd(store.key(LEASES), {"w-2": 0})
        store.take_over("w-2")
        assert not store.redis.keys(store.key("g:*"))


class TestFence:
    """What a worker sent before it was given up may come after it."""

    def test_a_dead_worker_adds_nothing_more(self, store: Store) -> None:
        store.renew("w-1")
        store.open("w-1", "ann")
        store.take_over("w-1", known=True)
        self._expect_fenced(store, 1)
        self._expect_fenced(store, 2)
        assert store.owed == [lost("ann")]
        assert not store.keys_of("w-1")
        assert 900 < cast(int, store.redis.ttl(store.key("i:w-1"))) <= 3600

    def test_nor_one_that_has_ended_by_itself(self, store: Store) -> None:
        store.redis.zadd(store.key(LEASES), {"w-1": 0})
        store.take_over("w-1")
        self._expect_fenced(store, 1)

    def test_one_that_lives_goes_on_with_its_next_connection(self, store: Store) -> None:
        store.renew("w-1", epoch=4)
        store.open("w-1", "ann")
        store.expire("w-1")
        for _ in range(2):
            store.take_over("w-1")
            store.redis.zadd(store.key(LEASES), {"w-1": 1})
        self._expect_fenced(store, 3)
        self._expect_fenced(store, 4)
        assert store.renew("w-1", epoch=5)
        store.call(OWE, "w-1", 5, f"cid {BORN}", "1000 bye")
        store.park("w-1", ("cid", BORN, 1000, "bye"), epoch=5)
        assert store.owed == [lost("ann"), ("cid", BORN, 1000, "bye")]
        self._expect_fenced(store, 4)
        assert store.redis.ttl(store.key("i:w-1")) == -1, "it stands for as long as it is needed"

    def test_a_younger_connection_makes_the_older_void(self, store: Store) -> None:
        store.renew("w-1", epoch=9)
        store.renew("w-1", epoch=10)
        self._expect_fenced(store, 9)
        store.renew("w-1", epoch=10)

    def test_a_lease_that_is_held_holds_nobody_off(self, store: Store) -> None:
        store.renew("w-1")
        assert store.take_over("w-1") is None
        store.renew("w-1")
        store.park("w-1", ("cid", BORN, 1000, "bye"))
        assert store.owed

    def test_a_redis_that_has_forgotten_everything_learns_the_epoch_anew(
        self, store: Store
    ) -> None:
        store.renew("w-1", epoch=3)
        store.redis.flushall()
        store.renew("w-1", epoch=3)
        self._expect_fenced(store, 2)

    def _expect_fenced(self, store: Store, epoch: int) -> None:
        before = self._all(store)
        for call in (
            lambda: store.renew("w-1", epoch=epoch),
            lambda: store.call(OWE, "w-1", epoch, f"bob {BORN}", "1000 bye"),
            lambda: store.park("w-1", ("bob", BORN, 1000, "bye"), epoch=epoch),
        ):
            with pytest.raises(ResponseError, match="FENCED"):
                call()
        assert self._all(store) == before

    def _all(self, store: Store) -> dict[bytes, bytes | None]:
        keys = cast("list[bytes]", store.redis.keys("*"))
        return {key: cast("bytes | None", store.redis.dump(key)) for key in keys}


class TestReconnected:
    @pytest.mark.parametrize("where", ["w-1", "w-2"])
    @pytest.mark.parametrize("kind", ["open", "ask", "end"])
    def test_a_client_that_is_back_gets_none(self, store: Store, where: str, kind: str) -> None:
        if kind == "end":
            store.end("w-1", ("ann", BORN, 1000, ""))
        else:
            getattr(store, kind)("w-1", "ann", BORN)
        store.redis.set(store.key("c:ann"), f"{where} {BORN + 1}")
        assert store.take_over("w-1", known=True) == [0, 1, 0]
        assert not store.owed
        assert store.redis.get(store.key("c:ann")) == f"{where} {BORN + 1}".encode()
        assert not store.keys_of("w-1")

    def test_an_older_connection_elsewhere_is_no_return(self, store: Store) -> None:
        """The API was asked about the younger one, and may have said ok: it must hear of its end,
        for it will not believe the end of the older one."""
        store.open("w-2", "ann", BORN)
        store.ask("w-1", "ann", BORN + 1)
        assert store.take_over("w-1", known=True) == [1, 0, 0]
        assert store.owed == [lost("ann", BORN + 1)]
        assert store.redis.get(store.key("c:ann")) == f"w-2 {BORN}".encode()

    def test_a_client_that_is_coming_back_gets_one(self, store: Store) -> None:
        """Nobody knows whether the API will let it in; its younger mark stays."""
        store.open("w-1", "ann", BORN)
        store.ask("w-2", "ann", BORN + 1)
        assert store.take_over("w-1", known=True) == [1, 0, 0]
        assert store.owed == [lost("ann")]
        assert store.redis.get(store.key("p:ann")) == f"w-2 {BORN + 1}".encode()


class TestGivenUp:
    def test_a_worker_that_lived_learns_whom_it_has_to_close(self, store: Store) -> None:
        store.open("w-1", "ann", BORN)
        store.ask("w-1", "bob", BORN + 1)
        store.end("w-1", ("cid", BORN + 2, 1000, ""))
        store.expire("w-1")
        store.take_over("w-1")
        assert store.given_up("w-1") == {("ann", BORN), ("bob", BORN + 1)}
        assert store.redis.ttl(store.key("x:w-1")) > 0
        assert store.renew("w-1")

    def test_of_each_connection_of_an_id(self, store: Store) -> None:
        store.open("w-1", "ann", BORN)
        store.ask("w-1", "ann", BORN + 1)
        store.expire("w-1")
        assert store.take_over_all("w-1") == (2, 0)
        assert store.given_up("w-1") == {("ann", BORN), ("ann", BORN + 1)}

    def test_also_of_clients_that_are_back(self, store: Store) -> None:
        store.open("w-1", "ann", BORN)
        store.redis.set(store.key("c:ann"), f"w-2 {BORN + 1}")
        store.expire("w-1")
        assert store.take_over("w-1") == [0, 1, 0]
        assert store.given_up("w-1") == {("ann", BORN)}

    @pytest.mark.parametrize("known", [True, False])
    def test_one_that_is_dead_for_sure_leaves_no_such_list(self, store: Store, known: bool) -> None:
        store.open("w-1", "ann")
        store.redis.zadd(store.key(LEASES), {"w-1": LEASE_MS if known else 0})
        store.take_over("w-1", known=known)
        assert not store.keys_of("w-1")

    def test_renewing_tells_nothing_else(self, store: Store) -> None:
        assert not store.renew("w-1")
        now_s, _ = cast("tuple[int, int]", store.redis.time())
        until_ms = cast("float", store.redis.zscore(store.key(LEASES), "w-1"))
        assert now_s * 1000 <= until_ms - LEASE_MS <= (now_s + 2) * 1000


class TestBound:
    def test_the_oldest_fall_off(self, store: Store) -> None:
        for number in range(7):
            store.park("w-1", (f"client-{number}", BORN, 1000, ""), bound=4)
        assert [client_id for client_id, _, _, _ in store.owed] == [
            f"client-{number}" for number in range(3, 7)
        ]
        assert store.dropped == 3

    def test_holds_for_a_lost_worker_too(self, store: Store) -> None:
        store.park("w-1", ("oldest", BORN, 1000, ""), bound=100)
        for number in range(1000):
            store.open("w-1", f"client-{number}")
        store.expire("w-1")
        moved = 0
        while (batch := store.take_over("w-1", bound=100)) is not None and batch[0]:
            moved += batch[0]
        assert moved == 1000
        assert len(store.owed) == 100
        assert store.dropped == 901

    def test_a_lower_one_than_before_takes_effect(self, store: Store) -> None:
        for number in range(10):
            store.park("w-1", (f"client-{number}", BORN, 1000, ""))
        store.park("w-1", ("last", BORN, 1000, ""), bound=1)
        assert store.owed == [("last", BORN, 1000, "")]
        assert store.dropped == 10

    def test_parking_strikes_off_what_the_worker_owed(self, store: Store) -> None:
        store.end("w-1", ("ann", BORN, 1000, "bye"))
        store.end("w-1", ("bob", BORN, 1000, "bye"))
        store.park("w-1", ("ann", BORN, 1000, "bye"))
        assert store.redis.hkeys(store.key("e:w-1")) == [f"bob {BORN}".encode()]
        assert store.owed == [("ann", BORN, 1000, "bye")]
