"""Tests of taskpool: `python test_taskpool.py [pattern]`. Standard library only.

The classes are the promises of the module's docstring, P1-P8, and what the README says.
Worker processes, kills and files are real. Nothing here asserts a speed.
"""

from __future__ import annotations

import ast
import asyncio
import collections
import concurrent.futures
import contextlib
import doctest
import functools
import json
import logging
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
from concurrent.futures import Future
from datetime import datetime, timedelta, timezone
from pathlib import Path

import taskpool
from taskpool import (
    Cluster,
    DuplicateTask,
    RemoteError,
    SQLiteStore,
    StoreError,
    Task,
    TaskPoolError,
    TaskQueue,
    TaskTimeout,
    WorkerDied,
)
from taskpool import MemoryStore, Outcome, Query, after_add, retry_delay, share  # noqa: F401

HERE = Path(__file__).resolve().parent
PATIENCE = 60.0  # How long something that hangs may take; costs nothing when green.
METHODS = [m for m in ("spawn", "forkserver", "fork") if m in multiprocessing.get_all_start_methods()]
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
    except FileNotFoundError:
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


class Clock:
    """time.time for a TaskQueue, that tests can set."""

    def __init__(self):
        self.offset = 0.0

    def __call__(self):
        return time.time() + self.offset


