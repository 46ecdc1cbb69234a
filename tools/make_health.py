"""Write docs/health.md: what the proof of SAEs says when each SAE of the demo is pointed at a wrong place on purpose.

python tools/make_health.py        about two minutes on two cores
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from actstore.blocks import TokenShard, is_plain
from actstore.corpus import Window, lay_out, load_tokenizer, read_documents
from actstore.demo import assets
from actstore.errors import InvalidInput, Unhealthy
from actstore.extraction.batches import plan_batches
from actstore.health import HealthCheck
from actstore.models import LoadedModel, load_model, prove
from actstore.saes import SaeEncoder, SparseCoder, compete, expand_sae_arguments, load_sae, sae_health
from actstore.sites import Site, parse_site

PAGE = Path(__file__).resolve().parent.parent / "docs" / "health.md"
N_ROWS = 4096

INTRODUCTION = """# The proof of SAEs, tried on purpose

Written by `python tools/make_health.py`: the SAEs of the embedded world on {n_rows} plain rows, read rightly and
wrongly. A run stops where the FVU at the declared site exceeds 1, or another site of its width within one layer
explains it more than 5 % better. FVU = Σ‖x − x̂‖² / Σ‖x − mean‖², the mean per dimension (Gemma Scope's definition).

Every wrong site is refused, and so are transposed weights. A model that forgets the scale of its embedding is another
model, of which SAEs of deep layers still explain much; the model's own proof refuses it. What the rule cannot see is a
mistake that is the same at every site and leaves the right one the best: `b_dec` subtracted before the encoder raises
the FVU four- to ninefold and is accepted, because these SAEs declare no FVU to compare with; thresholds rounded to
float16 change nothing that matters. So encoders take the equation from the format, never from a guess.
"""

Rows = dict[Site, torch.Tensor]


def unscaled(model: LoadedModel) -> LoadedModel:
    """Return a model that forgets to scale its embedding by √d_model: every stream above it is another."""
    wrong = copy.deepcopy(model.causal_lm)
    wrong.get_input_embeddings().embed_scale.fill_(1.0)
    return dataclasses.replace(model, causal_lm=wrong)


def plain_rows(model: LoadedModel) -> Rows:
    """Return the first plain rows of the demo's dataset at every site of the model that has rows: (row, width)."""
    sites = [site for site in model.sites() if site.kind != "pattern"]
    documents = read_documents(str(assets().dataset))
    batches = lay_out(documents, load_tokenizer(assets().model), Window(256), shard_rows=N_ROWS, max_tokens=N_ROWS)
    shard: TokenShard = next(shard for batch in batches for shard in batch.shards)
    kept = {site: torch.empty(N_ROWS, model.site_width(site)) for site in sites}
    for batch in plan_batches(shard, 8192):
        rows, mask = torch.from_numpy(batch.rows), torch.from_numpy(batch.attention_mask)
        real = mask.reshape(-1).nonzero()[:, 0]

        def deposit(site: Site, values: torch.Tensor, rows: torch.Tensor = rows, real: torch.Tensor = real) -> None:
            kept[site][rows] = values.reshape(-1, values.shape[-1])[real]

        model.capture(torch.from_numpy(batch.token_ids), mask, sites, deposit)
    plain = np.flatnonzero((shard.column("token_id") >= 0) & is_plain(shard.column("flags")))
    return {site: values[torch.from_numpy(plain)] for site, values in kept.items()}


def moved(coder: SparseCoder, site: Site) -> SparseCoder:
    """Return an SAE that declares another site."""
    return dataclasses.replace(coder, identity=dataclasses.replace(coder.identity, site=str(site)))


def wrong_places(coder: SparseCoder, rows: Rows) -> Iterator[tuple[str, SparseCoder]]:
    """Yield each mistake by its name, with the SAE as it would then be read."""
    own = parse_site(coder.identity.site)
    assert own.layer is not None
    same_width = [site for site in rows if rows[site].shape[1] == coder.d_in and site != own]
    near = {Site(own.kind, own.layer + step) for step in (-1, 1)}
    inside = {Site(kind, own.layer) for kind in ("resid_pre", "resid_mid", "resid_post")}
    raw = {Site(kind, own.layer) for kind in ("mlp_out_raw", "attn_out_raw", "attn_out", "mlp_out", "ln2", "q")}
    for site in same_width:
        if site in near or site in inside or site in raw or site.kind == "embed_raw":
            yield f"read at {site}", moved(coder, site)
    yield "b_dec subtracted", dataclasses.replace(coder, b_enc=coder.b_enc - coder.b_dec @ coder.w_enc)
    yield "features shuffled in the decoder", dataclasses.replace(coder, w_dec=np.roll(coder.w_dec, 1, axis=0))
    rounded = coder.threshold.astype(np.float16).astype(np.float32)
    yield "thresholds rounded to float16", dataclasses.replace(coder, threshold=rounded)


def verdict(coder: SparseCoder, rows: Rows) -> tuple[float, float, str]:
    """Return FVU, L0 and what the rule decides, as an extraction would."""
    encoder, own = SaeEncoder(coder, "cpu"), parse_site(coder.identity.site)
    near = {site: found for site, found in rows.items() if found.shape[1] == coder.d_in and _near(site, own)}
    health: Mapping[str, HealthCheck] = {check.name: check for check in sae_health(encoder, rows[own])}
    contest = next(check for check in compete(encoder, near) if check.subject.endswith(f"@ {own}"))
    failed = [
        name for name, ok in (("FVU > 1", health["sae_fvu"].ok), ("another site wins", contest.ok)) if ok is False
    ]
    return health["sae_fvu"].value or float("nan"), health["sae_l0"].value or 0.0, ", ".join(failed) or "accepted"


def refusal_of_model(model: LoadedModel) -> str:
    """Return what the proof of the model itself says, before any SAE is tried."""
    try:
        prove(model, [Site("resid_post", 0)])
    except Unhealthy as refused:
        return "model refused" + (" (scale of the embedding)" if "scale · embed_raw" in str(refused) else "")
    return "model accepted"


def refusal_of_transposed(coder: SparseCoder) -> str:
    """Return what is said of an SAE whose matrices lie the other way round."""
    try:
        dataclasses.replace(coder, w_enc=coder.w_enc.T, w_dec=coder.w_dec.T)
    except InvalidInput as refused:
        return "refused when read: w_enc is transposed" if "transposed" in str(refused) else "refused when read"
    return "accepted"


def _near(site: Site, own: Site) -> bool:
    return site == own or (site.layer is not None and own.layer is not None and abs(site.layer - own.layer) <= 1)


def page() -> str:
    """Return the page."""
    model = load_model(str(assets().model), dtype="float32", device="cpu")
    rows = plain_rows(model)
    n_rows = len(next(iter(rows.values())))
    wrong_model = unscaled(model)
    without_scale, refused = plain_rows(wrong_model), refusal_of_model(wrong_model)
    lines = [
        INTRODUCTION.format(n_rows=n_rows),
        "| SAE | read | FVU | L0 | verdict |",
        "|---|---|---|---|---|",
    ]
    for path in assets().saes:
        coder = load_sae(expand_sae_arguments([str(path)])[0])
        for name, wrong in [("rightly", coder), *wrong_places(coder, rows)]:
            fvu, l0, said = verdict(wrong, rows)
            lines.append(f"| {coder.identity.sae} | {name} | {fvu:.3g} | {l0:.1f} | {said} |")
        fvu, l0, said = verdict(coder, without_scale)
        said = f"{refused}; SAE: {said}"
        lines.append(f"| {coder.identity.sae} | a model with unscaled embeddings | {fvu:.3g} | {l0:.1f} | {said} |")
        lines.append(f"| {coder.identity.sae} | weights transposed | – | – | {refusal_of_transposed(coder)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
