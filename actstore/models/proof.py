"""Proof that the sites of a model are what their names say, before anything is extracted from it.

Every identity compares two (row, column) matrices row by row; its value is the worst row's ‖difference‖ divided by
the largest norm among the tensors of that row. A quotient of norms, since a few dimensions of a real residual stream
are a hundred times larger than the others and would hide or dominate a difference of single elements.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.errors import InvalidInput, Unhealthy, explain
from actstore.health import HealthCheck
from actstore.sites import KINDS, WITHOUT_LAYER, Site

from .attention import ATTENTION_KINDS, attention_identities
from .loaded import LoadedModel
from .transforms import NORMALIZED
from .unembedding import logits

if TYPE_CHECKING:
    import torch

__all__ = ["IDENTITY_TOLERANCE", "PADDING_TOLERANCE", "prove"]

IDENTITY_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Largest error of an identity inside one layer, by compute dtype.

bfloat16 keeps 8 significant bits, so each rounding moves a number by at most 2⁻⁹ = 0.2 %, and an identity has at most
four between its two sides (the model adds twice, or multiplies, caps, …): under 0.8 %; 0.34 % was the most measured.
float32's own error is 1e-7; 1e-4 leaves room for sums over many thousand columns.
"""

PADDING_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest difference between a padded batch and single runs, by compute dtype.

Another batch shape may choose another order of summation, and that difference grows through every layer above: 3.4 %
was measured in bfloat16 on 26 random layers, 4e-6 in float32. Rows that see each other's padding differ by far more.
"""

_LENGTHS = (13, 7, 2)  # of the sequences of the proof, each the start of the first, so that causality is proved too


@dataclass(frozen=True)
class _Sum:
    """An identity of the residual stream: the sum of some kinds is another kind, in the same layer."""

    name: str
    terms: tuple[str, ...]
    total: str


_SUMS = (
    _Sum("resid_pre + attn_out = resid_mid", ("resid_pre", "attn_out"), "resid_mid"),
    _Sum("resid_pre + attn_out + mlp_out = resid_post", ("resid_pre", "attn_out", "mlp_out"), "resid_post"),
)
_INSIDE_A_LAYER = frozenset(KINDS) - WITHOUT_LAYER - ATTENTION_KINDS  # what the identities compare
_EMBEDDING, _FIRST_RESIDUAL, _FINAL = Site("embed_raw"), Site("resid_pre", 0), Site("final")
_Rows = dict[Site, "torch.Tensor"]


def prove(
    model: LoadedModel, sites: Sequence[Site], *, vocabulary_ids: Sequence[int] | None = None
) -> list[HealthCheck]:
    """Return the proofs of the requested sites and their layers, and of the unembedding; all hold.

    vocabulary_ids: token ids that the proof's sequences are drawn from, by default all of the model's.
    Proves widths, the scale of the embedding, sums of the residual stream, both output projections, every norm but
    that before attention, the logits with their cap, that a padded batch equals single runs, and that no token sees a
    later one; of patterns, queries, keys and values what `attention_identities` says.
    Raises UnknownName for a site that the model does not have, Unhealthy, naming each failed identity with its value
    and tolerance, where one does not hold.
    """
    wanted = tuple(dict.fromkeys(sites))
    sequences = _sequences(model, vocabulary_ids)
    rows = _capture(model, sequences, _needed(model, wanted))
    layers = sorted({site.layer for site in wanted if site.layer is not None})
    widths = _sound(model, [_width(model, site, values) for site, values in rows.items()])
    checks = [check for check in widths if check.subject in set(map(str, wanted))]
    for layer in layers:
        checks += [*_sums(model, rows, layer), *_products(model, rows, layer), *_norms(model, rows, layer)]
    checks += _attention(model, sequences[0], [site for site in wanted if site.kind in ATTENTION_KINDS])
    checks += [*_embedding(model, rows), *_final(model, rows), _logits(model, sequences, rows), _causal(model, rows)]
    checks += _padding(model, sequences, {site: rows[site] for site in wanted})
    return _sound(model, checks)


def _sound(model: LoadedModel, checks: list[HealthCheck]) -> list[HealthCheck]:
    if failed := [check for check in checks if not check.ok]:
        raise _unhealthy(model, failed)
    return checks


def _sequences(model: LoadedModel, vocabulary_ids: Sequence[int] | None) -> list[list[int]]:
    ids = range(model.facts.vocabulary_size) if vocabulary_ids is None else vocabulary_ids
    last = model.facts.vocabulary_size - 1
    if not ids or not 0 <= min(ids) <= max(ids) <= last:
        raise InvalidInput(explain("The vocabulary ids of the proof are not the model's", accepted=f"0 to {last}"))
    whole = random.Random(0).choices(ids, k=max(_LENGTHS))
    return [whole[:length] for length in _LENGTHS]


def _needed(model: LoadedModel, wanted: Sequence[Site]) -> list[Site]:
    layers = {site.layer for site in wanted if site.layer is not None}
    # The embedding in any case: one that is not scaled makes every stream above it another model's.
    everywhere = {_EMBEDDING, _FIRST_RESIDUAL, _last_residual(model)}
    helpers = {Site(kind, layer) for layer in layers for kind in _INSIDE_A_LAYER} | everywhere
    return [*wanted, *(helpers & set(model.sites()) - set(wanted))]


def _last_residual(model: LoadedModel) -> Site:
    return Site("resid_post", model.facts.n_layers - 1)


def _padded(model: LoadedModel, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, int64 (sequence, position), padded on the right with an ordinary token."""
    import torch

    longest = max(map(len, sequences))
    ids = [[*sequence, *[sequences[0][0]] * (longest - len(sequence))] for sequence in sequences]
    mask = [[int(position < len(sequence)) for position in range(longest)] for sequence in sequences]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)