class InFolder(unittest.TestCase):
    """A test with a folder of its own."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="taskpool-test-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def queue(self, name="tasks.db"):
        queue = TaskQueue(self.folder / name)
        self.addCleanup(queue.close)
        return queue

    def cluster(self, task_map, queue=None, **options):
        options.setdefault("oversubscribe", True)
        options.setdefault("max_available_workers", 2)
        options.setdefault("refresh_rate", 50)
        cluster = Cluster(task_map, queue or self.queue(), **options)
        self.addCleanup(cluster.shutdown, wait=False)
        return cluster

    def script(self, source, name="script.py"):
        path = self.folder / name
        path.write_text(textwrap.dedent(source), encoding="utf-8")
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


def about(job):
    return job.id, job.task_type, job.data, job.priority, job.attempt, job.state, job.in_memory


def add_line(job):
    """Append the task's id and attempt to a file, in one write."""
    fd = os.open(job.data["file"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{job.id} {job.attempt}\n".encode())
    os.close(fd)


def lines_of(path):
    return Path(path).read_text().split("\n")[:-1] if Path(path).exists() else []


def pid_of_worker(job):
    return os.getpid()


def hold(job):
    """Say that the task runs, then run until told to end."""
    Path(job.data + ".started").write_text(str(os.getpid()))
    deadline = time.monotonic() + PATIENCE
    while not os.path.exists(job.data + ".end") and time.monotonic() < deadline:
        time.sleep(0.005)
    return "held"


def fail(job):
    raise ValueError(f"attempt {job.attempt}")


def succeed_at(job):
    if job.attempt < job.data:
        raise ValueError(f"attempt {job.attempt}")
    return job.attempt


def kill_at_first(job):
    add_line(job)
    if job.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def end_badly(job):
    """End in the way that the data name."""
    add_line(job)
    how = job.data["how"]
    if how == "raise":
        raise ValueError("bad")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    time.sleep(PATIENCE)


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


class Exploding:
    def __reduce__(self):
        return (explode, ())


def explode():
    raise RuntimeError("exploded while loading")


class ExitsOnLoad:
    def __reduce__(self):
        return (sys.exit, (4,))


def raise_kind(job):
    kind = job.data
    if kind == "odd":
        raise Odd(1, text="odd")
    if kind == "unprintable":
        raise Unprintable
    if kind == "exit":
        raise SystemExit("disk missing")
    if kind == "exit0":
        sys.exit(0)
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "local":
        class Local(Exception):
            pass

        raise Local("inside")
    if kind == "lock":
        error = ValueError("holds a lock")
        error.lock = threading.Lock()
        raise error
    if kind == "timeout":
        raise TimeoutError("mine")
    if kind == "eof":
        raise EOFError("mine")
    if kind == "huge":
        raise ValueError("x" * 30_000_000)
    if kind == "surrogate":
        raise ValueError("gl\u0101\udcff")
    if kind == "deep":
        return raise_kind(job)
    return None


def return_kind(job):
    return {
        "lambda": lambda: 1,
        "generator": (i for i in range(3)),
        "lock": threading.Lock(),
        "exploding": Exploding(),
        "exits": ExitsOnLoad(),
        "tuple": (1, 2),
        "large": b"x" * 3_000_000,
    }[job.data]


def ping(job, toggle_ipc):
    return toggle_ipc(lambda answer: answer, lambda send: send({"status": 4, "data": job.data}))


def ping_by_position(job, talk):
    return ping(job, talk)


def ping_three_deep(job, toggle_ipc):
    def ask(depth, heard):
        return toggle_ipc(
            lambda answer: ask(depth + 1, heard + [answer]) if depth < 3 else heard + [answer],
            lambda send: send({"status": 4, "data": f"ping {depth}"}),
        )

    return ask(1, [])


def ping_and_wait_inside(job, toggle_ipc):
    def ask(text):
        return toggle_ipc(lambda answer: answer, lambda send: send({"status": 2, "data": text}))

    def on_message(answer):
        return [answer, ask("inner").result(PATIENCE)]

    return toggle_ipc(on_message, lambda send: send({"status": 2, "data": "outer"})).result(PATIENCE)


async def ping_async(job, toggle_ipc):
    answers = [
        asyncio.wrap_future(
            toggle_ipc(lambda answer: answer, lambda send, i=i: send({"status": 2, "data": i}))
        )
        for i in range(3)
    ]
    return await asyncio.gather(*answers)


def ping_later(job, toggle_ipc):
    def initialize(send):
        threading.Timer(0.02, send, [{"status": 2, "data": "late"}]).start()

    return toggle_ipc(lambda answer: answer, initialize)


def ping_status(job, toggle_ipc):
    return toggle_ipc(lambda answer: answer, lambda send: send(job.data))


def ping_twice(job, toggle_ipc):
    def initialize(send):
        send({"status": 2, "data": 1})
        send({"status": 2, "data": 2})

    return toggle_ipc(lambda answer: answer, initialize)


def ping_and_forget(job, toggle_ipc):
    toggle_ipc(lambda answer: answer, lambda send: send({"status": 2, "data": "silence"}))
    return "forgot"


def ping_and_die(job, toggle_ipc):
    toggle_ipc(lambda answer: answer, lambda send: send({"status": 2, "data": "silence"}))
    if job.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return job.attempt


def fail_in_on_message(job, toggle_ipc):
    def on_message(answer):
        raise LookupError(answer)

    return toggle_ipc(on_message, lambda send: send({"status": 2, "data": "x"}))


def fail_in_initialize(job, toggle_ipc):
    def initialize(send):
        raise LookupError("initialize")

    return toggle_ipc(lambda answer: answer, initialize)


def add_from_task(job):
    with TaskQueue(job.data["db"]) as queue:
        queue.add_task("echo", 1, task_id=job.data["id"], keep_result=60)
        try:
            queue.in_memory.find()
        except RuntimeError as error:
            return str(error)


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
    """Wrong arguments raise at once and name the parameter; nothing is stored."""

    WRONG = [  # (parameter, value, error)
        *[("task_type", v, TypeError) for v in (None, 5, b"x", ["x"])],
        *[("task_type", v, ValueError) for v in ("", "a\0b", "\udcff", "x" * 10_001)],
        *[("priority", v, TypeError) for v in (None, True, 2.5, "3")],
        *[("priority", v, ValueError) for v in (2**63, -(2**63))],
        *[("task_id", v, TypeError) for v in (123, 0, b"x", 1.5)],
        *[("task_id", v, ValueError) for v in ("", "\0", "\ud800")],
        *[("due_date", v, TypeError) for v in (5, "tomorrow", 1.0, math.inf)],
        ("due_date", timedelta.max, ValueError),
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
    ]

    def test_a_wrong_argument_raises_and_names_its_parameter(self):
        queue = self.queue()
        for parameter, value, error in self.WRONG:
            with self.subTest(parameter=parameter, value=repr(value)[:40]):
                task = {"task_type": "x", parameter: value}
                with self.assertRaisesRegex(error, parameter):
                    queue.add_task(**task)
                with self.assertRaisesRegex(error, parameter):
                    queue.add_tasks([{"task_type": "good"}, task])
        with self.assertRaises(TypeError):
            queue.add_task("x", repeat=5)  # Not there yet: no stub.
        self.assertEqual(queue.count(), 0)

    def test_data_that_json_would_alter_is_refused_with_the_path_to_it(self):
        queue = self.queue()
        deep = []
        for _ in range(100):
            deep = [deep]
        loop = []
        loop.append(loop)
        for data, error, path in [
            ((1, 2), TypeError, "data is"),
            ({"a": [1, {"b": (1,)}]}, TypeError, r'data\["a"\]\[1\]\["b"\]'),
            ({1: "a"}, TypeError, "a key of data"),
            ({"a": {None: 1}}, TypeError, r'a key of data\["a"\]'),
            ([math.nan], ValueError, r"data\[0\]"),
            ([-math.inf], ValueError, r"data\[0\]"),
            (b"bytes", TypeError, "data is"),
            ({"t": datetime.now()}, TypeError, r'data\["t"\]'),
            ({1, 2}, TypeError, "data is"),
            (["ok", "\udcff"], ValueError, r"data\[1\]"),
            ({"\ud800": 1}, ValueError, "a key of data"),
            ({"a\0": 1}, ValueError, "a key of data"),
            (2**63, ValueError, "data is"),
            ([1, -(2**63) - 1], ValueError, r"data\[1\]"),
            (collections.OrderedDict(a=1), TypeError, "data is"),
            (deep, ValueError, "nested too deep"),
            (loop, ValueError, "nested too deep"),
            (object(), TypeError, "data is"),
        ]:
            for in_memory in (False, True):
                with self.subTest(data=repr(data)[:40], in_memory=in_memory):
                    with self.assertRaisesRegex(error, path):
                        queue.add_task("x", data, in_memory=in_memory)
        self.assertEqual(queue.count() + queue.in_memory.count(), 0)

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

    def test_data_are_copied_when_added(self):
        queue = self.queue()
        data = {"a": [1]}
        task = queue.add_task("x", data, in_memory=True)
        data["a"].append(2)
        task.data["a"].append(3)
        self.assertEqual(queue.in_memory.find_by_id(task.id).data, {"a": [1]})

    def test_omitted_data_are_an_empty_dict_and_none_stays_none(self):
        queue = self.queue()
        self.assertEqual(queue.add_task("x").data, {})
        self.assertIsNone(queue.add_task("x", None).data)

    def test_a_due_date_keeps_its_microseconds_and_its_zone(self):
        queue = self.queue()
        zone = timezone(timedelta(hours=5, minutes=30))
        aware = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=zone)
        naive = datetime(2030, 1, 2, 3, 4, 5, 678901)
        far = datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=timezone.utc)
        for given, meant in [(aware, aware), (naive, naive.astimezone()), (far, far)]:
            for in_memory in (False, True):
                task = queue.add_task("x", due_date=given, in_memory=in_memory)
                self.assertEqual(task.due_date, meant)
                self.assertEqual(task.due_date.utcoffset(), timedelta(0))
        soon = queue.add_task("x", due_date=timedelta(seconds=90))
        self.assertAlmostEqual((soon.due_date - soon.created_at).total_seconds(), 90)
        past = queue.add_task("x", due_date=datetime(1, 1, 2, tzinfo=timezone.utc))
        self.assertEqual([t.id for t in queue.find(due=True)], [past.id])

    def test_ids_are_unique_and_odd_ones_work(self):
        queue = self.queue()
        ids = {queue.add_task("x").id for _ in range(100)}
        self.assertEqual(len(ids), 100)
        self.assertTrue(queue.add_task("x", in_memory=True).id.startswith("inMemory_"))
        odd = ["a:b", "a/b", "%s", "'; drop table--", " ", "\n", "x" * 4000, "😀", "$set", "a.b", "123"]
        for task_id in odd:
            for verbs, in_memory in ((queue, False), (queue.in_memory, True)):
                queue.add_task("x", task_id=task_id, in_memory=in_memory)
                self.assertEqual(verbs.find_one(task_id=task_id).id, task_id)
                self.assertEqual(verbs.remove(task_id=task_id), 1)

    def test_add_tasks_stores_all_or_none(self):
        queue = self.queue()
        queue.add_task("x", task_id="taken")
        for in_memory in (False, True):
            if in_memory:
                queue.add_task("x", task_id="taken", in_memory=True)
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
        with self.assertRaises(AttributeError):
            task.priority = 5
        with self.assertRaises(AttributeError):
            task.other = 5
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
            self.assertEqual(ids(), list("012345"))
            self.assertEqual(ids(task_type="a"), list("024"))
            self.assertEqual(ids(task_type=["a", "b"], due=False), ["4", "5"])
            self.assertEqual(ids(task_id=["5", "1", "none"]), ["1", "5"])
            self.assertEqual(ids(state="waiting", limit=2, offset=1), ["1", "2"])
            self.assertEqual(ids(state=["running", "failed", "done"]), [])
            self.assertEqual(ids(task_id=[]), [])
            self.assertEqual(ids(limit=0), [])
            self.assertEqual(ids(due=True), list("0123"))
            self.assertEqual(verbs.find_one(task_type="b").id, "1")
            self.assertIsNone(verbs.find_one(task_id="none"))
            self.assertEqual(verbs.count(task_type="a"), 3)
            self.assertEqual(len(verbs.find(task_id=[str(i) for i in range(2000)])), 6)

    def test_wrong_filters_are_refused(self):
        for verbs, _ in self.kinds():
            for wrong, error in [
                ({"task_id": 5}, TypeError), ({"task_type": [1]}, TypeError),
                ({"state": "ready"}, ValueError), ({"due": 1}, TypeError),
                ({"limit": -1}, ValueError), ({"limit": "5"}, TypeError),
                ({"offset": None}, TypeError), ({"colour": "red"}, TypeError),
            ]:
                for verb in (verbs.find, verbs.find_one, verbs.count, verbs.remove, verbs.retry):
                    if verb == verbs.find_one and "limit" in wrong:
                        continue  # Its limit is 1.
                    if verb not in (verbs.find, verbs.find_one) and {"limit", "offset"} & set(wrong):
                        error = TypeError  # Has no such filter.
                    with self.assertRaisesRegex(error, list(wrong)[0]):
                        verb(**wrong)

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
                ({"priority": "1"}, TypeError), ({"data": {1: 2}}, TypeError),
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
        queue.add_task("echo", task_id="later", due_date=timedelta(hours=1))
        with self.assertRaisesRegex(TimeoutError, "later.*waiting"):
            queue.wait("later", 0.01)

    def test_the_queue_can_be_closed_and_used_again(self):
        with TaskQueue(self.folder / "again.db") as queue:
            queue.add_task("x")
        self.assertEqual(queue.count(), 1)
        queue.close()

    def test_listeners_and_stores_are_checked(self):
        queue = self.both
        for wrong, error in [(("end", print), ValueError), ((5, print), TypeError), (("done", 5), TypeError)]:
            with self.assertRaises(error):
                queue.add_event_listener(*wrong)
        with self.assertRaises(ValueError):
            queue.remove_event_listener("start")
        for wrong, error in [(5, TypeError), (None, TypeError), ("", ValueError), (":memory:", ValueError)]:
            with self.assertRaises(error):
                TaskQueue(wrong)
        with self.assertRaisesRegex(ValueError, "synchronous"):
            SQLiteStore("x.db", synchronous="OFF")


