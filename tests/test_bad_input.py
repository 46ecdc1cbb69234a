"""Whatever is wrong is said: one of our errors, with the thing, the value, what is accepted, the next step.

And nothing that was written before is lost: a store that is there stays as it was, byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking_support import MODEL, RES, Truth, firing_arrays
from saes_support import Arrays, write_sae

import actstore
from actstore.errors import (
    ActstoreError,
    InvalidInput,
    MissingInput,
    QueryError,
    RecipeMismatch,
    UnknownName,
    UnsupportedFormat,
)
from actstore.sealed import read_sealed, write_sealed
from actstore.store import StoreReader

TEXTS = ["A short text about tea.", "Another one about the sea and a ship that leaves."]
SITE = ["resid_post.0"]


def files_of(store: Path) -> dict[str, str]:
    """Return the digest of every file of a store but its journal, which tells of failures too."""
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in store.rglob("*")
        if path.is_file() and "journal" not in path.parts
    }


@pytest.fixture
def made(copied: Callable[[], Path]) -> Path:
    """A store that is there, of the session's recipe."""
    return copied()


def refused(kind: type[ActstoreError], builtin: type[Exception], *parts: str, **options: Any) -> str:
    """Extract what cannot be; return the message, which must hold `parts`."""
    given: dict[str, Any] = {"model": MODEL, "dataset": TEXTS, "sites": SITE, "device": "cpu"} | options
    with pytest.raises(kind) as caught:
        actstore.extract(given.pop("model"), given.pop("dataset"), **given)
    assert isinstance(caught.value, builtin)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    return message


# Models


def test_a_model_folder_that_is_missing(tmp_path: Path) -> None:
    nowhere = tmp_path / "no-model"
    refused(MissingInput, FileNotFoundError, str(nowhere), "Accepted", model=nowhere, out=tmp_path / "x.act")
    assert not (tmp_path / "x.act").exists()


@pytest.mark.parametrize(
    ("architecture", "kind", "part"),
    [
        ("BertForMaskedLM", InvalidInput, "not a causal language model"),
        ("BertLMHeadModel", UnsupportedFormat, "Gemma2ForCausalLM"),
    ],
)
def test_a_model_that_is_no_causal_language_model(
    tmp_path: Path, architecture: str, kind: type[ActstoreError], part: str
) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "bert"}))
    refused(kind, ValueError, architecture, part, model=folder, out=tmp_path / "x.act")


def test_half_precision_is_refused(tmp_path: Path) -> None:
    refused(InvalidInput, ValueError, "'float16'", "65,504", "bfloat16", dtype="float16", out=tmp_path / "x.act")


@pytest.mark.parametrize(
    ("sites", "parts"),
    [
        (["resid_post.17"], ["resid_post.17", "resid_post.0-5"]),
        (["resid_pots.1"], ["resid_pots", "Did you mean 'resid_post"]),
        (["nothing.*"], ["nothing.*", "resid_post.0-5"]),
        (["resid_post"], ["resid_post", "a layer"]),
        (["blocks.1.hook_nosuch"], ["hook_nosuch", "hook_resid_post"]),
        (["resid_post.3-1"], ["3-1"]),
        ([""], ["kind.layer"]),
    ],
)
def test_a_site_that_does_not_exist(made: Path, sites: list[str], parts: list[str]) -> None:
    before = files_of(made)
    with pytest.raises((UnknownName, InvalidInput)) as caught:
        actstore.extract(MODEL, None, out=made, into=True, sites=sites, dtype="float32", device="cpu")
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "Accepted" in str(caught.value)
    assert files_of(made) == before


# SAEs


def changed(**arrays: Any) -> Arrays:
    random = np.random.default_rng(0).normal(size=(400, 128))
    return firing_arrays(random, 64, 0) | arrays


def terabytes() -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 18)})
    return header.getvalue() + b"\0" * 64


BROKEN_SAES: dict[str, tuple[Any, str]] = {
    "wrong width": (
        changed(W_enc=np.ones((90, 64), "f4"), W_dec=np.ones((64, 90), "f4"), b_dec=np.ones(90, "f4")),
        "90",
    ),
    "wrong dtype": (changed(W_enc=np.ones((128, 64), "i4")), "int32"),
    "NaN": (changed(b_enc=np.full(64, np.nan, "f4")), "b_enc has NaN"),
    "objects": (changed(W_enc=np.array([{}] * 64, dtype=object)), "never opened"),
    "a missing array": ({name: a for name, a in changed().items() if name != "threshold"}, "threshold is missing"),
    "a threshold of zero": (changed(threshold=np.zeros(64, "f4")), "not positive"),
    "not an archive": (b"this is no archive", "not an npz archive"),
    "a header of terabytes": ({"W_enc": terabytes()}, "claims"),
}


