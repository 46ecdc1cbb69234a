"""A small real store, and its truth as plain numpy: what the tests of extraction, queries, API and commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from saes_support import Arrays, write_sae
from transformers import AutoModelForCausalLM, AutoTokenizer

import actstore
from actstore.blocks import TOKEN_FIELDS, RowFirings
from actstore.store import StoreReader

torch.set_num_threads(1)

ASSETS = Path(__file__).parents[1] / "actstore" / "demo" / "assets"
MODEL, DATASET = ASSETS / "model", ASSETS / "dataset.jsonl"
CONTEXT, STRIDE, SHARD_ROWS, BATCH_TOKENS = 48, 40, 512, 1000
RES, ATT = "3-tiny-scope-res-256__l0-13", "2-tiny-scope-att-96__l0-5"
SAE_SITES = {RES: "resid_post.3", ATT: "z.2"}
DEAD, ALWAYS = 5, 7  # features of every SAE made here
LENS_SITES = [f"resid_post.{layer}" for layer in range(6)]
SITES = ["resid_pre.0", "resid_mid.3", "resid_post.*", "attn_out.1", "mlp_out.4", "z.2", "z.3", "final"]
ODD_TEXTS = [
    "Emoji 🙂🧑‍🚀 and e\u0301 combining, 日本語の文章。\nA new line\t and a tab. <script>alert(1)</script> «quoted»",
    "",
    "Nina likes tea.<eos>Nina likes tea.",
    "x",
]


def embedded_texts(n_documents: int) -> list[dict[str, Any]]:
    """Return the first documents of the embedded dataset, between documents that are odd."""
    with DATASET.open(encoding="utf-8") as lines:
        documents = [json.loads(next(lines)) for _ in range(n_documents)]
    long = {"text": " ".join(document["text"] for document in documents[:6]), "kind": "long"}
    return [{"text": text, "kind": "odd"} for text in ODD_TEXTS] + [long, *documents]


def reference_model(dtype: torch.dtype = torch.float32, path: Path = MODEL) -> Any:
    """Return a model, by default the embedded one, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def firing_arrays(rows: np.ndarray, width: int, seed: int) -> Arrays:
    """Return an SAE of Gemma Scope's arrays of which every feature fires on one row in twenty."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(width, rows.shape[1]))
    w_dec = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    scale = 1 / np.abs(rows).mean()
    w_enc, b_enc = w_dec.T * scale, random.normal(size=width)
    before = rows @ w_enc + b_enc
    threshold = np.maximum(np.quantile(before, 0.95, axis=0), 0.01)
    threshold[DEAD] = 1e6
    b_enc[ALWAYS], threshold[ALWAYS] = 50.0, 1.0
    arrays = {"W_enc": w_enc, "W_dec": w_dec, "b_enc": b_enc, "b_dec": rows.mean(0), "threshold": threshold}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def some_rows(model: Any, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return rows of the SAEs' sites over some texts, BOS left out."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found: dict[str, list[np.ndarray]] = {site: [] for site in SAE_SITES.values()}
    layers = model.model.layers
    hooks = [
        layers[3].register_forward_hook(lambda _m, _i, out: found["resid_post.3"].append(out[0, 1:].numpy())),
        layers[2].self_attn.o_proj.register_forward_hook(lambda _m, i, _o: found["z.2"].append(i[0][0, 1:].numpy())),
    ]
    with torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    return {site: np.concatenate(parts) for site, parts in found.items()}


@dataclass(frozen=True)
class SmallStore:
    """The store of the session with everything that went into it; tests never change it."""

    path: Path
    saes: dict[str, Arrays]
    sae_folders: dict[str, Path]
    documents: list[dict[str, Any]]

    def open(self) -> actstore.api.Store:
        return actstore.open(self.path)

    @cached_property
    def truth(self) -> Truth:
        return Truth(StoreReader(self.path))


def request_of(folders: dict[str, Path]) -> dict[str, Any]:
    """Return the options by which the small store was made."""
    return {
        "sites": SITES,
        "saes": [str(folder) for folder in folders.values()],
        "lens_k": 5,
        "dtype": "float32",
        "device": "cpu",
        "context": CONTEXT,
        "stride": STRIDE,
        "shard_rows": SHARD_ROWS,
        "batch_tokens": BATCH_TOKENS,
        "allow_unhealthy": True,
    }


def build_small_store(folder: Path) -> SmallStore:
    """Extract the embedded model over a few documents: overlapping windows, several shards, two SAEs, a lens."""
    documents = embedded_texts(40)
    model = reference_model()
    rows = some_rows(model, [document["text"] for document in documents[4:]])
    saes = {RES: firing_arrays(rows["resid_post.3"], 256, 0), ATT: firing_arrays(rows["z.2"], 96, 1)}
    folders = {
        RES: write_sae(folder, "layer_3/width_256/average_l0_13", saes[RES], release="tiny-scope-res"),
        ATT: write_sae(folder, "layer_2/width_96/average_l0_5", saes[ATT], release="tiny-scope-att"),
    }
    actstore.extract(MODEL, documents, out=folder / "small.act", **request_of(folders))
    return SmallStore(folder / "small.act", saes, folders, documents)


@dataclass(frozen=True)
class Firings:
    """Every stored firing of an SAE, by row then feature."""

    row: np.ndarray
    feature: np.ndarray
    activation: np.ndarray


class Truth:
    """The stored arrays as flat numpy, row by row in use: what every answer must agree with."""

    def __init__(self, reader: StoreReader) -> None:
        self.reader = reader
        self._firings: dict[str, Firings] = {}
        shards = range(reader.layout.n_shards)
        tokens = [reader.tokens(shard) for shard in shards]
        self.rows = np.concatenate([np.arange(len(t)) + shard * reader.shard_rows for shard, t in enumerate(tokens)])
        self._tokens = np.concatenate(tokens)
        sequences = [reader.sequences(segment.segment) for segment in reader.segments()]
        self.sequences = np.concatenate(sequences)
        self.vocabulary: list[str] = reader.vocabulary().to_pylist()
        self.doc = self.sequences[self.field("seq"), 0]
        self.plain = self.field("flags") == 0
        self.place = {int(row): place for place, row in enumerate(self.rows)}

    def field(self, name: str) -> np.ndarray:
        """Return one field of the tokens of every row in use."""
        return self._tokens[:, TOKEN_FIELDS.index(name)]

    def matrix(self, path: str) -> np.ndarray:
        """Return a matrix over all rows in use."""
        return np.concatenate([self.reader.matrix(path, shard) for shard in range(self.reader.layout.n_shards)])

    def firings(self, sae: str) -> Firings:
        """Return every stored firing of an SAE."""
        if sae not in self._firings:
            self._firings[sae] = self._read_firings(sae)
        return self._firings[sae]

    def _read_firings(self, sae: str) -> Firings:
        shards = range(self.reader.layout.n_shards)
        parts: list[RowFirings] = [self.reader.firings(sae, shard) for shard in shards]
        rows = np.concatenate([one.rows() + shard * self.reader.shard_rows for shard, one in enumerate(parts)])
        features = np.concatenate([one.features for one in parts]).astype(np.int64)
        return Firings(rows, features, np.concatenate([one.activations for one in parts]))

    def plain_firings(self, sae: str, feature: int | None = None) -> Firings:
        """Return the firings on plain rows, of one feature or of all."""
        all_ = self.firings(sae)
        keep = self.plain[self.places(all_.row)]
        if feature is not None:
            keep &= all_.feature == feature
        return Firings(all_.row[keep], all_.feature[keep], all_.activation[keep])

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Return where rows are among the rows in use."""
        return np.searchsorted(self.rows, rows)

    def text(self, doc: int) -> str:
        return self.reader.document_text(doc)

    def snippet(self, row: int, before: int, after: int) -> str:
        """Return a snippet, token after token: the text of the neighbours in the sequence, the token marked."""
        here = self.place[row]
        seq, start, end = self.field("seq"), self.field("char_start"), self.field("char_end")
        low = high = here
        while here - low < before and low > 0 and seq[low - 1] == seq[here]:
            low -= 1
        while high - here < after and high + 1 < len(seq) and seq[high + 1] == seq[here]:
            high += 1
        text = self.text(int(self.doc[here]))
        shown = text[start[here] : end[here]] or self.vocabulary[self.field("token_id")[here]]
        first, last = start[low : high + 1].min(), end[low : high + 1].max()
        return f"{text[first : start[here]]}«{shown}»{text[end[here] : last]}"
