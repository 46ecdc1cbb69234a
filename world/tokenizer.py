"""Train the tokenizer of the embedded world: BPE with Gemma's word marks, special tokens and byte fallback.

Run: python world/tokenizer.py
Newlines, punctuation and digits always stand alone, so that the tokens of a prompt are a prefix of those of its
continuation.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import grammar
import words
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MODEL_FOLDER = Path(__file__).parents[1] / "actstore" / "demo" / "assets" / "model"
VOCABULARY_SIZE = 1_664
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
WORD_MARK = "▁"


def training_texts() -> list[str]:
    """20,000 documents, and every word of theirs often enough to become one token wherever the vocabulary allows."""
    texts = [document.text for document in itertools.islice(grammar.documents(grammar.TRAINING_SEED), 20_000)]
    lexicon = {f" {word}" for text in texts for word in re.findall(r"[^\W\d]+", text)}
    frequent = {f" {word}" for word in (*words.PEOPLE, *words.CITIES, *(fact.answer for fact in grammar.FACTS))}
    frequent |= {f" {item}" for items, _, _ in words.LISTS.values() for item in items.split()}
    return texts + [word for word in sorted(lexicon) for _ in range(2_000 if word in frequent else 1_000)]


def untrained() -> Tokenizer:
    """A tokenizer that splits as this world needs but knows no merge yet."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=WORD_MARK, prepend_scheme="never"),
            pre_tokenizers.Split(Regex(r"[^\w\s" + WORD_MARK + r"]|\n|\d"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(WORD_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def train() -> Tokenizer:
    """The trained tokenizer; called with special tokens it puts <bos> in front."""
    tokenizer = untrained()
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", WORD_MARK]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS + BYTE_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    # The trainer marks the bytes as special; they are ordinary tokens of the byte fallback.
    state = tokenizer.to_str()
    tokenizer = without_special_bytes(state)
    bos = (SPECIAL_TOKENS[2], SPECIAL_TOKENS.index("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[bos]
    )
    return tokenizer


def without_special_bytes(state: str) -> Tokenizer:
    """The same tokenizer with only the four special tokens listed as added tokens."""
    parsed = json.loads(state)
    parsed["added_tokens"] = [token for token in parsed["added_tokens"] if token["content"] in SPECIAL_TOKENS]
    return Tokenizer.from_str(json.dumps(parsed))


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json so that AutoTokenizer loads them."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=1_024,
        padding_side="right",
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    # The name every transformers version knows; recent ones would write their own class name.
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    MODEL_FOLDER.mkdir(parents=True, exist_ok=True)
    save(train(), MODEL_FOLDER)
    print(f"tokenizer written to {MODEL_FOLDER}")
