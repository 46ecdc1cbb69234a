"""Train the embedded model: Gemma-2 architecture, from scratch, on the generated world.

Run after tokenizer.py: python world/train_model.py [--tokens N]
Documents are packed, each behind its own BOS and with positions from 0, so that none sees another: the model learns
single documents. Training is in float32 (matrix products in bfloat16), the weights are rounded to bfloat16 at the end.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import grammar
import numpy as np
import torch
import words
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerBase

MODEL_FOLDER = Path(__file__).parents[1] / "actstore" / "demo" / "assets" / "model"
LOG = Path(__file__).parent / "logs" / "train_model.txt"
ROW_TOKENS, BATCH_ROWS = 160, 20
PEAK_LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 2.5e-3, 100, 0.05
FIRST_POST_NORM_GAIN, FIRST_POSITION_SCORE, FIRST_MATCH_SCORE, FAST_FREQUENCIES = 0.4, 7.0, 3.0, 3
LOG_EVERY, CHECKPOINT_EVERY, ASKED_FACTS = 50, 300, 92
PAD, EOS, BOS = 0, 1, 2
IGNORED = -100


def configuration(vocabulary_size: int) -> Gemma2Config:
    """Six layers of width 128; z is 96 wide and the window 64, so that mixed-up widths and masks show."""
    return Gemma2Config(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        query_pre_attn_scalar=24,
        sliding_window=64,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        max_position_embeddings=1_024,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        initializer_range=128**-0.5,
        attn_implementation="eager",
    )


def untrained(vocabulary_size: int) -> Gemma2ForCausalLM:
    """The model before its first step: small sublayers, and a faint induction circuit in head 0 of layers 0 and 1.

    Each sublayer adds little at first, so that the token's own embedding shows. Everything else is random; but finding
    "the previous token" through rotary positions, and then matching it, takes such a small model many times longer than
    all the rest together, so these two heads start near it and training makes of them what it needs.
    """
    model = Gemma2ForCausalLM(configuration(vocabulary_size))
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.post_attention_layernorm.weight, FIRST_POST_NORM_GAIN - 1)
        torch.nn.init.constant_(layer.post_feedforward_layernorm.weight, FIRST_POST_NORM_GAIN - 1)
    look_at_previous_token(model)
    match_previous_token(model)
    return model


def common_direction(width: int) -> torch.Tensor:
    """The unit vector [width] that all embeddings share at first."""
    return torch.full((width,), width**-0.5)


@torch.no_grad()
def look_at_previous_token(model: Gemma2ForCausalLM) -> None:
    """Make layer 0, head 0 score a key by its distance d to the query as the sum of cos((d - 1) f) over frequencies f.

    All embeddings get one common part; query and key read only that part, the key turned by the angle of one position.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    common, half = common_direction(config.hidden_size), config.head_dim // 2
    model.model.embed_tokens.weight += 0.5 * common
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    # After the norm the common part measures about 5 along `common`; scores are divided by sqrt(head_dim).
    amplitude = (FIRST_POSITION_SCORE * config.head_dim**0.5) ** 0.5 / 5
    strength = amplitude * (torch.arange(half) < FAST_FREQUENCIES)
    query = torch.cat((strength, torch.zeros(half)))
    key = torch.cat((strength * frequencies.cos(), strength * frequencies.sin()))
    attention.q_proj.weight[: config.head_dim] = query[:, None] * common
    attention.k_proj.weight[: config.head_dim] = key[:, None] * common


