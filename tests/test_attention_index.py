"""Attention in the index: edges by weight, means of heads that do not depend on how the parts came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_support import SHARD_ROWS, FakeSource

from actstore.blocks import ATTENTION_VALUES, HEAD_METRICS
from actstore.errors import CorruptStore, UnsupportedFormat
from actstore.index import (
    Connection,
    build_index,
    compact,
    find_orphans,
    gc_index,
    open_index,
    read_catalog,
    verify_index,
)
from actstore.index import catalog as catalog_module
from actstore.sealed import seal, sha256_hex, unseal

N_HEADS, K = 3, 4
MINIMA = {0: 0.1, 2: 0.0, 11: 0.5}


class AttentiveSource(FakeSource):
    """The fake truth with attention of three layers, each indexed from another weight on."""

    def tables(self) -> Any:
        stored = [{"layer": layer, "minimum": minimum} for layer, minimum in MINIMA.items()]
        return {**super().tables(), "saes": [], "lenses": [], "attention": stored}

    def attend(self, *shards: int, layers: Sequence[int] = tuple(MINIMA)) -> None:
        """Make attention of shards: fewer edges at the start of sequences, NaN metrics, weights at the minimum."""
        for shard in shards:
            pos = self.tokens[shard][:, 2]
            for layer in layers:
                weights = -np.sort(-self.random.random((len(pos), N_HEADS, K)).astype(np.float32), axis=-1)
                weights[5, 0, 1] = np.float32(MINIMA[layer])
                offsets = self.random.integers(0, 8, weights.shape).astype(np.int32)
                missing = np.arange(K) > pos[:, None, None]
                missing = np.broadcast_to(missing, weights.shape)
                weights[missing], offsets[missing] = np.nan, -1
                values = self.random.random((len(pos), N_HEADS, len(ATTENTION_VALUES))).astype(np.float32)
                values[:, :, ATTENTION_VALUES.index("induction")][self.random.random((len(pos), N_HEADS)) < 0.7] = (
                    np.nan
                )
                values[:, 2, ATTENTION_VALUES.index("bos_attention")] = np.nan
                values[7, 1, :2] = np.nan
                arrays = {"weights": weights, "offsets": offsets, "values": values}
                self.matrices |= {(f"attention/{layer}/{name}", shard): one for name, one in arrays.items()}
                self.receipts.setdefault(f"attention/{layer}", {})[shard] = f"a{shard}"


@pytest.fixture
def source() -> AttentiveSource:
    made = AttentiveSource((3, 3))
    made.attend(0, 1, 3)
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[AttentiveSource, Path]:
    """A source and its index, neither of which a test may change."""
    made, directory = AttentiveSource((3, 3)), tmp_path_factory.mktemp("built")
    made.attend(0, 1, 3)
    build_index(made, directory)
    return made, directory


def opened(directory: Path) -> Connection:
    return open_index(read_catalog(directory), lambda name: directory / name, threads=2)


def ask(directory: Path, text: str) -> list[tuple[Any, ...]]:
    with opened(directory) as connection:
        return [tuple(row.values()) for row in connection.sql(text).table.to_pylist()]


def expected_heads(source: AttentiveSource, layer: int) -> list[tuple[Any, ...]]:
    rows = []
    shards = sorted(source.receipts[f"attention/{layer}"])
    plain = np.concatenate([source.tokens[shard][:, 5] == 0 for shard in shards])
    values = np.concatenate([source.matrices[f"attention/{layer}/values", shard] for shard in shards])[plain]
    for head in range(N_HEADS):
        columns = [values[:, head, ATTENTION_VALUES.index(name)].astype(np.float64) for name in HEAD_METRICS]
        means = [None if np.isnan(one).all() else float(np.nanmean(one)) for one in columns]
        rows.append((layer, head, *means))
    return rows


@pytest.mark.parametrize("layer", MINIMA)
def test_edges_from_the_minimum_on_are_listed_by_row(built: tuple[AttentiveSource, Path], layer: int) -> None:
    source, directory = built
    expected = []
    for shard in (0, 1, 3):
        weights, offsets = (source.matrices[f"attention/{layer}/{name}", shard] for name in ("weights", "offsets"))
        for place in range(len(weights)):
            row = shard * SHARD_ROWS + place
            for head in range(N_HEADS):
                for weight, offset in zip(weights[place, head].tolist(), offsets[place, head].tolist(), strict=True):
                    if weight >= np.float32(MINIMA[layer]):
                        expected.append((layer, head, row, row - offset, weight))
    assert any(edge[4] == np.float32(MINIMA[layer]) for edge in expected)
    assert ask(directory, f"FROM attention WHERE layer = {layer}") == expected
    some = expected[len(expected) // 2][2]
    assert ask(directory, f"FROM attention WHERE layer = {layer} AND row = {some}") == [
        edge for edge in expected if edge[2] == some
    ]


def test_what_is_not_a_number_is_null(built: tuple[AttentiveSource, Path]) -> None:
    source, directory = built
    assert ask(directory, "FROM attention_rows WHERE layer = 2 AND row = 7 AND head = 1") == [(2, 1, 7, None, None)]
    found = ask(directory, "SELECT kept_weight, entropy FROM attention_rows WHERE layer = 2 AND row = 6 ORDER BY head")
    assert found == [tuple(map(float, one)) for one in source.matrices["attention/2/values", 0][6, :, :2].tolist()]


def test_heads_are_means_over_plain_rows(built: tuple[AttentiveSource, Path]) -> None:
    source, directory = built
    found = ask(directory, "FROM heads ORDER BY layer, head")
    expected = [row for layer in MINIMA for row in expected_heads(source, layer)]
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for mine, wanted in zip(found, expected, strict=True):
        assert [value is None for value in mine] == [value is None for value in wanted]
        assert [v for v in mine if v is not None] == pytest.approx([v for v in wanted if v is not None], abs=1e-9)


def test_heads_are_the_same_to_the_last_bit_however_they_were_indexed(source: AttentiveSource, tmp_path: Path) -> None:
    said = []
    source.attend(2, 4, 5)
    receipts = {artifact: dict(of) for artifact, of in source.receipts.items()}
    for name, order in (("whole", [[0, 1, 2, 3, 4, 5]]), ("late", [[5], [3, 1], [4], [0], [2]])):
        done: list[int] = []
        for shards in order:
            done += shards
            source.receipts = {
                artifact: {shard: of[shard] for shard in of if shard in done or not artifact.startswith("attention")}
                for artifact, of in receipts.items()
            }
            build_index(source, tmp_path / name)
        said.append(ask(tmp_path / name, "FROM heads ORDER BY layer, head"))
    assert len(read_catalog(tmp_path / "late").select("attention", "0")) == 5
    before = (
        ask(tmp_path / "late", "FROM attention ORDER BY ALL"),
        ask(tmp_path / "late", "FROM attention_rows ORDER BY ALL"),
    )
    compact(tmp_path / "late")
    assert len(read_catalog(tmp_path / "late").select("attention", "0")) == 4
    said.append(ask(tmp_path / "late", "FROM heads ORDER BY layer, head"))
    assert said[0] == said[1] == said[2]
    assert before == (
        ask(tmp_path / "late", "FROM attention ORDER BY ALL"),
        ask(tmp_path / "late", "FROM attention_rows ORDER BY ALL"),
    )
    assert verify_index(tmp_path / "late") == []


def test_a_layer_made_again_replaces_its_parts_alone(source: AttentiveSource, tmp_path: Path) -> None:
    first = build_index(source, tmp_path)
    source.attend(1, layers=[2])
    source.receipts["attention/2"][1] = "again"
    second = build_index(source, tmp_path)
    same = {part.name for part in first.parts} & {part.name for part in second.parts}
    assert {part.subject for part in second.parts if part.name not in same} == {"2"}
    for row, expected in zip(
        ask(tmp_path, "FROM heads WHERE layer = 2 ORDER BY head"), expected_heads(source, 2), strict=True
    ):
        assert row[2:4] == pytest.approx(expected[2:4], abs=1e-9)


def downgrade(directory: Path, version: int) -> None:
    """Make the current catalog one of another format."""
    catalog = read_catalog(directory)
    body = unseal((directory / catalog.name).read_bytes(), "")
    data = seal({**{key: value for key, value in body.items() if key != "digest"}, "format": version})
    (directory / catalog.name).write_bytes(data)
    (directory / "CURRENT").write_bytes(seal({"catalog": catalog.name, "sha256": sha256_hex(data)}))


def test_an_index_of_an_older_format_says_what_to_do_and_is_made_anew(source: AttentiveSource, tmp_path: Path) -> None:
    build_index(source, tmp_path)
    said = ask(tmp_path, "FROM heads ORDER BY ALL")
    old = {path.name for path in tmp_path.glob("*.duckdb")}
    downgrade(tmp_path, catalog_module.FORMAT - 1)
    with pytest.raises(UnsupportedFormat, match=r"format 1.*format 2.*run `actstore index`"):
        read_catalog(tmp_path)
    assert "run `actstore index`" in verify_index(tmp_path)[0] and find_orphans(tmp_path) == []
    build_index(source, tmp_path)
    assert ask(tmp_path, "FROM heads ORDER BY ALL") == said and verify_index(tmp_path) == []
    assert old < set(gc_index(tmp_path)) and ask(tmp_path, "FROM heads ORDER BY ALL") == said


def test_an_index_of_a_newer_format_is_left_alone(source: AttentiveSource, tmp_path: Path) -> None:
    build_index(source, tmp_path)
    downgrade(tmp_path, catalog_module.FORMAT + 1)
    for use in (read_catalog, lambda directory: build_index(source, directory)):
        with pytest.raises(UnsupportedFormat, match="install a newer actstore"):
            use(tmp_path)


@pytest.mark.parametrize("subject", ["x", "", "-1", "1/2", "1); DROP", "9" * 12])
def test_a_layer_that_cannot_be_one_is_refused(built: tuple[AttentiveSource, Path], subject: str) -> None:
    (part, *_) = read_catalog(built[1]).select("attention")
    with pytest.raises(CorruptStore, match="no part of one"):
        replace(part, subject=subject)
