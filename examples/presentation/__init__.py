"""Colours and tables that examples and benchmarks share."""
