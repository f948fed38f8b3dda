# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the taskpool authors. Licensed under the MIT License.
"""taskpool - run Python functions later, in other processes, and lose none of them.

One file, standard library only. Copy it into your project:

    from taskpool import Cluster, TaskQueue

    def resize(job):
        return job.data["width"] // 2

    if __name__ == "__main__":
        queue = TaskQueue("tasks.db")
        with Cluster({"resize": resize}, queue) as cluster:
            queue.add_task("resize", {"width": 640}, priority=5)   # stored, runs soon
            future = cluster.submit("resize", {"width": 320})      # the same, with a Future
            print(future.result())

Who does what

    your program        master process (yours too)            worker processes
    ------------   ------------------------------------   ------------------------
                                                   run
    add_task() --> Store <-- store thread <-+   ---------> _worker_main
                                            |                 your function(job)
    Future     <-- futures thread  <--  dispatcher         done, fail
    listeners  <-- listener thread <--  (one thread)   <---------
    broker     <-- broker thread   <--      ^            ask (toggle_ipc)
                                            +------------------

The life of a task (each arrow is a method of Store)

       add                claim                settle: done
    --------> waiting --------------> running ---------------> (removed), or `done`
                ^                      |  |                     if keep_result was given
                |  settle: retry, or   |  |    settle: failed
                |  given back; recover |  +------------------> failed
                +----------------------+                         |
                |                retry                           |
                +------------------------------------------------+
    remove: waiting, failed, done --> (removed)      update: waiting --> waiting

What is promised (the tests and the README carry the same numbers)

    P1  A persistent task that add_task returned is not lost: not by killing any process
        at any moment, a full disk, a locked database or a row that cannot be read.
        (synchronous="FULL": nor by power failure.)
    P2  Each start that is charged runs at least once to its end, and exactly once unless
        a process was killed or a lease was lost before the end was recorded. No two live
        clusters run the same claim; a late outcome of a lost claim is discarded.
    P3  Master dead: its running tasks start again, at once where the new master can see
        that the old one is dead (same machine), else when its lease of 30 s ran out. Not
        charged to `retries`. A task found so is from then on claimed singly, and the
        fifth interruption of such a claim fails it.
    P4  Worker dead or over `timeout`: only the task that it was running is charged one
        attempt. Tasks queued behind it start elsewhere uncharged; finished ones are not
        run again. No zombie, no orphan, no leaked file descriptor.
    P5  In-memory tasks first, then persistent; in each the highest priority, then the
        oldest. A worker has at most 10 ms of expected work ahead, never over 256 tasks;
        nothing waits behind a slow task while another worker is idle for over 50 ms.
    P6  A task starts at its due date: never earlier, and at once on an idle machine.
    P7  Only task types in the cluster's map are claimed; others stay waiting.
    P8  Nothing stored is ever unpickled or evaluated: who can write to the store can
        only start mapped functions with JSON data.

Units: durations are seconds (or a timedelta), but `refresh_rate` and an integer
`keep_alive` are milliseconds, as in nschwarz:cluster, from which this descends.
Instants are datetimes outside and integer microseconds since 1970 (UTC) inside.

Map of the file: errors, tasks, policies, stores, queue, messages, worker, master,
demo and command line. Each part uses only the parts above it.
"""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import heapq
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.process
import os
import pickle
import queue as _queues
import selectors
import signal
import socket
import sqlite3
import struct
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime, timedelta, timezone
from multiprocessing.connection import Connection
from types import CoroutineType
from typing import Any, Callable, NamedTuple, TypeVar, Union, cast

__version__ = "0.1.0"
__all__ = [
    "Cluster",
    "DuplicateTask",
    "RemoteError",
    "SQLiteStore",
    "Store",
    "StoreError",
    "Task",
    "TaskPoolError",
    "TaskQueue",
    "TaskTimeout",
    "WorkerDied",
]

AHEAD_SECONDS = 0.010  # Expected work that a worker may have claimed ahead (P5).
AHEAD_TASKS = 256  # The same as a number of tasks: what a crash can give back.
LEAST_SECONDS = AHEAD_SECONDS / AHEAD_TASKS  # Quicker tasks are no different (P5).
SLOW_SECONDS = 0.020  # A task that runs longer lets go of those queued behind it.
LEASE_SECONDS = 30.0  # A master that has not renewed for this long is given up (P3).
RENEW_SECONDS = 10.0  # Three chances to renew within one lease.
WARN_SECONDS = 60.0  # The same warning is not given more often.
WATCH_SECONDS = 1.0  # How often masters look for dead masters.
INTERRUPTIONS = 5  # Interrupted single claims after which a task fails (P3).
BUSY_SECONDS = 30.0  # Longest wait for another process's write lock on SQLite.
RETRY_CAP_SECONDS = 3600.0  # Longest wait before a retry.
BOOT_SECONDS = 0.04  # First wait after a worker died as it started; then doubled...
BOOT_CAP_SECONDS = 30.0  # ... up to this.
STORE_SECONDS = 0.1  # The same for a store that fails...
STORE_CAP_SECONDS = 5.0  # ... up to this.
BOOT_TRIES = 5  # Silent deaths of starting workers, in a row, that count as an error.
WAIT_SECONDS = 3600.0  # Longest wait of a dispatcher: selectors overflow at 24 days.
EXIT_SECONDS = 2.0  # A worker told to stop is killed after this long.
ERROR_CHARS = 10_000  # Messages of exceptions are cut to this, tracebacks to 4 times.
EXCEPTION_BYTES = 1_000_000  # A larger pickled exception travels as text only.
MAX_DEPTH = 90  # Nesting of `data`; within the limits of json and of MongoDB (100).
MAX_INT = 2**63 - 1
NEVER = MAX_INT  # An instant after every due date.

_log = logging.getLogger("taskpool")  # Fixed, also where the file is vendored.
_log.addHandler(logging.NullHandler())


# --- Errors --------------------------------------------------------------------------
# Each class exists because somebody catches it apart from the others.


class TaskPoolError(Exception):
    """Base of all errors that taskpool defines.

    TaskPoolError
    +-- DuplicateTask   add_task: the id is taken (also a ValueError)
    +-- StoreError      the store failed; names it (the file, say)
    +-- RemoteError     a task failed with an exception that cannot be rebuilt here
    +-- WorkerDied      a task's process ended under it
    +-- TaskTimeout     a task ran longer than its timeout (also a TimeoutError)
    """


class DuplicateTask(TaskPoolError, ValueError):
    """A task of that id is waiting or running and `if_exists` is "raise"."""


class StoreError(TaskPoolError):
    """The store could not do what was asked; nothing was changed."""


class RemoteError(TaskPoolError):
    """A task's exception, as text, where it cannot be rebuilt in this process.

    `type_name` is the exception's qualified class name, `text` its message and
    `traceback` the formatted remote traceback.
    """

    def __init__(self, type_name: str, text: str = "", traceback: str = "") -> None:
        super().__init__(type_name, text, traceback)
        self.type_name, self.text, self.traceback = type_name, text, traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}" if self.text else self.type_name


class WorkerDied(TaskPoolError):
    """A worker process ended while it ran a task.

    `exit_code` is the exit code, negative for a signal, None if unknown; `pid`,
    `task_type` and `task_id` tell which process and task.
    """

    def __init__(
        self, exit_code: int | None, pid: int, task_type: str = "", task_id: str = ""
    ) -> None:
        super().__init__(exit_code, pid, task_type, task_id)
        self.exit_code, self.pid = exit_code, pid
        self.task_type, self.task_id = task_type, task_id

    def __str__(self) -> str:
        if self.exit_code is None:
            how = "ended, exit code unknown,"
        elif self.exit_code < 0:
            try:
                name = signal.Signals(-self.exit_code).name
            except ValueError:
                name = f"signal {-self.exit_code}"
            how = f"was killed by {name} ({self.exit_code})"
        else:
            how = f"exited with code {self.exit_code}"
        what = f"running {self.task_type!r} task {self.task_id!r}" if self.task_id else "starting"
        return f"worker process {self.pid} {how} while {what}"


class TaskTimeout(TaskPoolError, TimeoutError):
    """A task ran longer than its `timeout`; its worker process was killed."""


class _RemoteTraceback(Exception):
    """The `__cause__` of a task's own exception: the traceback from the worker."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


# --- Tasks ---------------------------------------------------------------------------
# The values that travel, and what may be in them. Nothing here does I/O.

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)


class Row(NamedTuple):
    """One task as stores keep it: the columns of the SQLite table, in order."""

    id: str
    task_type: str
    data: str  # JSON text, made once in add_task.
    priority: int
    created_at: int  # Microseconds since 1970, like all instants here.
    due_at: int  # The due date. Retries do not move it.
    ready_at: int  # The earliest start: the due date, or that of the next retry.
    retries: int
    retry_delay: float  # Seconds.
    timeout: float | None  # Seconds.
    keep_result: float | None  # Seconds.
    lane: str  # "" = for any cluster, else the owner that submitted it.
    state: str  # scheduled or ready (both are `waiting` outside), running, failed, done.
    attempt: int = 0  # Charged starts.
    claim: int = 0  # The fencing token: grows with every claim, never reset.
    owner: str = ""  # Who holds the claim, while running.
    interrupted: int = 0  # Claims that ended with their master, since a run ended.
    result: str | None = None  # JSON text, with keep_result.
    error: str | None = None
    expires_at: int | None = None  # When a `done` row is removed.
    removed: int = 0  # 1: remove() was called during the run.
    successor: str | None = None  # What replaces this when its run ends: _packed_row.
    repeat: str | None = None
    progress: str | None = None
    in_memory: bool = False  # Not a column.


def _packed_row(row: Row) -> str:
    """A Row as text. By name, so that a later version with more columns can read it."""
    return json.dumps(row._asdict())


def _public_state(state: str) -> str:
    return "waiting" if state in ("scheduled", "ready") else state


def _datetime(instant: int) -> datetime:
    return _EPOCH + instant * _MICROSECOND


class Task:
    """One task, as it was when you looked. Immutable.

    Returned by add_task and find, and passed to your functions as `job`.
    """

    __slots__ = ("_data", "_row")
    _row: Row
    _data: Any

    def __init__(self, row: Row) -> None:
        object.__setattr__(self, "_row", row)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Task is immutable; cannot set {name!r} (see TaskQueue.update)")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Task) and self._row == other._row

    def __hash__(self) -> int:
        return hash(self._row)

    def __reduce__(self) -> Any:
        return Task._from_tuple, (tuple(self._row),)

    def __repr__(self) -> str:
        return f"<Task {self.id!r} {self.task_type!r} {self.state}, attempt {self.attempt}>"

    @staticmethod
    def _from_tuple(values: Iterable[Any]) -> Task:
        return Task(Row._make(values))

    @property
    def id(self) -> str:
        """The task's id, unique in its store."""
        return self._row.id

    @property
    def task_type(self) -> str:
        """The key of the cluster's task map."""
        return self._row.task_type

    @property
    def data(self) -> Any:
        """The JSON value given to add_task; this Task's own copy."""
        try:
            return self._data
        except AttributeError:
            object.__setattr__(self, "_data", json.loads(self._row.data))
            return self._data

    @property
    def priority(self) -> int:
        """Higher starts first."""
        return self._row.priority

    @property
    def due_date(self) -> datetime:
        """The earliest start, an aware UTC datetime."""
        return _datetime(self._row.due_at)

    @property
    def created_at(self) -> datetime:
        """When it was added, an aware UTC datetime."""
        return _datetime(self._row.created_at)

    @property
    def in_memory(self) -> bool:
        """Whether it lives in the master's memory only."""
        return bool(self._row.in_memory)

    @property
    def state(self) -> str:
        """`waiting`, `running`, `failed` or `done`."""
        return _public_state(self._row.state)

    @property
    def on_going(self) -> bool:
        """Whether it is running."""
        return self._row.state == "running"

    @property
    def attempt(self) -> int:
        """Number of charged starts: 1 during the first run."""
        return self._row.attempt

    @property
    def retries(self) -> int:
        """Further starts that a failure may have."""
        return self._row.retries

    @property
    def retry_delay(self) -> float:
        """Seconds before the first retry; each further one waits twice as long."""
        return self._row.retry_delay

    @property
    def timeout(self) -> float | None:
        """Seconds after which a run is killed, or None."""
        return self._row.timeout

    @property
    def result(self) -> Any:
        """The JSON result of a `done` task that was added with keep_result."""
        return None if self._row.result is None else json.loads(self._row.result)

    @property
    def error(self) -> str | None:
        """The last failure: type, message and traceback as text."""
        return self._row.error


def _new_id() -> str:
    """A fresh id: time first, so that new ids are neighbours in the store's index."""
    return f"{time.time_ns() // 1000:014x}{os.urandom(9).hex()}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def _wrong_type(name: str, value: Any, allowed: str) -> TypeError:
    return TypeError(f"{name} is {_shown(value)} ({type(value).__name__}); give {allowed}")


def _wrong_value(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{name} is {_shown(value)}; give {allowed}")


def _checked_int(name: str, value: Any, low: int, high: int = MAX_INT) -> int:
    allowed = f"an int from {low} to {high}"
    if type(value) is not int:
        raise _wrong_type(name, value, allowed)
    if not low <= value <= high:
        raise _wrong_value(name, value, allowed)
    return value


def _checked_bool(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise _wrong_type(name, value, "True or False")
    return value


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked_text(name: str, value: Any) -> str:
    """A str that every store keeps unchanged: not empty, no NUL, no lone surrogate."""
    allowed = "a non-empty str of at most 10,000 characters, without NUL or lone surrogates"
    if type(value) is not str:
        raise _wrong_type(name, value, allowed)
    if not 0 < len(value) <= 10_000 or "\0" in value or not _is_unicode(value):
        raise _wrong_value(name, value, allowed)
    return value


def _checked_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    allowed = "one of " + ", ".join(map(repr, choices))
    if type(value) not in {type(choice) for choice in choices}:
        raise _wrong_type(name, value, allowed)
    if value not in choices:
        raise _wrong_value(name, value, allowed)
    return value


def _checked_seconds(name: str, value: Any, zero: bool = False) -> float:
    """Seconds as a float, from a number or a timedelta; 0 only if *zero*."""
    allowed = "a finite number of seconds or a timedelta, " + ("0 or more" if zero else "over 0")
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif type(value) in (int, float):
        try:
            seconds = float(value)
        except OverflowError:
            seconds = math.inf
    else:
        raise _wrong_type(name, value, allowed)
    if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not zero):
        raise _wrong_value(name, value, allowed)
    return seconds


def _checked_milliseconds(name: str, value: Any) -> float:
    """Milliseconds (an int or a timedelta) as seconds."""
    allowed = "a whole number of milliseconds over 0, or a timedelta"
    if isinstance(value, timedelta):
        return _checked_seconds(name, value)
    if type(value) is not int:
        raise _wrong_type(name, value, allowed)
    if not 0 < value <= MAX_INT:
        raise _wrong_value(name, value, allowed)
    return value / 1000


def _instant(due_date: Any, now: int) -> int:
    """Microseconds since 1970 of a due date; naive datetimes are local time."""
    allowed = "a datetime (naive = local time), a timedelta from now, or None"
    if due_date is None:
        return now
    try:
        if isinstance(due_date, timedelta):
            instant = now + due_date // _MICROSECOND
            _datetime(instant)
            return instant
        if isinstance(due_date, datetime):
            aware = due_date if due_date.utcoffset() is not None else due_date.astimezone()
            return (aware - _EPOCH) // _MICROSECOND
    except (OverflowError, ValueError, OSError) as error:
        raise _wrong_value("due_date", due_date, allowed + f" ({error})") from None
    raise _wrong_type("due_date", due_date, allowed)


_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
).encode


def _check_depth(path: str, depth: int) -> None:
    if depth >= MAX_DEPTH:
        shown = path if len(path) <= 80 else path[:77] + "..."
        raise ValueError(f"{shown} is nested too deep; give at most {MAX_DEPTH} levels")


def _check_json(value: Any, path: str, depth: int) -> None:
    """Raise if JSON would alter *value*; *path* is where it stands."""
    kind = type(value)
    if kind is str:
        if not _is_unicode(value):
            raise _wrong_value(path, value, "text without lone surrogates")
    elif kind is int:
        if not -MAX_INT - 1 <= value <= MAX_INT:
            raise _wrong_value(path, value, "an integer of signed 64 bits")
    elif kind is float:
        if not math.isfinite(value):
            raise _wrong_value(path, value, "a finite number")
    elif kind is dict:
        _check_depth(path, depth)
        for key, item in value.items():
            if type(key) is not str:
                raise _wrong_type(f"a key of {path}", key, "str keys, as in JSON")
            if "\0" in key or not _is_unicode(key):
                raise _wrong_value(f"a key of {path}", key, "keys without NUL or lone surrogates")
            _check_json(item, f'{path}["{key}"]', depth + 1)
    elif kind is list:
        _check_depth(path, depth)
        for index, item in enumerate(value):
            if type(item) is not int or not -MAX_INT - 1 <= item <= MAX_INT:
                _check_json(item, f"{path}[{index}]", depth + 1)
    elif value is not None and kind is not bool:
        allowed = "JSON values: dict with str keys, list, str, int, float, bool, None"
        raise _wrong_type(path, value, allowed)


def _checked_json(value: Any) -> str:
    """JSON text of *value*, which will come back equal and of the same types."""
    _check_json(value, "data", 0)
    return str(value) if type(value) is int else _encode(value)


_NO_DATA: dict[str, Any] = {}
_IF_EXISTS = ("raise", "keep", "replace")


def _make_row(
    now: int,
    task_type: Any,
    data: Any = _NO_DATA,
    *,
    priority: Any = 1,
    task_id: Any = None,
    due_date: Any = None,
    in_memory: Any = False,
    retries: Any = 0,
    retry_delay: Any = 1.0,
    timeout: Any = None,
    keep_result: Any = None,
    if_exists: Any = "raise",
    lane: str = "",
) -> tuple[Row, str]:
    """The new Row and its `if_exists`, or the error that add_task documents."""
    _checked_text("task_type", task_type)
    text = _checked_json(data)
    if type(priority) is not int or not -MAX_INT <= priority <= MAX_INT:
        _checked_int("priority", priority, -MAX_INT)
    if in_memory is not False:
        _checked_bool("in_memory", in_memory)
    if task_id is None:
        task_id = f"inMemory_{_new_id()}" if in_memory else _new_id()
    else:
        _checked_text("task_id", task_id)
    if if_exists not in _IF_EXISTS:
        _checked_choice("if_exists", if_exists, _IF_EXISTS)
    if retries != 0 or type(retries) is not int:
        _checked_int("retries", retries, 0)
    if retry_delay != 1.0 or type(retry_delay) is not float:
        retry_delay = _checked_seconds("retry_delay", retry_delay, zero=True)
    if timeout is not None:
        timeout = _checked_seconds("timeout", timeout)
    if keep_result is not None:
        keep_result = _checked_seconds("keep_result", keep_result, zero=True)
    due_at = now if due_date is None else _instant(due_date, now)
    state = "ready" if due_at <= now else "scheduled"
    times = (now, due_at, due_at)
    row = Row(
        *(task_id, task_type, text, priority, *times),
        *(retries, retry_delay, timeout, keep_result, lane, state),
        in_memory=in_memory,
    )
    return row, if_exists


# --- Policies ------------------------------------------------------------------------
# Decisions as pure functions: no I/O, no clock. Stores and the master carry them out.


class Outcome(NamedTuple):
    """What became of one claim: the argument of Store.settle."""

    id: str
    claim: int
    state: str  # done, failed, ready (start again at ready_at), or removed.
    charged: bool = True  # False: given back; the start does not count.
    ready_at: int = 0
    result: str | None = None  # JSON text.
    error: str | None = None


def back_off(seconds: float, failures: int, most: float) -> float:
    """Seconds to wait after so many failures in a row: doubled by each, at most *most*.

    >>> [back_off(1.0, n, 3600.0) for n in (1, 2, 3, 20, 10**6)]
    [1.0, 2.0, 4.0, 3600.0, 3600.0]
    """
    # The exponent is capped, so that the power never overflows.
    return min(seconds * 2.0 ** min(max(failures, 1) - 1, 64), most)


def learned(expected: float | None, seconds: float) -> float:
    """The expected duration of a task type after one more run: quick to rise.

    >>> learned(None, 0.5), learned(0.001, 0.5), round(learned(0.5, 0.1), 3)
    (0.5, 0.5, 0.42)
    """
    if expected is None or seconds > expected:
        return seconds
    return expected + (seconds - expected) / 5


def share(expected: float | None) -> float:
    """The part of a worker's room that a task takes: 1 = a worker for itself.

    A type without history takes all. (P5: 10 ms of expected work, 256 tasks.)

    >>> share(None), share(1.0), share(0.005), share(0.0) == 1 / 256
    (1.0, 1.0, 0.5, True)
    """
    if expected is None:
        return 1.0
    return min(max(expected / AHEAD_SECONDS, 1 / AHEAD_TASKS), 1.0)


