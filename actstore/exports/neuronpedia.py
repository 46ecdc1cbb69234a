"""Features of one SAE in the layout that Neuronpedia imports, and SAEDashboard writes: gzipped JSON lines in batches.

    OUT/model.jsonl, sourceset.jsonl, source.jsonl    one line each: what the lines below belong to
    OUT/features/batch-<n>.jsonl.gz                   a line for every feature, dead ones too (table Neuron there)
    OUT/activations/batch-<n>.jsonl.gz                a line for every example (table Activation)
    OUT/explanations/batch-<n>.jsonl.gz               a line for every label; only batches that have any

Batch n holds the features from n · 1,024 on. OUT is what lies at `v1/<model>/<source>/` in Neuronpedia's data sets.
An importer takes the columns of the first line for all, so every line of a kind has the same keys, in this order:

`features`: modelId, layer (the source, such as `20-gemmascope-res-16k`), index (text), sourceSetName, creatorId,
maxActApprox, hasVector (false), frac_nonzero (density over plain rows), freq_hist_data_bar_heights (firings in 20 equal
bins of (0, max]), freq_hist_data_bar_values (their middles), pos_str, pos_values (the ten highest logits, falling),
neg_str, neg_values (the ten lowest, rising), logits_hist_data_bar_heights, logits_hist_data_bar_values (empty: a store
keeps the ends of a feature's logits, not all).

`activations`: id (a digest of what it shows), modelId, layer, index, creatorId, dataIndex (the document's number),
tokens (text as displayed), values (of this feature, 0 where it does not fire), maxValue, maxValueTokenIndex, minValue,
binMin (-1), binMax (the feature's maximum), binContains (-1: the strongest, no sample of an interval),
qualifyingTokenIndex. The 20 strongest, one of a sequence, each with up to 64 tokens before and 63 after it.

`explanations`: id, modelId, layer, index, description, authorId, typeName, explanationModelName (null, null).

Creator and author are the account that Neuronpedia's tools use by default. Dates are left to the importer, so that
equal stores give equal bytes.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actstore.progress import Report

from .source import Source, must_be_one
from .target import Exported, exported, new_target

__all__ = ["BATCH_FEATURES", "export_neuronpedia"]

BATCH_FEATURES = 1024
CREATOR = "clkht01d40000jv08hvalcvly"

_FEATURES = """
WITH ends AS (
    SELECT feature,
        list(token ORDER BY rank) FILTER (rank > 0) AS pos_str,
        list(logit ORDER BY rank) FILTER (rank > 0) AS pos_values,
        list(token ORDER BY rank DESC) FILTER (rank < 0) AS neg_str,
        list(logit ORDER BY rank DESC) FILTER (rank < 0) AS neg_values
    FROM feature_logits JOIN vocabulary USING (token_id)
    WHERE sae = $sae AND feature >= $first AND feature < $end AND abs(rank) <= 10
    GROUP BY feature
)
SELECT f.feature, to_json(struct_pack(
    "modelId" := $model, "layer" := $source, "index" := f.feature::VARCHAR, "sourceSetName" := $source_set,
    "creatorId" := $creator, "maxActApprox" := f.max_activation, "hasVector" := false, "frac_nonzero" := f.density,
    "freq_hist_data_bar_heights" := f.histogram,
    "freq_hist_data_bar_values" := list_transform(
        range(len(f.histogram)), lambda bin: f.max_activation::DOUBLE * (2 * bin + 1) / (2 * len(f.histogram))
    ),
    "pos_str" := coalesce(e.pos_str, []), "pos_values" := coalesce(e.pos_values, []),
    "neg_str" := coalesce(e.neg_str, []), "neg_values" := coalesce(e.neg_values, []),
    "logits_hist_data_bar_heights" := []::INTEGER[], "logits_hist_data_bar_values" := []::INTEGER[]
))::VARCHAR AS line
FROM features f LEFT JOIN ends e USING (feature)
WHERE f.sae = $sae AND f.feature >= $first AND f.feature < $end
ORDER BY f.feature
"""

_ACTIVATIONS = """
WITH found AS (
    SELECT e.feature, e.rank, e.row, t.doc,
        greatest(s.row, e.row - 64) AS first, least(s.row + s.n_tokens, e.row + 64) AS beyond
    FROM examples e JOIN tokens t USING (row) JOIN sequences s ON s.seq = t.seq
    WHERE e.sae = $sae AND e.feature >= $first AND e.feature < $end
    QUALIFY row_number() OVER (PARTITION BY e.feature, t.seq ORDER BY e.rank) = 1
), chosen AS (
    SELECT * FROM found QUALIFY row_number() OVER (PARTITION BY feature ORDER BY rank) <= 20
), places AS (
    SELECT feature, rank, unnest(range(first, beyond)) AS row FROM chosen
), fired AS (
    SELECT feature, row, activation FROM activations WHERE sae = $sae AND feature >= $first AND feature < $end
), windows AS (
    SELECT p.feature, p.rank,
        list(t.token ORDER BY p.row) AS tokens, list(coalesce(a.activation, 0::FLOAT) ORDER BY p.row) AS "values"
    FROM places p JOIN tokens t USING (row) LEFT JOIN fired a ON a.feature = p.feature AND a.row = p.row
    GROUP BY p.feature, p.rank
)
SELECT c.feature, to_json(struct_pack(
    "id" := left(sha256(concat_ws('/', $model, $source, c.feature, c.row)), 24),
    "modelId" := $model, "layer" := $source, "index" := c.feature::VARCHAR, "creatorId" := $creator,
    "dataIndex" := c.doc::VARCHAR, "tokens" := w.tokens, "values" := w."values",
    "maxValue" := list_max(w."values"), "maxValueTokenIndex" := list_position(w."values", list_max(w."values")) - 1,
    "minValue" := list_min(w."values"), "binMin" := -1, "binMax" := f.max_activation, "binContains" := -1,
    "qualifyingTokenIndex" := c.row - c.first
))::VARCHAR AS line
FROM chosen c JOIN windows w USING (feature, rank) JOIN features f ON f.sae = $sae AND f.feature = c.feature
ORDER BY c.feature, c.rank
"""

_EXPLANATIONS = """
SELECT feature, to_json(struct_pack(
    "id" := left(sha256(concat_ws('/', $model, $source, feature, label)), 24),
    "modelId" := $model, "layer" := $source, "index" := feature::VARCHAR, "description" := label,
    "authorId" := $creator, "typeName" := NULL::VARCHAR, "explanationModelName" := NULL::VARCHAR
))::VARCHAR AS line
FROM features WHERE sae = $sae AND feature >= $first AND feature < $end AND label IS NOT NULL ORDER BY feature
"""


def export_neuronpedia(source: Source, what: Sequence[str], out: Path, *, report: Report) -> Exported:
    """Write the features and examples of one SAE into the new directory `out`, in the layout of this module.

    Raises UnknownName for an SAE that is not stored, InvalidInput for several, MissingInput where the index lacks it.
    """
    sae = source.sae(must_be_one(what, "SAE", "this layout"))
    source.must_be_indexed(sae["sae"])
    names = _names(source, sae)
    with new_target(out) as root:
        root.mkdir()
        _write_owners(root, names)
        n_lines = 0
        for first in range(0, int(sae["width"]), BATCH_FEATURES):
            report("exporting features", first, int(sae["width"]), "features")
            n_lines += _write_batch(source, root, names | {"sae": sae["sae"]}, first)
        report("exporting features", int(sae["width"]), int(sae["width"]), "features")
    return exported(out, n_lines)


def _names(source: Source, sae: Mapping[str, Any]) -> dict[str, str]:
    """Return what Neuronpedia calls the model, the source and its set: `gemma-2-2b`, `20-gemmascope-res-16k`, …"""
    model = str(source.reader.store.model["identity"]["name"]).rstrip("/").rsplit("/", 1)[-1].lower()
    name = str(sae["neuronpedia_id"] or sae["sae"]).rsplit("/", 1)[-1]
    source_set = name.partition("-")[2].partition("__")[0] or name
    return {"model": model, "source": name, "source_set": source_set, "creator": CREATOR}


def _write_owners(root: Path, names: Mapping[str, str]) -> None:
    model, public = names["model"], {"creatorId": CREATOR, "visibility": "PUBLIC"}
    shown = {"displayName": model, "displayNameShort": model, "instruct": model.endswith("-it")}
    source_set = {"modelId": model, "name": names["source_set"], "description": names["source_set"], "urls": []}
    lines = {
        "model": {"id": model, **shown, "creatorId": CREATOR},
        "sourceset": {**source_set, "creatorName": "actstore", **public},
        "source": {"id": names["source"], "modelId": model, "setName": names["source_set"], **public},
    }
    for name, line in lines.items():
        (root / f"{name}.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")


def _write_batch(source: Source, root: Path, names: Mapping[str, str], first: int) -> int:
    """Write the files of the features from `first` on; return how many lines they have."""
    n_lines = 0
    for kind, sql in (("features", _FEATURES), ("activations", _ACTIVATIONS), ("explanations", _EXPLANATIONS)):
        used = {name: value for name, value in names.items() if f"${name}" in sql}
        lines = source.table(sql, {**used, "first": first, "end": first + BATCH_FEATURES}).column("line").to_pylist()
        if lines or kind != "explanations":
            _write_lines(root / kind / f"batch-{first // BATCH_FEATURES}.jsonl.gz", lines)
        n_lines += len(lines)
    return n_lines


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write lines gzipped; neither name nor time goes into the file, so that equal lines are equal bytes."""
    path.parent.mkdir(exist_ok=True)
    with (
        path.open("xb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as zipped,
    ):
        zipped.write("".join(f"{line}\n" for line in lines).encode())
