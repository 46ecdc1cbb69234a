"""The demo: the embedded world extracted, and the three headline answers, each with the command that gives it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.api import Store
from actstore.maintenance import extract_and_index
from actstore.pictures import lens_grid
from actstore.progress import Report, silent
from actstore.saes import expand_sae_arguments

if TYPE_CHECKING:
    from actstore.extraction import Outcome

__all__ = ["DemoAnswer", "DemoAssets", "assets", "demo_answers", "extract_demo"]

PROMPT_DOC = 0  # the lens example is the first document of the demo's corpus


@dataclass(frozen=True)
class DemoAssets:
    """Where the embedded world lies, and what its guide says is worth showing."""

    model: Path
    saes: tuple[Path, ...]
    dataset: Path
    guide: dict[str, Any]

    def documents(self) -> list[dict[str, Any]]:
        """Return the corpus of the demo: the prompt of the lens example, then the embedded dataset."""
        lines = self.dataset.read_text(encoding="utf-8").splitlines()
        return [{"text": self.guide["lens"]["prompt"], "kind": "prompt"}, *(json.loads(line) for line in lines)]

    def sae_id(self, sae: str) -> str:
        """Return the id in the store of an SAE that the guide names by its folder."""
        return expand_sae_arguments([str(self.model.parent / sae)])[0].sae


@dataclass(frozen=True)
class DemoAnswer:
    """One answer: what it shows, the answer itself, and the commands that give it."""

    title: str
    text: str
    commands: tuple[str, ...]


@cache
def assets() -> DemoAssets:
    """Return the embedded world."""
    home = Path(str(files("actstore.demo"))) / "assets"
    saes = sorted(path.parent for path in home.glob("gemma-scope-*/**/params.npz"))
    guide = json.loads((home / "guide.json").read_text(encoding="utf-8"))
    return DemoAssets(home / "model", tuple(saes), home / "dataset.jsonl", guide)


def extract_demo(out: Path, report: Report = silent) -> Outcome:
    """Run the embedded model over the embedded dataset into a store, with every SAE, and index it; resumes."""
    world = assets()
    return extract_and_index(
        model=str(world.model),
        dataset=world.documents(),
        out=out,
        sites=["resid_post.*"],
        saes=[str(path) for path in world.saes],
        lens_k=5,
        dtype="float32",
        device="cpu",
        context=256,
        report=report,
    )


def demo_answers(store: Store) -> list[DemoAnswer]:
    """Return the three headline answers: logit lens, top examples, feature statistics."""
    return [_lens(store), _top(store), _stats(store)]


def _lens(store: Store) -> DemoAnswer:
    lens = assets().guide["lens"]
    result = store.lens("logit", doc=PROMPT_DOC)
    last = max(row["pos"] for row in result.rows())
    first = max(0, last - 7)
    url = shlex.quote(store.url)
    statement = (
        "SELECT l.site, v.token, exp(l.logprob) AS probability FROM lens_tokens l JOIN vocabulary v USING (token_id) "
        f"JOIN tokens t USING (row) WHERE t.doc = {PROMPT_DOC} AND t.pos = {last} AND l.rank = 1 ORDER BY l.site"
    )
    return DemoAnswer(
        f"1. Logit lens: what each layer would say next, over the end of {lens['prompt']!r} (answer:{lens['answer']})",
        lens_grid(result, first=first),
        (
            f"actstore lens {url} --doc {PROMPT_DOC} --first {first}",
            f"actstore query {url} logit_lens -p doc={PROMPT_DOC}",
            f"actstore sql {url} {shlex.quote(statement)}",
        ),
    )


def _top(store: Store) -> DemoAnswer:
    shown = assets().guide["features"][0]
    sae = assets().sae_id(shown["sae"])
    parameters = {"sae": sae, "feature": shown["feature"], "k": 10, "per_document": 1}
    result = store.query("max_activating", parameters)
    given = " ".join(f"-p {name}={value}" for name, value in parameters.items())
    return DemoAnswer(
        f"2. Top examples of feature {shown['feature']} of {sae}: {shown['meaning']}",
        str(result),
        (
            f"actstore query {shlex.quote(store.url)} max_activating {given}",
            f"actstore top {shlex.quote(store.url)} {sae} {shown['feature']} -k 10 --per-document 1",
        ),
    )


def _stats(store: Store) -> DemoAnswer:
    sae = assets().sae_id(assets().guide["features"][0]["sae"])
    statement = (
        "SELECT sae, count(*) AS features, count(*) FILTER (n_firings = 0) AS dead, sum(n_firings)::BIGINT AS firings, "
        "max(density) AS highest_density FROM features GROUP BY sae ORDER BY sae"
    )
    text = f"{store.query('feature_stats', {'sae': sae, 'k': 6})}\n\n{store.sql(statement)}"
    url = shlex.quote(store.url)
    return DemoAnswer(
        "3. How often features fire, and how many are dead",
        text,
        (f"actstore query {url} feature_stats -p sae={sae} -p k=6", f"actstore sql {url} {shlex.quote(statement)}"),
    )