def claimed(row: Row, owner: str) -> Row:
    """waiting -> running, claimed by *owner*: one more claim, one more charged start."""
    # Three times as fast as _replace, and done for every task.
    return Row(*row[:12], "running", row.attempt + 1, row.claim + 1, owner, *row[16:])


def after_run(row: Row, outcome: Outcome, now: int) -> Row | None:
    """running -> the Row that follows, or None if the task is over and gone."""
    if row.removed or outcome.state == "removed":
        return None
    if not outcome.charged:
        return row._replace(
            state="ready", attempt=max(row.attempt - 1, 0), owner="", ready_at=outcome.ready_at
        )
    if row.successor is not None:
        # Its created_at stays: that is when it was added.
        return Row(**json.loads(row.successor))
    if outcome.state == "done" and row.keep_result is None:
        return None
    row = row._replace(
        state=outcome.state, owner="", interrupted=0, result=outcome.result, error=outcome.error
    )
    if outcome.state == "ready":
        state = "ready" if outcome.ready_at <= now else "scheduled"
        return row._replace(state=state, ready_at=outcome.ready_at)
    if outcome.state == "done":
        kept = int(min(cast(float, row.keep_result) * 1e6, NEVER - now - 1))  # Fits in a store.
        return row._replace(expires_at=now + kept)
    return row


def after_interruption(row: Row, now: int) -> Row | None:
    """running, its master dead -> the Row that follows, or None. (P3)

    The first interruption only marks the task, as its neighbours may be to blame; from
    then on it is claimed singly and each interruption of such a claim counts.
    """
    if row.removed:
        return None
    interrupted = row.interrupted + 1
    if interrupted > INTERRUPTIONS:
        if row.successor is not None:
            return Row(**json.loads(row.successor))
        times = f"{INTERRUPTIONS} times in a row"
        error = f"Interrupted: its master died {times} while it ran this task alone"
        return row._replace(state="failed", owner="", interrupted=0, error=error)
    return row._replace(
        state="ready", attempt=max(row.attempt - 1, 0), owner="", interrupted=interrupted, lane=""
    )


def after_retry(row: Row, now: int) -> Row:
    """failed -> waiting, with a fresh set of attempts."""
    return row._replace(state="ready", attempt=0, ready_at=now, error=None, lane="")


def after_add(old: Row | None, new: Row, if_exists: str) -> tuple[Row | None, Row]:
    """What add() stores where *old* has the id, and the Row that it returns.

    The first is None if nothing is to be stored. Raises DuplicateTask.
    """
    if old is None or old.state in ("failed", "done"):
        return new, new
    if if_exists == "keep":
        return None, old
    if if_exists == "raise":
        raise DuplicateTask(
            f"task_id {_shown(old.id)} is {_public_state(old.state)}; give another task_id, "
            'or if_exists="keep" or "replace"'
        )
    if old.state == "running":
        return old._replace(successor=_packed_row(new), removed=0), new
    return new, new


def after_update(row: Row | None, task_id: str, changes: Mapping[str, Any], now: int) -> Row:
    """waiting -> waiting with other values. Raises ValueError if it is not waiting."""
    if row is None or row.state not in ("scheduled", "ready"):
        state = "not there" if row is None else row.state
        text = "only waiting tasks can be updated"
        raise ValueError(f"task_id {_shown(task_id)} is {state}; {text}")
    row = row._replace(**changes)
    return row._replace(state="ready" if row.ready_at <= now else "scheduled")


# --- Forks and owners ----------------------------------------------------------------
# What a process must know of itself and of others before it may touch a queue.

_reset_in_forks: weakref.WeakSet[Any] = weakref.WeakSet()  # Have _reset_after_fork().
_carried_over_fork: list[Any] = []  # Kept, so that nobody closes them in this process.
_held_for_fork: list[Any] = []  # The locks that _before_fork took.
_master_ends: set[Any] = set()  # Files and sockets that must not live on in a fork.


def _after_fork_in_child() -> None:
    # No locks, no logging, no threads here: any lock may be held by a thread that does
    # not exist in the child. Siblings must not hold the master's ends of pipes, or a
    # dead master would not read as end-of-file.
    for end in list(_master_ends):
        with contextlib.suppress(OSError):
            end.close()
    _master_ends.clear()
    _held_for_fork.clear()
    for thing in list(_reset_in_forks):
        thing._reset_after_fork()


def _before_fork() -> None:
    # A fork in the middle of a transaction would copy SQLite's own table of locks, and
    # the child would take its parent's for its own: "database is locked", for ever.
    for thing in list(_reset_in_forks):
        for lock in getattr(thing, "_fork_locks", ()):
            if lock.acquire(timeout=BUSY_SECONDS):
                _held_for_fork.append(lock)


def _after_fork_in_parent() -> None:
    while _held_for_fork:
        _held_for_fork.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


_worker: Any | None = None  # Set in a worker process, for good.
_rerunning = False  # True while a worker of ours runs the entry file again.


def _is_rerun() -> bool:
    """Whether this is a child process that still runs the entry file again."""
    # While multiprocessing runs the entry file again, parent_process() is still None and
    # the name may be MainProcess; this flag is what its own "bootstrapping" error uses.
    return _rerunning or getattr(multiprocessing.process.current_process(), "_inheriting", False)


def _is_master() -> bool:
    return _worker is None and not _is_rerun()


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """The start time of a living process, in ticks since boot; "" if there is none."""
    fields = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(fields) < 20 or fields[0] in "ZX":  # A zombie is dead: see proc(5).
        return ""
    return fields[19]


def _here() -> str:
    """This boot of this machine and its pid namespace; "" where /proc does not tell."""
    boot = _read_text("/proc/sys/kernel/random/boot_id")
    try:
        return boot and f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _new_owner() -> str:
    """A name for a running cluster, from which others can see whether it died."""
    pid = os.getpid()
    return f"{_here()}|{pid}|{_process_start(pid)}|{os.urandom(8).hex()}"


def owner_is_dead(owner: str) -> bool:
    """Whether that owner is surely dead. False if that cannot be seen from here. (P3)"""
    place, _, rest = owner.partition("|")
    pid, _, rest = rest.partition("|")
    start = rest.partition("|")[0]
    if not start or not pid.isdigit() or place != _here():
        return False
    return _process_start(int(pid)) != start


# --- Stores --------------------------------------------------------------------------
# A store decides nothing. It moves a task along the arrow that it was asked for, if the
# task is still at the arrow's foot, by the functions above. It reads no clock.


class Query(NamedTuple):
    """Which tasks find, count, remove and retry mean: those that fit every field."""

    ids: Sequence[str] | None = None
    types: Sequence[str] | None = None
    states: Sequence[str] | None = None  # As users say them: waiting, running...
    due: bool | None = None  # True: could run now. False: waiting, but not due.
    until: int = NEVER  # Due date at most this.
    limit: int | None = None
    offset: int = 0


class Store:
    """Where tasks live. Subclass it, and TaskQueue takes your store.

    All methods may be called from any thread. Each is atomic, and raises StoreError,
    having changed nothing, if the store fails. `now` is microseconds since 1970. An
    `owner` is the text that a running cluster calls itself by.
    """

    in_memory = False

    def add(self, additions: Sequence[tuple[Row, str]], now: int) -> list[Row]:
        """-> waiting, for (row, if_exists) in *additions*: all, or none if one raises.

        after_add() decides what a taken id means. Returns the Rows that stand for the
        additions: new ones, or those kept.
        """
        raise NotImplementedError

    def claim(
        self,
        owner: str,
        types: Mapping[str, float] | Iterable[str],
        limit: float,
        now: int,
        until: int = NEVER,
    ) -> list[Row]:
        """waiting -> running: take what is due, highest priority first, then oldest.

        *limit* is how much to take: each task uses up `types[task_type]` of it, or 1
        where *types* is not a mapping; the first that does not fit ends the claim.
        Takes only tasks with a due date of at most *until*, and of other owners' lanes
        none. Each Row returned has its attempt and claim counted up. A task that was
        interrupted is taken alone, and only if *owner* holds no other such task. A row
        that cannot be read becomes `failed`, and is returned so.
        """
        raise NotImplementedError

    def settle(self, owner: str, outcomes: Sequence[Outcome], now: int) -> list[bool]:
        """running -> what after_run() says, for each outcome whose claim is still held.

        Returns for each whether it was; the others change nothing.
        """
        raise NotImplementedError

    def renew(self, owner: str, now: int) -> None:
        """Tell observers that *owner* lives; also removes `done` rows that expired."""
        raise NotImplementedError

    def recover(self, owner: str, seconds: float, now: int) -> list[Row]:
        """running -> what after_interruption() says, for tasks of dead owners.

        *seconds* is the observer's monotonic clock. Returns the Rows that ended.
        """
        raise NotImplementedError

    def leave(self, owner: str, now: int) -> None:
        """Give back, uncharged, all that *owner* still holds, and forget it."""
        raise NotImplementedError

    def next_due(
        self, owner: str, types: Iterable[str], limit: int, now: int, until: int = NEVER
    ) -> list[int]:
        """When waiting tasks that claim() would take can start, the first *limit*.

        Those that can start now come as some instant of at most *now*.
        """
        raise NotImplementedError

    def foreign(self, types: Iterable[str], now: int) -> list[str]:
        """Task types outside *types* of which a task is due."""
        raise NotImplementedError

    def find(self, query: Query, now: int) -> list[Row]:
        """The Rows that fit *query*, oldest first."""
        raise NotImplementedError

    def count(self, query: Query, now: int) -> int:
        """How many Rows fit *query*."""
        raise NotImplementedError

    def remove(self, query: Query, now: int) -> int:
        """-> (removed). A running task is marked: after its run nothing follows."""
        raise NotImplementedError

    def retry(self, query: Query, now: int) -> int:
        """failed -> waiting, with a fresh set of attempts. Returns how many."""
        raise NotImplementedError

    def update(self, task_id: str, changes: Mapping[str, Any], now: int) -> Row:
        """waiting -> waiting with *changes* to its columns, as after_update() says."""
        raise NotImplementedError

    def transaction(self) -> contextlib.AbstractContextManager[Any]:
        """Make the calls inside one write, and yield anything but None, if the store can."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Let go of files and connections. A later call opens them again."""


def _shares(types: Mapping[str, float] | Iterable[str]) -> Mapping[str, float]:
    return types if isinstance(types, Mapping) else dict.fromkeys(types, 1.0)


_RankedRow = tuple[int, int, int, Row]  # (-priority, created_at, insertion, row)


def _fits(row: Row, query: Query, now: int) -> bool:
    waiting = row.state in ("scheduled", "ready")
    could_run = row.state == "ready" or (row.state == "scheduled" and row.ready_at <= now)
    return (
        (query.types is None or row.task_type in query.types)
        and (query.states is None or _public_state(row.state) in query.states)
        and (query.due is None or (waiting and could_run == query.due))
        and row.due_at <= query.until
    )


class MemoryStore(Store):
    """Tasks in this process only: two heaps for each lane and type.

    An entry of a heap is alive while its Row is the one in `_rows`; changed and removed
    tasks leave dead entries, which are skipped, and swept when they outnumber the rest.
    """

    in_memory = True

    def __init__(self) -> None:
        self._reset_after_fork()
        _reset_in_forks.add(self)

    def _reset_after_fork(self) -> None:
        """A forked child starts empty: the tasks belong to its parent."""
        self._lock = threading.RLock()  # Protects all below; held for a moment only.
        self._rows: dict[str, Row] = {}
        self._ready: dict[tuple[str, str], list[_RankedRow]] = {}
        self._scheduled: dict[tuple[str, str], list[tuple[int, int, Row]]] = {}
        self._expiring: list[tuple[int, str]] = []  # A heap of (expires_at, id).
        self._insertions = itertools.count()
        self._dead_entries = 0

    def add(self, additions: Sequence[tuple[Row, str]], now: int) -> list[Row]:
        with self._lock:
            added: list[Row] = []
            before: list[tuple[str, Row | None]] = []
            try:
                for new, if_exists in additions:
                    old = self._rows.get(new.id)
                    stored, row = after_add(old, new, if_exists)
                    if stored is not None:
                        before.append((new.id, old))
                        self._put(stored)
                    added.append(row)
            except DuplicateTask:
                for task_id, old in reversed(before):
                    self._put(old) if old else self._drop(task_id)
                raise
            return added

    def _put(self, row: Row) -> None:
        if row.id in self._rows:
            self._dead_entries += 1
        self._rows[row.id] = row
        place = row.lane, row.task_type
        if row.state == "ready":
            entry = (-row.priority, row.created_at, next(self._insertions), row)
            heapq.heappush(self._ready.setdefault(place, []), entry)
        elif row.state == "scheduled":
            due = (row.ready_at, next(self._insertions), row)
            heapq.heappush(self._scheduled.setdefault(place, []), due)
        elif row.expires_at is not None:
            heapq.heappush(self._expiring, (row.expires_at, row.id))
        if self._dead_entries > 1000 + len(self._rows):
            self._sweep()

    def _drop(self, task_id: str) -> None:
        if self._rows.pop(task_id, None):
            self._dead_entries += 1

    def _sweep(self) -> None:
        self._dead_entries = 0
        heaps: list[dict[Any, list[Any]]] = [cast(Any, self._ready), cast(Any, self._scheduled)]
        for by_place in heaps:
            for place, heap in list(by_place.items()):
                alive = [entry for entry in heap if self._alive(entry[-1])]
                heapq.heapify(alive)
                by_place[place] = alive
                if not alive:
                    del by_place[place]

    def _alive(self, row: Row) -> bool:
        return self._rows.get(row.id) is row

    def _top(self, owner: str, types: Iterable[str], now: int) -> Iterator[list[_RankedRow]]:
        """The heaps of ready tasks, after what became due moved there."""
        for task_type in types:
            for place in (("", task_type), (owner, task_type)):
                scheduled = self._scheduled.get(place)
                while scheduled and (scheduled[0][0] <= now or not self._alive(scheduled[0][2])):
                    row = heapq.heappop(scheduled)[2]
                    if self._alive(row):
                        self._put(row._replace(state="ready"))
                heap = self._ready.get(place)
                while heap and not self._alive(heap[0][3]):
                    heapq.heappop(heap)
                if heap:
                    yield heap

    def claim(
        self,
        owner: str,
        types: Mapping[str, float] | Iterable[str],
        limit: float,
        now: int,
        until: int = NEVER,
    ) -> list[Row]:
        if not self._rows:
            return []
        shares = _shares(types)
        taken: list[Row] = []
        later: list[Row] = []
        with self._lock:
            tops = list(self._top(owner, shares, now))
            heads = [(heap[0], index) for index, heap in enumerate(tops)]
            heapq.heapify(heads)
            while heads:
                (_, _, _, row), index = heads[0]
                heap = tops[index]
                if row.due_at > until:
                    later.append(row)
                elif shares[row.task_type] > limit + 1e-9:
                    break
                else:
                    limit -= shares[row.task_type]
                    self._rows[row.id] = running = claimed(row, owner)
                    taken.append(running)
                heapq.heappop(heap)
                while heap and not self._alive(heap[0][3]):
                    heapq.heappop(heap)
                if heap:
                    heapq.heapreplace(heads, (heap[0], index))
                else:
                    heapq.heappop(heads)
            for row in later:
                self._put(row)
        return taken

    def settle(self, owner: str, outcomes: Sequence[Outcome], now: int) -> list[bool]:
        held: list[bool] = []
        with self._lock:
            for outcome in outcomes:
                row = self._rows.get(outcome.id)
                mine = row is not None and (row.claim, row.owner) == (outcome.claim, owner)
                held.append(mine)
                if row is not None and mine:
                    following = after_run(row, outcome, now)
                    if following is None:
                        del self._rows[row.id]
                    else:
                        self._put(following)
        return held

    def renew(self, owner: str, now: int) -> None:
        with self._lock:
            while self._expiring and self._expiring[0][0] <= now:
                expires_at, task_id = heapq.heappop(self._expiring)
                row = self._rows.get(task_id)
                if row is not None and row.expires_at == expires_at:
                    self._drop(task_id)

    def recover(self, owner: str, seconds: float, now: int) -> list[Row]:
        return []  # These tasks die with their master.

    def leave(self, owner: str, now: int) -> None:
        with self._lock:
            for row in list(self._rows.values()):
                if row.owner == owner and row.state == "running":
                    attempt = row.attempt - 1
                    self._put(row._replace(state="ready", owner="", attempt=attempt, lane=""))
                elif row.lane == owner:
                    self._put(row._replace(lane=""))

    def next_due(
        self, owner: str, types: Iterable[str], limit: int, now: int, until: int = NEVER
    ) -> list[int]:
        if not self._rows:
            return []
        with self._lock:
            due: list[int] = []
            types = list(types)
            for heap in self._top(owner, types, now):
                ready = (now for *_, row in heap if self._alive(row) and row.due_at <= until)
                due.extend(itertools.islice(ready, limit - len(due)))
            for place in itertools.product(("", owner), types):
                # Usually only the first, which is the earliest: that is all a timer needs.
                for ready_at, _, row in self._scheduled.get(place, ()):
                    if self._alive(row) and row.due_at <= until:
                        due.append(ready_at)
                        break
            return sorted(due)[:limit]

    def foreign(self, types: Iterable[str], now: int) -> list[str]:
        known = set(types)
        with self._lock:
            places = list(self._ready) + list(self._scheduled)
            other = {task_type for lane, task_type in places if not lane} - known
            return [t for t in sorted(other) if any(self._top("", [t], now))]

    def find(self, query: Query, now: int) -> list[Row]:
        with self._lock:
            if query.ids is None:
                rows = list(self._rows.values())
            else:
                rows = [self._rows[i] for i in dict.fromkeys(query.ids) if i in self._rows]
        found = sorted((r for r in rows if _fits(r, query, now)), key=lambda row: row.created_at)
        stop = None if query.limit is None else query.offset + query.limit
        return found[query.offset : stop]

    def count(self, query: Query, now: int) -> int:
        if query == Query():
            return len(self._rows)
        return len(self.find(query, now))

    def remove(self, query: Query, now: int) -> int:
        with self._lock:
            rows = self.find(query, now)
            for row in rows:
                if row.state == "running":
                    self._rows[row.id] = row._replace(removed=1, successor=None)
                else:
                    self._drop(row.id)
            return len(rows)

    def retry(self, query: Query, now: int) -> int:
        with self._lock:
            rows = [row for row in self.find(query, now) if row.state == "failed"]
            for row in rows:
                self._put(after_retry(row, now))
            return len(rows)

    def update(self, task_id: str, changes: Mapping[str, Any], now: int) -> Row:
        with self._lock:
            row = after_update(self._rows.get(task_id), task_id, changes, now)
            self._put(row)
            return row


# SQL, in the order of a task's life. Nothing newer than SQLite 3.31. Table names carry
# our name, as the file may be your application's own.

_COLUMNS = Row._fields[:-1]
_LIST = ", ".join(_COLUMNS)

SCHEMA_VERSION = 1  # Counts changes of what follows; see SQLiteStore._prepare.
_SCHEMA = (
    """
    CREATE TABLE IF NOT EXISTS taskpool_task (
        seq INTEGER PRIMARY KEY,  -- order of insertion
        id TEXT NOT NULL UNIQUE, task_type TEXT NOT NULL, data TEXT NOT NULL,
        priority INTEGER NOT NULL, created_at INTEGER NOT NULL,
        due_at INTEGER NOT NULL, ready_at INTEGER NOT NULL,
        retries INTEGER NOT NULL, retry_delay REAL NOT NULL, timeout REAL,
        keep_result REAL, lane TEXT NOT NULL, state TEXT NOT NULL,
        attempt INTEGER NOT NULL, claim INTEGER NOT NULL, owner TEXT NOT NULL,
        interrupted INTEGER NOT NULL, result TEXT, error TEXT, expires_at INTEGER,
        removed INTEGER NOT NULL, successor TEXT, repeat TEXT, progress TEXT)
    """,
    # For _READY and _FOREIGN: what can be claimed, in order.
    """
    CREATE INDEX IF NOT EXISTS taskpool_ready
    ON taskpool_task (lane, task_type, priority DESC, created_at) WHERE state = 'ready'
    """,
    # For _PROMOTE and _NEXT_DUE: rows that are not due are never in the way of others.
    """
    CREATE INDEX IF NOT EXISTS taskpool_scheduled
    ON taskpool_task (lane, task_type, ready_at) WHERE state = 'scheduled'
    """,
    # For _HELD_BY, _OWNERS, _SUSPECT.
    """
    CREATE INDEX IF NOT EXISTS taskpool_running
    ON taskpool_task (owner, interrupted) WHERE state = 'running'
    """,
    # For _OPEN_LANE.
    """
    CREATE INDEX IF NOT EXISTS taskpool_lane ON taskpool_task (lane) WHERE lane > ''
    """,
    # For _EXPIRE.
    """
    CREATE INDEX IF NOT EXISTS taskpool_expires
    ON taskpool_task (expires_at) WHERE expires_at IS NOT NULL
    """,
    """
    CREATE TABLE IF NOT EXISTS taskpool_master (owner TEXT PRIMARY KEY, beat INTEGER NOT NULL)
    """,
    "CREATE TABLE IF NOT EXISTS taskpool_version (version INTEGER NOT NULL)",
)

