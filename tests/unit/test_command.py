"""`python -m worker` as a command: what it says of a slip, and to a reader that has gone."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from deploy.local import LocalRedis
from tests.stream.harness import until
from worker import logs
from worker.__main__ import COMMANDS, main
from worker.logs import Sparing


def test_a_misspelt_command_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fsk"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert all(command in told for command in COMMANDS)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_a_misspelt_flag_is_one_line(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--nope"])
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert (told.out, told.err.count("\n"), told.err[:7]) == ("", 1, "error: ")


def test_a_variable_that_is_no_setting_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEDUP_TRESHOLD", "0.9")
    monkeypatch.setenv("DEDUP_LOG_LEVEL", "info")
    command = ["--weights", "no-such-file", "--http-port", "0", "--log-format", "json"]
    assert main(command) == 2
    told = capsys.readouterr().err.splitlines()
    assert "error: no weights file at no-such-file" in told
    strange = [json.loads(line) for line in told if "no such setting" in line]
    assert [(line["variable"], line["meant"]) for line in strange] == [
        ("DEDUP_TRESHOLD", "DEDUP_THRESHOLD")
    ]


def test_a_reader_that_has_gone_is_no_broken_invariant() -> None:
    with LocalRedis() as server:
        reading, writing = os.pipe()
        os.close(reading)
        ended = subprocess.run(
            [sys.executable, "-m", "worker", "fsck", "--redis-url", server.url],
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
            timeout=120,
        )
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


def test_control_c_ends_a_command_with_a_word() -> None:
    with LocalRedis() as server:
        os.kill(server.pid, signal.SIGSTOP)
        fsck = subprocess.Popen(
            [sys.executable, "-m", "worker", "fsck", "--redis-url", server.url],
            stderr=subprocess.PIPE,
        )
        try:
            until(lambda: is_connected(fsck.pid, server.port), 60, "a connection to Redis")
            fsck.send_signal(signal.SIGINT)
            _, told = fsck.communicate(timeout=60)
        finally:
            fsck.kill()
            os.kill(server.pid, signal.SIGCONT)
    assert (fsck.returncode, told) == (128 + signal.SIGINT, b"interrupted\n")


def is_connected(pid: int, port: int) -> bool:
    """Whether a process is connected to that port."""
    return any(
        each.raddr and each.raddr.port == port for each in psutil.Process(pid).net_connections()
    )


def test_a_trouble_that_lasts_is_said_sparingly(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("worker.logs.time.monotonic", lambda: now)
    sparing = Sparing()
    assert not sparing.over("redis")
    assert sparing.due("redis", "refused")
    assert not sparing.due("redis", "refused")
    assert sparing.due("kafka", "refused")
    assert sparing.due("redis", "timeout")
    now += logs.REMIND_SECONDS
    assert sparing.due("redis", "timeout")
    assert sparing.over("redis")
    assert not sparing.over("redis")
    assert sparing.due("redis", "timeout")
