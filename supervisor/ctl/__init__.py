"""The command ws2api-ctl: a client of the admin port and of the push port, quick to start.

`arguments` reads the command line, `access` finds addresses and tokens, `client` speaks HTTP,
`views` turn answers into tables, which `tables` draws; `cli` has a function for each command.
"""
