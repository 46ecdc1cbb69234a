"""Write the demo dataset: generated documents with their ground truth as flat metadata.

Run: python world/make_dataset.py
One JSON object per line: `text`, `kind`, what the kind knows (entity, topic, length, sentiment, ...), and under the
label of each ground-truth span the code-point offsets of its last character, so that a token with
char_start <= offset < char_end carries the label. `topic_from` and `sentiment_from` are where those stretches begin.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import grammar

DATASET = Path(__file__).parents[1] / "actstore" / "demo" / "assets" / "dataset.jsonl"
DATASET_SEED = grammar.TRAINING_SEED + 2
N_DOCUMENTS = 2_600
POINT_LABELS = ("fact", "list_stop", "repeated_name", "topic_due", "sentiment_due")


def record(document: grammar.Document) -> dict[str, object]:
    """The JSON object of one document."""
    offsets: dict[str, list[int]] = {}
    for span in document.spans:
        if span.label in POINT_LABELS:
            offsets.setdefault(span.label, []).append(span.end - 1)
    stretches = {f"{span.label}_from": span.start for span in document.spans if span.label not in POINT_LABELS}
    return {"text": document.text, "kind": document.kind, **document.metadata, **offsets, **stretches}


def demo_documents() -> list[grammar.Document]:
    """The documents of the demo dataset, in order."""
    return list(itertools.islice(grammar.documents(DATASET_SEED), N_DOCUMENTS))


def dataset_text() -> str:
    """The whole file: one compact JSON object per line."""
    lines = (json.dumps(record(document), separators=(",", ":")) for document in demo_documents())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DATASET.write_text(dataset_text())
    print(f"{N_DOCUMENTS} documents, {DATASET.stat().st_size} bytes written to {DATASET}")
