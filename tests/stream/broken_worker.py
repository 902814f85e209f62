"""A worker whose index reads first and inserts later: what the race test must catch."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from worker import service
from worker.__main__ import main
from worker.index import Answer, Arrival, Index

# Between look and insert; real stores of this kind have one, too. Long, as on a slow machine two
# workers hardly come to the same pair at the same time.
WINDOW_SECONDS = 0.2


class ReadsFirst(Index):
    """Answers with what was stored before the insert, but not in the same step."""

    def place(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        """Look (as a check does), then insert; the answer is that of the look."""
        looked = super().place([replace(arrival, store=False) for arrival in arrivals])
        time.sleep(WINDOW_SECONDS)
        placed = super().place(arrivals)
        return [a._replace(sequence=b.sequence) for a, b in zip(looked, placed, strict=True)]


if __name__ == "__main__":
    vars(service)["Index"] = ReadsFirst
    sys.exit(main(sys.argv[1:]))
