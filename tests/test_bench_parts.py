"""The parts of a benchmark that need no system: frames, addresses, limits, shares, medians."""

from __future__ import annotations

import argparse
import ipaddress
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import SERVER, Protocol

pytest.importorskip("rich", reason="the extra `bench`")
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from bench_ import addresses, arguments, frames, messages
from bench_.crowd import shares
from bench_.machine import Machine
from bench_.measure import Rounds

MACHINE = Machine(cores=2, memory_kb=24 << 20, files=20_000, system_files=2_000_000, ports=28_232)


# Frames


@pytest.mark.parametrize("size", [1, 30, 125, 126, 1_024, 65_535, 65_536, 100_000])
def test_a_websocket_server_reads_what_a_client_says(size: int) -> None:
    server = Protocol(SERVER, max_size=None)
    server.receive_data(frames.client_frame(frames.question(size)))
    [frame] = server.events_received()
    assert isinstance(frame, Frame)
    assert frame.opcode is Opcode.TEXT
    assert frame.data == frames.question(size)
    assert len(frame.data) == size


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_536])
def test_a_frame_is_found_in_front_of_other_bytes(size: int) -> None:
    payload = frames.answer(size)
    frame = frames.server_frame(payload)
    begin, end = frames.split_frame(frame + b"more") or (0, 0)
    assert frame[begin:end] == payload
    assert end == len(frame)


def test_a_head_that_is_not_whole_is_none() -> None:
    frame = frames.server_frame(frames.answer(65_536))
    assert [frames.split_frame(frame[:length]) for length in range(10)] == [None] * 10


def test_answers_are_what_the_api_puts_together_from_units() -> None:
    unit = frames.answer_unit()
    assert len(unit) == frames.UNIT
    assert frames.answer(3 * frames.UNIT + 5) == unit * 3 + unit[:5]


# Addresses


@given(st.integers(1, 1_000_000), st.integers(0, 10**9))
def test_addresses_are_of_loopback_and_differ(connections: int, offset: int) -> None:
    found = addresses.sources(connections, offset)
    assert len(set(found)) == len(found)
    assert all(ipaddress.IPv4Address(address).is_loopback for address in found)


def test_no_address_needs_more_ports_than_there_are() -> None:
    assert len(addresses.sources(16_000, 0, each=8_000)) == 2
    assert len(addresses.sources(16_001, 0, each=8_000)) == 3
    assert 1_000_000 / len(addresses.sources(1_000_000, 0)) < addresses.ports_per_address()


# Limits


def test_workers_leave_room_for_what_is_not_a_client() -> None:
    for clients in (1, 15_000, 100_000, 1_000_000):
        workers = MACHINE.workers_for(clients)
        assert clients / workers <= 0.85 * (MACHINE.files - 1_500)
        assert MACHINE.workers_for(clients) >= 1


def test_generators_stay_below_the_file_limit() -> None:
    assert MACHINE.processes_for(18_000) == 1
    assert MACHINE.processes_for(18_001) == 2
    assert MACHINE.processes_for(1_000_000) == 56


def test_a_small_file_limit_still_gives_workers() -> None:
    small = Machine(cores=1, memory_kb=1 << 20, files=1_024, system_files=100_000, ports=28_232)
    assert small.generator_clients == 524
    assert small.workers_for(1_000) > 1


def test_too_many_clients_are_cut_down(capsys: pytest.CaptureFixture[str]) -> None:
    assert MACHINE.fit_clients(10_000) == 10_000
    assert capsys.readouterr().err == ""
    assert MACHINE.fit_clients(5_000_000) == MACHINE.connections < 5_000_000
    assert "5,000,000 clients are too many" in capsys.readouterr().err


def test_too_few_workers_become_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert MACHINE.fit_workers(0, 100_000) == MACHINE.workers_for(100_000)
    assert MACHINE.fit_workers(32, 100_000) == 32
    assert capsys.readouterr().err == ""
    assert MACHINE.fit_workers(2, 100_000) == MACHINE.workers_for(100_000)
    assert "2 workers are too few" in capsys.readouterr().err


# Shares


@given(st.integers(0, 10**6), st.integers(1, 60))
def test_shares_are_even_and_lose_nothing(total: int, parts: int) -> None:
    found = list(shares(total, parts))
    assert sum(found) == total
    assert len(found) == parts
    assert max(found) - min(found) <= 1


# Rounds


def test_rows_have_medians_and_the_ratio_of_rounds_that_followed_each_other() -> None:
    rounds = Rounds()
    for ours, theirs in ((10.0, 20.0), (30.0, 40.0), (12.0, 20.0)):
        rounds.add("gateway", {"cpu_us": ours})
        rounds.add("nchan", {"cpu_us": theirs})
    gateway, nchan = rounds.rows("messages", {"clients": 1})
    assert gateway.figures == {"cpu_us": 12, "cpu_us_ratio": 0.6}
    assert gateway.spread == {"cpu_us": (10, 30)}
    assert nchan.figures == {"cpu_us": 20}


# Options of bench messages


def options(line: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    messages.add_arguments(parser)
    return parser.parse_args(line.split())


def test_without_options_it_is_the_standard_set() -> None:
    assert messages.loads(options()) == list(messages.STANDARD)


def test_lists_give_one_load_each() -> None:
    found = messages.loads(options("--in-flight 1,64 --bytes 30,1024"))
    assert [(one.clients, one.in_flight, one.bytes_each) for one in found] == [
        (1, 1, 30),
        (256, 64, 30),
        (1, 1, 1_024),
        (256, 64, 1_024),
    ]


def test_a_rate_alone_is_no_closed_loop() -> None:
    [one] = messages.loads(options("--rate 8000"))
    assert (one.clients, one.rate, one.in_flight) == (4_000, 8_000, 0)


def test_no_more_in_flight_than_clients() -> None:
    [one] = messages.loads(options("--clients 10 --in-flight 64"))
    assert one.in_flight == 10


def test_an_unknown_system_is_named() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no such system: apache"):
        arguments.names("gateway,apache")


def test_nothing_and_less_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        arguments.integers("0")