def _capture(model: LoadedModel, sequences: Sequence[Sequence[int]], sites: Sequence[Site]) -> _Rows:
    """Run the sequences as one batch; return the rows of their real positions, (row, width) by site.

    A pattern's row has all keys of the longest sequence of the proof, head after head.
    """
    from torch.nn.functional import pad

    token_ids, mask = _padded(model, sequences)
    found: _Rows = {}

    def deposit(site: Site, values: torch.Tensor) -> None:
        if site.kind == "pattern":
            values = pad(values, (0, max(_LENGTHS) - values.shape[-1])).transpose(1, 2).flatten(2)
        found[site] = values[mask.bool()]

    model.capture(token_ids, mask, sites, deposit)
    return found


def _width(model: LoadedModel, site: Site, values: torch.Tensor) -> HealthCheck:
    declared, width = model.site_width(site), values.shape[-1]
    if site.kind == "pattern":
        width //= max(_LENGTHS)
    return HealthCheck("width", str(site), float(width), str(declared), width == declared)


def _sums(model: LoadedModel, rows: _Rows, layer: int) -> Iterator[HealthCheck]:
    for identity in _SUMS:
        terms = [Site(kind, layer) for kind in identity.terms]
        total = Site(identity.total, layer)
        if {*terms, total} <= rows.keys():
            found = sum((rows[term].float() for term in terms[1:]), start=rows[terms[0]].float())
            error = _worst_row(found, rows[total], *(rows[term] for term in terms))
            yield _identity(model, identity.name, total, error)


def _products(model: LoadedModel, rows: _Rows, layer: int) -> Iterator[HealthCheck]:
    for name, source, target, module in (
        ("z · W_O = attn_out_raw", "z", "attn_out_raw", model.family.attention_output),
        ("mlp_act · W_down = mlp_out_raw", "mlp_act", "mlp_out_raw", model.family.mlp_output),
    ):
        weight, bias = model.projection(module, layer)
        product = rows[Site(source, layer)].float() @ weight.float()
        found = product if bias is None else product + bias
        expected = rows[Site(target, layer)]
        yield _identity(model, name, Site(target, layer), _worst_row(found, expected, product))


def _norms(model: LoadedModel, rows: _Rows, layer: int) -> Iterator[HealthCheck]:
    family = model.family
    for name, source, target, module in (
        ("post-norm(attn_out_raw) = attn_out", "attn_out_raw", "attn_out", family.attention_post_norm),
        ("ln2_normalized · gain = ln2", "ln2_normalized", "ln2", family.mlp_pre_norm),
        ("post-norm(mlp_out_raw) = mlp_out", "mlp_out_raw", "mlp_out", family.mlp_post_norm),
    ):
        if module is not None:
            gain, bias = model.norm(module.format(layer=layer))
            given = rows[Site(source, layer)].float()
            scaled = gain * (given if target == "ln2" else NORMALIZED[family.norm](given, model.facts.norm_eps))
            found = scaled if bias is None else scaled + bias
            yield _identity(model, name, Site(target, layer), _worst_row(found, rows[Site(target, layer)], scaled))


