"""Shared data types, errors and interfaces; no I/O beyond settings and entry points."""
