"""Measure the embedded world: recall, lists, induction, SAEs, and single features against the ground truth.

Run last: python world/evaluate.py            measures the committed assets and writes report.md and report.json
          python world/evaluate.py --random-weights   the same measures on untrained weights
Exits 1 if a requirement is not met; untrained weights must fail.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import capture
import grammar
import make_dataset
import numpy as np
import torch
import truth
import words
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

REPORT = Path(__file__).parent
FACT_OPENER = "From the town records:"
END_OF_LIST = "\n\n"
EVALUATION_SEED = grammar.TRAINING_SEED + 3
INDUCTION_SEQUENCES, INDUCTION_NAMES = 64, 20
MAX_LIST_TOKENS = 90
# On untrained activations the SAEs fire hundreds of features per row, so fewer rows are read there.
RANDOM_WEIGHTS_DOCUMENTS = 400
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Requirement:
    """One demand on the world: what was measured, the bound, and whether it holds."""

    name: str
    value: float
    bound: str
    ok: bool


def at_least(name: str, value: float, bound: float) -> Requirement:
    """A requirement that `value` is `bound` or more."""
    return Requirement(name, value, f">= {bound:g}", value >= bound)


def at_most(name: str, value: float, bound: float) -> Requirement:
    """A requirement that `value` is `bound` or less."""
    return Requirement(name, value, f"<= {bound:g}", value <= bound)


@torch.no_grad()
def next_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[int]:
    """The most likely next token id after each prompt."""
    found: list[int] = []
    for first in range(0, len(prompts), 64):
        batch = tokenizer(prompts[first : first + 64], return_tensors="pt", padding=True)
        logits = model(batch.input_ids, use_cache=False).logits
        last = batch.attention_mask.sum(dim=1) - 1
        found += logits[torch.arange(len(last)), last].argmax(dim=1).tolist()
    return found


def recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Share of facts whose answer is the top next token, asked in the wordings never seen with that entity."""
    asked = [(fact, question) for fact in grammar.FACTS for question in fact.unseen_questions()]
    prompts = [f"{FACT_OPENER} {question}" for _, question in asked]
    answers = [tokenizer(f" {fact.answer}", add_special_tokens=False).input_ids[0] for fact, _ in asked]
    right = np.array(next_tokens(model, tokenizer, prompts)) == np.array(answers)
    attributes = np.array([fact.attribute for fact, _ in asked])
    by_attribute = {str(name): float(right[attributes == name].mean()) for name in np.unique(attributes)}
    return {"questions": len(asked), "all": float(right.mean()), **by_attribute}


@torch.no_grad()
def continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Greedy continuation of each prompt, up to the blank line that ends a list."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    ids, length = batch.input_ids, batch.attention_mask.sum(dim=1)
    ids = torch.nn.functional.pad(ids, (0, MAX_LIST_TOKENS), value=tokenizer.pad_token_id)
    every = torch.arange(len(prompts))
    for _ in range(MAX_LIST_TOKENS):
        logits = model(ids[:, : int(length.max())], use_cache=False).logits[every, length - 1]
        ids[every, length] = logits.argmax(dim=1)
        length = length + 1
    texts = [tokenizer.decode(row[1:count]) for row, count in zip(ids, length.tolist(), strict=True)]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def list_lengths(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: str) -> dict[str, float]:
    """Fewest and most items over all headers, topics and both styles; share that stops."""
    prompts = [
        header.format(length=length, topic=topic) + style
        for header in words.LIST_HEADERS
        for topic in words.LISTS
        for style in ("\n-", "\n1.")
    ]
    texts = continued(model, tokenizer, prompts)
    stopped = [END_OF_LIST in text for text in texts]
    counts = [text.split(END_OF_LIST)[0].count("\n") + 1 for text in texts]
    return {"lists": len(prompts), "fewest": min(counts), "most": max(counts), "stopped": float(np.mean(stopped))}


@torch.no_grad()
def induction(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """[layer, head] mean attention from a repeated token to the token after its first occurrence."""
    total = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads)
    for text in texts:
        ids = tokenizer(f" {text} {text}", return_tensors="pt").input_ids
        half = (ids.shape[1] - 1) // 2
        patterns = torch.stack(model(ids, use_cache=False, output_attentions=True).attentions)[:, 0]
        query = torch.arange(1 + half, 2 * half)
        total += patterns[:, :, query, query - half + 1].mean(dim=-1)
    return total / len(texts)


def induction_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Best head on repeated names as roll calls have them, and the same head's rivals on repeated common words."""
    rng = random.Random(EVALUATION_SEED)
    items = [item for listed, _, _ in words.LISTS.values() for item in listed.split()]
    items = [item for item in items if len(tokenizer.tokenize(f" {item}")) == 1]
    report: dict[str, object] = {}
    for name, vocabulary in (("names", words.PEOPLE), ("words", tuple(items))):
        texts = [" ".join(rng.sample(vocabulary, INDUCTION_NAMES)) for _ in range(INDUCTION_SEQUENCES)]
        scores = induction(model, tokenizer, texts)
        layer, head = divmod(int(scores.argmax()), scores.shape[1])
        report[name] = {"best": float(scores.max()), "layer": layer, "head": head, "scores": scores.tolist()}
    return report


