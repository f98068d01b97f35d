"""What every message is: one line that can be printed, of a length that can be read."""

import numpy as np
import pytest

from deepkd_plugin.errors import LONGEST, UserError, shown


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, "0.1"),
        ("text", "'text'"),
        ([1, "a", None], "[1, 'a', None]"),
        ({"a": 1}, "{'a': 1}"),
        ("a\x00\n\ud800é", r"'a\x00\n\ud800é'"),
        (10**30, "1" + "0" * 30),
        (list(range(1000)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...]"),
    ],
)
def test_values_are_shown_in_a_line(value, expected):
    assert shown(value) == expected


def test_large_values_are_shown_in_part():
    assert shown([10**5000]) == "[a number of about 5001 digits]"  # Python itself refuses
    nested = ["x" * 10_000] * 1000
    for _ in range(50):
        nested = [nested] * 9  # written out it would have 9 ** 50 parts
    for value in (nested, "x" * 10**6, b"x" * 10**6, np.zeros(10**6), {str(i): "x" * 1000 for i in range(1000)}):
        assert len(shown(value)) <= 200
    assert shown("start" + "x" * 1000 + "end").startswith("'startx")
    assert shown("start" + "x" * 1000 + "end").endswith("xend'")


def test_a_message_is_one_line_that_can_be_printed():
    error = UserError("  file\x00\ud800name: is\n\n  wrong\t(é, ², …)\x1b[31m; it must be right  ")
    assert str(error) == r"file\x00\ud800name: is wrong (é, ², …)\x1b[31m; it must be right"


def test_a_long_message_keeps_its_ends():
    text = str(UserError("config: KEY is " + "x" * 10**6 + "; it must be short"))
    assert len(text) <= LONGEST
    assert text.startswith("config: KEY is xxx")
    assert text.endswith("xxx; it must be short")


def test_a_worker_s_traceback_is_left_out():
    worker = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n  line\nx.UserError: file: is wrong\n"
    )
    assert str(UserError(worker)) == "file: is wrong"
    assert str(UserError("KEY is 'UserError: x'; no")) == "KEY is 'UserError: x'; no"
