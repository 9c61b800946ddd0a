"""The run directory: what a training process and its watchers share, as files."""
