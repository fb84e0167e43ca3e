"""`make gpu-check` without a GPU: limits, deadline, what is written, and that a typing error is found beforehand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.gpu import check, every_launch, probe, quick, rehearsal, runner, verdicts
from tools.gpu.parts import PARTS, Step, filled, steps
from tools.gpu.runner import Log, Outcome, Runner, missing, summary

ROOT = Path(__file__).parents[2]
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rf")
SLEEPING_TESTS = """
import pathlib, time
def test_first(): pass
def test_second(): assert False, "on purpose"
def test_third():
    pathlib.Path("begun").touch()
    time.sleep(60)
"""


KINDS = ("relu", "schmitt", "gelu")


def table() -> list[Step]:
    return [filled(step, Path("results"), Path("model"), sys.executable) for step in steps(loop=True)]


def python(code: str, limit: int = 60, **more: Any) -> Step:
    return Step("tests", more.pop("name", "a"), (sys.executable, "-c", code), limit, **more)


def run(folder: Path, *chosen: Step, deadline: float = 300.0) -> list[Outcome]:
    log = Log(folder)
    outcomes = Runner(log, deadline, dict(os.environ), folder).run(chosen)
    log.close()
    return outcomes


def test_pytest_keeps_its_table_and_its_json_when_its_time_is_up(tmp_path: Path) -> None:
    (tmp_path / "test_sleeping.py").write_text(SLEEPING_TESTS)
    command = (*PYTEST, "--junitxml=tests.xml", "test_sleeping.py")
    log = Log(tmp_path)
    child = runner.Child(Step("tests", "sleeping", command, 60), log, os.environ, tmp_path)
    while not (tmp_path / "begun").exists() and time.monotonic() < child.begin + 60:
        time.sleep(0.05)
    child.wait(time.monotonic())
    outcome = child.outcome()
    log.close()
    assert (outcome.status, outcome.detail) == ("limit", "1 failed, 1 passed")
    assert outcome.failures[0].startswith("FAILED test_sleeping.py::test_second")
    assert 'failures="1"' in (tmp_path / "tests.xml").read_text()
    assert "on purpose" in (tmp_path / "log.txt").read_text()


def test_workers_of_pytest_end_at_the_limit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "test_sleeping.py").write_text(SLEEPING_TESTS)
    command = (*PYTEST, "-n", "2", "test_sleeping.py")
    log = Log(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    monkeypatch.setattr(runner, "GRACE", 40.0)  # however busy the machine that runs the tests is
    child = runner.Child(Step("tests", "sleeping", command, 60), log, environment, tmp_path)
    while not (tmp_path / "begun").exists() and time.monotonic() < child.begin + 60:
        time.sleep(0.05)
    time.sleep(1)  # the other worker's report
    child.wait(time.monotonic())
    log.close()
    assert child.outcome().status == "limit"
    assert "1 failed, 1 passed" in child.outcome().detail
    with pytest.raises(ProcessLookupError):
        os.killpg(child.process.pid, 0)


def test_a_step_is_interrupted_where_the_caller_ignores_the_signal(tmp_path: Path) -> None:
    """As a program does that a script started with `&`."""
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('interrupt' + 'ed')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        (outcome,) = run(tmp_path, python(code, 6))
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.status == "limit"
    assert "interrupted" in (tmp_path / "log.txt").read_text()


def test_a_deaf_step_and_what_it_started_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.3)
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1]]).pid, flush=True)\n"
    deaf = rehearsal.DEAF
    step = Step("tests", "a", (sys.executable, "-c", code + deaf, deaf), 2)
    (outcome,) = run(tmp_path, step)
    assert (outcome.status, outcome.detail) == ("limit", "exit code -9")
    inner = next(line.split("] ")[1] for line in (tmp_path / "log.txt").read_text().splitlines() if "[a]" in line)
    for _ in range(50):
        status = Path(f"/proc/{int(inner)}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("a grandchild is still running")


def test_outcomes_are_on_disk_as_they_come_and_the_deadline_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.2)
    monkeypatch.setattr(runner, "LEAST", 0.5)
    see = "import pathlib; print(pathlib.Path('measurements.jsonl').read_text())"
    begin = time.monotonic()
    found = run(
        tmp_path,
        python("print('7 passed in 1.00s')", name="first"),
        python(see, name="second"),
        python("import time; time.sleep(60)", name="third"),
        python("print()", name="fourth"),
        deadline=4,
    )
    assert time.monotonic() - begin < 8
    assert [outcome.status for outcome in found] == ["pass", "pass", "limit", "not reached"]
    assert found[0].detail == "7 passed"
    log = (tmp_path / "log.txt").read_text()
    assert '[second] {"part": "tests", "outcome": {"part": "tests", "name": "first", "status": "pass"' in log
    lines = (tmp_path / "measurements.jsonl").read_text().splitlines()
    assert [json.loads(line)["outcome"]["name"] for line in lines] == ["first", "second", "third", "fourth"]


def test_steps_of_one_group_run_side_by_side(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time; me, other = sys.argv[1:]; pathlib.Path(me).touch(); end = time.time() + 60\n"
        "while not pathlib.Path(other).exists() and time.time() < end: time.sleep(0.02)\n"
        "sys.exit(not pathlib.Path(other).exists())"
    )
    pair = [Step("sanitizer", n, (sys.executable, "-c", code, *n), 60, together="both") for n in ("ab", "ba")]
    assert [outcome.status for outcome in run(tmp_path, *pair)] == ["pass", "pass"]


def test_steps_of_one_group_are_interrupted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE", 3.0)
    deaf = [python(rehearsal.DEAF, limit=1, name=name, together="all") for name in "abc"]
    outcomes = run(tmp_path, *deaf)
    assert {outcome.status for outcome in outcomes} == {"limit"}
    assert max(outcome.seconds for outcome in outcomes) < 8


def test_packed_wheels_are_installed_once_and_can_be_imported(tmp_path: Path) -> None:
    folder = tmp_path / check.PACK / "wheels"
    folder.mkdir(parents=True)
    about = "tiny_wheel-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_wheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_wheel.py", "value = 7")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    assert check.install_wheels(tmp_path, sys.executable) == ""
    environment = check.environment_of_steps(os.environ, tmp_path)
    assert missing("module:tiny_wheel", environment, tmp_path) == ""
    code = "import tiny_wheel; assert tiny_wheel.value == 7"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    (folder / "broken-1.0-py3-none-any.whl").write_text("not a wheel")
    assert check.install_wheels(tmp_path, sys.executable) == ""  # they are there already
    shutil.rmtree(tmp_path / check.PACK / "site")
    assert "broken" in check.install_wheels(tmp_path, sys.executable)


def test_what_is_missing_or_not_necessary_is_skipped_with_the_reason(tmp_path: Path) -> None:
    needs = ("program:no-such-program", "module:no_such_module", "file:no/such/file")
    true, false = ((sys.executable, "-c", f"raise SystemExit({code})") for code in (0, 1))
    found = run(
        tmp_path,
        *(python("", needs=(need,)) for need in needs),
        python("", unless=true),
        python("", unless=false),
        Step("tests", "b", ("no-such-program",), 5),
    )
    assert [(outcome.status, outcome.detail) for outcome in found[:5]] == [
        ("skipped", "no-such-program is not on the PATH"),
        ("skipped", "the Python package no_such_module is not installed"),
        ("skipped", "there is no no/such/file"),
        ("skipped", "not necessary"),
        ("pass", ""),
    ]
    assert found[5].status == "fail"
    (tmp_path / "site" / "no_such_module").mkdir(parents=True)
    assert missing(needs[1], {"PYTHONPATH": str(tmp_path / "site")}, tmp_path) == ""
    with pytest.raises(ValueError, match="must be program:, module: or file:"):
        missing("library:x", {}, tmp_path)


def test_after_an_essential_step_fails_nothing_runs(tmp_path: Path) -> None:
    found = run(tmp_path, python("raise SystemExit('no GPU')", name="device", essential=True), python(""))
    assert [outcome.status for outcome in found] == ["fail", "not reached"]
    assert found[0].failures == ("no GPU",)
    assert found[1].detail == "device failed"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("========= 3 failed, 10 passed, 2 skipped in 4.20s =========", "3 failed, 10 passed, 2 skipped"),
        ("1 passed, 1 error in 0.10s", "1 passed, 1 error"),
        ("no tests ran in 0.01s", ""),
        ("600 launches", ""),
    ],
)
def test_the_counts_of_pytest(line: str, expected: str) -> None:
    assert summary(["2 passed in 9.99s", line] if expected else [line]) == expected


def test_parts_and_deadline_are_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.chosen_parts("bench, quick") == ["bench", "quick"]
    assert check.chosen_parts("") == list(PARTS)
    for name, value, said in (("PARTS", "quik", "PARTS must be some of"), ("DEADLINE", "ten", "DEADLINE must be")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert check.main() == 2
        assert said in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_ends(tmp_path: Path) -> None:
    """The whole command, as `make gpu-check` runs it."""
    environment = os.environ | {"OUT": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": "", "DEADLINE": "200"}
    environment |= {"PARTS": "probe quick", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "tools.gpu.check"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "sees no GPU" in result.stdout
    assert "not reached quick: quick, 0 s  device failed" in result.stdout
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"log.txt", "measurements.jsonl", "summary.txt"}
    assert (tmp_path / "out" / "summary.txt").read_text() in result.stdout


def measured(case: str, own: str, times: dict[str, float], **more: Any) -> dict[str, Any]:
    """A benchmark's line; h of 1 GB, which the first variant copies."""
    rows = [
        {"variant": name, "kind": "copy" if name == "h.clone()" else "backend", "seconds": t, "bytes": 2 * 10**9}
        for name, t in times.items()
    ]
    return {"part": "benchmarks", "case": case, "own": own, "rows": rows, "tensor_bytes": 10**9, "notes": {}} | more