# --- Stores --------------------------------------------------------------------------


def row(task_id="t", task_type="x", *, now=NOW, lane="", **options):
    return taskpool._make_row(now, task_type, task_id=task_id, lane=lane, **options)[0]


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
        return self.store.settle(owner, [outcome], now) == [True]

    def look(self, task_id="t", now=NOW):
        found = self.store.find(Query(ids=[task_id]), now)
        return found[0] if found else None

    def test_add_claim_settle_done_removes_the_task(self):
        self.add(row())
        (claimed,) = self.claim()
        self.assertEqual((claimed.state, claimed.attempt, claimed.owner), ("running", 1, "me"))
        self.assertEqual(self.claim(), [])
        self.assertTrue(self.settle(claimed, "done"))
        self.assertIsNone(self.look())

    def test_a_kept_result_stays_until_it_expires(self):
        self.add(row(keep_result=10))
        self.settle(self.claim()[0], "done", result="[1]")
        self.assertEqual((self.look().state, self.look().result), ("done", "[1]"))
        self.store.renew("me", NOW + 9 * SECOND)
        self.assertIsNotNone(self.look())
        self.store.renew("me", NOW + 10 * SECOND)
        self.assertIsNone(self.look())

    def test_settle_failed_keeps_it_and_retry_revives_it(self):
        self.add(row())
        self.settle(self.claim()[0], "failed", error="E: bad")
        self.assertEqual((self.look().state, self.look().error), ("failed", "E: bad"))
        self.assertEqual(self.claim(), [])
        self.assertEqual(self.store.retry(Query(types=["y"]), NOW), 0)
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

    def test_a_claim_given_back_is_not_charged_and_its_number_is_used_up(self):
        self.add(row())
        (first,) = self.claim()
        self.assertTrue(self.settle(first, "ready", charged=False))
        (second,) = self.claim()
        self.assertEqual((second.attempt, second.claim), (1, first.claim + 1))
        self.assertFalse(self.settle(first, "done"))
        self.assertFalse(self.settle(second, "done", owner="other"))
        self.assertTrue(self.settle(second, "done"))
        self.assertFalse(self.settle(second, "done"))

    def test_one_settle_takes_many_outcomes_and_tells_them_apart(self):
        self.add(*[row(str(i)) for i in range(4)])
        a, b, c, d = self.claim()
        outcomes = [
            Outcome(a.id, a.claim, "done"), Outcome(b.id, b.claim + 1, "done"),
            Outcome(c.id, c.claim, "failed", error="E"), Outcome(d.id, d.claim, "removed"),
        ]
        self.assertEqual(self.store.settle("me", outcomes, NOW), [True, False, True, True])
        self.assertEqual([(r.id, r.state) for r in self.store.find(Query(), NOW)], [("1", "running"), ("2", "failed")])

    def test_order_is_priority_then_age_then_insertion(self):
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

    def test_order_holds_across_types_and_lanes(self):
        for order in (1, -1):
            rows = [
                row(str(i), "xyz"[i % 3], lane=("", "me")[i % 2], priority=-i) for i in range(12)
            ][::order]
            self.add(*rows)
            got = self.claim(types=("x", "y", "z"), limit=12)
            self.assertEqual([r.id for r in got], [str(i) for i in range(12)])
            for claimed in got:
                self.settle(claimed, "done")

    def test_only_the_types_asked_for_are_claimed(self):
        self.add(row("a", "x"), row("b", "y", priority=9))
        self.assertEqual([r.id for r in self.claim()], ["a"])
        self.assertEqual(self.claim(types=()), [])
        self.assertEqual(self.store.foreign(["x"], NOW), ["y"])
        self.assertEqual(self.store.foreign(["x", "y"], NOW), [])
        self.assertEqual([r.id for r in self.claim(types=["y"])], ["b"])

    def test_only_due_tasks_are_claimed(self):
        self.add(row("now"), row("soon", due_date=timedelta(seconds=1), priority=9))
        self.assertEqual([r.id for r in self.claim()], ["now"])
        self.assertEqual(self.claim(now=NOW + SECOND - 1), [])
        self.assertEqual([r.id for r in self.claim(now=NOW + SECOND)], ["soon"])

    def test_a_clock_set_back_holds_back_nothing_that_was_due(self):
        self.add(row("a"), row("b", due_date=timedelta(seconds=1)))
        self.store.next_due("me", ["x"], 5, NOW)
        self.assertEqual([r.id for r in self.claim(now=NOW - 3600 * SECOND)], ["a"])

    def test_a_lane_is_claimed_by_its_owner_only(self):
        self.add(row("mine", lane="me"), row("theirs", lane="you"), row("free"))
        self.assertEqual([r.id for r in self.claim()], ["mine", "free"])
        self.assertEqual(self.store.next_due("me", ["x"], 5, NOW), [])
        self.assertEqual([r.id for r in self.claim(owner="you")], ["theirs"])

    def test_the_limit_counts_shares(self):
        self.add(*[row(f"f{i}", "fast") for i in range(10)], row("s", "slow", now=NOW + 1))
        types = {"fast": 0.25, "slow": 1.0}
        self.assertEqual(len(self.claim(1.0, types, NOW + 1)), 4)
        self.assertEqual(len(self.claim(1.9, types, NOW + 1)), 6)  # The slow one does not fit.
        self.assertEqual([r.id for r in self.claim(1.0, types, NOW + 1)], ["s"])
        self.assertEqual(self.claim(0.0), [])

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

    def test_replacing_a_running_task_makes_a_successor_in_place_of_its_retry(self):
        for end in ({"state": "done"}, {"state": "failed", "error": "E"}, {"state": "ready", "ready_at": NOW}):
            self.add(row())
            (running,) = self.claim()
            self.add(row(priority=2), if_exists="replace")
            self.add(row(priority=3, due_date=timedelta(seconds=1)), if_exists="replace")
            self.assertEqual(self.look().state, "running")
            self.assertEqual(self.claim(), [])
            self.assertTrue(self.settle(running, **end))
            found = self.look()
            self.assertEqual((found.state, found.priority, found.attempt), ("scheduled", 3, 0))
            self.assertEqual(self.store.remove(Query(ids=["t"]), NOW), 1)

    def test_a_successor_waits_while_its_predecessor_is_given_back(self):
        self.add(row())
        (running,) = self.claim()
        self.add(row(priority=2), if_exists="replace")
        self.settle(running, "ready", charged=False)
        (again,) = self.claim()
        self.assertEqual(again.priority, 1)
        self.settle(again, "done")
        self.assertEqual(self.claim()[0].priority, 2)

    def test_a_removed_running_task_ends_its_run_and_is_not_retried(self):
        for state in ("done", "failed", "ready"):
            self.add(row(keep_result=60))
            (running,) = self.claim()
            self.assertEqual(self.store.remove(Query(ids=["t"]), NOW), 1)
            self.assertEqual(self.look().state, "running")
            self.assertTrue(self.settle(running, state))
            self.assertIsNone(self.look())

    def test_update_moves_between_due_and_not_due(self):
        self.add(row(now=NOW - 5))
        self.store.update("t", {"due_at": NOW + 9, "ready_at": NOW + 9}, NOW)
        self.assertEqual(self.claim(), [])
        self.store.update("t", {"priority": 8}, NOW)
        (claimed,) = self.claim(now=NOW + 9)
        self.assertEqual(claimed.priority, 8)
        with self.assertRaisesRegex(ValueError, "running"):
            self.store.update("t", {"priority": 8}, NOW)

    def test_leave_gives_back_all_that_an_owner_holds(self):
        self.add(row("a"), row("b", lane="me"), row("c", lane="me", due_date=timedelta(1)))
        self.claim(1)
        self.store.leave("me", NOW)
        got = self.claim(owner="you", now=NOW + 90_000 * SECOND)
        self.assertEqual([(r.id, r.attempt) for r in got], [("a", 1), ("b", 1), ("c", 1)])

    def test_add_is_all_or_nothing(self):
        self.add(row("b", priority=7))
        with self.assertRaises(DuplicateTask):
            self.store.add([(row("a"), "raise"), (row("b"), "replace"), (row("a"), "raise")], NOW)
        self.assertEqual([(r.id, r.priority) for r in self.store.find(Query(), NOW)], [("b", 7)])


