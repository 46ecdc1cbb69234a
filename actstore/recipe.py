"""The recipe: all that determines a pass's numbers; its digest is the identity of the pass (docs/format.md §4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from .errors import InvalidInput, explain
from .sealed import digest_of

__all__ = [
    "COMPUTE_DTYPES",
    "NOTHING_ASKED",
    "QUANTISED",
    "SAE_PRECISIONS",
    "STORAGE_DTYPES",
    "CorpusIdentity",
    "ModelIdentity",
    "Recipe",
    "SaeIdentity",
    "SourceIdentity",
    "refuse_same_ids",
]

COMPUTE_DTYPES = ("float32", "bfloat16")
QUANTISED = "int8"
STORAGE_DTYPES = (*COMPUTE_DTYPES, QUANTISED)
SAE_PRECISIONS = ("float32", "screen")


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model: names for people, digests for identity."""

    name: str  # hub id or the folder's own name; never an absolute path
    revision: str | None  # resolved commit of a hub model, else None
    architecture: str  # the class named in config.json
    config_digest: str  # sha256 of the configuration's canonical JSON
    weights_digest: str  # sha256 over names, shapes, dtypes and bytes of all tensors


@dataclass(frozen=True, kw_only=True)
class CorpusIdentity:
    """Which text and how it became rows: the first segment's documents, the tokenizer and the window."""

    documents_digest: str  # sha256 over the canonical JSON of every document of segment 0, in order
    max_tokens: int | None  # where the first segment was cut off
    tokenizer_digest: str
    context: int  # tokens of a window, BOS included
    stride: int  # tokens from one window's first text token to the next one's
    shard_rows: int
    batch_tokens: int  # padded tokens of a forward pass at most


@dataclass(frozen=True, kw_only=True)
class SaeIdentity:
    """Which sparse coder, read from which site."""

    sae: str  # short id, unique in the store
    site: str  # canonical name of the site it reads
    width: int  # number of features
    d_in: int  # width of the site
    architecture: str
    weights_digest: str  # sha256 of the weights file
    release: str | None = None
    sae_id: str | None = None
    neuronpedia_id: str | None = None
    revision: str | None = None
    declared_l0: float | None = None
    write_site: str | None = None  # the site that a transcoder reconstructs; None: the one it reads
    truncated_to: int | None = None  # firings of a row that are kept at most (neurons); None: all


