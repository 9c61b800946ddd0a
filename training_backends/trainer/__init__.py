"""The training program: `python -m training_backends.trainer train RUN_DIR`.

Started as a child process, driven only by a run directory (`rundir.directory`), imported by
nothing. Kept libraries train (transformers' Trainer, peft); ours are the encoding and its
loss mask, the order of the data, and what is written into the run directory.
"""
