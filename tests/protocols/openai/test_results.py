"""Result files, plain and in base64."""

import base64
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import training_backends as tb
from training_backends.protocols.openai.results import RESULT_COLUMNS, read_results, write_results
from training_backends.protocols.openai.wire import StepMetrics

VALUES = st.none() | st.floats(0, 1e300)
ROWS = st.lists(
    st.builds(
        StepMetrics,
        step=st.integers(1, 10**9),
        train_loss=VALUES,
        train_mean_token_accuracy=VALUES,
        valid_loss=VALUES,
        valid_mean_token_accuracy=VALUES,
    ),
    max_size=4,
)


@given(ROWS, st.sampled_from(["plain", "base64"]), st.sampled_from(["openai", "azure"]))
def test_file_is_read_as_it_was_written(
    rows: list[StepMetrics],
    coding: Literal["plain", "base64"],
    layout: Literal["openai", "azure"],
) -> None:
    """Every number survives exactly in both codings and with both providers' columns."""
    content = write_results(rows, coding=coding, layout=layout)
    assert read_results(content) == rows
    if coding == "base64":
        content = base64.b64decode(content)
    assert content.decode().splitlines()[0] == ",".join(RESULT_COLUMNS[layout])


def test_header_is_the_documented_one() -> None:
    """The columns are those that scripts written against OpenAI expect."""
    assert write_results([]) == (
        b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"step,train_loss,valid_loss,new\n1,2.5,-1,x\n\n2,,nan,y\n",
        b"\xef\xbb\xbfstep,train_loss\r\n1,2.5\r\n2,\r\n",
        b'"step","train_loss"\n1,2.5\n2,odd,more\nnone,1\n',
        base64.encodebytes(b"step,train_loss\n1,2.5\n2,\n"),
    ],
)
def test_files_of_others_are_read(content: bytes) -> None:
    """Unknown columns, a BOM, quotes, -1 for missing values and lines of base64 are read."""
    first, second = read_results(content)
    assert (first.step, first.values()) == (1, {"train_loss": 2.5})
    assert (second.step, second.values()) == (2, {})


@given(st.binary(max_size=60))
def test_other_content_is_rejected(content: bytes) -> None:
    """What is no result file raises one error, whatever it is."""
    if b"step" not in content:
        with pytest.raises(tb.ProtocolError):
            read_results(content)


def test_huge_step_is_no_step() -> None:
    """A step that is not a number leaves its row out."""
    assert read_results(b"step,train_loss\ninf,1\nnan,1\n1e3,1\n")[0].step == 1000