def test_figures_stand_beside_their_targets(tmp_path: Path) -> None:
    both = "forward + backward"
    quick_row = {"part": "quick", "backend": "cuda", "dtype": "bfloat16", "case": "relu", "forward_of_copy": 0.91}
    compiled = {"h.clone()": 0.001, "eager loop": 0.2, "prefix sums, compiled": 0.007, "cuda": 0.0025}
    lines = [
        {"part": "probe", "device": "a GPU", "torch": "2.11.0", "triton": "3.6.0"},
        quick_row | {"backward_of_copy": 0.6},
        measured(f"relu, {both}", "cuda", compiled),
        measured("relu, forward", "cuda", {"h.clone()": 0.001, "cuda": 0.0012}),
        measured("time per element", "cuda, T = 128", {"cuda, T = 128": 0.001, "cuda, T = 512": 0.00105}),
        measured(f"relu, {both}", "cuda", {"cuda": 9.0}, smoke=True),
    ]
    file = tmp_path / "measurements.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"part": "cut sh')
    text = verdicts.screen([Outcome("quick", "quick", "pass", 3.0)], file)
    for expected in (
        "a GPU, driver ?, torch 2.11.0, triton 3.6.0",
        "ok     cuda forward, bfloat16 relu, of copy bandwidth: 0.91 (target >= 0.85)",
        "MISSED cuda backward, bfloat16 relu, of copy bandwidth: 0.6 (target >= 0.85)",
        "ok     cuda against the eager loop: 80 x (target >= 50)",
        "MISSED cuda against prefix sums, compiled: 2.8 x (target >= 3)",
        "MISSED cuda relu, forward, of copy bandwidth (benchmark): 0.833 (target >= 0.85)",
        "ok     time per element: cuda, T = 512 / cuda, T = 128: 1.05 x (target <= 1.1)",
        "1 pass; 3 of 6 targets met",
    ):
        assert expected in text.splitlines(), text