@pytest.mark.parametrize("case", BROKEN_SAES)
def test_an_sae_that_cannot_be_used(made: Path, tmp_path: Path, case: str) -> None:
    content, part = BROKEN_SAES[case]
    folder = write_sae(tmp_path, "layer_3/width_64/average_l0_5", changed(), release="tiny-scope-res")
    if isinstance(content, bytes):
        (folder / "params.npz").write_bytes(content)
    elif case == "a header of terabytes":
        with zipfile.ZipFile(folder / "params.npz", "a") as archive:
            archive.writestr("W_enc2.npy", content["W_enc"])
    else:
        np.savez(folder / "params.npz", allow_pickle=True, **content)
    before = files_of(made)
    options: dict[str, Any] = {"out": made, "into": True, "dataset": None, "sites": [], "dtype": "float32"}
    refused(InvalidInput, ValueError, part, saes=[str(folder)], **options)
    assert files_of(made) == before


def test_an_sae_that_is_missing_or_says_no_site(made: Path, tmp_path: Path) -> None:
    before = files_of(made)
    options: dict[str, Any] = {"out": made, "into": True, "dataset": None, "sites": []}
    nowhere = str(tmp_path / "none")
    refused(MissingInput, FileNotFoundError, nowhere, "params.npz", saes=[nowhere], **options)
    plain = write_sae(tmp_path, "mine", changed(), release="somewhere")
    refused(InvalidInput, ValueError, "which site", "@resid_post.12", saes=[str(plain)], **options)
    refused(UnknownName, LookupError, "resid_post.40", saes=[f"x={plain}@resid_post.40"], **options)
    refused(InvalidInput, ValueError, "twice", saes=[f"x={plain}@resid_post.1", f"x={plain}@resid_post.2"], **options)
    refused(UnknownName, LookupError, "20-gemmascope-res-16k", saes=["neuronpedia:gemma-2-2b/20-gemmascope"], **options)
    assert files_of(made) == before


# Datasets


