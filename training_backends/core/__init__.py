"""The words that every other layer speaks; no I/O beyond settings and entry points."""
