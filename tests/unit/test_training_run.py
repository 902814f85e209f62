"""From photos to measured weights: train, stop, resume, calibrate, evaluate."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.unit.embedder_photos import TILE, tiles, write_tar
from worker.embedder import DEFAULT_PATH, Embedder
from worker.errors import ConfigError
from worker.network import TruncatedResNet18
from worker.training import average, calibrate, evaluate, train
from worker.training.lanes import Lanes, deal
from worker.training.lookalikes import look_alikes
from worker.training.objective import contrastive_loss
from worker.training.photos import Photo, read_photos, split
from worker.training.run import Recipe, Run
from worker.training.settling import settle, whiten
from worker.training.views import Views, batches, grouped
from worker.weightfile import read, save

# Rows of a unit matrix: four references, then two copies of each, of which one is elsewhere.
ONE_COPY_APART = [[*range(4), *range(4), *range(4, 8)], [*range(4), *range(4, 8), *range(4)]]
TINY = Recipe(steps=6, batch=8, size=40, early_size=32, early_share=0.5, lanes=2, alike=4)


def _run(steps: int, from_checkpoint: Path | None = None) -> tuple[Run, Views]:
    run = Run(TINY, "cpu")
    if from_checkpoint is not None:
        run.load(from_checkpoint)
    views = Views(read_tiles(), TINY.size, TINY.seed, TINY.objective)
    for _ in train.steps(run, views, processes=0):
        if run.step == steps:
            break
    return run, views


def read_tiles() -> list[Photo]:
    return [Photo(str(place), tile, bytes([place])) for place, tile in enumerate(tiles()[:40])]


@pytest.mark.parametrize("stopped", [2, 6])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    stopped: int, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.checkpoint"
    begun, _ = _run(stopped)
    begun.save(checkpoint)
    assert begun.near is not None
    states = []
    for run, views in (_run(6, checkpoint), _run(6)):
        assert run.step == 6
        settle(run, views, views.photos)
        states.append(run.network.state_dict())
    resumed, uninterrupted = states
    for name, value in uninterrupted.items():
        assert torch.equal(resumed[name], value), name


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    Run(TINY, "cpu").save(path)
    other = replace(TINY, start="0123456789abcdef", temperature=0.1)
    with pytest.raises(ConfigError, match="other settings: start, temperature"):
        Run(other, "cpu").load(path)


def test_a_run_is_not_taken_up_with_other_photos(archive: Path, trained: Path) -> None:
    recipe = "--batch 8 --size 48 --early-size 32 --held-out 0.5 --steps 4 --start default"
    command = f"--out {trained} {recipe} --device cpu --resume --photos {archive} {archive}"
    with pytest.raises(ConfigError, match=r"begun with other settings: photos$"):
        train.main(command.split())


def test_look_alikes_come_into_one_batch() -> None:
    order, near = np.array([4, 0, 1, 2, 3, 5]), np.full((6, 3), -1, np.int32)
    near[4], near[0] = [1, 5, 0], [4, 1, 3]
    assert grouped(order, near, 3) == [[4, 1, 5], [0, 3], [2]]
    views = Views(read_tiles(), 32, 0, "contrastive")
    random = [views[at][1] for at in range(40)]
    pairs = np.arange(40, dtype=np.int32)[:, None] ^ 1
    views.bring_together(pairs, 2)
    photos = [views[at][1] for at in range(40)]
    assert sorted(photos) == sorted(random) == list(range(40))
    assert all(photos[at] == photos[at + 1] ^ 1 for at in range(0, 40, 2))


def test_every_so_many_photos_comes_a_reshot_with_a_label_of_its_own() -> None:
    plain, views = (Views(read_tiles(), 32, 0, "contrastive", every) for every in (0, 4))
    labels = [views[item][1] for item in range(12)]
    for item, label in enumerate(labels):
        again = item % 4 == 3
        assert label == (~labels[item - 1] if again else plain[item][1])
        assert np.array_equal(views[item][0], plain[item][0]) != again


def test_look_alikes_are_the_nearest_but_never_the_same_picture() -> None:
    photos = read_tiles()
    near = look_alikes(Run(TINY, "cpu"), [*photos, photos[3]])
    assert near.shape == (41, 40)
    assert 40 not in near[3]
    assert 3 not in near[40]
    assert not any(place in row for place, row in enumerate(near))
    assert all(len(set(row) - {-1}) == (row >= 0).sum() for row in near)


def test_views_do_not_depend_on_who_makes_them() -> None:
    views = Views(read_tiles(), 32, 0, "contrastive")
    alone, helped = batches(views, 4, 3, 0), batches(views, 4, 3, 2)
    for _ in range(2):
        for here, there in zip(next(alone), next(helped), strict=True):
            assert torch.equal(here, there)


def test_lanes_give_the_gradients_of_one_network() -> None:
    torch.manual_seed(0)
    network = TruncatedResNet18().eval()  # without batch statistics, parts do not matter
    pixels = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    lanes = Lanes(network, 3, "cpu")
    outputs = lanes.forward(pixels.chunk(3))
    lanes.backward(outputs, [torch.ones_like(output) for output in outputs])
    with torch.autocast("cpu", torch.bfloat16):
        rows = network(pixels).float()
    wanted = torch.autograd.grad(rows.sum(), list(network.parameters()))
    torch.testing.assert_close(torch.cat(outputs), rows.detach(), atol=0.02, rtol=0.02)
    for parameter, gradient in zip(network.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert (
            torch.nn.functional.cosine_similarity(
                parameter.grad.flatten(), gradient.flatten(), dim=0
            )
            > 0.98
        )


@pytest.mark.parametrize(("views", "lanes"), [(2, 3), (3, 3), (3, 4)])
def test_a_photos_views_are_dealt_to_different_lanes(views: int, lanes: int) -> None:
    places = deal(10, views, lanes)
    assert sorted(torch.cat(places).tolist()) == list(range(10 * views))
    for place in places:
        photos = (place % 10).tolist()
        assert len(set(photos)) == len(photos)
    assert torch.cat(deal(10, 1, 4)).tolist() == list(range(10))


def test_whitening_evens_out_what_dimensions_share() -> None:
    torch.manual_seed(0)
    network = TruncatedResNet18().eval()
    mixed = torch.rand(3000, 128) @ torch.rand(128, 128) ** 4
    directions = torch.nn.functional.normalize(mixed)
    whiten(network, directions)
    with torch.inference_mode():
        rows = network.centring(directions * 128**0.5) @ network.get_buffer("whitening")
    correlation = torch.corrcoef(rows.T) - torch.eye(128)
    before = torch.corrcoef(directions.T) - torch.eye(128)
    assert correlation.abs().mean() < 0.5 * before.abs().mean()
    torch.testing.assert_close(rows.mean(0), torch.zeros(128), atol=1e-3, rtol=0)


def test_settled_statistics_fit_the_weights() -> None:
    run, photos = Run(TINY, "cpu"), read_tiles()
    views = Views(photos, TINY.size, 0, "contrastive")
    for layer in run.network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.get_buffer("running_var").fill_(100)  # as if the weights had since moved far away
    settle(run, views, photos)
    assert not run.network.training
    assert float(run.network.bn1.get_buffer("running_var").mean()) < 50
    assert not torch.equal(run.network.get_buffer("whitening"), torch.eye(128))


def test_the_loss_wants_copies_close_and_strangers_away() -> None:
    unit, photos = torch.eye(8), torch.arange(4)
    loss = partial(contrastive_loss, temperature=0.05, entropy_weight=2.0)
    good = loss(unit[:4].expand(3, 4, 8), photos)
    apart = [loss(unit[rows].reshape(3, 4, 8), photos) for rows in ONE_COPY_APART]
    twice = unit[[0, 0, 1, 1]].expand(3, 4, 8)
    assert all(good < worse for worse in apart)
    assert good < loss(twice, photos)
    same = loss(twice, torch.tensor([0, 0, 1, 1]))  # a photo drawn twice
    torch.testing.assert_close(same, good)


def test_the_loss_weighs_every_copy_alike_whatever_their_number() -> None:
    torch.manual_seed(0)
    views = torch.nn.functional.normalize(torch.randn(2, 6, 16), dim=2)
    loss = partial(contrastive_loss, photos=torch.arange(6), temperature=0.1, entropy_weight=0.0)
    once, again = loss(views), loss(views[[0, 1, 1]])
    assert once < again < once + 1  # strangers are met once more, and that is all
    strangers = views.flatten(0, 1) @ views.flatten(0, 1).T / 0.1
    strangers[torch.arange(12)[:, None] % 6 == torch.arange(12) % 6] = -20.0
    positive = (views[0] * views[1]).sum(1).repeat(2) / 0.1
    plain = torch.nn.functional.softplus(strangers.logsumexp(1) - positive).mean()
    torch.testing.assert_close(once, plain)


def test_the_rotation_objective_trains() -> None:
    recipe = replace(TINY, objective="rotation", steps=2)
    run = Run(recipe, "cpu")
    before = run.head.weight.detach().clone()
    losses = [x for x, _ in train.steps(run, Views(read_tiles(), 40, 0, "rotation"), 0)]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert not torch.equal(run.head.weight, before)


def test_photos_come_from_folders_and_archives_alike(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    tiles()[0].save(tmp_path / "deep" / "a.png")
    (tmp_path / "empty.jpg").write_bytes(b"")
    photos = read_photos([archive, tmp_path])
    assert len(photos) == len(tiles()) + 1
    assert photos[-1].image.size == (TILE, TILE)
    with pytest.raises(ConfigError, match="neither"):
        read_photos([tmp_path / "missing"])
    with pytest.raises(ConfigError, match="no pictures"):
        read_photos([])


def test_the_split_looks_at_bytes_alone(archive: Path) -> None:
    photos = read_photos([archive])
    kept, out = split(photos, 0.3)
    _, out_reversed = split(photos[::-1], 0.3)
    assert {p.name for p in out} == {p.name for p in out_reversed}
    assert len(kept) + len(out) == len(photos)
    assert 0.2 < len(out) / len(photos) < 0.4


def test_trained_weights_carry_all_that_is_known_of_them(trained: Path) -> None:
    about = read(trained).description
    assert about.input_size == 48
    assert about.training["steps_done"] == 4
    assert about.training["start"] == read(DEFAULT_PATH).model_id()
    assert about.training["temperature"] == 0.05
    assert about.training["entropy_weight"] == 2.0
    assert about.evaluation["calibration"]["threshold"] == about.threshold
    assert 0 <= about.evaluation["micro_average_precision"] <= 1
    assert Embedder.load(trained, mode="fp32").threshold == about.threshold


def test_an_average_lies_between_and_says_of_what_it_is(
    archive: Path, trained: Path, tmp_path: Path
) -> None:
    first, second = read(DEFAULT_PATH), read(trained)
    for share in (0.0, 0.25, 1.0):
        mixed = average.averaged(first, second, share).tensors["conv1.weight"]
        wanted = (
            first.tensors["conv1.weight"] * (1 - share) + second.tensors["conv1.weight"] * share
        )
        assert torch.allclose(mixed, wanted, atol=1e-6)
    out = tmp_path / "w.safetensors"
    with pytest.raises(ConfigError, match="different sizes"):
        average.main(f"default {trained} --photos {archive} --out {out}".split())
    rest = f"--photos {archive} --out {out} --held-out 0.5 --device cpu"
    assert average.main(f"{trained} {trained} --share 0.3 {rest}".split()) == 0
    about = read(out).description
    assert about.training["share"] == 0.3
    assert about.training["held_out"] == 0.5
    assert about.training["average_of"] == {second.model_id(): second.description.training}
    assert about.evaluation["calibration"]["threshold"] == about.threshold
    # What is trained is the same; the statistics were measured anew.
    assert torch.equal(read(out).tensors["conv1.weight"], second.tensors["conv1.weight"])


def test_photos_learned_before_are_not_held_out(trained: Path, tmp_path: Path) -> None:
    weights, silent = read(trained), tmp_path / "silent.safetensors"
    save(silent, replace(weights, description=replace(weights.description, training={})))
    learned = "trained with --held-out 0.5: with 0.6, photos it has learned"
    unread = "neither a folder nor a tar file"
    more = f"--photos none.tar --out {tmp_path / 'w'} --held-out 0.6"
    for line in (f"{trained} {silent}", f"{silent} {trained}"):
        assert learned in _refusal(average, f"{line} {more}")
    assert learned in _refusal(train, f"--start {trained} --steps 1 {more}")
    photos = "--photos none.tar --held-out 0.6"
    for line in (f"--weights {trained}@fp32 {photos}", f"--against {trained} {photos}"):
        assert learned in _refusal(evaluate, line)
    assert learned in _refusal(calibrate, f"--weights {trained} {photos}")
    for line in (photos, f"--weights {silent} {photos}", f"--weights {trained} {photos[:-1]}5"):
        for command in (evaluate, calibrate):
            assert unread in _refusal(command, line)
    # No more than before, and what is not known, are refused for want of photos only.
    assert unread in _refusal(average, f"{trained} {trained} {more[:-1]}5")
    assert unread in _refusal(average, f"{silent} {silent} {more}")
    assert unread in _refusal(train, f"--start default --steps 1 {more}")


def test_too_few_photos_are_one_line_errors(tmp_path: Path, trained: Path) -> None:
    few = write_tar(tmp_path / "few.tar", list(tiles()[:3]))
    with pytest.raises(ConfigError, match="too few"):
        train.main(f"--photos {few} --out {tmp_path / 'w'} --steps 1".split())
    with pytest.raises(ConfigError, match="too few"):
        calibrate.main(f"--photos {few} --weights {trained} --mode fp32".split())
    with pytest.raises(ConfigError, match="too few"):
        evaluate.main(f"--photos {few} --weights {trained}@fp32".split())


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.checkpoint"
    run, _ = _run(1)
    run.save(checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cut short"):
        run.load(checkpoint)


def test_a_wrong_argument_is_told_before_any_photo_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere, nothing = tmp_path / "missing" / "file", f"--photos {tmp_path / 'none.tar'}"
    (tmp_path / "taken").touch()
    evaluating, calibrating = partial(_refusal, evaluate), partial(_refusal, calibrate)
    training = partial(_refusal, train)
    assert "no folder" in evaluating(f"{nothing} --json {nowhere}")
    assert "cannot be a folder" in evaluating(f"{nothing} --out {tmp_path / 'taken'}")
    assert "no folder" in calibrating(f"{nothing} --plot {nowhere}")
    assert "no folder" in calibrating(f"{nothing} --write {nowhere}")
    assert "no folder" in training(f"{nothing} --steps 1 --out {nowhere}")
    assert "cannot be written" in training(f"{nothing} --steps 1 --out {tmp_path}")
    assert "w.checkpoint to resume from" in training(
        f"{nothing} --steps 1 --out {tmp_path / 'w'} --resume"
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib" in evaluating(f"{nothing} --out {tmp_path / 'out'}")
    assert "matplotlib" in calibrating(f"{nothing} --plot {tmp_path / 'p.png'}")


def _refusal(command: ModuleType, line: str) -> str:
    with pytest.raises(ConfigError) as refused:
        command.main(line.split())
    return str(refused.value)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (calibrate, "--stored -5"),
        (evaluate, "--originals 0"),
        (evaluate, "--held-out 2"),
        (evaluate, "--same-as nan"),
        (train, "--out w --steps 0"),
        (train, "--out w --steps 1 --save-every 0"),
        (train, "--out w --minutes 1 --warmup 0"),
    ],
)
def test_a_number_out_of_range_is_exit_status_2(
    command: ModuleType, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["--photos", "none.tar", *flags.split()])
    assert end.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"error: argument {flags.split()[-2]}: ")


def test_a_curve_begins_anew_or_goes_on_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "CURVE_EVERY", 2)
    out, curve = tmp_path / "w.safetensors", tmp_path / "w.curve.jsonl"
    curve.write_text("of an older run\n")
    views = Views(read_tiles(), TINY.size, 0, "contrastive")
    for taken_up_at in (0, 2):
        run = Run(replace(TINY, steps=4), "cpu")
        run.step = taken_up_at
        train.follow(run, views, out, 0, 100)
        assert [json.loads(point)["step"] for point in curve.open()] == [2, 4]
