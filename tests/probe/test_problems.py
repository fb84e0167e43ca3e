"""The training and test tokens of problems, and that the two parts are independent."""

import numpy as np
import pytest
import torch
from tiny import make_tokenizer, sample_text

from tsae.data.documents import Document
from tsae.data.sections import Section
from tsae.data.sequences import SequenceStream
from tsae.probe.problems import (
    GAP,
    MAX_LABELS,
    MIN_TOKENS,
    counted_tokens,
    document_of_tokens,
    pose_problems,
)
from tsae.probe.token_classes import CLASSES, token_classes

LENGTH = 64


def packed(texts, tokenizer, sequences=1000):
    documents = [Document(f"text#{i}", text) for i, text in enumerate(texts)]
    stream = SequenceStream(lambda epoch: iter(documents), tokenizer, LENGTH, repeat=False)
    return stream.next_batch(sequences), documents


def posed(tokenizer, texts, sections=None, seed=0, labels=None):
    batch, documents = packed(texts, tokenizer)
    owner = document_of_tokens(batch, documents, tokenizer)
    places = {documents[i].name: section for i, section in (sections or {}).items()}
    classes = token_classes(counted_tokens(batch).numpy(), tokenizer)
    labels = {column: {documents[i].name: value for i, value in of.items()} for column, of in (labels or {}).items()}
    problems, left_out = pose_problems(batch, owner, documents, places, classes, seed, labels)
    counted = batch.segments.numpy() >= 0
    row = np.broadcast_to(np.arange(len(owner))[:, None], owner.shape)[counted]
    return {problem.name: problem for problem in problems}, left_out, owner[counted], row, classes


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("sequences", [3, 1000])
def test_the_document_of_every_token(bos, sequences):
    """Documents across rows, special tokens in the text, a padded or cut end, with and without BOS."""
    tokenizer = make_tokenizer(bos=bos, eos=False)
    texts = [sample_text(words, seed=words) + "<pad>" * (words % 2) for words in (3, 150, 40, 1, 77, 9)]
    batch, documents = packed(texts, tokenizer, sequences)
    owner = document_of_tokens(batch, documents, tokenizer)
    assert owner.shape == batch.segments.shape
    assert ((owner >= 0) == (batch.segments.numpy() >= 0)).all()
    flat = [
        (i, token)
        for i, document in enumerate(documents)
        for token in tokenizer(document.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ]
    width = LENGTH + (not bos)  # without BOS the first token of a row of content is its prefix
    for n, (mine, tokens) in enumerate(zip(owner, batch.tokens, strict=True)):
        row = flat[n * width : (n + 1) * width]
        row += [(-1, tokenizer.pad_token_id)] * (width - len(row))
        row = row if bos else row[1:]
        assert tokens[1:].tolist() == [token for _, token in row]
        assert mine.tolist() == [-1 if token == tokenizer.pad_token_id else i for i, token in row]
    assert len(set(owner[owner >= 0])) == (len(documents) if sequences > 3 else owner.max() + 1)


def test_other_documents_are_noticed(tokenizer):
    batch, documents = packed([sample_text(200, seed=seed) for seed in range(3)], tokenizer)
    with pytest.raises(ValueError, match="documents"):
        document_of_tokens(batch, documents[::-1], tokenizer)


def test_the_parts_of_a_document_are_apart_in_time_and_in_sequences(tokenizer):
    texts = [sample_text(words, seed=words) for words in (150, 200, 31, 250, 2, 180)]
    problems, _, owner, row, _ = posed(tokenizer, texts)
    problem = problems["document"]
    assert len(problem.labels) >= 3
    assert "text#4" not in problem.labels  # two words
    assert not (problem.train & problem.test).any()
    assert ((problem.y >= 0) == (problem.train | problem.test)).all()
    for label, name in enumerate(problem.labels):
        train, test = (np.flatnonzero(part & (problem.y == label)) for part in (problem.train, problem.test))
        assert set(owner[train]) == set(owner[test]) == {int(name.split("#")[1])}
        assert train.max() + GAP < test.min()
        assert not set(row[train]) & set(row[test])
        assert min(len(train), len(test)) >= MIN_TOKENS
        whole = (owner == owner[train[0]]).sum()
        assert abs(len(train) - whole / 2) <= LENGTH / 2 + 1  # the boundary is the nearest to the middle


def test_documents_that_lie_in_one_sequence_are_no_problem(tokenizer):
    _, left_out, *_ = posed(tokenizer, [sample_text(12, seed=seed) for seed in range(40)])
    assert "in a later one" in left_out["document"]


def test_the_parts_of_a_section_are_of_different_documents_and_sequences(tokenizer):
    texts = [sample_text(120, seed=seed) for seed in range(9)]
    # Text and stream are in different order; document 8 is the only one in its section, 7 is in none.
    sections = {i: Section("ab"[i % 2], place) for i, place in enumerate([3, 0, 1, 9, 2, 4, 0])}
    sections[8] = Section("alone", 0)
    problems, left_out, owner, row, _ = posed(tokenizer, texts, sections)
    problem = problems["section"]
    assert problem.labels == ("a", "b")
    assert "section" not in left_out
    for label, name in enumerate(problem.labels):
        train, test = (np.flatnonzero(part & (problem.y == label)) for part in (problem.train, problem.test))
        places = [{sections[i].place for i in owner[part]} for part in (train, test)]
        assert max(places[0]) < min(places[1])
        assert {sections[i].name for i in owner[np.concatenate([train, test])]} == {name}
        assert not set(row[train]) & set(row[test])
    assert not (problem.train & problem.test).any()


def test_the_parts_of_a_label_are_of_different_documents_and_sequences(tokenizer):
    texts = [sample_text(120, seed=seed) for seed in range(9)]
    kinds = {i: ("book", "code")[i % 2] for i in range(8)}  # document 8 has none
    problems, left_out, owner, row, _ = posed(
        tokenizer, texts, labels={"kind": kinds, "year": dict.fromkeys(range(9), "1")}
    )
    problem = problems["label kind"]
    assert problem.labels == ("book", "code")
    assert "fewer than two values" in left_out["label year"]
    assert not (problem.train & problem.test).any()
    for label, name in enumerate(problem.labels):
        train, test = (np.flatnonzero(part & (problem.y == label)) for part in (problem.train, problem.test))
        assert {kinds[i] for i in owner[np.concatenate([train, test])]} == {name}
        assert len(set(owner[train])) == len(set(owner[test])) == 2
        assert not set(owner[train]) & set(owner[test])
        assert not set(row[train]) & set(row[test])
    other, *_ = posed(tokenizer, texts, labels={"kind": kinds}, seed=1)
    assert (other["label kind"].train != problem.train).any()


def test_a_sequence_that_the_parts_of_a_section_share_trains_only(tokenizer):
    """Documents that follow each other in the stream: the second begins where the first ends."""
    texts = [sample_text(120, seed=seed) for seed in range(4)]
    problems, _, owner, row, _ = posed(tokenizer, texts, {i: Section("ab"[i // 2], i) for i in range(4)})
    problem = problems["section"]
    for label, (first, second) in enumerate(((0, 1), (2, 3))):
        train, test = (np.flatnonzero(part & (problem.y == label)) for part in (problem.train, problem.test))
        assert set(owner[train]) == {first}
        assert set(owner[test]) == {second}
        assert not set(row[train]) & set(row[test])
        assert set(row[train]) & set(row[owner == second])  # the case occurs


def test_a_text_without_sections_says_so(tokenizer):
    texts = [sample_text(120, seed=seed) for seed in range(4)]
    assert "has no sections" in posed(tokenizer, texts)[1]["section"]
    alone = {i: Section(str(i), 0) for i in range(4)}
    assert "fewer than two sections" in posed(tokenizer, texts, alone)[1]["section"]


def test_classes_are_learned_from_other_documents_than_tested_on(tokenizer):
    texts = [sample_text(60, seed=seed) + " 7" * 30 for seed in range(8)]
    problems, _, owner, _, classes = posed(tokenizer, texts)
    problem = problems["token class"]
    assert {"word", "continuation", "punctuation", "blank"} & set(problem.labels)
    assert not set(owner[problem.train]) & set(owner[problem.test])
    assert len(set(owner[problem.train])) == 4
    known = problem.y >= 0
    assert (np.array(problem.labels)[problem.y[known]] == np.array(CLASSES)[classes[known]]).all()
    for part in (problem.train, problem.test):
        assert (np.bincount(problem.y[part]) >= MIN_TOKENS).all()
    again = posed(tokenizer, texts)[0]["token class"]
    assert (again.train == problem.train).all()
    assert (posed(tokenizer, texts, seed=1)[0]["token class"].train != problem.train).any()


def test_of_many_documents_some_are_drawn(tokenizer):
    texts = [sample_text(70, seed=seed) for seed in range(MAX_LABELS + 20)]
    labels = posed(tokenizer, texts)[0]["document"].labels
    assert len(labels) == MAX_LABELS
    assert labels == posed(tokenizer, texts)[0]["document"].labels
    assert labels != posed(tokenizer, texts, seed=1)[0]["document"].labels


def test_only_counted_tokens_are_given_a_class(tokenizer):
    batch, _ = packed(["bed <pad> kol " * 40], tokenizer)
    tokens = counted_tokens(batch)
    assert tokens.dtype == torch.int64
    assert len(tokens) == int((batch.segments >= 0).sum())
    assert tokenizer.pad_token_id not in tokens
