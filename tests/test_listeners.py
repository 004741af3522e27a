"""Bind real sockets, share them among slots and with nobody else."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
from ws2api.gateway.settings import Address, Settings
from ws2api.supervisor import listeners
from ws2api.supervisor.errors import StartError
from ws2api.supervisor.listeners import Listeners


def make_settings(**options: object) -> Settings:
    values: dict[str, object] = {
        "workers": 3,
        "listen": "127.0.0.1:0",
        "push_listen": "127.0.0.1:0",
        "admin_listen": "127.0.0.1:0",
    }
    return Settings(**{**values, **options})  # type: ignore[arg-type]


@pytest.fixture
def bound() -> Iterator[Listeners]:
    with closing(listeners.bind(make_settings())) as bound:
        yield bound


def all_sockets(bound: Listeners) -> list[socket.socket]:
    groups = [(slot.client, slot.push, slot.private_push) for slot in bound.slots]
    return [bound.admin, *(item for group in groups for item in group)]


def accepts(listener: socket.socket, timeout_s: float = 10.0) -> bool:
    ready, _, _ = select.select([listener], [], [], timeout_s)
    if ready:
        listener.accept()[0].close()
    return bool(ready)


def test_slots_share_the_port_that_the_kernel_chose(bound: Listeners) -> None:
    port = bound.client_address.port
    assert port != 0
    assert {slot.client.getsockname() for slot in bound.slots} == {("127.0.0.1", port)}
    push_port = bound.push_address.port
    assert {slot.push.getsockname() for slot in bound.slots} == {("127.0.0.1", push_port)}
    assert bound.admin.getsockname() == ("127.0.0.1", bound.admin_address.port)


def test_connections_reach_every_slot(bound: Listeners) -> None:
    waiting = {slot.client for slot in bound.slots}
    # The kernel chooses by a hash of the connection's addresses; each slot gets a third.
    for _ in range(500):
        with socket.create_connection(("127.0.0.1", bound.client_address.port)):
            ready, _, _ = select.select([slot.client for slot in bound.slots], [], [], 10)
            for listener in ready:
                listener.accept()[0].close()
                waiting.discard(listener)
        if not waiting:
            return
    pytest.fail(f"{len(waiting)} slots got no connection")


def test_private_socket_is_reached_under_its_url_alone(bound: Listeners) -> None:
    urls = [slot.push_url for slot in bound.slots]
    assert len(set(urls)) == 3
    host, port = urls[1].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))):
        assert accepts(bound.slots[1].private_push)
    assert not accepts(bound.slots[0].private_push, 0)
    assert not accepts(bound.slots[2].private_push, 0)


def test_sockets_do_not_block_and_are_not_inherited_by_programs(bound: Listeners) -> None:
    for listener in all_sockets(bound):
        assert not listener.getblocking()
        assert not os.get_inheritable(listener.fileno())


@pytest.mark.parametrize("option", ["listen", "push_listen", "admin_listen"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_second_supervisor_is_refused(bound: Listeners, option: str, host: str) -> None:
    address = {
        "listen": bound.client_address,
        "push_listen": bound.push_address,
        "admin_listen": bound.admin_address,
    }[option]
    with pytest.raises(StartError) as caught:
        listeners.bind(make_settings(**{option: f"{host}:{address.port}"}))
    flag = option.replace("_", "-")
    assert str(caught.value) == f"{flag}: cannot listen on {host}:{address.port}: port in use"


def test_nothing_stays_open_after_a_failure() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as foreign:
        taken = foreign.getsockname()[1]
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        with pytest.raises(StartError):
            listeners.bind(
                make_settings(listen=f"127.0.0.1:{port}", admin_listen=f"127.0.0.1:{taken}")
            )
    socket.create_server(("127.0.0.1", port)).close()


def test_port_is_free_again_in_spite_of_time_wait() -> None:
    with closing(listeners.bind(make_settings(workers=1))) as first:
        port = first.client_address.port
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert accepts(first.slots[0].client)  # which closes first: TIME_WAIT is on this side
            assert client.recv(1) == b""
    listeners.bind(make_settings(listen=f"127.0.0.1:{port}")).close()


def test_slot_keeps_its_own(bound: Listeners) -> None:
    own = bound.keep_slot(1)
    kept = {own.client, own.push, own.private_push}
    assert all((item.fileno() >= 0) == (item in kept) for item in all_sockets(bound))


def test_admin_keeps_its_own(bound: Listeners) -> None:
    admin = bound.keep_admin()
    assert all((item.fileno() >= 0) == (item is admin) for item in all_sockets(bound))


def test_unusable_address_is_one_line() -> None:
    with pytest.raises(StartError, match=r"^listen: cannot listen on 192\.0\.2\.1:0: Cannot"):
        listeners.bind(make_settings(listen="192.0.2.1:0"))


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ({}, "127.0.0.1"),
        ({"push_advertise": "gw.example"}, "gw.example"),
        ({"push_listen": "0.0.0.0:0"}, socket.gethostname()),
        ({"push_listen": "0.0.0.0:0", "push_advertise": "10.1.2.3"}, "10.1.2.3"),
    ],
)
def test_push_url_names_a_host_that_the_api_reaches(options: dict[str, str], host: str) -> None:
    with closing(listeners.bind(make_settings(workers=1, **options))) as bound:
        slot = bound.slots[0]
        assert slot.push_url == f"http://{host}:{slot.private_push.getsockname()[1]}"


def test_listens_on_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with closing(listeners.bind(make_settings(listen="[::1]:0", push_listen="[::1]:0"))) as bound:
        assert bound.client_address == Address("::1", bound.slots[0].client.getsockname()[1])
        assert bound.slots[0].push_url.startswith("http://[::1]:")
        with socket.create_connection(("::1", bound.client_address.port)):
            pass