# What leads from version n to n + 1. Never changed once released: it states old names.
_SUCCESSOR_0 = (
    "id task_type data priority created_at due_at ready_at retries retry_delay timeout "
    "keep_result lane state attempt claim owner interrupted result error expires_at removed "
    "successor in_memory".split()
)
_UPGRADES = (
    (
        "ALTER TABLE taskpool_task ADD COLUMN repeat TEXT",
        "ALTER TABLE taskpool_task ADD COLUMN progress TEXT",
        "UPDATE taskpool_task SET successor = json_object({}) WHERE successor IS NOT NULL".format(
            ", ".join(
                f"'{name}', json_extract(successor, '$[{index}]')"
                for index, name in enumerate(_SUCCESSOR_0)
            )
        ),
    ),
)
_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"

# -> waiting. Fails if the id is taken.
_ADD = f"INSERT INTO taskpool_task ({_LIST}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_BY_ID = f"SELECT {_LIST} FROM taskpool_task WHERE id = ?"
_ERASE = "DELETE FROM taskpool_task WHERE id = ?"
# Any state -> any other: writes a whole Row back.
_WRITE = f"UPDATE taskpool_task SET ({_LIST}) = ({', '.join('?' * len(_COLUMNS))}) WHERE id = ?"

# scheduled -> ready
_PROMOTE = """
UPDATE taskpool_task SET state = 'ready'
WHERE state = 'scheduled' AND lane = ? AND task_type = ? AND ready_at <= ?
"""
# What claim() would take of one lane and type, best first.
_READY = f"""
SELECT seq, {_LIST} FROM taskpool_task
WHERE state = 'ready' AND lane = ? AND task_type = ? AND due_at <= ?
ORDER BY priority DESC, created_at, seq LIMIT ?
"""
# ready -> running
_CLAIM = """
UPDATE taskpool_task
SET state = 'running', owner = ?, claim = claim + 1, attempt = attempt + 1 WHERE seq = ?
"""
# ready -> failed, for rows that cannot be read: they must not block the rest.
_SET_ASIDE = "UPDATE taskpool_task SET state = 'failed', error = ? WHERE seq = ?"
_SUSPECT = """
SELECT 1 FROM taskpool_task
WHERE state = 'running' AND owner = ? AND interrupted > 0 LIMIT 1
"""
_NEXT_DUE = """
SELECT ready_at FROM taskpool_task
WHERE state = 'scheduled' AND lane = ? AND task_type = ? AND due_at <= ?
ORDER BY ready_at LIMIT ?
"""
_COUNT_READY = """
SELECT count(*) FROM (SELECT 1 FROM taskpool_task
WHERE state = 'ready' AND lane = ? AND task_type = ? AND due_at <= ? LIMIT ?)
"""

# True only for the claim that the caller was given: an ended claim is not 'running', and
# a later one has another number.
_HELD = "id = ? AND claim = ? AND owner = ? AND state = 'running'"
# running -> (removed), the common end of a run.
_FINISH = f"DELETE FROM taskpool_task WHERE {_HELD} AND successor IS NULL"
_HELD_ROW = f"SELECT {_LIST} FROM taskpool_task WHERE {_HELD}"
_HELD_BY = f"SELECT {_LIST} FROM taskpool_task WHERE state = 'running' AND owner = ?"

_RENEW = "UPDATE taskpool_master SET beat = beat + 1 WHERE owner = ?"
_ENTER = "INSERT INTO taskpool_master (owner, beat) VALUES (?, 0)"
_LEAVE = "DELETE FROM taskpool_master WHERE owner = ?"
# Holders of claims, and owners of lanes, that are not in the table of masters count as
# silent masters: one may die before its first beat, or add to its lane as it leaves.
_OWNERS = """
WITH RECURSIVE lane_owner(o) AS (
    SELECT min(lane) FROM taskpool_task WHERE lane > ''
    UNION ALL SELECT (SELECT min(lane) FROM taskpool_task WHERE lane > '' AND lane > o)
    FROM lane_owner WHERE o IS NOT NULL)
SELECT owner, beat FROM taskpool_master
UNION SELECT owner, -1 FROM (
    SELECT owner FROM taskpool_task WHERE state = 'running'
    UNION SELECT o FROM lane_owner WHERE o IS NOT NULL)
WHERE owner NOT IN (SELECT owner FROM taskpool_master)
"""
_OPEN_LANE = "UPDATE taskpool_task SET lane = '' WHERE lane > '' AND lane = ?"
_EXPIRE = "DELETE FROM taskpool_task WHERE expires_at IS NOT NULL AND expires_at <= ?"

# The distinct task types that wait, one index look-up each.
_FOREIGN = """
WITH RECURSIVE
ready(t) AS (
    SELECT min(task_type) FROM taskpool_task WHERE state = 'ready' AND lane = ''
    UNION ALL SELECT (SELECT min(task_type) FROM taskpool_task
                      WHERE state = 'ready' AND lane = '' AND task_type > t)
    FROM ready WHERE t IS NOT NULL),
scheduled(t) AS (
    SELECT min(task_type) FROM taskpool_task WHERE state = 'scheduled' AND lane = ''
    UNION ALL SELECT (SELECT min(task_type) FROM taskpool_task
                      WHERE state = 'scheduled' AND lane = '' AND task_type > t)
    FROM scheduled WHERE t IS NOT NULL)
SELECT t FROM ready WHERE t IS NOT NULL
UNION SELECT t FROM scheduled WHERE t IS NOT NULL AND
    (SELECT min(ready_at) FROM taskpool_task
     WHERE state = 'scheduled' AND lane = '' AND task_type = t) <= ?
"""

_OLDEST_FIRST = "ORDER BY created_at, seq LIMIT ? OFFSET ?"
# waiting, failed, done -> (removed); a running task is marked.
_REMOVE = "DELETE FROM taskpool_task WHERE state <> 'running'"
_MARK = "UPDATE taskpool_task SET removed = 1, successor = NULL WHERE state = 'running'"


def _decoded(raw: bytes, otherwise: Any) -> Any:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return otherwise


def _rank(candidate: Sequence[Any]) -> tuple[int, int, int]:
    """The order of claims, for a result of _READY."""
    seq, _, _, _, priority, created_at = candidate[:6]
    if type(priority) is not int or type(created_at) is not int:
        return -NEVER, 0, seq  # It cannot be run: see _unusable.
    return -priority, created_at, seq


def _unusable(columns: Sequence[Any]) -> str:
    """Why a stored row cannot be a Row ("" if it can): SQLite keeps any type anywhere."""
    for name, value in zip(_COLUMNS, columns):
        if type(value) not in _COLUMN_TYPES[name]:
            return f"column {name} holds {_shown(value)}"
    return ""


_NULL = type(None)
_TEXT, _INT, _REAL = (str,), (int,), (float, int)
_COLUMN_TYPES: dict[str, tuple[type, ...]] = dict(
    zip(
        _COLUMNS,
        # id to ready_at
        (_TEXT, _TEXT, _TEXT, _INT, _INT, _INT, _INT)
        # retries to state
        + (_INT, _REAL, (*_REAL, _NULL), (*_REAL, _NULL), _TEXT, _TEXT)
        # attempt to interrupted
        + (_INT, _INT, _TEXT, _INT)
        # result to progress
        + ((str, _NULL), (str, _NULL), (int, _NULL), _INT, *[(str, _NULL)] * 3),
    )
)


def _where(query: Query, now: int) -> tuple[str, list[Any]]:
    """The condition of *query* in SQL, and its values."""
    terms: list[str] = ["1"]
    values: list[Any] = []
    states = query.states
    if states is not None:
        states = [s for s in states if s != "waiting"]
        if "waiting" in cast(Sequence[str], query.states):
            states += ["scheduled", "ready"]
    for column, allowed in (("id", query.ids), ("task_type", query.types), ("state", states)):
        if allowed is not None:
            if len(allowed) <= 500:
                terms.append(f"{column} IN ({', '.join('?' * len(allowed))})")
                values += allowed
            else:  # SQLite before 3.32 takes 999 values at most.
                terms.append(f"{column} IN (SELECT value FROM json_each(?))")
                values.append(json.dumps(list(allowed)))
    if query.due is not None:
        terms.append("state IN ('scheduled', 'ready')")
        terms.append(f"(state = 'ready' OR ready_at <= ?) = {int(query.due)}")
        values.append(now)
    if query.until != NEVER:
        terms.append("due_at <= ?")
        values.append(query.until)
    return " AND ".join(terms), values


_T = TypeVar("_T")  # What is read or written.


