"""What is settled before torch and the libraries around it are loaded."""

import logging
import sys

from training_backends.core.config import TINY_MODEL

__all__ = ["prepare_imports"]


def prepare_imports(model: str = "") -> None:
    """Have only those libraries loaded that a model can need, and without a word.

    peft loads bitsandbytes wherever it is installed: most of a second, and on some processors a
    warning that a further package would be faster. The built-in model is never quantized.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if model == TINY_MODEL:
        # The import system's own way to say that there is no such module.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
