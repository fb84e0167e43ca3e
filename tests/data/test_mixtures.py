"""Several sources with weights: how they are written, their shares, order, epochs, split, and resuming."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer, sample_text

from tsae.data.documents import Document
from tsae.data.mixtures import Weighted, interleave, parse_mixture
from tsae.data.sections import sections
from tsae.data.sequences import SequenceStream
from tsae.data.text import (
    TextConfig,
    absolute_source,
    is_same_source,
    open_text,
    open_unseen,
    shown_source,
    split_threshold,
)
from tsae.errors import UserError
from tsae.utils.notices import warn_once


def write(path: Path, count: int, words: int, name: str) -> Path:
    rows = ({"text": f"{name} {i} {sample_text(words + i % 7, seed=i)}"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sources: `a.jsonl` of short documents, `b.jsonl` of long ones."""
    write(tmp_path / "a.jsonl", 600, 10, "A")
    write(tmp_path / "b.jsonl", 120, 100, "B")
    monkeypatch.chdir(tmp_path)
    warn_once.cache_clear()
    return tmp_path


def read(source: str, part: str = "train", seed: int = 0, epoch: int = 0, **config: Any) -> list[str]:
    documents = open_text(source, part=part, seed=seed, epoch=epoch, config=TextConfig(**config))
    return [document.text for document in documents]