def sae_figures(x: Floats, sae: dict[str, Floats], features: Floats) -> dict[str, float]:
    """FVU, mean L0, dead share and width of one SAE on the rows of the demo dataset."""
    return {
        "fvu": capture.unexplained_variance(x, capture.decode(sae, features)),
        "l0": float((features > 0).sum(axis=1).mean()),
        "dead": 1 - float((features > 0).any(axis=0).mean()),
        "width": features.shape[1],
        "width_in": x.shape[1],
    }


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n_documents: int) -> dict[str, Any]:
    """Every figure of the report; SAEs and features on the first `n_documents` of the demo dataset."""
    documents = make_dataset.demo_documents()[:n_documents]
    sites = list(capture.SAE_SITES)
    rows = capture.capture(model, tokenizer, [document.text for document in documents], sites)
    saes = {site: capture.load_sae(site) for site in sites}
    features = {site: capture.encode(saes[site], rows.activations[site]) for site in sites}
    predictors = truth.best_predictors(features, rows, documents)
    return {
        "rows": len(rows.document),
        "recall": recall(model, tokenizer),
        "lists": {length: list_lengths(model, tokenizer, length) for length in ("short", "long")},
        "induction": induction_scores(model, tokenizer),
        "saes": {site: sae_figures(rows.activations[site], saes[site], features[site]) for site in sites},
        "features": {question: asdict(predictor) for question, predictor in predictors.items()},
    }


def question_scores(figures: dict[str, Any]) -> dict[str, float]:
    """Held-out F1 of the four questions; a question with several values counts with their mean."""
    scores: dict[str, float] = {}
    for name in ("topic", "list stop", "repeated name", "sentiment"):
        found = [entry["held_out_f1"] for key, entry in figures["features"].items() if key.startswith(name)]
        scores[name] = float(np.mean(found))
    return scores


def requirements(figures: dict[str, Any], d_model: int) -> list[Requirement]:
    """What the world promises, held against the figures."""
    short, long = figures["lists"]["short"], figures["lists"]["long"]
    demands = [
        at_least("facts recalled, unseen wording", figures["recall"]["all"], 0.95),
        at_least("short list, fewest items", short["fewest"], 3),
        at_most("short list, most items", short["most"], 5),
        at_least("short lists that stop", short["stopped"], 1),
        at_least("long list, fewest items", long["fewest"], 7),
        at_least("best induction head", figures["induction"]["names"]["best"], 0.4),
    ]
    for site, sae in figures["saes"].items():
        demands += [
            at_most(f"{site} FVU", sae["fvu"], 0.10),
            at_most(f"{site} L0", sae["l0"], d_model / 8),
            at_least(f"{site} width", sae["width"], 8 * d_model),
            at_most(f"{site} dead share", sae["dead"], 0.10),
        ]
    good = sum(score >= 0.9 for score in question_scores(figures).values())
    return [*demands, at_least("questions of four with held-out F1 >= 0.9", good, 3)]


def table(figures: dict[str, Any], demands: list[Requirement]) -> str:
    """Markdown: requirements, then the best feature of every question."""
    lines = ["| requirement | measured | bound | met |", "|---|---|---|---|"]
    for demand in demands:
        lines.append(f"| {demand.name} | {demand.value:.4g} | {demand.bound} | {'yes' if demand.ok else 'NO'} |")
    lines += ["", "| question | SAE | feature | threshold | F1 chosen | F1 held out |", "|---|---|---|---|---|---|"]
    for question, found in figures["features"].items():
        place = f"{found['site']} | {found['feature']} | {found['threshold']:.3f}"
        lines.append(f"| {question} | {place} | {found['chosen_f1']:.3f} | {found['held_out_f1']:.3f} |")
    return "\n".join(lines) + "\n"


def untrained(model: PreTrainedModel) -> PreTrainedModel:
    """The same architecture with random weights."""
    torch.manual_seed(0)
    random_model: PreTrainedModel = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    return random_model.float().eval()


def main() -> int:
    """Measure, print, write the report; 0 if every requirement is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-weights", action="store_true")
    random_weights = parser.parse_args().random_weights
    model, tokenizer = capture.load()
    random_figures = measure(untrained(model), tokenizer, RANDOM_WEIGHTS_DOCUMENTS)
    random_demands = requirements(random_figures, model.config.hidden_size)
    if random_weights:
        print(table(random_figures, random_demands))
        return int(not all(demand.ok for demand in random_demands))
    figures = measure(model, tokenizer, make_dataset.N_DOCUMENTS)
    demands = requirements(figures, model.config.hidden_size)
    trained_table, random_table = table(figures, demands), table(random_figures, random_demands)
    scores = ", ".join(f"{name} {score:.3f}" for name, score in question_scores(figures).items())
    (REPORT / "report.md").write_text(
        REPORT_TEXT.format(
            trained=trained_table,
            random=random_table,
            rows=figures["rows"],
            scores=scores,
            random_documents=RANDOM_WEIGHTS_DOCUMENTS,
        )
    )
    summary = {
        "requirements": [asdict(demand) for demand in demands],
        "figures": figures,
        "random_requirements": [asdict(demand) for demand in random_demands],
    }
    (REPORT / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(trained_table)
    return int(not all(demand.ok for demand in demands))


REPORT_TEXT = """# The embedded world, measured

Written by `python world/evaluate.py`. SAEs and features are measured on the {rows} plain rows of the demo dataset,
which neither the model nor the SAEs were trained on. A feature and its threshold are chosen on the even documents and
scored on the odd ones, over all plain rows: it has to fire on the rows of the ground truth and on no other row of any
document. `topic` means every row from the word that gives the topic away to the end of the document, `list stop` the
newline from which a list ends, `repeated name` a name that stood earlier, `sentiment` the place where the verdict is
due. A question with several values (five topics, two sentiments) counts with the mean of their F1.

Mean held-out F1: {scores}.

{trained}
## The same measures on random weights

The same architecture, untrained, read by the same SAEs (first {random_documents} documents).
`python world/evaluate.py --random-weights` exits 1.

{random}"""


if __name__ == "__main__":
    sys.exit(main())
