"""Tests of taskpool: `python test_taskpool.py [pattern]`. Standard library only.

The classes are the promises of the module's docstring, P1-P8, and what the README says.
Worker processes, kills and files are real. Nothing here asserts a speed.
"""

from __future__ import annotations

import array
import ast
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import copy
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import marshal
import math
import multiprocessing
import os
import pickle
import queue as queues
import random
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import unittest
import unittest.mock
import urllib.parse
import weakref
from concurrent.futures import Future
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import taskpool
from taskpool import (
    Cluster,
    Cron,
    DuplicateTask,
    MemoryStore,
    Outcome,
    Query,
    RemoteError,
    SQLiteStore,
    StoreError,
    TaskQueue,
    TaskTimeout,
    WorkerDied,
)

HERE = Path(__file__).resolve().parent
PATIENCE = 60.0  # How long something that hangs may take; costs nothing when green.
METHODS = [m for m in ("spawn", "forkserver", "fork") if m in multiprocessing.get_all_start_methods()]
# Python 3.12.0-2 cannot fork once the main script has ended (python/cpython#113964): there
# the tasks stay waiting.
AT_END = [m for m in METHODS if m != "fork" or not (3, 12) <= sys.version_info < (3, 12, 3)]
LINUX = sys.platform.startswith("linux")
NOW = 1_700_000_000_000_000  # An instant for stores, in microseconds.
SECOND = 1_000_000


# --- Helpers -------------------------------------------------------------------------


def eventually(condition, what="the condition", seconds=PATIENCE):
    """Wait until *condition()* is true, and return its value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true in {seconds:g} s")
        time.sleep(0.005)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid):
    """The living children of a process, by /proc."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{entry}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
                if int(fields[1]) == pid and fields[0] not in "ZX":
                    found.append(int(entry))
    return found


def begun(path):
    """Wait until the task "hold" of that path runs, and return the pid of its worker."""
    eventually(lambda: os.path.exists(path + ".started"))
    return int(Path(path + ".started").read_text())


def let_end(path):
    """The task "hold" of that path ends."""
    Path(path + ".end").touch()


def idle_pids(cluster):
    return [worker["pid"] for worker in cluster.workers() if worker["state"] == "idle"]


def refuses(cluster):
    """Whether *cluster* takes no more tasks."""
    try:
        return cluster.submit(next(iter(cluster.task_map)), in_memory=True, due_date=timedelta(hours=1)) is None
    except RuntimeError as error:
        return "after shutdown" in str(error)


def call_in_thread(cluster, name, call):
    """Have a thread of the cluster make a call, as finalizers and log handlers do; returns when it begins."""
    queue, begins = cluster.queue, threading.Event()
    clock = queue.clock

    def clock_that_calls():
        if threading.current_thread().name == f"taskpool-{name}" and not begins.is_set():
            begins.set()
            call()
        return clock()

    queue.clock = clock_that_calls
    cluster.set_refresh_rate(50)  # Wakes it up.
    assert begins.wait(PATIENCE), f"the thread {name} never looks at the clock"
    queue.clock = clock


def closes(cluster):
    """Wait for the end of a cluster that was told to stop."""
    def run():
        with contextlib.suppress(taskpool.TaskPoolError):  # Its dispatcher failed.
            cluster.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "the cluster does not end"


class Clock:
    """time.time for a TaskQueue, that tests can set."""

    offset = 0.0

    def __call__(self):
        return time.time() + self.offset


class Hooked(SQLiteStore):
    """A store that calls before(name) and after(name, result) with each of its public methods.

    What a test puts there may wait or raise; else the next fails[name] calls fail.
    """

    def __init__(self, path):
        super().__init__(path)
        self.fails = collections.Counter()

    def before(self, name):
        if self.fails[name] > 0:
            self.fails[name] -= 1
            raise StoreError("the disk is full")

    def after(self, name, result):
        pass

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name.startswith("_") or name in ("before", "after", "claim", "settle") or not callable(value):
            return value
        return functools.partial(self._call, name, value)

    def _call(self, name, method, *arguments, **options):
        self.before(name)
        result = method(*arguments, **options)
        self.after(name, result)
        return result

    def _claim(self, *arguments, **options):  # Also that of turn().
        return self._call("claim", super()._claim, *arguments, **options)

    def _settle(self, *arguments):
        return self._call("settle", super()._settle, *arguments)


class InFolder(unittest.TestCase):
    """A test with a folder of its own."""

    FILE = "tasks.db"
    IMPORTS = (
        "import logging, multiprocessing, os, random, signal, sqlite3, subprocess, sys, threading, time\n"
        "from datetime import timedelta\n"
        "import taskpool\n"
        "from taskpool import Cluster, SQLiteStore, StoreError, TaskQueue, main\n"
    )

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="taskpool-test-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def queue(self, name="tasks.db"):
        queue = TaskQueue(self.folder / name)
        self.addCleanup(queue.close)
        return queue

    def hooked(self, name="tasks.db"):
        """A store with hooks, and its queue."""
        store = Hooked(self.folder / name)
        queue = TaskQueue(store)
        self.addCleanup(queue.close)
        return store, queue

    def sql(self, statement, *values):
        """What another program does to the file."""
        with contextlib.closing(sqlite3.connect(self.folder / self.FILE, isolation_level=None, timeout=PATIENCE)) as db:
            return db.execute(statement, values).fetchall()

    def cluster(self, task_map, queue=None, **options):
        options.setdefault("oversubscribe", True)
        options.setdefault("max_available_workers", 2)
        options.setdefault("refresh_rate", 50)
        cluster = Cluster(task_map, queue or self.queue(), **options)
        self.addCleanup(self.end, cluster)
        return cluster

    @staticmethod
    def end(cluster):
        """Stop it at once, and wait: what it logs as it ends belongs to this test."""
        with contextlib.suppress(taskpool.TaskPoolError):  # Its dispatcher failed.
            cluster.shutdown(wait=False)
            cluster._engine.begin_stop(0.0)  # inside
        closes(cluster)

    def script(self, source, name="script.py"):
        """A file with that source, and the usual imports if it uses them and makes none of its own."""
        path, source = self.folder / name, textwrap.dedent(source)
        if re.search(r"(Cluster|Queue)\(", source) and not re.search("(from|import) taskpool", source):
            source = self.IMPORTS + source
        path.write_text(source, encoding="utf-8")
        return path

    def start(self, path, *arguments, **options):
        """Run a Python script in the folder; killed at the end of the test."""
        environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1"}
        environment.update(options.pop("env", {}))
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        process = subprocess.Popen(
            [sys.executable, *options.pop("flags", ()), str(path), *map(str, arguments)],
            cwd=self.folder, env=environment, text=True, **options,
        )

        def end():
            with contextlib.suppress(OSError):
                process.kill()
            process.communicate()

        self.addCleanup(end)
        return process

    def run_script(self, source, *arguments, name="script.py", code=0, **options):
        """Run a script to its end and return what it printed."""
        process = self.start(self.script(source, name), *arguments, **options)
        out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, code, f"\n{out}\n{err}")
        self.stderr = err
        return out


# Functions that tests run in workers. At the top level, so that every start method finds
# them.


def echo(job):
    return job.data


def job_itself(job):
    return job


def about(job):
    return job.id, job.task_type, job.data, job.priority, job.attempt, job.state, job.in_memory


def add_line(job):
    """Append the task's id and attempt to a file, in one write."""
    fd = os.open(job.data["file"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{job.id} {job.attempt}\n".encode())
    os.close(fd)


def end_as_told(job):
    """End in the way that the data name."""
    how = job.data.get("how")
    if how == "raise":
        raise ValueError("bad")
    if how == "kill" or (how == "kill first" and job.attempt == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how in ("sleep", "hang"):
        time.sleep(PATIENCE)


def end_badly(job):
    add_line(job)
    end_as_told(job)


def add_slot(job):
    """Append the slot that runs and the id of the master, then end in the way that data name."""
    fd = os.open(job.data["file"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{job.due_date.isoformat()} {os.getppid()} {job.attempt}\n".encode())
    os.close(fd)
    end_as_told(job)
    return (job.result or 0) + 1  # Of the last run.


def lines_of(path):
    return Path(path).read_text().split("\n")[:-1] if Path(path).exists() else []


def pid_of_worker(job):
    return os.getpid()


def what_programs_get(job=None):
    """The pipes that a program started here gets, and the signals that are blocked and ignored there."""
    program = (
        "import os\n"
        "for fd in os.listdir('/proc/self/fd'):\n"
        "    if int(fd) > 2 and os.path.exists(f'/proc/self/fd/{fd}'): print(os.readlink(f'/proc/self/fd/{fd}'))\n"
        "for line in open('/proc/self/status'):\n"
        "    if line[:6] in ('SigBlk', 'SigIgn'): print(''.join(line.split()))"
    )
    command = [sys.executable, "-S", "-c", program]
    return subprocess.run(command, close_fds=False, stdout=subprocess.PIPE, text=True).stdout.split()


def become_another_program(job):
    os.execv("/bin/sleep", ["sleep", str(PATIENCE)])


def send_ctrl_c_to_itself(job):
    os.kill(os.getpid(), signal.SIGINT)


def hold(job):
    """Say that the task runs, then run until told to end."""
    Path(job.data + ".starting").write_text(str(os.getpid()))
    os.replace(job.data + ".starting", job.data + ".started")  # Whoever sees it can read it.
    deadline = time.monotonic() + 10 * PATIENCE  # A test may have several waits meanwhile.
    while not os.path.exists(job.data + ".end") and time.monotonic() < deadline:
        time.sleep(0.005)
    return "held"


def report_and_hold(job):
    """Report without an end, beside hold()."""
    threading.Thread(target=report_on_and_on, args=(job,), daemon=True).start()
    return hold(job)


def report_on_and_on(job):
    with contextlib.suppress(RuntimeError):  # The task has ended.
        for step in itertools.count():
            job.progress(step)
            time.sleep(0.01)


def hold_and_fail(job):
    hold(job)
    raise OSError("late")


def hold_the_gil(job):
    """Sleep in C code that does not let go of the interpreter."""
    import ctypes

    add_line(job)
    ctypes.PyDLL(None).usleep(int(job.data["seconds"] * 1e6))


def fail(job):
    raise ValueError(f"attempt {job.attempt}")


def tell_times(job):
    started, at_start = time.monotonic(), (job.started_at.isoformat(), job.ended_at)
    time.sleep(0.01)
    return [*at_start, started, time.monotonic()]


def fail_evilly(job):
    raise ValueError("\x1b[2J\nsecond")


def needs_words(job, *, to, subject="hello"):
    return [to, subject]


def succeed_at(job):
    if job.attempt < job.data:
        raise ValueError(f"attempt {job.attempt}")
    return job.attempt


def about_item(job):
    """What a function gets for one item of a chunk."""
    job.progress(1)
    return job.id, job.data, job.attempt, pickle.loads(pickle.dumps(job)).data


def sum_of(job, *, a=1, b=2):
    return a + b


def sleep_for(job):
    time.sleep(job.data)
    return job.data


def note_span(job):
    """Append when the task starts and ends, by a clock that all processes share."""
    for change in ("1", "-1"):
        fd = os.open(job.data["file"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, f"{time.monotonic_ns()} {change} {os.getppid()}\n".encode())
        os.close(fd)
        time.sleep(job.data["seconds"] if change == "1" else 0)


def line_of_item(job):
    """Append the item and the attempt to a file; end as the item says."""
    with open(job.data["file"], "a") as file:
        file.write(f"{job.data['item']} {job.attempt}\n")
    if job.data["how"] == "fail first" and job.attempt == 1:
        raise ValueError("first")
    end_as_told(job)
    return job.data["item"]


_made = []  # What note_start() got in this process.


def note_start(*given):
    _made.append((os.getpid(), *given))


def what_started(job):
    return _made


def add_one(counter):
    with counter.get_lock():
        counter.value += 1


async def sleep_a_little(job):
    await asyncio.sleep(0.01)
    return "slept"


def future_later(job):
    future = Future()
    threading.Timer(0.01, future.set_result, ["later"]).start()
    return future


class Odd(Exception):
    def __init__(self, number, *, text):
        super().__init__(f"{number}: {text}")


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Leaving(Exception):
    def __str__(self):
        raise SystemExit(3)


class OnLoad:
    """Makes a call in the process that unpickles it."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


class Point:
    def __init__(self, *at):
        self.at = at

    def __eq__(self, other):
        return type(other) is Point and self.at == other.at

    __hash__ = None


ANYTHING = [
    b"bytes", (1, (2,)), {1, 2}, frozenset("a"), {(1, 2): None, 3: "x"}, datetime(2026, 1, 2, tzinfo=timezone.utc), timedelta(1),
    math.inf, 2**100, -1j, "\ud800", range(3), Path("a"), array.array("d", [0.5]), collections.OrderedDict(a=1), ValueError,
    Point(1, {2}), [Point()], None, {}, [], "", 0, {"a": [1]}, bytearray(300_000), "x" * 300_000,
]


class Known:
    """Tells in which threads it was unpickled, and waits there until it may go on."""

    threads, go = [], threading.Event()

    def __init__(self, how):
        self.how = how

    def __setstate__(self, state):
        if taskpool._worker is None:
            Known.threads.append(threading.current_thread().name)
            if state["how"] == "wait":
                Known.go.wait(PATIENCE)


class KnownError(Known, Exception):
    def __reduce__(self):
        return KnownError, (self.how,), {"how": self.how}

    def __setattr__(self, name, value):
        raise SystemExit if name == "__cause__" else AttributeError(name)

    def __init__(self, how):
        self.__dict__["how"] = how


def known(job):
    if job.data == "raise":
        raise KnownError("raise")
    return Known(job.data)


class Fragile:
    """Unpickling it raises."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        return throw, (self.error,)


class Refusing(Fragile):
    """Pickling it raises."""

    def __reduce__(self):
        raise self.error


class Bare(BaseException):
    """As what pytest.fail() raises."""


def throw(error):
    raise error


def with_a_lock():
    error = ValueError("holds a lock")
    error.lock = threading.Lock()
    return error


LIKE_OURS = {
    kind.__name__: kind
    for kind in (
        BrokenPipeError, ConnectionResetError, InterruptedError, StopIteration, queues.Empty, sqlite3.OperationalError,
        concurrent.futures.CancelledError, concurrent.futures.InvalidStateError, BlockingIOError, StoreError, GeneratorExit,
        asyncio.CancelledError,
    )
}
RAISED = {
    "odd": lambda: Odd(1, text="odd"), "unprintable": Unprintable, "leaving": Leaving, "base": lambda: Bare("bare"),
    "exit": lambda: SystemExit("disk missing"), "exit0": lambda: SystemExit(0), "interrupt": KeyboardInterrupt,
    "local": lambda: type("Local", (Exception,), {})("inside"), "lock": with_a_lock, "timeout": lambda: TimeoutError("mine"),
    "eof": lambda: EOFError("mine"), "huge": lambda: ValueError("x" * 200_000_000), "surrogate": lambda: ValueError("gl\u0101\udcff"),
    **{name: functools.partial(kind, "database is locked") for name, kind in LIKE_OURS.items()},
}


def raise_kind(job):
    if job.data == "deep":
        return raise_kind(job)
    raise RAISED[job.data]()


def return_kind(job):
    return {
        "lambda": lambda: 1,
        "generator": (i for i in range(3)),
        "lock": threading.Lock(),
        "exploding": OnLoad(throw, RuntimeError("exploded while loading")),
        "exits": OnLoad(sys.exit, 4),
        "tuple": (1, 2),
        "large": b"x" * 3_000_000,
    }[job.data]


class Busy(taskpool.Retry):
    """Cannot be pickled."""

    def __init__(self, seconds):
        super().__init__(seconds, counts=False)
        self.lock = threading.Lock()


class Hopeless(taskpool.GiveUp):
    """Cannot be pickled, and not rebuilt from its arguments."""

    def __init__(self, text):
        super().__init__(text, threading.Lock())


class Vague(taskpool.Retry):
    def __init__(self, seconds):
        self.seconds = seconds


WISHES = {"GiveUp": taskpool.GiveUp, "Retry": taskpool.Retry, "Busy": Busy, "Hopeless": Hopeless, "Vague": Vague}


def wish(job, toggle_ipc):
    """Note this start in a file, and raise what the data say, in the way that they say, if it is one of the first *times*."""
    with open(job.data["file"], "a") as file:
        file.write(f"{job.attempt} {time.time()}\n")
    if len(Path(job.data["file"]).read_text().splitlines()) > job.data.get("times", 99):
        return job.attempt
    kind, *arguments = job.data["raise"]
    error, way = WISHES[kind](*arguments), job.data.get("way")
    if way in ("async", "group"):
        return in_async(error, group=way == "group")
    if way == "future":
        future = concurrent.futures.Future()
        future.set_exception(error)
        return future
    if way == "conversation":
        return toggle_ipc(lambda answer: throw(error), lambda send: send({"status": 2}))
    raise error from OSError("the cause")


async def in_async(error, *, group=False):
    if group:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(in_async(error))
    raise error


def fork_and_come_back(job):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] >> 8
    sys.stderr = None
    if job.data == "exit":
        sys.exit(7)
    if job.data == "raise":
        raise ValueError("in the fork")
    return "in the fork"


def report_in_a_handler(job):
    """Reports and adds in a handler that interrupts reporting and adding."""
    queue, ticks = TaskQueue(job.data), []

    def tick(*_):
        ticks.append(1)
        job.progress(len(ticks))
        with contextlib.suppress(StoreError):  # If it interrupts a write.
            queue.add_task("nobody's", due_date=timedelta(days=1))
        if len(ticks) <= 30:
            signal.setitimer(signal.ITIMER_REAL, 0.003)

    before = signal.signal(signal.SIGALRM, tick)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.003)
        while len(ticks) <= 30:
            job.progress(0)
            queue.add_task("nobody's", due_date=timedelta(days=1))
    finally:
        signal.signal(signal.SIGALRM, before)
        queue.close()
    return len(ticks)


def ask(toggle_ipc, data, on_message=lambda answer: answer):
    """Begin a conversation with that question."""
    return toggle_ipc(on_message, lambda send: send({"status": 4, "data": data}))


def ping(job, toggle_ipc):
    return ask(toggle_ipc, job.data)


def ping_by_position(job, ipc):
    return ping(job, ipc)


def ping_three_deep(job, toggle_ipc):
    def ping_next(depth, heard):
        return ask(
            toggle_ipc, f"ping {depth}",
            lambda answer: ping_next(depth + 1, heard + [answer]) if depth < 3 else heard + [answer],
        )

    return ping_next(1, [])


def ping_many_deep(job, toggle_ipc):
    def ping_next(left):
        return ask(toggle_ipc, left, lambda answer: ping_next(left - 1) if left else answer)

    return ping_next(job.data)


def ping_and_wait_inside(job, toggle_ipc):
    inner = lambda answer: [answer, ask(toggle_ipc, "inner").result(PATIENCE)]  # noqa: E731
    return ask(toggle_ipc, "outer", inner).result(PATIENCE)


async def ping_async(job, toggle_ipc):
    return await asyncio.gather(*(asyncio.wrap_future(ask(toggle_ipc, i)) for i in range(3)))


def ping_later(job, toggle_ipc):
    message = {"status": 2, "data": "late"}
    return toggle_ipc(lambda answer: answer, lambda send: threading.Timer(0.02, send, [message]).start())


def ping_status(job, toggle_ipc):
    return toggle_ipc(lambda answer: answer, lambda send: send(job.data))


def ping_twice(job, toggle_ipc):
    sent = threading.Event()

    def initialize(send):
        send({"status": 2, "data": "silence"})  # An answer could come before the second.
        send({"status": 2, "data": 2})
        sent.set()

    return toggle_ipc(lambda answer: sent.wait(PATIENCE), initialize)


def ping_and_forget(job, toggle_ipc):
    ask(toggle_ipc, "silence")
    return "forgot"


def ping_and_die(job, toggle_ipc):
    ask(toggle_ipc, "silence")
    if job.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return job.attempt


def fail_in_on_message(job, toggle_ipc):
    return ask(toggle_ipc, "x", lambda answer: throw(LookupError(answer)))


def fail_in_initialize(job, toggle_ipc):
    return toggle_ipc(lambda answer: answer, lambda send: throw(LookupError("initialize")))


def add_from_task(job):
    with TaskQueue(job.data["db"]) as queue:
        queue.add_task("echo", 1, task_id=job.data["id"], keep_result=60)
        try:
            queue.in_memory.find()
        except RuntimeError as error:
            return str(error)


def cancel_there(job):
    """Cancel the task of that id in that folder; then wait, as it may be this one."""
    folder, task_id = job.data
    with TaskQueue(os.path.join(folder, "tasks.db")) as queue:
        told = queue.cancel(task_id)
    while task_id == job.id:
        time.sleep(PATIENCE)
    return told


def use_cluster_in_task(job):
    cluster = Cluster({"echo": echo}, TaskQueue(job.data))
    try:
        cluster.submit("echo")
    except RuntimeError as error:
        return Cluster.is_master(), str(error)


def double_with(number, job):
    return number * job.data


class Scaler:
    def __init__(self, factor):
        self.factor = factor

    def scale(self, job):
        return self.factor * job.data


# --- What a task may be --------------------------------------------------------------


class TestWhatAddTaskTakes(InFolder):
    """Wrong arguments raise at once and name the parameter; nothing is stored.

    CK-06, PR-04, RT-03, SE-01, SE-06, ENGINE 19.
    """

    WRONG = [  # (parameter, value, error)
        *[("task_type", v, TypeError) for v in (None, 5, b"x", ["x"])],
        *[("task_type", v, ValueError) for v in ("", "a\0b", "\udcff", "x" * 10_001)],
        *[("priority", v, TypeError) for v in (None, True, 2.5, "3")],
        *[("priority", v, ValueError) for v in (2**63, -(2**63))],
        *[("task_id", v, TypeError) for v in (123, 0, b"x", 1.5)],
        *[("task_id", v, ValueError) for v in ("", "\0", "\ud800")],
        *[("due_date", v, TypeError) for v in (5, "tomorrow", 1.0, math.inf)],
        ("due_date", timedelta.max, ValueError),
        ("due_date", datetime.max.replace(tzinfo=timezone(-timedelta(hours=5))), ValueError),
        *[("in_memory", v, TypeError) for v in (1, None, "yes")],
        *[("retries", v, TypeError) for v in (None, True, "3", 1.5)],
        ("retries", -1, ValueError),
        *[("retry_delay", v, TypeError) for v in (None, "1", True)],
        *[("retry_delay", v, ValueError) for v in (-1, math.nan, math.inf)],
        *[("timeout", v, TypeError) for v in ("1", True, [])],
        *[("timeout", v, ValueError) for v in (0, -1, math.nan, math.inf, timedelta(0), 10**400)],
        *[("keep_result", v, TypeError) for v in ("1", True)],
        *[("keep_result", v, ValueError) for v in (-1, math.inf)],
        *[("if_exists", v, TypeError) for v in (None, 1)],
        ("if_exists", "ignore", ValueError),
        *[("connection", v, TypeError) for v in ("tasks.db", 5)],
        # CN-06: never taken for "now".
        *[("repeat", v, TypeError) for v in (5, 0, 1.5, True, b"@daily", ["* * * * *"], datetime.max)],
        *[("repeat", v, ValueError) for v in (timedelta(0), -timedelta(seconds=1), "", "* * * *", "61 * * * *", "@every 5m", "5")],
    ]

    def test_a_wrong_argument_raises_and_names_its_parameter(self):
        queue = self.queue()
        for parameter, value, error in self.WRONG:
            with self.subTest(parameter=parameter, value=repr(value)[:40]):
                task = {"task_type": "x", parameter: value}
                for add in (lambda task=task: queue.add_task(**task), lambda task=task: queue.add_tasks([{"task_type": "good"}, task])):
                    with self.assertRaisesRegex(error, rf"^(tasks\[1\]: )?{parameter}") as caught:
                        add()
                    self.assertIs(type(caught.exception), error)
        self.assertEqual(queue.count(), 0)

    def test_data_that_json_would_alter_is_refused_with_the_path_to_it(self):
        queue = self.queue()
        deep = functools.reduce(lambda inner, _: [inner], range(100), [])
        loop = []
        loop.append(loop)
        for data, error, path in [
            *[(v, TypeError, "data is") for v in ((1, 2), b"bytes", {1, 2}, collections.OrderedDict(a=1), object())],
            ({"a": [1, {"b": (1,)}]}, TypeError, r'data\["a"\]\[1\]\["b"\]'),
            ({"t": datetime.now()}, TypeError, r'data\["t"\]'),
            ({1: "a"}, TypeError, "a key of data"), ({"a": {None: 1}}, TypeError, r'a key of data\["a"\]'),
            *[({key: 1}, ValueError, "a key of data") for key in ("\ud800", "a\0")],
            *[([v], ValueError, r"data\[0\]") for v in (math.nan, -math.inf, "\udcff")],
            (2**63, ValueError, "data is"), ([1, -(2**63) - 1], ValueError, r"data\[1\]"),
            *[(v, ValueError, "nested too deep") for v in (deep, loop)],
        ]:
            with self.subTest(data=repr(data)[:40]), self.assertRaisesRegex(error, path):
                queue.add_task("x", data)
        self.assertEqual(queue.count(), 0)

    def test_json_data_come_back_equal_and_of_the_same_types(self):
        queue = self.queue()
        for data in [
            None, True, False, 0, -1, 2**63 - 1, -(2**63), 0.1, -0.0, 1e300, "", "\0 é 😀",
            [], {}, [[], [None]], {"": {"a b": [1, "2", 3.0, None, True]}}, list(range(1000)),
        ]:
            for in_memory in (False, True):
                with self.subTest(data=repr(data)[:40], in_memory=in_memory):
                    task = queue.add_task("x", data, in_memory=in_memory)
                    verbs = queue.in_memory if in_memory else queue
                    for found in (task.data, verbs.find_one(task_id=task.id).data):
                        self.assertEqual(repr(found), repr(data))

    def test_data_are_copied_when_added_and_an_empty_dict_if_omitted(self):
        queue, data = self.queue(), {"a": Point([1])}
        task = queue.add_task("x", data, in_memory=True)
        data["a"].at[0].append(2)
        task.data["a"].at[0].append(3)
        self.assertEqual(queue.in_memory.find_by_id(task.id).data, {"a": Point([1])})
        self.assertEqual((queue.add_task("x").data, queue.add_task("x", None).data), ({}, None))

    def test_a_due_date_keeps_its_microseconds_and_its_zone(self):
        queue, naive = self.queue(), datetime(2030, 1, 2, 3, 4, 5, 678901)
        aware = naive.replace(tzinfo=timezone(timedelta(hours=5, minutes=30)))
        far = datetime.max.replace(tzinfo=timezone.utc)
        for given, meant in [(aware, aware), (naive, naive.astimezone()), (far, far)]:
            for in_memory in (False, True):
                task = queue.add_task("x", due_date=given, in_memory=in_memory)
                self.assertEqual(task.due_date, meant)
                self.assertEqual(task.due_date.utcoffset(), timedelta(0))
        soon = queue.add_task("x", due_date=timedelta(seconds=90))
        self.assertAlmostEqual((soon.due_date - soon.created_at).total_seconds(), 90)
        last_day = datetime(9999, 12, 31)  # Here Python 3.12 looks at the year 10000.
        self.assertEqual(queue.add_task("x", due_date=last_day).due_date.astimezone(timezone.utc).year, 9999)
        past = queue.add_task("x", due_date=datetime(1, 1, 2, tzinfo=timezone.utc))
        self.assertEqual([t.id for t in queue.find(due=True)], [past.id])

    def test_ids_are_unique_and_odd_ones_work(self):
        queue = self.queue()
        self.assertEqual(len({queue.add_task("x").id for _ in range(100)}), 100)
        self.assertTrue(queue.add_task("x", in_memory=True).id.startswith("inMemory_"))
        odd = ["a:b", "a/b", "%s", "'; drop table--", " ", "\n", "x" * 4000, "😀", "$set", "a.b", "123"]
        for task_id in odd:
            for verbs, in_memory in ((queue, False), (queue.in_memory, True)):
                queue.add_task("x", task_id=task_id, in_memory=in_memory)
                self.assertEqual(verbs.find_one(task_id=task_id).id, task_id)
                self.assertEqual(verbs.remove(task_id=task_id), 1)

    def test_add_tasks_stores_all_or_none(self):
        queue = self.queue()
        for in_memory in (False, True):
            queue.add_task("x", task_id="taken", in_memory=in_memory)
            tasks = [{"task_type": "x", "task_id": i, "in_memory": in_memory} for i in ("a", "taken")]
            with self.assertRaises(DuplicateTask):
                queue.add_tasks(tasks)
            verbs = queue.in_memory if in_memory else queue
            self.assertEqual([t.id for t in verbs.find()], ["taken"])
        added = queue.add_tasks({"task_type": "x", "data": i} for i in range(500))
        self.assertEqual([t.data for t in added], list(range(500)))
        self.assertEqual(queue.count(), 501)
        for wrong, text in [
            ([5], r"tasks\[0\]"), ([{}], "task_type"), ([{"task_type": "x", "lane": "y"}], "lane"),
            ([{"task_type": "x"}, {"task_type": "x", "prio": 1}], r"tasks\[1\].*prio"),
        ]:
            with self.assertRaisesRegex(TypeError, text):
                queue.add_tasks(wrong)
        with self.assertRaisesRegex(ValueError, "in_memory"):
            queue.add_tasks([{"task_type": "x"}, {"task_type": "x", "in_memory": True}])
        self.assertEqual(queue.add_tasks([]), [])

    def test_a_task_is_immutable_hashable_picklable_and_says_what_it_is(self):
        task = self.queue().add_task("mail", {"to": 1}, task_id="m1")
        for name in ("priority", "other"):
            with self.assertRaises(AttributeError):
                setattr(task, name, 5)
        copy = pickle.loads(pickle.dumps(task))
        self.assertEqual((copy, hash(copy), copy.data), (task, hash(task), {"to": 1}))
        self.assertEqual(repr(task), "<Task 'm1' 'mail' waiting, attempt 0>")
        self.assertEqual((task.on_going, task.error, task.result), (False, None, None))


class TestQueueVerbs(InFolder):
    """find, find_one, count, remove, retry, update, wait; persistent and in memory."""

    def setUp(self):
        super().setUp()
        self.both = self.queue()

    def kinds(self):
        for in_memory in (False, True):
            with self.subTest(in_memory=in_memory):
                verbs = self.both.in_memory if in_memory else self.both
                yield verbs, functools.partial(self.both.add_task, in_memory=in_memory)

    def test_filters_combine_and_take_lists(self):
        for verbs, add in self.kinds():
            for i in range(6):
                add("ab"[i % 2], i, task_id=str(i), due_date=timedelta(hours=i // 4))
            ids = lambda **filters: [task.id for task in verbs.find(**filters)]  # noqa: E731
            for filters, found in (
                ({}, "012345"), ({"task_type": "a"}, "024"), ({"task_type": ["a", "b"], "due": False}, "45"),
                ({"task_id": ["5", "1", "none"]}, "15"), ({"state": "waiting", "limit": 2, "offset": 1}, "12"),
                ({"state": ["running", "failed", "done"]}, ""), ({"task_id": []}, ""), ({"limit": 0}, ""), ({"due": True}, "0123"),
            ):
                self.assertEqual(ids(**filters), list(found), filters)
            self.assertEqual(verbs.find_one(task_type="b").id, "1")
            self.assertIsNone(verbs.find_one(task_id="none"))
            self.assertEqual(verbs.count(task_type="a"), 3)
            self.assertEqual(len(verbs.find(task_id=[str(i) for i in range(2000)])), 6)

    def test_a_task_will_do_for_its_id_and_a_declared_function_for_its_type(self):
        self.both.task(echo)
        others = [self.both.add_task(echo, due_date=timedelta(hours=1), in_memory=memory) for memory in (False, True)]
        for verbs, add in self.kinds():
            task = add(echo)
            follower = add("b", after=task)
            for filters, found in (
                ({"task_id": task}, [task]), ({"task_id": [task, follower.id]}, [task, follower]), ({"after": task}, [follower]),
                ({"before": [follower]}, [task]), ({"task_type": echo, "due": True}, [task]), ({"task_type": [echo, "b"], "held": True}, [follower]),
            ):
                self.assertEqual((verbs.find(**filters), verbs.count(**filters)), (found, len(found)), filters)
            self.assertEqual((verbs.update(task, priority=3).priority, verbs.cancel(task), verbs.retry(task_type=echo)), (3, True, 0))
            self.assertEqual(self.both.wait(follower, 5).state, "failed")
            self.assertEqual((verbs.remove(task_type=[echo], task_id=task), verbs.remove(task_id=follower)), (0, 1))
            (other,) = [task for task in others if task.in_memory is not (verbs is self.both.in_memory)]
            for call in (verbs.cancel, verbs.update, lambda it: verbs.find(task_id=[it]), lambda it: verbs.remove(after=it)):
                with self.assertRaisesRegex(ValueError, "(task_id|after) is <Task .*; give tasks that are (stored|in memory)"):
                    call(other)
            with self.assertRaisesRegex(ValueError, "task_type is .*declared"):
                verbs.count(task_type=fail)
        with self.assertRaisesRegex(TimeoutError, "is still waiting"):
            self.both.wait(others[0], 0)
        self.assertEqual((self.both.in_memory.find_by_id(others[1]), self.both.in_memory.remove_by_id(others[1])), (others[1], True))

    def test_wrong_filters_are_refused(self):
        for verbs, _ in self.kinds():
            for wrong, error in [
                ({"task_id": 5}, TypeError), ({"task_id": "\udcff"}, ValueError), ({"task_type": [1]}, TypeError),
                ({"state": "ready"}, ValueError), ({"due": 1}, TypeError),
                ({"limit": -1}, ValueError), ({"limit": "5"}, TypeError),
                ({"offset": None}, TypeError), ({"colour": "red"}, TypeError),
            ]:
                for verb in (verbs.find, verbs.find_one, verbs.count, verbs.remove, verbs.retry):
                    if verb == verbs.find_one and "limit" in wrong:
                        continue  # Its limit is 1.
                    if verb not in (verbs.find, verbs.find_one) and {"limit", "offset"} & set(wrong):
                        error = TypeError  # Has no such filter.
                    with self.assertRaisesRegex(error, next(iter(wrong))) as caught:
                        verb(**wrong)
                    self.assertNotRegex(str(caught.exception), r"^_|\b_\w+\(")  # A private name.

    def test_what_is_wrong_is_named_as_the_caller_knows_it(self):
        queue = self.queue()
        for call, given, error, text in [
            (queue.add_tasks, [None], TypeError, "tasks is None"),
            (queue.add_tasks, [{"task_type": "x"}], TypeError, "tasks is {.*an iterable of dicts"),
            (TaskQueue, [5], TypeError, "store is 5 .*a file name or a Store"), (TaskQueue, [None], TypeError, "store is None"),
            (TaskQueue, [""], ValueError, "path is ''"), (TaskQueue, [":memory:"], ValueError, "path is ':memory:'"),
            (functools.partial(SQLiteStore, synchronous="OFF"), ["x.db"], ValueError, "synchronous"),
            (queue.add_event_listener, ["end", print], ValueError, "event"), (queue.add_event_listener, [5, print], TypeError, "event"),
            (queue.add_event_listener, ["done", 5], TypeError, ""),
            (queue.add_event_listener, ["done", lambda value: 1], TypeError, ""), (queue.remove_event_listener, ["start"], ValueError, "event"),
        ]:
            with self.subTest(call=call, given=given), self.assertRaisesRegex(error, text):
                call(*given)
        self.assertEqual(queue.count(), 0)

    def test_remove_needs_a_filter(self):
        for verbs, add in self.kinds():
            add("x"), add("x"), add("y")
            with self.assertRaisesRegex(ValueError, "without a filter"):
                verbs.remove()
            self.assertEqual(verbs.remove(task_type="x"), 2)
            self.assertEqual(verbs.remove(state=["waiting", "running", "failed", "done"]), 1)
            self.assertEqual(verbs.count(), 0)

    def test_update_changes_a_waiting_task(self):
        for verbs, add in self.kinds():
            add("x", task_id="u", due_date=timedelta(hours=1))
            changed = verbs.update(
                "u", data=[1], priority=7, due_date=timedelta(0), retries=2,
                retry_delay=5, timeout=timedelta(seconds=3), keep_result=9,
            )
            self.assertEqual(changed, verbs.find_one(task_id="u"))
            self.assertEqual(
                (changed.data, changed.priority, changed.retries, changed.retry_delay, changed.timeout),
                ([1], 7, 2, 5.0, 3.0),
            )
            self.assertEqual(verbs.count(due=True), 1)
            later = verbs.update("u", due_date=timedelta(days=1))
            self.assertEqual(verbs.count(due=False), 1)
            self.assertEqual(verbs.update("u", priority=1).due_date, later.due_date)
            for wrong, error in [
                ({"priority": "1"}, TypeError), ({"data": threading.Lock()}, TypeError),
                ({"task_id": "v"}, TypeError), ({"state": "done"}, TypeError),
            ]:
                with self.assertRaises(error):
                    verbs.update("u", **wrong)
            with self.assertRaisesRegex(ValueError, "none.*not there"):
                verbs.update("none", priority=1)

    def test_in_memory_has_the_verbs_of_the_original(self):
        memory = self.both.in_memory
        first = self.both.add_task("x", in_memory=True)
        later = self.both.add_task("x", in_memory=True, due_date=timedelta(hours=1))
        self.assertEqual(memory.find_by_id(first.id), first)
        self.assertEqual(memory.tasks(), [first, later])
        self.assertEqual(memory.available_tasks(), [first])
        self.assertEqual((memory.remove_by_id(first.id), memory.remove_by_id(first.id)), (True, False))
        self.assertIsNone(memory.find_by_id(first.id))
        self.assertEqual(self.both.count(), 0)

    def test_wait_returns_the_ended_task(self):
        queue = self.both
        cluster = self.cluster({"echo": echo, "fail": fail}, queue)
        kept = queue.add_task("echo", [1], keep_result=60)
        self.assertEqual((queue.wait(kept.id, PATIENCE).state, queue.wait(kept.id).result), ("done", [1]))
        for in_memory in (False, True):
            failed = queue.add_task("fail", in_memory=in_memory)
            task = queue.wait(failed.id, PATIENCE)
            self.assertEqual((task.state, task.error.split("\n")[0]), ("failed", "ValueError: attempt 1"))
            gone = queue.add_task("echo", in_memory=in_memory)
            self.assertEqual(queue.wait(gone.id, PATIENCE).state, "done")
        self.assertEqual(queue.wait("never seen").state, "done")
        cluster.shutdown()
        queue.add_task("echo", task_id="again")
        again = {"echo": lambda job: queue.add_task("echo", task_id=job.id, if_exists="replace", due_date=timedelta(1))}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            with mock.patch.object(queue._store, "find", wraps=queue._store.find) as look:
                ended = pool.submit(queue.wait, "again", PATIENCE)
                eventually(lambda: look.called)
            queue.run_due(again)  # As "a task that adds itself again".
            self.assertEqual(ended.result().state, "done")
        queue.add_task("echo", task_id="later", due_date=timedelta(hours=1))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            with mock.patch.object(queue._store, "find", wraps=queue._store.find) as look:
                late = pool.submit(queue.wait, "later", 0.1)
                eventually(lambda: look.called)
            queue.add_task("echo", task_id="later", in_memory=True)  # Another task, for which nobody waits.
            with self.assertRaisesRegex(TimeoutError, "later.*waiting"):
                late.result()

    def test_wait_for_a_repeating_task_ends_with_the_run_under_way_or_the_next(self):
        """Whenever it was called, and wherever updates move the due date meanwhile."""
        waits = row("s", repeat=timedelta(hours=1), due_date=timedelta(hours=5))
        sooner, later = (waits._replace(due_at=NOW + n * SECOND) for n in (0, 9 * 3600))
        runs = taskpool.claimed(sooner, "me|", NOW)
        ended = taskpool.after_run(runs, Outcome("s", 1, "done"), NOW)
        again = taskpool.after_run(taskpool.claimed(ended, "me|", NOW), Outcome("s", 2, "done"), NOW)
        requeued = taskpool.requeued(runs, NOW)
        for seen in (
            [runs, ended], [runs, requeued, runs._replace(claim=2), ended._replace(claim=2)], [waits, sooner, runs, ended],
            [waits, later, sooner, ended], [ended, again], [later, runs, ended], [runs, runs._replace(claim=2, due_at=NOW + 1)],
        ):
            with mock.patch.object(self.both._store, "find", side_effect=[[r] for r in seen]) as look:
                self.assertEqual((self.both.wait("s", PATIENCE)._row, look.call_count), (seen[-1], len(seen)))


# --- Stores --------------------------------------------------------------------------


def row(task_id="t", task_type="x", *, now=NOW, lane="", **options):
    return taskpool._make_row(now, task_type, task_id=task_id, lane=lane, **options)[0]


class TestPolicies(unittest.TestCase):
    """What stores and masters decide by, without either."""

    def test_no_two_tasks_of_one_id_have_one_instant_of_creation(self):
        first, second, third = (row("t", data=i) for i in range(3))
        waits = taskpool.after_add(first, second, "replace")[0]
        self.assertEqual(waits.created_at, NOW + 1)
        running = taskpool.claimed(first, "me", NOW)
        follows, told = taskpool.after_add(running, second, "replace")
        self.assertEqual((taskpool.after_add(follows, third, "replace")[1].created_at, told.created_at), (NOW + 2, NOW + 1))

    def test_what_cannot_be_read_of_a_setting_counts_as_not_set(self):
        counts = taskpool.read_counts('{"done": "x", "failed": 7, "later": null, "other": 1.5}')
        self.assertEqual(dict(counts), {"failed": 7})
        for text in (None, 5, b"x", "[]", "{", "null"):
            self.assertEqual(taskpool.read_counts(text)["done"], 0)
        for columns, expected in {
            ("x", 1, 2, 5, 9, b"x"): (0, 1, 2, 5, 9, None), (1, -5, 2, 0, 0, None): (1, None, None, None, 0, None),
            (0, 2.5, 0, 5, "", "{}"): (0, None, None, 5, 0, None),
        }.items():
            self.assertEqual(taskpool._readable_setting(columns)[:5], expected[:5])

    def test_a_claim_takes_in_order_what_fits_and_suspects_alone(self):
        costs = {"x": 0.25, "slow": 1.0}
        rows = {name: row(name) for name in "abc"}
        rows.update(slow=row("slow", "slow"), suspect=row("suspect")._replace(interrupted=1), bad=row("bad")._replace(retries="1"))
        for names, limit, taken, broken in (
            ("a b c", 0.5, "a b", ""), ("a b slow c", 1.4, "a b", ""), ("slow a", 1.0, "slow", ""), ("", 9, "", ""),
            ("suspect a", 9, "suspect", ""), ("a suspect b", 9, "a", ""), ("suspect a", 0.9, "", ""),
            ("bad a bad b", 0.25, "a", "bad"), ("bad a bad b", 0.5, "a b", "bad bad"), ("bad slow bad", 0.5, "", "bad"), ("bad", 1, "", "bad"),
        ):
            with self.subTest(candidates=names, limit=limit):
                got, failed = taskpool.choose([rows[name] for name in names.split()], costs, limit, NOW)
                self.assertEqual([r.id for r in got], taken.split())
                self.assertEqual([r.id for r, reason in failed if "column retries" in reason], broken.split())

    def test_the_end_of_a_run_is_told_of_the_very_task_that_ran(self):
        back, again = {"charged": False}, {"successor": taskpool._packed_row(row(now=NOW + 1))}
        for changes, state, options, expected in (
            ({}, "done", {}, "done"), ({"keep_result": 9}, "done", {}, "done"), ({}, "failed", {}, "failed"),
            ({}, "ready", {}, "waits"), ({}, "ready", back, "waits"), ({}, "running", {}, "running"), ({}, "removed", {}, "removed"),
            ({"repeat": "10"}, "done", {}, "repeats"), ({"repeat": "10"}, "failed", {}, "repeats"), ({"repeat": "10"}, "ready", {}, "waits"),
            ({"removed": 1}, "done", {}, "done"), ({"removed": 1}, "ready", {}, "failed"), ({"removed": 1}, "ready", back, "removed"),
            (again, "done", {}, "done"), (again, "ready", {}, "failed"), (again, "ready", back, "waits"),
        ):
            with self.subTest(changes=changes, state=state, **options):
                running = taskpool.claimed(row()._replace(**changes), "me", NOW)
                outcome = Outcome("t", 1, state, **options)
                led = taskpool.led_to(running, taskpool.after_run(running, outcome, NOW), outcome)
                self.assertEqual(led, expected)
                told = taskpool.Task(taskpool.as_told(running, led, outcome, NOW))
                self.assertEqual(told.state, "waiting" if led in ("waits", "repeats") else led)

    def test_what_is_added_after_a_cancel_follows_the_run_however_that_ends(self):
        """Until then the id is taken by what was added, not by the run; a remove() leaves it to the run."""
        runs, new = taskpool.claimed(row(retries=9), "me", NOW)._replace(successor=taskpool._packed_row(row(now=NOW + 5))), row(data=7)
        cancelled = taskpool.after_remove(runs, 2)
        self.assertEqual((cancelled.removed, taskpool.after_remove(cancelled), cancelled.successor), (2, cancelled, None))
        for if_exists in ("raise", "keep", "replace", "follow"):
            follows, told = taskpool.after_add(cancelled, new, if_exists)
            self.assertEqual((told.data, taskpool.after_add(follows, row(), "keep")), ("7", (None, told)))
            with self.assertRaises(DuplicateTask):
                taskpool.after_add(follows, row(), "raise")
            after = told._replace(claim=1)
            for state, charged in (("done", True), ("failed", True), ("ready", True), ("ready", False), ("removed", True)):
                outcome = Outcome("t", 1, state, charged)
                self.assertIsNone(taskpool.after_run(cancelled, outcome, NOW))
                self.assertEqual(taskpool.after_run(follows, outcome, NOW), after)
            self.assertEqual((taskpool.after_interruption(cancelled, NOW), taskpool.after_interruption(follows, NOW)), (None, after))
        with self.assertRaises(DuplicateTask):
            taskpool.after_add(taskpool.after_remove(runs), new, "raise")

    def test_what_became_of_a_task_counts_for_its_own_incarnation(self):
        before = row()
        runs, later = taskpool.claimed(before, "me", NOW), row(now=NOW + 1)
        for found, expected in (
            (None, "gone"), (before, ""), (runs, ""), (later, "replaced"), (before._replace(state="failed"), "failed"),
            (before._replace(state="done"), "done"), (later._replace(state="done"), "replaced"),
            (later._replace(state="running", successor=taskpool._packed_row(before)), ""),
            (later._replace(state="running", successor="x"), "replaced"),
            (runs._replace(state="scheduled", due_at=NOW + 9), ""), (runs._replace(state="scheduled", due_at=NOW + 9, repeat="9"), "repeated"),
            # Of a repeat only the end of a run, not an update(), nor a claim given back.
            (before._replace(due_at=NOW + 9, repeat="9"), ""), (runs._replace(state="scheduled", repeat="9"), ""),
        ):
            with self.subTest(found=found):
                self.assertEqual(taskpool.what_became(before, found), expected)

    def test_an_interruption_keeps_the_slot_and_the_sixth_in_a_row_ends_the_run(self):
        """CR-03, P3: the first only marks the task, five more were its own."""
        for repeat, state in ((None, "failed"), ("10000000", "scheduled")):
            stored = row(lane="me")._replace(repeat=repeat)
            for number in range(6):
                stored = taskpool.after_interruption(taskpool.claimed(stored, f"far{number}", NOW), NOW)
                if number < 5:
                    self.assertEqual((stored.due_at, stored.ready_at, stored.lane, stored.state, stored.attempt), (NOW, NOW, "", "ready", 0))
            self.assertEqual((stored.state, stored.interrupted, stored.due_at > NOW), (state, 0, repeat is not None))
            self.assertIn("Interrupted", stored.error)
            self.assertEqual((stored.started_at, stored.ended_at), (NOW, NOW))

    def test_no_run_began_before_its_claim_or_after_its_end_whatever_the_clocks_say(self):
        running = taskpool.claimed(row(keep_result=9), "me", NOW)
        for seconds, now, began in ((1e300, NOW + 5, NOW), (0.0, NOW + 5, NOW + 5), (0.0, NOW - 5, NOW - 5), (3e-6, NOW + 5, NOW + 2)):
            for state in ("done", "failed"):
                after = taskpool.after_run(running, Outcome("t", 1, state, seconds=seconds), now)
                self.assertEqual((after.started_at, after.ended_at), (began, now))


class StoreContract:
    """What every Store does. Subclasses say which, in open()."""

    OWNER = "me"

    def setUp(self):
        super().setUp()
        self.store = self.open()
        self.addCleanup(self.store.close)

    def add(self, *rows, if_exists="raise", now=NOW):
        return self.store.add([(r, if_exists) for r in rows], now)

    def claim(self, limit=10, types=("x",), now=NOW, owner=OWNER, **options):
        return self.store.claim(owner, types, limit, now, **options)

    def settle(self, claimed, state, owner=OWNER, now=NOW, **fields):
        outcome = Outcome(claimed.id, claimed.claim, state, **fields)
        return self.store.settle(owner, [outcome], now)[0]  # "": its claim was lost.

    def look(self, task_id="t", now=NOW):
        found = self.store.find(Query(ids=[task_id]), now)
        return found[0] if found else None

    def test_lists_for_people_go_page_by_page_newest_first_with_their_texts_cut(self):
        """Failed tasks: the last failure first."""
        self.add(*[row(f"t{n}", data="long", now=NOW + n % 3) for n in range(7)], row("other", "y"))
        pages, before = [], None
        while found := self.store.newest(Query(types=["x"], states=["waiting"]), 3, before, 4, NOW):
            pages.append([seen.row.id for seen in found])
            before = json.loads(json.dumps(found[-1].key))
            self.assertEqual({(seen.row.data, *seen.lengths) for seen in found}, {('"lon', 6, 0, 0)})
        self.assertEqual([len(ids) for ids in pages], [3, 3, 1])
        self.assertEqual(sorted(itertools.chain(*pages)), [f"t{n}" for n in range(7)])
        for number, claim in enumerate(self.claim(3, now=NOW + 9)):
            self.settle(claim, "failed", error="E" * (number + 1), seconds=1.0, now=NOW + 20 - number)
        found = self.store.newest(Query(states=["failed"]), 9, None, 2, NOW)
        self.assertEqual([(seen.row.error, seen.lengths[2]) for seen in found], [("E", 1), ("EE", 2), ("EE", 3)])
        found = self.store.newest(Query(states=["failed"]), 9, found[0].key, 2, NOW)
        self.assertEqual([seen.row.ended_at for seen in found], [NOW + 19, NOW + 18])
        self.assertEqual([seen.row.id for seen in self.store.newest(Query(ids=["other"]), 1, None, 0, NOW)], ["other"])

    def test_what_a_clock_that_was_ahead_made_ready_can_be_put_off(self):
        self.add(*[row(str(n), due_date=timedelta(seconds=9)) for n in range(3)])
        (first,) = self.claim(1, now=NOW + 9 * SECOND)
        self.settle(first, "done", now=NOW + 9 * SECOND)
        self.store.put_off(NOW)  # For those whose clock was not ahead.
        self.assertEqual(self.claim(owner="you"), [])
        self.assertEqual(self.store.next_due("you", ["x"], 1, NOW), [NOW + 9 * SECOND])
        self.assertEqual(len(self.claim(owner="you", now=NOW + 9 * SECOND)), 2)

    def test_an_owner_without_a_name_claims_no_task_twice(self):
        self.add(row())
        self.assertEqual((len(self.claim(owner="")), self.claim(owner="")), (1, []))

    def test_schedules_are_found_the_next_one_first(self):
        self.add(*[row(f"s{n}", repeat=timedelta(seconds=9), due_date=timedelta(seconds=3 - n)) for n in range(3)], row())
        self.assertEqual([it.id for it in self.store.schedules(2)], ["s2", "s1"])

    def test_a_claim_given_back_is_not_charged_and_its_number_is_used_up(self):
        self.add(row())
        (first,) = self.claim()
        self.assertEqual((first.state, first.attempt, first.owner, self.claim()), ("running", 1, "me", []))
        self.assertTrue(self.settle(first, "ready", charged=False))
        (second,) = self.claim()
        self.assertEqual((second.attempt, second.claim), (1, first.claim + 1))
        self.assertFalse(self.settle(first, "done"))
        self.assertFalse(self.settle(second, "done", owner="other"))
        self.assertTrue(self.settle(second, "done"))
        self.assertFalse(self.settle(second, "done"))
        self.assertIsNone(self.look())

    def test_a_kept_result_stays_until_it_expires(self):
        self.add(row(keep_result=10))
        self.settle(self.claim()[0], "done", result="[1]")
        self.assertEqual((self.look().state, self.look().result), ("done", "[1]"))
        self.add(row("ages", keep_result=1e300))  # CK-06: beyond every integer.
        self.assertTrue(self.settle(self.claim()[0], "done", result="[2]"))
        self.store.renew("me", NOW + 9 * SECOND)
        self.assertIsNotNone(self.look())
        self.store.renew("me", NOW + 10 * SECOND)
        self.assertIsNone(self.look())

    def test_settle_failed_keeps_it_and_retry_revives_it(self):
        self.add(row())
        self.settle(self.claim()[0], "failed", error="E: bad")
        self.assertEqual((self.look().state, self.look().error), ("failed", "E: bad"))
        self.assertEqual(self.claim(), [])
        for query in (Query(types=["y"]), Query(states=[]), Query(states=["waiting", "done"])):
            self.assertEqual(self.store.retry(query, NOW), 0)
        self.assertEqual(self.store.retry(Query(ids=["t"]), NOW), 1)
        (again,) = self.claim()
        self.assertEqual((again.attempt, again.error), (1, None))

    def test_settle_ready_starts_again_at_its_time_and_keeps_the_due_date(self):
        self.add(row())
        (first,) = self.claim()
        self.settle(first, "ready", ready_at=NOW + SECOND, error="E: once")
        self.assertEqual(self.claim(), [])
        self.assertEqual(self.store.next_due("me", ["x"], 5, NOW), [NOW + SECOND])
        (second,) = self.claim(now=NOW + SECOND)
        self.assertEqual((second.attempt, second.due_at, second.claim), (2, NOW, first.claim + 1))
        self.assertEqual(second.error, "E: once")

    def test_one_settle_takes_many_outcomes_and_tells_them_apart(self):
        self.add(*[row(str(i)) for i in range(4)])
        a, b, c, d = self.claim()
        outcomes = [
            Outcome(a.id, a.claim, "done"), Outcome(b.id, b.claim + 1, "done"),
            Outcome(c.id, c.claim, "failed", error="E"), Outcome(d.id, d.claim, "removed"),
        ]
        self.assertEqual(self.store.settle("me", outcomes, NOW), ["done", "", "failed", "removed"])
        self.assertEqual([(r.id, r.state) for r in self.store.find(Query(), NOW)], [("1", "running"), ("2", "failed")])

    def test_a_turn_settles_claims_and_tells_what_comes_next(self):
        costs = {"x": 0.5, "y": 1.0}
        self.assertEqual(self.store.turn("me", [], costs, 1.0, 2, NOW)[:3], ([], [], []))
        self.add(row("a"), row("b"), row("c"), row("soon", "y", due_date=timedelta(seconds=5)))
        led, rows, due, _ = self.store.turn("me", [], costs, 1.0, 2, NOW)
        self.assertEqual((led, [r.id for r in rows]), ([], ["a", "b"]))
        self.assertLessEqual(due[0], NOW + 5 * SECOND)
        ends = [Outcome("a", 1, "done"), Outcome("b", 2, "done"), Outcome("b", 1, "failed", error="E")]
        led, rows, due, _ = self.store.turn("me", ends, costs, 0.5, 2, NOW, eager=True)
        self.assertEqual((led, [r.id for r in rows], due), (["done", "", "failed"], ["c"], [NOW + 5 * SECOND]))
        self.assertEqual(self.store.turn("me", [], costs, 1.0, 2, NOW, eager=True)[:3], ([], [], [NOW + 5 * SECOND]))
        later = NOW + 5 * SECOND
        self.assertEqual(self.store.turn("me", [Outcome("c", 1, "ready")], costs, 0.0, 0, later)[:3], (["waits"], [], []))
        self.assertEqual([r.id for r in self.store.turn("me", [], costs, 1.0, 2, later, NOW).rows], ["c"])
        self.assertEqual([r.id for r in self.store.turn("me", [], costs, 1.0, 2, later).rows], ["soon"])

    def test_a_report_is_recorded_and_ends_with_the_next_run(self):
        self.add(row(retries=1, keep_result=9))
        (first,) = self.claim()
        self.assertTrue(self.settle(first, "running", progress="[1,3,null]"))
        self.assertFalse(self.settle(first, "running", owner="other", progress="[9,9,null]"))
        self.assertEqual((self.look().state, self.look().progress, self.look().claim), ("running", "[1,3,null]", 1))
        self.settle(first, "ready", ready_at=NOW, progress="[2,3,null]")
        self.assertEqual((self.look().state, self.look().progress), ("ready", None))
        (second,) = self.claim()
        self.settle(second, "running", progress="[1,3,null]")
        self.settle(second, "ready", charged=False)
        self.assertIsNone(self.look().progress)
        (second,) = self.claim()
        self.store.remove(Query(ids=["t"]), NOW)
        self.assertTrue(self.settle(second, "running", progress="[3,3,null]"))  # It runs on.
        self.assertEqual(self.look().state, "running")
        self.settle(second, "done", result="1")
        self.add(row("u", keep_result=9))
        self.settle(self.claim()[0], "done", result="1", progress="[3,3,\"end\"]")
        self.assertEqual(self.look("u").progress, "[3,3,\"end\"]")

    def test_order_is_priority_then_age_then_insertion(self):
        """PR-01, PR-02, PR-04."""
        ranks = [(5, 0), (1, -2), (1, -1), (0, 0), (-1, -9)]
        for order in (ranks, ranks[::-1], ranks[2:] + ranks[:2]):
            self.add(*[row(f"{p} {age}", priority=p, now=NOW + age) for p, age in order])
            got = [r.id for r in self.claim()]
            self.assertEqual(got, [f"{p} {age}" for p, age in ranks])
            self.store.remove(Query(), NOW)
            for claimed in self.store.find(Query(), NOW):
                self.settle(claimed, "done")
        self.add(*[row(str(i)) for i in range(50)])
        self.assertEqual([r.id for _ in range(50) for r in self.claim(1)], [str(i) for i in range(50)])

    FLOOD = 2 * taskpool.PROMOTE_TASKS + 1

    def test_tasks_that_come_due_together_are_all_served_however_many(self):
        """A look makes no more than a part of them ready, so that it takes its time for none."""
        soon = timedelta(seconds=1)
        self.add(*[row(f"t{i}", due_date=soon) for i in range(self.FLOOD)])
        later = NOW + SECOND
        taken = []
        while self.store.next_due("me", ["x"], 1, later):
            got = self.claim(self.FLOOD, now=later)
            self.assertTrue(got)
            taken += got
        self.assertEqual(sorted(r.id for r in taken), sorted(f"t{i}" for i in range(self.FLOOD)))

    def test_a_map_of_many_types_is_served_like_one_of_few(self):
        types = [f"type {i:02}" for i in range(40)]
        self.add(*[row(t, t, priority=i % 7) for i, t in enumerate(types[::2])], row("foreign", "y", priority=99))
        self.add(row("mine", types[1], lane="me", priority=8), row("hers", types[3], lane="she", priority=9))
        self.add(row("soon", types[5], due_date=timedelta(seconds=5), priority=9))
        self.assertEqual((self.store.foreign(types, NOW), self.store.foreign([*types, "y"], NOW), self.claim(types=())), (["y"], [], []))
        self.assertEqual(self.store.next_due("me", types, 100, NOW), [NOW] * 21 + [NOW + 5 * SECOND])
        taken = self.store.claim("me", types, 100, NOW)
        self.assertEqual(taken[0].id, "mine")
        expected = sorted(range(20), key=lambda i: (-(i % 7), i))
        self.assertEqual([r.id for r in taken[1:]], [types[::2][i] for i in expected])
        (soon,) = self.store.claim("me", types, 100, NOW + 5 * SECOND)
        self.assertEqual(soon.id, "soon")

    def test_order_holds_across_types_and_lanes(self):
        for order in (1, -1):
            rows = [row(str(i), "xyz"[i % 3], lane=("", "me")[i % 2], priority=-i) for i in range(12)]
            self.add(*rows[::order])
            got = self.claim(12, ("x", "y", "z"))
            self.assertEqual([r.id for r in got], [str(i) for i in range(12)])
            self.assertTrue(all(self.settle(claimed, "done") for claimed in got))

    def test_only_due_tasks_are_claimed_and_a_clock_set_back_holds_back_nothing_that_was_due(self):
        self.add(row("now"), row("soon", due_date=timedelta(seconds=1), priority=9), row("second"))
        self.assertEqual([r.id for r in self.claim(1)], ["now"])
        self.assertEqual([r.id for r in self.claim(now=NOW - 3600 * SECOND)], ["second"])
        self.assertEqual(self.claim(now=NOW + SECOND - 1), [])
        self.assertEqual([r.id for r in self.claim(now=NOW + SECOND)], ["soon"])

    def test_the_limit_counts_shares(self):
        self.add(*[row(f"f{i}", "fast") for i in range(10)], row("s", "slow", now=NOW + 1))
        types = {"fast": 0.25, "slow": 1.0}
        self.assertEqual(len(self.claim(1.0, types, NOW + 1)), 4)
        self.assertEqual(len(self.claim(1.9, types, NOW + 1)), 6)  # The slow one does not fit.
        self.assertEqual([r.id for r in self.claim(1.0, types, NOW + 1)], ["s"])
        self.assertEqual(self.claim(0.0), [])

    def test_a_retry_stays_due_since_its_due_date(self):
        self.add(row(retries=1))
        self.settle(self.claim()[0], "ready", ready_at=NOW + SECOND, error="E: first", seconds=0.0)
        self.assertEqual(self.store.next_due("me", ["x"], 9, NOW, NOW), [NOW + SECOND])
        self.assertEqual(len(self.claim(now=NOW + SECOND, until=NOW)), 1)
        interrupted = taskpool.after_interruption(taskpool.claimed(row(), "me", NOW + SECOND), NOW + SECOND)
        self.assertTrue(taskpool.was_due(interrupted, NOW))

    def test_until_holds_back_what_is_due_later(self):
        self.add(row("old"), row("new", now=NOW + 5))
        self.assertEqual(self.store.next_due("me", ["x"], 9, NOW + 9, NOW), [NOW + 9])
        self.assertEqual([r.id for r in self.claim(now=NOW + 9, until=NOW)], ["old"])
        self.assertEqual(self.store.next_due("me", ["x"], 9, NOW + 9, NOW), [])
        self.assertEqual([r.id for r in self.claim(now=NOW + 9)], ["new"])

    def test_next_due_tells_what_can_start_now_and_next(self):
        self.assertEqual(self.store.next_due("me", ["x"], 3, NOW), [])
        self.add(row("a"), row("b"), row("c", due_date=timedelta(seconds=5)))
        self.add(row("y", "y", due_date=timedelta(seconds=1)))
        self.assertEqual(self.store.next_due("me", ["x"], 9, NOW), [NOW, NOW, NOW + 5 * SECOND])
        self.assertEqual(self.store.next_due("me", ["x", "y"], 2, NOW), [NOW, NOW])
        due = self.store.next_due("me", ["x", "y"], 9, NOW + 5 * SECOND)
        self.assertEqual([at <= NOW + 5 * SECOND for at in due], [True] * 4)

    def test_if_exists_decides_by_the_state_of_the_old_one(self):
        """SE-04."""
        self.add(row(priority=1))
        with self.assertRaisesRegex(DuplicateTask, "'t' is waiting"):
            self.add(row(priority=2))
        (kept,) = self.add(row(priority=3), if_exists="keep")
        self.assertEqual((kept.priority, self.look().priority), (1, 1))
        self.add(row(priority=4), if_exists="replace")
        self.assertEqual(self.look().priority, 4)
        (running,) = self.claim()
        with self.assertRaisesRegex(DuplicateTask, "'t' is running"):
            self.add(row())
        self.assertEqual(self.add(row(), if_exists="keep")[0].state, "running")
        self.settle(running, "failed", error="E")
        for if_exists in ("raise", "keep", "replace"):  # An ended one is always replaced.
            self.add(row(priority=5), if_exists=if_exists)
            self.assertEqual((self.look().state, self.look().priority), ("ready", 5))
            self.settle(self.claim()[0], "failed", error="E")
        self.assertEqual(self.store.count(Query(), NOW), 1)

    def test_the_number_of_a_claim_grows_over_all_tasks_of_an_id(self):
        """P2: the outcome of an old claim never fits a later task of the same id and owner."""
        self.add(row())
        numbers = []
        for ending in ("failed", "ready", "done"):
            (claimed,) = self.claim()
            numbers.append(claimed.claim)
            if ending == "done":
                self.add(row(), if_exists="replace")
            self.settle(claimed, ending, ready_at=NOW)
            if ending != "done":
                self.add(row(), if_exists="replace")
        (last,) = self.claim()
        self.assertEqual([*numbers, last.claim], [1, 2, 3, 4])
        self.assertFalse(self.settle(claimed, "done"))

    def test_replacing_a_running_task_makes_a_successor_in_place_of_its_retry(self):
        ends = {"state": "done"}, {"state": "failed", "error": "E"}, {"state": "ready", "ready_at": NOW}
        for end, repeat in itertools.product(ends, (None, timedelta(seconds=9))):
            self.add(row(repeat=repeat))
            (running,) = self.claim()
            self.add(row(priority=2), if_exists="replace")
            self.add(row(priority=3, due_date=timedelta(seconds=1)), if_exists="replace")
            self.settle(running, "ready", charged=False)  # It waits while its predecessor is requeued.
            (running,) = self.claim()
            self.assertEqual((running.priority, self.claim()), (1, []))
            self.assertTrue(self.settle(running, **end))
            found = self.look()
            self.assertEqual((found.state, found.priority, found.attempt, found.repeat), ("scheduled", 3, 0, None))
            self.assertEqual(self.store.remove(Query(ids=["t"]), NOW), 1)

    def test_what_follows_a_waiting_task_gives_it_the_data_and_what_follows_a_running_one_runs_once(self):
        self.add(row("t", data={"n": 1}, priority=3, due_date=timedelta(seconds=9)))
        for n in (2, 3):
            (told,) = self.add(row("t", data={"n": n}, priority=7, now=NOW + n), if_exists="follow", now=NOW + n)
        self.assertEqual(self.look(), told)
        self.assertEqual((told.data, told.priority, told.created_at, told.due_at), ('{"n":3}', 3, NOW, NOW + 9 * SECOND))
        (running,) = self.claim(now=NOW + 9 * SECOND)
        self.assertEqual(running.data, '{"n":3}')
        for n in (4, 5):
            (told,) = self.add(row("t", data={"n": n}, priority=n, now=NOW + n), if_exists="follow", now=NOW + n)
        self.assertEqual((told.data, told.priority, told.created_at), ('{"n":5}', 4, NOW + 4))
        self.settle(running, "ready", charged=False)  # Given back: what was added since does not touch it.
        self.add(row("t", data={"n": 6}), if_exists="follow")
        for data in ('{"n":3}', '{"n":6}'):
            (running,) = self.claim(now=NOW + 9 * SECOND)
            self.assertEqual((running.data, running.attempt), (data, 1))
            self.settle(running, "ready", ready_at=NOW)  # In place of its retry, and then without a follower.
        self.settle(self.claim()[0], "failed", error="E")
        self.assertEqual(self.add(row("t", "y"), if_exists="follow")[0].task_type, "y")
        with self.assertRaisesRegex(DuplicateTask, "'t' is of the type 'y'"):
            self.add(row("new"), row("t", "x"), if_exists="follow")
        self.assertEqual((self.store.count(Query(), NOW), self.look().task_type), (1, "y"))

    def test_what_has_expired_when_its_turn_comes_fails_and_a_retry_lifts_that(self):
        self.add(row("late", expires=4, priority=2), row("in time", expires=5), row("later", expires=5, due_date=timedelta(seconds=5)))
        then = NOW + 5 * SECOND
        got = {r.id: r for r in self.claim(now=then) + self.claim(now=then) + self.claim(now=then)}
        self.assertEqual({name: r.state for name, r in got.items()}, {"late": "failed", "in time": "running", "later": "running"})
        late = self.look("late")
        self.assertEqual((late.state, late.attempt, late.owner, late.error, got["late"].error), (
            "failed", 0, "", "Expired: due 2023-11-14 22:13:20.000+00:00, to be started within 4 s", late.error))
        self.assertEqual(self.store.retry(Query(), then), 1)
        (again,) = self.claim(now=then + 9)
        self.assertEqual((again.id, again.attempt, again.expires, again.error), ("late", 1, None, None))
        self.settle(got["in time"], "ready", ready_at=NOW, error="E: first", seconds=1, now=then)
        (failed,) = self.claim(now=then + 1)
        self.assertEqual((failed.error, self.look("in time").error), (failed.error, failed.error))
        self.assertRegex(failed.error, "(?s)^Expired: due .* within 5 s\n\nE: first$")

    def test_a_schedule_skips_the_slot_that_has_expired_and_a_successor_follows(self):
        self.add(row(repeat=timedelta(seconds=60), expires=5, retries=1))
        for _ in range(2):  # The error does not grow from slot to slot.
            (told,) = self.claim(now=self.look().due_at + 7 * SECOND)
            self.assertEqual((self.look(), told.state, told.attempt), (told, "scheduled", 0))
            self.assertRegex(told.error, "^Expired: due [^\n]* within 5 s$")
        self.assertEqual(told.ready_at, NOW + 120 * SECOND)
        (runs,) = self.claim(now=NOW + 121 * SECOND)
        self.assertEqual((runs.state, runs.attempt, runs.expires), ("running", 1, 5))
        self.add(row(data=[1], now=NOW + 121 * SECOND), if_exists="replace")
        self.settle(runs, "ready", charged=False)
        for state, data in (("failed", "{}"), ("running", "[1]")):
            (told,) = self.claim(now=NOW + 130 * SECOND)
            self.assertEqual((told.state, told.data), (state, data))

    def test_not_now_is_not_charged_and_keeps_its_reason(self):
        self.add(row(retries=1))
        later = {"charged": False, "seconds": 0.0, "ready_at": NOW + SECOND, "error": "Retry: busy"}
        self.settle(self.claim()[0], "ready", ready_at=NOW, error="E: first", seconds=0.0)
        self.store.leave("me", NOW)
        self.assertEqual(self.store.next_due("me", ["x"], 9, NOW, NOW - 1), [])
        for now in (NOW, NOW + SECOND):
            (running,) = self.claim(now=now)
            self.assertEqual(running.attempt, 2)
            self.assertEqual(self.settle(running, "ready", now=NOW, **later), "waits")
            found = self.look()
            self.assertEqual((found.state, found.attempt, found.ready_at, found.error, found.ended_at),
                             ("scheduled", 1, NOW + SECOND, "Retry: busy", None))
            for until, due in (NOW + SECOND - 1, []), (NOW + SECOND, [NOW + SECOND]):  # It is not due before.
                self.assertEqual(self.store.next_due("me", ["x"], 9, NOW, until), due)
        self.assertEqual(self.claim(now=NOW + SECOND, until=NOW), [])
        (running,) = self.claim(now=NOW + SECOND)
        self.add(row(data=[2]), if_exists="follow")
        self.assertEqual(self.settle(running, "ready", **later), "removed")
        self.assertEqual((self.look().data, self.look().state), ("[2]", "ready"))

    def test_update_moves_between_due_and_not_due(self):
        self.add(row(now=NOW - 5))
        self.store.update("t", {"due_at": NOW + 9, "ready_at": NOW + 9}, NOW)
        self.assertEqual(self.claim(), [])
        self.store.update("t", {"priority": 8}, NOW)
        (claimed,) = self.claim(now=NOW + 9)
        self.assertEqual(claimed.priority, 8)
        with self.assertRaisesRegex(ValueError, "running"):
            self.store.update("t", {"priority": 8}, NOW)

    def test_leave_gives_back_all_that_an_owner_holds_but_no_removed_task_and_forgets_no_successor(self):
        self.add(row("a"), row("b", lane="me"), row("c", lane="me", due_date=timedelta(1)))
        self.claim(1)
        self.store.leave("me", NOW)
        got = self.claim(owner="you", now=NOW + 90_000 * SECOND)
        self.assertEqual([(r.id, r.attempt) for r in got], [("a", 1), ("b", 1), ("c", 1)])
        self.add(row("removed"), row("replaced"))
        self.claim()
        self.store.remove(Query(ids=["removed"]), NOW)
        self.add(row("replaced", data={"new": 1}), if_exists="replace")
        self.store.leave("me", NOW)
        for data in ("{}", '{"new":1}'):
            (claimed,) = self.claim()
            self.assertEqual((claimed.id, claimed.data, claimed.attempt), ("replaced", data, 1))
            self.assertTrue(self.settle(claimed, "done"))

    def test_a_repeating_task_goes_back_to_waiting_for_its_next_slot(self):
        """DU-03: the end of the run and the next slot are one step."""
        self.add(row(repeat=timedelta(seconds=10), retries=1))
        (first,) = self.claim()
        self.assertTrue(self.settle(first, "done", now=NOW + 3 * SECOND, result="7"))
        self.assertFalse(self.settle(first, "done"))
        found = self.look()
        self.assertEqual((found.state, found.due_at, found.ready_at), ("scheduled", NOW + 10 * SECOND, NOW + 10 * SECOND))
        self.assertEqual((found.attempt, found.result, found.error, found.created_at), (0, "7", None, NOW))
        self.assertEqual(self.store.next_due("me", ["x"], 5, NOW), [NOW + 10 * SECOND])
        self.assertEqual(self.claim(now=NOW + 10 * SECOND - 1), [])
        (second,) = self.claim(now=NOW + 10 * SECOND)
        self.assertEqual((second.attempt, second.claim, second.result), (1, first.claim + 1, "7"))
        self.assertTrue(self.settle(second, "done", now=NOW + 10 * SECOND))  # Without a result, too.
        self.assertEqual((self.look().due_at, self.look().result), (NOW + 20 * SECOND, None))

    def test_missed_slots_are_made_up_by_one_run(self):
        """RC-07, RC-08, RC-11, RC-16."""
        day = 86_400 * SECOND
        self.add(row("interval", repeat=timedelta(seconds=60)), row("cron", repeat="* * * * *"))
        late = NOW + 4 * day + 7 * SECOND
        self.assertEqual(len(self.claim(now=late)), 2)
        for claimed in self.store.find(Query(), NOW):
            self.settle(claimed, "done", now=late, result="1")
            due = self.look(claimed.id).due_at
            self.assertTrue(late < due <= late + 60 * SECOND)
            self.assertEqual((due - claimed.due_at) % (60 * SECOND), 0)
        self.assertEqual(self.claim(now=late), [])

    def test_a_failed_run_keeps_the_schedule_and_its_error_until_one_succeeds(self):
        """RC-10, RC-12, CR-03."""
        self.add(row(repeat=timedelta(seconds=10), retries=1))
        self.settle(self.claim()[0], "ready", ready_at=NOW + SECOND, error="E: one")
        self.assertEqual((self.look().due_at, self.look().attempt), (NOW, 1))  # A retry of this slot.
        self.settle(self.claim(now=NOW + SECOND)[0], "failed", now=NOW + 2 * SECOND, error="E: two")
        found = self.look()
        self.assertEqual((found.state, found.due_at, found.attempt, found.error), ("scheduled", NOW + 10 * SECOND, 0, "E: two"))
        self.settle(self.claim(now=found.due_at)[0], "done", now=found.due_at, result="1")
        self.assertEqual((self.look().error, self.look().due_at), (None, NOW + 20 * SECOND))

    def test_a_task_tells_when_its_last_run_was_through_retries_repeats_and_requeues(self):
        def times():
            task = taskpool.Task(self.look())
            return tuple(at and (at - taskpool._datetime(NOW)).total_seconds() for at in (task.started_at, task.ended_at))

        def run(at, seconds, state, **fields):
            (claimed,) = self.claim(now=NOW + at * SECOND)
            self.assertEqual(times(), (at, None))
            if seconds is not None:
                self.settle(claimed, "running", now=NOW + at * SECOND, progress="[1]")
                fields["seconds"] = seconds
            self.settle(claimed, state, now=NOW + (at + 3) * SECOND, **fields)
            return times()

        self.add(row(repeat=timedelta(seconds=10), retries=1, keep_result=9))
        self.assertEqual(times(), (None, None))
        self.assertEqual(run(0, None, "ready", charged=False), (None, None))
        self.assertEqual(run(1, 2.5, "ready", error="E: one"), (1.5, 4))
        self.assertEqual(run(5, None, "ready", charged=False), (1.5, 4))
        self.assertEqual(run(6, 0.25, "done", result="1"), (8.75, 9))
        self.store.update("t", {"repeat": None}, NOW)
        self.assertEqual(run(10, 3.0, "failed", error="E: two"), (10, 13))
        self.store.retry(Query(), NOW + 14 * SECOND)
        self.assertEqual(times(), (10, 13))
        self.assertEqual(run(15, 1.0, "done", result="1"), (17, 18))
        self.add(row(keep_result=9))
        self.assertEqual(times(), (None, None))

    def test_a_clock_set_back_runs_no_slot_twice(self):
        """CK-01, CK-04, DU-08."""
        for repeat in (timedelta(seconds=60), "* * * * *"):
            self.add(row(repeat=repeat, now=NOW - NOW % (60 * SECOND), due_date=timedelta()))
            slots = []
            for offset in (0, -300_000, -3600 * SECOND, 0, 30 * SECOND):
                (claimed,) = self.claim(now=self.look().due_at)
                slots.append(claimed.due_at)
                self.settle(claimed, "done", now=claimed.due_at + offset, result="1")
            self.assertEqual([b - a for a, b in zip(slots, slots[1:])], [60 * SECOND] * 4)
            self.store.remove(Query(ids=["t"]), NOW)

    def test_align_has_schedules_follow_their_declarations(self):
        """Added, changed with or without another due date, in a run, kept after a remove(), and removed."""
        def align(seconds, now=NOW, **changes):
            self.store.align({"t": seconds and row(repeat=timedelta(seconds=seconds), now=now, **changes)}, now)
            return self.look()

        align(None), align(10)
        self.assertEqual(align(10, NOW + 5, retries=3)[:8], row(retries=3)[:8])
        self.settle(self.claim()[0], "done")
        soon = align(3, NOW + 4 * SECOND)
        self.assertEqual((soon.due_at, soon.state, soon.retries), (NOW + 6 * SECOND, "scheduled", 0))
        (running,) = self.claim(now=NOW + 7 * SECOND)
        align(None, NOW + 7 * SECOND), align(5, NOW + 8 * SECOND, priority=7)
        self.assertEqual(self.settle(running, "done", now=NOW + 8 * SECOND), "repeats")
        after = self.look()
        self.assertEqual((after.due_at, after.priority, after.claim), (NOW + 11 * SECOND, 7, 2))
        (running,) = self.claim(now=after.due_at)
        self.store.cancel("t", after.due_at)
        align(60, now=after.due_at + 1), align(60, now=after.due_at + 2)  # Does not take it back.
        self.assertEqual([*self.store.cancelled("me", ["t"])], [("t", 3)])
        self.assertEqual(self.settle(running, "ready", now=after.due_at + 3, charged=False), "removed")
        self.assertEqual((self.look().due_at, self.look().attempt), (after.due_at + 1, 0))
        self.assertIsNone(align(None))

    def test_a_cron_starts_at_its_next_time_and_follows_its_zone(self):
        zone_or_skip("Europe/Berlin")
        cron, now = Cron("30 2 * * *", "Europe/Berlin"), datetime(2024, 3, 30, 12, tzinfo=timezone.utc)
        self.add(row(repeat=cron, now=(now - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1)))
        for slot in first_runs(cron, now, 3):
            due = self.look().due_at
            self.assertEqual(taskpool._datetime(due), slot)
            self.settle(self.claim(now=due)[0], "done", now=due, result="1")

    def test_a_given_due_date_is_the_first_slot_also_after_a_requeue(self):
        for repeat in (timedelta(seconds=60), "0 0 * * *"):
            self.add(row(repeat=repeat, due_date=timedelta(seconds=5)))
            self.assertEqual(self.look().due_at, NOW + 5 * SECOND)
            self.settle(self.claim(now=NOW + 5 * SECOND)[0], "ready", charged=False)
            (again,) = self.claim(now=NOW + 7 * SECOND)
            self.assertEqual((again.due_at, again.attempt), (NOW + 5 * SECOND, 1))
            self.settle(again, "removed")

    def test_another_due_date_moves_one_run_of_a_schedule_and_no_later_slot(self):
        day = 86400 * SECOND
        slot = NOW // day * day + day
        # Brought forward, twice; put off, behind the next slot; with a rule of which it is the first slot.
        cases = (([NOW + 2, NOW + 1], None, slot), ([slot + day + 9], None, slot + 2 * day), ([slot + 5], str(9 * SECOND), slot + 5 + 9 * SECOND))
        for repeat in (timedelta(days=1), "0 0 * * *"):
            self.add(row(repeat=repeat, due_date=taskpool._datetime(slot)))
            for dates, rule, following in cases:
                before = self.look()
                for due_at in dates:
                    self.store.update("t", {"due_at": due_at, "ready_at": due_at, **({"repeat": rule} if rule else {})}, NOW)
                self.assertEqual(taskpool.what_became(before, self.look()), "")
                self.assertTrue(self.settle(self.claim(now=due_at)[0], "done", now=due_at))
                self.assertEqual((self.look().due_at, taskpool.what_became(before, self.look())), (following, "repeated"))
            self.store.remove(Query(ids=["t"]), NOW)

    def test_remove_or_cancel_during_a_run_ends_the_task_its_retries_and_repeats(self):
        for repeat, state in itertools.product((None, timedelta(seconds=10)), ("done", "failed", "ready", "removed")):
            self.add(row(repeat=repeat, keep_result=60))
            (running,) = self.claim()
            if state != "removed":
                self.assertEqual(self.store.remove(Query(ids=["t"]), NOW), 1)
                self.assertEqual(self.look().state, "running")
            self.assertTrue(self.settle(running, state, error="E"))
            self.assertIsNone(self.look())

    def test_cancel_removes_what_does_not_run_and_its_owner_finds_what_does(self):
        self.assertFalse(self.store.cancel("none", NOW))
        self.add(row("waits"), row("later", due_date=timedelta(hours=1)), row("kept", keep_result=9), row("fails"))
        rows = {r.id: r for r in self.claim()}
        self.settle(rows["kept"], "done", result="1"), self.settle(rows["fails"], "failed"), self.settle(rows["waits"], "ready")
        self.assertEqual([self.store.cancel(i, NOW) for i in ("waits", "later", "kept", "fails")], [True] * 4)
        self.assertEqual(self.store.find(Query(), NOW), [])
        ids = ["cancelled", "removed", "runs"]
        self.add(*[row(i, repeat=timedelta(seconds=9), retries=9) for i in ids])
        mine = {r.id: r for r in self.claim()}
        self.add(row("theirs"), row("theirs too"))
        self.assertEqual(len(self.claim(owner="other")), 2)
        self.store.remove(Query(ids=["removed"]), NOW)
        self.assertEqual([self.store.cancel(i, NOW) for i in ("cancelled", "cancelled", "theirs")], [True] * 3)
        self.store.remove(Query(ids=["cancelled"]), NOW)  # Does not take it back.
        self.assertEqual([*self.store.cancelled("me", [*ids, "theirs"])], [("cancelled", mine["cancelled"].claim)])
        self.assertEqual([*self.store.cancelled("other", ["theirs", "theirs too"])], [("theirs", 1)])
        self.settle(mine["cancelled"], "ready", charged=False), self.store.leave("other", NOW)
        self.assertEqual([r.id for r in self.store.find(Query(), NOW)], ["removed", "runs", "theirs too"])
        self.assertEqual([*self.store.cancelled("me", ids)], [])

    def test_a_task_removed_during_its_run_can_be_added_again(self):
        """if_exists="keep" does not keep what is about to go."""
        self.add(row(repeat=timedelta(seconds=10)))
        (running,) = self.claim()
        self.store.remove(Query(ids=["t"]), NOW)
        self.add(row(repeat=timedelta(seconds=99)), if_exists="keep")
        self.settle(running, "done", result="1")
        self.assertEqual((self.look().state, self.look().repeat), ("ready", "99000000"))

    def test_a_repeat_without_a_further_slot_ends_as_other_tasks(self):
        year_9999 = (datetime.max.replace(tzinfo=timezone.utc) - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1)
        for repeat in (timedelta.max, timedelta(days=400), "0 0 1 1 *"):
            for state, keep, left in (("done", None, None), ("done", 60, "done"), ("failed", None, "failed")):
                self.add(row(repeat=repeat, keep_result=keep, due_date=datetime(9999, 1, 1, tzinfo=timezone.utc)))
                (running,) = self.claim(now=year_9999)
                self.settle(running, state, now=year_9999, result="1", error="E")
                found = self.look()
                self.assertEqual(found and found.state, left)
                self.store.remove(Query(ids=["t"]), NOW)

    def test_add_is_all_or_nothing(self):
        self.add(row("b", priority=7))
        with self.assertRaises(DuplicateTask):
            self.store.add([(row("a"), "raise"), (row("b"), "replace"), (row("a"), "raise")], NOW)
        self.assertEqual([(r.id, r.priority) for r in self.store.find(Query(), NOW)], [("b", 7)])

    def test_a_turn_tells_that_more_could_start_now_than_there_is_room_for(self):
        """Or else a further worker would start late."""
        for eager in (False, True):
            for number, cost in (2, 1.0), (4, 0.5), (3, 1.0):
                with self.subTest(eager=eager, number=number, cost=cost):
                    self.add(*[row(f"{i}") for i in range(number)], row("later", due_date=timedelta(seconds=5)))
                    _led, claimed, due, _ = self.store.turn("me", [], {"x": cost}, number * cost - 1, 3, NOW, eager=eager)
                    left = number - len(claimed)
                    self.assertEqual(len(claimed), round((number * cost - 1) / cost))
                    self.assertEqual([at <= NOW for at in due], [*[True] * left, False])
                    self.store.leave("me", NOW)
                    self.store.remove(Query(), NOW)


class Gates:
    """Stores that know pauses and limits."""

    def gate(self, task_type="x", now=NOW, **changes):
        self.store.set_up([task_type], changes, now)

    def turn(self, outcomes=(), room=9.0, now=NOW, types=("x", "y"), owner="me"):
        """What a turn claims, and when more can start, without what is always told of free types."""
        turn = self.store.turn(owner, list(outcomes), dict.fromkeys(types, 0.1), room, 9, now, eager=True)
        return [r.id for r in turn.rows], turn.due

    def test_nothing_of_a_paused_type_is_claimed_or_due_and_after_its_end_all_is_in_order(self):
        self.add(row("a"), row("b", now=NOW + 1), row("y", "y"))
        self.gate(paused=1)
        self.assertEqual(self.turn(), (["y"], []))
        self.add(row("c", now=NOW + 2, priority=2), row("later", due_date=timedelta(seconds=1)))
        self.assertEqual(self.turn(now=NOW + SECOND), ([], []))
        paused = [name for name, it in self.store.settings().items() if it.paused]
        for due, ids in ((True, []), (False, ["a", "b", "c", "later"])):
            query = Query(due=due, paused=paused)
            self.assertEqual(sorted(r.id for r in self.store.find(query, NOW + SECOND)), ids)
            self.assertEqual(self.store.count(query, NOW + SECOND), len(ids))
        self.gate(paused=0)
        self.assertEqual(self.turn(now=NOW + SECOND), (["c", "a", "later", "b"], []))
        self.assertEqual(dict(self.store.settings()), {})

    def test_a_full_type_stands_in_nobodys_way_and_a_place_is_free_when_the_rows_say_so(self):
        self.gate(at_once=2)
        self.add(*[row(f"{i}", now=NOW - 9 + i, priority=9) for i in range(5)], row("y", "y"))
        self.assertEqual(self.turn(), (["0", "1", "y"], [taskpool.NEVER] * 3))
        self.assertEqual(self.turn(owner="you"), ([], [taskpool.NEVER] * 3))
        self.assertEqual(self.turn([Outcome("0", 1, "done")]), (["2"], [taskpool.NEVER] * 2))
        self.store.leave("me", NOW)  # Requeued: two places.
        self.assertEqual(self.turn(owner="you"), (["1", "2", "y"], [taskpool.NEVER] * 2))
        self.gate(at_once=1)
        self.assertEqual(self.turn([Outcome("1", 2, "ready", ready_at=NOW)], owner="you")[0], [])
        self.gate(at_once=None)
        self.assertEqual(self.turn()[0], ["1", "3", "4"])

    def test_a_limited_type_is_found_behind_what_may_not_start_and_in_every_lane(self):
        """While a cluster ends it starts what was due before, however much else there is."""
        self.gate(at_once=2)
        late = [row(f"late {i}", priority=9, now=NOW + 9) for i in range(5)]
        self.add(*late, row("mine", lane="me"), row("b", now=NOW + 1), row("c", now=NOW + 2), row("theirs", lane="you|"))
        self.assertEqual([r.id for r in self.claim(9, now=NOW + 9, until=NOW + 5)], ["mine", "b"])
        self.settle(self.look("mine"), "done", now=NOW + 9)
        self.assertEqual([r.id for r in self.claim(9, now=NOW + 9)], ["late 0"])
        self.assertEqual(self.store.count(Query(states=["waiting"]), NOW), 6)
        self.gate(at_once=None)
        self.assertEqual([r.id for r in self.claim(99, now=NOW + 9)], ["late 1", "late 2", "late 3", "late 4", "c"])

    def test_starts_are_spaced_by_the_rate_and_no_burst_follows_an_idle_time(self):
        self.gate(starts=10, period=SECOND)
        self.add(*[row(f"{i}", now=NOW - 9 + i) for i in range(5)], row("y", "y"))
        step = SECOND * 105 // 1000  # A start may come to its function a little late.
        self.assertEqual(self.turn(), (["0", "y"], [NOW + i * step for i in range(1, 5)]))
        self.assertEqual(self.turn(now=NOW + step - 1)[0], [])
        self.assertEqual(self.turn([Outcome("0", 1, "ready", charged=False)], now=NOW + step - 1)[0], [])
        self.assertEqual(self.turn(now=NOW + step)[0], ["0"])  # It counts again.
        # One that has read its clock before it waited for the store gives no start away.
        self.assertEqual(self.turn(now=NOW - SECOND), ([], [NOW + i * step for i in range(2, 6)]))
        self.assertEqual(self.turn(now=NOW + 2 * step - 1)[0], [])
        self.assertEqual(self.turn(now=NOW + 36_000 * step)[0], ["1"])
        self.assertEqual(self.turn(now=NOW), ([], [NOW + i * step for i in range(1, 4)]))  # A clock set back.
        self.assertEqual(self.turn(now=NOW + step)[0], ["2"])

    def test_another_rate_counts_at_once_and_the_same_one_again_lifts_no_spacing(self):
        slow, fast, now = {"starts": 1, "period": 25 * SECOND}, {"starts": 10, "period": SECOND}, NOW + SECOND
        self.gate(**slow)
        self.add(*[row(f"{i}", now=NOW + i) for i in range(3)])
        self.assertEqual(self.turn()[0], ["0"])
        self.gate(now=NOW - SECOND, **slow)  # By a clock that is behind, say.
        self.assertEqual(self.turn(now=NOW + 25 * SECOND)[0], [])
        self.gate(now=now, **fast)
        next_at = now + SECOND * 105 // 1000
        self.assertEqual(self.turn(now=now)[1][0], next_at)
        self.gate(now=now + 1, **slow)
        self.assertEqual(self.turn(now=next_at)[0], ["1"])
        self.assertEqual(self.turn(now=next_at + 25 * SECOND)[0], [])

    def test_starts_closer_than_50_ms_come_in_lumps_of_50_ms_at_most(self):
        self.gate(starts=100, period=SECOND)
        self.add(*[row(f"{i}") for i in range(250)])
        chance, starts, now = random.Random(1), collections.Counter(), NOW
        while now < NOW + 2 * SECOND:
            starts[now] += len(self.turn(room=chance.choice((0.5, 20.0)), now=now)[0])
            now += chance.choice((1000, 5000, 70_000))
        for first in starts:
            self.assertLessEqual(sum(n for at, n in starts.items() if first <= at < first + SECOND), 105)
        self.assertGreater(sum(starts.values()), 50)

    def test_limits_of_any_size_are_told_as_they_were_set_and_hold(self):
        most = taskpool.MAX_INT
        self.add(row("a"), row("b"))
        for changes in ({"at_once": most}, {"starts": most, "period": 1}, {"starts": 1, "period": most}):
            self.gate(**changes)
            setting = self.store.settings()["x"]
            self.assertEqual({name: getattr(setting, name) for name in changes}, changes)
        self.assertEqual(self.turn()[0], ["a"])
        self.assertEqual(self.turn(now=NOW + 3600 * SECOND)[0], [])

    def test_runs_are_added_up_for_ever(self):
        for _ in range(2):
            tally = taskpool.new_tally()
            for seconds, state, led, charged in (
                (0.01, "done", "done", True), (5.0, "failed", "failed", True), (9999.0, "ready", "waits", False), (0.02, "ready", "waits", True),
                (60.0, "ready", "removed", True), (None, "ready", "waits", False), (60.0, "ready", "removed", False), (0.0, "done", "removed", True),
            ):
                taskpool.count_run(tally, "x", Outcome("t", 1, state, charged, seconds=seconds), led)
            self.store.tally(tally)
            self.store.tally({})
        self.add(row("late", expires=1), row("later", expires=2))
        self.claim(now=NOW + 2 * SECOND)
        told = taskpool._told(self.store.settings(all_types=True)["x"])["runs"]
        self.assertEqual(told.pop("seconds_le"), {0.01: 4, 0.1: 6, 1.0: 6, 10.0: 8, 60.0: 12, 600.0: 12, 3600.0: 12})
        self.assertEqual(told, {"done": 4, "failed": 4, "later": 4, "retried": 2, "interrupted": 0, "expired": 1, "seconds": 2 * 10124.03})
        self.assertEqual(dict(self.store.settings()), {})

    def test_a_summary_counts_each_task_of_each_type(self):
        self.add(*[row(f"{n}", now=NOW + n) for n in range(3)], row("later", due_date=timedelta(seconds=5)), row("y", "y"))
        self.settle(self.claim(1)[0], "failed", error="E")
        self.claim(1)
        self.assertEqual([tuple(line) for line in self.store.summary(NOW + SECOND)], [
            ("x", 2, 1, 1, 1, 0, 1 - 2e-6, NOW + 5 * SECOND, 0), ("y", 1, 1, 0, 0, 0, 1.0, None, 0),
        ])


class InOrder:
    """Part of the contract of the stores here."""

    def test_what_has_expired_holds_up_nothing_and_500_at_once_are_set_aside(self):
        self.add(*[row(str(i), expires=1, priority=2) for i in range(1100)], row("good", due_date=timedelta(seconds=2)))
        got = [self.claim(1, now=NOW + 2 * SECOND) for _ in range(3)]
        self.assertEqual(([len(rows) // 500 for rows in got], sum(map(len, got))), ([1, 1, 0], 1101))
        self.assertEqual([(r.id, r.state) for r in got[2] if r.state != "failed"], [("good", "running")])
        self.assertEqual(self.store.count(Query(states=["failed"]), NOW), 1100)

    def test_tasks_added_together_keep_their_order_whenever_they_come_due(self):
        rows = [row(f"{i}")._replace(state="scheduled", due_at=NOW + 10 - i, ready_at=NOW + 10 - i) for i in range(5)]
        late = row("late")._replace(due_at=NOW + 50)
        self.add(*rows, late, row("last"))
        passed_over, then = self.claim(until=NOW), self.claim(now=NOW + 20, until=NOW + 20)
        self.assertEqual([r.id for r in passed_over], ["last"])
        self.assertEqual([r.id for r in then], [r.id for r in rows])
        self.assertEqual([r.id for r in self.claim(now=NOW + 60)], ["late"])

    def test_tasks_start_by_priority_and_age_however_they_came_there(self):
        """P5: added, changed, removed, come due and given back, in two types and two lanes."""
        chance, left, ages = random.Random(5), {}, itertools.count()
        for _ in range(300):
            kind = chance.choice(["add", "add", "add", "come due", "update", "remove", "claim"])
            some = chance.choice(list(left)) if left else None
            priority = chance.choice([1, 1, 1, 2, 0, -3])
            if kind in ("add", "come due"):
                age = next(ages) if kind == "add" else -next(ages)
                place = {"task_type": chance.choice("xy"), "lane": chance.choice(["", "me"])}
                new = row(f"{age}", now=NOW - 1000 + age, priority=priority, **place)
                if kind == "come due":
                    new = new._replace(state="scheduled", ready_at=NOW)
                self.add(new)
                left[new.id] = (-priority, new.created_at)
            elif kind == "update" and some is not None:
                self.store.update(some, {"priority": priority}, NOW)
                left[some] = (-priority, left[some][1])
            elif kind == "remove" and some is not None:
                self.store.remove(Query(ids=[some]), NOW)
                del left[some]
            elif kind == "claim":
                claimed = self.claim(chance.randrange(1, 9), ("x", "y"))
                self.assertEqual([r.id for r in claimed], sorted(left, key=left.get)[: len(claimed)])
                self.assertTrue(claimed or not left)
                for r in claimed:
                    back = chance.random() < 0.5
                    state = {"state": "ready", "charged": False} if back else {"state": "done"}
                    self.assertTrue(self.settle(r, **state))
                    if not back:
                        del left[r.id]
        self.assertGreater(next(ages), 100)


class Following:
    """Part of the contract of stores whose tasks can follow others."""

    LIVES = 150

    def follow(self, child, after=(), after_end=(), if_exists="raise"):
        return self.add(row(child, now=NOW + next(self.ages), after=list(after), after_end=list(after_end)), if_exists=if_exists)

    def test_a_slot_that_is_skipped_is_an_end_of_its_schedule(self):
        for room in (1, 9):
            self.ages = itertools.count()
            self.add(row("s", repeat=timedelta(seconds=9), expires=1), row("other", now=NOW + 1))
            self.follow("strict", after=["s"]), self.follow("any", after_end=["s"])
            got = [(r.id, r.state) for r in self.claim(room, now=NOW + 5 * SECOND)]
            self.assertIn(("s", "scheduled"), got)
            self.assertEqual([r.id for r in self.store.find(Query(held=True), NOW)], ["strict"])
            self.store.leave(self.OWNER, NOW), self.store.remove(Query(), NOW)

    def test_what_is_released_starts_in_its_place_among_those_added_with_it(self):
        self.add(row("first", now=NOW - 1))
        (first,) = self.claim()
        self.add(row("a"), row("b", after=["first"]), row("c"), row("d", after_end=["first"]))
        self.settle(first, "done")
        self.assertEqual([r.id for r in self.claim()], ["a", "b", "c", "d"])

    def test_what_follows_a_waiting_task_gives_it_its_predecessors_too(self):
        self.add(row("p"), row("q"), row("t", priority=3))
        for parent, held in ("p", ["p"]), ("q", ["p", "q"]):
            (told,) = self.add(row("t", data={"n": parent}, now=NOW + 1, after=[parent]), if_exists="follow")
            self.assertEqual((told.state, told.data, told.priority, told.created_at), ("held", f'{{"n":"{parent}"}}', 3, NOW))
            self.assertEqual((self.look(), sorted(bond.parent for bond in self.store.bonds(children=["t"]))), (told, held))
        self.add(row("t", data={"n": 4}), if_exists="follow")
        self.assertEqual((self.add(row("t", after=["t2"]), if_exists="keep")[0].data, self.look().state), ('{"n":4}', "held"))

    def told(self):
        """{id: [state, {predecessor: however it ends}]}"""
        told = {r.id: ["ready" if r.state == "scheduled" else r.state, {}] for r in self.store.find(Query(), NOW)}
        for bond in self.store.bonds(parents=list(told)):  # Nobody else has any.
            told[bond.child][1][bond.parent] = bool(bond.anyway)
        self.assertEqual(len(self.store.bonds(children=list(told))), sum(len(bonds) for _, bonds in told.values()))
        return told

    def test_whatever_happens_followers_do_what_the_manual_says(self):
        """Random lives against a model of the manual's table; what is cut short has not happened."""
        follow = self.store._follow

        def cut_short(*arguments):
            follow(*arguments)
            raise StoreError("cut short")

        for seed in range(self.LIVES):
            self.ages, chance, model = itertools.count(), random.Random(seed), Lives()
            for step in range(80):
                change, then = model.choose(chance, self), copy.deepcopy(model)
                cut = self.store.atomic and chance.random() < 0.2
                with mock.patch.object(self.store, "_follow", cut_short if cut else follow):
                    try:
                        change(then)
                        model = then
                    except StoreError:
                        self.assertTrue(cut)
                self.assertEqual(self.told(), model.tasks, (seed, step))
                self.assertEqual(self.store.count(Query(held=True), NOW), sum(state == "held" for state, _ in model.tasks.values()))
            self.store.leave(self.OWNER, NOW)
            self.store.remove(Query(), NOW)
            self.assertEqual((self.told(), self.store.bonds()), ({}, []))


class Lives:
    """What the manual says of tasks that follow others, in the simplest words."""

    def __init__(self):
        self.tasks = {}  # {id: [state, {predecessor: however it ends}]}
        # While they run: removed; cancelled; followed under their ids.
        self.removed, self.cancelled, self.succeeded = set(), set(), set()

    def ended(self, ids, how):
        """These have ended at the same time; a task that is removed is no longer there."""
        if how == "removed":
            for i in ids:
                self.tasks.pop(i, None)
        failed = []
        for i, (child, it) in itertools.product(ids, self.tasks.items()):
            if i in it[1] and (how != "failed" or it[1][i]):
                anyway = it[1].pop(i)
                if it[0] == "held" and how == "removed" and not anyway:
                    it[0] = "failed"
                    failed.append(child)
        for it in self.tasks.values():
            if it[0] == "held" and not it[1]:
                it[0] = "ready"
        if failed:
            self.ended(failed, "failed")

    def settled(self, ends):
        """The runs of these have ended: {id: (state, charged)}."""
        gone = []
        for i, (state, charged) in ends.items():
            if i in self.cancelled and state != "done":
                state = "failed" if i in self.succeeded else "removed"
            if state == "removed" or (i in self.removed and state != "done"):
                gone.append(i)
            elif state == "ready" and not (charged and i in self.succeeded):
                self.tasks[i][0] = "ready"
            else:
                if state == "done":
                    del self.tasks[i]
                if i in self.succeeded:
                    self.tasks[i] = ["ready", {}]
                elif state == "failed":
                    self.tasks[i][0] = "failed"
                self.ended([i], "done" if state == "done" else "failed")
                self.succeeded.discard(i)
            self.removed.discard(i), self.cancelled.discard(i)
        self.succeeded.difference_update(gone)
        self.ended(gone, "removed")

    def above(self, i):
        found, todo = set(), set(self.tasks[i][1])
        while todo:
            found |= todo
            todo = {p for j in todo for p in self.tasks[j][1]} - found
        return found

    def choose(self, chance, test):
        """A random change: it makes it in the store, and then in a model."""
        ids, store = sorted(self.tasks), test.store
        some = chance.sample(ids, min(len(ids), chance.choice([1, 1, 2])))
        others = [i for i in ids if i not in some]
        after, after_end = (chance.sample(others, min(len(others), chance.choice([0, 0, 1, 2, 3]))) for _ in range(2))
        wanted = {**{i: True for i in after_end if self.tasks[i][0] != "failed"}, **dict.fromkeys(after, False)}
        kind = chance.choice(["add", "add", "replace", "follow", "claim", "claim", "end", "end", "end", "remove", "cancel", "retry", "update", "free", "die"])
        state = self.tasks[some[0]][0] if some else ""
        rings = any(some[0] in {p, *self.above(p)} for p in wanted) if some else False
        ends = [(chance.choice(["done", "done", "failed", "ready", "removed"]), chance.random() < 0.7) for _ in range(2)]
        limit = chance.randrange(1, 4)
        there = self.tasks[some[0]][1] if some else {}
        joined = {**there, **{p: anyway and there.get(p, True) for p, anyway in wanted.items()}}

        def change(model):
            if kind == "add" or not some:
                new = f"t{next(test.ages)}"
                test.follow(new, after, after_end)
                model.tasks[new] = ["held" if wanted else "ready", wanted]
            elif kind in ("replace", "follow"):
                # What was given back by a run still has its successor.
                succeeds = state == "running" or (kind == "follow" and some[0] in self.succeeded)
                if rings or (succeeds and (after or after_end)):
                    return test.assertRaises(ValueError, test.follow, some[0], after, after_end, kind)
                test.follow(some[0], after, after_end, kind)
                model.removed.discard(some[0])
                if succeeds:
                    model.succeeded.add(some[0])
                else:
                    model.succeeded.discard(some[0])
                    bonds = joined if kind == "follow" and state != "failed" else wanted
                    model.tasks[some[0]] = ["held" if bonds else "ready", bonds]
            elif kind in ("update", "free"):
                bonds = row(some[0], after=after, after_end=after_end).after if kind == "update" else ()
                changes = {"after": bonds} if bonds or kind == "free" else {"priority": 2}
                if state not in ("ready", "held") or (rings and kind == "update"):
                    return test.assertRaises(ValueError, store.update, some[0], changes, NOW + 10**6)
                store.update(some[0], changes, NOW + 10**6)
                bonds = {} if kind == "free" else joined
                model.tasks[some[0]] = ["held" if bonds else "ready", bonds]
            elif kind == "claim":
                for r in test.claim(limit, now=NOW + 10**6):
                    test.assertEqual(self.tasks[r.id][0], "ready")
                    model.tasks[r.id][0] = "running"
            elif kind == "end":
                held = dict(zip(store.held_by(test.OWNER), ends))
                outcomes = [Outcome(r.id, r.claim, end, charged or end != "ready", NOW) for r, (end, charged) in held.items()]
                test.assertNotIn("", store.settle(test.OWNER, outcomes, NOW + 10**6))
                model.settled({o.id: o[2:4] for o in outcomes})
            elif kind == "die":
                store.leave(test.OWNER, NOW + 10**6)
                model.settled({i: ("ready", False) for i, it in self.tasks.items() if it[0] == "running"})
            elif kind == "remove":
                store.remove(Query(ids=some), NOW + 10**6)
                running = {i for i in some if self.tasks[i][0] == "running"}
                model.removed |= running
                model.succeeded -= set(some)
                model.ended([i for i in some if i not in running], "removed")
            elif kind == "cancel":
                test.assertEqual(store.cancel(some[0], NOW + 10**6), True)
                model.succeeded.discard(some[0])
                if state == "running":
                    model.cancelled.add(some[0])
                else:
                    model.ended(some[:1], "removed")
            elif kind == "retry":
                store.retry(Query(ids=some), NOW + 10**6)
                for i in some:
                    if self.tasks[i][0] == "failed":
                        model.tasks[i][0] = "held" if model.tasks[i][1] else "ready"
            return None

        return change


class Spoiled:
    """Stores in which others write: spoil() puts a value into the stored task "bad"."""

    def test_whatever_is_stored_no_verb_raises_and_the_others_run(self):
        """It becomes `failed` with the reason, also at the end of its run; it can be found, retried and removed."""
        now = NOW + 60 * SECOND
        for state, (column, value) in itertools.product(("ready", "running"), self.spoils()):
            with self.subTest(state=state, column=column, value=str(value)[:30]):
                self.add(row("bad", priority=9, keep_result=5), row("good", now=NOW + 1))
                claimed = self.claim(1) if state == "running" else []
                self.spoil(column, value)
                self.store.find(Query(), now), self.store.next_due("me", ["x"], 9, now)
                for held in claimed:
                    ends = (
                        lambda: self.settle(held, "done", result="1"), lambda: self.store.leave("me", now),
                        lambda: [self.store.recover("you", seconds, now) for seconds in (0.0, 99.0)],
                    )
                    ends[len(column + str(value)) % 3]()
                got = [r for limit in (1, 9, 1, 9) for r in self.claim(limit, now=now)]
                self.assertIn(("good", "running"), [(r.id, r.state) for r in got])
                self.store.next_due("me", ["x"], 9, now), self.store.foreign(["y"], now), self.store.owners()
                for task in map(taskpool.Task, self.store.find(Query(), now)):
                    repr(task), task.created_at, task.due_date, task.result, task.progress, task.repeat
                self.store.retry(Query(), now), self.store.renew("me", now), self.claim(now=now)
                self.store.add([(row("bad"), "replace")], now)
                self.store.leave("me", now)
                self.assertGreaterEqual(self.store.remove(Query(types=["x"]), now), 1)
            self.clear()

    def test_only_done_tasks_expire(self):
        self.add(row("bad"))
        self.spoil("kept_until", 1)
        self.store.renew("me", NOW)
        self.assertIsNotNone(self.look("bad"))

    def test_none_expires_whose_date_cannot_be_read(self):
        self.add(row("bad", keep_result=10))
        self.settle(self.claim()[0], "done", result="[1]")
        self.spoil("kept_until", "'2030-01-01'")
        self.store.renew("me", NOW + 99 * SECOND)
        self.assertIsNotNone(self.look("bad"))


class TestMemoryStore(Gates, InOrder, Following, StoreContract, unittest.TestCase):
    """The in-memory store keeps the contract."""

    def open(self):
        return MemoryStore()

    def entries(self):
        return sum(len(line.queue) + len(line.heap) for line in self.store._ready.values())

    def test_a_ctrl_c_in_the_midst_of_an_add_leaves_no_task_that_never_runs(self):
        class Interrupted(collections.deque):
            def append(self, row):
                raise KeyboardInterrupt

        self.store._arrived = Interrupted()  # inside
        with self.assertRaises(KeyboardInterrupt):
            self.add(row())
        self.store._arrived = collections.deque()  # inside
        self.assertEqual((self.look(), self.add(row()), self.claim()[0].id), (None, [row()], "t"))

    def test_changed_and_removed_tasks_leave_nothing_behind(self):
        for i in range(5000):
            self.add(row(str(i)))
            self.store.update(str(i), {"priority": 2}, NOW)
            self.store.remove(Query(ids=[str(i)]), NOW)
        self.assertLess(self.entries(), 3000)

    def test_a_look_for_what_is_due_passes_removed_tasks_once(self):
        self.add(*[row(str(i)) for i in range(900)])
        self.add(row("last"))
        self.store.remove(Query(ids=[str(i) for i in range(900)]), NOW)
        self.assertEqual(self.store.next_due(self.OWNER, ["x"], 1, NOW), [NOW])
        self.assertEqual(self.entries(), 1)


class TestSQLiteStore(Gates, InOrder, Following, Spoiled, StoreContract, InFolder):
    """The SQLite store keeps the contract, in a file."""

    def open(self):
        return SQLiteStore(self.folder / self.FILE)

    def test_an_index_serves_every_statement(self):
        """EXPLAIN of the constants: no scan of the table, no sorting (PF-01, MG-09)."""
        self.add(row())
        db = sqlite3.connect(self.folder / "tasks.db")
        self.addCleanup(db.close)
        by_id, masters = "sqlite_autoindex_taskpool_task_1", "sqlite_autoindex_taskpool_master_1"
        ready, scheduled, running = "taskpool_ready", "PRIMARY KEY .*taskpool_scheduled", "taskpool_running"
        served = {
            "_ERASE": by_id, "_WRITE": by_id, "_HELD_ROW": by_id, "_REMOVE": by_id, "_MARK": by_id, "_FINISH": by_id, "_BEGINNING": by_id,
            "_CLAIM": "PRIMARY KEY", "_READY": f"{ready}.*{running}", "_HEADS": f"PRIMARY KEY .*{ready}", "_PROMOTE": scheduled, "_DUE": scheduled[-18:],
            "_NEXT_DUE": f"{ready}.*{scheduled}", "_STARTABLE": f"{ready} .*taskpool_scheduled .*taskpool_scheduled ",
            "_HELD_BY": running, "_OWNERS": running, "_OPEN_LANE": f"{ready}.*taskpool_scheduled.*taskpool_aside",
            "_EXPIRE": "taskpool_aside", "_MASTERS": masters, "_LEAVE": masters, "_RUNNING": running, "_STUCK": "taskpool_after", "_CANCELLED_BY": running, "_GATES": "taskpool_gates",
            "_FOLLOWER": "taskpool_after", "_FOLLOWERS": "taskpool_after_child", "_UNBIND": "PRIMARY KEY .parent=. AND child=", "_REMOVED": by_id, "_SCHEDULES": "taskpool_repeating",
        }  # fmt: skip
        statements = {
            name: value for name, value in vars(taskpool).items()
            if isinstance(value, str) and re.match(r"\s*(SELECT|UPDATE|DELETE|WITH)\b", value)
            and name not in ("_TABLES", "_VERSION", "_SUMMARY", "_SETTINGS", "_EARLY")  # Not of tasks; of all tasks.
        }
        self.assertEqual(set(statements), set(served))
        for name, statement in statements.items():
            if name in ("_REMOVE", "_MARK", "_REMOVED"):  # The filters of the user follow.
                statement += " AND " + taskpool._where(Query(ids=["a"]), NOW)[0]
            statement = statement.format("state = ?")  # What _WRITE changes.
            named = re.findall(r":(\w+)", statement)
            values = dict.fromkeys(named, 0) if named else [0] * statement.count("?")
            plan = "\n".join(r[3] for r in db.execute("EXPLAIN QUERY PLAN " + statement, values))
            with self.subTest(statement=name, plan=plan):
                self.assertRegex(plan, re.compile(served[name], re.DOTALL))
                # Nothing is read through but what runs, and the first schedules. A UNION may sort what it has found: few.
                scans = re.findall(r"SCAN (?:TABLE )?taskpool_task\b(.*)", plan)
                self.assertEqual([scan for scan in scans if not re.search("taskpool_(running|repeating)", scan)], [])
                if "UNION SELECT" not in statement:
                    self.assertNotIn("TEMP B-TREE FOR ORDER", plan)

    def test_an_index_serves_every_list_for_people(self):
        """What fails is in its order; of what runs or is held there are few; all else is in the order of the table."""
        self.add(row())
        plans, select = [], self.store._select

        def explain(statement, values):
            plans.append("\n".join(line[3] for line in select("EXPLAIN QUERY PLAN " + statement, values)))
            return []

        with mock.patch.object(self.store, "_select", explain):
            for state, index in {"failed": "taskpool_aside", "running": "taskpool_running"}.items():
                self.store.rows(Query(states=[state]), NOW)
                self.assertIn(index, plans[-1])
            for query, plan in (
                (Query(states=["failed"]), "taskpool_aside"), (Query(states=["failed"], types=["x"]), "taskpool_aside"),
                (Query(states=["running"]), "taskpool_running"), (Query(held=True), "taskpool_aside"), (Query(ids=["t"]), "autoindex"),
                (Query(states=["waiting"]), r"(?s)(SCAN|PRIMARY KEY)(?!.*ORDER)"), (Query(), r"(?s)(SCAN|PRIMARY KEY)(?!.*ORDER)"),
            ):
                for before in (None, [5, 5]):
                    self.store.newest(query, 50, before, 200, NOW)
                    self.assertRegex(plans[-1], plan)
                    self.assertFalse(query.states == ["failed"] and "ORDER" in plans[-1], plans[-1])

    def test_what_cannot_be_the_file_is_a_store_error_with_the_path_and_the_real_reason(self):
        (self.folder / "text").write_text("this is not a database" * 100)
        cases = [
            (self.folder, " is a folder"), ("none/x.db", "folder .*none does not exist"),
            ("n" * 300, "too long|Invalid"), ("text", "not a database"),
        ]
        if os.name == "posix":
            os.mkfifo(self.folder / "fifo")
            for name, target in ("loop", "loop"), ("far", "none/x.db"), ("link", "."):
                os.symlink(target, self.folder / name)
            cases += [
                ("fifo", " is a device, pipe or socket"), (os.devnull, " is a device, pipe or socket"),
                ("text/x.db", "Not a directory"), ("loop", "Too many levels"), ("link", " is a folder"),
                ("far", "folder .*none does not exist"),
            ]
        for name, text in cases:
            path = self.folder / name
            queue = TaskQueue(path)  # Says nothing yet.
            for use in (lambda queue=queue: queue.add_task("x"), queue.find):
                with self.subTest(path=name), self.assertRaisesRegex(StoreError, text) as caught:
                    use()
                self.assertIn(str(path), str(caught.exception))

    @unittest.skipUnless(LINUX, "uses setuid and RLIMIT_NOFILE")
    def test_what_a_process_may_not_do_is_told_with_the_file_or_folder_and_what_is_read_only_can_be_looked_at(self):
        out = self.run_script(
            """
            import resource
            for folder, mode in ("free", 0o777), ("full", 0o555), ("shut", 0o600), ("read", 0o555):
                os.mkdir(folder)
                with TaskQueue(f"{folder}/tasks.db") as queue:
                    queue.add_task("x")
                os.chmod(f"{folder}/tasks.db", 0o444 if folder == "read" else 0o666)
                os.chmod(folder, mode)
            TaskQueue("free/hidden.db").count()
            os.chmod("free/hidden.db", 0)
            os.chmod("free/tasks.db", 0o444)
            os.chmod(".", 0o755)
            main(["list", "free/tasks.db", "--json"])  # Nobody, below, may find no more modules.
            if os.getuid() == 0:
                os.setgid(65534), os.setuid(65534)
            print("seen", main(["list", "read/tasks.db", "--json"]))
            def tell(path):
                try:
                    TaskQueue(path).add_task("x")
                except StoreError as error:
                    print(str(error).replace(os.getcwd(), ""))
            for path in "free/tasks.db", "free/hidden.db", "full/tasks.db", "full/new.db", "shut/tasks.db", "read/tasks.db":
                tell(path)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
            tell("free/new.db")
            """)
        shown, _, told = out.partition("seen 0\n")
        self.assertEqual(shown.count('"task_type": "x"'), 2, out)
        for line, words in zip(told.splitlines(), (
            "/free/tasks.db: .* is not writable", "/free/hidden.db: .* is not readable",
            "/full/tasks.db: .*; the folder /full is not writable", "/full/new.db: .*; the folder /full is not writable",
            "/shut/tasks.db: .*; Permission denied", "/read/tasks.db: .* is not writable", "/free/new.db: .*; Too many open files",
        )):
            self.assertRegex(line, words)
        self.assertEqual(told.count("\n"), 7, out)

    BAD = (
        "'x'", "x'ff00'", "CAST(x'ff41' AS TEXT)", "9e999", "-9e999", "9223372036854775807", "4611686018427387904",
        "1.5", "1e300", "'[[[['", f"'{'[' * 5000}'", "'{\"a\":1}'", "NULL", "-1",
    )  # fmt: skip

    def spoils(self):
        return itertools.product(taskpool._COLUMNS[2:], self.BAD)

    def spoil(self, column, value):
        with contextlib.suppress(sqlite3.IntegrityError):
            self.sql(f"UPDATE taskpool_task SET {column} = {value} WHERE id = 'bad'")

    def clear(self):
        self.sql("DELETE FROM taskpool_task")

    def test_a_row_that_cannot_be_run_fails_with_the_reason_and_can_be_retried_and_removed(self):
        """CR-08, SQ-05, TT-05: and the others run."""
        bad = {
            "priority": "x'ff'", "data": "CAST(x'ff41' AS TEXT)", "created_at": 2**60, "due_at": -(2**62), "ready_at": 2**62,
            "claim": 2**63 - 1, "attempt": 2**63 - 1, "interrupted": -1, "keep_result": "9e999", "timeout": -1.0,
            "retries": 1.5, "successor": "'x'", "repeat": "'[1]'",
        }  # fmt: skip
        self.add(*[row(column, due_date=timedelta(seconds=1), priority=9) for column in bad], row("good"))
        for column, value in bad.items():
            self.sql(f"UPDATE taskpool_task SET {column} = {value} WHERE id = ?", column)
            with self.subTest(column=column), self.assertRaisesRegex(ValueError, f"column {column}"):
                self.store.update(column, {"lane": ""}, NOW)
        got = [r for _ in range(3) for r in self.claim(50, now=NOW + SECOND)]
        self.assertEqual({r.id: r.state for r in got}, {**dict.fromkeys(bad, "failed"), "good": "running"})
        for column in bad:
            with self.subTest(column=column):
                self.assertIn(f"column {column}", self.look(column).error)
                query = Query(ids=[column])
                self.assertEqual((self.store.retry(query, NOW), self.store.remove(query, NOW)), (1, 1))

    def test_what_others_wrote_beside_the_tasks_holds_up_nobody(self):
        """Bonds with bytes in place of ids, settings and counts that are none."""
        self.add(row("a"), row("b"))
        self.sql("INSERT INTO taskpool_after VALUES ('a', x'00', 0), (x'00', 'a', 'x'), ('a', CAST(x'ff' AS TEXT), 1)")
        huge = json.dumps({"us": 10**400, "failed": -1})
        self.sql("INSERT INTO taskpool_type VALUES ('x', 'x', x'01', 'z', 9e999, 'q', ?)", huge)
        self.sql("INSERT INTO taskpool_type VALUES (x'00', 1, 1, 1, 1, 9223372036854775807, x'00')")
        queue = TaskQueue(self.store)
        self.assertEqual((queue.find(after="a"), queue.find(before="a")), ([], []))
        (x,) = (told for told in queue.types() if told["task_type"] == "x")
        self.assertEqual((x["at_once"], x["rate"], x["runs"]["seconds"], x["runs"]["failed"]), (None, None, 0, 0))
        got = self.claim()
        ends = [Outcome(r.id, r.claim, "failed", error="-") for r in got]
        self.assertEqual(self.store.settle("me", ends, NOW), ["failed"] * 2)
        self.assertEqual(self.store.remove(Query(ids=["a"]), NOW), 1)

    def test_a_plan_that_others_wrote_holds_up_nobody(self):
        self.add(row("a"), row("b"))
        got = self.claim()
        self.store.add([(row("a"), "replace")], NOW)
        packed = json.loads(self.sql("SELECT successor FROM taskpool_task WHERE id = 'a'")[0][0])
        wrong = {**packed, "expires": 10**400, "after": [["b", "a"]], "items": "x"}
        self.sql("UPDATE taskpool_task SET successor = ? WHERE id = 'a'", json.dumps(wrong))
        self.assertEqual(self.store.settle("me", [Outcome(r.id, r.claim, "done") for r in got], NOW), ["done"] * 2)
        self.assertIn("column expires", self.look("a").error)

    def test_what_a_trigger_ignores_is_not_taken_for_done(self):
        """A task whose claim is not recorded would run again and again."""
        self.add(row("a"), row("b"))
        for event, verb in {
            "UPDATE": lambda: self.claim(), "INSERT": lambda: self.add(row("c")), "INSERT ON": lambda: self.add(row("d"), row("e")),
        }.items():  # fmt: skip
            self.sql(f"CREATE TRIGGER quiet BEFORE {event.split()[0]} ON taskpool_task BEGIN SELECT RAISE(IGNORE); END")
            with self.assertRaisesRegex(StoreError, "trigger"):
                verb()
            self.assertEqual((self.store.retry(Query(), NOW), self.store.count(Query(states=["waiting"]), NOW)), (0, 2))
            self.sql("DROP TRIGGER quiet")
        self.sql("CREATE TRIGGER one BEFORE UPDATE ON taskpool_task WHEN NEW.id = 'a' BEGIN SELECT RAISE(IGNORE); END")
        (claim,) = self.claim()
        self.assertEqual(claim.id, "b")
        self.sql("DROP TRIGGER one")
        self.add(row("c", after=["b"]))
        self.sql("CREATE TRIGGER one BEFORE UPDATE ON taskpool_task WHEN NEW.id = 'c' BEGIN SELECT RAISE(IGNORE); END")
        with self.assertRaisesRegex(StoreError, "trigger"):
            self.settle(claim, "done")
        self.assertEqual(([b.parent for b in self.store.bonds(children=["c"])], self.look("b").state), (["b"], "running"))

    def test_a_trigger_that_ignores_the_end_of_one_run_holds_up_no_other(self):
        """That claim counts as lost. What a run leaves behind is written whole, or not at all."""
        for change, event, end in [
            ("DELETE", "OLD.id = 'a'", {"state": "done"}), ("UPDATE", "NEW.id = 'a'", {"state": "failed"}),
            ("INSERT", "NEW.id = 'a'", {"state": "done"}), ("UPDATE", "NEW.id = 'a'", {"state": "done"}),
        ]:  # fmt: skip
            with self.subTest(change=change):
                self.add(row("a"), row("b"), row("c"))
                rows = self.claim(2)
                if end["state"] == "done" and change != "DELETE":
                    self.add(row("a", data=2), if_exists="replace")
                self.sql(f"CREATE TRIGGER quiet BEFORE {change} ON taskpool_task WHEN {event} BEGIN SELECT RAISE(IGNORE); END")
                outcomes = [Outcome(r.id, r.claim, **end) for r in rows]
                led, claimed, *_ = self.store.turn("me", outcomes, {"x": 1.0}, 1.0, 1, NOW)
                self.assertEqual((bool(led[0]), led[1], claimed[0].id), (change == "INSERT", end["state"], "c"))
                self.sql("DROP TRIGGER quiet")
                left = self.look("a")
                self.assertEqual((left.state, left.data), ("ready", "2") if change == "INSERT" else ("running", "{}"))
                self.store.leave("me", NOW)
                self.store.remove(Query(), NOW)

    def test_a_turn_in_which_nothing_is_due_writes_nothing(self):
        """Or else each idle master would keep the disk busy."""
        self.add(row(due_date=timedelta(seconds=1)))
        with contextlib.closing(sqlite3.connect(self.folder / "tasks.db")) as db:
            before = db.execute("PRAGMA data_version").fetchone()
            self.assertEqual(self.store.turn("me", [], {"x": 1.0}, 1.0, 2, NOW).due, [NOW + SECOND])
            self.assertEqual(db.execute("PRAGMA data_version").fetchone(), before)

    def test_a_write_in_the_midst_of_a_write_of_its_thread_is_refused_and_spoils_nothing(self):
        """As that of a signal handler or a finalizer."""
        queue = self.queue()
        store, refused, added, points = queue._store, [], [], []

        def interrupted(real, *arguments):
            points.append(real)
            if points == [real]:  # Not in what the handler itself does.
                queue.count()  # Reading goes on.
                try:
                    added.append(queue.add_task("handler"))
                except StoreError as error:
                    refused.append(str(error))
            points.pop()
            return real(*arguments)

        for owner, name in ((store, "_is_current"), (store, "write_all"), (store, "take")):
            refused.clear()
            with mock.patch.object(owner, name, functools.partial(interrupted, getattr(owner, name))):
                queue.add_tasks([{"task_type": "x"}] * 20)
                store.claim("me|", ["x"], 20, int(time.time() * 1e6))
                self.assertEqual(store.count(Query(states=["running"]), 0), 20)
            self.assertRegex(refused[0], "signal handler")
            self.assertEqual((queue.count(task_type="x"), queue.count(task_type="handler")), (20, len(added)))
            queue.remove(task_type="x"), store.leave("me|", 0)
        with store._read_lock, contextlib.closing(store._reader.execute("SELECT 1")):
            self.assertEqual((queue.remove(task_type="handler"), queue.count()), (len(added), 0))

    def test_a_write_while_its_thread_makes_the_file_is_refused_at_once(self):
        """It would wait for itself, 30 s."""
        queue, refused, look = self.queue(), [], taskpool._version_of

        def interrupted(db, path):
            if db.in_transaction and not refused:
                for use in functools.partial(queue.add_task, "handler"), queue.count:
                    with self.assertRaisesRegex(StoreError, "signal handler"):
                        use()
                    refused.append(use)
            return look(db, path)

        for use, kept in ((queue.count, 0), (functools.partial(queue.add_task, "x"), 1)):
            with mock.patch.object(taskpool, "_version_of", interrupted):
                use()
            self.assertEqual((len(refused), queue.count()), (2, kept))
            refused.clear(), queue.close()
            for path in self.folder.glob("tasks.db*"):
                path.unlink()

    @unittest.skipUnless(LINUX and hasattr(os, "getuid") and os.getuid() == 0, "becomes another user")
    def test_to_look_as_another_user_leaves_no_file_that_stops_the_owner(self):
        """Also to watch: from before a master begins on."""
        source = """
            import os, sys
            from taskpool import main
            main(["status", "tasks.db", "--json"])  # Nobody, below, may find no more modules.
            os.setgid(65534), os.setuid(65534)
            main(["status", "tasks.db", "--json"])
            print("watching")
            sys.stdout.flush()
            main(["status", "tasks.db", "--json", "--watch"])
        """
        with self.queue() as queue:
            queue.add_task("x")
        for mode in (0o777, 0o755):
            os.chmod(self.folder, mode)
            watch = self.start(self.script(source))
            self.assertIn("watching\n", iter(watch.stdout.readline, ""))
            self.assertEqual(json.loads(watch.stdout.readline())["tasks"], queue.count())
            queue.add_task("x")  # It stays open.
            self.assertTrue(any(json.loads(line)["tasks"] == queue.count() for line in watch.stdout))
            watch.kill()
            watch.wait()
            self.assertEqual({path.stat().st_uid for path in self.folder.glob("tasks.db*")}, {0})
            queue.close()

    def test_a_program_that_closes_nothing_ends_without_a_warning(self):
        self.run_script(
            """
            queue = TaskQueue("tasks.db")
            queue.add_task("x")
            print(queue.count())
            """, flags=["-X", "dev"])
        self.assertEqual(self.stderr, "")
        self.assertEqual(sorted(f.name for f in self.folder.iterdir()), ["script.py", "tasks.db"])

    def test_eight_threads_add_and_claim_without_an_error(self):
        def work(number):
            for i in range(50):
                self.add(row(f"{number} {i}"))
                got.extend(self.claim(2, owner=f"o{number}"))

        got = []
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        got += self.claim(1000)
        self.assertEqual(len({r.id for r in got}), 400)
        self.assertEqual(len(got), 400)

    def test_a_master_that_is_seen_to_be_dead_is_recovered_at_once(self):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        start = taskpool._process_start(process.pid)
        dead = f"{taskpool._here()}|{process.pid}|{start}|abc"
        self.store.renew(dead, NOW)
        early = dead[:-3] + "early"  # It died before it could renew for the first time.
        self.add(row("run"), row("lane", lane=dead), row("early", lane=early))
        self.claim(1, owner=dead)
        self.assertEqual(self.store.recover("me", 0.0, NOW), [])
        self.assertEqual(self.look("run").state, "running")
        if not taskpool._here():
            self.skipTest("this system has no /proc to see a dead process by")
        process.kill()
        eventually(lambda: taskpool.owner_is_dead(dead))  # A zombie counts as dead.
        self.assertEqual(self.store.recover("me", 0.0, NOW), [])
        self.assertEqual((self.look("run").state, self.look("run").attempt), ("ready", 0))
        self.assertEqual((self.look("lane").lane, self.look("early").lane), ("", ""))

    def test_a_silent_master_is_recovered_after_its_lease(self):
        far = "elsewhere|1|1|abc"
        self.store.renew(far, NOW)
        self.add(row())
        (first,) = self.claim(owner=far)
        self.store.recover("me", 100.0, NOW)
        self.store.recover("me", 129.9, NOW)
        self.assertEqual(self.look().state, "running")
        self.store.renew(far, NOW)  # It lives: the lease starts again.
        self.store.recover("me", 131.0, NOW)
        self.store.recover("me", 160.9, NOW)
        self.assertEqual(self.look().state, "running")
        self.store.recover("me", 161.0, NOW)
        self.assertEqual((self.look().state, self.look().interrupted), ("ready", 1))
        self.assertFalse(self.settle(first, "done", owner=far))
        self.claim(owner="missed")  # Silent: it never renews.
        for seconds in (170.0, 199.9, 199.9, 229.8):  # The clock stood still: a look was missed.
            self.store.recover("me", seconds, NOW)
            self.store.recover("you", 0.0, NOW)  # Another observer, with a clock of its own.
        self.assertEqual(self.look().state, "running")
        self.store.recover("me", 229.9, NOW)
        self.assertEqual(self.look().state, "ready")
        self.store.leave(far, NOW)
        self.add(row("lane", lane=far))  # As it left.
        self.store.recover("me", 300.0, NOW)
        self.assertEqual(self.look("lane").lane, far)
        self.store.recover("me", 330.0, NOW)
        self.assertEqual(self.look("lane").lane, "")

    def test_an_interrupted_task_is_claimed_singly_and_the_fifth_time_fails(self):
        """P3: six starts in all, and its neighbours are not blamed."""
        seconds = 0.0

        def interrupt(owner):
            nonlocal seconds
            self.store.recover("me", seconds, NOW)
            seconds += 31
            return self.store.recover("me", seconds, NOW)

        for repeat, state in ((None, "failed"), (timedelta(seconds=10), "scheduled")):
            self.add(row("killer", repeat=repeat), row("neighbour"), row("third"))
            self.assertEqual(len(self.claim(2, owner="far0")), 2)
            self.assertEqual(interrupt("far0"), [])
            for number in range(1, 6):
                owner = f"far{number}"
                self.assertEqual([r.id for r in self.claim(9, owner=owner)], ["killer"])
                # Others are served meanwhile, but not a second one under suspicion.
                rest = [r.id for r in self.claim(9, owner=owner)]
                self.assertEqual(rest, ["third"] if number == 1 else [])
                if rest:
                    self.settle(self.look("third"), "done", owner=owner)
                ended = interrupt(owner)
            self.assertEqual([(r.id, r.state) for r in ended], [("killer", state)])
            self.assertIn("Interrupted", self.look("killer").error)
            (neighbour,) = self.claim(9)
            self.assertEqual((neighbour.id, neighbour.attempt, neighbour.interrupted), ("neighbour", 1, 1))
            self.settle(neighbour, "ready", ready_at=NOW)
            self.assertEqual(self.look("neighbour").interrupted, 0)  # A run ended: reset.
            self.store.remove(Query(), NOW)

    def test_reading_and_running_keep_what_another_version_stored(self):
        """TT-05: a state, a type and a column that this version does not know."""
        queue = self.queue()
        for task_id in ("state", "type", "good"):
            queue.add_task("unknown" if task_id == "type" else "echo", task_id=task_id)
        self.sql("ALTER TABLE taskpool_task ADD COLUMN colour TEXT")
        self.sql("UPDATE taskpool_task SET state = 'paused', colour = 'red' WHERE id = 'state'")
        self.cluster({"echo": echo}, queue).shutdown()
        self.assertEqual({t.id: t.state for t in queue.find()}, {"state": "paused", "type": "waiting"})
        self.assertEqual((queue.count(), queue.find(due=True, state="waiting")[0].id), (2, "type"))
        self.assertEqual((queue.retry(), queue.find_one(task_id="state").task_type), (0, "echo"))
        self.assertEqual(self.sql("SELECT state, colour FROM taskpool_task WHERE id = 'state'"), [("paused", "red")])

    def test_where_wal_is_impossible_it_works_with_one_warning(self):
        """SQ-07."""
        class NoWAL(sqlite3.Connection):
            def execute(self, statement, *values):
                return super().execute(statement.replace("journal_mode = WAL", "journal_mode"), *values)

        connect = functools.partial(sqlite3.connect, factory=NoWAL)
        with unittest.mock.patch("sqlite3.connect", connect), self.assertLogs("taskpool", "WARNING") as logs:
            queue = self.queue("plain.db")
            with self.cluster({"echo": echo}, queue) as cluster:
                self.assertEqual([cluster.submit("echo", i).result(PATIENCE) for i in range(5)], list(range(5)))
        warnings = [line for line in logs.output if "WAL" in line]
        self.assertEqual(len(warnings), 1)
        self.assertIn("plain.db: WAL is not possible here; journal mode is delete", warnings[0])

    def test_suspects_that_must_wait_for_one_hold_up_no_other_task(self):
        """P3: only one interrupted task at a time, however many are first in line."""
        self.add(*[row(f"suspect{i}", priority=9) for i in range(10)])
        self.assertEqual(len(self.claim(owner="dead")), 10)
        self.assertEqual(self.store.recover("me", 0.0, NOW), [])
        self.assertEqual(self.store.recover("me", 1e6, NOW), [])
        self.add(row("good"))
        self.assertEqual([r.id for r in self.claim(1)], ["suspect0"])
        self.assertEqual([r.id for r in self.claim(1)], ["good"])
        self.assertEqual([r.id for r in self.claim(1, owner="other")], ["suspect1"])

    def test_a_full_disk_is_called_so_however_many_tasks_are_added(self):
        """SQLite undoes the whole transaction then, and what was begun in it."""
        self.add(row())
        self.store._writer.execute("PRAGMA max_page_count = 20")
        for rows in ([row("big", data="x" * 10**6)], [row(f"r{i}", data="x" * 1000) for i in range(1000)]):
            with self.assertRaisesRegex(StoreError, "full"):
                self.add(*rows)
        self.assertEqual([r.id for r in self.store.find(Query(), NOW)], ["t"])
        self.add(row("small"))

    def test_a_master_that_enters_again_does_not_look_as_before(self):
        """P3: else an observer that was slow would take it for silent."""
        self.add(row())
        self.store.renew("far", NOW)
        self.assertEqual(self.store.recover("me", 0.0, NOW), [])
        self.store.leave("far", NOW)
        self.store.renew("far", NOW)
        self.claim(owner="far")
        self.store.recover("me", 31.0, NOW)
        self.assertEqual(self.look().state, "running")

    def test_a_repeat_that_cannot_be_read_is_set_aside_and_says_why(self):
        """A zone that this machine does not have, say."""
        bad = {"0": "repeat", "[1, 2, 3]": "repeat", "[0, 2]": "repeat", '["* * * * *"]': "repeat", '["0 0 30 2 *", "UTC"]': "never fires", '["@daily", "No/Where"]': "tzdata"}
        self.add(*[row(text)._replace(repeat=text) for text in bad], row("good", repeat="@daily", due_date=timedelta()))
        self.assertEqual({r.id: r.state for r in self.claim(20)}, {**dict.fromkeys(bad, "failed"), "good": "running"})
        for text, reason in bad.items():
            self.assertIn(reason, self.look(text).error)

    def test_user_tables_in_the_same_file_are_left_alone(self):
        """SM-03; an empty file is as good as none."""
        (self.folder / "empty.db").touch()
        self.assertEqual(self.queue("empty.db").add_task("x").state, "waiting")
        self.sql("CREATE TABLE task (id)"), self.sql("INSERT INTO task VALUES (1)")
        self.queue().add_task("x")
        self.assertEqual(self.sql("SELECT * FROM task"), [(1,)])


class TestOwnTransaction(InFolder):
    """connection=: the task exists if and only if the caller's transaction commits."""

    def setUp(self):
        super().setUp()
        self.tasks = self.queue()
        self.connection = self.connect()
        self.connection.execute("CREATE TABLE invoice (id)")

    def connect(self, name="tasks.db", **options):
        connection = sqlite3.connect(name if name == ":memory:" else self.folder / name, **options)
        self.addCleanup(connection.close)
        return connection

    def invoices(self):
        return [number for (number,) in self.sql("SELECT id FROM invoice")]

    def add(self, task_id, connection=None, **options):
        return self.tasks.add_task("mail", task_id=task_id, connection=connection or self.connection, **options)

    def ids(self):
        return [task.id for task in self.tasks.find()]

    def test_it_follows_the_transaction_also_in_a_file_without_our_tables(self):
        for end in ("rollback", "commit"):
            self.connection.execute("INSERT INTO invoice VALUES (1)")
            self.add("receipt")
            self.assertEqual(self.sql("SELECT count(*) FROM sqlite_master WHERE name = 'taskpool_task'"), [(0,)])
            getattr(self.connection, end)()
            committed = end == "commit"
            self.assertEqual((self.ids(), self.invoices()), (["receipt"], [1]) if committed else ([], []))
            if not committed:  # Now without the tables that find() made.
                self.tasks.close()
                self.connection.executescript("DROP TABLE taskpool_task; DROP TABLE taskpool_version")
        self.assertEqual(self.tasks.find_one().data, {})

    def test_it_begins_a_transaction_where_sqlite3_would(self):
        self.tasks.count()
        self.add("a")
        self.assertTrue(self.connection.in_transaction)
        self.assertEqual(self.ids(), [])
        self.connection.rollback()
        kinds = [({"isolation_level": "IMMEDIATE"}, True), ({"isolation_level": None}, False)]
        if sys.version_info >= (3, 12):
            kinds += [({"autocommit": True}, False), ({"autocommit": False}, True)]
        for number, (options, waits) in enumerate(kinds):
            with self.subTest(**options):
                connection = self.connect(**options)
                before = self.ids()
                self.add(f"kind {number}", connection)
                self.assertEqual(self.ids(), before if waits else [*before, f"kind {number}"])
                connection.commit()
                self.assertEqual(self.ids(), [*before, f"kind {number}"])

    def test_an_error_leaves_the_transaction_as_it_was(self):
        self.add("taken")
        self.connection.execute("INSERT INTO invoice VALUES (1)")
        many = [{"task_type": "mail", "task_id": i, "connection": self.connection} for i in ("a", "taken", "b")]
        with self.assertRaises(DuplicateTask):
            self.tasks.add_tasks(many)
        self.assertTrue(self.connection.in_transaction)
        self.connection.commit()
        self.assertEqual((self.ids(), self.invoices()), (["taken"], [1]))
        self.assertEqual(len(self.tasks.add_tasks(many[::2])), 2)
        self.assertEqual(self.add("a", if_exists="keep").id, "a")
        self.assertEqual(self.add("taken", if_exists="replace", priority=7).priority, 7)
        self.connection.commit()
        self.assertEqual(self.ids(), ["a", "b", "taken"])

    def test_it_waits_for_other_writers_in_every_mode(self):
        modes = [{}, {"isolation_level": None}, {"isolation_level": "EXCLUSIVE"}]
        modes += [{"autocommit": False}] if sys.version_info >= (3, 12) else []
        ended = threading.Event()

        def write():
            while not ended.is_set():
                self.tasks.remove(task_id=self.tasks.add_task("other").id)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for mode in modes:
                connection = self.connect(timeout=PATIENCE, **mode)
                for number in range(100):
                    self.add(f"{mode} {number}", connection)
                    connection.commit()
        finally:
            ended.set()
            writer.join()
        self.assertEqual(self.tasks.count(task_type="mail"), 100 * len(modes))

    def test_a_transaction_that_has_read_is_told_why_sqlite_does_not_wait_and_what_helps(self):
        """SQLITE_BUSY_SNAPSHOT, and SQLITE_BUSY at once."""
        self.tasks.count()
        other = self.connect(isolation_level=None)
        modes = [{}, {"isolation_level": None}] + [{"autocommit": False}] * (sys.version_info >= (3, 12))
        for mode, how in itertools.product(modes, ("wrote", "writes", "reads on")):
            with self.subTest(mode=mode, how=how):
                connection = self.connect(timeout=PATIENCE, **mode)
                if how != "reads on" and not connection.in_transaction:
                    connection.execute("BEGIN")
                tables = connection.execute("SELECT * FROM sqlite_master")
                rows = tables.fetchone() if how == "reads on" else tables.fetchall()
                self.assertTrue(rows)
                other.execute("BEGIN IMMEDIATE")
                other.execute("INSERT INTO invoice VALUES (1)")
                other.execute("COMMIT") if how != "writes" else None
                with self.assertRaisesRegex(StoreError, "tasks.db: database is locked; .* BEGIN IMMEDIATE .*Django"):
                    self.add("late", connection)
                tables.close()
                connection.rollback()
                other.execute("COMMIT") if how == "writes" else None
                if "autocommit" not in mode:
                    connection.execute("BEGIN IMMEDIATE")
                self.add("late", connection)  # Before it reads.
                connection.execute("SELECT * FROM invoice").fetchall()
                connection.rollback()
        self.assertEqual(self.ids(), [])

    def test_a_wait_for_another_writer_ends_by_the_connections_own_timeout_and_says_so(self):
        self.tasks.count()
        other = self.connect(isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for begin in ("", "BEGIN", "BEGIN IMMEDIATE"):
            connection = self.connect(timeout=0.1)
            if begin == "BEGIN":
                connection.execute(begin)
            connection.isolation_level = begin.partition(" ")[2]
            with self.assertRaisesRegex(StoreError, r"locked; another program writes, .* timeout .* 0\.1 s$"):
                self.add("late", connection)

    def test_the_factories_of_the_connection_do_not_matter_and_stay(self):
        factories = self.connection.row_factory, self.connection.text_factory = sqlite3.Row, bytes
        self.add("a", data={"text": "\u00e9"})
        self.assertEqual(self.add("a", if_exists="keep").data, {"text": "\u00e9"})
        self.assertEqual((self.connection.row_factory, self.connection.text_factory), factories)

    def test_a_cluster_runs_it_after_the_commit(self):
        with self.cluster({"mail": echo}, self.tasks):
            self.add("a", keep_result=60, data=[1])
            self.connection.commit()
            self.assertEqual(self.tasks.wait("a", PATIENCE).result, [1])
        with self.cluster({"mail": echo}, self.tasks, refresh_rate=3_600_000) as cluster:
            cluster.drain()
            self.add("b", self.connect(isolation_level=None), keep_result=60)  # Committed: seen at once.
            self.assertEqual(self.tasks.wait("b", PATIENCE).state, "done")

    def test_what_cannot_work_is_refused(self):
        self.tasks.count()
        elsewhere, closed, quiet = self.connect("other.db"), self.connect(), self.connect()
        closed.close()
        quiet.execute("PRAGMA query_only = 1")
        reader = sqlite3.connect(f"{(self.folder / 'tasks.db').as_uri()}?mode=ro", uri=True)
        self.addCleanup(reader.close)
        thread = concurrent.futures.ThreadPoolExecutor(1)
        foreign = thread.submit(sqlite3.connect, self.folder / "tasks.db").result()
        self.addCleanup(thread.shutdown)
        self.addCleanup(lambda: thread.submit(foreign.close))
        mixed = [{"task_type": "x", "connection": c} for c in (self.connection, self.connect())]
        for call, error, text in (
            (lambda: self.add("a", elsewhere), ValueError, r"connection is to .*other\.db; give one to .*tasks\.db"),
            (lambda: self.add("a", self.connect(":memory:")), ValueError, "connection is to memory"),
            (lambda: self.add("a", in_memory=True), ValueError, "connection is .*None"),
            (lambda: self.add("a", closed), StoreError, "tasks.db: Cannot operate on a closed"),
            (lambda: self.add("a", foreign), StoreError, "tasks.db: .* same thread"),
            (lambda: self.add("a", reader), StoreError, "tasks.db: .* readonly .*connection can only read"),
            (lambda: self.add("a", quiet), StoreError, "tasks.db: .* readonly .*connection can only read"),
            (lambda: self.add("a", mock.Mock()), TypeError, "connection is .*Connection .*Django: .*SQLAlchemy: "),
            (lambda: self.tasks.add_tasks(mixed), ValueError, "connection differs"),
            (lambda: self.cluster({"x": echo}).submit("x", connection=self.connection), TypeError, "connection"),
        ):
            with self.assertRaisesRegex(error, text):
                call()
        self.assertEqual(self.ids(), [])


class TestTheManualsOwnStore(StoreContract, unittest.TestCase):
    """The store that README shows keeps the contract."""

    def open(self):
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        source = next(b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "class DictStore" in b)
        self.assertLess(source.count("\n"), 45)
        names = {"__name__": "manual"}
        exec(source, names)
        return names["DictStore"]()


class TestAStoreWithAllThatTheManualNames(Gates, Following, StoreContract, unittest.TestCase):
    """With these primitives a store of one's own knows pauses, limits, counters and followers."""

    LIVES = 20

    def open(self):
        class Complete(type(TestTheManualsOwnStore.open(self))):
            has_bonds = has_settings = True

            def __init__(self):
                super().__init__()
                self.types, self.bound = {}, {}

            def settings(self, all_types=False):
                return {name: it for name, it in self.types.items() if all_types or taskpool.is_gate(it)}

            def change_setting(self, task_type, changes):
                self.types[task_type] = self.types.get(task_type, taskpool.Setting())._replace(**changes)

            def bonds(self, parents=None, children=None):
                return [b for b in self.bound.values() if b.parent in (parents or ()) or b.child in (children or ())]

            def followers(self, ids=None):
                return {b.child for b in self.bound.values() if ids is None or b.child in ids}

            def bind(self, add, drop):
                for bond in drop:
                    del self.bound[bond[:2]]
                for bond in add:
                    if not bond.anyway or bond[:2] not in self.bound:
                        self.bound[bond[:2]] = bond

        return Complete()

    def test_a_predecessor_is_added_without_a_look_at_those_that_are_there(self):
        self.add(row("a"), row("b"), row("t", after=["a"]))
        with mock.patch.object(self.store, "bonds", wraps=self.store.bonds) as bonds:
            self.store.update("t", {"after": row("t", after=["b"]).after}, NOW)
        self.assertNotIn("t", [i for call in bonds.call_args_list for i in call.kwargs.get("children", ())])
        self.assertEqual(len(self.store.bonds(children=["t"])), 2)

    def test_a_follower_that_another_writer_changes_at_that_moment_is_released_all_the_same(self):
        """Its bonds are gone by then: nothing else would release it."""
        write, refused = self.store.write, []
        for losses, held in ((1, []), (99, ["b"])):
            self.add(row("a"), row("b", after=["a"]))
            (first,) = self.claim()

            def write_late(old, new, losses=losses):
                if old is None or old.id != "b" or len(refused) == losses:
                    return write(old, new)
                return refused.append(new) or False

            refused.clear()
            with mock.patch.object(self.store, "write", write_late), contextlib.suppress(StoreError):
                self.settle(first, "done")
                self.assertEqual(held, [], "nothing was said")
            self.assertEqual([r.id for r in self.store.find(Query(held=True), NOW)], held)
            self.store.remove(Query(), NOW)


# --- MongoDB -------------------------------------------------------------------------

try:
    import mongomock
except ImportError:
    mongomock = None
try:
    import pymongo
    import pymongo.errors
except ImportError:
    pymongo = None
try:
    from bson import ObjectId
except ImportError:
    ObjectId = None

SECANTUS = "pip install --no-deps --only-binary=:all: secantusdb==0.6.0b17"
SERVER = shutil.which("secantusd-rs") or shutil.which("secantusd-rs", path=os.path.dirname(sys.executable))


class MongoServer:
    """A server that speaks MongoDB's protocol (SecantusDB: WiredTiger, one-node replica set)."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="taskpool-mongo-")
        self.port = 0
        self.start()

    def start(self):
        log = os.path.join(self.folder, "log")
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [SERVER, "--host", "127.0.0.1", "--port", str(self.port), "--storage-path", self.folder + "/data",
                 "--sync-on-commit", "--log-file-max", "32MB", "--cache-size", "256M", "--log-level", "WARNING"],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        said = eventually(lambda: re.search(r"listening on 127.0.0.1:(\d+)", Path(log).read_text()), "the server")
        self.port = int(said.group(1))

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def client(self, **options):
        options = {"serverSelectionTimeoutMS": 20_000, "heartbeatFrequencyMS": 500, "directConnection": True, **options}
        options.update(port=self.port, host="127.0.0.1")
        return pymongo.MongoClient(**options)


@unittest.skipUnless(pymongo and SERVER, f"needs a server and pymongo: {SECANTUS} && pip install pymongo")
class WithMongo(InFolder):
    """Tests that share one server; each has a collection of its own."""

    server = None
    numbers = iter(range(10**6))

    def setUp(self):
        super().setUp()
        if WithMongo.server is None:
            WithMongo.server = MongoServer()
            unittest.addModuleCleanup(WithMongo.server.close)
        self.client = self.server.client()
        self.addCleanup(self.client.close)
        self.collection = self.client.test[f"tasks{next(self.numbers)}"]
        # Unlike MongoDB, this server fails deletes from a collection that does not exist.
        self.client.test.create_collection(f"{self.collection.name}.masters")

    def uri(self):
        return f"mongodb://127.0.0.1:{self.server.port}"

    @staticmethod
    def on_mongo(source):
        """That script, with the collection of a test in place of a file."""
        store = "taskpool.MongoStore(pymongo.MongoClient(URI).test.NAME)"
        return "\n        import pymongo" + source.replace('TaskQueue("tasks.db")', f"TaskQueue({store})")

    def script(self, source, name="script.py"):
        return super().script(source.replace("URI", repr(self.uri())).replace("NAME", self.collection.name), name)

    def open(self):
        return taskpool.MongoStore(self.collection)

    def queue(self, collection=None):
        return TaskQueue(taskpool.MongoStore(self.collection if collection is None else collection))

    def proxy(self):
        proxy = Proxy(self.server.port)
        self.addCleanup(proxy.close)
        return proxy

    def counted(self, **options):
        """A store, and a function that tells which commands it has sent since the last time."""
        events = []

        class Listener(pymongo.monitoring.CommandListener):
            started = lambda self, event: events.append(event)  # noqa: E731
            succeeded = failed = lambda self, event: None

        client = self.server.client(event_listeners=[Listener()], **options)
        self.addCleanup(client.close)
        store = taskpool.MongoStore(client.test[self.collection.name])
        store.count(Query(), NOW)  # The indexes are there.
        events.clear()
        return store, lambda: [events.pop(0) for _ in list(events)]


class MongoContract(Following, Spoiled, StoreContract):
    """What holds for MongoStore on whatever has a Collection."""

    FLOOD = 600  # Documents.
    LIVES = 25

    test_a_dead_master = TestSQLiteStore.test_a_master_that_is_seen_to_be_dead_is_recovered_at_once
    test_a_silent_master = TestSQLiteStore.test_a_silent_master_is_recovered_after_its_lease
    test_an_interrupted_task = TestSQLiteStore.test_an_interrupted_task_is_claimed_singly_and_the_fifth_time_fails
    test_what_has_expired = InOrder.test_what_has_expired_holds_up_nothing_and_500_at_once_are_set_aside

    def open(self):
        return taskpool.MongoStore(self.collection)

    def raw(self, task_id="t"):
        return self.collection.find_one({"_id": task_id})

    def insert(self, task_id="m", **fields):
        """A document as the original's addTask makes it."""
        date = datetime.fromtimestamp(NOW // SECOND, timezone.utc)
        document = {
            "_id": task_id, "taskType": "x", "priority": 1, "data": {}, "createdAt": date, "onGoing": False,
            "dueDate": date, **fields,
        }
        self.collection.insert_one({k: v for k, v in document.items() if v is not ...})

    def pollable(self):
        """What the original's own cluster would start."""
        later = datetime.fromtimestamp(NOW // SECOND + 60, timezone.utc)
        return {d["_id"] for d in self.collection.find({"onGoing": False, "dueDate": {"$lte": later}}, {"_id": 1})}

    def test_the_originals_fields_are_written_for_a_meteor_application(self):
        self.add(row(data={"a": [1, 2.5, {"b": None}]}, priority=3, due_date=timedelta(0.5)))
        document = self.raw()
        self.assertEqual((document["taskType"], document["priority"], document["onGoing"]), ("x", 3, False))
        self.assertEqual(document["data"], {"a": [1, 2.5, {"b": None}]})
        created, due = (document[name].replace(tzinfo=timezone.utc) for name in ("createdAt", "dueDate"))
        self.assertEqual((created, due), (taskpool._datetime(NOW), taskpool._datetime(NOW + 43_200 * SECOND)))

    def test_data_come_back_exactly_also_those_that_a_document_cannot_hold(self):
        cases = [
            {"z": 1, "a": 1.0, "": [2**63 - 1, -(2**63), 2**31, -0.0, 1e300, True, None, "\0é😀"]}, None, 0, 1.0, "x", [], {},
            {"$set": {"a": 1}}, {"a": {"b.c": 1}}, {"a": [{"$x": {}}]}, {"_id": 7, "10": 1, "9": 2},
            ["long"] * 200_000,
        ]
        for value in cases:
            self.add(row(data=value))
            text = row(data=value).data
            self.assertEqual(self.look().data, text)
            (claimed,) = self.claim()
            self.assertEqual(claimed.data, text)
            self.settle(claimed, "failed", error="E")
            self.assertEqual(self.look().data, text)
            self.store.retry(Query(), NOW)
            for other in ({"$": 1}, {"plain": 1}, value):
                self.store.update("t", {"data": row(data=other).data}, NOW)
                self.assertEqual(self.look().data, row(data=other).data)
            self.assertEqual(self.store.remove(Query(), NOW), 1)

    def test_a_document_of_a_meteor_application_runs_and_is_removed(self):
        """SE-06, PR-04: seven fields, numbers as JavaScript writes them, or data left out."""
        soon = taskpool._datetime(NOW + SECOND)
        self.insert("Xq3vWhZp9LkTbRn2s", priority=1.0, data={"position": 1.0})
        self.insert("first", priority=8)
        self.insert("bare", data=..., priority=0.0)
        self.insert("soon", dueDate=soon)
        self.insert("other", taskType="y")
        self.assertEqual(self.store.next_due("me", ["x"], 9, NOW), [NOW] * 3 + [NOW + SECOND])
        self.insert("late", priority=5.0)
        self.assertEqual(self.store.count(Query(states=["waiting"]), NOW), 6)
        got = self.claim()
        self.assertEqual([r.id for r in got], ["first", "late", "Xq3vWhZp9LkTbRn2s", "bare"])
        self.assertEqual([r.data for r in got], ["{}", "{}", '{"position":1.0}', "{}"])
        self.assertEqual({type(r.priority) for r in got}, {int})
        self.assertTrue(all(self.raw(r.id)["onGoing"] for r in got))
        self.assertEqual(self.pollable(), {"soon", "other"})
        for claimed in got:
            self.assertTrue(self.settle(claimed, "done"))
        self.assertEqual({d["_id"] for d in self.collection.find()}, {"soon", "other"})
        self.assertEqual(self.store.foreign(["x"], NOW), ["y"])
        (claimed,) = self.claim(now=NOW + SECOND)
        self.assertEqual((claimed.id, claimed.due_at, claimed.retries), ("soon", NOW + SECOND, 0))

    def test_the_originals_poller_starts_nothing_that_runs_waits_for_a_retry_or_ended(self):
        self.add(row("waits"), row("later", due_date=timedelta(1)))
        for task_id, end in [
            ("failed", {"state": "failed", "error": "E"}), ("retry", {"state": "ready", "ready_at": NOW + 3600 * SECOND}),
            ("kept", {"state": "done", "result": "1"}), ("running", None),
        ]:
            self.add(row(task_id, "y", keep_result=60))
            (claimed,) = self.claim(types=["y"])
            if end:
                self.settle(claimed, **end)
        self.assertEqual(self.pollable(), {"waits"})
        self.store.retry(Query(), NOW)
        self.assertEqual(self.pollable(), {"waits", "failed"})

    def test_the_due_date_of_a_held_task_is_seen_and_the_originals_poller_starts_it_when_it_is_released(self):
        self.add(row("a"), self.follower("t", "a"), row("bound", after=[taskpool.Task(row("t"))]))
        due = self.raw("t")["dueDate"].replace(tzinfo=timezone.utc)
        self.assertEqual((due, self.pollable()), (taskpool._datetime((NOW + 1) // 1000 * 1000), {"a"}))
        self.settle(self.claim()[0], "done")
        self.assertEqual((self.pollable(), self.raw("t")["dueDate"].replace(tzinfo=timezone.utc)), ({"t"}, due))
        self.settle(self.claim(now=NOW + 1)[0], "failed", error="E")
        self.store.retry(Query(), NOW)
        self.assertEqual(self.pollable(), {"t"})

    def test_a_task_that_was_due_by_a_clock_ahead_waits_for_ours_but_not_once_it_has_another_date(self):
        """P6. So does run_due, whose clock may stand at a date to come."""
        later = NOW + 3600 * SECOND
        ends = {
            "requeued": lambda held: self.store.leave("far", later), "retried": lambda held: self.settle(held, "ready", ready_at=later, owner="far"),
            "failed": lambda held: self.settle(held, "failed", error="E", owner="far"),
        }
        for name, end in ends.items():
            self.add(row(due_date=timedelta(seconds=60)))
            end(self.claim(owner="far", now=later)[0])
            with self.subTest(end=name):
                due = [] if name == "failed" else [later]
                self.assertEqual((self.claim(), self.store.next_due("me", ["x"], 1, NOW)), ([], due))
                self.assertEqual([self.store.count(Query(due=True), now) for now in (NOW, later)], [0, len(due)])
                if due:
                    self.store.update("t", {"priority": 2}, NOW)
                    self.assertEqual((self.claim(), self.store.next_due("me", ["x"], 1, NOW)), ([], due))
                    self.store.update("t", {"due_at": NOW, "ready_at": NOW}, NOW)
                self.store.retry(Query(), NOW)
                self.assertEqual([r.id for r in self.claim()], ["t"])
            self.store.leave("me", NOW), self.store.remove(Query(), NOW)

    def test_what_a_meteor_cluster_left_on_going_is_recovered_after_the_lease(self):
        self.insert("left", onGoing=True)
        self.assertEqual(self.claim(), [])
        for seconds in (0.0, 29.9):
            self.store.recover("me", seconds, NOW)
            self.assertEqual((self.claim(), self.look("left").state), ([], "running"))
        self.store.recover("me", 30.0, NOW)
        (claimed,) = self.claim()
        self.assertEqual((claimed.id, claimed.attempt), ("left", 1))

    def test_a_document_that_is_unusable_fails_with_the_reason_and_the_others_run(self):
        """CR-08, TT-05."""
        date = datetime(2001, 2, 3)
        wrong = [
            ("priority", "high"), ("data", {"when": date}), ("taskType", 5), ("dueDate", "tomorrow"), ("createdAt", {"a": 1}),
            ("priority", 1.5), ("data", float("nan")),
            *[(field, n) for field in ("priority", "createdAt") for n in (1.797e308, -1e300, 2.0**63, float("inf"))],
        ]
        for number, (field, value) in enumerate(wrong):
            self.insert(f"bad {number}", **{field: value})
        self.insert("good")
        ours = {"taskpool.retries": "many"}, {"priority": -1e300}
        for number, change in enumerate(ours):
            self.add(row(f"ours {number}", priority=9))
            self.collection.update_one({"_id": f"ours {number}"}, {"$set": change})
        with self.assertLogs("taskpool", "ERROR") as logs:
            got = self.claim()
        states = [("good", "running"), ("ours 0", "failed"), ("ours 1", "failed")]
        self.assertEqual([(r.id, r.state) for r in got], states)
        self.assertIn("column retries holds 'many'", got[1].error)
        self.assertEqual(len(logs.output), len(wrong))
        failed = {r.id: r for r in self.store.find(Query(states=["failed"]), NOW)}
        self.assertEqual(len(failed), len(wrong) + 2)
        for number, (field, _) in enumerate(wrong):
            column = {"dueDate": "due_at", "createdAt": "created_at", "taskType": "task_type"}.get(field, field)
            self.assertIn(f"column {column} holds", failed[f"bad {number}"].error)
        self.assertEqual(self.pollable(), set())
        self.assertEqual(self.raw("bad 0")["priority"], "high")  # Nothing is lost.
        self.assertEqual(self.raw("bad 1")["data"]["when"].replace(tzinfo=None), date)
        self.assertEqual(self.claim(), [])
        self.store.retry(Query(ids=["bad 0"]), NOW)
        self.assertEqual([(r.id, r.state) for r in self.claim()], [("bad 0", "failed")])
        self.assertEqual(self.store.remove(Query(states=["failed"]), NOW), len(failed))

    BAD = ("x", -1e300, float("nan"), 2**63 - 1, ["x"], datetime(2001, 2, 3))

    def spoils(self):
        ours = "json", "seq", "promoted_at", "after", "followed"
        names = [name for name in (*taskpool._COLUMNS[2:], *ours) if name not in ("data", "task_type")]
        if self.faulty_kind is Faulty:  # mongomock adds to whatever it finds.
            names = [name for name in names if name not in ("claim", "attempt")]
        return [(n, v) for n, v in itertools.product(["data", *names], self.BAD) if n != "state"]

    def spoil(self, column, value):
        field = column if column in ("priority", "data") else f"taskpool.{column}"
        self.collection.update_one({"_id": "bad"}, {"$set": {field: value}})

    def clear(self):
        self.collection.delete_many({})

    def test_no_field_of_an_application_is_taken_for_ours(self):
        theirs = {
            "kept_until": 1, "owner": "Ann", "timeout": "5m", "progress": 0, "json": "no JSON", "state": "paid", "lane": "fast",
            "claim": "x", "attempt": 7, "repeat": 1, "successor": 1, "removed": 1, "ready_at": 0, "due_at": 0, "created_at": 1,
            "error": 5, "result": 5, "retries": "many", "interrupted": 9, "keep_result": "x", "seq": "x",
            **({"taskpool": "mine"} if self.TRANSACTIONS else {}),  # mongomock looks into a str.
        }  # fmt: skip
        soon = taskpool._datetime(NOW + SECOND)
        self.insert(dueDate=soon, **theirs)
        self.insert("odd", taskType="y", taskpool={"$x": 1})
        self.assertEqual([r.id for r in self.claim(types=["y"])], ["odd"])
        self.settle(self.look("odd"), "done")
        self.store.renew("me", NOW)
        self.assertEqual((self.claim(), self.store.recover("you", 0.0, NOW), self.store.recover("you", 99.0, NOW)), ([], [], []))
        (claimed,) = self.claim(now=NOW + SECOND)
        self.assertEqual((claimed.timeout, claimed.progress, claimed.attempt, claimed.data), (None, None, 1, "{}"))
        self.settle(claimed, "failed", error="E")
        theirs.pop("taskpool", None)
        self.assertEqual({name: self.raw("m")[name] for name in theirs}, theirs)

    def test_data_that_the_application_sets_count_always(self):
        for before, after in itertools.product(({"a": 1}, {"a.b": 1}, ["long"] * 200_000), ({"b": 2}, None, "x")):
            self.add(row(data=before))
            self.collection.update_one({"_id": "t"}, {"$set": {"data": after}})
            self.assertEqual(json.loads(self.look().data), after)
            (claimed,) = self.claim()
            self.assertEqual(json.loads(claimed.data), after)
            self.settle(claimed, "done")

    def test_a_task_is_named_by_an_id_whatever_the_documents_is(self):
        keys = [5, "5", 2.5, True, "", b"x", datetime(2001, 2, 3)] + ([ObjectId()] if ObjectId else [])
        for key in keys:
            self.insert(key)
        self.add(row("ours"))
        ids = [r.id for r in self.store.find(Query(), NOW)]
        self.assertEqual(len(set(ids)), len(keys) + 1)
        for task_id in ids:
            self.assertEqual([r.id for r in self.store.find(Query(ids=[task_id]), NOW)], [task_id])
            self.assertEqual(self.store.update(task_id, {"priority": 7}, NOW).priority, 7)
            with self.assertRaises(DuplicateTask):
                self.add(row(task_id))
        rows = self.claim(20)
        self.assertEqual({(r.id, r.priority) for r in rows}, {(i, 7) for i in ids})
        outcomes = [Outcome(r.id, r.claim, "failed", error="E") for r in rows]
        self.assertTrue(all(self.store.settle("me", outcomes, NOW)))
        self.assertEqual([self.store.retry(Query(ids=[i]), NOW) for i in ids], [1] * len(ids))
        self.assertEqual([self.store.remove(Query(ids=[i]), NOW) for i in ids], [1] * len(ids))

    def test_remove_and_leave_miss_nothing_that_changes_between_their_writes(self):
        store, faults = self.faulty()
        self.add(row(repeat=timedelta(seconds=9)))
        faults.before("delete_many", lambda: self.claim())
        self.assertEqual(store.remove(Query(ids=["t"]), NOW), 1)
        self.assertTrue(self.settle(self.look(), "done"))
        self.assertIsNone(self.look())
        self.add(row())
        store.claim("me", ["x"], 1, NOW)
        faults.before("update_one", lambda: self.add(row(priority=5), if_exists="replace"))
        store.leave("me", NOW)
        self.assertEqual((faults.left(), self.look().state, self.look().owner), (False, "ready", ""))

    def test_retry_counts_what_it_did(self):
        self.add(row("a"), row("b"), row("c"))
        for claimed in self.claim():
            self.settle(claimed, "failed", error="E")
        store, faults = self.faulty()
        faults.before("update_many", lambda: self.store.remove(Query(ids=["b"]), NOW))
        self.assertEqual(store.retry(Query(), NOW), 2)
        for claimed in self.claim():
            self.settle(claimed, "failed", error="E")
        faults.plan("delete_many", OSError("killed"), False)
        with self.assertRaises(StoreError):
            store.remove(Query(ids=["a"]), NOW)
        self.store.retry(Query(), NOW)  # Its run counts: it was not removed.
        self.settle(self.claim()[0], "failed", error="E")
        self.assertEqual(self.look("a").state, "failed")

    def test_an_index_of_the_application_that_forbids_a_task_is_named(self):
        self.collection.create_index([("taskType", 1)], name="one_of_each", unique=True)
        self.add(row("a"))
        for rows in ([row("b")], [row("c"), row("d")]):
            with self.assertRaisesRegex(StoreError, "one_of_each" if self.TRANSACTIONS else "taskType|Duplicate"):
                self.add(*rows)

    def follower(self, task_id, parents):
        return row(task_id, now=NOW + 1, after=[taskpool.Task(row(i)) for i in parents])

    def lives(self):
        """What can become of `c`, which follows `a` that runs and `p` that waits, and of those around it."""
        verbs = {
            f"{i} {how}": lambda store, i=i, how=how: store.settle("me", [Outcome(i, 1, how, error="E")], NOW)
            for i in "ab" for how in ("done", "failed")
        }
        for i in "acp":
            verbs[f"remove {i}"] = lambda store, i=i: store.remove(Query(ids=[i]), NOW)
            verbs[f"retry {i}"] = lambda store, i=i: store.retry(Query(ids=[i]), NOW)
        verbs["add"] = lambda store: store.add([(self.follower(*it), "raise") for it in ("db", "ed", "fc")], NOW)
        verbs["replace"] = lambda store: store.add([(self.follower("c", "bp"), "replace")], NOW)
        verbs["more"] = lambda store: store.update("c", {"after": self.follower("c", "bp").after}, NOW)
        verbs["free"] = lambda store: store.update("c", {"after": ()}, NOW)
        verbs["renew"] = lambda store: store.renew("you", NOW)
        verbs["leave"] = lambda store: store.leave("me", NOW)
        return verbs

    def half_removed(self, store):
        """By a process that dies before it has told anybody."""
        store, faults = self.faulty()
        written = {"taskpool.followed": "removed"}
        faults.now = lambda method: (LookupError("died") if self.collection.find_one(written) else None, False, None)
        with contextlib.suppress(StoreError):
            store.remove(Query(ids=["p"]), NOW)

    def check_followers(self, verbs, left):
        found = {document["taskpool"]["id"]: document["taskpool"] for document in self.collection.find()}
        states = collections.defaultdict(lambda: "done", {i: ours["state"] for i, ours in found.items()})
        for i, ours in found.items():
            bonds = ours.get("after", [])
            self.assertTrue("?" not in bonds and ours.get("followed", "yes") == "yes", (i, ours))
            self.assertEqual(bonds != [], ours["state"] == "held" or (bonds != [] and ours["state"] == "failed"), (i, ours))
            self.assertEqual([b for b in bonds if states[b[1:]] in (["done", "failed"] if b[0] == "*" else ["done"])], [], found)
            needs = {"c": "bp" if "replace" in verbs else "ap", "d": "b", "e": "d", "f": "c"}.get(i, "")
            if ours["state"] in ("ready", "scheduled") and "free" not in verbs:
                self.assertEqual([parent for parent in needs if states[parent] != "done"], [], (i, found))
        if "remove p" in verbs and not {"free", "replace", "retry c", "remove c"}.intersection(verbs):
            self.assertIn(states["c"], ["failed", *["held"] * (verbs[0] == "remove p" and left is not None)])
        if "a done" in verbs and "remove a" in verbs and left is None:
            self.assertEqual(states["c"], "held")  # It follows p, too: the work of a was done.

    def test_whatever_comes_in_the_midst_of_a_verb_no_follower_starts_too_early_or_never(self):
        """Before each of its commands another process makes a change; then or later this one may die, and others in its wake."""
        verbs = self.lives()
        others = {**verbs, "half remove p": self.half_removed}
        pairs = [(name, other) for name in verbs for other in others if name[0] not in "ab" or name[:2] != other[:2]]
        cases = [*itertools.product(pairs, [None]), *list(itertools.product(pairs, (0, 1, 3)))[::7]]
        for (name, other), left in cases[:: self.SOME]:
            for number in itertools.count():
                self.collection.delete_many({})
                store, faults = self.faulty()
                self.add(row("a"), row("b"))
                self.claim()
                self.add(row("p", due_date=timedelta(1)))
                self.add(self.follower("c", "ap"), self.follower("g", "p"), row("q", after_end=[taskpool.Task(row("g"))]))
                beside = self.open()

                def meanwhile(beside=beside, other=other):
                    with contextlib.suppress(ValueError):
                        others[other](beside)

                store.count(Query(), NOW)  # The indexes are there.
                faults.at(number, meanwhile, left)
                with self.subTest(verb=name, other=other, number=number, left=left):
                    with contextlib.suppress(ValueError, *[StoreError] * (left is not None)):
                        verbs[name](store)
                    was_last = faults.asked <= number
                    if was_last:
                        meanwhile()
                    for died_at in itertools.count():
                        faults.at(died_at, None, None if left is None else 0)
                        with contextlib.suppress(StoreError):
                            store.renew("far", NOW)
                            break
                    self.check_followers((name, other.replace("half ", "")), left)
                if was_last:
                    break

    def test_a_task_can_follow_documents_of_an_application(self):
        self.insert("m"), self.insert(5)
        queue = TaskQueue(self.store)
        queue.add_task("y", task_id="t", after="m", after_end="5")
        self.assertEqual([t.id for t in queue.find(before="t")], ["m", "5"])
        for claimed in self.claim():
            self.assertEqual(self.look().state, "held")
            self.settle(claimed, "done")
        self.assertEqual([r.id for r in self.claim(types=["y"], now=int(time.time() * 1e6))], ["t"])

    @mock.patch.object(taskpool, "_MOST_BONDS", 3)
    def test_a_task_that_follows_more_than_its_document_holds_is_refused(self):
        self.add(*[row(f"{i}") for i in range(5)], self.follower("t", "012"))
        for wrong in (
            lambda: self.add(self.follower("u", "0123")), lambda: self.add(row("v"), self.follower("u", "0123")),
            lambda: self.add(self.follower("t", "1234"), if_exists="replace"), lambda: self.store.update("t", {"after": self.follower("t", "3").after}, NOW),
        ):
            with self.assertRaisesRegex(ValueError, "after has 4 tasks; MongoDB holds at most 3 for one: give it tasks that follow parts"):
                wrong()
        self.store.update("t", {"after": self.follower("t", "12").after}, NOW)
        self.assertEqual((self.store.count(Query(), NOW), len(self.store.bonds(children=["t"]))), (6, 3))

    def each_claim(self, room, changes, action):
        """Claims of "far", with *action* before each of their commands, or after all: the store, and all rows that are claimed."""
        is_last = False
        for number in itertools.count():
            if is_last:
                break
            self.collection.delete_many({}), self.collection["masters"].delete_many({})
            (store, faults), self.store, self.rows = self.faulty(), self.open(), []
            self.add(*[row(f"{i}", now=NOW + i) for i in range(9)])
            if "at_once" in changes:
                self.take(self.store, "old", 1.0)  # What began before there was a limit.
            self.store.set_up(["x"], changes, NOW)
            store.renew("far", NOW), store.settings()
            faults.at(number, lambda: action(store))
            self.take(store, "far", room)
            is_last = faults.asked <= number
            if is_last:
                action(store)
            faults.at(0, None)
            yield store

    def take(self, store, owner, room, now=NOW + 10):
        self.rows += store.turn(owner, [], {"x": 1.0 if room == 1.0 else 0.1}, room, 9, now, eager=True).rows

    @mock.patch.object(taskpool, "COPY_SECONDS", 0.02)
    def test_a_pause_or_a_limit_holds_for_every_master_when_the_call_returns(self):
        settings = ({"paused": 1}, 0), ({"at_once": 1}, 1), ({"starts": 1, "period": 3600 * SECOND}, 1)
        for (changes, most), room, is_own in itertools.product(settings, (1.0, 9.0), (False, True)):
            before = set()

            def set_up(store):
                before.clear()
                (store if is_own else self.store).set_up(["x"], changes, NOW)
                before.update(r.id for r in self.store.find(Query(states=["running"]), NOW))

            for store in self.each_claim(room, {"paused": 0}, set_up):
                self.take(store, "far", room)
                ids = [r.id for r in self.rows]
                with self.subTest(changes=changes, room=room, is_own=is_own, before=before):
                    self.assertEqual(sorted(r.id for r in self.store.find(Query(states=["running"]), NOW)), sorted(ids))
                    self.assertLessEqual(len({*ids} - before), 0 if before and "at_once" in changes else most)

    def test_of_two_masters_that_claim_at_once_no_more_start_than_allowed_and_no_place_is_lost(self):
        settings = [({"at_once": most}, most) for most in (1, 2, 3)] + [({"starts": 10, "period": SECOND}, 1)]
        for (changes, most), room in itertools.product(settings, (1.0, 9.0)):
            for store in self.each_claim(room, changes, lambda store, room=room: self.take(self.store, "you", room)):
                running = [(r.owner, Outcome(r.id, r.claim, "done")) for r in self.rows]
                with self.subTest(changes=changes, room=room, running=running):
                    self.assertLessEqual(len(running), most)
                    for owner, outcome in running:
                        self.assertEqual({"far": store}.get(owner, self.store).settle(owner, [outcome], NOW), ["done"])
                    self.rows.clear()
                    self.take(store, "far", 9.0, NOW + 10 + SECOND // 9)  # Spacing: 105 ms.
                    self.assertEqual(len(self.rows), most)

    @mock.patch.object(taskpool, "COPY_SECONDS", 0.02)
    def test_a_rate_that_is_raised_while_a_start_is_reserved_counts_at_once(self):
        for room in (1.0, 9.0):
            slow, fast = ({"starts": n, "period": 25 * SECOND} for n in (1, 25))
            for number, store in enumerate(self.each_claim(room, slow, lambda store, fast=fast: self.store.set_up(["x"], fast, NOW))):
                before = len(self.rows)
                self.take(store, "far", 9.0, NOW + 2 * SECOND)
                with self.subTest(room=room, number=number):
                    self.assertEqual(len(self.rows), before + 1)
        self.collection.delete_many({}), self.collection["masters"].delete_many({})
        (store, faults), self.rows = self.faulty(), []
        self.add(row("a"), row("b")), self.store.set_up(["x"], slow, NOW)
        faults.before("update_one", lambda: self.take(self.store, "you", 1.0))
        store.set_up(["x"], fast, NOW)
        self.take(store, "far", 9.0, NOW + 11)
        self.assertEqual([r.id for r in self.rows], ["a"])  # That start counts.

    def test_whatever_others_wrote_for_a_type_or_a_master_its_tasks_start_and_no_limit_is_passed(self):
        """What cannot be read counts as not there, and the next write mends it."""
        bad = [*self.BAD, [{"a": 1}, "x"], {"0": 1}, {"$x": 1}, None]
        if self.TRANSACTIONS:  # mongomock knows neither.
            from bson.datetime_ms import DatetimeMS
            bad.append(DatetimeMS(8_640_000_000_000_000))
        else:
            bad = [value for value in bad if value == value]
        for field, value in itertools.product(("claims", "next_at", "counts", "beat"), bad):
            if (field, value) == ("next_at", taskpool.MAX_INT):
                continue  # That can be read: it shows that a clock was set back.
            self.collection.delete_many({}), self.collection["masters"].delete_many({})
            self.add(*[row(f"{i}", now=NOW + i) for i in range(4)])
            (store, you), now, tally = (self.open(), self.open()), NOW + SECOND, {"x": collections.Counter(failed=2)}
            store.set_up(["x"], {"at_once": 2, "starts": 10**6, "period": 1}, NOW)
            store.renew("me", NOW), you.renew("you", NOW)
            self.collection["masters"].update_many({}, {"$set": {field: value}})
            with self.subTest(field=field, value=str(value)):
                self.assertEqual([r.id for r in store.turn("me", [], {"x": 1.0}, 9.0, 9, now).rows], ["0", "1"])
                self.assertEqual([r.id for r in you.turn("you", [], {"x": 1.0}, 9.0, 9, now).rows], [])
                self.assertEqual(store.turn("me", [Outcome("0", 1, "done")], {"x": 1.0}, 0.0, 9, now).led, ["done"])
                self.assertEqual([r.id for r in you.turn("you", [], {"x": 1.0}, 9.0, 9, now + 2 * SECOND).rows], ["2"])
                store.tally(dict(tally)), you.tally(dict(tally))
                self.assertEqual(taskpool.read_counts(store.settings(all_types=True)["x"].counts)["failed"], 4)
                self.assertEqual([you.recover("you", seconds, now) for seconds in (0.0, 31.0)], [[], []])
                self.assertEqual(you.count(Query(states=["running"]), now), 1)  # A master that is silent is seen to be so.

    def test_of_two_masters_that_add_up_their_runs_at_once_no_count_is_lost_or_added_twice(self):
        def tally():
            return {name: collections.Counter(failed=1, us=10) for name in "xyz"}

        for number in range(4):
            self.collection["masters"].delete_many({})
            store, faults = self.faulty()
            faults.before("update_one", lambda: self.store.tally(tally()), skip=number)
            store.tally(tally())
            mine = tally()
            faults.plan("update_one", OSError("cut"), False, skip=1)
            with self.assertRaises(StoreError):
                store.tally(mine)
            store.tally(mine)
            counts = {name: dict(taskpool.read_counts(it.counts)) for name, it in self.store.settings(all_types=True).items()}
            self.assertEqual(counts, {name: {"failed": 2 + (number < 3), "us": 20 + 10 * (number < 3)} for name in "xyz"})

    def test_the_indexes_serve_the_claims_and_are_made_once(self):
        """PF-01, MG-09: a claim reads what is ready, of its types, in order, and nothing else."""
        for _ in range(2):
            self.open().next_due("me", ["x"], 5, NOW)
        found = {name: list(map(tuple, spec["key"])) for name, spec in self.collection.index_information().items()}
        place = [("taskpool.state", 1), ("taskpool.lane", 1), ("taskType", 1)]
        rank = [("priority", -1), ("taskpool.created_at", 1), ("taskpool.seq", 1)]
        self.assertEqual(found, {
            "_id_": [("_id", 1)], "taskpool_id": [("taskpool.id", 1)], "taskpool_ready": [*place, *rank],
            "taskpool_scheduled": [*place, ("taskpool.ready_at", 1)], "taskpool_running": [("taskpool.owner", 1)],
            "taskpool_kept": [("taskpool.kept_until", 1)], "taskpool_after": [("taskpool.after", 1)],
            "taskpool_followed": [("taskpool.followed", 1)],
        })
        store, faults = self.faulty()
        self.add(row("a"), row("b"), row("c", due_date=timedelta(1)), row("d", due_date=timedelta(seconds=1)))
        store.claim("me", {"x": 0.1, "y": 1.0}, 1.0, NOW)
        store.turn("me", [], {"x": 1.0}, 1.0, 1, NOW + SECOND)
        store.turn("you", [], {"x": 1.0}, 1.0, 1, NOW, eager=True)
        scans = [(a[0], o) for name, a, o in faults.calls if "sort" in o and "taskpool.id" not in a[0]]
        self.assertGreater(len(scans), 5)
        for selector, options in scans:
            states = selector["taskpool.state"]
            self.assertLessEqual({states} if type(states) is str else set(states["$in"]), {None, "ready", "scheduled"})
            self.assertEqual(list(selector)[:3], [name for name, _ in place])
            by_date = options["sort"] == [("taskpool.ready_at", 1)]
            self.assertTrue(by_date or options["sort"] == rank)
            if self.TRANSACTIONS:  # Both indexes begin so.
                self.assertEqual(options["hint"], "taskpool_scheduled" if by_date else "taskpool_ready")

    def test_a_result_that_no_document_holds_is_not_kept_and_says_so(self):
        self.add(row(keep_result=60))
        self.assertTrue(self.settle(self.claim()[0], "done", result='"' + "x" * 7_000_001 + '"'))
        found = self.look()
        self.assertEqual((found.state, found.result), ("done", None))
        self.assertIn("7,000,000 bytes", found.error)
        with self.assertRaisesRegex(ValueError, "data of 'big': over 7,000,000 bytes"):
            self.add(row("big", data="é" * 3_600_000))

    def test_what_is_no_collection_is_refused(self):
        for wrong in (None, "mongodb://localhost", 5, MemoryStore()):
            with self.assertRaisesRegex(TypeError, "pymongo Collection"):
                taskpool.MongoStore(wrong)

    # ---- Faults, one call at a time

    def faulty(self):
        """A store on a collection that can be told to fail, beside self.store."""
        faults = Faults()
        return taskpool.MongoStore(self.faulty_kind(self.collection, faults)), faults

    def test_whatever_the_driver_raises_is_a_store_error_that_names_the_collection(self):
        store, faults = self.faulty()
        self.add(row())
        query = Query(ids=["t"])
        for verb in (
            lambda: store.add([(row("u"), "raise")], NOW), lambda: store.claim("me", ["x"], 1, NOW),
            lambda: store.settle("me", [Outcome("t", 1, "done")], NOW), lambda: store.renew("me", NOW),
            lambda: store.recover("me", 0.0, NOW), lambda: store.leave("me", NOW), lambda: store.find(query, NOW),
            lambda: store.next_due("me", ["x"], 1, NOW), lambda: store.foreign(["y"], NOW), lambda: store.count(query, NOW),
            lambda: store.remove(query, NOW), lambda: store.retry(query, NOW), lambda: store.update("t", {"priority": 2}, NOW),
        ):
            faults.always = OSError("the network is gone")
            with self.assertRaisesRegex(StoreError, "tasks.*: OSError: the network is gone"):
                verb()
            faults.always = None
        self.assertEqual(len(store.claim("me", ["x"], 1, NOW)), 1)

    def test_an_end_that_was_recorded_although_the_driver_raised_is_not_taken_for_lost(self):
        """DU-07: settle is asked again with the same outcomes."""
        for applied in (True, False):
            for method in ("bulk_write", "delete_one", "update_one", "find"):
                store, faults = self.faulty()
                self.add(*[row(f"{i}", keep_result=60 if i == 1 else None) for i in range(5)])
                rows = store.claim("me", ["x"], 5, NOW)
                self.store.add([(row("3", priority=7), "replace")], NOW)
                self.store.remove(Query(ids=["4"]), NOW)
                outcomes = [
                    Outcome("0", rows[0].claim, "done"), Outcome("1", rows[1].claim, "done", result="1"),
                    Outcome("2", rows[2].claim, "failed", error="E"), Outcome("3", rows[3].claim, "done"),
                    Outcome("4", rows[4].claim, "ready"), Outcome("5", 1, "done"),
                ]
                faults.plan(method, OSError("cut"), applied)
                failures = 0
                while True:
                    try:
                        held = store.settle("me", outcomes, NOW)
                        break
                    except StoreError:
                        failures += 1
                        faults.always = OSError("still cut")
                        with self.assertRaises(StoreError):
                            store.settle("me", outcomes, NOW)
                        faults.always = None
                with self.subTest(method=method, applied=applied):
                    self.assertEqual(failures, not faults.left())
                    self.assertEqual(held, ["done", "done", "failed", "done", "failed", ""])
                    found = {r.id: (r.state, r.priority) for r in self.store.find(Query(), NOW)}
                    self.assertEqual(found, {"1": ("done", 1), "2": ("failed", 1), "3": ("ready", 7)})
                    self.assertEqual(store.settle("me", outcomes, NOW), [""] * 6)
                self.collection.delete_many({})

    def test_an_uncertain_end_of_a_task_that_was_recovered_is_lost(self):
        store, faults = self.faulty()
        self.add(row())
        (first,) = store.claim("me", ["x"], 1, NOW)
        faults.plan("delete_one", OSError("cut"), False)
        with self.assertRaises(StoreError):
            store.settle("me", [Outcome("t", first.claim, "done")], NOW)
        for seconds in (0.0, 30.0):
            self.store.recover("you", seconds, NOW)
        (second,) = self.claim(owner="you")
        self.assertEqual(store.settle("me", [Outcome("t", first.claim, "done")], NOW), [""])
        self.assertTrue(self.settle(second, "done", owner="you"))

    def test_a_turn_whose_claim_fails_tells_what_it_settled_and_claims_at_the_next(self):
        for applied in (False, True):
            store, faults = self.faulty()
            self.add(row("a"), row("b"), row("c"))
            a, b, _ = store.claim("me", ["x"], 3, NOW)
            outcomes = [Outcome("a", a.claim, "done"), Outcome("b", b.claim + 1, "done"), Outcome("b", b.claim, "ready")]
            faults.plan("find_one_and_update", OSError("cut"), applied)
            turn = store.turn("me", outcomes, {"x": 1.0}, 9.0, 4, NOW)
            self.assertEqual((faults.left(), *turn[:3]), (False, ["done", "", "waits"], [], [NOW]))
            turn = store.turn("me", [], {"x": 1.0}, 9.0, 4, NOW)
            self.assertEqual([(r.id, r.attempt) for r in turn.rows], [("b", 2)])
            self.assertFalse(any(store.settle("me", outcomes[::2], NOW)))
            faults.always = OSError("cut")
            with self.assertRaises(StoreError):
                store.turn("me", [Outcome("c", 1, "done")], {"x": 1.0}, 9.0, 4, NOW)
            faults.always = None
            self.assertEqual(store.turn("me", [Outcome("c", 1, "done")], {"x": 1.0}, 0.0, 0, NOW).led, ["done"])
            self.collection.delete_many({})

    def test_a_look_that_broke_off_is_made_again_and_that_of_another_hides_nothing(self):
        store, faults = self.faulty()
        self.add(row("t", due_date=timedelta(seconds=1)))
        store.settings()
        faults.plan("find", OSError("cut"), False)
        with self.assertRaises(StoreError):
            store.turn("me", [], {"x": 1.0}, 1.0, 1, NOW)
        for _ in range(2):
            self.assertEqual(store.turn("me", [Outcome("u", 1, "done")], {"x": 1.0}, 1.0, 1, NOW).due, [NOW + SECOND])
            self.assertEqual(store.next_due("me", ["y"], 1, NOW, NOW), [])

    def test_a_claim_that_was_made_although_the_driver_raised_is_given_back_uncharged(self):
        def claim(number):
            return store.claim("me", ["x"], limit, NOW)

        def turn(number):
            return store.turn("me", [], {"x": 1.0}, float(limit), 9, NOW, eager=number % 2 == 0).rows

        cases = itertools.product((claim, turn), ("update_many", "find", "find_one_and_update"), (1, 3), range(8))
        for verb, method, limit, number in cases:  # Which call of that method fails.
            store, faults = self.faulty()
            self.add(*[row(f"{i}") for i in range(3)])
            store.count(Query(), NOW)
            faults.plan(method, OSError("cut"), True, skip=number)
            with self.subTest(verb=verb.__name__, method=method, limit=limit, number=number):
                rows = []
                for number in range(8):
                    with contextlib.suppress(StoreError):
                        rows += verb(number)
                self.assertEqual(sorted((r.id, r.attempt) for r in rows), [(f"{i}", 1) for i in range(3)])
            self.collection.delete_many({})

    def test_a_claim_that_the_server_made_late_is_given_back_at_the_next_renewal(self):
        """And no other: one whose run goes on after a report is kept."""
        self.add(row(keep_result=9))
        self.store.renew("me", NOW)
        late = {"taskpool.state": "running", "taskpool.owner": "me", "taskpool.claim": 1, "taskpool.attempt": 1}
        self.collection.update_one({"_id": "t"}, {"$set": late})
        self.store.renew("me", NOW)
        (claimed,) = self.claim()
        self.assertEqual((claimed.attempt, claimed.claim), (1, 2))
        self.store.renew("me", NOW)
        self.assertTrue(self.settle(claimed, "running", progress="[1,2,null]"))
        self.store.renew("me", NOW)
        self.assertTrue(self.settle(claimed, "done", result="1"))

    def test_an_add_that_broke_off_tells_what_it_stored(self):
        store, faults = self.faulty()
        store._transactions = False  # As on a server that is alone.
        for applied, text in ((False, "nothing was stored"), (True, r"stored all the same: \['a', 'b'\]")):
            faults.plan("insert_many", OSError("cut"), applied)
            with self.assertRaisesRegex(StoreError, text):
                store.add([(row("a"), "raise"), (row("b"), "raise")], NOW)
        self.store.remove(Query(), NOW)
        faults.plan("insert_many", OSError("cut"), True, and_then=("find", OSError("cut")))
        with self.assertRaisesRegex(StoreError, "whether anything was stored is not known"):
            store.add([(row("a"), "raise")], NOW)
        self.assertEqual(store.add([(row("a", priority=5), "keep")], NOW)[0].priority, 1)

    def test_of_two_that_add_the_same_id_at_once_one_is_told(self):
        """MG-11: the other insert came between the look and the write."""
        store, faults = self.faulty()
        other = lambda: self.collection.find_one({"_id": "t"}) or self.add(row(priority=7))  # noqa: E731
        faults.before("insert_many", other)
        with self.assertRaises(DuplicateTask if self.TRANSACTIONS else StoreError) as caught:
            store.add([(row("s"), "raise"), (row(), "raise")], NOW)
        self.assertEqual(self.look("s") is None, self.TRANSACTIONS)
        self.assertEqual("stored all the same: ['s']" in str(caught.exception), not self.TRANSACTIONS)
        self.store.remove(Query(), NOW)
        faults.before("insert_many", other)
        self.assertEqual(store.add([(row(), "keep")], NOW)[0].priority, 7)
        self.store.remove(Query(), NOW)
        faults.before("insert_many", other)
        store.add([(row(priority=9), "replace")], NOW)
        self.assertEqual(self.look().priority, 9)
        faults.before("update_one", lambda: self.claim())
        store.add([(row(priority=3), "replace")], NOW)
        self.assertEqual((self.look().state, self.look().priority), ("running", 9))
        self.assertTrue(self.settle(self.look(), "done"))
        self.assertEqual(self.look().priority, 3)
        faults.before("update_one", lambda: self.collection.update_one({"_id": "t"}, {"$inc": {"taskpool.claim": 1}}))
        self.assertEqual(store.update("t", {"retries": 4}, NOW).retries, 4)
        self.assertEqual((self.look().retries, self.look().claim), (4, 2))
        faults.before("update_one", lambda: self.store.update("t", {"retries": 9, "timeout": 5.0}, NOW))
        new = row(now=NOW + 5, data=8)
        store.add([(new, "replace")], NOW)
        self.assertEqual(self.look()._replace(claim=0), new)  # Nothing of the one that it replaces.

    def test_a_master_that_renews_just_before_it_would_be_recovered_keeps_its_tasks(self):
        store, faults = self.faulty()
        self.add(row())
        self.store.renew("far", NOW)
        self.claim(owner="far")
        store.recover("me", 0.0, NOW)
        faults.before("find", lambda: self.store.renew("far", NOW), skip=1)
        self.assertEqual(store.recover("me", 30.0, NOW), [])
        self.assertEqual((faults.left(), self.look().state), (False, "running"))
        for seconds in (31.0, 61.0):
            store.recover("me", seconds, NOW)
        self.assertEqual(self.look().state, "ready")

    def test_an_interrupted_task_is_not_taken_together_with_those_before_it(self):
        self.add(row("killer"))
        self.claim(owner="far")
        for seconds in (0.0, 30.0):
            self.store.recover("me", seconds, NOW)
        for claim in (self.claim, lambda: self.store.turn("me", [], {"x": 1.0}, 9.0, 4, NOW, eager=True).rows):
            self.add(row("first", priority=2), row("third"))
            self.assertEqual([[r.id for r in claim()] for _ in range(3)], [["first"], ["killer"], ["third"]])
            self.store.leave("me", NOW), self.store.remove(Query(ids=["first", "third"]), NOW)

    def test_what_changes_between_look_and_claim_counts(self):
        store, faults = self.faulty()
        self.add(row("a"), row("b"), row("c"))

        def meanwhile():
            self.store.update("a", {"data": "5"}, NOW)
            self.claim(1, owner="you") and self.store.remove(Query(ids=["c"]), NOW)

        faults.before("update_many", meanwhile)
        got = store.claim("me", ["x"], 3, NOW)
        self.assertEqual([(r.id, r.data) for r in got], [("b", "{}")])
        self.assertEqual(self.look("a").data, "5")
        faults.before("update_many", lambda: self.add(row("e")) and self.claim(3, owner="you"))
        self.add(row("d"), row("f"))
        self.assertEqual([r.id for r in store.claim("me", ["x"], 3, NOW)], [])
        self.add(row("g"), row("h"), row("j"))
        taken = []
        faults.before("update_many", lambda: taken.extend(self.claim(1, owner="you")) or self.add(row("i")))
        got = [r for limit in (1.5, 3, 3) for r in store.claim("me", ["x"], limit, NOW)]
        self.assertEqual(sorted(r.id for r in got + taken), ["g", "h", "i", "j"])


class Faults:
    """What a Faulty collection shall do wrong."""

    def __init__(self):
        self.always, self._plans, self.calls = None, [], []

    def plan(self, method, error, applied, skip=0, and_then=None):
        """Have the next call (after *skip*) of *method* raise, before or after the server did it."""
        self._plans = [[method, skip, error, applied, None]]
        if and_then:
            self._plans.append([and_then[0], 0, and_then[1], False, None])

    def before(self, method, action, skip=0):
        """Have *action* called before the next call of *method*."""
        self._plans = [[method, skip, None, False, action]]

    def left(self):
        return bool(self._plans)

    def at(self, number, action, left=None):
        """Have *action* called before that call of any method; *left* calls later have all raise."""
        self.asked = 0

        def now(method):
            self.asked += 1
            dead = left is not None and self.asked > number + left
            return LookupError("died") if dead else None, False, action if self.asked == number + 1 else None

        self.now = now

    def now(self, method):
        if self.always:
            raise self.always
        if self._plans and self._plans[0][0] == method:
            if self._plans[0][1] == 0:
                return self._plans.pop(0)[2:]
            self._plans[0][1] -= 1
        return None, False, None


class Faulty:
    """A collection that fails as it is told. What its class's module begins with makes
    MongoStore use bulk_write, as with pymongo's own."""

    METHODS = frozenset(
        "find distinct count_documents insert_many update_one update_many find_one_and_update delete_one "
        "delete_many bulk_write create_index".split()
    )

    def __init__(self, collection, faults):
        self._collection, self._faults = collection, faults

    def __getitem__(self, name):
        return type(self)(self._collection[name], self._faults)

    def __getattr__(self, name):
        value = getattr(self._collection, name)
        if name not in self.METHODS:
            return value

        def call(*arguments, **options):
            self._faults.calls.append((name, arguments, options))
            error, applied, action = self._faults.now(name)
            if action:
                action()
            if error and not applied:
                raise error
            result = value(*arguments, **options)
            if name == "find":
                result = list(result)
            if error:
                raise error
            return result

        return call


class FaultyInBulk(Faulty):
    """The same; looks like pymongo's."""

    __module__ = "pymongo.collection"


@unittest.skipUnless(mongomock, "needs mongomock: pip install mongomock==4.3.0")
class TestMongoStoreOnMongomock(Gates, MongoContract, unittest.TestCase):
    """The MongoDB store keeps the contract, on a collection that is not pymongo's."""

    faulty_kind, TRANSACTIONS, SOME = Faulty, False, 1

    def setUp(self):
        self.collection = mongomock.MongoClient().test.tasks
        super().setUp()

    def test_values_that_others_wrote_hold_up_no_claim_and_no_recovery(self):
        self.add(row("a", expires=5), row("b"), row("c"))
        self.collection.update_one({"_id": "a"}, {"$set": {"taskpool.due_at": "x"}})
        self.collection.update_one({"_id": "b"}, {"$set": {"taskpool.expires": "x"}})
        states = {r.id: r.state for r in self.claim(9)}
        self.assertEqual(states, {"a": "failed", "b": "failed", "c": "running"})
        self.collection.update_one({"_id": "c"}, {"$set": {"taskType": {"x": 1}}})
        observer = self.open()
        for seconds in (0.0, 1.0, 100.0, 200.0):
            observer.recover("you", seconds, NOW)
        self.assertEqual(observer.find(Query(ids=["c"]), NOW)[0].state, "failed")

    def test_documents_without_an_id_hold_up_no_heartbeat_and_no_follower(self):
        self.add(row("a"))
        for number, ours in enumerate(({"after": ["?", "=a"]}, {"followed": "done"}, {"id": 5, "followed": "removed"})):
            self.collection.insert_one({"_id": number, "taskpool": {"state": "held", **ours}})
        (follower,) = self.add(row("b", after="a"))
        self.store.renew("me", NOW)
        (got,) = self.claim()
        self.assertEqual(self.store.settle("me", [Outcome("a", got.claim, "done")], NOW), ["done"])
        self.assertEqual([r.id for r in self.claim()], [follower.id])

    def test_a_failure_after_ends_were_recorded_does_not_hide_them(self):
        self.add(row("a"))
        (got,) = self.claim()
        self.store._copy = {}, -math.inf  # Too old.
        outcome = Outcome("a", got.claim, "done")
        with mock.patch.object(self.store, "_read_side", side_effect=StoreError("away")), self.assertRaises(StoreError):
            self.store.turn("me", [outcome], {"x": 1.0}, 1.0, 1, NOW)
        self.assertEqual(self.store.turn("me", [outcome], {"x": 1.0}, 1.0, 1, NOW).led, ["done"])


class TestMongoStoreOnAServer(Gates, MongoContract, WithMongo):
    """The MongoDB store keeps the contract, over the wire."""

    faulty_kind, TRANSACTIONS, SOME = FaultyInBulk, True, 37
    test_eight_threads = TestSQLiteStore.test_eight_threads_add_and_claim_without_an_error

    def setUp(self):
        WithMongo.setUp(self)
        self.store = self.open()

    def test_an_index_of_the_same_name_or_keys_only_warns(self):
        """MG-07: neither refuses to start nor drops the user's index."""
        self.collection.create_index([("taskpool.owner", 1)], name="mine")
        self.collection.create_index([("mine", 1)], name="taskpool_ready")
        with self.assertLogs("taskpool", "WARNING") as logs:
            self.add(row())
            self.assertEqual(len(self.claim()), 1)
        self.assertIn("taskpool_ready", logs.output[0])
        self.assertIn("mine", self.collection.index_information())

    def test_a_task_that_is_due_by_another_machines_clock_waits_for_ones_own(self):
        """P6: never earlier by the clock of the machine that claims it."""
        self.add(*[row(str(i), due_date=timedelta(seconds=2)) for i in range(3)], row("now"))
        early, late = NOW + 2 * SECOND, NOW + SECOND
        self.assertEqual([r.id for r in self.claim(1, owner="early", now=early)], ["0"])
        for limit, ids in ((1, ["now"]), (1, []), (5, [])):
            self.assertEqual([r.id for r in self.claim(limit, owner="late", now=late)], ids)
        self.assertEqual(self.store.next_due("late", ["x"], 5, late), [NOW + 2 * SECOND] * 2)
        self.assertEqual(self.store.next_due("early", ["x"], 5, early), [early] * 2)
        (back,) = self.claim(1, owner="early", now=early)
        self.settle(back, "ready", charged=False, owner="early")
        self.assertEqual(self.claim(5, owner="late", now=late), [])
        # A clock that is set back holds back nothing that was due by it.
        self.assertEqual([r.id for r in self.claim(1, owner="early", now=late)], ["1"])
        self.assertEqual([r.id for r in self.claim(1, owner="late", now=early)], ["2"])

    def test_dates_are_the_same_with_every_kind_of_client(self):
        """MG-05, MG-04: tz_aware or not, in whatever zone."""
        east = timezone(timedelta(hours=9))
        for options in ({"tz_aware": False}, {"tz_aware": True}, {"tz_aware": True, "tzinfo": east}):
            client = self.server.client(**options)
            self.addCleanup(client.close)
            store = taskpool.MongoStore(client.test[self.collection.name])
            self.insert(dueDate=taskpool._datetime(NOW + SECOND))
            store.add([(row(due_date=timedelta(hours=1)), "raise")], NOW)
            self.assertEqual(store.claim("me", ["x"], 5, NOW), [])
            self.assertEqual(store.next_due("me", ["x"], 5, NOW), [NOW + SECOND, NOW + 3600 * SECOND])
            found = {r.id: (r.created_at, r.due_at) for r in store.find(Query(), NOW)}
            self.assertEqual(found, {"m": (NOW, NOW + SECOND), "t": (NOW, NOW + 3600 * SECOND)})
            store.remove(Query(), NOW)

    def test_a_date_that_cannot_be_decoded_in_any_field_is_in_nobodys_way(self):
        """Nested too, and before and after the document was looked at."""
        from bson.datetime_ms import DatetimeMS

        never = DatetimeMS(8_640_000_000_000_000)
        fields = "priority data data.deep createdAt dueDate onGoing taskType mine mine.deep".split()
        self.add(*[row(f"old {field}") for field in fields])
        self.insert(never)
        for field in fields:
            self.insert(f"new {field}")
            self.collection.update_many({"_id": {"$regex": f" {re.escape(field)}$"}}, {"$set": {field: never}})
        with self.assertLogs("taskpool", "ERROR"):
            got = [r for limit in (1, 50) * 9 for r in self.claim(limit)]
        fine = ("new mine", "new mine.deep", "old createdAt", "old dueDate", "old mine", "old mine.deep", "old onGoing")
        self.assertEqual(sorted(r.id for r in got if r.state == "running"), list(fine))
        failed = self.store.find(Query(states=["failed"]), NOW)
        unknown = "old taskType"  # It is none of a type that is served.
        self.assertEqual({r.id for r in failed}, {f"{kind} {field}" for kind in ("old", "new") for field in fields} - {*fine, unknown})
        self.assertEqual({"out of range" in r.error for r in (*failed, self.look(unknown))}, {True})
        self.assertEqual(self.store.retry(Query(ids=["new data"]), NOW), 1)
        self.assertEqual([r.state for r in self.claim()], ["failed"])
        self.assertEqual(self.store.remove(Query(states=["failed", "waiting"]), NOW), len(failed) + 1)

    def names(self, events):
        """Of commands, but for the looks at settings, which depend on the time that has passed."""
        looks = f"{self.collection.name}.masters"
        return [event.command_name for event in events if event.command.get("find") != looks]

    def test_an_end_and_the_next_start_are_two_commands_for_one_task_and_four_for_many(self):
        store, commands = self.counted()
        self.add(*[row(str(i)) for i in range(203)])
        commands()
        for types, room, ids, most in [
            ({"x": 1.0}, 1.0, ["0"], 3), ({"x": 1.0}, 1.0, ["1"], 2), ({"x": 1.0}, 1.0, ["2"], 2),
            ({"x": 0.01}, 2.0, [str(i) for i in range(3, 203)], 5), ({"x": 0.01}, 2.0, [], 2),
        ]:
            outcomes = [Outcome(r.id, r.claim, "done") for r in self.store.find(Query(states=["running"]), NOW)]
            led, rows, *_ = store.turn("me", outcomes, types, room, 2, NOW)
            self.assertEqual((led, [r.id for r in rows]), (["done"] * len(outcomes), ids))
            names = self.names(commands())
            self.assertLessEqual(len(names), most, names)

    def test_an_end_and_the_next_start_are_few_commands_where_a_type_is_limited_too(self):
        store, commands = self.counted()
        self.add(*[row(str(i), now=NOW + i) for i in range(20)], row("y", "y", priority=-1))
        for changes, most in (({"at_once": 2}, 5), ({"at_once": None, "starts": 10**6, "period": 1}, 4), ({"at_once": 1}, 6)):
            store.set_up(["x"], changes, NOW), store.turn("me", [], {"x": 1.0, "y": 0.1}, 0.0, 2, NOW + SECOND)
            sent = []
            for _ in range(5):
                outcomes = [Outcome(r.id, r.claim, "done") for r in self.store.find(Query(states=["running"]), NOW)]
                commands()
                turn = store.turn("me", outcomes, {"x": 1.0, "y": 0.1}, 1.0, 2, NOW + SECOND, eager=True)
                self.assertEqual((len(turn.rows), len(turn.due)), (1, 2))
                sent.append(self.names(commands()))
            self.assertLessEqual(max(map(len, sent[2:])), most, sent)

    def test_to_wait_for_a_task_is_one_command_per_look(self):
        store, commands = self.counted()
        self.add(row())
        store.find(Query(ids=["t"]), NOW)
        self.assertEqual([event.command_name for event in commands()], ["find"])

    def test_it_asks_for_acknowledged_writes_and_reads_from_the_primary(self):
        """MG-12: the write concern is the user's, and never weakened."""
        for wrong in (
            self.collection.with_options(write_concern=pymongo.WriteConcern(w=0)),
            self.collection.with_options(read_preference=pymongo.ReadPreference.SECONDARY_PREFERRED),
        ):
            with self.assertRaisesRegex(ValueError, "acknowledges writes and reads from the primary"):
                taskpool.MongoStore(wrong)
        asynchronous = getattr(pymongo, "AsyncMongoClient", lambda: self.client)()
        for wrong in (self.client, self.client.test, asynchronous.db.c, asynchronous.db, asynchronous):
            if wrong is not None:
                with self.assertRaisesRegex(TypeError, "pymongo Collection"):
                    taskpool.MongoStore(wrong)
        store, commands = self.counted(w="majority")
        store.add([(row("a"), "raise"), (row("b"), "raise")], NOW)
        store.add([(row("c"), "raise")], NOW)
        store.renew("me", NOW)
        rows = store.claim("me", ["x"], 1, NOW) + store.claim("me", ["x"], 5, NOW)
        store.settle("me", [Outcome(r.id, r.claim, "done") for r in rows], NOW)
        writes = [e.command for e in commands() if e.command_name in ("insert", "update", "delete", "findAndModify", "commitTransaction")]
        concerns = [command.get("writeConcern", command.get("autocommit")) for command in writes]
        self.assertGreater(len(concerns), 6)
        self.assertEqual([c for c in concerns if c not in ({"w": "majority"}, False)], [])

    def test_a_server_without_transactions_is_found_out_and_add_tasks_checks_first(self):
        store, faults = self.faulty()
        alone = OSError("Transaction numbers are only allowed on a replica set member or mongos")
        alone.code = 20
        faults.plan("insert_many", alone, False)
        store.add([(row("a"), "raise"), (row("b"), "raise")], NOW)
        with self.assertRaises(DuplicateTask):
            store.add([(row("c"), "raise"), (row("b"), "raise")], NOW)
        self.assertEqual([r.id for r in self.store.find(Query(), NOW)], ["a", "b"])

    def test_add_tasks_is_all_or_nothing_when_the_connection_breaks(self):
        for command in ("insert", "commitTransaction"):
            fail_point(self.client, {"times": 3}, failCommands=[command], closeConnection=True)
            try:
                with self.assertRaisesRegex(StoreError, "nothing was stored"):
                    self.add(*[row(str(i)) for i in range(50)])
            finally:
                fail_point(self.client, "off")
            self.assertEqual(self.store.count(Query(), NOW), 0)


def fail_point(client, mode, **data):
    """What the server shall do wrong, at the next commands."""
    client.admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})


class Proxy:
    """Stands between a client and the server, and breaks connections."""

    def __init__(self, port):
        self.target, self.refuse = port, False
        self._pairs, self._lock = set(), threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    if self.refuse:
                        raise OSError
                    server = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    client.close()
                    continue
                with self._lock:
                    self._pairs.add((client, server))
                for a, b in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(a, b, (client, server)), daemon=True).start()

    def _pass_on(self, source, sink, pair):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        self._end(pair)

    def _end(self, pair):
        with self._lock:
            self._pairs.discard(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut(self):
        """Break every connection."""
        for pair in list(self._pairs):
            self._end(pair)

    def close(self):
        self._listener.close()
        self.cut()


class TestMongoFaults(WithMongo):
    """P1, P2 with MongoDB: what a network and a server do. MG-01, MG-03, DU-07."""

    QUICK = {"serverSelectionTimeoutMS": 300, "connectTimeoutMS": 1000, "heartbeatFrequencyMS": 500}

    def through(self, port, **options):
        """The collection, by another way."""
        client = pymongo.MongoClient("127.0.0.1", port, directConnection=True, **{**self.QUICK, **options})
        self.addCleanup(client.close)
        return client.test[self.collection.name]

    def left(self):
        with contextlib.suppress(StoreError):
            return self.queue().count()

    def add_lines(self, count, **options):
        """Tasks that write a line each, added on a way without faults."""
        self.lines = str(self.folder / "lines")
        tasks = [{"task_type": "line", "data": {"file": self.lines}, **options} for _ in range(count)]
        return sorted(task.id for task in self.queue().add_tasks(tasks))

    def run_all(self, ids, collection, meanwhile=lambda: None, **options):
        """Run these tasks; each must start exactly once, as no process is killed."""
        with self.assertLogs("taskpool", "WARNING") as logs:
            logging.getLogger("taskpool").warning("at least one line")
            cluster = self.cluster({"line": add_line}, self.queue(collection), keep_alive="always", **options)
            meanwhile()
            eventually(lambda: self.left() == 0, "the end of all tasks")
            cluster.shutdown()
        self.assertEqual(sorted(line.split()[0] for line in lines_of(self.lines)), ids)
        self.assertEqual({line.split()[1] for line in lines_of(self.lines)}, {"1"})
        text = "\n".join(logs.output)
        self.assertNotIn("its claim was lost", text)
        # One line for an outage, and one a minute while it lasts.
        self.assertLessEqual(text.count("the store failed"), text.count("the store works again") + 1)
        return text

    def test_every_error_of_the_driver_from_every_method_is_survived(self):
        kinds = [
            pymongo.errors.AutoReconnect("a"), pymongo.errors.NotPrimaryError("b"), pymongo.errors.DuplicateKeyError("c", 11000),
            pymongo.errors.OperationFailure("d", 1), pymongo.errors.WriteError("e", 2), pymongo.errors.NetworkTimeout("f"),
            pymongo.errors.ServerSelectionTimeoutError("g"), OSError("h"),
        ]
        methods = sorted(Faulty.METHODS - {"insert_many", "count_documents", "create_index"})
        for kind in (Faulty, FaultyInBulk):
            faults, number = Faults(), [0]

            def more(name, number=number, faults=faults):
                number[0] += 1
                if number[0] % 3 == 0 and number[0] < 400:
                    return kinds[number[0] % len(kinds)], number[0] % 2 == 0, None
                return None, False, None

            faults.now = lambda name: more(name) if name in methods else (None, False, None)
            with self.subTest(kind=kind.__name__), fast_back_off():
                ids = self.add_lines(60)
                text = self.run_all(ids, kind(self.collection, faults))
                self.assertIn("the store failed", text)
                os.remove(self.lines)

    def test_commands_that_a_server_drops_refuses_or_cannot_confirm_are_survived(self):
        """A change of the primary, and writes that were done but that no majority has."""
        self.addCleanup(fail_point, self.client, "off")
        reads = ["find", "update", "delete", "findAndModify", "distinct"]
        wrong = {"code": 64, "errmsg": "waiting for replication timed out"}
        for options, *points in (
            ({}, {"failCommands": reads, "closeConnection": True}, {"failCommands": reads, "errorCode": 10107}),
            ({"w": "majority"}, {"failCommands": ["update", "delete"], "writeConcernError": wrong}),
        ):
            ids = self.add_lines(200)

            def fail(points=points):
                for enough, point in zip((0, 60), points):
                    eventually(lambda enough=enough: len(lines_of(self.lines)) >= enough)
                    fail_point(self.client, {"times": 12 if len(points) == 2 else 30}, **point)

            with self.subTest(**options), fast_back_off():
                text = self.run_all(ids, self.through(self.server.port, **options), fail)
                self.assertIn("waiting for replication" if options else "the store", text)
            os.remove(self.lines)

    def test_a_server_that_is_killed_and_comes_back_has_lost_nothing(self):
        server = MongoServer()
        self.addCleanup(server.close)
        self.client = server.client(**self.QUICK)
        self.addCleanup(self.client.close)
        self.collection = self.client.test.tasks
        ids = self.add_lines(400)
        waiting = self.add_lines(5, due_date=timedelta(days=1))

        def kill():
            for enough in (50, 150, 250):
                eventually(lambda: len(lines_of(self.lines)) > enough)
                server.kill()
                if enough == 150:
                    with self.assertRaises(StoreError):
                        self.queue().add_task("line")
                server.start()
            eventually(lambda: self.left() == 5)
            self.queue().remove(task_id=waiting)

        self.run_all(ids, self.collection, kill)


@contextlib.contextmanager
def fast_back_off():
    """A store that fails often is tried again soon, so that the test is quick."""
    before = taskpool.STORE_SECONDS, taskpool.STORE_CAP_SECONDS
    taskpool.STORE_SECONDS = taskpool.STORE_CAP_SECONDS = 0.01
    try:
        yield
    finally:
        taskpool.STORE_SECONDS, taskpool.STORE_CAP_SECONDS = before


class TestMongoCommands(WithMongo):
    """What a cluster asks of the server, told by a listener of the driver."""

    MOST_A_TASK = 5
    MOST_A_SECOND = 3

    def test_a_task_takes_few_commands_and_an_idle_cluster_sends_few(self):
        store, commands = self.counted()
        options = {"max_available_workers": 1, "keep_alive": "always", "refresh_rate": 1000}
        with self.cluster({"echo": echo}, TaskQueue(store), **options) as cluster:
            counts = []
            for i in range(9):  # The least: others are sent once a second.
                commands()
                self.assertEqual(cluster.submit("echo", i).result(PATIENCE), i)
                counts.append(len(commands()))
            self.assertLessEqual(min(counts), self.MOST_A_TASK)
            sent, masters = [], f"{self.collection.name}.masters"

            def seconds():
                sent.extend(commands())
                return sum(event.command.get("find") == masters for event in sent)

            eventually(lambda: seconds() > 5)
            if len(sent) > self.MOST_A_SECOND * seconds():  # Each 10 s a heartbeat needs some more.
                sent.clear()
                eventually(lambda: seconds() > 5)
            self.assertLessEqual(len(sent), self.MOST_A_SECOND * seconds())


class TestMongoManyMachines(WithMongo):
    """P2, P3, P6 with MongoDB: clusters that see nothing of each other but the documents."""

    MASTER = """
        import logging, os, sys, time, pymongo, taskpool
        from taskpool import Cluster, MongoStore, TaskQueue
        taskpool.LEASE_SECONDS, taskpool.RENEW_SECONDS, taskpool.WATCH_SECONDS = 1.5, 0.3, 0.1
        taskpool.STORE_CAP_SECONDS = 0.2  # As much less than a lease as it is.
        taskpool._here = lambda: ""  # Another machine: nobody's death can be seen from here.
        logging.basicConfig(filename=sys.argv[3] + ".log", level=logging.WARNING)
        logging.getLogger("taskpool").addFilter(lambda record: "CPUs" not in record.getMessage())
        def note(job):
            fd = os.open("lines", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(fd, f"{job.id} {job.attempt} {time.time() - job.due_date.timestamp():.6f} {sys.argv[3]}\\n".encode())
            os.close(fd)
        def hold(job):
            note(job)
            while not os.path.exists(sys.argv[3] + ".end"):
                time.sleep(0.005)
        if __name__ == "__main__":
            queue = TaskQueue(MongoStore(pymongo.MongoClient(sys.argv[1]).test[sys.argv[2]]))
            queue.clock = lambda: time.time() + float(sys.argv[4])
            Cluster({"note": note, "hold": hold}, queue, max_available_workers=2, oversubscribe=True,
                    refresh_rate=100).run()
    """

    def machine(self, name, shift=0.0):
        return self.start(self.script(self.MASTER), self.uri(), self.collection.name, name, shift)

    def lines(self):
        return [line.split() for line in lines_of(self.folder / "lines")]

    def test_clusters_with_clocks_apart_run_each_task_once_and_recover_nobody_who_lives(self):
        """DU-01: for several leases; by each one's own clock, and by no other."""
        queue = self.queue()
        machines = [self.machine("early", 2.0), self.machine("late", -2.0)]
        held = [queue.add_task("hold").id for _ in range(2)]
        eventually(lambda: len(self.lines()) == 2)
        ids = {t.id for t in queue.add_tasks([{"task_type": "note", "due_date": timedelta(seconds=1 + s / 60)} for s in range(160)])}
        eventually(lambda: len(self.lines()) == 162, "all tasks")
        for name in ("early", "late"):
            (self.folder / f"{name}.end").touch()
        eventually(lambda: queue.count() == 0)
        lines = self.lines()
        self.assertEqual(sorted(line[0] for line in lines), sorted([*held, *ids]))
        self.assertEqual({line[1] for line in lines}, {"1"})
        for task_id, _, late, name in lines:
            if task_id in ids:  # Never earlier by the clock of the machine that claimed it.
                self.assertGreaterEqual(float(late) + {"early": 2.0, "late": -2.0}[name], 0.0)
        for machine in machines:
            machine.terminate()
        for machine, name in zip(machines, ("early", "late")):
            self.assertEqual(machine.wait(PATIENCE), 0)
            self.assertEqual((self.folder / f"{name}.log").read_text(), "")
        self.assertEqual(list(self.collection["masters"].find({"_id": {"$gt": ""}})), [])

    @unittest.skipUnless(LINUX, "stops the workers, which it finds in /proc")
    def test_a_machine_that_falls_silent_is_recovered_after_its_lease_and_its_late_outcome_discarded(self):
        queue = self.queue()
        queue.add_task("hold", task_id="t")
        first = self.machine("first", 2.0)
        eventually(lambda: len(self.lines()) == 1)
        stopped = [first.pid, *children(first.pid)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        second = self.machine("second", -2.0)
        eventually(lambda: len(self.lines()) == 2)
        self.assertEqual([line[:2] for line in self.lines()], [["t", "1"]] * 2)  # Not charged.
        (self.folder / "first.end").touch()
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: "its claim was lost" in (self.folder / "first.log").read_text())
        self.assertEqual(queue.find_one().state, "running")
        (self.folder / "second.end").touch()
        eventually(lambda: queue.count() == 0)
        self.assertEqual((self.folder / "second.log").read_text(), "")
        first.kill()
        second.kill()

    def test_masters_that_were_cut_off_together_lose_nothing_to_each_other(self):
        proxy = self.proxy()
        uri = f"mongodb://127.0.0.1:{proxy.port}/?directConnection=true&serverSelectionTimeoutMS=300"
        self.queue().add_task("hold", task_id="t")
        script = self.script(self.MASTER)
        for number, name in enumerate(("first", "second"), 1):
            self.start(script, uri, self.collection.name, name, 0.0)
            eventually(lambda number=number: self.lines() and self.collection["masters"].count_documents({"_id": {"$gt": ""}}) == number)
        for _ in range(3):
            proxy.refuse = True
            proxy.cut()
            time.sleep(2.0)
            proxy.refuse, before = False, list(self.collection["masters"].find({"_id": {"$gt": ""}}))
            eventually(lambda: all(master not in before for master in self.collection["masters"].find({"_id": {"$gt": ""}})))
        (self.folder / "first.end").touch()
        (self.folder / "second.end").touch()
        eventually(lambda: self.queue().count() == 0)
        self.assertEqual(len(self.lines()), 1)

    def test_the_three_lines_of_the_manual_work(self):
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        (source,) = re.findall(r"```py\n(.*?)```", readme, re.S)
        source = source.replace("mongodb://localhost", self.uri()) + textwrap.dedent("""
            def square(job):
                return job.data**2
            if __name__ == "__main__":
                with Cluster({"square": square}, queue) as cluster:
                    print(list(cluster.map("square", range(5))), queue)
                client.drop_database("mydatabase")
        """)
        out = self.run_script(source)
        self.assertEqual(out, "[0, 1, 4, 9, 16] TaskQueue(MongoStore('mydatabase.tasks'))\n")

    def test_two_clusters_on_a_meteor_applications_collection(self):
        now = datetime.now(timezone.utc)
        clusters = [self.cluster({"echo": echo, "line": add_line}, self.queue()) for _ in range(2)]
        path = str(self.folder / "out")
        for i in range(100):
            self.collection.insert_one({
                "_id": f"{i:017d}", "taskType": "line", "priority": float(i % 3), "data": {"file": path},
                "createdAt": now, "onGoing": False, "dueDate": now,
            })
        eventually(lambda: self.collection.count_documents({}) == 0, "the end of all tasks")
        self.assertEqual(sorted(line.split()[0] for line in lines_of(path)), [f"{i:017d}" for i in range(100)])
        self.assertEqual(clusters[0].submit("echo", [1, 2.0]).result(PATIENCE), [1, 2.0])


class TestMongoWithoutPymongo(InFolder):
    """The MongoDB store imports no driver."""

    @unittest.skipUnless(mongomock, "needs mongomock: pip install mongomock==4.3.0")
    def test_it_works_where_pymongo_cannot_be_imported(self):
        """MG-03."""
        out = self.run_script("""
            import sys
            sys.modules["pymongo"] = sys.modules["bson"] = None
            import taskpool, mongomock
            store = taskpool.MongoStore(mongomock.MongoClient().test.tasks)
            (row,) = store.add([(taskpool._make_row(0, "x", {"a": 1}, keep_result=5)[0], "raise")], 0)
            (claimed,) = store.claim("me", ["x"], 1, 0)
            print(claimed.data, store.settle("me", [taskpool.Outcome(row.id, 1, "done", result="5")], 0))
            print(store.find(taskpool.Query(), 0)[0].result)
        """)
        self.assertEqual(out, '{"a":1} [\'done\']\n5\n')


class TestSchemaVersions(InFolder):
    """Older files are brought up to date, newer ones are refused."""

    def change(self, script, query="SELECT version, (SELECT * FROM pragma_user_version) FROM taskpool_version"):
        with contextlib.closing(sqlite3.connect(self.folder / "tasks.db")) as db:
            db.executescript(script)
            return db.execute(query).fetchone()

    def test_an_older_file_keeps_its_tasks_and_gets_what_is_new(self):
        """SM-03. The user_version is left to the application."""
        with self.queue() as queue:
            queue.add_task("x", task_id="old")
        version = taskpool.SCHEMA_VERSION
        self.assertEqual(self.change("PRAGMA user_version = 77"), (version, 77))
        upgrade = {version: ("ALTER TABLE taskpool_task ADD COLUMN new TEXT",)}
        with mock.patch.multiple(taskpool, _UPGRADES=upgrade, SCHEMA_VERSION=version + 1):
            for _ in range(2):  # Once only.
                with self.queue() as queue:
                    self.assertEqual([task.id for task in queue.find()], ["old"])
        self.assertEqual(self.change("SELECT new FROM taskpool_task"), (version + 1, 77))

    def test_files_that_are_newer_or_were_never_released_are_refused_and_not_touched(self):
        """SM-04, TT-05."""
        path = self.folder / "tasks.db"
        for script, text in (
            ("UPDATE taskpool_version SET version = 77", r"tasks\.db: made by a newer taskpool \(schema 77"),
            ("UPDATE taskpool_version SET version = 2", r"tasks\.db: made by an unreleased taskpool \(schema 2"),
            ("DELETE FROM taskpool_version", r"unreleased taskpool \(schema 0"),
            ("DROP TABLE taskpool_version", r"unreleased taskpool \(schema 0"),
        ):
            path.unlink(missing_ok=True)
            with self.queue() as queue:
                queue.count()
            self.change(f"PRAGMA journal_mode = DELETE; {script}", "SELECT 1")
            before, queue = path.read_bytes(), self.queue()
            for call in (lambda queue=queue: queue.add_task("y"), queue.find, queue.count):
                with self.assertRaisesRegex(StoreError, text):
                    call()
            self.assertEqual((path.read_bytes(), os.listdir(self.folder)), (before, ["tasks.db"]))


# --- Running tasks -------------------------------------------------------------------

EVERYTHING = {
    "echo": echo, "job": job_itself, "about": about, "fail": fail, "succeed_at": succeed_at, "hold": hold,
    "raise_kind": raise_kind, "return_kind": return_kind, "sleep": sleep_a_little, "wish": wish,
    "later": future_later, "ping": ping, "position": ping_by_position,
    "fork and come back": fork_and_come_back, "report in a handler": report_in_a_handler,
    "three deep": ping_three_deep, "many deep": ping_many_deep, "wait inside": ping_and_wait_inside, "async ping": ping_async,
    "ping later": ping_later, "status": ping_status, "twice": ping_twice,
    "forget": ping_and_forget, "die": ping_and_die, "bad message": fail_in_on_message,
    "bad initialize": fail_in_initialize, "add": add_from_task, "cluster": use_cluster_in_task,
    "pid": pid_of_worker, "line": add_line, "badly": end_badly, "end": end_badly,
    "about item": about_item, "item": line_of_item, "hold and fail": hold_and_fail,
    "partial": functools.partial(double_with, 3), "method": Scaler(4).scale,
}


def answer_pings(respond, message):
    """A broker that answers in every way there is."""
    if message["data"] == "silence":
        return
    if message["data"] == "raise":
        raise LookupError("the broker fails")
    if message["data"] == "thread":
        threading.Timer(0.02, respond, ["from a thread"]).start()
        return
    if message["data"] == "unpicklable":
        respond(lambda: 1)
    if message["data"] == "about":
        respond({key: message[key] for key in ("status", "worker", "task_id", "task_type")})
    respond(f"pong {message['data']}")
    respond("a second answer counts for nothing")


class WithCluster(InFolder):
    """Tests that share one running cluster, which must outlive them all."""

    @classmethod
    def setUpClass(cls):
        cls.home = tempfile.mkdtemp(prefix="taskpool-test-")
        cls.addClassCleanup(shutil.rmtree, cls.home, ignore_errors=True)
        cls.shared_queue = TaskQueue(Path(cls.home) / "shared.db")
        cls.shared = Cluster(
            EVERYTHING, cls.shared_queue, max_available_workers=2, oversubscribe=True,
            keep_alive="always", message_broker=answer_pings, refresh_rate=50,
        )
        cls.addClassCleanup(cls.shared_queue.close)
        cls.addClassCleanup(cls.shared.shutdown)

    def submit(self, *arguments, **options):
        return self.shared.submit(*arguments, **options)

    def hold(self, name, task_type="hold", **options):
        """Submit a task that runs until let_end(its path): its Future, that path, the pid of its worker."""
        path = str(self.folder / name)
        future = self.submit(task_type, path, **options)
        return future, path, begun(path)

    def verbs(self, in_memory):
        return self.shared_queue.in_memory if in_memory else self.shared_queue

    def result(self, *arguments, **options):
        return self.submit(*arguments, **options).result(PATIENCE)

    def error(self, *arguments, **options):
        return self.submit(*arguments, **options).exception(PATIENCE)

    def tearDown(self):
        self.assertEqual(self.result("echo", "still works"), "still works")
        with self.subTest("nothing is left of this test"):
            self.shared_queue.remove(state=["failed", "done"])
            self.shared_queue.in_memory.remove(state=["failed", "done"])
            self.assertEqual(self.shared_queue.find(), [])


class TestExecutor(WithCluster):
    """A Cluster is a concurrent.futures.Executor over task types."""

    def test_submit_gives_the_result_of_any_kind_of_function(self):
        """SE-03: also what is falsy, as data and as a result."""
        for task_type, data, result in [
            ("echo", {"a": [1]}, {"a": [1]}), ("sleep", None, "slept"), ("later", None, "later"),
            ("partial", 5, 15), ("method", 5, 20), ("return_kind", "tuple", (1, 2)),
            *(("echo", value, value) for value in (None, 0, "", [], False, {}, 0.0)),
        ]:
            for in_memory in (False, True):
                with self.subTest(task_type=task_type, data=data, in_memory=in_memory):
                    self.assertEqual(repr(self.result(task_type, data, in_memory=in_memory)), repr(result))

    def test_the_job_is_the_running_task(self):
        for in_memory in (False, True):
            future = self.submit("about", [1], priority=3, task_id="me", in_memory=in_memory)
            expected = ("me", "about", [1], 3, 1, "running", in_memory)
            self.assertEqual(future.result(PATIENCE), expected)
            self.assertEqual((future.task.id, future.task.state), ("me", "waiting"))

    def test_it_works_with_asyncio_and_wait(self):
        async def main():
            loop = asyncio.get_running_loop()
            jobs = [loop.run_in_executor(self.shared, "echo", i) for i in range(5)]
            return await asyncio.gather(*jobs)

        self.assertEqual(asyncio.run(main()), list(range(5)))
        futures = [self.submit("echo", i) for i in range(5)]
        done, waiting = concurrent.futures.wait(futures, PATIENCE)
        self.assertEqual((len(done), len(waiting)), (5, 0))

    def test_its_futures_are_those_of_concurrent_futures(self):
        """They make their own attributes, so a new one in a later Python must turn this red."""
        future = self.submit("hold", str(self.folder / "held"))
        self.assertEqual([name for name in vars(Future()) if not hasattr(future, name)], [])
        self.assertEqual(future._state, Future()._state)
        with self.assertRaises(concurrent.futures.TimeoutError):
            future.result(0.01)
        done, called = [], []
        future.add_done_callback(called.append)
        future.add_done_callback(lambda it: called.append(it.result()))
        threads = [threading.Thread(target=lambda: done.append(future.result())) for _ in range(3)]
        for thread in threads:
            thread.start()
        self.assertFalse(concurrent.futures.wait([future, future], timeout=0.01).done)
        (self.folder / "held.end").touch()
        for thread in threads:
            thread.join(PATIENCE)
        eventually(lambda: len(called) == 2)
        self.assertEqual((done, called), (["held"] * 3, [future, "held"]))
        self.assertEqual(next(concurrent.futures.as_completed([future])), future)
        waits = self.submit("echo", due_date=timedelta(hours=1))
        alone = self.submit("echo")
        eventually(alone.done)  # Before anybody waits for it.
        ended = concurrent.futures.as_completed([waits, Future(), alone], PATIENCE)
        self.assertEqual(next(ended), alone)
        threading.Timer(0.05, waits.cancel).start()  # While it is waited for.
        self.assertEqual(next(ended), waits)

    def test_each_future_has_a_lock_of_its_own(self):
        """Else wait() for ours and others, in two threads, could wait for each other."""
        held, other = self.submit("echo", due_date=timedelta(hours=1)), self.submit("echo", 1)
        with held._condition, concurrent.futures.ThreadPoolExecutor(1) as thread:
            self.assertEqual(other.result(PATIENCE), 1)
            self.assertTrue(thread.submit(other.done).result(PATIENCE))
        self.assertTrue(held.cancel())

    def test_a_signal_handler_may_wait_for_one_future_while_the_program_looks_into_others(self):
        """Else who interrupts a look keeps a lock that the threads of the cluster need."""
        results, made = [], self.submit("echo").task._row  # inside

        def handle(*_):
            future = taskpool.TaskFuture(self.shared._engine.futures, made)
            self.shared._engine.threads[0].post(lambda: future.set_result(len(results)))  # inside
            results.append(future.result(PATIENCE))
            signal.setitimer(signal.ITIMER_REAL, 0.0005)

        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, handle))
        self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0.0005)
        while len(results) < 300:
            for future in [taskpool.TaskFuture(self.shared._engine.futures, made) for _ in range(50)]:
                self.assertFalse(future.done())
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.assertEqual(results, list(range(len(results))))

    def test_a_future_that_ends_in_the_midst_of_a_look_ends_for_who_looks(self):
        """At whichever bytecode of the one another thread, a handler or a finalizer does the other."""
        row = self.submit("echo").task._row  # inside
        self.addCleanup(sys.settrace, sys.gettrace())
        for ends_first in (True, False):
            for moment in itertools.count():
                future, called = taskpool.TaskFuture(self.shared._engine.futures, row), []
                packed = pickle.dumps(moment)
                calls = [lambda: future._end_unseen(packed) or future._end("FINISHED", packed), lambda: future.add_done_callback(called.append)]
                other = threading.Thread(target=calls.pop(ends_first))
                left = moment

                def trace(frame, event, _):
                    nonlocal left
                    frame.f_trace_opcodes = True
                    left -= event == "opcode"
                    if left < 0 and other.ident is None:
                        other.start()
                        other.join(0.02)  # It may have to wait for this one.
                    return trace

                sys._getframe().f_trace_opcodes = True  # Python 3.12 needs it before settrace().
                sys.settrace(trace)
                calls[0]()
                sys.settrace(None)
                if other.ident is None:  # That were all.
                    break
                other.join(PATIENCE)
                self.shared._engine.threads[1].flush(PATIENCE)  # inside
                self.assertEqual((future.result(0), called), (moment, [future]), (ends_first, moment))
                self.assertEqual(vars(future), {})  # Not in use: two threads may find two, with Python 3.11.
            self.assertGreater(moment, 10)

    def test_who_waits_for_a_future_hears_that_it_was_cancelled_whatever_callbacks_do(self):
        waits, heard = self.submit("echo", due_date=timedelta(hours=1)), []

        def call_back(future):
            heard.append(type(waiter.exception(PATIENCE)))
            raise SystemExit

        waits.add_done_callback(call_back)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            waiter = thread.submit(waits.result)
            eventually(lambda: waits._condition._waiters)  # inside
            with self.assertRaises(SystemExit):
                waits.cancel()
        self.assertEqual(heard, [concurrent.futures.CancelledError])

    def test_the_error_of_a_future_does_not_keep_it_alive(self):
        future = self.submit("badly", {"file": str(self.folder / "file"), "how": "raise"})
        ended = weakref.ref(future)
        gc.disable()
        self.addCleanup(gc.enable)
        try:
            future.result(PATIENCE)
        except ValueError:
            del future
        eventually(lambda: ended() is None)

    def test_the_future_of_a_waiting_task_is_cancelled_whoever_removes_it(self):
        elsewhere = SQLiteStore(Path(self.home) / "shared.db")
        self.addCleanup(elsewhere.close)
        cancels = (lambda future: future.cancel(), lambda future: self.shared.cancel(future.task.id))
        removes = (
            lambda future: self.verbs(future.task.in_memory).remove(task_id=future.task.id),
            lambda future: elsewhere.remove(Query(ids=[future.task.id]), NOW) or (future.task.in_memory and future.cancel()),
        )
        for in_memory, how in itertools.product((False, True), cancels + removes):
            waits = self.submit("echo", due_date=timedelta(hours=1), in_memory=in_memory)
            self.assertFalse(waits.running())
            self.assertTrue(how(waits))
            self.assertTrue(waits.cancelled() if how in cancels else eventually(waits.cancelled))
            self.assertEqual(concurrent.futures.wait([waits], 1).done, {waits})
        self.assertFalse(self.shared.cancel("none"))

    def test_a_running_task_is_killed_by_the_cancel_of_the_cluster_and_not_of_its_future(self):
        for in_memory in (False, True):
            runs, path, _ = self.hold(f"ends {in_memory}", in_memory=in_memory)
            self.assertTrue(runs.running())
            self.assertFalse(runs.cancel())
            let_end(path)
            self.assertEqual(runs.result(PATIENCE), "held")
            self.assertFalse(runs.cancel())
            runs, _, pid = self.hold(f"killed {in_memory}", in_memory=in_memory, retries=5)
            self.assertTrue(self.shared.cancel(runs.task.id))
            eventually(lambda: runs.cancelled() and not is_alive(pid) and not self.verbs(in_memory).find())

    def test_submit_twice_under_one_id_follows_if_exists(self):
        options = {"task_id": "one", "due_date": timedelta(hours=1)}
        first = self.submit("echo", 1, **options)
        with self.assertRaises(DuplicateTask):
            self.submit("echo", 2, **options)
        self.assertFalse(first.done())
        self.assertIs(self.submit("echo", 3, if_exists="keep", **options), first)
        second = self.submit("echo", 4, task_id="one", if_exists="replace")
        self.assertEqual(second.result(PATIENCE), 4)
        self.assertTrue(first.cancelled())
        self.shared_queue.add_task("echo", 5, task_id="k", due_date=timedelta(hours=1), keep_result=60)
        kept = self.submit("echo", 6, task_id="k", if_exists="keep")
        self.shared_queue.update("k", due_date=None)
        self.assertEqual(kept.result(PATIENCE), 5)

    def add_or_submit(self, submits, path, **options):
        """The Future of the task "hold" of that path, or None."""
        if submits:
            return self.submit("hold", path, **options)
        self.shared_queue.add_task("hold", path, **options)
        return None

    def test_a_future_has_the_end_of_its_own_task_and_not_of_the_one_that_it_replaces(self):
        """Also where that is claimed at this very moment."""
        for number, in_memory, submits in itertools.product(range(8), (False, True), (False, True)):
            path = str(self.folder / f"{number} {in_memory} {submits}")
            options = {"task_id": "one", "in_memory": in_memory}
            first = self.add_or_submit(submits, path, **options)
            if number % 2:
                begun(path)
            second = self.submit("echo", "second", if_exists="replace", **options)
            third = self.submit("echo", "third", if_exists="replace", **options)
            let_end(path)
            self.assertEqual(third.result(PATIENCE), "third")
            with contextlib.suppress(concurrent.futures.CancelledError):  # It may have been quick.
                self.assertEqual(second.result(PATIENCE), "second")
            if first is not None and os.path.exists(path + ".started"):
                self.assertEqual(first.result(PATIENCE), "held")
            elif first is not None:
                self.assertTrue(first.cancelled())

    def test_a_future_that_finds_its_task_running_shares_in_its_end(self):
        """Also if the run fails, in that of its retry."""
        for in_memory, submits, fails in itertools.product((False, True), repeat=3):
            path = str(self.folder / f"{in_memory} {submits} {fails}")
            options = {"task_id": "one", "in_memory": in_memory, "retries": 1, "retry_delay": 0}
            first, pid = self.add_or_submit(submits, path, **options), begun(path)
            joins = self.submit("echo", "not this", if_exists="keep", **options)
            if fails:
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
                eventually(lambda path=path, pid=pid: begun(path) != pid)
            let_end(path)
            for future in filter(None, (first, joins)):
                self.assertEqual(future.result(PATIENCE), "held")

    def test_of_threads_that_submit_one_id_each_has_its_due(self):
        """Who was stored has a result, whatever the others do meanwhile."""
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        start = threading.Barrier(4)

        def submit(number, task_id, if_exists):
            start.wait(PATIENCE)
            with contextlib.suppress(DuplicateTask):
                return self.submit("echo", number, task_id=task_id, if_exists=if_exists)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for if_exists, turn in itertools.product(("raise", "keep", "replace"), range(25)):
                same = functools.partial(submit, task_id=f"{if_exists} {turn}", if_exists=if_exists)
                for future in filter(None, pool.map(same, range(4))):
                    try:
                        self.assertIn(future.result(PATIENCE), [future.task.data, None] if if_exists == "keep" else [future.task.data])
                    except concurrent.futures.CancelledError:
                        self.assertEqual(if_exists, "replace")

    def test_submit_refuses_what_can_never_run(self):
        with self.assertRaisesRegex(ValueError, "task_type.*'none'.*'echo'"):
            self.submit("none")
        with self.assertRaisesRegex(TypeError, "task_type"):
            self.submit(5)
        for unknown in ("lane", "retry"):
            with self.assertRaisesRegex(TypeError, rf"submit.*'{unknown}'"):
                self.submit("echo", **{unknown: "x"})
        with self.assertRaisesRegex(TypeError, "timeout"):
            self.shared.map("echo", [1, 2], [3, 4])
        self.assertEqual(list(self.shared.map("echo", [1, 2], timedelta(seconds=PATIENCE))), [1, 2])
        with self.assertRaisesRegex(TypeError, "priority"):
            self.submit("echo", priority="1")

    def test_workers_tells_what_each_process_does(self):
        future, path, pid = self.hold("hold", task_id="held")
        (busy,) = [worker for worker in self.shared.workers() if worker["state"] == "busy"]
        self.assertEqual((busy["pid"], busy["task_id"], busy["task_type"]), (pid, "held", "hold"))
        self.assertLess(abs(datetime.now(timezone.utc) - busy["since"]), timedelta(seconds=PATIENCE))
        let_end(path)
        future.result(PATIENCE)


class TestMap(WithCluster):
    """Cluster.map: Executor.map over tasks, one by one or in chunks."""

    def lines(self):
        return lines_of(self.folder / "lines")

    def items(self, *hows, **more):
        return [{"file": str(self.folder / "lines"), "item": i, "how": how, **more} for i, how in enumerate(hows)]

    def test_the_jobs_of_a_chunk_differ_by_their_data(self):
        jobs = list(self.shared.map("job", [1, 2, Point(3)], chunksize=3, in_memory=True))
        self.assertEqual([job.data for job in jobs], [1, 2, Point(3)])
        self.assertEqual((jobs[0] == jobs[1], jobs[0] == copy.copy(jobs[0]), len(set(jobs))), (False, True, 3))

    def waiting(self):
        return [task for in_memory in (False, True) for task in self.verbs(in_memory).find(state="waiting")]

    def test_results_come_in_order_with_and_without_chunks(self):
        for options in ({}, {"in_memory": True}, {"buffersize": 1}, {"in_memory": True, "buffersize": 3}, {"priority": 3}):
            for chunksize in (1, 4, 100):
                with self.subTest(options=options, chunksize=chunksize):
                    got = self.shared.map("echo", range(30), chunksize=chunksize, timeout=PATIENCE, **options)
                    self.assertEqual(list(got), list(range(30)))
        self.assertEqual(list(self.shared.map("echo", [])), [])

    def test_wrong_arguments_raise_in_the_call_and_take_nothing(self):
        taken = map(self.fail, range(3))
        for options, error, text in [
            ({"chunksize": 0}, ValueError, "chunksize"), ({"chunksize": 2.0}, TypeError, "chunksize"),
            ({"buffersize": 0}, ValueError, "buffersize"), ({"buffersize": "1"}, TypeError, "buffersize"),
            ({"timeout": -1}, ValueError, "timeout"), ({"retries": -1}, ValueError, "retries"),
            ({"priority": "1"}, TypeError, "priority"), ({"retry": 1}, TypeError, "map.*'retry'"),
            ({"task_id": "x"}, TypeError, "map.*'task_id'"), ({"in_memory": 1}, TypeError, "in_memory"),
        ]:
            with self.subTest(options=options), self.assertRaisesRegex(error, text):
                self.shared.map("echo", taken, **options)
        with self.assertRaisesRegex(ValueError, "task_type.*'none'"):
            self.shared.map("none", taken)
        with self.assertRaisesRegex(TypeError, "data is 5"):
            self.shared.map("echo", 5)

    def test_an_endless_iterable_is_taken_only_as_far_as_buffersize_says(self):
        for chunksize in (1, 10):
            taken = []
            endless = (taken.append(i) or i for i in itertools.count())
            results = self.shared.map("echo", endless, in_memory=True, chunksize=chunksize, buffersize=4)
            self.assertEqual(len(taken), 4 * chunksize)
            for number in range(95):
                self.assertEqual(next(results), number)
                self.assertLessEqual(len(taken) - number, 5 * chunksize)
            results.close()
        eventually(lambda: not self.waiting())

    def test_nobody_runs_what_nobody_waits_for_any_more(self):
        """The iterable raises, a task fails, the time is up, the iterator is closed, forgotten unused, or forgotten."""
        def broken():
            yield from [str(self.folder / "first"), *map(str, range(50))]
            raise LookupError("the iterable")

        def times_out(results):
            with self.assertRaises(concurrent.futures.TimeoutError):
                next(results)

        def forgets(results):
            del results

        for in_memory, (name, leave) in itertools.product((True, False), [
            ("times out", times_out), ("closes", lambda results: results.close()), ("forgets", forgets),
            ("collects", lambda results: call_in_thread(self.shared, "dispatcher", results.close)),
        ]):
            with self.subTest(name, in_memory=in_memory):
                held = [self.hold(f"{name} {in_memory} {i}", "hold", in_memory=True) for i in range(2)]
                timeout = 0.01 if leave is times_out else None
                leave(self.shared.map("item", self.items(*[None] * 700), timeout, in_memory=in_memory))
                eventually(lambda: not self.waiting(), "the removal")
                for future, path, _ in held:
                    let_end(path)
                    future.result(PATIENCE)
        held = [self.hold(f"broken {i}", "hold", in_memory=True) for i in range(2)]
        with self.assertRaisesRegex(LookupError, "the iterable"):
            self.shared.map("hold", broken(), in_memory=True)
        eventually(lambda: not self.waiting(), "the removal")
        for future, path, _ in held:
            let_end(path)
            future.result(PATIENCE)
        self.assertEqual(self.lines(), [])
        eventually(lambda: not self.shared._engine.futures, "the end of their Futures")  # inside

    @unittest.skipIf(os.name == "nt", "sends SIGINT")
    def test_nothing_goes_on_after_ctrl_c(self):
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        for options in ({"in_memory": True}, {"in_memory": True, "chunksize": 2}, {}):
            results = self.shared.map("sleep", range(5000), **options)
            next(results)
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            with self.assertRaises(KeyboardInterrupt):
                list(results)
            eventually(lambda: not self.waiting(), "the removal")

    def test_a_run_whose_result_nobody_wants_is_not_retried(self):
        path = str(self.folder / "late")
        results = self.shared.map("hold and fail", [path], in_memory=True, retries=5, retry_delay=0.01)
        begun(path)
        results.close()
        let_end(path)
        eventually(lambda: not self.shared_queue.in_memory.find(), "the end")

    def test_a_chunk_calls_its_function_once_for_each_item(self):
        (mine, data, attempt, copied), other, *_ = rows = list(self.shared.map("about item", "abcde", in_memory=True, chunksize=3))
        self.assertEqual([row[1] for row in rows], list("abcde"))
        self.assertEqual((mine, data, attempt, copied), (other[0], "a", 1, "a"))
        self.assertEqual(len({row[0] for row in rows}), 2)
        for task_type, items, results in [
            ("sleep", [None] * 3, ["slept"] * 3), ("later", [None] * 3, ["later"] * 3), ("method", [5, 6], [20, 24]),
        ]:
            with self.subTest(task_type):
                self.assertEqual(list(self.shared.map(task_type, items, in_memory=True, chunksize=3)), results)
        about = list(self.shared.map("about item", "ab", chunksize=2))
        self.assertEqual(len({row[0] for row in about}), 2, "stored tasks have no chunks")

    def test_the_data_and_the_result_of_a_chunk_are_lists(self):
        told = []
        self.shared_queue.add_event_listener("done", lambda value, task: told.append((value, task.data)))
        self.addCleanup(self.shared_queue.remove_event_listener, "done")
        results = self.shared.map("echo", range(3), in_memory=True, chunksize=2, keep_result=PATIENCE)
        self.assertEqual(list(results), [0, 1, 2])
        eventually(lambda: len(told) == 2)
        self.assertEqual(sorted(told), [([0, 1], [0, 1]), ([2], [2])])
        kept = self.shared_queue.in_memory.find(task_type="echo")
        self.assertEqual([(task.data, task.result) for task in kept], [([0, 1], [0, 1]), ([2], [2])])

    def test_a_failing_item_fails_its_chunk_and_a_retry_runs_all_of_it(self):
        """P4: so does a worker that dies; other chunks go on."""
        for how in ("kill first", "fail first"):
            with self.subTest(how):
                items = self.items(None, how, None, None)
                results = self.shared.map("item", items, in_memory=True, chunksize=2, retries=1, retry_delay=0)
                self.assertEqual(list(results), [0, 1, 2, 3])
                self.assertEqual(sorted(self.lines()), ["0 1", "0 2", "1 1", "1 2", "2 1", "3 1"])
                os.remove(self.folder / "lines")
        results = self.shared.map("item", self.items(None, None, "raise", None), in_memory=True, chunksize=2)
        self.assertEqual((next(results), next(results)), (0, 1))
        with self.assertRaisesRegex(ValueError, "bad"):
            next(results)

    def test_the_timeout_of_its_type_counts_for_each_item_of_a_chunk(self):
        queue = self.queue()
        queue.task(name="nap", timeout=1.0, in_memory=True)(sleep_for)
        cluster = self.cluster({"nap": sleep_for}, queue, max_available_workers=1)
        self.assertEqual(list(cluster.map("nap", [0.4] * 4, chunksize=4)), [0.4] * 4)
        with self.assertRaises(TaskTimeout):
            list(cluster.map("nap", [0, PATIENCE], chunksize=2))

    def test_each_item_of_a_chunk_fills_the_keywords_of_its_function(self):
        cluster = self.cluster({"sum": sum_of}, max_available_workers=1)
        for chunksize in (1, 3):
            items = [{"a": 1}, {"b": 1}, None]
            self.assertEqual(list(cluster.map("sum", items, in_memory=True, chunksize=chunksize)), [3, 2, 3])
            with self.assertRaisesRegex(TypeError, "'c'"):
                cluster.map("sum", [*items, {"c": 1}], in_memory=True, chunksize=chunksize)

    def test_run_due_runs_chunks(self):
        queue = self.queue()
        queue.add_task("echo", taskpool._Chunk([1, 2]), in_memory=True)  # inside
        self.assertEqual([task.result for task in queue.run_due({"echo": echo})], [[1, 2]])

    def test_the_cost_of_a_chunk_is_that_of_its_items(self):
        """P5: as far as a worker's room goes; what is learned from it is the cost of one item."""
        costs = {"x": 0.001}
        single, few, many = (row("x", "x")._replace(items=items) for items in (0, 64, 10_000))
        self.assertEqual([taskpool.cost_of(r, costs) for r in (single, few, many)], [taskpool.LEAST_SHARE, 0.064, 1.0])
        crew = taskpool._Crew(None, ["x"], None)  # inside
        crew.learn(few, 0.64)
        self.assertEqual(crew.expected, {"x": 0.01})


class TestInitializer(InFolder):
    """Cluster(initializer=, initargs=): called in each worker before its first task."""

    def test_it_is_called_once_in_each_worker_before_its_first_task(self):
        """Also in those that replace others: after so many tasks, and after a death."""
        for method in METHODS:
            with self.subTest(method):
                cluster = self.cluster(
                    {"started": what_started, "badly": end_as_told}, start_method=method, max_available_workers=1,
                    max_tasks_per_worker=2, initializer=note_start, initargs=("a", [1]), keep_alive="always",
                )
                found = [cluster.submit("started").result(PATIENCE) for _ in range(4)]
                with self.assertRaises(WorkerDied):
                    cluster.submit("badly", {"how": "exit"}).result(PATIENCE)
                found.append(cluster.submit("started").result(PATIENCE))
                self.assertEqual({tuple(map(str, mine[1:])) for (mine,) in found}, {("a", "[1]")})
                self.assertEqual(len({mine[0] for (mine,) in found}), 3)

    def test_its_arguments_may_be_what_multiprocessing_shares(self):
        for method in METHODS:
            counter = multiprocessing.get_context(method).Value("i")
            cluster = self.cluster({"echo": echo}, start_method=method, initializer=add_one, initargs=(counter,), keep_alive="always")
            self.assertEqual(cluster.submit("echo", 5).result(PATIENCE), 5)
            eventually(lambda: counter.value == 2)

    def test_one_that_raises_is_a_start_that_failed(self):
        for initializer in (throw, sys.exit):
            with self.subTest(initializer), self.assertLogs("taskpool", "ERROR") as logged:
                cluster = self.cluster({"echo": echo}, initializer=initializer, initargs=(LookupError("no such model"),))
                with self.assertRaises((LookupError, RemoteError)) as caught:
                    cluster.submit("echo", 5).result(PATIENCE)
                self.assertIn("no such model", str(caught.exception))
            self.assertIn("a worker could not start", logged.output[0])

    def test_lambdas_work_where_functions_of_tasks_may_be_lambdas(self):
        source = """
            import builtins
            cluster = Cluster({"get": lambda job: builtins.made}, max_available_workers=1, start_method=sys.argv[1],
                              initializer=lambda n: setattr(builtins, "made", n), initargs=(random.random(),), logs="error")
            if Cluster.is_master():
                with cluster:
                    print(cluster.submit("get").result() == cluster._options.initargs.get()[0])
        """
        for method in METHODS:
            with self.subTest(method):
                self.assertEqual(self.run_script(source, method), "True\n")

    def test_one_that_a_worker_cannot_find_is_told_of(self):
        source = """
            def main():
                with Cluster({"len": len}, initializer=lambda: 0) as cluster:
                    cluster.submit("len").result()
            if __name__ == "__main__":
                main()
        """
        self.run_script(source, code=1)
        self.assertIn("cannot be pickled", self.stderr)
        process = self.start("-", stdin=subprocess.PIPE)
        _, err = process.communicate(self.IMPORTS + "Cluster({'len': len}, initializer=lambda: 0)", timeout=PATIENCE)
        self.assertIn("the initializer was defined where a worker process cannot find it", err)

    def test_wrong_ones_are_refused(self):
        for options, text in [
            ({"initializer": 5}, "initializer is 5"), ({"initializer": note_start, "initargs": "abc"}, "initargs is 'abc'"),
            ({"initializer": lambda a: 0}, "initializer.*missing"), ({"initializer": lambda: 0, "initargs": (1,)}, "initializer.*too many"),
            ({"initializer": note_start, "initargs": (lambda: 0,)}, "initargs.*pickled"),
        ]:
            with self.subTest(options=options), self.assertRaisesRegex(TypeError, text):
                Cluster({"echo": echo}, self.queue(), **options)


class TestFutures(InFolder):
    """Which Futures wait for which incarnation of a task."""

    def test_the_end_of_a_cluster_overtakes_no_reason_why_a_future_fails(self):
        cluster, gate = self.cluster({"echo": echo}), threading.Event()
        future, futures = cluster.submit("echo", due_date=timedelta(hours=1)), cluster._engine.futures  # inside
        futures.threads[taskpool._FUTURES].post(lambda: gate.wait(PATIENCE))
        futures.fail_waiting(OSError("no worker can start"))
        futures.end_all()
        gate.set()
        self.assertIsInstance(future.exception(PATIENCE), OSError)

    def test_a_task_that_ends_before_submit_returns_with_a_later_creation_ends_its_future(self):
        """What is added under the id of one that seems to be younger gets a later `created_at`."""
        store, queue = self.hooked()
        cluster = self.cluster({"echo": echo}, queue)
        queue.clock = clock = Clock()
        clock.offset = 100.0
        queue.add_task("echo", task_id="x", due_date=timedelta(hours=1))
        clock.offset = 0.0

        def until_it_has_run(name, result):
            if name == "add":
                eventually(lambda: not queue.find())
                eventually(cluster._engine.idle.is_set)  # inside

        store.after = until_it_has_run
        self.assertEqual(cluster.submit("echo", 5, task_id="x", if_exists="replace").result(PATIENCE), 5)

    def test_a_future_is_not_that_of_a_task_of_its_id_that_another_added_at_the_same_instant(self):
        futures = self.cluster({"echo": echo}, auto_initialize=False)._engine.futures  # inside
        mine, other = (taskpool._make_row(NOW, "echo", data, task_id="x")[0] for data in (1, 2))
        future = taskpool.TaskFuture(futures, mine)
        futures.add(future)
        futures.claimed([other])
        self.assertFalse(future.running())
        self.assertEqual((futures.of(other), futures.of(mine._replace(created_at=NOW + 1))), ([], [future]))
        run = taskpool._Run(None, other, 1.0)
        run.outcome, run.event, run.left = Outcome("x", 1, "done"), "done", None
        futures.settled(run, "done")
        self.assertFalse(future.done())

    def test_two_who_replace_one_task_at_once_end_the_future_of_the_first(self):
        store, queue = self.hooked()
        cluster, made = self.cluster({"echo": echo}, queue, auto_initialize=False), {}
        stored = {"first": threading.Event(), "second": threading.Event()}

        def order(name, result):
            me = threading.current_thread().name
            if name == "add" and me in stored:
                stored[me].set()
                stored["second"].wait(PATIENCE)
                if me == "second":
                    eventually(lambda: "first" in made)

        def submit(name):
            made[name] = cluster.submit("echo", name, task_id="x", if_exists="replace")

        store.after = order
        threads = [threading.Thread(target=submit, args=[name], name=name) for name in stored]
        for thread, event in zip(threads, stored.values()):
            thread.start()
            self.assertTrue(event.wait(PATIENCE))
        for thread in threads:
            thread.join()
        self.assertEqual((made["first"].cancelled(), made["second"].done()), (True, False))
        self.assertTrue(made["second"].cancel())

    def test_a_cancel_beside_a_submit_ends_its_future_if_its_task_is_removed(self):
        for moment in ("before", "after"):
            with self.subTest(moment):
                store, queue = self.hooked(f"{moment}.db")
                cluster, made = self.cluster({"echo": echo}, queue, auto_initialize=False), []
                old, come, go_on = cluster.submit("echo", 1, task_id="x"), threading.Event(), threading.Event()

                def hold_up(name, *_, come=come, go_on=go_on):
                    if name == "add":
                        come.set()
                        go_on.wait(PATIENCE)

                setattr(store, moment, hold_up)
                submit = functools.partial(cluster.submit, "echo", 2, task_id="x", if_exists="replace")
                thread = threading.Thread(target=lambda made=made, submit=submit: made.append(submit()))
                thread.start()
                self.assertTrue(come.wait(PATIENCE))
                self.assertTrue(cluster.cancel("x"))
                go_on.set()
                thread.join()
                self.assertEqual((old.cancelled(), made[0].cancelled()), (True, moment == "after"))

    def test_a_future_is_found_while_another_of_its_id_ends(self):
        queue, switch = self.queue(), sys.getswitchinterval()
        futures = self.cluster({"echo": echo}, queue, auto_initialize=False)._engine.futures  # inside
        row = taskpool._make_row(NOW, "echo", task_id="x")[0]
        one, other = (taskpool.TaskFuture(futures, row._replace(created_at=NOW + i)) for i in range(2))
        futures.add(one)
        looks, missed, end = [], [], threading.Event()

        def look():
            while not end.is_set():
                looks.append(1)
                if not futures.of(one._row):
                    missed.append(1)

        thread = threading.Thread(target=look)
        self.addCleanup(sys.setswitchinterval, switch)
        sys.setswitchinterval(1e-6)
        thread.start()
        eventually(looks.__len__)
        for _ in range(20_000):
            futures.add(other)
            futures.discard(other)
        end.set()
        thread.join()
        self.assertEqual(missed, [])
        futures.discard(one)
        self.assertFalse(futures)


class TestReportsToAStoreThatFails(InFolder):
    def test_only_the_last_report_of_a_run_waits(self):
        store, queue = self.hooked()
        path = str(self.folder / "held")
        with mock.patch.object(taskpool, "REPORT_STORE_SECONDS", 0.001), mock.patch.object(taskpool, "STORE_CAP_SECONDS", 0.1):
            cluster = self.cluster({"report": report_and_hold}, queue)
            future = cluster.submit("report", path)
            begun(path)
            store.fails["turn"] = 10**6
            eventually(lambda: store.fails["turn"] < 10**6 - 20)
            source = cluster._engine.sources[1]  # inside
            counts = [(time.sleep(0.01), len(source.unsettled))[1] for _ in range(50)]
            self.assertLess(max(counts), 10)
            store.fails.clear()
            let_end(path)
            self.assertEqual(future.result(PATIENCE), "held")


class TestWorkersThatEnd(InFolder):
    def test_a_worker_that_ends_after_its_task_is_not_waited_for_while_the_task_runs(self):
        cluster, path = self.cluster({"hold": hold}, max_tasks_per_worker=1, refresh_rate=10**7), str(self.folder / "held")
        future = cluster.submit("hold", path)
        begun(path)
        with mock.patch.object(cluster._engine, "turn", side_effect=cluster._engine.turn) as turn:  # inside
            time.sleep(1.0)
            self.assertLess(turn.call_count, 50)
            let_end(path)
            self.assertEqual(future.result(PATIENCE), "held")
        eventually(lambda: not cluster.workers())

    def test_a_worker_without_functions_that_does_not_end_is_killed_soon(self):
        out = self.run_script(
            """
            import threading, time
            from taskpool import Cluster, TaskQueue
            if Cluster.is_master():
                cluster = Cluster({"lambda": lambda job: 1}, TaskQueue("tasks.db"))
                print(type(cluster.submit("lambda").exception()).__name__)
                began = time.monotonic()
                cluster.shutdown()
                print(time.monotonic() - began < 6.0)
            else:
                threading.Thread(target=time.sleep, args=(600,)).start()
            """
        )
        self.assertEqual(out, "RuntimeError\nTrue\n")


class TestCancelledRuns(InFolder):
    @mock.patch.object(taskpool, "WATCH_SECONDS", 3600.0)  # Nothing else is in the way.
    def test_what_ends_as_it_is_cancelled_is_not_retried_and_not_repeated(self):
        functions = {"hold": hold, "hold_and_fail": hold_and_fail}
        cluster = self.cluster(functions, max_available_workers=1, refresh_rate=10**7)
        cases = ("hold_and_fail", {"retries": 3, "retry_delay": 0}), ("hold", {"repeat": timedelta(seconds=1)})
        for in_memory, (kind, options) in itertools.product((False, True), cases):
            with self.subTest(kind, in_memory=in_memory):
                path = str(self.folder / f"{kind} {in_memory}")
                future = cluster.submit(kind, path, task_id=path, in_memory=in_memory, **options)
                begun(path)
                go_on, ended = threading.Event(), threading.Event()

                def hold_up(go_on=go_on, ended=ended):
                    ended.set()
                    go_on.wait(PATIENCE)

                cluster._engine.post(hold_up)  # inside
                self.assertTrue(ended.wait(PATIENCE))
                let_end(path)
                channel = cluster._engine.crew.workers[0].channel  # inside
                eventually(lambda channel=channel: select.select([channel], [], [], 0)[0])
                with concurrent.futures.ThreadPoolExecutor(1) as threads:
                    answer = threads.submit(cluster.cancel, path)
                    eventually(lambda: any("cancel" in getattr(call, "__qualname__", "") for call in [*cluster._engine.inbox]))  # inside
                    go_on.set()
                    self.assertTrue(answer.result(PATIENCE))
                self.assertTrue(future.cancelled())
                eventually(cluster._engine.idle.is_set)  # inside
                self.assertTrue(cluster.drain(PATIENCE))
                verbs = cluster.queue.in_memory if in_memory else cluster.queue
                self.assertEqual(verbs.find(), [])


class TestFuturesOfOthers(InFolder):
    """Futures of tasks that others run: looks at the store, in a cluster without a process."""

    def setUp(self):
        super().setUp()
        self.store, self.tasks = self.hooked()
        self.waits = self.cluster({"echo": echo}, self.tasks, auto_initialize=False)

    def claim(self, owner):
        now = self.tasks._now()
        (row,) = self.store.claim(owner, {"echo": 1.0}, 1, now)
        return lambda: self.store.settle(owner, [Outcome(row.id, row.claim, "done")], now)

    def look(self):
        futures = self.waits._engine.futures  # inside
        for found in futures.look(self.store):
            futures.compare(*found)

    def test_a_future_that_found_its_task_in_another_cluster_ends_whatever_comes_after_it(self):
        for how in ("nothing", "follows", "follows later", "is removed"):
            self.tasks.add_task("echo", task_id=how)
            settle = self.claim("another|")
            found = [self.waits.submit("echo", 0, task_id=how, if_exists="keep") for _ in range(2)]
            if how != "nothing":
                due_date = timedelta(days=how == "follows later")
                follows = self.waits.submit("echo", 1, task_id=how, if_exists="replace", due_date=due_date)
            if how == "is removed":
                self.tasks.remove(task_id=how)
            self.look()
            self.assertFalse(any(future.done() for future in found))
            settle(), self.look()
            self.assertEqual([future.result(0) for future in found], [None, None])
            if how != "nothing":
                self.assertEqual(follows.cancelled(), how == "is removed")
                self.assertTrue(follows.cancel())

    def test_cancel_of_a_run_that_has_ended_leaves_the_task_that_has_its_id_now(self):
        first = self.waits.submit("echo", 1, task_id="y")
        self.claim(self.waits._engine.owner)()  # inside. It has ended, but nobody was told.
        second = self.waits.submit("echo", 2, task_id="y", due_date=timedelta(hours=1))
        self.assertFalse(first.cancel())
        self.assertEqual(self.tasks.count(task_id="y"), 1)
        self.assertTrue(second.cancel())


KILLERS = [asyncio.CancelledError, SystemExit, KeyboardInterrupt, Bare, ValueError]


class TestCodeOfUsers(WithCluster):
    """It runs in no thread that others wait for, and whatever it raises is its own affair."""

    @classmethod
    def setUpClass(cls):
        EVERYTHING["known"] = known
        super().setUpClass()

    def test_callbacks_have_a_thread_of_their_own_and_may_wait_for_other_tasks_there(self):
        """However the Future ends, and whoever ends it."""
        for in_memory, how in itertools.product((False, True), ("done", "cancel waiting", "cancel running", "remove", "replace")):
            with self.subTest(how=how, in_memory=in_memory):
                path, called = str(self.folder / f"{how} {in_memory}"), queues.SimpleQueue()
                runs, options = how in ("done", "cancel running"), {"task_id": path, "in_memory": in_memory}
                future = self.submit("hold", path, due_date=timedelta(hours=not runs), **options)

                def call_back(future, called=called, in_memory=in_memory):
                    result = self.result("echo", 2, in_memory=in_memory)
                    called.put((threading.current_thread().name, future.done(), result))

                future.add_done_callback(call_back)
                if runs:
                    begun(path)
                if "cancel" in how:
                    self.assertTrue(self.shared.cancel(path))
                    self.assertTrue(future.cancelled())
                elif how == "replace":
                    self.assertEqual(self.result("echo", 3, if_exists="replace", **options), 3)
                elif how == "remove":
                    self.verbs(in_memory).remove(task_id=path)
                let_end(path)
                self.assertEqual(called.get(timeout=PATIENCE), ("taskpool-callbacks", True, 2))

    def test_a_callback_of_ones_own_cancel_is_called_at_once(self):
        future, called = self.submit("echo", due_date=timedelta(hours=1)), []
        for error in KILLERS:
            future.add_done_callback(lambda _, error=error: called.append(error) or throw(error))
        with self.assertLogs("taskpool", "ERROR") as logs, self.assertRaises(asyncio.CancelledError):
            future.cancel()
        self.assertEqual((called, len(logs.output)), (KILLERS, 4))

    def test_a_callback_that_raises_keeps_no_other_future_from_its_end(self):
        for how in ("end", "shut down", "never start", "cancel"):
            with self.subTest(how=how), self.assertLogs("taskpool", "ERROR") as logs:
                starts = how != "never start"
                cluster = self.cluster({"echo": echo}, self.queue(f"{how}.db"), auto_initialize=starts, start_method=METHODS[-1])
                due_date, called = timedelta(hours=how != "end"), queues.SimpleQueue()
                options = {"due_date": due_date, "in_memory": starts}
                futures = [cluster.submit("echo", i, **options) for i in range(60)]
                for i, future in enumerate(futures):
                    future.add_done_callback(lambda _, i=i: throw(KILLERS[i % 5]))
                    future.add_done_callback(called.put)
                if how == "cancel":
                    for future in futures:
                        cluster.cancel(future.task.id)
                if how != "end":
                    cluster.shutdown(cancel_futures=how == "shut down")
                self.assertEqual(concurrent.futures.wait(futures, PATIENCE).done, set(futures))
                self.assertEqual({called.get(timeout=PATIENCE) for _ in futures}, set(futures))
                cluster.shutdown()
                for error in KILLERS:
                    self.assertIn(error.__name__, "".join(logs.output))

    def test_a_result_is_unpickled_by_who_asks_for_it_and_holds_up_nobody_else(self):
        Known.threads.clear(), Known.go.clear()
        slow, called = self.submit("known", "wait"), threading.Event()
        slow.add_done_callback(lambda _: called.set())
        self.assertTrue(called.wait(PATIENCE))
        self.assertEqual(Known.threads, [])
        with concurrent.futures.ThreadPoolExecutor(2, "asker") as askers:
            asked = [askers.submit(slow.result, PATIENCE) for _ in range(2)]
            eventually(lambda: Known.threads)
            others = [self.submit("echo", i) for i in range(20)]
            self.assertEqual(len(concurrent.futures.wait([*others, slow], PATIENCE).done), 21)
            self.assertEqual([future.result() for future in others], list(range(20)))
            Known.go.set()
            self.assertIs(asked[0].result(PATIENCE), asked[1].result(PATIENCE))
        self.assertIs(slow.result(), asked[0].result())
        self.assertEqual({name.partition("_")[0] for name in Known.threads}, {"asker"})

    def test_an_exception_is_rebuilt_by_who_asks_for_it(self):
        Known.threads.clear()
        future = self.submit("known", "raise")
        self.assertEqual(concurrent.futures.wait([future], PATIENCE).done, {future})
        self.assertEqual(Known.threads, [])
        error = future.exception()
        self.assertEqual((type(error), error.how), (KnownError, "raise"))
        self.assertIn("in known", str(error.__cause__))
        self.assertIs(future.exception(), error)
        self.assertEqual(Known.threads, ["MainThread"])
        with self.assertRaises(KnownError):
            future.result()

    def test_a_log_handler_that_raises_whatever_ends_no_thread_of_the_cluster(self):
        class Raises(logging.Handler):
            def emit(self, record):
                if threading.current_thread() is not threading.main_thread():
                    raised.append(threading.current_thread().name)
                    raise KILLERS[len(raised) % 5]

        raised, logger, handler, called = [], logging.getLogger("taskpool"), Raises(), queues.SimpleQueue()
        logger.addHandler(handler)
        self.addCleanup(logger.removeHandler, handler)
        self.addCleanup(logger.setLevel, logger.level)
        logger.setLevel(logging.INFO)
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            with self.cluster({"fail": fail}) as cluster:
                cluster.queue.add_task("fail", in_memory=True, due_date=timedelta(hours=1))
                futures = [cluster.submit("fail", i, retries=1, retry_delay=0) for i in range(20)]
                for future in futures:
                    future.add_done_callback(lambda _: 1 / 0)
                    future.add_done_callback(called.put)
                self.assertEqual({type(called.get(timeout=PATIENCE).exception()) for _ in futures}, {ValueError})
            logger.removeHandler(handler)
        self.assertLessEqual({"taskpool-dispatcher", "taskpool-callbacks"}, set(raised))
        self.assertIn("Bare", shown.getvalue())


class TestFailures(WithCluster):
    """How tasks can fail, and what a Future, the task and the listener then hold."""

    def test_the_future_raises_the_tasks_own_exception_with_its_traceback(self):
        """EX-06: also one that looks like the pool's own."""
        error = self.error("fail")
        self.assertEqual((type(error), str(error)), (ValueError, "attempt 1"))
        # It begins in the user's code.
        self.assertRegex(str(error.__cause__), r'Traceback \(most recent call last\):\n  File ".*test_taskpool\.py", line \d+, in fail\n')
        for kind, error in [("timeout", TimeoutError), ("eof", EOFError), ("deep", RecursionError), ("surrogate", ValueError), *LIKE_OURS.items()]:
            with self.subTest(kind=kind):
                caught = self.error("raise_kind", kind)
                if issubclass(error, Exception):
                    self.assertIs(type(caught), error)
                else:
                    self.assertTrue(caught.type_name.endswith(kind), caught.type_name)

    def test_an_exception_that_cannot_be_rebuilt_becomes_a_remote_error(self):
        """EX-01, EX-03, EX-05, EX-09, ENGINE 22, 23."""
        for kind, type_name, text in [
            ("odd", "Odd", "1: odd"), ("unprintable", "Unprintable", ""), ("leaving", "Leaving", ""), ("exit", "SystemExit", "disk missing"),
            ("exit0", "SystemExit", "0"), ("interrupt", "KeyboardInterrupt", ""), ("local", "Local", "inside"),
            ("lock", "ValueError", "holds a lock"), ("huge", "ValueError", "xxx"), ("base", "Bare", "bare"),
        ]:
            with self.subTest(kind=kind):
                error = self.error("raise_kind", kind)
                if type(error) is RemoteError:
                    self.assertTrue(error.type_name.endswith(type_name), error.type_name)
                    self.assertIn("raise_kind", error.traceback)
                    self.assertLess(len(error.traceback), 200_000)
                else:
                    self.assertEqual(type(error).__name__, type_name)
                if kind not in ("unprintable", "leaving"):
                    self.assertIn(text, str(error))
                task = self.shared_queue.find_one(state="failed", task_type="raise_kind")
                self.assertIn(type_name, task.error.split("\n")[0])
                self.shared_queue.remove(state="failed")

    def test_a_result_that_cannot_travel_fails_that_task_only(self):
        """SE-09, ENGINE 20, 22."""
        for kind, text in [
            ("lambda", "pickle"), ("generator", "pickle"), ("lock", "pickle"),
            ("exploding", "exploded while loading"), ("exits", "SystemExit"),
        ]:
            with self.subTest(kind=kind):
                pid = self.result("pid")
                self.assertIn(text, str(self.error("return_kind", kind)))
                self.assertTrue(is_alive(pid) or not LINUX)
        self.assertEqual(len(self.result("return_kind", "large")), 3_000_000)

    def test_starts_are_retries_plus_one_for_every_kind_of_failure(self):
        """RT-03, RT-04, TO-04, RT-05. And until one succeeds."""
        kinds = {"raise": ValueError, "kill": WorkerDied, "exit": WorkerDied, "sleep": TaskTimeout}
        failing = {}
        for how, (retries, in_memory) in itertools.product(kinds, ((0, False), (1, True), (2, False))):
            path = str(self.folder / f"{how} {retries} {in_memory}")
            failing[path, retries, how] = self.submit(
                "badly", {"file": path, "how": how}, retries=retries, retry_delay=0,
                timeout=0.2 if how == "sleep" else None, in_memory=in_memory,
            )
        for (path, retries, how), future in failing.items():
            self.assertIs(type(future.exception(PATIENCE)), kinds[how])
            attempts = [int(line.split()[1]) for line in lines_of(path)]
            self.assertEqual(attempts, list(range(1, retries + 2)), path)
        for in_memory in (False, True):
            self.assertEqual(self.result("succeed_at", 3, retries=3, retry_delay=0.01, in_memory=in_memory), 3)

    def test_a_dead_worker_is_told_with_its_signal_pid_type_and_id(self):
        """ENGINE 2, 5. TO-01: and a timeout with its seconds."""
        for how, code, text in [("kill", -9, "SIGKILL"), ("exit", 3, "code 3")]:
            error = self.error("badly", {"file": str(self.folder / how), "how": how}, task_id=how)
            self.assertEqual((error.exit_code, error.task_type, error.task_id), (code, "badly", how))
            for part in (text, "'badly'", repr(how), str(error.pid)):
                self.assertIn(part, str(error))
            self.assertEqual(str(pickle.loads(pickle.dumps(error))), str(error))
        error = self.error("badly", {"file": str(self.folder / how), "how": "sleep"}, timeout=0.2)
        self.assertIsInstance(error, TimeoutError)
        self.assertRegex(str(error), r"0\.2 s")

    def test_a_kept_result_is_json_or_says_why_not_and_is_kept_for_its_time(self):
        for in_memory in (False, True):
            task = self.submit("echo", {"a": 1}, keep_result=60, in_memory=in_memory).task
            kept = self.shared_queue.wait(task.id, PATIENCE)
            self.assertEqual((kept.state, kept.result, kept.error), ("done", {"a": 1}, None))
        with mock.patch.object(self.shared_queue, "clock", lambda: time.time() + 61):
            eventually(lambda: self.shared_queue.in_memory.find_by_id(task.id) is None)
        future = self.submit("return_kind", "tuple", keep_result=60)
        self.assertEqual(future.result(PATIENCE), (1, 2))
        kept = self.shared_queue.wait(future.task.id, PATIENCE)
        self.assertEqual((kept.state, kept.result), ("done", None))
        self.assertIn("tuple", kept.error)


class TestWhatATaskAsksFor(WithCluster):
    """Which end a task asks for by GiveUp and Retry."""

    def setUp(self):
        super().setUp()
        self.path, self.errors = self.folder / "starts", []
        self.shared_queue.add_event_listener("error", lambda error, task: self.errors.append((type(error), task.state, task.attempt)))
        self.addCleanup(self.shared_queue.remove_event_listener, "error")

    def wish(self, *what, add=None, way=None, times=99, **options):
        data = {"file": str(self.path), "raise": list(what), "way": way, "times": times}
        return (add or self.submit)("wish", data, **options)

    def starts(self):
        """The attempt and instant of each start since the last look."""
        lines = [line.split() for line in self.path.read_text().splitlines()]
        self.path.unlink()
        return [(int(attempt), float(at)) for attempt, at in lines]

    @unittest.skipIf(sys.version_info < (3, 11), "there are no groups of exceptions")
    def test_a_group_asks_for_what_the_first_in_it_asks(self):
        group = ExceptionGroup  # noqa: F821
        give_up, again = taskpool.GiveUp("enough"), taskpool.Retry(5)
        for errors, plan in (
            ([ValueError(), give_up], taskpool.Plan(may_retry=False)), ([group("", [again]), give_up], taskpool.plan_of(again)),
            ([ValueError()], taskpool.plan_of(ValueError())),
        ):
            self.assertEqual(taskpool.plan_of(group("", errors)), plan)
            broken = type("Broken", (group,), {"exceptions": 5})("", errors)
            self.assertEqual(taskpool.plan_of(broken), taskpool.Plan())
        self.wish("GiveUp", "enough", way="group", retries=5).exception(PATIENCE)
        self.assertNotIn("event loop", self.shared_queue.find_one(state="failed").error)
        self.shared_queue.remove(state="failed")
        self.assertEqual([attempt for attempt, _ in self.starts()], [1])

    def test_who_gives_up_is_not_started_again(self):
        for (way, kind), memory in itertools.product(
            (*itertools.product((None, "async", "future", "conversation"), ["GiveUp"]), (None, "Hopeless")), (False, True)):
            with self.subTest(way=way, kind=kind, memory=memory):
                error = self.wish(kind, "enough", way=way, retries=5, in_memory=memory).exception(PATIENCE)
                if kind == "GiveUp":
                    self.assertEqual((type(error), str(error)), (taskpool.GiveUp, "enough"))
                else:
                    self.assertRegex(error.type_name, "Hopeless$")
                (task,) = self.verbs(memory).find(state="failed")
                self.assertIn(kind, task.error.partition("\n")[0])
                self.assertEqual(("the cause" in task.error), way is None)
                self.assertEqual([attempt for attempt, _ in self.starts()], [1])
                eventually(lambda: len(self.errors) == 1)
                self.assertEqual(self.errors.pop()[1:], ("failed", 1))
                self.verbs(memory).remove(state="failed")

    def test_a_retry_comes_when_the_task_says_and_uses_up_the_attempts(self):
        for way, memory in (None, False), ("conversation", True):
            with self.subTest(way=way, memory=memory):
                error = self.wish("Retry", 0.2, way=way, retries=2, retry_delay=3000, in_memory=memory).exception(PATIENCE)
                self.assertEqual((type(error), error.seconds, error.counts), (taskpool.Retry, 0.2, True))
                starts = self.starts()
                self.assertEqual([attempt for attempt, _ in starts], [1, 2, 3])
                for (_, one), (_, next_one) in zip(starts, starts[1:]):
                    self.assertGreaterEqual(next_one - one, 0.199)
                eventually(lambda: len(self.errors) == 3)
                self.assertEqual([state for _, state, _ in self.errors], ["waiting", "waiting", "failed"])
                self.errors.clear()
                self.verbs(memory).remove(state="failed")

    def test_not_now_is_no_failure_however_often(self):
        for kind, memory in itertools.product((("Retry", 0.02, False), ("Busy", 0.02)), (False, True)):
            with self.subTest(kind=kind, memory=memory), self.assertLogs("taskpool", "INFO") as logs:
                self.assertEqual(self.wish(*kind, times=20, in_memory=memory).result(PATIENCE), 1)
                self.assertEqual([attempt for attempt, _ in self.starts()], [1] * 21)
                self.assertEqual((self.errors, sum("not now, next in 0.02 s" in line for line in logs.output)), ([], 20))
                self.assertNotIn("WARNING", "".join(logs.output))

    def test_a_retry_that_its_subclass_spoils_is_an_ordinary_failure(self):
        for seconds in ("soon", -1, None):
            error = self.wish("Vague", seconds, retries=1, retry_delay=0).exception(PATIENCE)
            self.assertEqual((type(error), error.seconds), (Vague, seconds), error)
            self.assertEqual([attempt for attempt, _ in self.starts()], [1, 2])

    def test_an_item_speaks_for_its_chunk(self):
        data = [{"file": str(self.path), "raise": what, "times": times} for what, times in ((["Retry", 0.02, False], 2), (["GiveUp", "enough"], 99))]
        with self.assertRaisesRegex(taskpool.GiveUp, "enough"):
            list(self.shared.map("wish", data, chunksize=2, in_memory=True, retries=3))
        self.assertEqual([attempt for attempt, _ in self.starts()], [1] * 4)

    def test_run_due_does_what_they_ask_for(self):
        queue = self.queue()
        queue.add_event_listener("error", lambda error, task: self.errors.append((str(error), task.state)))
        for what, options, runs, errors in (
            (("GiveUp", "enough"), {"retries": 5}, [("failed", 1)], [("enough", "failed")]),
            (("Retry", 60), {"retries": 1}, [("waiting", 1), ("failed", 2)], [("again in 60 s", "waiting"), ("again in 60 s", "failed")]),
            (("Busy", 60), {"times": 3, "expires": 150}, [("waiting", 1)] * 3 + [("failed", 0)], None),
            (("Hopeless", "x"), {"repeat": timedelta(minutes=6)}, [("waiting", 1)] * 2, None),
        ):
            with self.subTest(what):
                self.wish(*what, add=queue.add_task, **options)
                ended = queue.run_due(EVERYTHING, until=timedelta(minutes=10))
                self.assertEqual([(task.state, task.attempt) for task in ended], runs)
                self.assertEqual(self.errors, errors or self.errors)
                self.errors.clear(), self.starts(), queue.remove(state=["failed", "waiting"])
        for _ in range(2):
            self.wish("Busy", 60, add=queue.add_task)
        self.assertEqual(len(queue.run_due(EVERYTHING, raise_errors=True)), 2)  # No failure.

    def test_they_are_plain_exceptions_elsewhere_and_refuse_what_is_wrong(self):
        for error in (taskpool.Retry(timedelta(minutes=1)), taskpool.Retry(seconds=60, counts=False), taskpool.GiveUp("no")):
            again = pickle.loads(pickle.dumps(error))
            self.assertEqual((type(again), str(again), vars(again)), (type(error), str(error), vars(error)))
        for wrong, kind in {(-1,): ValueError, ("1",): TypeError, (math.nan,): ValueError, (1, 0): TypeError, (0, False): ValueError}.items():
            with self.assertRaisesRegex(kind, "seconds is|counts is"):
                taskpool.Retry(*wrong)
        self.assertEqual((taskpool.Retry(0).seconds, taskpool.Retry(1e300).seconds), (0, 1e300))


class TestExpires(WithCluster):
    """A task that is to start in time or not at all."""

    def test_what_is_late_fails_and_is_told_like_any_failure(self):
        told = queues.SimpleQueue()
        self.shared_queue.add_event_listener("error", lambda error, task: told.put((task.id, str(error), task.state, task.error)))
        self.addCleanup(self.shared_queue.remove_event_listener, "error")
        past, soon = datetime.now(timezone.utc) - timedelta(seconds=1), datetime.now() + timedelta(hours=1)
        for memory in (False, True):
            with self.subTest(memory=memory), self.assertLogs("taskpool", "ERROR") as logs:
                late = self.submit("echo", 1, expires=past, task_id="late", in_memory=memory)
                error = late.exception(PATIENCE)
                self.assertRegex(str(error), "^Expired: due .* to be started within 0 s$")
                self.assertIs(type(error), taskpool.TaskPoolError)
                self.assertEqual(told.get(timeout=PATIENCE), ("late", str(error), "failed", str(error)))
                self.assertRegex(logs.output[0], "late.*failed: Expired: due")
                (task,) = self.verbs(memory).find(state="failed")
                self.assertEqual((task.error, task.attempt, task.started_at), (str(error), 0, None))
                self.assertGreaterEqual(task.ended_at, task.created_at)
                if not memory:
                    self.assertEqual(self.shared_queue.wait("late", PATIENCE).state, "failed")
                self.assertEqual(self.result("echo", 2, expires=soon, in_memory=memory), 2)
                self.assertEqual(self.verbs(memory).retry(task_id="late"), 1)
                eventually(lambda memory=memory: not self.verbs(memory).find())

    def test_the_seconds_count_from_the_due_date(self):
        queue, now = self.queue(), 1_800_000_000
        queue.clock, due = (lambda: now), datetime.fromtimestamp(now + 60, timezone.utc)
        for expires, seconds in (5, 5.0), (timedelta(minutes=1), 60.0), (due + timedelta(seconds=7), 7.0), (due - timedelta(days=1), -86400.0):
            task = queue.add_task("x", due_date=due, expires=expires)
            self.assertEqual((task.expires, queue.find_one(task_id=task.id)), (seconds, task))
            self.assertEqual(queue.update(task.id, expires=expires).expires, seconds)
            self.assertIsNone(queue.update(task.id, expires=None).expires)
            self.assertEqual(queue.update(task.id, expires=due, due_date=due - timedelta(seconds=9)).expires, 9)
        for wrong, kind in {0: ValueError, -1: ValueError, timedelta(0): ValueError, math.inf: ValueError, "1": TypeError, True: TypeError}.items():
            with self.assertRaisesRegex(kind, "^expires is .*over 0, after the due date; or a datetime"):
                queue.add_task("x", expires=wrong)
        with self.assertRaisesRegex(TypeError, "expires is .* it counts from the due date of each task"):
            queue.task("x", expires=due)
        self.assertEqual(queue.count(), 4)

    def test_it_can_be_declared_and_a_schedule_follows_the_code(self):
        queue, start = self.queue(), datetime(2026, 3, 1, tzinfo=timezone.utc)
        queue.clock = start.timestamp
        queue.task("x", expires=30)(echo)
        self.assertEqual((queue.add_task("x").expires, queue.add_task(echo, expires=None).expires), (30, None))
        queue.remove(state="waiting")
        for expires in (30, 40):
            queue.task("x", expires=expires, repeat=timedelta(minutes=1))(echo)
            self.assertEqual([t.state for t in queue.run_due()], ["waiting"] * (expires == 30))
            self.assertEqual(queue.find_one().expires, expires)
        queue.clock = (start + timedelta(seconds=101)).timestamp
        (skipped,) = queue.run_due()
        self.assertEqual((skipped.state, skipped.due_date, queue.find_one()), ("waiting", start + timedelta(minutes=2), skipped))
        self.assertRegex(skipped.error, "^Expired: due 2026-03-01 00:01:00")
        self.assertEqual((skipped.started_at, skipped.ended_at), (None, start + timedelta(seconds=101)))
        with self.assertRaisesRegex(taskpool.TaskPoolError, "^Expired: due 2026-03-01 00:02:00"):
            queue.clock = (start + timedelta(seconds=161)).timestamp
            queue.run_due(raise_errors=True)


class TestFollow(WithCluster):
    """if_exists="follow": no event is lost, and none runs twice."""

    def test_a_hundred_events_during_a_run_make_one_more_run_with_the_last_data(self):
        for memory in (False, True):
            with self.subTest(memory=memory):
                first, path, _ = self.hold(f"first {memory}", task_id="t", in_memory=memory)
                paths = [str(self.folder / f"{i} {memory}") for i in range(100)]
                let_end(paths[-1])
                adds = [self.submit("hold", p, task_id="t", in_memory=memory, if_exists="follow") for p in paths]
                self.assertEqual({future.task.created_at for future in adds}, {adds[0].task.created_at})
                self.assertFalse(os.path.exists(paths[-1] + ".started"))
                let_end(path)
                first.result(PATIENCE), [future.result(PATIENCE) for future in adds]
                self.assertEqual([p for p in paths if os.path.exists(p + ".started")], paths[-1:])

    def test_a_hundred_events_before_a_run_make_one_at_the_first_due_date(self):
        for memory in (False, True):
            with self.subTest(memory=memory):
                options = {"task_id": "t", "in_memory": memory, "if_exists": "follow"}
                adds = [self.submit("about", i, due_date=timedelta(hours=1 + i), priority=i, **options) for i in range(100)]
                self.assertEqual({(future.task.due_date, future.task.data) for future in adds}, {(adds[0].task.due_date, 99)})
                self.verbs(memory).update("t", due_date=None)
                self.assertEqual({future.result(PATIENCE)[2:4] for future in adds}, {(99, 0)})


class TestDataInMemory(WithCluster):
    """Data of in-memory tasks are anything that pickles."""

    def test_they_come_back_equal_wherever_they_are_looked_at(self):
        heard, queue = queues.SimpleQueue(), self.queue()
        self.shared_queue.add_event_listener("done", lambda value, task: heard.put((value, task.data)))
        self.addCleanup(self.shared_queue.remove_event_listener, "done")
        for value in ANYTHING:
            with self.subTest(value=repr(value)[:40]):
                future = self.submit("echo", value, in_memory=True)
                found = [future.result(PATIENCE), future.task.data, *heard.get(timeout=PATIENCE)]
                queue.add_task("echo", task_id="t", in_memory=True)
                for task in (queue.in_memory.update("t", data=value), *queue.in_memory.find()):
                    found += [same.data for same in (task, pickle.loads(pickle.dumps(task)), copy.deepcopy(task))]
                    self.assertEqual((copy.copy(task), len({task, copy.copy(task)})), (task, 1))
                queue.run_due({"echo": lambda job, found=found: found.append(job.data)})
                self.assertEqual([(type(v), v) for v in found], [(type(value), value)] * 11)

    def test_what_cannot_be_pickled_is_refused_in_the_call_and_nothing_is_added(self):
        queue = self.queue()
        task = queue.add_task("x", in_memory=True, due_date=timedelta(hours=1))
        deep = functools.reduce(lambda inner, _: [inner], range(100_000), [])
        for value in (threading.Lock(), lambda: 5, (i for i in ()), [Refusing(ValueError("no"))], Refusing(Unprintable()), deep):
            for add in (
                lambda value=value: queue.add_task("x", value, in_memory=True),
                lambda value=value: queue.add_tasks([{"task_type": "x", "data": v, "in_memory": True} for v in (1, value)]),
                lambda value=value: queue.in_memory.update(task.id, data=value),
                lambda value=value: self.submit("echo", value, in_memory=True),
            ):
                with self.assertRaisesRegex(TypeError, "(?s)^(tasks.1.: )?data is .*give what can be pickled; .* raised"):
                    add()
        self.assertEqual((queue.in_memory.find(), self.shared_queue.in_memory.find()), ([task], []))

    def test_what_cannot_be_unpickled_fails_without_a_retry_and_harms_nobody(self):
        """Not even if unpickling raises SystemExit or KeyboardInterrupt, in a worker or a listener."""
        told, queue = queues.SimpleQueue(), self.shared_queue

        def listen(error, task):
            told.put(error)
            told.put(task.data)  # Raises.

        queue.add_event_listener("error", listen)
        self.addCleanup(queue.remove_event_listener, "error")
        pids = {worker["pid"] for worker in self.shared.workers()}
        for error in (ValueError("no"), SystemExit(3), Unprintable(), RecursionError(), KeyboardInterrupt()):
            with self.subTest(error=type(error)), self.assertLogs("taskpool", "ERROR") as logs:
                value = Fragile(error)
                future = self.submit("echo", value, in_memory=True, retries=3, retry_delay=0)
                raised = future.exception(PATIENCE)
                self.assertRegex(f"{type(raised)} {raised}", type(error).__name__)
                self.assertRegex(str(told.get(timeout=PATIENCE)), type(error).__name__)
                eventually(lambda logs=logs: "taskpool-listener" in str(logs.output))
                (failed,) = queue.in_memory.find(state="failed")
                self.assertEqual((failed.id, failed.attempt), (future.task.id, 1))
                queue.in_memory.remove(state="failed")
            if not isinstance(error, KeyboardInterrupt):  # In the main thread that is the user's.
                self.assertRegex(str(raised), "data cannot be unpickled")
                with self.assertRaisesRegex(ValueError, "data cannot be unpickled"):
                    failed.data.clear()
                here = self.queue()
                here.add_task("x", value, in_memory=True, retries=3)
                (ended,) = here.run_due({"x": echo})
                self.assertEqual((ended.state, ended.attempt), ("failed", 1))
        self.assertEqual({worker["pid"] for worker in self.shared.workers()}, pids)
        self.assertTrue(told.empty())

    def test_they_see_no_json(self):
        never = mock.Mock(side_effect=AssertionError("JSON"))
        queue, found = self.queue(), []
        queue.add_event_listener("done", lambda value, task: found.append(task.data))
        with mock.patch.multiple(taskpool, _check_json=never, _encode=never, _decode=never):
            # A forked worker has these, too. (Python 3.15 itself uses the module json as it starts one.)
            method = "fork" if "fork" in METHODS else "spawn"
            with self.cluster({"echo": echo}, queue, in_memory_only=True, start_method=method) as cluster:
                for options in ({}, {"if_exists": "replace"}):
                    data = {"a": [1, Point()]}
                    self.assertEqual(cluster.submit("echo", data, task_id="t", retries=1, **options).result(PATIENCE), data)
            for _ in range(2):  # As the heartbeat does, each second.
                queue.in_memory._store.tally({"echo": collections.Counter(failed=1)})
        self.assertEqual((found, never.called), ([data, data], False))

    def test_a_running_task_is_replaced_by_one_with_such_data(self):
        for task_type, submits in itertools.product(("hold", "hold_and_fail"), (False, True)):
            path = str(self.folder / f"{task_type} {submits}")
            with self.subTest(task_type, submits=submits), self.cluster({**EVERYTHING, "hold_and_fail": hold_and_fail}, start_method=METHODS[-1]) as cluster:
                cluster.submit(task_type, path, task_id="t", in_memory=True, retries=1)
                begun(path)
                add = cluster.submit if submits else cluster.queue.add_task
                heard = queues.SimpleQueue()
                cluster.queue.add_event_listener("done", lambda value, task, heard=heard: heard.put(value))
                add("echo", {Point: b"1"}, task_id="t", in_memory=True, if_exists="replace")
                let_end(path)
                while (value := heard.get(timeout=PATIENCE)) != {Point: b"1"}:
                    self.assertEqual(task_type, "hold", value)

    def test_they_fill_keyword_parameters(self):
        queue, found = self.queue(), []

        @queue.task(in_memory=True)
        def keep(job, *, at, **rest):
            found.append((at, rest))

        queue.add_task(keep, {"at": Point(1), "and": {2}})
        self.assertEqual([task.error for task in queue.run_due()], [None])
        self.assertEqual(found, [(Point(1), {"and": {2}})])
        for data in ({"at": 1, 5: 2}, {b"at": 1}, ("at", 1)):
            with self.assertRaisesRegex(TypeError, "^data "):
                queue.add_task(keep, data)

    @unittest.skipUnless(hasattr(signal, "SIGSTOP"), "no SIGSTOP")
    def test_large_ones_hold_up_no_other_task(self):
        """Those of a worker that does not read them, say."""
        cluster, held = self.cluster(EVERYTHING, in_memory_only=True, keep_alive="always"), str(self.folder / "held")
        cluster.submit("hold", held)
        begun(held)
        (pid,) = eventually(lambda: idle_pids(cluster))
        os.kill(pid, signal.SIGSTOP)
        self.addCleanup(lambda: is_alive(pid) and os.kill(pid, signal.SIGCONT))
        large = cluster.submit("pid", bytes(20_000_000))
        eventually(lambda: not idle_pids(cluster))  # It has the large one.
        let_end(held)
        self.assertNotIn(pid, [cluster.submit("pid").result(PATIENCE) for _ in range(20)])
        os.kill(pid, signal.SIGCONT)
        self.assertEqual(large.result(PATIENCE), pid)


class TestListeners(InFolder):
    """queue.add_event_listener: told after the state was stored; can break nothing."""

    def test_done_and_error_are_told_value_and_task(self):
        """TO-07: every failed start once, however it failed; and when each ran, as find() tells of the last."""
        queue, told = self.queue(), []
        queue.add_event_listener("done", lambda value, task: told.append(("replaced", task)))
        for event in ("done", "error"):
            queue.add_event_listener(event, lambda value, task: told.append((value, task)))
        hows = {"raise": ValueError, "kill": WorkerDied, "sleep": TaskTimeout}
        expected = [("good", list, "done", 1), ("late", int, "done", 2), ("late", ValueError, "waiting", 1)]
        for how, kind in hows.items():
            expected += [(how, kind, "waiting", 1), (how, kind, "failed", 2)]
        with self.cluster({"times": tell_times, "succeed_at": succeed_at, "badly": end_badly}, queue) as cluster:
            for tasks, in_memory in ((queue, False), (queue.in_memory, True)):
                before = datetime.now(timezone.utc)
                options = {"in_memory": in_memory, "retries": 1, "retry_delay": 0, "keep_result": 60}
                queue.add_task("times", task_id="good", **options)
                queue.add_task("succeed_at", 2, task_id="late", **options)
                for how in hows:
                    timeout = 0.3 if how == "sleep" else None
                    queue.add_task("badly", {"file": str(self.folder / how), "how": how}, task_id=how, timeout=timeout, **options)
                self.assertTrue(cluster.drain(PATIENCE))
                after, runs = datetime.now(timezone.utc), collections.defaultdict(list)
                self.assertEqual(sorted([(task.id, type(value), task.state, task.attempt) for value, task in told], key=str), sorted(expected, key=str))
                for value, task in told:
                    self.assertTrue(before < task.started_at <= task.ended_at < after, task)
                    runs[task.id].append((task.started_at, task.ended_at))
                    found = tasks.find_one(task_id=task.id)
                    if task.state == found.state:
                        self.assertEqual((found.started_at, found.ended_at), runs[task.id][-1])
                        self.assertEqual(found.result, value if task.state == "done" else None)
                self.assertLessEqual(runs["late"][0][1], runs["late"][1][0])
                (claimed, none, *span), (good,) = tasks.find_one(task_id="good").result, runs["good"]
                self.assertEqual((none, datetime.fromisoformat(claimed) <= good[0]), (None, True))
                self.assertLessEqual(timedelta(seconds=span[1] - span[0]), good[1] - good[0])
                self.assertGreaterEqual(runs["sleep"][1][1] - runs["sleep"][1][0], timedelta(seconds=0.3))
                told.clear(), tasks.remove(state=["done", "failed"])
            queue.remove_event_listener("done"), queue.remove_event_listener("done")
            queue.add_task("succeed_at", 1)
            cluster.drain(PATIENCE)
            self.assertEqual(told, [])

    def test_a_listener_that_raises_or_is_slow_stops_nothing(self):
        """LL-01, LL-03."""
        queue, release, told = self.queue(), threading.Event(), []

        def slow(value, task):
            told.append(value)
            if value == "slow":
                release.wait(PATIENCE)
            raise SystemExit("from a listener")

        queue.add_event_listener("done", slow)
        with self.assertLogs("taskpool", "ERROR") as logs, self.cluster({"echo": echo, "sleep": end_badly}, queue) as cluster:
            queue.add_task("echo", "slow")
            eventually(lambda: told)
            self.assertEqual(queue.count(), 0)  # Stored before it was called.
            self.assertEqual([cluster.submit("echo", i).result(PATIENCE) for i in range(5)], list(range(5)))
            late = cluster.submit("sleep", {"file": str(self.folder / "f"), "how": "sleep"}, timeout=0.1)
            self.assertIsInstance(late.exception(PATIENCE), TaskTimeout)
            release.set()
        self.assertEqual(told, ["slow", *range(5)])
        self.assertIn("from a listener", "\n".join(logs.output))

    def test_listeners_and_brokers_may_be_async(self):
        told = []

        async def listen(value, task):
            await asyncio.sleep(0)
            told.append(value)

        async def answer(respond, message):
            await asyncio.sleep(0)
            respond(message["data"])

        queue = self.queue()
        for event in taskpool.EVENTS:
            queue.add_event_listener(event, listen)
        cluster = self.cluster({"ping": ping, "fail": fail}, queue, message_broker=answer)
        self.assertEqual(cluster.submit("ping", 5).result(PATIENCE), 5)
        eventually(lambda: told == [5])
        queue.add_task("ping", 6)
        queue.run_due({"ping": ping}, message_broker=answer)
        cluster.drain(PATIENCE)
        eventually(lambda: told == [5, 6])

        async def from_a_loop(job, toggle_ipc):
            async def hear(value):
                return value

            return toggle_ipc(hear, lambda send: send({"status": 2, "data": job.data}))

        queue.add_task("from a loop", 7)
        (task,) = queue.run_due({"from a loop": from_a_loop}, message_broker=answer)
        self.assertEqual((task.state, told), ("done", [5, 6, 7]), task.error)

    def test_a_listener_may_add_tasks_and_shut_down(self):
        queue, told = self.queue(), []

        def listener(value, task):
            told.append(value)
            if value < 5:
                queue.add_task("echo", value + 1)
            else:
                queue.remove_event_listener("done")
                cluster.shutdown()

        queue.add_event_listener("done", listener)
        cluster = self.cluster({"echo": echo}, queue)
        queue.add_task("echo", 1)
        closes(cluster)
        self.assertEqual(told, [1, 2, 3, 4, 5])


class TestProgress(InFolder):
    """job.progress(done, total=None, note=None) shows how far a task is."""

    def test_a_report_in_the_midst_of_another_waits_for_nothing(self):
        """As that of a signal handler: a Timer must not be cancelled within its cancel()."""
        sent, cancelled = [], []
        reports = taskpool._Reports(lambda number, report: sent.append(json.loads(report)[0]))  # inside
        progress = reports.begin(1)

        def cancel(timer):
            self.assertNotIn(timer, cancelled)
            cancelled.append(timer)
            reports._next = 0.0
            progress(3)

        progress(1), progress(2)
        with mock.patch.object(threading.Timer, "cancel", cancel):
            reports.end()
        self.assertEqual((sent[0], sent[-1], len(cancelled)), (1, 3, 1))

    def test_the_timer_and_a_handler_in_the_midst_of_a_send_do_not_wait_for_each_other(self):
        lock, sent = threading.RLock(), []
        reports = taskpool._Reports(lambda number, report: sent.append(report), lock)
        progress = reports.begin(1)
        progress(1)
        timer = threading.Thread(target=reports.flush, daemon=True)

        def handler():
            with lock:
                progress(2)
                timer.start()
                timer.join(0.1)  # It is waiting, or will.
                progress(3)

        thread = threading.Thread(target=handler, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        self.assertFalse(thread.is_alive())
        eventually(lambda: sent[-1] == "[3,null,null]")

    def test_a_report_is_never_taken_for_one_of_another_run(self):
        """One that a thread makes in the midst of the end, and one that a handler makes in the midst of a report."""
        sent = []

        def send(number, report):
            sent.append((number, report))
            if len(sent) == 1:
                progress(2)

        reports = taskpool._Reports(send)
        progress = reports.begin(1)
        progress(1)
        reports.end()
        self.assertEqual(sent, [(1, "[1,null,null]"), (1, "[2,null,null]")])
        reports._unsent = 1, taskpool.Progress(3)
        reports.begin(2)
        reports.flush()
        self.assertEqual(len(sent), 2)

    def test_it_is_seen_by_find_and_the_listener_and_the_last_one_is_kept(self):
        for in_memory in (False, True):
            with self.subTest(in_memory=in_memory):
                heard, queue = [], self.queue(f"{in_memory}.db")
                for event in ("progress", "done"):
                    queue.add_event_listener(event, lambda value, task, e=event: heard.append((e, value, task)))
                flag, verbs = str(self.folder / f"flag {in_memory}"), queue.in_memory if in_memory else queue
                with self.cluster({"steps": progress_and_hold}, queue) as cluster:
                    future = cluster.submit("steps", flag, in_memory=in_memory, keep_result=60)
                    task = future.task
                    self.assertIsNone(task.progress)
                    # Of a thousand reports the last is seen, although the task says no more.
                    eventually(lambda: verbs.find_one(task_id=task.id).progress == (999, 1000, "half way"))
                    self.assertEqual((verbs.find_one().progress.note, future.done()), ("half way", False))
                    Path(flag + ".end").touch()
                    ended = queue.wait(task.id, PATIENCE)
                self.assertEqual((ended.state, ended.progress), ("done", (1000, 1000, None)))
                reports = [(value, t) for e, value, t in heard if e == "progress"]
                self.assertEqual([e for e, _, _ in heard], ["progress"] * len(reports) + ["done"])
                self.assertEqual([value for value, _ in reports][-1:], [(1000, 1000, None)])
                self.assertEqual({(value == t.progress, t.state) for value, t in reports}, {(True, "running")})
                self.assertLess(len(reports), 50)
                self.assertEqual(heard[-1][2].progress.done, 1000)

    def test_a_failed_run_keeps_it_and_a_retry_begins_anew(self):
        queue, path = self.queue(), str(self.folder / "dies")
        queue.add_task("steps", "fail", task_id="a")
        queue.add_task("steps", "fail", task_id="b", retries=1, retry_delay=3600)
        queue.add_task("steps", path, task_id="c")
        with self.cluster({"steps": progress_and_end}, queue):
            eventually(lambda: queue.find_one(task_id="c").progress == (1, 2, None))
            let_end(path)
            eventually(lambda: queue.count(state="failed") == 2 and queue.find_one(task_id="b").attempt == 1)
            self.assertEqual(queue.find_one(task_id="a").progress, (1, 2, None))
            self.assertIsNone(queue.find_one(task_id="b").progress)
            queue.update("b", due_date=None)
            self.assertEqual(queue.retry(task_id="a"), 1)
            eventually(lambda: queue.count(state="failed") == 3)
        found = {task.id: task.progress for task in queue.find()}
        self.assertEqual(found, {"a": (1, 2, None), "b": None, "c": (1, 2, None)})
        queue.retry(task_id="c")
        self.assertIsNone(queue.find_one(task_id="c").progress)

    def test_wrong_arguments_fail_the_task_and_other_tasks_cannot_report(self):
        queue = self.queue()
        wrong = {
            "TypeError: done is '5' (str)": ["5"], "TypeError: done is True": [True], "ValueError: done is -1": [-1],
            "ValueError: done is nan": ["nan"], "TypeError: total is 'x'": [1, "x"], "ValueError: total is -3": [1, -3],
            "TypeError: note is 5": [1, 2, 5], "ValueError: note is ''": [1, 2, ""], "TypeError: done is None": [None],
        }
        tasks = [queue.add_task("steps", data) for data in wrong.values()]
        with self.cluster({"steps": progress_with}, queue, max_available_workers=1, keep_alive="always") as cluster:
            cluster.drain(PATIENCE)
            self.assertEqual(cluster.submit("steps", "late").result(PATIENCE), "progress was called after its task had ended")
        for text, task in zip(wrong, tasks):
            self.assertIn(text, queue.find_one(task_id=task.id).error)
        with self.assertRaisesRegex(RuntimeError, "running task only"):
            taskpool.Progress(1, 2)(3)


def progress_and_hold(job):
    for step in range(1000):
        job.progress(step, 1000, "half way")
    hold(job)
    job.progress(998, 1000)
    job.progress(1000, 1000)


def progress_and_end(job):
    if job.attempt == 1:
        job.progress(0, 2)
        job.progress(1, 2)
    if job.data not in (None, "fail"):
        hold(job)
        os._exit(1)
    raise ValueError("after half")


def progress_with(job):
    if job.data == "late":
        old, caught = progress_with.last, []
        try:
            old(1)
        except RuntimeError as error:
            caught.append(str(error))
        return caught[0]
    progress_with.last = job.progress
    return job.progress(*(math.nan if value == "nan" else value for value in job.data))


class TestConversations(WithCluster):
    """toggle_ipc: a running task talks with the master."""

    def test_a_message_is_answered_and_on_messages_value_is_the_result(self):
        told = self.result("ping", "about", task_id="who")
        self.assertEqual((told["status"], told["task_id"], told["task_type"]), (4, "who", "ping"))
        self.assertIn(told["worker"], [w["pid"] for w in self.shared.workers()])
        self.assertEqual(self.result("ping", "x"), "pong x")
        self.assertEqual(self.result("position", "y"), "pong y")
        self.assertEqual(self.result("ping", "thread"), "from a thread")
        self.assertEqual(self.result("ping later"), "pong late")

    def test_conversations_nest_to_any_depth_beside_plain_tasks(self):
        plain = [self.submit("echo", i) for i in range(50)]
        deep = [self.submit("three deep", in_memory=bool(i % 2)) for i in range(10)]
        for future in deep:
            self.assertEqual(future.result(PATIENCE), ["pong ping 1", "pong ping 2", "pong ping 3"])
        self.assertEqual([f.result(PATIENCE) for f in plain], list(range(50)))
        self.assertEqual(self.result("many deep", 1000), "pong 0")

    def test_result_and_await_work_inside(self):
        self.assertEqual(self.result("wait inside"), ["pong outer", "pong inner"])
        self.assertEqual(self.result("async ping"), ["pong 0", "pong 1", "pong 2"])

    def test_a_bad_message_fails_the_future(self):
        for message, error, text in [
            ({"status": 0}, ValueError, "status is 0"), ({"status": 1, "data": 1}, ValueError, "status is 1"),
            ({"status": "x"}, TypeError, "status is 'x'"), ({"data": 1}, TypeError, "message"),
            ({"status": True}, TypeError, "status"), ("ping", TypeError, "message"),
            ({"status": 2, "date": 5}, TypeError, "message"),
        ]:
            with self.subTest(message=message):
                caught = self.error("status", message)
                self.assertIs(type(caught), error)
                self.assertIn(text, str(caught))
        self.assertIn("twice", str(self.error("twice")))

    def test_what_fails_on_the_way_fails_the_future(self):
        self.assertEqual(repr(self.error("bad message")), "LookupError('pong x')")
        self.assertEqual(repr(self.error("bad initialize")), "LookupError('initialize')")
        with self.assertLogs("taskpool", "ERROR") as logs:
            self.assertEqual(repr(self.error("ping", "raise")), "LookupError('the broker fails')")
            self.assertRegex(str(self.error("ping", "unpicklable")), "pickle|local object")
        self.assertIn("the broker fails", "\n".join(logs.output))

    def test_a_task_that_ends_with_an_open_conversation_is_done_with_a_warning(self):
        with self.assertLogs("taskpool", "WARNING") as logs:
            self.assertEqual(self.result("forget"), "forgot")
        self.assertIn("1 open conversation", "\n".join(logs.output))

    def test_a_worker_that_dies_in_a_conversation_is_a_failed_attempt(self):
        self.assertIsInstance(self.error("die"), WorkerDied)
        self.assertEqual(self.result("die", retries=1, retry_delay=0), 2)

    def test_an_answer_that_never_comes_ends_with_the_timeout_or_the_shutdown(self):
        self.assertIsInstance(self.error("ping", "silence", timeout=0.2), TaskTimeout)
        for broker, text in ((answer_pings, "shut down before"), (None, "no message_broker")):
            cluster = self.cluster({"ping": ping}, message_broker=broker, shutdown_timeout=0.2)
            future = cluster.submit("ping", "silence")
            cluster.shutdown()
            self.assertIn(text, str(future.exception(0)))

    def test_queue_calls_in_a_task_work_and_cluster_calls_raise(self):
        path = str(self.folder / "other.db")
        self.assertIn("in-memory", self.result("add", {"db": path, "id": "added"}))
        self.assertEqual(self.queue("other.db").find_one().id, "added")
        self.result("add", {"db": str(Path(self.home) / "shared.db"), "id": "chain"})
        self.assertEqual(self.shared_queue.wait("chain", PATIENCE).result, 1)
        is_master, text = self.result("cluster", path)
        self.assertFalse(is_master)
        self.assertIn("only the master", text)


class TestClusterOptions(InFolder):
    """What the parameters of Cluster mean."""

    def test_a_wrong_argument_raises_and_names_its_parameter(self):
        too_short = [timedelta(microseconds=999), timedelta(0), -timedelta(days=1), 0]  # Milliseconds are at least one.
        for options, error, text in [
            ({"task_map": {}}, ValueError, "task_map"),
            ({"task_map": {"x": 5}}, TypeError, r"task_map\['x'\]"), ({"task_map": {5: echo}}, TypeError, "task_map"),
            ({"queue": "tasks.db"}, TypeError, "queue"), ({"max_available_workers": "2"}, TypeError, "max_available"),
            ({"max_available_workers": True}, TypeError, "max_available"), ({"refresh_rate": 1.5}, TypeError, "refresh_rate"),
            *(({name: value}, ValueError, f"^{name} is .*1 ms") for name in ("refresh_rate", "keep_alive") for value in too_short),
            ({"in_memory_only": 1}, TypeError, "in_memory_only"), ({"logs": "none"}, ValueError, "logs"),
            ({"message_broker": 5}, TypeError, "message_broker"), ({"message_broker": lambda: 0}, TypeError, "message_broker.*respond"),
            ({"message_broker": lambda a, b, c: 0}, TypeError, "message_broker.*missing"),
            ({"keep_alive": "sometimes"}, ValueError, "keep_alive"), ({"keep_alive": True}, TypeError, "keep_alive"),
            ({"auto_initialize": None}, TypeError, "auto_initialize"), ({"oversubscribe": 1}, TypeError, "oversubscribe"),
            ({"start_method": "thread"}, ValueError, "start_method"), ({"start_method": None}, TypeError, "start_method"),
            ({"max_tasks_per_worker": 0}, ValueError, "max_tasks_per_worker"),
            ({"max_tasks_per_worker": "1"}, TypeError, "max_tasks_per_worker"), ({"port": 3008}, TypeError, "port"),
            ({"shutdown_timeout": -1}, ValueError, "shutdown_timeout"), ({"shutdown_timeout": "1"}, TypeError, "shutdown_timeout"),
        ]:
            with self.subTest(options=options), self.assertRaisesRegex(error, text):
                Cluster(**{"task_map": {"x": echo}, "queue": self.queue(), **options})
        with self.assertRaisesRegex(ValueError, "refresh_rate"):
            self.cluster({"x": echo}, refresh_rate=timedelta(milliseconds=1)).set_refresh_rate(-1)

    def test_a_function_that_cannot_be_called_as_a_task_is_refused(self):
        """Its type and what is allowed are named; nothing is stored or charged."""

        class Callable:
            def __call__(self, job): pass
            def without(self): pass
            def method(self, job, toggle_ipc): pass

        class OfTwo:
            def __init__(self, a, b): pass

        def anything(inner):
            return functools.wraps(inner)(lambda *arguments, **options: inner(*arguments, **options))

        def mail(to, subject): pass
        named, bound = (lambda job, toggle_ipc: 0), Callable()
        bad_text = eval("lambda job: 0")
        bad_text.__signature__ = "no signature"
        for function, style in [
            (echo, None), (lambda job=1: 0, None), (lambda job, n=3: 0, None), (lambda *a: 0, None), (lambda job, *a, **o: 0, None),
            (lambda job, *, n=1: 0, None), (named, "name"), (lambda job, n=1, toggle_ipc=None: 0, "name"),
            (lambda *a, toggle_ipc: 0, "name"), (lambda job, *, toggle_ipc=None: 0, "name"), (lambda job, ipc=None: 0, None),
            (lambda job, ipc: 0, "position"), (lambda job, toggleIPC, n=1: 0, "position"), (eval("lambda job, toggle_ipc, /: 0"), "position"),
            (functools.partial(mail, "me"), None), (functools.partial(mail, subject="hi"), None), (functools.partial(named, toggle_ipc=1), "name"),
            (bound, None), (bound.method, "name"), (Callable.without, None), (len, None), (os.getcwd, None), (print, None), (int, None), (dict, None), (max, None),
            (unittest.mock.Mock(), None), (bad_text, None), (anything(echo), None), (anything(named), "name"), (anything(mail), None),
            (anything(lambda job, ipc: 0), "position"), (functools.wraps(lambda job, ipc: 0)(lambda job: 0), None),
        ]:
            with self.subTest(function=function):
                self.assertEqual(taskpool._call_style(function).toggle_ipc or None, style)  # inside
                Cluster({"x": function}, auto_initialize=False, start_method=METHODS[-1])
        for function, reason in [
            (lambda: 0, "takes no"), (lambda **o: 0, "takes no"), (lambda *, job: 0, "takes no"), (lambda a, b, c: 0, "'b'"), (mail, "'subject'"),
            (lambda job, ipc, more: 0, "'more'"),
            (eval("lambda job, n, toggle_ipc, /: 0"), "'n'"), (eval("lambda job, n=1, toggle_ipc=None, /: 0"), "'toggle_ipc'"),
            (functools.partial(mail, "me", "hi"), "takes no"), (functools.partial(mail, to="me"), "takes no"), (bound.without, "takes no"),
            (Callable.method, "'job'"), (OfTwo, "'b'"), (functools.wraps(echo)(lambda: 0), "takes no"),
        ]:
            with self.subTest(function=function):
                for use in (Cluster, self.queue().run_due):
                    with self.assertRaisesRegex(TypeError, rf"task_map\['x'\].*function\(job, toggle_ipc\).*toggleIPC or ipc.*{reason}"):
                        use({"x": function})

    def test_no_worker_is_closed_while_tasks_wait_for_it(self):
        queue = self.queue()
        queue.add_tasks({"task_type": "pid", "keep_result": 600} for _ in range(300))
        cluster = self.cluster({"pid": pid_of_worker}, queue, max_available_workers=1, refresh_rate=1)
        self.assertTrue(cluster.drain(PATIENCE))
        self.assertEqual(len({task.result for task in queue.find(state="done")}), 1)

    def test_workers_are_clamped_with_warnings(self):
        most = Cluster.max_workers()
        for given, used, oversubscribe in [(0, 1, False), (-5, 1, False), (most + 3, most, False), (most + 3, most + 3, True)]:
            with self.assertLogs("taskpool", "WARNING") as logs:
                logging.getLogger("taskpool").warning("none")
                cluster = self.cluster({"x": echo}, max_available_workers=given, oversubscribe=oversubscribe, auto_initialize=False)
            self.assertEqual(f"using {used}" in logs.output[-1], not oversubscribe)
            self.assertEqual(cluster._options.max_workers, used)  # inside

    def test_using_all_cpus_warns_once(self):
        with mock.patch.object(taskpool, "_warned_all_cpus", False), self.assertLogs("taskpool", "WARNING") as logs:
            for _ in range(3):
                Cluster({"x": print}, auto_initialize=False)
        self.assertEqual("".join(logs.output).count("CPUs are used"), 1)

    def test_the_library_configures_no_logging_and_logs_the_lines_of_the_original(self):
        """LL-04: each event once, however many clusters there are or were."""
        with self.assertLogs("taskpool", "INFO") as logs:
            for turn in range(2):
                with self.cluster({"echo": echo}) as one, self.cluster({"echo": echo}, self.queue("other.db")) as other:
                    for number, cluster in enumerate((one, other)):
                        cluster.submit("echo", task_id=f"t{turn}{number}").result(PATIENCE)
        for name, event in itertools.product(("t00", "t01", "t10", "t11"), ("started\n", r"done in \d+ ms\n")):
            self.assertEqual(len(re.findall(rf"cluster:echo:{name}:\t{event}", "\n".join([*logs.output, ""]))), 1)
        logger = logging.getLogger("taskpool")
        self.assertEqual(([type(h) for h in logger.handlers], logger.propagate, logger.level), ([logging.NullHandler], True, logging.NOTSET))
        with self.assertLogs("taskpool", "INFO") as logs:
            with self.cluster({"echo": echo, "fail": fail}, logs="error") as cluster:
                cluster.submit("echo").result(PATIENCE)
                cluster.submit("fail").exception(PATIENCE)
        self.assertEqual([r.levelname for r in logs.records if "cluster:" in r.getMessage()], ["ERROR"])

    def test_a_final_failure_is_one_record_with_the_traceback_and_one_that_is_retried_a_line(self):
        with self.assertLogs("taskpool", "WARNING") as logs, self.cluster({"fail": fail_evilly}) as cluster:
            cluster.submit("fail", retries=1, retry_delay=0).exception(PATIENCE)
        warning, error = [record for record in logs.records if "cluster:fail" in record.getMessage()]
        self.assertEqual((warning.levelname, error.levelname), ("WARNING", "ERROR"))
        self.assertEqual(len(warning.getMessage().splitlines()), 1)
        head, *lines = error.getMessage().splitlines()
        self.assertTrue(head.endswith("\tfailed: ValueError: \\x1b[2J"), head)
        self.assertIn("Traceback (most recent call last):", lines)
        self.assertTrue(any("in fail_evilly" in line for line in lines), lines)
        self.assertEqual([lines[0], *lines[-2:]], ["second", "ValueError: \\x1b[2J", "second"])
        self.assertTrue(all(line.isprintable() for line in lines), lines)

    def test_keep_alive_always_starts_all_and_replaces_the_dead(self):
        """SG-08, SG-11: which leave no zombie and no descriptor."""
        cluster, victims, descriptors = self.cluster({"echo": echo}, keep_alive="always"), set(), []
        for _ in range(4):
            eventually(lambda: len(idle_pids(cluster)) == 2 and not victims & set(idle_pids(cluster)))
            eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in victims))  # Reaped.
            descriptors.append(len(os.listdir("/proc/self/fd")) if LINUX else 0)
            victims.add(idle_pids(cluster)[0])
            os.kill(idle_pids(cluster)[0], signal.SIGKILL)
        self.assertLessEqual(descriptors[-1], descriptors[0])

    def test_idle_workers_are_closed_at_a_refresh_or_after_keep_alive_milliseconds(self):
        for keep_alive in (None, 40):
            cluster = self.cluster({"pid": pid_of_worker}, keep_alive=keep_alive, refresh_rate=10)
            self.assertEqual(cluster.workers(), [])
            pid = cluster.submit("pid").result(PATIENCE)
            eventually(lambda cluster=cluster: not cluster.workers())
            self.assertFalse(LINUX and is_alive(pid))
            self.assertNotEqual(cluster.submit("pid").result(PATIENCE), pid)
            self.end(cluster)
        longer = self.cluster({"pid": pid_of_worker}, keep_alive=timedelta(hours=1), refresh_rate=10)
        pid = longer.submit("pid").result(PATIENCE)
        other = self.queue().add_task("pid", keep_result=60)  # Only a refresh finds it.
        self.assertEqual(self.queue().wait(other.id, PATIENCE).result, pid)

    def test_an_idle_worker_stays_for_a_task_that_can_start_soon(self):
        """As its type has a rate, or its due date is near."""
        queue = self.queue()
        queue.limit("pid", rate=(1, 1))
        cluster = self.cluster({"pid": pid_of_worker}, queue, refresh_rate=10, max_available_workers=1)
        soon = cluster.submit("pid", due_date=timedelta(seconds=1.5), in_memory=True)
        pids = [future.result(PATIENCE) for future in (cluster.submit("pid"), cluster.submit("pid"), soon)]
        self.assertEqual(len(set(pids)), 1)
        later = cluster.submit("pid", due_date=timedelta(hours=1))
        eventually(lambda: not cluster.workers())
        self.assertTrue(later.cancel())

    def test_in_memory_only_never_touches_the_store(self):
        queue = self.queue()
        with self.cluster({"echo": echo}, queue, in_memory_only=True) as cluster:
            self.assertEqual(list(cluster.map("echo", [1, 2])), [1, 2])
            self.assertTrue(cluster.submit("echo").task.in_memory)
            self.assertTrue(cluster.drain(PATIENCE))
            with self.assertRaisesRegex(ValueError, "in_memory is False; give True"):
                cluster.submit("echo", in_memory=False)
        self.assertEqual(os.listdir(self.folder), [])

    def test_what_is_submitted_before_initialize_waits_for_its_own_cluster(self):
        queue = self.queue()
        first = self.cluster({"x": echo}, queue, auto_initialize=False, max_available_workers=1)
        other = self.cluster({"x": clock_of, "echo": echo}, queue, max_available_workers=1)
        futures = []
        for in_memory in (False, True):
            futures.append(first.submit("x", "mine", in_memory=in_memory))
            # Which comes later, so it is claimed later.
            self.assertEqual(other.submit("echo", 1, in_memory=in_memory).result(PATIENCE), 1)
        self.assertEqual((first.workers(), queue.count(state="waiting")), ([], 1))
        first.initialize(), first.initialize()
        self.assertEqual([future.result(PATIENCE) for future in futures], ["mine", "mine"])
        never = self.cluster({"x": echo}, queue, auto_initialize=False)
        left = never.submit("x")
        never.shutdown()
        self.assertTrue(left.cancelled())
        self.assertEqual(queue.wait(left.task.id, PATIENCE).state, "done")  # It was let go of.

    def test_what_is_called_after_shutdown_is_refused(self):
        """And a cluster that was never initialized leaves nothing behind."""
        ends = set(taskpool._master_ends)  # inside
        for options in ({}, {"auto_initialize": False, "in_memory_only": True}):
            with TaskQueue(self.folder / f"{len(options)}.db") as queue:
                cluster = self.cluster({"echo": echo}, queue, **options)
                future = cluster.submit("echo", due_date=timedelta(hours=1), in_memory=True)
                with self.assertLogs("taskpool", "WARNING") as logs:
                    cluster.shutdown(), cluster.shutdown()
                self.assertTrue(refuses(cluster) and future.cancelled() and cluster.drain(1))
                why = "1 Future is cancelled, as initialize() was not called" if options else "1 in-memory task ends here"
                self.assertEqual([why in line for line in logs.output], [True], logs.output)
        self.assertLessEqual(taskpool._master_ends, ends)  # inside
        self.assertFalse(os.path.exists(self.folder / "2.db"))

    def test_who_submits_while_another_thread_initializes_waits_for_that(self):
        cluster, wakes = self.cluster({"echo": echo}, auto_initialize=False), []
        real = taskpool.selectors.DefaultSelector

        def slow():
            wakes.append(thread.submit(lambda: cluster.submit("echo", 1).result(PATIENCE)))
            self.assertFalse(concurrent.futures.wait(wakes, 0.1).done)  # It has not begun, and must not seem so.
            return real()

        with concurrent.futures.ThreadPoolExecutor(1) as thread, mock.patch.object(taskpool.selectors, "DefaultSelector", slow):
            cluster.initialize()
            self.assertEqual([future.result(PATIENCE) for future in wakes], [1])

    def test_an_initialize_that_fails_can_be_tried_again_and_leaves_nothing(self):
        cluster = self.cluster({"echo": echo}, auto_initialize=False, max_available_workers=1)
        threads, ends = set(threading.enumerate()), len(taskpool._master_ends)  # inside
        for place, name, error in (
            (taskpool.selectors, "DefaultSelector", OSError(24, "no files")), (threading.Thread, "start", RuntimeError("no new thread")),
        ):
            with mock.patch.object(place, name, side_effect=error), self.assertRaisesRegex(type(error), "no "):
                cluster.initialize()
        eventually(lambda: set(threading.enumerate()) <= threads)
        self.assertLessEqual(len(taskpool._master_ends), ends + 3)  # inside; its name has a port.
        cluster.initialize()
        self.assertEqual(cluster.submit("echo", 1).result(PATIENCE), 1)

    def test_futures_end_with_a_cluster_whose_dispatcher_could_not_start(self):
        cluster, start = self.cluster({"echo": echo}, auto_initialize=False), threading.Thread.start

        def start_others(thread):
            if thread.name == "taskpool-dispatcher":
                raise RuntimeError("no new thread")
            start(thread)

        called, future = threading.Event(), cluster.submit("echo", 1)
        future.add_done_callback(lambda _: called.set())
        with mock.patch.object(threading.Thread, "start", start_others):
            self.assertRaisesRegex(RuntimeError, "no new thread", cluster.initialize)
        cluster.shutdown()
        self.assertTrue(called.wait(PATIENCE) and future.cancelled())

    def test_a_finalizer_in_a_thread_of_the_cluster_stops_nothing(self):
        """What would wait there for that very thread is an error; shutdown() does not wait."""
        for name in ("dispatcher", "store"):
            cluster, ended = self.cluster({"echo": echo}, max_available_workers=1), queues.SimpleQueue()
            future = cluster.submit("echo", due_date=timedelta(hours=1))
            for call in (future.result, cluster.drain, functools.partial(cluster.cancel, "x"), cluster.shutdown):
                def finalize(call=call, ended=ended):
                    try:
                        ended.put(call())
                    except RuntimeError as error:
                        ended.put(str(error))

                cluster.queue.add_task("later")
                call_in_thread(cluster, name, finalize)
                told = ended.get(timeout=PATIENCE)
                self.assertIn("thread of the cluster" if call == future.result else "", str(told))
            cluster.shutdown()

    def test_a_worker_is_replaced_after_max_tasks_per_worker(self):
        """SG-11, ENGINE 10, 28."""
        for most in (1, 3):
            cluster = self.cluster({"pid": pid_of_worker}, max_tasks_per_worker=most, max_available_workers=1, keep_alive="always")
            futures = [cluster.submit("pid", in_memory=True) for _ in range(2 * most + 1)]
            counts = collections.Counter(f.result(PATIENCE) for f in futures)
            self.assertEqual(sorted(counts.values()), sorted([1, most, most]))
            cluster.shutdown()
        cluster = self.cluster({"large": return_kind}, max_tasks_per_worker=1, max_available_workers=1)
        futures = [cluster.submit("large", "large") for _ in range(3)]
        cluster.shutdown()  # At once: what is due is finished first.
        self.assertEqual([len(f.result(0)) for f in futures], [3_000_000] * 3)

    def test_max_workers_counts_usable_cpus(self):
        """ENGINE 61: by affinity, and by the quota of a container."""
        if hasattr(os, "sched_getaffinity"):
            usable = os.sched_getaffinity(0)
            self.assertLessEqual(Cluster.max_workers(), len(usable))
            os.sched_setaffinity(0, {min(usable)})
            self.addCleanup(os.sched_setaffinity, 0, usable)
            self.assertEqual(Cluster.max_workers(), 1)
            os.sched_setaffinity(0, usable)
        for text, most in [("50000 100000", 1), ("100001 100000", 2), ("max 100000", 10**6), ("", 10**6)]:
            with unittest.mock.patch.object(taskpool, "_read_text", lambda path, text=text: text):  # inside
                self.assertLessEqual(Cluster.max_workers(), most)
        self.assertGreaterEqual(Cluster.max_workers(), 1)

    def test_the_longest_durations_are_slept_through(self):
        """CK-06: what is a month away or more overflows no timer."""
        longest = {"refresh_rate": 2**63 - 1, "keep_alive": 2**63 - 1, "shutdown_timeout": 1e300}
        cluster = self.cluster({"echo": echo}, in_memory_only=True, **longest)
        cluster.submit("echo", due_date=datetime(9999, 12, 31, tzinfo=timezone.utc))
        future = cluster.submit("echo", timeout=1e300, retries=1, retry_delay=1e300)
        self.assertEqual(future.result(PATIENCE), None)
        self.assertEqual(cluster.submit("echo", 5).result(PATIENCE), 5)

    def test_tasks_of_others_start_at_a_refresh_or_without_waiting_for_it(self):
        """Each add in another process rings a bell, or comes so soon after one that the second look finds it."""
        queue, other = self.queue(), SQLiteStore(self.folder / "tasks.db")
        self.addCleanup(other.close)
        cluster = self.cluster({"echo": echo}, queue, refresh_rate=3_600_000)
        cluster.submit("echo").result(PATIENCE)
        self.run_script(
            """
            queue = TaskQueue("tasks.db")
            for burst in range(5):
                for task in [queue.add_task("echo", keep_result=60) for _ in range(10)]:
                    assert queue.wait(task.id, 60).state == "done"
            """
        )
        other.add([(row("silent", "echo", keep_result=60.0), "raise")], NOW)  # No event tells of it.
        cluster.set_refresh_rate(20)
        self.assertEqual(queue.wait("silent", PATIENCE).state, "done")

    def test_the_start_method_of_the_program_is_not_fixed(self):
        """ENGINE 52, WP-04."""
        out = self.run_script(
            """
            if __name__ == "__main__":
                with Cluster({"pid": os.getpid}, TaskQueue("x.db"), max_available_workers=1) as cluster:
                    pass
                with Cluster({"len": len}, TaskQueue("x.db"), max_available_workers=1) as cluster:
                    cluster.submit("len").exception()
                    multiprocessing.set_start_method("fork")
                    print(multiprocessing.get_start_method())
            """
        )
        self.assertEqual(out, "fork\n")


# --- The promises --------------------------------------------------------------------


class TestP1NothingIsLost(InFolder):
    """P1 A persistent task that add_task returned is not lost."""

    def test_a_locked_database_delays_and_loses_nothing(self):
        """SQ-01: a foreign write lock; the pool's own work goes on meanwhile."""
        cluster = self.cluster({"echo": echo}, keep_alive="always")
        cluster.submit("echo").result(PATIENCE)
        with contextlib.closing(sqlite3.connect(self.folder / "tasks.db", isolation_level=None)) as db:
            future = cluster.submit("echo", "stored")
            db.execute("BEGIN IMMEDIATE")
            here = [cluster.submit("echo", i, in_memory=True).result(PATIENCE) for i in range(5)]
            self.assertEqual(here, list(range(5)))
            db.execute("COMMIT")
        self.assertEqual(future.result(PATIENCE), "stored")

    def test_a_store_that_fails_for_a_while_is_tried_again(self):
        """RC-15: also for the next slot of a repeating task."""
        store, queue = self.hooked()
        cluster, path = self.cluster({"line": add_line}, queue), str(self.folder / "lines")
        with self.assertLogs("taskpool", "WARNING") as logs:
            store.fails["settle"] = 3
            cluster.submit("line", {"file": path}, task_id="t", repeat=timedelta(hours=1)).result(PATIENCE)
            eventually(lambda: "works again" in logs.output[-1])
        self.assertEqual((lines_of(path), queue.find_one().state), (["t 1"], "waiting"))
        self.assertEqual("\n".join(logs.output).count("disk is full"), 1)

    def test_the_end_waits_for_a_store_that_fails_for_a_while_and_not_for_ever(self):
        path = str(self.folder / "lines")
        for fails, seconds, left in ((3, PATIENCE, 0), (10**9, 0.3, 1)):
            store, queue = self.hooked()
            cluster = self.cluster({"line": add_line}, queue, shutdown_timeout=seconds)
            with self.assertLogs("taskpool", "WARNING") as logs:
                store.fails["settle"] = fails
                future = cluster.submit("line", {"file": path})
                eventually(functools.partial(lines_of, path))
                threading.Thread(target=cluster.shutdown, daemon=True).start()
                closes(cluster)
            error = future.exception(PATIENCE)
            store.fails.clear()
            self.assertEqual([task.state for task in cluster.queue.find()], ["waiting"] * left)
            self.assertEqual(isinstance(error, StoreError), bool(left))
            self.assertEqual("1 outcome is lost;" in "\n".join(logs.output), bool(left))
            os.remove(path)

    @mock.patch.multiple(taskpool, RENEW_SECONDS=0.05, WATCH_SECONDS=0.01)
    def test_a_claim_of_which_the_answer_was_lost_is_made_again(self):
        """As where a COMMIT fails that was done."""
        store, queue = self.hooked()
        lost = []

        def lose(name, result):
            if name == "turn" and result.rows and not lost:
                lost.extend(result.rows)
                raise StoreError("the answer was lost")

        store.after = lose
        with self.cluster({"echo": echo}, queue, refresh_rate=10**6) as cluster:
            self.assertEqual(cluster.submit("echo", 1).result(PATIENCE), 1)
        self.assertEqual([row.attempt for row in lost], [1])

    def test_what_was_recorded_or_claimed_is_kept_when_the_next_call_fails(self):
        """The store fails after each claim; or between two calls that it cannot group."""
        claims = itertools.count()
        for groups in (True, False):
            store, queue = self.hooked()
            cluster = self.cluster({"line": add_line}, queue, auto_initialize=False)
            path = str(self.folder / f"{groups}")

            def fail_after_a_claim(name, result, store=store):
                if name == "claim" and result:  # More than there are ends after that.
                    store.fails["next_due"] = 45

            def fail_at_every_second_claim(name):
                if name == "claim" and next(claims) % 2 == 0:
                    raise StoreError("the claim failed")

            if groups:
                store.after = fail_after_a_claim
            else:
                store.before, store.atomic = fail_at_every_second_claim, False
            with mock.patch.object(taskpool, "STORE_CAP_SECONDS", 0.01), self.assertLogs("taskpool", "WARNING") as logs:
                cluster.initialize()
                futures = [cluster.submit("line", {"file": path}) for _ in range(40)]
                self.assertEqual([f.result(PATIENCE) for f in futures], [None] * 40)
                cluster.shutdown()
            self.assertEqual(cluster.queue.count(), 0)
            self.assertEqual(len(set(lines_of(path))), len(lines_of(path)), "one ran twice")
            text = "\n".join(logs.output)
            self.assertIn("failed; nothing is lost", text)
            self.assertNotIn("claim was lost", text)

    @mock.patch.object(taskpool, "BUSY_SECONDS", 0.005)
    def test_an_add_that_raised_stored_nothing(self):
        """DU-07: so that the caller may try again."""
        queue, stop, errors, added = self.queue(), threading.Event(), 0, 0
        queue.count()
        db = sqlite3.connect(self.folder / "tasks.db", isolation_level=None, check_same_thread=False)
        self.addCleanup(db.close)

        def lock():
            while not stop.is_set():
                db.execute("BEGIN IMMEDIATE")
                stop.wait(random.uniform(0, 0.02))
                db.execute("COMMIT")
                stop.wait(random.uniform(0, 0.002))

        locker = threading.Thread(target=lock)
        locker.start()
        while errors < 5 or added < 50:
            try:
                queue.add_task("x", task_id=str(added))
                added += 1
            except StoreError as error:  # A DuplicateTask would be a lie of the one before.
                self.assertIn("locked", str(error))
                errors += 1
        stop.set()
        locker.join()
        self.assertEqual(sorted(int(t.id) for t in queue.find()), list(range(added)))

    def test_a_ctrl_c_anywhere_in_a_queue_call_loses_nothing_and_blocks_nobody(self):
        """SQ-05: also not while the KeyboardInterrupt is looked at."""
        queue, other = self.queue(), SQLiteStore(self.folder / "tasks.db")
        self.addCleanup(other.close)
        with unittest.mock.patch.object(taskpool, "BUSY_SECONDS", 2.0):
            other.add([(row("other"), "raise")], NOW)
        calls = {
            "add": lambda n: queue.add_task("x", task_id=f"add{n}"), "find": lambda n: queue.find(task_id="none"),
            "count": lambda n: queue.count(), "remove": lambda n: queue.remove(task_id=f"none{n}"),
        }
        with concurrent.futures.ThreadPoolExecutor(1) as elsewhere:
            for name, call in calls.items():
                call("first")
                for n in range(10_000):
                    events = iter(range(n))

                    def interrupt(frame, event, argument, events=events):
                        ours = frame.f_code.co_filename.endswith(("taskpool.py", "contextlib.py"))
                        # Not after the __enter__ of a lock, where only 3.14 looks, by mistake (python/cpython#148874).
                        looks = event == "call" or (event == "c_return" and argument.__name__ != "__enter__")
                        if ours and looks and next(events, None) is None:
                            raise KeyboardInterrupt

                    sys.setprofile(interrupt)  # Where CPython looks for signals.
                    try:
                        call(n)
                        break
                    except KeyboardInterrupt:
                        sys.setprofile(None)
                        task_id = f"after {name} {n}"
                        other.remove(Query(ids=["other"]), NOW)  # No lock is left behind.
                        queue.add_task("x", task_id=task_id)
                        self.assertEqual(len(other.find(Query(ids=[task_id]), NOW)), 1, "it is not stored")
                        other.remove(Query(ids=[task_id]), NOW)
                        self.assertEqual(elsewhere.submit(queue.count, task_id=task_id).result(PATIENCE), 0)
                        self.assertTrue(elsewhere.submit(queue.add_task, "x").result(PATIENCE))
                    finally:
                        sys.setprofile(None)
                self.assertGreater(n, 10)

    def test_a_retry_is_never_put_beyond_the_calendar(self):
        """RT-01: also not after more attempts than a float has powers of two."""
        for attempt in (60, 1100, 10**6):
            failing = row(retries=10**7, retry_delay=1e300)._replace(attempt=attempt)
            self.assertEqual(taskpool.retry_or_fail(failing, "bad", NOW).ready_at, NOW + 3600 * SECOND)


class TestP2OnceAndOnlyOnce(InFolder):
    """P2 Each charged start runs once; a late outcome of a lost claim is discarded."""

    def test_a_claim_is_kept_for_longer_than_a_lease_by_a_master_that_lives(self):
        """DU-01, DU-10: also while the task holds the GIL of its worker."""
        leases = {"LEASE_SECONDS": 2.0, "RENEW_SECONDS": 0.05, "WATCH_SECONDS": 0.05}
        with unittest.mock.patch.multiple(taskpool, **leases), unittest.mock.patch.object(taskpool, "owner_is_dead", return_value=False):
            path = str(self.folder / "starts")
            clusters = [self.cluster({"long": hold_the_gil}, self.queue()) for _ in range(2)]
            clusters[0].queue.add_task("long", {"file": path, "seconds": 4.5})
            self.assertTrue(clusters[0].drain(PATIENCE))
            for cluster in clusters:
                cluster.shutdown()
        self.assertEqual(len(lines_of(path)), 1)

    @mock.patch.object(taskpool, "LEASE_SECONDS", 3600.0)  # Of the other master, which is none.
    def test_a_late_outcome_of_a_lost_claim_is_discarded(self):
        queue, path = self.queue(), str(self.folder / "hold")
        cluster = self.cluster({"hold": hold}, queue)
        future = cluster.submit("hold", path, task_id="lost")
        begun(path)
        self.sql("UPDATE taskpool_task SET owner = 'another', claim = claim + 1")
        with self.assertLogs("taskpool", "WARNING") as logs:
            let_end(path)
            eventually(lambda: logs.output)
        self.assertIn("its claim was lost", logs.output[0])
        self.assertNotIn(logs.records[0].funcName, ("log", "warning"))  # Not what passes all lines on.
        self.assertEqual(queue.find_one().state, "running")
        self.assertEqual([w["state"] for w in cluster.workers() if w["state"] == "busy"], [])
        self.assertFalse(future.done())
        self.sql("DELETE FROM taskpool_task")  # It has ended there.
        with self.assertRaisesRegex(taskpool.TaskPoolError, "'lost': its claim was lost"):
            future.result(PATIENCE)

    @mock.patch.multiple(taskpool, LEASE_SECONDS=0.001, WATCH_SECONDS=3600.0)
    def test_a_future_whose_task_others_could_take_is_not_cancelled_as_if_it_had_not_run(self):
        """Its master had stood still, and its waiting tasks became everybody's."""
        cluster = self.cluster({"echo": echo}, auto_initialize=False)
        futures = [cluster.submit("echo", i, keep_result=60 if i == 1 else None) for i in range(5)]
        other, now = SQLiteStore(self.folder / "tasks.db"), int(time.time() * 1e6)
        self.addCleanup(other.close)
        other.recover("other|", 0.0, now), other.recover("other|", 1.0, now)  # A lease later.
        claimed = other.claim("other|", ["echo"], 4, now)
        self.assertEqual([row.id for row in claimed], [future.task.id for future in futures[:4]])
        ends = [{"state": "done"}, {"state": "done", "result": '"kept"'}, {"state": "failed", "error": "LookupError: there\n\ntrace", "seconds": 0.1}]
        outcomes = [Outcome(row.id, row.claim, **end) for row, end in zip(claimed, ends)]
        self.assertEqual(other.settle("other|", outcomes, now), ["done", "done", "failed"])
        cluster.initialize()
        with self.assertRaisesRegex(taskpool.TaskPoolError, "stood still for longer than a lease.*may have run it"):
            futures[0].result(PATIENCE)
        self.assertEqual(futures[1].result(PATIENCE), "kept")
        error = futures[2].exception(PATIENCE)
        self.assertEqual((type(error), error.type_name, error.text), (RemoteError, "LookupError", "there"))
        self.assertEqual(futures[4].result(PATIENCE), 4)  # Nobody had taken that.
        self.assertFalse(futures[3].done())  # It runs there.
        cluster.shutdown()
        with self.assertRaisesRegex(taskpool.TaskPoolError, "may have run it"):
            futures[3].result(PATIENCE)


class TestP3MasterDead(InFolder):
    """P3 The running tasks of a dead master start again, uncharged."""

    MASTER = """
        def note(job):
            fd = os.open("lines", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(fd, f"{job.id} {job.attempt}\\n".encode())
            os.close(fd)
            while not os.path.exists("end"):
                time.sleep(0.005)
        if __name__ == "__main__":
            with Cluster({"note": note}, TaskQueue("tasks.db"), max_available_workers=2) as cluster:
                print("master", flush=True)
                cluster.drain()
                print("drained", flush=True)
    """

    @unittest.skipUnless(LINUX, "reads /proc")
    def test_a_master_is_dead_only_if_that_is_proved(self):
        """Not if it is hidden (another user's, under hidepid), or no file can be opened."""
        mine, real = taskpool._new_owner(0), taskpool._read_text  # inside
        dead = subprocess.Popen([sys.executable, "-c", ""])
        place, _, *rest = mine.split("|")
        theirs = "|".join((place, str(dead.pid), *rest))
        self.assertTrue(os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT))
        self.assertTrue(taskpool.owner_is_dead(theirs))  # A zombie.
        dead.wait()

        def hidden(path):
            return "" if path.endswith("/stat") else real(path)

        for read in (real, hidden):
            with mock.patch.object(taskpool, "_read_text", read):
                self.assertFalse(taskpool.owner_is_dead(mine))
                self.assertTrue(taskpool.owner_is_dead(theirs))

    def test_names_of_masters_that_others_wrote_or_that_hear_nothing_are_in_nobodys_way(self):
        queue, here = self.queue(), taskpool._here()
        bell = socket.socket(type=socket.SOCK_DGRAM)
        self.addCleanup(bell.close)
        bell.bind(("127.0.0.1", 0))
        ports = "0", "99999", "x", "9" * 5000, bell.getsockname()[1]
        for owner in ("", "a|b", f"{here}|{'9' * 5000}|x|y|5", *(f"{here}|1|x|{n}|{port}" for n, port in enumerate(ports))):
            queue._store._change(queue._store.heartbeat, owner)  # inside
        queue.add_task("x")
        bell.settimeout(PATIENCE)
        self.assertEqual(bell.recv(9), b"!")
        for now in (0.0, 99.0):
            queue._store.recover("me|", now, NOW)  # inside

    def test_a_new_master_takes_over_at_once_and_no_worker_is_left(self):
        """CR-01, CR-10, CR-11, SG-07, ENGINE 65. Of a repeating task (RC-12, CR-03) that costs this run only."""
        queue, path, script = self.queue(), self.folder / "lines", self.script(self.MASTER)
        queue.add_task("note", task_id="repeats", repeat=timedelta(hours=1), priority=2)
        for i in range(4):
            queue.add_task("note", task_id=str(i))
        first = self.start(script)
        eventually(lambda: len(lines_of(path)) == min(2, Cluster.max_workers()))
        workers = children(first.pid) if LINUX else []
        first.kill()
        first.wait()
        eventually(lambda: not any(map(is_alive, workers)))
        self.assertIn("running", [task.state for task in queue.find()])
        (self.folder / "end").touch()
        out, err = self.start(script).communicate(timeout=PATIENCE)
        self.assertEqual(out, "master\ndrained\n", err)
        self.assertEqual({line.split()[0] for line in lines_of(path)}, {"0", "1", "2", "3", "repeats"})
        self.assertEqual({line.split()[1] for line in lines_of(path)}, {"1"})  # Not charged.
        self.assertEqual(lines_of(path).count("repeats 1"), 2)
        (task,) = queue.find()
        self.assertEqual((task.state, task.due_date - task.created_at), ("waiting", timedelta(hours=1)))
        self.assertEqual(queue.add_task("note", task_id="0").attempt, 0)  # Its id is free again.


class TestCancelFromAnywhere(InFolder):
    """queue.cancel ends a task in whatever process it waits or runs."""

    FUNCTIONS = {"hold": hold, "cancel": cancel_there, "echo": echo}

    def serve(self, **options):
        """A queue, and a cluster on it that looks by itself for nothing but what the test is about."""
        self.tasks = self.queue()
        self.served = self.cluster(self.FUNCTIONS, self.tasks, refresh_rate=10**7, max_available_workers=3, **options)

    def hold(self, task_id, **options):
        """Submit a task that runs until let_end(its path): its Future, and the pid of its worker."""
        path = str(self.folder / task_id)
        return self.served.submit("hold", path, task_id=task_id, **options), begun(path)

    def is_over(self, future, pid):
        eventually(lambda: future.cancelled() and not is_alive(pid) and not self.tasks.find(task_id=future.task.id))

    @mock.patch.object(taskpool, "WATCH_SECONDS", 3600.0)  # Only the bell tells of it.
    def test_another_process_ends_runs_at_once_with_their_retries_and_repeats_and_harms_no_other(self):
        self.serve()
        ends = [self.hold("retried", retries=3, retry_delay=0), self.hold("repeats", repeat=timedelta(seconds=1))]
        neighbour, pid = self.hold("neighbour")
        later = self.served.submit("echo", task_id="later", due_date=timedelta(hours=1))
        ids = ["retried", "repeats", "later", "none"]
        told = self.run_script(f"""
            taskpool.KNOCK_SECONDS = 3600.0  # No second task in a row is told of.
            queue = TaskQueue("tasks.db")
            queue.add_task("echo")
            print([queue.cancel(i) for i in {ids}])
        """)
        self.assertEqual(told, "[True, True, True, False]\n")
        for ended in ends:
            self.is_over(*ended)
        eventually(lambda: later.cancelled() and [t.id for t in self.tasks.find()] == ["neighbour"])
        self.assertEqual(self.tasks.wait("retried", 9).state, "done")
        self.assertTrue(is_alive(pid))
        let_end(str(self.folder / "neighbour"))
        self.assertEqual(neighbour.result(PATIENCE), "held")
        self.served.shutdown()
        (hold,) = [it["runs"] for it in self.tasks.types() if it["task_type"] == "hold"]
        self.assertEqual([hold[how] for how in ("done", *taskpool._ENDS)], [1, 0, 0, 0, 0, 0])

    def test_a_task_says_whether_the_one_in_memory_or_the_stored_one_of_its_id_is_meant(self):
        self.serve()
        stored, pid = self.hold("both")
        in_memory = self.served.submit("hold", str(self.folder / "m"), task_id="both", in_memory=True)
        begun(str(self.folder / "m"))
        self.assertTrue(self.served.cancel(stored.task))
        self.is_over(stored, pid)
        self.assertFalse(self.served.cancel(stored.task))
        let_end(str(self.folder / "m"))
        self.assertEqual(in_memory.result(PATIENCE), "held")

    @mock.patch.object(taskpool, "WATCH_SECONDS", 0.05)
    def test_where_no_bell_is_heard_a_look_finds_it(self):
        self.serve()
        ended = self.hold("far")
        self.assertTrue(self.queue().cancel("far"))
        self.is_over(*ended)

    @mock.patch.object(taskpool, "WATCH_SECONDS", 3600.0)
    def test_a_task_cancels_itself_or_another_one(self):
        self.serve()
        other, cancel = self.hold("other"), functools.partial(self.served.submit, "cancel")
        self.assertEqual(cancel([str(self.folder), "other"]).result(PATIENCE), True)
        self.is_over(*other)
        eventually(cancel([str(self.folder), "itself"], task_id="itself", repeat=timedelta(seconds=1)).cancelled)
        eventually(lambda: self.tasks.find() == [])

    def test_the_programs_own_tasks_are_ended_in_memory_too_and_their_ids_are_free_at_once(self):
        self.serve()
        for verbs, in_memory in ((self.tasks, False), (self.tasks.in_memory, True)):
            with self.subTest(in_memory=in_memory):
                future, pid = self.hold(f"x{in_memory}", in_memory=in_memory)
                self.assertEqual((verbs.cancel(future.task.id), verbs.cancel("none")), (True, False))
                again = self.served.submit("echo", 5, task_id=future.task.id, in_memory=in_memory)
                self.assertEqual(again.result(PATIENCE), 5)
                self.is_over(future, pid)
                for wrong, error in ((5, TypeError), (None, TypeError), ("", ValueError), ("\udcff", ValueError)):
                    with self.assertRaisesRegex(error, "task_id"):
                        verbs.cancel(wrong)

    @mock.patch.object(taskpool, "WATCH_SECONDS", 3600.0)
    def test_a_run_that_a_shutdown_gives_its_time_is_ended_as_before_it(self):
        for in_memory in (False, True):
            with self.subTest(in_memory=in_memory):
                self.serve(shutdown_timeout=3600)
                ended, other = (self.hold(f"{name}{in_memory}", in_memory=in_memory) for name in ("ended", "other"))
                self.served.shutdown(wait=False)
                eventually(lambda: refuses(self.served))
                self.assertTrue((self.tasks.in_memory if in_memory else self.tasks).cancel(ended[0].task.id))
                self.is_over(*ended)
                let_end(str(self.folder / f"other{in_memory}"))
                self.assertEqual(other[0].result(PATIENCE), "held")

    def test_a_chunk_of_a_map_is_one_task(self):
        self.serve()
        path = str(self.folder / "chunk")
        results = self.served.map("hold", [path, path], in_memory=True, chunksize=2)
        pid, (chunk,) = begun(path), self.tasks.in_memory.tasks()
        self.assertTrue(self.tasks.in_memory.cancel(chunk.id))
        with self.assertRaises(concurrent.futures.CancelledError):
            list(results)
        eventually(lambda: not is_alive(pid))

    def test_what_a_dead_master_ran_does_not_run_again_and_its_followers_fail(self):
        queue, script = self.queue(), self.script(TestP3MasterDead.MASTER)
        queue.add_task("note", task_id="gone", repeat=timedelta(hours=1))
        queue.add_task("note", task_id="stays")
        for kind in ("after", "after_end"):
            queue.add_task("note", task_id=kind, **{kind: "gone"})
        first = self.start(script)
        eventually(lambda: len(lines_of(self.folder / "lines")) == min(2, Cluster.max_workers()))
        first.kill()
        first.wait()
        self.assertTrue(queue.cancel("gone"))
        (self.folder / "end").touch()
        out, err = self.start(script).communicate(timeout=PATIENCE)
        self.assertEqual(out, "master\ndrained\n", err)
        ran = collections.Counter(line.split()[0] for line in lines_of(self.folder / "lines"))
        self.assertEqual((ran.pop("stays") > 0, ran), (True, {"gone": 1, "after_end": 1}))
        self.assertEqual([(t.id, t.state) for t in queue.find()], [("after", "failed")])

    def test_run_due_ends_one_that_cancels_itself(self):
        tasks = self.queue()
        for verbs, in_memory in ((tasks, False), (tasks.in_memory, True)):
            tasks.add_task("once", repeat=timedelta(seconds=1), in_memory=in_memory)
            ran = tasks.run_due({"once": lambda job, verbs=verbs: verbs.cancel(job.id)}, timedelta(seconds=5))
            self.assertEqual((len(ran), verbs.find()), (1, []))


class TestSilence(InFolder):
    """P3: a lease runs out, and a timeout, only while somebody could listen."""

    def dead_at(self, looks, beat=lambda now: 1):
        """At which of these looks (None: the look fails) the other counts as dead."""
        clock, seen, now = taskpool._ObserverClock(), {}, 0.0
        for now in looks:
            if now is None:
                clock.miss()
            elif taskpool._dead_owners({"elsewhere": beat(now)}, seen, clock.look(now)):
                return now
        return None

    def test_a_lease_runs_out_by_observed_silence(self):
        def every(second, start, end):
            return range(start, end, second)

        self.assertEqual(self.dead_at(every(1, 100, 900)), 130)  # An observer that came late.
        self.assertEqual(self.dead_at(every(3, 0, 900)), 30)
        self.assertEqual(self.dead_at(every(10, 0, 900)), 100)  # A look counts three intervals.
        self.assertIsNone(self.dead_at(every(11, 0, 9000)))  # All may have missed a renewal.
        stopped = [*every(1, 0, 29), *every(1, 70, 900)]
        self.assertEqual(self.dead_at(stopped), 100)
        self.assertEqual(self.dead_at([*every(1, 0, 29), None, *every(1, 29, 900)]), 59)
        self.assertEqual(self.dead_at(stopped, beat=lambda now: now >= 95), 125)
        flapping = [now for start in range(0, 900, 20) for now in (*every(1, start, start + 19), None)]
        self.assertIsNone(self.dead_at(flapping))

    MASTER = """
        taskpool.LEASE_SECONDS, taskpool.RENEW_SECONDS, taskpool.WATCH_SECONDS = 3.0, 1.0, 0.1
        taskpool.BUSY_SECONDS = taskpool.STORE_CAP_SECONDS = 0.5
        logging.basicConfig(filename=sys.argv[1] + ".log", format="%(message)s")
        def hold(job):
            fd = os.open("lines", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(fd, f"{job.id} {job.attempt}\\n".encode())
            while not os.path.exists(sys.argv[1] + ".end"):
                time.sleep(0.005)
            return "held"
        if __name__ == "__main__":
            with Cluster({"hold": hold}, TaskQueue("tasks.db"), max_available_workers=1, keep_alive="always") as cluster:
                if sys.argv[1] == "timeout":
                    print(repr(cluster.submit("hold", timeout=2.0, task_id="t").exception()))
                cluster.run()
    """

    def masters(self):
        """Two masters, one of which runs a task."""
        queue, masters, script = self.queue(), [], self.script(self.MASTER)
        queue.add_task("hold", task_id="t")
        for name in ("first", "second"):
            masters.append(self.start(script, name, start_new_session=True))
            eventually(lambda: len(self.beats()) == len(masters) and lines_of(self.folder / "lines"))
        return queue, masters

    def beats(self):
        return dict(self.sql("SELECT owner, beat FROM taskpool_master"))

    def check_that_it_runs_once(self, queue, first):
        """Although the second master looks before the first, which is stopped, can renew."""
        before = self.beats()
        eventually(lambda: before != self.beats())
        os.killpg(first.pid, signal.SIGCONT)
        eventually(lambda: all(before.get(owner) != beat for owner, beat in self.beats().items()))
        (self.folder / "first.end").touch()
        eventually(lambda: queue.count() == 0)
        self.assertEqual(lines_of(self.folder / "lines"), ["t 1"])
        self.assertNotIn("claim was lost", (self.folder / "first.log").read_text())

    @unittest.skipUnless(LINUX, "stops groups of processes")
    def test_masters_that_were_stopped_together_lose_nothing_to_each_other(self):
        queue, masters = self.masters()
        for master in masters:
            os.killpg(master.pid, signal.SIGSTOP)
        time.sleep(3.5)
        os.killpg(masters[1].pid, signal.SIGCONT)
        self.check_that_it_runs_once(queue, masters[0])

    @unittest.skipUnless(LINUX, "stops a group of processes")
    def test_masters_that_a_lock_kept_from_writing_lose_nothing_to_each_other(self):
        queue, masters = self.masters()
        with contextlib.closing(sqlite3.connect(self.folder / "tasks.db", isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            time.sleep(3.5)
            os.killpg(masters[0].pid, signal.SIGSTOP)
            db.execute("ROLLBACK")
        self.check_that_it_runs_once(queue, masters[0])

    @unittest.skipUnless(LINUX, "stops a group of processes")
    def test_a_master_stopped_longer_than_its_lease_has_its_late_outcome_discarded(self):
        queue, (first, _) = self.masters()
        os.killpg(first.pid, signal.SIGSTOP)
        eventually(lambda: len(lines_of(self.folder / "lines")) == 2)  # The other took the task over.
        (self.folder / "first.end").touch()
        os.killpg(first.pid, signal.SIGCONT)
        eventually(lambda: "its claim was lost" in (self.folder / "first.log").read_text())
        self.assertEqual((queue.find_one().state, lines_of(self.folder / "lines")), ("running", ["t 1"] * 2))
        (self.folder / "second.end").touch()
        eventually(lambda: queue.count() == 0)
        self.assertNotIn("lost", (self.folder / "second.log").read_text())

    @unittest.skipUnless(LINUX, "stops a group of processes")
    def test_time_in_which_the_master_was_stopped_counts_for_no_timeout(self):
        master = self.start(self.script(self.MASTER), "timeout", start_new_session=True)
        for _ in range(2):
            eventually(lambda: lines_of(self.folder / "lines"))
            os.killpg(master.pid, signal.SIGSTOP)
            time.sleep(2.5)
            os.killpg(master.pid, signal.SIGCONT)
        (self.folder / "timeout.end").touch()
        self.assertEqual(master.stdout.readline(), "None\n")
        self.assertEqual(lines_of(self.folder / "lines"), ["t 1"])


class TestP4WorkerDead(WithCluster):
    """P4 Only the task that a dead worker was running is charged."""

    def test_the_neighbours_in_a_batch_run_once_and_uncharged(self):
        """CR-09, RT-05, ENGINE 1: tasks of one type, in both kinds of queue; and all others."""
        for in_memory in (False, True):
            path, verbs = str(self.folder / f"lines {in_memory}"), self.verbs(in_memory)
            for _ in range(30):  # Teaches the cluster that these are quick: then they go in batches.
                self.result("end", {"file": str(self.folder / "warm")}, in_memory=in_memory)
            self.shared_queue.add_tasks(
                {"task_type": "end", "data": {"file": path, "how": "kill" if i == 150 else None}, "task_id": f"t{i:03}", "in_memory": in_memory}
                for i in range(300)
            )
            echoes = [self.submit("echo", i, in_memory=True) for i in range(200)]
            self.assertEqual([future.result(PATIENCE) for future in echoes], list(range(200)))
            eventually(lambda verbs=verbs: verbs.count(state=["waiting", "running"]) == 0)
            self.assertEqual(sorted(lines_of(path)), [f"t{i:03} 1" for i in range(300)])
            self.assertEqual([t.id for t in verbs.find()], ["t150"])
            verbs.remove(state="failed")


def framed(*message, length=None):
    """What a worker writes to its pipe; only so many bytes of the message."""
    packed = (taskpool._write_message if message[:1] == ("done",) else marshal.dumps)(message)[:length]  # inside
    return len(packed).to_bytes(4, "big") + packed


FAILURE = ("ValueError", "text", "trace", None)
PLAN = tuple(taskpool.Plan())
NONSENSE = {  # What a task may write to its worker's pipe, given the number of its run.
    "odd bytes": lambda number: b"hello",
    "zeros": lambda number: bytes(7),
    "a bad message": lambda number: b"\0\0\0\5hello",
    "a huge length": lambda number: b"\x7f\xff\xff\xff",
    "a huger length": lambda number: b"\xff\xff\xff\xff" + b"\x7f" * 8,
    "no tuple": lambda number: b"\0\0\0\5" + marshal.dumps(1),
    "nothing": lambda number: framed(),
    "an unknown kind": lambda number: framed("hello", number),
    "a kind that is none": lambda number: framed(["done"], number),
    "too short": lambda number: framed("start"),
    "too long": lambda number: framed("start", number, 0),
    "a wrong type": lambda number: framed("start", str(number)),
    "half an end": lambda number: framed("done", number, 0.1, b"", None, None, 0, length=20),
    "an end with half its notes": lambda number: framed("done", number, 0.1, b"", None, "why", 0, length=33),
    "an end with odd notes": lambda number: framed("done", number, 0.1, b"", None, 5, 0),
    "an unknown task": lambda number: framed("done", number + 1000, 0.1, b"", None, None, 0),
    "an earlier task": lambda number: framed("fail", -1, 0.1, FAILURE, PLAN),
    "seconds of no number": lambda number: framed("done", number, math.nan, b"", None, None, 0),
    "seconds for ever": lambda number: framed("fail", number, math.inf, FAILURE, PLAN),
    "negative seconds": lambda number: framed("done", number, -1.0, b"", None, None, 0),
    "a lone surrogate": lambda number: framed("done", number, 0.1, b"", None, "\ud800", 0),
    "a failure of three": lambda number: framed("fail", number, 0.1, FAILURE[:3], PLAN),
    "a wait for ever": lambda number: framed("fail", number, 0.1, FAILURE, (True, math.nan, True)),
    "progress of nonsense": lambda number: framed("progress", number, "nonsense"),
    "progress of text": lambda number: framed("progress", number, '["a", null, null]'),
    "progress without end": lambda number: framed("progress", number, "[NaN]"),
    "a second start": lambda number: framed("ready"),
    "a failed start": lambda number: framed("boot error", FAILURE),
    "code": lambda number: framed("ask", number, 1, framed.__code__),
    "a pickle": lambda number: (lambda packed: len(packed).to_bytes(4, "big") + packed)(pickle.dumps(Known("code"))),
}

NO_NONSENSE_IN_ITSELF = ("an unknown task", "an earlier task", "a second start", "a failed start")


def write_nonsense(job):
    """Write to the pipe of this worker; the task then ends well."""
    worker = taskpool._worker
    if job.data == "a second outcome":
        worker.send(("done", worker._current, 0.0, taskpool._dumps("first"), None, None, 0))
    elif job.data == "half a message":
        os.write(worker._outgoing.fileno(), framed("ready")[:-3])
        os._exit(0)
    elif job.data == "half a permit":
        time.sleep(0.01)  # There are more by now.
        os.read(worker._permits, 3)
    elif job.data is not None:
        os.write(worker._outgoing.fileno(), NONSENSE[job.data](worker._current))
    return job.data


class TestNonsenseFromAWorker(InFolder):
    """P4 Whatever a task writes to its worker's pipe, that worker ends and the others do not."""

    def test_no_message_but_what_workers_send_is_taken_in_and_no_code_runs(self):
        Known.threads.clear()
        for what, make in NONSENSE.items():
            with self.subTest(what=what):
                piped = make(5)
                try:
                    size = int.from_bytes(piped[:4], "big", signed=True)
                    self.assertTrue(0 <= size <= 1 << 20)
                    message = taskpool._read_message(piped[4 : 4 + size])  # inside
                except (AssertionError, taskpool._Nonsense):
                    continue
                self.assertIn(what, NO_NONSENSE_IN_ITSELF, message)
        self.assertEqual(Known.threads, [])
        for message in [("ready",), ("start", 0), ("progress", 0, "[1, 2.5, null]"), ("ask", 0, 1, b""), ("changed",),
                        ("done", 0, 0.5, b"", None, None, 0), ("done", 7, 0.0, b"packed", "1", None, 0), ("done", 7, 0.0, b"", None, "why", 1)]:
            self.assertEqual(taskpool._read_message(bytearray(taskpool._write_message(message))), message)
        self.assertEqual(taskpool._read_message(marshal.dumps(("fail", 0, 0.0, FAILURE, PLAN)))[3], taskpool._Failure(*FAILURE))
        problem = taskpool._kept(row(keep_result=1), type("Odd", (), {"__repr__": lambda self: "\udcff"})())[1]
        self.assertTrue(taskpool._is_unicode(problem), ascii(problem))  # That of a healthy worker.

    def test_the_task_that_writes_it_is_charged_and_its_worker_replaced(self):
        cluster = self.cluster({"write": write_nonsense, "hold": hold, "echo": echo}, in_memory_only=True, keep_alive="always")
        path = str(self.folder / "hold")
        held, waits = cluster.submit("hold", path), cluster.submit("echo", due_date=timedelta(hours=1))
        begun(path)
        for what in ("odd bytes", "a huge length", "progress of nonsense", "half a message", "a second outcome", *NO_NONSENSE_IN_ITSELF):
            with self.subTest(what=what):
                self.assertEqual(cluster.submit("write").result(PATIENCE), None)  # In the worker that is free.
                before = {worker["pid"] for worker in cluster.workers()}
                future = cluster.submit("write", what)
                if what == "a second outcome":
                    self.assertEqual(future.result(PATIENCE), "first")
                else:
                    self.assertIsInstance(future.exception(PATIENCE), WorkerDied)
                eventually(lambda before=before: before - {worker["pid"] for worker in cluster.workers()})
                self.assertEqual([cluster.submit("echo", i).result(PATIENCE) for i in range(3)], [0, 1, 2])
        self.assertFalse(held.done() or waits.done())
        let_end(path)
        self.assertEqual(held.result(PATIENCE), "held")

    @unittest.skipUnless(LINUX, "reads pipes")
    def test_who_takes_permits_of_others_ends_only_its_own_worker(self):
        cluster = self.cluster({"write": write_nonsense}, in_memory_only=True, keep_alive="always", max_available_workers=1)
        for _ in range(30):  # Teaches the cluster that these are quick: then they go in batches.
            cluster.submit("write").result(PATIENCE)
        cluster.queue.add_tasks([
            {"task_type": "write", "data": None if i else "half a permit", "in_memory": True, "task_id": str(i), "keep_result": 600}
            for i in range(50)
        ])
        eventually(lambda: cluster.queue.in_memory.count(state="done") >= 49)
        self.assertEqual(cluster.queue.in_memory.count(state=["waiting", "running"]), 0)

    def test_what_a_worker_sends_arrives_whole_however_the_pipe_cuts_it(self):
        """Also what fills several pieces, or exactly one."""
        piece = taskpool._PIECE_BYTES
        channel = taskpool._Pipes(multiprocessing)  # inside
        self.addCleanup(channel.close_theirs)
        ours = channel.theirs[1]
        self.addCleanup(channel.close)
        sizes = [0, 1, 3, piece - 1, piece, piece + 1, 2 * piece, 3 * piece + 7]
        worker = taskpool._WorkerProcess(None, ours, None)  # inside
        thread = threading.Thread(target=lambda: [worker._put(bytes([i]) * size) for i, size in enumerate(sizes)])
        thread.start()
        messages = []
        eventually(lambda: messages.extend(map(bytes, channel.receive())) or len(messages) == len(sizes))
        thread.join(PATIENCE)
        self.assertEqual([len(message) for message in messages], sizes)
        self.assertTrue(all(set(message) <= {i} for i, message in enumerate(messages)))
        for cut in range(1, len(framed("cut"))):
            os.write(ours.fileno(), framed("cut")[:cut])
            self.assertEqual(list(channel.receive()), [])
            os.write(ours.fileno(), framed("cut")[cut:])
            self.assertEqual([marshal.loads(message) for message in channel.receive()], [("cut",)])
        os.write(ours.fileno(), (piece + 1).to_bytes(4, "big"))
        with self.assertRaises(taskpool._Nonsense):
            list(channel.receive())


class TestP5Order(InFolder):
    """P5 In-memory first, then persistent; in each the highest priority, then the oldest."""

    def test_tasks_start_in_the_promised_order(self):
        queue, path = self.queue(), str(self.folder / "lines")
        for order in (1, -1):
            expected = []
            for in_memory in (True, False)[::order]:
                for priority in (8, 1, 0, -1)[::order]:
                    task_id = f"{'memory' if in_memory else 'stored'}:{priority}"
                    queue.add_task("line", {"file": path}, task_id=task_id, priority=priority, in_memory=in_memory)
                    expected.append(task_id)
            cluster = self.cluster({"line": add_line}, queue, max_available_workers=1)
            self.assertTrue(cluster.drain(PATIENCE))
            cluster.shutdown()
            self.assertEqual([line.split()[0] for line in lines_of(path)], expected[::order])
            os.remove(path)

    @mock.patch.object(taskpool, "SLOW_SECONDS", PATIENCE)  # Else what a worker does not begin soon may come after others.
    def test_a_thousand_equals_run_in_the_order_of_insertion(self):
        """PR-02."""
        expected = [f"1{i:03}" for i in range(500)] + [f"0{i:03}" for i in range(500)]
        queue, path = self.queue(), str(self.folder / "lines")
        queue.add_tasks({"task_type": "line", "data": {"file": path}, "task_id": i, "in_memory": True} for i in expected[:500])
        for task_id in expected[500:]:
            queue.add_task("line", {"file": path}, task_id=task_id)
        self.assertTrue(self.cluster({"line": add_line}, queue, max_available_workers=1).drain(PATIENCE))
        self.assertEqual([line.split()[0] for line in lines_of(path)], expected)

    def test_nothing_waits_behind_a_slow_task_while_a_worker_is_idle(self):
        """Nor behind one that holds the GIL."""
        cluster, path = self.cluster({"mixed": mixed}, keep_alive="always"), str(self.folder / "hold")
        for _ in range(50):
            cluster.submit("mixed", None, in_memory=True).result(PATIENCE)
        gil = {"file": str(self.folder / "gil"), "seconds": 2 * PATIENCE}
        for in_memory, slow in itertools.product((True, False), (path, gil)):
            futures = [cluster.submit("mixed", slow if i == 3 else None, in_memory=in_memory) for i in range(100)]
            held = futures.pop(3)
            self.assertEqual(len(concurrent.futures.wait(futures, PATIENCE).not_done), 0)
            self.assertFalse(held.done())
            if slow is gil:
                self.assertTrue(cluster.cancel(held.task.id))
            else:
                let_end(path)
                self.assertEqual(held.result(PATIENCE), "held")
                os.remove(path + ".end")


def mixed(job):
    if isinstance(job.data, dict):
        hold_the_gil(job)
    return hold(job) if job.data else None


class TestCrew(unittest.TestCase):
    """P4 and P5, whatever comes in whatever order: workers, store and time are made up here."""

    class Channel:
        """Pipes to nowhere, with the permits that the worker has not read."""

        theirs = unsent = ()

        def __init__(self, _context):
            self.unread = []

        def permit(self, first, count):
            self.unread += range(first, first + count)

        def revoke(self):
            unread, self.unread = set(self.unread), []
            return unread

        def send(self, message):
            pass

        close = close_theirs = lambda self: None

    class Process:
        def __init__(self, **_):
            self.pid, self.exitcode, self.dies_late = 1, None, False

        def kill(self):
            self.exitcode = self.exitcode or (None if self.dies_late else -9)

        close = lambda self: None  # noqa: E731

    def setUp(self):
        for name, fake in (("_Pipes", self.Channel), ("_start_process", lambda *_: None), ("_SELECTABLE", True)):
            patch = mock.patch.object(taskpool, name, fake)
            patch.start()
            self.addCleanup(patch.stop)
        logging.disable()
        self.addCleanup(logging.disable, logging.NOTSET)

    # The engine and the source of the crew:
    hear = forget_worker = lambda self, worker: None

    def start_worker(self):
        with mock.patch.object(multiprocessing, "get_context", lambda _: mock.Mock(Process=self.Process)):
            worker = taskpool._Worker(self.made.options, 1, SimpleNamespace(functions=0), None)
        worker.since = worker.check_at = self.now
        worker.kill_at = self.now + taskpool.BOOT_WARN_SECONDS
        return worker

    def crew(self, workers=2, max_tasks=None, keep_alive=None):
        """A crew whose workers have not begun, at a time of its own."""
        self.now, self.ends, self.took, self.futures = 1000.0, collections.defaultdict(list), [], mock.Mock()
        end = lambda run, how: self.ends[run.row.id].append(how)  # noqa: E731
        self.source = mock.Mock(
            requeue=lambda run: end(run, "requeued"), cancelled=lambda run: end(run, "cancelled"),
            fail=lambda run, error, seconds: end(run, type(error).__name__) or self.took.append(round(seconds, 6)),
        )
        options = taskpool._Options(workers, True, None, False, keep_alive, True, "spawn", max_tasks, 1.0)
        self.made = taskpool._Crew(options, ["quick", "slow"], self)
        self.made.learn(row("x", "quick"), 0.0005)
        return self.made

    def working(self, ids, task_type="quick", **options):
        """A crew with one worker that is ready, gets these tasks and has begun the first."""
        crew = self.crew(1, **options)
        crew.tick(self.now, 1)
        (worker,) = crew.workers
        crew.got_ready(worker, self.now)
        self.place(ids, task_type)
        worker.channel.unread.pop(0)
        return crew, worker

    def place(self, ids, task_type="quick"):
        cost = self.made.costs()[task_type]
        self.made.place([taskpool._Run(self.source, row(i, task_type, timeout=5.0), cost) for i in ids], self.now)

    def after(self, seconds, died=None, available=0):
        """The crew that many seconds later, when its workers have died with an exit code; what was told since then."""
        self.now += seconds
        for worker in self.made.workers if died is not None else ():
            worker.process.exitcode, worker.check_at = died, 0.0
        self.ends.clear()
        again = [self.made.tick(self.now, available) for _ in range(2)][-1]
        self.assertGreater(again, self.now, "it is called in a circle")
        return {task_id: end for task_id, (end,) in self.ends.items()}

    def test_a_run_over_its_timeout_is_told_of_when_its_worker_is_dead(self):
        """TO-05: no attempt runs beside the next one. RT-03: so it is with the last task of a worker."""
        for last, code in itertools.product((None, 2), (-9, 3)):
            crew, worker = self.working("ab", max_tasks=last)
            worker.process.dies_late = True
            self.assertEqual(worker.stopping, last is not None)
            self.assertEqual(self.after(7.0), {"b": "requeued"})
            self.assertEqual(self.after(0.1), {})
            self.assertEqual((self.after(1.0, died=code, available=1), self.took), ({"a": "TaskTimeout"}, [8.1]))
            self.assertNotIn(worker, crew.workers)

    def test_a_worker_dead_of_sigterm_is_charged_unless_the_master_is_told_to_stop_soon_after(self):
        for stops in (False, True):
            crew, _ = self.working("ab")
            self.assertEqual((self.after(0.001, died=-signal.SIGTERM), crew.room()), ({}, 0.0))
            crew.stopping = stops
            self.assertEqual(self.after(0.25), {"a": "requeued" if stops else "WorkerDied", "b": "requeued"})
            self.assertEqual(self.took, [] if stops else [0.251])

    def test_a_cancelled_task_that_runs_costs_its_worker_and_one_that_waits_there_nothing(self):
        crew, worker = self.working("abc")
        for task_id, ends in (("none", {}), ("b", {"b": ["cancelled"], "c": ["requeued"]}), ("a", {})):
            self.ends.clear()
            crew.cancel(task_id, False)
            self.assertEqual((self.ends, worker.killed), (ends, task_id == "a"))
        self.assertEqual((self.after(0.001), crew.workers), ({"a": "cancelled"}, []))
        crew, worker = self.working("abc")
        crew.cancel_runs([*worker.runs][:2])
        self.assertEqual((dict(self.ends), self.after(0.001)), ({"b": ["cancelled"], "c": ["requeued"]}, {"a": "cancelled"}))

    def test_a_worker_is_told_to_leave_with_its_last_task_and_killed_if_it_stays(self):
        """SG-11: and replaced."""
        crew, worker = self.working("abcd", max_tasks=3)
        self.assertEqual((self.ends, worker.stopping, crew.room()), ({"d": ["requeued"]}, True, 0.0))
        for task_id in "abc":
            self.assertEqual(crew.ended(worker, 0.0005, self.now).row.id, task_id)
        self.assertEqual(self.after(0.0), {})
        self.assertEqual((self.after(taskpool.EXIT_SECONDS - 0.01), worker.killed), ({}, False))
        self.assertEqual((self.after(0.02), worker.killed, crew.workers), ({}, True, []))
        self.after(0.001, available=1)
        self.assertEqual([other.given for other in crew.workers], [0])

    def test_an_idle_worker_is_told_to_leave_after_its_time_and_gets_no_task_then(self):
        crew, worker = self.working("a", keep_alive=0.4)
        self.after(0.01)
        crew.ended(worker, 0.0005, self.now)
        self.assertEqual((self.after(0.39), worker.stopping), ({}, False))
        self.assertEqual((self.after(0.02), worker.stopping, crew.room()), ({}, True, 0.0))
        self.place("b")
        self.assertEqual(self.ends, {"b": ["requeued"]})

    def test_as_many_idle_workers_stay_as_are_needed(self):
        for needed in (0, 1, 5):
            crew = self.crew(3)
            crew.tick(self.now, 3)
            for worker in crew.workers:
                crew.got_ready(worker, self.now)
            self.place("a")
            crew.retire_idle(self.now, needed)
            self.assertEqual([worker.stopping for worker in crew.workers].count(True), max(0, 2 - needed))

    def test_a_slow_task_lets_go_of_others_and_a_worker_that_could_not_even_begin_is_used_again(self):
        """As happens to all on a machine that has too much to do."""
        crew, worker = self.working("abc")
        self.assertEqual(self.after(0.03), {"b": "requeued", "c": "requeued"})
        self.assertEqual((crew.room(), crew.shares["quick"]), (0.0, 1.0))
        crew, worker = self.working("abc")
        worker.channel.unread.insert(0, worker.runs[0].number)  # It had not begun.
        self.assertEqual(self.after(0.03), {"a": "requeued", "b": "requeued", "c": "requeued"})
        self.assertEqual((crew.workers, crew.room(), crew.shares["quick"] < 1.0), ([worker], 1.0, True))

    def test_workers_that_die_as_they_start_follow_each_other_ever_later_and_the_fifth_in_a_row_is_told(self):
        """TT-04: in between the master sleeps."""
        crew = self.crew(1)
        with mock.patch.object(taskpool._log, "error") as said:
            for number in range(7):
                self.after(0.0, available=1)
                self.assertEqual(self.after(0.001, died=4, available=1), {})
                pause = crew.tick(self.now, 1) - self.now
                self.assertGreater(pause, 0.99 * taskpool.BOOT_SECONDS * 2**number)
                self.assertEqual((crew.workers, self.futures.fail_waiting.call_count), ([], max(0, number - 3)))
                self.now += pause
        self.assertEqual(said.call_count, 1)
        self.assertIn("code 4", str(crew.boot_error))

    def test_workers_go_on_where_another_cannot_be_started(self):
        """Also where the one that is there runs its last task."""
        for last in (None, 1):
            crew, worker = self.working("a", "slow", max_tasks=last)
            crew.options = crew.options._replace(max_workers=2)
            with mock.patch.object(self, "start_worker", side_effect=OSError(24, "Too many open files")) as start:
                while start.call_count < taskpool.BOOT_TRIES + 2:
                    self.assertEqual(self.after(1.0 + 30.0 * start.call_count, available=5), {})
                    worker.runs[0].deadline = math.inf
            self.futures.fail_waiting.assert_not_called()
            crew.ended(worker, 1.0, self.now)
            self.assertEqual(worker.open, last is None)

    def test_each_run_ends_once_and_only_what_had_begun_is_charged(self):
        for seed in range(200):
            with self.subTest(seed=seed):
                self.drive(random.Random(seed))

    def drive(self, chance):
        placed, begun, crew = set(), set(), self.crew(max_tasks=chance.choice([None, 3]))
        for step in range(120):
            self.now += chance.choice([0.0, 0.0005, 0.03, 1.6])
            worker = chance.choice(crew.workers) if crew.workers else None
            lives = worker is not None and worker.process.exitcode is None
            head = worker.runs[0] if lives and worker.runs else None
            event = chance.choice(["claim", "claim", "begin", "end", "end", "die", "cancel", "ready", "ready", "refresh"])
            if event == "claim":
                late = chance.random() < 0.1  # The room has gone while the claim was under way.
                costs, room, runs = crew.costs(), crew.room() + 3 * late, []
                for number in range(chance.choice([1, 5, 40])):
                    task = row(f"{step} {number}", chance.choice(["quick", "quick", "slow"]), timeout=chance.choice([None, 0.5]))
                    room -= costs[task.task_type]
                    if room < -1e-9:
                        break
                    runs.append(taskpool._Run(self.source, task, costs[task.task_type]))
                placed.update(run.row.id for run in runs)
                crew.place(runs, self.now)
                self.assertTrue(late or not any(run.row.id in self.ends for run in runs), "there was room for all")
            elif event == "ready" and lives and not worker.ready:
                crew.got_ready(worker, self.now)
            elif event in ("begin", "end") and head and worker.channel.unread[:1] == [head.number]:
                begun.add(head.row.id)
                worker.channel.unread.pop(0)
            if event == "end" and head and head.row.id in begun:
                self.ends[crew.ended(worker, 0.0005, self.now).row.id].append("done")
            elif event == "die" and lives:
                worker.process.exitcode, worker.check_at = chance.choice([1, -9]), 0.0
            elif event == "refresh":
                crew.retire_idle(self.now)
            elif event == "cancel" and head:
                self.assertIs(crew.cancel(head.row.id, False), head)
            crew.tick(self.now, chance.randrange(3))
            self.assertLessEqual(len(crew.workers), 2)
            for worker in crew.workers:
                *ahead, _last = [0.0, *(run.cost for run in worker.runs)]
                self.assertLess(sum(ahead), 1.0 + 1e-9)
                self.assertLessEqual(worker.given, crew.options.max_tasks or math.inf)
                if worker.runs and self.now - worker.since > taskpool.SLOW_SECONDS:
                    self.assertEqual((len(worker.runs), worker.load), (1, max(worker.load, 1.0)))
        for worker in crew.workers:
            worker.kill()
        crew.tick(self.now)
        self.assertEqual((crew.runs(), set(self.ends)), ([], placed), "none was lost")
        self.assertEqual({task_id: ends for task_id, ends in self.ends.items() if len(ends) != 1}, {})
        charged = {task_id for task_id, (end,) in self.ends.items() if end in ("WorkerDied", "TaskTimeout")}
        self.assertLessEqual(charged, begun)


class TestNoWakeUpIsMissed(InFolder):
    """P6: what can start does, though the next refresh and the next look for dead masters are far away."""

    FAR = {"max_available_workers": 1, "keep_alive": "always", "refresh_rate": 10**7}

    def setUp(self):
        super().setUp()
        patched = mock.patch.object(taskpool, "WATCH_SECONDS", 3600.0)
        patched.start()
        self.addCleanup(patched.stop)
        self.store, self.stored = self.hooked()

    def one_worker(self):
        cluster = self.cluster({"echo": echo, "hold": hold, "nap": nap}, self.stored, **self.FAR)
        self.assertEqual(cluster.submit("echo", 1).result(PATIENCE), 1)
        return cluster

    def delay_answers(self, until):
        """What the store says of tasks that wait arrives only when *until* has become true."""
        asked = threading.Event()

        def late(name, result):
            if name == "next_due" and result:
                asked.set()
                eventually(until)

        self.store.after = late
        return asked

    def test_a_ctrl_c_in_the_midst_of_a_wake_up_keeps_no_later_one_back(self):
        wake = taskpool._WakeUp()  # inside
        self.addCleanup(wake.close)
        writer, wake._writer = wake._writer, mock.Mock(send=mock.Mock(side_effect=KeyboardInterrupt))
        with self.assertRaises(KeyboardInterrupt):
            wake.set()
        wake._writer = writer
        wake.set()
        self.assertEqual(wake.reader.recv(9), b"!")

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_other_queues_of_this_process_and_forked_children_wake_its_clusters(self):
        self.one_worker()
        self.queue().add_task("echo", 2, task_id="queue", keep_result=60)
        self.assertEqual(self.stored.wait("queue", PATIENCE).result, 2)
        self.stored._next_owners = 0.0  # inside
        self.stored._wake_others()
        self.stored._next_owners = math.inf  # inside: as if that was just now; the child is not to go by it.
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                self.stored.add_task("echo", 3, task_id="child", keep_result=60)
            os._exit(0)
        os.waitpid(pid, 0)
        self.assertEqual(self.stored.wait("child", PATIENCE).result, 3)

    def test_a_run_ends_while_a_look_that_saw_no_room_is_under_way(self):
        cluster, held = self.one_worker(), str(self.folder / "held")
        first = cluster.submit("hold", held, in_memory=True)
        begun(held)
        asked = self.delay_answers(lambda: first.done() and idle_pids(cluster))
        second = cluster.submit("echo", 2)
        self.assertTrue(asked.wait(PATIENCE))
        let_end(held)
        self.assertEqual(second.result(PATIENCE), 2)

    def test_a_task_comes_due_while_a_look_that_saw_it_waiting_is_under_way(self):
        cluster, due = self.one_worker(), datetime.now(timezone.utc) + timedelta(seconds=0.3)
        self.delay_answers(lambda: datetime.now(timezone.utc) > due)
        self.assertEqual(cluster.submit("echo", 3, due_date=due).result(PATIENCE), 3)

    def test_tasks_that_are_removed_all_the_time_hold_up_no_other(self):
        """As each removal has the cluster look after its Futures."""
        cluster = self.one_worker()
        removed = cluster.submit("echo", due_date=timedelta(hours=1))

        def remove_more(name, result):
            if name == "find" and threading.current_thread().name == "taskpool-store":
                self.stored._changed(removed=True)  # inside

        self.store.after = remove_more
        self.stored._changed(removed=True)  # inside
        self.assertEqual([cluster.submit("echo", i).result(PATIENCE) for i in range(3)], [0, 1, 2])
        self.store.remove(Query(ids=[removed.task.id]), 0)
        self.assertRaises(concurrent.futures.CancelledError, removed.result, PATIENCE)

    def test_answers_of_the_store_that_come_late_at_random_hide_no_task(self):
        """While threads add tasks, and others end or come due; after each burst all is quiet."""
        chance = random.Random(7)
        self.store.before = self.store.after = lambda *_: time.sleep(chance.uniform(0.0, 0.02))
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            for workers in (1, 2):
                cluster = self.cluster({"nap": nap}, self.stored, **{**self.FAR, "max_available_workers": workers})

                def add(kind, cluster=cluster):
                    time.sleep(chance.choice((0.0, 0.01, 0.03)))
                    data, due_date = chance.choice((0.0, 0.002, 0.03, 0.1)), None
                    if chance.random() < 0.3:
                        due_date = timedelta(seconds=chance.uniform(0.0, 0.2))
                    if kind == "added":
                        task = self.stored.add_task("nap", data, due_date=due_date, keep_result=600)
                        return functools.partial(self.stored.wait, task.id)
                    return cluster.submit("nap", data, due_date=due_date, in_memory=kind == "in memory").result

                for burst in range(30):
                    kinds = chance.choices(("added", "submitted", "in memory"), k=1 + burst % 4)
                    for wait in list(threads.map(add, kinds)):
                        wait(PATIENCE)
                cluster.shutdown()

    @unittest.skipUnless(LINUX, "sees in /proc that a master is dead")
    def test_a_master_dies_while_another_is_idle(self):
        """P3."""
        source = """
            import test_taskpool
            if __name__ == "__main__":
                taskpool.Cluster({"hold": test_taskpool.hold}, taskpool.TaskQueue("tasks.db"),
                                 max_available_workers=1).run()
        """
        held = str(self.folder / "held")
        task = self.stored.add_task("hold", held, keep_result=60)
        master = self.start(self.script(source), stderr=subprocess.DEVNULL)
        begun(held)
        with mock.patch.object(taskpool, "WATCH_SECONDS", 0.05):
            idle = self.cluster({"hold": echo}, self.stored, **self.FAR)
            eventually(lambda: idle_pids(idle))
            master.kill()
            self.assertEqual(self.stored.wait(task.id, PATIENCE).result, held)

    def test_slow_tasks_follow_each_other_in_a_worker_that_is_to_be_replaced(self):
        cluster = self.cluster({"nap": nap}, self.stored, max_tasks_per_worker=3, **self.FAR)
        for in_memory in (True, False):
            pids = [cluster.submit("nap", 0.02, in_memory=in_memory).result(PATIENCE) for _ in range(6)]
            self.assertLessEqual(max(collections.Counter(pids).values()), 3)


class TestAtOnce(InFolder):
    """A task that an idle worker can start does so when it is added, and not before it is stored."""

    def test_a_write_that_failed_stores_nothing_and_one_cut_short_loses_nothing(self):
        """P1: Ctrl-C may come just after the write."""
        store, queue = self.hooked()
        cluster = self.cluster({"echo": echo}, queue, refresh_rate=10**6)
        self.assertEqual(cluster.submit("echo", 1).result(PATIENCE), 1)
        for where, error in (("after", KeyboardInterrupt), ("before", StoreError)):
            def cut_short(name, result=True, error=error):
                if name.startswith("add") and result:
                    raise error

            with mock.patch.object(store, where, cut_short), self.assertRaises(error):
                queue.add_task("echo", task_id=where, keep_result=60)
        self.assertEqual((queue.wait("after", PATIENCE).state, queue.count()), ("done", 1))


class TestP6DueDates(InFolder):
    """P6 A task starts at its due date: never earlier."""

    def test_no_task_starts_before_its_due_date(self):
        queue = self.queue()
        cluster = self.cluster({"clock": clock_of}, queue, keep_alive="always", refresh_rate=3_600_000)
        for in_memory in (True, False):
            futures = [
                cluster.submit("clock", due_date=timedelta(seconds=s / 20), in_memory=in_memory) for s in range(6, 0, -1)
            ]
            for future in futures:
                self.assertGreaterEqual(future.result(PATIENCE), future.task.due_date.timestamp())

    @unittest.skipUnless(hasattr(time, "tzset"), "this system's zone cannot be set")
    def test_a_due_date_is_the_instant_that_its_timestamp_is(self):
        """TZ-01, TZ-02: naive or aware, in odd zones, and in an hour that the clock skips, or has twice."""
        source = """
            from datetime import datetime, timedelta, timezone
            queue = TaskQueue("tz.db")
            local = datetime.now() + timedelta(seconds=10)
            dates = [local, local.astimezone(), local.astimezone(timezone.utc)]
            dates += [datetime(2026, 3, day, hour, 30, 0, 123457) for day, hour in ((8, 1), (8, 2), (8, 3), (9, 2))]
            dates += [datetime(2026, 11, 1, 1, 30, fold=fold) for fold in (0, 1)]
            print({queue.add_task("x", due_date=due).due_date.timestamp() - due.timestamp() for due in dates})
        """
        for zone in ("America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"):
            self.assertEqual(self.run_script(source, env={"TZ": zone}), "{0.0}\n")


def clock_of(job):
    return time.time()


def nap(job):
    time.sleep(job.data or 0.0)
    return os.getpid()


class TestP7OnlyMappedTypes(InFolder):
    """P7 Only types in the cluster's task map are claimed."""

    def test_other_types_stay_waiting_for_a_cluster_that_knows_them(self):
        """TT-01."""
        queue = self.queue()
        for i in range(20):
            queue.add_task("ab"[i % 2], i, in_memory=i % 4 > 1)
        with self.assertLogs("taskpool", "WARNING") as logs:
            first = self.cluster({"a": echo}, queue)
            self.assertTrue(first.drain(PATIENCE))
            eventually(lambda: "no function for: 'b'" in "\n".join(logs.output))
        first.shutdown()
        self.assertEqual({t.task_type for t in queue.find() + queue.in_memory.find()}, {"b"})
        second = self.cluster({"b": echo}, queue)
        self.assertTrue(second.drain(PATIENCE))
        self.assertEqual(queue.count() + queue.in_memory.count(), 0)

    def test_a_submitted_task_is_run_by_its_own_cluster(self):
        clusters = [self.cluster({"pid": pid_of_worker}, self.queue(), keep_alive="always") for _ in range(2)]
        for cluster in clusters:
            pids = eventually(lambda cluster=cluster: len(idle_pids(cluster)) == 2 and idle_pids(cluster))
            self.assertLessEqual(set(cluster.map("pid", range(20))), set(pids))


class TestP8NothingStoredIsExecuted(InFolder):
    """P8 Nothing stored is ever unpickled or evaluated."""

    def test_what_the_store_holds_is_json_and_pickles_there_are_inert(self):
        queue, flag, told = self.queue(), self.folder / "flag", []
        evil = pickle.dumps(OnLoad(open, str(flag), "w"))
        queue.add_event_listener("error", lambda value, task: told.append((task.id, task.state, task.error)))
        queue.add_task("echo", task_id="evil", retries=5, priority=5)
        self.sql("UPDATE taskpool_task SET data = ?, successor = ?", evil, evil)
        with self.cluster({"echo": echo}, queue) as cluster:
            cluster.submit("echo", {"a": 1}, keep_result=60, task_id="good").result(PATIENCE)
        self.assertEqual(self.sql("SELECT data, result FROM taskpool_task WHERE id = 'good'"), [('{"a":1}', '{"a":1}')])
        self.assertFalse(flag.exists())
        self.assertEqual(told, [("evil", "failed", queue.find_one(task_id="evil").error)])

    def test_no_stored_row_is_taken_for_one_in_memory(self):
        """Neither by what a store of yours reads, nor by a successor that somebody wrote."""

        class Own(MemoryStore):
            in_memory = False

        class Trusting(Own):
            find = MemoryStore.rows

            def _claim(self, owner, costs, limit, now, until, settings=None):
                return self.take(list(self.candidates(owner, costs, 9, now, until, {})), owner, now)

        flag = self.folder / "flag"
        columns = row(data=OnLoad(open, str(flag), "w"), in_memory=True)
        with self.assertRaises(TypeError):
            taskpool.Row(*columns, True)
        for kind, runs_here in itertools.product((Own, Trusting), (False, True)):
            store = kind()
            store.add([(taskpool.Row(*columns), "raise")], NOW)
            queue = TaskQueue(store)
            (task,) = queue.find()
            self.assertFalse(task.in_memory)
            with self.assertRaises(ValueError) if kind is Trusting else contextlib.nullcontext():
                self.assertIsNone(task.data)
            if runs_here:
                queue.run_due({"x": echo})
            else:
                with self.cluster({"x": echo}, queue) as cluster:
                    self.assertTrue(cluster.drain(PATIENCE))
            self.assertEqual((queue.count(state="failed"), flag.exists()), (1, False))
        queue = self.queue()
        queue.add_task("x", task_id="t")
        successor = {**row()._asdict(), "data": columns.data.decode("latin-1")}
        store = queue._store
        (claimed,) = store.claim("me", ["x"], 1, queue._now())
        self.sql("UPDATE taskpool_task SET successor = ?", json.dumps(successor))
        self.assertEqual(store.settle("me", [Outcome("t", claimed.claim, "done")], queue._now()), ["done"])
        (ended,) = queue.run_due({"x": echo})
        self.assertEqual((ended.state, ended.in_memory, flag.exists()), ("failed", False, False))


# --- Scripts: every start method, both styles, and how they end ------------------------


class TestIsomorphic(InFolder):
    """The entry file runs again in every worker; both styles of script work."""

    UNGUARDED = """
        queue = TaskQueue("tasks.db")
        factor = 3
        def die(job):
            os._exit(5)
        cluster = Cluster(
            {"triple": lambda job: factor * job.data, "die": die, "add": lambda job: queue.add_task("triple", 1).id,
             "master": lambda job: Cluster.is_master()},
            queue, max_available_workers=2, start_method=sys.argv[1], logs="error",
        )
        queue.add_event_listener("done", lambda value, task: None)
        cluster.set_refresh_rate(500)
        cluster.initialize()
        if Cluster.is_master():
            print([cluster.submit("triple", i).result() for i in range(3)], cluster.submit("master").result())
            print(repr(type(cluster.submit("die").exception())), len(cluster.submit("add").result()) > 10)
            for i in range(4):
                queue.add_task("triple", i)
    """

    GUARDED = """
        def run(job):  # A profiler has one, too.
            return 3 * job.data
        async def wait(job):
            return "waited"
        def main():
            with Cluster({"triple": run, "wait": wait}, TaskQueue("tasks.db"),
                         max_available_workers=2, start_method=sys.argv[1]) as cluster:
                print([cluster.submit("triple", i).result() for i in range(3)], cluster.submit("wait").result())
        if __name__ == "__main__":
            main()
    """

    MAKE = (
        "from taskpool import *\n"
        "def make(task_map, method):\n"
        "    return Cluster(task_map, TaskQueue('x.db'), max_available_workers=1, start_method=method)\n"
    )

    def test_both_styles_of_script_work_under_every_start_method(self):
        for method in METHODS:
            with self.subTest(method=method):
                self.assertEqual(self.run_script(self.GUARDED, method), "[0, 3, 6] waited\n")
                out = self.run_script(self.UNGUARDED, method)
                self.assertEqual(out, "[0, 3, 6] False\n<class 'taskpool.WorkerDied'> True\n")
                self.assertEqual({t.state for t in self.queue().find()}, {"failed"})  # The end finishes.
                self.queue().remove(state="failed")

    def test_a_worker_never_runs_the_functions_of_another_cluster(self):
        """Made by one line, which is reached in another order, or by other calls, in workers."""
        out = self.run_script(
            """
            def make(name, order):
                queue = TaskQueue(f"{name}.db")
                return Cluster({"who": lambda job: name}, queue, max_available_workers=1, start_method="spawn")
            if Cluster.is_master():
                alone = make("master", 0)
            names = ["a", "b", "c"]
            made = {name: make(name, 1) for name in (names if Cluster.is_master() else names[::-1])}
            if Cluster.is_master():
                print([made[name].submit("who").result() for name in names])
                print(type(alone.submit("who").exception()).__name__)
            """
        )
        self.assertEqual(out, "['a', 'b', 'c']\nRuntimeError\n")

    def test_other_ways_to_start_a_script_work(self):
        """ENGINE 46, 47, 49, 50, 55, TT-03."""
        for folder in ("pkg", "hidden"):
            (self.folder / folder).mkdir()
        # hidden/odd.py cannot be imported by its name, as under some test runners.
        for name in ("pkg/__main__.py", "pkg/sub.py", "plain.py", "hidden/odd.py"):
            self.script(self.UNGUARDED, name)
        self.script(self.GUARDED, "guarded.py")  # Under a profiler, which has a function of that name.
        self.script("", "pkg/__init__.py")
        self.script("import plain", "importer.py")
        self.script("import runpy\nrunpy.run_path('plain.py', run_name='__main__')", "runner.py")
        self.script(
            """
            import importlib.util, sys
            if __name__ == "__main__":
                spec = importlib.util.spec_from_file_location("odd_name", "hidden/odd.py")
                sys.modules["odd_name"] = module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            """,
            "by_file.py",
        )
        shutil.make_archive(self.folder / "archive", "zip", self.folder / "pkg")
        for flags, name in [
            ([], "archive.zip"), (["-m"], "pkg"), (["-m"], "pkg.sub"), (["-m"], "plain"), (["-m", "cProfile"], "plain.py"),
            (["-m", "cProfile"], "guarded.py"), (["-m", "trace", "--count", "--missing", "-C."], "guarded.py"),
            ([], "importer.py"), ([], "pkg"), ([], "runner.py"), ([], "by_file.py"), (["-X", "dev", "-W", "error"], "plain.py"),
        ]:
            with self.subTest(flags=flags, name=name):
                out, err = self.start(name, "spawn", flags=flags).communicate(timeout=PATIENCE)
                expected = "waited\n" if name == "guarded.py" else "False\n<class 'taskpool.WorkerDied'> True\n"
                self.assertTrue(out.startswith(f"[0, 3, 6] {expected}"), out + err)
        process = self.start("plain.py", "spawn", flags=["-i"], stdin=subprocess.PIPE)
        out, err = process.communicate("print('later', cluster.submit('triple', 5).result())\n", timeout=PATIENCE)
        self.assertIn("later 15", out, err)

    def test_tasks_of_the_last_line_run_although_the_script_has_ended(self):
        """ENGINE 70."""
        for method in AT_END:
            with self.subTest(method=method):
                self.run_script(
                    """
                    queue = TaskQueue("tasks.db")
                    def note(job):
                        print("ran", job.data, flush=True)
                        open("ran", "a").write("x")
                        if job.attempt == 1: raise ValueError
                    cluster = Cluster({"note": note}, queue, max_available_workers=2, start_method=sys.argv[1])
                    if Cluster.is_master():
                        for i in range(4):
                            queue.add_task("note", i, retries=1, retry_delay=0.05)
                        queue.add_task("note", 9, due_date=timedelta(hours=1), task_id="later")
                    """,
                    method,
                )
                self.assertEqual((self.folder / "ran").read_text(), "x" * 8)
                self.assertEqual([t.id for t in self.queue().find()], ["later"])
                self.queue().remove(task_id="later")
                os.remove(self.folder / "ran")

    def test_the_program_of_the_original_runs_line_by_line(self):
        for method in AT_END:
            with self.subTest(method=method):
                out = self.run_script(ORIGINAL_PROGRAM, method)
                got = sorted(out.splitlines())
                self.assertEqual(got, sorted(ORIGINAL_OUTPUT), self.stderr)
                left = self.queue().find()
                self.assertEqual(sorted(t.task_type for t in left), ["recurringTask", "sometype"])
                self.queue().remove(state="waiting")

    def test_a_script_without_a_guard_that_adds_tasks_is_told_to_guard(self):
        source = """
            queue = TaskQueue("tasks.db")
            cluster = Cluster({"x": print}, queue, max_available_workers=1)
            queue.add_task("x")
            cluster.drain()
        """
        self.run_script(source, code=1)
        self.assertIn("Cluster.is_master()", self.stderr)
        self.assertIn("add_task was called", self.stderr)
        self.assertEqual(self.queue().count(), 1)

    def test_what_cannot_work_fails_with_the_cure(self):
        """ENGINE 44, TT-03."""
        inner = """
            if __name__ == "__main__":
                def main():
                    with Cluster({"inner": lambda job: 1}, TaskQueue("x.db"), max_available_workers=1) as cluster:
                        print(cluster.submit("inner").exception())
                main()
        """
        self.assertRegex(self.run_script(inner), "'inner'.*top level.*fork")
        make = self.MAKE
        self.script(make, "lib.py")
        code = "def f(job): return 5\nwith make({'f': f}, '%s') as c: print(c.submit('f').result())"
        told = "RuntimeError: the function of 'f' was defined where a worker process cannot find it (python -c, standard input"
        for method, text in [("spawn", told), ("fork", "5")]:
            for made in (make, "from lib import make\n"):  # In __main__, and elsewhere.
                with self.subTest(method=method, made=made):
                    out, err = self.start("-c", made + code % method).communicate(timeout=PATIENCE)
                    self.assertIn(text, out + err)
                    out, err = self.start("-", stdin=subprocess.PIPE).communicate(made + code % method, timeout=PATIENCE)
                    self.assertIn(text, out + err)

    ODD = """
        import lib
        def own(job):
            return "own"
        def main(*types):
            for method in METHODS:
                with Cluster({name: {"own": own, "lib": lib.function}[name] for name in types}, TaskQueue("x.db"),
                             max_available_workers=1, start_method=method) as cluster:
                    print(*[cluster.submit(name).result() for name in types])
                with lib.make({name: {"own": own, "lib": lib.function}[name] for name in types}, method) as cluster:
                    print(*[cluster.submit(name).result() for name in types])
        def late():
            threading.main_thread().join()
            main("own", "lib")
    """.replace("METHODS", repr(METHODS[:2]))

    def test_workers_start_where_the_main_module_cannot_be_run_again(self):
        """Of standard input, missing, without argv, under a debugger, or when its script has ended."""
        self.script(self.MAKE + "def function(job): return 'lib'", "lib.py")
        debug = "break\ncontinue\nquit\n"
        guarded = "if __name__ == '__main__': "
        for ending, flags, stdin, expected in [
            ("main('lib')", [], None, "lib\n"),
            ("lib.module = sys.modules.pop('__main__'); main('lib')", [], "", "lib\n"),
            ("del sys.argv[:]; main('own', 'lib')", [], "", "own lib\n"),
            ("main('own', 'lib')", ["-m", "pdb"], debug, "own lib\n"),
            ("main('own', 'lib')", ["-m", "pdb", "-m"], debug, "own lib\n"),
            ("del sys.argv[:]; main('own', 'lib')", ["-m"], "", "own lib\n"),
            # These Pythons start no thread once the script has ended (python/cpython#113964).
            *[("threading.Thread(target=late).start()", [], "", "own lib\n")] * (not (3, 12) <= sys.version_info < (3, 12, 3)),
        ]:
            with self.subTest(ending=ending, flags=flags):
                source = self.script(textwrap.dedent(self.ODD) + guarded + ending).read_text()
                name = "-" if stdin is None else "script" if flags[-1:] == ["-m"] else "script.py"
                process = self.start(name, flags=flags, stdin=subprocess.PIPE)
                out, err = process.communicate(source if stdin is None else stdin, timeout=PATIENCE)
                self.assertEqual(out.count(expected), 2 * len(METHODS[:2]), out + err)

    def test_a_program_that_is_not_python_is_named(self):
        source = """
            if __name__ == "__main__":
                sys.executable = sys.argv[1]
                with Cluster({"x": print}, TaskQueue("x.db"), max_available_workers=1, start_method=sys.argv[2]) as cluster:
                    print(cluster.submit("x").exception())
        """
        for program in ("/no/such/python", shutil.which("false"), shutil.which("true")):
            for method in METHODS[:2]:
                with self.subTest(program=program, method=method):
                    out = self.run_script(source, program, method)
                    self.assertIn(program, out)
                    self.assertNotIn("your file", out + self.stderr)

    def test_functions_of_a_package_that_was_loaded_by_its_file_are_found(self):
        """As pytest --import-mode=importlib does: the names of the packages can be imported nowhere."""
        (self.folder / "hidden/tests/unit").mkdir(parents=True)
        make = self.MAKE
        for name, text in {"unit/helper": "def helps(job): return 'helps'", "unit/test_x": make + "def function(job): return __name__",
                           "conftest": make, "__init__": "here = True"}.items():
            self.script(text, f"hidden/tests/{name}.py")
        self.script(
            """
            import importlib.util, sys, types
            def load(name, file):
                spec = importlib.util.spec_from_file_location(name, file)
                sys.modules[name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[name])
                return sys.modules[name]
            if __name__ == "__main__":
                for name in ("tests", "tests.unit"):
                    sys.modules[name] = types.ModuleType(name)
                load("tests.conftest", "hidden/tests/conftest.py")
                task_map = {"x": load("tests.unit.test_x", "hidden/tests/unit/test_x.py").function,
                            "helper": load("tests.unit.helper", "hidden/tests/unit/helper.py").helps}
                for method in sys.argv[1:]:
                    for make in (sys.modules["tests.unit.test_x"].make, sys.modules["tests.conftest"].make):
                        with make(task_map, method) as cluster:
                            print(cluster.submit("x").result(), cluster.submit("helper").result())
            """,
            "runner.py",
        )
        out, err = self.start("runner.py", *METHODS).communicate(timeout=PATIENCE)
        self.assertEqual(out, "tests.unit.test_x helps\n" * 2 * len(METHODS), err)


class TestWhatAWorkerRunsAgain(InFolder):
    """What a worker computes as it runs the entry file again equals what the master has."""

    JOBS = """
        import tempfile
        queues = {
            "relative": TaskQueue("tasks.db"),
            "pid": TaskQueue(f"t-{os.getpid()}.db"),
            "temporary": TaskQueue(os.path.join(tempfile.mkdtemp(dir="."), "temporary.db")),
            "absolute": TaskQueue(SQLiteStore(os.path.abspath("absolute.db"))),
            "variable": TaskQueue(os.environ.get("VARIABLE", "variable.db")),
        }
        for name in ("a", "b"):
            queues[name] = TaskQueue(f"{name}.db")
        def add(job):
            queues[job.data].add_task("other", task_id="added")
            return queues[job.data]._store.path
        def by_path(job):
            return TaskQueue(job.data).add_task("other", task_id="added", if_exists="replace").id
        def move(folder):
            os.makedirs(folder)
            os.chdir(folder)
        def make(function):
            task_map = {"add": add, "by path": by_path, "function": function}
            return Cluster(task_map, queues[sys.argv[2]], max_available_workers=1, start_method=sys.argv[1], max_tasks_per_worker=1)
        def use(cluster):
            os.environ["VARIABLE"] = "changed.db"
            paths = {name: queue._store.path for name, queue in queues.items()}
            for name, queue in queues.items():
                move(name)
                assert cluster.submit("add", name).result() == paths[name], name
                assert queue.remove(task_id="added"), name
            assert cluster.submit("by path", "a.db").result() and queues["a"].remove(task_id="added")
            print(cluster.submit("function").result(), cluster.submit("by path", "new.db").exception())
    """
    GUARDED = """
        if __name__ == "__main__":
            move("before")
            with make(str) as cluster:
                use(cluster)
    """
    UNGUARDED = """
        cluster = make(lambda job: factor * 7)
        factor = 6
        if Cluster.is_master():
            use(cluster)
    """

    def check(self, entry, method, own, jobs=""):
        with self.subTest(method=method, own=own):
            source = textwrap.dedent(self.JOBS)
            if jobs:
                self.script(source + textwrap.dedent(jobs), "jobs.py")
            out = self.run_script(entry if jobs else source + textwrap.dedent(entry), method, own)
            self.assertIn("new.db: in a worker process it cannot be known which file this is", out)
            files = sorted(re.sub(r"\d+", "PID", path.name) for path in self.folder.rglob("*.db"))
            made = {"tasks.db", "t-PID.db", "temporary.db", "absolute.db", "variable.db", "a.db", "b.db"}
            self.assertEqual(files, sorted(made))
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def test_each_queue_is_the_masters_file_wherever_the_master_went_since(self):
        for method in METHODS:
            self.check(self.GUARDED, method, "pid")
            self.check(self.UNGUARDED, method, "temporary")
        self.check("import jobs", METHODS[0], "relative", self.UNGUARDED)

    def test_a_read_while_the_file_runs_again_is_of_the_masters_file_or_an_error(self):
        """And makes no file."""
        source = """
            queue = TaskQueue("tasks.db")
            cluster = Cluster({"count": lambda job: count}, queue, max_available_workers=1, start_method=sys.argv[1])
            count = queue.count()
            if Cluster.is_master():
                queue.add_task("another program's")
                os.mkdir(sys.argv[2])
                if sys.argv[2] == "away": os.chdir("away")
                future = cluster.submit("count")
                print(future.exception() or future.result())
        """
        for method in METHODS[:2]:
            for folder, said in (("stay", "2\n"), ("away", "it cannot be known which file this is while it runs your file again")):
                with self.subTest(method=method, folder=folder):
                    out = self.run_script(source, method, folder)
                    self.assertIn(said, out + self.stderr)
                    self.assertEqual([path.name for path in self.folder.rglob("*.db")], ["tasks.db"])
                    shutil.rmtree(self.folder / folder)
                    os.remove(self.folder / "tasks.db")

    def test_of_clusters_that_look_alike_a_worker_never_guesses(self):
        """Types and files tell; so do functions that are the same."""
        out = self.run_script(
            """
            options = {"queue": TaskQueue("tasks.db"), "max_available_workers": 1}
            by_type = {n: Cluster({n: lambda job, n=n: n}, **options) for n in {"a", "b"}}
            same = [Cluster({"same": lambda job: "same"}, in_memory_only=True, max_available_workers=1) for _ in range(2)]
            alike = [Cluster({"alike": lambda job, n=n: n}, **options) for n in {"a", "b"}]
            fewer = [Cluster({"fewer": lambda job, n=n: n}, TaskQueue(f"{n}.db"), max_available_workers=1)
                     for n in ("c", "d")[not Cluster.is_master():]]
            if Cluster.is_master():
                print([by_type[n].submit(n).result() for n in "ab"], [cluster.submit("same").result() for cluster in same])
                print([type(cluster.submit(name).exception()).__name__ for name in ("alike", "fewer") for cluster in globals()[name][:1]])
            """
        )
        self.assertEqual(out, "['a', 'b'] ['same', 'same']\n['RuntimeError', 'RuntimeError']\n", self.stderr)

    def test_of_queues_made_in_one_line_a_worker_takes_the_masters_or_none(self):
        place, other, folders = ("jobs", (1,)), ("jobs", (2,)), {str(self.folder / "a"), str(self.folder / "b")}

        def path(given, made, living, folders=folders):
            here = [mock.Mock(_given=name, _place=place) for name in (given, *living)]
            with mock.patch.object(taskpool, "_living", lambda: here):
                return taskpool._masters_path(here[0], taskpool._Known(made, folders))

        for given, made, living, expected in [
            ("x.db", [(place, "x.db", "/m/x.db")], [], "/m/x.db"),
            ("9.db", [(place, "1.db", "/m/1.db")], [], "/m/1.db"),  # Computed anew.
            ("/t9/x.db", [(place, "/t1/x.db", "/t1/x.db")], [], "/t1/x.db"),
            ("new.db", [(place, "x.db", "/m/x.db")], ["x.db"], ""),  # That one is taken.
            ("9.db", [(place, "1.db", "/m/1.db")], ["8.db"], ""), ("9.db", [(place, "1.db", "/m/1.db"), (place, "2.db", "/m/2.db")], [], ""),
            ("x.db", [(place, "x.db", "/m/x.db"), (place, "x.db", "/n/x.db")], [], ""),
            ("x.db", [(other, "x.db", "/m/x.db")], [], "/m/x.db"), ("/t/x.db", [(other, "/n/x.db", "/n/x.db")], [], "/t/x.db"),
            ("x.db", [(other, "x.db", "/m/x.db"), (other, "x.db", "/n/x.db")], [], ""), ("x.db", [], [], ""),
        ]:
            with self.subTest(given=given, made=made, living=living):
                self.assertEqual(path(given, made, living), expected)
        self.assertEqual(path("x.db", [], [], {os.getcwd()}), os.path.abspath("x.db"))

    def test_the_log_says_once_which_store_a_cluster_works_on(self):
        for options, level, lines in (({}, "INFO", 1), ({"logs": "error"}, "DEBUG", 0), ({"in_memory_only": True}, "DEBUG", 0)):
            with self.subTest(options=options), self.assertLogs("taskpool", level) as logs:
                logging.getLogger("taskpool").info("begins")
                with self.cluster({"echo": echo}, **options) as cluster:
                    cluster.submit("echo").result(PATIENCE)
                told = [line for line in logs.output if "works on" in line]
                self.assertEqual(len(told), lines)
                self.assertIn(str(self.folder / "tasks.db") if lines else "", "".join(told))

    @unittest.skipUnless(LINUX, "a folder that is in use cannot be deleted, or its name is not told")
    def test_a_deleted_current_folder_is_named(self):
        out = self.run_script(
            """
            if __name__ == "__main__":
                queue = TaskQueue("tasks.db")
                for number, method in enumerate(sys.argv[1:]):
                    folder = f"{os.path.dirname(queue._store.path)}/gone{number}"
                    os.mkdir(folder), os.chdir(folder), os.rmdir(folder)
                    with Cluster({"x": print}, queue, max_available_workers=1, start_method=method) as cluster:
                        print(cluster.submit("x").exception())
                    try: TaskQueue("relative.db")
                    except FileNotFoundError as error: print(error)
            """,
            *METHODS,
        )
        for number, method in enumerate(METHODS):
            self.assertEqual(out.count(str(self.folder / f"gone{number}")), 1 if method == "fork" else 2, out + self.stderr)


ORIGINAL_PROGRAM = """
    import os, sys, time
    from datetime import timedelta
    from concurrent.futures import Future
    from threading import Timer
    from taskpool import Cluster, TaskQueue

    def say(text):  # print() writes the end of a line apart.
        os.write(1, f"{text}\\n".encode())

    def syncTask(job):
        say("this is a synchronous task")

    def asyncTask(job):
        future = Future()
        Timer(job.data["timeout"] / 1000, lambda: (say("this is an asynchronous task"), future.set_result(None))).start()
        return future

    def recurringTask(job):
        TaskQueue("tasks.db").add_task("recurringTask", due_date=timedelta(minutes=10))
        say("recurring")

    def ipcPingTest(job, toggle_ipc):
        def on_message(msg):
            say(msg)
            return "result you eventually want to pass to the master"
        return toggle_ipc(on_message, lambda smtm: smtm({"status": 4, "data": "ping"}))

    def ipcNestedPingTest(job, toggle_ipc):
        def on_message(msg):
            say(f"outer {msg}")
            return toggle_ipc(
                lambda msg: say(f"inner {msg}"),
                lambda smtm: smtm({"status": 4, "data": "ping"}),
            )
        return toggle_ipc(on_message, lambda smtm: smtm({"status": 4, "data": "ping"}))

    task_map = {
        "TEST": lambda job: say(f"testing {job.data['position']}"),
        "SYNC": syncTask,
        "ASYNC": asyncTask,
        "recurringTask": recurringTask,
        "ipcPingTest": ipcPingTest,
        "ipcNestedPingTest": ipcNestedPingTest,
        "sometype": lambda job: print("too early"),
    }

    def onJobsDone(value, task):
        if value is not None:
            say(f"done {value}")

    def onJobsError(value, task):
        print("error", value, flush=True)

    def message_broker(respond, msg):
        if msg["data"] == "ping":
            respond("pong")

    queue = TaskQueue("tasks.db")
    cluster = Cluster(task_map, queue, message_broker=message_broker, start_method=sys.argv[1])

    if Cluster.is_master():
        queue.add_event_listener("done", onJobsDone)
        queue.add_event_listener("error", onJobsError)
        queue.add_task("SYNC", {})
        queue.add_task("ASYNC", {"timeout": 50}, priority=6)
        queue.add_task("TEST", {"position": 1}, priority=8, in_memory=True)
        queue.add_task("TEST", {"position": 2}, priority=1, in_memory=True)
        queue.add_task("TEST", {"position": 3}, priority=8, in_memory=False)
        queue.add_task("TEST", {"position": 4}, priority=1, in_memory=False)
        queue.add_task("sometype", {}, priority=1, due_date=timedelta(minutes=10))
        if queue.find_one(task_type="recurringTask") is None:
            queue.add_task("recurringTask")
        queue.add_task("ipcPingTest")
        queue.add_task("ipcNestedPingTest")
"""

ORIGINAL_OUTPUT = [
    "this is a synchronous task", "this is an asynchronous task", *(f"testing {i}" for i in range(1, 5)),
    "recurring", "pong", "done result you eventually want to pass to the master", "outer pong", "inner pong",
]


class TestEnds(InFolder):
    """Shutdown, drain, signals, boot errors: how things end."""

    def test_shutdown_finishes_what_was_due_and_leaves_the_rest(self):
        for in_memory in (False, True):
            queue = self.queue(f"{in_memory}.db")
            add = functools.partial(queue.add_task, in_memory=in_memory)
            cluster = self.cluster({"echo": echo, "succeed_at": succeed_at}, queue)
            for i in range(20):
                add("echo", i)
            add("succeed_at", 3, retries=2, retry_delay=0.05)
            add("echo", task_id="later", due_date=timedelta(hours=1))
            add("unknown", task_id="foreign")
            cluster.shutdown()
            left = (queue.in_memory if in_memory else queue).find()
            self.assertEqual((sorted(task.id for task in left), cluster.workers()), (["foreign", "later"], []))

    def test_nobody_waits_for_a_task_that_says_not_now(self):
        for in_memory, seconds in itertools.product((False, True), (3600, 0.02)):
            with self.subTest(in_memory=in_memory, seconds=seconds):
                queue, starts = self.queue(f"{in_memory}-{seconds}.db"), self.folder / f"{in_memory}-{seconds}"
                cluster = self.cluster({"wish": wish}, queue)
                data = {"file": str(starts), "raise": ["Retry", seconds, False]}
                verbs = queue.in_memory if in_memory else queue
                for repeat in (None, timedelta(days=1)):
                    queue.add_task("wish", data, retries=1, repeat=repeat, in_memory=in_memory)
                eventually(lambda: verbs.count(state="waiting") == 2 and all(task.started_at for task in verbs.find()))
                self.assertTrue(cluster.drain(PATIENCE))
                cluster.shutdown()
                self.assertEqual([(task.state, task.ended_at) for task in verbs.find()], [("waiting", None)] * 2)

    def test_drain_waits_for_the_same_and_goes_on(self):
        queue = self.queue()
        cluster = self.cluster({"echo": echo, "succeed_at": succeed_at, "hold": hold}, queue)
        self.assertTrue(cluster.drain(PATIENCE))
        self.assertTrue(self.cluster({"echo": echo}, queue, auto_initialize=False).drain(PATIENCE))
        queue.add_task("succeed_at", 2, retries=1, retry_delay=0.05)
        queue.add_task("echo", due_date=timedelta(hours=1))
        queue.add_task("unknown")
        self.assertTrue(cluster.drain(PATIENCE))
        self.assertEqual(queue.count(), 2)
        path = str(self.folder / "hold")
        queue.add_task("hold", path)
        self.assertFalse(cluster.drain(0.05))
        let_end(path)
        self.assertTrue(cluster.drain(timedelta(seconds=PATIENCE)))
        self.assertEqual(cluster.submit("echo", 5).result(PATIENCE), 5)

    def test_shutdown_without_waiting_gives_running_tasks_their_time_and_then_back(self):
        queue = self.queue()
        for seconds, left in [(PATIENCE, ["never"]), (0.05, ["never", "running"])]:
            path = str(self.folder / f"{seconds}")
            cluster = self.cluster({"hold": hold}, queue, shutdown_timeout=seconds, max_available_workers=1)
            queue.add_task("hold", path, task_id="running")
            queue.add_task("hold", path, task_id="never", priority=0)
            begun(path)
            cluster.shutdown(wait=False)
            if len(left) == 1:
                let_end(path)
            closes(cluster)
            found = sorted((task.id, task.state, task.attempt) for task in queue.find())
            self.assertEqual(found, [(task_id, "waiting", 0) for task_id in left])
            queue.remove(state="waiting")

    def test_cancel_futures_removes_the_waiting_ones_first(self):
        cluster = self.cluster({"echo": echo})
        futures = [cluster.submit("echo", due_date=timedelta(hours=1), in_memory=i % 2 == 0) for i in range(4)]
        cluster.shutdown(cancel_futures=True)
        self.assertTrue(all(future.cancelled() for future in futures))
        self.assertEqual(cluster.queue.count(), 0)

    SERVER = """
        logging.basicConfig(level=logging.INFO)
        def hold(job):
            open(f"started{job.id}", "w").close()
            while not os.path.exists("end"):
                time.sleep(0.005)
        if __name__ == "__main__":
            cluster = Cluster({"hold": hold}, TaskQueue("tasks.db"), max_available_workers=2,
                              shutdown_timeout=float(sys.argv[1]), oversubscribe=True)
            cluster.run()
            print("stopped")
    """

    def serve(self, seconds, source=SERVER, **options):
        queue, self.log = self.queue(), self.folder / "log"
        for i in range(5):
            queue.add_task("hold", task_id=str(i))
        with open(self.log, "w") as log:
            process = self.start(self.script(source), seconds, stderr=log, **options)
        eventually(lambda: (self.folder / "started0").exists() and (self.folder / "started1").exists())
        return queue, process

    def check_end(self, queue, process, left, out="stopped\n"):
        """These tasks wait, uncharged; the folder is as before."""
        self.assertEqual((process.communicate(timeout=PATIENCE)[0], process.returncode), (out, 0), self.log.read_text())
        self.assertNotRegex(self.log.read_text(), "Traceback|WorkerDied")
        self.assertEqual([(t.id, t.state, t.attempt) for t in queue.find()], [(i, "waiting", 0) for i in left], self.log.read_text())
        queue.remove(state="waiting")
        for path in (*self.folder.glob("started*"), *self.folder.glob("end")):
            path.unlink()

    def test_the_first_signal_lets_running_tasks_end_and_starts_no_more(self):
        """SG-01, SG-03, SG-05."""
        for number in (signal.SIGTERM, signal.SIGINT):
            queue, process = self.serve(PATIENCE)
            process.send_signal(number)
            eventually(lambda: "stopping: running tasks" in self.log.read_text())
            (self.folder / "end").touch()
            self.check_end(queue, process, "234")

    def test_a_second_signal_or_one_to_the_whole_group_gives_tasks_back_at_once(self):
        """As service managers send it: the workers die of it, and the master knows why."""
        queue, process = self.serve(PATIENCE)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        self.check_end(queue, process, "01234")
        for _ in range(3 if LINUX else 0):
            queue, process = self.serve(PATIENCE, start_new_session=True)
            os.killpg(process.pid, signal.SIGTERM)
            self.check_end(queue, process, "01234")

    @unittest.skipUnless(LINUX, "sends signals")
    def test_a_signal_that_is_ignored_from_the_start_stays_so(self):
        """As SIGHUP is under nohup, and SIGINT in `script &` of a shell script."""
        for ignored, other in ((signal.SIGHUP, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)):
            ignore = functools.partial(signal.signal, ignored, signal.SIG_IGN)
            queue, process = self.serve(PATIENCE, start_new_session=True, preexec_fn=ignore)
            os.killpg(process.pid, ignored)
            (self.folder / "end").touch()
            eventually(lambda queue=queue: queue.count() == 0)
            process.send_signal(other)
            self.check_end(queue, process, "")

    @unittest.skipUnless(LINUX, "sends signals")
    def test_a_second_ctrl_c_at_the_end_of_the_script_gives_tasks_back(self):
        source = self.SERVER.replace("cluster.run()", "cluster.set_refresh_rate(50)")
        queue, process = self.serve(PATIENCE, source)
        self.assertEqual(process.stdout.readline(), "stopped\n")
        for text in ("", "stopping: running tasks"):
            eventually(lambda text=text: text in self.log.read_text())
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
        self.assertEqual({(t.state, t.attempt, t.on_going) for t in queue.find()}, {("waiting", 0, False)}, self.log.read_text())
        self.assertEqual(queue.count(), 5)

    @unittest.skipUnless(LINUX, "sends signals")
    def test_ctrl_c_inside_with_says_what_is_waited_for(self):
        wait = 'f = cluster.submit("hold", task_id="x", priority=-1)\n            with cluster: f.result()'
        queue, process = self.serve(5, self.SERVER.replace("cluster.run()", wait))
        process.send_signal(signal.SIGINT)
        eventually(lambda: "2 tasks run" in self.log.read_text())
        self.assertIn("Ctrl-C (again) starts nothing more and gives running tasks 5.0 s", self.log.read_text())
        (self.folder / "end").touch()
        process.communicate(timeout=PATIENCE)
        self.assertEqual(queue.count(), 0)

    @mock.patch.object(taskpool, "LEASE_SECONDS", 3600.0)  # Of the other master, which is none.
    def test_whatever_ends_the_dispatcher_ends_every_future_and_every_call_says_so(self):
        """At whichever look at the clock, while all sorts of tasks wait, run and end."""
        for number in range(0, 10, 2):
            queue, path, armed = self.queue(f"{number}.db"), str(self.folder / f"{number}"), itertools.repeat(-1)

            def clock(number=number):
                if threading.current_thread().name == "taskpool-dispatcher" and next(armed) == number:
                    raise ZeroDivisionError
                return time.time()

            queue.clock = clock
            cluster = self.cluster({"hold": hold, "echo": echo}, queue, keep_alive="always", start_method=METHODS[-1])
            held = [cluster.submit("hold", f"{path} {i}", task_id=str(i), in_memory=bool(i)) for i in range(2)]
            begun(f"{path} 0"), begun(f"{path} 1")
            with contextlib.closing(SQLiteStore(self.folder / f"{number}.db")) as another:
                another.add([(row("k", "hold", lane="another|"), "raise")], NOW)
                another.claim("another|", ["hold"], 1, NOW)
            futures = [
                held[1], cluster.submit("echo", due_date=timedelta(hours=1)), cluster.submit("hold", task_id="k", if_exists="keep"),
                # These may end before.
                held[0], cluster.submit("echo", task_id="0", if_exists="replace"), cluster.submit("echo"), cluster.submit("echo", in_memory=True),
            ]
            called = queues.SimpleQueue()
            for future in futures:
                future.add_done_callback(called.put)
            with concurrent.futures.ThreadPoolExecutor(1) as thread, self.assertLogs("taskpool", "ERROR") as logs:
                drains, armed = thread.submit(cluster.drain), itertools.count()
                let_end(f"{path} 0")
                raised = [future.exception(PATIENCE) for future in (drains, *futures)]
                self.assertNotIn(None, raised[:4])
                closes(cluster)
            self.assertIn("the dispatcher failed; its tasks start again in another cluster", logs.output[0])
            self.assertEqual({called.get(timeout=PATIENCE) for _ in futures}, set(futures))
            for call in (
                cluster.drain, cluster.run, cluster.shutdown, cluster.workers, cluster.initialize, cluster.__enter__,
                functools.partial(cluster.submit, "echo"), functools.partial(cluster.cancel, "0"),
                functools.partial(cluster.shutdown, wait=False), functools.partial(cluster.map, "echo", [1]),
            ):
                with self.assertRaises(taskpool.TaskPoolError) as caught:
                    call()
                raised.append(caught.exception)
            told = {(type(error), str(error)) for error in raised if error}
            self.assertEqual(told, {(taskpool.TaskPoolError, "the dispatcher failed: ZeroDivisionError()")})

    def test_a_clock_that_fails_is_told_once_and_what_ran_waits_again(self):
        for number, clock in enumerate(("1 / 0", "None")):
            for beat in (50, 3_600_000):  # The dispatcher notices, or the end of the program.
                with self.subTest(clock=clock, beat=beat):
                    self.run_script(f"""
                        def hold(job):
                            time.sleep(3600)
                        if Cluster.is_master():
                            logging.basicConfig(level="WARNING")
                            queue = TaskQueue("{beat}-{number}.db")
                            cluster = Cluster({{"hold": hold}}, queue, max_available_workers=1, oversubscribe=True, refresh_rate={beat})
                            future = cluster.submit("hold")
                            while not future.running():
                                time.sleep(0.005)
                            queue.clock = lambda: {clock}
                            if {beat} == 50:
                                print(type(future.exception()))
                    """)
                    self.assertEqual(self.stderr.count("Traceback"), 1, self.stderr)
                    self.assertNotRegex(self.stderr, "Exception (ignored )?in")
                    self.assertEqual(self.queue(f"{beat}-{number}.db").find_one().state, "waiting")

    def test_an_entry_file_that_raises_in_the_worker_is_a_boot_error(self):
        """TT-04, ENGINE 7, 34, 35."""
        for body, text in [
            ("raise ImportError('no such thing')", "standard error"), ("sys.exit(1)", "code 1"),
            ("import os; os._exit(4)", "code 4"),
        ]:
            source = f"""
                if __name__ != "__main__":
                    {body}
                import functools
                def f(job, ballast=None): pass
                if __name__ == "__main__":
                    queue = TaskQueue("tasks.db")
                    stored = queue.add_task("f", task_id="stored")
                    large = functools.partial(f, ballast="x" * 500_000)  # More than a pipe holds.
                    cluster = Cluster({{"f": large}}, queue, max_available_workers=1)
                    kept = cluster.submit("f", task_id="stored", if_exists="keep")
                    print("future", cluster.submit("f").exception())
                    print("kept", kept.exception())
                    for wait in (cluster.drain, cluster.run):
                        try:
                            wait()
                        except Exception as error:
                            print(wait.__name__, error)
            """
            with self.subTest(body=body):
                out = self.run_script(source)
                for name in ("future", "kept", "drain", "run"):
                    line = next(line for line in out.splitlines() if line.startswith(name))
                    self.assertIn(text, line)
                self.assertLessEqual(self.stderr.count("could not start"), 2)
                self.assertEqual([(t.id, t.state) for t in self.queue().find()], [("stored", "waiting")])
                self.queue().remove(state="waiting")

    @unittest.skipUnless(LINUX, "looks into /proc")
    def test_every_way_to_end_a_program_leaves_no_process(self):
        """SG-10, ENGINE 64, 65, 67, 71, 79: with an idle, a busy, and a GIL-holding worker."""
        source = """
            import ctypes
            def busy(job):
                open("busy", "w").close()
                while True: pass
            def gil(job):
                open("gil", "w").close()
                ctypes.PyDLL(None).sleep(60)
            def pid(job): return os.getpid()
            if __name__ == "__main__":
                cluster = Cluster({"busy": busy, "gil": gil, "pid": pid}, TaskQueue("tasks.db"), max_available_workers=3,
                                  keep_alive="always", shutdown_timeout=0.1, in_memory_only=True, oversubscribe=True,
                                  start_method=sys.argv[2])
                cluster.submit("pid").result()
                if sys.argv[1] != "script":
                    cluster.submit("busy"), cluster.submit("gil")
                    while not (os.path.exists("busy") and os.path.exists("gil")): time.sleep(0.005)
                while any(w["state"] == "starting" for w in cluster.workers()): time.sleep(0.005)
                print(*[w["pid"] for w in cluster.workers()], flush=True)
                how = sys.argv[1]
                if how == "_exit": os._exit(0)
                if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
                if how == "term": os.kill(os.getpid(), signal.SIGTERM)
                cluster.shutdown(wait=False)
                if how == "exit": sys.exit(3)
                if how == "raise": raise ValueError
        """
        for how, code, methods in [
            ("_exit", 0, ["spawn"]), ("kill", -9, METHODS), ("term", -15, ["spawn"]), ("exit", 3, ["spawn"]),
            ("raise", 1, ["spawn"]), ("script", 0, METHODS),
        ]:
            for method in methods:
                with self.subTest(how=how, method=method):
                    pids = list(map(int, self.run_script(source, how, method, code=code).split()))
                    self.assertEqual(len(pids), 3)
                    eventually(lambda: not any(map(is_alive, pids)), "the end of all workers", 30)  # The busiest sleeps for 60.
                    for name in ("busy", "gil"):
                        with contextlib.suppress(FileNotFoundError):
                            os.remove(self.folder / name)

    @unittest.skipUnless(LINUX, "looks into /proc")
    def test_signals_while_workers_start_end_the_program_too(self):
        """SG-01, ENGINE 74: one, or two, while the entry file takes its time in the worker."""
        boots = "if not Cluster.is_master(): open('started0', 'w'), open('started1', 'w'), time.sleep(60)"
        for numbers in ([signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]):
            queue, process = self.serve(PATIENCE, self.SERVER.replace("def hold", f"{boots}\n        def hold"))
            workers = children(process.pid)
            for number in numbers:
                process.send_signal(number)
            self.check_end(queue, process, "01234")
            eventually(lambda workers=workers: not any(map(is_alive, workers)))

    def test_a_storm_of_signals_is_two_signals(self):
        """LL-06: while all threads log."""
        out = self.run_script(
            """
            def hold(job): time.sleep(60)
            if __name__ == "__main__":
                logging.basicConfig(level=logging.DEBUG, filename="log")
                def before(*_): pass
                for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, before)
                def storm():
                    while not any(w["state"] == "busy" for w in cluster.workers()): time.sleep(0.005)
                    for i in range(400):
                        os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM)[i % 2])
                        logging.getLogger("taskpool").info("storm %d", i)
                class Chatty(TaskQueue):
                    def clock(self):
                        logging.info("what time is it?")
                        return time.time()
                cluster = Cluster({"hold": hold}, Chatty("tasks.db"), max_available_workers=1, shutdown_timeout=60)
                cluster.queue.add_task("hold")
                thread = threading.Thread(target=storm)
                thread.start()
                cluster.run()
                thread.join()
                print("stopped", signal.getsignal(signal.SIGINT) is before)
            """
        )
        self.assertEqual((out, self.stderr), ("stopped True\n", ""))
        self.assertEqual([(t.state, t.attempt) for t in self.queue().find()], [("waiting", 0)])

    @unittest.skipUnless(LINUX, "looks into /proc")
    def test_the_end_waits_for_exit_handlers_but_not_for_threads_and_children(self):
        """ENGINE 80, 82, 85."""
        out = self.run_script(
            """
            import atexit
            def leave(job):
                threading.Thread(target=time.sleep, args=(60,)).start()
                child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                return os.getpid(), child.pid
            def idle(job): return os.getpid()
            if __name__ != "__main__":
                atexit.register(lambda: open(f"left {os.getpid()}", "w").close())
            if __name__ == "__main__":
                taskpool.EXIT_SECONDS = 0.5
                with Cluster({"leave": leave}, TaskQueue("x.db"), max_available_workers=1, in_memory_only=True) as cluster:
                    print(*cluster.submit("leave").result())
                taskpool.EXIT_SECONDS = 60.0
                with Cluster({"idle": idle}, TaskQueue("x.db"), max_available_workers=1, in_memory_only=True) as cluster:
                    print(cluster.submit("idle").result())
            """
        )
        stuck, child, idle = map(int, out.split())
        os.kill(child, signal.SIGKILL)  # It is the task's own: see the manual.
        self.assertFalse(is_alive(stuck) or is_alive(idle))
        self.assertTrue((self.folder / f"left {idle}").exists())

    def test_the_end_in_one_thread_and_submits_in_others_never_lock_each_other(self):
        """ENGINE 31: also submits that fail."""
        for wait in (True, False):
            cluster = self.cluster({"echo": echo}, start_method="fork" if "fork" in METHODS else "spawn", in_memory_only=True)
            begun, accepted = threading.Event(), []

            def work():
                while True:
                    for data in (1, threading.Lock()):
                        try:
                            accepted.append(cluster.submit("echo", data))
                        except TypeError:
                            begun.set()
                        except RuntimeError:  # After shutdown.
                            return

            with concurrent.futures.ThreadPoolExecutor(3) as threads:
                working = [threads.submit(work) for _ in range(3)]
                begun.wait(PATIENCE)
                cluster.shutdown(wait=wait)
                self.assertEqual([one.result(PATIENCE) for one in working], [None] * 3)
            self.assertEqual(len(concurrent.futures.wait(accepted, PATIENCE).not_done), 0)
        for in_memory in (True, False):
            queue = self.queue()
            cluster = self.cluster({"echo": echo}, queue)

            def end_first(queue=queue, cluster=cluster):
                queue.clock = time.time
                cluster.shutdown()
                return time.time()

            queue.clock = end_first  # It is shut down after submit() has looked whether it is.
            self.assertTrue(cluster.submit("echo", in_memory=in_memory).cancelled())


# --- Attacks ---------------------------------------------------------------------------
# P1 to P4 while processes are killed, stopped and starved, and files break.


def chaos(job):
    """Write when it starts and when it ends; take a while in between."""
    fd = os.open(job.data["file"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"start {job.data['name']}\n".encode())
    time.sleep(job.data["seconds"])
    os.write(fd, f"end {job.data['name']}\n".encode())
    os.close(fd)


class TestPassingFailures(InFolder):
    """A failure that passes is not the end, and a wait ends, or says what it is for."""

    def test_one_failure_of_the_store_while_it_shuts_down_or_drains_changes_nothing(self):
        """One of what the cluster asks, and one of what who waits asks."""
        often = {"WATCH_SECONDS": 0.01, "RENEW_SECONDS": 0.01, "WARN_SECONDS": 0.01}
        methods = ("next_due", "find", "recover", "renew", "foreign", "claim")
        for how, method in itertools.product(("shutdown", "drain"), methods):
            with self.subTest(f"{method} fails in {how}"), mock.patch.multiple(taskpool, **often):
                store, queue = self.hooked()
                cluster = self.cluster(
                    {"echo": echo, "hold": hold}, queue, refresh_rate=1, max_available_workers=1, start_method=METHODS[-1])
                path, failed = str(self.folder / f"{how} {method}"), set()

                def fail_once(name, method=method, failed=failed):
                    here = threading.current_thread().name.startswith("taskpool-")
                    if name == method and here not in failed:
                        failed.add(here)
                        raise StoreError(f"{name} failed")

                held = cluster.submit("hold", path)
                futures = [cluster.submit("echo", i) for i in range(5)]
                begun(path)
                with concurrent.futures.ThreadPoolExecutor(1) as thread:
                    ended = thread.submit(getattr(cluster, how))
                    store.before = fail_once
                    cluster.queue.add_task("nobody's")
                    cluster.queue.remove(task_type="nobody's")
                    if method != "claim":
                        eventually(lambda failed=failed: True in failed)
                    let_end(path)
                    self.assertIn(ended.result(PATIENCE), (None, True))
                self.assertEqual([future.result(0) for future in (held, *futures)], ["held", *range(5)])
                self.assertIn(True, failed)
                self.end(cluster)

    def test_a_store_that_is_away_is_given_up_at_shutdown(self):
        asked = []

        def away(name):
            asked.append(name)
            time.sleep(0.2)
            raise StoreError("away")

        with mock.patch.multiple(taskpool, WATCH_SECONDS=0.01, RENEW_SECONDS=0.01):
            store, queue = self.hooked()
            cluster = self.cluster({"hold": hold}, queue, refresh_rate=1, shutdown_timeout=0.1, max_available_workers=1)
            run, waits = (cluster.submit("hold", str(self.folder / "hold"), priority=i) for i in (2, 1))
            other = cluster.submit("hold", due_date=timedelta(hours=1))
            begun(str(self.folder / "hold"))
            with self.assertLogs("taskpool", "ERROR") as logs:
                store.before = away
                (self.folder / "hold.end").touch()
                eventually(lambda: len(asked) > 2)
                del asked[:]  # Calls that had piled up would still come.
                cluster.shutdown()
        self.assertLessEqual(len([name for name in asked if name not in ("leave", "close")]), 1)
        self.assertRegex(str(run.exception(PATIENCE)), "did not come back")
        eventually(lambda: waits.done() and other.done())
        self.assertIn("did not come back: 2 submitted tasks stay waiting", "".join(logs.output))
        del store.before
        self.assertEqual(cluster.queue.count(), 3)

    BOOT = """
        from test_taskpool import nap
        logging.basicConfig(format="%(message)s")
        if not Cluster.is_master():
            try:
                os.close(os.open("first", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                {second}
        if __name__ == "__main__":
            taskpool.BOOT_WARN_SECONDS, taskpool.BOOT_LIMIT_SECONDS = 0.2, float(sys.argv[1])
            with Cluster({{"nap": nap}}, TaskQueue("tasks.db"), max_available_workers=2, oversubscribe=True) as cluster:
                futures = [cluster.submit("nap", 0.02) for i in range(50)]
                while len(cluster.workers()) < 2 and not futures[-1].done(): time.sleep(0.001)
            print(*[future.exception() or "done" for future in futures])
    """

    def test_workers_go_on_where_another_cannot_start(self):
        for second in ("raise ImportError('no')", "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(3600)"):
            with self.subTest(second):
                out = self.run_script(self.BOOT.format(second=second), PATIENCE)
                self.assertEqual(out.split(), ["done"] * 50, self.stderr)
                os.remove(self.folder / "first")

    def test_a_file_that_does_not_come_to_its_end_in_a_worker_is_told_of_and_given_up(self):
        (self.folder / "first").touch()
        out = self.run_script(self.BOOT.format(second="time.sleep(3600)"), 0.6)
        self.assertEqual(out.count("is still running your file, or its initializer, after"), 50)
        self.assertIn("it is killed after 1 s", self.stderr)
        self.assertEqual(self.queue().count(), 0)


def add_parts_for(job):
    """Add ten tasks, and have another that follows this one wait for those, too."""
    with TaskQueue(job.data["db"]) as queue:
        parts = queue.add_tasks({"task_type": "line", "data": job.data, "task_id": f"{job.id}{i}"} for i in range(10))
        queue.update(job.data["then"], after=parts)
    add_line(job)


class TestFollowers(InFolder):
    """Tasks that wait for the ends of others, by `after` and `after_end`."""

    MASTER = """
        from test_taskpool import chaos
        if __name__ == "__main__":
            Cluster({"chaos": chaos}, TaskQueue("tasks.db"), max_available_workers=2, oversubscribe=True,
                    keep_alive="always", refresh_rate=100, logs="error").run()
    """

    def line(self, task_id, verbs=None, task_type="line", **options):
        data = {"file": str(self.folder / "lines"), **options.pop("data", {})}
        in_memory = verbs is not None and verbs is getattr(self.tasks, "in_memory", None)
        return self.tasks.add_task(task_type, data, task_id=task_id, in_memory=in_memory, **options)

    def setUp(self):
        super().setUp()
        self.tasks = self.queue()

    def states(self, verbs=None):
        return {t.id: "held" if t.held else t.state for t in (verbs or self.tasks).find()}

    def ran(self):
        return [line.split()[0] for line in lines_of(self.folder / "lines")]

    def test_it_takes_tasks_ids_and_lists_and_tells_who_waits_for_whom(self):
        for verbs in (self.tasks, self.tasks.in_memory):
            with self.subTest(verbs=verbs):
                a, b = self.line("a", verbs), self.line("b", verbs)
                for after, after_end in ((a, None), ("a", None), ([a, "b"], None), (None, (a, b)), ({"a"}, [b]), ([], "a"), (["a"], ["a", "b"])):
                    c = self.line("c", verbs, after=after, after_end=after_end, priority=9)
                    self.assertEqual((c.held, c.state, verbs.find(held=True)), (True, "waiting", [c]))
                    self.assertEqual((verbs.find(after="a"), verbs.count(after="c"), verbs.count(due=True), verbs.count(due=False)), ([c], 0, 2, 1))
                    self.assertEqual({t.id for t in verbs.find(before="c")} | {"b"}, {"a", "b"})
                    self.assertEqual((verbs.find(held=False), verbs.count(held=True, task_id=["a", "c"])), ([a, b], 1))
                    self.assertEqual((verbs.remove(after=["a", "b"], held=True), verbs.find()), (1, [a, b]))
                self.assertFalse(self.line("c", verbs, after=[], after_end=()).held)
                self.assertEqual(verbs.remove(state="waiting"), 3)

    def test_what_cannot_be_followed_is_refused_and_nothing_stored(self):
        a, there = self.line("a"), self.line("m", self.tasks.in_memory)
        self.line("b", after=a)
        for error, options, text in (
            (ValueError, {"after": "typo"}, "'typo'.*there"), (ValueError, {"after_end": ["a", "typo"]}, "after_end is 'typo'"),
            (TypeError, {"after": 5}, "after is 5"), (TypeError, {"after_end": [a, None]}, "after_end is None"), (ValueError, {"after": ""}, "after"),
            (ValueError, {"after": "c", "task_id": "c"}, "itself"), (ValueError, {"after": there}, "stored"), (ValueError, {"after": a, "in_memory": True}, "in memory"),
            (ValueError, {"after": a, "repeat": timedelta(1)}, "repeat.*schedule"), (ValueError, {"after": "b", "task_id": "a", "if_exists": "replace"}, "wait for itself"),
        ):
            with self.subTest(**options), self.assertRaisesRegex(error, text):
                self.tasks.add_task("line", **options)
        for task_id, changes, text in (
            ("b", {"after": "typo"}, "typo"), ("b", {"after": "b"}, "itself"), ("a", {"after": "b"}, "itself"), ("b", {"repeat": timedelta(1)}, "schedule"),
            ("b", {"after": None, "after_end": "a"}, "None"),
        ):
            with self.subTest(task_id, **changes), self.assertRaisesRegex(ValueError, text):
                self.tasks.update(task_id, **changes)
        # What is kept follows nobody new, so that a start of a program can add it again and again.
        self.assertEqual(self.tasks.add_task("line", task_id="b", after="gone", if_exists="keep").id, "b")
        for tasks, text in (
            ([{"task_id": "y", "after": "later"}, {"task_id": "later"}], "'later'.*there"),
            # The first one stays, with its bonds, and gets other data.
            ([{"task_id": "b", "if_exists": "follow"}, {"task_id": "a", "after": "b", "if_exists": "replace"}], "wait for itself"),
            ([{"task_id": "p"}, {"task_id": "q", "after": "p"}, {"task_id": "p", "after": "q", "if_exists": "replace"}], "'p' waits for 'q'"),
        ):
            with self.subTest(tasks), self.assertRaisesRegex(ValueError, text):
                self.tasks.add_tasks({"task_type": "line", **task} for task in tasks)
        with self.assertRaises(StoreError) as raised:
            TaskQueue(TestTheManualsOwnStore.open(self)).add_task("x", after=a)
        self.assertIn("lacks", str(raised.exception))
        self.assertEqual((self.states(), self.states(self.tasks.in_memory)), ({"a": "waiting", "b": "held"}, {"m": "waiting"}))

    def test_whom_it_was_to_follow_may_be_over_where_it_was_given_as_a_task(self):
        for verbs in (self.tasks, self.tasks.in_memory):
            gone, kept = self.line("gone", verbs), self.line("kept", verbs, keep_result=60)
            self.tasks.run_due(EVERYTHING)
            tasks = [self.line("first", verbs, after=[gone, kept]), self.line("then", verbs, after_end=[gone, "kept", "first"])]
            self.assertEqual([t.held for t in tasks], [False, True])
            self.assertEqual([t.id for t in self.tasks.run_due(EVERYTHING)], ["first", "then"])
            verbs.remove(state="done")

    def test_a_transaction_stores_both_or_neither(self):
        self.tasks.count()
        for commits in (False, True):
            with contextlib.closing(sqlite3.connect(self.folder / "tasks.db")) as db:
                a = self.line("a", connection=db)
                self.line("b", connection=db, after="a"), self.line("c", connection=db, after_end=[a, "b"])
                db.commit() if commits else db.rollback()
            self.assertEqual(self.states(), {"a": "waiting", "b": "held", "c": "held"} if commits else {})
        self.assertEqual(len(self.sql("SELECT * FROM taskpool_after")), 3)
        data = {"file": str(self.folder / "lines")}
        self.tasks.add_tasks({"task_type": "line", "data": data, "task_id": i, "after": a} for i, a in (("d", "c"), ("e", "d"), ("f", ["d", "e"])))
        self.assertEqual([t.id for t in self.tasks.run_due(EVERYTHING)], list("abcdef"))

    def test_behind_one_that_fails_it_waits_for_the_retry_and_one_that_takes_any_end_runs(self):
        for verbs in (self.tasks, self.tasks.in_memory):
            with self.subTest(verbs=verbs):
                self.line("a", verbs, "fail"), self.line("b", verbs, after="a"), self.line("c", verbs, after="b"), self.line("any", verbs, after_end="a")
                self.assertEqual([(t.id, t.state) for t in self.tasks.run_due(EVERYTHING)], [("a", "failed"), ("any", "done")])
                self.assertEqual((self.states(verbs), verbs.count(due=True)), ({"a": "failed", "b": "held", "c": "held"}, 0))
                verbs.retry(task_id="a")
                self.assertEqual([t.id for t in self.tasks.run_due({**EVERYTHING, "fail": echo})], ["a", "b", "c"])

    def test_of_one_that_is_removed_the_followers_fail_and_a_retry_starts_them(self):
        for verbs in (self.tasks, self.tasks.in_memory):
            with self.subTest(verbs=verbs):
                self.line("a:7", verbs), self.line("x", verbs, "fail"), self.line("b", verbs, after=["a:7", "x"]), self.line("c", verbs, after="b")
                verbs.remove(task_id="a:7")
                b = verbs.find_one(task_id="b")
                self.assertEqual((b.state, b.error, self.states(verbs)["c"]), ("failed", "not started: a:7, which it was to follow, was removed", "held"))
                self.assertEqual((b.started_at, b.ended_at >= b.created_at), (None, True))
                self.assertEqual(verbs.retry(task_id="b"), 1)
                self.assertTrue(verbs.find_one(task_id="b").held)
                self.assertEqual([t.id for t in self.tasks.run_due({**EVERYTHING, "fail": echo})], ["x", "b", "c"])
                self.line("a", verbs), self.line("b", verbs, after="a")
                self.assertEqual((verbs.remove(task_id=["a", "b"]), verbs.find()), (2, []))

    def test_a_held_task_can_be_changed_told_to_run_now_and_keeps_its_due_date(self):
        self.line("a"), self.line("b", after="a")
        self.assertEqual((self.tasks.update("b", priority=9).held, self.tasks.update("b", after=[]).held), (True, True))
        self.assertEqual(self.tasks.update("b", after=None).held, False)
        self.assertEqual([t.id for t in self.tasks.run_due(EVERYTHING)], ["b", "a"])
        self.tasks.clock = Clock()
        self.line("a"), self.line("b", after="a", due_date=timedelta(hours=1))
        self.assertEqual([t.id for t in self.tasks.run_due(EVERYTHING)], ["a"])
        self.assertEqual([(t.id, t.held) for t in self.tasks.find(due=False)], [("b", False)])
        self.tasks.clock.offset = 3601
        self.assertEqual([t.id for t in self.tasks.run_due(EVERYTHING)], ["b"])

    def test_a_repeating_task_lets_its_followers_go_at_the_end_of_a_run(self):
        self.tasks.clock = Clock()
        self.tasks.add_task("fail", task_id="a", repeat=timedelta(hours=1))
        self.line("b", after="a"), self.line("any", after_end="a")
        self.assertEqual([t.id for t in self.tasks.run_due(EVERYTHING)], ["a", "any"])
        self.tasks.clock.offset = 3700
        self.assertEqual([t.id for t in self.tasks.run_due({**EVERYTHING, "fail": echo})], ["a", "b"])

    def test_it_starts_after_the_end_of_the_last_and_exactly_once(self):
        """Pairs, a fan-in, diamonds and a chain, on four workers, stored and in memory."""
        cluster = self.cluster(EVERYTHING, self.tasks, max_available_workers=4, keep_alive="always")
        cluster.initialize()
        for verbs in (self.tasks, self.tasks.in_memory):
            with self.subTest(verbs=verbs):
                befores = {}
                for i in range(40):
                    befores[f"b{i}"] = [self.line(f"a{i}", verbs)]
                    self.line(f"b{i}", verbs, after=befores[f"b{i}"])
                parts = [self.line(f"p{i}", verbs) for i in range(100)]
                befores.update(left=parts, right=parts, bottom=[self.line(name, verbs, after=parts) for name in ("left", "right")])
                last = self.line("bottom", verbs, after=befores["bottom"])
                for i in range(30):
                    befores[f"c{i}"] = [last]
                    last = self.line(f"c{i}", verbs, after=last)
                self.assertTrue(cluster.drain(PATIENCE))
                eventually(lambda: not verbs.find(), "the end of all")
                ran = self.ran()
                self.assertEqual(len(ran), len(set(ran)))
                for name, before in befores.items():
                    self.assertLess(max(ran.index(t.id) for t in before), ran.index(name), name)
                os.remove(self.folder / "lines")

    def test_nobody_waits_for_a_held_task_and_the_log_tells_of_those_behind_a_failed_one(self):
        for in_memory in (False, True):
            with self.subTest(in_memory=in_memory), self.assertLogs("taskpool", "WARNING") as logs:
                verbs = self.tasks.in_memory if in_memory else self.tasks
                with self.cluster(EVERYTHING, self.tasks) as cluster:
                    first = cluster.submit("fail", task_id="a", in_memory=in_memory)
                    held = [cluster.submit("echo", i, task_id=f"b{i}", in_memory=in_memory, after=first.task) for i in range(2)]
                    self.assertIsInstance(first.exception(PATIENCE), ValueError)
                    self.assertTrue(cluster.drain(PATIENCE))
                    self.assertEqual([(f.done(), f.running(), t.held) for f, t in zip(held, verbs.find(held=True))], [(False, False, True)] * 2)
                    with self.assertRaises(TimeoutError):
                        self.tasks.wait("b0", 0)
                self.assertEqual(sum("fail:a:\t2 tasks wait for this one" in line for line in logs.output), 1)
                self.assertEqual(([f.cancelled() for f in held], verbs.count(held=True)), ([True, True], 2))
        self.tasks.retry(task_id="a")
        with self.cluster({**EVERYTHING, "fail": echo}, self.tasks) as cluster:
            cluster.drain(PATIENCE)
        self.assertEqual(self.tasks.find(), [])

    def test_the_future_of_one_that_cannot_start_any_more_ends(self):
        for in_memory in (False, True):
            with self.subTest(in_memory=in_memory):
                cluster = self.cluster(EVERYTHING, self.tasks, refresh_rate=10**6)
                verbs, path = self.tasks.in_memory if in_memory else self.tasks, str(self.folder / f"run{in_memory}")
                runs = cluster.submit("hold and fail", path, in_memory=in_memory, retries=5, task_id=path)
                then = cluster.submit("echo", 1, after=runs.task.id, in_memory=in_memory)
                last = cluster.submit("echo", 2, after_end=then.task, in_memory=in_memory)
                begun(path)
                verbs.remove(task_id=runs.task.id)
                self.assertFalse(then.done())
                let_end(path)
                error = then.exception(PATIENCE)
                self.assertEqual((type(error), str(error)), (taskpool.TaskPoolError, f"not started: {path}, which it was to follow, was removed"))
                self.assertEqual(last.result(PATIENCE), 2)

    def test_a_running_task_lets_its_follower_wait_for_the_tasks_that_it_adds(self):
        """In a chain, and two at once."""
        data = {"db": str(self.folder / "tasks.db"), "then": "b"}
        for name in ("a", "x"):
            self.line(name, task_type="parts", data=data)
        self.line("b", task_type="parts", data={**data, "then": "c"}, after=["a", "x"]), self.line("c", after="b")
        with self.cluster({"line": add_line, "parts": add_parts_for}, self.tasks) as cluster:
            eventually(lambda: cluster.drain() and not self.tasks.find(), "the end of all")
        ran = self.ran()
        self.assertEqual((len(ran), len(set(ran)), ran[-1]), (34, 34, "c"))
        self.assertEqual([{name[0] for name in ran[:22]}, {name[0] for name in ran[22:33]}], [{"a", "x"}, {"b"}])

    def test_programs_with_different_types_follow_each_other(self):
        here, there = self.cluster({"here": add_line}, self.tasks), self.cluster({"there": add_line}, self.queue())
        here.initialize(), there.initialize()
        for i in range(20):
            self.line(f"{i}", task_type=["here", "there"][i % 2], after=[f"{i - 1}"] if i and str(i - 1) in self.states() else [])
        last = self.line("last", task_type="there", after_end=self.tasks.find())
        self.tasks.wait(last.id, PATIENCE)
        self.assertEqual(self.ran()[-1], "last")

    def test_a_master_that_is_killed_starts_no_follower_too_early_and_forgets_none(self):
        self.kill(kills=3, pairs=30)

    def kill(self, kills, pairs):
        chance, quiet = random.Random(kills), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        master = self.script(self.MASTER, "master.py")
        data = {"file": str(self.folder / "lines"), "seconds": 0.01}
        running, lines = self.start(master, **quiet), self.folder / "lines"
        for i in range(pairs):
            a = self.tasks.add_task("chaos", {**data, "name": f"a{i}"}, task_id=f"a{i}", retries=9, retry_delay=0.0)
            self.tasks.add_task("chaos", {**data, "name": f"b{i}"}, task_id=f"b{i}", after=a, retries=9, retry_delay=0.0)
        for _ in range(kills):
            size = lines.stat().st_size if lines.exists() else 0
            eventually(lambda size=size: (lines.exists() and lines.stat().st_size > size) or not self.tasks.find())
            time.sleep(chance.uniform(0, 0.05))
            running.kill()
            running.communicate()
            running = self.start(master, **quiet)
        eventually(lambda: not self.tasks.find(state=["waiting", "running"]), "the end of all")
        running.terminate()
        running.communicate()
        self.assertEqual((self.tasks.find(), self.tasks._store.bonds()), ([], []))
        ended, starts = set(), collections.Counter()
        for kind, name in map(str.split, lines_of(lines)):
            if kind == "end":
                ended.add(name)
            else:
                starts[name] += 1
                self.assertTrue(name[0] == "a" or "a" + name[1:] in ended, f"{name} was too early")
        self.assertEqual(set(starts), {f"{kind}{i}" for kind in "ab" for i in range(pairs)})
        self.assertLessEqual(sum(starts.values()), 2 * pairs + 2 * kills)  # Two workers run when a master dies.


class TestKillAnythingAnyTime(InFolder):
    """P1-P4: random workers and masters get SIGKILL, and every task ends as promised.

    CR-01, CR-05, CR-10, DU-05, DU-10, SQ-04, WP-01, ENGINE 13.
    """
    MASTER = TestFollowers.MASTER
    PRODUCER = """
        with TaskQueue("tasks.db") as queue:
            for i in range(int(sys.argv[2])):
                name, seconds = f"{sys.argv[1]}-{i}", random.choice([0, 0, 0, 0.002, 0.02])
                queue.add_task("chaos", {"file": "lines", "seconds": seconds, "name": name},
                               task_id=name if i % 2 else None,  # Else one is drawn.
                               retries=random.choice([0, 1, 60]), retry_delay=0.01)
    """

    def drive(self, masters, kills, producers, tasks):
        random_ = random.Random(masters)
        master, producer = self.script(self.MASTER, "master.py"), self.script(self.PRODUCER, "producer.py")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        queue, lines = self.queue(), self.folder / "lines"
        adding = [self.start(producer, i, tasks // producers, **quiet) for i in range(producers)]
        running = [self.start(master, **quiet) for _ in range(masters)]
        ids = {f"{p}-{i}" for p in range(producers) for i in range(tasks // producers)}
        ended, seen, done, pids, size, before = {}, set(), 0, set(), 0, None
        while done < kills or len(ended) < len(ids):
            progress = done, len(ended), size
            if progress != before:
                before, deadline = progress, time.monotonic() + PATIENCE
            added = all(process.poll() is not None for process in adding)
            left = {task.data["name"] for task in queue.find(state=["waiting", "running"])}
            size = lines.stat().st_size if lines.exists() else 0
            seen |= left
            for task_id in ids - left - set(ended) if added else seen - left - set(ended):
                ended[task_id] = size  # From here on it must not start again.
            if time.monotonic() > deadline:
                self.fail(f"{len(ids) - len(ended)} tasks have not ended: {queue.find(limit=3)}")
            for i, process in enumerate(running):
                if process.poll() is not None:  # run() has raised: five starts in a row were killed.
                    running[i] = self.start(master, **quiet)
            if done < kills:
                i = random_.randrange(masters)
                workers = [pid for pid in children(running[i].pid) if b"spawn_main" in command_line(pid)]
                pids |= {running[i].pid, *workers}
                if random_.random() < 0.25:
                    running[i].kill()
                    running[i].communicate()
                    running[i] = self.start(master, **quiet)
                    done += 1
                elif workers:
                    with contextlib.suppress(OSError):
                        os.kill(random_.choice(workers), signal.SIGKILL)
                        done += 1
            time.sleep(random_.uniform(0.005, 0.06))
        for process in running:
            pids |= {process.pid, *children(process.pid)}
            descriptors = functools.partial(os.listdir, f"/proc/{process.pid}/fd")
            eventually(lambda: len(descriptors()) < 45, "the closing of descriptors")  # Some 30 are in use.
        for process in running:
            eventually(lambda process=process: process.terminate() or process.poll() is not None)
        eventually(lambda: not any(map(is_alive, pids)), "the end of all processes")
        self.check(queue, ids, ended, lines)

    def check(self, queue, ids, ended, lines):
        starts, ends, position = collections.Counter(), collections.Counter(), 0
        for line in lines_of(lines):
            kind, task_id = line.split()
            (starts if kind == "start" else ends)[task_id] += 1
            if kind == "start":
                self.assertFalse(position >= ended[task_id], f"{task_id} ran again after its end")
            position += len(line) + 1
        failed = {task.data["name"]: task for task in queue.find()}
        self.assertEqual({task.state for task in failed.values()} - {"failed"}, set())
        for task_id in ids - set(failed):
            self.assertGreaterEqual(ends[task_id], 1, f"{task_id} is missing")
        for task in failed.values():
            self.assertEqual(task.attempt, task.retries + 1)
            # The last kill may have come between the start and its first line.
            self.assertGreaterEqual(starts[task.data["name"]], task.retries)
            self.assertIn("WorkerDied", task.error)
        self.check_store()

    def check_store(self):
        self.assertEqual(self.sql("PRAGMA integrity_check"), [("ok",)])
        self.assertEqual(self.sql("SELECT count(*) FROM taskpool_task WHERE owner <> ''"), [(0,)])

    def test_one_master_and_its_workers(self):
        self.drive(masters=1, kills=70, producers=1, tasks=1200)

    def test_three_masters_and_producers_in_other_processes(self):
        self.drive(masters=3, kills=90, producers=3, tasks=1500)

    def test_a_task_that_kills_its_master_fails_after_six_starts_and_others_are_served(self):
        """P3, RT-05, ENGINE 4: the whole process group dies, at every start."""
        source = """
            def note(job):
                fd = os.open("lines", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.write(fd, f"{job.id}\\n".encode())
                if job.id == "poison":
                    os.killpg(0, signal.SIGKILL)
            if __name__ == "__main__":
                os.setpgid(0, 0)
                with Cluster({"note": note}, TaskQueue("tasks.db"), max_available_workers=2) as cluster:
                    cluster.drain()
        """
        queue, script = self.queue(), self.script(source)
        for i in range(20):
            queue.add_task("note", task_id=f"good{i}", priority=-(i % 2))
        queue.add_task("note", task_id="poison", retries=3)
        for _ in range(12):
            if self.start(script).wait(PATIENCE) == 0:
                break
        counts = collections.Counter(lines_of(self.folder / "lines"))
        self.assertEqual(counts.pop("poison"), 6)
        self.assertEqual(set(counts), {f"good{i}" for i in range(20)})
        (failed,) = queue.find()
        self.assertEqual((failed.id, failed.state, failed.attempt), ("poison", "failed", 1))

    def test_a_grandchild_that_holds_the_pipes_hides_no_death(self):
        """ENGINE 16, 17."""
        with self.cluster({"grandchild": leave_a_grandchild, "echo": echo}, max_available_workers=1) as cluster:
            error = cluster.submit("grandchild", str(self.folder / "pid")).exception(PATIENCE)
            self.assertEqual(error.exit_code, 9)
            self.assertEqual(cluster.submit("echo", 1).result(PATIENCE), 1)
        os.kill(int((self.folder / "pid").read_text()), signal.SIGKILL)


class TestMongoKillAnythingAnyTime(WithMongo):
    """P1-P4 with MongoDB: the same attack."""

    drive, check = TestKillAnythingAnyTime.drive, TestKillAnythingAnyTime.check
    MASTER, PRODUCER = map(WithMongo.on_mongo, (TestKillAnythingAnyTime.MASTER, TestKillAnythingAnyTime.PRODUCER))

    def check_store(self):
        self.assertEqual(self.collection.count_documents({"taskpool.owner": {"$gt": ""}}), 0)

    @unittest.skipUnless(LINUX, "finds the victims in /proc")
    def test_two_masters_and_producers_in_other_processes(self):
        self.drive(masters=2, kills=14, producers=2, tasks=600)


class TestMongoFollowers(WithMongo):
    """Tasks that wait for the ends of others, with MongoDB."""

    line, states, ran, kill = (getattr(TestFollowers, name) for name in ("line", "states", "ran", "kill"))
    MASTER = WithMongo.on_mongo(TestFollowers.MASTER)

    def setUp(self):
        super().setUp()
        self.tasks = self.queue()

    test_start, test_future, test_held, test_kill = (
        getattr(TestFollowers, f"test_{name}") for name in (
            "it_starts_after_the_end_of_the_last_and_exactly_once", "the_future_of_one_that_cannot_start_any_more_ends",
            "nobody_waits_for_a_held_task_and_the_log_tells_of_those_behind_a_failed_one",
            "a_master_that_is_killed_starts_no_follower_too_early_and_forgets_none"))
    test_takes, test_fails, test_removed, test_changed = (
        getattr(TestFollowers, f"test_{name}") for name in (
            "it_takes_tasks_ids_and_lists_and_tells_who_waits_for_whom",
            "behind_one_that_fails_it_waits_for_the_retry_and_one_that_takes_any_end_runs",
            "of_one_that_is_removed_the_followers_fail_and_a_retry_starts_them",
            "a_held_task_can_be_changed_told_to_run_now_and_keeps_its_due_date"))


class TestMongoCancel(WithMongo):
    """Of tasks in MongoDB, from another machine."""

    FUNCTIONS, hold, is_over, serve = (
        getattr(TestCancelFromAnywhere, name) for name in ("FUNCTIONS", "hold", "is_over", "serve"))
    test_look = TestCancelFromAnywhere.test_where_no_bell_is_heard_a_look_finds_it
    test_own = TestCancelFromAnywhere.test_the_programs_own_tasks_are_ended_in_memory_too_and_their_ids_are_free_at_once


def command_line(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def leave_a_grandchild(job):
    pid = os.fork()
    if pid == 0:
        time.sleep(PATIENCE)
        os._exit(0)
    Path(job.data).write_text(str(pid))
    os._exit(9)


def misbehave(job):
    """Run for ever, in a way that is hard to end; or do harm to the process."""
    how = job.data["how"]
    Path(job.data["file"]).write_text(str(os.getpid()))
    if how == "spin":
        while True:
            pass
    if how == "regex":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if how == "gil":
        import ctypes

        ctypes.PyDLL(None).sleep(int(PATIENCE))  # Holds the GIL.
    if how == "signals":
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
    if how == "thread":
        threading.Thread(target=time.sleep, args=(PATIENCE,)).start()
    if how == "child":
        subprocess.run(["sleep", "3"])
    if how == "socket":
        import socket

        left, _right = socket.socketpair()
        left.recv(1)
    if how in ("close", "close and stay"):
        os.closerange(3, 64)
        return time.sleep(PATIENCE) if how == "close and stay" else "closed"
    if how == "chdir":
        os.chdir("/")
        return "moved"
    if how == "stdout":
        os.close(1), os.close(2)
        with contextlib.suppress(OSError):
            print("into the void")
        return "printed"
    if how == "handlers":
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        return "handled"
    if how == "pool":
        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(abs, [-1, -2])
    if how == "executor":
        with concurrent.futures.ProcessPoolExecutor(1) as executor:
            return executor.submit(abs, -3).result()
    if how == "memory":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, limit[1]))
        try:
            return len(bytearray(1 << 32))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)
    if how == "big":
        return b"x" * 200_000_000
    if how == "segfault":
        import ctypes

        sys.stderr = None
        ctypes.string_at(0)
    if how == "term to exit":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    if how.startswith("term"):
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "daemon":
        threading.Thread(target=time.sleep, args=(PATIENCE,), daemon=True).start()
        return "left a thread"
    time.sleep(PATIENCE)
    return None


@unittest.skipUnless(LINUX, "uses POSIX signals and /proc")
@unittest.skipUnless(LINUX, "looks into /proc")
class TestNothingIsGivenAway(InFolder):
    """What a task starts gets what a program started by the master gets, and nothing of ours."""

    def test_programs_get_no_pipe_and_no_blocked_or_ignored_signal(self):
        for method in METHODS:
            with self.subTest(method), self.cluster({"get": what_programs_get}, start_method=method) as cluster:
                self.assertLessEqual({*cluster.submit("get").result(PATIENCE)}, {*what_programs_get()})

    def test_nor_do_those_that_the_entry_file_starts_as_it_runs_again(self):
        """Under forkserver that may be in the server (from Python 3.13.8 on), whose ways are its own."""
        source = """
            from test_taskpool import echo, what_programs_get
            if not Cluster.is_master():
                print({*what_programs_get()} <= {*sys.argv}, flush=True)
            elif len(sys.argv) == 1:
                sys.argv += what_programs_get()
            cluster = Cluster({"echo": echo}, in_memory_only=True, max_available_workers=1)
            if Cluster.is_master():
                cluster.submit("echo").result()
                cluster.shutdown()
        """
        self.assertEqual(self.run_script(source), "True\n")

    def test_signals_that_the_master_blocks_are_not_blocked_in_workers(self):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGIO, signal.SIGUSR1})
        self.addCleanup(signal.pthread_sigmask, signal.SIG_SETMASK, blocked)
        for method in METHODS:
            with self.cluster({"get": what_programs_get}, start_method=method) as cluster:
                self.assertIn("SigBlk:" + "0" * 16, cluster.submit("get").result(PATIENCE))

    def test_a_task_that_becomes_another_program_has_died(self):
        for method in METHODS:
            with self.subTest(method), self.cluster({"exec": become_another_program, "echo": echo}, start_method=method) as cluster:
                died = cluster.submit("exec").exception(PATIENCE / 2)
                self.assertIsInstance(died, WorkerDied)
                eventually(lambda pid=died.pid: not is_alive(pid))
                self.assertEqual(cluster.submit("echo", 1).result(PATIENCE), 1)

    def test_a_program_in_the_background_keeps_nobody_waiting(self):
        source = """
            def start(job): os.system("sleep 60 < /dev/null > /dev/null 2>&1 & echo $! > pid")
            if __name__ == "__main__":
                with Cluster({"start": start}, in_memory_only=True, max_available_workers=1) as cluster:
                    cluster.submit("start").result()
        """
        self.run_script(source)  # Reads to the end of output, which all that are left must have closed.
        pid = int((self.folder / "pid").read_text())
        self.assertTrue(is_alive(pid))
        os.kill(pid, signal.SIGKILL)

    def test_a_ctrl_c_in_a_forked_worker_is_not_told_to_the_masters_event_loop(self):
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
            self.addCleanup(end.close)
        self.addCleanup(signal.set_wakeup_fd, signal.set_wakeup_fd(theirs.fileno()))
        with self.cluster({"send": send_ctrl_c_to_itself}, start_method="fork") as cluster:
            self.assertIsNone(cluster.submit("send").result(PATIENCE))
        self.assertRaises(BlockingIOError, ours.recv, 1)


class TestHostileTasks(WithCluster):
    """P4: whatever a task does to its process, the pool goes on."""

    @classmethod
    def setUpClass(cls):
        EVERYTHING["misbehave"] = misbehave
        super().setUpClass()

    def misbehave(self, how, **options):
        self.file = str(self.folder / how)
        return self.submit("misbehave", {"how": how, "file": self.file}, **options)

    def test_a_timeout_ends_every_way_to_run_for_ever(self):
        """TO-01, TO-03, ENGINE 8, 16."""
        for how in ("sleep", "spin", "regex", "gil", "signals", "thread", "child", "socket"):
            with self.subTest(how=how):
                error = self.misbehave(how, timeout=0.3).exception(PATIENCE)
                self.assertIsInstance(error, TaskTimeout)
                if os.path.exists(self.file):  # Else the machine was too slow to begin it.
                    eventually(lambda: not is_alive(int(Path(self.file).read_text() or 0)))

    def test_a_task_that_harms_its_process_harms_no_other(self):
        """EX-07."""
        for how, result in [
            ("chdir", "moved"), ("stdout", "printed"), ("pool", [1, 2]), ("executor", 3), ("daemon", "left a thread"),
            ("handlers", "handled"),  # Last, as a Pool stops its processes by SIGTERM.
            ("close", WorkerDied), ("close and stay", WorkerDied), ("segfault", WorkerDied), *[("memory", MemoryError)] * 5,
        ]:
            with self.subTest(how=how):
                future = self.misbehave(how)
                error = future.exception(PATIENCE)
                self.assertEqual(future.result() if error is None else type(error), result)
                if how == "segfault":
                    self.assertIn("SIGSEGV", str(error))
                self.assertEqual([self.result("echo", i) for i in range(4)], [*range(4)])

    def test_a_result_of_two_hundred_megabytes_arrives_and_holds_up_nobody(self):
        """ENGINE 25, 26, EX-09."""
        big = self.misbehave("big")
        for i in range(10):
            self.assertEqual(self.result("echo", i, in_memory=True), i)
        self.assertEqual(len(big.result(PATIENCE)), 200_000_000)

    def test_a_flood_of_submits_while_the_dispatcher_is_held_up_blocks_nobody(self):
        """ENGINE 29: the wake-up pipe is not filled by them."""
        release = threading.Event()
        self.shared._engine.post(lambda: release.wait(PATIENCE))
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            work = threads.map(lambda i: self.submit("echo", i, in_memory=True), range(4000), timeout=PATIENCE)
            futures = list(work)
            release.set()
        self.assertEqual(sum(future.result(PATIENCE) for future in futures), sum(range(4000)))
        self.shared._engine.wake._pending = True  # As a Ctrl-C before its byte leaves it.
        eventually(lambda: not self.shared._engine.wake._pending)

    def test_a_worker_dies_of_sigterm_whatever_the_master_does_with_it(self):
        """ENGINE 14, 76: also under fork, and after a task made it a SystemExit."""
        previous = signal.signal(signal.SIGTERM, lambda *_: self.fail("the master's own handler ran"))
        self.addCleanup(signal.signal, signal.SIGTERM, previous)
        with self.cluster({"misbehave": misbehave}, start_method="fork", max_available_workers=1) as cluster:
            data = {"how": "term", "file": str(self.folder / "pid")}
            error = cluster.submit("misbehave", data).exception(PATIENCE)
            self.assertEqual((type(error), error.exit_code), (WorkerDied, -signal.SIGTERM))
            data["how"] = "term to exit"
            error = cluster.submit("misbehave", data).exception(PATIENCE)
            self.assertEqual(error.type_name, "SystemExit")
        self.assertFalse(is_alive(int((self.folder / "pid").read_text())))

    def test_large_data_travel_both_ways_without_a_deadlock(self):
        text = "x" * 2_000_000
        futures = [self.submit("echo", text + str(i), in_memory=bool(i % 2)) for i in range(8)]
        self.assertEqual([f.result(PATIENCE) for f in futures], [text + str(i) for i in range(8)])

    def test_a_fork_of_the_program_does_not_disturb_its_workers(self):
        """ENGINE 62, 73."""
        futures = [self.submit("sleep") for _ in range(5)]
        pid = os.fork()
        if pid == 0:
            try:
                ok = not self.shared._engine.thread and self.shared.workers() == []
            finally:
                os._exit(0 if ok else 1)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        self.assertEqual([f.result(PATIENCE) for f in futures], ["slept"] * 5)

    @unittest.skipUnless(LINUX, "forks in threads")
    def test_threads_that_fork_at_once_release_their_own_locks_only(self):
        out = self.run_script(
            """
            import warnings
            from concurrent.futures import ThreadPoolExecutor
            warnings.simplefilter("ignore")
            sys.setswitchinterval(1e-6)
            queues = [TaskQueue(f"{i}.db") for i in range(3)]
            for queue in queues:
                queue.add_task("x")
            done = threading.Event()
            def fork(_):
                for _ in range(60):
                    pid = os.fork()
                    if not pid: os._exit(0)
                    os.waitpid(pid, 0)
            def add(_):
                while not done.is_set():
                    for queue in queues: queue.add_task("x")
            with ThreadPoolExecutor(4) as forking, ThreadPoolExecutor(2) as adding:
                added = adding.map(add, range(2))
                list(forking.map(fork, range(4)))
                done.set()
                print("held", list(added))
            """
        )
        self.assertEqual((out, self.stderr), ("held [None, None]\n", ""))

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no fork")
    def test_a_fork_in_a_signal_handler_in_the_midst_of_a_fork_keeps_no_lock(self):
        out = self.run_script(
            """
            import os, threading, taskpool
            store = taskpool.TaskQueue("tasks.db")._store
            class Lock:
                def __init__(self, lock): self.lock, self.forks = lock, 1
                def acquire(self, timeout):
                    if self.forks:  # As a signal handler does.
                        self.forks = 0
                        fork()
                    return self.lock.acquire(timeout=timeout)
                def release(self): self.lock.release()
            def fork():
                pid = os.fork()
                if not pid: os._exit(0)
                os.waitpid(pid, 0)
            write, read = store._fork_locks
            store._fork_locks = write, Lock(read)
            fork()
            def look(): print(*(lock.acquire(timeout=1) for lock in (taskpool._birth_lock, write, read)))
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            """
        )
        self.assertEqual(out, "True True True\n")

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no fork")
    def test_a_fork_that_comes_back_from_its_task_is_no_worker(self):
        for how in ("return", "raise", "exit"):
            forks = self.submit("fork and come back", how)
            others = [self.submit("echo", i) for i in range(30)]
            self.assertEqual(forks.result(PATIENCE), {"return": 0, "raise": 1, "exit": 7}[how])
            self.assertEqual([future.result(PATIENCE) for future in others], list(range(30)))

    @unittest.skipUnless(hasattr(signal, "setitimer"), "this system has no timer signals")
    def test_a_signal_handler_in_a_task_may_report_and_add_tasks(self):
        path = str(self.shared_queue._store.path)
        self.assertGreater(self.result("report in a handler", path), 20)
        self.shared_queue.remove(task_type="nobody's")

    @unittest.skipUnless(LINUX, "counts pipes")
    def test_a_fork_in_the_midst_of_a_workers_start_does_not_keep_that_worker(self):
        """P4: it dies with its master, although the fork lives on."""
        process = self.start(self.script(
            """
            import multiprocessing.context
            def pid(job): return os.getpid()
            pipes, forked = threading.Semaphore(0), threading.Event()
            make = multiprocessing.context.BaseContext.Pipe
            def pipe(*args, **kwargs):
                ends = make(*args, **kwargs)
                pipes.release()
                if pipes._value == 4: forked.wait(0.5)  # In vain, if the fork has to wait.
                return ends
            multiprocessing.context.BaseContext.Pipe = pipe
            if __name__ == "__main__":
                cluster = Cluster({"pid": pid}, TaskQueue("x.db"), max_available_workers=1, in_memory_only=True, keep_alive="always")
                while pipes._value < 4: time.sleep(0.001)
                fork = os.fork()
                if not fork: time.sleep(600)
                forked.set()
                print(fork, cluster.submit("pid").result(), flush=True)
                time.sleep(600)
            """
        ))
        fork, worker = map(int, process.stdout.readline().split())
        self.addCleanup(os.kill, fork, signal.SIGKILL)
        process.kill()
        eventually(lambda: not is_alive(worker), "the end of the worker")
        self.assertTrue(is_alive(fork))

    def test_a_fork_may_run_a_cluster_of_its_own(self):
        out = self.run_script(
            """
            def pid(job): return os.getppid()
            if __name__ == "__main__":
                queue = TaskQueue("tasks.db")
                cluster = Cluster({"pid": pid}, queue, max_available_workers=1)
                print(cluster.submit("pid").result() == os.getpid())
                sys.stdout.flush()
                queue.add_task("pid", in_memory=True, task_id="of the parent", priority=-1)
                if os.fork() == 0:
                    print(queue.in_memory.find(), cluster.submit("pid").result() == os.getpid())
                    sys.exit(0)
                os.wait()
                print(cluster.submit("pid").result() == os.getpid())
            """
        )
        self.assertEqual(out.split("\n"), ["True", "[] True", "True", ""])


def waste(job):
    """Fail with much memory in a frame, which an exception may hold in a cycle."""
    held = b"x" * 20_000_000
    if job.data == "chained":
        try:
            inner = ValueError("inner")
            raise inner
        except ValueError as error:
            raise LookupError("outer") from error
    raise ValueError(len(held))


def memory_of(pid):
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class TestOddPlaces(InFolder):
    """P4 where processes, pipes, text or threads are not as usual."""

    @unittest.skipUnless("forkserver" in METHODS and LINUX, "needs forkserver")
    def test_a_killed_forkserver_costs_its_workers_and_is_replaced(self):
        """ENGINE 40, 41, 43: the entry file may also be preloaded in it."""
        out = self.run_script(
            """
            from multiprocessing.forkserver import _forkserver
            def hold(job):
                open("pid", "w").write(str(os.getpid()))
                time.sleep(60)
            cluster = Cluster({"hold": hold, "pid": lambda job: os.getpid()}, TaskQueue("x.db"), max_available_workers=1,
                              start_method="forkserver", in_memory_only=True, auto_initialize=False)
            if Cluster.is_master():
                multiprocessing.set_forkserver_preload(["__main__"])
                cluster.initialize()
                future = cluster.submit("hold")
                while not (os.path.exists("pid") and open("pid").read()): time.sleep(0.005)
                os.kill(_forkserver._forkserver_pid, signal.SIGKILL)
                print(type(future.exception()).__name__, cluster.submit("pid").result() > 0)
                deadline, pid = time.monotonic() + 60, open("pid").read()
                while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline: time.sleep(0.005)
                print(os.path.exists(f"/proc/{pid}"))
            """
        )
        self.assertEqual(out, "WorkerDied True\nFalse\n", self.stderr)

    @unittest.skipUnless("fork" in METHODS, "needs fork")
    def test_forks_of_a_program_with_busy_threads_do_not_hang(self):
        """WP-03, ENGINE 37, 38, 83."""
        out = self.run_script(
            """
            import io, importlib
            import colorsys
            def task(job):
                logging.warning("in %d", os.getpid())
                importlib.reload(colorsys)
                return os.getpid(), random.random()
            def busy():
                db = sqlite3.connect("user.db", isolation_level=None)
                while not stop.wait(0.001):
                    logging.warning("busy")
                    importlib.reload(colorsys)
                    db.execute("SELECT 1").fetchone()
                    queue.count()
            if __name__ == "__main__":
                logging.basicConfig()
                stop, queue = threading.Event(), TaskQueue("tasks.db")
                threads = [threading.Thread(target=busy) for _ in range(8)]
                for thread in threads: thread.start()
                with Cluster({"task": task}, queue, max_available_workers=4, max_tasks_per_worker=1, oversubscribe=True,
                             start_method="fork", logs="error") as cluster:
                    results = list(cluster.map("task", range(30)))
                stop.set()
                print(len({pid for pid, _ in results}), len({number for _, number in results}))
            """
        )
        self.assertEqual(out, "30 30\n", self.stderr)

    def test_any_text_passes_where_output_is_ascii_or_closed(self):
        """SE-07."""
        source = r"""
            def bad(job): raise ValueError("gl\u0101\u017e \U0001f600 \udcff")
            def same(job):
                print("gl\u0101\u017e")
                return "gl\u0101\u017e \U0001f600 \udcff"
            if __name__ == "__main__":
                logging.basicConfig(level=logging.INFO)
                with Cluster({"\u043f\u043e\u0447\u0442\u0430": bad, "same": same, "echo": len}, TaskQueue("tasks.db"),
                             max_available_workers=1) as cluster:
                    error = cluster.submit("\u043f\u043e\u0447\u0442\u0430").exception()
                    result = cluster.submit("same", keep_result=60, task_id="kept").result
                    try: result = result()
                    except UnicodeEncodeError as failed: result = failed.object
                with open("out", "w", encoding="ascii", errors="backslashreplace") as file:
                    print(ascii(str(error)), ascii(result), file=file)
        """
        ascii_only = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}

        def close():
            os.close(1), os.close(2)

        for options in ({}, {"preexec_fn": close} if os.name == "posix" else {}):
            self.run_script(source, env=ascii_only, **options)
            text = r"'gl\u0101\u017e \U0001f600 \udcff'"
            said = (self.folder / "out").read_text()
            self.assertTrue(said.startswith(text), said)
            self.assertIn(r"gl\u0101\u017e", said[len(text):])
            failed = self.queue().find_one(state="failed", task_type="\u043f\u043e\u0447\u0442\u0430")
            self.assertIn("ValueError: gl\u0101\u017e \U0001f600 \\udcff", failed.error)
            self.queue().remove(state=["failed", "done"])


@unittest.skipUnless(LINUX, "measures by /proc")
class TestNothingPilesUp(InFolder):
    """P4: no process, thread, file descriptor or memory is left over."""

    def test_a_worker_forgets_what_its_tasks_held(self):
        """PF-03, ENGINE 32."""
        task_map = {"waste": waste, "echo": echo, "pid": pid_of_worker}
        cluster = self.cluster(task_map, max_available_workers=1, keep_alive="always", in_memory_only=True)
        pid = cluster.submit("pid").result(PATIENCE)
        for how in ("plain", "chained"):
            for _ in range(3):
                cluster.submit("waste", how).exception(PATIENCE)
            before = memory_of(pid), memory_of(os.getpid())
            for _ in range(12):
                cluster.submit("waste", how).exception(PATIENCE)
                self.assertLess(memory_of(pid) - before[0], 50_000_000, how)
            self.assertLess(memory_of(os.getpid()) - before[1], 50_000_000, how)
        before = memory_of(pid)
        cluster.submit("echo", "x" * 70_000_000).result(PATIENCE)
        eventually(lambda: memory_of(pid) - before < 30_000_000)  # Although it got nothing else to do.
        self.assertEqual(cluster.submit("pid").result(PATIENCE), pid)

    def test_a_master_forgets_what_ended_and_the_file_does_not_grow(self):
        """PF-05, SQ-09."""
        queue = self.queue()
        cluster = self.cluster({"echo": echo, "fail": fail}, queue, keep_alive="always", logs="error")
        queue.add_event_listener("done", lambda value, task: None)
        logging.getLogger("taskpool").setLevel(logging.CRITICAL)
        self.addCleanup(logging.getLogger("taskpool").setLevel, logging.NOTSET)

        def round_():
            for in_memory in (True, False):
                futures = [cluster.submit("echo", [i], in_memory=in_memory) for i in range(500)]
                futures += [cluster.submit("fail", in_memory=in_memory) for _ in range(20)]
                concurrent.futures.wait(futures, PATIENCE)
                del futures
                queue.add_tasks({"task_type": "echo", "in_memory": in_memory} for _ in range(500))
                self.assertTrue(cluster.drain(PATIENCE))
            queue.remove(state="failed"), queue.in_memory.remove(state="failed")
            gc.collect()
            return sys.getallocatedblocks(), self.sql("PRAGMA page_count")[0][0]

        for _ in range(3):
            round_()
        before, after = round_(), [round_() for _ in range(3)][-1]
        self.assertLess(after[0] - before[0], 1500)  # Of 6000 tasks, not one block each.
        self.assertLess(after[1] - before[1], 80)  # 3000 rows would need twice that.
        self.assertEqual((queue.count(), queue.in_memory.count()), (0, 0))

    def test_twenty_starts_and_stops_leave_nothing(self):
        """SG-10, LL-04."""
        queue, pids = self.queue(), []

        def look():
            mine = [t.name for t in threading.enumerate() if t.name.startswith("taskpool")]
            return len(os.listdir("/proc/self/fd")), mine, len(children(os.getpid()))

        def leave(cluster, raises):
            with contextlib.suppress(ZeroDivisionError), cluster:
                cluster.submit("pid")
                return raises and 1 / 0

        bind = functools.partial
        ends = Cluster.shutdown, bind(Cluster.shutdown, wait=False), bind(leave, raises=False), bind(leave, raises=True)

        def turn(number):
            cluster = self.cluster({"fail": fail, "pid": pid_of_worker}, queue, start_method="fork", keep_alive="always")
            pids.append(cluster.submit("pid", in_memory=bool(number % 2)).result(PATIENCE))
            future = cluster.submit("fail", task_id=f"turn {number}", keep_result=60)
            self.assertIsInstance(future.exception(PATIENCE), ValueError)
            ends[number % 4](cluster)
            closes(cluster)

        with self.assertLogs("taskpool", "ERROR") as logs:
            turn(0)
            before = eventually(lambda: look() if not look()[1] else None)
            for number in range(1, 20):
                turn(number)
        eventually(lambda: look() == before, f"{look()} like {before}")
        self.assertFalse(any(map(is_alive, pids)))
        self.assertEqual([sum(f"turn {n}:\tfailed" in line for line in logs.output) for n in range(20)], [1] * 20)

    def test_ignored_deaths_many_files_and_few_descriptors(self):
        """SG-08, SG-11, ENGINE 77: SIGCHLD ignored; descriptors over 1024; a low limit."""
        out = self.run_script(
            """
            import resource
            def pid(job): return os.getpid()
            def die(job): os._exit(4)
            def descriptors(): return len(os.listdir("/proc/self/fd"))
            def limit(most): resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            def until(condition):
                deadline = time.monotonic() + 60
                while not condition() and time.monotonic() < deadline: time.sleep(0.005)
            def idle(): return [w["pid"] for w in cluster.workers() if w["state"] == "idle"]
            if __name__ == "__main__":
                hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                options = {"in_memory_only": True, "oversubscribe": True, "logs": "error"}
                limit(min(hard, 4096) if hard >= 0 else 4096)
                files = [open(os.devnull) for _ in range(1500)] if hard < 0 or hard > 1600 else []
                with Cluster({"pid": pid}, TaskQueue("x.db"), max_available_workers=2, **options) as cluster:
                    print(len(set(cluster.map("pid", range(20)))) > 0)
                for file in files: file.close()
                with Cluster({"pid": pid}, TaskQueue("x.db"), max_available_workers=1, max_tasks_per_worker=1,
                             start_method="fork", **options) as cluster:
                    list(cluster.map("pid", range(5)))
                    before = descriptors()
                    limit(before + 20)
                    print(len(set(cluster.map("pid", range(80)))))
                    until(lambda: descriptors() <= before)
                    print(descriptors() <= before)
                limit(1024)
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)
                with Cluster({"pid": pid, "die": die}, TaskQueue("x.db"), max_available_workers=3, keep_alive="always",
                             start_method="fork", **options) as cluster:
                    until(lambda: len(idle()) == 3)
                    before, first = descriptors(), idle()
                    futures = [cluster.submit("die") for _ in range(3)]
                    print(["exit code unknown" in str(f.exception()) for f in futures])
                    until(lambda: len(idle()) == 3)
                    second = idle()
                    for victim in second: os.kill(victim, signal.SIGKILL)
                    until(lambda: len(idle()) == 3 and not set(idle()) & set(second))
                    print(len({*first, *second, *idle()}), descriptors() <= before)
            """
        )
        self.assertEqual(out, "True\n80\nTrue\n[True, True, True]\n9 True\n", self.stderr)

    @unittest.skipUnless(os.name == "posix", "needs limits of resources")
    def test_a_worker_that_cannot_be_started_leaves_no_descriptor(self):
        """At whichever of its descriptors the limit is reached."""
        out = self.run_script(
            """
            import errno, os, resource, types
            from multiprocessing import resource_tracker
            import taskpool
            def descriptors(): return len(os.listdir("/dev/fd"))
            if __name__ == "__main__":
                hard, wake = resource.getrlimit(resource.RLIMIT_NOFILE)[1], taskpool._WakeUp()
                resource_tracker.ensure_running()  # It keeps one.
                options, failed, worker = types.SimpleNamespace(start_method="spawn", initargs=None), 0, None
                before, room, first = max(map(int, os.listdir("/dev/fd"))), 0, descriptors()
                while worker is None:
                    room += 1
                    resource.setrlimit(resource.RLIMIT_NOFILE, (before + room, hard))
                    try:
                        worker = taskpool._Worker(options, 1, types.SimpleNamespace(functions=0), wake)  # inside
                    except OSError as error:
                        assert error.errno == errno.EMFILE, error
                        failed += 1
                    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 60, hard))
                    assert worker or descriptors() == first, (room, descriptors(), first)
                worker.kill(); worker.process.join(); worker.close()
                print(failed > 8, descriptors() - first, len(taskpool._master_ends))
            """
        )
        self.assertEqual(out, "True 0 3\n", self.stderr)


class TestStoresUnderPressure(InFolder):
    """P1: locks, crowds, full disks, and files that vanish."""

    def test_eight_producers_and_two_clusters_share_a_file_without_an_error(self):
        """SQ-01, SQ-04, DU-05. P2: and each task runs once."""
        producer = self.script(
            """
            with TaskQueue("tasks.db") as queue:
                for i in range(0, int(sys.argv[2]), 10):  # Five alone, then five together.
                    tasks = [
                        {"task_type": "line", "data": {"file": sys.argv[3]}, "task_id": f"{sys.argv[1]}-{j}"}
                        for j in range(i, i + 10)
                    ]
                    for task in tasks[:5]:
                        queue.add_task(**task)
                    queue.add_tasks(tasks[5:])
            """
        )
        producers = [self.start(producer, i, 1250, self.folder / "lines") for i in range(8)]
        with self.warnings() as records:
            clusters = [self.cluster({"line": add_line}, self.queue()) for _ in range(2)]
            for process in producers:
                _out, err = process.communicate(timeout=PATIENCE * 2)
                self.assertEqual(process.returncode, 0, err)
            for cluster in clusters:
                self.assertTrue(cluster.drain(PATIENCE * 2))
        self.assertEqual([record.getMessage() for record in records], [])
        ids = [f"{p}-{i}" for p in range(8) for i in range(1250)]
        self.assertEqual(sorted(line.split()[0] for line in lines_of(self.folder / "lines")), sorted(ids))

    @contextlib.contextmanager
    def warnings(self):
        records = []  # But not of the clusters of other tests, which may still be ending.
        others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda r: records.append(r) if "CPU" not in r.getMessage() and r.thread not in others else None
        logging.getLogger("taskpool").addHandler(handler)
        try:
            yield records
        finally:
            logging.getLogger("taskpool").removeHandler(handler)

    def test_ten_processes_open_a_fresh_file_at_once(self):
        """SQ-07, SM-01, SM-03."""
        script = self.script(
            """
            print("ready", flush=True)
            for turn in range(20):
                while not os.path.exists(f"go{turn}"):
                    time.sleep(0.001)
                with TaskQueue(f"fresh{turn}.db") as queue:
                    queue.add_task("x", task_id=sys.argv[1])
                open(f"done{turn}.{sys.argv[1]}", "w").close()
            """
        )
        processes = [self.start(script, i) for i in range(10)]
        for process in processes:
            self.assertEqual(process.stdout.readline(), "ready\n")
        for turn in range(20):
            (self.folder / f"go{turn}").touch()
            eventually(lambda: all((self.folder / f"done{turn}.{i}").exists() or processes[i].poll() for i in range(10)))
            self.assertEqual(self.queue(f"fresh{turn}.db").count(), 10)
        for process in processes:
            _out, err = process.communicate(timeout=PATIENCE)
            self.assertEqual((process.returncode, err), (0, ""))

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_a_connection_carried_over_a_fork_is_never_used_there(self):
        """SQ-02."""
        queue = self.queue()
        for turn in range(10):
            queue.add_task("x", turn)
            pid = os.fork()
            if pid == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    queue.add_task("x", -turn)
                    queue.close()
                    code = 0
                os._exit(code)
            queue.add_task("x", turn)
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        self.assertEqual(queue.count(), 30)
        self.assertEqual(self.sql("PRAGMA integrity_check"), [("ok",)])

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_a_fork_waits_for_the_transactions_of_other_threads(self):
        """SQ-02: else SQLite in the child would take its parent's locks for its own."""
        queue, begun, release = self.queue(), threading.Event(), threading.Event()
        write_all = queue._store.write_all

        def write():
            with mock.patch.object(queue._store, "write_all", lambda pairs: begun.set() or release.wait(0.2) or write_all(pairs)):
                queue._store.add([(row(f"{i} of the thread"), "raise") for i in range(2)], NOW)

        thread = threading.Thread(target=write)
        thread.start()
        begun.wait(PATIENCE)
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                taskpool.BUSY_SECONDS = 3.0
                queue.add_task("x", task_id="of the child")
                code = 0
            os._exit(code)
        release.set()
        thread.join()
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        self.assertEqual({task.id for task in queue.find()}, {"0 of the thread", "1 of the thread", "of the child"})

    def test_sigkill_during_writes_leaves_whole_rows_and_what_was_acknowledged(self):
        """SQ-05: and SIGINT, and SIGTERM."""
        script = self.script(
            """
            queue = TaskQueue("tasks.db")
            i = queue.count()
            while True:
                print(queue.add_task("x", ["y" * 2000, i], task_id=f"{i}").id, flush=True)
                i += 1
            """
        )
        acknowledged = []
        for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM) * 2:
            process = self.start(script)
            for _ in range(20):
                acknowledged.append(process.stdout.readline().strip())
            process.send_signal(number)
            acknowledged += process.communicate(timeout=PATIENCE)[0].split()
        stored = {task.id: task.data for task in self.queue().find()}
        self.assertLessEqual(set(acknowledged), set(stored))
        self.assertTrue(all(data == ["y" * 2000, int(i)] for i, data in stored.items()))

    def test_a_full_disk_is_a_store_error_and_work_goes_on_when_there_is_space(self):
        """SQ-10, SQ-11."""
        disk = self.folder / "disk"
        disk.mkdir()
        mount = shutil.which("mount")
        if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
            self.skipTest("needs the right to mount a small tmpfs")
        self.addCleanup(subprocess.run, ["umount", "-l", disk], capture_output=True)
        queue, lines = TaskQueue(disk / "tasks.db"), str(self.folder / "lines")
        self.addCleanup(queue.close)
        cluster = self.cluster({"line": add_line}, queue, keep_alive="always")
        first = cluster.submit("line", {"file": lines}, keep_result=60)
        first.result(PATIENCE)
        acknowledged = 0
        with self.assertRaisesRegex(StoreError, "full") as caught:
            while True:
                queue.add_task("line", {"file": lines, "filler": "x" * 20_000}, due_date=timedelta(hours=1))
                acknowledged += 1
        self.assertIn(str(disk / "tasks.db"), str(caught.exception))
        self.assertEqual(queue.count(state="waiting"), acknowledged)
        with self.warnings() as records:  # Failing writes and working reads take turns.
            for _ in range(2):
                renewed = cluster._engine.sources[1].watch.next_look
                eventually(lambda: cluster._engine.sources[1].watch.next_look > renewed)
        self.assertLessEqual(len(records), 2)
        subprocess.run([mount, "-o", "remount,size=20m", disk], check=True)
        queue.add_task("line", {"file": lines}, task_id="after")
        self.assertEqual(queue.wait("after", PATIENCE).state, "done")
        self.assertEqual(queue.count(state="waiting"), acknowledged)

    def test_a_file_that_is_deleted_or_replaced_is_never_written_to_unseen(self):
        queue = self.queue()
        cluster = self.cluster({"echo": echo}, queue, keep_alive="always")
        self.assertEqual(cluster.submit("echo", 1).result(PATIENCE), 1)
        for path in self.folder.glob("tasks.db*"):
            path.unlink(missing_ok=True)
        later = queue.add_task("echo", due_date=timedelta(hours=1))
        self.assertEqual(self.queue().find_one().id, later.id)  # In the file that is there.
        self.assertEqual(cluster.submit("echo", 2).result(PATIENCE), 2)
        (self.folder / "junk").write_bytes(b"junk" * 10_000)
        os.replace(self.folder / "junk", self.folder / "tasks.db")
        for path in self.folder.glob("tasks.db-*"):
            path.unlink(missing_ok=True)
        with self.assertRaisesRegex(StoreError, "not a database"):
            queue.add_task("echo")
        self.assertEqual(cluster.submit("echo", 3, in_memory=True).result(PATIENCE), 3)
        os.remove(self.folder / "tasks.db")
        self.assertEqual(cluster.submit("echo", 4).result(PATIENCE), 4)

    def test_a_damaged_page_is_a_store_error_and_the_pool_lives(self):
        queue = self.queue()
        queue.add_tasks({"task_type": "echo", "data": "x" * 1000} for _ in range(200))
        queue.close()
        with open(self.folder / "tasks.db", "r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (os.path.getsize(self.folder / "tasks.db") - 8192))
        with self.assertLogs("taskpool", "ERROR") as logs:
            cluster = self.cluster({"echo": echo}, queue)
            self.assertEqual(cluster.submit("echo", 1, in_memory=True).result(PATIENCE), 1)
            eventually(lambda: "malformed" in "\n".join(logs.output))
        with self.assertRaisesRegex(StoreError, "malformed"):
            queue.add_task("echo")


class TestClockChanges(InFolder):
    """A clock set back or forward by a day loses, doubles and stops nothing. CK-01, CK-06."""

    def test_due_retried_repeated_and_running_tasks_survive_a_clock_that_jumps(self):
        for in_memory, jump in itertools.product((False, True), (-86400.0, 86400.0)):
            with self.subTest(in_memory=in_memory, jump=jump):
                queue, path = self.queue(f"{in_memory}{jump}.db"), str(self.folder / f"{in_memory}{jump}")
                queue.clock = Clock()
                add = functools.partial(queue.add_task, in_memory=in_memory)
                task_map = {"line": add_line, "hold": hold, "succeed_at": succeed_at}
                cluster = self.cluster(task_map, queue, max_available_workers=1)
                add("hold", path, task_id="held", priority=9)
                begun(path)
                add("line", {"file": path}, task_id="due")  # Before the clock jumps.
                add("line", {"file": path}, task_id="day", due_date=timedelta(hours=12))
                add("line", {"file": path}, task_id="slots", repeat=timedelta(hours=1))
                queue.clock.offset = jump
                add("line", {"file": path}, task_id="now")
                let_end(path)
                add("succeed_at", 2, retries=1, retry_delay=0.05, task_id="again")
                for task_id in ("held", "due", "now", "again", *["day"] * (jump > 0)):
                    self.assertEqual(queue.wait(task_id, PATIENCE).state, "done")
                self.assertTrue(cluster.drain(PATIENCE))
                ran = sorted(line.split()[0] for line in lines_of(path))
                # RC-07, CK-04: missed slots are one run.
                self.assertEqual(ran, [*["day"] * (jump > 0), "due", "now", "slots"])
                queue.clock.offset = -3600.0
                self.assertTrue(cluster.drain(PATIENCE))
                self.assertEqual(len(lines_of(path)), len(ran))
                cluster.shutdown()


@unittest.skipUnless(LINUX, "uses a pty")
class TestTerminal(InFolder):
    """Ctrl-C reaches the whole process group, also while workers start."""

    def test_ctrl_c_stops_the_program_once_without_a_traceback(self):
        """SG-05, ENGINE 74."""
        import pty

        serves = 'print("serving", flush=True), cluster.run()'
        script, queue, names = self.script(TestEnds.SERVER.replace("cluster.run()", serves)), self.queue(), ("started0", "started1")
        for boot in (False, True):
            queue.add_tasks({"task_type": "hold", "task_id": str(i)} for i in range(2))
            pid, terminal = pty.fork()
            if pid == 0:
                os.chdir(self.folder)
                os.execve(sys.executable, [sys.executable, str(script), "60"], {**os.environ, "PYTHONPATH": str(HERE)})
            self.addCleanup(os.close, terminal)
            shown = b""
            while b"serving" not in shown:
                shown += os.read(terminal, 4096)
            eventually(lambda: any(b"spawn_main" in command_line(child) for child in children(pid)) if boot
                       else all((self.folder / name).exists() for name in names))
            os.write(terminal, b"\x03")
            (self.folder / "end").touch()
            with contextlib.suppress(OSError):  # The terminal is gone with the process.
                while True:
                    shown += os.read(terminal, 4096)
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0, shown)
            self.assertIn(b"stopped", shown)
            self.assertNotIn(b"Traceback", shown)
            self.assertEqual({task.state for task in queue.find()} - {"waiting"}, set())
            queue.remove(state="waiting")
            for name in (*names, "end"):
                (self.folder / name).unlink(missing_ok=True)


# --- Cron ----------------------------------------------------------------------------
# Tables: one case per line, cells parted by " | ".

CRON_CASES = Path(os.environ.get("TASKPOOL_CRON_CASES", HERE.parent / "shared" / "cron"))
UTC = timezone.utc
MINUTE = timedelta(minutes=1)

# Rule | text | zone | after | the first two runs
CRON_RULES = """
rule 1, spaces and tabs | \t30  9\t* * *  | UTC | 2024-01-01T00:00+00:00 | 2024-01-01T09:30+00:00 2024-01-02T09:30+00:00
rule 1, seconds first | 15 30 9 * * * | UTC | 2024-01-01T00:00+00:00 | 2024-01-01T09:30:15+00:00 2024-01-02T09:30:15+00:00
rule 1, any case | 0 0 * jAn Mon | UTC | 2024-01-01T00:00+00:00 | 2024-01-08T00:00+00:00 2024-01-15T00:00+00:00
rule 2, 0 is Sunday | 0 0 * * 0 | UTC | 2024-01-01T00:00+00:00 | 2024-01-07T00:00+00:00 2024-01-14T00:00+00:00
rule 2, 7 is Sunday | 0 0 * * 7 | UTC | 2024-01-01T00:00+00:00 | 2024-01-07T00:00+00:00 2024-01-14T00:00+00:00
rule 2, leading zeros | 000005 07 * * * | UTC | 2024-01-01T00:00+00:00 | 2024-01-01T07:05+00:00 2024-01-02T07:05+00:00
rule 3, lists and ranges | 5,50-51 7-7 * * * | UTC | 2024-01-01T07:10+00:00 | 2024-01-01T07:50+00:00 2024-01-01T07:51+00:00
rule 4, hours wrap | 0 22-4/3 * * * | UTC | 2024-01-01T02:00+00:00 | 2024-01-01T04:00+00:00 2024-01-01T22:00+00:00
rule 4, weekdays wrap | 0 0 * * SAT-MON | UTC | 2024-01-06T00:00+00:00 | 2024-01-07T00:00+00:00 2024-01-08T00:00+00:00
rule 4, months wrap | 0 0 1 NOV-JAN/2 * | UTC | 2024-01-01T00:00+00:00 | 2024-11-01T00:00+00:00 2025-01-01T00:00+00:00
rule 5, a/n goes to the end | 40/9 0 * * * | UTC | 2024-01-01T00:40+00:00 | 2024-01-01T00:49+00:00 2024-01-01T00:58+00:00
rule 5, weekday a/n goes to 6 | 0 0 * * 3/3 | UTC | 2024-01-03T00:00+00:00 | 2024-01-06T00:00+00:00 2024-01-10T00:00+00:00
rule 5, a step may be the size | */60 * * * * | UTC | 2024-01-01T00:00+00:00 | 2024-01-01T01:00+00:00 2024-01-01T02:00+00:00
rule 6, ? is * | 0 0 ? * 2 | UTC | 2024-01-01T00:00+00:00 | 2024-01-02T00:00+00:00 2024-01-09T00:00+00:00
rule 7, either day field | 0 0 13 * 5 | UTC | 2024-09-06T00:00+00:00 | 2024-09-13T00:00+00:00 2024-09-20T00:00+00:00
rule 7, a starred field means both | 0 0 */2 * 1 | UTC | 2024-01-01T00:00+00:00 | 2024-01-15T00:00+00:00 2024-01-29T00:00+00:00
rule 7, a list that begins with a star | 0 0 *,5 * 1 | UTC | 2024-01-01T00:00+00:00 | 2024-01-08T00:00+00:00 2024-01-15T00:00+00:00
rule 8, last day | 0 0 L * * | UTC | 2024-01-31T00:00+00:00 | 2024-02-29T00:00+00:00 2024-03-31T00:00+00:00
rule 8, last working day | 0 0 LW * * | UTC | 2024-03-01T00:00+00:00 | 2024-03-29T00:00+00:00 2024-04-30T00:00+00:00
rule 8, Saturday the 1st | 0 0 1W * * | UTC | 2024-05-31T00:00+00:00 | 2024-06-03T00:00+00:00 2024-07-01T00:00+00:00
rule 8, no 31st, no 31W | 0 0 31W * * | UTC | 2024-05-31T00:00+00:00 | 2024-07-31T00:00+00:00 2024-08-30T00:00+00:00
rule 8, in a list | 0 0 15,L * * | UTC | 2024-02-01T00:00+00:00 | 2024-02-15T00:00+00:00 2024-02-29T00:00+00:00
rule 9, last Friday | 0 0 * * FRIL | UTC | 2024-02-01T00:00+00:00 | 2024-02-23T00:00+00:00 2024-03-29T00:00+00:00
rule 9, second Friday | 0 0 * * 5#2 | UTC | 2024-02-01T00:00+00:00 | 2024-02-09T00:00+00:00 2024-03-08T00:00+00:00
rule 9, in a list | 0 0 * * MON,FRI#2 | UTC | 2024-02-05T00:00+00:00 | 2024-02-09T00:00+00:00 2024-02-12T00:00+00:00
rule 10, macro | @Weekly | UTC | 2024-01-01T00:00+00:00 | 2024-01-07T00:00+00:00 2024-01-14T00:00+00:00
rule 12, either day is enough | 0 0 31 2 MON | UTC | 2024-02-01T00:00+00:00 | 2024-02-05T00:00+00:00 2024-02-12T00:00+00:00
rule 13, no leap year 2100 | 0 0 29 2 * | UTC | 2096-02-01T00:00+00:00 | 2096-02-29T00:00+00:00 2104-02-29T00:00+00:00
rule 13, the rarest | 0 0 * 2 MON#5 | UTC | 2072-03-01T00:00+00:00 | 2112-02-29T00:00+00:00 2140-02-29T00:00+00:00
rule 14, later than after | 0 9 * * * | UTC | 2024-01-01T09:00:00.000001+00:00 | 2024-01-02T09:00+00:00 2024-01-03T09:00+00:00
rule 14, after of any offset | 0 9 * * * | Asia/Tokyo | 2024-01-01T23:00-05:00 | 2024-01-03T09:00+09:00 2024-01-04T09:00+09:00
rule 14, asked in the second pass | 30 2 * * * | Europe/Berlin | 2024-10-27T02:15+01:00 | 2024-10-28T02:30+01:00 2024-10-29T02:30+01:00
rule 15, six fields, fixed | 0 30 2 * * * | Europe/Berlin | 2024-10-26T12:00+02:00 | 2024-10-27T02:30+02:00 2024-10-28T02:30+01:00
rule 15, six fields, interval | */30 59 2 * * * | Europe/Berlin | 2024-10-27T02:59+02:00 | 2024-10-27T02:59:30+02:00 2024-10-27T02:59+01:00
rule 16, nothing in the gap | */30 2 * * * | Europe/Berlin | 2024-03-31T00:00+01:00 | 2024-04-01T02:00+02:00 2024-04-01T02:30+02:00
rule 16, both passes | */30 2 * * * | Europe/Berlin | 2024-10-27T02:30+02:00 | 2024-10-27T02:00+01:00 2024-10-27T02:30+01:00
rule 16, up to the second pass | * * * * * | Europe/Berlin | 2016-10-30T02:59+02:00 | 2016-10-30T02:00+01:00 2016-10-30T02:01+01:00
rule 17, several due in a gap are one run | 15,45 2 * * * | Europe/Berlin | 2024-03-31T00:00+01:00 | 2024-03-31T03:00+02:00 2024-04-01T02:15+02:00
rule 17, a full range is fixed | 0 0-23 * * * | Europe/Berlin | 2024-10-27T02:00+02:00 | 2024-10-27T03:00+01:00 2024-10-27T04:00+01:00
rule 18, half an hour | 45 1 * * * | Australia/Lord_Howe | 2024-04-06T12:00+11:00 | 2024-04-07T01:45+11:00 2024-04-08T01:45+10:30
rule 18, a day skipped | 0 12 * * * | Pacific/Apia | 2011-12-29T12:00-10:00 | 2011-12-31T00:00+14:00 2011-12-31T12:00+14:00
rule 18, a gap from 00:01 | 30 0 * * * | America/St_Johns | 2006-04-01T12:00-03:30 | 2006-04-02T01:01-02:30 2006-04-03T00:30-02:30
"""

# Part of the message | wrong text
CRON_MISTAKES = """
7 fields (a year field is not supported) | 0 0 12 ? * MON 2025
minute '60' | 60 * * * *
repeat=timedelta(minutes=90) | */90 * * * *
a step is 1 to 60 | */0 * * * *
a step is 1 to 12 | 0 0 1 */13 *
a value is missing | 1,,2 * * * *
write MON, | 0 0 * * monday
(H, R, ~) | H/15 * * * *
(H, R, ~) | 0~30 * * * *
L-3 is not supported | 0 0 L-3 * *
5L or FRIL | 0 0 * * L
? alone | 0 0 1,? * *
FRI#2 | 0 0 * * MON#6
no such value | \u0665 * * * *
no such value | 0 0 *? * *
no such value | 0 0 * * fr\u0131
@reboot has no time | @reboot
repeat=timedelta(minutes=5) | @every 5m
write THU, | 0 0 * * th
no such value | 0 0 * * MON-XYZ
no such value | 0 0 * * hourly
tz='Europe/Berlin' | 30 2 * * * Europe/Berlin
Cron('30 2 * * *', tz='Europe/Berlin') | CRON_TZ=Europe/Berlin 30 2 * * *
Cron('@daily', tz='America/New_York') | @daily America/New_York
'/usr/bin/backup' is no part of it; give only the fields, '0 5 * * *' | 0 5 * * * /usr/bin/backup
'root cmd' is no part of it; give only the fields, '*/5 * * * *' | */5 * * * * root cmd
'cd /srv && ./run.sh >/dev/null 2>&1' is no part of it; | 0 5 * * 1-5	cd /srv && ./run.sh >/dev/null 2>&1
'~/backup' is no part of it; give only the fields, '@hourly' | @hourly ~/backup
'# weekdays' is no part of it; | 0 5 * * 1-5 # weekdays
a year field is not supported | 0 9 29 2 * 2028
have no blanks | 0 9 * * MON, FRI
have no blanks | 0 9 * * 1 - 5
1 field (a fixed interval is repeat=timedelta | 5m
3 fields (a fixed interval is repeat=timedelta | every 5 minutes
never fires | 0 0 30 2 *
never fires | 0 0 */20 * 1L
"""

# Zones with odd clock changes: by half an hour, 2, 3 and 24 hours, at midnight and at 00:01, over
# midnight, backwards in spring; and the year to look at.
ODD_ZONES = """
Australia/Lord_Howe 2026, Antarctica/Troll 2024, Antarctica/Casey 2010, Pacific/Apia 2011,
Africa/Cairo 2024, Asia/Beirut 2024, America/Sao_Paulo 2018, America/Santiago 2022,
America/Havana 2024, America/St_Johns 2006, Europe/Dublin 2024, Africa/Casablanca 2024,
Africa/Windhoek 2016, Atlantic/Azores 2024, Asia/Pyongyang 2018, Asia/Colombo 1996
"""

# Text | zone | words
CRON_WORDS = """
0 9 * * 1-5 | Europe/Paris | at 09:00, Monday to Friday, Europe/Paris; a time skipped by the clock change runs right after it
*/15 * * * * | Europe/Paris | every 15 minutes, Europe/Paris; a time skipped by the clock change has no run, a repeated one two
0 8,17 1 jan,7 * | UTC | at 08:00 and 17:00, day 1, January and July, UTC
5 30 2 L,15W * ? | UTC | at 02:30:05, the last day and the working day nearest to day 15, UTC
0 9-17 13 * FRI#2,0L | UTC | at minute 0 of hour 9 to hour 17, day 13 or the second Friday and the last Sunday, UTC
*/07 * * * * | UTC | every 7 minutes, UTC
*/1 09 01 */001 * | UTC | every minute of hour 9, day 1, every month, UTC
10-30/5 */2 */2 * 7 | UTC | every 5 minutes from minute 10 to minute 30 of every 2 hours, every 2 days if it is Sunday, UTC
"""

def cells(table):
    return [[cell.strip("\n") for cell in line.split(" | ")] for line in table.strip("\n").splitlines()]


def zone_or_skip(name):
    import zoneinfo

    try:
        return zoneinfo.ZoneInfo(name)
    except LookupError:
        raise unittest.SkipTest(f"no time zone data for {name}; pip install tzdata") from None


def first_runs(cron, after, count):
    runs = [cron.next(after)]
    while len(runs) < count:
        runs.append(cron.next(runs[-1]))
    return runs


class TestCron(unittest.TestCase):
    """When the next run is: rules, mistakes, and what a Cron is."""

    def assert_runs(self, text, tz, after, expected):
        runs = first_runs(Cron(text, tz), datetime.fromisoformat(after), len(expected))
        wanted = [datetime.fromisoformat(run).isoformat() for run in expected]
        self.assertEqual([run.isoformat() for run in runs], wanted)

    def cases(self, name):
        if not (CRON_CASES / name).exists():
            self.skipTest(f"no {name} in {CRON_CASES}; set TASKPOOL_CRON_CASES to its folder")
        return json.loads((CRON_CASES / name).read_text(encoding="utf-8"))

    def test_each_rule_holds(self):
        """CN-01, CN-03, TZ-03, TZ-05."""
        zone_or_skip("Europe/Berlin")
        for what, text, tz, after, expected in cells(CRON_RULES):
            with self.subTest(what, text=text):
                self.assert_runs(text, tz, after, expected.split())

    def test_every_vector_gives_its_five_runs(self):
        zone_or_skip("Europe/Berlin")
        for case in self.cases("vectors.json"):
            with self.subTest(text=case["expr"], tz=case["tz"], after=case["after"]):
                self.assert_runs(case["expr"], case["tz"], case["after"], case["next"])

    def test_every_wrong_text_is_refused_when_the_cron_is_made(self):
        for case in self.cases("errors.json"):
            with self.subTest(text=case["expr"], why=case["why"]):
                with self.assertRaises(ValueError) as caught:
                    Cron(case["expr"])
                self.assertIn(repr(case["expr"]), str(caught.exception))

    def test_the_message_shows_the_whole_text_and_helps(self):
        """CN-04."""
        for part, text in cells(CRON_MISTAKES):
            with self.subTest(text=text):
                with self.assertRaisesRegex(ValueError, f"(?s){re.escape(repr(text))}.*{re.escape(part)}"):
                    Cron(text)

    def test_only_spaces_and_tabs_are_blanks_and_the_ends_of_a_line(self):
        for text in ("0 0 * * *\n", "\n 0 0 * * * \r\n", "@daily\n"):
            self.assertEqual(Cron(text), Cron("@daily"))
        for text in ("0\u00a00 * * *", "0\x0b0 * * *", "0 0 * * *\x0c", "", " \t", "\n"):
            with self.subTest(text=text), self.assertRaises(ValueError):
                Cron(text)
        for text in ("0\n0 * * *", "0 0 * * *\n0 9 * * *\n"):
            with self.subTest(text=text), self.assertRaisesRegex(ValueError, "several lines"):
                Cron(text)
        for text in ("9" * 5000 + " * * * *", "*/" + "9" * 5000 + " * * * *"):
            with self.assertRaisesRegex(ValueError, "allowed: 0-59"):  # However long it is.
                Cron(text)

    def test_a_text_or_zone_of_another_type_is_a_type_error(self):
        for wrong in (b"* * * * *", 5, True, None, ["*"] * 5):
            with self.subTest(wrong=wrong):
                with self.assertRaisesRegex(TypeError, "str"):
                    Cron(wrong)
                with self.assertRaisesRegex(TypeError, "str"):
                    Cron("* * * * *", wrong)

    def test_an_unknown_zone_is_named_together_with_tzdata_and_utc_needs_none(self):
        with mock.patch.dict(sys.modules, {"zoneinfo": None}):
            self.assertEqual(Cron("0 9 * * *").next(datetime(2024, 1, 1, tzinfo=UTC)).hour, 9)
        for name in ("Mars/Olympus", "", "America", "../etc/passwd", "/etc/passwd", "a\0b", "+1"):
            with self.subTest(name=name), self.assertRaises(ValueError) as caught:
                Cron("* * * * *", name)
            self.assertIn(repr(name), str(caught.exception))
            self.assertIn("tzdata", str(caught.exception))

    def test_after_must_be_an_aware_datetime(self):
        with self.assertRaisesRegex(ValueError, "aware"):
            Cron("* * * * *").next(datetime(2024, 1, 1))
        for wrong in (0, 1.5, "2024-01-01T00:00+00:00", True, datetime(2024, 1, 1).date()):
            with self.subTest(wrong=wrong), self.assertRaisesRegex(TypeError, "after"):
                Cron("* * * * *").next(wrong)

    def test_there_is_no_run_past_the_year_9999(self):
        zone_or_skip("Asia/Tokyo")
        last = datetime(9999, 12, 31, 23, 59, tzinfo=UTC)
        self.assertEqual(Cron("* * * * *").next(last - MINUTE), last)
        for text in ("* * * * *", "0 0 29 2 *", "0 0 1 1 *"):
            for tz in ("UTC", "Asia/Tokyo", "America/New_York"):
                with self.subTest(text=text, tz=tz), self.assertRaisesRegex(ValueError, "9999"):
                    cron = Cron(text, tz)
                    cron.next(cron.next(last))

    def test_without_after_the_next_run_is_the_first_from_now_and_so_is_iteration(self):
        before, run = datetime.now(UTC), Cron("* * * * *").next()
        self.assertTrue(before < run <= datetime.now(UTC) + MINUTE, run)
        cron = Cron("0 0 29 2 *")
        runs = list(itertools.islice(cron, 3))
        self.assertEqual(runs, first_runs(cron, datetime.now(UTC), 3))
        self.assertEqual(runs, list(itertools.islice(iter(cron), 3)))

    def test_a_run_says_which_pass_it_is_in_and_after_may_be_a_time_that_the_clock_skips(self):
        skipped = datetime(2024, 3, 31, 2, 30, tzinfo=zone_or_skip("Europe/Berlin"))
        run = Cron("* * * * *", "Europe/Berlin").next(skipped)  # It is 01:30 UTC.
        self.assertEqual(run.isoformat(), "2024-03-31T03:31:00+02:00")
        after = datetime(2024, 10, 27, 0, 15, tzinfo=UTC)
        first, second = first_runs(Cron("30 * * * *", "Europe/Berlin"), after, 2)
        self.assertEqual(str(first.tzinfo), "Europe/Berlin")
        self.assertEqual((first.hour, first.fold, second.hour, second.fold), (2, 0, 2, 1))

    def test_crons_are_equal_if_fields_and_zone_are(self):
        zone_or_skip("Asia/Tokyo")
        daily = Cron("0 0 * * *")
        for same in (" 0\t0  * * * ", "@daily", "@MIDNIGHT"):
            self.assertEqual((daily, hash(daily)), (Cron(same), hash(Cron(same))))
        self.assertEqual(Cron("0 0 * * mon"), Cron("0 0 * * MON"))
        for other in (Cron("0 1 * * *"), Cron("0 0 * * *", "Asia/Tokyo"), "0 0 * * *"):
            self.assertNotEqual(daily, other)

    def test_str_is_the_text_and_a_copy_or_what_repr_makes_is_equal_and_works(self):
        zone_or_skip("Europe/Paris")
        after = datetime(2024, 3, 30, 12, tzinfo=UTC)
        for text, tz in (("30 2 LW * FRI#2", "UTC"), ("@Daily", "Europe/Paris")):
            cron = Cron(text, tz)
            self.assertEqual((str(cron), cron.tz), (text, tz))
            for twin in (pickle.loads(pickle.dumps(cron)), copy.deepcopy(cron), eval(repr(cron))):
                self.assertEqual(twin, cron)
                self.assertEqual(first_runs(twin, after, 3), first_runs(cron, after, 3))

    def test_explain_says_it_in_words(self):
        zone_or_skip("Europe/Paris")
        for text, tz, words in cells(CRON_WORDS):
            self.assertEqual(Cron(text, tz).explain(), words)
        for _, text, *_ in cells(CRON_RULES):
            self.assertRegex(Cron(text).explain(), "^(at|every) .*UTC$")


def literal_values(text, low, high):
    """The field's values, word by word from the rules (numbers, lists, ranges and steps only)."""
    values = set()
    for item in text.split(","):
        span, _, step = item.partition("/")
        first, _, last = (f"{low}-{high}" if span == "*" else span).partition("-")
        values.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return values


def literal_match(text, wall):
    minute, hour, day, month, weekday = text.split()
    on_date = wall.day in literal_values(day, 1, 31)
    on_weekday = wall.isoweekday() % 7 in literal_values(weekday, 0, 6)
    both = day.startswith("*") or weekday.startswith("*")
    return (
        wall.minute in literal_values(minute, 0, 59)
        and wall.hour in literal_values(hour, 0, 23)
        and wall.month in literal_values(month, 1, 12)
        and (on_date and on_weekday if both else on_date or on_weekday)
    )


def literal_runs(text, walls):
    """Runs by the rules for clock changes, from all instants in turn and what the clock shows."""
    minute, hour, *_ = text.split()
    is_interval = minute.startswith("*") or hour.startswith("*")
    latest = min(walls.values()) - MINUTE
    span = (max(walls.values()) - latest) // MINUTE
    matches = {latest + MINUTE * late: literal_match(text, latest + MINUTE * late) for late in range(span + 1)}
    runs = []
    for instant, wall in walls.items():
        if is_interval:
            is_due = matches[wall]
        else:  # The times that the clock has not shown before, with those that it has skipped.
            is_due = any(matches[latest + MINUTE * late] for late in range(1, (wall - latest) // MINUTE + 1))
            latest = max(latest, wall)
        if is_due:
            runs.append(instant)
    return runs


def clock_changes(zone, year):
    """The instants at which the zone's UTC offset changes, in a year."""
    def offset(instant):
        return instant.astimezone(zone).utcoffset()

    for day in range(366):
        start = datetime(year, 1, 1, tzinfo=UTC) + timedelta(days=day)
        if offset(start) != offset(start + timedelta(days=1)):
            yield next(at for at in (start + MINUTE * late for late in range(1, 1441)) if offset(at) != offset(start))


class TestCronAroundClockChanges(unittest.TestCase):
    """Every minute of two days around each change of odd zones, against a literal checker."""

    def check(self, text, tz, walls):
        cron, expected = Cron(text, tz), literal_runs(text, walls)
        coming = iter(expected)
        run = next(coming, None)
        for instant in walls:  # Jumping in, at each minute.
            run = next(coming, None) if instant == run else run
            if run is None:
                break
            found = cron.next(instant).astimezone(UTC)
            if found != run:
                self.fail(f"{text} {tz} after {instant}: {found}, by the rules {run}")
        runs = first_runs(cron, min(walls) - MINUTE, len(expected) + 1)[:-1]  # From run to run.
        self.assertEqual([run.astimezone(UTC) for run in runs], expected, f"{text} {tz}")

    def test_runs_are_those_of_the_rules(self):
        """TZ-05, TZ-06."""
        changes = 0
        for name, year in (pair.split() for pair in ODD_ZONES.split(",")):
            zone = zone_or_skip(name)
            for change in clock_changes(zone, int(year)):
                changes += 1
                instants = [change + MINUTE * late for late in range(-1440, 1441)]
                walls = {instant: instant.astimezone(zone).replace(tzinfo=None) for instant in instants}
                hour = min(walls[change], walls[change - MINUTE]).hour
                for text in ("*/20 * * * *", f"*/15 {hour} * * *", f"7,31,50 {hour} * * *",
                             "0 0-23/2 */2 * *", f"{changes} {hour} * * 0-5"):
                    self.check(text, name, walls)
        self.assertGreater(changes, 25)


class TestRepeat(InFolder):
    """Repeating tasks, on real clusters."""

    def slots(self, path):
        return [line.split()[0] for line in lines_of(path)]

    def test_what_repeat_takes(self):
        """RC-06: one rule twice is two schedules."""
        queue = self.queue()
        for repeat in (timedelta(microseconds=1), timedelta(days=400, seconds=1), "@daily", "@daily", Cron("0 9 * * 1-5"), None):
            task = queue.add_task("x", repeat=repeat)
            self.assertEqual(task.repeat, Cron(repeat) if type(repeat) is str else repeat)
            self.assertEqual(queue.find_one(task_id=task.id), task)
        self.assertEqual(queue.count(), 6)

    def test_a_thousand_slots_do_not_drift(self):
        """And none is run twice or before its time, whatever the delays."""
        chance = random.Random(4)
        for repeat, seconds in (("700000", 0.7), ('["*/7 * * * * *", "UTC"]', None)):
            due, now, slots = NOW, NOW, []
            for _ in range(1000):
                now = max(now, due) + int(chance.choice((0, 1, 0.3, 5)) * chance.random() * SECOND)  # It ran.
                slots.append(due)
                due = taskpool.next_slot(repeat, due, now)
                self.assertGreater(due, now)
                self.assertLess(due - now, 8 * SECOND)
            self.assertEqual(sorted(set(slots)), slots)
            if seconds:
                self.assertEqual({(slot - NOW) % int(seconds * SECOND) for slot in slots}, {0})
            else:
                self.assertEqual({slot // SECOND % 60 % 7 for slot in slots[1:]}, {0})

    def test_each_slot_runs_once_in_two_clusters_and_says_what_was_stored(self):
        """DU-03, RC-16."""
        path, told = str(self.folder / "lines"), []
        queues = self.queue(), self.queue()
        for queue in queues:
            queue.add_event_listener("done", lambda value, task: told.append((task.state, task.due_date, value)))
            self.cluster({"slot": add_slot}, queue, keep_alive="always")
        interval = timedelta(milliseconds=20)
        first = queues[0].add_task("slot", {"file": path}, repeat=interval).due_date
        eventually(lambda: len(told) > 30)
        self.assertEqual(queues[0].remove(state=["waiting", "running"]), 1)
        eventually(lambda: not queues[0].count() and len(told) == len(lines_of(path)))
        slots = [datetime.fromisoformat(slot) for slot in self.slots(path)]
        self.assertEqual(len(set(slots)), len(slots))
        self.assertEqual({(slot - first) % interval for slot in slots}, {timedelta()})
        self.assertEqual([value for *_, value in sorted(told, key=lambda item: item[1])], list(range(1, len(slots) + 1)))
        others = [state for state, *_ in told if state != "waiting"]
        self.assertIn(others, ([], ["done"]))  # Of the run during which it was removed.
        self.assertEqual(sorted(due for _, due, _ in told), sorted(slots))

    def test_a_future_is_the_first_run_and_the_schedule_goes_on(self):
        path, queue = str(self.folder / "lines"), self.queue()
        cluster = self.cluster({"slot": add_slot}, queue)
        future = cluster.submit("slot", {"file": path}, task_id="s", repeat=timedelta(milliseconds=20))
        self.assertEqual(future.result(PATIENCE), 1)
        eventually(lambda: len(lines_of(path)) > 5)
        self.assertEqual(queue.find_one(task_id="s").repeat, timedelta(milliseconds=20))
        eventually(lambda: cluster.cancel("s"))
        eventually(lambda: queue.count() == 0)
        failing = cluster.submit("slot", {"file": path, "how": "raise"}, task_id="f", repeat=timedelta(hours=1))
        self.assertIsInstance(failing.exception(PATIENCE), ValueError)
        self.assertEqual(queue.find_one(task_id="f").state, "waiting")

    def test_a_kept_repeat_of_another_cluster_resolves_the_future_with_its_next_end(self):
        path, first, second = str(self.folder / "lines"), self.queue(), self.queue()
        runner, asker = self.cluster({"slot": add_slot}, first), self.cluster({"slot": add_slot}, second)
        for how in ("return", "raise"):
            runner.submit("slot", {"file": path, "how": how}, task_id=how, repeat=timedelta(milliseconds=400)).exception(PATIENCE)
            future = asker.submit("slot", {"file": path}, task_id=how, if_exists="keep")
            self.assertEqual(future.task.repeat, timedelta(milliseconds=400))
            error = future.exception(PATIENCE)
            if how == "raise":
                self.assertEqual(str(error), "ValueError: bad")
            else:
                self.assertGreater(future.result(), 1)
                self.assertGreater(second.wait(how, PATIENCE).result, 1)
            eventually(lambda how=how: first.remove(task_id=how))

    def test_the_end_runs_what_was_due_once(self):
        """Not what came due after shutdown() was called."""
        queue, path, held = self.queue(), str(self.folder / "lines"), str(self.folder / "held")
        queue.clock = lambda: NOW / SECOND
        queue.add_task("hold", held, priority=9, in_memory=True)
        for number in range(4):
            queue.add_task("slot", {"file": path}, task_id=str(number), repeat=timedelta(microseconds=1 + number), in_memory=number > 2)
        cluster = self.cluster({"slot": add_slot, "hold": hold}, queue, max_available_workers=1)
        begun(held)
        threading.Thread(target=cluster.shutdown, daemon=True).start()
        eventually(lambda: refuses(cluster))
        queue.clock = lambda: NOW / SECOND + 60
        let_end(held)
        closes(cluster)
        self.assertEqual(len(lines_of(path)), 4)
        self.assertEqual([task.state for task in queue.find()], ["waiting"] * 3)

    def test_starting_a_program_again_keeps_one_schedule(self):
        """RC-01, RC-03, RC-04, DU-06: also five times at once."""
        script = self.script("""
            from test_taskpool import add_slot
            if __name__ == "__main__":
                queue = TaskQueue("tasks.db")
                repeat = timedelta(hours=int(sys.argv[1]))
                queue.add_task("slot", {"file": "lines"}, task_id="report", repeat=repeat, if_exists=sys.argv[2])
                with Cluster({"slot": add_slot}, queue, max_available_workers=1):
                    pass
        """)
        queue, lines = self.queue(), self.folder / "lines"
        for starts, hours, if_exists, runs in ((5, 1, "keep", 1), (1, 5, "replace", 2)):  # To replace is to start afresh: now.
            for process in [self.start(script, hours, if_exists) for _ in range(starts)]:
                _, err = process.communicate(timeout=PATIENCE)
                self.assertEqual((process.returncode, err), (0, ""))
            (task,) = queue.find()
            hour = timedelta(hours=hours)
            self.assertEqual((len(lines_of(lines)), task.repeat, task.due_date - task.created_at), (runs, hour, hour))

    def test_the_fifth_interruption_is_told_as_an_error_of_a_waiting_task(self):
        """P3."""
        store, told = SQLiteStore(self.folder / "tasks.db"), queues.SimpleQueue()
        ended = [[row("t", repeat=timedelta(hours=1))._replace(state="scheduled", error="Interrupted: 5 times")]]
        with mock.patch.object(store, "recover", lambda *_: ended.pop() if ended else []), TaskQueue(store) as queue:
            queue.add_event_listener("error", lambda value, task: told.put((task.id, task.state, str(value))))
            with self.assertLogs("taskpool", "ERROR"), self.cluster({"x": echo}, queue):
                self.assertEqual(told.get(timeout=PATIENCE), ("t", "waiting", "Interrupted: 5 times"))

    def test_update_changes_a_repeat_and_ends_it(self):
        queue, path = self.queue(), str(self.folder / "lines")
        now = queue.add_task("slot", {"file": path}, task_id="s", repeat="@yearly").due_date
        self.assertEqual(queue.update("s", priority=3).repeat, Cron("@yearly"))
        changed = queue.update("s", repeat=Cron("@hourly"))
        self.assertEqual((changed.repeat, changed.due_date), (Cron("@hourly"), Cron("@hourly").next(changed.created_at)))
        changed = queue.update("s", repeat=timedelta(hours=1), due_date=timedelta(days=1))
        self.assertGreater(changed.due_date - changed.created_at, timedelta(hours=23))
        with self.assertRaisesRegex(ValueError, "^repeat"):
            queue.update("s", repeat="nope")
        changed = queue.update("s", repeat=timedelta(hours=1))  # From now on.
        self.assertLess(changed.due_date, now)
        self.assertEqual(queue.update("s", repeat=None).due_date, changed.due_date)
        with self.cluster({"slot": add_slot}, queue):
            pass
        self.assertEqual((queue.count(), len(lines_of(path))), (0, 1))

    def test_a_new_repeat_begins_with_all_attempts(self):
        queue = self.queue()
        for store in (queue, queue.in_memory):
            queue.add_task("fail", task_id="s", retries=1, retry_delay=60, repeat=timedelta(hours=1), in_memory=store is not queue)
            self.assertEqual([t.attempt for t in queue.run_due({"fail": fail})], [1])
            self.assertEqual(store.update("s", repeat=timedelta(hours=2)).attempt, 0)
            store.remove(task_id="s")

    def test_all_are_told_that_a_task_which_was_removed_or_replaced_does_not_go_on(self):
        """Of a retry, and of a repeat: the listener, the Future, and who asked run_due."""
        queue, told = self.queue(), queues.SimpleQueue()
        cluster = self.cluster({"hold": hold, "hold_and_fail": hold_and_fail}, queue, max_available_workers=2)
        for event in ("done", "error"):
            queue.add_event_listener(event, lambda value, task: told.put((type(value), task.state)))
        for in_memory, fails, replaced, repeats in itertools.product((False, True), repeat=4):
            path = str(self.folder / f"{in_memory} {fails} {replaced} {repeats}")
            tasks, task_type = queue.in_memory if in_memory else queue, "hold_and_fail" if fails else "hold"
            options = {"task_id": path[-40:], "in_memory": in_memory, "retries": 3, "retry_delay": 0}
            future = cluster.submit(task_type, path, repeat=timedelta(hours=1) if repeats else None, **options)
            begun(path)
            if replaced:
                queue.add_task("nobody's", if_exists="replace", **options)
            else:
                tasks.remove(task_id=options["task_id"])
            let_end(path)
            with self.subTest(in_memory=in_memory, fails=fails, replaced=replaced, repeats=repeats):
                self.assertEqual(type(future.exception(PATIENCE)), OSError if fails else type(None))
                self.assertEqual(told.get(timeout=PATIENCE), (OSError, "failed") if fails else (str, "done"))
                self.assertEqual(tasks.remove(task_id=options["task_id"]), replaced)
        cluster.shutdown()
        for fails, state in ((True, "failed"), (False, "done")):
            queue.add_task("x", task_id="x", retries=1, repeat=timedelta(hours=1))
            leave = lambda job, fails=fails: queue.remove(task_id="x") / (not fails)  # noqa: E731
            self.assertEqual([t.state for t in queue.run_due({"x": leave})], [state])


class TestWithoutSelectablePipes(InFolder):
    """The channels of Windows, where no selector waits for pipes: threads read and write."""

    def setUp(self):
        super().setUp()
        patched = unittest.mock.patch.object(taskpool, "_SELECTABLE", False)  # Pipes are none.
        patched.start()
        self.addCleanup(patched.stop)

    def test_results_failures_timeouts_and_conversations_come_through(self):
        """ENGINE 58."""
        heard = []
        queue = self.queue()
        queue.add_event_listener("progress", lambda report, task: heard.append(report))
        task_map = {**EVERYTHING, "steps": progress_and_end, "misbehave": misbehave}
        with self.cluster(task_map, queue, message_broker=answer_pings, refresh_rate=20) as cluster:
            large = cluster.submit("echo", "x" * 3_000_000)
            self.assertEqual(list(cluster.map("echo", range(300))), list(range(300)))
            self.assertEqual(len(large.result(PATIENCE)), 3_000_000)
            self.assertEqual(cluster.submit("three deep").result(PATIENCE), ["pong ping 1", "pong ping 2", "pong ping 3"])
            for task_type, how, kind, options in (
                ("fail", "", ValueError, {}), ("steps", "", ValueError, {}), ("badly", "exit", WorkerDied, {}),
                ("badly", "kill", WorkerDied, {"retries": 1, "retry_delay": 0}), ("misbehave", "close", WorkerDied, {}),
                ("badly", "hang", TaskTimeout, {"timeout": 0.3}), ("misbehave", "gil", TaskTimeout, {"timeout": 0.3}),
            ):
                future = cluster.submit(task_type, {"how": how, "file": str(self.folder / how)} if how else None, **options)
                self.assertIsInstance(future.exception(PATIENCE), kind)
                self.assertEqual(getattr(future.exception(), "exit_code", 3), 3 if how in ("", "exit", "hang", "gil") else mock.ANY)
            held = cluster.submit("hold", str(self.folder / "flag"))
            begun(str(self.folder / "flag"))
            self.assertTrue(cluster.cancel(held.task.id))
            for number in range(50):
                queue.add_task("line", {"file": str(self.folder / "lines")}, task_id=str(number))
        self.assertEqual(sorted(map(int, (line.split()[0] for line in lines_of(self.folder / "lines")))), list(range(50)))
        self.assertEqual(heard[-1], (1, 2, None))
        self.assertEqual((queue.count(state=["waiting", "running"]), multiprocessing.active_children()), (0, []))

    test_nothing_waits_behind_a_slow_task = TestP5Order.test_nothing_waits_behind_a_slow_task_while_a_worker_is_idle
    test_a_task_that_writes_nonsense_is_charged = TestNonsenseFromAWorker.test_the_task_that_writes_it_is_charged_and_its_worker_replaced
    test_shutdown_gives_back = TestEnds.test_shutdown_without_waiting_gives_running_tasks_their_time_and_then_back
    test_a_worker_is_replaced = TestClusterOptions.test_a_worker_is_replaced_after_max_tasks_per_worker
    test_a_dead_worker_is_replaced = TestClusterOptions.test_keep_alive_always_starts_all_and_replaces_the_dead


# --- Help for users' tests -------------------------------------------------------------


class TestRunDue(InFolder):
    """queue.run_due(task_map, until=None) runs what is due here, without workers."""

    START = datetime(2026, 3, 1, tzinfo=timezone.utc)

    def setUp(self):
        super().setUp()
        self.tasks = self.queue()
        self.tasks.clock = self.START.timestamp

    def run_due(self, *arguments, **options):
        ended = self.tasks.run_due({**EVERYTHING, "now": self.hours}, *arguments, **options)
        self.assertEqual((multiprocessing.active_children(), self.tasks.count(state="running")), ([], 0))
        return ended

    def hours(self, job):
        """The hours from START to now, by the queue's clock."""
        return round((self.tasks.clock() - self.START.timestamp()) / 3600, 6)

    def test_what_is_due_runs_in_order_and_the_rest_waits(self):
        for task_id, options in {
            "low": {"priority": 0}, "old": {}, "young": {}, "high": {"priority": 9}, "memory": {"in_memory": True},
            "later": {"due_date": timedelta(seconds=1)}, "other": {},
        }.items():
            self.tasks.add_task("x" if task_id == "other" else "echo", task_id, task_id=task_id, **options)
        ended = self.run_due()
        self.assertEqual([task.id for task in ended], ["memory", "high", "old", "young", "low"])
        self.assertEqual([(t.state, t.result, t.error, t.attempt) for t in ended[:2]],
                         [("done", "memory", None, 1), ("done", "high", None, 1)])
        self.assertEqual([task.id for task in self.tasks.find()], ["later", "other"])
        self.assertEqual(self.run_due(), [])

    def test_a_clock_that_moved_along_makes_nothing_start_early_afterwards(self):
        """P6: also where an error ends run_due between two tasks that were due together."""
        for in_memory in (False, True):
            for _ in range(2):
                self.tasks.add_task("fail", due_date=timedelta(hours=1), retries=1, retry_delay=3600, in_memory=in_memory)
            with self.assertRaises(ValueError):
                self.run_due(until=timedelta(hours=1.5), raise_errors=True)
            self.assertEqual((self.run_due(), self.tasks.count(due=True)), ([], 0))
            states = [task.state for task in self.run_due(until=timedelta(hours=1.5))]
            self.assertEqual(states, ["waiting"])
            self.assertEqual(len(self.run_due(until=timedelta(hours=3))), 2)

    def test_every_kind_of_function_runs_and_fails_as_in_a_worker(self):
        kinds = {"echo": [1], "sleep": "slept", "later": "later", "partial": 15, "method": 20}
        for task_type in kinds:
            self.tasks.add_task(task_type, [1] if task_type == "echo" else 5, keep_result=60)
        for tasks in (self.run_due(), self.tasks.find(state="done")):
            self.assertEqual({t.task_type: t.result for t in tasks}, kinds)
        self.tasks.remove(state="done")
        self.tasks.add_task("echo", task_id="bad"), self.tasks.add_task("echo", task_id="good")
        self.sql("UPDATE taskpool_task SET retries = x'00' WHERE id = 'bad'")
        self.assertEqual({t.id: t.state for t in self.run_due()}, {"bad": "failed", "good": "done"})
        self.tasks.remove(task_id="bad")
        heard, texts = [], {
            "exit": "SystemExit: disk missing", "lock": "ValueError: holds a lock", "base": "Bare: bare", "CancelledError": "asyncio"}
        for kind in texts:
            self.tasks.add_task("raise_kind", kind)
        self.tasks.add_task("return_kind", "lock")

        def listen(error, task):
            heard.append(error)
            raise SystemExit("from a listener")

        self.tasks.add_event_listener("error", listen)
        with self.assertLogs("taskpool", "ERROR"):
            failed = self.run_due()
        for task, text in zip(failed, [*texts.values(), "TypeError: the result (lock) cannot be pickled"]):
            self.assertEqual((task.state, task.result), ("failed", None))
            self.assertTrue(task.error.startswith(text), task.error)
        self.assertEqual((self.tasks.count(state="failed"), len(heard)), (5, 5))

    def test_follow_ups_run_too_and_until_makes_time_pass_in_due_order(self):
        def add_two(job):
            self.tasks.add_task("now", task_id="at once")
            self.tasks.add_task("now", task_id="next day", due_date=timedelta(days=1))
            self.tasks.add_task("now", task_id="next year", due_date=timedelta(days=365))

        self.tasks.add_task("now", task_id="third hour", due_date=timedelta(hours=3))
        self.tasks.add_task("add two", due_date=timedelta(hours=2))
        ended = self.tasks.run_due({"now": self.hours, "add two": add_two}, until=timedelta(days=2))
        self.assertEqual([(t.id, t.result) for t in ended[1:]], [("at once", 2), ("third hour", 3), ("next day", 26)])
        self.assertEqual((self.tasks.clock(), self.tasks.count()), (self.START.timestamp(), 1))
        (last,) = self.run_due(until=self.START + timedelta(days=500))
        self.assertEqual((last.id, last.result), ("next year", 365 * 24 + 2))
        for until in (-timedelta(hours=1), datetime(1999, 1, 1)):  # A past date adds nothing to what is due.
            self.tasks.add_task("now", task_id="due")
            self.tasks.add_task("now", task_id="later", due_date=timedelta(microseconds=1), if_exists="keep")
            self.assertEqual([(task.id, task.result) for task in self.run_due(until=until)], [("due", 0)])

    def test_one_thread_at_a_time_has_the_clock_and_a_run_may_run_what_is_due(self):
        def run_within(job):
            run_due = functools.partial(self.tasks.run_due, {"now": self.hours}, until=timedelta(hours=1))
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                return [len(run_due()), str(thread.submit(run_due).exception(PATIENCE)), self.hours(job)]

        self.tasks.add_task("within", due_date=timedelta(hours=2))
        self.tasks.add_task("now", due_date=timedelta(hours=2.5), keep_result=9999)
        (ended,) = self.tasks.run_due({"within": run_within}, until=timedelta(hours=2))
        self.assertEqual(ended.result, [1, "another thread is in run_due of this queue, and sets its clock", 2])
        self.assertEqual((self.tasks.find(state="done")[0].result, self.tasks.clock()), (2.5, self.START.timestamp()))

    def test_a_schedule_runs_slot_by_slot_and_microseconds_are_exact(self):
        self.tasks.add_task("now", task_id="nightly", repeat="30 2 * * *")
        self.tasks.add_task("now", task_id="odd", repeat=timedelta(hours=40, microseconds=1), retries=1)
        ended = self.run_due(until=timedelta(days=3))
        self.assertEqual([(t.id, t.result) for t in ended], [
            ("odd", 0), ("nightly", 2.5), ("nightly", 26.5), ("odd", 40), ("nightly", 50.5)])
        self.assertEqual({t.state for t in ended}, {"waiting"})
        due = {t.id: t.due_date - self.START for t in self.tasks.find()}
        self.assertEqual(due, {"nightly": timedelta(hours=74.5), "odd": timedelta(hours=80, microseconds=2)})
        noted = []
        self.tasks.clock = datetime(2040, 1, 1, tzinfo=timezone.utc).timestamp  # Floats lose microseconds from 2038 on.
        for number in range(200):
            self.tasks.add_task("note", due_date=timedelta(microseconds=7_123_457 * number))
        self.tasks.run_due({"note": lambda job: noted.append(self.tasks.add_task("x").created_at - job.due_date)}, timedelta(hours=1))
        self.assertEqual(noted, [timedelta()] * 200)

    def test_retries_run_when_they_are_due(self):
        self.tasks.add_task("succeed_at", 3, retries=2, retry_delay=60)
        for until, runs in ((None, [("waiting", 1, None)]), (None, []), (timedelta(seconds=59), []),
                            (timedelta(minutes=5), [("waiting", 2, None), ("done", 3, 3)])):
            ended = self.run_due(until=until)
            self.assertEqual([(t.state, t.attempt, t.result) for t in ended], runs)
            for task, minutes in zip(ended[-2:], (1, 3) if len(ended) > 1 else (0,)):  # By the queue's clock.
                self.assertEqual({task.started_at, task.ended_at}, {self.START + timedelta(minutes=minutes)})

    def test_errors_are_recorded_or_raised(self):
        for _ in range(2):
            self.tasks.add_task("fail")
        try:
            self.run_due(raise_errors=True)
        except ValueError as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.assertEqual((str(error), last.name), ("attempt 1", "fail"))  # The task's own traceback.
        self.assertEqual((self.tasks.count(state="failed"), self.tasks.count(state="waiting")), (1, 1))
        (recorded,) = self.run_due()
        self.assertEqual(recorded.state, "failed")
        self.tasks.add_task("raise_kind", "interrupt", task_id="interrupted")
        with self.assertRaises(KeyboardInterrupt):  # Somebody pressed Ctrl-C: no failure.
            self.run_due()
        task = self.tasks.find_one(task_id="interrupted")
        self.assertEqual((task.state, task.attempt), ("waiting", 0))

    def test_listeners_progress_and_conversations_work(self):
        heard = []
        for event in taskpool.EVENTS:
            self.tasks.add_event_listener(event, lambda value, task, e=event: heard.append((e, value, task.state)))
        self.tasks.add_task("steps", task_id="steps", keep_result=9)
        self.tasks.add_task("fail")

        def steps(job):
            job.progress(0, 2)
            self.assertEqual(self.tasks.find_one(state="running").progress, (0, 2, None))
            job.progress(1, 2)
            job.progress(2, 2)
            return "end"

        self.tasks.run_due({"steps": steps, "fail": fail})
        self.assertEqual([(e, str(v), s) for e, v, s in heard if e != "progress"],
                         [("done", "end", "done"), ("error", "attempt 1", "failed")])
        self.assertEqual([v for e, v, _ in heard if e == "progress"], [(0, 2, None), (2, 2, None)])
        self.assertEqual(self.tasks.find_one(task_id="steps").progress, (2, 2, None))
        for task_type in ("ping", "position", "three deep", "wait inside", "async ping", "ping later"):
            self.tasks.add_task(task_type, "x")
        ended = self.run_due(message_broker=answer_pings)
        self.assertEqual([task.error for task in ended], [None] * 6)
        self.assertEqual((ended[0].result, ended[2].result), ("pong x", ["pong ping 1", "pong ping 2", "pong ping 3"]))
        for task_type, data, broker, text in (
            ("bad message", None, answer_pings, "LookupError"), ("bad initialize", None, answer_pings, "LookupError"),
            ("ping", "raise", answer_pings, "LookupError: the broker fails"), ("ping", "x", None, "no message_broker"),
        ):
            self.tasks.add_task(task_type, data)
            self.assertIn(text, self.run_due(message_broker=broker)[0].error)
        self.tasks.add_task("ping", task_id="interrupted")
        with self.assertRaises(KeyboardInterrupt):  # Ctrl-C while the broker works is no failure, either.
            self.run_due(message_broker=mock.Mock(side_effect=KeyboardInterrupt))
        self.assertEqual(self.tasks.find_one(task_id="interrupted").state, "waiting")

    def test_wrong_arguments_are_refused(self):
        for options, error in (
            ({"task_map": {}}, ValueError), ({"task_map": 5}, TypeError), ({"until": 5}, TypeError),
            ({"until": timedelta.max}, ValueError), ({"raise_errors": 1}, TypeError), ({"message_broker": 1}, TypeError),
        ):
            with self.assertRaisesRegex(error, next(iter(options))):
                self.tasks.run_due(**{"task_map": {"x": echo}, **options})


class TestPausesAndLimits(InFolder):
    """queue.pause, resume and limit count in all clusters of the store."""

    PROGRAM = """
        from test_taskpool import note_span
        cluster = Cluster({"span": note_span}, TaskQueue("tasks.db"), max_available_workers=4, oversubscribe=True, refresh_rate=50)
        if Cluster.is_master():
            cluster.shutdown()
    """

    def setUp(self):
        super().setUp()
        self.tasks, self.file = self.queue(), str(self.folder / "lines")
        self.data = {"file": self.file}

    def serve(self, **options):
        return self.cluster({"line": add_line, "echo": echo, "span": note_span}, self.tasks, **options)

    def test_a_name_that_was_paused_by_mistake_is_told_of_as_long_as_it_is(self):
        self.tasks.pause("typo"), self.tasks.limit("line", at_once=1)
        self.assertEqual([kind["task_type"] for kind in self.tasks.types()], ["line", "typo"])
        self.tasks.resume("typo")
        self.assertEqual([kind["task_type"] for kind in self.tasks.types()], ["line"])

    @mock.patch.multiple(taskpool, WATCH_SECONDS=3600.0, RENEW_SECONDS=3600.0)  # Nothing else looks, however long it takes.
    def test_the_end_of_a_run_that_is_limited_or_followed_looks_after_no_future_that_waits(self):
        store, self.tasks = self.hooked()
        self.tasks.limit("echo", at_once=1)
        cluster, looks = self.serve(refresh_rate=10**6), []
        later = cluster.submit("echo", due_date=timedelta(hours=1))
        self.assertEqual(cluster.submit("echo", 1).result(PATIENCE), 1)
        store.before = lambda name: looks.append(name) if name == "find" else None
        for kind in ("echo", "line"):
            last, ends = None, []
            for _ in range(20):
                ends.append(cluster.submit(kind, {"file": self.file}, after=last))
                last = ends[-1].task if kind == "line" else None
            concurrent.futures.wait(ends, PATIENCE)
            self.assertTrue(all(future.done() for future in ends))
            self.assertLess(len(looks), 10)
        self.assertTrue(later.cancel())

    def most_at_once(self, killed=()):
        """How many runs of note_span overlapped, where (nanoseconds, 0, pid) tells of masters that were killed."""
        events = [tuple(map(int, line.split())) for line in lines_of(self.file)]
        running, most, dead = collections.Counter(), 0, {1}
        for _, change, master in sorted([*events, *killed]):
            if not change:
                dead.add(master)
                del running[master]
            elif master not in dead:  # Its workers outlive it by a moment.
                running[master] += change
            most = max(most, sum(running.values()))
        return most

    def test_what_waits_in_a_pause_holds_up_nobody_and_runs_in_order_after_it(self):
        for store in (self.tasks, self.tasks.in_memory):
            in_memory = store is not self.tasks
            store.pause("line", "line", "other")
            with self.serve(max_available_workers=1) as cluster:
                for n in range(5):
                    self.tasks.add_task("line", self.data, task_id=f"{n}", in_memory=in_memory)
                self.assertEqual(cluster.submit("echo", 1, in_memory=in_memory).result(PATIENCE), 1)
                self.assertTrue(cluster.drain(PATIENCE))
                self.assertEqual((store.count(due=True), store.count(due=False), store.count()), (0, 5, 5))
                self.assertEqual(store.find(due=True), [])
            self.assertEqual(self.tasks.run_due({"line": add_line}), [])
            self.assertEqual(lines_of(self.file), [])
            again = TaskQueue(self.folder / "tasks.db")  # Another program, which knows no `line`.
            with again, self.cluster({"line": add_line}, again if not in_memory else self.tasks, max_available_workers=1) as cluster:
                self.assertTrue(cluster.drain(PATIENCE))
                self.assertEqual(lines_of(self.file), [])
                store.resume("line")
                eventually(lambda: len(lines_of(self.file)) == 5)
            self.assertEqual(lines_of(self.file), [f"{n} 1" for n in range(5)])
            os.remove(self.file)

    def test_a_pause_from_a_task_lets_it_end_and_its_retry_waits(self):
        path = str(self.folder / "held")
        with self.cluster({"fail": hold_and_fail}, self.tasks) as cluster:
            task = self.tasks.add_task("fail", path, retries=1, retry_delay=0)
            begun(path)
            self.tasks.pause("fail")
            let_end(path)
            eventually(lambda: self.tasks.find_one(task_id=task.id, state="waiting"))
            self.assertTrue(cluster.drain(PATIENCE))
        self.assertEqual(self.tasks.find_one(task_id=task.id).attempt, 1)

    def test_a_schedule_makes_up_for_its_pause_by_one_run(self):
        start = datetime(2026, 3, 1, tzinfo=timezone.utc)
        self.tasks.clock = start.timestamp
        self.tasks.add_task("echo", repeat=timedelta(seconds=1))
        self.tasks.pause("echo")
        self.assertEqual(self.tasks.run_due({"echo": echo}, until=start + timedelta(seconds=5)), [])
        self.tasks.clock = (start + timedelta(seconds=5)).timestamp
        self.tasks.resume("echo")
        self.assertEqual(len(self.tasks.run_due({"echo": echo})), 1)
        self.assertEqual(self.tasks.find_one().due_date, start + timedelta(seconds=6))

    def test_never_more_run_at_once_than_allowed_though_masters_are_killed(self):
        self.tasks.limit("span", at_once=2)
        self.tasks.add_tasks({"task_type": "span", "data": {**self.data, "seconds": 0.02}} for _ in range(60))
        script = self.script(self.PROGRAM)
        masters, killed = [self.start(script) for _ in range(2)], []
        for done in (20, 60):
            eventually(lambda done=done: len(lines_of(self.file)) >= done)
            masters[0].kill()
            killed.append((time.monotonic_ns(), 0, masters[0].pid))
            masters[0] = self.start(script)
        for master in masters:
            self.assertEqual(master.wait(PATIENCE), 0, master.stderr.read())
        self.assertEqual(self.tasks.count(), 0)
        self.assertEqual(self.most_at_once(killed), 2)

    def test_a_place_is_free_at_once_when_its_worker_is_killed(self):
        with self.cluster({"end": end_badly, "echo": echo}, self.tasks, refresh_rate=10**6):
            self.tasks.limit("end", at_once=1)
            for how in ("kill", "exit"):
                self.tasks.add_task("end", how)
            eventually(lambda: self.tasks.count(state="failed") == 2)

    def test_a_full_type_of_high_priority_stands_in_nobodys_way(self):
        self.tasks.limit("hold", at_once=1)
        paths = [str(self.folder / f"{n}") for n in range(3)]
        for path in paths:
            self.tasks.add_task("hold", path, priority=9)
        with self.cluster({"hold": hold, "echo": echo}, self.tasks, refresh_rate=10**6) as cluster:
            begun(paths[0])
            self.assertEqual(cluster.submit("echo", 5).result(PATIENCE), 5)
            self.tasks.limit("hold", at_once=2)  # Lifted while it runs.
            begun(paths[1])
            self.assertEqual(self.tasks.count(state="running"), 2)
            for path in paths:
                let_end(path)
        self.assertEqual(self.tasks.count(), 0)  # The end has waited for the third.

    def test_in_memory_and_chunks_are_limited_too(self):
        self.tasks.in_memory.limit("span", at_once=1)
        data = {**self.data, "seconds": 0.002}
        with self.serve(max_available_workers=4) as cluster:
            list(cluster.map("span", [data] * 10, in_memory=True))
            list(cluster.map("span", [data] * 10, in_memory=True, chunksize=3))
            self.assertEqual(self.most_at_once(), 1)
            self.tasks.in_memory.limit("span", at_once=None, rate=(1, 3600))
            futures = [cluster.submit("span", data, in_memory=True) for _ in range(2)]
            futures[0].result(PATIENCE)
            self.assertTrue(futures[1].cancel())

    def test_starts_come_at_the_rate_and_the_end_of_a_cluster_waits_for_them(self):
        """Retries count; a clock that is set back delays the next start by one spacing at most."""
        self.tasks.clock = Clock()
        self.tasks.limit("fail", rate=(2, timedelta(seconds=1)))
        task = self.tasks.add_task("fail", retries=3, retry_delay=0)
        starts = []
        self.tasks.add_event_listener("error", lambda value, task: starts.append(task.attempt))
        with self.cluster({"fail": fail}, self.tasks):
            for number, offset in (1, -3600.0), (2, 0.0):  # While its retry waits for the next start.
                eventually(lambda: len(starts) >= number and self.tasks.find_one(task_id=task.id).state == "waiting")
                self.tasks.clock.offset = offset
        self.assertEqual((len(starts), self.tasks.find_one(task_id=task.id).state), (4, "failed"))

    def test_declared_limits_are_written_when_a_cluster_starts_and_others_are_left_alone(self):
        self.tasks.limit("echo", at_once=7, rate=(5, 1))
        self.tasks.limit("about", at_once=3)
        self.tasks.task(name="echo", at_once=2)(echo)
        self.tasks.task(name="about")(about)
        self.assertEqual(self.tasks._store.settings()["echo"].at_once, 7)  # inside
        with self.cluster(None, self.tasks):
            eventually(lambda: self.tasks._store.settings()["echo"].at_once == 2)  # inside
            self.tasks.limit("echo", at_once=9)
            self.tasks.task(name="later", rate=(1, 60))(fail)
            eventually(lambda: "later" in self.tasks._store.settings())  # inside
        found = self.tasks._store.settings()  # inside
        self.assertEqual([(found[name].at_once, found[name].starts) for name in ("echo", "about", "later")], [(9, 5), (3, None), (None, 1)])

    @mock.patch.object(taskpool, "WATCH_SECONDS", 3600.0)
    def test_what_is_declared_in_a_cluster_that_runs_counts_for_the_next_claim(self):
        self.tasks.task(echo)
        cluster = self.cluster(None, self.tasks, max_available_workers=3, keep_alive="always", refresh_rate=10**6)
        eventually(lambda: len(idle_pids(cluster)) == 3)
        self.assertEqual(cluster.submit("echo", 1).result(PATIENCE), 1)
        held = [str(self.folder / f"held{number}") for number in range(2)]
        self.tasks.task(at_once=1)(hold)
        self.tasks.task(name="each minute", repeat="* * * * *")(fail)
        futures = [cluster.submit(hold, path) for path in held]
        begun(held[0])
        self.assertEqual(cluster.submit("echo", 2).result(PATIENCE), 2)
        self.assertEqual(self.tasks.count(task_type="hold", state="running"), 1)
        self.assertIsNotNone(self.tasks.find_one(task_id="schedule:each minute"))
        for path, future in zip(held, futures):
            let_end(path)
            self.assertEqual(future.result(PATIENCE), "held")

    def test_every_end_is_counted_once_and_the_masters_add_up(self):
        for _ in range(2):
            with self.cluster({"succeed": succeed_at, "fail": fail, "echo": echo}, self.tasks) as cluster:
                self.tasks.add_task("fail", retries=2, retry_delay=0)
                for in_memory in (False, True):
                    list(cluster.map("echo", range(50), in_memory=in_memory))
        self.tasks.limit("none", at_once=4, rate=(5, timedelta(minutes=1)))
        self.tasks.pause("fail")
        self.tasks.retry(state="failed")
        self.tasks.add_task("echo", due_date=datetime(2999, 1, 1, tzinfo=timezone.utc))
        for store, types in ((self.tasks, ["echo", "fail", "none"]), (self.tasks.in_memory, ["echo"])):
            told = {kind["task_type"]: kind for kind in store.types()}
            self.assertEqual(list(told), types)
            runs = told["echo"]["runs"]
            self.assertEqual((runs["done"], runs["failed"], runs["retried"], runs["seconds_le"][3600.0]), (100, 0, 0, 100))
            self.assertTrue(0 < runs["seconds"] < PATIENCE)
        told = {kind["task_type"]: kind for kind in self.tasks.types()}
        self.assertEqual([told["fail"]["runs"][how] for how in ("done", "failed", "retried")], [0, 2, 4])
        self.assertEqual([told["fail"][name] for name in ("waiting", "due", "oldest_due", "paused", "at_once")], [2, 0, None, True, None])
        self.assertEqual((told["echo"]["next_due"].year, told["echo"]["waiting"]), (2999, 1))
        self.assertEqual((told["none"]["waiting"], told["none"]["at_once"], told["none"]["rate"]), (0, 4, (5, 60.0)))
        self.tasks.resume("fail")
        due = next(kind for kind in self.tasks.types() if kind["task_type"] == "fail")
        self.assertEqual(due["due"], 2)
        self.assertGreater(due["oldest_due"], 0)

    def test_run_due_reads_no_counts_of_other_types(self):
        tasks = self.queue()
        tasks.add_task("echo"), tasks.add_task("echo", in_memory=True), tasks.pause("other")
        settings = tasks._store.settings
        with mock.patch.object(tasks._store, "settings", lambda: settings()):
            self.assertEqual(len(tasks.run_due({"echo": echo})), 2)

    def test_what_expires_and_what_run_due_runs_is_counted_too(self):
        for store in (self.tasks, self.tasks.in_memory):
            in_memory = store is not self.tasks
            for serve in (False, True):
                for options in ({}, {"expires": datetime.now() - timedelta(1)}):
                    self.tasks.add_task("echo", in_memory=in_memory, **options)
                self.tasks.add_task("fail", in_memory=in_memory, retries=1, retry_delay=0)
                if serve:
                    with self.cluster({"echo": echo, "fail": fail}, self.tasks) as cluster:
                        self.assertTrue(cluster.drain(PATIENCE))
                else:
                    self.tasks.run_due({"echo": echo, "fail": fail})
            told = {kind["task_type"]: {how: n for how, n in kind["runs"].items() if n and not how.startswith("seconds")} for kind in store.types()}
            self.assertEqual(told, {"echo": {"done": 2, "expired": 2}, "fail": {"retried": 2, "failed": 2}})

    @mock.patch.object(taskpool, "LEASE_SECONDS", 3600.0)  # Of the other program, which renews it once.
    def test_other_programs_are_woken_by_whatever_may_let_their_tasks_start(self):
        """By each change, and by the end of a run that others follow, or of a type with a limit."""
        bell = socket.socket(type=socket.SOCK_DGRAM)
        self.addCleanup(bell.close)
        bell.bind(("127.0.0.1", 0))
        pid, port = os.getppid(), bell.getsockname()[1]
        owner = f"{taskpool._here()}|{pid}|{taskpool._process_start(pid)}|x|{port}"
        self.tasks._store._change(self.tasks._store.heartbeat, owner)  # inside

        def rings(change):
            bell.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while bell.recv(9):
                    pass
            self.tasks._next_knock = 0.0  # inside: else it may be too soon after the last one
            change()
            bell.settimeout(PATIENCE)

        def other(**options):
            return self.tasks.add_task("other", task_id="other", if_exists="replace", **options)

        for change in (
            other, lambda: self.tasks.update("other", priority=2), lambda: self.tasks.pause("other"), lambda: self.tasks.resume("other"),
            lambda: self.tasks.limit("other", at_once=1), lambda: self.tasks.retry(state="failed"), lambda: self.tasks.remove(task_id="other"),
        ):
            rings(change)
            bell.recv(9)
        with self.cluster({"hold": hold}, self.tasks):
            for number, prepare in enumerate((None, lambda: other(after=task), lambda: other(after_end=task), lambda: self.tasks.limit("hold", at_once=5))):
                path = str(self.folder / f"{number}")
                task = self.tasks.add_task("hold", path)
                begun(path)
                if prepare:
                    prepare()
                rings(lambda: let_end(path))
                eventually(lambda: not self.tasks.find(task_id=task.id))
                if prepare:
                    bell.recv(9)
                else:
                    bell.setblocking(False)
                    self.assertRaises(BlockingIOError, bell.recv, 9)

    def test_runs_that_ended_with_their_master_are_counted(self):
        self.tasks.add_task("x")
        self.tasks._store.claim("dead|", ["x"], 1, int(time.time() * 1e6))  # inside
        for seconds in (0.0, 99.0):
            self.tasks._store.recover("me", seconds, NOW)  # inside
        self.assertEqual(self.tasks.types()[0]["runs"]["interrupted"], 1)

    def test_wrong_arguments_are_refused_and_change_nothing(self):
        store = self.tasks
        wrong = [
            (store.pause, (), {}), (store.pause, (5,), {}), (store.resume, ("",), {}), (store.limit, ("x",), {}),
            (store.pause, (echo,), {}), (store.in_memory.pause, (), {}),
            *[(store.limit, ("x",), {"at_once": n}) for n in (0, -1, 1.5, True, "2")],
            *[(store.limit, ("x",), {"rate": r}) for r in (5, (1,), (0, 1), (1, 0), (1, math.inf), (1.5, 1), "10", (1, 2, 3))],
            (store.task, ("x",), {"at_once": 0}), (store.task, ("x",), {"rate": (1, "s")}),
        ]  # fmt: skip
        for call, given, options in wrong:
            with self.subTest(call=call.__name__, given=given, options=options), self.assertRaises((TypeError, ValueError)):
                call(*given, **options)
        self.assertEqual(store._store.settings(all_types=True), {})  # inside

    def test_a_name_that_nobody_knows_is_paused_with_a_warning_and_foreign_tasks_tell_of_it(self):
        self.tasks.task(name="echo")(echo)
        with self.assertLogs("taskpool", "WARNING") as logs:
            self.tasks.pause("ecko")
        self.assertIn("'echo'", logs.output[0])
        self.tasks.add_task("ecko")
        with self.assertLogs("taskpool", "WARNING") as logs, self.cluster(None, self.tasks):
            eventually(lambda: "'ecko' (paused)" in "".join(logs.output))

    def test_a_store_of_ones_own_says_what_it_lacks(self):
        class Simple(MemoryStore):
            has_settings, change_setting = False, taskpool.Store.change_setting

        queue = TaskQueue(Simple())
        for call in (lambda: queue.pause("x"), lambda: queue.limit("x", at_once=1)):
            with self.assertRaisesRegex(StoreError, "change_setting"):
                call()
        queue.task(name="echo", at_once=1)(echo)
        with self.assertRaisesRegex(StoreError, "change_setting.*'echo'"):
            self.cluster(None, queue)


class TestMongoLimits(WithMongo):
    """Pauses and limits count on all machines that share a collection."""

    PROGRAM = WithMongo.on_mongo(TestPausesAndLimits.PROGRAM)
    serve, most_at_once = TestPausesAndLimits.serve, TestPausesAndLimits.most_at_once
    test_killed, test_place, test_rate, test_task, test_schedule, test_declared, test_counts, test_cut_short = (
        getattr(TestPausesAndLimits, f"test_{name}") for name in (
            "never_more_run_at_once_than_allowed_though_masters_are_killed", "a_place_is_free_at_once_when_its_worker_is_killed",
            "starts_come_at_the_rate_and_the_end_of_a_cluster_waits_for_them", "a_pause_from_a_task_lets_it_end_and_its_retry_waits",
            "a_schedule_makes_up_for_its_pause_by_one_run",
            "declared_limits_are_written_when_a_cluster_starts_and_others_are_left_alone",
            "every_end_is_counted_once_and_the_masters_add_up", "runs_that_ended_with_their_master_are_counted"))

    def setUp(self):
        super().setUp()
        self.tasks, self.file = self.queue(), str(self.folder / "lines")
        self.data = {"file": self.file}

    def test_a_pause_holds_in_every_cluster_when_the_call_returns_and_until_it_is_lifted(self):
        queues = [self.queue(), self.queue()]  # Each knows of the other by the documents only.
        clusters = [self.cluster({"echo": echo}, queue, keep_alive="always") for queue in queues]
        self.assertEqual([cluster.submit("echo", 1).result(PATIENCE) for cluster in clusters], [1, 1])
        queues[0].pause("echo")
        queues[1].add_task("echo", keep_result=60, task_id="t")
        self.assertEqual(queues[1].count(due=True), 0)
        for cluster in clusters:
            self.assertTrue(cluster.drain(PATIENCE))
        self.assertEqual(queues[0].find_one(task_id="t").state, "waiting")
        queues[1].resume("echo")
        self.assertEqual(queues[0].wait("t", PATIENCE).state, "done")


class TestDeclaredTasks(InFolder):
    """@queue.task declares a task type beside its function."""

    def declared(self):
        queue = self.queue()
        queue.task(name="mail", priority=5, retries=3, retry_delay=2, timeout=9, keep_result=60)(echo)
        queue.task(name="quick", in_memory=True)(about)
        return queue

    def test_a_declaration_counts_where_the_call_says_nothing_else(self):
        queue = self.declared()
        names = ("priority", "retries", "retry_delay", "timeout", "keep_result")
        tasks = [queue.add_task("mail"), queue.add_task(echo, [1]), *queue.add_tasks([{"task_type": echo}, {"task_type": "mail"}])]
        for task in tasks:
            self.assertEqual((task.task_type, *(getattr(task._row, name) for name in names)), ("mail", 5, 3, 2, 9, 60))  # inside
        task = queue.add_task("mail", priority=0, retries=0, retry_delay=0, timeout=None, keep_result=None)
        self.assertEqual([getattr(task._row, name) for name in names], [0, 0, 0, None, None])  # inside
        self.assertTrue(queue.add_task(about).in_memory)
        self.assertFalse(queue.add_task("quick", in_memory=False).in_memory)
        self.assertIs(queue.task_map["mail"], echo)
        with self.assertRaises(TypeError):
            queue.task_map["mail"] = fail
        # Another program, and a queue that has declared nothing, have defaults of their own.
        self.assertEqual(self.queue().add_task("mail").retries, 0)

    def test_submit_and_map_take_functions_and_what_is_declared(self):
        queue = self.declared()
        with self.cluster(None, queue) as cluster:
            future = cluster.submit(echo, 5)
            self.assertEqual((future.task.task_type, future.task.priority, future.result(PATIENCE)), ("mail", 5, 5))
            self.assertEqual(list(cluster.map(echo, [1, 2])), [1, 2])
            self.assertTrue(cluster.submit("quick").task.in_memory)
            with self.assertRaisesRegex(ValueError, "'none'.*'mail', 'quick'"):
                cluster.submit("none")

    def test_a_type_that_is_declared_later_runs_in_workers_that_start_later(self):
        """Those that run already are replaced; nothing is charged. What no worker can find fails."""
        queue = self.queue()
        queue.task(name="pid")(pid_of_worker)
        with self.cluster(None, queue, keep_alive="always", max_available_workers=1) as cluster:
            before = cluster.submit("pid").result(PATIENCE)
            queue.task(about), queue.task(repeat=timedelta(hours=1), data=[5], keep_result=9)(echo)
            for _ in range(3):
                self.assertEqual(cluster.submit(about).result(PATIENCE)[4], 1)
            eventually(lambda: [task.result for task in queue.find(task_id="schedule:echo")] == [[5]], "the schedule's first run")
            self.assertNotEqual(cluster.submit("pid").result(PATIENCE), before)
            queue.task(name="lost")(lambda job: 1)
            with self.assertRaisesRegex(RuntimeError, "no function for 'lost': declare it at the top level"):
                cluster.submit("lost", retries=1, retry_delay=0.001).result(PATIENCE)

    def test_a_function_stands_for_its_name_also_after_a_reload(self):
        self.script("def job(job): pass\ndef other(job): pass", "jobs_of_a_module.py")
        sys.path.insert(0, str(self.folder))
        self.addCleanup(sys.path.remove, str(self.folder))
        import importlib

        queue, module = self.queue(), importlib.import_module("jobs_of_a_module")
        self.addCleanup(sys.modules.pop, "jobs_of_a_module")
        before = queue.task(module.job)
        self.assertIs(before, module.job)
        self.assertIsNot(queue.task(importlib.reload(module).job), before)
        for function in (before, module.job):
            self.assertEqual(queue.add_task(function).task_type, "job")
        with self.assertRaisesRegex(ValueError, "name is 'job'.*jobs_of_a_module.py, line 1 has it"):
            queue.task(name="job")(module.other)
        for function, error in ((module.other, ValueError), (print, ValueError), (5, TypeError)):
            with self.assertRaisesRegex(error, "task_type"):
                queue.add_task(function)
        queue.task(name="twice")(module.job)
        with self.assertRaisesRegex(ValueError, "one of its names: 'job', 'twice'"):
            queue.add_task(module.job)

    def test_functions_that_one_code_makes_are_not_taken_for_each_other(self):
        class Machine:
            def run(self, job): return self

        def decorate(function):
            def wrapper(*arguments):
                return function(*arguments)
            return wrapper

        def make(n):
            return lambda job: n

        queue, one, two = self.queue(), Machine(), Machine()
        for first, second in ((decorate(echo), decorate(fail)), (make(1), make(2)), (one.run, two.run),
                              (functools.partial(echo), functools.partial(echo))):
            queue.task(name="first")(first)
            self.assertEqual(queue.add_task(first).task_type, "first")
            with self.assertRaisesRegex(ValueError, "name is 'first'.*(test_taskpool.py, line|has it)"):
                queue.task(name="first")(second)
            with self.assertRaisesRegex(ValueError, "task_type"):
                queue.add_task(second)
            queue.task(name="second")(second)
            self.assertEqual((queue.add_task(first).task_type, queue.add_task(second).task_type), ("first", "second"))
            queue = self.queue()
        queue.task(name="method")(one.run), queue.task(name="method")(one.run)
        self.assertEqual(queue.add_task(one.run).task_type, "method")

    def test_a_static_method_is_declared_above_and_below_its_decorator(self):
        queue = self.queue()

        class Mails:
            @queue.task
            @staticmethod
            def above(job, *, to): return to

            @staticmethod
            @queue.task
            def below(job, *, to): return to

        for function in (Mails.above, Mails.below):
            queue.add_task(function, {"to": 1}, keep_result=60)
        self.assertEqual([(t.task_type, t.result) for t in queue.run_due()], [("above", 1), ("below", 1)])

    def test_what_cannot_be_declared_is_refused_and_says_why(self):
        queue = self.queue()
        for arguments, function, error, text in (
            ({}, lambda job: 1, ValueError, "no name of its own"), ({}, 5, TypeError, "function is 5"),
            ({"name": ""}, echo, ValueError, "name is ''"), ({"name": 5}, echo, TypeError, "name is 5"),
            ({}, lambda: 1, TypeError, "takes no positional"), ({"name": "x"}, lambda job: (yield), TypeError, "without `yield`"), ({"name": "x"}, lambda job, other: 1, TypeError, "'other'"),
            ({"retrys": 1}, echo, TypeError, "no default 'retrys'"), ({"task_id": "x"}, echo, TypeError, "'task_id'"),
            ({"retries": -1}, echo, ValueError, "retries"), ({"repeat": "x"}, echo, ValueError, "repeat"),
            ({"repeat": "@daily", "in_memory": True}, echo, ValueError, "in_memory"), ({"data": 1}, echo, TypeError, "repeat"),
            ({"repeat": "@daily", "data": threading.Lock()}, echo, TypeError, "data is <unlocked"),
            ({"name": "x", "repeat": "@daily"}, needs_words, TypeError, "no 'to'"),
            ({"name": "x", "repeat": "@daily", "data": {"to": 1, "two": 2}}, needs_words, TypeError, "'two'.*'x' does not"),
        ):
            with self.subTest(arguments), self.assertRaisesRegex(error, text):
                queue.task(**arguments)(function)
        self.assertEqual(dict(queue.task_map), {})
        with self.assertRaisesRegex(ValueError, "task_id.*schedule:"):
            queue.add_task("x", task_id="schedule:x")
        queue.task(repeat="@daily")(echo)
        with self.assertRaisesRegex(ValueError, "in_memory_only.*'echo'"):
            Cluster(queue=queue, in_memory_only=True, auto_initialize=False)
        later = self.queue("later.db")
        cluster = self.cluster(None, later, in_memory_only=True, auto_initialize=False)
        later.task(repeat="@daily")(echo)
        with self.assertRaisesRegex(ValueError, "in_memory_only.*'echo'"):
            cluster.initialize()
        with self.assertRaisesRegex(TypeError, "queue="):
            Cluster()
        self.assertEqual(os.listdir(self.folder), [])

    def test_a_name_that_nobody_here_knows_is_taken_with_one_warning(self):
        queue = self.queue()
        queue.add_task("mial")  # Nobody here knows any name: a producer.
        self.cluster({"post": echo}, queue, auto_initialize=False)
        queue.task(name="mail")(echo)
        with self.assertLogs("taskpool", "WARNING") as logs:
            for name in ("mial", "mial", "post", "mail", "xyz"):
                queue.add_task(name)
            queue._unknown.update(map(str, range(100)))  # inside: names that are made of data
            queue.add_task("user-17")
        self.assertEqual([r.getMessage() for r in logs.records], [
            "no task type 'mial' is declared or mapped here; did you mean 'mail'?", "no task type 'xyz' is declared or mapped here"])

    def test_keyword_only_parameters_are_filled_from_data(self):
        def decorate(function):
            @functools.wraps(function)
            def call(*arguments, **options):
                return function(*arguments, **options)

            return call

        def both(job, toggle_ipc, *, to, **rest):
            return [callable(toggle_ipc), to, rest]

        queue = self.queue()
        functions = {"words": needs_words, "decorated": decorate(needs_words), "both": both,
                     "cached": functools.lru_cache(needs_words), "bound": functools.partial(needs_words, to="bound"),
                     "bound outside": functools.partial(decorate(needs_words), to="bound"), "optional": lambda job, *, size=3: size}
        for name, function in functions.items():
            queue.task(name=name, keep_result=60)(function)
        for name, data, result in (
            ("words", {"to": "a"}, ["a", "hello"]), ("words", {"to": "a", "subject": 2}, ["a", 2]), ("optional", {}, 3),
            ("decorated", {"to": "a"}, ["a", "hello"]), ("both", {"to": 1, "b": 2}, [True, 1, {"b": 2}]),
            ("bound", {"subject": 1}, ["bound", 1]), ("optional", {"size": 4}, 4),
            ("bound outside", {"subject": 1}, ["bound", 1]), ("cached", {"to": "a"}, ["a", "hello"]),
        ):
            with self.subTest(name=name, data=data):
                queue.add_task(name, data)
                self.assertEqual([task.result for task in queue.run_due()], [result])
        for name, data, text in (
            ("words", {}, "no 'to'.*'words'"), ("words", {"to": 1, "subjct": 2}, "'subjct'.*did you mean 'subject'"),
            ("words", [1], r"data is \[1\]"), ("optional", None, "data is None"), ("bound", {"to": 1}, "'to'"),
            ("bound outside", {"to": 1}, "'to'"), ("cached", {}, "no 'to'"),
            ("both", {"to": 1, "job": 2}, "'job'"), ("decorated", {"toggle_ipc": 1, "to": 2}, "'toggle_ipc'"),
        ):
            for add in (queue.add_task, lambda name, data: queue.add_tasks([{"task_type": name, "data": data}])):
                with self.subTest(name=name, data=data), self.assertRaisesRegex(TypeError, text):
                    add(name, data)
        self.assertEqual(queue.count(state="waiting"), 0)
        with self.assertRaisesRegex(TypeError, "no 'to'"):
            queue.add_task("words")
        with self.assertRaisesRegex(TypeError, "no parameter 'to'; 'words' takes it from data: give {'to': ...}"):
            queue.add_task("words", to=1)
        # Old code adds what new code needs more of: a failure like any other, with its retries.
        self.queue().add_task("words", {}, retries=1, retry_delay=0.001)
        ended = queue.run_due(until=timedelta(seconds=9))
        self.assertEqual([(t.state, t.error.split("\n")[0]) for t in ended], [
            (state, "TypeError: data has no 'to', which the function of 'words' needs") for state in ("waiting", "failed")])

    def test_each_cluster_checks_the_keywords_of_its_own_functions(self):
        """And add_task, where one function is known."""
        queue = self.queue()
        queue.task(name="a")(lambda job, *, x: x)
        options = {"in_memory_only": True, "max_available_workers": 1}
        for functions in ({"a": echo, "b": needs_words}, {"a": needs_words, "b": echo}):
            with self.cluster(functions, queue, **options) as cluster:
                if functions["b"] is needs_words:
                    for call in (cluster.submit, queue.add_task):
                        self.assertRaisesRegex(TypeError, "no 'to'", call, "b", {})
                for name, function in functions.items():
                    data = {"to": 1} if function is needs_words else 5
                    self.assertIn(cluster.submit(name, data).result(PATIENCE), ([1, "hello"], 5))
                    self.assertEqual(len(list(cluster.map(name, [data]))), 1)
        for name in "ab":
            queue.add_task(name, 7)  # It may be for either function.

    LAYOUTS = {
        "unguarded": ("", """
            queue = TaskQueue("tasks.db")
            cluster = Cluster(queue=queue, start_method=sys.argv[1], max_available_workers=1)
            queue.task(name="add")(lambda job, *, a, b=1: a + b)
            @queue.task
            async def chain(job):
                queue.add_task("add", {"a": job.data}, task_id="chained", keep_result=60)
                return "added"
            if Cluster.is_master():
                print(cluster.submit("add", {"a": 1}).result(), cluster.submit(chain, 5).result())
                print(queue.wait("chained").result)
        """),
        "module": ("""
            queue = TaskQueue("tasks.db")
            queue.task(name="add", keep_result=60)(lambda job, *, a, b=1: a + b)
            @queue.task
            def chain(job):
                queue.add_task("add", {"a": job.data}, task_id="chained")
                return "added"
        """, """
            from jobs import chain, queue
            if __name__ == "__main__":
                with Cluster(queue=queue, start_method=sys.argv[1], max_available_workers=1) as cluster:
                    print(cluster.submit("add", {"a": 1}).result(), cluster.submit(chain, 5).result())
                    print(queue.wait("chained").result)
        """),
        "decorated elsewhere": ("""
            def add(job, *, a, b=1):
                return a + b
            def chain(job):
                import script_queue
                script_queue.queue.add_task("add", {"a": job.data}, task_id="chained")
                return "added"
        """, """
            import jobs
            from script_queue import queue
            queue.task(keep_result=60)(jobs.add)
            queue.task(jobs.chain)
            def main():
                with Cluster(queue=queue, start_method=sys.argv[1], max_available_workers=1) as cluster:
                    print(cluster.submit(jobs.add, {"a": 1}).result(), cluster.submit(jobs.chain, 5).result())
                    print(queue.wait("chained").result)
            if __name__ == "__main__":
                main()
        """),
    }

    def test_declared_tasks_run_in_every_layout_and_by_every_start_method(self):
        self.script('from taskpool import TaskQueue\nqueue = TaskQueue("tasks.db")', "script_queue.py")
        for layout, (module, script) in self.LAYOUTS.items():
            self.script(module, "jobs.py")
            self.script(script, "script.py")
            for method in METHODS:
                for flags in ([], ["-m"]) if method == "spawn" else ([],):
                    with self.subTest(layout=layout, method=method, flags=flags):
                        process = self.start("script" if flags else "script.py", method, flags=flags)
                        out, err = process.communicate(timeout=PATIENCE)
                        self.assertEqual(out, "2 added\n6\n", err)
                        self.queue().remove(state=list(taskpool.STATES))


class TestSchedulesFollowTheCode(InFolder):
    """repeat= in queue.task keeps one stored task, `schedule:NAME`, as the code declares it."""

    START = datetime(2026, 3, 1, 0, 20, tzinfo=timezone.utc)
    HOUR = timedelta(hours=1)

    def setUp(self):
        super().setUp()
        self.now = self.START

    def nothing(self, name="nightly", **options):
        """The queue of a program that declares so a function that does nothing."""
        queue = self.queue()
        queue.clock = lambda: self.now.timestamp()
        queue.task(name=name, **options)(lambda job: None)
        return queue

    def stored(self):
        return self.queue().find_one(task_id="schedule:nightly")

    def runs(self, queue, until=timedelta()):
        """The slots that run, as hours since START."""
        ended = queue.run_due(until=until)
        return [(task.due_date - self.START) / self.HOUR for task in ended]

    def test_what_is_declared_is_added_once_as_by_add_task(self):
        for rule, first, slots in ((self.HOUR, 0, [0, 1, 2]), (Cron("30 * * * *", "Europe/Berlin"), 1 / 6, [1 / 6, 7 / 6, 13 / 6])):
            with self.subTest(rule=rule):
                queue = self.nothing(repeat=rule, priority=7, data={"a": [1]}, retries=2)
                queue._align(), self.nothing(repeat=rule, priority=7, data={"a": [1]}, retries=2)._align()  # inside
                task = self.stored()
                self.assertEqual((task.task_type, task.data, task.priority, task.retries, task.repeat), ("nightly", {"a": [1]}, 7, 2, rule))
                self.assertEqual((task.due_date - self.START) / self.HOUR, first)
                self.assertEqual(self.runs(queue, 2.5 * self.HOUR), slots)
                self.assertEqual(queue.count(), 1)
                queue.remove(task_id="schedule:nightly")

    def test_a_schedule_that_cannot_be_stored_holds_up_nothing_else(self):
        queue = self.nothing(repeat=self.HOUR)
        queue.clock = time.time
        queue.task(name="echo")(echo)
        self.assertEqual(queue.count(), 0)  # Makes the file.
        self.sql("CREATE TRIGGER no BEFORE INSERT ON taskpool_task WHEN NEW.repeat IS NOT NULL BEGIN SELECT RAISE(ABORT, 'quota'); END")
        with self.assertLogs("taskpool", "ERROR") as logs, self.cluster(None, queue) as cluster:
            self.assertEqual([cluster.submit("echo", n).result(PATIENCE) for n in range(2)], [0, 1])
        self.assertEqual(len(logs.output), 1)
        self.assertRegex(logs.output[0], "what is declared could not be stored.*quota")

    def test_another_rule_moves_only_a_due_date_to_come(self):
        """An interval counts on from the last due date, a cron goes on with its next time."""
        for old, new, now, slots in (
            (self.HOUR, timedelta(minutes=25), 0.3, [25 / 60, 50 / 60]), (self.HOUR, timedelta(minutes=25), 0.5, [50 / 60, 75 / 60]),
            (self.HOUR, timedelta(hours=3), 0.5, [3, 6]), (self.HOUR, "0 * * * *", 0.3, [2 / 3, 5 / 3]),
            ("0 * * * *", "10 1 * * *", 0.3, [5 / 6, 24 + 5 / 6]), ("@yearly", timedelta(minutes=30), 0.3, [0.5, 1]),
            # What is overdue still runs once, and the new rule counts on from there.
            (self.HOUR, timedelta(minutes=25), 1.1, [1, 1 + 25 / 60]), ("0 * * * *", "10 * * * *", 0.7, [2 / 3, 5 / 6]),
        ):
            with self.subTest(old=old, new=new, now=now):
                self.now = self.START
                self.runs(self.nothing(repeat=old))
                self.now = self.START + now * self.HOUR
                queue = self.nothing(repeat=new)
                queue._align()  # inside
                queue._align()  # inside
                until = self.START + (slots[-1] + 0.001) * self.HOUR
                self.assertEqual([round(slot, 9) for slot in self.runs(queue, until)], [round(slot, 9) for slot in slots])
                queue.remove(task_id="schedule:nightly")

    def test_an_interval_in_place_of_a_cron_counts_on_from_the_last_run(self):
        """Even if that was late."""
        self.nothing(repeat="20 * * * *")._align()  # inside
        self.now += 1.1 * self.HOUR
        self.assertEqual(self.runs(self.nothing(repeat="20 * * * *")), [1])
        self.now += 0.1 * self.HOUR
        self.assertEqual(self.runs(self.nothing(repeat=timedelta(minutes=30)), self.HOUR), [1.5, 2])

    def test_a_cluster_that_goes_on_takes_back_no_schedule_that_others_have_changed(self):
        old, new = self.nothing(repeat=self.HOUR), self.nothing(repeat=3 * self.HOUR)
        known = old._align()  # inside
        new._align()  # inside
        old.task(name="another", repeat="@daily")(lambda job: None)
        self.assertEqual(set(old._align(known)), {"nightly", "another"})  # inside
        self.assertEqual((self.stored().repeat, old.count()), (3 * self.HOUR, 2))
        old._align()  # inside: another start
        self.assertEqual(self.stored().repeat, self.HOUR)

    def test_the_same_rule_in_other_words_moves_nothing(self):
        self.nothing(repeat="@daily")._align()  # inside
        due_date = self.START + timedelta(minutes=7)
        self.queue().update("schedule:nightly", due_date=due_date)
        self.nothing(repeat="0 0 * * *", priority=3)._align()  # inside
        task = self.stored()
        self.assertEqual((task.due_date, task.priority, str(task.repeat)), (due_date, 3, "0 0 * * *"))

    def test_a_run_out_of_turn_moves_no_slot_also_if_the_service_starts_again_before_it(self):
        self.nothing(repeat=self.HOUR)._align()  # inside
        self.assertEqual(self.runs(self.nothing(repeat=self.HOUR)), [0])
        self.now += self.HOUR / 4
        self.queue().update("schedule:nightly", due_date=self.now)
        self.assertEqual(self.runs(self.nothing(repeat=self.HOUR), 2 * self.HOUR), [0.25, 1, 2])

    def test_old_code_beside_new_runs_no_slot_twice(self):
        old, new = ({"repeat": rule} for rule in (self.HOUR, timedelta(minutes=30)))
        ran = []
        for step in range(48):
            self.now = self.START + step * timedelta(minutes=5)
            ran += self.runs(self.nothing(**(old, new)[step % 2]))
        self.assertEqual(len(ran), len(set(ran)))
        self.assertEqual(ran, sorted(ran))
        self.assertLessEqual(set(ran), {n / 2 for n in range(8)})
        self.assertGreaterEqual(set(ran), set(range(4)))

    def test_without_repeat_its_schedule_goes_and_a_deleted_function_leaves_it(self):
        queue = self.nothing(repeat="@daily")
        queue._align()  # inside
        queue.add_task("nightly", task_id="other"), queue.add_task("x", task_id="scheduled:nightly")
        other = self.nothing("else", repeat="@daily")
        other._align()  # inside
        self.assertIsNotNone(self.stored())
        self.nothing(priority=2)._align()  # inside
        self.assertEqual({task.id for task in queue.find()}, {"other", "scheduled:nightly", "schedule:else"})
        self.nothing(repeat="@daily")._align()  # inside
        self.assertIsNotNone(self.stored())

    def test_one_that_failed_or_cannot_be_read_is_added_anew(self):
        queue = self.nothing(repeat=self.HOUR)
        for change in ("state = 'failed', error = 'x'", "repeat = 'x'", "priority = x'00'", "state = 'done', kept_until = 1"):
            queue._align()  # inside
            self.sql(f"UPDATE taskpool_task SET {change}")
            self.now += self.HOUR
            queue._align()  # inside
            task = self.stored()
            self.assertEqual((task.state, task.due_date, task.error, task.repeat), ("waiting", self.now, None, self.HOUR), change)

    def test_the_end_of_a_declaration_ends_the_schedule_after_the_run_under_way_and_a_new_one_keeps_it(self):
        path = str(self.folder / "hold")
        queue, without = self.queue(), self.queue()
        queue.task(name="nightly", repeat=self.HOUR, data=path)(hold)
        without.task(name="nightly")(hold)
        with self.cluster(None, queue) as cluster:
            begun(path)
            without._align()  # inside
            self.assertEqual(self.stored().state, "running")
            queue._align(), without._align()  # inside
            let_end(path)
            eventually(lambda: self.stored() is None)
            self.assertTrue(cluster.drain(PATIENCE))
        with self.cluster(None, queue):
            eventually(lambda: self.stored() and self.stored().attempt == 0 and self.stored().result == "held")

    def test_a_schedule_that_nobody_declares_any_more_is_named_with_the_cure(self):
        queue = self.nothing(repeat=self.HOUR)
        queue._align()  # inside
        with self.assertLogs("taskpool", "WARNING") as logs, self.cluster({"other": echo}):
            eventually(lambda: any("no function for" in line for line in logs.output))
        (line,) = [line for line in logs.output if "no function for" in line]
        self.assertRegex(line, r"'nightly' \(.*: python taskpool\.py remove .*tasks\.db schedule:nightly\)")


# --- The file, the manual, the demo ----------------------------------------------------


class TestTheFile(unittest.TestCase):
    """What a stranger may expect of taskpool.py as a text."""

    def setUp(self):
        self.source = (HERE / "taskpool.py").read_text(encoding="utf-8")
        self.tree = ast.parse(self.source)

    def test_nothing_refers_to_a_name_defined_further_down(self):
        """Annotations apart, which are never evaluated here."""
        line_of = {n.name: n.lineno for n in self.tree.body if hasattr(n, "name")}
        for node in self.tree.body:
            inner = list(ast.walk(node))
            notes = [getattr(n, name) for n in inner for name in ("annotation", "returns") if getattr(n, name, None)]
            apart = {id(part) for note in notes for part in ast.walk(note)}
            names = [n for n in inner if isinstance(n, ast.Name) and id(n) not in apart]
            local = {n.arg for n in inner if isinstance(n, ast.arg)} | {n.id for n in names if isinstance(n.ctx, ast.Store)}
            late = [n for n in names if n.id not in local and line_of.get(n.id, 0) > node.end_lineno]
            self.assertEqual([f"line {n.lineno} uses {n.id} of line {line_of[n.id]}" for n in late], [])

    def test_only_the_standard_library_is_imported(self):
        names = getattr(sys, "stdlib_module_names", None)
        if names is None:
            self.skipTest("this Python does not list its standard library")
        (checked,) = [node for node in self.tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "typing.TYPE_CHECKING"]
        never_run = set(ast.walk(checked))
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in never_run:
                for name in [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]:
                    self.assertIn(name.split(".")[0], names)

    def test_all_names_exist_and_everything_public_is_documented(self):
        self.assertEqual(taskpool.__all__, sorted(taskpool.__all__))
        for name in taskpool.__all__:
            thing = getattr(taskpool, name)
            self.assertTrue(thing.__doc__, name)
            for verb, function in vars(thing).items():
                if not verb.startswith("_") and callable(function) and thing not in (SQLiteStore, taskpool.MongoStore):
                    self.assertTrue(function.__doc__, f"{name}.{verb}")

    def test_lines_are_short_and_the_licence_travels_along(self):
        lines = self.source.splitlines()
        self.assertEqual([n for n, line in enumerate(lines, 1) if len(line) > 99], [])
        self.assertIn("MIT", lines[0] + lines[1])

    def test_the_examples_in_docstrings_are_true(self):
        """RT-01: back_off."""
        import doctest

        result = doctest.testmod(taskpool)
        self.assertEqual(result.failed, 0)
        self.assertGreater(result.attempted, 2)

    def test_promises_have_the_same_numbers_everywhere(self):
        numbers = {f"P{i}" for i in range(1, 9)}
        self.assertEqual(set(re.findall(r"^    (P\d)  ", taskpool.__doc__, re.M)), numbers)
        classes = {m.group(1) for m in map(re.compile(r"Test(P\d)").match, globals()) if m}
        self.assertEqual(classes, numbers)
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        self.assertEqual(set(re.findall(r"\*\*(P\d)\*\*", readme)), numbers)

    def test_an_older_python_is_told_which_one_it_needs(self):
        for how, text in (("import taskpool", "ImportError: "), ("runpy.run_path('taskpool.py', run_name='__main__')", "")):
            lacks = "sys.modules.update(graphlib=None, zoneinfo=None)"
            code = f"import runpy, sys; sys.version_info, sys.version = (3, 8, 18), '3.8.18 (main)'; {lacks}; {how}"
            done = subprocess.run([sys.executable, "-c", code], cwd=HERE, stderr=subprocess.PIPE, text=True)
            lines = done.stderr.splitlines()
            self.assertEqual((done.returncode, lines[-1]), (1, text + "taskpool needs Python 3.9 or later; this is 3.8.18"))
            self.assertTrue(text or len(lines) == 1, lines)

    def test_importing_it_starts_nothing_and_imports_nothing_heavy(self):
        # traceback, which logging needs, brings inspect from Python 3.14 on.
        code = (
            "import sys, threading, logging; there = set(sys.modules); import taskpool; "
            "heavy = {'asyncio', 'argparse', 'http', 'inspect', 'zoneinfo'} - there; "
            "print(threading.active_count(), sorted(heavy & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-S", "-c", code], cwd=HERE, capture_output=True, text=True)
        self.assertEqual(done.stdout.strip(), "1 []", done.stderr)


class TestCommandLine(InFolder):
    """python taskpool.py --demo | --version | --help"""

    def command(self, *arguments):
        return subprocess.run(
            [sys.executable, str(HERE / "taskpool.py"), *arguments],
            capture_output=True, text=True, timeout=PATIENCE * 3, cwd=self.folder,
        )

    def test_the_demo_comes_out_as_promised(self):
        done = self.command("--demo")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        for text in ("urgent first: True", "SIGKILL", "attempt 3 succeeded", "All parts came out as promised"):
            self.assertIn(text, done.stdout)
        self.assertNotIn("BROKEN", done.stdout)
        self.assertEqual(os.listdir(self.folder), [])

    @unittest.skipUnless(LINUX, "uses SIGINT and /dev/full")
    def test_a_demo_that_is_interrupted_or_cannot_print_ends_without_a_traceback(self):
        process = self.start(HERE / "taskpool.py", "--demo")
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, err), (1, ""), out)
        with open("/dev/full", "w") as full:
            process = self.start(HERE / "taskpool.py", "--demo", stdout=full)
            _, err = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, err.count("\n")), (1, 1), err)

    def test_a_demo_that_breaks_a_promise_says_which_and_exits_with_1(self):
        def broken(cluster, folder):
            """9. A part that is broken"""
            return False, "seen"

        with mock.patch.object(taskpool, "_PARTS", (broken,)), mock.patch.object(logging, "basicConfig"), \
                contextlib.redirect_stdout(io.StringIO()) as shown:
            self.assertEqual(taskpool.main(["--demo"]), 1)
        out = shown.getvalue()
        self.assertIn("BROKEN: seen", out)
        self.assertIn("9. A part that is broken", out.split("NOT as promised")[1])

    def test_the_bench_measures_everything_it_names(self):
        """With few tasks: the numbers themselves are nobody's promise."""
        names = "add_task in memory|add_tasks?|stored tasks run|submit to result|until an idle"
        lines = list(taskpool._bench_lines(str(self.folder), 100))
        for what, number in lines:
            with self.subTest(what=what):
                self.assertRegex(number, r"^\d[\d,]* a second$|^\d+\.\d\d ms$")
        self.assertEqual(sum(bool(re.match(names, what)) for what, _ in lines), 7)
        with mock.patch.object(taskpool, "_bench_lines", return_value=lines), contextlib.redirect_stdout(io.StringIO()) as shown:
            taskpool.main(["bench"])
        self.assertEqual(len({re.search(r"\d (a second|ms)$", line).start() for line in shown.getvalue().splitlines() if line[:2] == "  "}), 1)

    def test_version_and_help(self):
        self.assertEqual(self.command("--version").stdout, f"taskpool {taskpool.__version__}\n")
        self.assertIn("--demo", self.command("--help").stdout)


def with_some_tasks(queue):
    """The queue, with a task that is done, one that has failed, and one that is due later."""
    queue.add_task("echo", [1], task_id="good", keep_result=3600)
    queue.add_task("fail", task_id="bad")
    queue.run_due({"echo": echo, "fail": fail})
    queue.add_task("echo", "later", task_id="later", due_date=timedelta(days=3))
    return queue


class TestOperators(InFolder):
    """status, list, show, retry, remove, run and cron: for who has not read the manual."""

    is_terminal = False

    def main(self, *arguments):
        """Exit code, standard output and standard error of a command, run here."""
        out, err = io.StringIO(), io.StringIO()
        out.isatty = lambda: self.is_terminal
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = taskpool.main([str(argument) for argument in arguments])
            except SystemExit as end:
                code = end.code
        return code, out.getvalue(), err.getvalue()

    def out(self, *arguments):
        code, out, err = self.main(*arguments)
        self.assertEqual((code, err), (0, ""))
        return out

    def error(self, *arguments, code=1):
        got, out, err = self.main(*arguments)
        self.assertEqual((got, out, err.count("\n")), (code, "", 1), err)
        return err

    def json(self, *arguments):
        return json.loads(self.out(*arguments, "--json"), parse_constant=self.fail)

    def some(self):
        """A queue with a task in each state but running."""
        queue = with_some_tasks(self.queue())
        queue.add_task("other", task_id="other")
        return queue

    def test_status_tells_what_waits_runs_and_fails_and_who_works(self):
        queue, flag = self.some(), str(self.folder / "flag")
        with self.cluster({"hold": hold, "steps": progress_and_hold}, queue) as cluster:
            queue.add_task("hold", flag, task_id="held")
            queue.add_task("steps", flag + "2", task_id="steps")
            begun(flag)
            eventually(lambda: queue.find_one(task_id="steps").progress == (999, 1000, "half way"))
            status, text = self.json("status", "tasks.db"), self.out("status", "tasks.db")
            let_end(flag), let_end(flag + "2")
            self.assertTrue(cluster.drain(PATIENCE))
        names = ("waiting", "due", "running", "failed", "done")
        counts = {t["task_type"]: tuple(t[name] for name in names) for t in status["types"]}
        self.assertEqual(counts, {
            "echo": (1, 0, 0, 0, 1), "fail": (0, 0, 0, 1, 0), "hold": (0, 0, 1, 0, 0),
            "other": (1, 1, 0, 0, 0), "steps": (0, 0, 1, 0, 0),
        })
        by_type = {t["task_type"]: (t["oldest_due"], t["next_due"]) for t in status["types"]}
        wait, due = by_type["other"]
        self.assertTrue(0 <= wait < PATIENCE and due is None, wait)
        self.assertEqual(by_type["echo"], (None, queue.find_one(task_id="later").due_date.isoformat()))
        self.assertEqual(status["tasks"], 6)
        alive = {"pid": os.getpid(), "state": "alive" if LINUX else "unknown"}
        self.assertEqual(status["masters"], [alive])
        running = {r["id"]: r for r in status["running"]}
        self.assertEqual(running["held"]["where"], alive)
        self.assertEqual(running["steps"]["progress"], {"done": 999, "total": 1000, "note": "half way"})
        since = datetime.now(timezone.utc) - datetime.fromisoformat(running["held"]["since"])
        self.assertTrue(timedelta() <= since < timedelta(seconds=PATIENCE))
        self.assertRegex(text, r"^tasks.db: 6 tasks\nmasters: pid \d+ \(")
        self.assertRegex(text, r"\nother +1 +1 +0 +0 +0  \d[\d.]* s +-\n")
        self.assertRegex(text, r"\necho +1 +0 +0 +0 +1  - +in 3 d\n")
        self.assertRegex(text, r"\nsteps +steps +1  pid \d+  .* ago  \[#{19} \]  99%  999 of 1,000  half way\n")
        self.assertIn("masters: none", self.out("status", "tasks.db"))

    def test_status_tells_of_pauses_limits_and_what_is_held_in_columns_that_stay_while_it_watches(self):
        queue = self.some()
        self.assertNotRegex(self.out("status", "tasks.db"), "limits|held|wait for")
        queue.limit("echo", at_once=1234, rate=(10, 60))
        queue.limit("none", rate=(1, 0.25))
        queue.pause("other", "echo")
        queue.add_task("next", after=["bad", "later"])
        queue.add_task("next", after_end=["bad", "later"], task_id="end")
        queue.add_task("last", after=["end"])
        text, status = self.out("status", "tasks.db"), self.json("status", "tasks.db")
        self.assertRegex(text, r"\Atasks.db: 7 tasks; 1 waits for failed tasks\nmasters: .*\n\ntype +limits +waiting  due  held  ")
        for line in (r"echo +paused, 1,234 at once, 10 per 60 s +1 +0 +0 ", "last +- +1 +0 +1 ", "next +- +2 +0 +2 ",
                     r"none +1 per 0\.25 s +0 ", "other +paused +1 +0 +0 +0 +0 +0  - +-"):
            self.assertRegex(text, rf"\n{line}")
        self.assertEqual((status["waiting_for_failed"], [t["held"] for t in status["types"]]), (1, [0, 0, 1, 2, 0, 0]))
        self.assertEqual([t["paused"] for t in status["types"]], [True, False, False, False, False, True])
        options = taskpool._parser().parse_args(["status", "tasks.db", "--watch"])
        for change in (lambda: None, lambda: queue.resume("echo"), lambda: queue.remove(task_type=["next", "last"])):
            change()
            with contextlib.closing(SQLiteStore(self.folder / "tasks.db", _looking=True)) as view:
                _, lines = taskpool._tell_status(view, options, NOW, 0)
            self.assertRegex(lines[3], "limits .* held")
        self.assertNotIn("wait for", lines[0])
        queue.remove(state="waiting")
        queue.remove(task_id="bad")
        self.assertRegex(self.out("status", "tasks.db"), r"\Atasks.db: 1 task\n")

    def test_pause_resume_and_limit_tell_what_holds_then(self):
        queue = self.some()
        def told(name):
            return next(kind for kind in queue.types() if kind["task_type"] == name)
        self.assertEqual(self.out("pause", "tasks.db", "echo", "fail", "echo"), "echo: paused\nfail: paused\n")
        self.assertTrue(told("echo")["paused"] and told("fail")["paused"])
        self.assertEqual(self.out("limit", "tasks.db", "echo", "--at-once", 4, "--rate", "10/0.5"), "echo: paused, 4 at once, 10 per 0.5 s\n")
        self.assertEqual(self.out("resume", "tasks.db", "echo"), "echo: 4 at once, 10 per 0.5 s\n")
        self.assertEqual(self.out("limit", "tasks.db", "echo", "--rate", "none"), "echo: 4 at once\n")
        self.assertEqual((told("echo")["paused"], told("echo")["at_once"], told("echo")["rate"]), (False, 4, None))
        self.assertEqual(self.out("limit", "tasks.db", "echo", "--at-once", "none"), "echo: no limit\n")
        evil = "\x1b[2J\u202e\n"
        self.assertEqual(self.out("pause", "tasks.db", "ecko", evil),
                         "ecko: paused; no task here is of that type; did you mean 'echo'?\n"
                         "\\x1b[2J\\u202e\\n: paused; no task here is of that type\n")

    def test_now_starts_what_waits_for_its_time_or_for_others_and_list_and_show_tell_of_those(self):
        queue, later = self.some(), timedelta(days=1)
        queue.add_task("echo", task_id="end", after=["later", "bad"], due_date=later)
        queue.add_task("echo", task_id="next", after="end")
        shown = self.out("show", "tasks.db", "end")
        self.assertRegex(shown, r'\nheld +true\n(.*\n)*after +\{"bad": "failed", "later": "waiting"\}\nfollowed_by +1\nerror +null\n\Z')
        self.assertEqual([(t["id"], t["held"]) for t in self.json("list", "tasks.db", "--held")], [("end", True), ("next", True)])
        self.assertEqual(self.out("list", "tasks.db", "--held", "--type", "other"), "no tasks\n")
        self.assertEqual(self.out("now", "tasks.db", "en", "later"), "end: due now\nlater: due now\n")
        self.assertEqual((self.json("show", "tasks.db", "end")["after"], self.json("show", "tasks.db", "next")["after"]), ({}, {"end": "waiting"}))
        self.assertEqual([task.id for task in queue.run_due({"echo": echo})], ["later", "end", "next"])
        code, out, err = self.main("now", "tasks.db", "bad", "other", "nope")
        self.assertEqual((code, out, err.count("\n")), (1, "other: due now\n", 2))
        self.assertRegex(err, "'bad' is failed; only waiting tasks .*\n.*'nope': no such task\n")
        queue.pause("other")
        self.assertEqual(self.out("now", "tasks.db", "other"), "other: due now, but it does not start: 'other' is paused\n")

    def test_of_a_task_that_waits_it_is_told_when_it_starts_also_again(self):
        queue = self.some()
        queue.add_task("fail", task_id="again", retries=1, retry_delay=1800)
        queue.run_due({"fail": fail})
        queue.add_task("echo", task_id="held", after="again")
        self.assertRegex(self.out("list", "tasks.db"), r"again +waiting +1  again in (30|29) min .*\n")
        self.assertRegex(self.out("show", "tasks.db", "again"), r"\nstarts_at +\S+ \(in (30|29) min\)\n")
        starts = {task["id"]: task["starts_at"] for task in self.json("list", "tasks.db")}
        self.assertEqual({i for i, date in starts.items() if date is None}, {"good", "bad", "held"})
        self.assertEqual(starts["later"], queue.find_one(task_id="later").due_date.isoformat())
        waits = datetime.fromisoformat(starts["again"]) - queue.find_one(task_id="again").ended_at
        self.assertLess(abs(waits - timedelta(seconds=1800)), timedelta(seconds=1))
        queue.update("again", due_date=None)
        self.assertNotIn("again in", self.out("list", "tasks.db"))

    def test_cancel_tells_of_each_task(self):
        self.some()
        with mock.patch.object(TaskQueue, "cancel", create=True, side_effect=[True, False]) as cancel:
            code, out, err = self.main("cancel", "tasks.db", "lat", "good", "nope")
        self.assertEqual((code, out), (1, "later: cancelled\n"))
        self.assertEqual(err, "taskpool.py: 'good': no such task\ntaskpool.py: 'nope': no such task\n")
        self.assertEqual([call[0][0] for call in cancel.call_args_list], ["later", "good"])

    @unittest.skipUnless(LINUX, "only /proc tells that a process is dead")
    def test_status_tells_that_a_master_is_dead(self):
        with contextlib.closing(SQLiteStore(self.folder / "tasks.db")) as store:
            dead = subprocess.Popen([sys.executable, "-c", ""])
            dead.wait()
            store.renew(f"{taskpool._here()}|{dead.pid}|1|x|0", NOW)
            store.renew("elsewhere|7|1|x|0", NOW)
            store.renew("odd", NOW)
        states = {master["pid"]: master["state"] for master in self.json("status", "tasks.db")["masters"]}
        self.assertEqual(states, {dead.pid: "dead", 7: "unknown", None: "unknown"})
        self.assertIn("(unknown: of another machine", self.out("status", "tasks.db"))

    def test_looking_makes_upgrades_and_changes_nothing(self):
        for name in ("old.db", "tasks.db"):
            with self.queue(name) as queue:
                queue.add_task("x", task_id="one")
        self.sql("UPDATE taskpool_version SET version = 77")
        with contextlib.closing(sqlite3.connect(self.folder / "foreign.db")) as db:
            db.executescript("CREATE TABLE mine (id)")
        (self.folder / "text.db").write_text("no database, but long enough to be looked at" * 20)
        before = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.assertRegex(self.out("list", "old.db"), r"\nx     one  waiting        0  ")
        self.assertEqual(self.json("show", "old.db", "one")["progress"], None)
        self.assertRegex(self.out("status", "old.db"), r"\nx +1 +1 +0 +0 +0 ")
        for command in (("status",), ("list",), ("show", "x"), ("retry", "x"), ("remove", "x"), ("cancel", "x"), ("now", "x"),
                        ("pause", "x"), ("resume", "x"), ("limit", "x", "--at-once", "1"), ("metrics",)):
            for name, text in (
                ("none.db", "no such file"), ("tasks.db", "made by a newer taskpool"),
                ("foreign.db", "holds no tasks"), ("text.db", "not a database"), (".", " is a folder"),
                ("n" * 300, "too long"),
            ):
                with self.subTest(command=command, file=name):
                    self.assertIn(text, self.error(command[0], name, *command[1:]))
        self.assertEqual({path.name: path.read_bytes() for path in self.folder.iterdir()}, before)

    def test_list_and_show_tell_of_tasks(self):
        self.some()
        self.assertEqual([(t["id"], t["state"]) for t in self.json("list", "tasks.db")],
                         [("good", "done"), ("bad", "failed"), ("later", "waiting"), ("other", "waiting")])
        some = self.json("list", "tasks.db", "--state", "waiting", "--state", "done", "--type", "echo")
        self.assertEqual([t["id"] for t in some], ["good", "later"])
        lines = self.out("list", "tasks.db", "--limit", 2).splitlines()
        self.assertEqual(lines[0].split(), "type id state attempt due took what".split())
        self.assertRegex(lines[2], r"^fail  bad   failed        1  .* ago +\d+ m?s +ValueError: attempt 1$")
        newest = self.out("list", "tasks.db", "--newest", "--limit", 3).splitlines()
        self.assertEqual([line.split()[1] for line in newest[1:4]], ["other", "later", "bad"])
        self.assertEqual(newest[4:], ["... 3 of 4; --limit shows more"])
        self.assertEqual([t["id"] for t in self.json("list", "tasks.db", "--newest")], ["other", "later", "bad", "good"])
        self.assertEqual(lines[3:], ["... 2 of 4; --limit shows more"])
        bad = self.json("show", "tasks.db", "bad")
        self.assertEqual((bad["task_type"], bad["data"], bad["attempt"], bad["result"]), ("fail", {}, 1, None))
        text = self.out("show", "tasks.db", "bad")
        self.assertRegex(text, r"(?m)^state +failed$")
        self.assertRegex(text, r"(?m)^due_date +\d{4}-.*\+00:00 \(.* ago\)$")
        self.assertRegex(text, r"(?m)^error +ValueError: attempt 1\n(    .*\n)+\Z")
        self.assertRegex(text, r"(?m)^started_at +\d{4}-.* ago\)\nended_at +\d{4}-.* ago\)$")
        self.assertLessEqual(bad["started_at"], bad["ended_at"])
        self.assertEqual([self.json("show", "tasks.db", "other")[name] for name in ("started_at", "ended_at")], [None, None])
        self.assertRegex(self.out("show", "tasks.db", "good"), r"(?m)^result +\[1\]$")
        self.assertIn("'nope': no such task", self.error("show", "tasks.db", "nope"))

    def test_list_shows_results_and_the_whole_cause_and_on_a_terminal_as_much_as_fits(self):
        queue, cause = self.queue(), "no " * 50
        queue.add_task("x", {"words": cause})
        for number, data in enumerate((cause, [1, 2], None, "")):
            queue.add_task("y", data, task_id=str(number), keep_result=60)
        queue.run_due({"y": lambda job: int(job.data) if job.data == cause else job.progress(1, 2) or job.data})
        lines = self.out("list", "tasks.db").splitlines()[1:]
        self.assertEqual([re.split(r"ago +(?:-|\d+ ms) +", line, maxsplit=1)[1] for line in lines], [
            f'{{"words": "{cause}"}}', f"ValueError: invalid literal for int() with base 10: '{cause}'", "[1, 2]", "null", '""'])
        self.assertIn(cause, self.json("list", "tasks.db")[1]["error"].partition("\n")[0])
        self.is_terminal = True
        for columns in (40, 150, 400):
            with mock.patch.dict(os.environ, {"COLUMNS": str(columns)}):
                lines = self.out("list", "tasks.db").splitlines()[:3]
            self.assertEqual(max(map(len, lines)) == 150, columns == 150, lines)
            self.assertEqual([line.endswith("...") for line in lines], [False] + [columns < 400] * 2)
            self.assertIn("invalid literal for int()", lines[2])

    def test_columns_stay_in_line_whatever_the_letters_and_long_cells_move_only_their_own_line(self):
        rows = [["\u6f22\u5b57", 1, "x"], ["e\u0301te\u0301", 22, "y"], ["plain", 3, "z"], ["long" * 20, 4, "a"]]
        head, *lines = taskpool._table([dict(zip(("task_type", "n", "what"), row)) for row in rows], NOW)
        self.assertEqual(head, "type    n  what")
        self.assertEqual(lines, ["\u6f22\u5b57    1  x", "e\u0301te\u0301    22  y", "plain   3  z", "long" * 20 + "   4  a"])
        for text, width, fits in (("\u6f22" * 9, 10, "\u6f22" * 3 + "..."), ("\u6f22" * 5, 10, "\u6f22" * 5), ("abc", 1, "...")):
            self.assertEqual(taskpool._fit(text, width), fits)

    def test_json_is_complete_and_what_a_row_holds_is_neither_wrong_json_nor_a_command_to_the_terminal(self):
        queue, evil = self.queue(), "\x1b[2J\x07\n\u202ex"
        queue.add_tasks({"task_type": "x", "task_id": str(number)} for number in range(150))
        queue.add_task(evil, evil, task_id=evil)
        for change, *values in (
            ("data = 'NaN', retry_delay = 9e999, progress = '[1' WHERE id = '7'",), ("data = '[9e999]' WHERE id = '8'",),
            ("due_at = x'00', data = 'no json', progress = '[\"a\", 1, 2]' WHERE id = '9'",),
            ("error = ?, progress = '[1, 2, \"\x1b[2J\"]' WHERE task_type <> 'x'", evil),
        ):
            self.sql(f"UPDATE taskpool_task SET {change}", *values)
        listed = self.json("list", "tasks.db")
        self.assertEqual((len(listed), len(self.json("list", "tasks.db", "--limit", 3))), (151, 3))
        for number in (7, 8, 9):
            self.assertIn("cannot be read", listed[number]["data"])
        self.assertIn("column retry_delay", listed[7]["error"])
        self.assertIn("... 100 of 151", self.out("list", "tasks.db"))
        self.assertEqual(self.out("list", "tasks.db", "--type", "y"), "no tasks\n")
        odd = self.out("show", "tasks.db", "9")
        self.assertRegex(odd, "(?m)^data         cannot be read(.*\n)*error        column due_at")
        texts = [self.out(*c) for c in (
            ("status", "tasks.db"), ("list", "tasks.db", "--limit", 999), ("show", "tasks.db", evil),
            ("list", "tasks.db", "--json"), ("remove", "tasks.db", evil),
        )]
        for text in (odd, *texts, self.error("remove", "tasks.db", evil)):
            self.assertEqual([c for c in text if c != "\n" and not c.isprintable()], [])
        with self.assertLogs("taskpool", "INFO") as logs, self.cluster({"\x1b[2J\nx": fail}, queue) as cluster:
            cluster.submit("\x1b[2J\nx", task_id="\x1b[2J\nx").exception(PATIENCE)
        lines = [record.getMessage() for record in logs.records]
        self.assertTrue(any("cluster:\\x1b[2J\\nx:\\x1b[2J\\nx:\tfailed" in line for line in lines), lines)
        self.assertEqual([line for line in "\n".join(lines).split("\n") if not line.replace("\t", "").isprintable()], [])

    def test_an_id_that_begins_with_a_dash_stands_behind_two(self):
        queue = self.queue()
        for task_id in ("-x", "--json", "-1"):
            queue.add_task("x", task_id=task_id)
        self.assertIn("id           -x\n", self.out("show", "tasks.db", "--", "-x"))
        self.assertIn("id           --json\n", self.out("show", "tasks.db", "--", "--json"))
        for command in ("show", "retry", "remove", "cancel", "now"):
            self.assertIn("begins with - goes behind --", self.error(command, "tasks.db", "-x", code=2))
            self.assertIn("begins with - goes behind --", self.out(command, "--help"))
        self.assertEqual(self.out("remove", "tasks.db", "--", "-x", "--json", "-1").count("removed"), 3)

    def test_retry_and_remove_tell_of_each_task(self):
        queue, flag = self.some(), str(self.folder / "flag")
        self.assertEqual(self.out("retry", "tasks.db", "bad"), "bad: waiting\n")
        self.assertEqual(queue.find_one(task_id="bad").state, "waiting")
        code, out, err = self.main("retry", "tasks.db", "bad", "nope")
        self.assertEqual((code, out), (1, ""))
        self.assertEqual(err, "taskpool.py: 'bad': it is waiting, not failed\ntaskpool.py: 'nope': no such task\n")
        with self.cluster({"hold": hold}, queue):
            queue.add_task("hold", flag, task_id="held")
            begun(flag)
            self.assertIn("held: runs; it is removed at the end", self.out("remove", "tasks.db", "held"))
            let_end(flag)
        code, out, err = self.main("remove", "tasks.db", "good", "nope", "bad")
        self.assertEqual((code, out, err), (1, "good: removed\nbad: removed\n", "taskpool.py: 'nope': no such task\n"))
        self.assertEqual([task.id for task in queue.find()], ["later", "other"])

    def test_retry_and_remove_of_a_type_or_state_say_how_many(self):
        queue = self.some()
        queue.add_tasks({"task_type": name, "task_id": f"{name}{number}"} for name in ("fail", "echo", "other") for number in range(3))
        queue.run_due({"fail": fail})
        self.assertEqual(self.out("retry", "tasks.db", "--type", "echo"), "0 put back to waiting\n")
        self.assertEqual(self.out("retry", "tasks.db", "--type", "fail", "--type", "echo", "--state", "failed"), "4 put back to waiting\n")
        self.assertEqual(self.out("remove", "tasks.db", "--type", "echo", "--state", "waiting"), "4 removed\n")
        self.assertEqual([task.id for task in queue.find(task_type="echo")], ["good"])
        queue.add_tasks({"task_type": "other"} for _ in range(200))
        self.sql("UPDATE taskpool_task SET id = CAST(x'78c3' AS TEXT) WHERE id = 'other0'")
        self.assertEqual(self.out("remove", "tasks.db", "--state", "done", "--state", "waiting"), "209 removed\n")
        self.assertEqual(queue.find(), [])

    def test_an_unambiguous_beginning_of_an_id_will_do_and_a_whole_id_comes_first(self):
        queue = self.queue()
        for task_id in ("job", "job:1", "job:12", "job:13", "other", "\u6f22\u5b57", "%_"):
            queue.add_task("fail", task_id=task_id)
        queue.run_due({"fail": fail})
        for text, task_id in (("job", "job"), ("job:1", "job:1"), ("job:12", "job:12"), ("o", "other"), ("\u6f22", "\u6f22\u5b57"), ("%", "%_")):
            self.assertEqual(self.json("show", "tasks.db", text)["id"], task_id)
        self.assertIn("'jo': several ids begin so: 'job', 'job:1', 'job:12', ...\n", self.error("show", "tasks.db", "jo"))
        for text in ("", "x", "_", "OTHER", "job:123", "\udc80", "'"):
            self.assertIn("no such task", self.error("show", "tasks.db", text))
        self.sql("UPDATE taskpool_task SET id = CAST(x'78c3' AS TEXT) WHERE id = 'job:12'")
        self.assertIn("no such task", self.error("show", "tasks.db", "x"))
        self.assertEqual(self.out("retry", "tasks.db", "ot"), "other: waiting\n")
        code, out, err = self.main("remove", "tasks.db", "job:", "job:13", "job", "ot")
        self.assertEqual((code, out), (1, "job:13: removed\njob: removed\nother: removed\n"))
        self.assertEqual(err, "taskpool.py: 'job:': several ids begin so: 'job:1', 'job:13'\n")

    def test_add_prints_the_id_of_a_task_in_a_file_that_it_makes_if_need_be(self):
        ids = [self.out("add", "tasks.db", "x", *data).rstrip() for data in ((), ('{"a": [1, "\u6f22"]}',), ("-1",), ("null",), (' "text" ',))]
        self.assertEqual([(task.id, task.task_type, task.data) for task in self.queue().find()],
                         [(task_id, "x", data) for task_id, data in zip(ids, ({}, {"a": [1, "\u6f22"]}, -1, None, "text"))])
        for arguments, text in ((("",), "task_type is ''"), (("x", str(2**70)), "data is"), (("x", "[" * 91 + "]" * 91), "90 levels")):
            self.assertIn(text, self.error("add", "tasks.db", *arguments, code=2))
        self.assertIn(" is a folder", self.error("add", ".", "x"))

    def test_add_by_the_name_of_a_queue_knows_what_its_code_declares(self):
        self.script("""
            queue = TaskQueue("tasks.db")

            @queue.task(retries=3, priority=7, in_memory=True)
            def mail(job, *, to):
                pass
        """, "declared.py")
        def add(*arguments, module="taskpool", queue="declared:queue"):
            process = self.start("-m", module, "add", queue, *arguments)
            out, err = process.communicate(timeout=PATIENCE)
            return process.returncode, out.rstrip(), err
        code, task_id, err = add("mail", '{"to": 5}')
        self.assertEqual((code, err), (0, ""))
        task = self.queue().find_one(task_id=task_id)  # Stored, whatever is declared: the program ends.
        self.assertEqual((task.task_type, task.data, task.retries, task.priority), ("mail", {"to": 5}, 3, 7))
        code, out, err = add("mail", '{"too": 5}')
        self.assertEqual((code, out, err.count("\n")), (2, "", 1), err)
        self.assertIn("data has no 'to'", err)
        code, task_id, err = add("mial")
        self.assertEqual((code, self.queue().count(task_id=task_id)), (0, 1))
        self.assertEqual(err, "taskpool.py: 'mial' is not declared; did you mean 'mail'?\n")
        (self.folder / "mine").mkdir()  # Also where it is part of a package.
        shutil.copy(HERE / "taskpool.py", self.folder / "mine" / "pool.py")
        (self.folder / "vendored.py").write_text("from mine import pool\nqueue = pool.TaskQueue('tasks.db')")
        code, task_id, err = add("mail", module="mine.pool", queue="vendored:queue")
        self.assertEqual((code, err, self.queue().count(task_id=task_id)), (0, "", 1))

    def test_a_mistake_is_told_in_one_line_with_the_usage(self):
        for arguments in (
            [], ["--colour"], ["stat"], ["status"], ["status", "a", "b"], ["list", "a", "--state", "x"],
            ["list", "a", "--limit", "0"], ["list", "a", "--limit", "9" * 5000], ["list", "a", "--limit", "0" * 99 + "9" * 50],
            ["show", "a"], ["run", "app", "a"], ["run", "a.py:X", "a"], ["cron"], ["cron", "* * * * *", "-n", "x"],
            *(["run", "app:X", "a", f"--{option}"] for option in (
                "workers=0", "keep-alive=0", "keep-alive=never", "max-tasks-per-worker=0", "start-method=exec",
                "shutdown-timeout=-1", "shutdown-timeout=nan", "logs=none")),
            ["add", "a"], *(["add", "a", "x", text] for text in ("{", "NaN", "{'a': 1}", "[" * 5000, "x")),
            *([command, "a", *rest] for command in ("retry", "remove") for rest in ((), ("b", "--type", "x"), ("--state", "x"))),
            *([command, *rest] for command in ("cancel", "now", "pause", "resume", "limit") for rest in ((), ("a",))),
            ["metrics"], ["pause", "a", ""], ["pause", "a", "x", "\udc80"], ["cancel", "a", "--type", "x"], ["limit", "a", "x"],
            *(["limit", "a", "x", f"--{option}"] for option in (
                "at-once=0", "at-once=x", "at-once=", "rate=5", "rate=0/5", "rate=1.5/5", "rate=5/0", "rate=5/nan", "rate=5/6/7", "rate=NONE")),
        ):
            with self.subTest(arguments=arguments):
                self.assertIn("; usage: taskpool.py", self.error(*arguments, code=2))
        for command in (["status", "a"], ["list", "a"], ["show", "a", "b"], ["retry", "a", "b"], ["remove", "a", "b"],
                        ["run", "app:X", "a"], ["cron", "@daily"], ["bench"]):
            with self.subTest(command=command):
                err = self.error(*command, "--\x1b[2J", code=2)
                self.assertIn(rf"taskpool.py {command[0]}: unrecognized arguments: --\x1b[2J", err)
                self.assertIn(f"; usage: taskpool.py {command[0]} [-h]", err)
        self.assertFalse((self.folder / "a").exists())
        self.assertIn("tz 'Nowhere' is unknown", self.error("cron", "* * * * *", "--tz", "Nowhere", code=2))
        self.assertIn("61", self.error("cron", "61 * * * *", code=2))

    def test_the_worked_lines_of_help_are_right(self):
        text = self.out("--help")
        lines = re.findall(r"python taskpool\.py (.*?)(?:  +.*)?$", text.split("examples:")[1], re.M)
        self.assertGreater(len(lines), 5)
        for line in lines:
            taskpool._parser().parse_args(shlex.split(line))

    def test_cron_explains_and_tells_the_next_runs(self):
        cron = Cron("30 9 * * MON", "Europe/Berlin")
        words, *runs = self.out("cron", str(cron), "--tz", cron.tz, "-n", 3).splitlines()
        self.assertEqual(words, cron.explain())
        self.assertEqual([datetime.fromisoformat(run) for run in runs], first_runs(cron, None, 3))

    @unittest.skipUnless(os.name == "posix", "needs a shell")
    def test_a_reader_that_has_enough_and_a_closed_standard_output_are_no_error(self):
        self.queue().add_tasks({"task_type": "x", "data": "y" * 50} for _ in range(5000))
        for command, reader in (("list tasks.db --limit 5000", "| head -1"), ("status tasks.db", ">&-"), ("cron @daily", ">&-")):
            script = f"({shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'taskpool.py'))} {command}; echo $? >&2) {reader}"
            done = subprocess.run(["sh", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=self.folder, timeout=PATIENCE)
            self.assertEqual(done.stderr, b"0\n")

    @unittest.skipUnless(os.name == "posix", "needs signals")
    def test_watch_goes_on_until_ctrl_c_and_draws_over_what_a_terminal_shows(self):
        import pty

        queue = self.some()
        for number, (flags, mark) in enumerate((((), "tasks.db: {} tasks"), (("--json",), '"tasks": {},'))):
            process = self.start(HERE / "taskpool.py", "status", "tasks.db", "--watch", *flags)
            for count in (4 + 2 * number, 5 + 2 * number):
                self.assertTrue(any(mark.format(count) in line for line in process.stdout))
                queue.add_task("new")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=PATIENCE)
            self.assertEqual((process.returncode, err), (0, ""))
        mine, theirs = pty.openpty()
        process = self.start(HERE / "taskpool.py", "status", "tasks.db", "--watch", stdout=theirs, env={"TERM": "xterm"})
        os.close(theirs)
        shown = b""
        while shown.count(b"\x1b[J") < 2:
            shown += os.read(mine, 4096)
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(PATIENCE), 0)
        os.close(mine)
        screens = shown.split(b"\x1b[J")
        self.assertTrue(all(screen.startswith(b"\x1b[H") for screen in screens[:2]), screens)
        self.assertEqual(screens[0].count(b"\x1b[K"), screens[0].count(b"\n"))

    APP = """

        cluster = Cluster({"x": print}, TaskQueue("other.db"), auto_initialize=False)
        os.makedirs("elsewhere", exist_ok=True)
        os.chdir("elsewhere")  # DB means the folder of who types the command.

        def about(job):
            logging.info("about to tell")
            return [Cluster.is_master(), taskpool._worker is not None, Task is type(job)]

        Task = taskpool.Task
        class inner:
            TASKS = {"about": about, "lambda": lambda job: job.data + 1, "asks": lambda job, ipc: callable(ipc)}
    """

    @unittest.skipUnless(os.name == "posix", "sends a signal")
    def test_run_serves_until_a_signal_and_workers_have_the_same_copy(self):
        self.script(self.APP, "app.py")
        queue = self.queue()
        for command in (["app:inner.TASKS"], ["-m"], ["-I"]):
            for task_type, data in (("about", None), ("lambda", 41), ("asks", None)):
                queue.add_task(task_type, data, task_id=task_type, keep_result=60)
            if command == ["-m"]:  # As a module, with another signal.
                process = self.start("-m", "taskpool", "run", "app:inner.TASKS", "tasks.db", "--workers", "1")
            else:
                flags = command[:1] * command[0].startswith("-")
                process = self.start(HERE / "taskpool.py", "run", "app:inner.TASKS", "tasks.db", "--workers", "1", flags=flags)
            results = [queue.wait(task_type, PATIENCE).result for task_type in ("about", "lambda", "asks")]
            process.send_signal(signal.SIGTERM if command == ["-m"] else signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
            self.assertEqual((process.returncode, out), (0, ""), err)
            self.assertEqual(results, [[False, True, True], 42, True], err)
            self.assertIn("serving 'about', 'lambda', 'asks' of tasks.db until Ctrl-C", err)
            self.assertIn("cluster:lambda:lambda:\tdone", err)
            self.assertIn(" INFO about to tell", err)
            queue.remove(state="done")

    @unittest.skipUnless(os.name == "posix", "sends a signal")
    def test_run_serves_what_a_queue_declares_with_the_options_of_a_cluster(self):
        self.script("""
            queue = TaskQueue("declared.db")
            os.makedirs("elsewhere", exist_ok=True)
            os.chdir("elsewhere")

            @queue.task(keep_result=60)
            def pid(job):
                return os.getpid()

            @queue.task(name="parent", keep_result=60)
            def add(job, *, word):
                return queue.add_task(pid, task_id=word).id
        """, "app.py")
        queue = self.queue("declared.db")
        options = "--workers 3 --oversubscribe --keep-alive always --max-tasks-per-worker 1 --start-method forkserver --shutdown-timeout 2.5 --logs error"
        process = self.start(HERE / "taskpool.py", "run", "app:queue", *options.split())
        queue.add_task("parent", {"word": "child"}, keep_result=60)
        eventually(lambda: queue.find_one(task_id="child", state="done"))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, out), (0, ""), err)
        self.assertNotIn(" INFO ", err)
        self.addCleanup(sys.modules.pop, "app", None), self.addCleanup(taskpool._served.cache_clear)
        known = Cluster.__init__.__kwdefaults__
        with mock.patch.object(Cluster, "__init__", autospec=True, side_effect=taskpool.TaskPoolError("made")) as made, \
                mock.patch.object(logging, "basicConfig"), mock.patch.object(sys, "path", [*sys.path]):
            made.__kwdefaults__ = known
            self.assertIn("made", self.error("run", "app:queue", *options.split()))
        self.assertEqual(made.call_args[1], {
            "auto_initialize": False, "max_available_workers": 3, "oversubscribe": True, "keep_alive": "always",
            "max_tasks_per_worker": 1, "start_method": "forkserver", "shutdown_timeout": 2.5, "logs": "error"})

    def test_run_says_in_one_line_what_it_cannot_use(self):
        (self.folder / "broken.py").write_text("\n1 / 0")
        (self.folder / "odd.py").write_text(
            "import taskpool\nTASKS = {'x': 5}\nEMPTY = {}\nGOOD = {'x': print}\nempty = taskpool.TaskQueue()\n"
            "queue = taskpool.TaskQueue()\n@queue.task\ndef x(job): pass")
        for name, db, text in (
            ("nope:TASKS", "tasks.db", "ModuleNotFoundError: No module named 'nope'"),
            ("odd:NOPE", "tasks.db", "has no attribute 'NOPE'"), ("odd:EMPTY", "tasks.db", "task_map is {}"),
            ("broken:TASKS", "tasks.db", r"ZeroDivisionError.*broken\.py, line 2\)"),
            ("odd:TASKS", "tasks.db", r"task_map\['x'\] is 5"), ("odd:GOOD", "odd.py", "odd.py: file is not a database"),
            ("odd:empty", None, "this TaskQueue declares no tasks"), ("odd:GOOD", None, "odd:GOOD is a task map: say which DB; usage"),
            ("odd:queue", "tasks.db", "odd:queue has a store: leave DB out; usage"),
        ):
            process = self.start(HERE / "taskpool.py", "run", name, *([db] if db else []))
            out, err = process.communicate(timeout=PATIENCE)
            self.assertEqual((process.returncode, out, err.count("\n")), (1 + ("usage" in text), "", 1), err)
            self.assertRegex(err, text)
        self.assertEqual(list(self.folder.glob("*.db")), [])


try:
    from prometheus_client import parser
except ImportError:
    parser = None

HOSTILE = (
    "<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "\u202egnp.exe \u05e9\u05dc\u05d5\u05dd", "a\x01\x1b[2J\x7f\x9b\r\n\tb",
    "\"'`&lt;&#60;\\${alert(3)}", "javascript:alert(4)", "__proto__",
)


class TestMetrics(InFolder):
    """python taskpool.py metrics: numbers in the text format of Prometheus, 0.0.4."""

    def read(self, text):
        """{name of a sample: {its labels: its value}}, by the rules of the format."""
        samples, known, family = {}, set(), None
        self.assertEqual(text[-1:], "\n")
        for line in text[:-1].split("\n"):
            if line.startswith("#"):
                kind, name, rest = re.fullmatch(r"# (HELP|TYPE) (taskpool_[a-z_]+) (.+)", line).groups()
                if kind == "TYPE":
                    self.assertNotIn(name, known)
                    self.assertIn(rest, ("gauge", "counter", "histogram"))
                    known.add(name)
                    family = rf"{name}(_bucket|_sum|_count)" if rest == "histogram" else name
                continue
            name, within, value = re.fullmatch(r"([a-z_]+)(?:\{(.+)\})? (\S+)", line).groups()
            self.assertRegex(name, rf"\A{family}\Z")  # All of a family stand together.
            label = r'([a-z]+)="((?:[^"\\]|\\[\\"n])*)"'
            self.assertTrue(re.fullmatch(rf"{label}(,{label})*", within or 'a=""'), line)
            labels = tuple(re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), text) for _, text in re.findall(label, within or ""))
            self.assertNotIn(labels, samples.setdefault(name, {}))
            samples[name][labels] = float(value)
        return samples

    def printed(self):
        done = subprocess.run([sys.executable, str(HERE / "taskpool.py"), "metrics", "tasks.db"], cwd=self.folder, timeout=PATIENCE,
                              env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        return done.stdout.decode("utf-8")

    def metrics(self):
        return self.read(self.printed())

    @unittest.skipUnless(parser, "needs pip install prometheus_client")
    def test_the_parser_of_prometheus_client_reads_the_same(self):
        queue = self.queue()
        queue.add_tasks({"task_type": name} for name in ("echo", "fail", *HOSTILE))
        queue.run_due({"echo": echo, "fail": fail})
        queue.pause(*HOSTILE)
        queue.limit("echo", at_once=3)
        text, found = self.printed(), {}
        for family in parser.text_string_to_metric_families(text):
            self.assertTrue(family.documentation and family.type in ("gauge", "counter", "histogram"), family)
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
        self.assertEqual(found, self.read(text))

    def test_each_task_is_counted_in_one_state(self):
        queue, flag, odd = self.queue(), str(self.folder / "flag"), '\u6f22"b\n\\'
        for name in ("echo", "off", odd):
            queue.add_tasks({"task_type": name, "due_date": due} for due in (None, None, timedelta(days=9)))
        queue.add_task("fail", task_id="bad")
        queue.add_task("kept", keep_result=600)
        queue.run_due({"fail": fail, "kept": job_itself})
        queue.add_task("off", after="bad")
        queue.pause("off")
        queue.limit("kept", at_once=7)
        with self.cluster({"hold": hold}, queue):
            queue.add_task("hold", flag)
            begun(flag)
            found, count = self.metrics(), queue.count()
            let_end(flag)
        self.assertEqual({labels: n for labels, n in found["taskpool_tasks"].items() if n}, {
            ("echo", "due"): 2, ("echo", "scheduled"): 1, (odd, "due"): 2, (odd, "scheduled"): 1, ("off", "paused"): 3, ("off", "held"): 1,
            ("fail", "failed"): 1, ("kept", "done"): 1, ("hold", "running"): 1})
        self.assertEqual((sum(found["taskpool_tasks"].values()), len(found["taskpool_tasks"])), (count, 6 * 7))
        self.assertEqual({labels[0] for labels, n in found["taskpool_oldest_due_seconds"].items() if n}, {"echo", odd})
        self.assertEqual([labels[0] for labels, n in found["taskpool_paused"].items() if n], ["off"])
        self.assertEqual(found["taskpool_at_once"], {("kept",): 7})
        self.assertEqual(sum(found["taskpool_masters"].values()), 1)
        self.assertEqual((found["taskpool_build_info"], found["taskpool_counted_seconds"]), ({(taskpool.__version__,): 1}, {(): 0}))

    def test_runs_are_counted_by_their_ends_and_durations(self):
        queue = self.queue()
        with self.cluster({"echo": echo, "fail": fail, "wish": wish}, queue):
            queue.add_tasks({"task_type": "echo"} for _ in range(20))
            queue.add_task("fail", retries=2, retry_delay=0)
            later = queue.add_task("wish", {"file": str(self.folder / "starts"), "raise": ["Busy", 0.01], "times": 2})
            queue.wait(later, PATIENCE)
        found = self.metrics()
        self.assertEqual({labels: n for labels, n in found["taskpool_runs_total"].items() if n},
                         {("echo", "done"): 20, ("fail", "failed"): 1, ("fail", "retried"): 2, ("wish", "later"): 2, ("wish", "done"): 1})
        for name, count in (("echo", 20), ("fail", 3), ("wish", 3)):
            steps = [(le, n) for (task_type, le), n in found["taskpool_run_seconds_bucket"].items() if task_type == name]
            self.assertEqual([float(le) for le, _ in steps], [*taskpool.BOUNDS, math.inf])
            self.assertEqual([n for _, n in steps], sorted(n for _, n in steps))
            self.assertEqual((steps[-1], found["taskpool_run_seconds_count"][name,]), (("+Inf", count), count))
            self.assertGreater(found["taskpool_run_seconds_sum"][name,], 0)

    def test_of_many_types_the_rest_is_summed_up_and_no_name_is_a_command_to_a_terminal(self):
        queue = self.queue()
        queue.add_tasks({"task_type": f"t{number:03}"} for number in range(600))
        queue.add_tasks({"task_type": name} for name in ("(other)", "\x1b[2J\u202e"))
        queue.pause("t599")
        text = taskpool.metrics_text(queue.types(), ["dead", "alive", "dead"], "1")
        self.assertEqual([c for c in text if c != "\n" and not c.isprintable()], [])
        found = self.read(text)
        self.assertEqual(sum(found["taskpool_tasks"].values()), 602)
        self.assertEqual(len({name for name, _ in found["taskpool_tasks"]}), 500)
        self.assertEqual([found["taskpool_tasks"]["(other)", state] for state in ("due", "paused")], [102, 1])
        self.assertEqual((found["taskpool_paused"]["(other)",], found["taskpool_paused"]["t000",]), (1, 0))
        oldest = found["taskpool_oldest_due_seconds"]
        self.assertLess(oldest["(other)",], 2 * oldest["t000",])  # Of all that it stands for the longest, not their sum.
        self.assertEqual(found["taskpool_masters"], {("alive",): 1, ("dead",): 2, ("unknown",): 0})


class TestPage(InFolder):
    """python taskpool.py web: what it shows, what it does, and what attackers get."""

    TOKEN = "secret-for-tests-0123456789"

    def serve(self, target="tasks.db", *options, token=TOKEN):
        """The program; its port is self.port, and its first line self.line."""
        arguments = HERE / "taskpool.py", "web", target, "--port", 0, *options
        process = self.start(*arguments, env={"TASKPOOL_TOKEN": token}, flags=["-B"])
        self.line = process.stdout.readline()
        self.assertIn("http://", self.line, self.line or process.communicate()[1])
        self.port = int(re.search(r":(\d+)/#", self.line).group(1))
        return process

    def ask(self, path, body=None, *, token=TOKEN, method=None, **headers):
        """Status and text of an answer; its headers are self.headers."""
        import http.client  # Not in each worker that imports this file.

        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if isinstance(body, dict):
            body = json.dumps(body)
        with contextlib.closing(connection):
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
            answer = connection.getresponse()
            self.headers, text = dict(answer.getheaders()), answer.read().decode()
        self.assertFalse([name for name in self.headers if name.lower().startswith("access-control")])
        self.assertNotIn("Traceback", text if answer.status >= 400 else "")
        return answer.status, text

    def told(self, path, body=None):
        status, text = self.ask(path, body)
        self.assertEqual(status, 200, text)
        return json.loads(text, parse_constant=self.fail)

    def do(self, verb, **wish):
        return self.told("/api/do", {"verb": verb, **wish})["count"]

    def refused(self, status, path, body=None, **options):
        """The line that says why."""
        got, text = self.ask(path, body, **options)
        self.assertEqual(got, status, text)
        (line,) = json.loads(text).values()
        self.assertNotIn("\n", line)
        return line

    def dump(self):
        with contextlib.closing(sqlite3.connect(self.folder / self.FILE)) as db:
            return list(db.iterdump())

    def some(self):
        """A queue with a task in each state but running, and a schedule."""
        queue = with_some_tasks(self.queue())
        queue.add_task("fail", task_id="follows", after="bad")
        queue.add_task("tick", task_id="ticks", repeat=timedelta(minutes=10), due_date=timedelta(hours=1))
        return queue

    PATHS = ("/api/state", "/api/tasks?state=failed", "/api/task?id=bad", "/metrics", "/nothing", "/api", "/x?y")

    # ---- Security

    def test_who_has_no_token_gets_the_empty_page_and_nothing_else(self):
        """Another user of the machine; a rebound name (Host); a foreign page (Origin, forms)."""
        self.some()
        self.serve()
        before = self.dump()
        wrong = (None, "", "x" * len(self.TOKEN), self.TOKEN[:-1], self.TOKEN + "x", self.TOKEN.upper(), "\xe9" * 20)
        evil = {"Origin": "https://evil.example", "Host": "evil.example:80", "Cookie": f"token={self.TOKEN}"}
        for token in wrong:
            status, page = self.ask("/", token=token, **evil)
            self.assertEqual((status, "good" in page, self.TOKEN in page), (200, False, False))
            for path in self.PATHS:
                self.assertEqual(self.refused(401, path, token=token, **evil), "the token is missing or wrong")
            for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json"):
                body = json.dumps({"verb": "remove", "state": "failed"})
                self.refused(401, "/api/do", body, token=token, **{"Content-Type": kind}, **evil)
        self.refused(401, f"/api/state?token={self.TOKEN}", token=None, Authorization=f"Basic {self.TOKEN}")
        self.refused(405, "/api/do", method="OPTIONS", token=None, **evil, **{"Access-Control-Request-Method": "POST"})
        self.assertEqual(self.dump(), before)

    def test_hostile_texts_are_json_only_and_the_page_runs_only_its_own_script(self):
        queue, evil = self.queue(), "<img src=x onerror=alert(1)></script>\u202e\x07\n\x1b[31m"
        queue.add_task("fail", {"k": evil}, task_id=evil)
        queue.add_task(evil, evil, task_id="other")
        queue.run_due({"fail": fail})
        self.sql("UPDATE taskpool_task SET error = ? WHERE state = 'failed'", evil)
        self.serve()
        query = urllib.parse.urlencode({"id": evil})
        for path in ("/api/state", "/api/tasks?state=failed", "/api/tasks?state=waiting", f"/api/task?{query}"):
            status, text = self.ask(path)
            kind = self.headers["Content-Type"], self.headers["X-Content-Type-Options"]
            self.assertEqual((status, *kind), (200, "application/json; charset=utf-8", "nosniff"))
            self.assertTrue(text.isascii() and text.isprintable(), text)
        self.assertEqual((json.loads(text)["id"], json.loads(text)["error"]), (evil, evil))
        _, page = self.ask("/", token=None)
        for danger in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval", "Function", "http:", "src=", "href="):
            self.assertNotIn(danger, page)
        policy = dict(rule.split(" ", 1) for rule in self.headers["Content-Security-Policy"].split("; "))
        self.assertEqual({name: policy.pop(name) for name in ("default-src", "base-uri", "form-action", "frame-ancestors")},
                         dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"))
        self.assertEqual(policy.pop("connect-src"), "'self'")
        for name, rule in policy.items():  # script-src and style-src
            tag = name.partition("-")[0]
            (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
            code = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            self.assertEqual(rule, f"'sha256-{code}'")
        self.assertEqual(len(policy), 2)
        self.assertEqual(re.findall(r"\son\w+=|\sstyle=", page.partition("<script>")[0]), [])

    def test_no_answer_is_framed_cached_guessed_or_says_where_it_came_from(self):
        self.some()
        self.serve()
        big = "x" * (taskpool.BODY_BYTES + 1)
        for status, *request in (
            (200, "/"), (401, "/api/state"), (200, "/api/state"), (404, "/nothing"), (405, "/api/do"), (200, "/metrics"),
            (400, "/api/tasks?state=odd"), (400, "/api/tasks?limit=x"), (404, "/api/task?id=nobody"), (405, "/api/state", "{}"),
            (400, "/api/do", "[" * 60_000), (400, "/api/do", "{}"), (400, "/api/do", {"verb": ["x"]}), (413, "/api/do", big),
        ):
            got, text = self.ask(*request, token=None if status == 401 else self.TOKEN)
            self.assertEqual((got, text.count("\n") if got >= 400 else 0), (status, 0), request)
            self.assertIn("frame-ancestors 'none'", self.headers["Content-Security-Policy"])
            names = "Cache-Control", "Referrer-Policy", "X-Content-Type-Options", "Server"
            self.assertEqual([self.headers[name] for name in names], ["no-store", "no-referrer", "nosniff", "taskpool"])
        for method in ("PUT", "DELETE", "HEAD", "TRACE", "PROPFIND"):
            self.assertEqual(self.ask("/api/state", method=method)[0], 405)
        for raw in (b"nonsense\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
                    b"POST /api/do HTTP/1.1\r\n\r\n", b"POST /api/do HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as end:
                end.sendall(raw)
                answer = b"".join(iter(lambda: end.recv(1 << 16), b""))
            self.assertNotIn(b"Traceback", answer)
            self.assertNotIn(b"good", answer)
        self.assertEqual(self.ask("/api/state")[0], 200)

    def test_each_start_has_its_own_token_which_no_list_of_processes_and_no_log_shows(self):
        self.some()
        tokens = set()
        for _ in range(2):
            process = self.serve(token="")
            token = self.line.strip().partition("#")[2]
            tokens.add(token)
            self.assertEqual(self.ask("/api/state", token=token)[0], 200)
            self.assertEqual(self.ask("/api/state?secret", token="wrong")[0], 401)
            if LINUX:
                self.assertNotIn(token, Path(f"/proc/{process.pid}/cmdline").read_text())
            process.terminate()
            self.assertEqual(process.communicate(timeout=PATIENCE), ("", ""))
        self.assertEqual((len(tokens), {len(token) >= 43 for token in tokens}), (2, {True}))
        process = self.serve()  # Who has made up the token knows it.
        self.assertEqual(self.ask("/api/state")[0], 200)
        process.terminate()
        self.assertNotIn(self.TOKEN, self.line + "".join(process.communicate(timeout=PATIENCE)))
        page = taskpool._Page("x", self.queue(), self.TOKEN, False)
        with mock.patch("hmac.compare_digest", return_value=False) as compare:
            self.assertEqual(page.answer("GET", "/api/state", f"Bearer {self.TOKEN}", b"")[0], 401)
        compare.assert_called_once()

    def test_it_is_not_opened_to_others_by_mistake(self):
        self.some()
        for options, token, text in (
            (["--host", "0.0.0.0"], "", "open to others"), (["--host", "::"], "", "--host ::"), (["--host", ""], "", "--host"),
            (["--host", "0.0.0.0"], "x" * 15, "16 ASCII"), ([], "x" * 15 + "\n", "16 ASCII"), (["--host", "no.such.invalid"], "", "no such address"),
            (["--port", "70000"], "", "not a port"), (["--port", "x"], "", "not a port"),
        ):
            served = mock.patch.object(taskpool, "_page_server", side_effect=OSError("it was opened"))
            with mock.patch.dict(os.environ, TASKPOOL_TOKEN=token), served:
                code, out, err = TestOperators.main(self, "web", "tasks.db", *options)
            self.assertEqual((code, out, err.count("\n")), (2, "", 1), err)
            self.assertIn(text, err)
        process = self.serve("tasks.db", "--host", "0.0.0.0")
        self.assertEqual(self.ask("/api/state")[0], 200)
        other = self.start(HERE / "taskpool.py", "web", "tasks.db", "--port", self.port)
        out, err = other.communicate(timeout=PATIENCE)
        self.assertEqual((other.returncode, out, err.count("\n")), (1, "", 1), err)
        process.terminate()
        self.assertRegex(process.communicate(timeout=PATIENCE)[1], r"^[^\n]*not encrypted[^\n]*\n$")

    is_terminal = False

    def test_nothing_stored_is_unpickled_or_evaluated(self):
        self.some()
        flag = self.folder / "flag"
        evil = pickle.dumps(OnLoad(os.mkdir, str(flag)))
        self.sql("UPDATE taskpool_task SET data = ?, result = ?, progress = ?, successor = ?, repeat = ?", *[evil] * 5)
        self.sql("UPDATE taskpool_task SET task_type = CAST(x'ff41' AS TEXT) WHERE id = 'later'")
        self.serve()
        for state in taskpool.STATES:
            for task in self.told(f"/api/tasks?state={state}")["tasks"]:
                self.told("/api/task?" + urllib.parse.urlencode({"id": task["id"]}))
        self.told("/api/state")
        self.assertFalse(flag.exists())

    # ---- What it shows

    def test_the_state_tells_types_runs_masters_and_schedules(self):
        queue, flag = self.some(), str(self.folder / "flag")
        queue.pause("echo")
        queue.limit("hold", at_once=2, rate=(100, 1))
        self.serve()
        with self.cluster({"steps": progress_and_hold}, queue) as cluster:
            queue.add_task("steps", flag, task_id="steps")
            eventually(lambda: queue.find_one(task_id="steps").progress == (999, 1000, "half way"))
            state = self.told("/api/state")
            let_end(flag)
            self.assertTrue(cluster.drain(PATIENCE))
        self.assertEqual((state["name"], state["version"], state["read_only"]), ("tasks.db", taskpool.__version__, False))
        types = {kind["task_type"]: kind for kind in state["types"]}
        self.assertEqual({name: types["fail"][name] for name in ("waiting", "held", "failed")}, {"waiting": 1, "held": 1, "failed": 1})
        self.assertEqual((types["echo"]["paused"], types["hold"]["at_once"], types["hold"]["rate"]), (True, 2, [100, 1.0]))
        (run,) = state["running"]
        self.assertEqual((run["id"], run["type"], run["attempt"], run["master"], "since" in run), ("steps", "steps", 1, os.getpid(), True))
        self.assertEqual(run["progress"], {"done": 999, "total": 1000, "note": "half way"})
        self.assertEqual([(master["pid"], master["running"]) for master in state["masters"]], [(os.getpid(), 1)])
        (schedule,) = state["schedules"]
        self.assertEqual((schedule["id"], schedule["rule"], schedule["error"]), ("ticks", "every 10 min", None))
        self.assertEqual(datetime.fromisoformat(schedule["starts"]), queue.find_one(task_id="ticks").due_date)
        ages = [datetime.fromisoformat(state["now"]) - datetime.fromisoformat(state["counted_at"])]
        self.assertTrue(timedelta() <= ages[0] < timedelta(seconds=PATIENCE), ages)

    def test_rules_are_told_in_words(self):
        rules = {timedelta(seconds=90): "90 s", timedelta(hours=2): "2 h", timedelta(days=7): "7 d", timedelta(seconds=0.25): "0.25 s"}
        for rule, words in rules.items():
            self.assertEqual(taskpool._in_words(rule), f"every {words}")
        self.assertIn("Monday", taskpool._in_words(Cron("0 9 * * MON")))

    def test_metrics_are_those_of_the_command(self):
        self.some()
        self.serve()
        status, text = self.ask("/metrics")
        self.assertEqual((status, self.headers["Content-Type"]), (200, "text/plain; version=0.0.4; charset=utf-8"))
        _, out, _ = TestOperators.main(self, "metrics", "tasks.db")
        mine, theirs = (re.sub(r"(oldest_due|counted)_seconds(\S*) .*", r"\1\2", it) for it in (text, out))
        self.assertEqual(mine, theirs)

    def test_lists_go_by_key_newest_first_and_long_texts_are_cut(self):
        queue = self.queue()
        queue.add_tasks({"task_type": "x" if n % 2 else "y", "data": n, "task_id": str(n)} for n in range(120))
        queue.add_task("x", "z" * 14_000_000, task_id="big")
        self.serve()
        seen, before = [], ""
        while before is not None:
            got = self.told(f"/api/tasks?state=waiting&type=x&limit=25&before={urllib.parse.quote(before)}")
            seen, before = seen + [task["id"] for task in got["tasks"]], got["before"]
            queue.add_task("x")  # What comes meanwhile moves nothing.
        self.assertEqual(seen, ["big", *(str(n) for n in range(119, 0, -2))])
        status, text = self.ask("/api/tasks?state=waiting&limit=3")
        self.assertTrue(status == 200 and len(text) < 20_000, len(text))
        status, text = self.ask("/api/task?id=big")
        self.assertLess(len(text), 102_000)
        self.assertTrue(json.loads(text)["data"].endswith("z ... (14,000,002 characters)"))
        self.assertEqual(len(self.told("/api/tasks")["tasks"]), 50)

    def test_what_a_request_may_not_ask_is_told_in_one_line_and_nothing_is_done(self):
        queue = self.some()
        self.serve()
        keys = ("[]", "{}", "1", "x", '["a"]', '[1,"x",3]', "[[1],1]", "[1,[1]]", "[1,null]", "[true,1]", f"[1,{2**63}]", '[1,"\\ud800"]', "[" * 9999)
        wrong = {"before": keys, "limit": ("x", "0", "-1", "1.5"), "held": ("maybe", "0"), "state": ("odd",), "stat": ("done",), "id": ("bad",)}
        for name, value in [(name, value) for name, values in wrong.items() for value in values]:
            self.assertRegex(self.refused(400, f"/api/tasks?{name}={urllib.parse.quote(value)}"), f"^'?{name}'? is .*(; give |no parameter)")
        for path in ("/api/state?held=1", "/api/task?id=bad&x=1", "/metrics?type=x", "/api/tasks?type=x&type=y"):
            self.refused(400, path)
        for odd in ({"stat": "done"}, {"held": "maybe"}, {"held": False}, {"limit": 1}):
            self.assertIn(next(iter(odd)), self.refused(400, "/api/do", {"verb": "remove", "type": "echo", **odd}))
        self.assertEqual(queue.count(), 5)

    def test_of_a_held_task_it_tells_whom_it_waits_for_failed_ones_first(self):
        queue = self.some()
        more = [queue.add_task("echo", task_id=f"a{n}", due_date=timedelta(days=1)) for n in range(30)]
        queue.update("follows", after=more)
        self.serve()
        (task,) = self.told("/api/tasks?held=1")["tasks"]
        self.assertEqual((task["id"], task["after"]["count"], len(task["after"]["tasks"])), ("follows", 31, 5))
        self.assertEqual(self.told("/api/task?id=follows")["after"]["tasks"][0], {"id": "bad", "state": "failed"})
        self.assertEqual(self.told("/api/task?id=bad")["followed_by"], {"count": 1, "tasks": [{"id": "follows", "state": "waiting"}]})
        task = self.told("/api/task?id=bad")
        self.assertIn("Traceback", task["error"])
        self.assertEqual(self.told("/api/tasks?state=failed")["tasks"][0]["error"], task["error"].partition("\n")[0])
        self.assertEqual(json.loads(self.told("/api/task?id=good")["result"]), [1])

    # ---- What it does

    def test_each_verb_does_what_it_says_as_another_process_sees(self):
        queue = self.some()
        self.serve()
        self.assertEqual(self.do("retry", ids=["bad"], state="failed"), 1)
        self.assertEqual(queue.find_one(task_id="bad").state, "waiting")
        self.assertEqual(self.do("retry", ids=["bad"], state="failed"), 0)
        self.assertEqual(self.do("now", ids=["follows"]), 1)
        self.assertEqual((queue.find_one(task_id="follows").held, queue.count(due=True)), (False, 2))
        self.assertEqual(self.do("remove", ids=["follows", "later", "good"], state="waiting"), 2)
        self.assertEqual(queue.count(task_id=["follows", "later", "good"]), 1)
        self.assertEqual(self.do("remove", state="done"), 1)
        self.assertEqual(self.do("pause", type="fail"), 1)
        self.assertEqual(self.do("limit", type="fail", at_once=3, rate=[5, 2]), 1)
        (kind,) = (kind for kind in queue.types() if kind["task_type"] == "fail")
        self.assertEqual((kind["paused"], kind["at_once"], kind["rate"]), (True, 3, (5, 2.0)))
        self.do("limit", type="fail", at_once=None)
        self.do("resume", type="fail")
        (kind,) = (kind for kind in queue.types() if kind["task_type"] == "fail")
        self.assertEqual((kind["paused"], kind["at_once"], kind["rate"]), (False, None, (5, 2.0)))
        self.assertEqual(self.do("cancel", ids=["ticks", "nobody"]), 1)
        for status, text, wish in (
            (409, "ticks", {"verb": "now", "ids": ["ticks"]}), (409, "at_once", {"verb": "limit", "type": "x", "at_once": 0}),
            (409, "limit()", {"verb": "limit", "type": "x"}), (409, "task_type", {"verb": "pause"}), (409, "give ids", {"verb": "remove"}),
            (409, "state", {"verb": "remove", "state": "odd"}), (409, "str", {"verb": "retry", "ids": [1]}), (400, "verb", {"verb": "add"}),
            (400, "verb", {"verb": "__init__", "type": "x"}),
        ):
            self.assertIn(text, self.refused(status, "/api/do", wish))
        self.assertEqual([task.id for task in queue.find()], ["bad"])

    def test_who_is_removed_with_those_that_it_follows_does_not_fail(self):
        """However many go at once, and whichever is the older one."""
        queue = self.queue()
        queue.add_task("merge", task_id="merge", after=queue.add_task("part"))
        queue.update("merge", after=queue.add_tasks({"task_type": "part"} for _ in range(150)))
        queue.add_task("last", after="merge")
        self.serve()
        self.assertEqual((self.do("remove", state="waiting"), queue.find()), (153, []))

    def test_all_of_a_filter_goes_in_parts_and_spares_what_comes_meanwhile(self):
        sizes = []

        class Counting(SQLiteStore):
            def remove(self, query, now):
                sizes.append(len(query.ids))
                time.sleep(0.001 * len(query.ids))  # A slow machine, of which a cluster is to have its share.
                super().add([(row("new" + str(len(sizes)), now=now), "raise")], now)
                return super().remove(query, now)

            def retry(self, query, now):
                done = super().retry(query, now)
                self._change(lambda: self._run("UPDATE taskpool_task SET state = 'failed', ended_at = ? WHERE state = 'ready' AND id NOT LIKE 'new%'", (now,)))  # They fail again at once.
                return done

        queue = TaskQueue(Counting(self.folder / "tasks.db"))
        self.addCleanup(queue.close)
        queue.add_tasks({"task_type": "x"} for _ in range(2500))
        page = taskpool._Page("x", queue, self.TOKEN, False)

        def count(**wish):
            status, _, text = page.answer("POST", "/api/do", f"Bearer {self.TOKEN}", json.dumps(wish).encode())
            return status, json.loads(text)["count"]

        self.assertEqual(count(verb="remove", state="waiting", type="x"), (200, 2500))
        self.assertEqual((sum(sizes), queue.count()), (2500, len(sizes)))
        self.assertLessEqual(max(sizes), 100)  # About 20 ms each, once it is seen how slow it is.
        queue.add_tasks({"task_type": "x"} for _ in range(1500))
        self.sql("UPDATE taskpool_task SET state = 'failed', ended_at = 5 WHERE id NOT LIKE 'new%'")
        self.assertEqual(count(verb="retry", state="failed"), (200, 1500))
        for store in page.stores:
            store.close()

    def test_read_only_changes_nothing_and_so_does_looking(self):
        self.some()
        self.serve("tasks.db", "--read-only")
        before = self.dump()
        for verb in ("retry", "remove", "cancel", "now", "pause", "resume", "limit"):
            self.assertIn("--read-only", self.refused(403, "/api/do", {"verb": verb, "ids": ["bad"], "type": "fail", "at_once": 1}))
        self.assertTrue(self.told("/api/state")["read_only"])
        for path in ("/", *self.PATHS):
            self.ask(path)
        self.assertEqual(self.dump(), before)

    # ---- Load and faults

    def test_it_is_found_once_for_all_who_ask_and_rarely(self):
        now, calls, go = [0.0], [], threading.Event()

        def find():
            calls.append(threading.current_thread())
            now[0] += 1.0  # So long does it take.
            if len(calls) == 2:
                go.wait(PATIENCE)
            if len(calls) == 4:
                raise OSError("away\nfor long")
            return len(calls)

        with mock.patch.object(taskpool, "time", SimpleNamespace(monotonic=lambda: now[0], time_ns=time.time_ns)):
            shared = taskpool._Shared(find)
            with concurrent.futures.ThreadPoolExecutor(10) as pool:
                self.assertEqual({it[0] for it in pool.map(lambda _: shared.get(), range(20))}, {1})
            now[0] += 18.9
            self.assertEqual((shared.get()[::2], len(calls)), ((1, 1.0), 1))
            now[0] += 0.2  # 5 % of the time: who asks now has the old answer, at once.
            self.assertEqual({shared.get()[0] for _ in range(5)}, {1})
            go.set()
            eventually(lambda: shared.get()[0] == 2)
            self.assertIsNot(calls[1], threading.current_thread())
            now[0] += 60.0  # Nobody has asked for long: the old answer is too old.
            self.assertEqual((shared.get()[0], len(calls)), (3, 3))
            now[0] += 60.0
            for _ in range(3):
                with self.assertRaisesRegex(StoreError, "away"):
                    shared.get()
            now[0] += 1.0
            self.assertEqual((shared.get()[0], len(calls)), (5, 5))

    @unittest.skipIf(os.name == "nt", "sends SIGINT")
    def test_idle_connections_hold_up_neither_answers_nor_the_end(self):
        self.some()
        process = self.serve()
        with contextlib.ExitStack() as stack:
            for number in range(11):
                end = stack.enter_context(socket.create_connection(("127.0.0.1", self.port)))
                end.sendall(b"POST /api/do HTTP/1.1\r\nContent-Length: 9\r\n\r\n{" if number == 10 else b"")
            self.assertEqual(self.ask("/api/state")[0], 200)
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.communicate(timeout=PATIENCE), ("", ""))
        self.assertEqual(process.returncode, 0)

    def test_a_flood_of_idle_connections_takes_few_threads_and_shuts_nobody_out(self):
        page = taskpool._Page("x", self.some(), self.TOKEN, True)
        with mock.patch.object(taskpool, "SOCKET_SECONDS", 1000.0):
            server = taskpool._page_server(page, socket.AF_INET, ("127.0.0.1", 0))
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(server), thread.start(), stack.callback(server.shutdown)
            before = threading.active_count()
            for number in range(500):
                end = stack.enter_context(socket.create_connection(("127.0.0.1", self.port)))
                end.sendall(b"POST /api/do HTTP/1.1\r\nContent-Length: 9\r\n\r\n"[:number % 50])
                if number % 100 == 99:
                    self.assertEqual(self.ask("/api/state")[0], 200)
            eventually(lambda: threading.active_count() <= before + taskpool.STRANGERS)  # One for each socket.
            self.assertEqual(self.ask("/api/state")[0], 200)
        for store in page.stores:
            store.close()

    def test_a_silent_connection_is_closed_and_the_end_waits_for_none(self):
        page = taskpool._Page("x", self.queue(), self.TOKEN, True)
        for seconds in (0.1, 1000.0):
            with mock.patch.object(taskpool, "SOCKET_SECONDS", seconds):
                server = taskpool._page_server(page, socket.AF_INET, ("127.0.0.1", 0))
            with socket.create_connection(server.server_address, PATIENCE) as end, server:
                thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
                thread.start()
                if seconds < 1:
                    self.assertEqual(end.recv(1), b"")
                else:
                    with socket.create_connection(server.server_address, PATIENCE) as other:
                        other.sendall(b"GET / HTTP/1.0\r\n\r\n")
                        self.assertEqual(other.recv(8), b"HTTP/1.0")
                server.shutdown()
            thread.join()

    def test_a_file_that_is_away_is_told_in_one_line_and_may_come_back(self):
        self.some()
        process = self.serve()
        self.told("/api/state")
        shutil.move(self.folder / "tasks.db", self.folder / "moved.db")
        for path, body in (("/api/tasks?state=failed", None), ("/api/do", {"verb": "retry", "ids": ["bad"]})):
            self.assertIn("no such file", self.refused(503, path, body))
        eventually(lambda: self.ask("/api/state")[0] == 503)
        self.assertFalse((self.folder / "tasks.db").exists())
        shutil.move(self.folder / "moved.db", self.folder / "tasks.db")
        eventually(lambda: self.ask("/api/state")[0] == 200)
        self.assertEqual(self.do("retry", state="failed"), 1)
        shutil.move(self.folder / "tasks.db", self.folder / "moved.db")
        eventually(lambda: self.ask("/api/state")[0] == 503)
        process.send_signal(signal.SIGINT)
        self.assertEqual((*process.communicate(timeout=PATIENCE), process.returncode), ("", "", 0))

    def test_a_wrong_target_is_told_in_one_line(self):
        (self.folder / "text.db").write_text("no database, but long enough to be looked at" * 20)
        self.script("queue = 5\nraise_here = None", "wrong.py")
        for target, text in (
            ("none.db", "no such file"), ("text.db", "not a database"), (".", " is a folder"), ("wrong:queue", "a TaskQueue"),
            ("wrong:nothing", "nothing"), ("no_such_module:queue", "no_such_module"), ("C:\\tasks.db", "no such file"),
        ):
            code, out, err = TestOperators.main(self, "web", target)
            self.assertEqual((code, out, err.count("\n")), (1, "", 1), err)
            self.assertIn(text, err)

    def test_it_shows_any_store(self):
        """MODULE:NAME; here a store that has the fewest primitives, and one that fails now and then."""
        self.script("""
            import taskpool
            from taskpool import TaskQueue

            class Bare(taskpool.Store):
                def __init__(self):
                    self.memory = taskpool.MemoryStore()
                def transaction(self):
                    return self.memory.transaction()
                def rows(self, query, now):
                    if "away" in (query.types or ()):
                        raise RuntimeError("the store\\nis away")
                    return self.memory.rows(query, now)
                def write(self, old, new):
                    return self.memory.write(old, new)

            queue = TaskQueue(Bare())
            queue.add_tasks({"task_type": "x", "task_id": str(n)} for n in range(5))
        """, "bare.py")
        self.serve("bare:queue")
        self.assertEqual(self.told("/api/state")["types"][0]["waiting"], 5)
        got = self.told("/api/tasks?state=waiting&limit=3")
        self.assertEqual([task["id"] for task in got["tasks"]], ["4", "3", "2"])
        got = self.told("/api/tasks?state=waiting&limit=3&" + urllib.parse.urlencode({"before": got["before"]}))
        self.assertEqual([task["id"] for task in got["tasks"]], ["1", "0"])
        self.assertEqual((self.do("remove", ids=["4", "2"]), self.do("remove", type="x")), (2, 3))
        self.assertIn("pauses and limits need", self.refused(503, "/api/do", {"verb": "pause", "type": "x"}))
        self.assertIn("is away", self.refused(503, "/api/tasks?type=away"))


try:
    import playwright.sync_api as playwright
except ImportError:
    playwright = None
CHROMIUM = shutil.which("chromium")


def show_progress_and_hold(job):
    job.progress(61, 100, HOSTILE[0])
    hold(job)


@unittest.skipUnless(playwright and CHROMIUM, "needs a browser: apt-get install chromium && pip install playwright")
class TestPageInABrowser(InFolder):
    """python taskpool.py web FILE, for people. At the end of each test: no complaint of the browser, no word to another host."""

    # Elements with text of their own whose contrast is under 4.5, with that.
    PALE = """() => {
        const shine = color => color.match(/[\\d.]+/g).map(Number), light = c => {
            const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b;
        };
        const behind = e => { const c = shine(getComputedStyle(e).backgroundColor);
            return c.length < 4 || c[3] ? c : e.parentElement ? behind(e.parentElement) : [255, 255, 255]; };
        return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility({visibilityProperty: true}) &&
            [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
                const [a, b] = [light(shine(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => b - a);
                return [e.textContent, (a + .05) / (b + .05)]; }).filter(pair => pair[1] < 4.5);
    }"""

    OUTSIDE = """() => [...document.querySelectorAll("button, select, input")].filter(e => {
        const {left, right, width} = e.getBoundingClientRect();
        return width && (left < 0 || right > innerWidth); }).map(e => e.textContent)"""

    @classmethod
    def setUpClass(cls):
        driver = playwright.sync_playwright().start()
        cls.addClassCleanup(driver.stop)
        cls.browser = driver.chromium.launch(executable_path=CHROMIUM)
        cls.addClassCleanup(cls.browser.close)

    def serve(self, *options, port=0, token=""):
        """Start the server of the page. Returns its address."""
        command = (HERE / "taskpool.py", "web", "tasks.db", "--port", port, *options)
        self.server = self.start(*command, env={"TASKPOOL_TOKEN": token})
        return self.server.stdout.readline().strip().replace("$TASKPOOL_TOKEN", token.replace(" ", "%20"))

    def look(self, address=None, complaints="(?!)", **options):
        """A page of the browser; *complaints*: those of the browser that the test expects."""
        address, said, hosts, self.questions, self.yes = address or self.serve(), [], set(), [], False
        context = self.browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(1000 * PATIENCE)
        shot = f"{self._testMethodName}-{len(self.browser.contexts)}.png"
        page = context.new_page()
        page.on("console", lambda it: it.type not in ("error", "warning") or re.search(complaints, it.text) or said.append(it.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (self.questions.append(dialog.message), self.reply(dialog)))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))

        def end():
            folder = os.environ.get("TASKPOOL_SCREENSHOTS")
            if folder:
                page.screenshot(path=os.path.join(folder, shot), full_page=True)
            context.close()
            self.assertEqual((said + self.questions, hosts), ([], {address.split("/")[2]}))

        self.addCleanup(end)
        page.goto(address)
        return page

    def reply(self, dialog):
        """self.yes: whether the answer is yes, or the texts that are typed, one for each question."""
        if isinstance(self.yes, list):
            dialog.accept(self.yes.pop(0)) if self.yes else dialog.dismiss()
        else:
            dialog.accept() if self.yes else dialog.dismiss()

    @staticmethod
    def row(page, text):
        return page.locator("li").filter(has=page.get_by_text(text, exact=True))

    def press(self, page, button, row=None, asks=None, yes=True):
        """Press a button, that of the row of this text, and answer what it asks."""
        self.yes = yes
        (page if row is None else self.row(page, row)).get_by_role("button", name=re.compile(button)).first.click()
        self.asked(asks)

    def asked(self, question):
        """It was that, or nothing."""
        self.assertRegex("\n".join(self.questions), rf"\A{question or ''}\Z")
        self.questions.clear()

    def failed(self, queue, count, name="bad"):
        queue.add_tasks({"task_type": "fail", "task_id": f"{name}{number}"} for number in range(count))
        queue.run_due({"fail": fail})

    def states(self, queue):
        return {task.id: task.state for task in queue.find()}

    def sees(self, queue, states):
        """What another process finds is what is to be, soon."""
        eventually(lambda: self.states(queue) == states, f"{states}, not {self.states(queue)},")

    def test_each_button_for_one_task_does_what_it_says(self):
        queue = self.queue()
        self.failed(queue, 3)
        queue.add_task("echo", task_id="later", due_date=timedelta(days=9))
        queue.add_task("echo", task_id="held", after="bad2")
        queue.add_task("echo", task_id="daily", repeat=timedelta(days=1), due_date=timedelta(days=1))
        queue.add_task("fail", task_id="again", retries=1, retry_delay=1800)
        queue.run_due({"fail": fail})
        states, page = self.states(queue), self.look()
        self.press(page, "^retry$", "bad0")
        self.sees(queue, {**states, "bad0": "waiting"})
        self.press(page, "^remove$", "bad1")
        del states["bad1"]
        self.sees(queue, {**states, "bad0": "waiting"})
        for tab, task_id in (("waiting", "later"), ("held", "held"), ("schedules", "daily")):
            self.press(page, f"^{tab}")
            if tab == "waiting":
                eventually(lambda: re.search(r"again in (30|29) min", page.inner_text("#tasks")))
            self.assertEqual(queue.count(task_id=task_id, due=True), 0)
            self.press(page, "^now$", task_id)
            eventually(lambda i=task_id: queue.count(task_id=i, due=True), f"{task_id} is due")
        self.press(page, "^remove$", "daily")
        del states["daily"]
        self.sees(queue, {**states, "bad0": "waiting"})

    def test_each_button_for_many_tasks_names_how_many_and_takes_those(self):
        queue = self.queue()
        self.failed(queue, 60)
        queue.add_tasks({"task_type": "echo", "task_id": f"new{number}"} for number in range(12_000))
        page = self.look()
        self.press(page, "^retry shown$")
        eventually(lambda: queue.count(state="failed") == 10)
        self.press(page, "^retry all 10$")
        eventually(lambda: not queue.count(state="failed"))
        self.press(page, "^waiting")
        page.get_by_label("type").select_option("fail")
        self.row(page, "bad59").wait_for()
        page.get_by_label("type").evaluate(  # Who is too quick gets the list that is on its way.
            "it => { it.value = 'echo'; it.onchange(); document.getElementById('older').click(); }")
        self.row(page, "new11999").wait_for()
        self.press(page, "^older$")
        self.row(page, "new11949").wait_for()  # The newest come first, 50 at once.
        self.press(page, "^remove shown$", asks=r"remove 50 waiting\?", yes=False)
        self.press(page, "^remove shown$", asks=r"remove 50 waiting\?")
        eventually(lambda: queue.count() == 60 + 12_000 - 50)
        self.assertTrue(queue.find_one(task_id="new11950") and not queue.find_one(task_id="new11949"))
        self.press(page, "^remove all 11,950$", asks=r"remove all 11,950 waiting echo\?")
        eventually(lambda: queue.count() == 60)
        self.assertEqual(queue.count(task_type="fail", state="waiting"), 60)

    def test_a_run_is_shown_with_its_progress_and_cancelled(self):
        queue, flag = self.queue(), str(self.folder / "flag")
        with self.cluster({"hold": show_progress_and_hold}, queue):
            queue.add_task("hold", flag, task_id="long", retries=9)
            worker, page = begun(flag), self.look()
            self.row(page, "long").get_by_text(f"61 % \u00b7 {HOSTILE[0]} \u00b7 pid {os.getpid()}").wait_for()
            self.press(page, "^cancel$", "long", asks=r"cancel long\?", yes=False)
            self.assertTrue(is_alive(worker))
            self.press(page, "^cancel$", "long", asks=r"cancel long\?")
            self.sees(queue, {})
            eventually(lambda: not is_alive(worker))

    def test_a_type_is_paused_and_resumed_and_its_limits_are_shown(self):
        queue = self.queue()
        queue.add_task("echo")
        queue.limit("echo", at_once=3, rate=(10, 2.5))
        page = self.look()
        self.row(page, "echo").get_by_text("3 at once, 10 per 2.5 s", exact=True).wait_for()
        for button, is_paused in (("pause", True), ("resume", False)):
            self.press(page, f"^{button}$", "echo")
            eventually(lambda is_paused=is_paused: queue.types()[0]["paused"] is is_paused)
        self.assertEqual((queue.types()[0]["at_once"], queue.types()[0]["rate"]), (3, (10, 2.5)))

    def test_the_limits_of_a_type_are_set_and_a_wrong_one_is_told(self):
        queue, evil = self.queue(), HOSTILE[0] + HOSTILE[2]
        queue.add_task(evil)
        queue.limit(evil, at_once=3)
        page = self.look(complaints="409", viewport={"width": 320, "height": 640})
        shown = evil.replace("\u202e", r"\u202e")
        at_once, rate = (f"{shown}: how many {what}, or none" for what in ("run at once: N", "start in how many seconds: N/SECONDS"))

        def limits():
            return tuple(queue.types()[0][name] for name in ("at_once", "rate"))

        button = self.row(page, shown).get_by_role("button", name="limit")
        for answers, expected in ((["4", "10/2.5"], (4, (10, 2.5))), ([" 5 ", "none"], (5, None)), (["none", "1/60"], (None, (1, 60.0)))):
            button.focus()
            self.yes = [*answers]
            page.keyboard.press("Enter")
            eventually(lambda expected=expected: limits() == expected)
            self.asked(re.escape(f"{at_once}\n{rate}"))
            page.get_by_text(f"limit {shown}: done", exact=True).wait_for()
        self.row(page, shown).get_by_text("1 per 60 s", exact=True).wait_for()
        for answers, words in ((["0", "none"], "at_once is 0"), (["x", "none"], "at_once is 'x'"), (["1e999", "none"], "at_once is '1e999'"),
                               (["none", "5"], "rate is 5"), (["none", ""], "rate"), (["none", "none/5"], "rate"), (["none", "5/0"], "rate[1] is 0")):
            self.press(page, "^limit$", shown, asks=re.escape(f"{at_once}\n{rate}"), yes=[*answers])
            page.locator("#said").filter(has_text=words).wait_for()
        self.press(page, "^limit$", shown, asks=re.escape(at_once), yes=[])  # Who goes back changes nothing.
        self.assertEqual(limits(), (None, (1, 60.0)))

    def test_what_tasks_say_is_text_and_nothing_else(self):
        queue = self.queue()

        def fail_as_told(job):
            raise ValueError(job.data["say"])

        for text in HOSTILE:
            queue.add_task(text, {"say": text}, task_id=text)
            queue.add_task(text, {"say": text}, task_id="held" + text, after=text)
        queue.run_due(dict.fromkeys(HOSTILE, fail_as_told))
        page = self.look()
        for text in HOSTILE:
            shown = re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202e]", lambda match: f"\\u{ord(match[0]):04x}", text)
            with self.subTest(shown):
                row = self.row(page, shown).filter(has=page.get_by_role("button", name="retry"))
                self.assertEqual([row.locator(".row > *").nth(i).text_content() for i in (0, 1)], [shown, shown])
                row.get_by_role("button").first.click()
                error, data = (row.locator(f"dt:text-is('{name}') + dd").text_content() for name in ("error", "data"))
                self.assertIn(f"ValueError: {shown}\n", error + "\n")
                self.assertEqual(json.loads(data), {"say": text})
                row.get_by_role("button", name="retry").click()
                eventually(lambda text=text: queue.count(task_id=text, state="waiting"))
                self.row(page, shown).get_by_role("button", name="pause").click()
                eventually(lambda text=text: any(kind["paused"] for kind in queue.types() if kind["task_type"] == text))
        made = page.evaluate("() => [...document.querySelectorAll('script, img, iframe, a, object, svg')].map(e => e.tagName)")
        self.assertEqual(made, ["SCRIPT"])

    def test_a_refresh_moves_nothing_under_the_hand(self):
        queue = self.queue()
        self.failed(queue, 40)
        page = self.look(viewport={"width": 1000, "height": 500})
        self.row(page, "bad20").get_by_role("button").first.click()
        page.get_by_text("attempt 1").first.wait_for()
        page.evaluate("getSelection().selectAllChildren(document.querySelector('#tasks dd'))")
        button = self.row(page, "bad10").get_by_role("button", name="remove")
        button.focus()
        page.mouse.move(0, 0)

        def view():
            return (page.evaluate("[document.activeElement.closest('li')?.dataset.name, scrollX, scrollY, String(getSelection())]"),
                    button.bounding_box(), page.get_by_text("attempt 1").first.is_visible())

        before = view()
        self.assertTrue(before[0][3])
        self.assertGreater(before[0][2], 0)
        self.failed(queue, 5, "new")
        queue.remove(task_id="bad9")
        page.get_by_role("button", name=re.compile("failed 44")).wait_for()
        self.assertEqual(view(), before)
        self.press(page, "^retry shown$")  # And not those that only wait to be shown.
        eventually(lambda: queue.count(state="waiting") == 39)
        self.assertEqual({task.id for task in queue.find(state="failed")}, {f"new{number}" for number in range(5)})
        many = page.get_by_role("button", name=re.compile("^retry all"))
        many.focus()
        self.failed(queue, 1, "last")
        page.get_by_role("button", name="retry all 45").wait_for()
        self.assertEqual(page.evaluate("document.activeElement.textContent"), "retry all 45")
        self.row(page, "fail").get_by_role("button", name="pause").first.focus()
        queue.add_tasks([{"task_type": "a"}, {"task_type": "z"}])
        self.row(page, "z").wait_for()
        self.assertEqual(page.evaluate("document.activeElement.closest('li').dataset.name"), "fail")
        row = self.row(page, "new0")  # What has gone stays for who reads in it, and no longer.
        row.get_by_role("button").first.click()
        queue.remove(task_id="new0")
        page.get_by_role("button", name="failed 44").wait_for()
        row.locator("dd").first.wait_for()
        row.get_by_role("button").first.click()
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        row.wait_for(state="hidden")

    def test_all_of_it_works_by_keys_alone(self):
        queue = self.queue()
        self.failed(queue, 12)
        page = self.look()
        self.row(page, "bad6").get_by_role("button").first.focus()

        def go_to(text, row=None, key="Tab", most=60):
            """Press Tab until the focus is there, and is seen."""
            for _ in range(most):
                page.keyboard.press(key)
                found = page.evaluate("(e => [e.matches('body') || e.textContent, e.closest('li')?.dataset.name,"
                                      " getComputedStyle(e).outlineStyle])(document.activeElement)")  # fmt: skip
                if found[0] is not True and re.search(text, found[0]) and row in (None, found[1]):
                    self.assertNotEqual(found[2], "none")
                    return
            self.fail(f"the key {key} does not get to {text} {row}")

        for task_id in ("bad5", "bad4"):  # In the midst of the list: the next ones are near then.
            go_to("^retry$", task_id, most=12)
            page.keyboard.press("Enter")
            self.row(page, task_id).wait_for(state="hidden")
        self.assertEqual({task.id for task in queue.find(state="waiting")}, {"bad4", "bad5"})
        go_to("bad3", most=4)
        page.keyboard.press("Space")
        page.locator("#tasks dd").first.wait_for()
        self.yes = True
        page.get_by_role("button", name="remove all 10").wait_for()
        go_to("^remove all 10$", key="Shift+Tab")
        page.keyboard.press("Enter")
        self.asked(r"remove all 10 failed ?\?")
        self.sees(queue, {"bad4": "waiting", "bad5": "waiting"})

    def test_it_can_be_read_in_light_and_dark_and_on_a_narrow_screen(self):
        queue, backs = self.queue(), set()
        self.failed(queue, 3, "long-name-" * 15)
        queue.add_tasks({"task_type": name, "data": list(HOSTILE)} for name in ("long-type-" * 10, *HOSTILE))
        queue.add_task("echo", [*HOSTILE], task_id="new")
        queue.add_task("fail", after=queue.find_one(state="failed"), task_id="held")
        queue.pause("fail")
        queue.limit("fail", at_once=1000, rate=(1000, 60))
        address = self.serve()
        for scheme, width in (("light", 1280), ("dark", 1280), ("light", 320), ("dark", 320)):
            page = self.look(address, color_scheme=scheme, viewport={"width": width, "height": 640})
            for tab, task_id in (("failed", "long-name-" * 15 + "0"), ("held", "held"), ("done", ""), ("waiting", "new")):
                with self.subTest(scheme=scheme, width=width, tab=tab):
                    self.press(page, f"^{tab} ")
                    if task_id:
                        self.row(page, task_id).get_by_role("button").first.click()
                        page.locator("#tasks dd").first.wait_for()
                    else:
                        page.get_by_text("none", exact=True).wait_for()
                    self.assertEqual(page.evaluate(self.PALE), [])
                    self.assertLessEqual(page.evaluate("document.documentElement.scrollWidth"), width)
                    self.assertEqual(page.evaluate(self.OUTSIDE), [])
            backs.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        self.assertEqual(len(backs), 2)

    def test_an_empty_queue_says_so(self):
        self.queue().count()
        page = self.look()
        page.get_by_text("no tasks yet").wait_for()
        self.assertIn("0 tasks", page.locator("header").inner_text())

    def test_it_tells_that_the_server_is_gone_and_goes_on_with_the_next(self):
        queue, token = self.queue(), "a token of one's own"
        queue.add_task("echo", task_id="old")
        address = self.serve(token=token)
        page = self.look(address, "ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE")
        self.press(page, "^waiting")
        self.row(page, "old").wait_for()
        self.server.kill()
        page.get_by_role("status").filter(has_text="no answer").wait_for()
        self.assertTrue(self.row(page, "old").is_visible())
        queue.add_task("echo", task_id="new")
        self.serve(token=token, port=re.search(r":(\d+)/", address)[1])
        self.row(page, "new").wait_for()
        page.get_by_role("status").filter(has_text="counted").wait_for()

    def test_the_token_is_asked_for_and_not_left_in_the_address(self):
        self.queue().add_task("echo", task_id="secret")
        address, _, token = self.serve().partition("#")
        page = self.look(address, "401")
        field = page.get_by_label("token")
        field.fill("x" * len(token))
        page.keyboard.press("Enter")
        page.get_by_role("status").filter(has_text="the token is missing or wrong").wait_for()
        self.assertNotIn("secret", page.content())
        field.fill(token)
        page.keyboard.press("Enter")
        self.press(page, "^waiting")
        self.row(page, "secret").wait_for()
        page.reload()  # The tab of the browser remembers it.
        self.press(page, "^waiting")
        self.row(page, "secret").wait_for()
        self.assertEqual(page.url, address)

    def test_read_only_it_has_nothing_to_press_that_changes_anything(self):
        queue = self.queue()
        self.failed(queue, 1)
        page = self.look(self.serve("--read-only"))
        for tab in ("schedules", "waiting", "failed"):
            self.press(page, f"^{tab} ")
        self.row(page, "bad0").wait_for()
        verbs = "^(retry|remove|cancel|now|pause|resume|limit|set)"
        self.assertEqual([button.text_content() for button in page.get_by_role("button", name=re.compile(verbs)).all()], [])


class TestReadme(InFolder):
    """Every block of the manual is run; every output in it is real."""

    TEXT = (HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else ""

    BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)

    # A block that begins with `# name.py` is a file of that name, which others may import.
    FILES = {match[1]: program for program in BLOCKS for match in [re.match(r"# (\w+\.py)\n", program)] if match}

    PACKAGES = {"flask": "flask", "sqlalchemy": "sqlalchemy", "django": "'django>=5.1'", "pytest": "pytest"}

    def run_block(self, number):
        """The block as a program in a folder of its own; one that imports pytest is run by that."""
        folder, program = self.folder / f"block{number}", self.BLOCKS[number]
        folder.mkdir()
        for name, text in {**self.FILES, "example.py": program}.items():
            (folder / name).write_text(text, encoding="utf-8")
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if "import pytest" in program else []
        command = ["-X", "dev", *command, "example.py"]
        environment = {**os.environ, "PYTHONPATH": str(HERE), "SHOP_TASKS": str(folder / "tasks.db")}
        return subprocess.run(
            [sys.executable, *command], cwd=folder, text=True, capture_output=True, env=environment, timeout=2 * PATIENCE
        )

    def check_blocks(self, package):
        """The blocks that import *package*; None: none of PACKAGES."""
        needs = re.compile(rf"^(?:import|from) ({'|'.join(self.PACKAGES)})\b", re.M)
        found = {n: needs.search(program) for n, program in enumerate(self.BLOCKS)}
        numbers = [n for n, match in found.items() if (match and match[1]) == package]
        self.assertGreater(len(numbers), 0)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:  # They wait much.
            for number, done in zip(numbers, pool.map(self.run_block, numbers)):
                program = self.BLOCKS[number]
                with self.subTest(block=number, starts=program[:60]):
                    self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
                    if package != "pytest":
                        self.assertEqual(done.stdout, "".join(re.findall(r"# -> (.*\n)", program)))
                    # Such as ResourceWarning, with -X dev. Of a spawned __main__, Python 3.15 gives one of its own.
                    self.assertNotIn("Warning", done.stderr.replace("DeprecationWarning: Module globals is missing a __spec__", ""))

    def test_every_python_block_runs_and_prints_what_the_manual_says(self):
        self.check_blocks(None)

    def test_recipes_that_need_other_packages_run_too(self):
        for package, name in self.PACKAGES.items():
            with self.subTest(package):
                if importlib.util.find_spec(package) is None:
                    self.skipTest(f"{package} is not here: python -m pip install {name}")
                self.check_blocks(package)

    @unittest.skipIf(os.name == "nt", "sends SIGTERM")
    def test_recipes_layout_the_service_runs_what_the_web_application_adds(self):
        if importlib.util.find_spec("flask") is None:
            self.skipTest("flask is not here: python -m pip install flask")
        for name, program in self.FILES.items():
            (self.folder / name).write_text(program, encoding="utf-8")
        command = re.search(r"^ExecStart=\S*python taskpool.py (.*)$", self.TEXT, re.M)[1].split()
        environment = {**os.environ, "PYTHONPATH": str(HERE), "SHOP_TASKS": str(self.folder / "tasks.db")}
        adds = "from app import app; print(app.test_client().post('/signup/ann').status)"
        done = subprocess.run([sys.executable, "-c", adds], cwd=self.folder, env=environment, capture_output=True, text=True)
        self.assertEqual(done.stdout, "202 ACCEPTED\n", done.stderr)
        service = self.start(HERE / "taskpool.py", *command, env=environment)
        with TaskQueue(self.folder / "tasks.db") as queue:
            eventually(lambda: queue.count(state="done"))
            self.assertEqual(queue.find_one(state="done").result, "hello, ann")
            self.assertEqual([task.id for task in queue.find(state="waiting")], ["schedule:report"])
        service.send_signal(signal.SIGTERM)
        _, log = service.communicate(timeout=PATIENCE)
        self.assertEqual(service.returncode, 0, log)
        self.assertIn("mail to ann", log)

    def test_every_command_prints_what_the_manual_says(self):
        """A console block is run in the folder of the program before it."""
        blocks = re.findall(r"```python\n((?:(?!```).)*?)```(?:(?!```).)*```console\n(.*?)```", self.TEXT, re.S)
        self.assertGreater(len(blocks), 0)
        environment = {**os.environ, "PYTHONPATH": str(HERE), "COLUMNS": "200"}
        for program, console in blocks:
            command = [sys.executable, str(self.script(program))]
            subprocess.run(command, cwd=self.folder, env=environment, check=True, stdout=subprocess.DEVNULL)
            for part in console.split("$ python ")[1:]:
                line, _, expected = part.partition("\n")
                command = shlex.split(line)
                self.assertEqual(command[0], "taskpool.py")
                done = subprocess.run(
                    [sys.executable, "-X", "dev", str(HERE / "taskpool.py"), *command[1:]], cwd=self.folder,
                    env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE,
                )
                self.assertEqual(self.timeless(done.stdout), self.timeless(expected), line)

    @staticmethod
    def timeless(text):
        """Without what differs from run to run: instants, durations, and how wide they are."""
        text = re.sub(r"\d{4}-\d\d-\d\d[ T][\d:.]+\+\d\d:00", "INSTANT", text)
        text = re.sub(r"\b[\d.]+ (ms|s|min|h|d)\b", r"SPAN", text)
        return re.sub(r" +", " ", text)

    def test_the_first_program_is_short_and_the_manual_is_no_book(self):
        self.assertLess(len([line for line in self.BLOCKS[0].splitlines() if line.strip()]), 15)
        self.assertLessEqual(len(self.TEXT.splitlines()), 1000)

    def test_all_links_within_the_manual_lead_somewhere(self):
        headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", self.TEXT, flags=re.S), re.M)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        self.assertEqual(set(re.findall(r"\]\(#(.*?)\)", self.TEXT)) - anchors, set())

    def test_the_manual_names_every_metric_and_no_other(self):
        section = re.search(r"^### Metrics\n(.*?)^## ", self.TEXT, re.S | re.M)[1]
        self.assertEqual(set(re.findall(r"\btaskpool_(\w+)", section)), set(taskpool._METRICS))

    def test_everything_public_is_in_the_manual(self):
        import inspect

        names = {*taskpool.__all__, *taskpool._FILTERS, *taskpool._ADD_PARAMETERS, "exit_code", "pid", "type_name", "traceback"}
        functions = [Cluster.__init__, SQLiteStore.__init__, taskpool.MongoStore.__init__]
        for public in (TaskQueue, type(TaskQueue().in_memory), Cluster, taskpool.Task, taskpool.Cron):
            verbs = {name: getattr(public, name) for name in dir(public) if name[0] != "_"}
            names |= verbs.keys()
            functions += filter(inspect.isroutine, verbs.values())
        for function in functions:
            names |= set(inspect.signature(function).parameters)
        spans = re.findall(r"`[^`\n]+`", re.sub(r"```.*?```", "", self.TEXT, flags=re.S))
        known = set(re.findall(r"\w+", " ".join(spans)))
        self.assertEqual({name for name in names if name[0] != "_"} - known - {"self", "fn", "iterables", "task"}, set())


# --- Running -------------------------------------------------------------------------


class Result(unittest.TextTestResult):
    """Counts what passed: from Python 3.12.1 on testsRun has no skipped tests."""

    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


def run_here(names, flags):
    """Run the tests whose names match, in this process. Returns (passed, failed, skipped)."""
    runner = unittest.TextTestRunner(verbosity=2 if "-v" in flags else 1, resultclass=Result)
    loader = unittest.TestLoader()
    if names:
        loader.testNamePatterns = [f"*{name}*" for name in names]
    result = runner.run(loader.loadTestsFromModule(sys.modules["__main__"]))
    failed = {id(test) for test, _ in result.failures + result.errors} | set(map(id, result.unexpectedSuccesses))
    return result.passed, len(failed), len(result.skipped)


def run_all(flags):
    """The same for all, each class in a process of its own, two at once for each CPU: they wait much.

    As modules, with a cache of their bytecode: each of some thousand processes that they
    start would compile them again.
    """
    classes = [name for name, value in globals().items() if isinstance(value, type)
               and issubclass(value, unittest.TestCase) and unittest.TestLoader().getTestCaseNames(value)]
    classes.sort(key=lambda name: "Kill" not in name)  # The longest first.

    def run(name):
        started = time.monotonic()
        command = [sys.executable, "-m", "test_taskpool", f".{name}.", *flags]
        done = subprocess.run(command, cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = done.stdout.decode("utf-8", "replace")
        counts = re.search(r"(\d+) passed, (\d+) failed, (\d+) skipped\s*\Z", output)
        passed, failed, skipped = map(int, counts.groups()) if counts else (0, 1, 0)
        failed = failed or int(done.returncode != 0)
        if failed or "-v" in flags:
            print(output, file=sys.stderr)
        result = f"{passed} passed, {failed} failed, {skipped} skipped ({time.monotonic() - started:.0f} s)"
        print(f"{name:<36} {result}", file=sys.stderr)
        return passed, failed, skipped

    with tempfile.TemporaryDirectory(prefix="taskpool-test-") as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        with concurrent.futures.ThreadPoolExecutor(2 * taskpool.Cluster.max_workers()) as pool:
            return [sum(counts) for counts in zip(*pool.map(run, classes))]


def main():
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    flags = [name for name in sys.argv[1:] if name.startswith("-")]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # As in `... &` of a shell script.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    passed, failed, skipped = run_here(names, flags) if names else run_all(flags)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
