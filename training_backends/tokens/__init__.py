"""Count the tokens of training files, exactly or with a stated interval, never by a guess.

    models     which model reads with which tokenizer
    rows       from a line to the conversations that training reads it as
    layout     Mistral's versions: texts, and control tokens between them
    texts      the tokens of one text, by the fastest exact library
    reference  mistral-common itself, which is right by definition
    counting   whole files, in several processes or sampled

Tokenizers are loaded when they are asked for: they cost up to a second, and are extras.
"""

from training_backends.tokens.count import (
    EXACT_BYTES,
    SAMPLE_ROWS,
    count_tokens,
    row_counter,
)
from training_backends.tokens.counts import TokenCount
from training_backends.tokens.tokenizers import tokenizer_of

__all__ = [
    "EXACT_BYTES",
    "SAMPLE_ROWS",
    "TokenCount",
    "count_tokens",
    "row_counter",
    "tokenizer_of",
]
