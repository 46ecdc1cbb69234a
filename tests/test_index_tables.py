"""Every column of every table, against the fake truth asked one by one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from index_support import HALF, LENS, N_FEATURES, N_RANKS, SHARD_ROWS, VOCABULARY, WIDE, FakeSource

from actstore.blocks import RowFirings
from actstore.index import EMPTY, TABLES, Connection, build_index, open_index

DONE = (0, 1, 3)


@pytest.fixture(scope="module")
def source() -> FakeSource:
    made = FakeSource()
    made.extract(*DONE)
    made.compute_logits(HALF)
    made.given_labels = [(HALF, 3, 'it\'s "named"'), (WIDE, 299, "last")]
    return made


@pytest.fixture(scope="module")
def connection(source: FakeSource, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = tmp_path_factory.mktemp("index")
    catalog = build_index(source, directory)
    with open_index(catalog, lambda name: directory / name, labels=source.labels(), threads=1) as opened:
        yield opened


def ask(connection: Connection, text: str, parameters: Any = None) -> list[tuple[Any, ...]]:
    """Return the rows of an answer, NaN as the text "nan" so that rows can be compared."""
    table = connection.sql(text, parameters).table
    columns = [[_plain(value) for value in column.to_pylist()] for column in table.columns]
    return list(zip(*columns, strict=True))


def _plain(value: Any) -> Any:
    return "nan" if isinstance(value, float) and math.isnan(value) else value


@pytest.mark.parametrize("table", TABLES)
def test_columns_and_types_are_the_contract(connection: Connection, table: str) -> None:
    described = ask(connection, f"DESCRIBE {table}")
    assert {name: kind for name, kind, *_ in described} == dict(TABLES[table])


@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_there_and_empty_before_anything_was_indexed(table: str) -> None:
    with open_index(EMPTY, Path, threads=1) as connection:
        assert ask(connection, f"FROM {table}") == []
        assert {name: kind for name, kind, *_ in ask(connection, f"DESCRIBE {table}")} == dict(TABLES[table])


def test_small_tables(connection: Connection) -> None:
    assert ask(connection, "SELECT model, revision, shards_done, shards_total, versions->>'a' FROM store") == [
        ("m", None, 3, 5, "1")
    ]
    assert ask(connection, "SELECT pass, (recipe->'context')::INTEGER, digest, done, total FROM passes") == [
        ("p", 30, "d", 3, 5)
    ]
    assert ask(connection, "FROM sites") == [("resid_post.1", "resid_post", 1, 8, "float32", "p")]
    assert ask(connection, "SELECT sae, site, layer, width, architecture FROM saes ORDER BY width") == [
        (HALF, "resid_post.1", 1, 40, None),
        (WIDE, "resid_post.1", 1, 300, None),
    ]
    assert ask(connection, "FROM health") == [("fvu", HALF, 0.25, "≤ 1", None)]
    assert ask(connection, "FROM vocabulary ORDER BY token_id") == list(enumerate(VOCABULARY))


def test_documents_and_sequences(source: FakeSource, connection: Connection) -> None:
    found = ask(connection, "FROM documents ORDER BY doc")
    expected = []
    for segment in source.segments():
        for doc in range(segment.first_doc, segment.first_doc + segment.n_docs):
            row = source.document(doc)
            expected.append(
                (doc, segment.segment, row["text"], row["n_tokens"], row["metadata"], row["parent"], row["variant"])
            )
    assert found == expected
    assert ask(connection, "SELECT metadata->>'topic' FROM documents WHERE doc = 2") == [("it's 2",)]
    sequences = np.concatenate(source.found_sequences)
    assert ask(connection, "FROM sequences ORDER BY seq") == [
        (seq, *map(int, rest)) for seq, rest in enumerate(sequences)
    ]


def test_tokens(source: FakeSource, connection: Connection) -> None:
    sequences = np.concatenate(source.found_sequences)
    expected = []
    for shard, matrix in source.tokens.items():
        for place, (token_id, seq, pos, start, end, flags, role) in enumerate(matrix.tolist()):
            kinds = (bool(flags & 1), bool(flags & 2), bool(flags & 4))
            name = {-1: None, 0: "user"}.get(role, str(role))
            row = shard * SHARD_ROWS + place
            doc = int(sequences[seq, 0])
            expected.append((row, seq, doc, pos, token_id, VOCABULARY[token_id], start, end, *kinds, name))
    assert ask(connection, "FROM tokens ORDER BY row") == expected


def test_predictions_have_no_target_on_a_sequences_last_row(source: FakeSource, connection: Connection) -> None:
    expected = []
    for shard in DONE:
        values, ids = source.matrix("predictions/values", shard), source.matrix("predictions/ids", shard)
        for place, ((logprob, entropy, top1), (target, top)) in enumerate(
            zip(values.tolist(), ids.tolist(), strict=True)
        ):
            last = target < 0
            row = shard * SHARD_ROWS + place
            expected.append((row, None if last else target, None if last else logprob, entropy, top, top1))
    assert sum(row[1] is None for row in expected) == 3 * len(DONE)
    assert ask(connection, "FROM predictions ORDER BY row") == expected


@pytest.mark.parametrize("sae", [HALF, WIDE])
def test_activations_are_the_exact_transpose(source: FakeSource, connection: Connection, sae: str) -> None:
    found = ask(connection, "SELECT feature, row, activation FROM activations WHERE sae = ?", [sae])
    assert found == [(feature, row, activation) for feature, row, activation, _ in source.all_firings(sae)]
    flags = np.concatenate([source.tokens[shard][:, 5] for shard in DONE])
    assert {0, 2, 4} <= set(
        flags[np.isin(np.concatenate([_rows(source, shard) for shard in DONE]), [r for _, r, _ in found])]
    )


def _rows(source: FakeSource, shard: int) -> np.ndarray:
    return shard * SHARD_ROWS + np.arange(len(source.tokens[shard]))


@pytest.mark.parametrize("sae", [HALF, WIDE])
def test_features_are_over_plain_rows(source: FakeSource, connection: Connection, sae: str) -> None:
    found = ask(connection, "SELECT * EXCLUDE (sae) FROM features WHERE sae = ? ORDER BY feature", [sae])
    own: dict[int, list[float]] = {feature: [] for feature in range(N_FEATURES[sae])}
    for feature, _, activation, plain in source.all_firings(sae):
        if plain:
            own[feature].append(activation)
    labels = {(name, feature): label for name, feature, label in source.labels()}
    assert [row[0] for row in found] == list(own)
    for feature, n, density, top, mean, std, p50, p90, p99, histogram, label in found:
        values = np.sort(np.array(own[feature], np.float64))
        assert n == len(values) and density == n / source.plain_rows(sae)
        assert label == labels.get((sae, feature))
        if not n:
            assert (top, mean, std, p50, p90, p99, set(histogram)) == (0, 0, 0, 0, 0, 0, {0})
            continue
        assert top == values[-1]
        assert mean == pytest.approx(values.mean(), rel=1e-12) and std == pytest.approx(
            values.std(), rel=1e-9, abs=1e-9
        )
        assert [p50, p90, p99] == [values[math.ceil(n * p / 100) - 1] for p in (50, 90, 99)]
        assert histogram == np.bincount(np.minimum(values / values[-1] * 20, 19).astype(int), minlength=20).tolist()


@pytest.mark.parametrize("sae", [HALF, WIDE])
def test_examples_are_the_top_100_with_ties_by_row(source: FakeSource, connection: Connection, sae: str) -> None:
    expected = []
    for feature in range(N_FEATURES[sae]):
        own = sorted((-a, row) for f, row, a, plain in source.all_firings(sae) if plain and f == feature)
        expected += [(feature, rank, row, -a) for rank, (a, row) in enumerate(own[:100], 1)]
    query = "SELECT feature, rank, row, activation FROM examples WHERE sae = ? ORDER BY feature, rank"
    assert ask(connection, query, [sae]) == expected


def test_feature_logits_rank_from_both_ends(source: FakeSource, connection: Connection) -> None:
    ids, logits = source.logits[HALF]
    expected = [
        (feature, rank, int(ids[feature, place]), float(logits[feature, place]))
        for feature in range(N_FEATURES[HALF])
        for place, rank in enumerate([1, 2, 3, -1, -2, -3])
    ]
    assert (
        ask(connection, "SELECT feature, rank, token_id, logit FROM feature_logits WHERE sae = ?", [HALF]) == expected
    )
    assert ask(connection, "SELECT count(*) FROM feature_logits WHERE sae = ?", [WIDE]) == [(0,)]


@pytest.mark.parametrize("sae", [HALF, WIDE])
def test_reconstruction(source: FakeSource, connection: Connection, sae: str) -> None:
    expected = [
        (row, int(l0), norm, error)
        for shard in DONE
        for row, (l0, norm, error) in zip(
            _rows(source, shard).tolist(), source.matrix(f"reconstruction/{sae}", shard).tolist(), strict=True
        )
    ]
    assert ask(connection, "SELECT * EXCLUDE (sae) FROM reconstruction WHERE sae = ? ORDER BY row", [sae]) == expected


def test_lens_tables(source: FakeSource, connection: Connection) -> None:
    lens, site = LENS
    summary, tokens = [], []
    for shard in DONE:
        values = source.matrix(f"lens/{lens}/{site}/values", shard).tolist()
        ids = source.matrix(f"lens/{lens}/{site}/ids", shard).tolist()
        for row, (target, entropy, kl, *logprobs), (rank, *top) in zip(
            _rows(source, shard).tolist(), values, ids, strict=True
        ):
            known = rank >= 0
            summary.append((lens, site, row, rank if known else None, target if known else None, entropy, kl))
            tokens += [(lens, site, row, k + 1, top[k], logprobs[k]) for k in range(N_RANKS)]
    assert ask(connection, "FROM lens_summary ORDER BY row") == summary
    assert ask(connection, "FROM lens_tokens ORDER BY row, rank") == tokens


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An index over one shard in which a model gave no numbers for row 3; its integers are whatever was there."""
    source = FakeSource(segments_shards=(1,))
    source.extract(0)
    lens = "/".join(("lens", *LENS))
    for path in ("predictions/values", f"{lens}/values", f"reconstruction/{HALF}"):
        source.matrices[path, 0][3] = np.nan
    for path in ("predictions/ids", f"{lens}/ids"):
        source.matrices[path, 0][3] = 7
    source.matrices[f"{lens}/values", 0][5, -1] = np.nan
    directory: Path = tmp_path_factory.mktemp("unmeasured")
    with open_index(build_index(source, directory), lambda name: directory / name, threads=1) as opened:
        yield opened


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT * EXCLUDE (target_id) FROM predictions WHERE row = 3", [(3, None, None, None, None)]),
        ("SELECT target_id FROM predictions WHERE row = 3", [(7,)]),
        (f"SELECT l0, norm, error_norm FROM reconstruction WHERE row = 3 AND sae = '{HALF}'", [(None, None, None)]),
        ("SELECT min(l0) >= 0, count(*) - count(l0) FROM reconstruction", [(True, 1)]),
        ("SELECT * EXCLUDE (lens, site) FROM lens_summary WHERE row = 3", [(3, None, None, None, None)]),
        ("SELECT rank FROM lens_tokens WHERE row = 3", []),
        ("SELECT rank FROM lens_tokens WHERE row = 5", [(1,), (2,)]),
        ("SELECT count(*) FROM predictions WHERE isnan(entropy) OR isnan(top1_prob) OR isnan(target_logprob)", [(0,)]),
    ],
)
def test_what_was_not_measured_is_null_and_never_a_number(
    unmeasured: Connection, query: str, expected: list[tuple[Any, ...]]
) -> None:
    assert ask(unmeasured, query) == expected


