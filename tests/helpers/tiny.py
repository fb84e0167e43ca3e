"""Random text, a small real tokenizer, and tiny models with random weights of the supported classes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

WORDS = [f"{a}{b}{c}" for a in "bdgklmnprst" for b in "aeiou" for c in ("", "n", "r", "sh")]


def sample_text(words: int, seed: int = 0) -> str:
    """Random prose of ``words`` words, in paragraphs."""
    rng = random.Random(seed)
    parts = []
    for i in range(words):
        parts.append(rng.choice(WORDS))
        parts.append(".\n\n" if i % 60 == 59 else ". " if i % 12 == 11 else " ")
    return "".join(parts)


def make_tokenizer(*, bos: bool = True, eos: bool = True) -> Any:
    """A byte-level BPE tokenizer of about 400 tokens with <pad>, and <bos> and <eos> if asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", *(["<eos>"] if eos else []), *(["<bos>"] if bos else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample_text(2000)], trainer)
    names = {f"{name.strip('<>')}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_model(folder: Path, model_class: str, config_class: str, **options: Any) -> Path:
    import transformers

    tokenizer = make_tokenizer()
    config = getattr(transformers, config_class)(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # so that blocks change what passes through them
        **{"max_position_embeddings": 512} | options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