@pytest.mark.parametrize(
    ("name", "content", "kind", "parts"),
    [
        ("none.jsonl", None, MissingInput, ["none.jsonl"]),
        ("empty.jsonl", b"", InvalidInput, ["empty.jsonl", "no document"]),
        ("blank.jsonl", b"\n\n  \n", InvalidInput, ["no document"]),
        ("a.jsonl", b'{"body": "x"}\n', InvalidInput, ["line 1", "'text'", "body", "text_field"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', InvalidInput, ["line 2", "not JSON"]),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', InvalidInput, ["line 3", "type int"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', InvalidInput, ["line 2", "null"]),
        ("a.jsonl", b'{"text": "x"}\n\xff\xfe\n', InvalidInput, ["line 2", "0xFF", "UTF-8"]),
        ("a.csv", b"text\nx\n", UnsupportedFormat, [".csv", ".jsonl"]),
        ("a.parquet", b"no parquet", InvalidInput, ["a.parquet", "Parquet"]),
        ("a.jsonl", b'{"text": ""}\n', InvalidInput, ["No document has a token"]),
    ],
)
def test_a_dataset_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, kind: type[ActstoreError], parts: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    builtin = FileNotFoundError if kind is MissingInput else ValueError
    refused(kind, builtin, *parts, dataset=tmp_path / name, out=tmp_path / "x.act")
    # What is left behind stands in nobody's way: another window, another text, the same --out.
    outcome = actstore.extract(MODEL, TEXTS, out=tmp_path / "x.act", sites=SITE, context=16, device="cpu")
    assert outcome.complete


def test_what_a_failed_run_left_does_not_decide_the_model(tmp_path: Path) -> None:
    """A run of one model that failed on its text, then another model: the store is the second one's."""
    from corpus_support import metaspace_transformers
    from models_support import save_tiny_model

    out = tmp_path / "x.act"
    refused(MissingInput, FileNotFoundError, dataset=tmp_path / "none.jsonl", out=out)
    other = save_tiny_model(tmp_path / "other", vocab_size=290)
    actstore.extract(other, ["the cat"], out=out, tokenizer=metaspace_transformers(), sites=["z.0"], device="cpu")
    with actstore.open(out) as store:
        assert store.sql("SELECT model FROM store").scalar() == "other"
        shown = store.sql("SELECT string_agg(token, '' ORDER BY row) FROM tokens WHERE NOT is_special").scalar()
        assert shown == "the cat"


HARD_DOCUMENTS = {
    "empty": "",
    "one token": "a",
    "a megabyte": "The ship leaves. " * 62_000,
    "NUL bytes": "a\x00b\x00",
    "lone surrogates": "a \ud800 lone \udfff pair",
    "only special tokens": "<eos><eos>",
    "a line separator": "a\u2028b\u0085c",
}


def test_documents_that_are_hard_are_stored_as_they_are(tmp_path: Path) -> None:
    out = tmp_path / "hard.act"
    options: dict[str, Any] = {"sites": ["z.0"], "context": 1024, "dtype": "float32", "device": "cpu", "lens_k": 0}
    texts = {name: text if name != "a megabyte" else text[:16_000] for name, text in HARD_DOCUMENTS.items()}
    actstore.extract(MODEL, list(texts.values()), out=out, predictions=False, **options)
    with actstore.open(out) as store:
        stored = [row["text"] for row in store.sql("SELECT text FROM documents ORDER BY doc").rows()]
        expected = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts.values()]
        assert [text.replace("\ufffd", "?") for text in stored] == [text.replace("\ufffd", "?") for text in expected]
        n_tokens = store.sql("SELECT n_tokens FROM documents ORDER BY doc").numpy()["n_tokens"]
        assert n_tokens[0] == 0 and n_tokens[1] == 1 and n_tokens[5] == 2 and n_tokens[2] > 3_000
        health = {row["name"]: row for row in store.sql("SELECT * FROM health WHERE subject = 'segment 0'").rows()}
        assert (health["replaced_surrogates"]["value"], health["replaced_surrogates"]["ok"]) == (2, False)
        assert (health["empty_documents"]["value"], health["empty_documents"]["ok"]) == (1, True)
        truth = Truth(StoreReader(out))
        special = truth.field("flags") & 1 == 1
        assert special[truth.doc == 5].all()  # BOS and both <eos>
        for doc in (1, 3, 4, 6):
            rows = truth.rows[truth.doc == doc]
            assert (
                store.sql(f"SELECT snippet({rows[-1]}, 99, 0)").scalar().replace("«", "").replace("»", "")
                == stored[doc]
            )


def test_a_megabyte_in_one_document_is_laid_out(tmp_path: Path) -> None:
    from actstore.extraction import Request, plan_extraction

    text = HARD_DOCUMENTS["a megabyte"]
    assert len(text) > 1 << 20
    plan = plan_extraction(Request(model=str(MODEL), out=tmp_path / "x", dataset=[text], sites=("z.0",)))
    assert plan.n_documents == 1 and plan.n_rows > 200_000 and plan.n_shards == -(-plan.n_rows // 16_384)


# Stores


def test_a_target_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    refused(InvalidInput, ValueError, "notes.txt", "another --out", out=tmp_path / "full")
    refused(InvalidInput, ValueError, "is a file", out=tmp_path / "file")
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["notes.txt"]
    for added in ({"into": True}, {"append": TEXTS}):
        refused(MissingInput, FileNotFoundError, "no store", out=tmp_path / "none", **added)
    refused(MissingInput, FileNotFoundError, "no dataset", dataset=None, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_store_of_another_recipe_is_left_alone(made: Path) -> None:
    before = files_of(made)
    options: dict[str, Any] = {"out": made, "device": "cpu"}
    message = refused(RecipeMismatch, ValueError, "sites", "--into", dataset=TEXTS, dtype="float32", **options)
    assert "stored" in message and "asked" in message
    refused(InvalidInput, ValueError, "context 48", "64", context=64, **options)
    refused(
        InvalidInput, ValueError, "stored already", dataset=None, into=True, sites=["z.2"], dtype="float32", **options
    )
    refused(RecipeMismatch, ValueError, "documents_digest", into=True, sites=["z.0"], dtype="float32", **options)
    assert files_of(made) == before


def test_a_newer_format_is_not_guessed(made: Path) -> None:
    body = read_sealed(made / "store.json")
    write_sealed(made / "store.json", body | {"version": 2})
    before = files_of(made)
    for use in (
        lambda: actstore.open(made),
        lambda: actstore.maintenance.index(made),
        lambda: actstore.extract(MODEL, None, out=made, into=True, sites=["z.0"], device="cpu"),
    ):
        with pytest.raises(UnsupportedFormat, match=r"version 2.*version 1.*pip install --upgrade actstore"):
            use()
    assert files_of(made) == before


@pytest.mark.parametrize("options", [{}, {"context": 64}, {"append": TEXTS}])
def test_nothing_asked_for_shows_three_examples(tmp_path: Path, options: dict[str, Any]) -> None:
    out = tmp_path / "x.act"
    message = refused(InvalidInput, ValueError, "--site", "--sae", "--lens", sites=[], out=out, **options)
    assert message.count("actstore extract MODEL DATASET --out STORE") == 3
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"context": 0}, ["context is 0"]),
        ({"context": 1}, ["context is 1", "at least 2"]),
        ({"context": 32, "stride": 33}, ["stride is 33"]),
        ({"context": 600, "shard_rows": 512}, ["600", "512"]),
        ({"shard_rows": 0}, ["shard-rows is 0"]),
        ({"batch_tokens": -1}, ["batch-tokens is -1"]),
        ({"activation_bits": 24}, ["24", "1 to 23"]),
        ({"lens_k": -1}, ["lens", "1 or more"]),
        ({"lens_k": 5000}, ["5000", "1664"]),
        ({"lens_k": 2, "lens_sites": ["z.1"]}, ["cannot read z.1"]),
        ({"lens_k": 2, "lens_sites": ["final"]}, ["cannot read final"]),
        ({"lens_sites": ["resid_post.1"]}, ["--lens 5"]),
        ({"max_tokens": 0}, ["max_tokens is 0"]),
        ({"device": "tpu"}, ["'tpu'"]),
        ({"dtype": "int8"}, ["'int8'"]),
        ({"storage_dtype": "float64"}, ["'float64'"]),
        ({"sites": "z.1"}, ["a list"]),
    ],
)
def test_an_option_out_of_range(tmp_path: Path, options: dict[str, Any], parts: list[str]) -> None:
    refused(InvalidInput, ValueError, *parts, "Accepted", out=tmp_path / "x.act", **options)


