"""Classes of tokens by their own characters: what a feature can represent without context."""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLASSES = (
    "blank",
    "number",
    "operator",
    "punctuation",
    "identifier",
    "function word",
    "keyword",
    "capitalised",
    "word",
    "continuation",
)
"""In the order in which `token_class` tries them."""

_OPERATORS = frozenset("+-*/%=<>&|^~@\\")

# English closed-class words: determiners, pronouns, prepositions, conjunctions, auxiliaries, and "not".
_FUNCTION_WORDS = frozenset(
    """
    a an the this that these those each every either neither some any no all both such
    i you he she it we they me him her us them my your his its our their mine yours hers ours theirs
    myself yourself himself herself itself ourselves themselves who whom whose which what
    of in on at by for with from to into onto upon over under about between among through during without within
    against before after above below across behind beyond near since until toward towards per via as like than
    and or but nor so yet if because although though while whereas unless whether when where why how once
    be am is are was were been being have has had having do does did done doing
    will would shall should can could may might must ought not there here then
    """.split()  # noqa: SIM905
)
_KEYWORDS = frozenset(keyword.kwlist)


def token_class(token: str) -> str | None:
    """The first of `CLASSES` that fits; None for a token without a class, such as part of a character.

    token: including a leading space

    blank          only spaces and line breaks
    number         digits and no letter: `12`, `3.`, ` 0`
    operator       one of + - * / % = < > & | ^ ~ @ and the backslash, without letter, digit or underscore: `->`, ` ==`
    punctuation    no letter, digit, underscore or operator: `.`, `("`, ` ...`
    identifier     has an underscore: `_name`, `__`
    function word  an English closed-class word in any case: ` the`, `Of`, `is`; includes Python's `if` and `for`
    keyword        any other reserved word of Python: ` def`, `None`
    capitalised    begins with a capital: ` Error`, `Path`
    word           any other after a space: ` river`
    continuation   any other: `ing`, and the first word of a line, which looks the same
    """
    core = token.strip()
    if "\N{REPLACEMENT CHARACTER}" in core:
        return None
    if not core:
        return "blank" if token else None
    if not any(c.isalpha() for c in core):
        if any(c.isdigit() for c in core):
            return "number"
        if "_" not in core:
            return "operator" if _OPERATORS.intersection(core) else "punctuation"
    if "_" in core:
        return "identifier"
    if core.lower() in _FUNCTION_WORDS:
        return "function word"
    if core in _KEYWORDS:
        return "keyword"
    if core[0].isupper():
        return "capitalised"
    return "word" if token[0].isspace() else "continuation"


def token_classes(ids: Sequence[int] | np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[n] int64, index in `CLASSES` of each token id, -1 for none."""
    unique, inverse = np.unique(np.asarray(ids), return_inverse=True)
    found = [token_class(string) for string in _strings(unique.tolist(), tokenizer)]
    return np.array([-1 if name is None else CLASSES.index(name) for name in found], dtype=np.int64)[inverse]


def _strings(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token, decoded after another token, because alone it may lose its leading space."""
    before = tokenizer("x", add_special_tokens=False)["input_ids"]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    start = len(tokenizer.decode(before, **options))
    return [text[start:] for text in tokenizer.batch_decode([[*before, i] for i in ids], **options)]