class TestParsing:
    @pytest.mark.parametrize(
        ("source", "found"),
        [
            ("a.jsonl:0.7,b.jsonl:0.3", [("a.jsonl", 0.7), ("b.jsonl", 0.3)]),
            ("a.jsonl:7, b.jsonl:3", [("a.jsonl", 7.0), ("b.jsonl", 3.0)]),
            ("a.jsonl:1e-3,owner/name:1", [("a.jsonl", 0.001), ("owner/name", 1.0)]),
            ("C:\\texts\\a.txt:0.5,D:/b:.5", [("C:\\texts\\a.txt", 0.5), ("D:/b", 0.5)]),
            ("run:1:0.5,python-docs:2", [("run:1", 0.5), ("python-docs", 2.0)]),
            ("a.jsonl:2", [("a.jsonl", 2.0)]),
        ],
    )
    def test_names_and_weights(self, folder: Path, source: str, found: list[tuple[str, float]]) -> None:
        mixture = parse_mixture(source)
        assert mixture is not None
        assert [(each.data, each.weight) for each in mixture] == found

    @pytest.mark.parametrize(
        "source",
        ["a.jsonl", "C:\\texts\\a.txt", "C:/a", "python-docs", "owner/name", "a,b", "here:1", "x:0.5,y:0.5", ""],
    )
    def test_a_single_source(self, folder: Path, source: str) -> None:
        """A path that exists is one, whatever its name."""
        (folder / "here:1").mkdir()
        (folder / "x:0.5,y:0.5").write_text("the river")
        assert parse_mixture(source) is None

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("a.jsonl,b.jsonl:0.5", "'a.jsonl' in 'a.jsonl,b.jsonl:0.5' has no weight"),
            ("here:1,b.jsonl:0.5", "'here:1' in .* has no weight"),
            ("a.jsonl:0,b.jsonl:1", r"weight of a.jsonl is 0.0; it must be a positive number"),
            ("a.jsonl:-1,b.jsonl:1", r"weight of a.jsonl is -1.0; it must be"),
            ("a.jsonl:nan", r"weight of a.jsonl is nan; it must be"),
            ("a.jsonl:inf", r"weight of a.jsonl is inf; it must be"),
            ("a.jsonl:0.5,,b.jsonl:0.5", "the source '' in .* has no weight"),
            ("a.jsonl:0.5,a.jsonl:0.5", "'a.jsonl' is named twice"),
            ("no.yaml:0.5,a.jsonl:0.5", "'no.yaml' cannot be a source of text among others"),
            ("no.yaml", "no such file or folder: 'no.yaml'"),
            ("nowhere/at/all:0.5,a.jsonl:0.5", "no such file or folder: 'nowhere/at/all'"),
        ],
    )
    def test_what_is_refused(self, folder: Path, source: str, message: str) -> None:
        (folder / "here:1").mkdir()
        with pytest.raises(UserError, match=message) as info:
            read(source)
        assert "\n" not in str(info.value)

    def test_yaml(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Paths are relative to the file; the options of a source go before those of the command."""
        (folder / "deep").mkdir()
        (folder / "mix.yaml").write_text(
            "- {data: a.jsonl, weight: 7, min_characters: 20, roles: [assistant]}\n- {data: python-docs, weight: 3}\n"
        )
        monkeypatch.chdir(folder / "deep")
        mixture = parse_mixture("../mix.yaml")
        assert mixture is not None
        assert Path(mixture[0].data).resolve() == folder / "a.jsonl"
        assert mixture[0].options == (("roles", ("assistant",)), ("min_characters", 20))
        assert mixture[1] == Weighted("python-docs", 3.0)
        config = mixture[0].config(TextConfig(min_characters=3, max_characters=99), hub=False)
        assert (config.min_characters, config.max_characters, config.roles) == (20, 99, ("assistant",))

    @pytest.mark.parametrize(
        "text",
        [
            *(
                "",
                "3",
                "[]",
                "{}",
                "data: a.jsonl",
                "- a.jsonl",
                "- {data: a.jsonl}",
                "- {weight: 1}",
                "- null",
                "- [1]",
            ),
            *("- {data: a.jsonl, weight: 0}", "- {data: a.jsonl, weight: true}", "- {data: a.jsonl, weight: x}"),
            *("- {data: a.jsonl, weight: .nan}", "- {data: 3, weight: 1}", "- {data: '', weight: 1}"),
            *("- {data: a.jsonl, weight: 1, columns: x}", "- {data: a.jsonl, weight: 1, column: 3}"),
            *("- {data: a.jsonl, weight: 1, threshold: 0.5}", "- {data: a.jsonl, weight: 1, roles: assistant}"),
            *("- {data: a.jsonl, weight: 1, max_characters: 1}", "- {data: a.jsonl, weight: 1, min_characters: -1}"),
            *(
                "- {data: a.jsonl, weight: 1, weight: 2}",
                "- {data: mix.yaml, weight: 1}",
                "- {data: a.jsonl, weight: 1",
            ),
            *("- {data: a.jsonl, weight: 1, subset: en}", "- {data: a.jsonl, weight: 1, split: [train]}", "\t- x"),
        ],
    )
    def test_damaged_yaml_is_one_sentence(self, folder: Path, text: str) -> None:
        (folder / "mix.yaml").write_text(text)
        with pytest.raises(UserError) as info:
            read("mix.yaml")
        assert "\n" not in str(info.value)

    def test_no_yaml_but_bytes(self, folder: Path) -> None:
        (folder / "mix.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match=r"cannot read 'mix.yaml'"):
            read("mix.yaml")

    def test_the_name_in_a_configuration_is_complete(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is absolute, and holds what a YAML file says, so that the file may go."""
        (folder / "mix.yaml").write_text(
            "- {data: a.jsonl, weight: 1, max_characters: 30}\n- {data: b.jsonl, weight: 1}"
        )
        expected = read("mix.yaml")
        names = [absolute_source("mix.yaml"), absolute_source("a.jsonl:0.7,b.jsonl:0.3")]
        assert "\n" not in names[0]
        assert names[1] == f"{folder}/a.jsonl:0.7,{folder}/b.jsonl:0.3"
        assert is_same_source("./a.jsonl:0.7,b.jsonl:0.3", names[1])
        assert not is_same_source("a.jsonl:0.6,b.jsonl:0.3", names[1])
        assert shown_source(names[1]) == "a.jsonl (0.7), b.jsonl (0.3)"
        (folder / "mix.yaml").unlink()
        monkeypatch.chdir("/")
        assert read(names[0]) == expected
        assert all(absolute_source(name) == name for name in names)


def characters(texts: list[str]) -> dict[str, int]:
    return {name: sum(len(text) for text in texts if text.startswith(name)) for name in "AB"}


class TestShares:
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_of_characters_at_any_time(self, folder: Path, share: float) -> None:
        """Of every prefix, to within a document; a source that ends early is read again."""
        texts = read(f"a.jsonl:{share},b.jsonl:{1 - share}")
        longest = max(map(len, texts))
        total = dict.fromkeys("AB", 0)
        for text in texts:
            total[text[0]] += len(text)
            assert abs(total["A"] - share * sum(total.values())) <= longest
        assert set(texts) == {*read("a.jsonl"), *read("b.jsonl")}

    def test_of_tokens(self, folder: Path) -> None:
        """Of sources in one language, tokens follow characters."""
        tokenizer = make_tokenizer()
        counts = dict.fromkeys("AB", 0)
        for text in read("a.jsonl:0.7,b.jsonl:0.3"):
            counts[text[0]] += len(tokenizer(text).input_ids)
        assert counts["A"] / sum(counts.values()) == pytest.approx(0.7, abs=0.03)

    def test_weights_need_not_sum_to_one(self, folder: Path) -> None:
        assert read("a.jsonl:7,b.jsonl:3") == read("a.jsonl:0.7,b.jsonl:0.3")


class TestEpochs:
    def test_a_source_that_ends_is_read_again_in_another_order(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        texts = [text for text in read("a.jsonl:0.9,b.jsonl:0.1") if text.startswith("A")]
        once = len(read("a.jsonl"))
        assert len(texts) > 2 * once
        assert sorted(texts[:once]) == sorted(texts[once : 2 * once]) == sorted(read("a.jsonl"))
        assert texts[:once] != texts[once : 2 * once]
        assert "'a.jsonl' has ended before the other sources" in caplog.text

    def test_evaluation_text_is_not_repeated(self, folder: Path) -> None:
        texts = read("a.jsonl:0.9,b.jsonl:0.1", "evaluation", evaluation_share=0.3)
        expected = [read(name, "evaluation", evaluation_share=0.3) for name in ("a.jsonl", "b.jsonl")]
        assert sorted(texts) == sorted(sum(expected, []))

    def test_seed_and_epoch_decide_the_order(self, folder: Path) -> None:
        source = "a.jsonl:0.5,b.jsonl:0.5"
        assert read(source) == read(source)
        for other in (read(source, seed=1), read(source, epoch=1)):
            assert other != read(source)
            assert set(other) == set(read(source))

    def test_single_sources_keep_their_order(self, folder: Path) -> None:
        assert read("a.jsonl:2") == read("a.jsonl")

    def test_the_stream_resumes_in_a_repeated_source(self, folder: Path) -> None:
        tokenizer = make_tokenizer()

        def stream() -> SequenceStream:
            source = "a.jsonl:0.9,b.jsonl:0.1"
            return SequenceStream(lambda epoch: open_text(source, part="train", seed=0, epoch=epoch), tokenizer, 32)

        whole = stream()
        for _ in range(8):
            whole.next_batch(2000)
            resumed = stream()
            resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
            assert resumed.next_batch(50).equals(whole.next_batch(50))
        assert whole.epoch > 0


class TestSplit:
    def test_parts_never_overlap(self, folder: Path) -> None:
        """Also not between the sources: a document of both is on one side."""
        rows = (folder / "a.jsonl").read_text().splitlines(True)
        (folder / "copy.jsonl").write_text("".join(rows[:300]))
        for source in ("a.jsonl:0.5,b.jsonl:0.5", "a.jsonl:0.5,copy.jsonl:0.1,b.jsonl:0.4"):
            train, evaluation = (set(read(source, part, evaluation_share=0.3)) for part in ("train", "evaluation"))
            assert train
            assert evaluation
            assert not train & evaluation
            assert train | evaluation == {*read("a.jsonl", evaluation_share=0), *read("b.jsonl", evaluation_share=0)}

    def test_a_side_is_that_of_the_source_alone(self, folder: Path) -> None:
        mixed = read("a.jsonl:0.5,b.jsonl:0.5", "evaluation")
        assert sorted(mixed) == sorted(read("a.jsonl", "evaluation") + read("b.jsonl", "evaluation"))

    def test_few_documents_still_have_both_sides(self, folder: Path) -> None:
        for name in ("x", "y"):
            (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"the river {name}"}) + "\n")
        source = "x.jsonl:1,y.jsonl:1"
        threshold = split_threshold(source, TextConfig())
        evaluation = read(source, "evaluation", threshold=threshold)
        assert len(evaluation) == 1
        with pytest.raises(UserError, match=r"no training text in '[xy].jsonl', one of the sources"):
            read(source, threshold=threshold)

    def test_unseen(self, folder: Path) -> None:
        config = TextConfig(evaluation_share=0.3)
        (folder / "c.jsonl").write_text((folder / "a.jsonl").read_text() + json.dumps({"text": "a new one"}) + "\n")
        source = "a.jsonl:0.5,b.jsonl:0.5"
        unseen = open_unseen("c.jsonl", seed=0, config=config, trained_on=source, trained_config=config)
        texts = [document.text for document in unseen]
        assert "a new one" in texts
        assert not set(texts) & set(read(source, evaluation_share=0.3))
        unseen = open_unseen(source, seed=0, config=config, trained_on="a.jsonl", trained_config=config)
        assert not {document.text for document in unseen} & set(read("a.jsonl", evaluation_share=0.3))


