"""Train run directories, each in a process of its own that has torch loaded already.

Reads the path of a run directory from each line of standard input and answers with one line:
the id of the process that trains there. When that has ended it writes a second line: its exit
code, or minus the signal that killed it. Loading torch takes seconds, and a test that kills a
process twenty times would do nothing else.
"""

import gc
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import training_backends.trainer.run  # noqa: F401  # loads what training needs
from training_backends.trainer.models import make_tiny_model
from training_backends.trainer.process import train


def main() -> None:
    """Serve one request after the other."""
    # What each process would do anew: what transformers prepares for the first model that it
    # saves, and looking through all modules for garbage.
    with TemporaryDirectory() as directory:
        make_tiny_model(0).save_pretrained(directory)
    gc.freeze()
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            os.setsid()
            os._exit(int(train(Path(line.strip()))))
        _answer(child)
        _, status = os.waitpid(child, 0)
        _answer(os.waitstatus_to_exitcode(status))


def _answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
