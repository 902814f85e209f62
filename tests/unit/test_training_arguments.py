"""What the commands around training refuse, and the names they take and print as they are."""

import argparse
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from deploy import demo
from tests.unit.embedder_photos import encoded, tiles
from worker.arguments import between, check_file, check_folder, share, whole
from worker.errors import ConfigError
from worker.training import calibrate, contestants, evaluate, report, train
from worker.training.attacks import ATTACKS, TIERS
from worker.training.calibrate import Nearest, Proposal, propose
from worker.training.photos import Photo, read_photos


def test_what_is_write_protected_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = tmp_path / "old.json", tmp_path / "old"
    file.touch()
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) not in (file, folder))
    check_file(str(tmp_path / "new.json"))
    with pytest.raises(ConfigError, match=r"old.json cannot be written"):
        check_file(str(file))
    with pytest.raises(ConfigError, match="old cannot be written into"):
        check_folder(str(folder))


def test_a_plot_that_is_no_png_is_told_before_the_work(tmp_path: Path) -> None:
    for name in ("x.foo", "name"):
        with pytest.raises(ConfigError, match=f"{name} does not end in .png"):
            calibrate.main(["--photos", "none.tar", "--plot", str(tmp_path / name)])


def test_wrong_weights_and_devices_are_told_before_photos_are_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no weights file at none"):
        calibrate.main(["--photos", "none.tar", "--weights", "none.safetensors"])
    command = ["--photos", "none.tar", "--out", str(tmp_path / "w"), "--steps", "1"]
    with pytest.raises(ConfigError, match="warp"):
        train.main([*command, "--device", "warp"])


def test_a_demo_without_a_place_for_its_report_does_not_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jpg").touch()
    command = ["--report", str(tmp_path / "no" / "r.html"), "--images", str(tmp_path)]
    assert demo.main(command) == 2
    assert "there is no folder" in " ".join(capsys.readouterr().out.split())


def test_a_demo_says_why_a_folder_will_not_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, locked = tmp_path / "a.jpg", tmp_path / "locked"
    file.touch()
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != locked)
    for wrong, why in {
        file: "not a folder",
        tmp_path / "none": "no such folder",
        locked: "not allowed to read it",
    }.items():
        assert demo.main(["--images", str(wrong), "--report", str(tmp_path / "r.html")]) == 2
        assert f"{wrong}: {why}" in capsys.readouterr().out.replace("\n", " ")


def test_names_are_printed_as_they_are() -> None:
    names = ["dress [red].jpg", f"a[/b]{'x' * 200}.jpg"]
    photos = [Photo(name, Image.new("RGB", (1, 1)), b"") for name in names]
    console = Console(file=io.StringIO(), width=80)
    nearest = Nearest(np.array([0.9, 0.9]), np.array([1, 0]))
    calibrate._tell(Proposal(0.7, 0.001, 2, 2, 2), nearest, photos, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count(f"  0.9000  {names[0]}  {names[1]}\n") == printed.count(names[0]) == 1


def test_names_that_are_no_utf8_are_printed_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n.jpg")
    (tmp_path / name).write_bytes(encoded(tiles()[0]))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / name, name)
    names = [photo.name for photo in read_photos([tmp_path, tmp_path / "a.tar"])]
    assert names == [rf"{tmp_path.name}/caf\udce9\n.jpg", r"caf\udce9\n.jpg"]


def test_names_of_contestants_are_printed_as_they_are() -> None:
    tiers = {"micro_average_precision": 0.5} | {
        f"recall_at_{at}": 0.5 for at in ("precision_0.99", "precision_0.999", "false_rate_1e-6")
    }
    by_edit = {attack.name: 0.5 for attack in ATTACKS}
    result = {
        **tiers,
        "tiers": dict.fromkeys(TIERS, tiers),
        "recall_by_edit": by_edit,
        "recall_at_precision_0.999_by_edit": by_edit,
        "recall_at_false_rate_1e-6_by_edit": by_edit,
    }
    counts = {"originals": 2, "strangers": 3, "stored": 4567, "edits": 26}
    for build in (lambda found: report.table(found, counts, None), report.edits_table):
        console = Console(file=io.StringIO(), width=200)
        console.print(build({"a[/b]": result, "[red]": result}))
        printed = console.file.getvalue()  # type: ignore[attr-defined]
        assert "a[/b]" in printed
        assert "[red]" in printed


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--batch 1", "1 is less than 2"),
        ("--batch many", "'many' is not a whole number"),
        ("--entropy-weight nan", "nan is not a finite number"),
        ("--entropy-weight -1", "-1 is not at least 0"),
        ("--decay inf", "inf is not a finite number"),
        ("--early-share 1.5", "1.5 is not at least 0 and at most 1"),
        ("--rate abc", "'abc' is not a number"),
        ("--rate 0", "0 is not above 0"),
        ("--held-out 1.5", "1.5 is not above 0 and at most 1"),
        ("--start=", "it is empty"),
    ],
)
def test_a_wrong_value_is_told_in_words(
    flags: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(["--photos", "none.tar", "--out", "w", "--steps", "1", *flags.split()])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f": {why} (python -m worker train --help tells more)\n")


def test_bounds_belong_to_the_range_or_not() -> None:
    assert between(0, 1)("0") == 0
    assert share(0, 1)("1") == between(0, 1)("1") == 1
    assert whole(2)("2") == 2
    for parse in (share(0, 1), between(0, 1)):
        with pytest.raises(argparse.ArgumentTypeError, match="inf is not a finite number"):
            parse("inf")


def test_contestants_may_be_listed_with_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(evaluate, "contestant", asked.append)
    with pytest.raises(ConfigError, match="neither"):
        evaluate.main(["--photos", "none.tar", "--against", "phash, pdq ,"])
    assert asked == ["default", "phash", "pdq"]


@pytest.mark.parametrize(
    ("spec", "weights", "mode", "rounded"),
    [
        ("/x/at@home/w.safetensors", "/x/at@home/w.safetensors", "auto", True),
        ("/x/at@home/w.safetensors@bf16", "/x/at@home/w.safetensors", "bf16", True),
        ("default@float", "default", "fp32", False),
        ("default", "default", "auto", True),
    ],
)
def test_an_at_sign_may_be_part_of_a_path(
    spec: str, weights: str, mode: str, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[object, ...]] = []
    monkeypatch.setattr(contestants, "Embedded", lambda *given: made.append(given))
    contestants.contestant(spec)
    assert made == [(spec, weights, mode, rounded)]


def test_a_threshold_that_no_worker_takes_is_not_proposed() -> None:
    nearest = Nearest(np.linspace(0.1, 0.6, 200), np.zeros(200, np.int64))
    assert propose(nearest, 0.01).threshold > 0
    with pytest.raises(ConfigError, match=r"no threshold above 0 gives as many as 0.5 false"):
        propose(nearest, 0.5, stored=1)
