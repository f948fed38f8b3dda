"""The checks of CI: see run. Prints one line per step, and the output of what failed."""

from __future__ import annotations

import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

CI = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(CI)
MINORS = ("3.11", "3.9", "3.10", "3.12", "3.13", "3.14")  # In the order of their runs.
TEST_SECONDS = 600
TOOL_SECONDS = 300
PIP_PAUSES = (5, 15, 45, None)  # Seconds after a failed try; None: it was the last.
# What speaks MongoDB's protocol for the tests. Later versions come without the program, and
# what it asks pip for, it does not need.
SERVER = ["--no-deps", "--only-binary=:all:", "secantusdb==0.6.0b17"]
WHICH = "import platform, sys; print(platform.python_version(), sys.executable)"
COUNTS = re.compile(r"(\d+) passed, (\d+) failed, (\d+) skipped")


def run(command: list[str], seconds: float) -> tuple[int | None, str]:
    """The exit code (None: over time) and the output of *command*, run in ROOT."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except BaseException as error:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
        log.seek(0)
        return code, log.read().decode("utf-8", "replace")


def pythons() -> list[tuple[str, str, str]]:
    """(minor, full version, path) of one Python for each minor version that is here."""
    found: dict[str, tuple[str, str]] = {}
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    names = [f"python{minor}" for minor in MINORS] + ["python3", "python"]
    candidates = [os.path.join(folder, name) for folder in folders if folder for name in names]
    candidates += sorted(glob.glob(os.path.join(pyenv, "versions", "*", "bin", "python")))
    candidates.append(sys.executable)
    for path in candidates:
        if not (os.path.isfile(path) and os.access(path, os.X_OK)):
            continue
        # Asked, as it may be a stand-in that only says that it is none.
        try:
            asked = subprocess.run(
                [path, "-c", WHICH], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, timeout=60, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            continue
        version, _, executable = asked.stdout.decode("utf-8", "replace").strip().partition(" ")
        minor = ".".join(version.split(".")[:2])
        if asked.returncode == 0 and minor in MINORS:
            found.setdefault(minor, (version, os.path.abspath(executable or path)))
    return [(minor, *found[minor]) for minor in MINORS if minor in found]


class Report:
    """What came of the steps so far."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0

    def step(self, what: str, result: str, seconds: float, output: str = "") -> None:
        """Print one step; *output* is shown if it failed."""
        print(f"{what:<28} {result}  ({seconds:.0f} s)", flush=True)
        if output:
            print("\n".join(f"    {line}" for line in output.rstrip().splitlines()), flush=True)

    def tests(self, what: str, python: str, *patterns: str) -> None:
        """The README's test command, with one Python; with *patterns* none may be skipped."""
        started = time.monotonic()
        code, output = run([python, "test_taskpool.py", *patterns], TEST_SECONDS)
        seconds = time.monotonic() - started
        last = output.rstrip().rpartition("\n")[2].strip()
        counts = COUNTS.fullmatch(last)
        passed, failed, skipped = map(int, counts.groups()) if counts else (0, 0, 0)
        result = last if counts else "did not get to its last line"
        if code is None:
            result = f"FAILED: not over after {TEST_SECONDS} s"
        elif code or failed or not counts or not passed or (patterns and skipped):
            result = f"FAILED: {result}, exit code {code}"
        if result.startswith("FAILED") and not failed:
            failed = 1
        self.passed, self.failed = self.passed + passed, self.failed + failed
        self.skipped += skipped
        self.step(what, result, seconds, output if failed else "")

    def tool(self, what: str, command: list[str], shown: bool = False) -> None:
        """One checker, which counts as one test; *shown*: its output is worth reading."""
        started = time.monotonic()
        code, output = run(command, TOOL_SECONDS)
        good = code == 0
        self.passed, self.failed = self.passed + good, self.failed + (not good)
        result = "passed" if good else "FAILED" if code else f"FAILED: over {TOOL_SECONDS} s"
        self.step(what, result, time.monotonic() - started, "" if good and not shown else output)


def install(folder: str, found: list[tuple[str, str, str]]) -> tuple[str, str]:
    """The path of a virtual environment's Python with the tools in it, or "" and why not."""
    output = "no Python from 3.10 on to install them with"
    environment = ""
    for minor, _, python in found:
        if minor == "3.9":  # mypy needs a newer one.
            continue
        shutil.rmtree(folder, ignore_errors=True)
        code, output = run([python, "-m", "venv", folder], TOOL_SECONDS)
        if code == 0:
            names = glob.glob(os.path.join(folder, "*", "python")) or glob.glob(
                os.path.join(folder, "*", "python.exe")
            )
            environment = names[0]
            break
    if not environment:
        return "", output
    pip = [environment, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    for what in (["-r", os.path.join(CI, "requirements.txt")], SERVER):
        for pause in PIP_PAUSES:
            code, output = run([*pip, *what], TOOL_SECONDS)
            if code == 0:
                break
            if pause is None:
                return "", output or "pip was not over in time"
            print(f"pip failed; the next try is in {pause} s", flush=True)
            time.sleep(pause)
    return environment, ""


def main() -> int:
    report = Report()
    found = pythons()
    if not found or found[0][0] != "3.11":
        print("Python 3.11 is not here; the tests run on the others", flush=True)
    for _, version, python in found:
        report.tests(f"tests, Python {version}", python)
    with tempfile.TemporaryDirectory(prefix="taskpool-ci-") as folder:
        started = time.monotonic()
        python, problem = install(os.path.join(folder, "venv"), found)
        seconds = time.monotonic() - started
        report.step("install the tools", "done" if python else "FAILED", seconds, problem)
        if python:
            settings = ["--no-cache", "--config", os.path.join(CI, "ruff.toml")]
            files = ["taskpool.py", "test_taskpool.py"]
            report.tool("ruff check", [python, "-m", "ruff", "check", *settings, *files])
            cache = ["--cache-dir", os.path.join(folder, "mypy")]
            mypy = [python, "-m", "mypy", "--strict", *cache, "taskpool.py"]
            report.tool("mypy --strict taskpool.py", mypy)
            speed = [python, "-B", os.path.join(CI, "cron_speed.py")]
            report.tool("Cron faster than cronsim", speed, shown=True)
            report.tests("tests, MongoDB", python, "TestMongo")
        else:
            report.failed += 4  # None of them was run.
    if not found:
        report.failed += 1
    print(f"{report.passed} passed, {report.failed} failed, {report.skipped} skipped", flush=True)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