def test_an_option_that_does_not_exist_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="layers"):
        actstore.extract(MODEL, TEXTS, out=tmp_path / "x.act", layers=[3])


# Questions


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("SELECT * FROM token", ["token", "tokens"]),
        ("SELECT toke FROM tokens", ["toke"]),
        ("SELEC 1", ["SELEC"]),
        ("", ["Accepted"]),
        ("SELECT 'a' + 1 FROM tokens", ["type casts"]),
        ("INSERT INTO documents VALUES (1)", ["Accepted"]),
        ("DELETE FROM tokens", ["Accepted"]),
        ("COPY tokens TO '/tmp/never.csv'", ["Accepted"]),
        ("ATTACH '/tmp/never.duckdb'", ["Accepted"]),
        ("INSTALL httpfs", ["Accepted"]),
        ("SET memory_limit = '1GB'", ["Accepted"]),
        ("SELECT * FROM read_csv('/etc/hostname')", []),
        ("SELECT $nothing", ["nothing"]),
    ],
)
def test_sql_that_is_wrong_or_writes(opened: Any, text: str, parts: list[str]) -> None:
    with pytest.raises(QueryError) as caught:
        opened.sql(text)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1
    assert not Path("/tmp/never.csv").exists() and not Path("/tmp/never.duckdb").exists()


def test_every_error_is_ours_and_a_builtins(opened: Any) -> None:
    for ask, builtin in (
        (lambda: opened.query("nosuch"), LookupError),
        (lambda: opened.query("max_activating", {"sae": RES}), ValueError),
        (lambda: opened["nosuch.1"], LookupError),
        (lambda: opened["z.2"][10**9], LookupError),
        (lambda: actstore.open("/nowhere"), FileNotFoundError),
    ):
        with pytest.raises(ActstoreError) as caught:
            ask()
        assert isinstance(caught.value, builtin)
        assert caught.value.http_status in (400, 404)