class SQLiteStore(Store):
    """Tasks in one SQLite file (WAL), shared by any number of processes of one machine.

    *path* is a file name; the file is made at first use, its folder must exist.
    *synchronous* is SQLite's: "NORMAL" survives the death of any process, "FULL" power
    failure as well, at the price of an fsync per write.

    Writers take turns by SQLite's lock, for which a call waits up to 30 s. Raises
    StoreError, with the path, for whatever SQLite reports.
    """

    def __init__(self, path: str | os.PathLike[str], *, synchronous: str = "NORMAL") -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise _wrong_type("path", path, "a file name")
        name = os.fspath(path)
        if not isinstance(name, str) or not name or "\0" in name or name == ":memory:":
            raise _wrong_value("path", path, 'a file name (for tasks in memory: "in_memory=True")')
        self._synchronous = _checked_choice("synchronous", synchronous, ("NORMAL", "FULL"))
        self.path = os.path.abspath(name)  # Now: a task may change the directory.
        self._connections: list[sqlite3.Connection] = []
        self._reset_after_fork()
        _reset_in_forks.add(self)

    def __repr__(self) -> str:
        return f"SQLiteStore({self.path!r})"

    def _reset_after_fork(self) -> None:
        """Use fresh connections in a forked child, and never close the parent's: closing
        drops the locks of the whole process (sqlite.org/howtocorrupt.html, 2.6)."""
        _carried_over_fork.extend(self._connections)
        self._connections = []
        # One connection writes, another reads, each under its lock. A thread that holds
        # the write lock also reads through the writer, to see what it wrote.
        self._write_lock, self._read_lock = threading.RLock(), threading.Lock()
        self._fork_locks = (self._write_lock, self._read_lock)
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._opened = self._reading = (0, 0)  # The _identity that each has.
        self._stale = False  # Open again before the next write.
        self._grouping = 0  # The thread in transaction(), which holds the write lock.
        self._seen: dict[str, tuple[int, float]] = {}  # owner -> beat, and since when.

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if type(error) is sqlite3.DatabaseError:
                self._stale = True  # Damaged, perhaps: look at the file afresh next time.
            raise StoreError(f"{self.path}: {error}{self._hint()}") from error

    def _identity(self) -> tuple[int, int]:
        """Which file has our name now. SQLite writes to the one that it opened, also when
        that was deleted or replaced: what it stores there is lost."""
        try:
            found = os.stat(self.path)
        except OSError:
            return 0, 0
        return found.st_dev, found.st_ino

    def _hint(self) -> str:
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            return f"; the folder {folder} does not exist"
        if os.path.exists(self.path) and not os.access(self.path, os.W_OK):
            return "; the file is not writable"
        return ""

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self._version(db)  # A newer file is refused before anything is changed.
            self._use_wal(db)
            db.execute(f"PRAGMA synchronous = {self._synchronous}")
            if self._version(db) != SCHEMA_VERSION:
                self._make_schema(db)
        except BaseException:
            db.close()
            raise
        self._connections.append(db)
        return db

    def _version(self, db: sqlite3.Connection) -> int | None:
        """The version of our tables, None if there are none. Raises StoreError if newer.

        In a file of ours it is `user_version`, where other tools see it. In one that is
        shared with an application that number is the application's: ours is in a table.
        """
        tables = {name for (name,) in db.execute(_TABLES)}
        alone = all(name.startswith("taskpool_") for name in tables)
        if "taskpool_task" not in tables:
            version = None
        elif alone:
            (version,) = db.execute("PRAGMA user_version").fetchone()
        elif "taskpool_version" in tables:
            (version,) = db.execute("SELECT max(version) FROM taskpool_version").fetchone()
        else:
            version = 0
        if (version or 0) > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path}: made by a newer taskpool (schema {version}; this is "
                f"{__version__}, schema {SCHEMA_VERSION}): update your taskpool.py"
            )
        return version

    def _make_schema(self, db: sqlite3.Connection) -> None:
        """Make the tables, or bring those of an older version up to date."""
        db.execute("BEGIN IMMEDIATE")
        version = self._version(db)  # Again: another process may have been quicker.
        if version is not None:
            for statements in _UPGRADES[version:]:
                for statement in statements:
                    db.execute(statement)
        for statement in _SCHEMA:
            db.execute(statement)
        db.execute("DELETE FROM taskpool_version")
        db.execute("INSERT INTO taskpool_version VALUES (?)", (SCHEMA_VERSION,))
        if all(name.startswith("taskpool_") for (name,) in db.execute(_TABLES)):
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")

    def _use_wal(self, db: sqlite3.Connection) -> None:
        # The switch needs the file for itself and fails at once, whatever the timeout.
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                if "readonly" in str(error):
                    return  # Reading is possible; a write will say what is wrong.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
        if mode != "wal" and not self._connections:  # Once.
            _log.warning("%s: WAL is not possible here; journal mode is %s", self.path, mode)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        with self._write_lock, self._errors():
            if self._grouping:
                yield cast(sqlite3.Connection, self._writer)
                return
            try:
                db = self._begin()
                self._grouping = threading.get_ident()
                yield db
                self._commit(db)
            except BaseException:
                self._roll_back()
                raise
            finally:
                self._grouping = 0

    def _write(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Have *work* write in a transaction of its own, or in that of the caller.

        This and _read are no context managers: a Ctrl-C between the entering of one and
        its block would keep the lock as long as somebody looks at the KeyboardInterrupt.
        """
        with self._write_lock, self._errors():
            if self._grouping:
                return work(cast(sqlite3.Connection, self._writer))
            try:
                db = self._begin()
                result = work(db)
                self._commit(db)
                return result
            except BaseException:
                self._roll_back()
                raise

    def _begin(self) -> sqlite3.Connection:
        if self._stale or self._opened != self._identity():
            self.close()
        if self._writer is None:
            self._writer = self._open()
            self._opened = self._identity()
        self._roll_back()  # What a second Ctrl-C, just after the first, left open.
        self._writer.execute("BEGIN IMMEDIATE")
        return self._writer

    def _commit(self, db: sqlite3.Connection) -> None:
        db.execute("COMMIT")
        if self._opened != self._identity():
            raise StoreError(f"{self.path}: the file was deleted or replaced")

    def _roll_back(self) -> None:
        # SQLite may have rolled back itself (full disk); keep the first error.
        if self._writer is not None and self._writer.in_transaction:
            self._writer.execute("ROLLBACK")

    def _read(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Have *work* read, in a transaction() what was written there too."""
        with self._errors():
            if self._grouping == threading.get_ident():
                return work(cast(sqlite3.Connection, self._writer))
            with self._read_lock:
                if self._reader is not None and self._reading != self._identity():
                    self._connections.remove(self._reader)
                    self._reader.close()
                    self._reader = None
                if self._reader is None:
                    self._reader = self._open()
                    self._reading = self._identity()
                return work(self._reader)

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            for db in self._connections:
                db.close()
            self._connections, self._writer, self._reader = [], None, None
            self._stale = False

    def add(self, additions: Sequence[tuple[Row, str]], now: int) -> list[Row]:
        return self._write(lambda db: [self._add(db, *addition) for addition in additions])

    def _add(self, db: sqlite3.Connection, new: Row, if_exists: str) -> Row:
        try:
            db.execute(_ADD, new[:-1])
            return new
        except sqlite3.IntegrityError:
            old = self._row(db, new.id)
        if old is None:
            raise StoreError(f"{self.path}: the task {_shown(new.id)} cannot be stored")
        stored, row = after_add(old, new, if_exists)
        if stored is not None:
            self._replace(db, old, stored)
        return row

    def _row(self, db: sqlite3.Connection, task_id: str) -> Row | None:
        found = db.execute(_BY_ID, (task_id,)).fetchone()
        return None if found is None else Row(*found)

    def _replace(self, db: sqlite3.Connection, old: Row, new: Row | None) -> None:
        """Write *new* in the place of *old*; a new task goes to the end of the line."""
        if new is not None and (new.id, new.created_at) == (old.id, old.created_at):
            db.execute(_WRITE, (*new[:-1], old.id))
            return
        db.execute(_ERASE, (old.id,))
        if new is not None:
            db.execute(_ADD, new[:-1])

    def claim(
        self,
        owner: str,
        types: Mapping[str, float] | Iterable[str],
        limit: float,
        now: int,
        until: int = NEVER,
    ) -> list[Row]:
        shares = _shares(types)
        if not shares or limit <= 0:
            return []

        def work(db: sqlite3.Connection) -> list[Row]:
            try:
                return self._claim(db, owner, shares, limit, now, until)
            except sqlite3.OperationalError as error:
                if "decode" not in str(error):
                    raise
            # Text that is not UTF-8: look again, so that _unusable finds the row.
            db.text_factory = lambda raw: _decoded(raw, raw)
            try:
                return self._claim(db, owner, shares, limit, now, until)
            finally:
                db.text_factory = str

        return self._write(work)

    def _claim(
        self,
        db: sqlite3.Connection,
        owner: str,
        shares: Mapping[str, float],
        limit: float,
        now: int,
        until: int,
    ) -> list[Row]:
        most = math.ceil(limit / min(shares.values()))
        suspect = db.execute(_SUSPECT, (owner,)).fetchone() is not None
        places = [(lane, t) for t in shares for lane in ("", owner)]
        db.executemany(_PROMOTE, [(*place, now) for place in places])
        streams = [db.execute(_READY, (*place, until, most)) for place in places]
        candidates = iter(streams[0]) if len(streams) == 1 else heapq.merge(*streams, key=_rank)
        taken: list[Row] = []
        taken_seq: list[tuple[str, int]] = []
        broken: list[tuple[str, int]] = []
        broken_rows: list[Row] = []
        for seq, *columns in candidates:
            reason = _unusable(columns)
            if reason:
                broken.append((reason, seq))
                broken_rows.append(Row(*columns)._replace(state="failed", error=reason))
                continue
            row = Row(*columns)
            if row.interrupted and suspect:
                continue
            cost = 1.0 if row.interrupted else shares[row.task_type]
            if cost > limit + 1e-9 or (row.interrupted and taken):
                break
            limit -= cost
            taken.append(claimed(row, owner))
            taken_seq.append((owner, seq))
            if row.interrupted:
                break
        for stream in streams:
            stream.close()
        db.executemany(_CLAIM, taken_seq)
        db.executemany(_SET_ASIDE, broken)
        return taken + broken_rows

    def settle(self, owner: str, outcomes: Sequence[Outcome], now: int) -> list[bool]:
        return self._write(lambda db: [self._settle(db, owner, o, now) for o in outcomes])

    def _settle(self, db: sqlite3.Connection, owner: str, outcome: Outcome, now: int) -> bool:
        claim = outcome.id, outcome.claim, owner
        if outcome.state == "done" and outcome.result is None and outcome.error is None:
            if db.execute(_FINISH, claim).rowcount:
                return True
        found = db.execute(_HELD_ROW, claim).fetchone()
        if found is None:
            return False
        row = Row(*found)
        self._replace(db, row, after_run(row, outcome, now))
        return True

    def renew(self, owner: str, now: int) -> None:
        def work(db: sqlite3.Connection) -> None:
            if not db.execute(_RENEW, (owner,)).rowcount:
                db.execute(_ENTER, (owner,))
            db.execute(_EXPIRE, (now,))

        self._write(work)

    def recover(self, owner: str, seconds: float, now: int) -> list[Row]:
        def look(db: sqlite3.Connection) -> dict[str, int]:
            return dict(db.execute(_OWNERS).fetchall())

        beats = self._read(look)
        beats.pop(owner, None)
        for other, beat in beats.items():
            if self._seen.get(other, (None,))[0] != beat:
                self._seen[other] = beat, seconds
        self._seen = {other: seen for other, seen in self._seen.items() if other in beats}
        silent = [o for o, (_, since) in self._seen.items() if seconds - since >= LEASE_SECONDS]
        dead = [other for other in beats if other in silent or owner_is_dead(other)]

        def work(db: sqlite3.Connection) -> list[Row]:
            # Looked at again, under the lock: some may have renewed in between.
            again, ended = look(db), []
            for other in dead:
                if again.get(other) == beats[other]:
                    ended += self._give_back(db, other, now, after_interruption)
            return ended

        return self._write(work) if dead else []

    def leave(self, owner: str, now: int) -> None:
        def given_back(row: Row, now: int) -> Row | None:
            return after_run(row, Outcome(row.id, row.claim, "ready", charged=False), now)

        self._write(lambda db: self._give_back(db, owner, now, given_back))

    def _give_back(
        self, db: sqlite3.Connection, owner: str, now: int, after: Callable[[Row, int], Row | None]
    ) -> list[Row]:
        ended = []
        for found in db.execute(_HELD_BY, (owner,)).fetchall():
            row = Row(*found)
            following = after(row, now)
            self._replace(db, row, following)
            if following is not None and following.state == "failed":
                ended.append(following)
        db.execute(_OPEN_LANE, (owner,))
        db.execute(_LEAVE, (owner,))
        return ended

    def next_due(
        self, owner: str, types: Iterable[str], limit: int, now: int, until: int = NEVER
    ) -> list[int]:
        def work(db: sqlite3.Connection) -> list[int]:
            due: list[int] = []
            for place in [(lane, t) for t in types for lane in ("", owner)]:
                (ready,) = db.execute(_COUNT_READY, (*place, until, limit)).fetchone()
                due += [now] * ready
                due += [at for (at,) in db.execute(_NEXT_DUE, (*place, until, limit))]
            return sorted(due)[:limit]

        return self._read(work)

    def foreign(self, types: Iterable[str], now: int) -> list[str]:
        known = set(types)
        found = self._read(lambda db: db.execute(_FOREIGN, (now,)).fetchall())
        return sorted(t for (t,) in found if t not in known)

    def find(self, query: Query, now: int) -> list[Row]:
        where, values = _where(query, now)
        limit = -1 if query.limit is None else query.limit
        statement = f"SELECT {_LIST} FROM taskpool_task WHERE {where} {_OLDEST_FIRST}"
        values += limit, query.offset

        def work(db: sqlite3.Connection) -> list[Any]:
            try:
                return db.execute(statement, values).fetchall()
            except sqlite3.OperationalError as error:
                if "decode" not in str(error):
                    raise
                db.text_factory = lambda raw: _decoded(raw, raw.decode(errors="replace"))
                try:
                    return db.execute(statement, values).fetchall()
                finally:
                    db.text_factory = str

        return [Row(*columns) for columns in self._read(work)]

    def count(self, query: Query, now: int) -> int:
        where, values = _where(query, now)
        statement = f"SELECT count(*) FROM taskpool_task WHERE {where}"
        return cast(int, self._read(lambda db: db.execute(statement, values).fetchone()[0]))

    def remove(self, query: Query, now: int) -> int:
        where, values = _where(query, now)
        statements = f"{_MARK} AND {where}", f"{_REMOVE} AND {where}"
        return self._write(lambda db: sum(db.execute(s, values).rowcount for s in statements))

    def retry(self, query: Query, now: int) -> int:
        where, values = _where(query, now)
        statement = f"SELECT {_LIST} FROM taskpool_task WHERE state = 'failed' AND {where}"

        def work(db: sqlite3.Connection) -> int:
            found = db.execute(statement, values).fetchall()
            for columns in found:
                self._replace(db, Row(*columns), after_retry(Row(*columns), now))
            return len(found)

        return self._write(work)

    def update(self, task_id: str, changes: Mapping[str, Any], now: int) -> Row:
        def work(db: sqlite3.Connection) -> Row:
            new = after_update(self._row(db, task_id), task_id, changes, now)
            self._replace(db, new, new)
            return new

        return self._write(work)


# --- Queue ---------------------------------------------------------------------------
# What producers call, in any process. It reads the clock; it knows no worker.


def _refuse_rerun(what: str) -> None:
    """Raise if the entry file is being run again in a child process."""
    if _is_rerun():
        raise RuntimeError(
            f"{what} was called while a worker process runs your file again, and would be "
            "called once more by every worker; put it under `if Cluster.is_master():` or "
            '`if __name__ == "__main__":`'
        )


def _listed(name: str, value: Any, choices: Sequence[str] | None = None) -> list[str] | None:
    """A filter's value, or list of values, as a list of str; None = any."""
    if value is None:
        return None
    values = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
    for item in values:
        if type(item) is not str:
            raise _wrong_type(name, item, "a str or a list of str")
        if choices is not None and item not in choices:
            raise _wrong_value(name, item, "one of " + ", ".join(choices))
    return values


STATES = ("waiting", "running", "failed", "done")


def _make_query(
    task_id: Any = None, task_type: Any = None, state: Any = None, due: Any = None
) -> Query:
    return Query(
        _listed("task_id", task_id),
        _listed("task_type", task_type),
        _listed("state", state, STATES),
        None if due is None else _checked_bool("due", due),
    )


class _Tasks:
    """The verbs that TaskQueue and TaskQueue.in_memory share.

    Filters: `task_id`, `task_type` and `state` (a value or a list of values; states are
    waiting, running, failed, done), `due` (True: could run now; False: waiting for its
    time). Tasks that fit every filter are meant.
    """

    _store: Store
    clock: Callable[[], float]

    def _now(self) -> int:
        return int(self.clock() * 1e6)

    def _usable(self, what: str) -> Store:
        _refuse_rerun(what)
        return self._store

    def _changed(self, removed: bool = False) -> None:
        """Called after every change, to wake who waits for it."""

    def find(
        self,
        *,
        task_id: str | Sequence[str] | None = None,
        task_type: str | Sequence[str] | None = None,
        state: str | Sequence[str] | None = None,
        due: bool | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[Task]:
        """The tasks that fit the filters, oldest first: *limit* of them, after *offset*."""
        query = _make_query(task_id, task_type, state, due)._replace(
            limit=None if limit is None else _checked_int("limit", limit, 0),
            offset=_checked_int("offset", offset, 0),
        )
        return [Task(row) for row in self._store.find(query, self._now())]

    def find_one(self, **filters: Any) -> Task | None:
        """The oldest task that fits the filters of find(), or None."""
        found = self.find(**{**filters, "limit": 1})
        return found[0] if found else None

    def count(self, **filters: Any) -> int:
        """How many tasks fit the filters of find()."""
        return self._store.count(_make_query(**filters), self._now())

    def remove(self, **filters: Any) -> int:
        """Remove the tasks that fit the filters, and return how many.

        A running task ends its run, after which it is neither retried nor repeated.
        Raises ValueError without a filter (say `state=[...]` to mean all).
        """
        query = _make_query(**filters)
        if query == Query():
            states = ", ".join(map(repr, STATES))
            raise ValueError(f"remove() without a filter; to mean all tasks give state=[{states}]")
        removed = self._usable("remove").remove(query, self._now())
        self._changed(removed=True)
        return removed

    def retry(self, **filters: Any) -> int:
        """Put failed tasks that fit the filters back to waiting; return how many.

        They get a fresh set of attempts and are due now.
        """
        retried = self._usable("retry").retry(_make_query(**filters), self._now())
        self._changed()
        return retried

    def update(self, task_id: str, **changes: Any) -> Task:
        """Change a waiting task and return it.

        *changes*: data, priority, due_date, retries, retry_delay, timeout, keep_result,
        as in add_task. Raises ValueError if the task is not waiting.
        """
        store, now = self._usable("update"), self._now()
        _checked_text("task_id", task_id)
        columns = {"due_date": ("due_at", "ready_at")}
        allowed = "data priority due_date retries retry_delay timeout keep_result".split()
        for name in changes:
            if name not in allowed:
                raise TypeError(f"update() cannot change {name!r}; give {', '.join(allowed)}")
        checked = _make_row(now, "any", **changes)[0]
        values = {
            column: getattr(checked, column)
            for name in changes
            for column in columns.get(name, (name,))
        }
        row = store.update(task_id, values, now)
        self._changed()
        return Task(row)


class InMemoryTasks(_Tasks):
    """`TaskQueue.in_memory`: the tasks of this process, with the verbs of TaskQueue."""

    def __init__(self, queue: TaskQueue) -> None:
        self._queue = queue
        self._memory = MemoryStore()

    @property
    def _store(self) -> Store:  # type: ignore[override]
        if _worker is not None:
            raise RuntimeError(
                "in-memory tasks live in the master process; in a worker, add persistent ones"
            )
        return self._memory

    def _now(self) -> int:
        return self._queue._now()

    def _changed(self, removed: bool = False) -> None:
        self._queue._changed(removed)

    def find_by_id(self, task_id: str) -> Task | None:
        """The task of that id, or None."""
        return self.find_one(task_id=_checked_text("task_id", task_id))

    def remove_by_id(self, task_id: str) -> bool:
        """Remove the task of that id; whether there was one."""
        return self.remove(task_id=_checked_text("task_id", task_id)) > 0

    def tasks(self) -> list[Task]:
        """All in-memory tasks, oldest first."""
        return self.find()

    def available_tasks(self) -> list[Task]:
        """Those that could run now, oldest first."""
        return self.find(due=True)


Listener = Callable[[Any, Task], Any]


class TaskQueue(_Tasks):
    """Tasks waiting to be run, in a store and in this process's memory.

    *store* is a path (-> SQLiteStore) or a Store. It is opened at first use, and closed
    by close() or `with`. May be used by any thread of any process: give each process a
    TaskQueue on the same file. `find`, `count`, `remove`, `retry` and `update` mean the
    persistent tasks; `in_memory` has the same verbs for the others.

    `clock` may be set to a function like time.time, for tests.
    """

    def __init__(self, store: str | os.PathLike[str] | Store = "taskpool.db") -> None:
        self._store = store if isinstance(store, Store) else SQLiteStore(store)
        self.clock = time.time
        self._in_memory = InMemoryTasks(self)
        self._watchers: tuple[Any, ...] = ()  # Running clusters: have _queue_changed().
        self._listeners: dict[str, Listener] = {}

    def __enter__(self) -> TaskQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TaskQueue({self._store!r})"

    def close(self) -> None:
        """Close the store's files and connections; the next use opens them again."""
        self._store.close()

    @property
    def in_memory(self) -> InMemoryTasks:
        """The in-memory tasks of this process (master only, else RuntimeError)."""
        return self._in_memory

    def _changed(self, removed: bool = False) -> None:
        if _worker is not None:
            _worker.tell_master_of_changes()
        for watcher in self._watchers:
            watcher._queue_changed(removed)

    def add_task(
        self,
        task_type: str,
        data: Any = _NO_DATA,
        *,
        priority: int = 1,
        task_id: str | None = None,
        due_date: datetime | timedelta | None = None,
        in_memory: bool = False,
        retries: int = 0,
        retry_delay: float | timedelta = 1.0,
        timeout: float | timedelta | None = None,
        keep_result: float | timedelta | None = None,
        if_exists: str = "raise",
    ) -> Task:
        """Store one task and return it. It is safe from then on (P1).

        *task_type* names the function in the cluster's map; *data* are JSON values, kept
        exactly (anything that JSON would alter is refused). Higher *priority* starts
        first. *due_date* is the earliest start: a datetime (naive = local time), a
        timedelta from now, or None = now. A failure is followed by up to *retries*
        further starts, the n-th after `retry_delay * 2**(n-1)` seconds, at most an hour.
        A run longer than *timeout* seconds is killed. The finished task is kept with its
        JSON result for *keep_result* seconds; None = removed at once. *if_exists* says
        what a waiting or running task of the same *task_id* does: "raise" DuplicateTask,
        "keep" (it is returned), "replace" (if it is running, the new one follows it).
        Durations may be timedeltas.

        Raises TypeError or ValueError, naming the parameter, before anything is stored;
        RuntimeError for *in_memory* in a worker; StoreError if the store failed.
        """
        _refuse_rerun("add_task")
        addition = _make_row(
            self._now(),
            task_type,
            data,
            priority=priority,
            task_id=task_id,
            due_date=due_date,
            in_memory=in_memory,
            retries=retries,
            retry_delay=retry_delay,
            timeout=timeout,
            keep_result=keep_result,
            if_exists=if_exists,
        )
        return Task(self._add([addition])[0])

    def add_tasks(self, tasks: Iterable[Mapping[str, Any]]) -> list[Task]:
        """Store many tasks in one transaction: all of them, or none if one is refused.

        Each is a dict with the parameters of add_task as keys. Persistent and in-memory
        tasks cannot be mixed in one call. Raises what add_task raises.
        """
        _refuse_rerun("add_tasks")
        now = self._now()
        additions = []
        for index, task in enumerate(tasks):
            if not isinstance(task, Mapping):
                raise _wrong_type(f"tasks[{index}]", task, "a dict of add_task's parameters")
            unknown = [name for name in task if name not in _ADD_PARAMETERS]
            if unknown or "task_type" not in task:
                wrong = f"has no parameter {unknown[0]!r}" if unknown else "needs a 'task_type'"
                raise TypeError(f"tasks[{index}]: add_task {wrong}")
            additions.append(_make_row(now, **task))
        return [Task(row) for row in self._add(additions)]

    def _add(self, additions: list[tuple[Row, str]]) -> list[Row]:
        here = sum(row.in_memory for row, _ in additions)
        if here not in (0, len(additions)):
            raise ValueError("in_memory is True for some tasks; add those in a call of their own")
        store = self._in_memory._store if here else self._store
        rows = store.add(additions, self._now())
        self._changed()
        return rows

    def wait(self, task_id: str, timeout: float | timedelta | None = None) -> Task:
        """Wait until a task ended, in whatever process it runs, and return it.

        Its state is `done` or `failed`. A task that is gone is taken for done without a
        kept result (its task_type is "" if this call never saw it). Raises TimeoutError
        after *timeout* seconds.
        """
        _refuse_rerun("wait")
        query = Query(ids=[_checked_text("task_id", task_id)])
        seconds = math.inf if timeout is None else _checked_seconds("timeout", timeout, zero=True)
        deadline, pause, row = time.monotonic() + seconds, 0.002, None
        stores = [self._store] if _worker else [self._in_memory._store, self._store]
        while True:
            found = [row for store in stores for row in store.find(query, self._now())]
            if not found:
                gone = row or Row(task_id, "", "null", 0, 0, 0, 0, 0, 0.0, None, None, "", "")
                return Task(gone._replace(state="done", owner=""))
            row = found[0]
            if row.state in ("failed", "done"):
                return Task(row)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"task {task_id!r} is still {_public_state(row.state)}")
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, 0.1)

    def add_event_listener(self, event: str, callback: Listener) -> None:
        """Have *callback(value, task)* called for each "done" or "error" of a cluster here.

        *value* is the result, or the exception. "error" comes for every failed attempt;
        `task.state` tells whether it waits for a retry or `failed` for good. It is called
        in a thread of its own, after the state was stored; what it raises is logged. A
        second listener of an event replaces the first. Master only: does nothing while a
        worker runs your file again.
        """
        _checked_choice("event", event, ("done", "error"))
        if not callable(callback):
            raise _wrong_type("callback", callback, "a function of (value, task)")
        if _is_master():
            self._listeners[event] = callback

    def remove_event_listener(self, event: str) -> None:
        """Forget the listener of "done" or "error", if there is one."""
        self._listeners.pop(_checked_choice("event", event, ("done", "error")), None)


_ADD_PARAMETERS = frozenset(
    "task_type data priority task_id due_date in_memory retries retry_delay timeout "
    "keep_result if_exists".split()
)


# --- Messages ------------------------------------------------------------------------
# All that crosses a pipe: tuples, pickled. The first item says which.
#
#   to the worker   ("boot", _Boot)                      first of all
#                   ("run", number, rows)                numbered from `number` on
#                   ("answer", conversation, ok, value)  of the broker; value is pickled
#                   ("stop",)
#   to the master   ("ready",)   ("boot error", failure)
#                   ("start", number)                    of a task with a timeout
#                   ("done", number, seconds, value, json, problem, open conversations)
#                   ("fail", number, seconds, failure, may_retry)
#                   ("ask", number, conversation, message)
#                   ("changed",)                         a task called its queue
#
# Only processes that we started speak here; what is stored never comes near pickle (P8).


class _Boot(NamedTuple):
    """How a worker finds its task map: see _find_task_map."""

    key: tuple[str, int, int]
    types: tuple[str, ...]
    entry: tuple[str, str] | None  # ("path", file) or ("module", name) of __main__.
    home_file: str | None
    pickled_map: bytes | None


class _Failure(NamedTuple):
    """An exception on its way to another process."""

    type_name: str
    text: str
    traceback: str
    pickled: bytes | None  # None if it cannot be rebuilt.


def _dumps(value: Any) -> bytes:
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def _cut(text: str, most: int) -> str:
    text = text[: most + 1].encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else text[:most] + "... (cut)"


def _failure(error: BaseException) -> _Failure:
    """Describe *error*, whatever it does to those who look at it."""
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__", "__mp_main__"):
        name = f"{kind.__module__}.{name}"
    try:
        text = _cut(str(error), ERROR_CHARS)
    except Exception as other:
        text = f"<its __str__ raised {type(other).__name__}>"
    try:
        lines = traceback.format_exception(kind, error, error.__traceback__)
        trace = _cut("".join(_cut(line, ERROR_CHARS) for line in lines), 4 * ERROR_CHARS)
    except Exception:
        trace = f"{name}: {text}"
    pickled = None
    if isinstance(error, Exception):  # SystemExit and its like would end the receiver.
        with contextlib.suppress(BaseException):
            attempt = _dumps(error)
            if len(attempt) <= EXCEPTION_BYTES and type(pickle.loads(attempt)) is kind:
                pickled = attempt
    return _Failure(name, text, trace, pickled)


def _rebuilt(failure: _Failure) -> Exception:
    """The exception of *failure*, or the RemoteError that stands for it."""
    error: Any = None
    if failure.pickled is not None:
        with contextlib.suppress(BaseException):
            error = pickle.loads(failure.pickled)
    if not isinstance(error, Exception):
        error = RemoteError(failure.type_name, failure.text, failure.traceback)
    error.__cause__ = _RemoteTraceback(failure.traceback)
    return cast(Exception, error)


def _error_text(failure: _Failure) -> str:
    """Task.error: type, message, traceback."""
    head = f"{failure.type_name}: {failure.text}" if failure.text else failure.type_name
    return f"{head}\n\n{failure.traceback}" if failure.traceback else head


# --- Worker --------------------------------------------------------------------------
# Code that runs in the child process. It knows no store; tasks come down the pipe.

TaskFunction = Callable[..., Any]

# The clusters made in this process, by module, line, and number of the call there. In a
# worker it is how the task map is found, so there they are kept alive as well.
_registry: weakref.WeakValueDictionary[tuple[str, int, int], Any] = weakref.WeakValueDictionary()
_registered: list[Any] = []


