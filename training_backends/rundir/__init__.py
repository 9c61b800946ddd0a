"""The run directory: files shared by a training process and those that observe it."""
