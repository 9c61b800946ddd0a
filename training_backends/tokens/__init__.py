"""Count the tokens of training files, exactly or with a confidence interval, and encode rows.

    tokenizers      find the tokenizer of a model
    text_counters   tokens of a text, with the fastest exact library
    mistral_layout  layout of conversations in Mistral's tokenizer versions
    counters        tokens of a row; mistral-common is the reference
    count           tokens of files, in several processes or sampled
    jinja           compile and interrupt chat templates
    chat_template   render conversations, and locate their answers
    encoders        rows as token ids with a loss mask
    examples        lines of data files as training examples
    preview         show what rows become

Tokenizers are optional dependencies and take up to a second to load, so they are loaded on demand.
"""

from training_backends.tokens.count import (
    EXACT_BYTES,
    SAMPLE_ROWS,
    count_files,
    count_tokens,
    row_counter,
)
from training_backends.tokens.counts import TokenCount
from training_backends.tokens.tokenizers import tokenizer_of

__all__ = [
    "EXACT_BYTES",
    "SAMPLE_ROWS",
    "TokenCount",
    "count_files",
    "count_tokens",
    "row_counter",
    "tokenizer_of",
]