def _die_with_master(life: Connection) -> None:
    """End this process when the master's end of the life line closes: at its death."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            life.poll(None)  # Readable only at end-of-file.
        os._exit(70)

    threading.Thread(target=watch, name="taskpool-life-line", daemon=True).start()
    with contextlib.suppress(ImportError, AttributeError, OSError):
        # A task in C code that keeps the GIL would stop the thread. Where the kernel
        # signals a hang-up (Linux), SIGIO's default action kills us even then.
        import fcntl

        fcntl.fcntl(life.fileno(), fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(life.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(life.fileno(), fcntl.F_SETFL, flags | os.O_ASYNC)


@contextlib.contextmanager
def _rerun() -> Iterator[None]:
    global _rerunning
    _rerunning = True
    try:
        yield
    finally:
        _rerunning = False


def _import_home(name: str, file: str | None) -> None:
    """Import the module that made the Cluster; by its file where its name does not do."""
    import importlib.util

    with _rerun():
        try:
            importlib.import_module(name)
        except ImportError:
            if file is None or not os.path.exists(file):
                return
            spec = importlib.util.spec_from_file_location(name, file)
            if spec is not None and spec.loader is not None:
                sys.modules[name] = module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)


def _has_run_again(file: str | None) -> bool:
    """Whether multiprocessing has run that entry file again in this process. It has not
    if the main script had ended, for `python -m package`, and under a profiler."""
    entry: Any = sys.modules["__main__"]
    ran = getattr(entry, "__file__", None)
    return entry.__name__ == "__mp_main__" and ran is not None and os.path.abspath(ran) == file


def _run_entry(kind: str, name: str) -> None:
    """Run the entry file as __mp_main__, as multiprocessing does."""
    import runpy
    import types

    entry = types.ModuleType("__mp_main__")
    with _rerun():
        if kind == "module":
            entry.__dict__.update(runpy.run_module(name, run_name="__mp_main__", alter_sys=True))
        else:
            entry.__dict__.update(runpy.run_path(name, run_name="__mp_main__"))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = entry


def _find_task_map(boot: _Boot) -> Mapping[str, TaskFunction]:
    """The task map of the Cluster for which this worker was started.

    It is the Cluster's that the entry file, run again or inherited, or the module that
    made it, registers here; else the pickled one.
    """
    home = boot.key[0]
    if boot.key not in _registry and home not in ("__main__", "__mp_main__"):
        _import_home(home, boot.home_file)
    unpickled: Any = None
    if boot.key not in _registry and boot.pickled_map is not None:
        with contextlib.suppress(Exception):
            unpickled = pickle.loads(boot.pickled_map)
    if boot.key not in _registry and unpickled is None and boot.entry is not None:
        if not _has_run_again(boot.home_file):
            _run_entry(*boot.entry)
    cluster = _registry.get(boot.key)
    if cluster is not None and set(cluster.task_map) >= set(boot.types):
        return cast(Mapping[str, TaskFunction], cluster.task_map)
    if unpickled is None and boot.pickled_map is not None:
        unpickled = pickle.loads(boot.pickled_map)  # Raises what is wrong.
    if unpickled is None:
        raise RuntimeError(
            f"a worker process cannot find the functions of {', '.join(map(repr, boot.types))}: "
            "the Cluster was not made at the top level of a file, and its task map cannot be "
            "pickled. Use functions defined at the top level of a module (no lambdas or inner "
            'functions), or make the Cluster there, or use start_method="fork"'
        )
    return cast(Mapping[str, TaskFunction], unpickled)


def _wants_toggle_ipc(function: TaskFunction) -> str | None:
    """How to pass toggle_ipc: "name", "position", or None for not at all."""
    import inspect

    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # Some builtins have no signature.
        return None
    if any(parameter.name == "toggle_ipc" for parameter in parameters):
        named = next(p for p in parameters if p.name == "toggle_ipc")
        return "position" if named.kind is named.POSITIONAL_ONLY else "name"
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) > 1 and positional[1].default is positional[1].empty:
        return "position"
    return None


def _checked_message(message: Any) -> Any:
    allowed = 'a dict {"status": int > 1, "data": any}'
    if type(message) is not dict or not {"status"} <= set(message) <= {"status", "data"}:
        raise _wrong_type("message", message, allowed)
    if type(message["status"]) is not int:
        raise _wrong_type("status", message["status"], "an int over 1")
    if message["status"] <= 1:
        raise _wrong_value("status", message["status"], "an int over 1 (0 and 1 are taken)")
    return {"status": message["status"], "data": message.get("data")}


def _resolve(future: Future[Any], value: Any = None, error: BaseException | None = None) -> None:
    """Resolve *future*, unless it already is."""
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)
    except concurrent.futures.InvalidStateError:
        pass


def _follow(future: Future[Any], result: Any) -> None:
    """Resolve *future* with *result*; with its result, if that is a Future too."""
    if not isinstance(result, Future):
        _resolve(future, result)
        return

    def done(inner: Future[Any]) -> None:
        if inner.cancelled():
            _resolve(future, error=concurrent.futures.CancelledError())
        elif inner.exception() is not None:
            _resolve(future, error=inner.exception())
        else:
            _follow(future, inner.result())

    result.add_done_callback(done)


class _WorkerProcess:
    """This process, while it is a worker: it runs tasks one after another.

    Tasks run in the main thread. Once a task has opened a conversation, a thread reads
    the channel, so that answers come through while the task runs.
    """

    def __init__(self, channel: Connection, permits: Connection | None) -> None:
        self.task_map: Mapping[str, TaskFunction] = {}
        self._channel = channel
        self._send_lock = threading.Lock()  # A message must not be cut by another.
        self._permits = permits
        self._permit = -1  # The number of the last permit read.
        self._call_styles: dict[str, str | None] = {}
        self._reader: threading.Thread | None = None
        self._received: _queues.SimpleQueue[Any] = _queues.SimpleQueue()
        self._conversation_ids = itertools.count(1)
        self._conversations: dict[int, tuple[Callable[[Any], Any], Future[Any]]] = {}
        self._current = -1  # The number of the running task, or -1.

    def send(self, message: tuple[Any, ...]) -> None:
        """Send to the master; called by any thread."""
        packed = _dumps(message)
        with self._send_lock:
            self._channel.send_bytes(packed)

    def tell_master_of_changes(self) -> None:
        with contextlib.suppress(OSError):
            self.send(("changed",))

    def serve(self) -> None:
        """Run what comes down the channel until told to stop."""
        while True:
            # Nothing of the last task is held while waiting for the next.
            message = self._received.get() if self._reader else self._receive()
            if message is None or message[0] == "stop":
                return
            if message[0] == "run":
                _, number, rows = message
                for offset, values in enumerate(rows):
                    if self._permitted(number + offset):
                        self._run(number + offset, Row._make(values))
                del rows, values
            del message

    def _receive(self) -> Any:
        return pickle.loads(self._channel.recv_bytes())

    def _read(self) -> None:
        """The body of the reader thread."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = self._receive()
                if message[0] == "answer":
                    self._hear(*message[1:])
                else:
                    self._received.put(message)
        self._received.put(None)

    def _permitted(self, number: int) -> bool:
        """Whether the task may start. The master writes one permit per task, before the
        task; those that it reads back itself are taken back."""
        if self._permits is None:
            return True
        while self._permit < number:
            try:
                packed = os.read(self._permits.fileno(), 8)
            except BlockingIOError:
                return False
            if not packed:
                raise EOFError
            (self._permit,) = struct.unpack("!Q", packed)
        return self._permit == number

    def _run(self, number: int, row: Row) -> None:
        """Run one task and report how it ended."""
        if row.timeout is not None:
            self.send(("start", number))
        self._current = number
        started = time.perf_counter()
        report: tuple[Any, ...]
        try:
            task = Task(row)
            try:
                task.data  # noqa: B018 - Decoded here, so that bad rows fail for good.
            except ValueError as error:
                wrong = RuntimeError(f"the stored data cannot be decoded: {error}")
                report = ("fail", number, 0.0, _failure(wrong), False)
            else:
                value = self._call(task)
                packed = None if value is None else self._packed(value)
                kept, problem = self._kept(row, value)
                seconds = time.perf_counter() - started
                report = ("done", number, seconds, packed, kept, problem)
                del value
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: they end the task, not the worker.
            report = ("fail", number, time.perf_counter() - started, _failure(error), True)
            traceback.clear_frames(error.__traceback__)  # Frees what they hold.
        self._current = -1
        opened = sum(not future.done() for _, future in self._conversations.values())
        self._conversations.clear()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self.send((*report, opened) if report[0] == "done" else report)

    def _call(self, task: Task) -> Any:
        """The task function's result, awaited where it is to be awaited."""
        task_type = task.task_type
        function = self.task_map[task_type]
        if task_type not in self._call_styles:
            self._call_styles[task_type] = _wants_toggle_ipc(function)
        style = self._call_styles[task_type]
        if style is None:
            value = function(task)
        elif style == "name":
            value = function(task, toggle_ipc=self._toggle_ipc())
        else:
            value = function(task, self._toggle_ipc())
        if type(value) is CoroutineType:
            import asyncio

            value = asyncio.run(value)
        while isinstance(value, Future):
            value = value.result()
        return value

    @staticmethod
    def _packed(value: Any) -> bytes:
        try:
            return _dumps(value)
        except Exception as error:
            kind = type(value).__name__
            raise TypeError(f"the result ({kind}) cannot be pickled: {error}") from error

    @staticmethod
    def _kept(row: Row, value: Any) -> tuple[str | None, str | None]:
        """The result as JSON, and why it is not kept: for tasks with keep_result."""
        if row.keep_result is None:
            return None, None
        try:
            _check_json(value, "result", 0)
            return _encode(value), None
        except (TypeError, ValueError) as error:
            return None, f"the result is kept as None: {error}"

    def _toggle_ipc(self) -> Callable[..., Future[Any]]:
        """The `toggle_ipc` of the running task."""
        number = self._current

        def toggle_ipc(
            on_message: Callable[[Any], Any], initialize: Callable[[Callable[[Any], None]], Any]
        ) -> Future[Any]:
            """Open a conversation with the master: see the README, "Conversations"."""
            if not callable(on_message) or not callable(initialize):
                raise TypeError("toggle_ipc(on_message, initialize) takes two functions")
            if self._current != number:
                raise RuntimeError("toggle_ipc was called after its task had ended")
            if self._reader is None:
                self._reader = threading.Thread(target=self._read, daemon=True)
                self._reader.start()
            future: Future[Any] = Future()
            future.set_running_or_notify_cancel()
            conversation = next(self._conversation_ids)
            self._conversations[conversation] = on_message, future
            sent = threading.Lock()  # Held from the first send() on.

            def send(message: Any) -> None:
                """Send {"status": int > 1, "data": any} to the broker, once."""
                try:
                    if not sent.acquire(blocking=False):
                        raise RuntimeError("send() was called twice in one conversation")
                    packed = _dumps(_checked_message(message))
                    self.send(("ask", number, conversation, packed))
                except Exception as error:
                    self._conversations.pop(conversation, None)
                    _resolve(future, error=error)

            try:
                initialize(send)
            except BaseException as error:
                self._conversations.pop(conversation, None)
                _resolve(future, error=error)
            return future

        return toggle_ipc

    def _hear(self, conversation: int, ok: bool, value: Any) -> None:
        """Take the broker's answer. on_message gets a thread of its own, as it may wait
        for conversations that it opens itself."""
        on_message, future = self._conversations.get(conversation, (None, None))
        if on_message is None or future is None:
            return

        def answer() -> None:
            try:
                if not ok:
                    raise _rebuilt(value)
                result = on_message(pickle.loads(value))
            except BaseException as error:
                _resolve(future, error=error)
            else:
                _follow(future, result)

        threading.Thread(target=answer, name="taskpool-answer", daemon=True).start()


def _worker_main(channel: Connection, permits: Connection | None, life: Connection) -> None:
    """The life of a worker process, from its first line to its exit."""
    global _worker
    # Ctrl-C reaches the whole process group; only the master answers to it. Under fork
    # the master's handlers are inherited.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _worker = worker = _WorkerProcess(channel, permits)
    _die_with_master(life)
    with contextlib.suppress(Exception):
        import faulthandler

        faulthandler.enable()
    with contextlib.suppress(EOFError, OSError):  # The master is gone.
        boot: _Boot = pickle.loads(channel.recv_bytes())[1]
        try:
            worker.task_map = _find_task_map(boot)
        except BaseException as error:
            worker.send(("boot error", _failure(error)))
            return
        worker.send(("ready",))
        worker.serve()


# --- Master --------------------------------------------------------------------------
# Code that runs in the parent process. One thread, the dispatcher, decides everything
# and never blocks but in its own wait. Whatever may block has a thread of its own: the
# store, Futures (unpickling and callbacks), the listeners, the broker.


class _Calls:
    """A daemon thread that makes the calls posted to it, in order.

    Not ThreadPoolExecutor: that takes no calls once the main script has ended, and ours
    finish the due tasks then.
    """

    def __init__(self, name: str) -> None:
        self._calls: _queues.SimpleQueue[Callable[[], Any] | None] = _queues.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"taskpool-{name}", daemon=True)
        self._thread.start()

    def post(self, call: Callable[[], Any]) -> None:
        self._calls.put(call)

    def stop(self) -> None:
        """End the thread after the calls posted so far. Does not wait."""
        self._calls.put(None)

    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def flush(self, timeout: float) -> bool:
        """Wait until the calls posted so far were made; never for itself."""
        if self.is_current():
            return True
        done, deadline = threading.Event(), time.monotonic() + timeout
        self._calls.put(done.set)
        while not done.wait(0.02):
            if not self._thread.is_alive():  # It was stopped, and made all calls.
                return True
            if time.monotonic() > deadline:
                return False
        return True

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            try:
                call()
            except BaseException:
                _log.exception("error in the thread %s", self._thread.name)
            del call


class _WakeUp:
    """Ends the dispatcher's wait, from any thread: at most one byte is under way."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        self._pending = False
        _master_ends.update((self.reader, self._writer))

    def set(self) -> None:
        if not self._pending:
            self._pending = True
            with contextlib.suppress(OSError):
                self._writer.send(b"!")

    def clear(self) -> None:
        # Drain first: the other order can leave the flag set and the socket empty.
        with contextlib.suppress(OSError):
            self.reader.recv(64)
        self._pending = False

    def close(self) -> None:
        for end in (self.reader, self._writer):
            _master_ends.discard(end)
            end.close()


def _own(connection: Connection) -> Any:
    """A raw, non-blocking file for the master's end of a pipe, in place of *connection*."""
    descriptor = os.dup(connection.fileno())
    both = connection.readable and connection.writable
    mode = "r+b" if both else "rb" if connection.readable else "wb"
    connection.close()
    os.set_blocking(descriptor, False)
    end = open(descriptor, mode, buffering=0)  # noqa: SIM115
    _master_ends.add(end)
    return end


def _disown(end: Any) -> None:
    _master_ends.discard(end)
    with contextlib.suppress(OSError):
        end.close()


_READ_BYTES = 1 << 18


class _Channel:
    """The master's end of a worker's channel, without blocking: buffers both ways.

    The framing is that of multiprocessing's Connection, which the worker uses.
    """

    takes_back = True  # With permits: see _WorkerHandle.take_back.

    def __init__(self, connection: Connection, wake: Callable[[], None]) -> None:
        self._file = _own(connection)
        self._received = bytearray()
        self._unsent: collections.deque[memoryview] = collections.deque()
        self.ended = False  # The worker's end is closed, or broken.

    def fileno(self) -> int:
        return cast(int, self._file.fileno())

    @property
    def is_full(self) -> bool:
        """Whether messages wait until the worker reads."""
        return bool(self._unsent)

    def send(self, message: bytes) -> None:
        size = len(message)
        head = struct.pack("!i", size) if size < 1 << 31 else struct.pack("!iQ", -1, size)
        if size < 1 << 14:
            self._unsent.append(memoryview(head + message))
        else:
            self._unsent += (memoryview(head), memoryview(message))
        self.flush()

    def flush(self) -> None:
        try:
            while self._unsent:
                chunk = self._unsent[0]
                sent = self._file.write(chunk)
                if sent is None:
                    return
                if sent < len(chunk):
                    self._unsent[0] = chunk[sent:]
                else:
                    self._unsent.popleft()
        except OSError:
            self.ended = True
            self._unsent.clear()

    def receive(self) -> Iterator[bytes]:
        """The messages that have arrived; of a flood, a part, so that others get a turn."""
        try:
            for _ in range(16):
                chunk = self._file.read(_READ_BYTES)
                if not chunk:
                    self.ended = self.ended or chunk is not None
                    break
                self._received += chunk
        except OSError:
            self.ended = True
        start, view = 0, self._received
        while len(view) - start >= 4:
            (size,) = struct.unpack_from("!i", view, start)
            body = start + 4
            if size == -1:
                if len(view) - body < 8:
                    break
                (size,) = struct.unpack_from("!Q", view, body)
                body += 8
            if len(view) - body < size:
                break
            yield bytes(view[body : body + size])
            start = body + size
        del self._received[:start]

    def close(self) -> None:
        _disown(self._file)


class _ThreadedChannel:
    """The same where pipes cannot be waited for with others (Windows): two threads.

    Without permits, so that a worker gets one task at a time.
    """

    takes_back = False
    is_full = False

    def __init__(self, connection: Connection, wake: Callable[[], None]) -> None:
        self._connection, self._wake = connection, wake
        self._received: collections.deque[bytes] = collections.deque()
        self.ended = False
        self._sender = _Calls("send")
        self._hung_up = False
        threading.Thread(target=self._read, name="taskpool-receive", daemon=True).start()
        _master_ends.add(connection)

    def send(self, message: bytes) -> None:
        def send() -> None:
            with contextlib.suppress(OSError, ValueError):
                self._connection.send_bytes(message)

        self._sender.post(send)

    def flush(self) -> None:
        pass

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._received.append(self._connection.recv_bytes())
                self._wake()
        self._hung_up = True
        self._wake()

    def receive(self) -> Iterator[bytes]:
        hung_up = self._hung_up  # Looked at first: what came before it is in the deque.
        while self._received:
            yield self._received.popleft()
        self.ended = hung_up

    def close(self) -> None:
        self._sender.stop()
        _disown(self._connection)


class _Run:
    """One claim, while this master holds it."""

    __slots__ = ("asks", "cost", "deadline", "future", "number", "row", "verdict")

    def __init__(self, row: Row, cost: float, future: _TaskFuture | None) -> None:
        self.row, self.cost, self.future = row, cost, future
        self.number = -1  # In the order in which its worker gets tasks.
        self.deadline = math.inf  # Monotonic, of its timeout.
        self.asks: dict[int, Any] = {}  # Conversations that wait for an answer.
        self.verdict: str | None = None  # Why its worker was killed: timeout, cancel.


def _start_process(process: Any) -> None:
    """Start it without side effects on the program's own use of multiprocessing."""
    unset = multiprocessing.get_start_method(allow_none=True) is None
    try:
        process.start()
    finally:
        if unset:  # spawn and forkserver fix the default method as they start.
            multiprocessing.set_start_method(None, force=True)
        # A fork of the program that exits would send SIGTERM to our worker, and other
        # threads' active_children() would take its exit code.
        getattr(multiprocessing.process, "_children", set()).discard(process)


class _WorkerHandle:
    """The master's end of one worker process. Used by the dispatcher only."""

    def __init__(self, context: Any, number: int, boot: bytes, wake: _WakeUp) -> None:
        channel_type = _Channel if os.name == "posix" else _ThreadedChannel
        mine, theirs = context.Pipe(duplex=True)
        life_theirs, life_mine = context.Pipe(duplex=False)
        permits_theirs: Any = None
        permits_mine: Any = None
        if channel_type.takes_back:
            permits_theirs, permits_mine = context.Pipe(duplex=False)
            os.set_blocking(permits_theirs.fileno(), False)
        self.process = context.Process(
            target=_worker_main,
            args=(theirs, permits_theirs, life_theirs),
            name=f"taskpool-worker-{number}",
            daemon=False,  # So that tasks may start processes.
        )
        # In the master's keeping before the start, so that a fork closes them.
        self.channel: Any = channel_type(mine, wake.set)
        self._ends: list[Any] = [_own(life_mine) if channel_type.takes_back else life_mine]
        if permits_mine is not None:
            copy = Connection(os.dup(permits_theirs.fileno()), writable=False)
            self._permits, self._unread_permits = _own(permits_mine), _own(copy)
            self._ends += [self._permits, self._unread_permits]
        try:
            _start_process(self.process)
        except BaseException:
            self.close()
            raise
        finally:
            for end in (theirs, life_theirs, permits_theirs):
                if end is not None:
                    end.close()
        self.pid: int = self.process.pid
        self.ready = False
        self.stopping = False  # Told to leave, or killed: gets no more tasks.
        self.killed = False  # By us: what it ran without a verdict is given back.
        self.runs: collections.deque[_Run] = collections.deque()  # In its hands, in order.
        self.load = 0.0  # The sum of their costs; 1 = no room.
        self.given = 0  # Tasks given so far.
        self.since = time.monotonic()  # In this state, or with this head of runs.
        self.kill_at = math.inf  # Monotonic: when patience ends.
        self.ended_at = math.inf  # Monotonic: when its end of the channel closed.
        self.channel.send(boot)

    @property
    def state(self) -> str:
        return "busy" if self.runs else "idle" if self.ready else "starting"

    def give(self, runs: list[_Run]) -> None:
        if not self.runs:
            self.since = time.monotonic()
        for number, run in enumerate(runs, self.given):
            run.number = number
            self.runs.append(run)
            if run.row.timeout is not None:
                # The worker tells the start; until then, allow for its getting there.
                run.deadline = time.monotonic() + run.row.timeout + 1.0
        if self.channel.takes_back:
            numbers = range(self.given, self.given + len(runs))
            with contextlib.suppress(OSError):
                self._permits.write(b"".join(struct.pack("!Q", number) for number in numbers))
        self.channel.send(_dumps(("run", self.given, [tuple(run.row) for run in runs])))
        self.given += len(runs)

    def take_back(self) -> list[_Run]:
        """The runs that had not started; they will not, as their permits are gone."""
        if not self.channel.takes_back:
            return []
        packed = self._unread_permits.read(8 * 4 * AHEAD_TASKS) or b""
        numbers = {number for (number,) in struct.iter_unpack("!Q", packed)}
        taken = [run for run in self.runs if run.number in numbers]
        for run in taken:
            self.runs.remove(run)
            self.load -= run.cost
        return taken

    def end_head(self, now: float) -> _Run:
        """The oldest run has ended: the next one is the head."""
        run = self.runs.popleft()
        self.load = self.load - run.cost if self.runs else 0.0
        self.since = now
        return run

    def retire(self, now: float) -> None:
        """Let it end as a process should: exit handlers run, output is flushed."""
        self.stopping = True
        self.kill_at = min(self.kill_at, now + EXIT_SECONDS)
        self.channel.send(_dumps(("stop",)))

    def kill(self) -> None:
        self.stopping = self.killed = True
        self.end()

    def end(self) -> None:
        """Kill it, but as one that dies by itself: what it runs fails."""
        with contextlib.suppress(OSError, ValueError):
            self.process.kill()

    def exit_code(self) -> int | None:
        return cast("int | None", self.process.exitcode)

    def close(self) -> None:
        self.channel.close()
        for end in self._ends:
            _disown(end)
        with contextlib.suppress(ValueError):
            self.process.close()


class _TaskFuture(Future[Any]):
    """The Future of a submitted task. `task` is the Task as it was added."""

    # Its base stays in the state PENDING until the end, as only then cancel() works at
    # any time; whether the task runs is kept apart.

    _runs = False
    _stored = False  # add() has returned.
    _foreign = False  # The task may be run by another cluster.

    def __init__(self, cluster: Cluster, row: Row) -> None:
        super().__init__()
        self._row, self._cluster = row, cluster

    @property
    def task(self) -> Task:
        """The Task, as it was added."""
        return Task(self._row)

    def running(self) -> bool:
        return self._runs and not self.done()

    def cancel(self) -> bool:
        """Remove the task if it waits. False if it runs or is over."""
        if not self.done() and not self._foreign and self._cluster._remove_waiting(self._row):
            self._end_cancelled()
        return self.cancelled()

    def _end_cancelled(self) -> None:
        me = object()
        first = self.__dict__.setdefault("_canceller", me) is me  # Of several threads.
        if first and super().cancel():
            self.set_running_or_notify_cancel()  # Tells concurrent.futures.wait().


