"""Edits, the attack suite and the random views."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.unit.embedder_photos import tiles
from worker.training import augment, edits
from worker.training.attacks import ATTACKS, Attack
from worker.training.photos import LONGEST_SIDE, WORKING_SIDE, reduced

ODD_SIZES = (
    (8, 8), (9, 300), (300, 9), (61, 47), (1, 1), (1, 600), (5, 300), (7, 7), (400, 6)
)  # fmt: skip


def test_the_suite_is_complete() -> None:
    assert Counter(attack.tier for attack in ATTACKS) == {"easy": 11, "medium": 10, "hard": 5}
    assert len({attack.name for attack in ATTACKS}) == 26


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_deterministic_and_changes_the_picture(attack: Attack) -> None:
    photo = tiles()[100].resize((90, 72))
    once, again = attack(photo, b"a"), attack(photo, b"a")
    assert once.mode == "RGB"
    assert once.tobytes() == again.tobytes()
    if attack.name != "thumbnail 160":  # the photo is smaller than that already
        assert once.size != photo.size or once.tobytes() != photo.tobytes()


@pytest.mark.parametrize("size", ODD_SIZES)
def test_attacks_bear_any_shape(size: tuple[int, int]) -> None:
    photo = tiles()[100].resize(size)
    for attack in ATTACKS:
        assert min(attack(photo, b"a").size) >= 1


def test_places_differ_between_pictures() -> None:
    crop = next(attack for attack in ATTACKS if attack.name == "crop 50 %")
    photo = tiles()[100]
    assert crop(photo, b"a").tobytes() != crop(photo, b"b").tobytes()


def test_crops_keep_the_wanted_area() -> None:
    image = Image.new("RGB", (400, 200))
    for area in (0.3, 0.5, 0.9):
        cropped = edits.crop(image, area, 1.0, 0.3, 0.7)
        assert cropped.width * cropped.height == pytest.approx(area * 400 * 200, rel=0.03)


def test_turns_and_mirrors_are_undone_by_themselves() -> None:
    photo = tiles()[100]
    assert edits.mirror(edits.mirror(photo)).tobytes() == photo.tobytes()
    assert edits.quarter_turn(edits.quarter_turn(photo, 1), 3).tobytes() == photo.tobytes()


def test_padding_reaches_the_wanted_aspect_and_keeps_the_picture() -> None:
    photo = tiles()[100].resize((90, 40))
    padded = edits.pad(photo, 1.0, edits.WHITE)
    assert padded.size == (90, 90)
    assert padded.crop((0, 25, 90, 65)).tobytes() == photo.tobytes()


def test_an_inset_covers_what_it_is_asked_to() -> None:
    photo, other = Image.new("RGB", (120, 80), edits.WHITE), Image.new("RGB", (60, 30), edits.BLACK)
    covered = np.asarray(edits.inset(photo, other, 0.25, 1.0, 0.0).convert("L")) == 0
    assert covered.sum() == 20 * 10
    assert covered[:10, -20:].all()


def test_a_screenshot_shows_the_whole_picture() -> None:
    photo = tiles()[100]
    shot = edits.screenshot(photo, aspect=1.8, margin=0.2, top=0.5, dark=False, lines=["hello"])
    assert shot.height / shot.width == pytest.approx(1.8, rel=0.02)
    left, pixels = (shot.width - photo.width) // 2, np.asarray(shot)
    wanted = np.asarray(photo)
    rows = range(shot.height - photo.height)
    assert any(
        np.array_equal(pixels[y : y + photo.height, left : left + photo.width], wanted)
        for y in rows
    )


def test_views_are_a_function_of_the_seed() -> None:
    photo, other = tiles()[100], tiles()[200]
    views = [
        augment.hard_view(photo, other, np.random.default_rng(seed)).tobytes() for seed in (1, 1, 2)
    ]
    assert views[0] == views[1] != views[2]


def test_a_slight_view_has_one_edit_of_every_kind_in_turn() -> None:
    photo, other = tiles()[100], tiles()[200]
    views = [augment.slight_view(photo, other, np.random.default_rng(seed)) for seed in range(200)]
    pixels = {(view.size, view.tobytes()) for view in views}
    assert {
        (edit(photo).size, edit(photo).tobytes()) for edit in (edits.grey, edits.mirror)
    } < pixels
    turned = {
        (way.size, way.tobytes()) for way in (edits.quarter_turn(photo, n) for n in (1, 2, 3))
    }
    assert turned < pixels
    smaller = sum(view.width * view.height < photo.width * photo.height for view in views)
    larger = sum(view.width * view.height > photo.width * photo.height for view in views)
    assert smaller > 20
    assert larger > 10


@pytest.mark.parametrize("size", ODD_SIZES)
def test_views_bear_any_shape(size: tuple[int, int]) -> None:
    photo, other = tiles()[100].resize(size), tiles()[200]
    for seed in range(150):
        rng = np.random.default_rng(seed)
        assert augment.hard_view(photo, other, rng).mode == "RGB"
        assert augment.slight_view(photo, other, rng).mode == "RGB"
        assert augment.mild_view(photo, rng).mode == "RGB"
        assert augment.reshot(photo, rng).mode == "RGB"


@pytest.mark.parametrize("size", [(690, 40_000), (100_000, 20)])
def test_edits_bear_strips_as_they_are_loaded(size: tuple[int, int]) -> None:
    photo = reduced(tiles()[100].resize(size), WORKING_SIDE)
    assert max(photo.size) == LONGEST_SIDE
    for attack in ATTACKS:
        assert max(attack(photo, b"a").size) <= 4 * LONGEST_SIDE


@pytest.mark.parametrize("size", ODD_SIZES)
def test_bending_by_nothing_changes_nothing(size: tuple[int, int]) -> None:
    photo = tiles()[100].resize(size)
    still = np.zeros((3, 3), np.float32)
    change = np.asarray(edits.bend(photo, still, still), int) - np.asarray(photo)
    assert np.abs(change).max() <= 1  # rounding


def test_bending_moves_what_is_seen_by_the_wanted_share() -> None:
    stripes = np.zeros((80, 80, 3), np.uint8)
    stripes[:, 40:] = 255
    half = np.full((4, 4), 0.25, np.float32)
    bent = np.asarray(edits.bend(Image.fromarray(stripes), half, 0 * half))
    assert not bent[:, :19].any()
    assert bent[:, 21:].all()  # to the edge: what is beyond the photo repeats its last column


def test_a_reshot_is_a_picture_of_its_own() -> None:
    photo = tiles()[100]
    shots = [augment.reshot(photo, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert shots[0].tobytes() == shots[1].tobytes() != shots[2].tobytes()
    assert shots[0].tobytes() != photo.tobytes()
    assert 0.6 < shots[0].width * shots[0].height / (photo.width * photo.height) < 1
