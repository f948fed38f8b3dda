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
MINORS = ("3.11", "3.9", "3.10", "3.12", "3.13", "3.14", "3.15")  # In the order of their runs.
FROM_DEBIAN = ("3.14", "3.15")  # Those of Debian unstable stand in where these are not here.
TEST_SECONDS = 600
TOOL_SECONDS = 300
PAUSES = (5, 15, 45, None)  # Seconds after a failed download; None: it was the last.
# What speaks MongoDB's protocol for the tests. Later versions come without the program, and
# what it asks pip for, it does not need.
SERVER = ["--no-deps", "--only-binary=:all:", "secantusdb==0.6.0b17"]
# Debian's packages for the tests of the page, which find the browser in PATH; what playwright
# brings along to drive it needs the library.
BROWSER = ("chromium", "libatomic1")
# As root, with the lists that each try has fetched anew: an old one names files that are gone.
APT = """export DEBIAN_FRONTEND=noninteractive; apt-get update
exec apt-get install -y --no-install-recommends "$@" """
WHICH = "import platform, sys; print(platform.python_version(), sys.executable)"
COUNTS = re.compile(r"(\d+) passed, (\d+) failed, (\d+) skipped")
# A command with mounts of its own: they end with its last process, however that ends.
PRIVATE = ["unshare", "--mount", "--propagation", "private"]
ENTER = """root=$1; shift
for folder in proc sys dev; do mount --rbind "/$folder" "$root/$folder"; done
exec env -u TMPDIR chroot "$root" env --chdir=/project "$@" """


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


def download(command: list[str]) -> tuple[int | None, str]:
    """As run(), but tried again where the servers are away."""
    for pause in PAUSES:
        code, output = run(command, TOOL_SECONDS)
        if code == 0 or pause is None:
            break
        print(f"a download failed; the next try is in {pause} s", flush=True)
        time.sleep(pause)
    return code, output or "it was not over in time"


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

    def tests(self, what: str, python: list[str], *patterns: str) -> None:
        """The README's test command, with one Python; with *patterns* none may be skipped."""
        started = time.monotonic()
        code, output = run([*python, "test_taskpool.py", *patterns], TEST_SECONDS)
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

    def untested(self, what: str, why: str, count: int) -> None:
        """What cannot be had here: a skip, and with the environment variable CI a failure."""
        print(f"\n*** NOT TESTED: {what}. {why} ***\n", flush=True)
        if os.environ.get("CI"):
            self.failed += count
        else:
            self.skipped += count

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
        code, output = download([*pip, *what])
        if code != 0:
            return "", output
    return environment, ""


def can_install(*programs: str) -> bool:
    """Whether Debian packages can be installed here, and these programs are here."""
    needed = ("apt-get", *programs)
    return os.name == "posix" and os.geteuid() == 0 and all(map(shutil.which, needed))


def apt_install(*packages: str) -> str:
    """Install those Debian packages that are not here. Returns what went wrong, or ""."""
    if run(["dpkg", "--status", *packages], TOOL_SECONDS)[0] == 0:
        return ""
    code, output = download(["sh", "-c", APT, "sh", *packages])
    return "" if code == 0 else output


def debian(folder: str, minors: list[str]) -> str:
    """Make *folder* the root of a Debian unstable with these Pythons and the project, from the
    mirror that apt uses here. Returns what went wrong, or ""."""
    download(["apt-get", "update"])  # Perhaps of a source that is not needed.
    problem = apt_install("mmdebstrap")
    if problem:
        return problem
    index = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)"]
    mirrors = re.findall(r"^Debian Debian (\S+)$", run(index, TOOL_SECONDS)[1], re.M)
    if not mirrors:
        return "apt's configuration names no mirror of Debian"
    packages = ",".join(["tzdata", *(f"python{minor}" for minor in minors)])
    make = ["sh", "-c", 'rm -rf "$0" && exec "$@"', folder]  # What a failed try has left.
    make += ["mmdebstrap", "--mode=root", "--variant=apt", f"--include={packages}"]
    make.append('--aptopt=Acquire::Check-Valid-Until "false"')  # The mirror may be a snapshot.
    code, output = download([*PRIVATE, *make, "sid", folder, mirrors[0]])
    if code != 0:
        return output
    leave_out = shutil.ignore_patterns(".git", "__pycache__")
    shutil.copytree(ROOT, os.path.join(folder, "project"), ignore=leave_out)
    return ""


