"""Training data files: reading, validation, repair, splitting and sharding."""
