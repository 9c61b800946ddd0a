"""The trainer: `python -m training_backends.trainer train RUN_DIR`.

Runs as a child process and is controlled only through a run directory (`rundir.directory`); no
other module imports it. transformers' Trainer and peft do the training. Encoding rows, masking
the loss, ordering the data and writing the run directory are implemented here.
"""
