"""Bind every listening socket once, for as long as the supervisor lives.

Each worker slot has its own socket in a SO_REUSEPORT group per port, so that the kernel spreads
connections over the workers without waking all of them for each. The supervisor keeps them open:
while a worker is replaced, connections wait in the slot's accept queue instead of being refused.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from ws2api.gateway.settings import Address, Settings

from .errors import StartError

BACKLOG: Final = 4096
"""Connections that may wait to be accepted; the kernel caps it (net.core.somaxconn)."""


@dataclass(frozen=True, slots=True)
class SlotSockets:
    """Hold what one worker accepts from.

    Attributes:
        client: one of the group on the client port.
        push: one of the group on the push port.
        private_push: on a port of its own, to reach this very worker.
        push_url: where private_push is reached, without a trailing slash.
    """

    client: socket.socket
    push: socket.socket
    private_push: socket.socket
    push_url: str

    def close(self) -> None:
        """Close all three in this process."""
        for item in (self.client, self.push, self.private_push):
            item.close()


@dataclass(frozen=True, slots=True)
class Listeners:
    """Hold the sockets of all worker slots and of the admin process.

    Attributes:
        slots: per worker.
        admin: the admin process's.
        client_address: the client port's, with the port that the kernel chose for port 0; the
            other two addresses likewise.
    """

    slots: tuple[SlotSockets, ...]
    admin: socket.socket
    client_address: Address
    push_address: Address
    admin_address: Address

    def keep_slot(self, index: int) -> SlotSockets:
        """Return one worker's sockets and close all others in this process, a forked child."""
        for other, slot in enumerate(self.slots):
            if other != index:
                slot.close()
        self.admin.close()
        return self.slots[index]

    def keep_admin(self) -> socket.socket:
        """Return the admin socket and close all others in this process, a forked child."""
        for slot in self.slots:
            slot.close()
        return self.admin

    def close_clients(self) -> None:
        """Take no more clients; the workers close their ends of the same sockets."""
        for slot in self.slots:
            slot.client.close()

    def close(self) -> None:
        """Close every socket."""
        self.keep_admin().close()


def bind(settings: Settings) -> Listeners:
    """Bind and listen on everything that the settings name.

    Raises:
        StartError: if an address is in use or cannot be bound; nothing stays open then.
    """
    with ExitStack() as undo:
        clients = _bind_group("listen", settings.listen, settings.workers, undo)
        pushes = _bind_group("push-listen", settings.push_listen, settings.workers, undo)
        admin = _bind("admin-listen", settings.admin_listen, undo)
        host = _push_host(settings)
        slots = []
        for client, push in zip(clients, pushes, strict=True):
            private = _bind("push-listen", Address(settings.push_listen.host, 0), undo)
            push_url = f"http://{host}:{private.getsockname()[1]}"
            slots.append(SlotSockets(client, push, private, push_url))
        undo.pop_all()
    return Listeners(
        tuple(slots),
        admin,
        _with_port_of(clients[0], settings.listen),
        _with_port_of(pushes[0], settings.push_listen),
        _with_port_of(admin, settings.admin_listen),
    )


def _bind_group(option: str, address: Address, size: int, undo: ExitStack) -> list[socket.socket]:
    """Open the sockets that share a port, and make sure that nobody else shares it.

    SO_REUSEPORT would let a second supervisor of the same user join the group and take half of
    the connections. So the first socket binds and listens alone, which fails if anybody else
    listens there, and only then lets the others in.
    """
    first = _bind(option, address, undo)
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    address = _with_port_of(first, address)
    return [first] + [_bind(option, address, undo, shared=True) for _ in range(size - 1)]


def _bind(option: str, address: Address, undo: ExitStack, *, shared: bool = False) -> socket.socket:
    """Open one listening, non-blocking socket."""
    try:
        listener = undo.enter_context(socket.socket(address.family, socket.SOCK_STREAM))
        # Connections of a former run that are in TIME_WAIT do not keep the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((address.host, address.port))
        listener.listen(BACKLOG)
    except OSError as error:
        raise StartError(f"{option}: cannot listen on {address}: {_reason(error)}") from None
    listener.setblocking(False)
    return listener


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "port in use"
    return os.strerror(error.errno) if error.errno else str(error)


def _with_port_of(listener: socket.socket, address: Address) -> Address:
    return Address(address.host, listener.getsockname()[1])


def _push_host(settings: Settings) -> str:
    """Choose the host of the addresses under which the API reaches one worker."""
    if settings.push_advertise is not None:
        return settings.push_advertise
    if settings.push_listen.is_wildcard:
        return socket.gethostname()
    host = settings.push_listen.host
    return f"[{host}]" if ":" in host else host