class _Ending(NamedTuple):
    """How a run ended, until the store has it and everybody was told."""

    run: _Run
    outcome: Outcome
    event: str | None = None  # done, error; None: given back or cancelled.
    packed: bytes | None = None  # The pickled result; None = None.
    error: Exception | _Failure | None = None


def _value(ending: _Ending) -> Any:
    """The result, or the exception, of a run. May take its time, and never raises."""
    if ending.error is not None:
        return _rebuilt(ending.error) if isinstance(ending.error, _Failure) else ending.error
    try:
        return None if ending.packed is None else pickle.loads(ending.packed)
    except BaseException as error:
        failure = _failure(error)
        text = f"the result cannot be unpickled: {failure.type_name}: {failure.text}"
        return RemoteError(failure.type_name, text, failure.traceback)


def _resolve_futures(endings: list[tuple[_TaskFuture, _Ending]]) -> None:
    """In the thread of Futures, as unpickling and callbacks may take their time."""
    for future, ending in endings:
        if ending.event is None:
            future._end_cancelled()
            continue
        value = _value(ending)
        if ending.event == "error" or (isinstance(value, RemoteError) and ending.packed):
            _resolve(future, error=value)
        else:
            _resolve(future, value)


def _checked_task_map(task_map: Any) -> dict[str, TaskFunction]:
    if not isinstance(task_map, Mapping):
        raise _wrong_type("task_map", task_map, "a dict of {task_type: function}")
    if not task_map:
        raise _wrong_value("task_map", task_map, "at least one {task_type: function}")
    for task_type, function in task_map.items():
        _checked_text("a key of task_map", task_type)
        if not callable(function):
            raise _wrong_type(f"task_map[{task_type!r}]", function, "a function")
    return dict(task_map)


def _checked_keep_alive(keep_alive: Any) -> float | str | None:
    """Seconds, "always" or None."""
    if keep_alive is None or keep_alive == "always":
        return cast("str | None", keep_alive)
    if isinstance(keep_alive, str):
        raise _wrong_value("keep_alive", keep_alive, 'None, milliseconds, or "always"')
    return _checked_milliseconds("keep_alive", keep_alive)


def _usable_cpus() -> int:
    """The CPUs that this process may use: affinity, and the quota of its cgroup."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    quota, _, period = _read_text("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cpus = min(cpus, math.ceil(int(quota) / int(period)))
    return max(cpus, 1)


def _allowed_workers(wanted: Any, oversubscribe: bool) -> int:
    """max_available_workers, clamped, with the warnings of the original."""
    global _warned_all_cpus
    cpus = _usable_cpus()
    if wanted is None:
        wanted = cpus
    elif type(wanted) is not int:
        raise _wrong_type("max_available_workers", wanted, "an int or None")
    quiet = not _is_master()
    if wanted < 1:
        if not quiet:
            _log.warning("max_available_workers is %d; using 1", wanted)
        wanted = 1
    elif wanted > cpus and not oversubscribe:
        text = "max_available_workers is %d, but there are %d CPUs; using %d (see oversubscribe)"
        if not quiet:
            _log.warning(text, wanted, cpus, cpus)
        wanted = cpus
    if wanted == cpus and not quiet and not _warned_all_cpus:
        _warned_all_cpus = True
        text = "all %d CPUs are used by workers; leave some for the master and the system"
        _log.warning(text, cpus)
    return cast(int, wanted)


def _register(cluster: Cluster, home: Mapping[str, Any], line: int) -> _Boot:
    """Register a new Cluster, and remember how a worker finds its task map.

    From the globals of the code that makes it, now: later __main__ forgets its file, and
    under a profiler sys.modules["__main__"] is another.
    """
    name = home.get("__name__", "__main__")
    name = "__main__" if name == "__mp_main__" else name
    number = next(n for n in itertools.count() if (name, line, n) not in _registry)
    key = name, line, number
    _registry[key] = cluster
    if not _is_master():
        _registered.append(cluster)
    file = home.get("__file__")
    file = os.path.abspath(file) if isinstance(file, str) else None
    spec = home.get("__spec__")
    entry = None
    if name == "__main__" and file is not None and os.path.exists(file):
        entry = ("path", file)
        if spec is not None and spec.name not in ("__main__", "__mp_main__"):
            entry = ("module", spec.name)
    try:
        pickled: bytes | None = _dumps(cluster.task_map)
    except Exception:
        pickled = None
    in_main = [
        task_type
        for task_type, function in cluster.task_map.items()
        if getattr(function, "__module__", None) == "__main__" or pickled is None
    ]
    if cluster._start_method != "fork" and name == "__main__" and entry is None and in_main:
        raise RuntimeError(
            f"the function of {in_main[0]!r} was defined where a worker process cannot find it "
            "(python -c, standard input, or an interactive session): put it into a file, or "
            'use start_method="fork"'
        )
    return _Boot(key, tuple(cluster.task_map), entry, file, pickled)


@contextlib.contextmanager
def _signals(act: Callable[[], None]) -> Iterator[None]:
    """Have SIGINT and SIGTERM call *act*: in the main thread, for elsewhere they cannot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A handler may interrupt anything: *act* takes no lock, does no I/O but one byte.
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda *_: act()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


_running: set[Cluster] = set()


def _at_exit() -> None:
    """The end of the main script: what leaving `with` does, for clusters still running."""
    for cluster in list(_running):
        if cluster._started:  # Not those of the parent, in a fork.
            try:
                cluster.shutdown()
            except KeyboardInterrupt:
                cluster._closed.wait(min(cluster._shutdown_timeout, WAIT_SECONDS) + EXIT_SECONDS)


_at_exit_registered = False


def _at_exit_once() -> None:
    global _at_exit_registered
    if not _at_exit_registered:
        _at_exit_registered = True
        atexit.register(_at_exit)


KeepAlive = Union[int, timedelta, str, None]
Broker = Callable[[Callable[[Any], None], dict[str, Any]], Any]
_warned_all_cpus = False