def test_every_positive_half_is_decoded_exactly(tmp_path: Path) -> None:
    halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    source = FakeSource(segments_shards=(2,))
    source.extract(0, 1)
    for shard in (0, 1):  # every feature fires on every row, each time with another activation
        shape = len(source.tokens[shard]), N_FEATURES[WIDE]
        indptr = np.arange(shape[0] + 1) * shape[1]
        activations = np.resize(halves[:: -1 if shard else 1], shape[0] * shape[1])
        features = np.tile(np.arange(shape[1], dtype=np.uint16), shape[0])
        source.firings_of[WIDE, shard] = RowFirings(indptr, features, activations)
    catalog = build_index(source, tmp_path)
    assert [part.facts["activation"] for part in catalog.select("firings", WIDE)] == ["half"]
    with open_index(catalog, lambda name: tmp_path / name, threads=1) as connection:
        found = ask(connection, "SELECT feature, row, activation FROM activations WHERE sae = ?", [WIDE])
    assert found == [firing[:3] for firing in source.all_firings(WIDE)]
    assert {activation for _, _, activation in found} == set(halves.tolist())


def test_answers_are_arrow_tables(connection: Connection) -> None:
    answer = connection.sql("SELECT sae, feature, row, activation FROM activations", limit=3)
    assert isinstance(answer.table, pa.Table) and answer.truncated and answer.table.num_rows == 3
    assert answer.table.schema.types == [pa.string(), pa.int32(), pa.int64(), pa.float32()]