def test_the_last_screen_is_short_however_much_fails(tmp_path: Path) -> None:
    failures = tuple(f"FAILED tests/a.py::test_{i} - " + "x" * 500 for i in range(300))
    outcomes = [Outcome("tests", str(i), "fail", 1.0, "", failures) for i in range(40)]
    row = {"part": "quick", "backend": "cuda", "dtype": "float32", "case": "relu", "forward_of_copy": 0.9}
    (tmp_path / "m.jsonl").write_text((json.dumps(row) + "\n") * 200)
    lines = verdicts.screen(outcomes, tmp_path / "m.jsonl").splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= verdicts.WIDTH
    assert lines[-1] == "40 fail; 0 of 0 targets met"


def test_every_step_has_a_part_in_order_of_value() -> None:
    found = table()
    assert {step.part for step in found} == set(PARTS)
    assert [step.name for step in found if step.essential] == ["device"]
    assert len({step.name for step in found}) == len(found)
    assert found[-1].name == "compiled loop"
    assert [step.name for step in steps()] == [step.name for step in found[:-1]]
    reached = list(dict.fromkeys(step.part for step in found))
    assert found[0].essential  # nothing else is worth a second without a GPU
    assert reached.index("probe") < reached.index("quick") < reached.index("tests") < reached.index("sanitizer")
    for step in found:
        assert not any("{" in text for text in step.command)


