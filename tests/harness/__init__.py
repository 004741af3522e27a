"""Drive the gateway from outside: real processes, real sockets, every byte under control."""
