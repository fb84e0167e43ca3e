"""Which section a passage belongs to."""

from pathlib import Path

from tsae.data.sections import Section, sections
from tsae.data.text import PYTHON_DOCS, TextConfig, open_text


def everything(source):
    return list(open_text(str(source), part="evaluation", seed=0, config=TextConfig(evaluation_share=1.0)))


def article(title: str, word: str, paragraphs: int) -> str:
    body = "".join(f" {' '.join([word] * 60)} .\n\n = = {word} part = = \n\n" for _ in range(paragraphs))
    return f" = {title} = \n\n{body}"


def test_the_last_title_before_a_passage(tmp_path):
    text = tmp_path / "wiki.txt"
    # 60 words of 5 letters and a heading: six paragraphs are a passage of 2,000 characters.
    text.write_text("before any title " * 200 + "\n\n" + article("One", "aaaa", 30) + article("Two", "bbbb", 30))
    documents = everything(text)
    found = sections(str(text), documents)
    assert len({section.name for section in found.values()}) == 2
    for document in documents:
        words = {"before", "aaaa", "bbbb"}.intersection(document.text.split())
        if document.name not in found:
            assert "before" in words or len(words) == 2  # above the first title, or on both sides of one
        else:
            (word,) = words
            assert found[document.name].name.endswith({"aaaa": "One", "bbbb": "Two"}[word])
            assert found[document.name].place == int(document.name.rpartition("#")[2])
    both = [document for document in documents if {"aaaa", "bbbb"} <= set(document.text.split())]
    assert both  # the case occurs
    assert sum(section.name.endswith("One") for section in found.values()) >= 4


def test_a_title_at_the_start_of_a_passage_and_equal_titles(tmp_path):
    text = tmp_path / "wiki.txt"
    text.write_text(article("Same", "aaaa", 15) + article("Same", "bbbb", 15))
    found = sections(str(text), everything(text))
    places = {section.place: section.name for section in found.values()}
    assert 0 in places  # its title is at its start
    names = [places[place] for place in sorted(places)]
    assert len(set(names)) == 2
    assert names == sorted(names, key=names.index)  # one after the other
    assert all(name.endswith(": Same") for name in names)


def test_files_without_titles_are_sections_of_their_folder(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text((name + " and words. ") * 500)
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    documents = everything(tmp_path)
    found = sections(str(tmp_path), documents)
    assert {Path(section.name).name for section in found.values()} == {"a.txt", "b.txt"}
    assert not any("rows.jsonl" in name for name in found)
    assert sum("rows.jsonl" in document.name for document in documents) == 1
    assert sections(str(tmp_path / "a.txt"), everything(tmp_path / "a.txt")) == {}


def test_rows_and_datasets_have_none(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": " = A = \\n\\n one"}\n{"text": " = B = \\n\\n two"}\n')
    documents = everything(rows)
    assert len(documents) == 2
    assert sections(str(rows), documents) == {}
    assert sections("someone/dataset", documents) == {}


def test_modules_with_their_docstrings():
    documents = list(open_text(PYTHON_DOCS, part="evaluation", seed=0))
    found = sections(PYTHON_DOCS, documents)
    assert found.keys() == {document.name for document in documents}
    module = next(name for name in found if ".py (documentation)#" in name)
    stem = module.split(" (")[0]
    assert found[module] == Section(stem, int(module.rpartition("#")[2]))
    assert {found[name].name for name in found if name.startswith(stem)} == {stem}