class Cluster(concurrent.futures.Executor):
    """Runs the tasks of a queue in worker processes. Also an Executor over task types.

    *task_map* is {task_type: function}; each is called as function(job) or function(job,
    toggle_ipc), is plain, `async def`, or returns a Future. *queue*: default
    TaskQueue("taskpool.db").

    max_available_workers   default: max_workers(), the usable CPUs. More is lowered to
                            that unless *oversubscribe*; below 1 becomes 1; with warnings.
    refresh_rate            milliseconds between looks for what no event announced.
    in_memory_only          never touch the persistent store.
    message_broker          broker(respond, message): answers `toggle_ipc` (README).
    logs                    "all" or "error"; the logger is "taskpool".
    keep_alive              None: a worker without work is closed at the next refresh; a
                            number of milliseconds without an available task after which
                            it is; "always": all workers start now and are kept.
    auto_initialize         False: nothing starts until initialize().
    start_method            "spawn", "forkserver" or "fork".
    max_tasks_per_worker    a worker is replaced after this many tasks. None: never.
    shutdown_timeout        seconds that running tasks get when the cluster must stop.

    While a worker process runs your file again, making a Cluster only registers its
    task map there; so a module-level Cluster and `if Cluster.is_master():` need no other
    guard. Raises TypeError and ValueError for wrong arguments.
    """

    def __init__(
        self,
        task_map: Mapping[str, TaskFunction],
        queue: TaskQueue | None = None,
        *,
        max_available_workers: int | None = None,
        refresh_rate: int | timedelta = 1000,
        in_memory_only: bool = False,
        message_broker: Broker | None = None,
        logs: str = "all",
        keep_alive: KeepAlive = None,
        auto_initialize: bool = True,
        start_method: str = "spawn",
        max_tasks_per_worker: int | None = None,
        oversubscribe: bool = False,
        shutdown_timeout: float | timedelta = 10.0,
    ) -> None:
        self.task_map = _checked_task_map(task_map)
        if queue is not None and not isinstance(queue, TaskQueue):
            raise _wrong_type("queue", queue, "a TaskQueue or None")
        if message_broker is not None and not callable(message_broker):
            raise _wrong_type("message_broker", message_broker, "a function or None")
        self.queue = TaskQueue() if queue is None else queue
        _checked_bool("oversubscribe", oversubscribe)
        self._max_workers = _allowed_workers(max_available_workers, oversubscribe)
        self._refresh = _checked_milliseconds("refresh_rate", refresh_rate)
        self._in_memory_only = _checked_bool("in_memory_only", in_memory_only)
        self._broker = message_broker
        self._log_all = _checked_choice("logs", logs, ("all", "error")) == "all"
        self._keep_alive = _checked_keep_alive(keep_alive)
        self._auto_initialize = _checked_bool("auto_initialize", auto_initialize)
        self._start_method = _checked_choice(
            "start_method", start_method, ("spawn", "forkserver", "fork")
        )
        if start_method not in multiprocessing.get_all_start_methods():
            raise _wrong_value("start_method", start_method, "one that this system has")
        self._max_tasks = max_tasks_per_worker
        if max_tasks_per_worker is not None:
            _checked_int("max_tasks_per_worker", max_tasks_per_worker, 1)
        self._shutdown_timeout = _checked_seconds("shutdown_timeout", shutdown_timeout, zero=True)
        self._boot = _register(self, sys._getframe(1).f_globals, sys._getframe(1).f_lineno)
        self._reset_after_fork()
        _reset_in_forks.add(self)
        if self._auto_initialize:
            self.initialize()

    def _reset_after_fork(self) -> None:
        """Registered, not started: also what a forked child finds. All below belongs to
        the dispatcher, but for what says otherwise."""
        self._owner = ""
        self._start_lock = threading.Lock()
        self._started = False
        self._wake: _WakeUp | None = None
        self._inbox: collections.deque[Callable[[], Any]] = collections.deque()  # Any thread.
        self._futures: dict[str, _TaskFuture] = {}  # Of waiting tasks. Any thread adds.
        self._workers: list[_WorkerHandle] = []
        self._hand: collections.deque[_Run] = collections.deque()  # Claimed, not yet given.
        self._hand_since = 0.0
        self._unsettled_here: list[_Ending] = []  # In memory: until the next turn.
        self._unsettled: list[_Ending] = []  # Persistent: until the store has it.
        self._expected: dict[str, float] = {}  # Seconds, by task type.
        self._shares = dict.fromkeys(self.task_map, 1.0)
        self._logs_runs = False
        self._alarm = math.inf  # Monotonic: when the next wait ends at the latest.
        self._next_refresh = self._next_watch = self._next_renew = self._next_foreign = 0.0
        self._next_failure_log = 0.0  # 0: the store has not failed since it last wrote.
        self._last_available = 0.0
        self._worker_numbers = itertools.count(1)
        self._boot_after, self._failed_boots = 0.0, 0  # Back-off of dying starts.
        self._boot_error: Exception | None = None
        self._look = True  # Something may be claimable in the store. Any thread sets it.
        self._news = False  # Something was added since this turn began. Any thread sets it.
        self._hungry = True  # New tasks could start at once: adding them ends the wait.
        self._upcoming: list[int] | None = []  # What next_due said; None: more than we take.
        self._store_due = NEVER  # When the first of them that was not yet due is.
        self._store_busy = False  # A call is under way in the store thread...
        self._in_flight = 0  # ... with so many outcomes.
        self._store_retry, self._store_failures, self._failing_since = 0.0, 0, 0.0
        self._check_futures = False
        self._until = NEVER  # While finishing: the due date up to which tasks are run.
        self._mode = "running"  # -> finishing | stopping -> closing -> closed
        self._stop_at = math.inf  # Monotonic: when running tasks are given back.
        self._stuck_since = math.inf
        self._closed = threading.Event()
        self._idle = threading.Event()  # Nothing in hand: for drain().

    # ---- For users, from any thread

    @staticmethod
    def is_master() -> bool:
        """Whether this process may run a cluster: False in workers, also as they start."""
        return _is_master()

    @staticmethod
    def max_workers() -> int:
        """The number of CPUs that this process may use (affinity and cgroup)."""
        return _usable_cpus()

    def initialize(self) -> None:
        """Start dispatching, if it has not started. Does nothing in a worker."""
        if not _is_master():
            return
        with self._start_lock:
            if self._started:
                return
            self._started = True
            if not self._in_memory_only:
                self._store_thread = _Calls("store")
            self._future_thread = _Calls("futures")
            self._listener_thread = _Calls("listener")
            self._broker_thread = _Calls("broker")
            self._owner = _new_owner()
            self._wake = _WakeUp()
            self._context = multiprocessing.get_context(self._start_method)
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._wake.reader, selectors.EVENT_READ, None)
            _master_ends.add(self._selector)
            self.queue._watchers += (self,)
            _running.add(self)
            _at_exit_once()
            name = "taskpool-dispatcher"
            threading.Thread(target=self._dispatch, name=name, daemon=True).start()

    def set_refresh_rate(self, refresh_rate: int | timedelta) -> None:
        """Change `refresh_rate` (milliseconds). Does nothing in a worker."""
        self._refresh = _checked_milliseconds("refresh_rate", refresh_rate)
        if _is_master():
            self._next_refresh = 0.0
            self._wake_up()

    def submit(  # type: ignore[override]
        self, task_type: str, data: Any = None, **options: Any
    ) -> _TaskFuture:
        """Add a task and return its Future; *options* are those of add_task.

        Only this cluster runs it, while it lives. The Future resolves at the final end,
        after retries: with the result, the task's own exception (or a RemoteError that
        tells of it), WorkerDied or TaskTimeout. `future.task` is the Task;
        `future.cancel()` removes it if it waits. In an `in_memory_only` cluster the
        default is in_memory=True. Raises what add_task raises, and RuntimeError after
        shutdown().
        """
        self._use("submit")
        if self._mode != "running":
            raise RuntimeError("cannot submit after shutdown")
        if self._in_memory_only:
            options.setdefault("in_memory", True)
        if type(task_type) is str and task_type and task_type not in self.task_map:
            known = ", ".join(map(repr, self.task_map))
            raise _wrong_value("task_type", task_type, f"one of this cluster's: {known}")
        if "lane" in options or (options.get("in_memory") is False and self._in_memory_only):
            raise TypeError("submit() takes the parameters of add_task; this one cannot be given")
        if self._auto_initialize and not self._started:
            self.initialize()  # Again, in a fork.
        row, if_exists = _make_row(self.queue._now(), task_type, data, lane=self._owner, **options)
        future = _TaskFuture(self, row)
        before = self._futures.get(row.id)
        self._futures[row.id] = future  # First: it may start before _add returns.
        try:
            (stored,) = self.queue._add([(row, if_exists)])
        except BaseException:
            if before is None:
                self._futures.pop(row.id, None)
            else:
                self._futures[row.id] = before
            raise
        future._stored = True
        if self._mode == "closed":  # Meanwhile; the task stays waiting, as others do.
            future._end_cancelled()
        if stored is not row:  # Kept: another task stands for this one.
            if before is not None:
                self._futures[row.id] = before
                return before
            future._row, future._foreign = stored, True
        elif before is not None:
            before._end_cancelled()  # Replaced.
        return future

    def map(  # type: ignore[override]
        self, task_type: str, data: Iterable[Any], timeout: float | None = None
    ) -> Iterator[Any]:
        """The results of one task for each of *data*, in order, as Executor.map."""
        return super().map(task_type, data, timeout=timeout)  # type: ignore[arg-type]

    def cancel(self, task_id: str) -> bool:
        """Remove a waiting task, or kill the worker that runs it. Its Future is cancelled.

        False if there is no such task, or it runs in another cluster.
        """
        self._use("cancel")
        _checked_text("task_id", task_id)
        query = Query(ids=[task_id], states=["waiting"])
        stores = [self.queue.in_memory._store] + [self.queue._store] * (not self._in_memory_only)
        if any(store.remove(query, self.queue._now()) for store in stores):
            future = self._futures.pop(task_id, None)
            if future is not None:
                future._end_cancelled()
            return True
        if not self._started:
            return False
        answer: Future[bool] = Future()
        self._post(lambda: self._cancel_run(task_id, answer))
        while not self._closed.is_set():
            with contextlib.suppress(concurrent.futures.TimeoutError):
                return answer.result(0.1)
        return False

    def drain(self, timeout: float | timedelta | None = None) -> bool:
        """Wait until nothing that was due at the call is waiting or running.

        Retries included; only task types of the map count. False after *timeout* seconds.
        Raises the error of workers that cannot start.
        """
        self._use("drain")
        seconds = math.inf if timeout is None else _checked_seconds("timeout", timeout, zero=True)
        deadline, until = time.monotonic() + seconds, self.queue._now()
        while not self._closed.is_set():
            if self._boot_error and not any(worker.ready for worker in self._workers):
                raise self._boot_error
            if self._idle.is_set() and not self._is_pending(until):
                break
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if not self._idle.wait(min(left, 0.2)):
                continue
            time.sleep(min(left, 0.01))  # Idle, but something waits, or runs elsewhere.
        for thread in self._event_threads():
            thread.flush(max(0.0, min(deadline - time.monotonic(), 60.0)))
        return True

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM, or shutdown() from elsewhere; then stop.

        After the signal nothing is started; running tasks get `shutdown_timeout`, then
        go back to waiting, uncounted. A second signal stops at once. Raises the error of
        workers that cannot start.
        """
        self._use("run")
        self.initialize()
        patience = [0.0, self._shutdown_timeout]  # Of the second signal, and of the first.
        with _signals(lambda: self._begin_stop(patience.pop() if patience else 0.0)):
            while not self._closed.wait(0.5):
                if self._boot_error and not any(worker.ready for worker in self._workers):
                    self._begin_stop(0.0)
                    raise self._boot_error
        for thread in self._event_threads():
            thread.flush(self._shutdown_timeout)

    def workers(self) -> list[dict[str, Any]]:
        """The worker processes: pid, state (starting, idle, busy), task_id, task_type,
        and since when (an aware UTC datetime)."""
        self._use("workers")
        shown = []
        for worker in list(self._workers):
            row = next((run.row for run in list(worker.runs)), None)
            since = datetime.now(timezone.utc) - timedelta(seconds=time.monotonic() - worker.since)
            shown.append(
                {
                    "pid": worker.pid,
                    "state": worker.state,
                    "task_id": row and row.id,
                    "task_type": row and row.task_type,
                    "since": since,
                }
            )
        return shown

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """Stop. With *wait*: when what runs and what was due before the call is done.

        That is tasks of the map, retries included; the rest stays waiting. Without
        *wait* nothing more is started, and running tasks get `shutdown_timeout` seconds
        before they go back to waiting, uncounted. *cancel_futures* removes the waiting
        tasks of Futures first. Leaving `with` and the end of the main script do the same
        as shutdown(). Called by a listener, broker or Future callback it does not wait.
        """
        self._use("shutdown")
        if not self._started:
            self._mode = "closed"
            self._closed.set()
            return
        if cancel_futures:
            for future in list(self._futures.values()):
                future.cancel()
        if not wait:
            self._begin_stop(self._shutdown_timeout)
            return
        now = self.queue._now()
        self._post(lambda: self._begin_finish(now))
        if any(thread.is_current() for thread in self._event_threads()):
            return
        try:
            while not self._closed.wait(0.5):
                pass
        except KeyboardInterrupt:
            self._begin_stop(self._shutdown_timeout)
            raise
        for thread in self._event_threads():
            thread.flush(self._shutdown_timeout)

    def __enter__(self) -> Cluster:
        self._use("with")
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=True)

    # ---- Other threads' way in

    def _use(self, what: str) -> None:
        if _is_master():
            return
        _refuse_rerun(f"Cluster.{what}")
        if _worker is not None:
            raise RuntimeError(f"Cluster.{what} was called in a worker; only the master can")

    def _wake_up(self) -> None:
        if self._wake is not None:
            self._wake.set()

    def _post(self, call: Callable[[], Any]) -> None:
        """Have the dispatcher make a call."""
        self._inbox.append(call)
        self._wake_up()

    def _queue_changed(self, removed: bool) -> None:
        self._look = self._news = True
        if removed:
            self._check_futures = True
        if removed or self._hungry:
            self._wake_up()

    def _begin_stop(self, seconds: float) -> None:
        self._post(lambda: self._stop(time.monotonic() + seconds))

    def _event_threads(self) -> list[_Calls]:
        if not self._started:
            return []
        return [self._future_thread, self._listener_thread, self._broker_thread]

    def _remove_waiting(self, row: Row) -> bool:
        store = self.queue.in_memory._store if row.in_memory else self.queue._store
        if not store.remove(Query(ids=[row.id], states=["waiting"]), self.queue._now()):
            return False
        self._futures.pop(row.id, None)
        return True

    def _is_pending(self, until: int) -> bool:
        """Whether a task due by *until* waits or runs. Asks the stores, in this thread."""
        now, types = self.queue._now(), list(self.task_map)
        running = Query(types=types, states=["running"], until=until, limit=1)
        stores = [self.queue.in_memory._store] + [self.queue._store] * (not self._in_memory_only)
        return any(
            store.next_due(self._owner, types, 1, now, until) or store.find(running, now)
            for store in stores
        )

    # ---- The dispatcher

    def _dispatch(self) -> None:
        """The body of the dispatcher thread."""
        if hasattr(signal, "pthread_sigmask"):
            # Workers are born with SIGINT blocked, so that Ctrl-C cannot kill them before
            # they ignore it. The tracker first: starting it may unblock SIGINT here.
            with contextlib.suppress(Exception):
                from multiprocessing import resource_tracker

                resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            while self._mode != "closed":
                self._turn()
        except BaseException as error:
            _log.exception("the dispatcher failed; its tasks start again in another cluster")
            self._fail_futures(TaskPoolError(f"the dispatcher failed: {error!r}"))
        finally:
            self._close()

    def _turn(self) -> None:
        """One pass of the loop: look, decide, hand out, wait."""
        self._alarm, self._news = math.inf, False
        self._logs_runs = self._log_all and _log.isEnabledFor(logging.INFO)
        while self._inbox:
            self._inbox.popleft()()
        now = time.monotonic()
        self._watch_workers(now)
        self._keep_house(now)
        self._settle_in_memory()
        self._claim_in_memory()
        self._use_store(now)
        self._scale(now)
        self._assign(now)
        self._progress(now)
        if self._mode != "closed":
            self._receive()

    def _wake_at(self, instant: float) -> None:
        """Do not wait beyond *instant* (monotonic)."""
        self._alarm = min(self._alarm, instant)

    def _receive(self) -> None:
        """The only wait: for workers, other threads, or the alarm."""
        wake = cast(_WakeUp, self._wake)
        # When all workers have work, a turn follows soon anyhow: new tasks need not end
        # the wait, and add up meanwhile.
        self._hungry = len(self._workers) < self._max_workers or any(
            not worker.runs for worker in self._workers
        )
        timeout = min(max(0.0, self._alarm - time.monotonic()), WAIT_SECONDS)
        if self._inbox or (self._news and self._hungry):
            timeout = 0.0
        for key, events in self._selector.select(timeout):
            worker: _WorkerHandle | None = key.data
            if worker is None:
                wake.clear()
                continue
            if events & selectors.EVENT_WRITE:
                worker.channel.flush()
            if events & selectors.EVENT_READ:
                self._hear(worker)
        for worker in self._workers:
            if not worker.channel.takes_back:
                self._hear(worker)

    def _hear(self, worker: _WorkerHandle) -> None:
        """Take in what a worker has sent."""
        now = time.monotonic()
        for packed in worker.channel.receive():
            message = pickle.loads(packed)
            kind = message[0]
            if kind == "done":
                self._on_done(worker, now, *message[2:])
            elif kind == "fail":
                self._on_fail(worker, now, *message[2:])
            elif kind == "start":
                run = worker.runs[0]
                run.deadline = time.monotonic() + cast(float, run.row.timeout)
            elif kind == "ask":
                self._on_ask(worker, *message[1:])
            elif kind == "changed":
                self._look = True
            elif kind == "ready":
                self._on_ready(worker)
            elif kind == "boot error":
                worker.stopping = True  # Its end will be no second failure.
                self._on_failed_boot()
                self._on_boot_error(_rebuilt(message[1]), message[1])
        if worker.channel.ended and worker.ended_at == math.inf:
            worker.ended_at, worker.load = time.monotonic(), math.inf  # No more tasks for it.
            if worker.channel.takes_back:
                self._selector.unregister(worker.channel)

    def _on_ready(self, worker: _WorkerHandle) -> None:
        worker.ready, worker.since = True, time.monotonic()
        self._boot_error, self._failed_boots, self._boot_after = None, 0, 0.0
        self._look = True

    def _on_done(
        self,
        worker: _WorkerHandle,
        now: float,
        seconds: float,
        packed: bytes | None,
        kept: str | None,
        problem: str | None,
        opened: int,
    ) -> None:
        run = self._ended(worker, now, seconds)
        row = run.row
        if self._logs_runs:
            ms = round(seconds * 1000)
            _log.info("cluster:%s:%s:\tdone in %d ms", row.task_type, row.id, ms)
        if opened:
            what = "conversation was" if opened == 1 else "conversations were"
            _log.warning(
                "cluster:%s:%s:\tended while %d %s open; return the Future of toggle_ipc "
                "to wait for it",
                *(row.task_type, row.id, opened, what),
            )
        outcome = Outcome(row.id, row.claim, "done", result=kept, error=problem)
        self._settle(_Ending(run, outcome, "done", packed))

    def _on_fail(
        self, worker: _WorkerHandle, now: float, seconds: float, failure: _Failure, may_retry: bool
    ) -> None:
        run = self._ended(worker, now, seconds)
        self._fail(run, failure, _error_text(failure), may_retry)

    def _ended(self, worker: _WorkerHandle, now: float, seconds: float) -> _Run:
        """The head of the worker's runs, which has ended after *seconds*."""
        run = worker.end_head(now)
        self._learn(run.row.task_type, seconds)
        self._look = True
        if worker.runs:
            self._log_start(worker.runs[0])
        return run

    def _learn(self, task_type: str, seconds: float) -> None:
        if seconds <= LEAST_SECONDS and self._shares[task_type] == 1 / AHEAD_TASKS:
            return  # As quick as can be, and known to be.
        expected = learned(self._expected.get(task_type), seconds)
        self._expected[task_type], self._shares[task_type] = expected, share(expected)

    def _log_start(self, run: _Run) -> None:
        if self._logs_runs:
            _log.info("cluster:%s:%s:\tstarted", run.row.task_type, run.row.id)

    def _fail(
        self, run: _Run, error: Exception | _Failure, text: str, may_retry: bool = True
    ) -> None:
        """A charged start has failed: retry it, or fail it for good."""
        row = run.row
        first_line = text.partition("\n")[0]
        if may_retry and row.attempt <= row.retries:
            delay = back_off(row.retry_delay, row.attempt, RETRY_CAP_SECONDS)
            ready_at = self.queue._now() + int(delay * 1e6)
            outcome = Outcome(row.id, row.claim, "ready", ready_at=ready_at, error=text)
            what = f"attempt {row.attempt} of {row.retries + 1} failed, next in {delay:g} s"
            _log.warning("cluster:%s:%s:\t%s: %s", row.task_type, row.id, what, first_line)
        else:
            outcome = Outcome(row.id, row.claim, "failed", error=text)
            _log.error("cluster:%s:%s:\tfailed: %s", row.task_type, row.id, first_line)
        self._settle(_Ending(run, outcome, "error", error=error))

    # ---- Conversations

    def _on_ask(
        self, worker: _WorkerHandle, number: int, conversation: int, packed: bytes
    ) -> None:
        run = next((run for run in worker.runs if run.number == number), None)
        if run is None:
            return
        answered = threading.Lock()  # Held from the first answer on.

        def answer(ok: bool, value: Any) -> None:
            if answered.acquire(blocking=False):
                self._post(lambda: self._answer(worker, run, conversation, ok, value))

        run.asks[conversation] = answer
        row, pid, broker = run.row, worker.pid, self._broker

        def respond(value: Any = None) -> None:
            """Answer the message: now or later, from any thread. The first answer counts."""
            try:
                answer(True, _dumps(value))
            except Exception as error:
                answer(False, _failure(error))
                raise

        def consult() -> None:
            try:
                if broker is None:
                    raise RuntimeError("the cluster has no message_broker to answer toggle_ipc")
                about = {"worker": pid, "task_id": row.id, "task_type": row.task_type}
                broker(respond, {**pickle.loads(packed), **about})
            except BaseException as error:
                answer(False, _failure(error))
                if broker is not None:
                    raise

        self._broker_thread.post(consult)

    def _answer(
        self, worker: _WorkerHandle, run: _Run, conversation: int, ok: bool, value: Any
    ) -> None:
        if run in worker.runs and run.asks.pop(conversation, None) is not None:
            worker.channel.send(_dumps(("answer", conversation, ok, value)))

    # ---- Outcomes

    def _settle(self, ending: _Ending) -> None:
        """Have the store record how a run ended; who waits for it is told after that."""
        (self._unsettled_here if ending.run.row.in_memory else self._unsettled).append(ending)

    def _settle_in_memory(self) -> None:
        if self._unsettled_here:
            endings, self._unsettled_here = self._unsettled_here, []
            memory, outcomes = self.queue.in_memory._memory, [e.outcome for e in endings]
            self._settled(endings, memory.settle(self._owner, outcomes, self.queue._now()))

    def _settled(self, endings: list[_Ending], held: list[bool]) -> None:
        """The store has recorded these endings, if their claims were still held."""
        resolvable = []
        for ending, was_held in zip(endings, held):
            run, outcome = ending.run, ending.outcome
            row, future = run.row, run.future
            if not was_held:
                text = "cluster:%s:%s:\tits claim was lost; this outcome is discarded"
                _log.warning(text, row.task_type, row.id)
                if future is not None:  # Another cluster has it now.
                    future._foreign = True
                    self._futures.setdefault(row.id, future)
                continue
            if future is not None:
                future._runs = False
                waits = outcome.state == "ready"
                if not waits or self._futures.setdefault(row.id, future) is not future:
                    resolvable.append((future, ending))
            listener = self.queue._listeners.get(ending.event or "")
            if listener is not None:
                self._call_listener(listener, ending)
        if resolvable:
            self._future_thread.post(lambda: _resolve_futures(resolvable))

    def _call_listener(self, listener: Listener, ending: _Ending) -> None:
        state, result, error = ending.outcome.state, ending.outcome.result, ending.outcome.error
        task = Task(ending.run.row._replace(state=state, owner="", result=result, error=error))
        self._listener_thread.post(lambda: listener(_value(ending), task))

    def _give_back(self, runs: Iterable[_Run]) -> None:
        """running -> waiting, uncharged, for what has not started (or must stop)."""
        for run in runs:
            self._settle(_Ending(run, Outcome(run.row.id, run.row.claim, "ready", False)))
        self._look = True

    # ---- Workers

    def _watch_workers(self, now: float) -> None:
        """Timeouts, slow heads, and workers that ended."""
        for worker in list(self._workers):
            head = worker.runs[0] if worker.runs else None
            if head is not None and head.deadline <= now and not worker.killed:
                self._give_back(worker.take_back())
                head.verdict = "timeout"
                worker.kill()
            elif len(worker.runs) > 1 and worker.since + SLOW_SECONDS <= now:
                self._give_back(worker.take_back())
                if worker.runs:  # Else not even the first had started: it is not to blame.
                    slow = cast(_Run, head).row.task_type
                    self._learn(slow, max(self._expected.get(slow, 0.0), now - worker.since))
                    worker.load = max(worker.load, 1.0)
            if worker.kill_at <= now:
                worker.kill()
            self._look_at_exit(worker, now)
            if len(worker.runs) > 1:
                self._wake_at(worker.since + SLOW_SECONDS)
            if head is not None:
                self._wake_at(head.deadline)

    def _look_at_exit(self, worker: _WorkerHandle, now: float) -> None:
        """Bury the worker if it ended: by its exit code, as a grandchild may keep its
        pipes open, or by the end of its channel, as somebody else may reap it."""
        code = worker.exit_code()
        silent = now - worker.ended_at
        if code is None and silent < 1.0:
            if silent >= 0.05:  # It closed its pipe, but lives.
                worker.end()
            ending = worker.stopping or worker.ended_at < math.inf
            self._wake_at(now + (0.002 if ending else 0.5))
            return
        self._hear(worker) if worker.ended_at == math.inf else None
        self._bury(worker, code)

    def _bury(self, worker: _WorkerHandle, code: int | None) -> None:
        if worker.channel.takes_back and worker.ended_at == math.inf:
            self._selector.unregister(worker.channel)
        self._workers.remove(worker)
        self._give_back(worker.take_back())
        while worker.runs:
            run = worker.end_head(time.monotonic())
            row = run.row
            if run.verdict == "cancel":
                self._settle(_Ending(run, Outcome(row.id, row.claim, "removed")))
            elif run.verdict == "timeout":
                late = TaskTimeout(f"{row.task_type!r} task {row.id!r} ran over {row.timeout:g} s")
                self._fail(run, late, f"TaskTimeout: {late}")
            elif worker.killed:  # For another reason.
                self._give_back([run])
            else:
                died = WorkerDied(code, worker.pid, row.task_type, row.id)
                self._fail(run, died, f"WorkerDied: {died}")
        if not worker.ready and not worker.stopping:
            self._on_silent_boot(worker, code)
        worker.close()
        self._look = True

    def _on_failed_boot(self) -> None:
        self._failed_boots += 1
        wait = back_off(BOOT_SECONDS, self._failed_boots, BOOT_CAP_SECONDS)
        self._boot_after = time.monotonic() + wait

    def _on_silent_boot(self, worker: _WorkerHandle, code: int | None) -> None:
        self._on_failed_boot()
        died = WorkerDied(code, worker.pid)
        if code == 1:  # Python ended by an exception, of which it told on standard error.
            why = "your file raised an exception there, shown on standard error"
            self._on_boot_error(TaskPoolError(f"{died}: {why}"))
        elif self._failed_boots >= BOOT_TRIES:
            self._on_boot_error(TaskPoolError(f"{died}, {BOOT_TRIES} times in a row"))

    def _on_boot_error(self, error: Exception, failure: _Failure | None = None) -> None:
        """The entry file raised in a worker: say so once; fail the Futures that wait."""
        if self._boot_error is None:
            text = failure.traceback if failure else str(error)
            _log.error("a worker could not start; stored tasks stay waiting: %s", text)
        self._boot_error = error
        self._fail_futures(error)

    def _fail_futures(self, error: Exception) -> None:
        for task_id, future in list(self._futures.items()):
            self._futures.pop(task_id, None)

            def fail(future: _TaskFuture = future) -> None:
                with contextlib.suppress(StoreError):
                    self._remove_waiting(future._row)
                _resolve(future, error=error)

            self._future_thread.post(fail)

    def _scale(self, now: float) -> None:
        """Start the workers that are needed, close those that are not."""
        if self._mode not in ("running", "finishing"):
            return
        wall, memory = self.queue._now(), self.queue.in_memory._memory
        due = memory.next_due(self._owner, self._shares, self._max_workers, wall, self._until)
        due = due + (self._upcoming or [])
        available = sum(instant <= wall for instant in due) + len(self._hand)
        if self._upcoming is None:
            available += self._max_workers
        later = min((instant for instant in due if instant > wall), default=NEVER)
        self._wake_at(now + (later - wall) / 1e6)
        if available or any(worker.runs for worker in self._workers):
            self._last_available = now
        free = sum(not worker.runs and not worker.stopping for worker in self._workers)
        wanted = available - free
        if self._keep_alive == "always" and self._mode == "running":
            wanted = self._max_workers
        while wanted > 0 and len(self._workers) < self._max_workers:
            if self._boot_after > now:
                self._wake_at(self._boot_after)
                break
            if not self._start_worker():
                break
            wanted -= 1
        if isinstance(self._keep_alive, float):
            if now - self._last_available >= self._keep_alive:
                self._retire_idle(now)
            elif self._workers:
                self._wake_at(self._last_available + self._keep_alive)

    def _start_worker(self) -> bool:
        wake = cast(_WakeUp, self._wake)
        number = next(self._worker_numbers)
        try:
            worker = _WorkerHandle(self._context, number, _dumps(("boot", self._boot)), wake)
        except Exception as error:
            # No more processes for now; or the interpreter is going down.
            self._on_failed_boot()
            _log.error("a worker process could not be started: %r", error)
            if self._failed_boots >= BOOT_TRIES:
                self._on_boot_error(error)
            return False
        self._workers.append(worker)
        if worker.channel.takes_back:
            self._selector.register(worker.channel, selectors.EVENT_READ, worker)
        return True

    def _retire_idle(self, now: float) -> None:
        for worker in self._workers:
            if worker.ready and not worker.runs and not worker.stopping:
                worker.retire(now)

    # ---- Claiming

    def _accepting(self) -> list[_WorkerHandle]:
        return [w for w in self._workers if w.ready and not w.stopping and w.load < 1.0]

    def _room(self) -> float:
        """How much work may be claimed now, in workers' worth (P5)."""
        room = 0.0
        for worker in self._accepting():
            left = 1.0 - worker.load
            if self._max_tasks is not None:
                left = min(left, (self._max_tasks - worker.given) / self._max_tasks)
            room += left
        return room - sum(run.cost for run in self._hand)

    def _claimable(self) -> Mapping[str, float]:
        if self._max_tasks is None:
            return self._shares
        least = 1.0 / self._max_tasks
        return {task_type: max(cost, least) for task_type, cost in self._shares.items()}

    def _claim_in_memory(self) -> None:
        if self._mode not in ("running", "finishing"):
            return
        room = self._room()
        if room > 0:
            memory, now = self.queue.in_memory._memory, self.queue._now()
            rows = memory.claim(self._owner, self._claimable(), room, now, self._until)
            self._take_in_hand(rows)

    def _take_in_hand(self, rows: list[Row]) -> None:
        shares = self._claimable()
        if rows and not self._hand:
            self._hand_since = time.monotonic()
        for row in rows:
            cost = 1.0 if row.interrupted else shares[row.task_type]
            run = _Run(row, cost, self._futures.pop(row.id, None))
            if row.state == "failed":  # It cannot be read; the store has set it aside.
                reason = f"StoreError: the stored task cannot be run: {row.error}"
                outcome = Outcome(row.id, row.claim, "failed", error=reason)
                _log.error("cluster:%s:%s:\tfailed: %s", row.task_type, row.id, reason)
                error = StoreError(reason)
                self._settled([_Ending(run, outcome, "error", error=error)], [True])
                continue
            self._hand.append(run)

    def _use_store(self, now: float) -> None:
        """Send the store what ended, and for what can be claimed: one transaction."""
        if self._in_memory_only or self._store_busy:
            return
        if self._store_retry > now:
            self._wake_at(self._store_retry)
            return
        claiming = self._mode in ("running", "finishing")
        room = self._room() if claiming else 0.0
        if self._store_due <= self.queue._now():
            self._look, self._store_due = True, NEVER
        if not self._unsettled and not (self._look and claiming):
            return
        endings, self._unsettled = self._unsettled, []
        self._look = False
        self._store_busy, self._in_flight = True, len(endings)
        outcomes = [ending.outcome for ending in endings]
        owner, types, until = self._owner, dict(self._claimable()), self._until
        most = self._max_workers if claiming else 0

        def work() -> None:
            try:
                answer: Any = self._store_turn(owner, outcomes, types, room, most, until)
            except BaseException as error:
                answer = error
            self._post(lambda: self._on_store_answer(endings, room, answer))

        self._store_thread.post(work)

    def _store_turn(
        self,
        owner: str,
        outcomes: list[Outcome],
        types: Mapping[str, float],
        room: float,
        most: int,
        until: int,
    ) -> tuple[list[bool], list[Row], list[int] | None]:
        """What the store thread does for a turn. A look at an empty queue writes nothing."""
        store, held, rows = self.queue._store, [], []
        if outcomes:
            with store.transaction() as together:
                held = store.settle(owner, outcomes, self.queue._now())
                # A claim that failed must not undo, or seem to undo, what is recorded.
                if room > 0 and together is not None:
                    rows = store.claim(owner, types, room, self.queue._now(), until)
        if most and sum(types[row.task_type] for row in rows) >= room / 2 and rows:
            return held, rows, None
        if outcomes and most:
            return held, rows, None  # Recorded and claimed; the next turn looks on.
        now = self.queue._now()
        upcoming = store.next_due(owner, types, most, now, until) if most else []
        if room > 0 and upcoming and upcoming[0] <= now and not rows:
            rows = store.claim(owner, types, room, now, until)
            if rows:
                return held, rows, None
        return held, rows, upcoming

    def _on_store_answer(self, endings: list[_Ending], room: float, answer: Any) -> None:
        self._store_busy, self._in_flight = False, 0
        if isinstance(answer, BaseException):
            self._unsettled = endings + self._unsettled
            self._look = True
            self._on_store_failure(answer)
            return
        self._store_failures = 0
        held, rows, self._upcoming = answer
        if self._next_failure_log and (held or rows):  # Reading proves nothing: a full disk.
            self._next_failure_log = 0.0
            _log.warning("the store works again")
        now = self.queue._now()
        self._store_due = min((due for due in self._upcoming or () if due > now), default=NEVER)
        self._settled(endings, held)
        self._take_in_hand(rows)
        self._look = self._look or self._upcoming is None

    def _on_store_failure(self, error: BaseException) -> None:
        self._store_failures += 1
        now = time.monotonic()
        self._store_retry = now + back_off(STORE_SECONDS, self._store_failures, STORE_CAP_SECONDS)
        if self._store_failures == 1:
            self._failing_since = now
        if self._next_failure_log <= now:
            self._next_failure_log = now + WARN_SECONDS
            _log.error("the store failed; nothing is lost, trying again: %s", error)

    def _assign(self, now: float) -> None:
        """Give the tasks in hand to the workers with the most room."""
        batches: dict[_WorkerHandle, list[_Run]] = {}
        workers = self._accepting()
        while self._hand and workers:
            run = self._hand[0]
            worker = min(workers, key=lambda worker: worker.load)
            if worker.load > 0 and worker.load + run.cost > 1.0 + 1e-9:
                break
            self._hand.popleft()
            if run.future is not None:
                run.future._runs = True
            worker.load += run.cost
            batch = batches.setdefault(worker, [])
            batch.append(run)
            if self._max_tasks is not None and worker.given + len(batch) >= self._max_tasks:
                workers.remove(worker)
        for worker, runs in batches.items():
            if not worker.runs:
                self._log_start(runs[0])
            worker.give(runs)
            if self._max_tasks is not None and worker.given >= self._max_tasks:
                worker.retire(now)
                worker.kill_at = math.inf  # When its last task has ended: see _progress.
        if self._hand:
            if self._hand_since + 0.05 <= now or self._mode not in ("running", "finishing"):
                runs = list(self._hand)
                self._hand.clear()
                self._give_back(runs)
            self._wake_at(self._hand_since + 0.05)

    # ---- Housekeeping and the end

    def _keep_house(self, now: float) -> None:
        """What is done every so often."""
        for worker in self._workers:
            if not worker.channel.takes_back:
                continue
            if worker.ended_at < math.inf:
                continue
            full, channel = worker.channel.is_full, worker.channel
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if full else 0)
            if self._selector.get_key(channel).events != events:
                self._selector.modify(channel, events, worker)
        if self._next_refresh <= now:
            self._next_refresh = now + self._refresh
            self.queue.in_memory._memory.renew(self._owner, self.queue._now())
            cast(_WakeUp, self._wake).clear()  # Ctrl-C may have come before its byte.
            self._look = True
            self._check_futures = self._check_futures or self._idle.is_set()
            if self._keep_alive is None and self._mode == "running" and not self._hand:
                self._retire_idle(now)
        self._wake_at(self._next_refresh)
        if self._check_futures and self._futures and not self._store_busy:
            self._check_futures = False
            self._look_after_futures()
        if not self._in_memory_only and self._mode != "closing":
            self._watch_masters(now)

    def _watch_masters(self, now: float) -> None:
        store = self.queue._store
        if self._next_watch <= now:
            self._next_watch = now + WATCH_SECONDS
            renew = self._next_renew <= now
            if renew:
                self._next_renew = now + RENEW_SECONDS
            warn = self._next_foreign <= now
            if warn:
                self._next_foreign = now + WARN_SECONDS

            def work() -> None:
                wall = self.queue._now()
                try:
                    if renew:
                        store.renew(self._owner, wall)
                    ended = store.recover(self._owner, time.monotonic(), wall)
                    foreign = store.foreign(self.task_map, wall) if warn else []
                except Exception as error:
                    failure = error  # `error` itself is gone after this block.
                    self._post(lambda: self._on_watch_failure(failure))
                else:
                    self._post(lambda: self._on_watched(ended, foreign))

            self._store_thread.post(work)
        self._wake_at(self._next_watch)

    def _on_watch_failure(self, error: Exception) -> None:
        self._next_renew = 0.0
        if not self._store_failures:
            self._on_store_failure(error)

    def _on_watched(self, ended: list[Row], foreign: list[str]) -> None:
        for row in ended:
            error = TaskPoolError(cast(str, row.error))
            run = _Run(row, 1.0, self._futures.pop(row.id, None))
            _log.error("cluster:%s:%s:\tfailed: %s", row.task_type, row.id, row.error)
            outcome = Outcome(row.id, row.claim, "failed", error=row.error)
            self._settled([_Ending(run, outcome, "error", error=error)], [True])
        if foreign:
            names = ", ".join(map(repr, foreign))
            _log.warning("tasks wait that this cluster has no function for: %s", names)

    def _look_after_futures(self) -> None:
        """Resolve Futures whose tasks were removed, or ended in another cluster."""
        futures = [future for future in list(self._futures.values()) if future._stored]

        def work() -> None:
            for in_memory in (True, False):
                mine = [future for future in futures if future._row.in_memory is in_memory]
                store = self.queue.in_memory._memory if in_memory else self.queue._store
                for start in range(0, len(mine), 500):
                    part = mine[start : start + 500]
                    query = Query(ids=[future._row.id for future in part])
                    rows = {row.id: row for row in store.find(query, self.queue._now())}
                    for future in part:
                        self._compare(future, rows.get(future._row.id))

        if self._in_memory_only:
            work()
        else:
            self._store_thread.post(work)

    def _compare(self, future: _TaskFuture, row: Row | None) -> None:
        task_id = future._row.id
        if self._futures.get(task_id) is not future:  # It was claimed in between.
            return
        if row is None:
            self._futures.pop(task_id, None)
            _resolve(future) if future._foreign else future._end_cancelled()
        elif row.state == "done":
            self._futures.pop(task_id, None)
            _resolve(future, Task(row).result)
        elif row.state == "failed" and future._foreign:
            self._futures.pop(task_id, None)
            name, _, text = (row.error or "").partition("\n")[0].partition(": ")
            _resolve(future, error=RemoteError(name, text, row.error or ""))

    def _cancel_run(self, task_id: str, answer: Future[bool]) -> None:
        """cancel() of a task that did not wait when it looked."""
        if self._store_busy:  # The claim may be on its way.
            self._store_thread.post(lambda: self._post(lambda: self._cancel_run(task_id, answer)))
            return
        for held in list(self._hand):
            if held.row.id == task_id:
                self._hand.remove(held)
                self._end_cancelled(held)
                answer.set_result(True)
                return
        for worker in self._workers:
            run = next((run for run in worker.runs if run.row.id == task_id), None)
            if run is None:
                continue
            taken = worker.take_back()
            if run in taken:
                taken.remove(run)
                self._end_cancelled(run)
            else:
                run.verdict = "cancel"
                if run.future is not None:
                    run.future._end_cancelled()
                worker.kill()
            self._give_back(taken)
            answer.set_result(True)
            return
        answer.set_result(False)

    def _end_cancelled(self, run: _Run) -> None:
        if run.future is not None:
            run.future._end_cancelled()
        self._settle(_Ending(run, Outcome(run.row.id, run.row.claim, "removed")))

    def _begin_finish(self, until: int) -> None:
        if self._mode == "running":
            self._mode, self._until, self._look = "finishing", until, True
            self._upcoming = None if not self._in_memory_only else []

    def _stop(self, at: float) -> None:
        if self._mode in ("running", "finishing"):
            self._mode = "stopping"
            _log.info("stopping: running tasks get %.1f s", max(0.0, at - time.monotonic()))
        self._stop_at = min(self._stop_at, at)

    def _progress(self, now: float) -> None:
        """Towards the end of a worker, of a drain, of the cluster."""
        for worker in self._workers:
            if worker.stopping and not worker.runs and worker.kill_at == math.inf:
                worker.kill_at = now + EXIT_SECONDS
                self._wake_at(worker.kill_at)
        working = self._hand or any(worker.runs for worker in self._workers)
        give_up_at = self._failing_since + self._shutdown_timeout
        given_up = self._store_failures > 0 and give_up_at <= now and not working
        busy = working or ((self._unsettled or self._in_flight) and not given_up)
        if busy or self._store_busy:
            self._idle.clear()
        else:
            self._idle.set()
        if self._mode == "running":
            return
        if self._mode == "finishing":
            self._end_stuck_conversations(now)
            memory, wall = self.queue.in_memory._memory, self.queue._now()
            waiting = (
                self._upcoming is None
                or self._upcoming
                or memory.next_due(self._owner, self._shares, 1, wall, self._until)
            )
            cannot = self._boot_error is not None and not self._accepting()
            unknown = self._store_busy or self._look_pending() or (waiting and not cannot)
            if busy or (unknown and not self._store_failures):
                return
            self._mode = "closing"
        elif self._mode == "stopping":
            if self._stop_at <= now:
                for worker in self._workers:
                    if worker.runs:
                        worker.kill()
            self._wake_at(self._stop_at)
            if busy:
                return
            self._mode = "closing"
        for worker in self._workers:
            if worker.ready and not worker.stopping:
                worker.retire(now)
            elif not worker.stopping:
                worker.kill()
            self._wake_at(worker.kill_at)
        if not self._workers and not self._store_busy:
            self._mode = "closed"

    def _look_pending(self) -> bool:
        return self._look and not self._in_memory_only

    def _end_stuck_conversations(self, now: float) -> None:
        """While finishing, an answer that does not come ends after shutdown_timeout."""
        runs = [run for worker in self._workers for run in worker.runs]
        if not runs or not all(run.asks for run in runs):
            self._stuck_since = math.inf
            return
        self._stuck_since = min(self._stuck_since, now)
        if self._stuck_since + self._shutdown_timeout > now:
            self._wake_at(self._stuck_since + self._shutdown_timeout)
            return
        error = _failure(RuntimeError("the cluster was shut down before the broker answered"))
        for run in runs:
            for answer in list(run.asks.values()):
                answer(False, error)

    def _close(self) -> None:
        """The dispatcher's last act."""
        self._mode = "closed"  # Futures made from here on are cancelled by submit().
        if self._unsettled:
            text = "the store did not come back: %d outcome(s) are lost, those tasks start again"
            _log.error(text, len(self._unsettled))
        for worker in self._workers:
            worker.kill()
            worker.close()
        self._workers.clear()
        if not self._in_memory_only:
            self._store_thread.post(lambda: self._leave())
            self._store_thread.flush(BUSY_SECONDS)
            self._store_thread.stop()
        left = self.queue.in_memory.count(task_type=list(self.task_map), state="waiting")
        if left:
            _log.warning("%d in-memory tasks were not due at shutdown; they end here", left)
        for future in list(self._futures.values()):
            self._future_thread.post(future._end_cancelled)
        for thread in self._event_threads():
            thread.stop()
        self._selector.close()
        _master_ends.discard(self._selector)
        wake, self._wake = self._wake, None
        cast(_WakeUp, wake).close()
        self.queue._watchers = tuple(w for w in self.queue._watchers if w is not self)
        _running.discard(self)
        self._idle.set()
        self._closed.set()

    def _leave(self) -> None:
        with contextlib.suppress(StoreError):
            self.queue._store.leave(self._owner, self.queue._now())


