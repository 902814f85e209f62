"""How long the embedder waits for company."""

import pytest

from worker.lanes import LULL
from worker.pipeline import SOON, STOCK, PipelineSettings, embedding_patience

SETTINGS = PipelineSettings(threshold=0.5, batch_images=64, batch_wait_seconds=0.02)


@pytest.mark.parametrize(
    ("waiting", "fills", "embedding", "times"),
    [
        (SOON - 1, False, False, 0),  # alone each is as cheap
        (SOON - 1, False, True, 1),
        (SOON, False, False, 1),
        (STOCK - 1, False, True, 1),
        (STOCK, False, False, LULL),
        (1, True, False, 1),
        (63, True, True, 1),
        (64, True, False, LULL),
    ],
)
def test_more_are_waited_for_where_it_pays(
    waiting: int, fills: bool, embedding: bool, times: int
) -> None:
    assert embedding_patience(waiting, SETTINGS, fills, embedding) == 0.02 * times
