"""Bring an ask to its client, wherever the client is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from . import outcomes
from .admission import Admission
from .ask import Ask
from .bus import Bus, RemoteAsk
from .client import Client

# A client that moves while an ask is under way to it is followed this often.
_MAX_HOPS: Final = 3


class Router:
    """Decide between a client of this worker and the bus.

    Args:
        clients: open clients of this worker by id.
        connecting: clients whose connect is being decided, by id.
    """

    def __init__(
        self, clients: Mapping[bytes, Client], connecting: Mapping[bytes, Admission]
    ) -> None:
        self._clients = clients
        self._connecting = connecting
        self.bus: Bus | None = None
        """Set by the worker: router and bus know each other."""

    def route(self, ask: Ask) -> None:
        """Take an ask of the push port, or one that is on its way again."""
        if self._connecting and self._hold(ask):
            return
        client = self._clients.get(ask.client_id)
        # One for a younger generation than the client here is for a connection elsewhere.
        if client is not None and ask.generation <= client.generation:
            ask.finish(*client.apply(ask))
        else:
            self._forward(ask)

    def route_remote(self, ask: RemoteAsk) -> None:
        """Take an ask that another worker sent here, because Redis says that the client is here."""
        if self._connecting and self._hold(ask):
            return
        client = self._clients.get(ask.client_id)
        if client is not None:
            ask.finish(*client.apply(ask))
        else:
            ask.waited = True  # no connect is being decided here; a mark that says so is stale
            self._forward(ask)

    def _hold(self, ask: Ask) -> bool:
        pending = self._connecting.get(ask.client_id)
        if pending is None or ask.waited or ask.generation not in (0, pending.generation):
            return False
        pending.hold(ask)
        return True

    def _forward(self, ask: Ask) -> None:
        assert self.bus is not None
        if isinstance(ask, RemoteAsk):
            ask.hops += 1
            if ask.hops > _MAX_HOPS:
                ask.finish(outcomes.NOT_FOUND, b"")
                return
        self.bus.forward(ask)

    def replace(self, client_id: bytes, generation: int) -> None:
        """Close the connection that has to give way, if it is still here."""
        for client in (self._clients.get(client_id), self._connecting.get(client_id)):
            if client is not None and client.generation == generation:
                client.replace()