TYPOS = """
import sys
from pathlib import Path
import tools.gpu.pretend
from tools.gpu import rehearsal
from tools.gpu.parts import filled, steps

table = {step.name: filled(step, Path("results"), Path("model"), sys.executable) for step in steps(loop=True)}

def refused(name, old, new):
    step = table[name]
    command = tuple(text.replace(old, new) for text in step.command)
    assert command != step.command, name
    try:
        rehearsal.check_command(step._replace(command=command))
    except rehearsal.RehearsalError as error:
        print("refused:", str(error).splitlines()[0])
    else:
        print("accepted:", name, old, new)

refused("cuda", "test_kernels_cuda.py", "test_kernels_cuba.py")
refused("trainer", "test_training_cuda.py", "test_training_cuda.py::test_nothing")
refused("backend cuda elsewhere", "cuda and not", "cuba and not")
refused("backend cuda elsewhere", "--durations", "--duration-of-all")
refused("demo", "--steps", "--step-count")
refused("quick", "--lines", "--line-by-line")
refused("quick", "tools.gpu.quick", "tools.gpu.quik")
refused("memcheck", "--tool", "--tol")
refused("memcheck", "memcheck", "memchek")
refused("ncu", "2304", "wide")
refused("build", "build_ext", "build_extension")
"""


@pytest.mark.slow
def test_a_typing_error_in_a_command_is_found() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"TRITON_INTERPRET": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", TYPOS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("refused:") == 11, result.stdout + result.stderr
    assert "accepted:" not in result.stdout


def test_quick_finds_a_wrong_kernel(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--device", "cpu", "--shape", "3,20,6", "--rounds", "1", "--backends", "eager"]
    assert quick.main([*options, "--lines", str(tmp_path / "lines")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    found = {row["case"].replace(", T = 20", "") for row in rows if "backend" in row}
    assert found == {*KINDS, *(f"{kind}, packed" for kind in KINDS), "relu, T = 80", "relu, T = 320"}
    assert all(row["accurate"] for row in rows if "backend" in row)
    bad = {"dtype": "float32", "error": 1e-7, "grad_error": float("nan")}
    assert not quick.accurate(bad)
    assert quick.accurate(bad | {"grad_error": 1e-7})
    assert not quick.accurate(bad | {"grad_error": 1e-3})
    assert quick.main([*options[:-1], "no-such-backend"]) == 1
    assert "error: the backend no-such-backend is unknown" in capsys.readouterr().out


def test_quick_fails_if_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = quick.Inputs.backward
    monkeypatch.setattr(
        quick.Inputs,
        "backward",
        lambda self, saved, backend: tuple(x * (1.1 if backend == "eager" else 1) for x in real(self, saved, backend)),
    )
    assert quick.main(["--device", "cpu", "--shape", "2,20,6", "--rounds", "1", "--backends", "eager"]) == 1
    assert "rows are not accurate" in capsys.readouterr().out


def test_every_launch_covers_the_kernels() -> None:
    cases = list(every_launch.cases("cuda"))
    assert 5 * len(cases) == 600
    assert {case.dtype for case in cases} == set(every_launch.DTYPES)
    assert 0 < len(list(every_launch.cases("triton"))) < len(cases) / 4


def test_the_probe_says_what_is_there() -> None:
    values = probe.found()
    assert values["backend eager"] == "ok"
    assert values["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
    assert probe.importable("tsae.train") == "ok"
    assert probe.version("no-such-package") == "none"
    assert probe.importable("no_such_module").startswith("ModuleNotFoundError")


def test_the_documented_limits_of_the_rehearsal_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs with stand-ins, which `make gpu-rehearsal` does after it has checked the commands."""
    monkeypatch.setattr(runner, "GRACE", 0.5)
    text = rehearsal.rehearse_order(table(), tmp_path / "order")
    assert f"{len(table())} pass" in text
    text = rehearsal.rehearse_trouble(table(), tmp_path)
    assert "1 fail, 2 limit, 1 pass" in text