class TestMemoryStore(StoreContract, unittest.TestCase):
    """The in-memory store keeps the contract."""

    def open(self):
        return MemoryStore()

    def test_changed_and_removed_tasks_leave_nothing_behind(self):
        for i in range(5000):
            self.add(row(str(i)))
            self.store.update(str(i), {"priority": 2}, NOW)
            self.store.remove(Query(ids=[str(i)]), NOW)
        entries = sum(map(len, self.store._ready.values()))
        self.assertLess(entries, 3000)


class TestSQLiteStore(StoreContract, InFolder):
    """The SQLite store keeps the contract, in a file."""

    def open(self):
        return SQLiteStore(self.folder / "store.db")

    def other(self):
        store = SQLiteStore(self.folder / "store.db")
        self.addCleanup(store.close)
        return store

    def test_another_process_sees_what_was_stored(self):
        self.add(row("a"), row("b"))
        self.assertEqual([r.id for r in self.other().find(Query(), NOW)], ["a", "b"])

    def test_indexes_serve_the_claim_and_the_timer(self):
        """EXPLAIN of the constants: no scan of the table, no sorting (PF-01, MG-09)."""
        self.add(row())
        db = sqlite3.connect(self.folder / "store.db")
        self.addCleanup(db.close)
        for statement, index in [
            (taskpool._READY, "taskpool_ready"), (taskpool._COUNT_READY, "taskpool_ready"),
            (taskpool._NEXT_DUE, "taskpool_scheduled"), (taskpool._PROMOTE, "taskpool_scheduled"),
            (taskpool._SUSPECT, "taskpool_running"), (taskpool._HELD_BY, "taskpool_running"),
            (taskpool._OPEN_LANE, "taskpool_lane"), (taskpool._EXPIRE, "taskpool_expires"),
            (taskpool._FINISH, "sqlite_autoindex"), (taskpool._CLAIM, "PRIMARY KEY"),
            (taskpool._OWNERS, "taskpool_running"), (taskpool._FOREIGN, "taskpool_ready"),
        ]:
            values = [0] * statement.count("?")
            plan = [r[3] for r in db.execute("EXPLAIN QUERY PLAN " + statement, values)]
            with self.subTest(statement=statement):
                text = "\n".join(plan)
                self.assertIn(index, text)
                self.assertNotIn("TEMP B-TREE FOR ORDER", text)
                self.assertNotRegex(text, r"SCAN (TABLE )?taskpool_task($|\n)")

    def test_a_row_that_cannot_be_read_is_set_aside_and_the_others_run(self):
        """CR-08, SQ-05, TT-05."""
        self.add(*[row(f"bad{i}", priority=9) for i in range(4)], row("good"))
        self.store.close()
        with contextlib.closing(sqlite3.connect(self.folder / "store.db")) as db:
            for i, change in enumerate([
                "priority = 'high'", "data = x'ff00'", "data = CAST(x'ff41' AS TEXT)", "retries = 1.5",
            ]):
                db.execute(f"UPDATE taskpool_task SET {change} WHERE id = 'bad{i}'")
            db.commit()
        got = []
        for _ in range(3):
            got += self.claim()
        self.assertEqual([r.id for r in got if r.state == "running"], ["good"])
        self.assertEqual({r.id for r in got if r.state == "failed"}, {f"bad{i}" for i in range(4)})
        self.assertTrue(all("column" in r.error for r in got if r.state == "failed"))
        states = {r.id: r.state for r in self.store.find(Query(), NOW)}
        self.assertEqual(set(states), {"good", "bad0", "bad1", "bad2", "bad3"})
        self.assertEqual(self.store.count(Query(states=["failed"]), NOW), 4)

    def test_what_sqlite_reports_is_a_store_error_that_names_the_path(self):
        no_database = self.folder / "text.db"
        no_database.write_text("this is not a database" * 100)
        for path, text in [
            (no_database, "not a database"), (self.folder / "none" / "x.db", "folder .* does not exist"),
            (self.folder, "unable to open"),
        ]:
            queue = TaskQueue(path)
            with self.assertRaisesRegex(StoreError, text) as caught:
                queue.add_task("x")
            self.assertIn(str(path), str(caught.exception))
            with self.assertRaises(StoreError):
                queue.find()

    @unittest.skipUnless(LINUX, "uses setuid")
    def test_a_read_only_file_is_a_store_error_but_can_be_read(self):
        out = self.run_script(
            """
            import os, sys
            from taskpool import TaskQueue, StoreError
            queue = TaskQueue("tasks.db")
            queue.add_task("x")
            queue.close()
            for name in os.listdir("."):
                os.chmod(name, 0o444)
            os.chmod(".", 0o555)
            if os.getuid() == 0:
                os.setgid(65534), os.setuid(65534)
            try:
                queue.add_task("y")
            except StoreError as error:
                print(error)
            os._exit(0)
            """,
            env={"TMPDIR": "/tmp"},
        )
        self.assertIn("tasks.db", out)
        self.assertIn("not writable", out)
        os.chmod(self.folder, 0o755)

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
        self.add(row("run"), row("lane", lane=dead))
        self.claim(1, owner=dead)
        self.assertEqual(self.store.recover("me", 0.0, NOW), [])
        self.assertEqual(self.look("run").state, "running")
        if not taskpool._here():
            self.skipTest("this system has no /proc to see a dead process by")
        process.kill()
        eventually(lambda: taskpool.owner_is_dead(dead))  # A zombie counts as dead.
        self.assertEqual(self.store.recover("me", 0.0, NOW), [])
        self.assertEqual((self.look("run").state, self.look("run").attempt), ("ready", 0))
        self.assertEqual(self.look("lane").lane, "")

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

    def test_an_interrupted_task_is_claimed_singly_and_the_fifth_time_fails(self):
        """P3: six starts in all, and its neighbours are not blamed."""
        seconds = 0.0

        def interrupt(owner):
            nonlocal seconds
            self.store.recover("me", seconds, NOW)
            seconds += 31
            return self.store.recover("me", seconds, NOW)

        self.add(row("killer"), row("neighbour"), row("third"))
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
        self.assertEqual([(r.id, r.state) for r in ended], [("killer", "failed")])
        self.assertIn("Interrupted", self.look("killer").error)
        (neighbour,) = self.claim(9)
        self.assertEqual((neighbour.id, neighbour.attempt, neighbour.interrupted), ("neighbour", 1, 1))
        self.settle(neighbour, "ready", ready_at=NOW)
        self.assertEqual(self.look("neighbour").interrupted, 0)  # A run ended: reset.

    def test_user_tables_in_the_same_file_are_left_alone(self):
        path = self.folder / "app.db"
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE task (id)")
            db.execute("INSERT INTO task VALUES (1)")
            db.commit()
        with TaskQueue(path) as queue:
            queue.add_task("x")
        with contextlib.closing(sqlite3.connect(path)) as db:
            self.assertEqual(db.execute("SELECT * FROM task").fetchall(), [(1,)])


