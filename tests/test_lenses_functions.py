"""The functions of SQL, for batches of rows of any order, against numpy; snippets for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from asking_support import ATT, RES, SmallStore, Truth
from corpus_support import byte_level_transformers, metaspace_transformers
from models_support import save_tiny_model

import actstore
from actstore.api import Store
from actstore.errors import InvalidInput, UnknownName
from actstore.lenses import TopTokens, Unembed
from actstore.store import StoreReader

TEXTS = [
    "the cat on the cat, the cat on the cat",
    "🙂🧑‍🚀 the cat 🙂",  # every emoji is four tokens or more
    "e\u0301 n\u0303 cafe\u0301",  # combining marks
    "日本語の文章 the 한국어",
    "line one\nline two\r\n\n\tthe end\n",
    "",
    "a",
    "<eos>the<eos>cat",
    "«the» <b>cat</b> 'quoted' \"twice\"",
    "the cat " * 30,  # several windows
    "\x00the\x00",
    " \u200bzero width\ufeff ",
]


@pytest.fixture(
    scope="module", params=[metaspace_transformers, byte_level_transformers], ids=["bytes fall back", "byte level"]
)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, Truth]]:
    """A store of a random model over texts that are hard to cut, by Gemma's kind of tokenizer or by GPT-2's."""
    folder = tmp_path_factory.mktemp("texts")
    make: Callable[[], Any] = request.param
    model = save_tiny_model(folder / "model", vocab_size=320)
    options: dict[str, Any] = {"context": 20, "stride": 12, "shard_rows": 64, "device": "cpu"}
    actstore.extract(model, TEXTS, out=folder / "s.act", sites=["z.0"], tokenizer=make(), **options)
    with actstore.open(folder / "s.act") as store:
        yield store, Truth(StoreReader(folder / "s.act"))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (0, 1), (3, 2), (10, 10), (1000, 1000)])
def test_a_snippet_is_the_text_around_the_token(written: tuple[Store, Truth], before: int, after: int) -> None:
    store, truth = written
    found = store.sql(f"SELECT row, snippet(row, {before}, {after}) AS example FROM tokens ORDER BY row").rows()
    assert [row["row"] for row in found] == truth.rows.tolist()
    for row in found:
        assert row["example"] == truth.snippet(row["row"], before, after), row


def test_the_token_at_a_row_is_that_of_the_tokens(written: tuple[Store, Truth]) -> None:
    store, _ = written
    question = "SELECT row, token_at(row) AS here, doc, pos, token FROM tokens ORDER BY hash(row)"
    found = store.sql(question).rows()
    assert found and all(one["here"] == {name: one[name] for name in ("doc", "pos", "token")} for one in found)
    with pytest.raises(UnknownName, match="There is no row -1"):
        store.sql("SELECT token_at(-1)")
    assert store.sql("SELECT token_at(NULL)").scalar() is None


def test_a_snippet_without_its_marks_is_the_documents_text(written: tuple[Store, Truth]) -> None:
    """Of any token with text: nothing is lost, doubled or spelled anew, however its bytes were cut."""
    store, truth = written
    found = store.sql("SELECT row, snippet(row, 4, 4) AS example FROM tokens WHERE char_end > char_start").rows()
    split = 0
    for row in found:
        text = truth.text(int(truth.doc[truth.place[row["row"]]]))
        start, end = (int(truth.field(name)[truth.place[row["row"]]]) for name in ("char_start", "char_end"))
        opening = row["example"].index("«", 0) if "«" not in text else row["example"].index(f"«{text[start:end]}»")
        without = row["example"][:opening] + text[start:end] + row["example"][opening + 2 + end - start :]
        assert without in text
        split += "🙂" in text[start:end]
    assert split >= 2 * 2  # each of the two is more than one token, and each of these shows all of it


def test_a_token_without_text_shows_its_name(written: tuple[Store, Truth]) -> None:
    store, truth = written
    if truth.reader.store.tokenizer["bos_id"] is None:
        assert not store.sql("SELECT * FROM tokens WHERE is_special AND pos = 0 AND token = '<bos>'").rows()
    else:
        found = store.sql("SELECT snippet(min(row), 5, 1) FROM tokens WHERE pos = 0").scalar()
        assert found.startswith("«<bos>»the")


def test_negative_numbers_of_tokens_are_refused(opened: Store) -> None:
    with pytest.raises(InvalidInput, match="0 or more"):
        opened.sql("SELECT snippet(0, -1, 3)")


@pytest.mark.parametrize(
    "call",
    [
        "snippet({row}, 1, 1)",
        "act('resid_post.1', {row})",
        f"firings('{RES}', {{row}})",
        "logit_lens('resid_post.1', {row}, 2)",
    ],
)
def test_a_row_that_does_not_exist_is_refused(opened: Store, small: SmallStore, call: str) -> None:
    filler = int(small.truth.reader.rows_used[0])
    assert filler not in small.truth.place
    for row in (-1, filler, 1 << 40):
        with pytest.raises(UnknownName, match=f"There is no row {row}"):
            opened.sql(f"SELECT {call.format(row=row)}")
    assert opened.sql(f"SELECT {call.format(row='NULL::BIGINT')}").scalar() is None


def test_act_gathers_any_rows_of_any_sites_in_any_order(opened: Store, small: SmallStore) -> None:
    truth = small.truth
    rows = np.random.default_rng(0).choice(truth.rows, 300)
    sites = np.where(np.arange(300) % 3 == 0, "z.2", "mlp_out.4").tolist()
    asked = opened.sql(
        "SELECT unnest($rows) AS row, unnest($sites) AS site", {"rows": rows.tolist(), "sites": sites}
    ).table.num_rows
    assert asked == 300
    question = """WITH asked AS (SELECT unnest($rows) AS row, unnest($sites) AS site)
        SELECT act(site, row) AS vector FROM asked"""
    found = opened.sql(question, {"rows": rows.tolist(), "sites": sites}).table.column("vector").to_pylist()
    matrices = {site: truth.matrix(f"sites/{site}") for site in ("z.2", "mlp_out.4")}
    for row, site, vector in zip(rows, sites, found, strict=True):
        np.testing.assert_array_equal(np.float32(vector), matrices[site][truth.place[int(row)]])


def test_vectors_go_into_duckdbs_own_functions(opened: Store, small: SmallStore) -> None:
    first, second = small.truth.rows[[5, 99]]
    found = opened.sql(
        f"SELECT list_cosine_similarity(act('resid_post.2', {first}), act('resid_post.2', {second}))"
    ).scalar()
    a, b = small.truth.matrix("sites/resid_post.2")[[5, 99]].astype(np.float64)
    assert found == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)


@pytest.mark.parametrize("sae", [RES, ATT])
def test_firings_are_the_rows_features(opened: Store, small: SmallStore, sae: str) -> None:
    found = opened.sql(f"SELECT row, firings('{sae}', row) AS fired FROM tokens ORDER BY hash(row)").rows()
    truth = small.truth.firings(sae)
    bounds = (
        np.searchsorted(truth.row, small.truth.rows, side="left"),
        np.searchsorted(truth.row, small.truth.rows, side="right"),
    )
    for row in found:
        place = small.truth.place[row["row"]]
        here = slice(bounds[0][place], bounds[1][place])
        assert [one["feature"] for one in row["fired"]] == truth.feature[here].tolist()
        assert [one["activation"] for one in row["fired"]] == truth.activation[here].tolist()


def test_a_lens_with_several_ks_in_one_question(opened: Store, small: SmallStore) -> None:
    rows = small.truth.rows[10:16].tolist()
    found = opened.sql(
        "SELECT k, logit_lens('resid_post.4', row, k) AS lens FROM (SELECT unnest($rows) AS row, unnest($ks) AS k)",
        {"rows": rows, "ks": [1, 3, 2, 3, 1, 5]},
    ).rows()
    stored = small.truth.matrix("lens/logit/resid_post.4/ids")[10:16, 1:]
    assert [len(row["lens"]) for row in found] == [1, 3, 2, 3, 1, 5]
    for row, ids in zip(found, stored.tolist(), strict=True):
        assert [one["token_id"] for one in row["lens"]] == ids[: row["k"]]
        assert [one["token"] for one in row["lens"]] == [small.truth.vocabulary[i] for i in ids[: row["k"]]]


def test_a_lens_of_several_sites_in_one_question_goes_through_the_vocabulary_once(
    opened: Store, small: SmallStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the extraction, which read one site after the other, stored it."""
    calls: list[int] = []
    top = Unembed.top

    def counted(self: Unembed, rows: np.ndarray, k: int) -> TopTokens:
        calls.append(len(rows))
        return top(self, rows, k)

    monkeypatch.setattr(Unembed, "top", counted)
    rows = np.random.default_rng(3).choice(small.truth.rows, 40)
    sites = [f"resid_post.{number}" for number in np.random.default_rng(4).integers(0, 6, 40)]
    found = opened.sql(
        "SELECT site, row, logit_lens(site, row, 3) AS lens FROM (SELECT unnest($sites) AS site, unnest($rows) AS row)",
        {"sites": sites, "rows": rows.tolist()},
    ).rows()
    assert calls == [40]
    stored = {site: small.truth.matrix(f"lens/logit/{site}/ids")[:, 1:4] for site in set(sites)}
    assert [(one["site"], one["row"]) for one in found] == list(zip(sites, rows.tolist(), strict=True))
    for one in found:
        ids = stored[one["site"]][small.truth.place[one["row"]]]
        assert [token["token_id"] for token in one["lens"]] == ids.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("act('resid_post.99', 0)", "Did you mean"),
        ("act('pattern.1', 0)", "actstore extract MODEL --into STORE --site pattern.1"),
        ("firings('nothing', 0)", RES),
        ("logit_lens('z.2', 0, 1)", "the residual stream"),
        ("logit_lens('final', 0, 1)", "before the final norm"),
        ("logit_lens('resid_post.1', 0, 0)", "k is 0"),
        ("logit_lens('resid_post.1', 0, 9999)", "1 to 1664"),
    ],
)
def test_what_is_not_stored_is_an_error_that_lists_what_is(opened: Store, call: str, message: str) -> None:
    with pytest.raises((UnknownName, InvalidInput)) as caught:
        opened.sql(f"SELECT {call}")
    assert message in str(caught.value)


