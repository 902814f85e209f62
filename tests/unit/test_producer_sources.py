"""What a folder, a CSV and JSON lines give, hostile ones too."""

import errno
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.sources import (
    MAX_LINE_BYTES,
    Found,
    Item,
    Rejected,
    SourceError,
    count_folder,
    id_of_link,
    read_csv,
    read_folder,
    read_json_lines,
)

LINK = "https://images.example/one.jpg"


def csv_items(text: str, *columns: str, delimiter: str = ",") -> list[Item]:
    return list(read_csv(io.StringIO(text, newline=""), columns, delimiter))


def json_items(data: bytes) -> list[Item]:
    return list(read_json_lines(io.BytesIO(data)))


def test_a_folder_gives_every_file_below_it_in_order(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.txt", "sub/c.png", "sub/deeper/empty", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name.endswith("empty") else b"x")
    os.mkfifo(tmp_path / "pipe")
    found = list(read_folder(tmp_path))
    assert all(isinstance(item, Found) for item in found)
    ids = [item.image_id for item in found if isinstance(item, Found)]
    assert ids == [".hidden", "a.txt", "b.jpg", "sub/c.png", "sub/deeper/empty"]
    assert count_folder(tmp_path) == 5


def test_folder_ids_do_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    ids = []
    for place in ("here", "there"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub" / "a b%.jpg").write_bytes(b"x")
        (item,) = read_folder(tmp_path / place)
        assert isinstance(item, Found)
        assert item.uri is not None
        assert item.uri.endswith(f"/{place}/sub/a%20b%25.jpg")
        ids.append(item.image_id)
    assert ids == ["sub/a b%.jpg"] * 2


def test_a_file_name_that_is_no_utf8_gets_an_id_that_is(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    (item,) = read_folder(tmp_path)
    assert isinstance(item, Found)
    assert item.image_id == "caf\\xe9.jpg"
    assert item.uri is not None
    assert item.uri.endswith("/caf%E9.jpg")


def test_a_folder_that_links_to_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert count_folder(tmp_path) == 1


@pytest.mark.parametrize("unreadable", ["", "a", "b", "b/last"])
def test_a_folder_that_cannot_be_read_is_reported_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreadable: str
) -> None:
    for name in ("a", "b", "b/last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_bytes(b"x")
    scandir = os.scandir

    def denied(path: str) -> object:
        # What root, who runs the tests here and there, would not meet.
        if Path(path) == tmp_path / unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    rejected = [item for item in read_folder(tmp_path) if isinstance(item, Rejected)]
    assert rejected == [Rejected(str(tmp_path / unreadable), "Permission denied")]


def test_a_file_that_cannot_be_looked_at_is_reported_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    look = Path.stat

    def denied(path: Path, **options: bool) -> os.stat_result:
        if path.name == "a.jpg":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path, **options)

    monkeypatch.setattr(Path, "stat", denied)
    bad, good = sorted(read_folder(tmp_path), key=lambda item: isinstance(item, Found))
    assert bad == Rejected(str(tmp_path / "a.jpg"), "Permission denied")
    assert isinstance(good, Found)


def test_links_that_lead_nowhere_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "below a file").symlink_to(tmp_path / "a.jpg" / "nothing")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (item,) = read_folder(tmp_path)
    assert isinstance(item, Found)


def test_csv_links_of_several_columns_with_blank_cells() -> None:
    items = csv_items(f"name,front,back\nshirt,{LINK},\nhat,,http://h.example/b\n", "front", "back")
    assert [(item.place, item.uri) for item in items if isinstance(item, Found)] == [
        ("line 2, column front", LINK),
        ("line 3, column back", "http://h.example/b"),
    ]


def test_csv_ids_are_the_same_for_the_same_link_anywhere() -> None:
    (one,) = csv_items(f"a,link\nx,{LINK}\n", "link")
    (other,) = csv_items(f"\ufefflink\n{LINK}\n".lstrip("\ufeff"))
    assert isinstance(one, Found)
    assert isinstance(other, Found)
    assert one.image_id == other.image_id == id_of_link(LINK)
    assert id_of_link(LINK + "?v=2") != one.image_id


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("a,b\n", ()),
        ("a,b\n", ("c",)),
        ("a,a\n", ("a",)),
        ("", ()),
        ('"unclosed', ("a",)),
    ],
)
def test_a_csv_header_that_does_not_fit_is_one_error(text: str, columns: tuple[str, ...]) -> None:
    with pytest.raises(SourceError):
        csv_items(text, *columns)


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        (f"{LINK}\nhttp://h.example/b\n", ()),
        (f"HTTP://h.example/a,{LINK}\n", ()),
        (f"shirt,{LINK}\nhat,http://h.example/b\n", ("link",)),
        (f"shirt , s3://bucket/a\nhat,{LINK}\n", ()),
    ],
)
def test_a_csv_without_a_header_loses_no_link(text: str, columns: tuple[str, ...]) -> None:
    with pytest.raises(SourceError, match="put a line with names"):
        csv_items(text, *columns)


