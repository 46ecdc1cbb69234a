"""Write guide.json: what the demo shows, chosen from what was measured.

Run after evaluate.py: python world/make_guide.py
"""

from __future__ import annotations

import json
from pathlib import Path

import capture
import evaluate
import grammar
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

GUIDE = capture.ASSETS / "guide.json"
MEANINGS = {
    "repeated name": "a name that stood earlier in the same document",
    "topic": "the text of {value} headlines, from the word that gives the topic away",
    "sentiment": "the place where the verdict of a {value} review has to be given",
}


@torch.no_grad()
def answer_by_layer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> list[dict[str, object]]:
    """Logit lens at the prompt's last token: per layer the top token, the answer's probability and its rank."""
    sites = [f"resid_post.{layer}" for layer in range(model.config.num_hidden_layers)]
    answer_id = tokenizer(answer, add_special_tokens=False).input_ids[0]
    table: list[dict[str, object]] = []
    with capture.hooked(model, sites) as kept:
        model(tokenizer(prompt, return_tensors="pt").input_ids, use_cache=False)
    for site in sites:
        raw = model.lm_head(model.model.norm(kept[site][0, -1]))
        cap = model.config.final_logit_softcapping
        probability = torch.softmax(torch.tanh(raw / cap) * cap, dim=0)
        table.append(
            {
                "site": site,
                "top": tokenizer.decode([int(raw.argmax())]),
                "answer_probability": round(float(probability[answer_id]), 4),
                "answer_rank": int((raw > raw[answer_id]).sum()),
            }
        )
    return table


def vague_then_right(table: list[dict[str, object]]) -> float:
    """How well a lens table tells its story: the last layer is sure, the first three know little."""
    probabilities = [float(str(line["answer_probability"])) for line in table]
    if table[-1]["answer_rank"] != 0:
        return 0.0
    return probabilities[-1] - sum(probabilities[:3]) / 3


def lens_example(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """The fact question, in a wording never seen with its entity, whose lens table tells most."""
    best: dict[str, object] = {}
    best_score = 0.0
    for fact in grammar.FACTS[:80]:
        prompt, answer = f"{evaluate.FACT_OPENER} {fact.unseen_questions()[-1]}", f" {fact.answer}"
        table = answer_by_layer(model, tokenizer, prompt, answer)
        if (score := vague_then_right(table)) > best_score:
            best_score, best = score, {"prompt": prompt, "answer": answer, "layers": table}
    return best


def features(report: dict[str, dict[str, dict[str, dict[str, float | str]]]]) -> list[dict[str, object]]:
    """Where the feature of the repeated name, the best topic and the best sentiment is, and what it means."""
    found = report["figures"]["features"]
    entries: list[dict[str, object]] = []
    for kind in ("repeated name", "topic", "sentiment"):  # the demo shows the first: its meaning is seen at once
        named = [name for name in found if name.startswith(kind)]
        question = max(named, key=lambda name: found[name]["held_out_f1"])
        value = question.removeprefix(kind).strip()
        entry, site = found[question], str(found[question]["site"])
        entries.append(
            {
                "question": question,
                "sae": capture.sae_path(site).parent.relative_to(capture.ASSETS).as_posix(),
                "site": site,
                "layer": int(site.split(".")[1]),
                "feature": entry["feature"],
                "threshold": round(float(entry["threshold"]), 4),
                "meaning": MEANINGS[kind].format(value=value),
                "f1": round(float(entry["held_out_f1"]), 3),
            }
        )
    return entries


if __name__ == "__main__":
    report = json.loads((Path(__file__).parent / "report.json").read_text())
    guide = {"lens": lens_example(*capture.load()), "features": features(report)}
    GUIDE.write_text(json.dumps(guide, indent=1) + "\n")
    print(GUIDE.read_text())