# token_id


def test_token_id_finds_every_token_that_is_shown_once(opened: Store, small: SmallStore) -> None:
    vocabulary = small.truth.vocabulary
    once = [text for text in vocabulary if text and vocabulary.count(text) == 1]
    assert len(once) > 1400
    found = opened.sql(
        "SELECT token_id(token) AS id, token_id FROM vocabulary WHERE list_contains($once, token)", {"once": once}
    )
    assert len(found) == len(once)
    assert all(row["id"] == row["token_id"] for row in found.rows())


def test_token_id_of_none_and_of_several(opened: Store, small: SmallStore) -> None:
    vocabulary = small.truth.vocabulary
    spaced = next(text for text in vocabulary if text.startswith(" ") and len(text) > 3 and text[1:] not in vocabulary)
    with pytest.raises(UnknownName, match=f"Did you mean {spaced!r}"):
        opened.sql("SELECT token_id($text)", {"text": spaced[1:]})
    with pytest.raises(UnknownName, match=r"No single token is shown as 'no such token'.*`vocabulary`"):
        opened.sql("SELECT token_id('no such token')")
    assert opened.sql("SELECT token_id(NULL)").scalar() is None


def test_token_id_refuses_to_choose(written: tuple[Store, Truth]) -> None:
    store, truth = written
    twice = [text for text in set(truth.vocabulary) if text and truth.vocabulary.count(text) > 1]
    if not twice:
        pytest.skip("no two tokens of this tokenizer are shown alike")
    with pytest.raises(UnknownName, match=r"is how \d tokens are shown: ids .*use the id itself"):
        store.sql("SELECT token_id($text)", {"text": twice[0]})