def _attention(model: LoadedModel, sequence: Sequence[int], sites: Sequence[Site]) -> Iterator[HealthCheck]:
    token_ids, _ = _padded(model, [sequence])
    layers = sorted({site.layer for site in sites if site.layer is not None})
    for identity in attention_identities(model, token_ids, layers):
        error = _worst_row(identity.found, identity.expected)
        yield _identity(model, identity.name, identity.site, error, identity.tolerance or IDENTITY_TOLERANCE)


def _embedding(model: LoadedModel, rows: _Rows) -> Iterator[HealthCheck]:
    import torch

    if _EMBEDDING in rows:
        positions = torch.cat([torch.arange(length) for length in _LENGTHS]).to(model.device)
        error = _worst_row(model.embedded(rows[_EMBEDDING], positions), rows[_FIRST_RESIDUAL])
        yield _identity(model, "scale · embed_raw + position = resid_pre", _FIRST_RESIDUAL, error)


def _final(model: LoadedModel, rows: _Rows) -> Iterator[HealthCheck]:
    if _FINAL in rows:
        gain, bias = model.norm(model.family.final_norm)
        normed = NORMALIZED[model.family.norm](rows[_last_residual(model)].float(), model.facts.norm_eps) * gain
        error = _worst_row(normed if bias is None else normed + bias, rows[_FINAL], normed)
        yield _identity(model, "final-norm(resid_post) = final", _FINAL, error)


def _logits(model: LoadedModel, sequences: Sequence[Sequence[int]], rows: _Rows) -> HealthCheck:
    import torch

    token_ids, mask = _padded(model, sequences)
    last = _last_residual(model)
    with torch.no_grad():
        own = model.causal_lm(input_ids=token_ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    error = _worst_row(logits(model.unembedding(), rows[last]), own)
    return _identity(model, "unembedding(resid_post) = the model's logits", last, error)


def _causal(model: LoadedModel, rows: _Rows) -> HealthCheck:
    import torch

    last = _last_residual(model)
    whole, *starts = torch.split(rows[last], list(_LENGTHS))
    error = max(_worst_row(start, whole[: len(start)]) for start in starts)
    return _identity(model, "the start of a sequence = its rows in the whole", last, error, PADDING_TOLERANCE)


def _padding(model: LoadedModel, sequences: Sequence[Sequence[int]], rows: _Rows) -> Iterator[HealthCheck]:
    import torch

    alone = [_capture(model, [sequence], list(rows)) for sequence in sequences]
    for site, batched in rows.items():
        error = _worst_row(torch.cat([single[site] for single in alone]), batched)
        yield _identity(model, "a padded batch = single runs", site, error, PADDING_TOLERANCE)


def _worst_row(found: torch.Tensor, expected: torch.Tensor, *terms: torch.Tensor) -> float:
    """Return the largest of all rows' ‖found − expected‖ / largest norm in the row; NaN where any number is."""
    import torch

    norms = [rows.float().norm(dim=-1) for rows in (found, expected, *terms)]
    scale = torch.stack(norms).amax(0).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((found.float() - expected.float()).norm(dim=-1) / scale).max())


def _identity(
    model: LoadedModel, name: str, site: Site, error: float, tolerances: dict[str, float] = IDENTITY_TOLERANCE
) -> HealthCheck:
    tolerance = tolerances[model.dtype]
    return HealthCheck(name, str(site), error, f"at most {tolerance:g}", error <= tolerance)


def _unhealthy(model: LoadedModel, failed: Sequence[HealthCheck]) -> Unhealthy:
    found = "; ".join(
        f"{check.name} at {check.subject} is {'not finite' if check.value is None else f'{check.value:.3g}'}, "
        f"{check.expected}"
        for check in failed[:5]
    )
    return Unhealthy(
        explain(
            f"{model.facts.name} in {model.dtype} fails {len(failed)} of its proofs: {found}",
            accepted="relative errors within the tolerance of the dtype",
            next_step="try dtype 'float32'; if it fails too, this version of transformers moves the model's tensors",
        )
    )
