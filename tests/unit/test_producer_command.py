"""What `python -m producer` says and returns; Kafka is a double that takes everything."""

import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import producer.__main__ as command
from producer.events import Outgoing
from producer.publisher import Tally
from worker.connections import KafkaSettings

LINK = "https://images.example/one.jpg"


class TakesAll:
    """A publisher whose records are acknowledged at once."""

    unreachable = False

    def __init__(self, _settings: KafkaSettings) -> None:
        self.tally = Tally()

    def __enter__(self) -> "TakesAll":
        return self

    def __exit__(self, *_error: object) -> None:
        """Nothing is left to wait for."""

    def send(self, _outgoing: Outgoing) -> None:
        self.tally.sent += 1
        self.tally.acknowledged += 1


@pytest.fixture(autouse=True)
def _no_kafka(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Publisher", TakesAll)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of each source; the working directory."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "links.csv").write_text(f"link\n{LINK}\n")
    (tmp_path / "header.csv").write_text("link\n")
    (tmp_path / "events.jsonl").write_text(f'{{"uri":"{LINK}"}}\n')
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "array.json").write_text(f'[\n{{"uri":"{LINK}"}}\n]\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("name", ["empty", "header.csv", "blank.jsonl"])
def test_a_source_without_events_is_told(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([name]) == command.OK
    assert capsys.readouterr().err == f"nothing to send in {name}\n"


def test_standard_input_without_events_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO()))
    assert command.main(["-"]) == command.OK
    assert capsys.readouterr().err == "nothing to send in standard input\n"


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("name", ["photos", "links.csv", "events.jsonl"])
@pytest.mark.parametrize("options", [[], ["--op", "check"]])
def test_a_source_with_events_is_only_summed_up(
    name: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([name, *options]) == command.OK
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("1 of 1 events acknowledged")


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(path: str) -> object:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    assert command.main([str(source / "photos")]) == command.INCOMPLETE
    assert capsys.readouterr().err == f"{source / 'photos'}: Permission denied\n"


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("name", ["photos", "events.jsonl", "-"])
def test_columns_of_what_has_none_are_one_line_and_status_2(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([name, "--column", "link"]) == command.UNUSABLE
    wanted = "producer: --column is for a file ending in .csv or .tsv, not for"
    assert capsys.readouterr().err == f"{wanted} {name}\n"


@pytest.mark.usefixtures("source")
def test_an_array_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["array.json"]) == command.UNUSABLE
    assert capsys.readouterr().err == ("producer: line 1: an array; one object a line is wanted\n")


def test_an_unknown_op_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main([".", "--op", "foo"])
    assert left.value.code == command.UNUSABLE
    answer = capsys.readouterr().err.splitlines()[-1]
    assert "invalid choice: 'foo'" in answer
    assert all(op in answer for op in ("add", "check", "delete"))


@pytest.mark.parametrize("rate", ["abc", "0", "inf", "nan"])
def test_a_rate_that_is_none_is_told(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main([".", "--rate", rate])
    assert left.value.code == command.UNUSABLE
    assert f"argument --rate: {rate}" in capsys.readouterr().err.replace("'", "")


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    "options",
    [
        ["--max-message-bytes", "1"],
        ["--security-protocol", "TLS"],
        ["--security-protocol", "SASL_SSL"],
        ["--kafka-ca-file", "missing.pem"],
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["photos", *options]) == command.UNUSABLE
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("producer: ")
    assert said.err.count("\n") == 1
