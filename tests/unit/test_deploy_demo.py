"""How the demo judges answers, and what it counts."""

from pathlib import Path

import pytest
from PIL import Image

from deploy.demo_photos import EDITS, Kind, Sample, shipped_photos, write_samples
from deploy.demo_report import MOST_SHOWN, Report, by_kind, summary, write_report
from deploy.demo_results import Outcome, Results, judge

TRUTH = {
    "cat": Sample(Path("cat.jpg"), "cat", Kind.ORIGINAL),
    "cat small": Sample(Path("cat-small.jpg"), "cat", Kind.RESIZED),
    "cat again": Sample(Path("cat-again.jpg"), "cat", Kind.SAME_BYTES),
    "dog": Sample(Path("dog.jpg"), "dog", Kind.NEW),
    "notes": Sample(Path("notes.txt"), "notes", Kind.BROKEN),
}


def outcome(image_id: str, verdict: str = "", of: str | None = None, reason: str = "") -> Outcome:
    similarity = None if of is None else 0.9
    matches = {} if of is None else {of: 0.9}
    return Outcome(
        image_id, 0.5, 1_000, verdict, of, similarity, of, matches, threshold=0.8, reason=reason
    )


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (outcome("cat", "unique"), ""),
        (outcome("dog", "unique"), ""),
        (outcome("cat small", "duplicate", "cat"), ""),
        (outcome("cat small", "duplicate", "cat again"), ""),
        (outcome("cat again", "exact", "cat"), ""),
        (outcome("notes", reason="undecodable"), ""),
        (outcome("cat small", "unique"), "missed"),
        (outcome("cat small", "duplicate", "dog"), "taken for another photo"),
        (outcome("dog", "duplicate", "cat"), "taken for another photo"),
        (outcome("cat", "duplicate", "dog"), "taken for another photo"),
        (outcome("cat again", "duplicate", "cat"), "judged duplicate"),
        (outcome("cat small", "exact", "cat"), "judged exact"),
        (outcome("dog", reason="undecodable"), "dead letter: undecodable"),
        (outcome("notes", "unique"), "a broken file was judged unique"),
    ],
)
def test_answers_are_judged_by_the_truth(given: Outcome, wrong: str) -> None:
    assert judge(given, TRUTH) == wrong


def report(*outcomes: Outcome, events: int) -> Report:
    results = Results(events, {each.image_id: each for each in outcomes})
    return Report(results, {}, TRUTH)


def test_the_summary_counts_right_wrong_and_missing() -> None:
    right, missed = outcome("cat", "unique"), outcome("cat small", "unique")
    bad = outcome("notes", reason="undecodable")
    found = dict(summary(report(right, missed, bad, events=4)))
    assert found["verdict unique"] == "2"
    assert found["dead letter undecodable"] == "1"
    assert (found["right"], found["wrong"], found["no answer"]) == ("2", "1", "1")
    kinds = {
        name: (right, count) for name, right, count in by_kind(report(right, missed, events=2))
    }
    assert kinds["original"] == (1, 1)
    assert kinds["resized"] == (0, 1)


def test_rate_and_latency_come_from_the_timestamps() -> None:
    outcomes = {str(n): Outcome(str(n), n / 10, 1_000 + 20 * n, "unique") for n in range(101)}
    results = Results(101, outcomes)
    assert results.complete
    assert results.rate() == pytest.approx(50)
    assert results.latency(0.5) == pytest.approx(5.0)
    assert results.latency(0.99) == pytest.approx(9.9)


def test_the_page_shows_a_mistake_beside_what_it_should_have_matched(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "cat.jpg")
    missed = outcome("cat small", "unique")
    shown = report(outcome("cat", "unique"), missed, events=2)
    shown.paths = {"cat": tmp_path / "cat.jpg", "cat small": tmp_path / "gone.jpg"}
    write_report(shown, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "data:image/jpeg" in page
    assert '<p class="mistake">missed</p>' in page
    assert "not among the matches" in page


def test_the_page_of_a_large_folder_is_bounded(tmp_path: Path) -> None:
    count = MOST_SHOWN + 5
    repeats = [outcome(str(n), "duplicate", "first") for n in range(count)]
    broken = [outcome(f"broken {n}", reason="undecodable") for n in range(count)]
    results = Results(2 * count, {each.image_id: each for each in (*repeats, *broken)})
    write_report(Report(results, {}, None), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<article") == MOST_SHOWN
    assert page.count("<td>undecodable</td>") == MOST_SHOWN
    assert page.count("and 5 more") == 2


def test_shipped_photos_are_many_and_no_two_share_a_pixel_block() -> None:
    photos = dict(shipped_photos())
    assert len(photos) >= 25
    assert all(min(photo.size) >= 190 for photo in photos.values())
    assert len({photo.tobytes() for photo in photos.values()}) == len(photos)


def test_every_edit_changes_the_file_and_the_truth_covers_all(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    samples = write_samples(first, second)
    files = {path for folder in (first, second) for path in folder.iterdir()}
    assert {sample.path for sample in samples} == files
    originals = {s.photo for s in samples if s.kind is Kind.ORIGINAL}
    for kind, _ in EDITS:
        assert {s.photo for s in samples if s.kind is kind} == originals
    contents = [s.path.read_bytes() for s in samples if s.kind is not Kind.SAME_BYTES]
    assert len(set(contents)) == len(contents)
