"""Text sources: cutting, splitting, shuffling, local files, python-docs, errors."""

from __future__ import annotations

import gzip
import json
import random
import time
from itertools import chain
from pathlib import Path

import pytest
from tiny import sample_text

from tsae.data import python_docs
from tsae.data.documents import PASSAGE_CHARACTERS, Document, cut, shuffle
from tsae.data.split import Split, decide_split
from tsae.data.text import TextConfig, open_text
from tsae.errors import UserError


def read(source: Path | str, part: str = "train", seed: int = 0, epoch: int = 0, **config: object) -> list[str]:
    documents = open_text(str(source), part=part, seed=seed, epoch=epoch, config=TextConfig(**config))
    return [document.text for document in documents]


def zstd(content: bytes) -> bytes:
    """One zstd frame."""
    import pyarrow as pa

    return pa.Codec("zstd").compress(content, asbytes=True)


def both(source: Path | str, **config: object) -> tuple[list[str], list[str]]:
    return read(source, "train", **config), read(source, "evaluation", **config)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A jsonl file of 200 documents and second copies of every tenth."""
    path = tmp_path / "lines.jsonl"
    texts = [sample_text(30, seed) for seed in range(200)]
    texts += texts[::10]
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


class TestCut:
    @pytest.mark.parametrize("chunk", [1, 7, 1000, 10**6])
    def test_pieces_join_to_the_text_however_it_is_chunked(self, chunk: int) -> None:
        text = sample_text(400)
        pieces = list(cut((text[i : i + chunk] for i in range(0, len(text), chunk)), 200))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 200
        assert pieces == list(cut([text], 200))

    def test_prefers_paragraphs_then_lines_then_sentences_then_words(self) -> None:
        assert next(cut(["aaa bbb. ccc\n\nddd eee. f\nggg hhh."], 25)) == "aaa bbb. ccc\n\n"
        assert next(cut(["aaa bbb ccc ddd.\nee. f ggg hhh"], 24)) == "aaa bbb ccc ddd.\n"
        assert next(cut(["aaa bbb ccc. dd eee fff ggg"], 20)) == "aaa bbb ccc. "
        assert next(cut(["aaa bbb ccc ddd eee"], 10)) == "aaa bbb "
        assert list(cut(["a" * 25], 10)) == ["a" * 10, "a" * 10, "a" * 5]


class TestSplit:
    def test_is_stable_and_ignores_surrounding_whitespace(self) -> None:
        split = Split("evaluation", 0.5)
        sides = [split.contains(word) for word in ("alpha", "beta", "gamma", "delta", "\ud800")]
        assert sides == [split.contains(f" {word}\n") for word in ("alpha", "beta", "gamma", "delta", "\ud800")]
        # Never change these: another hash would move text between the parts of existing runs.
        assert sides == [False, True, True, False, True]

    @pytest.mark.parametrize("count", [2, 3, 10])
    @pytest.mark.parametrize("share", [0.001, 0.05, 0.999])
    def test_few_documents_still_have_both_sides(self, count: int, share: float) -> None:
        texts = [f"document {i}" for i in range(count)]
        sides = [decide_split(texts, part, share, "x") for part in ("train", "evaluation")]
        kept = [[text for text in texts if side.contains(text)] for side in sides]
        assert kept[0]
        assert kept[1]
        assert sorted(kept[0] + kept[1]) == texts

    def test_share_of_many_documents_is_approximate(self) -> None:
        texts = [f"document {i}" for i in range(5000)]
        split = decide_split(texts, "evaluation", 0.1, "x")
        assert sum(map(split.contains, texts)) == pytest.approx(500, abs=80)

    def test_single_document_is_training_text(self) -> None:
        assert decide_split(["a", "a "], "train", 0.05, "x").contains("a")
        with pytest.raises(UserError, match="another text"):
            decide_split(["a", "a "], "evaluation", 0.05, "x")

    def test_shares_of_zero_and_one_are_exact(self) -> None:
        assert decide_split(["a", "b"], "train", 0, "x").threshold == 0
        assert decide_split(["a", "b"], "evaluation", 1, "x").threshold == 1
        with pytest.raises(UserError, match="share is 0"):
            decide_split(["a", "b"], "evaluation", 0, "x")
        with pytest.raises(UserError, match="share is 1"):
            decide_split(["a", "b"], "train", 1, "x")


def test_shuffle_keeps_every_document_and_depends_on_the_seed() -> None:
    documents = [Document(str(i), "x") for i in range(100)]
    orders = [[d.name for d in shuffle(documents, random.Random(seed), 10)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0], key=int) == [d.name for d in documents] != orders[0]


class TestFiles:
    def test_order_depends_on_seed_and_epoch_only(self, lines: Path) -> None:
        first = read(lines)
        assert first == read(lines)
        assert first != read(lines, seed=1)
        assert first != read(lines, epoch=1)
        assert sorted(first) == sorted(read(lines, seed=1)) == sorted(read(lines, epoch=1))

    def test_files_are_shuffled_beyond_the_buffer(self, tmp_path: Path) -> None:
        for i in range(20):
            (tmp_path / f"{i:02}.txt").write_text(f"file {i:02}")
        first = read(tmp_path, shuffle_buffer=1, evaluation_share=0)
        assert sorted(first) != first != read(tmp_path, shuffle_buffer=1, evaluation_share=0, seed=1)

    def test_parts_are_disjoint_and_complete(self, lines: Path) -> None:
        train, evaluation = both(lines, evaluation_share=0.2)
        assert evaluation
        assert not set(train) & set(evaluation)
        assert len(train) + len(evaluation) == 220
        assert len(train) > len(evaluation)

    def test_parts_do_not_depend_on_file_names_or_order(self, lines: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.jsonl"
        other.write_text("".join(reversed(lines.read_text().splitlines(keepends=True))))
        assert set(read(lines, "evaluation")) == set(read(other, "evaluation"))

    def test_long_text_is_cut_without_loss(self, tmp_path: Path) -> None:
        text = sample_text(20_000)
        path = tmp_path / "book.txt"
        path.write_text(text)
        train, evaluation = both(path)
        assert max(map(len, train + evaluation)) <= PASSAGE_CHARACTERS
        assert sum(map(len, train + evaluation)) == len(text)
        assert not set(train) & set(evaluation)

    def test_copy_of_a_file_is_on_the_same_side(self, tmp_path: Path) -> None:
        for name in ("a.txt", "b/c.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(sample_text(20_000))
        train, evaluation = both(tmp_path)
        assert evaluation
        assert not set(train) & set(evaluation)
        assert len(train) == 2 * len(set(train))

    def test_folder_is_read_recursively_and_hidden_files_are_not(self, tmp_path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        (tmp_path / "deep/er").mkdir(parents=True)
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git/x.txt").write_text("hidden")
        (tmp_path / "image.png").write_bytes(b"\x89PNG")
        (tmp_path / "deep/er/one.txt").write_text("one")
        (tmp_path / "two.jsonl").write_text('{"text": "two"}\n\n{"text": " "}\n{"text": null}\n')
        (tmp_path / "three.txt.gz").write_bytes(gzip.compress(b"three"))
        (tmp_path / "four.jsonl.gz").write_bytes(gzip.compress(b'{"text": "four"}\n'))
        (tmp_path / "six.txt.zst").write_bytes(zstd(b"six"))
        pq.write_table(pa.table({"n": [1, 2, 3], "text": ["five", None, ""]}), tmp_path / "deep/five.parquet")
        assert sorted(chain(*both(tmp_path))) == ["five", "four", "one", "six", "three", "two"]

    def test_surrogates_spelled_in_json_can_be_encoded(self, tmp_path: Path) -> None:
        path = tmp_path / "x.jsonl"
        path.write_text('{"text": "a \\ud800 b"}\n')
        assert read(path) == ["a ? b"]

    @pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
    def test_ten_megabytes_in_one_line(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        text = "lorem ipsum " * 870_000
        path.write_text(text if name == "x.txt" else json.dumps({"text": text}))
        start = time.perf_counter()
        texts = read(path, evaluation_share=0)
        assert sum(map(len, texts)) == len(text)
        assert max(map(len, texts)) <= 100_000
        assert time.perf_counter() - start < 20

    def test_frames_of_zstd_are_one_file(self, tmp_path: Path) -> None:
        """As in the Pile; a row may begin in one frame and end in the next."""
        content = b"".join(json.dumps({"text": f"dökument {i}"}).encode() + b"\n" for i in range(3000))
        path = tmp_path / "x.jsonl.zst"
        path.write_bytes(b"".join(zstd(content[i : i + 10_001]) for i in range(0, len(content), 10_001)))
        assert sorted(read(path, evaluation_share=0)) == sorted(f"dökument {i}" for i in range(3000))

    def test_column(self, tmp_path: Path) -> None:
        path = tmp_path / "x.jsonl"
        path.write_text('{"title": "t", "body": "b"}\n')
        assert read(path, column="body") == ["b"]
        with pytest.raises(UserError, match=r"title, body"):
            read(path)
        with pytest.raises(UserError, match=r"'content'.*title, body"):
            read(path, column="content")


class TestErrors:
    @pytest.mark.parametrize(
        "source", ["./nowhere", "/nowhere", "~/nowhere.d/x", "missing.txt", "a/b.jsonl", "a/b/c", ""]
    )
    def test_path_that_does_not_exist(self, source: str) -> None:
        with pytest.raises(UserError, match="no such file or folder"):
            read(source)

    def test_name_that_no_file_can_have(self) -> None:
        with pytest.raises(UserError, match=r"cannot read 'aaa.*': File name too long"):
            read("a" * 300 + ".txt")

    def test_hub_without_network_fails_at_once(self) -> None:
        start = time.perf_counter()
        with pytest.raises(UserError, match="hub") as info:
            read("nobody-there/no-such-dataset")
        assert time.perf_counter() - start < 15
        assert "\n" not in str(info.value)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.txt", b"", "no text in"),
            ("x.txt", b" \n\n ", "no text in"),
            ("x.jsonl", b"", "no text in"),
            ("x.jsonl", b'{"text": ""}\n', "no text in"),
            ("x.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 .* not valid JSON"),
            ("x.jsonl", b'"a"\n', "line 1 .* not a JSON object"),
            ("x.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2 .* does not hold text"),
            ("x.txt.gz", b"not gzip", "cannot read"),
            ("x.txt.gz", gzip.compress(b"x" * 10_000, mtime=0)[:-12], "cannot read"),
            ("x.parquet", b"not parquet", "cannot read .* as parquet"),
            ("x.docx", b"text", "ends in one of .txt"),
        ],
    )
    def test_bad_file(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as info:
            read(tmp_path / name)
        assert "\n" not in str(info.value)

    @pytest.mark.parametrize("content", [b"not zstd", zstd(b'"a"\n')[:-3], zstd(b'{"text": "a"}\n') + zstd(b"b")[:-3]])
    def test_bad_zstd(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "x.jsonl.zst"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*x\.jsonl\.zst': (Truncated|ZSTD)") as info:
            read(path)
        assert "\n" not in str(info.value)

    def test_folder_without_text(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no text files in the folder"):
            read(tmp_path)

    @pytest.mark.parametrize("config", [{"evaluation_share": 1.5}, {"shuffle_buffer": 0}, {"subset": "en"}])
    def test_bad_config(self, lines: Path, config: dict[str, object]) -> None:
        with pytest.raises(UserError, match=next(iter(config))):
            read(lines, **config)


class TestPythonDocs:
    def test_first_document_comes_quickly(self) -> None:
        python_docs.units.cache_clear()
        python_docs._passages.cache_clear()
        start = time.process_time()
        assert next(open_text("python-docs", part="train", seed=0)).text
        assert time.process_time() - start < 4

    def test_parts_and_order(self) -> None:
        train, evaluation = both("python-docs")
        assert sum(map(len, evaluation)) > 50_000
        assert sum(map(len, train)) > 1_000_000
        assert max(map(len, train)) <= PASSAGE_CHARACTERS
        assert train == read("python-docs")
        assert train != read("python-docs", seed=1)

    def test_modules_are_on_one_side(self) -> None:
        names = [
            {d.name.split("#")[0].split(" (")[0] for d in open_text("python-docs", part=part, seed=0)}
            for part in ("train", "evaluation")
        ]
        assert not names[0] & names[1]

    def test_about_half_is_documentation_also_at_the_beginning(self) -> None:
        documents = list(open_text("python-docs", part="train", seed=0))
        for some in (documents, documents[:400]):
            is_source = [d.name.split("#")[0].endswith(".py") for d in some]
            assert 0.3 < sum(is_source) / len(some) < 0.7

    def test_epochs_take_turns_with_the_source(self) -> None:
        epochs = [
            {d.name for d in open_text("python-docs", part="evaluation", seed=0, epoch=epoch)} for epoch in range(4)
        ]
        documentation = {name for name in epochs[0] if "(documentation)" in name}
        assert epochs[0] & epochs[1] == documentation
        assert epochs[3] == epochs[0]

    def test_encodings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "declared.py").write_bytes(b"# coding: latin-1\nx = 'caf\xe9'\n")
        (tmp_path / "marked.py").write_bytes(b"\xef\xbb\xbfx = 3\r\n")
        (tmp_path / "wrong.py").write_bytes(b"x = 'caf\xe9'\n")
        (tmp_path / "gone.py").symlink_to("nowhere.py")
        monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path))
        found = {unit.name: unit.text for unit in python_docs.units.__wrapped__() if unit.is_module}
        assert found == {"declared.py": "# coding: latin-1\nx = 'café'\n", "marked.py": "x = 3\n"}
        assert ["wrong.py" in caplog.messages[1], "gone.py" in caplog.messages[0]] == [True, True]

    def test_left_out(self) -> None:
        parts = {part for unit in python_docs.units() for part in unit.name.split("/")}
        assert not parts & {"site-packages", "test", "idlelib", "lib2to3", "encodings", "__pycache__"}
        assert "ast.py" in parts

    def test_docstrings_are_taken_out_of_the_source(self) -> None:
        text = (
            '"""Top."""\nx = 1\n\n\nclass A:\n    """Of A."""\n\n    def f(self):\n        "Of f."\n        return 1\n'
        )
        documentation, source = python_docs._split_docstrings(python_docs.Unit("p/m.py", text, is_module=True))
        assert documentation == "p.m\n---\n\nTop.\n\np.m.A\n-----\n\nOf A.\n\np.m.A.f\n-------\n\nOf f.\n\n"
        assert source == "x = 1\n\n\nclass A:\n\n    def f(self):\n        return 1\n"

    def test_module_that_does_not_parse_is_source(self) -> None:
        assert python_docs._split_docstrings(python_docs.Unit("m.py", "print 1", is_module=True)) == ("", "print 1")
