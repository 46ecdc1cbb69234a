"""actstore: run a language model over a dataset once, ask what happened inside it for ever.

    import actstore
    store = actstore.open("gemma.act")
    store.sql("SELECT count(*) FROM tokens")

Importing this, and every offline question, imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ActstoreError

if TYPE_CHECKING:
    from .api import Store
    from .extraction import Outcome

__all__ = ["ActstoreError", "encode", "extract", "open"]
__version__ = "0.1.0"


def open(store: str | Path) -> Store:
    """Open a store for reading, by path or fsspec URL.

    Raises MissingInput where there is none, UnsupportedFormat for a newer format, CorruptStore for damage.
    """
    from .api import Store

    return Store(store)


def extract(model: Any, dataset: Any, *, out: str | Path, **options: Any) -> Outcome:
    """Run a model over a dataset, store what is asked for, and index it.

    model: hub id, folder, or a loaded `PreTrainedModel` (then give `tokenizer=`); dataset: file, folder, hub id, or a
    list of strings. Options are the fields of `actstore.extraction.Request`: sites=[…], saes=[…], lens_k=5, ….
    Raises ActstoreError for everything that a user can cause; what was finished is kept, the same call resumes.
    """
    from .maintenance import extract_and_index

    return extract_and_index(model=model, dataset=dataset, out=Path(out), **options)


def encode(store: str | Path, saes: Sequence[str], **options: Any) -> Outcome:
    """Encode the stored sites of a store with new SAEs, without the model, and index the firings.

    saes: `[ID=]SOURCE[@SITE]` each, as for `extract`. Options are the fields of `actstore.extraction.EncodeRequest`.
    Raises ActstoreError for everything that a user can cause; what was finished is kept, the same call resumes.
    """
    from .maintenance import encode_and_index

    return encode_and_index(store, saes=saes, **options)
