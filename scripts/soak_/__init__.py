"""Disturb a gateway at random for a long time, and find out whether anything was lost."""


class SoakError(Exception):
    """Say why the run could not go on."""
