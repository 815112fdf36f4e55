"""docs/reference.md matches the schema, and every key is documented."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from pathlib import Path

import pytest
from make_reference import (
    TARGET,
    UndocumentedError,
    field_doc,
    main,
    reference,
    section_doc,
)

from opo_megatron.config.keys import key_types


def test_the_committed_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_page_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "reference.md"
    stale.write_text(TARGET.read_text(encoding="utf-8").replace("K: responses per prompt", "K"))
    monkeypatch.setattr("make_reference.TARGET", stale)
    assert main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err


def test_every_key_is_on_the_page_once() -> None:
    page = reference()
    for key, hint in key_types().items():
        row = f"\n## `{key}`\n" if is_dataclass(hint) else f"\n| `{key}` |"
        assert page.count(row) == 1, key


def test_a_key_or_section_without_a_docstring_is_refused() -> None:
    @dataclass
    class BareSection:
        key: int = 1

    with pytest.raises(UndocumentedError, match=r"BareSection\.key"):
        field_doc(BareSection, "key")
    with pytest.raises(UndocumentedError, match="BareSection"):
        section_doc(BareSection)


def test_a_base_class_documents_its_keys_unless_overridden() -> None:
    hints = key_types()
    assert field_doc(hints["warm_start"], "eps") == field_doc(hints["optimizer"], "eps")
    assert field_doc(hints["warm_start"], "lr") != field_doc(hints["optimizer"], "lr")
