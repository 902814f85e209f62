"""Half an hour of random faults, and memory that stays what it was."""

import pytest

from tests.faults.soak import soak


@pytest.mark.slow
def test_half_an_hour() -> None:
    print(soak(minutes=30, seed=0))
