"""What is printed: streams that fail, encodings, text that looks like markup."""

from __future__ import annotations

import ast
import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.text import Text

import tsae
from tsae.errors import UserError, WriteError
from tsae.reports.table import print_comparison
from tsae.utils.cli import deliver, report_errors
from tsae.utils.output import Tolerant, console, say, tables, tolerant_streams
from tsae.utils.progress import bar

PACKAGE = Path(tsae.__file__).parent
COMMANDS = [PACKAGE / f"{name}.py" for name in ("train", "evaluate", "export")] + sorted(PACKAGE.glob("*/__main__.py"))


class Full(io.StringIO):
    """A stream that cannot be written."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def run(script: str, environment: dict[str, str] | None = None, shell: str = "{}") -> subprocess.CompletedProcess[str]:
    """A Python script in a process of its own; ``shell`` is a command line with {} for it."""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "SCRIPT": script} | (environment or {})
    line = shell.replace("{}", f'"{sys.executable}" -c "$SCRIPT"')
    return subprocess.run(["bash", "-c", line], env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(("encoding", "expected"), [("ascii", "0.5 ? 0.1 ??"), ("cp932", "0.5 ± 0.1 日?")])
def test_characters_that_the_encoding_lacks(encoding: str, expected: str) -> None:
    raw = io.BytesIO()
    stream = Tolerant(io.TextIOWrapper(raw, encoding=encoding))
    assert stream.write("0.5 ± 0.1 日é") == 12
    stream.flush()
    assert raw.getvalue().decode(encoding) == expected


def test_a_lone_surrogate_is_printed() -> None:
    raw = io.BytesIO()
    stream = Tolerant(io.TextIOWrapper(raw, encoding="utf-8"))
    stream.write("Written: run\udcff\n")  # a file name that is not UTF-8
    stream.flush()
    assert raw.getvalue() == b"Written: run?\n"


def test_a_closed_pipe_ends_quietly_and_the_command_goes_on(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from tsae.utils.cli import report_errors
from tsae.utils.output import say, tables
with report_errors() as status:
    time.sleep(0.3)
    for i in range(3000):
        tables().print("a line")
        print("another")
        say("a sentence")
    Path({str(tmp_path / "file")!r}).write_text("complete")
sys.exit(status.code)
"""
    for shell in ("{} | true", "{} | head -1", "{} 2>&1 | true", "{} 2>&1 >/dev/null | head -1"):
        (tmp_path / "file").unlink(missing_ok=True)
        done = run(script, shell=f"set -o pipefail; {shell}")
        assert done.returncode == 0, done.stderr
        assert "Error" not in done.stderr + done.stdout
        assert (tmp_path / "file").read_text() == "complete"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_under_stdout_is_said() -> None:
    script = """
import sys
from tsae.utils.cli import report_errors
with report_errors() as status:
    print("figures")
sys.exit(status.code)
"""
    sentence = "error: What is printed on stdout cannot be written (No space left on device)"
    for work in (script, script.replace('print("figures")', 'print("--help"); raise SystemExit(0)')):
        done = run(work, shell="{} > /dev/full")
        assert done.returncode == 2
        assert done.stderr == f"{sentence}; the files written are complete.\n"


def test_closed_streams_are_not_taken_for_files(tmp_path: Path) -> None:
    """Else the first file opened has the number of stdout, and gets what libraries print there."""
    script = f"""
import os, sys
from tsae.utils.cli import report_errors
with report_errors() as status:
    file = open({str(tmp_path / "file")!r}, "w")
    assert file.fileno() > 2
    os.write(1, b"printed by a library")
    os.write(2, b"printed by a library")
    print("figures")
    sys.stderr.write("a sentence")
    file.write("content")
    file.close()
sys.exit(status.code)
"""
    done = run(script, shell="{} <&- >&- 2>&-")
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "content"


def test_the_streams_are_as_before_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with tolerant_streams() as out:
        assert sys.stdout is out
        assert out.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_after_a_failure_nothing_more_is_tried(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Full(number))
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    with report_errors() as status:
        print("figures")
        tables().print(Text("figures"))
    assert status.code == (0 if number == errno.EPIPE else 2)
    assert ("cannot be written" in said.getvalue()) == (number != errno.EPIPE)


def test_progress_on_a_stream_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Full(errno.EPIPE))
    with report_errors() as status:
        with bar("Training", 10) as advance:
            advance(10)
        say("Written: run")
        raise UserError("no")
    assert status.code == 2


@pytest.mark.parametrize("name", ["a[/b]", "[red]run", "run :smile:", "[link=x]", "日本", "a\\[b"])
def test_names_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"Written: runs/{name}")
    console.print(f"runs/{name}")
    metrics = {"metrics": {}, "error": f"{name} stopped"}
    print_comparison({name: metrics}, title=name)
    found = capsys.readouterr()
    assert found.err == f"Written: runs/{name}\nruns/{name}\n"
    assert found.out.lstrip().startswith(f"{name}")
    assert f"\n{name} " in found.out
    assert f"{name}: {name} stopped" in found.out


def test_tables_are_drawn_in_ascii_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from tsae.reports.table import print_table

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with report_errors() as status:
        print_table({"explained_variance": 0.5}, text="日本")
    assert status.code == 0
    printed = raw.getvalue().decode("ascii")
    assert "Evaluation on other text: ??" in printed
    assert "|" in printed
    assert "-+-" in printed


class TestDeliver:
    """Files, then printing, then the error."""

    def test_the_order(self) -> None:
        done: list[str] = []

        def write(name: str) -> str:
            done.append(name)
            return name

        deliver(lambda: write("a"), lambda: write("b"), show=lambda *written: done.append(f"printed {written}"))
        assert done == ["a", "b", "printed ('a', 'b')"]

    @pytest.mark.parametrize("error", [WriteError(Path("f"), "full"), PermissionError(errno.EACCES, "no", "f")])
    def test_what_cannot_be_written_is_printed(self, error: Exception) -> None:
        def fail() -> None:
            raise error

        shown: list[object] = []
        with pytest.raises(WriteError, match="f cannot be written"):
            deliver(fail, lambda: "b", show=lambda *written: shown.extend(written))
        assert shown == [None, "b"]

    def test_a_bug_is_not_swallowed(self) -> None:
        def fail() -> None:
            raise FileNotFoundError(errno.ENOENT, "a bug", "x")

        with pytest.raises(FileNotFoundError):
            deliver(fail, show=lambda _: None)


def calls(path: Path) -> list[tuple[int, str]]:
    """Line and name of every call in a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func
            found.append((node.lineno, getattr(function, "id", getattr(function, "attr", ""))))
    return found


def test_everything_is_printed_through_one_module() -> None:
    """A `Console` of its own would take paths for markup and know nothing of the stream's encoding."""
    others = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "output.py"
        for line, name in calls(path)
        if name in ("Console", "print_json", "pprint")
    ]
    assert not others, "use tsae.utils.output"


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_command_works_within_report_errors(path: Path) -> None:
    main: Callable[..., int] | ast.FunctionDef
    (main,) = (
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    *start, block, end = main.body[1:]  # after the docstring
    assert isinstance(block, ast.With)
    assert ast.unparse(block.items[0].context_expr).startswith("report_errors(")
    assert all(ast.unparse(line).startswith("argv = ") for line in start)
    assert ast.unparse(end) == "return status.code"