def test_a_column_may_be_named_like_a_link() -> None:
    (item,) = csv_items(f"name,https://schema.org/image\nhat,{LINK}\n", "https://schema.org/image")
    assert isinstance(item, Found)


@pytest.mark.parametrize(
    ("header", "delimiter"), [("url;o", ","), ("url\to", ","), ("url,o", "\t"), ("url;o", "\t")]
)
def test_columns_set_apart_by_something_else_are_not_one(header: str, delimiter: str) -> None:
    text = f"{header}\n{LINK}\n"
    with pytest.raises(SourceError, match=r"a \.csv is read with ',' and a \.tsv with tabs"):
        csv_items(text, delimiter=delimiter)
    (item,) = csv_items(text, header, delimiter=delimiter)
    assert isinstance(item, Found)


@pytest.mark.parametrize(
    "row",
    [
        "no link",
        "ftp://host.example/a",
        "javascript:alert(1)",
        "http:///nohost",
        "http://[broken/a",
        "file://",
        f"{LINK},surplus",
        '"half quoted" x',
        "https://h.example/" + "a" * 200_000,
        "https://h.example/\udcff",
    ],
)
def test_a_bad_csv_row_is_reported_with_its_line_and_the_rest_goes_on(row: str) -> None:
    bad, good = csv_items(f"link\n{row}\n{LINK}\n")
    assert isinstance(bad, Rejected)
    assert bad.place.startswith("line 2")
    assert len(bad.reason) < 200
    assert isinstance(good, Found)


def test_json_lines_keep_what_the_event_says() -> None:
    (item,) = json_items(b'\n{"image_id":"7","uri":"file:///a.jpg","op":"check","extra":1}\n')
    assert item == Found("line 2", "7", "file:///a.jpg", fields={"op": "check", "extra": 1})


def test_a_json_line_without_an_id_gets_the_one_of_its_link() -> None:
    (item,) = json_items(f'{{"uri":"{LINK}"}}'.encode())
    assert isinstance(item, Found)
    assert item.image_id == id_of_link(LINK)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b"{}",
        b'{"image_id":7,"uri":"https://h.example/a"}',
        b'{"image_id":"a","uri":7}',
        b'{"image_id":"a","uri":"gopher://host/a"}',
        b'{"image_id":""}',
        b"[" * 100_000,
        b'{"image_id":"' + b"a" * MAX_LINE_BYTES + b'"}',
    ],
)
def test_a_bad_json_line_is_reported_with_its_number_and_the_rest_goes_on(line: bytes) -> None:
    good = b'{"image_id":"good","op":"delete"}\n'
    before, bad, after = json_items(good + line + b"\n" + good)
    assert isinstance(before, Found)
    assert isinstance(bad, Rejected)
    assert bad.place == "line 2"
    assert isinstance(after, Found)
    assert after.place == "line 3"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f'[{{"uri":"{LINK}"}}]', 1),
        (f'[\n{{"uri":"{LINK}"}},\n{{"uri":"{LINK}"}}\n]\n', 1),
        (f'\n \n\t[{{"uri":"{LINK}"}}]', 3),
        (f'\ufeff[{{"uri":"{LINK}"}}]', 1),
        ("[" + f'{{"uri":"{LINK}"}},' * (MAX_LINE_BYTES // len(LINK)), 1),
    ],
    ids=["one line", "a line each", "after blank lines", "with a mark", "longer than a line"],
)
def test_an_array_is_one_error(text: str, line: int) -> None:
    with pytest.raises(SourceError, match=f"line {line}: an array; one object a line is wanted"):
        json_items(text.encode())


@given(st.binary(max_size=300))
def test_no_bytes_stop_the_reading_of_json_lines(data: bytes) -> None:
    lines = b"{}\n" + data  # what begins like an array is one error
    assert all(isinstance(item, Found | Rejected) for item in json_items(lines))


@given(st.text(max_size=300))
def test_no_text_stops_the_reading_of_a_csv(text: str) -> None:
    assert all(isinstance(item, Found | Rejected) for item in csv_items(f"link\n{text}", "link"))
