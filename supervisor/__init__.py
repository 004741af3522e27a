"""The process tree around the workers: sockets, children, the admin port, the embedded Valkey."""
