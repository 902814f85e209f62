"""One training run: its recipe, its state, one step of it, and its checkpoint."""

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from worker.arguments import between, share, whole
from worker.errors import ConfigError
from worker.images import PREPROCESSING
from worker.network import DIMENSIONS, TruncatedResNet18
from worker.training.lanes import Lanes, deal
from worker.training.objective import contrastive_loss, rotation_loss
from worker.weightfile import Description, Weights, write_whole

PARTS = ("network", "head", "optimizer")  # of a checkpoint
STAGES = 8  # of a run; look-alikes change while the network learns


def _option(default: Any, about: str, parse: Callable[[str], Any]) -> Any:
    return field(default=default, metadata={"help": f"{about} (default {default})", "type": parse})


@dataclass(frozen=True)
class Recipe:
    """What decides the weights; it becomes the command's options and travels with the weights."""

    objective: str = "contrastive"
    steps: int | None = None
    minutes: float | None = None
    start: str | None = None  # model id of the weights it began with; None: random numbers
    photos: str | None = None  # `fingerprint` of those trained on; look-alikes are places there
    batch: int = _option(256, "photos a step, each seen three times", whole(2))
    size: int = _option(
        128, "pixels a side, of the last phase and of the shipped network", whole(32)
    )
    early_size: int = _option(
        80, "pixels a side at first: cheaper steps for coarse features", whole(32)
    )
    early_share: float = _option(0.5, "share of the run with the early size", between(0, 1))
    rate: float = _option(3e-3, "highest learning rate of AdamW", share(0, math.inf))
    warmup: float = _option(
        0.03, "share of the run in which the rate rises; then it falls to 0", share(0, 1)
    )
    decay: float = _option(0.02, "weight decay", between(0, math.inf))
    held_out: float = _option(0.08, "share of photos set aside, by SHA-256", share(0, 1))
    alike: int = _option(
        8, "photos that look alike brought together in a batch; 1 for none", whole(1)
    )
    reshots: int = _option(
        12, "every so many-th photo is a made-up re-shot of the one before; 0 for none", whole(0)
    )
    temperature: float = _option(0.05, "of the contrastive loss", share(0, math.inf))
    entropy_weight: float = _option(
        2.0, "of what spreads strangers, in the contrastive loss", between(0, math.inf)
    )
    lanes: int = _option(4, "threads that share a batch on a CPU", whole(1))
    seed: int = _option(0, "decides views and first weights", whole(0))


