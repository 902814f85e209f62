"""The documentation says what the code does."""

import re
from pathlib import Path

import pytest

from deploy import docs
from worker.errors import Reason
from worker.metrics import Metrics

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", docs.PAGES)
def test_tables_are_those_of_the_code(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert docs.current(text) == text, "run: python -m deploy.docs"


def test_a_page_without_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="no marked table"):
        docs.current("# nothing")


def test_every_dead_letter_reason_is_explained() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [reason for reason in Reason if f"`{reason}`" not in text] == []


def test_links_to_files_lead_somewhere() -> None:
    for page in ROOT.glob("**/*.md"):
        if ".venv" in page.parts:
            continue
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_metric_names_carry_the_prefix_and_base_units() -> None:
    for family in Metrics().registry.collect():
        assert family.name.startswith("dedup_")
        assert not family.name.endswith(("_ms", "_milliseconds", "_mb", "_percent"))


def test_every_promise_names_tests_that_are_there() -> None:
    text = (ROOT / "deploy/RELIABILITY.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.endswith("shown by |")]  # the heads
    assert len(rows) > 50
    for row in rows:
        named = re.findall(r"`(tests/[^`:]+)(?:::([^`]+))?`", row)
        assert named, f"no test: {row}"
        for file, test in named:
            assert (ROOT / file).exists(), row
            assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), row
