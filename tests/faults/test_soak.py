"""Half an hour of random faults, and memory that stays what it was."""

import pytest

from tests.conftest import require_apache_kafka
from tests.faults.soak import soak

LEAST_ROUNDS = 4  # in fewer no worker lives long enough for its memory to be judged


@pytest.mark.slow
def test_half_an_hour() -> None:
    rounds, said = soak(minutes=30, seed=0)
    print(said)
    assert rounds >= LEAST_ROUNDS


@pytest.mark.slow
@pytest.mark.apache_kafka
@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_half_an_hour_on_apache_kafka(delivery: str) -> None:
    require_apache_kafka()
    rounds, said = soak(minutes=30, seed=0, broker="apache", delivery=delivery)
    print(said)
    assert rounds >= LEAST_ROUNDS