OK, FAILURE, USAGE = 0, 1, 2  # Exit codes; argparse exits with 2 itself.


# --- Demo ----------------------------------------------------------------------------
# `python taskpool.py --demo`: the promises on real work, each part with its own code.

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def _demo_files() -> list[str]:
    """The .py files of this Python's standard library, the largest first."""
    library = os.path.dirname(os.__file__)
    files = []
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda file: (-os.path.getsize(file), file))


def _demo_parse(job: Task) -> dict[str, Any]:
    """Parse one file: its lines, functions, and longest function."""
    import ast

    with open(job.data, "rb") as file:
        source = file.read()
    nodes = ast.walk(ast.parse(source))
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    sizes = [(cast(int, n.end_lineno) - n.lineno + 1, n.name) for n in functions]
    longest = list(max(sizes, default=(0, "")))
    return {"lines": source.count(b"\n"), "functions": len(sizes), "longest": longest}


async def _demo_sleep(job: Task) -> list[int]:
    import asyncio

    async def one(number: int) -> int:
        await asyncio.sleep(0.05)
        return number

    return list(await asyncio.gather(*map(one, range(job.data))))


def _demo_talk(job: Task, toggle_ipc: Callable[..., Future[Any]]) -> Future[Any]:
    return toggle_ipc(
        lambda first: toggle_ipc(
            lambda second: [first, second], lambda send: send({"status": 3, "data": "and nested?"})
        ),
        lambda send: send({"status": 2, "data": "master, do you hear me?"}),
    )


def _demo_broker(respond: Callable[[Any], None], message: dict[str, Any]) -> None:
    respond(f"{message['data']} yes")


def _demo_flaky(job: Task) -> int:
    if job.attempt < 3:
        raise OSError(f"no luck at attempt {job.attempt}")
    return job.attempt


def _demo_spin(job: Task) -> None:
    while True:
        pass


def _demo_suicide(job: Task) -> None:
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def _demo_clock(job: Task) -> float:
    return time.time()


def _demo_note(job: Task) -> None:
    """Append the id to a file, in one write: what really ran, whoever is killed."""
    time.sleep(0.02)
    with open(job.data, "ab", buffering=0) as file:
        file.write(f"{job.id}\n".encode())


_DEMO_MAP: dict[str, TaskFunction] = {
    "parse": _demo_parse, "sleep": _demo_sleep, "talk": _demo_talk, "flaky": _demo_flaky,
    "spin": _demo_spin, "suicide": _demo_suicide, "clock": _demo_clock, "note": _demo_note,
}  # fmt: skip


def _demo_doomed_master(path: str) -> None:
    """The second master of the demo: works on the tasks of *path* until it is killed."""
    with Cluster(_DEMO_MAP, TaskQueue(path), logs="error") as cluster:
        cluster.drain()


class _Demo:
    """One run of the demo: its queue and cluster, and what went wrong."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.broken: list[str] = []
        self.ended: collections.Counter[str] = collections.Counter()
        self.parsed: dict[str, dict[str, Any]] = {}
        self.order: list[str] = []
        self.seconds = 0.0

    def part(self, play: Callable[[], tuple[bool, str]]) -> None:
        """Show the code of one part, run it, and show what came of it."""
        import inspect
        import textwrap

        lines = textwrap.dedent(inspect.getsource(play)).splitlines()
        print(f"\n{play.__doc__}\n")
        print("\n".join(f"    {line[4:]}" for line in lines[2:]), flush=True)
        try:
            good, result = play()
        except Exception as error:
            good, result = False, f"{type(error).__name__}: {error}"
        print(f"\n  {'->' if good else 'BROKEN:'} {result}", flush=True)
        if not good:
            self.broken.append(cast(str, play.__doc__))

    @staticmethod
    def read(path: str) -> list[str]:
        """The words in a file, if it is there."""
        return _read_text(path).split()

    def listen(self, value: Any, task: Task) -> None:
        self.ended["failed" if isinstance(value, Exception) else "done"] += 1
        if task.task_type == "parse":
            self.order.append(task.data)
            if isinstance(value, dict):
                self.parsed[task.data] = value

    def watch(self, total: int) -> None:
        """Progress, until so many files are parsed: one line on a terminal, else a few."""
        live, shown = sys.stdout.isatty(), 0
        while len(self.order) < total:
            time.sleep(0.05)
            count = len(self.order)
            if live:
                bar = "#" * (30 * count // total)
                print(f"\r  [{bar:<30}] {count} of {total} files", end="", flush=True)
            elif count * 4 // total > shown:
                shown = count * 4 // total
                print(f"  {count} of {total} files", flush=True)
        if live:
            print("\r" + " " * 60 + "\r", end="")

    def play(self) -> None:
        """All parts. The functions below are printed as they run."""
        queue = TaskQueue(os.path.join(self.folder, "demo.db"))
        queue.add_event_listener("done", self.listen)
        queue.add_event_listener("error", self.listen)
        files = _demo_files()
        urgent = files[-6:]
        cluster = Cluster(
            _DEMO_MAP, queue, keep_alive="always", message_broker=_demo_broker,
            auto_initialize=False,
        )  # fmt: skip

        def parse() -> tuple[bool, str]:
            """1. Parse the standard library: stored tasks, and urgent ones in memory first"""
            queue.add_tasks({"task_type": "parse", "data": file} for file in files[:-6])
            for rank, file in enumerate(urgent):
                queue.add_task("parse", file, priority=rank, in_memory=True)
            started = time.monotonic()
            cluster.initialize()
            self.watch(len(files))
            cluster.drain()
            self.seconds = time.monotonic() - started
            first = sorted(self.order[:6]) == sorted(urgent)
            good = first and len(self.parsed) == len(files) and not queue.count()
            return good, f"{len(self.parsed)} files; urgent first: {first}"

        def sleep() -> tuple[bool, str]:
            """2. A task due in a second starts on time; an asyncio task runs meanwhile"""
            clock = cluster.submit("clock", due_date=timedelta(seconds=1))
            numbers = cluster.submit("sleep", 5).result()
            due = clock.task.due_date.timestamp()
            late = clock.result() - due
            good = 0 <= late < 0.5 and numbers == [0, 1, 2, 3, 4]
            return good, f"{numbers}, {late * 1000:.1f} ms late"

        def talk() -> tuple[bool, str]:
            """3. A conversation: the task asks the master, and asks again in the answer"""
            answers = cluster.submit("talk").result()
            return answers[1] == "and nested? yes", repr(answers)

        def flaky() -> tuple[bool, str]:
            """4. A task that fails twice and then succeeds"""
            attempt = cluster.submit("flaky", retries=2, retry_delay=0.1).result()
            return attempt == 3, f"attempt {attempt} succeeded"

        def kill() -> tuple[bool, str]:
            """5. A task over its timeout is killed; one kills its own worker; others go on"""
            spin = cluster.submit("spin", timeout=0.5)
            suicide = cluster.submit("suicide")
            neighbours = list(cluster.map("parse", files[-20:]))
            errors = spin.exception(), suicide.exception()
            good = isinstance(errors[0], TaskTimeout) and isinstance(errors[1], WorkerDied)
            return good and len(neighbours) == 20, f"{errors[0]}; {errors[1]}; 20 neighbours done"

        def restart() -> tuple[bool, str]:
            """6. A second master is killed with SIGKILL in mid-work; a third finishes its tasks"""
            path = os.path.join(self.folder, "restart.db")
            notes = os.path.join(self.folder, "notes")
            with TaskQueue(path) as second:
                tasks = second.add_tasks({"task_type": "note", "data": notes} for _ in range(40))
                doomed = multiprocessing.get_context("spawn").Process(
                    target=_demo_doomed_master, args=(path,)
                )
                doomed.start()
                while doomed.is_alive() and len(self.read(notes)) < 10:
                    time.sleep(0.005)
                doomed.kill()
                doomed.join()
                left = second.count()
                with Cluster(_DEMO_MAP, second) as third:
                    third.drain()
                ran = self.read(notes)
                twice = len(ran) - len(set(ran))
                good = set(ran) == {task.id for task in tasks} and left > 0 and not second.count()
                good = good and twice <= 2
                return good, f"{left} of 40 were left, all ran in the end, {twice} of them twice"

        for play in (parse, sleep, talk, flaky, kill, restart):
            self.part(play)
        cluster.shutdown()
        queue.close()

    def table(self) -> None:
        """What it came to."""
        lines = {file: parsed["lines"] for file, parsed in self.parsed.items()}
        largest = max(lines, key=lambda file: lines[file], default="")
        sizes = [(*parsed["longest"], file) for file, parsed in self.parsed.items()]
        longest = max(sizes, default=(0, "", ""))
        rows = [
            ("tasks done", f"{self.ended['done']:,}"),
            ("failed attempts (all intended)", f"{self.ended['failed']:,}"),
            ("files parsed", f"{len(lines):,}, {sum(lines.values()):,} lines"),
            ("functions", f"{sum(p['functions'] for p in self.parsed.values()):,}"),
            ("parsed per second", f"{len(lines) / max(self.seconds, 1e-9):,.0f} files"),
            ("largest file", f"{os.path.basename(largest)}, {lines.get(largest, 0):,} lines"),
            (
                "longest function",
                f"{longest[1]} in {os.path.basename(longest[2])}, {longest[0]:,} lines",
            ),
        ]
        print()
        for name, value in rows:
            print(f"  {name:<32} {value}")


class _DemoLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f"  log: {record.getMessage()}", flush=True)


def _demo() -> int:
    import tempfile

    _log.addHandler(_DemoLog(logging.WARNING))
    print(f"taskpool {__version__}, Python {sys.version.split()[0]}, {_usable_cpus()} CPUs")
    with tempfile.TemporaryDirectory(prefix="taskpool-demo-") as folder:
        demo = _Demo(folder)
        demo.play()
        demo.table()
    if demo.broken:
        print("\nNOT as promised:", *demo.broken, sep="\n  ")
        return FAILURE
    print("\nAll parts came out as promised.")
    return OK


# --- Command line --------------------------------------------------------------------


_EPILOG = """\
  python taskpool.py --demo       works through the standard library, in ten seconds
  python -c "help(__import__('taskpool').TaskQueue.add_task)"     one call, explained
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 for failure, 2 for usage."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="taskpool.py",
        description="Background jobs in one file: run Python functions later, elsewhere.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--demo", action="store_true", help="show it at work, on real files")
    parser.add_argument("--version", action="version", version=f"taskpool {__version__}")
    options = parser.parse_args(arguments)
    if options.demo:
        return _demo()
    parser.print_usage(sys.stderr)
    return USAGE


if __name__ == "__main__":
    sys.modules.setdefault("taskpool", sys.modules["__main__"])  # Never imported twice.
    sys.exit(main())
