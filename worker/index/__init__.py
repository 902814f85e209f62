"""The index of everything seen so far, in Redis: `index` has its calls, `keys` its layout.

Only this package knows Redis keys and scripts. It must not know Kafka or how vectors are made.
"""

from worker.index.answers import Answer, Arrival, IndexSettings, Neighbour
from worker.index.index import Index

__all__ = ["Answer", "Arrival", "Index", "IndexSettings", "Neighbour"]