# --- Running tasks -------------------------------------------------------------------

EVERYTHING = {
    "echo": echo, "about": about, "fail": fail, "succeed_at": succeed_at, "hold": hold,
    "raise_kind": raise_kind, "return_kind": return_kind, "sleep": sleep_a_little,
    "later": future_later, "ping": ping, "position": ping_by_position,
    "three deep": ping_three_deep, "wait inside": ping_and_wait_inside, "async ping": ping_async,
    "ping later": ping_later, "status": ping_status, "twice": ping_twice,
    "forget": ping_and_forget, "die": ping_and_die, "bad message": fail_in_on_message,
    "bad initialize": fail_in_initialize, "add": add_from_task, "cluster": use_cluster_in_task,
    "pid": pid_of_worker, "line": add_line, "kill first": kill_at_first, "badly": end_badly,
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
        for task_type, data, result in [
            ("echo", {"a": [1]}, {"a": [1]}), ("sleep", None, "slept"), ("later", None, "later"),
            ("partial", 5, 15), ("method", 5, 20), ("echo", None, None), ("return_kind", "tuple", (1, 2)),
        ]:
            for in_memory in (False, True):
                with self.subTest(task_type=task_type, in_memory=in_memory):
                    self.assertEqual(self.result(task_type, data, in_memory=in_memory), result)

    def test_falsy_results_and_data_are_not_taken_for_missing(self):
        """SE-03."""
        for value in (None, 0, "", [], False, {}, 0.0):
            self.assertEqual(repr(self.result("echo", value)), repr(value))

    def test_the_job_is_the_running_task(self):
        for in_memory in (False, True):
            future = self.submit("about", [1], priority=3, task_id="me", in_memory=in_memory)
            expected = ("me", "about", [1], 3, 1, "running", in_memory)
            self.assertEqual(future.result(PATIENCE), expected)
            self.assertEqual((future.task.id, future.task.state), ("me", "waiting"))

    def test_map_gives_results_in_order(self):
        self.assertEqual(list(self.shared.map("echo", range(30))), list(range(30)))
        with self.assertRaises(ValueError):
            list(self.shared.map("fail", [1]))

    def test_it_works_with_asyncio_and_wait(self):
        async def main():
            loop = asyncio.get_running_loop()
            jobs = [loop.run_in_executor(self.shared, "echo", i) for i in range(5)]
            return await asyncio.gather(*jobs)

        self.assertEqual(asyncio.run(main()), list(range(5)))
        futures = [self.submit("echo", i) for i in range(5)]
        done, waiting = concurrent.futures.wait(futures, PATIENCE)
        self.assertEqual((len(done), len(waiting)), (5, 0))

    def test_a_future_is_cancelled_while_it_waits_and_not_while_it_runs(self):
        for in_memory in (False, True):
            with self.subTest(in_memory=in_memory):
                waits = self.submit("echo", due_date=timedelta(hours=1), in_memory=in_memory)
                self.assertFalse(waits.running())
                self.assertTrue(waits.cancel())
                self.assertTrue(waits.cancelled())
                self.assertEqual(concurrent.futures.wait([waits], 1).done, {waits})
                path = str(self.folder / f"hold {in_memory}")
                runs = self.submit("hold", path, in_memory=in_memory)
                eventually(lambda: os.path.exists(path + ".started"))
                self.assertTrue(runs.running())
                self.assertFalse(runs.cancel())
                Path(path + ".end").touch()
                self.assertEqual(runs.result(PATIENCE), "held")
                self.assertFalse(runs.cancel())

    def test_cancel_kills_a_running_task(self):
        for in_memory in (False, True):
            with self.subTest(in_memory=in_memory):
                path = str(self.folder / f"hold {in_memory}")
                runs = self.submit("hold", path, in_memory=in_memory, retries=5)
                eventually(lambda: os.path.exists(path + ".started"))
                self.assertTrue(self.shared.cancel(runs.task.id))
                eventually(runs.cancelled)
                pid = int(Path(path + ".started").read_text())
                eventually(lambda: not is_alive(pid))
                verbs = self.shared_queue.in_memory if in_memory else self.shared_queue
                eventually(lambda: not verbs.find(task_id=runs.task.id))
                waits = self.submit("echo", due_date=timedelta(hours=1), in_memory=in_memory)
                self.assertTrue(self.shared.cancel(waits.task.id))
                self.assertTrue(waits.cancelled())
        self.assertFalse(self.shared.cancel("none"))

    def test_the_future_of_a_removed_task_is_cancelled(self):
        for in_memory in (False, True):
            verbs = self.shared_queue.in_memory if in_memory else self.shared_queue
            future = self.submit("echo", due_date=timedelta(hours=1), in_memory=in_memory)
            self.assertEqual(verbs.remove(task_id=future.task.id), 1)
            eventually(future.cancelled)
        future = self.submit("echo", due_date=timedelta(hours=1))
        with contextlib.closing(SQLiteStore(Path(self.home) / "shared.db")) as elsewhere:
            elsewhere.remove(Query(ids=[future.task.id]), NOW)
        eventually(future.cancelled)

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

    def test_a_kept_task_that_somebody_else_added_resolves_the_future_too(self):
        self.shared_queue.add_task("echo", 5, task_id="k", due_date=timedelta(seconds=0.2), keep_result=60)
        future = self.submit("echo", 6, task_id="k", if_exists="keep")
        self.assertEqual(future.result(PATIENCE), 5)

    def test_submit_refuses_what_can_never_run(self):
        with self.assertRaisesRegex(ValueError, "task_type.*'none'.*'echo'"):
            self.submit("none")
        with self.assertRaisesRegex(TypeError, "task_type"):
            self.submit(5)
        with self.assertRaises(TypeError):
            self.submit("echo", lane="x")
        with self.assertRaisesRegex(TypeError, "priority"):
            self.submit("echo", priority="1")

    def test_workers_tells_what_each_process_does(self):
        path = str(self.folder / "hold")
        future = self.submit("hold", path, task_id="held")
        eventually(lambda: os.path.exists(path + ".started"))
        busy = [w for w in self.shared.workers() if w["state"] == "busy"]
        self.assertEqual([(w["task_id"], w["task_type"]) for w in busy], [("held", "hold")])
        self.assertEqual(busy[0]["pid"], int(Path(path + ".started").read_text()))
        self.assertLess(abs(datetime.now(timezone.utc) - busy[0]["since"]), timedelta(seconds=PATIENCE))
        Path(path + ".end").touch()
        future.result(PATIENCE)


class TestFailures(WithCluster):
    """How tasks can fail, and what a Future, the task and the listener then hold."""

    def test_the_future_raises_the_tasks_own_exception_with_its_traceback(self):
        error = self.error("fail")
        self.assertEqual((type(error), str(error)), (ValueError, "attempt 1"))
        self.assertIn("in fail", str(error.__cause__))

    def test_an_exception_that_cannot_be_rebuilt_becomes_a_remote_error(self):
        """EX-01, EX-03, EX-05, ENGINE 22, 23."""
        for kind, type_name, text in [
            ("odd", "Odd", "1: odd"), ("unprintable", "Unprintable", ""), ("exit", "SystemExit", "disk missing"),
            ("exit0", "SystemExit", "0"), ("interrupt", "KeyboardInterrupt", ""), ("local", "Local", "inside"),
            ("lock", "ValueError", "holds a lock"), ("huge", "ValueError", "xxx"),
        ]:
            with self.subTest(kind=kind):
                error = self.error("raise_kind", kind)
                if type(error) is RemoteError:
                    self.assertTrue(error.type_name.endswith(type_name), error.type_name)
                    self.assertIn("raise_kind", error.traceback)
                    self.assertLess(len(error.traceback), 200_000)
                else:
                    self.assertEqual(type(error).__name__, type_name)
                if kind != "unprintable":
                    self.assertIn(text, str(error))
                task = self.shared_queue.find_one(state="failed", task_type="raise_kind")
                self.assertIn(type_name, task.error.split("\n")[0])
                self.shared_queue.remove(state="failed")

    def test_errors_that_look_like_the_pools_own_are_plain_task_errors(self):
        """EX-06."""
        for kind, error in [("timeout", TimeoutError), ("eof", EOFError), ("deep", RecursionError), ("surrogate", ValueError)]:
            with self.subTest(kind=kind):
                self.assertIs(type(self.error("raise_kind", kind)), error)

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

    def test_a_failed_task_stays_until_it_is_retried_or_removed(self):
        self.error("succeed_at", 2, task_id="r")
        self.assertEqual(self.shared_queue.find_one(task_id="r").state, "failed")
        self.shared_queue.retry(task_id="r")
        eventually(lambda: self.shared_queue.find_one(task_id="r").state == "failed")
        self.assertEqual(self.shared_queue.find_one(task_id="r").attempt, 1)

    def test_retries_start_again_until_one_succeeds(self):
        for in_memory in (False, True):
            options = {"retries": 3, "retry_delay": 0.01, "in_memory": in_memory}
            self.assertEqual(self.result("succeed_at", 3, **options), 3)
            error = self.error("succeed_at", 9, **options)
            self.assertEqual(str(error), "attempt 4")

    def test_starts_are_retries_plus_one_for_every_kind_of_failure(self):
        """RT-03, RT-04, TO-04, RT-05."""
        futures, files = [], []
        for how, timeout in [("raise", None), ("kill", None), ("exit", None), ("sleep", 0.2)]:
            for retries in (0, 1, 2):
                for in_memory in (False, True):
                    path = str(self.folder / f"{how} {retries} {in_memory}")
                    files.append((path, retries, how))
                    futures.append(self.submit(
                        "badly", {"file": path, "how": how}, retries=retries, retry_delay=0,
                        timeout=timeout, in_memory=in_memory,
                    ))
        kinds = {"raise": ValueError, "kill": WorkerDied, "exit": WorkerDied, "sleep": TaskTimeout}
        for future, (path, retries, how) in zip(futures, files):
            self.assertIs(type(future.exception(PATIENCE)), kinds[how])
            attempts = [int(line.split()[1]) for line in lines_of(path)]
            self.assertEqual(attempts, list(range(1, retries + 2)), path)

    def test_a_dead_worker_is_told_with_its_signal_pid_type_and_id(self):
        """ENGINE 2, 5."""
        for how, code, text in [("kill", -9, "SIGKILL"), ("exit", 3, "code 3")]:
            path = str(self.folder / how)
            error = self.error("badly", {"file": path, "how": how}, task_id=how)
            self.assertEqual((error.exit_code, error.task_type, error.task_id), (code, "badly", how))
            for part in (text, "'badly'", repr(how), str(error.pid)):
                self.assertIn(part, str(error))
            copy = pickle.loads(pickle.dumps(error))
            self.assertEqual(str(copy), str(error))

    def test_a_kept_result_is_json_or_says_why_not(self):
        task = self.submit("echo", {"a": 1}, keep_result=60).task
        kept = self.shared_queue.wait(task.id, PATIENCE)
        self.assertEqual((kept.state, kept.result, kept.error), ("done", {"a": 1}, None))
        future = self.submit("return_kind", "tuple", keep_result=60)
        self.assertEqual(future.result(PATIENCE), (1, 2))
        kept = self.shared_queue.wait(future.task.id, PATIENCE)
        self.assertEqual((kept.state, kept.result), ("done", None))
        self.assertIn("tuple", kept.error)


class TestListeners(InFolder):
    """queue.add_event_listener: told after the state was stored; can break nothing."""

    def test_done_and_error_are_told_value_and_task(self):
        queue, told = self.queue(), []
        queue.add_event_listener("done", lambda value, task: told.append(("replaced", value)))
        queue.add_event_listener("done", lambda value, task: told.append(("done", value, task)))
        queue.add_event_listener("error", lambda value, task: told.append(("error", value, task)))
        with self.cluster({"echo": echo, "succeed_at": succeed_at, "fail": fail}, queue) as cluster:
            for in_memory in (False, True):
                queue.add_task("echo", 5, task_id="e", in_memory=in_memory)
                queue.add_task("succeed_at", 2, retries=1, retry_delay=0, task_id="s", in_memory=in_memory)
                queue.add_task("fail", task_id="f", in_memory=in_memory)
                self.assertTrue(cluster.drain(PATIENCE))
                seen = sorted((kind, task.id, task.state, task.attempt) for kind, _, task in told)
                self.assertEqual(seen, [
                    ("done", "e", "done", 1), ("done", "s", "done", 2),
                    ("error", "f", "failed", 1), ("error", "s", "waiting", 1),
                ])
                values = {(task.id, kind): value for kind, value, task in told}
                self.assertEqual((values["e", "done"], str(values["f", "error"])), (5, "attempt 1"))
                told.clear()
            queue.remove_event_listener("done")
            queue.remove_event_listener("done")
            queue.add_task("echo", 5)
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
        cluster = self.cluster({"echo": echo, "sleep": end_badly}, queue)
        with self.assertLogs("taskpool", "ERROR") as logs:
            queue.add_task("echo", "slow")
            eventually(lambda: told)
            self.assertEqual(queue.count(), 0)  # Stored before it was called.
            self.assertEqual([cluster.submit("echo", i).result(PATIENCE) for i in range(5)], list(range(5)))
            late = cluster.submit("sleep", {"file": str(self.folder / "f"), "how": "sleep"}, timeout=0.1)
            self.assertIsInstance(late.exception(PATIENCE), TaskTimeout)
            release.set()
            cluster.drain(PATIENCE)
            eventually(lambda: len(told) == 6)
        self.assertIn("from a listener", "\n".join(logs.output))

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
        self.assertTrue(cluster._closed.wait(PATIENCE))
        self.assertEqual(told, [1, 2, 3, 4, 5])


class TestConversations(WithCluster):
    """toggle_ipc: a running task talks with the master."""

    def test_a_message_is_answered_and_on_messages_value_is_the_result(self):
        self.assertEqual(self.result("ping", "x"), "pong x")
        self.assertEqual(self.result("position", "y"), "pong y")
        self.assertEqual(self.result("ping", "thread"), "from a thread")
        self.assertEqual(self.result("ping later"), "pong late")

    def test_the_broker_is_told_who_asks(self):
        future = self.submit("ping", "about", task_id="who")
        told = future.result(PATIENCE)
        self.assertEqual((told["status"], told["task_id"], told["task_type"]), (4, "who", "ping"))
        self.assertIn(told["worker"], [w["pid"] for w in self.shared.workers()])

    def test_conversations_nest_to_any_depth_beside_plain_tasks(self):
        plain = [self.submit("echo", i) for i in range(50)]
        deep = [self.submit("three deep", in_memory=bool(i % 2)) for i in range(10)]
        for future in deep:
            self.assertEqual(future.result(PATIENCE), ["pong ping 1", "pong ping 2", "pong ping 3"])
        self.assertEqual([f.result(PATIENCE) for f in plain], list(range(50)))

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
            self.assertIn("pickle", str(self.error("ping", "unpicklable")))
        self.assertIn("the broker fails", "\n".join(logs.output))

    def test_without_a_broker_the_future_fails(self):
        with self.cluster({"ping": ping}) as cluster:
            error = cluster.submit("ping", 1).exception(PATIENCE)
        self.assertIn("no message_broker", str(error))

    def test_a_task_that_ends_with_an_open_conversation_is_done_with_a_warning(self):
        with self.assertLogs("taskpool", "WARNING") as logs:
            self.assertEqual(self.result("forget"), "forgot")
        self.assertIn("1 conversation was open", "\n".join(logs.output))

    def test_a_worker_that_dies_in_a_conversation_is_a_failed_attempt(self):
        self.assertIsInstance(self.error("die"), WorkerDied)
        self.assertEqual(self.result("die", retries=1, retry_delay=0), 2)

    def test_an_answer_that_never_comes_ends_with_the_timeout(self):
        self.assertIsInstance(self.error("ping", "silence", timeout=0.2), TaskTimeout)

    def test_an_answer_that_never_comes_ends_with_the_shutdown(self):
        cluster = self.cluster({"ping": ping}, message_broker=answer_pings, shutdown_timeout=0.2)
        future = cluster.submit("ping", "silence")
        cluster.shutdown()
        self.assertIn("shut down before", str(future.exception(0)))

    def test_queue_calls_in_a_task_work_and_cluster_calls_raise(self):
        path = str(self.folder / "other.db")
        data = {"db": path, "id": "added"}
        self.assertIn("in-memory", self.result("add", data))
        self.assertEqual(TaskQueue(path).find_one().id, "added")
        here = {"db": str(Path(self.home) / "shared.db"), "id": "chain"}
        self.result("add", here)
        self.assertEqual(self.shared_queue.wait("chain", PATIENCE).result, 1)
        is_master, text = self.result("cluster", path)
        self.assertFalse(is_master)
        self.assertIn("only the master", text)


class TestClusterOptions(InFolder):
    """What the parameters of Cluster mean."""

    def test_a_wrong_argument_raises_and_names_its_parameter(self):
        queue = self.queue()
        for options, error, text in [
            ({"task_map": None}, TypeError, "task_map"), ({"task_map": {}}, ValueError, "task_map"),
            ({"task_map": {"x": 5}}, TypeError, r"task_map\['x'\]"), ({"task_map": {5: echo}}, TypeError, "task_map"),
            ({"queue": "tasks.db"}, TypeError, "queue"), ({"max_available_workers": "2"}, TypeError, "max_available"),
            ({"max_available_workers": True}, TypeError, "max_available"), ({"refresh_rate": 0}, ValueError, "refresh_rate"),
            ({"refresh_rate": 1.5}, TypeError, "refresh_rate"), ({"in_memory_only": 1}, TypeError, "in_memory_only"),
            ({"message_broker": 5}, TypeError, "message_broker"), ({"logs": "none"}, ValueError, "logs"),
            ({"keep_alive": "sometimes"}, ValueError, "keep_alive"), ({"keep_alive": 0}, ValueError, "keep_alive"),
            ({"keep_alive": True}, TypeError, "keep_alive"), ({"auto_initialize": None}, TypeError, "auto_initialize"),
            ({"start_method": "thread"}, ValueError, "start_method"), ({"start_method": None}, TypeError, "start_method"),
            ({"max_tasks_per_worker": 0}, ValueError, "max_tasks_per_worker"),
            ({"max_tasks_per_worker": "1"}, TypeError, "max_tasks_per_worker"),
            ({"oversubscribe": 1}, TypeError, "oversubscribe"), ({"shutdown_timeout": -1}, ValueError, "shutdown_timeout"),
            ({"shutdown_timeout": "1"}, TypeError, "shutdown_timeout"), ({"port": 3008}, TypeError, "port"),
        ]:
            with self.subTest(options=options), self.assertRaisesRegex(error, text):
                Cluster(**{"task_map": {"x": echo}, "queue": queue, **options})
        with self.assertRaisesRegex(ValueError, "refresh_rate"):
            self.cluster({"x": echo}).set_refresh_rate(-1)

    def test_workers_are_clamped_with_warnings(self):
        most = Cluster.max_workers()
        for given, used, text in [(0, 1, "using 1"), (-5, 1, "using 1"), (most + 3, most, f"using {most}")]:
            with self.assertLogs("taskpool", "WARNING") as logs:
                cluster = self.cluster({"x": echo}, max_available_workers=given, oversubscribe=False, auto_initialize=False)
            self.assertEqual(cluster._max_workers, used)
            self.assertIn(text, logs.output[0])
        cluster = self.cluster({"x": echo}, max_available_workers=most + 3, auto_initialize=False)
        self.assertEqual(cluster._max_workers, most + 3)

    def test_using_all_cpus_warns_once(self):
        out = self.run_script(
            """
            import logging, sys
            from taskpool import Cluster
            logging.basicConfig(stream=sys.stdout)
            for _ in range(3):
                Cluster({"x": print}, auto_initialize=False)
            """
        )
        self.assertEqual(out.count("CPUs are used"), 1)

    def test_the_library_configures_no_logging_and_logs_the_lines_of_the_original(self):
        """LL-04."""
        self.assertEqual([type(h) for h in logging.getLogger("taskpool").handlers], [logging.NullHandler])
        with self.assertLogs("taskpool", "INFO") as logs:
            with self.cluster({"echo": echo}) as cluster:
                cluster.submit("echo", task_id="t1").result(PATIENCE)
        text = "\n".join(logs.output)
        self.assertEqual(len(re.findall(r"cluster:echo:t1:\tstarted", text)), 1)
        self.assertEqual(len(re.findall(r"cluster:echo:t1:\tdone in \d+ ms", text)), 1)
        with self.assertLogs("taskpool", "INFO") as logs:
            with self.cluster({"echo": echo, "fail": fail}, logs="error") as cluster:
                cluster.submit("echo").result(PATIENCE)
                cluster.submit("fail").exception(PATIENCE)
        self.assertEqual([r.levelname for r in logs.records if "cluster:" in r.getMessage()], ["ERROR"])

    def test_keep_alive_always_starts_all_and_replaces_the_dead(self):
        cluster = self.cluster({"echo": echo}, keep_alive="always")
        ready = lambda: [w["pid"] for w in cluster.workers() if w["state"] == "idle"]  # noqa: E731
        eventually(lambda: len(ready()) == 2)
        for _ in range(3):
            victim = ready()[0]
            os.kill(victim, signal.SIGKILL)
            eventually(lambda: len(ready()) == 2 and victim not in ready())

    def test_without_keep_alive_idle_workers_are_closed_at_a_refresh(self):
        cluster = self.cluster({"pid": pid_of_worker})
        self.assertEqual(cluster.workers(), [])
        pid = cluster.submit("pid").result(PATIENCE)
        eventually(lambda: not cluster.workers())
        self.assertFalse(LINUX and is_alive(pid))
        self.assertNotEqual(cluster.submit("pid").result(PATIENCE), pid)

    def test_with_keep_alive_milliseconds_idle_workers_stay_that_long(self):
        cluster = self.cluster({"pid": pid_of_worker}, keep_alive=400, refresh_rate=10)
        pid = cluster.submit("pid").result(PATIENCE)
        ended = time.monotonic()
        eventually(lambda: not cluster.workers())
        self.assertGreaterEqual(time.monotonic() - ended, 0.35)
        longer = self.cluster({"pid": pid_of_worker}, keep_alive=timedelta(hours=1), refresh_rate=10)
        pid = longer.submit("pid").result(PATIENCE)
        refreshed = longer._next_refresh
        eventually(lambda: longer._next_refresh > refreshed + 0.05)
        self.assertEqual(longer.submit("pid").result(PATIENCE), pid)

    def test_in_memory_only_never_touches_the_store(self):
        queue = self.queue()
        with self.cluster({"echo": echo}, queue, in_memory_only=True) as cluster:
            self.assertEqual(list(cluster.map("echo", [1, 2])), [1, 2])
            self.assertTrue(cluster.submit("echo").task.in_memory)
            self.assertTrue(cluster.drain(PATIENCE))
            with self.assertRaises(TypeError):
                cluster.submit("echo", in_memory=False)
        self.assertEqual(os.listdir(self.folder), [])

    def test_auto_initialize_false_starts_nothing_until_initialize(self):
        queue = self.queue()
        cluster = self.cluster({"echo": echo}, queue, auto_initialize=False)
        future = cluster.submit("echo", 5)
        self.assertEqual((cluster.workers(), queue.count(state="waiting")), ([], 1))
        cluster.initialize()
        cluster.initialize()
        self.assertEqual(future.result(PATIENCE), 5)

    def test_a_worker_is_replaced_after_max_tasks_per_worker(self):
        """SG-11, ENGINE 10."""
        for most in (1, 3):
            cluster = self.cluster(
                {"pid": pid_of_worker}, max_tasks_per_worker=most, max_available_workers=1, keep_alive="always"
            )
            futures = [cluster.submit("pid", in_memory=True) for _ in range(9)]
            counts = collections.Counter(f.result(PATIENCE) for f in futures)
            self.assertEqual(sorted(counts.values()), [most] * (9 // most))
            cluster.shutdown()

    def test_max_workers_counts_usable_cpus(self):
        if hasattr(os, "sched_getaffinity"):
            self.assertLessEqual(Cluster.max_workers(), len(os.sched_getaffinity(0)))
        self.assertGreaterEqual(Cluster.max_workers(), 1)

    def test_set_refresh_rate_changes_the_poll(self):
        queue, other = self.queue(), self.queue()
        cluster = self.cluster({"echo": echo}, queue, refresh_rate=3_600_000)
        cluster.submit("echo").result(PATIENCE)
        task = other.add_task("echo", keep_result=60)  # No event tells of it.
        cluster.set_refresh_rate(20)
        self.assertEqual(queue.wait(task.id, PATIENCE).state, "done")

    def test_the_start_method_of_the_program_is_not_fixed(self):
        """ENGINE 52, WP-04."""
        out = self.run_script(
            """
            import multiprocessing, os
            from taskpool import Cluster, TaskQueue
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

    def test_what_is_called_after_shutdown_is_refused(self):
        cluster = self.cluster({"echo": echo})
        cluster.shutdown()
        cluster.shutdown()
        with self.assertRaisesRegex(RuntimeError, "after shutdown"):
            cluster.submit("echo")
        self.assertTrue(cluster.drain(1))
        never = self.cluster({"echo": echo}, auto_initialize=False)
        never.shutdown()
        with self.assertRaisesRegex(RuntimeError, "after shutdown"):
            never.submit("echo")
