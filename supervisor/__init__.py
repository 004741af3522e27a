"""The process tree around the workers: listening sockets, children, the admin port, the embedded Valkey."""
