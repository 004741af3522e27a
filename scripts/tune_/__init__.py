"""Raise what a machine lacks for many connections; scripts/tune.py is the program."""