@dataclass(frozen=True, kw_only=True)
class SourceIdentity:
    """Which stored site a pass reads in the model's place."""

    site: str
    dtype: str  # as it is stored
    digest: str  # of the recipe of the pass that stored it


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that determines a pass's numbers; frozen, comparable, digested."""

    model: ModelIdentity
    corpus: CorpusIdentity
    sites: tuple[str, ...] = ()
    saes: tuple[SaeIdentity, ...] = ()
    predictions: bool = True
    lens_k: int = 0
    lens_sites: tuple[str, ...] = ()
    compute_dtype: str = "float32"
    storage_dtype: str = "float32"
    activation_bits: int = 10  # mantissa bits kept of a firing's float32 activation
    encode_special: bool = False
    tile_rows: int = 1024  # rows that an SAE encodes at once; part of identity because sums depend on it
    attention_implementation: str = "eager"
    intervention: None = None
    attention_top: int = 0  # keys kept of every (layer, head, row); 0: no attention
    attention_min: float = 0.005  # edges of less weight stay out of the index
    sources: tuple[SourceIdentity, ...] = ()  # stored sites that are read; none: the model ran
    lens_name: str = "logit"
    lens_digest: str | None = None  # of a tuned lens: sha256 over all that changes its numbers
    sae_precision: str = "float32"  # or "screen": what fires is decided near its threshold in float64

    def __post_init__(self) -> None:
        for name, value, known in (
            ("compute", self.compute_dtype, COMPUTE_DTYPES),
            ("storage", self.storage_dtype, STORAGE_DTYPES),
        ):
            if value not in known:
                raise InvalidInput(explain(f"The {name} dtype {value!r} is not known", accepted=", ".join(known)))
        if self.sae_precision not in SAE_PRECISIONS:
            what = f"The precision {self.sae_precision!r} of SAEs is not known"
            raise InvalidInput(explain(what, accepted=", ".join(SAE_PRECISIONS)))
        if not (self.sites or self.saes or self.lens_sites or self.attention_top or self.predictions):
            raise InvalidInput(NOTHING_ASKED)
        refuse_same_ids([coder.sae for coder in self.saes])

    @property
    def digest(self) -> str:
        """Identity of the pass: SHA-256 of the recipe's canonical JSON without the model's name.

        A model of this name elsewhere, or a folder renamed, has the same weights digest or is another model.
        """
        body = self.to_json()
        return digest_of({**body, "model": {key: body["model"][key] for key in body["model"] if key != "name"}})

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values; fields that came later are left out where they say nothing.

        So a recipe that could be asked before they came has the digest that it had then.
        """
        body: dict[str, Any] = _plain(asdict(self))
        saes = [_without_later(coder, SaeIdentity) for coder in body["saes"]]
        return {**_without_later(body, Recipe), "saes": saes}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Return the recipe that `to_json` wrote; raises TypeError for fields it does not know."""
        values = dict(body)
        values["model"] = ModelIdentity(**values["model"])
        values["corpus"] = CorpusIdentity(**values["corpus"])
        values["saes"] = tuple(SaeIdentity(**coder) for coder in values["saes"])
        values["sites"], values["lens_sites"] = tuple(values["sites"]), tuple(values["lens_sites"])
        values["sources"] = tuple(SourceIdentity(**source) for source in values.get("sources", ()))
        return cls(**values)

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Return the fields that differ, `{"corpus.context": (self's, other's)}`."""
        mine, theirs = _flat(self.to_json()), _flat(other.to_json())
        return {key: (mine.get(key), theirs.get(key)) for key in mine | theirs if mine.get(key) != theirs.get(key)}


def refuse_same_ids(ids: Sequence[str]) -> None:
    """Raise InvalidInput where two SAEs of one pass have the same id."""
    if twice := {sae for sae in ids if ids.count(sae) > 1}:
        raise InvalidInput(
            explain(
                f"The SAE id {min(twice)!r} is given twice",
                accepted="ids that differ",
                next_step="name one of them yourself: --sae ANOTHER_ID=SOURCE",
            )
        )


_LATER = {
    SaeIdentity: ("write_site", "truncated_to"),
    Recipe: ("attention_top", "attention_min", "sources", "lens_name", "lens_digest", "sae_precision"),
}


def _without_later(body: Mapping[str, Any], of: type[SaeIdentity] | type[Recipe]) -> dict[str, Any]:
    """Return a body without the fields that were added to format 1 later and have their default value."""
    defaults = {one.name: _plain(one.default) for one in fields(of)}
    return {key: value for key, value in body.items() if key not in _LATER[of] or value != defaults[key]}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _flat(body: Mapping[str, Any]) -> dict[str, Any]:
    nested = {field.name for field in fields(Recipe)} & {"model", "corpus"}
    flat = {f"{name}.{key}": value for name in nested for key, value in body[name].items()}
    flat |= {f"sae {coder['sae']}": coder for coder in body["saes"]}
    return flat | {key: value for key, value in body.items() if key not in nested | {"saes"}}


NOTHING_ASKED = """Nothing was asked for: give a site, an SAE, a lens or --attention-top (predictions come with these),
or --predictions for them alone. For example:
  actstore extract MODEL DATASET --out STORE --site 'resid_post.*'
  actstore extract MODEL DATASET --out STORE --sae google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71
  actstore extract MODEL DATASET --out STORE --lens 5"""
