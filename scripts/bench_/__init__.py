"""Measure the gateway and its peers: systems under test, crowds of clients, scenarios, a report."""


class BenchError(Exception):
    """Say why a figure could not be had, or that the counts do not add up."""
