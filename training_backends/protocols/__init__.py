"""Wire protocols as data models for clients and servers; no I/O."""
