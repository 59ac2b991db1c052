import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.limits import Limit, format_count, parse_count


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("465M", 465_000_000),
        ("0.4G", 400_000_000),
        ("4.5k", 4500),
        (" 12 ", 12),
        ("199.96m", 199_960_000),
        ("773403968", 773_403_968),
    ],
)
def test_counts_are_read(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "M", "-3M", "0", "1e9", "nan", "465 MB", "4,5M", "١٢", "0.0000001"])
def test_what_is_no_count_says_how_to_write_one(text):
    with pytest.raises(UserError, match="is not a count; write a positive number as 465M"):
        parse_count(text)


@given(st.integers(1, 10**12))
def test_formatted_ranges_lie_inside_what_they_stand_for(value):
    low, high = parse_count(format_count(value, math.floor)), parse_count(format_count(value, math.ceil))
    assert low <= value <= high
    assert high - low <= value / 1000


def test_limits_read_as_one_would_say_them():
    assert str(Limit("macs", high=465e6)) == "macs <= 465M"
    assert str(Limit("params", low=4.5e6)) == "params >= 4.5M"
    assert str(Limit("macs", 200e6, 300e6)) == "200M <= macs <= 300M"


def test_an_empty_interval_is_refused():
    with pytest.raises(UserError, match=r"macs from 500M to 400M is empty; the lower limit must not exceed"):
        Limit("macs", 500e6, 400e6)