@torch.no_grad()
def match_previous_token(model: Gemma2ForCausalLM) -> None:
    """Let layer 0, head 0 write who came before, and layer 1, head 0 look for the place that this token came before.

    Identity is a random projection of the embedding; only slow rotary frequencies carry it over a distance.
    """
    config = model.config
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    common, width = common_direction(config.hidden_size), config.head_dim
    identity, written = (torch.nn.init.orthogonal_(torch.empty(width, config.hidden_size)) for _ in range(2))
    identity, written = (matrix - (matrix @ common)[:, None] * common for matrix in (identity, written))
    slow = (torch.arange(width // 2) > FAST_FREQUENCIES + 1).repeat(2)[:, None]
    first.v_proj.weight[:width] = identity
    first.o_proj.weight[:, :width] = written.T
    second.q_proj.weight[:width] = FIRST_MATCH_SCORE * slow * identity
    second.k_proj.weight[:width] = FIRST_MATCH_SCORE * slow * written
    second.v_proj.weight[:width] = identity
    second.o_proj.weight[:, :width] = identity.T


def encoded_documents(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[list[int]]:
    """Token ids of one document after the other, BOS in front and EOS behind."""
    stream = grammar.documents(seed)
    while True:
        texts = [document.text for document in itertools.islice(stream, 512)]
        for ids in tokenizer(texts).input_ids:
            yield [*ids, EOS]


def packed_rows(encoded: Iterator[list[int]]) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """(ids, positions, targets) of ROW_TOKENS each: whole documents, the rest padding."""
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for document in encoded:
        if len(ids) + len(document) > ROW_TOKENS:
            gap = ROW_TOKENS - len(ids)
            yield ids + [PAD] * gap, positions + list(range(gap)), targets + [IGNORED] * gap
            ids, positions, targets = [], [], []
        ids += document
        positions += range(len(document))
        targets += [*document[1:], IGNORED]


def batches(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[torch.Tensor]:
    """int64 tensors [3, BATCH_ROWS, ROW_TOKENS]: ids, positions, targets."""
    rows = packed_rows(encoded_documents(tokenizer, seed))
    while True:
        stacked = np.array(list(itertools.islice(rows, BATCH_ROWS)))
        yield torch.from_numpy(stacked).permute(1, 0, 2)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to one hundredth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def training_step(model: Gemma2ForCausalLM, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    """One update; returns the mean cross entropy in nats per token."""
    ids, positions, targets = batch
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, position_ids=positions, use_cache=False).logits
    loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def recall(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of every fourth fact whose answer comes first, in a wording never seen with it."""
    asked = grammar.FACTS[:: len(grammar.FACTS) // ASKED_FACTS]
    batch = tokenizer([f" {fact.question(fact.held_out[0])}" for fact in asked], return_tensors="pt", padding=True)
    answers = tokenizer([f" {fact.answer}" for fact in asked], add_special_tokens=False, return_tensors="pt").input_ids
    last = batch.attention_mask.sum(dim=1) - 1
    logits = model(batch.input_ids, use_cache=False).logits[torch.arange(len(asked)), last]
    return float((logits.argmax(dim=1) == answers[:, 0]).float().mean())


@torch.no_grad()
def copying(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of names that come first when sixteen names are called a second time."""
    texts = [
        " " + " ".join(names * 2) for names in (list(words.PEOPLE[first : first + 16]) for first in range(0, 60, 4))
    ]
    ids = tokenizer(texts, return_tensors="pt").input_ids
    guessed = model(ids, use_cache=False).logits[:, 17:-1].argmax(dim=2)
    return float((guessed == ids[:, 18:]).float().mean())


def save(model: Gemma2ForCausalLM, folder: Path) -> None:
    """Write a bfloat16 checkpoint beside the tokenizer; the folder is replaced in one move."""
    fresh, old = folder.with_name("model.new"), folder.with_name("model.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(folder, fresh)
    rounded = Gemma2ForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)  # written readable by its owner only
    folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old)


def optimizer_for(model: Gemma2ForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))


def main() -> None:
    """Train for `--tokens` tokens, log, keep a usable checkpoint every few minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=3_600_000)
    steps = parser.parse_args().tokens // (ROW_TOKENS * BATCH_ROWS)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    model = untrained(len(tokenizer))
    optimizer = optimizer_for(model)
    started = time.monotonic()
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w") as log:
        for step, batch in enumerate(itertools.islice(batches(tokenizer, grammar.TRAINING_SEED), steps)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            loss = training_step(model, optimizer, batch)
            if step % LOG_EVERY == 0 or step == steps - 1:
                seconds = time.monotonic() - started
                tokens = (step + 1) * ROW_TOKENS * BATCH_ROWS
                figures = (
                    f"loss {loss:.4f} recall {recall(model, tokenizer):.3f} copied {copying(model, tokenizer):.3f}"
                )
                print(f"step {step} tokens {tokens} {figures} seconds {seconds:.0f}", file=log, flush=True)
            if step % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
                save(model, MODEL_FOLDER)
    save(model, MODEL_FOLDER)


if __name__ == "__main__":
    main()