class Run:
    """The state a checkpoint holds, and one step of it."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, device
        self.network = TruncatedResNet18().to(device).to(memory_format=torch.channels_last)
        # A lane without two views of its own has no statistics.
        lanes = min(recipe.lanes, recipe.batch) if device == "cpu" else 1
        self.lanes = Lanes(self.network, lanes, device)
        self.head = nn.Linear(DIMENSIONS, 4).to(device)
        weights = [*self.network.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(weights, recipe.rate, weight_decay=recipe.decay)
        self.step, self.seconds = 0, 0.0
        self.near: NDArray[np.int32] | None = None
        self.stage = 0  # whose look-alikes are known; random numbers know none in the first one

    def progress(self) -> float:
        """Share of the run that is done, by steps or by the clock."""
        if self.recipe.steps is not None:
            return self.step / self.recipe.steps
        return self.seconds / (60 * (self.recipe.minutes or 60.0))

    def due(self) -> bool:
        """Whether look-alikes are to be looked for, at the begin of each of STAGES stages."""
        wanted = self.recipe.alike > 1 and self.recipe.objective == "contrastive"
        return wanted and self.stage < int(self.progress() * STAGES)

    def know(self, near: NDArray[np.int32]) -> None:
        """Take what is `due`, see `Views.bring_together`."""
        self.near, self.stage = near, int(self.progress() * STAGES)

    def size(self) -> int:
        """Pixels a side at this point of the run."""
        early = self.progress() < self.recipe.early_share
        return self.recipe.early_size if early else self.recipe.size

    def train(self, pixels: Tensor, labels: Tensor) -> float:
        """One step on uint8 (n, views, S, S, 3) and int64 (n,), see `Views`; returns the loss.

        The loss looks at the whole batch; the network before it works lane by lane.
        """
        self._set_rate()
        labels, views = labels.to(self.device), pixels.to(self.device).transpose(0, 1).flatten(0, 1)
        places = deal(pixels.shape[0], pixels.shape[1], len(self.lanes.replicas))
        rotation = self.recipe.objective == "rotation"
        outputs = self.lanes.forward([views[place] for place in places], pooled=rotation)
        rows = torch.empty(len(views), DIMENSIONS, device=self.device)
        rows[torch.cat(places)] = torch.cat([output.detach() for output in outputs])
        self.optimizer.zero_grad()
        loss = self._loss(rows.requires_grad_(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        assert rows.grad is not None
        self.lanes.backward(outputs, [rows.grad[place] for place in places])
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        if self.recipe.objective == "rotation":
            return rotation_loss(rows, self.head, labels)
        temperature, entropy_weight = self.recipe.temperature, self.recipe.entropy_weight
        views = rows.reshape(-1, len(labels), DIMENSIONS)
        return contrastive_loss(views, labels, temperature, entropy_weight)

    def _set_rate(self) -> None:
        done = min(1.0, self.progress())
        warm = min(1.0, (done + 1e-4) / self.recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate * warm * (0.5 + 0.5 * math.cos(math.pi * done))

    def start_from(self, weights: Weights) -> None:
        """Begin with a trained network instead of random numbers."""
        self.network.load_state_dict(weights.tensors, strict=False)
        self.lanes.adopt_statistics()
        self.stage = -1

    def save(self, path: Path) -> None:
        """Write everything needed to go on, replacing the old file only when complete.

        Raises ConfigError where that is impossible.
        """
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        near = None if self.near is None else torch.from_numpy(self.near)
        told = {"step": self.step, "seconds": self.seconds, "stage": self.stage, "near": near}
        stream = io.BytesIO()  # some 8 MB; of a full disk torch itself says nothing that helps
        torch.save({"recipe": asdict(self.recipe), **parts, **told}, stream)
        write_whole(path, stream.getvalue())

    def load(self, path: Path) -> None:
        """Take up what `save` wrote. Only tensors and plain values are read, never code.

        Raises ConfigError for a checkpoint of another recipe, a damaged one, or what is none.
        """
        if not zipfile.is_zipfile(path):
            raise ConfigError(f"{path} is no checkpoint, or was cut short")
        try:
            state: dict[str, Any] = torch.load(path, self.device, weights_only=True)
            begun, wanted = state["recipe"], asdict(self.recipe)
            if changed := [name for name in wanted if begun.get(name) != wanted[name]]:
                raise ConfigError(f"{path} was begun with other settings: {', '.join(changed)}")
            self._take_up(state)
        except ConfigError:
            raise
        except Exception as error:  # of as many kinds as there are zip files and dictionaries
            raise ConfigError(f"{path} is no checkpoint of this trainer") from error

    def _take_up(self, state: dict[str, Any]) -> None:
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds, self.stage = state["step"], state["seconds"], state["stage"]
        self.near = None if state["near"] is None else state["near"].cpu().numpy()
        self.lanes.adopt_statistics()

    def weights(
        self,
        threshold: float,
        evaluation: dict[str, Any],
        training: dict[str, Any] | None = None,
    ) -> Weights:
        """The network as it is shipped, with all that travels along; `training`: of another."""
        done = {"steps_done": self.step, "seconds": round(self.seconds)}
        about = Description(
            preprocessing=PREPROCESSING,
            input_size=self.recipe.size,
            threshold=threshold,
            training=training or {**asdict(self.recipe), **done},
            evaluation=evaluation,
        )
        return Weights(self.network.state_dict(), about)
