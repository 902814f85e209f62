"""The worker one writes first, which `make bench` runs beside this project's.

One thread, one event at a time: open with Pillow, torchvision's transforms at 224 px, an unfolded
fp32 network, a dot product with every vector of the namespace (few enough here to need no
clusters), store, publish; after each poll's events, wait for their verdicts and commit. torch uses
the cores as it likes. Of what a worker owes, it does only this: a verdict for each event, and no
offset committed before it is acknowledged. (Waiting for each verdict and committing each offset is
as common and a third slower.)

Started by the bench, like a worker, with DEDUP_… variables.
"""

import io
import json
import os
from collections.abc import Callable
from itertools import chain
from typing import NoReturn

import numpy as np
import torch
from kafka import KafkaConsumer, KafkaProducer
from numpy.typing import NDArray
from PIL import Image
from prometheus_client import Counter, Gauge, start_http_server
from redis import Redis
from torchvision.models import resnet18
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

THRESHOLD = 0.9
POLL_MS = 1_000
ACKNOWLEDGED_SECONDS = 60
VERDICTS = Counter("dedup_verdicts", "Verdicts published", ["verdict"])
ASSIGNED = Gauge("dedup_assigned_partitions", "Partitions held")


def load() -> Callable[[bytes], NDArray[np.float32]]:
    """The embedder: an encoded picture to 128 float32 of unit length.

    Its weights are random, as time does not depend on them.
    """
    full = resnet18(weights=None)
    parts = [full.conv1, full.bn1, full.relu, full.maxpool, full.layer1, full.layer2, full.avgpool]
    network = torch.nn.Sequential(*parts).eval()
    colours = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    prepare = Compose([Resize((224, 224)), ToTensor(), colours])

    def embed(data: bytes) -> NDArray[np.float32]:
        picture = prepare(Image.open(io.BytesIO(data)).convert("RGB"))
        with torch.no_grad():
            features = network(picture[None]).flatten()
            vector: NDArray[np.float32] = torch.nn.functional.normalize(features, dim=0).numpy()
        return vector

    return embed


def main() -> NoReturn:
    """Serve until killed."""
    told = os.environ
    embed = load()
    store = Redis.from_url(told["DEDUP_REDIS_URL"])
    producer = KafkaProducer(bootstrap_servers=told["DEDUP_BOOTSTRAP_SERVERS"])
    consumer = KafkaConsumer(
        told["DEDUP_TOPIC"],
        bootstrap_servers=told["DEDUP_BOOTSTRAP_SERVERS"],
        group_id=told["DEDUP_GROUP_ID"],
        session_timeout_ms=int(1000 * float(told["DEDUP_SESSION_TIMEOUT_SECONDS"])),
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    ASSIGNED.set_function(lambda: len(consumer.assignment()))
    server, _ = start_http_server(0, "127.0.0.1")  # any path answers: ready from here on
    print(json.dumps({"message": "starting", "http_port": server.server_port}), flush=True)
    while True:
        polled, sent = consumer.poll(POLL_MS), []
        for message in chain.from_iterable(polled.values()):
            vector = embed(message.value)
            verdict = _judge(store, dict(message.headers)["namespace"], message.key, vector)
            value = json.dumps({"image_id": message.key.decode(), **verdict}).encode()
            sent.append(producer.send(told["DEDUP_VERDICT_TOPIC"], value, message.key))
            VERDICTS.labels(verdict["verdict"]).inc()
        if polled:
            for publication in sent:
                publication.get(ACKNOWLEDGED_SECONDS)
            consumer.commit()


def _judge(store: Redis, namespace: bytes, key: bytes, vector: np.ndarray) -> dict[str, object]:
    """Compare with all that is stored, and store."""
    pipeline = store.pipeline()
    pipeline.lrange(b"ids:" + namespace, 0, -1)
    pipeline.get(b"vectors:" + namespace)
    pipeline.rpush(b"ids:" + namespace, key)
    pipeline.append(b"vectors:" + namespace, vector.tobytes())
    ids, vectors, *_ = pipeline.execute()
    similarities = np.frombuffer(vectors or b"", np.float32).reshape(-1, len(vector)) @ vector
    near = np.flatnonzero(similarities >= THRESHOLD)
    if not len(near):
        return {"verdict": "unique"}
    first = int(near[0])
    verdict = {"verdict": "duplicate", "duplicate_of": ids[first].decode()}
    return {**verdict, "similarity": float(similarities[first])}


if __name__ == "__main__":
    main()
