"""Commands that keep a store: drop, verify, gc and label."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asking_support import ATT, RES
from cli_support import failure, printed, run


def test_drop_frees_space_and_the_store_stays_whole(copied: Callable[[], Path]) -> None:
    store = copied()
    before = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    for artifact, name in (
        ("z.3", "sites/z.3"),
        (ATT, f"firings/{ATT}"),
        ("blocks.0.hook_resid_pre", "sites/resid_pre.0"),
    ):
        assert printed("drop", store, artifact).startswith(f"{name} is gone")
        assert "artifact" in failure("drop", store, artifact)
    assert not (store / "arrays/sites/z.3").exists() and not (store / f"firings/{ATT}").exists()
    assert sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) < before
    assert json.loads(printed("verify", store, "--json"))["faults"] == []
    assert json.loads(printed("sql", store, "SELECT sae FROM saes", "--json")) == [{"sae": RES}]


def test_verify_names_every_fault_and_fails(copied: Callable[[], Path]) -> None:
    store = copied()
    damaged = [
        store / "arrays/sites/z.2/c.1.0",
        store / f"firings/{RES}/0.zip",
        next((store / "index").glob("*.duckdb")),
    ]
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    result = run("verify", store)
    assert result.exit_code == 1
    assert all(path.name in result.stdout for path in damaged)
    faults = json.loads(run("verify", store, "--json").stdout)
    assert not faults["ok"] and len(faults["faults"]) >= 3


def test_gc_removes_what_nothing_names(copied: Callable[[], Path]) -> None:
    store = copied()
    (store / "arrays/sites/z.2/c.9.0").write_bytes(b"left over")
    (store / "index/features-dead.duckdb").write_bytes(b"left over")
    assert "orphan" in printed("verify", store)
    assert "removed" in printed("gc", store)
    assert "orphan" not in printed("verify", store)
    assert not (store / "arrays/sites/z.2/c.9.0").exists()


def labels(store: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        printed("sql", store, "SELECT sae, feature, label FROM features WHERE label IS NOT NULL ORDER BY ALL", "--json")
    )
    return found


def test_labels_are_added_and_replaced(copied: Callable[[], Path], tmp_path: Path) -> None:
    store = copied()
    (tmp_path / "a.csv").write_text(f'sae,feature,label\n{RES},9,"is, after a name"\n{ATT},3,\u00fcber\n')
    assert printed("label", store, tmp_path / "a.csv").startswith("2 features named")
    (tmp_path / "b.jsonl").write_text(json.dumps({"sae": RES, "feature": 9, "label": "new\nline"}) + "\n\n")
    printed("label", store, tmp_path / "b.jsonl")
    expected = [{"sae": ATT, "feature": 3, "label": "\u00fcber"}, {"sae": RES, "feature": 9, "label": "new\nline"}]
    assert labels(store) == expected
    assert "new⏎line" in printed("stats", store, RES, "--feature", 9)
    assert json.loads(printed("verify", store, "--json"))["faults"] == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", f"sae,feature\n{RES},1\n", ":1: "),
        ("a.csv", f"sae,feature,label\n{RES},1\n", ":2: "),
        ("a.csv", f"sae,feature,label\n{RES},1,good\n{RES},256,bad\n", ":3: "),
        ("a.csv", f"sae,feature,label\n{RES},-1,bad\n", "0 to 255"),
        ("a.csv", "sae,feature,label\nnosuch,1,bad\n", "SAE 'nosuch'"),
        ("a.jsonl", json.dumps({"sae": RES, "feature": 1.5, "label": "x"}), ":1: "),
        ("a.jsonl", json.dumps({"sae": RES, "feature": 1, "label": None}), ":1: "),
        ("a.jsonl", "not json", ":1: "),
        ("a.jsonl", b"\xff\xfe", "UTF-8"),
    ],
)
def test_labels_that_do_not_fit_change_nothing(
    copied: Callable[[], Path], tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    store = copied()
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in failure("label", store, tmp_path / name)
    assert not (store / "labels.json").exists()
    assert "no file" in failure("label", store, tmp_path / "none.csv")
