"""Hold the names of what ends connections to what can really end them."""

from __future__ import annotations

import itertools

import pytest
from ws2api.gateway import causes, errors
from ws2api.gateway import counters as c
from ws2api.gateway.counters import Counters

ALL_CODES = range(1000, 5000)


@pytest.mark.parametrize("cause", causes.CODES)
def test_every_code_has_a_counter_under_every_cause(cause: str) -> None:
    for code in (0, *ALL_CODES, 65535):
        assert c.METRICS[c.of_close(code, cause)].labels == {
            "code": causes.label_of(code, cause),
            "cause": cause,
        }


@pytest.mark.parametrize(
    ("code", "cause", "label"),
    [
        (1000, causes.CLIENT, "1000"),
        (1005, causes.CLIENT, "1005"),
        (3000, causes.CLIENT, "3xxx"),
        (4999, causes.API, "4xxx"),
        (1004, causes.CLIENT, "other"),
        (1006, causes.LOST, "1006"),
        (4008, causes.REPLACED, "4008"),
        (4009, causes.REPLACED, "other"),
        (1002, causes.PROTOCOL, "1002"),
        (1000, causes.PROTOCOL, "other"),
        (1006, causes.WORKER_LOST, "1006"),
    ],
)
def test_label_of_a_code(code: int, cause: str, label: str) -> None:
    assert causes.label_of(code, cause) == label


def test_labels_are_few() -> None:
    labels = {
        (cause, causes.label_of(code, cause))
        for cause, code in itertools.product(causes.CODES, (0, *ALL_CODES, 65535))
    }
    assert len(labels) <= len(c.CLOSES) < 60


def test_codes_of_our_own_choice_are_told_apart() -> None:
    for code, cause in causes.OF_OUR_CODES.items():
        assert causes.label_of(code, cause) == str(code)


def test_every_error_has_a_cause_that_is_counted() -> None:
    classes = [errors.ApiError, *errors.ApiError.__subclasses__()]
    assert {each.cause for each in classes} | {causes.STATUS} == set(causes.OF_REQUESTS)
    assert set(c.ERRORS) == set(causes.OF_REQUESTS)


# A worker that dies tells nobody: its books are closed for it.


def test_connections_of_a_dead_worker_count_as_lost_with_it() -> None:
    counters = Counters(1)
    bank = counters.bank(0, 1)
    bank[c.CONNECTIONS_OPENED] = 10
    bank[c.CONNECTIONS_CLOSED] = bank[c.of_close(1000, causes.CLIENT)] = 4
    for _ in range(2):  # the second time there is nothing left to count
        counters.settle(0, 1)
        assert bank[c.of_close(1006, causes.WORKER_LOST)] == 6
        assert sum(bank[index] for index in c.CLOSES.values()) == bank[c.CONNECTIONS_CLOSED] == 10


def test_requests_of_a_dead_worker_count_as_abandoned() -> None:
    counters = Counters(1)
    bank = counters.bank(0, 0)
    bank[c.REQUESTS_STARTED], bank[c.REQUESTS_SUCCEEDED], bank[c.REQUESTS_FAILED] = 100, 90, 3
    for _ in range(2):
        counters.settle(0, 0)
        assert bank[c.ERRORS[causes.ABANDONED]] == 7
