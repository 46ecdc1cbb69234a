"""The tables: what SQL promises, and what each kind of part holds of it.

`TABLES` is the contract. A part leaves out the columns that are the same in all of its rows (its subject, such as
the SAE) and what lives outside the index (labels); the views of `views.py` put them back.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "PART_TABLES",
    "SMALL_TABLES",
    "SUBJECT_COLUMNS",
    "TABLES",
    "Columns",
    "create_table",
    "quote_name",
    "quote_text",
]

Columns = Mapping[str, str]

TABLES: Mapping[str, Columns] = {
    "store": {
        "model": "VARCHAR",
        "revision": "VARCHAR",
        "tokenizer": "VARCHAR",
        "shards_done": "BIGINT",
        "shards_total": "BIGINT",
        "versions": "JSON",
        "created": "VARCHAR",
    },
    "passes": {"pass": "VARCHAR", "recipe": "JSON", "digest": "VARCHAR", "done": "BIGINT", "total": "BIGINT"},
    "documents": {
        "doc": "BIGINT",
        "segment": "INTEGER",
        "text": "VARCHAR",
        "n_tokens": "BIGINT",
        "metadata": "JSON",
        "parent": "BIGINT",
        "variant": "VARCHAR",
    },
    "sequences": {"seq": "BIGINT", "doc": "BIGINT", "row": "BIGINT", "n_tokens": "INTEGER"},
    "tokens": {
        "row": "BIGINT",
        "seq": "BIGINT",
        "doc": "BIGINT",
        "pos": "INTEGER",
        "token_id": "INTEGER",
        "token": "VARCHAR",
        "char_start": "INTEGER",
        "char_end": "INTEGER",
        "is_special": "BOOLEAN",
        "is_template": "BOOLEAN",
        "is_repeat": "BOOLEAN",
        "role": "VARCHAR",
    },
    "vocabulary": {"token_id": "INTEGER", "token": "VARCHAR"},
    "sites": {
        "site": "VARCHAR",
        "kind": "VARCHAR",
        "layer": "INTEGER",
        "width": "INTEGER",
        "dtype": "VARCHAR",
        "pass": "VARCHAR",
    },
    "saes": {
        "sae": "VARCHAR",
        "site": "VARCHAR",
        "layer": "INTEGER",
        "width": "INTEGER",
        "architecture": "VARCHAR",
        "release": "VARCHAR",
        "sae_id": "VARCHAR",
        "neuronpedia_id": "VARCHAR",
        "revision": "VARCHAR",
        "sha256": "VARCHAR",
        "d_in": "INTEGER",
        "declared_l0": "DOUBLE",
        "write_site": "VARCHAR",
        "truncated_to": "INTEGER",
        "pass": "VARCHAR",
    },
    "predictions": {
        "row": "BIGINT",
        "target_id": "INTEGER",
        "target_logprob": "FLOAT",
        "entropy": "FLOAT",
        "top1_id": "INTEGER",
        "top1_prob": "FLOAT",
    },
    "activations": {"sae": "VARCHAR", "feature": "INTEGER", "row": "BIGINT", "activation": "FLOAT"},
    "features": {
        "sae": "VARCHAR",
        "feature": "INTEGER",
        "n_firings": "BIGINT",
        "density": "DOUBLE",
        "max_activation": "FLOAT",
        "mean_activation": "DOUBLE",
        "std_activation": "DOUBLE",
        "p50": "FLOAT",
        "p90": "FLOAT",
        "p99": "FLOAT",
        "histogram": "UINTEGER[]",
        "label": "VARCHAR",
    },
    "examples": {"sae": "VARCHAR", "feature": "INTEGER", "rank": "INTEGER", "row": "BIGINT", "activation": "FLOAT"},
    "feature_logits": {
        "sae": "VARCHAR",
        "feature": "INTEGER",
        "rank": "INTEGER",
        "token_id": "INTEGER",
        "logit": "FLOAT",
    },
    "reconstruction": {"sae": "VARCHAR", "row": "BIGINT", "l0": "INTEGER", "norm": "FLOAT", "error_norm": "FLOAT"},
    "attention": {"layer": "INTEGER", "head": "INTEGER", "row": "BIGINT", "key_row": "BIGINT", "weight": "FLOAT"},
    "attention_rows": {
        "layer": "INTEGER",
        "head": "INTEGER",
        "row": "BIGINT",
        "kept_weight": "FLOAT",
        "entropy": "FLOAT",
    },
    "heads": {
        "layer": "INTEGER",
        "head": "INTEGER",
        "entropy": "DOUBLE",
        "previous_token": "DOUBLE",
        "self_attention": "DOUBLE",
        "bos_attention": "DOUBLE",
        "induction": "DOUBLE",
    },
    "lens_tokens": {
        "lens": "VARCHAR",
        "site": "VARCHAR",
        "row": "BIGINT",
        "rank": "INTEGER",
        "token_id": "INTEGER",
        "logprob": "FLOAT",
    },
    "lens_summary": {
        "lens": "VARCHAR",
        "site": "VARCHAR",
        "row": "BIGINT",
        "target_rank": "INTEGER",
        "target_logprob": "FLOAT",
        "entropy": "FLOAT",
        "kl_to_final": "FLOAT",
    },
    "health": {"name": "VARCHAR", "subject": "VARCHAR", "value": "DOUBLE", "expected": "VARCHAR", "ok": "BOOLEAN"},
}

SMALL_TABLES = ("store", "passes", "sites", "saes", "health")

# Columns that a part's subject holds, in the order in which `/` joins them.
SUBJECT_COLUMNS: Mapping[str, Columns] = {
    "firings": {"sae": "VARCHAR"},
    "reconstruction": {"sae": "VARCHAR"},
    "features": {"sae": "VARCHAR"},
    "attention": {"layer": "INTEGER"},
    "lens": {"lens": "VARCHAR", "site": "VARCHAR"},
}


def _stored(table: str, *left_out: str) -> dict[str, str]:
    return {column: kind for column, kind in TABLES[table].items() if column not in left_out}


# `firings.plain` says whether the row counts in statistics, so that these need no join with the tokens;
# `firings.activation` is FLOAT in the parts that a half does not hold exactly. `head_sums` is what `heads` adds up.
PART_TABLES: Mapping[str, Mapping[str, Columns]] = {
    "core": {table: TABLES[table] for table in SMALL_TABLES},
    "vocabulary": {"vocabulary": TABLES["vocabulary"]},
    "documents": {"documents": TABLES["documents"], "sequences": TABLES["sequences"]},
    "tokens": {"tokens": TABLES["tokens"]},
    "predictions": {"predictions": TABLES["predictions"]},
    "firings": {"firings": {"feature": "INTEGER", "row": "BIGINT", "activation": "USMALLINT", "plain": "BOOLEAN"}},
    "reconstruction": {"reconstruction": _stored("reconstruction", "sae")},
    "features": {
        "features": _stored("features", "sae", "label"),
        "examples": _stored("examples", "sae"),
        "feature_logits": _stored("feature_logits", "sae"),
    },
    "attention": {
        "attention": _stored("attention", "layer"),
        "attention_rows": _stored("attention_rows", "layer"),
        "head_sums": {"head": "INTEGER", "metric": "VARCHAR", "n": "BIGINT", "total": "BIGINT"},
    },
    "lens": {
        "lens_tokens": _stored("lens_tokens", "lens", "site"),
        "lens_summary": _stored("lens_summary", "lens", "site"),
    },
}


def create_table(name: str, columns: Columns) -> str:
    """Return the statement that makes an empty table; `name` is already spelled as SQL."""
    listed = ", ".join(f"{quote_name(column)} {kind}" for column, kind in columns.items())
    return f"CREATE TABLE {name} ({listed})"


def quote_name(name: str) -> str:
    """Return a name as SQL spells it, whatever it contains."""
    return '"' + name.replace('"', '""') + '"'


def quote_text(text: str) -> str:
    """Return a text as an SQL literal, whatever it contains."""
    return "'" + text.replace("'", "''") + "'"