def debian_tests(report: Report, minors: list[str]) -> None:
    """The tests with these Pythons of Debian unstable, which takes root and apt."""
    names = " and ".join(minors)
    if not can_install("unshare", "chroot"):
        why = "They are not here, and only root on a Debian with apt can get them."
        report.untested(f"Python {names}", why, len(minors))
        return
    with tempfile.TemporaryDirectory(prefix="taskpool-sid-") as root:
        started = time.monotonic()
        problem = debian(root, minors)
        seconds = time.monotonic() - started
        report.step(f"get Python {names}", "FAILED" if problem else "done", seconds, problem)
        if problem:
            report.failed += len(minors)
            return
        for minor in minors:
            python = [*PRIVATE, "sh", "-ec", ENTER, "sh", root, f"python{minor}"]
            version = run([*python, "-c", WHICH], TOOL_SECONDS)[1].partition(" ")[0]
            report.tests(f"tests, Python {version}", python)


def page_tests(report: Report, python: str) -> None:
    """The tests of the page in Debian's browser, or in the one that is here."""
    browser = BROWSER[0]
    if can_install():
        started = time.monotonic()
        problem = apt_install(*BROWSER)
        seconds = time.monotonic() - started
        report.step(f"get {browser}", "FAILED" if problem else "done", seconds, problem)
        if problem:
            report.failed += 1
            return
    elif not shutil.which(browser):
        why = f"{browser} is not here, and only root on a Debian with apt can get it."
        report.untested("the page in a browser", why, 1)
        return
    report.tests("tests, the page in a browser", [python], "TestPageInABrowser")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # So that nothing is left behind.
    report = Report()
    found = pythons()
    if not found or found[0][0] != "3.11":
        print("Python 3.11 is not here; the tests run on the others", flush=True)
    for _, version, python in found:
        report.tests(f"tests, Python {version}", [python])
    here = [minor for minor, _, _ in found]
    missing = [minor for minor in FROM_DEBIAN if minor not in here]
    if missing:
        debian_tests(report, missing)
    with tempfile.TemporaryDirectory(prefix="taskpool-ci-") as folder:
        started = time.monotonic()
        python, problem = install(os.path.join(folder, "venv"), found)
        seconds = time.monotonic() - started
        report.step("install the tools", "done" if python else "FAILED", seconds, problem)
        if python:
            settings = ["--no-cache", "--config", os.path.join(CI, "ruff.toml")]
            files = ["taskpool.py", "test_taskpool.py", os.path.join(CI, "typed_program.py")]
            report.tool("ruff check", [python, "-m", "ruff", "check", *settings, *files])
            cache = ["--cache-dir", os.path.join(folder, "mypy")]
            mypy = [python, "-m", "mypy", "--strict", *cache, "taskpool.py"]
            mypy.append(os.path.join(CI, "typed_program.py"))
            report.tool("mypy --strict taskpool.py, and a user's program", mypy)
            speed = [python, "-B", os.path.join(CI, "cron_speed.py")]
            report.tool("Cron faster than cronsim", speed, shown=True)
            report.tests("tests, MongoDB, recipes", [python], "TestMongo", "recipes", "prometheus")
            page_tests(report, python)
        else:
            report.failed += 5  # None of them was run.
    if not found:
        report.failed += 1
    print(f"{report.passed} passed, {report.failed} failed, {report.skipped} skipped", flush=True)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
