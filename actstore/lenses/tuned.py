"""The tuned lens offline: a stored residual row, translated, then read as the logit lens reads it. No torch.

    logits_i = cap · tanh(U · norm(x + x @ W_iᵀ + b_i) / cap)                       (Belrose et al. 2023)

Translator i stands before layer i: it reads resid_pre.i, which is resid_post.(i − 1). The last resid_post has none: it
is final, and its lens is the model's own output. resid_mid is no state that a translator was fitted to.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.errors import InvalidInput, UnknownName, explain, unknown_name
from actstore.sites import Site, parse_site
from actstore.store import StoreReader

from .functions import Functions
from .tuned_files import LensConfig, Translator, find_translators, read_config, read_translators
from .unembed import TopTokens

__all__ = ["TunedLens", "lens_table", "translator_of", "unembed_hash"]

_EDGE = 3  # of a long axis, numpy prints so many first and last numbers


def translator_of(site: Site, n_layers: int) -> int | None:
    """Return the number of the translator that reads a site; None for the final residual stream, which needs none.

    Raises InvalidInput for a site that no translator reads.
    """
    if site.layer is not None and site.kind in ("resid_pre", "resid_post") and site.layer < n_layers:
        number = site.layer + (site.kind == "resid_post")
        return None if number == n_layers else number
    raise InvalidInput(
        explain(
            f"A tuned lens cannot read {site}",
            accepted="resid_pre and resid_post: the states between layers",
            next_step="read it with the logit lens",
        )
    )


def unembed_hash(weight: Any) -> str:
    """Return the published lenses' hash of an unembedding (token, width): SHA-256 of how numpy prints it.

    Numbers are rounded to one decimal, and of a large matrix only the corners are printed: no more rows are read.
    """
    n_tokens, size = weight.shape[0], int(np.prod(weight.shape))
    is_summarised = size > np.get_printoptions()["threshold"]
    ends = [weight[:]]
    if is_summarised and n_tokens > 2 * _EDGE:
        ends = [weight[: _EDGE + 1], weight[n_tokens - _EDGE :]]  # one row too many: dots stand for it
    rows = np.concatenate([np.asarray(end, dtype=np.float32) for end in ends])
    text = np.array2string(rows, precision=1, threshold=0 if is_summarised else size)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class TunedLens:
    """A tuned lens in a folder; translators are read when they are used."""

    folder: Path
    config: LensConfig
    file: Path
    numbers: tuple[int, ...]  # of the translators that it has

    @classmethod
    def open(cls, folder: str | Path, *, allow_pt: bool = False) -> TunedLens:
        """Open a published lens, or one fitted here; reads headers only.

        Raises MissingInput where there is none, UnsupportedFormat for what is not read, such as a pickle that was not
        allowed.
        """
        home = Path(folder).expanduser()
        config = read_config(home)
        file, numbers = find_translators(home, config, allow_pt=allow_pt)
        return cls(home, config, file, numbers)

    def translators(self, numbers: list[int]) -> Iterator[tuple[int, Translator]]:
        """Yield translators by number, one in memory at a time.

        Raises UnknownName for one that the lens does not have, UnsupportedFormat for NaN or infinity.
        """
        for number in numbers:
            if number not in self.numbers:
                what = f"The lens {self.folder} has no translator {number}, which reads resid_pre.{number}"
                raise UnknownName(explain(what, accepted=f"translators {', '.join(map(str, self.numbers))}"))
        return read_translators(self.file, self.config, numbers)

    def check(self, reader: StoreReader, site: str) -> None:
        """Raise InvalidInput where the lens is for another model than a stored site: its sizes or its unembedding."""
        facts = reader.store.model["facts"]
        found = (self.config.d_model, self.config.n_layers)
        stored = (facts["d_model"], facts["n_layers"])
        if found != stored:
            raise self._other(f"width and layers are {found}, and the store's are {stored}")
        digest = reader.kit_digest("unembedding", f"sites/{site}")
        if "unembedding" in self.config.ours:
            if self.config.ours["unembedding"] != digest:
                raise self._other(f"it was fitted with the unembedding {self.config.ours['unembedding']}, not {digest}")
        elif self.config.unembed_hash not in (None, unembed_hash(reader.kit_piece(digest)["weight"])):
            raise self._other("the hash of its unembedding is another, or that of another dtype")

    def _other(self, why: str) -> InvalidInput:
        return InvalidInput(
            explain(
                f"The lens {self.folder} is for another model ({self.config.base_model!r}): {why}",
                accepted="a lens of the store's model, in the dtype that it was run in",
                next_step="fit one: actstore fit-lens STORE --out FOLDER",
            )
        )

    def reads(self, site: Site) -> bool:
        """Return whether it has what a site's lens needs: its translator, or none where that is the final one."""
        if site.kind not in ("resid_pre", "resid_post"):
            return False
        return translator_of(site, self.config.n_layers) in (None, *self.numbers)

    def top(self, functions: Functions, site: str, rows: npt.NDArray[np.int64], k: int) -> TopTokens:
        """Return the k likeliest tokens of rows at a stored site, likeliest first.

        Raises InvalidInput for a lens of another model, a site that no translator reads, or k that cannot be.
        """
        number = translator_of(parse_site(site), self.config.n_layers)
        self.check(functions.reader, site)
        vectors = functions.vectors(site, rows)
        if number is not None:
            vectors = dict(self.translators([number]))[number].apply(vectors)
        return functions.unembed(f"sites/{site}").top(vectors, k)


def lens_table(functions: Functions, lens: TunedLens, pattern: str, place: pa.Table, k: int) -> pa.Table:
    """Return a tuned lens over rows: site, layer, seq, pos, row, input, rank, token_id, token, logprob.

    Of the stored sites that match the pattern, those that the lens reads. place: columns seq, pos, row, input.
    Raises UnknownName where there is no such site, InvalidInput for a lens of another model or k that cannot be.
    """
    stored = [parse_site(row["site"]) for row in functions.reader.sites]
    sites = [site for site in stored if fnmatch.fnmatchcase(str(site), pattern) and lens.reads(site)]
    if not sites:
        known = [str(site) for site in stored if lens.reads(site)]
        raise unknown_name("stored site that this lens reads", pattern, known, next_step="actstore extract … --site")
    rows = np.asarray(place["row"].combine_chunks(), dtype=np.int64)
    parts = [_table(functions, site, place, lens.top(functions, str(site), rows, k)) for site in sites]
    return pa.concat_tables(parts).sort_by([(name, "ascending") for name in ("layer", "site", "row", "rank")])


def _table(functions: Functions, site: Site, place: pa.Table, top: TopTokens) -> pa.Table:
    n_rows, k = top.token_ids.shape
    repeated = place.take(pa.array(np.repeat(np.arange(n_rows), k)))
    token_ids = pa.array(top.token_ids.reshape(-1))
    columns = {
        "site": pa.repeat(str(site), n_rows * k),
        "layer": pa.repeat(pa.scalar(site.layer, pa.int32()), n_rows * k),
        **{name: repeated[name] for name in ("seq", "pos", "row", "input")},
        "rank": pa.array(np.tile(np.arange(1, k + 1, dtype=np.int64), n_rows)),
        "token_id": token_ids,
        "token": functions.reader.vocabulary().take(token_ids).cast(pa.string()),
        "logprob": pa.array(top.logprobs.reshape(-1)),
    }
    return pa.table(columns)
