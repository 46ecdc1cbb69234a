"""Documents of every kind, their store at two stages, and what lies in its files as zarr and json alone read them."""

from __future__ import annotations

import json
import shutil
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from hypothesis import HealthCheck, Phase, settings
from store_support import home
from tiny_world import RESIDUAL_SAE, STRANGE, WORDS, extract, tiny_world
from zarr.storage import ZipStore

import actstore
from actstore import maintenance

LATE, GONE = "late", "gone"  # SAEs of a second pass: of the first segment alone; dropped
VALUES = [
    *(None, True, False, 0, 1, 1.0, -0.0, 0.1, 1e300, 1e-7, 2**64 - 1, "", "null", "1", "é", "日本", "a & b"),
    *('a "b" \\ \n c', " x=y ", "' OR 1=1 --", [], {}, [1, 2], {"a": [1, {"b": None}], "z": "ü"}),
]
KEYS = ["v", 'q"t', "a.b", "0", "日本", "#", "topic"]
N_DOCUMENTS, N_APPENDED = 26, 10
LABELS = {(RESIDUAL_SAE, feature): f"«{feature}» is ü" for feature in range(0, 300, 3)} | {(LATE, 8): "eight"}
ASKED = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def some_documents() -> list[dict[str, Any]]:
    """Return documents of which some are odd, empty, alike or long, with metadata of every kind of JSON."""
    random = np.random.default_rng(11)
    texts = [*STRANGE, "the cat on a hat", "the cat on a hat", "a lone \ud800 surrogate", "cat " * 40]
    texts += [" ".join(random.choice(WORDS, size=random.integers(1, 40))) for _ in range(N_DOCUMENTS - len(texts))]
    random.shuffle(texts)
    documents: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        metadata: dict[str, Any] = {key: VALUES[random.integers(len(VALUES))] for key in KEYS if random.random() < 0.7}
        documents.append({"text": text, "v": VALUES[number % len(VALUES)], **metadata, "topic": f"t{number % 3}"})
    return documents