def test_a_source_without_documents() -> None:
    def opener(count: int) -> Any:
        def documents(epoch: int) -> Iterator[Document]:
            return (Document(f"{epoch}.{i}", f"{count}") for i in range(count))

        return documents

    mixture = (Weighted("a", 1.0), Weighted("b", 1.0))
    found = interleave([opener(3), opener(0)], mixture, 0, repeat=False)
    assert [document.text for document in found] == ["3"] * 3
    with pytest.raises(UserError, match="no training text in 'b'"):
        list(interleave([opener(3), opener(0)], mixture, 0, repeat=True))


def test_errors_come_before_the_first_document(folder: Path) -> None:
    (folder / "c.jsonl").write_text("no JSON\n")
    with pytest.raises(UserError, match="not valid JSON"):
        open_text("a.jsonl:0.5,c.jsonl:0.5", part="train", seed=0, config=TextConfig(threshold=0.1))


def test_sections_of_several_sources(folder: Path) -> None:
    for name in ("x", "y"):
        (folder / f"{name}.txt").write_text(
            "".join(f" = {name} {i} = \n\n{sample_text(2000, seed=i)}\n" for i in range(4))
        )
    source = "x.txt:1,python-docs:1,a.jsonl:1"
    documents = list(open_text(source, part="evaluation", seed=0, config=TextConfig(evaluation_share=0.5)))
    found = sections(source, documents)
    names = {section.name for section in found.values()}
    assert any("x 1" in name for name in names)
    assert any(name.endswith(".py") for name in names)
    assert not any("a.jsonl" in name for name in found)


def test_python_docs_beside_a_file(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        texts = open_text("python-docs:0.5,a.jsonl:0.5", part="train", seed=0)
        first = [next(texts).text for _ in range(200)]
    share = sum(len(text) for text in first if text.startswith("A ")) / sum(map(len, first))
    assert share == pytest.approx(0.5, abs=0.05)
