"""Wire protocols as data, in both directions; no I/O."""
