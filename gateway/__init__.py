"""One worker: WebSockets on one side, plain HTTP requests to the API on the other.

The way of a client: `admission` (through `handshake` and `gate`), then `client`, which joins the
socket to the `session`; its id stands in the `registry`, its end in the `outbox`.

The way of its message: `client` reads it with `frames`, `session` puts it in its order, `upstream`
sends it on a connection of `connection_pool`, which `dial` opens, or lets it wait in the `line`
while `breaker` says so; `api_connection` reads the answer with `http_wire`, and it goes back the
same way. Of a message without an answer `tcp_progress` says whether it can have arrived.

The way of a push: `push` reads it, `push_request` says what it asks for, `router` finds the client
here or hands it to the `bus`. Replies and pushes whose heads were seen before are not parsed again:
`known_heads`, `known_fields`.

What happens is counted in `counters`, by the names of `causes`; the `journal` logs it and keeps the
latest in `recent`; the `tracer` shows it, by `traces`, to those who watch. `fence` and `redis_time`
make void what reaches Redis too late. `address_limit` says who has too many connections, `files`
how many of which kind there may be; at a `door` they wait for room. Whatever has a deadline is in
the `sweeper`. `worker` puts all of it together, starts it and, with `drain`, ends it.
"""
