"""The trainer: `python -m training_backends.trainer train RUN_DIR`.

Runs as a child process and is controlled only through a run directory (`rundir.directory`); no
other module imports it. Models come from transformers, adapters from peft, checkpoints from
torch. Encoding rows, the losses, the loop and the run directory are implemented here.
"""