class Raw:
    """What lies in the files of a store, by docs/format.md and without a reader of actstore's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layout = self.read("layout.json")
        self.shard_rows = self.read("store.json")["shard_rows"]
        self.arrays = zarr.open_group(path / "arrays", mode="r")
        tokens = self.array("corpus/tokens")
        self.rows = np.flatnonzero(tokens[:, 0] >= 0)
        self.tokens = tokens[self.rows]
        self.token_id, self.seq, self.pos, self.start, self.end, flags, _ = self.tokens.T
        self.plain = flags == 0
        segments = [f"corpus/segments/{one['segment']}" for one in self.layout["segments"]]
        self.sequences = np.concatenate([self.array(f"{one}/sequences") for one in segments])
        self.doc = self.sequences[self.seq, 0]
        self.texts: list[str] = []
        self.metadata: list[dict[str, Any]] = []
        for one in segments:
            text, metadata = (self.array(f"{one}/{name}").tobytes() for name in ("text", "metadata"))
            for bounds in self.array(f"{one}/documents").tolist():
                self.texts.append(text[bounds[0] : bounds[1]].decode())
                self.metadata.append(json.loads(metadata[bounds[2] : bounds[3]]))

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_bytes())

    def array(self, name: str) -> np.ndarray:
        return np.asarray(self.arrays[name])

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """Every firing by SAE, (row in use, feature), 0 where nothing fires."""
        coders = [coder for made in self.passes().values() for coder in made["recipe"]["saes"]]
        return {coder["sae"]: self._dense(coder["sae"], coder["width"]) for coder in coders}

    def _dense(self, sae: str, width: int) -> np.ndarray:
        dense: np.ndarray = np.zeros((len(self.array("corpus/tokens")), width))
        for file in (self.path / "firings" / sae).glob("[0-9]*.zip"):
            csr = zarr.open_group(ZipStore(file, mode="r"), mode="r")
            indptr, indices, data = (np.asarray(csr[name]) for name in ("indptr", "indices", "data"))
            rows = np.repeat(np.arange(self.shard_rows), np.diff(indptr))
            dense[int(file.stem) * self.shard_rows + rows, indices] = data
        return np.asarray(dense[self.rows])

    @cached_property
    def vocabulary(self) -> list[str]:
        file = self.path / "kit" / f"{self.read('store.json')['vocabulary']}.zip"
        piece = zarr.open_group(ZipStore(file, mode="r"), mode="r")
        text, bounds = np.asarray(piece["text"]).tobytes(), np.asarray(piece["bounds"]).tolist()
        return [text[first:last].decode() for first, last in pairwise(bounds)]

    def passes(self) -> dict[str, Any]:
        return {name: self.read(f"passes/{name}/pass.json") for name in self.layout["passes"]}

    def done(self, name: str) -> set[int]:
        """Return the shards of a pass that have receipts: by themselves, or in what seals their segment."""
        folder = self.path / "passes" / name
        shards = {int(file.stem) for file in folder.glob("receipts/[0-9]*.json")}
        for file in folder.glob("sealed-*.json"):
            one = self.layout["segments"][int(file.stem.removeprefix("sealed-"))]
            shards |= set(range(one["first_shard"], one["first_shard"] + one["n_shards"]))
        return shards

    def snippet(self, place: int, before: int, after: int) -> str:
        """Return a row's token between « and », with its neighbours in the sequence, as the document has them."""
        near = [one for one in range(place - before, place + after + 1) if 0 <= one < len(self.seq)]
        near = [one for one in near if self.seq[one] == self.seq[place]]
        text, start, end = self.texts[self.doc[place]], self.start[place], self.end[place]
        shown = text[start:end] or self.vocabulary[self.token_id[place]]
        return f"{text[self.start[near].min() : start]}«{shown}»{text[end : self.end[near].max()]}"

    def health(self) -> list[dict[str, Any]]:
        """Return the checks of all passes, less those of SAEs that were dropped, and what tokenising noticed."""
        found = []
        for one in self.layout["segments"]:
            said = self.read(f"passes/corpus/sealed-{one['segment']}.json")["describe"]
            for name, harmless in (("replaced_surrogates", False), ("empty_documents", True)):
                expected = "any number" if harmless else "0: the text is stored with U+FFFD in their place"
                subject, value, ok = f"segment {one['segment']}", said[name], harmless or said[name] == 0
                found.append({"name": name, "subject": subject, "value": value, "expected": expected, "ok": ok})
        for made in self.passes().values():
            kept = self.layout["artifacts"]
            gone = {one["sae"] for one in made["recipe"]["saes"] if f"firings/{one['sae']}" not in kept}
            of_gone = [one["name"][:4] == "sae_" and one["subject"].split(" @ ")[0] in gone for one in made["health"]]
            found += [one for one, is_gone in zip(made["health"], of_gone, strict=True) if not is_gone]
        return found


@cache
def grown_stages() -> dict[str, Path]:
    """A store after its extraction; and grown: passes that lack the second segment, a drop, labels.

    Nobody may change them; they go when the process ends.
    """
    folder = home() / "documents"
    folder.mkdir()
    documents, world = some_documents(), tiny_world()
    first, more = documents[:-N_APPENDED], documents[-N_APPENDED:]
    residual = world.residual_sae.partition("=")[2]
    options: dict[str, Any] = {
        "dataset": first,
        "saes": [world.residual_sae, world.attention_sae],
        "lens_k": 1,
        "lens_sites": ["resid_pre.1", "resid_post.1"],
        "sites": ["resid_post.1", "final"],
        "attention_top": 2,
        "encode_special": True,
        "stride": 16,
        "shard_rows": 256,
        "batch_tokens": 1024,
    }
    grown = folder / "grown.act"
    extract(grown, **options)
    shutil.copytree(grown, folder / "begun.act")
    second = [f"{sae}={residual}" for sae in (LATE, GONE)]
    actstore.encode(grown, second, device="cpu", allow_unhealthy=True, with_index=False)
    maintenance.drop(grown, GONE)
    third: dict[str, Any] = {
        "dataset": None,
        "sites": ["z.0"],
        "saes": [],
        "lens_k": 0,
        "lens_sites": [],
        "attention_top": 0,
    }
    extract(grown, **options | third, into=True, with_index=False)
    extract(grown, **options, append=more)
    named = [{"sae": sae, "feature": feature, "label": label} for (sae, feature), label in LABELS.items()]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, named)), encoding="utf-8")
    maintenance.label(grown, folder / "labels.jsonl")
    return {"begun": folder / "begun.act", "grown": grown}
