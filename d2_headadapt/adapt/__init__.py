"""Decide what happens to every tensor: class tables, head layouts, plans. Pure functions: no I/O, no config."""
