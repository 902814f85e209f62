"""The demo, whole: what it prints, what it writes, and that nothing of it is left."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from deploy import demo
from deploy.demo_photos import shipped_photos

END_SECONDS = 900.0
# valkey, tansu, two workers and a decoding process of each
PROCESSES = 6

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the demo with `start(*flags)`; its report goes to `report.html`."""
    started: list[subprocess.Popen[str]] = []

    def run(*flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "deploy.demo", "--report", str(tmp_path / "report.html")]
        environment = {**os.environ, "COLUMNS": "200", "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def run_to_the_end(process: subprocess.Popen[str]) -> tuple[str, dict[str, str], set[int]]:
    """Its output, the rows of its tables, and the ids of all processes it had."""
    seen: set[int] = set()
    deadline = time.monotonic() + END_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        seen |= descendants(process.pid)
        time.sleep(0.2)
    output = process.communicate(timeout=1)[0]
    rows = re.findall(r"│ (\S.*?) +│ +([\d.]+)(?: s)? +│", output)
    return output, dict(rows), seen


def descendants(pid: int) -> set[int]:
    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def still_there(pids: set[int]) -> list[psutil.Process]:
    """Which of these processes do not end within a while."""
    processes = []
    for pid in pids:
        try:
            processes.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return list(psutil.wait_procs(processes, timeout=60)[1])


def test_the_shipped_photos(start: Start, tmp_path: Path) -> None:
    process = start()
    output, rows, pids = run_to_the_end(process)
    assert process.returncode == 0, output
    kinds = ("unique", "duplicate", "exact")
    verdicts = sum(int(rows[f"verdict {kind}"]) for kind in kinds)
    assert rows["events"] == str(verdicts + 3)
    assert rows["verdict exact"] == "3"
    assert rows["dead letter undecodable"] == "1"
    assert rows["dead letter unsupported_format"] == "2"
    assert int(rows["right"]) + int(rows["wrong"]) == int(rows["events"])
    # How good the weights are is measured elsewhere; here they are the right ones, in one piece.
    assert int(rows["right"]) > 0.5 * int(rows["events"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg") > int(rows["verdict duplicate"])
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", page)
    assert len(pids) >= PROCESSES
    assert still_there(pids) == []
    assert list(tmp_path.glob("dedup-*")) == []


def test_a_folder_of_ones_own_with_anything_in_it(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "[red] pictures"
    (folder / "sub" / "deeper").mkdir(parents=True)
    photos = dict(shipped_photos())
    photos["chelsea"].save(folder / "chelsea.png")
    photos["coffee"].save(folder / "<b>&coffee.jpg")
    smaller = photos["coffee"].resize((300, 200), Image.Resampling.LANCZOS)
    smaller.save(folder / "sub" / "deeper" / "coffee.webp")
    (folder / "sub" / "same.png").write_bytes((folder / "chelsea.png").read_bytes())
    (folder / "sub" / "broken.jpg").write_bytes((folder / "<b>&coffee.jpg").read_bytes()[:5_000])
    (folder / "notes.txt").write_text("no image")
    (folder / "empty.jpg").touch()
    process = start("--images", str(folder))
    output, rows, _ = run_to_the_end(process)
    assert process.returncode == 0, output
    assert rows["events"] == "7"
    assert rows["verdict exact"] == "1"
    assert rows["verdict duplicate"] == "1"
    assert rows["verdict unique"] == "2"
    assert rows["dead letter undecodable"] == "1"
    assert rows["dead letter unsupported_format"] == "2"
    assert "right" not in rows
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;&amp;coffee.jpg" in page
    assert "<b>&coffee" not in page


@pytest.mark.parametrize(
    ("number", "processes"),
    [(signal.SIGINT, PROCESSES), (signal.SIGKILL, PROCESSES), (signal.SIGTERM, 1)],
)
def test_nothing_is_left_when_it_is_ended_early(
    start: Start, number: signal.Signals, processes: int, tmp_path: Path
) -> None:
    process = start()
    deadline = time.monotonic() + END_SECONDS
    while len(pids := descendants(process.pid)) < processes:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=180)[0]
    assert still_there(pids) == []
    if number is not signal.SIGKILL:
        assert process.returncode == 130, output
        assert "Traceback" not in output
        assert list(tmp_path.glob("dedup-*")) == []


def test_events_without_an_answer_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "WORKERS", 0)
    monkeypatch.setattr(demo, "IDLE_SECONDS", 1.0)
    (tmp_path / "a.jpg").touch()
    status = demo.main(["--images", str(tmp_path), "--report", str(tmp_path / "report.html")])
    assert status == 1
    assert "1 events got no answer" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["missing", "empty", "with,comma"])
def test_a_folder_that_cannot_be_shown_is_one_line(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "with,comma").mkdir()
    assert demo.main(["--images", str(tmp_path / folder)]) == 2
    assert "Traceback" not in capsys.readouterr().out
