# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the taskpool authors. Licensed under the MIT License.
"""taskpool - run Python functions later, in other processes, and lose none of them.

One file, standard library only. Copy it into your project:

    from taskpool import Cluster, TaskQueue

    queue = TaskQueue("tasks.db")

    @queue.task(retries=3)
    def resize(job, *, width):
        return width // 2

    if __name__ == "__main__":
        with Cluster(queue=queue) as cluster:
            queue.add_task(resize, {"width": 640}, priority=5)   # stored, runs soon
            future = cluster.submit(resize, {"width": 320})      # the same, with a Future
            print(future.result())

Who does what

    your program    master process (yours too)                       worker processes
    ------------    -------------------------------------------      ----------------
    add_task() ---> Store <---- store thread <---- _Source
                                                   |     ^
                                rows it has claimed|     |how their runs ended
                                                   v     |
                                                   _Crew --- run -------------> your
                                                     ^                      function(job)
    submit() -----> _Futures                         +--- done, fail, progress ---+
    Future    <---- futures, callbacks threads                                    |
    listeners <---- listener thread                                               |
    broker    <---- broker thread <---------------------- ask (toggle_ipc) -------+

    One thread, the dispatcher, has the _Source, the _Crew and the loop: it hears, looks,
    decides and hands out, and never waits but for events (_Dispatcher.turn).

The life of a task (each arrow is a method of Store)

       add                claim                settle: done
    --------> waiting --------------> running ---------------> (removed), or `done`
                ^                      |  |                     if keep_result was given
                |  settle: retry, next |  |    settle: failed
                |  slot of `repeat`, or|  +------------------> failed
                |  requeued;   recover |                         |
                +----------------------+                         |
                |                retry                           |
                +------------------------------------------------+
    remove: waiting, failed, done --> (removed)      update: waiting --> waiting
    cancel: as remove; running --> (removed), as its master kills the worker
    claim, of what `expires` or cannot be read: waiting --> failed

    A task that is to follow others (`after`, `after_end`) is held: it waits in no line, until
    the write that ends the last of those releases it. (Store._follow)

What is promised (the tests and the README carry the same numbers)

    P1  A persistent task that add_task returned is not lost: not by killing any process
        at any moment, a full disk, a locked database or a row that cannot be read.
        (synchronous="FULL": nor by power failure.)
    P2  Each start that is charged runs at least once to its end, and exactly once unless
        a process was killed or a lease was lost before the end was recorded. No two live
        clusters run the same claim; a late outcome of a lost claim is discarded.
    P3  Master dead: its running tasks start again, at once where the new master can see
        that the old one is dead (same machine), else when its lease of 30 s ran out,
        by an observer that looked all the time. Not charged to `retries`. A task found so
        is from then on claimed singly, and the fifth interruption of such a claim fails it.
    P4  Worker dead or over `timeout`: only the task that it was running is charged one
        attempt. Tasks queued behind it start elsewhere uncharged; finished ones are not
        run again. No zombie, no orphan, no leaked file descriptor.
    P5  In-memory tasks first, then persistent; in each the highest priority, then the
        oldest. A worker has at most 10 ms of expected work ahead, never over 256 tasks;
        nothing waits behind a slow task while another worker is idle for over 50 ms.
        What is paused or at its limit is passed over.
    P6  A task starts at its due date: never earlier, and at once on an idle machine,
        unless its type is paused or at its limit.
    P7  Only task types in the cluster's map are claimed; others stay waiting.
    P8  Nothing stored is ever unpickled or evaluated: who can write to the store can
        only start mapped functions with JSON data.

Tasks are stored in a SQLite file, in a MongoDB collection that many machines share
(TaskQueue(MongoStore(collection))), or in a store of your own. Durations are seconds (or a
timedelta), but `refresh_rate` and an integer `keep_alive` are milliseconds, as in
nschwarz:cluster, from which this descends. Instants are datetimes outside, and integer
microseconds since 1970 (UTC) inside. Each part of the file uses only the parts above it.
"""

from __future__ import annotations

import atexit
import builtins
import collections
import concurrent.futures
import contextlib
import copy
import copyreg
import errno
import functools
import heapq
import itertools
import json
import logging
import marshal
import math
import multiprocessing
import multiprocessing.process
import operator
import os
import pickle
import queue as _queues
import select
import selectors
import signal
import socket
import sqlite3
import stat
import struct
import sys
import threading
import time
import traceback
import typing
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import date, datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from multiprocessing.connection import Connection
from types import BuiltinFunctionType, CoroutineType, MappingProxyType, MethodType
from typing import Any, Callable, Final, Literal, NamedTuple, TypeVar, Union, cast, overload

if sys.version_info < (3, 9):  # noqa: UP036 - Who has an older one is to know.
    _text = "taskpool needs Python 3.9 or later; this is " + sys.version.split()[0]
    raise SystemExit(_text) if __name__ == "__main__" else ImportError(_text)

__version__ = "0.1.0"
__all__ = [
    "Cluster", "Cron", "DuplicateTask", "GiveUp", "MongoStore", "RemoteError", "Retry",
    "SQLiteStore", "Store", "StoreError", "Task", "TaskFuture", "TaskPoolError", "TaskQueue",
    "TaskTimeout", "WorkerDied",
]  # fmt: skip

MESSAGE_CHARS = 1 << 17  # From here on data goes to the worker in several messages.
AHEAD_SECONDS = 0.010  # Expected work that a worker may have claimed ahead (P5).
AHEAD_TASKS = 256  # The same in tasks: what a crash can requeue.
LEAST_SHARE = 1 / AHEAD_TASKS  # The least part of a worker's room that a task takes (P5).
LEAST_SECONDS = AHEAD_SECONDS * LEAST_SHARE
SLOW_SECONDS = 0.020  # A task that runs longer lets go of those queued behind it.
LUMP_SECONDS = 0.050  # Starts that are closer than this come in groups: those of so long.
BOUNDS = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0)  # Seconds, to count how long runs took.
LATE_SECONDS = 1.0  # A dispatcher that wakes this late may have been stopped.
LEASE_SECONDS = 30.0  # A master without a heartbeat for this long is given up (P3).
RENEW_SECONDS = 10.0  # Between heartbeats: three within one lease.
WARN_SECONDS = 60.0  # Between two warnings of the same kind.
OWNERS_SECONDS = 0.1  # How often producers look which masters there are, and ...
KNOCK_SECONDS = 0.002  # ... how often they wake them.
WATCH_SECONDS = 1.0  # How often masters look for dead masters.
INTERRUPTIONS = 5  # Interrupted single claims after which a task fails (P3).
BUSY_SECONDS = 30.0  # Longest wait for another process's write lock on SQLite.
ASIDE_TASKS = 500  # Expired or broken ones that a claim sets aside: no long transaction.
PROMOTE_TASKS = 5_000  # Due tasks made ready at once: a million would stop the rest.
PAGE_BYTES = 2048  # Of a new SQLite file: add_task takes a fifth less than by 4096.
CHECKPOINT_PAGES = 4000  # Of SQLite's log, 8 MB: fewer and cheaper fsyncs.
RETRY_CAP_SECONDS = 3600.0  # Longest wait before a retry.
BOOT_SECONDS = 0.04  # First wait after a worker died at its start; doubled ...
BOOT_CAP_SECONDS = 30.0  # ... up to this.
TRIES = 20  # How often a change is begun anew when other writers were quicker.
STORE_SECONDS = 0.1  # The same for a store that fails ...
STORE_CAP_SECONDS = 5.0  # ... up to this.
BOOT_TRIES = 5  # Silent deaths at the start, in a row, that are an error.
BOOT_WARN_SECONDS = 10.0  # A worker that is not ready by then is warned of, and ...
BOOT_LIMIT_SECONDS = 120.0  # ... killed after this long, which is an error.
WAIT_SECONDS = 3600.0  # Longest wait of a dispatcher: selectors overflow at 24 days.
REPORT_SECONDS = 0.1  # Between two reports of job.progress that leave a worker...
REPORT_STORE_SECONDS = 1.0  # ... and between two that a master stores.
SOON_SECONDS = 2.0  # A worker stays for a task that can start within this.
EXIT_SECONDS = 2.0  # A worker told to stop is killed after this long.
ERROR_CHARS = 10_000  # Of a message that is kept; of a traceback 4 times as many.
EXCEPTION_BYTES = 1_000_000  # A larger pickled exception travels as text only.
MAX_DEPTH = 90  # Nesting of `data`; MongoDB allows 100.
MAX_INT = 2**63 - 1
NEVER = MAX_INT  # An instant after every due date.

_logger = logging.getLogger("taskpool")  # Fixed, also where the file is vendored.
_logger.addHandler(logging.NullHandler())


def _plain(text: str) -> str:
    """The text without what moves the cursor, changes colours or begins another line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


_OUR_CALLER = 2 if sys.version_info >= (3, 11) else 3  # Whose line a log record names.


class _Log(logging.LoggerAdapter):  # type: ignore[type-arg]
    """Our logger. A handler that raises stops nothing here."""

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        """*lines* are further lines of the message, such as a traceback."""
        lines: str = kwargs.pop("lines", "")
        # Ids, types and errors may hold what a terminal obeys.
        args = tuple(_plain(arg) if isinstance(arg, str) else arg for arg in args)
        if lines:
            msg, args = f"{msg}\n%s", (*args, "\n".join(map(_plain, lines.split("\n"))))
        try:
            super().log(level, msg, *args, stacklevel=_OUR_CALLER, **kwargs)
        except BaseException as error:
            is_main = threading.current_thread() is threading.main_thread()
            if is_main and not isinstance(error, Exception):
                raise  # Ctrl-C, say. No thread of a cluster may end so.
            if logging.raiseExceptions:  # Shown as what emit() catches itself.
                with contextlib.suppress(BaseException):
                    traceback.print_exc()


_log = _Log(_logger, {})


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
    +-- GiveUp, Retry   raised by a task: what is to follow this failure
    """


class DuplicateTask(TaskPoolError, ValueError):
    """A task of that id is waiting or running and `if_exists` is "raise", or is "follow" and
    that task has another type."""


class StoreError(TaskPoolError):
    """The store could not do what was asked; nothing was changed."""


class RemoteError(TaskPoolError):
    """A task's exception, as text, where it cannot be rebuilt in this process: its qualified
    class name, its message and its formatted traceback."""

    def __init__(self, type_name: str, text: str = "", traceback: str = "") -> None:
        super().__init__(type_name, text, traceback)
        self.type_name, self.text, self.traceback = type_name, text, traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}" if self.text else self.type_name


class WorkerDied(TaskPoolError):
    """A worker process ended while it ran a task. `exit_code` is negative for a signal, and
    None if unknown; `pid`, `task_type` and `task_id` tell which process and task."""

    def __init__(
        self, exit_code: int | None, pid: int, task_type: str = "", task_id: str = ""
    ) -> None:
        super().__init__(exit_code, pid, task_type, task_id)
        self.exit_code, self.pid = exit_code, pid
        self.task_type, self.task_id = task_type, task_id

    def __str__(self) -> str:
        names = {number.value: number.name for number in signal.Signals}
        code = self.exit_code
        how = f"exited with code {code}" if code is not None else "ended, exit code unknown,"
        if code is not None and code < 0:
            how = f"was killed by {names.get(-code, f'signal {-code}')} ({code})"
        what = f"running {self.task_type!r} task {self.task_id!r}" if self.task_id else "starting"
        return f"worker process {self.pid} {how} while {what}"


class TaskTimeout(TaskPoolError, TimeoutError):
    """A task ran longer than its `timeout`; its worker process was killed."""


class _RemoteTraceback(Exception):
    """The `__cause__` of a task's own exception: the traceback from the worker."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


# --- Cron ----------------------------------------------------------------------------
# When is the next run? Arithmetic with calendars and clocks, which knows of no task.

_DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August"),
    *("September", "October", "November", "December"),
)
_MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_MACROS = {
    "@YEARLY": "0 0 1 1 *", "@ANNUALLY": "0 0 1 1 *", "@MONTHLY": "0 0 1 * *",
    "@WEEKLY": "0 0 * * 0", "@DAILY": "0 0 * * *", "@MIDNIGHT": "0 0 * * *",
    "@HOURLY": "0 * * * *",
}  # fmt: skip
_ORDINALS = {"L": "last", "1": "first", "2": "second", "3": "third", "4": "fourth", "5": "fifth"}


def _number(word: str) -> int:
    """Plain digits as a number, else -1. Three digits suffice to be out of any range."""
    return int(word.lstrip("0")[:3] or 0) if word.isdigit() and word.isascii() else -1


class _Field(NamedTuple):
    """One of the fields of a cron text: reads its part of the text, or says it in words."""

    name: str
    unit: str
    every: range  # The values that * stands for.
    allowed: str
    names: tuple[str, ...] = ()

    def error(self, item: str) -> ValueError:
        """What is wrong with a list item, with a hint if it is one of the usual slips."""
        span, slash, step = item.partition("/")
        size = len(self.every)
        word = next((part for part in span.split("-") if part.isalpha() and len(part) != 3), "-")
        near = [name for name in self.names if name.startswith(word[:3].capitalize())]
        if _number(step) > size and self.unit not in ("month", "weekday"):
            interval = f"repeat=timedelta({self.unit}s={step})"
            hint = f"every {step} {self.unit}s is {interval}, a step is 1 to {size}"
        elif slash and not (1 <= _number(step) <= size or any(map(str.isalpha, step))):
            hint = f"a step is 1 to {size}"
        elif "" in span.split("-"):
            hint = "a value is missing"
        elif near:
            hint = f"write {near[0][:3].upper()}, names have three letters"
        elif "~" in span or span in ("H", "R") or span.startswith(("H(", "R(")):
            hint = "random values (H, R, ~) are not supported"
        elif "L" in span and not span.strip("LW#-0123456789"):
            hint = "L is the last day of a month, 5L or FRIL its last Friday; L-3 is not supported"
        else:
            hint = "there is no such value"
        lists = "and lists (1,2), ranges (1-5) and steps (*/2) of these"
        return ValueError(f"{self.name} {item!r}: {hint}; allowed: {self.allowed}, {lists}")

    def value(self, word: str, item: str) -> int:
        """The value of a number or name; *item* is what to blame if it is neither."""
        names = [] if word.isdigit() else [name[:3].upper() for name in self.names]
        value = self.every[names.index(word)] if word in names else _number(word)
        if value in self.every or (value == 7 and self.unit == "weekday"):
            return value
        raise self.error(item)

    def values(self, text: str) -> Sequence[int]:
        """The values of a text without marks such as L, sorted."""
        if text == "*":
            return self.every
        if (number := _number(text)) in self.every:
            return (number,)
        every, size, found = self.every, len(self.every), set[int]()
        for item in text.split(","):
            span, slash, step_word = item.partition("/")
            start, dash, stop = span.partition("-")
            step = _number(step_word) if slash else 1
            if not 1 <= step <= size:
                raise self.error(item)
            first = every[0] if span == "*" else self.value(start, item)
            last = every[-1] if slash or span == "*" else first
            if dash:
                last = self.value(stop, item)
            last += size if last < first else 0  # 22-4 wraps around: 22-28, less 24 from 24 on.
            found.update(every[(at - every[0]) % size] for at in range(first, last + 1, step))
        return sorted(found)

    def marked_values(self, text: str) -> list[tuple[int, str]]:
        """Pairs of value and mark: 5 is (5, ""), 5W (5, "W"), 5L (5, "L"), FRI#2 (5, "2"), and
        the last day of the month is 0: L is (0, ""), LW (0, "W"). None for * and ?."""
        found, is_date = [], self.unit == "day"
        for item in text.split(",") if text not in ("*", "?") else ():
            word, mark = item[:-1], item[-1:]
            if is_date and item in ("L", "LW"):
                found.append((0, item[1:]))
            elif word and mark == ("W" if is_date else "L"):
                found.append((self.value(word, item), mark))
            elif not is_date and word[-1:] == "#" and mark in "12345":
                found.append((self.value(word[:-1], item), mark))
            else:
                found += [(value, "") for value in self.values(item)]
        return found

    def say(self, text: str) -> str:
        """The text, or a part of it, in words."""
        if "," in text:
            return " and ".join(self.say(item) for item in text.split(","))
        span, _, step = text.partition("/")
        if step or span == "*":
            many = f"every {_number(step)} {self.unit}s"
            every = many if _number(step) > 1 else f"every {self.unit}"
            return every if span == "*" else f"{every} from {self.say(span)}"
        if "-" in text:
            return " to ".join(self.say(word) for word in text.split("-"))
        word, mark = text[:-1].rstrip("#"), text[-1]
        if "#" in text or (mark in "LW" and self.unit != "month"):
            which = _ORDINALS.get(mark, "working day nearest to")
            return f"the {which} {self.say(word) if word else 'day'}"
        value = self.value(text, text)
        names = self.names or [f"{self.unit} {value}"]
        return names[(value - self.every[0]) % len(names)]


_SECOND = _Field("second", "second", range(60), "0-59")
_MINUTE = _Field("minute", "minute", range(60), "0-59")
_HOUR = _Field("hour", "hour", range(24), "0-23")
_DATE = _Field("day-of-month", "day", range(1, 32), "1-31, L, LW, 15W, or ? alone")
_MONTH = _Field("month", "month", range(1, 13), "1-12, JAN-DEC", _MONTHS)
_WEEKDAY = _Field("day-of-week", "weekday", range(7), "0-7, SUN-SAT, 5L, FRI#2, or ? alone", _DAYS)


def _cron_fields(text: str) -> list[str]:
    """The five or six fields in capitals, macros replaced."""
    # As bytes: no other letter gets ASCII.
    macro = text.strip(" \t\r\n").encode().upper().decode()
    if macro.startswith("@") and macro not in _MACROS:
        raise ValueError(
            f"no such macro; allowed: {', '.join(_MACROS).lower()}; @reboot has no time, and "
            "instead of @every 5m use repeat=timedelta(minutes=5)"
        )
    parts = [part for part in _MACROS.get(macro, macro).replace("\t", " ").split(" ") if part]
    if len(parts) not in (5, 6):
        why = " (a fixed interval is repeat=timedelta(minutes=5))" if len(parts) < 5 else ""
        why = " (a year field is not supported)" if len(parts) == 7 else why
        allowed = "[second] minute hour day-of-month month day-of-week"
        raise ValueError(f"{len(parts)} field{'s' * (len(parts) != 1)}{why}; allowed: {allowed}")
    return parts


def _slip(text: str) -> str:
    """What is wrong with the whole of a wrong cron text, if it is one of the usual slips."""
    import re  # Only if something is wrong.

    names = "|".join(name[:3] for name in _DAYS + _MONTHS)
    field = rf"(?:[\d*?,/LWHR()~-]|#\d|{names})+"
    line = rf"{field}(?:\s+{field}){{4,}}|{'|'.join(_MACROS)}"
    found = re.fullmatch(rf"(?:\w*=(\S+)\s+)?({line})(?:\s+(.*))?", text.strip(), re.I | re.S)
    if len(text.strip().splitlines()) > 1:
        return "it has several lines; give one"
    if not found:
        return ""
    fields, more = found[2].split(), found[1] or found[3]
    if not more:
        if len(fields) > 5 and any(word[0] in ",-" or word[-1] in ",-" for word in fields):
            return "lists and ranges have no blanks in them; write MON,FRI and 1-5"
        is_year = len(fields) == 6 and _number(fields[5]) > 99
        return "a year field is not supported" if is_year else ""
    if more[:3].title() in [name[:3] for name in _DAYS]:
        return ""  # A sixth field, "monday".
    cure = f"give only the fields, {' '.join(fields)!r}"
    if len(more.split()) == 1 and more[0] not in "/.~#":
        call = f"Cron({' '.join(fields)!r}, tz={more!r})"
        cure = f"a time zone is given by tz, {call}, a command not at all"
    return f"{' '.join(more.split())!r} is no part of it; {cure}"


@lru_cache(maxsize=1024)
def _month_kind(year: int, month: int) -> tuple[int, int]:
    """The weekday of a month's first day (0: Sunday), and its length."""
    leap = month == 2 and year % (400 if year % 100 == 0 else 4) == 0
    return date(year, month, 1).isoweekday() % 7, _MONTH_LENGTHS[month - 1] + leap


@lru_cache(maxsize=1024)  # next() asks twice, and mostly about the same few days.
def _clock_change(zone: tzinfo, day: int) -> tuple[datetime, datetime] | None:
    """How the zone's clock is changed on a day (ordinal): the time at which, and that to which
    it is put. None if it is not changed."""
    start = datetime.fromordinal(day).replace(tzinfo=zone)
    end = start.replace(hour=23, minute=59, second=59, fold=1)
    before, after = start.utcoffset() or timedelta(), end.utcoffset() or timedelta()
    if before == after:
        return None
    # From an instant before the change on, by halving: zones put their clocks at any time.
    instant = start.replace(tzinfo=timezone.utc) - max(before, after)
    for power in range(17, -1, -1):
        probe = instant + timedelta(seconds=2**power)
        instant = probe if probe.astimezone(zone).utcoffset() == before else instant
    new = (instant + timedelta(seconds=1)).astimezone(zone)
    return new - (after - before), new


class _Times:
    """The times that a cron text means, on a clock that is never changed."""

    def __init__(self, text: str) -> None:
        try:
            self.fields = _cron_fields(text)
            *second, minute, hour, day, month, weekday = self.fields
            self.seconds = _SECOND.values(second[0]) if second else (0,)
            self.minutes, self.hours = _MINUTE.values(minute), _HOUR.values(hour)
            self.months = _MONTH.values(month)
            self._dates, self._weekdays = _DATE.marked_values(day), _WEEKDAY.marked_values(weekday)
            # As in Debian: */2 counts as a star, 1-31 does not.
            self._needs_both = day[0] in "*?" or weekday[0] in "*?"
            self._known_days: dict[tuple[int, int], Sequence[int]] = {}
            months = itertools.product(range(2000, 2028), self.months)  # They have all calendars.
            if not any(self._days(year, month) for year, month in months):
                raise ValueError("never fires, no date matches")
        except ValueError as error:
            raise ValueError(f"cron text {text!r}: {_slip(text) or error}") from None

    def _days(self, year: int, month: int) -> Sequence[int]:
        """The matching days of a month, sorted."""
        kind = _month_kind(year, month)
        days = self._known_days.get(kind)
        if days is None:
            days = self._known_days[kind] = self._days_of_kind(*kind)
        return days

    def _days_of_kind(self, first: int, length: int) -> Sequence[int]:
        every, dates, weekdays = range(1, length + 1), set[int](), set[int]()
        for number, mark in self._dates:
            day = number or length
            if mark:
                working = [at for at in every if 0 < (first + at - 1) % 7 < 6]
                day = min(working, key=lambda at: abs(at - day))
            if number <= length:
                dates.add(day)
        for weekday, mark in self._weekdays:
            same = every[(weekday - first) % 7 :: 7]
            weekdays.update(same["L12345".index(mark) - 1 :][:1] if mark else same)
        if self._dates and self._weekdays:
            return sorted(dates & weekdays if self._needs_both else dates | weekdays)
        return sorted(dates or weekdays) if self._dates or self._weekdays else every

    def following(self, moment: datetime) -> datetime:
        """The first of these times after *moment*, in its zone."""
        hours, minutes, seconds, months = self.hours, self.minutes, self.seconds, self.months
        year, month, day = moment.year, moment.month, moment.day
        hour, minute, second = moment.hour, moment.minute, moment.second
        days = self._days(year, month) if month in months else ()
        today = day in days
        if today and hour in hours and minute in minutes and second < seconds[-1]:
            second = seconds[bisect_right(seconds, second)]
        elif today and hour in hours and minute < minutes[-1]:
            minute, second = minutes[bisect_right(minutes, minute)], seconds[0]
        elif today and hour < hours[-1]:
            hour, minute, second = hours[bisect_right(hours, hour)], minutes[0], seconds[0]
        else:
            hour, minute, second = hours[0], minutes[0], seconds[0]
            days = days[bisect_right(days, day) :]
            place = year * len(months) + bisect_right(months, month)
            while not days:
                year, month = place // len(months), months[place % len(months)]
                days = self._days(year, month)
                place += 1
            day = days[0]
        return datetime(year, month, day, hour, minute, second, tzinfo=moment.tzinfo)


_times = lru_cache(maxsize=1024)(_Times)  # A text is often read more than once.


class Cron:
    """A schedule in cron's notation: `Cron("0 9 * * 1-5", "Europe/Paris").next()`.

    *text* is minute, hour, day-of-month, month and day-of-week; or six fields, the second
    first; or @yearly @annually @monthly @weekly @daily @midnight @hourly. *tz* is the zone
    of its clock. Raises ValueError if the text is wrong or never matches (30 February), or
    the zone is unknown; TypeError if they are not str.

    Rules of crontab(5) and cron(8), Vixie's as in Debian; L, W, # and ? as in Quartz, but 0
    and 7 are Sunday. Ranges wrap around (22-4). `5/15` is `5-59/15`. If a day field begins
    with * or is ?, a day must match both, otherwise one is enough: `0 0 13 * 5` is each 13th
    and each Friday. If hour, minute or a written second begins with *, the job runs when the
    clock shows a matching time: not in a skipped hour, twice in a repeated one. Others run
    once for each matching time: a skipped one right after the clock change, a repeated one
    at first.
    """

    def __init__(self, text: str, tz: str = "UTC") -> None:
        if not isinstance(text, str) or not isinstance(tz, str):
            raise TypeError(f"text and tz of a Cron must be str, not {text!r} and {tz!r}")
        self._text, self.tz = text, tz
        self._zone: tzinfo = timezone.utc
        if tz != "UTC":  # That needs no time zone data, which Windows has not.
            from zoneinfo import ZoneInfo  # Slow to import.

            try:
                self._zone = ZoneInfo(tz)
            except (LookupError, ValueError, OSError):  # OSError: a folder, as "America".
                raise ValueError(
                    f"tz {tz!r} is unknown; allowed: names such as 'Europe/Paris' "
                    "(if none works, `pip install tzdata`)"
                ) from None
        self._times = _times(text)
        self._key = (*self._times.fields, tz)  # What makes two of them equal.
        self._is_interval = "*" in [field[0] for field in self._times.fields[:-3]]

    def _after(self, moment: datetime) -> datetime:
        """The first run after *moment*; both are in the zone, and so compare as clock times."""
        found, zone = self._times.following(moment), self._zone
        if self.tz == "UTC":
            return found
        change, fold = _clock_change(zone, moment.toordinal()), moment.fold
        tick = timedelta(seconds=1)
        if change and change[1] <= moment < change[0]:  # The clock shows this time twice.
            if found >= change[0] and self._is_interval and not fold:
                found, fold = self._times.following(change[1] - tick), 1
            if found < change[0] and (self._is_interval or not fold):
                return found.replace(fold=fold)
            found = self._times.following(change[0] - tick)
        while change := _clock_change(zone, found.toordinal()):
            skipped, resumed = change
            if not skipped <= found < resumed:
                return found
            if not self._is_interval:
                return resumed
            found = self._times.following(resumed - tick)
        return found

    def next(self, after: datetime | None = None) -> datetime:
        """The first run later than *after* (aware; None: now), in zone tz; ValueError if none."""
        after = datetime.now(timezone.utc) if after is None else after
        if not isinstance(after, datetime):
            raise TypeError(f"after must be a datetime, not {after!r}")
        if after.utcoffset() is None:
            raise ValueError(f"after must be aware (have a tzinfo), {after!r} is not")
        try:  # By way of UTC: *after* may be a time that the zone's clock skips.
            return self._after(after.astimezone(timezone.utc).astimezone(self._zone))
        except (ValueError, OverflowError):  # datetime has no year 10000.
            raise ValueError(f"{self!r} has no run after {after}, up to the year 9999") from None

    def __iter__(self) -> Iterator[datetime]:
        """The runs from now on, one after the other."""
        moment = None
        while True:
            moment = self.next(moment)
            yield moment

    def explain(self) -> str:
        """The schedule in words, with what becomes of it when the zone's clock is changed."""
        *clock, day, month, weekday = self._times.fields
        every = itertools.product(self._times.hours, self._times.minutes, self._times.seconds)
        times = [":".join(f"{number:02}" for number in time[: len(clock)]) for time in every]
        when = " and ".join(times)
        if self._is_interval or len(times) > 4:
            fields = zip((_SECOND, _MINUTE, _HOUR)[-len(clock) :], clock)
            when = " of ".join(field.say(part) for field, part in fields)
        when = when.replace("s of every hour", "s") if when.startswith("every") else f"at {when}"
        days = (" if it is " if "*" in day[0] + weekday[0] else " or ").join(
            field.say(part)
            for field, part in ((_DATE, day), (_WEEKDAY, weekday))
            if part not in ("*", "?")
        )
        parts = when, days, "" if month == "*" else _MONTH.say(month), self.tz
        rule = "has no run, a repeated one two" if self._is_interval else "runs right after it"
        change = "" if self.tz == "UTC" else f"; a time skipped by the clock change {rule}"
        return ", ".join(filter(None, parts)) + change

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cron) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Cron({self._text!r}, {self.tz!r})"


# --- Tasks ---------------------------------------------------------------------------
# The values that travel, and what may be in them. Nothing here does I/O.

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_FIRST_DATE = datetime.min.replace(tzinfo=timezone.utc)
_LAST_DATE = datetime.max.replace(tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)
_MOST_SECONDS = sys.float_info.max


class Bond(NamedTuple):
    """That a task is not to start before another one has ended."""

    parent: str  # The id of the predecessor, ...
    child: str  # ... and of its follower.
    anyway: bool = False  # `after_end`: however it ends. `after`: by success.
    known: bool = True  # False: given by its id alone, so that one of that id must be there.


class Row(NamedTuple):
    """One task as stores keep it: the columns of the SQLite table, in order."""

    id: str
    task_type: str
    data: Any  # JSON text, made once in add_task; of a MemoryRow its pickle, as bytes.
    priority: int
    created_at: int  # Microseconds since 1970, like all instants here.
    due_at: int  # The due date. Retries do not move it.
    ready_at: int  # Earliest start or retry; while running, when it was claimed.
    retries: int
    retry_delay: float  # Seconds, like the next two.
    timeout: float | None
    keep_result: float | None
    lane: str  # "" = for any cluster, else the owner that submitted it.
    state: str  # scheduled, ready, held (all `waiting` outside), running, failed, done.
    expires: float | None = None  # Seconds after due_at within which it is to be started.
    attempt: int = 0  # Charged starts.
    claim: int = 0  # The fencing token: grows with every claim, never reset.
    owner: str = ""  # Who holds the claim, while running.
    interrupted: int = 0  # Claims that ended with their master, since a run ended.
    result: str | None = None  # JSON text, with keep_result or repeat.
    error: str | None = None
    started_at: int | None = None  # Of the last run that ended, like the next one.
    ended_at: int | None = None  # None, too, if that run said "not now".
    kept_until: int | None = None  # When a `done` row is removed.
    removed: int = 0  # During the run, 1: remove() was called. 2: cancel() was.
    successor: Any = None  # What replaces it when its run ends: see _packed_row.
    # JSON text: microseconds, perhaps in a list with one of their slots; or Cron's arguments.
    repeat: str | None = None
    progress: str | None = None  # JSON of a Progress: the last report of its run.
    items: int = 0  # Of a chunk of Cluster.map: how many are in its data. Not a column.
    after: tuple[Bond, ...] = ()  # Given to write(): the bonds that it is to have. No column.


_COLUMNS = Row._fields[:-2]


class MemoryRow(Row):
    """A task in this process's memory. Only its data are ever unpickled: a store makes Rows,
    whatever it holds, and _make_row alone makes a MemoryRow. (P8)"""

    __slots__ = ()


def _packed_row(row: Row) -> str | MemoryRow:
    """A Row as its predecessor keeps it: in a store as text. By name, so that a later version
    with more columns can read it."""
    return row if isinstance(row, MemoryRow) else json.dumps(dict(zip(_COLUMNS, row)))


def _unpacked_row(packed: str | MemoryRow) -> Row:
    if isinstance(packed, MemoryRow):
        return packed
    try:
        return Row(**json.loads(packed))._replace(items=0, after=())
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _loaded(packed: bytes | bytearray) -> tuple[Any, BaseException | None]:
    """What *packed* unpickles to, and the error that unpickling raised. Only the user's Ctrl-C,
    which comes to the main thread, is raised here."""
    try:
        return pickle.loads(packed), None
    except BaseException as error:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and isinstance(error, KeyboardInterrupt):
            raise
        return None, error


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_no_number)
_raw_decode = _decoder.raw_decode


def _decode(text: str) -> Any:
    """As json.loads, in a third of its time for the short texts that we wrote.

    Raises ValueError for whatever is not JSON, also for NaN and for what is nested too deep.
    """
    try:
        value, end = _raw_decode(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError:
        end = -1
    return value if end == len(text) else _decoder.decode(text)


def _message(error: BaseException) -> str:
    """What *error* says, even if its own methods raise."""
    try:
        return str(error)
    except BaseException as other:
        return f"<its __str__ raised {type(other).__name__}>"


def _read_data(row: Row) -> Any:
    """The value of a task's data; unpickling runs code of the user's classes. Raises
    ValueError if it cannot be read."""
    if isinstance(row, MemoryRow):
        value, error = _loaded(row.data)
        if error is None:
            return value
        why = f"{type(error).__name__}: {_message(error)}"
        raise ValueError(f"data cannot be unpickled: {why}") from error
    try:
        return _decode(row.data)
    except (TypeError, ValueError) as wrong:  # TypeError: it is no text.
        raise ValueError(f"the stored data cannot be decoded: {wrong}") from None


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _counted(count: int, one: str, many: str = "") -> str:
    """`1 task`, `2 tasks`: a number, and what is counted in that form of it."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _shown(value: Any) -> str:
    try:
        return _short(repr(value))
    except BaseException:
        return f"<{type(value).__name__}>"


def _nearest(name: str, names: Iterable[str]) -> str:
    """A hint at the name that is meant, or ""."""
    import difflib

    found = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _wrong_type(name: str, value: Any, allowed: str) -> TypeError:
    return TypeError(f"{name} is {_shown(value)} ({type(value).__name__}); give {allowed}")


def _wrong_value(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{name} is {_shown(value)}; give {allowed}")


def _wrong(name: str, value: Any, allowed: str, *kinds: type) -> Exception:
    """A ValueError if the value has one of these types, else a TypeError."""
    return (_wrong_value if type(value) in kinds else _wrong_type)(name, value, allowed)


def _checked_int(name: str, value: Any, low: int) -> int:
    if type(value) is not int or not low <= value <= MAX_INT:
        raise _wrong(name, value, f"an int from {low} to {MAX_INT}", int)
    return value


def _checked_bool(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise _wrong_type(name, value, "True or False")
    return value


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _checked_text(name: str, value: Any) -> str:
    """A str that every store keeps unchanged: not empty, no NUL, no lone surrogate."""
    if type(value) is str and 0 < len(value) <= 10_000 and "\0" not in value:
        if value.isascii() or _is_unicode(value):
            return value
    allowed = "a non-empty str of at most 10,000 characters, without NUL or lone surrogates"
    raise _wrong(name, value, allowed, str)


def _checked_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if type(value) is not str or value not in choices:
        raise _wrong(name, value, "one of " + ", ".join(map(repr, choices)), str)
    return value


def _checked_seconds(name: str, value: Any, zero: bool = False, also: str = "") -> float:
    """Seconds as a float, from a number or a timedelta; 0 only if *zero*. *also* is what else
    the error names as allowed."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if type(seconds) in (int, float):
        if 0 < seconds <= _MOST_SECONDS or (zero and seconds == 0):  # Neither is NaN.
            return float(seconds)
    allowed = "a finite number of seconds or a timedelta, " + ("0 or more" if zero else "over 0")
    raise _wrong(name, value, allowed + also, int, float, timedelta)


def _checked_milliseconds(name: str, value: Any) -> float:
    """Milliseconds (an int or a timedelta) as seconds."""
    if isinstance(value, timedelta) and value >= timedelta(milliseconds=1):
        return value.total_seconds()
    if type(value) is int and 0 < value <= MAX_INT:
        return value / 1000
    allowed = "a whole number of milliseconds, 1 or more, or a timedelta of at least 1 ms"
    raise _wrong(name, value, allowed, int, timedelta)


_AS_IS: Any = object()  # Stands for a parameter that was not given.


def _checked_limits(at_once: Any, rate: Any) -> dict[str, Any]:
    """The columns of a Setting that these parameters of limit() change."""
    columns: dict[str, Any] = {}
    if at_once is not _AS_IS:
        columns["at_once"] = None if at_once is None else _checked_int("at_once", at_once, 1)
    if rate is None:
        columns.update(starts=None, period=None)
    elif rate is not _AS_IS:
        if not isinstance(rate, (tuple, list)) or len(rate) != 2:
            raise _wrong_type("rate", rate, "None or (starts, seconds)")
        columns["starts"] = _checked_int("rate[0]", rate[0], 1)
        period = _checked_seconds("rate[1]", rate[1]) * 1e6
        columns["period"] = int(max(1, min(period, MAX_INT)))
    return columns


def _datetime(instant: int) -> datetime:
    return _EPOCH + instant * _MICROSECOND


def _aware(date: datetime) -> datetime:
    """The datetime with a zone: this machine's, if it has none."""
    if date.utcoffset() is not None:
        return date
    try:
        # astimezone() of Python before 3.12 is an hour early where the clock skips one.
        seconds = date.replace(microsecond=0).timestamp()
        return _EPOCH + timedelta(seconds=seconds, microseconds=date.microsecond)
    except (OverflowError, ValueError, OSError):
        # On the last day of the year 9999, and on Windows far from today: as if it were now.
        return date.replace(tzinfo=date.replace(year=2036).astimezone().tzinfo)


def _instant(due_date: Any, now: int, name: str = "due_date") -> int:
    """Microseconds since 1970 of a due date; naive datetimes are local time."""
    allowed = "a datetime (naive = local time), a timedelta from now, or None"
    if not isinstance(due_date, (datetime, timedelta)):
        raise _wrong_type(name, due_date, allowed)
    try:
        if isinstance(due_date, timedelta):
            instant = now + due_date // _MICROSECOND
        else:
            instant = (_aware(due_date) - _EPOCH) // _MICROSECOND
        _datetime(instant)  # In UTC it may be a year that datetime has not.
    except (OverflowError, ValueError) as error:
        raise _wrong_value(name, due_date, allowed + f" ({error})") from None
    return instant


def _checked_expires(expires: Any, due_at: int, now: int) -> float:
    """Seconds after the due date; less than 0 for a datetime before that."""
    if isinstance(expires, datetime):
        return (_instant(expires, now, "expires") - due_at) / 1e6
    return _checked_seconds("expires", expires, also=", after the due date; or a datetime")


def _checked_repeat(repeat: Any) -> timedelta | Cron:
    if type(repeat) is str:
        try:
            return Cron(repeat)
        except ValueError as error:
            raise ValueError(f"repeat: {error}") from None
    if isinstance(repeat, Cron) or (isinstance(repeat, timedelta) and repeat > timedelta()):
        return repeat
    raise _wrong("repeat", repeat, "a timedelta over 0, a cron text, or a Cron", timedelta)


@lru_cache(maxsize=1024)
def _read_repeat(text: str) -> timedelta | Cron:
    """Task.repeat from its column. Raises ValueError if that cannot be read (here)."""
    value = _decode(text)
    if type(value) is list and [type(word) for word in value] == [str, str]:
        return Cron(*value)
    if type(value) is list and len(value) == 2 and type(value[1]) is int:
        value = value[0]
    if type(value) is int and 0 < value <= timedelta.max // _MICROSECOND:
        return value * _MICROSECOND
    raise ValueError(f"{text!r} is neither microseconds nor a cron text and a zone")


class Progress(NamedTuple):
    """What a task reported last, by `job.progress(done, total, note)`."""

    done: float
    total: float | None = None
    note: str | None = None

    def __call__(self, *_: object, **__: object) -> None:
        raise RuntimeError("progress can be reported by the running task only, with its `job`")


def _checked_progress(done: Any, total: Any = None, note: Any = None) -> Progress:
    for name, value in (("done", done), ("total", 0 if total is None else total)):
        if type(value) not in (int, float) or not 0 <= value <= MAX_INT:  # Neither is NaN.
            raise _wrong(name, value, "a number of 0 or more", int, float)
    if note is not None:
        _checked_text("note", note)
    return Progress(done, total, note)


def _read_progress(text: str) -> Progress:
    """Task.progress from its column, or ValueError."""
    try:
        return _checked_progress(*_decode(text))
    except TypeError as error:
        raise ValueError(f"it is not [done, total, note]: {error}") from None


_WAITING = ("scheduled", "ready", "held")


def _public_state(state: str) -> str:
    return "waiting" if state in _WAITING else state


def _column(name: str, what: str, read: Callable[[Any], Any] | None = None) -> Any:
    """A documented attribute of Task: that column of its Row, as *read* makes it."""
    column = operator.attrgetter(f"_row.{name}")
    if read is None:
        return property(column, doc=what)
    return property(lambda task: None if (v := column(task)) is None else read(v), doc=what)


_UNREAD: Any = object()  # Data that nobody has read so far.
_set = object.__setattr__


class Task:
    """One task, as it was when you looked. Immutable.

    Returned by add_task and find, and passed to your functions as `job`.
    """

    __slots__ = ("_data", "_report", "_row")
    _row: Row
    _data: Any
    _report: Callable[..., None]  # Only of the `job` of a running task.
    id: Final[str] = _column("id", "The task's id, unique in its store.")
    task_type: Final[str] = _column("task_type", "The key of the cluster's task map.")
    priority: Final[int] = _column("priority", "Higher starts first.")
    due_date: Final[datetime] = _column("due_at", "The earliest start, aware, in UTC.", _datetime)
    created_at: Final[datetime] = _column("created_at", "When it was added, in UTC.", _datetime)
    state: Final[State] = _column("state", "waiting, running, failed or done.", _public_state)
    on_going: Final[bool] = _column("state", "Whether it is running.", "running".__eq__)
    held: Final[bool] = _column(
        "state", "Whether it waits for the end of others: see `after` in add_task.", "held".__eq__
    )
    attempt: Final[int] = _column("attempt", "Number of charged starts: 1 during the first run.")
    retries: Final[int] = _column("retries", "Further starts that a failure may have.")
    retry_delay: Final[float] = _column(
        "retry_delay", "Seconds before the first retry; each further one waits twice as long."
    )
    timeout: Final[float | None] = _column("timeout", "Seconds after which a run is killed.")
    expires: Final[float | None] = _column(
        "expires", "Seconds after its due date: it is not started later. None: however late."
    )
    repeat: Final[timedelta | Cron | None] = _column(
        "repeat", "How it repeats: an interval, a Cron, or None for not at all.", _read_repeat
    )
    result: Final[Any] = _column(
        "result", "The JSON result of its last run, with keep_result or repeat.", _decode
    )
    error: Final[str | None] = _column(
        "error", "The failure of its last run: type, message and traceback as text."
    )

    def __init__(
        self, row: Row, report: Callable[..., None] | None = None, data: Any = _UNREAD
    ) -> None:
        _set(self, "_row", row)
        if report is not None:
            _set(self, "_report", report)
        if data is not _UNREAD:
            _set(self, "_data", data)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Task is immutable; cannot set {name!r} (see TaskQueue.update)")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Task) and self._row == other._row

    def __hash__(self) -> int:
        return hash(self._row)

    def __reduce__(self) -> Any:
        return Task, (self._row,)

    def __repr__(self) -> str:
        return f"<Task {self.id!r} {self.task_type!r} {self.state}, attempt {self.attempt}>"

    @property
    def started_at(self) -> datetime | None:
        """When its last run began, in UTC; None before the first, and where it failed without
        one. While it runs: when it was claimed for that. A run that goes back to waiting
        uncounted leaves no trace here."""
        row = self._row
        instant = row.ready_at if row.state == "running" else row.started_at
        return None if instant is None else _datetime(instant)

    @property
    def ended_at(self) -> datetime | None:
        """When the end of its last run was recorded, or that it failed without one, in UTC;
        None before the first, while it runs, and after a run that said "not now"."""
        instant = None if self.on_going else self._row.ended_at
        return None if instant is None else _datetime(instant)

    @property
    def in_memory(self) -> bool:
        """Whether it lives in the master's memory only."""
        return isinstance(self._row, MemoryRow)

    @property
    def data(self) -> Any:
        """The value given to add_task; this Task's own copy. That of an in-memory task is
        unpickled at the first look, which runs code of its classes. Raises ValueError if it
        cannot be read."""
        if not hasattr(self, "_data"):
            _set(self, "_data", _read_data(self._row))
        return self._data

    @property
    def progress(self) -> Any:
        """In the running task a function: `job.progress(done, total=None, note=None)` reports
        how far it is. Elsewhere the last report, a Progress, or None if there was none."""
        try:
            return self._report
        except AttributeError:
            return self._row.progress and _read_progress(self._row.progress)


class _Item(Task):
    """What the function of a chunk gets for one of the data: the chunk's Task, but for these."""

    __slots__ = ("data",)
    data: Any

    def __init__(self, row: Row, data: Any) -> None:
        super().__init__(row)
        _set_data(self, data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Item) and (self._row, self.data) == (other._row, other.data)

    __hash__ = Task.__hash__

    def __reduce__(self) -> Any:
        return _Item, (self._row, self.data)


_new_item = _Item.__new__
_set_row, _set_report = (vars(Task)[name].__set__ for name in ("_row", "_report"))
_set_data = vars(_Item)["data"].__set__


def _job(row: Row, report: Callable[..., None]) -> Task:
    """The Task that a function gets. Raises ValueError, and no retry helps, if its data cannot
    be read."""
    return Task(row, report, _read_data(row))


_nonce = os.urandom(8).hex()  # Of this process; a fork draws another.
_id_numbers = itertools.count()


def _new_id(now: int) -> str:
    """A fresh id; ids grow with time, which keeps an index on them compact."""
    # Nothing random here: a system call lets go of the GIL, which costs more than all
    # the rest of submit() while the dispatcher is busy.
    return "%014x%s%x" % (now, _nonce, next(_id_numbers))  # noqa: UP031 - Faster.


_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
).encode


class _Chunk(list[Any]):
    """The data of several calls, in one in-memory task: see Cluster.map."""


def _check_json(value: Any, path: str = "data", depth: int = 0) -> None:
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
    elif kind is dict or kind is list or kind is _Chunk:
        if depth >= MAX_DEPTH:
            raise ValueError(f"{_short(path)} is nested too deep; give at most {MAX_DEPTH} levels")
        if kind is dict:
            for key, item in value.items():
                if type(key) is not str or not (key.isascii() or _is_unicode(key)) or "\0" in key:
                    allowed = "str keys, as in JSON, without NUL or lone surrogates"
                    raise _wrong(f"a key of {path}", key, allowed, str)
                _check_json(item, f'{path}["{key}"]', depth + 1)
        elif set(map(type, value)) != {int} or min(value) < -MAX_INT or max(value) > MAX_INT:
            for index, item in enumerate(value):  # Long lists of numbers are spared this.
                _check_json(item, f"{path}[{index}]", depth + 1)
    elif value is not None and kind is not bool:
        allowed = "JSON values: dict with str keys, list, str, int, float, bool, None"
        raise _wrong_type(path, value, allowed)


_NO_DATA: dict[str, Any] = {}


def _checked_json(value: Any) -> str:
    """JSON text of *value*, which will come back equal and of the same types."""
    if value is None or value is _NO_DATA:
        return "null" if value is None else "{}"
    _check_json(value)
    return str(value) if type(value) is int else _encode(value)


_PICKLED_NO_DATA, _PICKLED_NONE = pickle.dumps({}), pickle.dumps(None)  # Shared: most common.


def _pickled_data(value: Any) -> bytes:
    """The data of an in-memory task, or a TypeError."""
    if value is None or value is _NO_DATA:
        return _PICKLED_NONE if value is None else _PICKLED_NO_DATA
    is_chunk = type(value) is _Chunk
    try:
        return pickle.dumps(list(value) if is_chunk else value, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        for one in value if is_chunk else ():  # Name the item that is wrong.
            _pickled_data(one)
        why = f"pickling it raised {type(error).__name__}: {_message(error)}"
        raise _wrong_type("data", value, f"what can be pickled; {why}") from error


def _checked_id(name: str, value: Any, in_memory: bool | None) -> str:
    """The id of a task, given by itself or by a Task that lives there (None: anywhere)."""
    if not isinstance(value, Task):
        if type(value) is not str:
            raise _wrong_type(name, value, "a Task, an id, or a list of them where many may be")
        return _checked_text(name, value)
    if in_memory not in (None, value.in_memory):
        where = "in memory" if in_memory else "stored"
        raise _wrong_value(name, value, f"tasks that are {where}, as all of this call are")
    return value.id


def _bonds(child: str, in_memory: bool, after: Any, after_end: Any) -> tuple[Bond, ...]:
    """The arguments `after` and `after_end` of the task *child*, or the error."""
    bonds: dict[str, Bond] = {}
    for name, given in ("after_end", after_end), ("after", after):
        items = given if isinstance(given, (list, tuple, set, frozenset)) else [given]
        for item in items if given is not None else ():
            parent = _checked_id(name, item, in_memory)
            if parent == child:
                raise _wrong_value(name, item, "other tasks; a task cannot follow itself")
            bonds[parent] = Bond(parent, child, name == "after_end", isinstance(item, Task))
    return tuple(bonds.values())


_FRESH = tuple(Row._field_defaults.values())[1:-4]  # Of a task without a history.
_IF_EXISTS = ("raise", "keep", "replace", "follow")
SCHEDULE = "schedule:"  # The ids of what queue.task keeps stored begin with this.


def _make_row(
    now: int, task_type: Any, data: Any = _NO_DATA, *, priority: Any = 1, task_id: Any = None,
    due_date: Any = None, in_memory: Any = False, repeat: Any = None, retries: Any = 0,
    retry_delay: Any = 1.0, timeout: Any = None, keep_result: Any = None, expires: Any = None,
    if_exists: Any = "raise", connection: Any = None, after: Any = None, after_end: Any = None,
    lane: str = "",
) -> tuple[Row, str]:  # fmt: skip
    """The new Row and its `if_exists`, or the error that add_task documents."""
    _checked_text("task_type", task_type)
    items = len(data) if type(data) is _Chunk else 0
    _checked_bool("in_memory", in_memory)
    data = (_pickled_data if in_memory else _checked_json)(data)
    _checked_int("priority", priority, -MAX_INT)
    if if_exists not in _IF_EXISTS:
        _checked_choice("if_exists", if_exists, _IF_EXISTS)
    _checked_int("retries", retries, 0)
    if retry_delay != 1.0 or type(retry_delay) is not float:
        retry_delay = _checked_seconds("retry_delay", retry_delay, zero=True)
    if task_id is None:
        task_id = f"inMemory_{_new_id(now)}" if in_memory else _new_id(now)
    elif _checked_text("task_id", task_id).startswith(SCHEDULE):
        allowed = f"another: ids that begin with {SCHEDULE} are those of declared schedules"
        raise _wrong_value("task_id", task_id, allowed)
    if timeout is not None:
        timeout = _checked_seconds("timeout", timeout)
    if keep_result is not None:
        keep_result = _checked_seconds("keep_result", keep_result, zero=True)
    if connection is not None and not isinstance(connection, sqlite3.Connection):
        allowed = (
            "a sqlite3.Connection to the queue's file (Django: connection.connection; "
            "SQLAlchemy: connection.connection.driver_connection)"
        )
        raise _wrong_type("connection", connection, allowed)
    follows: tuple[Bond, ...] = ()
    if after is not None or after_end is not None:
        follows = _bonds(task_id, in_memory, after, after_end)
    if repeat is not None:
        rule = _checked_repeat(repeat)
        if follows:
            raise _wrong_value("repeat", repeat, "None: a schedule follows no other task")
        if isinstance(rule, timedelta):
            repeat = str(rule // _MICROSECOND)
        else:
            repeat = json.dumps([str(rule), rule.tz])
            due_date = rule.next(_datetime(now)) if due_date is None else due_date
    due_at = now if due_date is None else _instant(due_date, now)
    if expires is not None:
        expires = _checked_expires(expires, due_at, now)
    state = "ready" if due_at <= now else "scheduled"
    columns = (
        task_id, task_type, data, priority, now, due_at, due_at, retries, retry_delay,
        timeout, keep_result, lane, state, expires, *_FRESH, repeat, None, items, follows,
    )  # fmt: skip
    # In two thirds of the time of Row().
    return tuple.__new__(MemoryRow if in_memory else Row, columns), if_exists


if typing.TYPE_CHECKING:  # Never run. Type checkers bring it along, for each Python from 3.9 on.
    from typing_extensions import Unpack
else:
    Unpack = getattr(typing, "Unpack", typing.Union)  # For those who look at annotations.

State = Literal["waiting", "running", "failed", "done"]
IfExists = Literal["raise", "keep", "replace", "follow"]
Predecessors = Union[Task, str, Collection[Union[Task, str]], None]


class _Attempts(typing.TypedDict, total=False):
    priority: int
    retries: int
    retry_delay: float | timedelta
    keep_result: float | timedelta | None


class MapOptions(_Attempts, total=False):
    """The keywords of Cluster.map, beside its own."""

    in_memory: bool


class TaskDefaults(MapOptions, total=False):
    """What queue.task may declare for all tasks of a type."""

    timeout: float | timedelta | None
    expires: float | timedelta | None


class _Plans(_Attempts, total=False):
    timeout: float | timedelta | None
    expires: float | timedelta | datetime | None
    due_date: datetime | timedelta | None
    repeat: timedelta | str | Cron | None
    after: Predecessors
    after_end: Predecessors


class SubmitOptions(_Plans, MapOptions, total=False):
    """The keywords of Cluster.submit."""

    task_id: str | None
    if_exists: IfExists


class TaskOptions(SubmitOptions, total=False):
    """The keywords of TaskQueue.add_task."""

    connection: sqlite3.Connection | None


_ADD_PARAMETERS = TaskOptions.__optional_keys__


class Changes(_Plans, total=False):
    """The keywords of TaskQueue.update."""

    data: Any


class Filters(typing.TypedDict, total=False):
    """The keywords of TaskQueue.find, count, remove and retry."""

    task_id: Predecessors
    task_type: str | TaskFunction | Collection[str | TaskFunction] | None
    state: State | Collection[State] | None
    due: bool | None
    held: bool | None
    after: Predecessors
    before: Predecessors


# --- Stored rows ---------------------------------------------------------------------
# Others can write to a store, too. What is read from it is checked here, once, so that no
# policy meets a value that it cannot work with, and no row is in the way of others.

_YEARS = (_FIRST_DATE - _EPOCH) // _MICROSECOND, (_LAST_DATE - _EPOCH) // _MICROSECOND
_SECONDS = (0, _MOST_SECONDS)
_ANY = (-MAX_INT - 1, MAX_INT)


class _Kind(NamedTuple):
    """What a column may hold."""

    types: tuple[type, ...]
    harmless: Any  # What stands for a value that cannot be read.
    limits: tuple[float, float] | None = None
    read: Callable[[str], Any] | None = None  # Raises ValueError for a wrong text.


_NULL = type(None)
_GROUPS = {
    "id task_type lane owner": _Kind((str,), ""),
    "data": _Kind((str,), "null"),
    "priority": _Kind((int,), 0, _ANY),
    "created_at due_at ready_at": _Kind((int,), 0, _YEARS),
    "retries": _Kind((int,), 0, (0, MAX_INT)),
    "retry_delay": _Kind((float, int), 0.0, _SECONDS),
    "timeout keep_result": _Kind((float, int, _NULL), None, _SECONDS),
    "expires": _Kind((float, int, _NULL), None, (-_MOST_SECONDS, _MOST_SECONDS)),
    "state": _Kind((str,), "failed"),
    "attempt claim interrupted": _Kind((int,), 0, (0, MAX_INT // 2)),  # With room for the next.
    "error successor": _Kind((str, _NULL), None),
    "result": _Kind((str, _NULL), None, None, _decode),
    "repeat": _Kind((str, _NULL), None, None, _read_repeat),
    "progress": _Kind((str, _NULL), None, None, _read_progress),
    "started_at ended_at": _Kind((int, _NULL), None, _YEARS),
    "kept_until": _Kind((int, _NULL), None, _ANY),
    "removed": _Kind((int,), 0, (0, 2)),
}
_KINDS = {n: kind for n in _COLUMNS for names, kind in _GROUPS.items() if n in names.split()}
_LIMITS = [(i, *kind.limits) for i, kind in enumerate(_KINDS.values()) if kind.limits]


def _fault(name: str, value: Any, is_told: bool = True) -> str:
    """What is wrong with the value of a column ("": nothing). The texts that only tell of a
    task are read if *is_told*: no run needs them."""
    kind = _KINDS[name]
    if type(value) not in kind.types:
        return f"column {name} holds {_shown(value)}"
    if value is None or (name in ("result", "progress") and not is_told):
        return ""
    if kind.limits and not kind.limits[0] <= value <= kind.limits[1]:
        return f"column {name} holds {_shown(value)}, which is out of range"
    try:
        if kind.read:
            kind.read(value)
    except ValueError as error:
        return f"column {name}: {error}"
    return ""


@lru_cache(maxsize=1000)
def _are_types(types: tuple[type, ...]) -> bool:
    return all(type_ in kind.types for type_, kind in zip(types, _KINDS.values()))


def _unusable(row: Row) -> str:
    """Why a stored Row cannot be run ("": it can).

    The texts of data, result and progress are left to those who decode them.
    """
    if isinstance(row, MemoryRow):
        return ""  # No other program can have written it.
    if row.repeat is None and row.successor is None and _are_types(tuple(map(type, row))):
        for index, low, high in _LIMITS:
            value: Any = row[index]
            if value is not None and not low <= value <= high:
                break
        else:
            return ""
    faults = (_fault(name, value, False) for name, value in zip(_COLUMNS, row))
    reason = next(filter(None, faults), "")
    if reason or row.successor is None:
        return reason
    try:
        reason = _unusable(_unpacked_row(row.successor))
    except ValueError as error:
        reason = str(error)
    return reason and f"column successor: {reason}"


def readable(row: Row, reason: str = "") -> Row:
    """A stored Row, for those who look at it. Columns that cannot be read get harmless values,
    and `error` is the *reason*; data that are no JSON raise in Task.data."""
    if isinstance(row, MemoryRow):
        return row
    values: list[Any] = list(row)
    for index, (name, value) in enumerate(zip(_COLUMNS, row)):
        fault, harmless = _fault(name, value), _KINDS[name].harmless
        if fault:
            reason = reason or fault
            is_name = isinstance(value, bytes) and harmless == ""
            values[index] = value.decode(errors="replace") if is_name else harmless
    row = Row(*values)
    is_told = row.state == "failed" and row.error
    return row._replace(error=reason) if reason and not is_told else row


# --- Policies ------------------------------------------------------------------------
# Decisions as pure functions: no I/O, no clock. Stores and the master carry them out.


class Outcome(NamedTuple):
    """What became of one claim: the argument of Store.settle."""

    id: str
    claim: int
    state: str  # done, failed, ready (start again at ready_at), removed; running: a report.
    charged: bool = True  # False: the start does not count: requeued, or "not now".
    ready_at: int = 0
    result: str | None = None  # JSON text.
    error: str | None = None
    progress: str | None = None  # JSON of a Progress.
    seconds: float | None = None  # How long the run took. None: it did not come to its end.


class Retry(TaskPoolError):
    """Raised by a task: it is to start again in so many *seconds* (or a timedelta; over 0
    without *counts*), in place of what `retry_delay` says. It uses up one of the `retries`, and
    without one left the task fails. With counts=False this attempt is no failure but "not now":
    it does not count, however often, and no "error" listener is called; `expires` ends it. A
    cluster that ends, or drains, does not wait for that later date.

    Subclasses count. Elsewhere than in a task this is an exception like others. Raises
    TypeError and ValueError for wrong arguments.
    """

    seconds: float | None = None  # Of a subclass that does not call this: by retry_delay.
    counts: bool = True

    def __init__(self, seconds: float | timedelta, counts: bool = True) -> None:
        self.counts = _checked_bool("counts", counts)
        self.seconds = _checked_seconds("seconds", seconds, zero=counts)

    def __reduce__(self) -> Any:  # Whatever arguments a subclass takes.
        new = copyreg.__newobj__  # type: ignore[attr-defined]
        return new, (type(self), *self.args), self.__dict__

    def __str__(self) -> str:
        when = "later" if self.seconds is None else f"in {self.seconds:g} s"
        return f"again {when}" + ("" if self.counts else ", not counted")


class GiveUp(TaskPoolError):
    """Raised by a task: it fails for good, whatever `retries` says. A task that repeats runs
    again at its next slot. Subclasses count. Elsewhere than in a task this is an exception like
    others."""


class Plan(NamedTuple):
    """What is to follow a failed attempt."""

    may_retry: bool = True
    seconds: float | None = None  # Until the retry; None: by its retry_delay.
    counts: bool = True  # False: it was no failure, but "not now".


_ORDINARY = Plan()


_ExceptionGroup: Any = getattr(builtins, "BaseExceptionGroup", ())  # From Python 3.11 on.


def plan_of(error: Any) -> Plan:
    """What the exception of a task asks for. A Retry may have been spoiled by its subclass. A
    group, such as asyncio.TaskGroup raises, asks for what the first GiveUp or Retry in it asks."""
    kind = type(error)
    if issubclass(kind, _ExceptionGroup):
        with contextlib.suppress(BaseException):
            plans = (plan_of(each) for each in error.exceptions)
            return next((plan for plan in plans if plan is not _ORDINARY), _ORDINARY)
    if issubclass(kind, Retry):
        with contextlib.suppress(BaseException):
            asked = Retry(error.seconds, error.counts)  # Checks both once more.
            return Plan(True, asked.seconds, asked.counts)
    return Plan(may_retry=False) if issubclass(kind, GiveUp) else _ORDINARY


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
    """The part of a worker's room that a run of so many seconds fills: all without history.

    >>> share(None), share(1.0), share(0.005)
    (1.0, 1.0, 0.5)
    """
    return 1.0 if expected is None else min(expected / AHEAD_SECONDS, 1.0)


def cost_of(row: Row, costs: Mapping[str, float]) -> float:
    """The part of a worker's room that a task takes, where *costs* has its type's share: a
    chunk takes that of each item. One that was interrupted takes all. (P3, P5)"""
    cost = costs[row.task_type] * (row.items or 1)
    if cost > 1.0 or row.interrupted:
        return 1.0
    return cost if cost > LEAST_SHARE else LEAST_SHARE


def with_slot(repeat: str, due_at: int) -> str:
    """A rule that can be read, and from which on it counts, if it is an interval: from *due_at*,
    unless it tells another slot already."""
    return f"[{repeat}, {due_at}]" if type(_decode(repeat)) is int else repeat


def next_slot(repeat: str, due_at: int, now: int) -> int | None:
    """The first slot of a repeating task after *due_at* and after *now*, or None.

    So one run makes up for all missed slots, and a clock set back runs no slot twice.

    >>> next_slot("10", 100, 100), next_slot("10", 100, 137), next_slot("10", 100, 0)
    (110, 140, 110)
    >>> next_slot(with_slot("10", 100), 73, 74), next_slot(with_slot("10", 100), 137, 137)
    (80, 140)
    """
    try:
        rule = _read_repeat(repeat)
    except ValueError:
        return now  # The next claim() fails the task, and says why.
    try:
        last = max(now, due_at)
        if isinstance(rule, Cron):
            return _instant(rule.next(_datetime(last)), now)
        interval, slot = rule // _MICROSECOND, json.loads(with_slot(repeat, due_at))[1]
        return _instant(_datetime(slot + ((last - slot) // interval + 1) * interval), now)
    except (OverflowError, ValueError):  # There is no year 10000.
        return None


def last_slot(repeat: str, due_at: int) -> int:
    """The slot of a repeating task before *due_at*, which is one.

    >>> last_slot("10", 100), last_slot('["0 0 29 2 *", "UTC"]', 951782400000000)
    (90, 825552000000000)
    """
    rule = _read_repeat(repeat)
    if not isinstance(rule, Cron):
        return due_at - rule // _MICROSECOND
    due, back = _datetime(due_at), timedelta(minutes=1)
    while (last := rule.next(due - back)) >= due:  # A Cron looks forward only.
        back *= 2
    while (following := rule.next(last)) < due:
        last = following
    return _instant(last, due_at)


def after_add(old: Row | None, new: Row, if_exists: str) -> tuple[Row | None, Row]:
    """What add() stores where *old* has the id, and the Row that it returns.

    The first is None if nothing is to be stored. Raises DuplicateTask.
    """
    if old is None:
        return new, new
    last, successor = old.created_at, None  # Id and created_at together name an incarnation.
    if old.successor is not None:
        with contextlib.suppress(ValueError):
            successor = _unpacked_row(old.successor)
            last = max(last, successor.created_at)
    if new.created_at <= last:
        new = new._replace(created_at=last + 1)
    replacing = new._replace(claim=old.claim)  # The fencing token is never reset.
    if old.state in ("failed", "done"):
        return replacing, new
    there = successor if old.removed else old  # A removed task is gone, though it still runs.
    if if_exists == "keep" and there:
        return None, there
    if if_exists == "raise" and (there or old.removed == 1):
        raise DuplicateTask(
            f"task_id {_shown(old.id)} is {_public_state(old.state)}; give another task_id, "
            'or if_exists="keep", "replace" or "follow"'
        )
    if if_exists == "follow" and (successor or old.state != "running"):
        waits = successor or old
        changed = waits._replace(data=new.data, after=(*waits.after, *new.after))
        if changed.task_type != new.task_type:
            kind = f"is of the type {_shown(changed.task_type)}"
            raise DuplicateTask(f"task_id {_shown(old.id)} {kind}; give another task_id")
        return old._replace(successor=_packed_row(changed)) if successor else changed, changed
    if old.state == "running":  # That revokes a remove(), but no cancel().
        return old._replace(successor=_packed_row(new), removed=old.removed & 2), new
    return replacing, new


_READY_AT, _STATE, _ATTEMPT, _CLAIM_NUMBER, _HOLDER = map(
    Row._fields.index, ("ready_at", "state", "attempt", "claim", "owner")
)


def claimed(row: Row, owner: str, now: int) -> Row:
    """waiting -> running, claimed by *owner*: one more claim, one more charged start."""
    # Takes two fifths of the time of _replace, and is done for every task.
    values: list[Any] = list(row)
    values[_READY_AT], values[_STATE], values[_HOLDER] = now, "running", owner
    values[_ATTEMPT] += 1
    values[_CLAIM_NUMBER] += 1
    return tuple.__new__(type(row), values)


class Setting(NamedTuple):
    """What is set for a task type, and how its runs ended: the columns of taskpool_type."""

    paused: int = 0  # 1: no task of the type is claimed.
    at_once: int | None = None  # So many run at once, at most.
    starts: int | None = None  # So many starts, at most, ...
    period: int | None = None  # ... in so many microseconds, evenly spaced.
    next_at: int = 0  # The instant of the next start, where starts and period are set.
    counts: str | None = None  # JSON: see read_counts().


_ENDS = ("failed", "retried", "later", "interrupted", "expired")
_TOOK = (*(f"{bound * 1000:.0f} ms" for bound in BOUNDS), "longer")
# Counts by task type: how many runs ended as each of _ENDS; how many took at most as long as
# each of _TOOK but longer than the one before; the microseconds of all of them ("us"). Runs that
# came to their end, did not fail and are not to start again are done: they have no count.
_Tally = dict[str, "collections.Counter[str]"]


def new_tally() -> _Tally:
    """Counts of no run so far."""
    return collections.defaultdict(collections.Counter)


def read_counts(text: Any) -> collections.Counter[str]:
    """The counts of a Setting. What cannot be read counts as nothing."""
    found: Any = None
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        found = text and json.loads(text)
    counts = found.items() if isinstance(found, dict) else ()
    usable = {name: n for name, n in counts if type(n) is int and 0 <= n <= MAX_INT}
    return collections.Counter(usable)


def is_gate(setting: Setting) -> bool:
    """Whether a claim must look at this Setting."""
    return bool(setting.paused) or setting.at_once is not None or setting.starts is not None


def next_start(setting: Setting, now: int) -> tuple[int, int]:
    """When the next task of a type may start, as far as its rate goes, and the time between two
    starts (0: it has no rate).

    The instant is in the past if several may start now: where starts are closer than
    LUMP_SECONDS, those of so long. A stored next start that is far ahead shows that a clock was
    set back: then the instant is one spacing ahead. (A little ahead is usual, as *now* was read
    before a long wait for the store, or by another machine's clock.)

    >>> next_start(Setting(starts=10, period=1_000_000, next_at=90), 100)
    (100, 105000)
    >>> next_start(Setting(starts=1_000, period=1_000_000), 60_000_000)
    (59950000, 1050)
    """
    if setting.starts is None or setting.period is None:
        return now, 0
    lump = int(LUMP_SECONDS * 1e6)
    # A start counts from its claim on, but its function may begin later, by some 50 ms on a
    # busy machine, and the next ones at once: a period that is so much longer keeps the rate.
    spacing = -(-(setting.period + min(setting.period // 20, lump)) // setting.starts)
    spacing = min(spacing, NEVER // 2)  # The next start fits in a store.
    if setting.next_at > now + spacing + int(LEASE_SECONDS * 1e6):
        return now + spacing, spacing
    return max(setting.next_at, now - lump if spacing < lump else now), spacing


def with_next_start(setting: Setting, changes: Mapping[str, Any], now: int) -> Mapping[str, Any]:
    """*changes* of a Setting, and what follows for its next start: another rate counts from
    *now* on, so that the next start is at most one spacing ahead. (The same rate keeps it.)

    >>> with_next_start(Setting(next_at=99_000_000), {"starts": 10, "period": 1_000_000}, 200)
    {'starts': 10, 'period': 1000000, 'next_at': 105200}
    """
    changed = setting._replace(**changes)
    _, spacing = next_start(changed, now)
    if not spacing or (changed.starts, changed.period) == (setting.starts, setting.period):
        return changes
    return {**changes, "next_at": min(setting.next_at, now + spacing)}


def openings(setting: Setting, running: int, most: int, now: int) -> list[int]:
    """When the next *most* tasks of a type may start, while *running* others run. NEVER: when
    another one has ended. A paused type has no such dates.

    >>> openings(Setting(at_once=3), 1, 3, 50), openings(Setting(paused=1), 0, 3, 50)
    ([50, 50, 9223372036854775807], [])
    """
    first, spacing = next_start(setting, now)
    room = most if setting.at_once is None else setting.at_once - running
    dates = [first + n * spacing if n < room else NEVER for n in range(most)]
    return [] if setting.paused else dates


def _after_end(row: Row, now: int) -> Row | None:
    """done, failed -> waiting for its next slot, if it has one; else kept, or None."""
    slot = None if row.repeat is None else next_slot(row.repeat, row.due_at, now)
    if slot is not None:
        waiting = row._replace(state="scheduled", attempt=0, progress=None)
        return waiting._replace(due_at=slot, ready_at=slot)
    if row.state == "failed":
        return row
    if row.keep_result is None:
        return None
    kept = int(min(row.keep_result * 1e6, NEVER - now - 1))  # Fits in a store.
    return row._replace(kept_until=now + kept)


def without_run(row: Row, reason: str, now: int) -> Row:
    """any -> failed, for a task that is not to start. Its data and plans stay as they are."""
    ended: dict[str, Any] = {"started_at": None, "ended_at": now}
    return row._replace(state="failed", owner="", interrupted=0, error=reason, **ended)


# The first words of the errors of tasks that expired, and of those whose predecessor is gone.
EXPIRED, ORPHANED = "Expired: ", "not started: "


def expiry(row: Row, now: int) -> str:
    """The error of a task whose turn comes too late ("": it comes in time)."""
    if row.expires is None or now <= row.due_at + row.expires * 1e6:
        return ""
    due, seconds = _datetime(row.due_at).isoformat(" ", "milliseconds"), max(row.expires, 0.0)
    error = f"{EXPIRED}due {due}, to be started within {seconds:.9g} s"
    if row.error and (row.ended_at is None or row.ended_at >= row.due_at):
        error += f"\n\n{row.error}"  # Of a run for this due date, which was to be retried.
    return error


def is_late(row: Row) -> bool:
    """Whether a task that was set aside had expired."""
    return row.error is not None and row.error.startswith(EXPIRED)


def succeeded(row: Row) -> Row | None:
    """The task that is to follow under the same id, or None."""
    if row.successor is None:
        return None
    return _unpacked_row(row.successor)._replace(claim=row.claim)


def set_aside(row: Row, reason: str, now: int) -> tuple[Row, Row]:
    """waiting -> failed, for a task that is not to start; a schedule skips the slot that has
    expired. Returns the Row to be stored, and the one that listeners and Futures are told."""
    failed = without_run(row, reason, now)
    if not reason.startswith(EXPIRED):
        return failed, readable(failed)
    if row.successor is not None:
        return cast(Row, succeeded(row)), failed
    following = cast(Row, _after_end(failed, now))
    return following, following


def not_started(row: Row) -> TaskPoolError:
    """What is told of a task that has failed without a run."""
    error = row.error or ""
    if error.startswith((EXPIRED, ORPHANED)):
        return TaskPoolError(error.partition("\n")[0])
    return StoreError(f"the stored task cannot be run: {error}")


def choose(
    candidates: Iterable[Row], costs: Mapping[str, float], limit: float, now: int,
    places: dict[str, int] | None = None,
) -> tuple[list[Row], list[tuple[Row, str]]]:  # fmt: skip
    """What a claim takes of *candidates*, which come in order; and those that it came across
    and that are not to start, with the reasons.

    Each task uses up its cost of *limit*; the first that does not fit ends the claim. A task
    that was interrupted is taken alone. (P3) Of each type in *places* it takes at most so many,
    and counts *places* down; further tasks of that type are passed over.
    """
    taken: list[Row] = []
    aside: list[tuple[Row, str]] = []
    limit += 1e-9  # What costs add up to is rounded.
    for row in candidates:
        if places and not places.get(row.task_type, 1):
            continue
        if reason := _unusable(row) or ("" if row.expires is None else expiry(row, now)):
            aside.append((row, reason))
            if len(aside) == ASIDE_TASKS:
                break
            continue
        is_suspect, cost = row.interrupted > 0, cost_of(row, costs)
        if cost > limit or (is_suspect and taken):
            break
        limit -= cost
        taken.append(row)
        if places and row.task_type in places:
            places[row.task_type] -= 1
        if is_suspect or limit < LEAST_SHARE:  # There is room for no other.
            break
    return taken, aside


def retry_or_fail(row: Row, error: str, now: int, plan: Plan = _ORDINARY) -> Outcome:
    """What becomes of a start that failed: a retry, or the end."""
    if plan.may_retry and (row.attempt <= row.retries or not plan.counts):
        delay = plan.seconds
        if delay is None:
            delay = back_off(row.retry_delay, row.attempt, RETRY_CAP_SECONDS)
        ready_at = now + int(min(delay * 1e6, _YEARS[1] - now))
        return Outcome(row.id, row.claim, "ready", plan.counts, ready_at, error=error)
    return Outcome(row.id, row.claim, "failed", error=error, progress=row.progress)


def is_held(row: Row, owner: str, outcome: Outcome) -> bool:
    """Whether *owner* still holds the claim that *outcome* ends."""
    return row.claim == outcome.claim and row.state == "running" and row.owner == owner


def _waiting_again(row: Row) -> Row:
    attempt = max(row.attempt - 1, 0)
    return row._replace(state="ready", attempt=attempt, owner="", progress=None)


def _run_times(row: Row, outcome: Outcome, now: int) -> dict[str, Any]:
    """The columns that tell when a run was whose end is recorded *now*."""
    if outcome.seconds is None:
        return {}
    # A clock may have been set, or patched by the task: no run began before its claim.
    began = min(now, max(row.ready_at, now - outcome.seconds * 1e6))
    return {"started_at": int(began), "ended_at": now}


def after_run(row: Row, outcome: Outcome, now: int) -> Row | None:
    """running -> the Row that follows, or None if the task is over and gone."""
    is_gone = row.keep_result is None and row.repeat is None and row.successor is None
    if is_gone and outcome.state == "done":  # As for most.
        return None
    if outcome.progress is not None:
        row = row._replace(progress=outcome.progress)
    if outcome.state == "running":
        return row
    if row.removed:
        return succeeded(row)  # It was added after the removal.
    if outcome.state == "removed":
        return None
    if not outcome.charged and outcome.seconds is None:
        return _waiting_again(row)._replace(ready_at=outcome.ready_at)
    if row.successor is not None:
        return succeeded(row)
    row = row._replace(
        state=outcome.state, owner="", interrupted=0, result=outcome.result, error=outcome.error,
        **_run_times(row, outcome, now),
    )  # fmt: skip
    if outcome.state == "ready":
        state = "ready" if outcome.ready_at <= now else "scheduled"
        row = row._replace(state=state, ready_at=outcome.ready_at, progress=None)
        return row if outcome.charged else row._replace(attempt=row.attempt - 1, ended_at=None)
    return _after_end(row, now)


def was_due(row: Row, until: int) -> bool:
    """Whether a waiting task was due at the instant *until*. A retry does not move its date, but
    one that has said "not now" has another one."""
    return row.due_at <= until and (row.ready_at <= until or row.ended_at is not None)


def requeued(row: Row, now: int) -> Row | None:
    """running -> waiting, uncharged: the run did not come to its end."""
    return after_run(row, Outcome(row.id, row.claim, "ready", charged=False), now)


def after_interruption(row: Row, now: int) -> Row | None:
    """running, its master dead -> the Row that follows, or None. (P3)

    The first interruption only marks the task, as its neighbours may be to blame; from
    then on it is claimed singly and each interruption of such a claim counts.
    """
    is_last = row.interrupted >= INTERRUPTIONS
    if row.removed or (is_last and row.successor is not None):
        return succeeded(row)
    if not is_last:
        again = _waiting_again(row)._replace(interrupted=row.interrupted + 1, lane="")
        return again._replace(ready_at=row.due_at)  # It is still due.
    times = f"{INTERRUPTIONS} times in a row"
    error = f"Interrupted: its master died {times} while it ran this task alone"
    row = row._replace(state="failed", owner="", interrupted=0, result=None, error=error)
    return _after_end(row._replace(started_at=row.ready_at, ended_at=now), now)


def led_to(row: Row, following: Row | None, outcome: Outcome) -> str:
    """What a run made of its own task. What follows under the same id may be another task.

    `running` (it was a report), `waits` (for a retry, or it was requeued), `repeats`, `done`,
    `failed` or `removed`.
    """
    if outcome.state in ("running", "removed"):
        return outcome.state
    if following is not None and following.created_at == row.created_at:
        if following.state in _WAITING:
            return "waits" if outcome.state == "ready" else "repeats"
    if not outcome.charged:
        return "removed"
    return "done" if outcome.state == "done" else "failed"


def as_told(row: Row, led: str, outcome: Outcome, now: int) -> Row:
    """The Row of a run that has ended, for listeners: *led* is what led_to() said."""
    state = "scheduled" if led in ("waits", "repeats") else led
    times = _run_times(row, outcome, now)
    return row._replace(state=state, owner="", result=outcome.result, error=outcome.error, **times)


def what_became(before: Row, found: Row | None) -> str:
    """What became of a task that was *before*, where *found* is stored under its id now.

    "": it waits or runs, or waits to succeed *found*. `gone`: it was removed, or is done and
    kept no result. `replaced`: another task has its id. `repeated`: a run has ended since, and
    it waits again. `done` or `failed`.
    """
    if found is None:
        return "gone"
    if found.created_at != before.created_at:
        with contextlib.suppress(ValueError):
            successor = _unpacked_row(found.successor) if found.successor else found
            if successor.created_at == before.created_at:
                return ""
        return "replaced"
    if found.state in ("done", "failed"):
        return found.state
    was_claimed = found.claim > before.claim - (before.state == "running")
    # A repeat moves the due date forward. An update may have moved it in either direction, even
    # so that it is the same again; but what waits for its first attempt at a slot is ready at it.
    came, went = found.due_at > before.due_at, found.due_at < before.due_at
    is_same = found.due_at == before.due_at == found.ready_at
    has_repeated = was_claimed and (came or (found.attempt == 0 and (went or is_same)))
    return "repeated" if found.repeat is not None and has_repeated else ""


def count_run(tally: _Tally, task_type: str, outcome: Outcome, led: str) -> None:
    """Count the end of a run; *led* is what led_to() says of it. A run that did not come to its
    end is not counted."""
    if outcome.seconds is None:
        return
    counts = tally[task_type]
    if outcome.state != "done":
        again = "retried" if led == "waits" else "failed"
        counts[again if outcome.charged else "later"] += 1
    counts[_TOOK[bisect_left(BOUNDS, outcome.seconds)]] += 1
    counts["us"] += int(outcome.seconds * 1e6)


def checked(policy: Callable[..., Row | None], row: Row, *arguments: Any) -> Row | None:
    """What follows a stored row: what *policy* says, or `failed` if it cannot be read. The last
    of *arguments* is the instant."""
    reason = _unusable(row)
    return without_run(row, reason, arguments[-1]) if reason else policy(row, *arguments)


def after_remove(row: Row, mark: int = 1) -> Row | None:
    """any -> (removed); a running task is marked: by 1 if its run is to go on, else by 2."""
    if row.state != "running":
        return None
    return row._replace(removed=2 if row.removed == 2 else mark, successor=None)


def after_retry(row: Row, now: int, is_bound: bool = False) -> Row:
    """failed -> waiting, with a fresh set of attempts, however late it is; held, if it still
    has bonds."""
    state = "held" if is_bound else "ready"
    waiting = row._replace(state=state, attempt=0, ready_at=now, error=None, lane="")
    # A remove() may have been killed half way.
    return waiting._replace(expires=None, progress=None, removed=0)


def bound(row: Row, there: Mapping[str, Row]) -> Row:
    """A Row that is to be stored, with only those bonds that it has to wait for, and held if
    there are any. *there* has the predecessors that are stored."""
    bonds = []
    for bond in row.after:
        parent = there.get(bond.parent)
        if parent is None and not bond.known:
            name = "after_end" if bond.anyway else "after"
            allowed = "the id of a task that is there; of one that may have ended, the Task"
            raise _wrong_value(name, bond.parent, allowed)
        ends = ("done", "failed") if bond.anyway else ("done",)
        if parent is not None and parent.state not in ends:
            bonds.append(bond)
    state = "held" if bonds else row.state
    if state == "held" and row.repeat is not None:
        raise ValueError(f"task_id {_shown(row.id)}: a schedule follows no other task")
    return row._replace(after=tuple(bonds), state=state)


def how_ended(row: Row, following: Row | None, outcome: Outcome | None = None) -> str:
    """What a change of a stored task is for its followers: `done`, if *outcome* says so,
    `failed`, `removed`, or "" for no end."""
    if outcome is not None and outcome.state == "done":
        return "done"
    if following is None:
        return "" if row.state == "done" else "removed"
    if following.state == "failed":
        return "" if row.state == "failed" else "failed"
    if row.state != "running" or following.state == "running":
        return ""
    # A retry keeps both. A repetition has another due date, a successor was created later.
    same = (following.created_at, following.due_at) == (row.created_at, row.due_at)
    return "" if same else "failed"


def keeps_bonds(old: Row, new: Row | None) -> bool:
    """Whether a stored task that changes keeps its bonds: only what is held, or has failed
    before it could start, has any."""
    if old.state not in ("held", "failed"):
        return True
    return new is not None and new.created_at == old.created_at and new.state in ("held", "failed")


def bond_after(how: str, anyway: bool) -> str:
    """What the end of a predecessor makes of a bond: `met`, `broken`, or "": it stays."""
    if how == "done" or (how and anyway):
        return "met"
    return "broken" if how == "removed" else ""


def released(row: Row, now: int) -> Row:
    """held -> waiting for its due date only."""
    return row._replace(state="ready" if row.ready_at <= now else "scheduled")


def orphaned(row: Row, parent: str, now: int) -> Row:
    """held -> failed, as a predecessor was removed."""
    return without_run(row, f"{ORPHANED}{parent}, which it was to follow, was removed", now)


def after_adds(
    there: Iterable[Row], additions: Sequence[tuple[Row, str]]
) -> tuple[list[tuple[Row | None, Row]], list[Row]]:
    """What add() changes where these Rows have the ids of *additions*, and of those that they
    follow, as pairs of the Row before and after; and the Rows that it returns. Raises
    DuplicateTask, and ValueError for bonds that cannot be."""
    before = {row.id: row for row in there}
    ids = {new.id for new, _ in additions if not new.after}
    if not before and len(ids) == len(additions):
        return [(None, new) for new, _ in additions], [new for new, _ in additions]
    planned, added = {task_id: readable(row) for task_id, row in before.items()}, []
    changed: dict[str, None] = {}  # Ids, in order.
    for new, if_exists in additions:
        stored, row = after_add(planned.get(new.id), new, if_exists)
        if stored is not None:
            if new.after and stored.successor is not None:
                allowed = "another task_id: what follows a run under its id follows nobody else"
                raise _wrong_value("task_id", new.id, allowed)
            if stored.after:  # It is new, or gets the bonds of what is to follow it.
                stored = bound(stored, planned)
                row = row._replace(state=stored.state)
            planned[new.id] = stored
            changed[new.id] = None
        added.append(row)
    return [(before.get(task_id), planned[task_id]) for task_id in changed], added


def after_update(old: Row | None, task_id: str, changes: Mapping[str, Any], now: int) -> Row:
    """waiting -> waiting with other values. Raises ValueError if it is not waiting.

    Of a schedule another due date moves one run: the slots after it stay where they were.
    """
    if old is None or old.state not in _WAITING:
        state = "not there" if old is None else old.state
        text = "only waiting tasks can be updated"
        raise ValueError(f"task_id {_shown(task_id)} is {state}; {text}")
    row = old._replace(**changes)
    if reason := _unusable(row):
        raise ValueError(f"task_id {_shown(task_id)} cannot be run, with these changes: {reason}")
    if row.repeat is not None and "due_at" in changes and "repeat" not in changes:
        row = row._replace(repeat=with_slot(row.repeat, old.due_at))
    return row if row.state == "held" and changes.get("after") != () else released(row, now)


_DECLARED = "data priority retries retry_delay timeout keep_result expires repeat".split()


def after_declaration(old: Row, new: Row | None, now: int) -> Row | None:
    """What follows the stored schedule *old* of a declared task: *new* is the Row that add()
    would store now, or None for a task without a schedule.

    Only another rule moves the due date, and only one to come: what is overdue still runs. A
    cron goes on with its next time, an interval counts on from the last due date.
    """
    if new is None:
        return after_remove(old)
    if _unusable(old):
        return after_add(readable(old)._replace(state="failed"), new, "replace")[0]
    declared = {name: getattr(new, name) for name in _DECLARED}
    follows = old._replace(removed=old.removed & 2, **declared)
    if old.repeat is None or new.repeat is None:
        return follows
    old_rule, new_rule = _read_repeat(old.repeat), _read_repeat(new.repeat)
    if old_rule == new_rule and isinstance(old_rule, timedelta):
        return follows._replace(repeat=old.repeat)  # It may tell a slot.
    if old_rule == new_rule or old.state == "running" or old.due_at <= now:
        return follows
    last = old.created_at if old.ended_at is None else last_slot(old.repeat, old.due_at)
    due_at = next_slot(new.repeat, last, now) or old.due_at
    return follows._replace(due_at=due_at, ready_at=due_at)


# --- Forks and owners ----------------------------------------------------------------
# What a process must know of itself and of others before it may touch a queue.

# By their id(), things that have _reset_after_fork().
_reset_in_forks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_carried_over_fork: list[Any] = []  # Kept, so that nobody closes them in this process.
_forking = threading.local()  # Of each thread: the locks that each _before_fork took.
_master_ends: set[Any] = set()  # Files and sockets that must not live on in a fork.
# Held while a worker's pipes are created, so that a concurrent fork cannot inherit them.
_birth_lock = threading.RLock()


def _living(kind: type = object) -> list[Any]:
    """Those of *_reset_in_forks* that still live and are of this kind."""
    # valuerefs() copies at once: other threads may register things meanwhile.
    things = [ref() for ref in _reset_in_forks.valuerefs()]
    return [thing for thing in things if thing is not None and isinstance(thing, kind)]


def _after_fork_in_child() -> None:
    # No locks, no logging, no threads here: any lock may be held by a thread that does
    # not exist in the child. Siblings must not hold the master's ends of pipes, or a
    # dead master would not read as end-of-file.
    global _nonce, _birth_lock
    for end in list(_master_ends):
        with contextlib.suppress(OSError):
            end.close()
    _master_ends.clear()
    _birth_lock, _nonce = threading.RLock(), os.urandom(8).hex()
    for thing in _living():
        thing._reset_after_fork()
    _forking.locks.pop()


def _before_fork() -> None:
    # A fork in the middle of a transaction would copy SQLite's own table of locks, and
    # the child would take its parent's for its own: "database is locked", for ever.
    taken: list[Any] = []
    # A list of lists, as a signal handler may fork in the midst of this.
    _forking.__dict__.setdefault("locks", []).append(taken)
    things = sorted(_living(), key=id)  # In one order, as others may fork, too.
    locks = (lock for thing in things for lock in getattr(thing, "_fork_locks", ()))
    for lock in itertools.chain([_birth_lock], locks):
        if lock.acquire(timeout=BUSY_SECONDS):
            taken.append(lock)


def _after_fork_in_parent() -> None:
    for lock in _forking.locks.pop():
        lock.release()


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


_CallPlace = tuple[str, tuple[int, ...]]


def _place_of(frame: Any) -> _CallPlace:
    """Where the code of *frame* runs: its module, and the lines of the calls that led there
    from the top level. Both are the same in a worker that runs the file again."""
    name, lines = str(frame.f_globals.get("__name__", "__main__")), [frame.f_lineno]
    while frame.f_code.co_name != "<module>" and frame.f_back is not None:
        frame = frame.f_back
        lines.append(frame.f_lineno)
    return "__main__" if name == "__mp_main__" else name, tuple(lines)


_Key = tuple[str, tuple[int, ...], str, int]

# The Clusters and TaskQueues made in this process, by module, lines of the calls that led
# there from the top level, kind, and id(). A worker finds its functions in one of them.
_registry: weakref.WeakValueDictionary[_Key, Any] = weakref.WeakValueDictionary()
_registered: list[Any] = []  # In a worker: keeps alive what the entry file made.


def _register(kind: str, thing: Any, frame: Any) -> _Key:
    """Register a Cluster or a TaskQueue, which the code of *frame* makes."""
    key = (*_place_of(frame), kind, id(thing))
    _registry[key] = thing
    if _is_rerun():
        _registered.append(thing)
    return key


def _caller() -> Any:
    """The frame of the code that called this file."""
    frame = sys._getframe(1)
    while frame.f_globals is globals() and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _absolute(path: str) -> str:
    """os.path.abspath, with an error that names the current folder if that was deleted."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError as error:
        folder = os.environ.get("PWD", "unknown")
        with contextlib.suppress(OSError):
            folder = os.readlink("/proc/self/cwd")
        text = "the current folder was deleted; os.chdir() to one that exists"
        raise FileNotFoundError(error.errno, text, folder) from None


def _read_text(path: str) -> str:
    """What a file holds; "" if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """The start time of a process, in ticks since boot; "dead"; or "" if that is not seen."""
    fields = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(fields) >= 20:
        return "dead" if fields[0] in "ZX" else fields[19]  # A zombie: see proc(5).
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return "dead"
    except OSError:
        pass
    return ""  # Hidden from us, or no file descriptor is left to look.


def _here() -> str:
    """This boot of this machine and its pid namespace; "" where /proc does not tell."""
    boot = _read_text("/proc/sys/kernel/random/boot_id")
    try:
        return boot and f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _new_owner(port: int) -> str:
    """A name for a running cluster, from which others can see whether it died, and on
    which port it hears of new tasks (see _WakeUp)."""
    pid = os.getpid()
    return f"{_here()}|{pid}|{_process_start(pid)}|{os.urandom(8).hex()}|{port}"


def _parts_of(owner: object) -> tuple[str, int, str, int]:
    """The place, pid, start and port in an owner's name. Others may have written that name: 0
    stands for a pid or port that is none."""
    place, pid, start, _, port = (*str(owner).split("|"), "", "", "", "")[:5]
    number, at = (int(n) if n.isdecimal() and len(n) < 10 else 0 for n in (pid, port))
    return place, number, start, at if at < 1 << 16 else 0


def told_owner(owner: str) -> dict[str, Any]:
    """The `pid` of that owner, and its `state`: alive, dead, or unknown if it is not seen here."""
    (place, pid, start, _), state = _parts_of(owner), "unknown"
    if pid and start and place == _here():
        state = "alive" if _process_start(pid) in (start, "") else "dead"
    return {"pid": pid or None, "state": state}


def owner_is_dead(owner: str) -> bool:
    """Whether that owner is surely dead. (P3)"""
    return bool(told_owner(owner)["state"] == "dead")


def _ports_of(owners: Iterable[str]) -> list[int]:
    """Where the masters of this machine among these hear of new tasks: see _WakeUp."""
    parts = list(map(_parts_of, owners))
    here = _here() if parts else ""
    return [port for place, _, _, port in parts if port and place == here]


CANCELLED_BELL = b"-"  # What rings where a task was cancelled; anything else: one was added.


def _ring(ports: Iterable[int], what: bytes) -> None:
    """Tell the masters there that there is something new. It may be lost."""
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as knock:
        knock.setblocking(False)
        for port in ports:
            knock.sendto(what, ("127.0.0.1", port))


# --- Stores --------------------------------------------------------------------------
# A store decides nothing and reads no clock. It moves a task along an arrow of the drawing,
# as the policies above say, if the task is still where the arrow begins.


# Task types, with what one task of each uses up of the room that claim() is given.
Types = Union[Mapping[str, float], Iterable[str]]


class Query(NamedTuple):
    """Which tasks find, count, remove and retry mean: those that fit every field."""

    ids: Sequence[str] | None = None
    types: Sequence[str] | None = None
    states: Sequence[str] | None = None  # As users say them: waiting, running...
    due: bool | None = None  # True: could run now. False: waiting, but not due.
    until: int = NEVER  # Due date at most this.
    limit: int | None = None
    offset: int = 0
    created_at: Sequence[int] | None = None  # Only tasks created at one of these instants.
    paused: Sequence[str] = ()  # Types of which no task is due.
    held: bool | None = None  # Whether they wait for the end of others.


def fits(row: Row, query: Query, now: int) -> bool:
    """Whether a task is one of those that *query* means, but for its ids."""
    waiting = row.state in _WAITING
    could_run = row.state == "ready" or (row.state == "scheduled" and row.ready_at <= now)
    could_run = could_run and row.task_type not in query.paused
    return (
        (query.types is None or row.task_type in query.types)
        and (query.states is None or _public_state(row.state) in query.states)
        and (query.due is None or (waiting and could_run == query.due))
        and row.due_at <= query.until
        and (query.created_at is None or row.created_at in query.created_at)
        and (query.held is None or (row.state == "held") == query.held)
    )


def summed(rows: Iterable[Row], now: int) -> list[tuple[Any, ...]]:
    """See Store.summary()."""
    types: dict[str, list[Row]] = {}
    for row in rows:
        types.setdefault(row.task_type, []).append(row)
    lines = []
    for name, those in sorted(types.items()):
        states = collections.Counter(row.state for row in those)
        waiting = sum(states[state] for state in _WAITING)
        due = [row for row in those if fits(row, Query(due=True), now)]
        since = [max(row.created_at, row.due_at, row.ready_at) for row in due]
        later = [row.ready_at for row in those if row.state == "scheduled" and row.ready_at > now]
        ends = states["running"], states["failed"], states["done"]
        dates = max(0.0, (now - min(since)) / 1e6) if since else None, min(later, default=None)
        lines.append((name, waiting, len(due), *ends, *dates, states["held"]))
    return lines


def _stored_states(query: Query) -> Sequence[str] | None:
    """The states of *query* as stores know them. None: all."""
    names = {"waiting": _WAITING}
    return query.states and [s for name in query.states for s in names.get(name, [name])]


class _ObserverClock:
    """The *seconds* of recover(): a clock that runs only while its observer looks. (P3)

    An observer that was stopped, blocked or cut off cannot tell silence from not having
    listened. Other masters may have been stopped, too, and need time for a heartbeat.
    """

    def __init__(self) -> None:
        self._seconds, self._looked_at = time.monotonic(), -math.inf

    def look(self, now: float) -> float:
        """The time of a look at *now* (monotonic): that of the last one if it is late."""
        gap, self._looked_at = now - self._looked_at, now
        if gap <= LEASE_SECONDS / 3:  # Else every heartbeat may have been missed.
            self._seconds += min(gap, 3 * WATCH_SECONDS)
        return self._seconds

    def miss(self) -> None:
        """A look has failed: the next one is late."""
        self._looked_at = -math.inf


# By owner: the last heartbeat that an observer saw, since when it has been the same, and
# when the observer last looked. Both times are those of the observer's clock.
_Seen = dict[str, tuple[Any, float, float]]


def _dead_owners(beats: Mapping[str, Any], seen: _Seen, seconds: float) -> list[str]:
    """Which owners are seen to be dead, or had no new heartbeat for a lease. (P3)"""
    for owner in set(seen) - set(beats):
        del seen[owner]
    for owner, beat in beats.items():
        before, since, looked_at = seen.get(owner, (beat, seconds, seconds))
        listened = before == beat and looked_at < seconds
        seen[owner] = beat, since if listened else seconds, seconds
    return [o for o in beats if seconds - seen[o][1] >= LEASE_SECONDS or owner_is_dead(o)]


_T = TypeVar("_T")  # What is read or written.
_Pair = tuple[Union[Row, None], Union[Row, None]]  # What is stored, and what shall be.
_Ids = Union[Sequence[str], None]


class _Raced(Exception):
    """Another writer changed a task between our read and our write."""


class Turn(NamedTuple):
    """The answer of Store.turn."""

    led: list[str]  # For each outcome; "" = the claim was lost.
    rows: list[Row]  # Claimed, or set aside: those have failed, or wait for their next slot.
    due: list[int]  # When further tasks can start: see Store.upcoming.
    limited: Collection[str] = ()  # The types with a limit. (A paused one has none.)


class Backend:
    """The part of a Store that every backend must write itself: transaction(), rows(), write()."""

    in_memory = False
    atomic = False  # Whether a transaction() that raises undoes what was done in it.

    def transaction(self) -> contextlib.AbstractContextManager[Any]:
        """A context whose reads and writes take effect together, or not at all. A backend
        without transactions gives a lock, and its write() says False after a race."""
        raise NotImplementedError

    def rows(self, query: Query, now: int) -> list[Row]:
        """The Rows that fit *query* as they are stored, oldest first."""
        raise NotImplementedError

    def write(self, old: Row | None, new: Row | None) -> bool:
        """Put *new* in the place of *old*; None: nothing is there, or shall be. Another
        `created_at` than before means another task: it goes to the end of its line.

        False, and nothing is changed, if another writer has changed what *old* was.
        """
        raise NotImplementedError

    def write_all(self, pairs: Sequence[_Pair]) -> list[bool]:
        """write() for each pair."""
        return [self.write(old, new) for old, new in pairs]

    def _change(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """The door to every write: *work* in one transaction; anew if others were quicker."""
        for _ in range(TRIES):
            try:
                with self.transaction():
                    return work(*arguments)
            except _Raced:
                pass
        raise StoreError(f"{self!r}: others change the same tasks all the time")


class TypeSettings(Backend):
    """The part of a Store that knows of task types: pauses, limits and counters. A backend that
    has none of these is a Store, too."""

    has_settings = False  # Whether there are settings() and change_setting().
    next_due: Callable[..., list[int]]

    # ---- Primitives

    def settings(self, all_types: bool = False) -> Mapping[str, Setting]:
        """What is set for task types: for those that are paused or limited, or for all."""
        return {}

    def change_setting(self, task_type: str, changes: Mapping[str, Any]) -> None:
        """Change columns of the Setting of a type."""
        raise StoreError(f"{self!r} has no change_setting(), which pauses and limits need")

    def setting(self, task_type: str) -> Setting:
        """What is set for a type."""
        return self.settings(all_types=True).get(task_type, Setting())

    def change_rate(self, task_type: str, setting: Setting, changes: Mapping[str, Any]) -> bool:
        """change_setting(). False, and nothing is changed, if another writer has changed the
        rate, or the next start, since *setting* was read."""
        self.change_setting(task_type, changes)
        return True

    def paused(self) -> list[str]:
        """The types that are paused."""
        return [name for name, it in self.settings().items() if it.paused]

    def running(self, types: Collection[str]) -> Mapping[str, int]:
        """How many tasks of each of these types run, whoever has claimed them."""
        rows = self.rows(Query(types=list(types), states=["running"]), 0)
        return collections.Counter(row.task_type for row in rows)

    # ---- The verbs

    def _openings(
        self, settings: Mapping[str, Setting], types: Collection[str], most: int, now: int
    ) -> dict[str, list[int]]:
        """openings() of each of *types* that is paused or limited."""
        mine = {name: it for name, it in settings.items() if name in types}
        counted = [name for name, it in mine.items() if it.at_once is not None and not it.paused]
        running = self.running(counted) if counted else {}
        return {name: openings(it, running.get(name, 0), most, now) for name, it in mine.items()}

    def upcoming(
        self, owner: str, types: Collection[str], limit: int, now: int, until: int,
        settings: Mapping[str, Setting] | None = None, gated: Collection[str] | None = None,
    ) -> list[int]:  # fmt: skip
        """next_due() as far as *settings* (or those stored) allow: NEVER stands for the end of
        another task, and a paused type has no date. *gated*: the types that have a Setting, where
        that is known."""
        if gated is None:
            gated = settings = self.settings() if settings is None else settings
        free = [name for name in types if name not in gated] if gated else types
        dates = self.next_due(owner, free, limit, now, until) if free else []
        if not gated or (len(dates) == limit and max(dates) <= now):
            return dates  # None of another type could come before these.
        settings = self.settings() if settings is None else settings
        for name, starts in self._openings(settings, types, limit, now).items():
            if starts and settings[name].next_at > starts[0]:
                starts[0] = now  # A clock was set back: a claim is to cut next_at down.
            dates += map(max, starts, starts and self.next_due(owner, [name], limit, now, until))
        return sorted(dates)[:limit]

    def _counted_starts(
        self, chosen: list[Row], places: Iterable[str], settings: Mapping[str, Setting], now: int
    ) -> list[Row]:
        """Those of *chosen* that may start as far as rates go. Each of these starts counts."""
        for name in places:
            if (setting := settings[name]).starts is None:
                continue
            count = sum(row.task_type == name for row in chosen)
            first, spacing = next_start(setting, now)
            if count or setting.next_at > first:
                if not self.change_rate(name, setting, {"next_at": first + count * spacing}):
                    chosen = [row for row in chosen if row.task_type != name]
        return chosen

    def summary(self, now: int) -> list[tuple[Any, ...]]:
        """For each task type: its name; how many tasks wait, are due, run, have failed and are
        done; for how many seconds the oldest that is due has been so, and when the next one
        will be (or None); how many are held."""
        return summed(map(readable, self.rows(Query(), now)), now)

    def tally(self, tally: _Tally) -> None:
        """Add to the counts of task types."""
        if tally and self.has_settings:
            self._change(self._tally, tally)

    def _tally(self, tally: _Tally) -> None:
        for name, counts in tally.items():
            total = read_counts(self.setting(name).counts)
            total.update(counts)
            self.change_setting(name, {"counts": json.dumps(total)})

    def _count(self, how: str, rows: Iterable[Row]) -> None:
        """Count *how* these tasks have ended, or were interrupted, as no master counts that."""
        tally = new_tally()
        for row in rows:
            tally[row.task_type][how] += 1
        if tally and self.has_settings:
            self._tally(tally)

    def set_up(
        self, types: Iterable[str], changes: Mapping[str, Any], now: int, wait: bool = True
    ) -> None:
        """Change these columns of the Settings of these types. With *wait* this returns when
        every cluster goes by them."""

        def work() -> None:
            for task_type in types:
                if "starts" not in changes:
                    self.change_setting(task_type, changes)
                    continue
                setting = self.setting(task_type)
                changed = with_next_start(setting, changes, now)
                if not self.change_rate(task_type, setting, changed):
                    raise _Raced

        self._change(work)


class Following(Backend):
    """The part of a Store that knows which tasks follow others. A backend that has none of
    these primitives is a Store, too."""

    has_bonds = False  # Whether there are bonds(), followers() and bind().
    # How many tasks were released, or failed, as others ended; how many of them failed.
    followed = 0, 0

    # ---- Primitives

    def bonds(self, parents: _Ids = None, children: _Ids = None) -> list[Bond]:
        """The bonds of these parents, or of these children."""
        return []

    def followers(self, ids: Collection[str] | None = None) -> set[str]:
        """Those of these tasks that have bonds as a child; None: any one task that has."""
        return set()

    def bind(self, add: Sequence[Bond], drop: Sequence[Bond]) -> None:
        """Forget the bonds *drop*, then store *add*. Of two bonds of the same two tasks the
        stricter one (`anyway` is False) counts."""
        raise NotImplementedError

    # ---- What the verbs do with them

    def _parents(self, rows: Iterable[Row], now: int) -> list[Row]:
        """The predecessors of new Rows that are there."""
        ids = list({bond.parent for row in rows for bond in row.after})
        if ids and not self.has_bonds:
            lacks = "bonds() and bind(), so that no task can follow others here"
            raise StoreError(f"{self!r} lacks the primitives {lacks}")
        return self.rows(Query(ids=ids), now) if ids else []

    def _check_rings(self, pairs: Sequence[_Pair]) -> None:
        """Raise ValueError if a task would wait for itself."""
        import graphlib  # Not above: an older Python lacks it, and is to be told so.

        above = {new.id: [bond.parent for bond in new.after] for _, new in pairs if new}
        freed = {old.id for old, new in pairs if old and not keeps_bonds(old, new)}
        seen: set[str] = set()
        # A ring has a new bond: look upwards from the new predecessors. Stored tasks can wait
        # only for those of the pairs that were there before.
        todo = set[str]().union(*above.values()) if any(old for old, _ in pairs) else set()
        while todo := todo - freed - seen:
            seen |= todo
            bonds = self.bonds(children=list(todo))
            for bond in bonds:
                above.setdefault(bond.child, []).append(bond.parent)
            todo = {bond.parent for bond in bonds}
        try:
            graphlib.TopologicalSorter(above).prepare()
        except graphlib.CycleError as error:
            ring = [_shown(task_id) for task_id in reversed(error.args[1])]
            text = f"after or after_end would have {ring[0]} wait for itself"
            raise ValueError(f"{text}: {' waits for '.join(ring)}") from None

    def _undo(self, pairs: Sequence[_Pair], done: Sequence[bool]) -> None:
        """Another writer was quicker with those that are not done: undo the others, unless the
        transaction does that. Raises _Raced."""
        for (old, new), written in zip(pairs, done):
            if written:
                self.write(new, old)
        raise _Raced

    def _put(self, pairs: Sequence[_Pair], now: int, binds: bool = False) -> None:
        """Write all pairs, or none if another writer was quicker with one of them; then their
        bonds (*binds*: there may be some), and what follows for those that follow them."""
        bonds = [bond for _, new in pairs if new for bond in new.after] if binds else []
        if bonds:
            self._check_rings(pairs)
            pairs = [(old, new and new._replace(after=())) for old, new in pairs]
        if not all(done := self.write_all(pairs)):
            self._undo(pairs, done)
        if bonds or self.followers():
            changes = [(old, new) for old, new in pairs if old is not None]
            freed = [old.id for old, new in changes if not keeps_bonds(old, new)]
            self.bind(bonds, self.bonds(children=freed))
            self._follow([(old.id, how_ended(old, new)) for old, new in changes], now)

    def _follow(self, ends: Iterable[tuple[str, str]], now: int) -> None:
        """The choke point of all arrows: these tasks have changed, each as how_ended() says, and
        bond_after() says what that is for those that follow them. A task that fails by this has
        ended, too, and its own followers are told."""
        how = {task_id: end for task_id, end in ends if end}
        while how and self.followers():
            bonds = self.bonds(parents=list(how))
            became = {bond: bond_after(how[bond.parent], bond.anyway) for bond in bonds}
            over = [bond for bond, end in became.items() if end]
            if not over:
                return
            self.bind((), over)
            losers = {bond.child: bond.parent for bond in over if became[bond] == "broken"}
            free = {bond.child for bond in over} - losers.keys()
            ids = [*(free - self.followers(free)), *losers]
            written = self._end_waiting(ids, losers, now) if ids else []
            how = {row.id: "failed" for row in written if row.state == "failed"}
            self.followed = self.followed[0] + len(written), self.followed[1] + len(how)

    def _end_waiting(self, ids: list[str], losers: Mapping[str, str], now: int) -> list[Row]:
        """Release those of these tasks that are held; *losers* fail. Returns the Rows written."""
        written: list[Row] = []
        for _ in range(TRIES):
            pairs: list[tuple[Row, Row]] = []
            for row in self.rows(Query(ids=ids, held=True), now):
                lost = losers.get(row.id)
                new = checked(released, row, now) if lost is None else orphaned(row, lost, now)
                pairs.append((row, cast(Row, new)))
            done = self.write_all(pairs)
            if self.atomic and not all(done):
                self._undo(pairs, done)
            written += [new for (_, new), is_done in zip(pairs, done) if is_done]
            ids = [row.id for (row, _), is_done in zip(pairs, done) if not is_done]
            if not ids:  # Their bonds are gone: nothing else would release them.
                return written
        raise StoreError(f"{self!r}: others change {ids[0]!r} all the time")


class Seen(NamedTuple):
    """A task in a list for people."""

    row: Row  # As it is stored, but for its long texts, which are cut.
    lengths: Sequence[int]  # How many characters each of LONG_TEXTS has.
    key: Sequence[Any]  # Where it stands in the list.


LONG_TEXTS = ("data", "result", "error")


def seen(row: Row, key: Sequence[Any], chars: int) -> Seen:
    """That Row with texts of at most so many characters."""
    texts = [getattr(row, name) or "" for name in LONG_TEXTS]
    cut: dict[str, Any] = {name: text[:chars] for name, text in zip(LONG_TEXTS, texts) if text}
    return Seen(row._replace(**cut), list(map(len, texts)), key)


class Looking(Backend):
    """The part of a Store that is for people who look at it, page by page."""

    def newest(
        self, query: Query, most: int, before: Sequence[Any] | None, chars: int, now: int
    ) -> list[Seen]:
        """The first *most* tasks that fit *query*, behind the one with the key *before*, with
        texts of at most *chars* characters. The newest come first; if only failed ones are asked
        for, those that failed last."""
        is_failed = query.states is not None and list(query.states) == ["failed"]

        def key(row: Row) -> list[Any]:
            ended = row.due_at if row.ended_at is None else row.ended_at
            return [ended if is_failed else row.created_at, row.id]

        keyed = [(key(row), row) for row in map(readable, self.rows(query, now))]
        keyed = [pair for pair in keyed if before is None or pair[0] < list(before)]
        return [seen(row, k, chars) for k, row in sorted(keyed, reverse=True)[:most]]

    def schedules(self, most: int) -> list[Row]:
        """The first *most* tasks that repeat, the next one first."""
        rows = [row for row in self.rows(Query(), 0) if row.repeat is not None]
        return sorted(map(readable, rows), key=lambda row: row.ready_at)[:most]


class Store(TypeSettings, Following, Looking):
    """Where tasks live. Subclass it, and TaskQueue takes your store.

    The verbs, each an arrow of the drawing above, are written once, here: read rows, ask a
    policy, write rows, in one transaction. A backend has primitives: it must have
    transaction(), rows() and write(); all others are written with these, for backends that
    have no quicker way.

    All methods may be called from any thread. Each verb is atomic, and raises StoreError,
    having changed nothing, if the store fails. `now` is microseconds since 1970. An `owner`
    is the text that a running cluster calls itself by.
    """

    # ---- Primitives of backends that several processes use

    def heartbeat(self, owner: str) -> None:
        """Tell observers that *owner* lives."""

    def heartbeats(self) -> dict[str, Any]:
        """The last heartbeat of each owner that lives, holds a claim, or has reserved a task:
        a value that each heartbeat() changes; None for an owner without one."""
        return {}

    def forget(self, owner: str) -> None:
        """*owner* is dead, or leaves: it has no heartbeat any more."""

    def owners(self) -> list[str]:
        """Who has a heartbeat, to be woken by producers."""
        return []

    def close(self) -> None:
        """Let go of files and connections. A later call opens them again."""

    # ---- Primitives that a backend may have a quicker way for

    def early(self, now: int) -> list[Row]:
        """The Rows that are ready, but due later: a clock that was ahead has made them ready."""
        found = map(readable, self.rows(Query(due=True), now))
        return [row for row in found if row.state == "ready" and row.ready_at > now]

    def candidates(
        self, owner: str, types: Iterable[str], most: int, now: int, until: int,
        places: Mapping[str, int],
    ) -> Iterable[Row]:  # fmt: skip
        """What *owner* could claim, in order: at least the first *most* of them. None that was
        interrupted, as long as *owner* holds another task that was. Of a type in *places* the
        first so many are enough; each that is taken is counted down there."""
        query = Query(types=list(types), due=True, until=until)
        rows = [row for row in self.rows(query, now) if was_due(row, until)]
        mine = [row for row in rows if row.lane in ("", owner)]
        if any(row.interrupted for row in self.held_by(owner)):
            mine = [row for row in mine if not row.interrupted]
        return sorted(mine, key=lambda row: (-row.priority, row.created_at))

    def take(self, rows: Sequence[Row], owner: str, now: int) -> list[Row]:
        """ready -> running. Returns the Rows after that, without those that others took."""
        running = [claimed(row, owner, now) for row in rows]
        return [new for new, won in zip(running, self.write_all(list(zip(rows, running)))) if won]

    def held_by(self, owner: str, outcomes: Sequence[Outcome] | None = None) -> list[Row]:
        """The running tasks of *owner*; with *outcomes*, at least those which they end."""
        ids = None if outcomes is None else [outcome.id for outcome in outcomes]
        running = self.rows(Query(ids=ids, states=["running"]), 0)
        return [row for row in running if row.owner == owner]

    def cancelled(self, owner: str, ids: Sequence[str]) -> Collection[tuple[str, int]]:
        """The id and claim of each running task of *owner* that was cancelled. *ids* are those
        that it knows of."""
        rows = self.rows(Query(ids=ids, states=["running"]), 0)
        return [(row.id, row.claim) for row in rows if row.removed == 2 and row.owner == owner]

    def open_lanes(self, owner: str) -> None:
        """What *owner* has reserved may be claimed by all."""
        mine = [row for row in self.rows(Query(), 0) if row.lane == owner]
        self.write_all([(row, row._replace(lane="")) for row in mine])

    def expire(self, now: int) -> None:
        """done -> (removed), for those whose time is over."""
        for row in self.rows(Query(states=["done"]), now):
            if row.kept_until is not None and row.kept_until <= now:
                self.write(row, None)

    def next_due(
        self, owner: str, types: Iterable[str], limit: int, now: int, until: int = NEVER
    ) -> list[int]:
        """When waiting tasks that claim() would take can start, the first *limit*, were it not
        for pauses and limits: see upcoming().

        Those that can start now come as some instant of at most *now*.
        """
        waiting = self.rows(Query(types=list(types), states=["waiting"], until=until), now)
        waiting = [row for row in waiting if was_due(row, until)]
        mine = [row for row in waiting if row.lane in ("", owner)]
        return sorted(now if row.state == "ready" else row.ready_at for row in mine)[:limit]

    def foreign(self, types: Iterable[str], now: int) -> list[str]:
        """Task types outside *types* of which a task is due that nobody has reserved."""
        due = {row.task_type for row in self.rows(Query(due=True), now) if not row.lane}
        return sorted(due - set(types))

    def count(self, query: Query, now: int) -> int:
        """How many Rows fit *query*."""
        return len(self.rows(query, now))

    # ---- The verbs

    def add(self, additions: Sequence[tuple[Row, str]], now: int) -> list[Row]:
        """-> waiting, for (row, if_exists) in *additions*: all, or none if one raises.

        after_add() decides what a taken id means. Returns the Rows that stand for the
        additions: new ones, or those kept.
        """
        return self._change(self._add, additions, now)

    def _add(self, additions: Sequence[tuple[Row, str]], now: int) -> list[Row]:
        followers = [new for new, _ in additions if new.after]
        there = self.rows(Query(ids=[new.id for new, _ in additions]), now)
        if followers:
            there += self._parents(followers, now)
        pairs, added = after_adds(there, additions)
        self._put(pairs, now, bool(followers))
        return [row._replace(after=()) for row in added] if followers else added

    def claim(
        self, owner: str, types: Types, limit: float, now: int, until: int = NEVER
    ) -> list[Row]:
        """waiting -> running: take what is due, highest priority first, then oldest.

        *limit* is how much to take: each task uses up `types[task_type]` of it, or 1
        where *types* is not a mapping; the first that does not fit ends the claim.
        Takes only tasks that were due at *until*, by was_due(), and none that others have
        reserved. Each Row returned has its attempt and claim counted up. A task that was
        interrupted is taken alone, and only if *owner* holds no other such task. A row
        that cannot be read or has expired becomes `failed`, or waits for its next slot,
        and is returned so.
        """
        costs = types if isinstance(types, Mapping) else dict.fromkeys(types, 1.0)
        if not costs or limit <= 0:
            return []
        return self._change(self._claim, owner, costs, limit, now, until)

    def _claim(
        self, owner: str, costs: Mapping[str, float], limit: float, now: int, until: int,
        settings: Mapping[str, Setting] | None = None,
    ) -> list[Row]:  # fmt: skip
        settings = self.settings() if settings is None else settings
        places: dict[str, int] = {}
        if settings:
            starts = self._openings(settings, costs, math.ceil(limit), now)
            places = {name: bisect_right(dates, now) for name, dates in starts.items()}
            # A task of a limited type takes a whole worker: none waits behind another there.
            costs = {t: 1.0 if t in places else c for t, c in costs.items() if places.get(t, 1)}
        most = math.ceil(limit / max(min(costs.values(), default=1.0), LEAST_SHARE))
        candidates = self.candidates(owner, costs, most, now, until, places)
        chosen, aside = choose(candidates, costs, limit, now, places)
        if places:
            chosen = self._counted_starts(chosen, places, settings, now)
        taken = self.take(chosen, owner, now) if chosen else []
        if aside:
            after = [set_aside(row, reason, now) for row, reason in aside]
            done = self.write_all([(row, new) for (row, _), (new, _) in zip(aside, after)])
            written = [pair for pair, is_written in zip(after, done) if is_written]
            self._follow([(new.id, "failed") for new, _ in written], now)
            taken += [told for _, told in written]
            self._count("expired", [told for _, told in written if is_late(told)])
        return taken

    def settle(self, owner: str, outcomes: Sequence[Outcome], now: int) -> list[str]:
        """running -> what after_run() says, for each outcome whose claim is still held.

        Returns what led_to() says of each, or "" if its claim was lost: then nothing was
        changed. An outcome "running" is no end: it records the progress of the run.
        """
        return self._change(self._settle, owner, outcomes, now)

    def _settle(self, owner: str, outcomes: Sequence[Outcome], now: int) -> list[str]:
        led, todo = [""] * len(outcomes), list(enumerate(outcomes))
        for _ in range(TRIES):
            rows = self.held_by(owner, [outcome for _, outcome in todo])
            held: dict[str, Row | None] = {row.id: row for row in rows}
            ends: list[tuple[int, Outcome]] = []
            pairs: list[tuple[Row, Row | None]] = []
            for number, outcome in todo:
                row = held.get(outcome.id)
                if row is not None and is_held(row, owner, outcome):
                    held[row.id] = following = checked(after_run, row, outcome, now)
                    led[number] = led_to(row, following, outcome)
                    ends.append((number, outcome))
                    pairs.append((row, following))
            written = self.write_all(pairs)
            told = zip(pairs, ends, written)
            self._follow([(p[0].id, how_ended(*p, end[1])) for p, end, done in told if done], now)
            todo = [end for end, done in zip(ends, written) if not done]
            for number, _ in todo:
                led[number] = ""
            if not todo:
                return led
        raise StoreError(f"{self!r}: others change {todo[0][1].id!r} all the time")

    def turn(
        self, owner: str, outcomes: Sequence[Outcome], types: Mapping[str, float], room: float,
        most: int, now: int, until: int = NEVER, eager: bool = False,
        settings: Mapping[str, Setting] | None = None,
    ) -> Turn:  # fmt: skip
        """What a cluster asks at once: settle *outcomes*, claim for *room*, and the first
        *most* dates of what comes next. Writes only if something ended or is due; *eager*:
        something was added, so that a claim comes first. *settings* count in place of those
        that are stored."""
        room = room if types else 0.0
        if not (outcomes or (eager and room > 0)):
            due = self.upcoming(owner, types, most or 1, now, until, settings)
            if room <= 0 or not due or due[0] > now:
                return Turn([], [], due[:most])

        def work() -> tuple[list[str], list[Row], Mapping[str, Setting]]:
            led = self._settle(owner, outcomes, now) if outcomes else []
            try:
                known = self.settings() if settings is None else settings
                if room <= 0:
                    return led, [], known
                return led, self._claim(owner, types, room, now, until, known), known
            except StoreError:
                if self.atomic or not led:
                    raise
                return led, [], {}  # What is settled counts. The claim is made again.

        led, rows, known = self._change(work)
        limited = [it for it in known if it in types and not known[it].paused] if known else ()
        try:
            # Starts have changed the settings, but not which types have one.
            due = self.upcoming(owner, types, most, now, until, settings, known) if most else []
            return Turn(led, rows, due, limited)
        except StoreError:
            if not (led or rows):
                raise
            return Turn(led, rows, [now], limited)  # What is recorded and claimed counts.

    def renew(self, owner: str, now: int) -> None:
        """Tell observers that *owner* lives; also removes `done` rows that expired."""
        self._change(self._renew, owner, now)

    def _renew(self, owner: str, now: int) -> None:
        self.heartbeat(owner)
        self.expire(now)

    def recover(self, owner: str, seconds: float, now: int) -> list[Row]:
        """running -> what after_interruption() says, for tasks of dead owners.

        A living owner without a heartbeat for LEASE_SECONDS counts as dead. *seconds* is the
        observer's own clock, which runs only while the observer looks: where two calls of
        one observer have the same *seconds*, it has missed something, and its patience
        with all others starts anew. Returns the Rows that ended.
        """
        beats = self.heartbeats()
        beats.pop(owner, None)
        seen: dict[str, _Seen] = self.__dict__.setdefault("_seen", {})  # By observer.
        ended: list[Row] = []
        for other in _dead_owners(beats, seen.setdefault(owner, {}), seconds):
            ended += self._change(self._recover, other, beats[other], now)
        return ended

    def _recover(self, other: str, beat: Any, now: int) -> list[Row]:
        # Looked at again in the transaction, as a heartbeat may have come in between.
        if self.heartbeats().get(other) != beat:
            return []
        self._count("interrupted", map(readable, self.held_by(other)))
        return self._release(other, after_interruption, now)

    def leave(self, owner: str, now: int) -> None:
        """Requeue, uncharged, all that *owner* still holds, and forget it."""
        self.__dict__.get("_seen", {}).pop(owner, None)
        self._change(self._release, owner, requeued, now)

    def _release(
        self, owner: str, policy: Callable[[Row, int], Row | None], now: int
    ) -> list[Row]:
        """Have *policy* say what follows all that *owner* holds. Returns the Rows that ended."""
        pairs = [(row, checked(policy, row, now)) for row in self.held_by(owner)]
        self._put(pairs, now)
        self.open_lanes(owner)
        self.forget(owner)
        # The same incarnation, of which no run is owed any more.
        stays = [new for row, new in pairs if new and new.created_at == row.created_at]
        return [readable(row) for row in stays if not row.interrupted]

    def put_off(self, now: int) -> None:
        """ready -> scheduled, for what is due later."""
        if self.early(now):  # Read without the write lock first: hardly ever are there any.
            self._change(lambda: self._put([(r, released(r, now)) for r in self.early(now)], now))

    def find(self, query: Query, now: int) -> list[Row]:
        """The Rows that fit *query*, oldest first; harmless values where one cannot be read."""
        return [readable(row) for row in self.rows(query, now)]

    def remove(self, query: Query, now: int) -> int:
        """-> (removed). A running task is marked: after its run nothing follows."""
        return self._change(self._remove, query, now, 1)

    def cancel(self, task_id: str, now: int) -> bool:
        """-> (removed), if it is there. A running task is marked, and its owner, who looks by
        cancelled(), is to end the run."""
        return self._change(self._remove, Query(ids=[task_id]), now, 2) > 0

    def _remove(self, query: Query, now: int, mark: int) -> int:
        rows = self.rows(query, now)
        self._put([(row, after_remove(row, mark)) for row in rows], now)
        return len(rows)

    def retry(self, query: Query, now: int) -> int:
        """failed -> waiting, with a fresh set of attempts. Returns how many."""
        if query.states is not None and "failed" not in query.states:
            return 0

        def work() -> int:
            rows = self.rows(query._replace(states=["failed"]), now)
            held = self.followers([row.id for row in rows])
            self._put([(row, after_retry(row, now, row.id in held)) for row in rows], now)
            return len(rows)

        return self._change(work)

    def align(self, declared: Mapping[str, Row | None], now: int) -> None:
        """Have the schedules of declared tasks follow the code: {id: as it is declared, or
        None}, as after_declaration() says."""

        def pairs() -> list[_Pair]:
            followed = [(row, after_declaration(row, declared[row.id], now)) for row in there()]
            return [(old, new) for old, new in followed if old != new]

        def there() -> list[Row]:
            return self.rows(Query(ids=list(declared)), now)

        ended = "failed", "done"
        stays = {row.id for row in there() if row.state not in ended and row.removed != 2}
        fresh = [(new, "keep") for new in declared.values() if new and new.id not in stays]
        if fresh:
            self.add(fresh, now)
        if pairs():  # Most starts change nothing, and write nothing.
            self._change(lambda: self._put(pairs(), now))

    def update(self, task_id: str, changes: Mapping[str, Any], now: int) -> Row:
        """waiting -> waiting with *changes* to its columns, as after_update() says. `after`
        among them adds bonds; () drops all."""

        def work() -> Row:
            old = next(iter(self.rows(Query(ids=[task_id]), now)), None)
            new = after_update(old, task_id, changes, now)
            new = bound(new, {row.id: row for row in self._parents([new], now)})
            self._put([(old, new)], now, binds=True)
            return new._replace(after=())

        return self._change(work)


_Place = tuple[str, str]  # (lane, task_type)
_RankedRow = tuple[int, int, int, Row]  # (-priority, created_at, insertion, row)
_DatedRow = tuple[int, int, Row]  # (instant, insertion, row)
_ROW_OF = operator.itemgetter(3)


def _ranked(number: int, row: Row) -> _RankedRow:
    return -row.priority, row.created_at, number, row


class _Line:
    """The ready tasks of one lane and type.

    Most come in the order in which they will start: a queue holds those, in two thirds of
    a heap's time and with nothing for the garbage collector. The others are in a heap.
    """

    __slots__ = ("heap", "numbers", "queue")

    def __init__(self) -> None:
        self.queue: collections.deque[Row] = collections.deque()
        self.numbers: collections.deque[int] = collections.deque()  # Of the rows in it.
        self.heap: list[_RankedRow] = []

    def push(self, number: int, row: Row) -> None:
        last, behind = (self.queue[-1], self.numbers[-1]) if self.queue else (row, -1)
        if row.priority <= last.priority and row.created_at >= last.created_at and number > behind:
            self.queue.append(row)
            self.numbers.append(number)
        else:
            heapq.heappush(self.heap, _ranked(number, row))

    def take(self, rows: Mapping[str, Row]) -> Iterator[_RankedRow]:
        """The entries that are alive, in order. Who asks for another has taken the last."""
        queue, numbers, heap = self.queue, self.numbers, self.heap
        while queue or heap:
            if heap and not (queue and _ranked(numbers[0], queue[0]) < heap[0]):
                if rows.get(heap[0][3].id) is heap[0][3]:
                    yield heap[0]
                heapq.heappop(heap)
                continue
            row = queue[0]
            if rows.get(row.id) is row:
                yield _ranked(numbers[0], row)
            queue.popleft()
            numbers.popleft()


class MemoryStore(Store):
    """Tasks in this process only: for each lane and type a line of those that are ready,
    and a heap of those that are scheduled.

    An entry of these is alive while its Row is the one in `_rows`. Changed and removed
    tasks leave dead entries, which are skipped, and swept when they outnumber the rest.
    """

    in_memory = has_bonds = has_settings = True

    def __init__(self) -> None:
        self._settings: dict[str, Setting] = {}
        self._gates: dict[str, Setting] = {}  # Of the types that are paused or limited.
        self._reset_after_fork()
        _reset_in_forks[id(self)] = self

    def _reset_after_fork(self) -> None:
        """A forked child starts empty: the tasks belong to its parent."""
        self._lock = threading.RLock()  # Protects all below; held for a moment only.
        # The ids of what runs of each type that is limited, and of some that has ended.
        self._claimed: dict[str, set[str]] = {}
        self._rows: dict[str, Row] = {}
        self._arrived: collections.deque[Row] = collections.deque()  # Not in lines yet.
        self._insertions = itertools.count()
        # {parent: {child: Bond}}, and {child: {parent: Bond}}.
        self._children: dict[str, dict[str, Bond]] = collections.defaultdict(dict)
        self._bonds: dict[str, dict[str, Bond]] = collections.defaultdict(dict)
        self._clear_lines()

    def _clear_lines(self) -> None:
        self._ready: dict[_Place, _Line] = collections.defaultdict(_Line)
        # By place those that are scheduled; under None those that expire.
        self._dated: dict[_Place | None, list[_DatedRow]] = collections.defaultdict(list)
        self._held_numbers: dict[str, int] = {}  # Of insertion, by id: a place among equals.
        self._dead_entries = 0

    def transaction(self) -> contextlib.AbstractContextManager[Any]:
        return self._lock

    def rows(self, query: Query, now: int) -> list[Row]:
        with self._lock:
            if query.ids is None:
                rows = list(self._rows.values())
            else:
                rows = [self._rows[i] for i in dict.fromkeys(query.ids) if i in self._rows]
        found = sorted((r for r in rows if fits(r, query, now)), key=lambda row: row.created_at)
        return found[query.offset :][: query.limit]

    def count(self, query: Query, now: int) -> int:
        return len(self._rows) if query == Query() else super().count(query, now)

    def write(self, old: Row | None, new: Row | None) -> bool:
        if self._arrived:
            self._take_in()
        if old is None:
            if new is None or self._rows.setdefault(new.id, new) is not new:
                return False
        elif self._rows.get(old.id) != old:
            return False
        elif new is None:
            del self._rows[old.id]
            self._held_numbers.pop(old.id, None)
        else:
            self._rows[old.id] = new
        if new is not None:
            self._enter(new)
        if old is not None and old.state != "running":
            self._dead_entries += 1
            if self._dead_entries > 1000 + len(self._rows):
                self._clear_lines()
                for row in list(self._rows.values()):
                    self._enter(row)
        return True

    def bonds(self, parents: _Ids = None, children: _Ids = None) -> list[Bond]:
        sides, ids = (self._bonds, children) if parents is None else (self._children, parents)
        with self._lock:
            return [bond for i in ids or () for bond in sides.get(i, {}).values()]

    def followers(self, ids: Collection[str] | None = None) -> set[str]:
        with self._lock:
            return self._bonds.keys() & (itertools.islice(self._bonds, 1) if ids is None else ids)

    def bind(self, add: Sequence[Bond], drop: Sequence[Bond]) -> None:
        for bond in drop:
            for sides, one, other in self._sides(bond):
                del sides[one][other]
                if not sides[one]:
                    del sides[one]
        for bond in add:
            for sides, one, other in self._sides(bond):
                if not bond.anyway or other not in sides[one]:
                    sides[one][other] = bond

    def _sides(self, bond: Bond) -> Sequence[tuple[dict[str, dict[str, Bond]], str, str]]:
        return (self._children, *bond[:2]), (self._bonds, bond.child, bond.parent)

    def add(self, additions: Sequence[tuple[Row, str]], now: int) -> list[Row]:
        if len(additions) == 1 and not additions[0][0].after:
            # Without the lock, for which a producer would wait as long as a claim takes.
            new = additions[0][0]
            try:
                if self._rows.setdefault(new.id, new) is new:
                    self._arrived.append(new)
                    return [new]
            except BaseException:  # Ctrl-C in between: it would wait for ever.
                if self._rows.get(new.id) is new:
                    del self._rows[new.id]
                raise
        return super().add(additions, now)

    def _take_in(self) -> None:
        """Move what arrived into the lines."""
        while self._arrived:
            self._enter(self._arrived.popleft())

    def _enter(self, row: Row) -> None:
        place, number = (row.lane, row.task_type), next(self._insertions)
        if self._held_numbers:
            number = self._held_numbers.pop(row.id, number)
        if row.state == "held":
            self._held_numbers[row.id] = number
        elif row.state == "ready":
            self._ready[place].push(number, row)
        elif row.state == "scheduled":
            heapq.heappush(self._dated[place], (row.ready_at, number, row))
        elif row.kept_until is not None:
            heapq.heappush(self._dated[None], (row.kept_until, number, row))

    def _is_alive(self, row: Row) -> bool:
        return self._rows.get(row.id) is row

    def _come(self, place: _Place | None, now: int) -> Iterator[tuple[int, Row]]:
        """Take from a heap what its instant has come for, with its numbers of insertion."""
        heap = self._dated.get(place)
        while heap:
            instant, number, row = heap[0]
            is_alive = self._is_alive(row)
            if is_alive and instant > now:
                return
            heapq.heappop(heap)
            if is_alive:
                yield number, row

    def settings(self, all_types: bool = False) -> Mapping[str, Setting]:
        return self._settings if all_types else self._gates

    def change_setting(self, task_type: str, changes: Mapping[str, Any]) -> None:
        setting = self._settings.get(task_type, Setting())._replace(**changes)
        # Never changed in place: others may be reading them.
        self._settings = {**self._settings, task_type: setting}
        if is_gate(setting) or task_type in self._gates:
            self._gates = {name: it for name, it in self._settings.items() if is_gate(it)}
        if "at_once" in changes:
            self._claimed.pop(task_type, None)

    def running(self, types: Collection[str]) -> Mapping[str, int]:
        for name in types:
            ids = list(self._claimed.get(name, self._rows))  # All, at first.
            rows = [self._rows[task_id] for task_id in ids if task_id in self._rows]
            run = {row.id for row in rows if row.state == "running" and row.task_type == name}
            self._claimed[name] = run
        return {name: len(self._claimed[name]) for name in types}

    def _lines(self, owner: str, types: Iterable[str], now: int) -> list[_Line]:
        """The lines of ready tasks, after what arrived and what became due moved there."""
        if self._arrived:
            self._take_in()
        places = [place for name in types for place in {("", name), (owner, name)}]
        for place in places:
            if place in self._dated:
                for number, row in itertools.islice(self._come(place, now), PROMOTE_TASKS):
                    self._rows[row.id] = row = row._replace(state="ready")
                    self._ready[place].push(number, row)
        return [self._ready[place] for place in places if place in self._ready]

    def candidates(
        self, owner: str, types: Iterable[str], most: int, now: int, until: int,
        places: Mapping[str, int],
    ) -> Iterable[Row]:  # fmt: skip
        free = [name for name in types if name not in places] if places else types
        lines = self._takings(owner, free, now)
        for name in places.keys() & types if places else ():
            own: Iterator[_RankedRow] = heapq.merge(*self._takings(owner, [name], now))
            # Who is asked for the next one has taken the last: only while there are places.
            lines.append(itertools.takewhile(lambda entry: places[entry[3].task_type] > 0, own))
        ranked = lines[0] if len(lines) == 1 else heapq.merge(*lines)
        return map(_ROW_OF, ranked if until == NEVER else self._due_by(until, ranked))

    def _takings(self, owner: str, types: Iterable[str], now: int) -> list[Iterator[_RankedRow]]:
        return [line.take(self._rows) for line in self._lines(owner, types, now)]

    def _due_by(self, until: int, ranked: Iterable[_RankedRow]) -> Iterator[_RankedRow]:
        later: list[tuple[int, Row]] = []
        try:
            for entry in ranked:
                if was_due(entry[3], until):
                    yield entry
                else:
                    later.append(entry[2:])
        finally:
            for number, row in later:
                self._ready[row.lane, row.task_type].push(number, row)

    def take(self, rows: Sequence[Row], owner: str, now: int) -> list[Row]:
        running = [claimed(row, owner, now) for row in rows]  # Their entries are gone.
        for row in running:
            self._rows[row.id] = row
        for name, ids in self._claimed.items():
            ids.update(row.id for row in running if row.task_type == name)
        return running

    def _settle(self, owner: str, outcomes: Sequence[Outcome], now: int) -> list[str]:
        if self._bonds:
            return super()._settle(owner, outcomes, now)
        # In half of the kernel's time: nobody else can change a row meanwhile.
        led: list[str] = []
        for outcome in outcomes:
            row = self._rows.get(outcome.id)
            if row is None or not is_held(row, owner, outcome):
                led.append("")
                continue
            following = after_run(row, outcome, now)
            is_over = following is None and outcome.state == "done"  # As for most.
            led.append("done" if is_over else led_to(row, following, outcome))
            if following is None:
                del self._rows[row.id]
            else:
                self.write(row, following)
        return led

    def expire(self, now: int) -> None:
        for _, row in self._come(None, now):
            del self._rows[row.id]

    def next_due(
        self, owner: str, types: Iterable[str], limit: int, now: int, until: int = NEVER
    ) -> list[int]:
        due: list[int] = []
        if not self._rows:
            return due
        with self._lock:
            for line in self._lines(owner, types := list(types), now):
                next(line.take(self._rows), None)  # Drops the dead before it.
                rows = itertools.chain(line.queue, (row for *_, row in line.heap))
                ready = (now for row in rows if self._is_alive(row) and was_due(row, until))
                due.extend(itertools.islice(ready, limit - len(due)))
            for place in itertools.product(("", owner), types):
                dated = self._dated.get(place, ())
                dates = (at for at, _, row in dated if was_due(row, until) and self._is_alive(row))
                # The first, and all that a timer needs. Those due later may stand before it.
                first = next(dates, None) if until == NEVER else min(dates, default=None)
                due += () if first is None else (first,)
        return sorted(due)[:limit]


# SQL, in the order of a task's life. Nothing newer than SQLite 3.31. Table names carry
# our name, as the file may be your application's own.

_LIST = ", ".join(_COLUMNS)
_IGNORED = "SQLite ignored the change; does the table have a trigger?"

SCHEMA_VERSION = 6  # Counts changes of what follows; see _make_schema.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS taskpool_task (
    seq INTEGER PRIMARY KEY,  -- Grows in the order of insertion.
    id TEXT NOT NULL UNIQUE, task_type TEXT NOT NULL, data TEXT NOT NULL,
    priority INTEGER NOT NULL, created_at INTEGER NOT NULL,
    due_at INTEGER NOT NULL, ready_at INTEGER NOT NULL,
    retries INTEGER NOT NULL, retry_delay REAL NOT NULL, timeout REAL,
    keep_result REAL, lane TEXT NOT NULL, state TEXT NOT NULL, expires REAL,
    attempt INTEGER NOT NULL, claim INTEGER NOT NULL, owner TEXT NOT NULL,
    interrupted INTEGER NOT NULL, result TEXT, error TEXT,
    started_at INTEGER, ended_at INTEGER, kept_until INTEGER,
    removed INTEGER NOT NULL, successor TEXT, repeat TEXT, progress TEXT);
-- For _READY, _STARTABLE, _OPEN_LANE: what can be claimed, in order.
CREATE INDEX IF NOT EXISTS taskpool_ready
ON taskpool_task (lane, task_type, priority DESC, created_at) WHERE state = 'ready';
-- For _PROMOTE and _NEXT_DUE: rows that are not due are never in the way of others.
CREATE INDEX IF NOT EXISTS taskpool_scheduled
ON taskpool_task (lane, task_type, ready_at, due_at) WHERE state = 'scheduled';
-- For _HELD_BY, _OWNERS, _READY, _RUNNING, _CANCELLED_BY.
CREATE INDEX IF NOT EXISTS taskpool_running
ON taskpool_task (owner, interrupted, task_type, removed) WHERE state = 'running';
-- For _EXPIRE, _OPEN_LANE and who looks for them: rows that are held, failed or done (all are
-- < 'r'). One index, as each is a cost for every other row.
CREATE INDEX IF NOT EXISTS taskpool_aside ON taskpool_task (
    state, CAST(coalesce(kept_until, ended_at, due_at) AS INTEGER), seq, task_type, lane)
WHERE state < 'r';
-- For _SCHEDULES.
CREATE INDEX IF NOT EXISTS taskpool_repeating
ON taskpool_task (ready_at) WHERE repeat IS NOT NULL;
-- Whom held tasks wait for, and those that failed before they could start. By their ids.
CREATE TABLE IF NOT EXISTS taskpool_after (
    parent TEXT NOT NULL, child TEXT NOT NULL, anyway INTEGER NOT NULL,
    PRIMARY KEY (parent, child)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS taskpool_after_child ON taskpool_after (child);
CREATE TABLE IF NOT EXISTS taskpool_master (owner TEXT PRIMARY KEY, beat INTEGER NOT NULL);
-- What is set for task types, and how their runs ended: see Setting.
CREATE TABLE IF NOT EXISTS taskpool_type (
    task_type TEXT PRIMARY KEY, paused INTEGER NOT NULL DEFAULT 0, at_once INTEGER,
    starts INTEGER, period INTEGER, next_at INTEGER NOT NULL DEFAULT 0, counts TEXT);
-- For _GATES: empty, if nothing is paused or limited.
CREATE INDEX IF NOT EXISTS taskpool_gates ON taskpool_type (task_type)
WHERE paused OR at_once IS NOT NULL OR starts IS NOT NULL;
CREATE TABLE IF NOT EXISTS taskpool_version (version INTEGER NOT NULL)
"""

# From each older version that is still read, the statements that lead to the next one.
_UPGRADES: dict[int, tuple[str, ...]] = {}
_TABLES = "SELECT name FROM sqlite_master WHERE name IN ('taskpool_task', 'taskpool_version')"
_VERSION = "SELECT max(version) FROM taskpool_version"
_FILES = "PRAGMA database_list"  # Rows of number, name, file.
# Changes nothing, but takes the write lock and waits for it. A transaction that reads first
# would fail at once if another process wrote before the first write.
_LOCK = "PRAGMA main.incremental_vacuum(1)"
# SQLite waits for other writers only before the first read of a transaction.
_BUSY_SNAPSHOT = 517  # SQLite's code.
_HAS_READ = (
    "SQLite does not wait for other writers where your transaction has read before it writes; "
    "roll back and begin with BEGIN IMMEDIATE (Django: transaction_mode; SQLAlchemy: an event; "
    "see README, In your own transaction), add the task before you read, or give the queue a "
    "file of its own"
)

_BONDS_OF = """
SELECT bond.parent, child, anyway FROM json_each(?) AS given
CROSS JOIN taskpool_after AS bond ON bond.{} = given.value
""".format
_FOLLOWER = "SELECT child FROM taskpool_after LIMIT 1"
_FOLLOWERS = """
SELECT value FROM json_each(?) WHERE EXISTS (SELECT 1 FROM taskpool_after WHERE child = value)
"""
_BIND = """
INSERT INTO taskpool_after VALUES (?, ?, ?)
ON CONFLICT (parent, child) DO UPDATE SET anyway = min(anyway, excluded.anyway)
"""
_UNBIND = "DELETE FROM taskpool_after WHERE parent = ? AND child = ?"

# -> waiting, without a history but for claim: one task, and ten. _addition() gives the values.
# `expires` comes by a second statement: few have it, and here it costs a twentieth more.
_EXPIRES = _COLUMNS.index("expires")
_GIVEN = *_COLUMNS[:_EXPIRES], "claim", "repeat"
_FIRST = f"({'?, ' * len(_GIVEN)}0, '', 0, 0)"
_INTO = f"INSERT INTO taskpool_task ({', '.join(_GIVEN)}, attempt, owner, interrupted, removed)"
_ADD, _ADD_TEN = (f"{_INTO} VALUES {', '.join([_FIRST] * count)}" for count in (1, 10))
_ERASE = "DELETE FROM taskpool_task WHERE id = ?"
# Any state -> any other: writes what differs, so that nothing else is touched.
_WRITE = "UPDATE taskpool_task SET {} WHERE id = ?"

# The lanes and task types that a cluster may claim of. (CROSS JOIN: SQLite keeps the order.
# UNION without ALL would take twice the time: it makes a table to find equal lanes.)
_PLACES = """
(SELECT '' AS place_lane UNION ALL SELECT :owner WHERE :owner > '')
CROSS JOIN (SELECT value AS place_type FROM json_each(:types))
"""
# The condition of taskpool_aside, without which no query uses it, and its second column: when
# a task has ended, or is to go.
_ASIDE = "state < 'r'"
_OVER_AT = "CAST(coalesce(kept_until, ended_at, due_at) AS INTEGER)"
_LINE = "state = '{}' AND lane = place_lane AND task_type = place_type".format
_DUE = f"SELECT seq FROM {_PLACES} CROSS JOIN taskpool_task WHERE {_LINE('scheduled')}"
# scheduled -> ready. A ready_at that is no instant counts as due, so that the claim finds
# the row unusable. (SQLite sorts text behind all numbers.)
_PROMOTE = f"""
UPDATE taskpool_task SET state = 'ready' WHERE seq IN (
    {_DUE} AND ready_at <= :now UNION ALL {_DUE} AND ready_at > {_YEARS[1]} LIMIT {PROMOTE_TASKS})
"""
# The first in each line, in the shape of _READY: seq, NULL, type, lane, priority, created_at.
_HEADS = f"""
SELECT seq, NULL, place_type, place_lane, priority, created_at
FROM {_PLACES} CROSS JOIN taskpool_task ON seq = (
    SELECT seq FROM taskpool_task WHERE {_LINE('ready')}
    ORDER BY priority DESC, created_at, seq LIMIT 1)
"""
# was_due(). A date that is none counts as due, so that the claim finds the row unusable.
_WAS_DUE = f"""
(due_at <= :until OR typeof(due_at) <> 'integer')
AND (ready_at <= :until OR ready_at > {_YEARS[1]} OR ended_at IS NOT NULL)
"""
# What claim() would take of one lane and type, best first. No suspects while :owner has one.
_READY = f"""
SELECT seq, {_LIST} FROM taskpool_task
WHERE state = 'ready' AND lane = :lane AND task_type = :type AND {_WAS_DUE}
AND (interrupted = 0 OR NOT EXISTS (
    SELECT 1 FROM taskpool_task WHERE state = 'running' AND owner = :owner AND interrupted > 0))
ORDER BY priority DESC, created_at, seq LIMIT :most
"""
# ready -> running
_CLAIM = """
UPDATE taskpool_task
SET state = 'running', owner = ?, ready_at = ?, claim = claim + 1, attempt = attempt + 1
WHERE state = 'ready' AND seq IN (SELECT value FROM json_each(?))
"""
_NEXT_DUE = f"""
SELECT * FROM (
    SELECT :now FROM {_PLACES} CROSS JOIN taskpool_task
    WHERE {_LINE('ready')} AND {_WAS_DUE} LIMIT :limit)
UNION ALL SELECT ready_at FROM {_PLACES} CROSS JOIN taskpool_task ON seq IN (
    SELECT seq FROM taskpool_task
    WHERE {_LINE('scheduled')} AND {_WAS_DUE} ORDER BY ready_at LIMIT :limit)
"""

# True only for the claim that the caller was given: an ended claim is not 'running', and
# a later one has another number. (+: not by the index on owner, who may hold hundreds.)
_HELD = "claim = ? AND +owner = ? AND state = 'running'"
# running -> (removed), the common end of a run.
_FINISH = f"""
DELETE FROM taskpool_task
WHERE id = ? AND {_HELD} AND successor IS NULL AND repeat IS NULL
"""
_HELD_ROW = f"SELECT {_LIST} FROM taskpool_task WHERE id = ? AND {_HELD}"
# The name of an owner may be text that is not UTF-8: we know it as bytes.
_OWNER = "(:owner, CAST(:owner AS TEXT))"
_HELD_BY = f"SELECT {_LIST} FROM taskpool_task WHERE state = 'running' AND owner IN {_OWNER}"
_CANCELLED_BY = """
SELECT id, claim FROM taskpool_task WHERE state = 'running' AND owner = ? AND removed = 2
"""

# From a random number: an owner that was given up and comes back shows another beat.
_HEARTBEAT = """
INSERT INTO taskpool_master (owner, beat) VALUES (?, random() & 0xffffffff)
ON CONFLICT (owner) DO UPDATE SET beat = beat + 1
"""
_SETTINGS = f"SELECT task_type, {', '.join(Setting._fields)} FROM taskpool_type"
_GATES = f"{_SETTINGS} WHERE paused OR at_once IS NOT NULL OR starts IS NOT NULL"
_SET = """
INSERT INTO taskpool_type (task_type, {0}) VALUES (:task_type, :{0})
ON CONFLICT (task_type) DO UPDATE SET {0} = :{0}
"""
_RUNNING = "SELECT task_type FROM taskpool_task WHERE state = 'running'"
_LEAVE = f"DELETE FROM taskpool_master WHERE owner IN {_OWNER}"
_MASTERS = "SELECT owner FROM taskpool_master"


def _values(column: str, where: str) -> str:
    """Two tables, ready(v) and scheduled(v), of the distinct values that *column* has in rows
    of that state: one index lookup for each value."""
    tables = []
    for state in ("ready", "scheduled"):
        least = f"SELECT min({column}) FROM taskpool_task WHERE state = '{state}' AND {where}"
        after = f"SELECT ({least} AND {column} > v) FROM {state} WHERE v IS NOT NULL"
        tables.append(f"{state}(v) AS ({least} UNION ALL {after})")
    return f"WITH RECURSIVE {', '.join(tables)}"


# An owner of a claim or a lane without a heartbeat counts as silent: it may have died before
# its first heartbeat, or have added to its lane while it left.
_OWNERS = f"""
{_values("lane", "lane > ''")}
SELECT owner, beat FROM taskpool_master
UNION SELECT owner, -1 FROM (
    SELECT owner FROM taskpool_task WHERE state = 'running'
    UNION SELECT v FROM ready UNION SELECT v FROM scheduled)
WHERE owner IS NOT NULL AND owner NOT IN (SELECT owner FROM taskpool_master)
"""
_OPEN_LANE = f"""
UPDATE taskpool_task SET lane = '' WHERE (state = 'ready' AND lane > '' AND lane IN {_OWNER})
OR (state = 'scheduled' AND lane > '' AND lane IN {_OWNER})
OR ({_ASIDE} AND state = 'held' AND lane > '' AND lane IN {_OWNER})
"""
_EXPIRE = f"""
DELETE FROM taskpool_task
WHERE {_ASIDE} AND state = 'done' AND {_OVER_AT} <= :now AND kept_until <= :now
"""

# The task types for all of which a task can start now.
_STARTABLE = f"""
{_values("task_type", "lane = ''")}
SELECT v FROM ready WHERE v IS NOT NULL
UNION SELECT v FROM scheduled WHERE v IS NOT NULL AND
    (SELECT min(ready_at) FROM taskpool_task
     WHERE state = 'scheduled' AND lane = '' AND task_type = v) <= ?
"""

# One line per type, of all tasks. A requeued one has ready_at 0: it waits since its due date.
_SUMMARY = """
SELECT task_type, sum(state IN ('ready', 'scheduled', 'held')), sum(due), sum(state = 'running'),
    sum(state = 'failed'), sum(state = 'done'),
    max(0.0, (:now - min(CASE WHEN due THEN since END)) / 1e6),
    min(CASE WHEN state = 'scheduled' AND NOT due THEN since END), sum(state = 'held')
FROM (SELECT task_type, state, CAST(max(created_at, due_at, ready_at) AS INTEGER) AS since,
    state = 'ready' OR (state = 'scheduled' AND ready_at <= :now) AS due FROM taskpool_task)
GROUP BY task_type ORDER BY task_type
"""

# What a clock that was ahead has made ready.
_EARLY = f"""
SELECT {_LIST} FROM taskpool_task
WHERE state = 'ready' AND ready_at > ? AND typeof(ready_at) = 'integer'
"""

# For lists. What failed is in the order of an index; `seq` is the order of the table itself,
# and +seq that of no index, for where another one finds the few rows.
_NEWEST = """
SELECT {0}, seq, {1} FROM taskpool_task WHERE {2} ORDER BY {0} DESC, seq DESC LIMIT ?
""".format
_OLDER = " AND {0} <= ? AND ({0}, seq) < (?, ?)".format
_SCHEDULES = f"""
SELECT {_LIST} FROM taskpool_task WHERE repeat IS NOT NULL ORDER BY ready_at LIMIT ?
"""

# waiting, failed, done -> (removed); a running task is marked.
_REMOVE = "DELETE FROM taskpool_task WHERE state <> 'running'"
_MARK = """
UPDATE taskpool_task SET removed = max(removed, 1), successor = NULL WHERE state = 'running'
"""
_REMOVED = "SELECT id FROM taskpool_task WHERE state NOT IN ('running', 'done')"


_Database = Union[sqlite3.Connection, sqlite3.Cursor]


def _text_or_bytes(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _rank(candidate: Sequence[Any]) -> tuple[int, int, int]:
    """The order of claims, for a result of _READY."""
    seq, _, _, _, priority, created_at = candidate[:6]
    if type(priority) is not int or type(created_at) is not int:
        return -NEVER, 0, seq  # It cannot be run: see _unusable.
    return -priority, created_at, seq


def _reads_bytes(db: sqlite3.Connection, error: BaseException) -> bool:
    """Whether *error* came of text that is not UTF-8: *db* gives such text as bytes from now
    on, so that a second try succeeds. Not at once, as it is slower."""
    if "decode" not in str(error) or db.text_factory is not str:
        return False
    db.text_factory = _text_or_bytes
    return True


@lru_cache(maxsize=100)
def _json_list(texts: tuple[str, ...]) -> str:
    return json.dumps(texts)


def _readable_setting(columns: Sequence[Any]) -> Setting:
    """A stored Setting; what is no whole number over 0 counts as not set."""
    *numbers, counts = columns
    pairs = zip(numbers, Setting._field_defaults.values())
    usable = [n if type(n) is int and 0 < n <= MAX_INT else usual for n, usual in pairs]
    setting = Setting._make([*usable, counts])
    return setting if setting.period else setting._replace(starts=None)


@lru_cache(maxsize=100)
def _read_settings(lines: tuple[Sequence[Any], ...]) -> Mapping[str, Setting]:
    return {str(name): _readable_setting(columns) for name, *columns in lines}


@lru_cache(maxsize=1000)
def _write_of(names: Sequence[str]) -> str:
    changes = [f"{name} = ?" for name in names]
    if "created_at" in names:  # Another task: behind those that are there.
        changes.append("seq = (SELECT max(seq) + 1 FROM taskpool_task)")
    return _WRITE.format(", ".join(changes))


def _stored_row(columns: Sequence[Any]) -> Row:
    return tuple.__new__(Row, (*columns, 0, ()))  # A fifth of the time of Row(*columns).


def _where(query: Query, now: int) -> tuple[str, list[Any]]:
    """The condition of *query* in SQL, and its values."""
    states, first = _stored_states(query), "1" if query.held is None else "state <> 'held'"
    one = ["held"] if query.held else list(states or ())
    if one in (["held"], ["failed"], ["running"]):  # By an index. (+: ids lead to the rows.)
        first = f"{'+' * (query.ids is not None)}state = '{one[0]}'"
        first += f" AND {_ASIDE}" if one[0] < "r" else ""
    lists = {
        "id": query.ids, "task_type": query.types, "state": states,
        "created_at": query.created_at,
    }  # fmt: skip
    terms: dict[str, list[Any]] = {
        f"{column} IN (SELECT value FROM json_each(?))": [json.dumps(list(allowed))]
        for column, allowed in lists.items()
        if allowed is not None
    }
    if query.due is not None:
        is_open = "task_type NOT IN (SELECT value FROM json_each(?))"
        is_due = "(state = 'ready' OR (state = 'scheduled' AND ready_at <= ?))"
        could_run = f"({is_due} AND {is_open}) = {int(query.due)}"
        terms[f"state IN {_WAITING} AND {could_run}"] = [now, json.dumps(list(query.paused))]
    if query.until != NEVER:
        terms["due_at <= ?"] = [query.until]
    return " AND ".join([first, *terms]), [*itertools.chain(*terms.values())]


def _texts(ids: Iterable[Any]) -> str:
    """The ids as JSON, but for those that cannot be read: nobody follows these."""
    return json.dumps([task_id for task_id in ids if type(task_id) is str])


def _addition(row: Row) -> tuple[Any, ...]:
    return (*row[:_EXPIRES], row.claim, row.repeat)


def _version_of(db: _Database, path: str) -> int | None:
    """The version of our tables, None if there are none. Raises StoreError if newer, or
    so old that nothing leads from it to ours."""
    tables = {name for (name,) in db.execute(_TABLES)}
    if "taskpool_task" not in tables:
        return None
    found = "taskpool_version" in tables and db.execute(_VERSION).fetchone()[0]
    version = int(found or 0)
    if version != SCHEMA_VERSION and version not in _UPGRADES:
        age = "a newer" if version > SCHEMA_VERSION else "an unreleased"
        raise StoreError(
            f"{path}: made by {age} taskpool (schema {version}; this is {__version__}, "
            f"schema {SCHEMA_VERSION}): update your taskpool.py, or give another file"
        )
    return version


def _make_schema(db: _Database, path: str) -> None:
    """Make the tables, or bring those of an older version up to date: in a transaction."""
    version = _version_of(db, path)  # Again: another process may have been quicker.
    steps = [_UPGRADES[older] for older in range(version or SCHEMA_VERSION, SCHEMA_VERSION)]
    for statement in itertools.chain(*steps, _SCHEMA.split(";")):
        db.execute(statement)
    db.execute("DELETE FROM taskpool_version")
    db.execute("INSERT INTO taskpool_version VALUES (?)", (SCHEMA_VERSION,))


def _write_in_a_write(path: str) -> StoreError:
    return StoreError(
        f"{path}: a signal handler, or a finalizer, wrote in the midst of a write of the same "
        "thread; have another thread do it"
    )


def _make_file(db: _Database, path: str, making: set[int]) -> None:
    """_make_schema() in a transaction of its own. *making* are the threads that are here."""
    thread = threading.get_ident()
    if thread in making:  # It would wait for itself.
        raise _write_in_a_write(path)
    making.add(thread)
    try:
        db.execute("BEGIN IMMEDIATE")
        _make_schema(db, path)
        db.execute("COMMIT")
    finally:
        making.discard(thread)


def _use_wal(db: _Database) -> str:
    """Returns the journal mode, "" if the file can only be read."""
    # The switch needs the file for itself and fails at once, whatever the timeout.
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
            return str(mode)
        except sqlite3.OperationalError as error:
            if "readonly" in str(error):
                return ""  # A write will say what is wrong.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def _file_fault(path: str) -> str:
    """What is wrong with a file, where SQLite knows only that it cannot use it.

    Never opens the file: closing it again would drop SQLite's locks on it.
    """
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))  # Fails if too many files are open.
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # Fails if the name is too long.
    except OSError as error:
        return str(error.strerror)
    real = os.path.realpath(path)
    name, folder = "it" if real == path else real, os.path.dirname(real)
    exists, is_special = os.path.exists(real), os.path.exists(real) and not os.path.isfile(real)
    flags = os.statvfs(folder).f_flag if os.path.isdir(folder) and hasattr(os, "statvfs") else 0
    why = " (a read-only file system)" if flags & getattr(os, "ST_RDONLY", 0) else ""
    faults = {
        f"the folder {folder} does not exist": not os.path.isdir(folder),
        f"{name} is a folder; give the name of a file": os.path.isdir(real),
        f"{name} is a device, pipe or socket; give the name of a file": is_special,
        f"{name} is not readable{why}": exists and not os.access(real, os.R_OK),
        f"{name} is not writable{why}": exists and not os.access(real, os.W_OK),
        f"the folder {folder} is not writable{why}": not os.access(folder, os.W_OK | os.X_OK),
    }
    return next((text for text, is_so in faults.items() if is_so), "")


def _view_of(path: str) -> str:
    """The URI with which SQLite opens an existing file to read it."""
    import pathlib

    try:
        os.stat(path)
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        text = f"{path}: {why}; give the one that your TaskQueue has"
        raise StoreError(text) from None
    # SQLite puts files beside it. They must belong to somebody who may write to the tasks.
    able = all(os.access(p, os.W_OK) for p in (os.path.dirname(path), path))
    is_quiet = not able and not os.path.exists(f"{path}-wal")  # Nobody has it open.
    mode = "immutable=1" if is_quiet else "mode=rw"
    return f"{pathlib.Path(path).as_uri()}?{mode}"


def _refusal(path: str, db: sqlite3.Cursor, error: sqlite3.Error, started: float) -> str:
    """Why the caller's own connection cannot write."""
    waited = time.monotonic() - started
    if "readonly" in str(error):
        return _file_fault(path) or "connection can only read: mode=ro, immutable or query_only"
    if str(error) != "database is locked":
        return ""
    timeout = db.execute("PRAGMA busy_timeout").fetchone()[0] / 1000
    code = getattr(error, "sqlite_errorcode", 0)  # From Python 3.11 on.
    if waited < timeout or code == _BUSY_SNAPSHOT:
        return _HAS_READ
    return f"another program writes, and the timeout of connection is {timeout:g} s"


class _Known(NamedTuple):
    """Which files the master's SQLiteStores have."""

    made: list[tuple[_CallPlace, str, str]]  # Where each was made, its path as given, in full.
    folders: set[str]  # What a relative path may be relative to.


_folders: set[str] = set()  # The current ones when a queue, a Cluster or a worker was made.
_known: _Known | None = None  # In a worker that has run the file again.


def _masters_path(store: _SQLiteFile, known: _Known) -> str:
    """The file that *store*, made in a worker, is in the master; "" if it cannot be known.

    That is the file of the store that the same call made in the master, even if the call
    gets another path here. If there is none, the path means what it means in the master.
    """
    given = store._given
    here = {s._given for s in _living() if getattr(s, "_place", None) == store._place}
    there = [(name, path) for place, name, path in known.made if place == store._place]
    names = {name for name, _ in there}
    if given in names:
        paths = {path for name, path in there if name == given}
    elif names - here:  # The call gets another path in each process.
        alone = len(here - names) == 1
        paths = {path for name, path in there if name not in here and alone}
    elif os.path.isabs(given):
        paths = {given}
    else:
        folders = known.folders | {_absolute(".")}
        paths = {path for _, name, path in known.made if name == given} or {
            os.path.normpath(os.path.join(folder, given)) for folder in folders
        }
    return paths.pop() if len(paths) == 1 else ""


def _check_path(store: _SQLiteFile) -> None:
    """Raise StoreError where this may be another file than in the master."""
    what = f"{store._given}: in a worker process it cannot be known which file this is"
    if not store.path:
        raise StoreError(
            f"{what}: the master's current folder changed, or the line that makes the "
            "queue computes paths that differ from process to process. Give an absolute "
            "path that is the same in every process"
        )
    if _is_rerun():
        start = getattr(multiprocessing.process, "ORIGINAL_DIR", None)  # The master's.
        same = os.path.normpath(os.path.join(start or "", store._given)) == store.path
        if not same or not os.path.exists(store.path):
            raise StoreError(
                f"{what} while it runs your file again; use the queue under `if "
                'Cluster.is_master():`, `if __name__ == "__main__":`, or in a task'
            )


class _SQLiteFile(Store):
    """The file of a SQLiteStore, and the connections to it."""

    def __init__(
        self, path: str | os.PathLike[str], *, synchronous: str = "NORMAL", _looking: bool = False
    ) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise _wrong_type("path", path, "a file name")
        name = os.fspath(path)
        if not isinstance(name, str) or not name or "\0" in name or name == ":memory:":
            raise _wrong_value("path", path, 'a file name (for tasks in memory: "in_memory=True")')
        self._synchronous = _checked_choice("synchronous", synchronous, ("NORMAL", "FULL"))
        self._given, self._place = os.path.normpath(name), _place_of(_caller())
        self._looking = _looking  # For the command line: an existing file, as it is.
        self._files: dict[Any, tuple[int, int] | None] = {}
        self._reset_after_fork()
        _reset_in_forks[id(self)] = self
        if _known is not None:
            self.path = _masters_path(self, _known)
            return
        self.path = _absolute(name)  # Now, as a task may change the current folder.
        if not os.path.isabs(name):
            _folders.add(_absolute("."))

    def __repr__(self) -> str:
        return f"SQLiteStore({self.path!r})"

    def _reset_after_fork(self) -> None:
        """Use fresh connections in a forked child, and never close the parent's: closing
        drops the locks of the whole process (sqlite.org/howtocorrupt.html, 2.6)."""
        _carried_over_fork.extend(self._files)
        self._files = {}  # Device and inode that each connection opened.
        # One connection writes, another reads, each under its lock. A thread in the midst of a
        # write reads through the writer, to see what was written. The locks may be taken again
        # by a signal handler or finalizer of the same thread.
        self._write_lock, self._read_lock = threading.RLock(), threading.RLock()
        self._fork_locks = (self._write_lock, self._read_lock)
        self._writer: Any = None
        self._reader: Any = None
        self._changing = 0  # The thread that is in the midst of a write.
        self._making: set[int] = set()  # Threads that make the tables of a file.
        self._seqs: dict[Any, int] = {}  # Of the candidates of this claim, by id.

    def _store_error(self, error: sqlite3.Error, why: str = "") -> StoreError:
        if type(error) is sqlite3.DatabaseError:  # Damaged, perhaps: open it afresh next time.
            self._files.update(dict.fromkeys(self._files))
        if type(error) is sqlite3.OperationalError and "locked" not in str(error):
            why = why or _file_fault(self.path)
        return StoreError(f"{self.path}: {error}{why and '; '}{why}")

    def _is_current(self, db: Any) -> bool:
        """Whether *db* is open on the file that is at our path now. A write to a file that was
        deleted or replaced is lost."""
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return self._files.get(db) == (found.st_dev, found.st_ino)

    def _move(self, path: str) -> None:
        """In a worker: take the path that the master's store has."""
        if path != self.path:
            self.close()
            self.path = path

    def _open(self) -> sqlite3.Connection:
        _check_path(self)
        place = _view_of(self.path) if self._looking else self.path
        try:
            db = sqlite3.connect(
                place, uri=self._looking, timeout=BUSY_SECONDS, isolation_level=None,
                check_same_thread=False,
            )  # fmt: skip
            try:
                self._prepare(db)
            except BaseException:
                db.close()
                raise
        except sqlite3.Error as error:
            raise self._store_error(error) from error
        self._files[db] = None
        with contextlib.suppress(OSError):  # It may have gone again.
            found = os.stat(self.path)
            self._files[db] = found.st_dev, found.st_ino
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        version = _version_of(db, self.path)  # A newer file is refused before anything is changed.
        if self._looking:
            if version is None:
                raise StoreError(f"{self.path}: holds no tasks; give the file of your TaskQueue")
            db.execute("PRAGMA query_only = 1")
            return
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # Does nothing to an old file.
        mode = _use_wal(db)
        if mode not in ("", "wal") and not self._files:  # Once.
            _log.warning("%s: WAL is not possible here; journal mode is %s", self.path, mode)
        db.execute(f"PRAGMA synchronous = {self._synchronous}")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        if version != SCHEMA_VERSION:
            _make_file(db, self.path, self._making)

    def _reopened(self, db: Any) -> Any:
        """In place of *db*, a connection to the file that is at our path now."""
        if db is not None:
            self._files.pop(db, None)
            db.close()
        return self._open()

    def _change(self, work: Callable[..., _T], *arguments: Any) -> _T:
        # No context manager of our own: if a Ctrl-C came between its entry and its block, the
        # lock would stay taken as long as somebody keeps the KeyboardInterrupt.
        with self._write_lock:
            if self._changing:
                # As a part of the interrupted write, it could be undone with that.
                raise _write_in_a_write(self.path)
            if not self._is_current(self._writer):
                self._writer = self._reopened(self._writer)
            db = self._writer
            self._changing = threading.get_ident()
            try:
                if db.in_transaction:  # A second Ctrl-C interrupted the ROLLBACK.
                    db.execute("ROLLBACK")
                db.execute("BEGIN IMMEDIATE")
                result = work(*arguments)
                db.execute("COMMIT")
                if not self._is_current(db):
                    raise StoreError(f"{self.path}: the file was deleted or replaced")
                return result
            except BaseException as error:
                with contextlib.suppress(sqlite3.Error):  # Keep the first error.
                    if db.in_transaction:  # Else SQLite has rolled back itself: a full disk, say.
                        db.execute("ROLLBACK")
                if not isinstance(error, sqlite3.Error):
                    raise
                if not _reads_bytes(db, error):
                    raise self._store_error(error) from error
            finally:
                self._changing = 0
            return self._change(work, *arguments)

    def _select(self, statement: str, values: Any = ()) -> list[Any]:
        """All that a statement finds: within a write also what that has written so far."""
        if self._changing == threading.get_ident():
            found: list[Any] = self._writer.execute(statement, values).fetchall()
            return found
        with self._read_lock:
            if not self._is_current(self._reader):
                self._reader = self._reopened(self._reader)
            try:
                return cast("list[Any]", self._reader.execute(statement, values).fetchall())
            except sqlite3.Error as error:
                if not _reads_bytes(self._reader, error):
                    raise self._store_error(error) from error
            return self._select(statement, values)

    def interrupt(self) -> None:
        """Have what another thread reads end at once, in a StoreError."""
        reader = self._reader
        if reader is not None:
            with contextlib.suppress(sqlite3.ProgrammingError):  # It is closed.
                reader.interrupt()

    def _run(self, statement: str, values: Any = ()) -> int:
        """Write in a transaction. Returns how many rows have changed."""
        count: int = self._writer.execute(statement, values).rowcount
        return count

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            for db in self._files:
                db.close()
            self._files, self._writer, self._reader = {}, None, None


class SQLiteStore(_SQLiteFile):
    """Tasks in one SQLite file (WAL), shared by any number of processes of one machine.

    *path* is a file name; the file is made at first use, its folder must exist.
    *synchronous* is SQLite's: "NORMAL" survives the death of any process, "FULL" power
    failure as well, at the price of an fsync per write.

    Writers take turns by SQLite's lock, for which a call waits up to 30 s. Raises
    StoreError, with the path, for whatever SQLite reports.
    """

    atomic = has_bonds = has_settings = True

    # ---- Primitives

    def rows(self, query: Query, now: int) -> list[Row]:
        where, values = _where(query, now)
        order = "ORDER BY created_at, seq LIMIT ? OFFSET ?"
        statement = f"SELECT {_LIST} FROM taskpool_task WHERE {where} {order}"
        values += -1 if query.limit is None else query.limit, query.offset
        return list(map(_stored_row, self._select(statement, values)))

    def write(self, old: Row | None, new: Row | None) -> bool:
        if old is None:
            done = new is None or self._run(_ADD, _addition(new)) == 1
            if new is not None and new.expires is not None:
                self._run(_write_of(("expires",)), (new.expires, new.id))
            return done
        statement, values = _ERASE, [old.id]
        if new is not None:
            pairs = zip(_COLUMNS, old, new)
            names = tuple([name for name, a, b in pairs if a is not b and a != b])
            if not names:
                return True
            statement, values = _write_of(names), [*[getattr(new, n) for n in names], old.id]
        if type(old.id) is not str:  # Bytes: as such, or text that is not UTF-8.
            statement = statement.replace("id = ?", "id IN (?, CAST(? AS TEXT))")
            values.append(old.id)
        return self._run(statement, values) == 1  # Not where a trigger ignores the change.

    def write_all(self, pairs: Sequence[_Pair]) -> list[bool]:
        if len(pairs) < 10 or any(old is not None for old, _ in pairs):
            return super().write_all(pairs)
        # Ten rows by each statement, in a third of the time.
        added = [cast(Row, new) for _, new in pairs]
        rows = [_addition(row) for row in added]
        tens = len(rows) // 10 * 10
        values = itertools.chain.from_iterable(rows[:tens])
        groups = zip(*[values] * (10 * len(rows[0])))
        count = self._writer.executemany(_ADD_TEN, groups).rowcount
        count += self._writer.executemany(_ADD, rows[tens:]).rowcount
        late = [(row.expires, row.id) for row in added if row.expires is not None]
        self._writer.executemany(_write_of(("expires",)), late)
        return [count == len(rows)] * len(rows)

    def _undo(self, pairs: Sequence[_Pair], done: Sequence[bool]) -> None:
        raise StoreError(f"{self.path}: a task cannot be changed: {_IGNORED}")

    def bonds(self, parents: _Ids = None, children: _Ids = None) -> list[Bond]:
        side, ids = ("child", children) if parents is None else ("parent", parents)
        found = self._select(_BONDS_OF(side), (_texts(ids or ()),))
        # Others may have written bytes, which are the id of no task.
        return [Bond(*it) for it in found if type(it[0]) is type(it[1]) is str]

    def followers(self, ids: Collection[str] | None = None) -> set[str]:
        asked = (_FOLLOWER, ()) if ids is None else (_FOLLOWERS, (_texts(ids),))
        return {task_id for (task_id,) in self._select(*asked)}

    def bind(self, add: Sequence[Bond], drop: Sequence[Bond]) -> None:
        self._writer.executemany(_UNBIND, [bond[:2] for bond in drop])
        self._writer.executemany(_BIND, [bond[:3] for bond in add])

    def heartbeat(self, owner: str) -> None:
        self._run(_HEARTBEAT, (owner,))

    def heartbeats(self) -> dict[str, Any]:
        return dict(self._select(_OWNERS))

    def forget(self, owner: str) -> None:
        self._run(_LEAVE, {"owner": owner})

    def owners(self) -> list[str]:
        return [owner for (owner,) in self._select(_MASTERS) if type(owner) is str]

    def settings(self, all_types: bool = False) -> Mapping[str, Setting]:
        found = self._select(_SETTINGS if all_types else _GATES)
        return _read_settings(tuple(found)) if found else {}

    def setting(self, task_type: str) -> Setting:
        found = self._select(f"{_SETTINGS} WHERE task_type = ?", (task_type,))
        return _readable_setting(found[0][1:]) if found else Setting()

    def change_setting(self, task_type: str, changes: Mapping[str, Any]) -> None:
        for column, value in changes.items():
            self._run(_SET.format(column), {"task_type": task_type, column: value})

    def summary(self, now: int) -> list[tuple[Any, ...]]:
        return self._select(_SUMMARY, {"now": now})

    # ---- Quicker than by reading rows

    def newest(
        self, query: Query, most: int, before: Sequence[Any] | None, chars: int, now: int
    ) -> list[Seen]:
        where, values = _where(query, now)
        is_few = query.ids is not None or query.held or query.states == ["running"]
        at = _OVER_AT if query.states == ["failed"] else "+seq" if is_few else "seq"
        if before is not None:
            where, values = where + _OLDER(at), [*values, before[0], *before]
        columns = [f"ifnull(length({name}), 0)" for name in LONG_TEXTS]
        columns += [f"substr({n}, 1, {chars})" if n in LONG_TEXTS else n for n in _COLUMNS]
        found = self._select(_NEWEST(at, ", ".join(columns), where), [*values, most])
        first = 2 + len(LONG_TEXTS)
        return [Seen(_stored_row(line[first:]), line[2:first], line[:2]) for line in found]

    def schedules(self, most: int) -> list[Row]:
        return [readable(_stored_row(line)) for line in self._select(_SCHEDULES, (most,))]

    def early(self, now: int) -> list[Row]:
        return [_stored_row(line) for line in self._select(_EARLY, (now,))]

    def running(self, types: Collection[str]) -> Mapping[str, int]:
        counts = collections.Counter(name for (name,) in self._select(_RUNNING))
        return {name: counts[name] for name in types}

    def candidates(
        self, owner: str, types: Iterable[str], most: int, now: int, until: int,
        places: Mapping[str, int],
    ) -> Iterator[Row]:  # fmt: skip
        db, values = self._writer, {"owner": owner, "types": _json_list(tuple(types)), "now": now}
        db.execute(_PROMOTE, values)
        heads = db.execute(_HEADS, values).fetchall()

        def line(head: Sequence[Any]) -> Iterator[Sequence[Any]]:
            if len(heads) > 1:
                yield head  # Until it is the best there is, the line behind it is not read.
            # Read one by one, so that more of them cost nothing where none is set aside.
            place = {"type": head[2], "lane": head[3], "until": until, "most": most + ASIDE_TASKS}
            rows = db.execute(_READY, {"owner": owner, **place})
            if head[2] in places:
                rows = itertools.takewhile(lambda _: places[head[2]], rows)
            yield from rows

        self._seqs = {}
        lines = list(map(line, heads))
        for columns in lines[0] if len(lines) == 1 else heapq.merge(*lines, key=_rank):
            if columns[1] is not None:  # No head.
                self._seqs[columns[1]] = columns[0]
                yield _stored_row(columns[1:])

    def take(self, rows: Sequence[Row], owner: str, now: int) -> list[Row]:
        seqs = str([self._seqs[row.id] for row in rows])  # Is JSON, too.
        running = [claimed(row, owner, now) for row in rows]
        if self._run(_CLAIM, (owner, now, seqs)) != len(rows):
            held = {row[:_CLAIM_NUMBER + 1] for row in self.held_by(owner)}
            running = [row for row in running if row[:_CLAIM_NUMBER + 1] in held]
            if not running:
                raise StoreError(f"{self.path}: no task can be claimed: {_IGNORED}")
        return running

    def held_by(self, owner: str, outcomes: Sequence[Outcome] | None = None) -> list[Row]:
        asked: list[tuple[str, Any]] = [(_HELD_BY, {"owner": owner})]
        if outcomes is not None:
            asked = [(_HELD_ROW, (outcome.id, outcome.claim, owner)) for outcome in outcomes]
        return [_stored_row(columns) for it in asked for columns in self._select(*it)]

    def _settle(self, owner: str, outcomes: Sequence[Outcome], now: int) -> list[str]:
        led, execute = list[str](), self._writer.execute
        if execute(_FOLLOWER).fetchone():
            return super()._settle(owner, outcomes, now)
        for outcome in outcomes:
            claim = outcome.id, outcome.claim, owner
            is_plain = outcome.state == "done" and outcome.result is None and outcome.error is None
            if is_plain and execute(_FINISH, claim).rowcount:
                led.append("done")
                continue
            became = ""
            for row in map(_stored_row, execute(_HELD_ROW, claim).fetchall()):
                following = checked(after_run, row, outcome, now)
                if self.write(row, following):
                    became = led_to(row, following, outcome)
            led.append(became)
        return led

    def cancelled(self, owner: str, ids: Sequence[str]) -> Collection[tuple[str, int]]:
        return self._select(_CANCELLED_BY, (owner,))

    def open_lanes(self, owner: str) -> None:
        self._run(_OPEN_LANE, {"owner": owner})

    def expire(self, now: int) -> None:
        self._run(_EXPIRE, {"now": now})

    def next_due(
        self, owner: str, types: Iterable[str], limit: int, now: int, until: int = NEVER
    ) -> list[int]:
        places: dict[str, Any] = {"owner": owner, "types": _json_list(tuple(types)), "now": now}
        found = self._select(_NEXT_DUE, {**places, "until": until, "limit": limit})
        return sorted([at if type(at) is int else now for (at,) in found])[:limit]

    def foreign(self, types: Iterable[str], now: int) -> list[str]:
        found = {str(task_type) for (task_type,) in self._select(_STARTABLE, (now,))}
        return sorted(found - set(types))

    def count(self, query: Query, now: int) -> int:
        where, values = _where(query, now)
        found = self._select(f"SELECT count(*) FROM taskpool_task WHERE {where}", values)
        return cast(int, found[0][0])

    def remove(self, query: Query, now: int) -> int:
        where, values = _where(query, now)
        statements = f"{_MARK} AND {where}", f"{_REMOVE} AND {where}"

        def work() -> int:
            found = self._select(f"{_REMOVED} AND {where}", values) if self.followers() else ()
            count, gone = sum(self._run(it, values) for it in statements), [i for (i,) in found]
            if gone:
                self.bind((), self.bonds(children=gone))
                self._follow([(task_id, "removed") for task_id in gone], now)
            return count

        return self._change(work)

    def add(self, additions: Sequence[tuple[Row, str]], now: int) -> list[Row]:
        with self._write_lock:
            db = self._writer
            is_idle = self._files.get(db) and not (db.in_transaction or self._changing)
            row = additions[0][0] if len(additions) == 1 else None
            if row is not None and is_idle and not row.after and row.expires is None:
                try:  # By one statement, in half of the time of a transaction.
                    if self._run(_ADD, _addition(row)) == 1 and self._is_current(db):
                        return [row]
                except sqlite3.IntegrityError:
                    pass  # The id is taken: after_add() says what that means.
                except sqlite3.Error as error:
                    raise self._store_error(error) from error
        return super().add(additions, now)

    # ---- In the caller's own transaction

    def add_through(
        self, connection: sqlite3.Connection, additions: Sequence[tuple[Row, str]]
    ) -> list[Row]:
        """add() in the transaction of the caller's own *connection* to the same file.

        Begins one where sqlite3 would; neither commits nor rolls it back.
        """
        _check_path(self)
        started, factory = time.monotonic(), connection.text_factory
        try:
            db = sqlite3.Cursor(connection)  # Without the connection's row_factory.
        except sqlite3.Error as error:
            raise self._store_error(error) from error
        guest = copy.copy(self)  # Writes by that connection.
        guest._writer, guest._changing = db, threading.get_ident()
        try:
            connection.text_factory = _text_or_bytes
            main = next(file for _, name, file in db.execute(_FILES) if name == "main")
            if not (main and os.path.exists(self.path) and os.path.samefile(main, self.path)):
                raise ValueError(f"connection is to {main or 'memory'}; give one to {self.path}")
            # From Python 3.12 on isolation_level counts only if autocommit is -1.
            level = connection.isolation_level
            if getattr(connection, "autocommit", -1) == -1 and level is not None:
                if not connection.in_transaction:
                    db.execute(f"BEGIN {level}")
            db.execute("SAVEPOINT taskpool_add")
            try:
                db.execute(_LOCK)
                if _version_of(db, self.path) != SCHEMA_VERSION:
                    _make_schema(db, self.path)
                rows = guest._add(additions, 0)
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back all.
                    db.execute("ROLLBACK TO taskpool_add")
                    db.execute("RELEASE taskpool_add")
                raise
            db.execute("RELEASE taskpool_add")
            return rows
        except sqlite3.Error as error:
            raise self._store_error(error, _refusal(self.path, db, error, started)) from error
        finally:
            connection.text_factory = factory
            with contextlib.suppress(sqlite3.Error):
                db.close()


# MongoDB. A document has the original's seven fields, which a Meteor application reads and
# writes, and in one sub-document our columns by their names, so that no field of an
# application is taken for one of ours. Columns that hold their usual value are left out.

_TOP = {"task_type": "taskType", "priority": "priority"}  # Columns that the original has.
_USUAL: dict[str, Any] = dict(
    Row._field_defaults, retries=0, retry_delay=1.0, timeout=None, keep_result=None
)
_SHORT = [n for n in _COLUMNS if n not in ("data", "result", "error", "progress")]
# What is read of a new document, of one of ours, and of that without its long columns. The
# fields that an application has beside these are never decoded.
_INSERTED = dict.fromkeys("taskType priority data createdAt onGoing dueDate taskpool".split(), 1)
_READ = dict.fromkeys("taskType priority data taskpool".split(), 1)
_RATE = Setting._fields[2:5]  # What a start depends on, and changes.
_BESIDE = ("promoted_at", "followed")  # What _row_of() needs beside the columns.
_READ_SHORT = dict.fromkeys([_TOP.get(n, f"taskpool.{n}") for n in (*_SHORT, *_BESIDE)], 1)
_RANK = [("priority", -1), ("taskpool.created_at", 1), ("taskpool.seq", 1)]  # Of claims.
_BY_DATE = [("taskpool.ready_at", 1)]
_PLACE = [("taskpool.state", 1), ("taskpool.lane", 1), ("taskType", 1)]
_MONGO_INDEXES: tuple[tuple[str, list[tuple[str, int]], dict[str, bool]], ...] = (
    # The id is the text of the `_id`, whatever its type. 5 and "5" would have the same.
    ("taskpool_id", [("taskpool.id", 1)], {"unique": True, "sparse": True}),
    ("taskpool_ready", [*_PLACE, *_RANK], {}),  # What can be claimed, in order.
    # What can be claimed later, by its date. Finds documents without a state, too.
    ("taskpool_scheduled", [*_PLACE, *_BY_DATE], {}),
    # Sparse: only running documents have an owner, only `done` ones expire.
    ("taskpool_running", [("taskpool.owner", 1)], {"sparse": True}),
    ("taskpool_kept", [("taskpool.kept_until", 1)], {"sparse": True}),
    # Sparse: only what is to follow others has bonds, only those others are followed.
    ("taskpool_after", [("taskpool.after", 1)], {"sparse": True}),
    ("taskpool_followed", [("taskpool.followed", 1)], {"sparse": True}),
)
_MOST_BONDS = 10_000  # Of a task: they are in its document.
_UNSURE = "?"  # Among its bonds: its predecessors are to be looked at once more.
_GONE = {"taskpool.state": "done", "taskpool.kept_until": 1}  # Is deleted when that is told.
_ENDINGS = ("done", "failed", "removed")  # What `taskpool.followed` says of an end.
COPY_SECONDS = 1.5  # How long a master goes by pauses and limits that it has read.
_READABLE_CHARS = 1_000_000  # Longer data are stored as text, which is smaller.
_MOST_BYTES = 7_000_000  # Of data, and of a result: MongoDB's 16 MB hold both.
_ADOPTED_AT_ONCE = 1000
_BATCH = 10_000  # Documents in one reply. A server sends 101 if it is not told.
_TYPES_AT_ONCE = 20  # With 3 states and 3 lanes: a server merges up to 200 ranges by date.
_NO_INDEX = (2, 27)  # Error codes: the hint names an index that is not there, ...
_REFUSED = (2, 9, 14, 28)  # ... or a document cannot be changed so.
_COROUTINE = 0x80  # inspect.CO_COROUTINE.

_MASTER = {"_id": {"$gt": ""}}
_TASKS = {"taskpool.state": {"$gt": ""}}
_NEW = {"taskpool.state": {"$not": {"$gt": ""}}}  # Documents that an application inserted.
_RESERVED = {"taskpool.state": {"$in": [*_WAITING, "running"]}}
# Any task that failed: all that retry() changes has an unusual value.
_FAILED = Row(
    *("", "", "", 0, 0, 0, -1, 0, 1.0, None, None, "-", "failed", 1.0, 1),
    error="-", removed=1, progress="-",
)  # fmt: skip


class _FollowedRow(Row):
    """A task that others may follow, as its document says: then its end is told to them."""

    __slots__ = ()


class _Undecodable(Exception):
    """Why a value of a document, in whose place this stands, cannot be decoded."""

    __repr__ = Exception.__str__


def _undecodable(error: Exception) -> str:
    """What a driver says of a document that it cannot decode. Raises any other error."""
    if "BSON" in type(error).__name__ or isinstance(error, (ValueError, ArithmeticError)):
        return str(error)[:500]
    raise error


def _was_race(error: Any) -> bool:
    """Whether another writer was quicker: to begin anew helps."""
    errors = (getattr(error, "details", None) or {}).get("writeErrors", ())
    codes = {getattr(error, "code", None), *(one.get("code") for one in errors)}
    # A duplicate key; a conflict of transactions.
    return isinstance(error, _Raced) or bool(codes & {11000, 112})


def _is_plain(value: Any) -> bool:
    """Whether all servers and drivers take these keys: not those with a $ or a dot."""
    if isinstance(value, dict):
        return all("." not in k and k[:1] != "$" and _is_plain(v) for k, v in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list) else True


def _data_fields(text: str) -> dict[str, Any]:
    """The data as the field `data`; else as text, which counts until a `data` is set."""
    value = _decode(text) if len(text) <= _READABLE_CHARS else {"$": ""}
    return {"data": value} if _is_plain(value) else {"taskpool.json": text}


def _date(*instants: Any) -> datetime:
    """The latest of these instants as a date for Meteor, or the nearest that can be one."""
    latest = max((i for i in instants if type(i) is int), default=0)
    return _datetime(min(max(latest, 0), 253_402_300_799_999_999))


def _bond_text(parent: str, anyway: bool) -> str:
    """A bond, as the document of the follower has it."""
    return f"{'*' if anyway else '='}{parent}"


def _bonds_of(ours: Mapping[str, Any]) -> list[Bond]:
    """The bonds in a document. Of two with the same predecessor the stricter one counts."""
    found, child = ours.get("after"), ours["id"]
    texts = sorted(map(str, found)) if isinstance(found, list) else []  # "*" is before "=".
    bonds = {t[1:]: Bond(t[1:], child, t[0] == "*") for t in texts if t[:1] in ("*", "=")}
    return list(bonds.values())


def _fields_of(row: Row) -> dict[str, Any]:
    """A Row as the fields of its document, without those of its data."""
    ended = row.state in ("failed", "done")
    fields: dict[str, Any] = {
        "createdAt": _date(row.created_at),
        # The original starts what has `onGoing: false` and a dueDate that is past. So it keeps
        # off what runs here, retries that wait, what has ended, and what is held.
        "onGoing": None if row.state == "held" else row.state == "running",
        "dueDate": None if ended else _date(row.due_at, row.ready_at),
    }
    for name in _COLUMNS:
        value = getattr(row, name)
        if name != "data" and (name not in _USUAL or value != _USUAL[name]):
            fields[_TOP.get(name, f"taskpool.{name}")] = value
    if row.after:
        texts = (_bond_text(bond.parent, bond.anyway) for bond in row.after)
        fields["taskpool.after"] = [_UNSURE, *texts]
    return fields


def _nested(fields: Mapping[str, Any], seq: int) -> dict[str, Any]:
    """These fields as a new document has them. *seq* breaks ties in the order of claims."""
    ours = {name.partition(".")[2]: value for name, value in fields.items() if "." in name}
    top = {name: value for name, value in fields.items() if "." not in name}
    return {**top, "taskpool": {"seq": seq, **ours}}


def _changes(old: Row, new: Row, how: str = "") -> dict[str, Any]:
    """The update that makes the document of *old* that of *new*; other fields stay. *how*: the
    followers are to be told of that end."""
    before, after = _fields_of(old), _fields_of(new)
    if new.created_at != old.created_at:  # Another task: nothing of the old one stays.
        before = {f"taskpool.{name}": name for name in (*_USUAL, "promoted_at")}
        old = old._replace(data="")
    elif new.ready_at != old.ready_at and old.state != "running":
        before["taskpool.promoted_at"] = None  # That was for another date.
    elif old.state == "ready":
        del before["taskpool.ready_at"]  # What is stored may differ: see _row_of().
    put = {name: value for name, value in after.items() if before.get(name, before) != value}
    if new.data != old.data and type(new.data) is str:
        put.update(_data_fields(new.data))
        before["taskpool.json" if "data" in put else "data"] = None
    if how:
        put["taskpool.followed"] = how
    gone = dict.fromkeys(before.keys() - after.keys() - put.keys(), "")
    changes = {"$set": {"taskpool.state": new.state, **put}}
    if not new.after and not keeps_bonds(old, new):
        gone["taskpool.after"] = ""
    elif new.after and old.state == "held" and old.created_at == new.created_at:
        changes["$addToSet"] = {"taskpool.after": {"$each": put.pop("taskpool.after")}}
        del changes["$set"]["taskpool.after"]
    return {**changes, "$unset": gone} if gone else changes


def _unchanged(row: Row) -> dict[str, Any]:
    """The selector of the document of *row*, if no other writer has taken it further."""
    where: dict[str, Any] = {"taskpool.id": row.id, "taskpool.state": row.state}
    for name in ("claim", "owner", "removed", "successor", "repeat", "created_at"):
        value = getattr(row, name)
        if type(value) in _KINDS[name].types:  # NaN, say, does not equal itself.
            usual = {"$in": [None, value]}  # None: or not there.
            where[f"taskpool.{name}"] = usual if value == _USUAL.get(name, row) else value
    if not isinstance(row, _FollowedRow):
        where["taskpool.followed"] = None
    return where


def _text_of(key: Any) -> str:
    """The id of a task whose document has that `_id`."""
    try:
        return _checked_text("_id", str(key))
    except ValueError:
        return ascii(key)[:5000]


def _is_ours(document: Mapping[str, Any]) -> bool:
    ours = document.get("taskpool")
    return isinstance(ours, Mapping) and type(ours.get("state")) is str and ours["state"] != ""


def _row_of(document: Mapping[str, Any], ours: Mapping[str, Any], now: int = 0) -> Row:
    """The Row of a document with that sub-document. Its values may be unusable.

    A ready task that was promoted by a clock ahead of ours is ready when ours gets there. (P6)
    """
    values = {**_USUAL, "id": _text_of(document["_id"]), **ours}
    values.update(task_type=document.get("taskType"), priority=document.get("priority", 1))
    values["data"] = document.get("data", {})
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        by_text = "json" in values and "data" not in document
        values["data"] = values["json"] if by_text else _encode(values["data"])
    promoted_at = ours.get("promoted_at")
    if ours.get("state") == "ready" and isinstance(promoted_at, int) and promoted_at > now:
        values["ready_at"] = promoted_at
    columns: list[Any] = list(map(values.get, _COLUMNS))
    for index, kind in enumerate(_KINDS.values()):
        value = columns[index]
        if isinstance(value, (int, float)) and type(value) not in (bool, *kind.types):
            if -MAX_INT < value < MAX_INT and value // 1 == value:
                columns[index] = int(value)  # JavaScript's 1.0; the driver's kinds of int.
    return (_FollowedRow if ours.get("followed") else Row)(*columns)


def _microseconds(date: Any) -> Any:
    if not isinstance(date, datetime):
        return date
    # Without tz_aware, drivers give UTC without saying so.
    aware = date if date.tzinfo is not None else date.replace(tzinfo=timezone.utc)
    return (aware - _EPOCH) // _MICROSECOND


def _adopted(document: Mapping[str, Any], now: int) -> Row:
    """The Row of a document that an application inserted. What is missing has its default."""
    created_at = _microseconds(document.get("createdAt", now))
    due_at = _microseconds(document.get("dueDate", created_at))
    is_due = isinstance(due_at, (int, float)) and due_at <= now
    ours = {"created_at": created_at, "due_at": due_at, "ready_at": due_at, "lane": ""}
    ours["state"] = "ready" if is_due else "scheduled"
    if document.get("onGoing"):  # A Meteor cluster's. If that is dead: see recover().
        ours.update(state="running", owner="nschwarz:cluster", attempt=1, claim=1)
    row = _row_of(document, ours)
    wrong = (repr(value) for value in document.values() if isinstance(value, _Undecodable))
    problem = _unusable(row) or next(wrong, "")
    return without_run(readable(row, problem), problem, now) if problem else row


def _still(name: str, value: Any) -> dict[str, Any]:
    """Documents in which that field holds what was read, whatever it is."""
    return {} if isinstance(value, _Undecodable) else {name: {"$eq": value}}


def _named(ids: Iterable[Any]) -> dict[str, Any]:
    return {"taskpool.id": {"$in": list(ids)}}


def _held_by(owner: Any) -> dict[str, Any]:
    return {"taskpool.state": "running", "taskpool.owner": owner}


def _were_due(until: int) -> dict[str, Any]:
    """was_due(). A date that is none counts as due."""
    by_then = {"$not": {"$gt": until}}
    dates = [{"taskpool.ready_at": by_then}, {"taskpool.ended_at": {"$ne": None}}]
    return {"taskpool.due_at": by_then, "$or": dates}


def _selector(query: Query, now: int) -> dict[str, Any]:
    """What find(), count(), remove() and retry() mean."""
    lists = ("id", query.ids), ("state", _stored_states(query))
    terms: list[Any] = [_TASKS]
    terms += [{f"taskpool.{n}": {"$in": list(some)}} for n, some in lists if some is not None]
    if query.types is not None:
        terms.append({"taskType": {"$in": list(query.types)}})
    if query.until != NEVER:
        terms.append({"taskpool.due_at": {"$lte": query.until}})
    if query.created_at is not None:
        terms.append({"taskpool.created_at": {"$in": list(query.created_at)}})
    if query.due is not None:
        dated = {"taskpool.state": "scheduled", "taskpool.ready_at": {"$lte": now}}
        ready = {"taskpool.state": "ready", "taskpool.promoted_at": {"$not": {"$gt": now}}}
        kinds = {"$or": [ready, dated]}
        could_run = {**kinds, "taskType": {"$nin": list(query.paused)}}
        waiting = {"taskpool.state": {"$in": _WAITING}}
        terms.append(could_run if query.due else {**waiting, "$nor": [could_run]})
    if query.held is not None:
        terms.append({"taskpool.state": "held" if query.held else {"$ne": "held"}})
    return {"$and": terms}


def _fitting(outcome: Outcome) -> Outcome:
    """*outcome*, without a result that is too big for a document: that would hold up others."""
    if outcome.result is None or len(outcome.result.encode()) <= _MOST_BYTES:
        return outcome
    error = f"the result is not kept: it has over {_MOST_BYTES:,} bytes as JSON"
    return outcome._replace(result=None, error=error)


def _sorted_out(row: Row, now: int) -> tuple[Row, Row]:
    """What is to be stored, and told, of a task that was claimed unseen: itself if it may run."""
    if not (reason := _unusable(row)) and (reason := expiry(row, now)):
        row = _waiting_again(row)  # That claim does not count.
    return set_aside(row, reason, now) if reason else (row, row)


def _setting_of(document: Mapping[str, Any]) -> Setting:
    columns = [document.get(name, usual) for name, usual in Setting._field_defaults.items()]
    # The driver's kinds of int, and what a shell writes.
    columns = [int(v) if isinstance(v, (int, float)) and v // 1 == v else v for v in columns]
    return _readable_setting(columns)


def _claim_of(row: Row) -> str:
    """A claim, as the document of its type has it."""
    return f"{row.claim}:{row.id}"


def _type(task_type: str) -> dict[str, Any]:
    """The document of a task type, beside those of masters."""
    return {"_id": {"type": task_type}}


class _Documents:
    """The collection of a MongoStore. Documents that cannot be decoded hide no others."""

    def __init__(self, collection: Any) -> None:
        if not isinstance(getattr(collection, "full_name", None), str):
            raise _wrong_type("collection", collection, "a pymongo Collection")
        # A call of an asynchronous driver does nothing before it is awaited.
        flags = getattr(getattr(collection.insert_many, "__code__", None), "co_flags", 0)
        if flags & _COROUTINE or "Motor" in type(collection).__name__:
            raise _wrong_type("collection", collection, "a synchronous pymongo Collection")
        concern = getattr(collection, "write_concern", None)
        preference: Any = getattr(collection, "read_preference", None)
        if getattr(concern, "acknowledged", True) is False or getattr(preference, "mode", None):
            allowed = "one that acknowledges writes and reads from the primary"
            raise _wrong_value("collection", collection, allowed)
        self._collection, self.side = collection, collection["masters"]
        self.name: str = collection.full_name
        self._insertions = itertools.count()
        self._indexes: Sequence[str] | None = None  # Those that are there. None: not known.
        # What bulk_write() takes, from the package of the collection's own class. Without
        # that, each write is a call of its own.
        modules = (kind.__module__.partition(".")[0] for kind in type(collection).__mro__)
        packages = map(sys.modules.get, modules)
        self._models = next((p for p in packages if hasattr(p, "DeleteOne")), None)

    def text(self, error: Exception) -> str:
        return f"{self.name}: {type(error).__name__}: {error}"[:500]

    @contextlib.contextmanager
    def errors(self, adopt_at: int | None = None) -> Iterator[None]:
        """What the driver raises within is a StoreError. *adopt_at*: adopt() at first."""
        try:
            if self._indexes is None:
                self._indexes = list(self._make_indexes())
            if adopt_at is not None:
                self.adopt(adopt_at)
            yield
        except (TaskPoolError, ValueError, _Raced):
            raise  # By the policies and the verbs.
        except Exception as error:
            if getattr(error, "code", None) in _NO_INDEX:
                self._indexes = None  # Somebody dropped one.
            raise StoreError(self.text(error)) from error

    def _make_indexes(self) -> Iterator[str]:
        """The names of those that are there."""
        for name, keys, options in _MONGO_INDEXES:
            try:
                self._collection.create_index(keys, name=name, **options)
                yield name
            except Exception as error:
                if not isinstance(getattr(error, "code", None), int):
                    raise  # The server did not answer.
                _log.warning("%s: no index %s, this may be slow: %s", self.name, name, error)

    def by(self, index: str) -> dict[str, Any]:
        """The option that makes a query use this index: two begin with the same fields."""
        return {"hint": index} if self._models and index in (self._indexes or ()) else {}

    def find(
        self, where: Any, fields: Any, skip: int = 0, limit: int = 0, side: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The documents of tasks, or those beside them. If the driver cannot decode one, they are
        read in halves, and the last one field by field."""
        collection, options["batch_size"] = self.side if side else self._collection, _BATCH
        try:
            return list(collection.find(where, fields, skip=skip, limit=limit, **options))
        except Exception as error:
            _undecodable(error)
        count = limit or collection.count_documents(where) - skip
        if count > 1:
            half = count // 2
            first = self.find(where, fields, skip, half, side, **options)
            return first + self.find(where, fields, skip + half, count - half, side, **options)
        document: dict[str, Any] = {}
        for field in dict.fromkeys(["_id", *(name.partition(".")[0] for name in fields)]):
            only = {"_id": field == "_id", field: 1}
            try:
                for found in collection.find(where, only, skip=skip, limit=1, **options):
                    document.update(found)
            except Exception as error:
                document[field] = _Undecodable(f"{field}: {_undecodable(error)}")
        return [document] if document else []

    def ours(self, where: Any, *names: str, limit: int = 0) -> list[dict[str, Any]]:
        """The id and these columns of documents, as they are stored."""
        found = self.find(where, {f"taskpool.{n}": 1 for n in ("id", *names)}, limit=limit)
        ours = (it["taskpool"] for it in found if isinstance(it.get("taskpool"), Mapping))
        return [columns for columns in ours if type(columns.get("id")) is str]

    def write(self, writes: list[tuple[Any, Any]], **options: Any) -> list[bool | None]:
        """Update, or where the update is None delete, one document for each.

        Returns for each whether it was found. As bulk_write() only counts them, that is None
        (unknown) where some were found and some not.
        """
        tasks, models = self._collection, cast(Any, self._models)
        if models is None or len(writes) < 2:
            return [
                tasks.delete_one(where, **options).deleted_count > 0
                if changes is None
                else tasks.update_one(where, changes, **options).matched_count > 0
                for where, changes in writes
            ]
        todo = [
            models.DeleteOne(where) if changes is None else models.UpdateOne(where, changes)
            for where, changes in writes
        ]
        done = tasks.bulk_write(todo, ordered=False, **options)
        count = done.deleted_count + done.matched_count
        return [None if 0 < count < len(writes) else count > 0] * len(writes)

    def rows(self, where: Any, now: int = 0, fields: Any = _READ, **options: Any) -> list[Row]:
        """The Rows of these documents, as they are stored."""
        found = self.find(where, fields, **options)
        strange = [document["_id"] for document in found if not _is_ours(document)]
        if strange:
            named = [key for key in strange if not isinstance(key, _Undecodable)]
            self.adopt(now, {"$or": [_NEW, {"_id": {"$in": named}}]})
            # Documents whose `_id` cannot be decoded stay as they are: leave them out.
            found = self.find({"$and": [where, _TASKS]}, fields, **options)
        return [_row_of(d, d["taskpool"], now) for d in found if _is_ours(d)]

    def adopt(self, now: int, new: Mapping[str, Any] = _NEW) -> bool:
        """Give documents that an application inserted what they need to be tasks. Returns
        whether there were any."""
        for number in range(TRIES):
            writes: list[tuple[Any, Any]] = []
            for document in self.find(new, _INSERTED, limit=_ADOPTED_AT_ONCE):
                if isinstance(document["_id"], _Undecodable):
                    continue
                row, before = _adopted(document, now), document.get("taskpool")
                fields = _nested(_fields_of(row), next(self._insertions))
                put = {name: fields[name] for name in ("onGoing", "dueDate", "taskpool")}
                if row.state == "failed":
                    text = "%s: the task %s cannot be run: %s"
                    _log.error(text, self.name, row.id, row.error)
                else:
                    put["priority"] = row.priority
                where = {"_id": document["_id"], **_still("taskpool", before)}
                writes.append((where, {"$set": put}))
            if not writes:
                return number > 0
            self._enter(writes)
            new = _NEW
        return True

    def _enter(self, writes: list[tuple[Any, Any]]) -> None:
        """Write these, which give documents their ids. If an id is taken, append the type."""
        try:
            self.write(writes)
        except Exception as error:
            if not _was_race(error):
                raise
            if len(writes) > 1:
                for write in writes:
                    self._enter([write])
            else:
                where, update = writes[0]
                update["$set"]["taskpool"]["id"] += f" ({type(where['_id']).__name__})"
                self.write(writes)

    def replace(
        self, changes: Sequence[tuple[Row, Row | None, str]], **options: Any
    ) -> list[bool | None]:
        """Put the second Row of each in place of the first, if that has not changed. The text is
        the end of which the followers are to be told."""
        writes = [(_unchanged(old), new and _changes(old, new, how)) for old, new, how in changes]
        return self.write(writes, **options)

    def store(self, pairs: Sequence[tuple[Row | None, Row]], at_once: bool) -> None:
        """Write these pairs of add(); *at_once*: in a transaction."""
        with contextlib.ExitStack() as stack:
            options = {}
            if at_once:
                session = stack.enter_context(self._collection.database.client.start_session())
                concern = getattr(self._collection, "write_concern", None)
                stack.enter_context(session.start_transaction(write_concern=concern))
                options = {"session": session}
            if not all(self.replace([(old, new, "") for old, new in pairs if old], **options)):
                raise _Raced
            fresh = []
            for row in (new for old, new in pairs if old is None):
                fields = {"_id": row.id, **_fields_of(row), **_data_fields(row.data)}
                if isinstance(row, _FollowedRow):
                    fields["taskpool.followed"] = "yes"
                fresh.append(_nested(fields, next(self._insertions)))
            if fresh:
                self._collection.insert_many(fresh, **options)

    def stored(self, rows: list[Row]) -> str:
        """For the error of an add(): which of its tasks are stored all the same."""
        try:
            there = self.rows(_named(row.id for row in rows))
        except Exception:
            return "; whether anything was stored is not known"
        found = {row[:6] for row in there}  # The columns that a run does not change.
        ids = [row.id for row in rows if row[:6] in found]
        return f"; stored all the same: {ids}" if ids else "; nothing was stored"


class _Claims:
    """What a MongoStore remembers of one owner."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}  # Claims that settle() has not ended.
        self.in_doubt = False  # The server may have more claims: a reply was lost.
        # By (id, claim): the reply to settle() was lost, the server may have applied it.
        self.unsure: set[Any] = set()
        self.ready: list[Row] = []  # What was seen to be able to start now, by a look or a claim.
        self.more = False  # There are more of these: the types without a limit were not read out.
        self.later: list[Row] = []  # What can start later.
        self.few = True  # The last claim took one task at most.
        self.asked = 0  # How many tasks beyond the room the last turn() wanted to know of, ...
        self.view: Any = None  # ... of which types, and up to which due date.
        self.joined = False  # The claim under way has taken one.
        # Of the turn under way: its instant, and the last due date that counts.
        self.owner, self.now, self.until = "", 0, NEVER
        # The latest instant that the owner has seen, and when it last looked and claimed.
        self.clock = self.looked_at = self.claimed_at = 0
        self.holders_at = -math.inf  # By the seconds of recover().

    def took(self, rows: Iterable[Row]) -> None:
        ids = {row.id for row in rows}
        self.ready = [row for row in self.ready if row.id not in ids]


class _MongoSide(Store):
    """The documents of a MongoStore beside those of tasks: of masters, and of task types.

    Masters read the settings of types with the heartbeats of others, and go by such a copy for
    COPY_SECONDS from before it was read. So whoever pauses or limits a type waits that long, if
    there are other masters: then no copy counts any more that is older. As a claim may take
    long, its tasks start only if the copy that counts after it says the same of their types.
    """

    has_settings = True
    _documents: _Documents
    _tasks: Any
    _masters: Any

    def _reset_after_fork(self) -> None:
        self._lock = threading.RLock()  # Held while a cluster's claims change.
        self._claims: dict[str, _Claims] = collections.defaultdict(_Claims)
        self._holders: set[str] = set()  # Of claims and reserved tasks, as of late.
        self._heard: list[str] | None = None  # Masters, where one here looks for them.
        # The types that are paused or limited, and since when that is known (monotonic).
        self._copy: tuple[dict[str, Setting], float] = {}, -math.inf
        self._set_at = -math.inf  # When one of them was changed here.
        # What has a place of a limited type, as its document said last: see _enter().
        self._entered: dict[str, Any] = {}
        self._running: dict[str, set[str]] = {}  # The claims that run, in this transaction().

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Each write counts by itself. The lock is for what is remembered of claims."""
        with self._lock, self._documents.errors():
            self._running.clear()
            yield

    def _look_soon(self, written: Iterable[Row | None] | None = None) -> None:
        """Have owners look again, as some tasks are to start later: perhaps one of these."""
        if written is None or any(row and row.state == "scheduled" for row in written):
            for claims in list(self._claims.values()):
                claims.looked_at = 0

    # ---- Masters

    def heartbeat(self, owner: str) -> None:
        # Random: a counter that starts again could show the value that an observer saw last.
        beat = {"$set": {"beat": os.urandom(8).hex()}}
        self._masters.update_one({"_id": owner}, beat, upsert=True)

    def heartbeats(self) -> dict[str, Any]:
        masters, _ = self._read_side()
        self._heard = list(masters)
        return {**dict.fromkeys(self._holders), **masters}

    def owners(self) -> list[str]:
        return self._alive() if self._heard is None else self._heard

    def _alive(self) -> list[str]:
        with self._documents.errors():
            return [master["_id"] for master in self._masters.find(_MASTER, {"_id": 1})]

    def _read_side(self, *more: str) -> tuple[dict[str, Any], dict[str, Setting]]:
        """The heartbeats of masters, and the Settings of types."""
        read_at, fields = time.monotonic(), ("beat", *Setting._fields[:-1], *more)
        with self._documents.errors():
            found = self._documents.find({}, dict.fromkeys(fields, 1), side=True)
        masters = {it["_id"]: str(it.get("beat")) for it in found if type(it["_id"]) is str}
        of_types = [it for it in found if isinstance(it["_id"], Mapping)]
        types = {str(it["_id"].get("type")): _setting_of(it) for it in of_types}
        self._copy = {name: it for name, it in types.items() if is_gate(it)}, read_at
        return masters, types

    def recover(self, owner: str, seconds: float, now: int) -> list[Row]:
        claims = self._claims[owner]
        if not claims.holders_at < seconds < claims.holders_at + LEASE_SECONDS / 6:
            with self._documents.errors():  # An owner may have no heartbeat yet.
                holders = self._tasks.distinct("taskpool.owner", _held_by({"$gt": ""}))
                reserved = {**_RESERVED, "taskpool.lane": {"$gt": ""}}
                holders += self._tasks.distinct("taskpool.lane", reserved)
            self._holders, claims.holders_at = set(holders), seconds
        return super().recover(owner, seconds, now)

    def forget(self, owner: str) -> None:
        self._masters.delete_one({"_id": owner})
        self._holders.discard(owner)
        self._claims.pop(owner, None)
        self._heard = None  # Nobody may look for masters here from now on.

    def cancelled(self, owner: str, ids: Sequence[str]) -> Collection[tuple[str, int]]:
        with self._documents.errors():
            where = {**_held_by(owner), "taskpool.removed": 2}
            rows = self._documents.rows(where, fields=_READ_SHORT)
        return [(row.id, row.claim) for row in rows]

    def open_lanes(self, owner: str) -> None:
        mine = {**_RESERVED, "taskpool.lane": owner}
        self._tasks.update_many(mine, {"$set": {"taskpool.lane": ""}})

    # ---- Task types

    def settings(self, all_types: bool = False) -> Mapping[str, Setting]:
        copy, read_at = self._copy
        if not all_types and read_at >= max(self._set_at, time.monotonic() - COPY_SECONDS):
            return copy
        _, types = self._read_side("counts")
        return types if all_types else self._copy[0]

    def paused(self) -> list[str]:
        _, types = self._read_side()
        return [name for name, it in types.items() if it.paused]

    def set_up(
        self, types: Iterable[str], changes: Mapping[str, Any], now: int, wait: bool = True
    ) -> None:
        super().set_up(types := list(types), changes, now)
        if wait and is_gate(Setting(**changes)):
            if any(owner not in self._claims for owner in self._alive()):
                time.sleep(1.01 * COPY_SECONDS)  # Clocks do not go at quite the same speed.
            with self.transaction():
                for name in types if changes.get("at_once") else ():  # What runs counts, too.
                    self.running([name])
                    self._enter(name, list(self._running[name]), sys.maxsize)

    def change_setting(self, task_type: str, changes: Mapping[str, Any]) -> None:
        self._masters.update_one(_type(task_type), {"$set": changes}, upsert=True)
        self._set_at = time.monotonic()

    def setting(self, task_type: str) -> Setting:
        return _setting_of(self._stored(task_type, *Setting._fields))

    def _stored(self, task_type: str, *names: str) -> dict[str, Any]:
        """These fields of the document of a type, whatever is in them."""
        found = self._documents.find(_type(task_type), dict.fromkeys(names, 1), side=True)
        return {name: found[0].get(name) if found else None for name in names}

    def _swap(self, task_type: str, there: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        """Set the fields *new* of the document of a type, if it is still as _stored() has told."""
        where, is_new = _type(task_type), all(value is None for value in there.values())
        for name, value in there.items():
            where.update(_still(name, value))
        try:
            done = self._masters.update_one(where, {"$set": new}, upsert=is_new)
        except Exception as error:
            if _was_race(error):  # There is such a document now.
                return False
            raise
        return done.matched_count > 0 or done.upserted_id is not None

    def change_rate(self, task_type: str, setting: Setting, changes: Mapping[str, Any]) -> bool:
        there = {name: getattr(setting, name) for name in _RATE}
        if not all(there.values()):  # What is stored may be something that cannot be read.
            there = self._stored(task_type, *_RATE)
        is_same = _setting_of(there)[2:5] == setting[2:5]
        is_done = is_same and self._swap(task_type, there, changes)
        if is_done and "starts" not in changes:
            copy, read_at = self._copy
            self._copy = {**copy, task_type: setting._replace(**changes)}, read_at
        else:
            self._set_at = time.monotonic()
        return is_done

    def _tally(self, tally: _Tally) -> None:
        for name in list(tally):
            there = self._stored(name, "counts")
            total = read_counts(there["counts"])
            total.update(tally[name])
            if not self._swap(name, there, {"counts": json.dumps(total)}):
                raise _Raced
            del tally[name]  # If a later one fails, this one is not added again.

    def running(self, types: Collection[str]) -> Mapping[str, int]:
        where = {"taskpool.state": "running", "taskType": {"$in": list(types)}}
        with self._lock, self._documents.errors():
            rows = self._documents.rows(where, fields=_READ_SHORT)
            for name in types:
                self._running[name] = {_claim_of(row) for row in rows if row.task_type == name}
            return {name: len(self._running[name]) for name in types}

    def _enter(self, name: str, claims: Sequence[str], at_once: int) -> Collection[str]:
        """Which claims of a type have a place. These get one, if there are fewer than *at_once*.

        The document of the type has them in one list, which is replaced as a whole, if nobody
        else has changed it, by those that still run and new ones. So no place is given twice,
        and none is lost with a master. What runs is asked after the list was read: a claim in
        the list that does not run then has ended.
        """
        for _ in range(TRIES):
            if name not in self._entered:
                self._entered[name] = self._stored(name, "claims")["claims"]
                self._running.pop(name, None)
            if name not in self._running:
                self.running([name])
            there, running = self._entered[name], self._running[name]
            texts = [it for it in there if type(it) is str] if type(there) is list else []
            stay = [claim for claim in texts if claim in running]
            new = [*dict.fromkeys([*stay, *claims])][: max(at_once, len(stay))]
            if not set(claims).intersection(new):
                return new
            if self._swap(name, {"claims": there}, {"claims": new}):
                self._entered[name] = new
                running.update(new)
                return new
            del self._entered[name]
        return ()

    def _allowed(self, rows: list[Row], known: Mapping[str, Setting], now: int) -> list[Row]:
        """Those that may start of what was claimed by these Settings. The others are requeued."""
        current, back = self.settings(), list[Row]()
        for name in known.keys() | current.keys():
            mine = [row for row in rows if row.state == "running" and row.task_type == name]
            knew, now_set = (them.get(name, Setting()) for them in (known, current))
            if knew[:4] != now_set[:4]:
                back += mine
            elif mine and now_set.at_once is not None:
                entered = self._enter(name, list(map(_claim_of, mine)), now_set.at_once)
                back += [row for row in mine if _claim_of(row) not in entered]
        self.write_all([(row, requeued(row, now)) for row in back])
        return [row for row in rows if row not in back]

    def foreign(self, types: Iterable[str], now: int) -> list[str]:
        other = {"taskpool.lane": "", "taskType": {"$nin": list(types), "$gt": ""}}
        ready = {"taskpool.state": "ready", **other}
        due = {"taskpool.state": "scheduled", **other, "taskpool.ready_at": {"$lte": now}}
        with self._documents.errors(now):
            found = [self._tasks.distinct("taskType", where) for where in (ready, due)]
            return sorted({name for names in found for name in names if type(name) is str})

    def summary(self, now: int) -> list[tuple[Any, ...]]:
        with self._documents.errors(now):
            return summed(map(readable, self._documents.rows(_TASKS, now, _READ_SHORT)), now)

    def newest(
        self, query: Query, most: int, before: Sequence[Any] | None, chars: int, now: int
    ) -> list[Seen]:
        # What has no such date comes last.
        name = "ended_at" if query.states == ["failed"] else "created_at"
        at, where = f"taskpool.{name}", _selector(query, now)
        if before is not None:
            since, last = before
            older = [{at: since, "taskpool.id": {"$lt": last}}, {at: {"$lt": since}}]
            older += [{at: None}] if since is not None else []
            where = {"$and": [where, {"$or": older}]}
        with self._documents.errors(now):
            order = [(at, -1), ("taskpool.id", -1)]
            rows = self._documents.rows(where, now, sort=order, limit=most)
        return [seen(row, [getattr(row, name), row.id], chars) for row in map(readable, rows)]

    def schedules(self, most: int) -> list[Row]:
        where = {"$and": [_TASKS, {"taskpool.repeat": {"$gt": ""}}]}
        with self._documents.errors(0):
            rows = self._documents.rows(where, sort=_BY_DATE, limit=most)
        return list(map(readable, rows))


class _MongoFollowing(_MongoSide):
    """How a MongoStore tells tasks of the ends of those that they follow.

    A follower has its bonds in `taskpool.after`. A predecessor is marked by `taskpool.followed`:
    "yes", or how it has ended, if its followers are still to be told. As each write counts by
    itself, their order keeps the promises, and each step can be made again:

        what    first                      then                      last
        add     mark the predecessors      the task; its bonds       look at these once more,
                with "yes"                 begin with "?"            drop the "?"
        end     the end, and the mark      followers lose bonds,     mark "yes", or delete
                says how (`done`, if it    fail or are free          what was to go
                is to go)
        remove  all: `removed`             delete what is idle       what runs ends so
        claim   running, by this owner     look at limits again,     start, or requeue
                                           take a place
        limit   the setting                wait for the masters      places for what runs

    What a crash has cut short is finished by the next heartbeat of any master (add, end), by the
    end of the run (remove), or by recover() (claim).
    """

    has_bonds = True
    _succeeded: Collection[tuple[str, int]] = ()  # Claims that settle() is about to end.
    _now = 0  # The instant of the last change.

    def bonds(self, parents: _Ids = None, children: _Ids = None) -> list[Bond]:
        where = {"taskpool.after": {"$gt": ""}} if children is None else _named(children)
        if parents is not None:
            both = itertools.product(parents, (True, False))
            where = {"taskpool.after": {"$in": [_bond_text(*bond) for bond in both]}}
        limit = int(parents is children is None)
        with self._documents.errors():
            found = self._documents.ours(where, "after", limit=limit)
        bonds = itertools.chain(*map(_bonds_of, found))
        wanted = None if parents is None else set(parents)
        return [bond for bond in bonds if wanted is None or bond.parent in wanted]

    def followers(self, ids: Collection[str] | None = None) -> set[str]:
        children = None if ids is None else list(ids)
        return {bond.child for bond in self.bonds(children=children)}

    def _put(self, pairs: Sequence[_Pair], now: int, binds: bool = False) -> None:
        self._now = now
        self._new_bonds(pairs)
        if not all(self.write_all(pairs)):
            raise _Raced  # What is written stays so: the verb begins anew with the others.

    def _follow(self, ends: Iterable[tuple[str, str]], now: int) -> None:
        """Nothing: write_all() tells the followers."""

    def _new_bonds(self, pairs: Sequence[_Pair]) -> list[Bond]:
        """The bonds that are to be stored. Raises ValueError for those that cannot be."""
        bonds = [bond for _, new in pairs if new is not None for bond in new.after]
        if bonds:
            self._check_rings(pairs)
            kept = [old.id for old, new in pairs if new and old and keeps_bonds(old, new)]
            there = self.bonds(children=kept) if kept else []
            children = collections.Counter(child for _, child in {it[:2] for it in bonds + there})
            count = max(children.values())
            if count > _MOST_BONDS:
                text = f"after has {count:,} tasks; MongoDB holds at most {_MOST_BONDS:,} for one"
                raise ValueError(f"{text}: give it tasks that follow parts of them")
        return bonds

    def _end(self, old: Row, new: Row | None) -> tuple[Row, Row | None, str]:
        """*old*, what is to be written in place of it, and how it has ended by that, if others
        may follow it."""
        if not isinstance(old, _FollowedRow):
            return old, new, ""
        is_done = (old.id, old.claim) in self._succeeded
        how = "done" if is_done else how_ended(old, new)
        if new is None and how:
            new = old._replace(state="done", owner="", kept_until=1)  # As in _GONE.
        return old, new, how

    def _mark(self, bonds: Sequence[Bond]) -> None:
        """From now on none of these predecessors ends without telling."""
        where = _named({bond.parent for bond in bonds})
        alive = {**where, "taskpool.followed": None, "taskpool.state": {"$ne": "done"}}
        self._tasks.update_many(alive, {"$set": {"taskpool.followed": "yes"}})

    def _look_again(self, where: Mapping[str, Any]) -> None:
        """Tell new followers, among the documents *where*, of ends before the mark."""
        new = self._documents.ours({**where, "taskpool.after": _UNSURE}, "after")
        parents = {bond.parent for ours in new for bond in _bonds_of(ours)}
        if new:
            there = self._documents.ours(_named(parents), "state", "followed")
            states = {ours["id"]: ours.get("state") for ours in there}
            states.update((it["id"], "removed") for it in there if it.get("followed") == "removed")
            ends = {i: how for i in parents if (how := states.get(i, "done")) in _ENDINGS}
            self._tell(ends, [ours["id"] for ours in new])

    def _tell(self, ends: Mapping[str, str], children: Sequence[str] = ()) -> None:
        """Tell the followers of these tasks how they have ended; with *children* only those,
        which are sure of their bonds then."""
        among, held = _named(children) if children else {}, {"taskpool.state": "held"}
        removed = [parent for parent, how in ends.items() if how == "removed"]
        failed = 0
        for _ in range(TRIES if removed else 0):
            losers = {it.child: it.parent for it in self.bonds(removed) if not it.anyway}
            rows = self._documents.rows({**_named(losers), **held})
            pairs = [(row, orphaned(row, losers[row.id], self._now)) for row in rows]
            failed += len(pairs)
            if all(self.write_all(pairs)):
                break
        both = itertools.product(ends, (True, False))
        met = [_bond_text(i, anyway) for i, anyway in both if bond_after(ends[i], anyway)]
        met += [_UNSURE] if children else []
        where = {**among, "taskpool.after": {"$in": met}, "taskpool.after.0": {"$exists": True}}
        self._tasks.update_many(where, {"$pullAll": {"taskpool.after": met}})
        scheduled = {"taskpool.state": "scheduled", "onGoing": False}
        free = {"$set": scheduled, "$unset": {"taskpool.after": ""}}
        self.followed = self.followed[0] + 1, self.followed[1] + failed
        if self._tasks.update_many({**held, "taskpool.after": []}, free).matched_count:
            self._look_soon()
        for how in () if children else set(ends.values()):
            ids = [task_id for task_id, end in ends.items() if end == how]
            told = {**_named(ids), "taskpool.followed": how}
            if self._tasks.delete_many({**told, **_GONE}).deleted_count < len(ids):
                self._tasks.update_many(told, {"$set": {"taskpool.followed": "yes"}})

    def remove(self, query: Query, now: int) -> int:
        where = _selector(query, now)
        self._now = now
        mark = {"$max": {"taskpool.removed": 1}, "$unset": {"taskpool.successor": ""}}
        idle = {"taskpool.state": {"$ne": "running"}, "taskpool.removed": 1, **where}
        with self._documents.errors(now):
            # The marks come first: a task that is claimed before the delete keeps its mark.
            removed = cast(int, self._tasks.update_many(where, mark).matched_count)
            gone = self._tasks.delete_many({**idle, "taskpool.followed": None}).deleted_count
            if gone < removed:  # Some run, or are followed.
                self._tell_untold()  # Of an end before this one.
                idle["taskpool.followed"] = {"$nin": ["done", "removed"]}
                change = {"$set": {"taskpool.followed": "removed", "dueDate": None, **_GONE}}
                if self._tasks.update_many(idle, change).matched_count:
                    self._tell_untold()
            return removed

    def retry(self, query: Query, now: int) -> int:
        where = {"taskpool.state": "failed", **_selector(query, now)}
        retried = 0
        with self._documents.errors(now):
            for is_bound in (True, False):
                changes = _changes(_FAILED, after_retry(_FAILED, now, is_bound))
                where["taskpool.after.0"] = {"$exists": is_bound}
                retried += self._tasks.update_many(where, changes).matched_count
            return retried

    def _finish(self, now: int) -> None:
        """Tell what a crash has left untold, if there is anything."""
        self._now, free = now, {"taskpool.state": "held", "taskpool.after": []}
        untold = {"taskpool.followed": {"$in": _ENDINGS}}
        where = {"$or": [untold, {"taskpool.after": _UNSURE}, free]}
        if self._documents.find(where, {"_id": 1}, limit=1):
            self._look_again({})
            self._tell_untold()

    def expire(self, now: int) -> None:
        done = {"taskpool.state": "done", "taskpool.kept_until": {"$lte": now}}
        self._tasks.delete_many({**done, "taskpool.followed": {"$in": [None, "yes"]}})

    def _tell_untold(self) -> None:
        untold = self._documents.ours({"taskpool.followed": {"$in": _ENDINGS}}, "followed")
        self._tell({it["id"]: it["followed"] for it in untold if it["followed"] in _ENDINGS})


class MongoStore(_MongoFollowing):
    """Tasks in a MongoDB collection, shared by any number of processes and machines.

    *collection* is a pymongo Collection, or what behaves like one (it is never imported).
    Used are `find`, `distinct`, `count_documents`, `insert_many`, `update_one`,
    `update_many`, `find_one_and_update`, `delete_one`, `delete_many`, `bulk_write`,
    `create_index`, `full_name`, `database.client.start_session`, and [".masters"]. The
    client is yours: its write concern counts ("majority" is advised), and close() leaves
    it open. It must read from the primary.

    A document has the fields of nschwarz:cluster: `_id`, `taskType`, `priority`, `data`,
    `createdAt`, `onGoing`, `dueDate`, and our columns in the sub-document `taskpool`. A
    Meteor application may insert documents with those seven alone, and fields of its own.
    Its own poller starts nothing that runs here, waits for a retry or has ended. Data that
    a document cannot hold as values, and long data, are text in `taskpool.json`.

    Every change is one conditional write to one document. add() of several tasks uses a
    transaction, where the server has them (a replica set); elsewhere the StoreError of an
    add() that broke off lists what it stored. Whatever the driver raises is a StoreError;
    whether the server did what was asked is then unknown, and the cluster, which asks
    again, finds out.
    """

    def __init__(self, collection: Any) -> None:
        self._documents = _Documents(collection)
        self._tasks, self._masters = collection, self._documents.side
        self._transactions = True  # Until the server says that it has none.
        self._reset_after_fork()
        _reset_in_forks[id(self)] = self

    def __repr__(self) -> str:
        return f"MongoStore({self._documents.name!r})"

    def _at(self, owner: str, now: int, until: int) -> _Claims:
        """What is remembered of *owner*, which looks now."""
        claims = self._claims[owner]
        claims.owner, claims.now, claims.until = owner, now, until
        claims.clock = max(claims.clock, now)  # A clock set back makes nothing late.
        return claims

    def write_all(self, pairs: Sequence[_Pair]) -> list[bool]:
        bonds = [bond for _, new in pairs if new is not None for bond in new.after]
        if bonds:
            self._mark(bonds)
        todo = [self._end(cast(Row, old), new) for old, new in pairs]  # add() inserts.
        done = self._applied([old for old, *_ in todo], self._documents.replace(todo))
        self._look_soon(new for _, new, _ in todo)
        for (old, new, _), is_done in zip(todo, done):
            claims = self._claims.get(str(old.owner))
            if claims and old.id in claims.rows:
                if not is_done:
                    claims.rows[old.id] = old._replace(state="")  # settle() reads it again.
                elif new is not None and new.state == "running":
                    claims.rows[old.id] = new
        ends = {old.id: how for (old, _, how), is_done in zip(todo, done) if is_done and how}
        if ends:
            self._tell(ends)
        if bonds:
            self._look_again(_named({bond.child for bond in bonds}))
        return done

    def _applied(self, rows: list[Row], hits: list[bool | None]) -> list[bool]:
        """Which of these Rows our writes have changed, where *hits* says whether the documents
        were found. A lost reply to settle() may have told of the same change."""
        unsure = {claim for claims in list(self._claims.values()) for claim in claims.unsure}
        missed = [(row, hit) for row, hit in zip(rows, hits) if not hit]
        perhaps = {r.id: r for r, hit in missed if hit is None or (r.id, r.claim) in unsure}
        found = self._documents.rows(_named(perhaps), fields=_READ_SHORT) if perhaps else ()
        for row in found:
            old = perhaps[row.id]
            # If the task has changed, take it that our write was applied, unless the task was
            # recovered since. (A recovery is not seen if a further run has ended as well.)
            same = (row.state, row.owner, row.claim) == (old.state, old.owner, old.claim)
            if same or row.interrupted > old.interrupted:
                del perhaps[row.id]
        return [bool(hit) or row.id in perhaps for row, hit in zip(rows, hits)]

    # ---- Adding

    def add(self, additions: Sequence[tuple[Row, str]], now: int) -> list[Row]:
        many, ids = len(additions) > 1, [new.id for new, _ in additions]
        for new, _ in additions:
            if len(new.data) * 4 > _MOST_BYTES and len(new.data.encode()) > _MOST_BYTES:
                raise ValueError(f"data of {_shown(new.id)}: over {_MOST_BYTES:,} bytes as JSON")
        there: list[Row] = []  # The first try reads nothing, as most ids are new.
        parents = {bond.parent for new, _ in additions for bond in new.after}
        self._now = now
        with self._documents.errors():
            for attempt in range(TRIES):
                whole = not many or self._transactions  # Else a failure may store a part of it.
                if attempt or parents or not whole:
                    there = self.rows(Query(ids=[*ids, *parents]), now)
                pairs, rows = after_adds(there, additions)
                if bonds := self._new_bonds(pairs):
                    self._mark(bonds)
                    pairs = [(o, _FollowedRow(*n) if n.id in parents else n) for o, n in pairs]
                try:
                    self._documents.store(pairs, whole and many)
                    self._look_soon(new for _, new in pairs)
                    if bonds:
                        self._look_again(_named({bond.child for bond in bonds}))
                    return [row._replace(after=()) if bonds else row for row in rows]
                except Exception as error:
                    last, code = self._documents.text(error), getattr(error, "code", None)
                    if many and whole and (code == 20 or isinstance(error, NotImplementedError)):
                        self._transactions = False  # A server that is alone; mongomock.
                    elif not (whole and _was_race(error)):
                        raise StoreError(f"{last}{self._documents.stored(rows)}") from error
            text = "others change the same tasks all the time, or an index of yours forbids them"
            raise StoreError(f"{last}; {text}")

    # ---- Running

    def _claim(
        self, owner: str, costs: Mapping[str, float], limit: float, now: int, until: int,
        settings: Mapping[str, Setting] | None = None,
    ) -> list[Row]:  # fmt: skip
        claims = self._at(owner, now, until)
        self._waiting(claims, [None, "scheduled"], list(costs), 1)
        claims.few = False
        return self._claim_ready(claims, costs, limit, settings)

    def turn(
        self, owner: str, outcomes: Sequence[Outcome], types: Mapping[str, float], room: float,
        most: int, now: int, until: int = NEVER, eager: bool = False,
        settings: Mapping[str, Setting] | None = None,
    ) -> Turn:  # fmt: skip
        """Store.turn() in few commands. It looks for waiting tasks if nothing ended and nothing
        was added, but at least every other second, and remembers what it saw."""
        # First, as it may raise: what is settled is to be told.
        known = self.settings() if settings is None else settings
        led = self.settle(owner, outcomes, now) if outcomes else []
        types = {n: cost for n, cost in types.items() if n not in known or not known[n].paused}
        rows, room, limited = list[Row](), room if types else 0.0, types.keys() & known.keys()

        def look_and_claim() -> list[int]:
            claims, view = self._at(owner, now, until), (types.keys(), until)
            if claims.view != view:
                claims.view, claims.looked_at = view, 0
            claims.asked = most
            asked = room > 0 and bool(outcomes or eager)
            late = not 0 <= now - claims.looked_at < 1.5e6 * WATCH_SECONDS
            if most and (late or not asked or any(row.ready_at <= now for row in claims.later)):
                self._look(claims, types, known, most)
                asked = bool(claims.ready)
            # After a clock was set back a look may not find what is ready: claim all the same.
            if room > 0 and (asked or not 0 <= now - claims.claimed_at < 1e6 * RENEW_SECONDS):
                rows.extend(self._claim_ready(claims, types, room, settings))
                if eager and not rows and most:
                    self._look(claims, types, known, most)
            current = self.settings() if settings is None else settings  # Starts change them.
            return self._due(claims, current, most)

        try:
            return Turn(led, rows, self._change(look_and_claim), limited)
        except StoreError:
            self._claims[owner].looked_at = 0  # That look may be cut short.
            if not (led or rows):
                raise
            return Turn(led, rows, [now], limited)  # What is settled and claimed counts.

    def _claim_ready(
        self, claims: _Claims, costs: Mapping[str, float], limit: float,
        settings: Mapping[str, Setting] | None,
    ) -> list[Row]:  # fmt: skip
        """Claim what is ready. A single command can claim the first task, whichever that is: it
        comes first if the last claim took one task at most, or if there is room for one."""
        owner, now, rows, more = claims.owner, claims.now, list[Row](), True
        known = self.settings() if settings is None else settings
        claims.claimed_at, claims.joined = now, False
        was_in_doubt, claims.in_doubt = claims.in_doubt, True
        least, most = max(min(costs.values()), LEAST_SHARE), max(*costs.values(), 1.0)
        is_free = known.keys().isdisjoint(costs)
        if is_free and most <= limit + 1e-9 and (claims.few or limit + 1e-9 < 2 * least):
            where = self._claimable(claims, costs)
            with contextlib.suppress(_Raced):  # The server cannot change that document so.
                rows = self._start(owner, where, now, True)
                claims.took(rows)
                if not rows:
                    claims.ready, claims.more = [], False
                limit -= sum(cost_of(row, costs) for row in rows if row.state == "running")
                claims.joined = True
                if limit + 1e-9 < least and (claims.ready or claims.more or not claims.asked):
                    more = False  # The room is full, and what is left is known or not asked.
                more = more and bool(rows) and not rows[0].interrupted
        if more:
            rows += super()._claim(owner, costs, limit, now, claims.until, known)
            claims.few = len(rows) < 2
        if settings is None:  # Else the caller answers for it.
            rows = self._allowed(rows, known, now)
        claims.rows.update((row.id, row) for row in rows if row.state == "running")
        claims.in_doubt = was_in_doubt  # Every claim that the server made is known.
        return rows

    def _claimable(self, claims: _Claims, types: Iterable[str]) -> dict[str, Any]:
        where: dict[str, Any] = {
            "taskpool.state": "ready",
            "taskpool.lane": {"$in": ["", claims.owner]},
            "taskType": {"$in": list(types)},
            "taskpool.promoted_at": {"$not": {"$gt": claims.clock}},  # By a fast clock. (P6)
        }
        if claims.until != NEVER:
            where.update(_were_due(claims.until))
        if any(row.interrupted for row in claims.rows.values()):
            where["taskpool.interrupted"] = None
        return where

    def candidates(
        self, owner: str, types: Iterable[str], most: int, now: int, until: int,
        places: Mapping[str, int],
    ) -> Iterator[Row]:  # fmt: skip
        claims, types = self._claims[owner], list(types)
        # Also types without a place, to see what waits there.
        first, claims.more = self._ready(claims, [*{*types, *places}], most)
        claims.ready = first
        # A task that was interrupted is taken alone.
        alone = next((n for n, row in enumerate(first) if row.interrupted and claims.joined), None)
        yield from first[:alone]
        if alone is not None or not (places and claims.more):
            return
        # There is room still: what may start stands behind what may not. Look for each type.
        free = [name for name in types if name not in places]
        rest, claims.more = self._ready(claims, free, most)
        for name in set(types).intersection(places):
            rest += self._ready(claims, [name], min(places[name], most))[0]
        ids = {row.id for row in first}
        rest = [row for row in rest if row.id not in ids]
        # In order, behind what cannot be run.
        rest.sort(key=lambda row: () if _unusable(row) else (-row.priority, row.created_at))
        claims.ready = first + rest
        yield from rest

    def _ready(self, claims: _Claims, types: list[str], most: int) -> tuple[list[Row], bool]:
        """The first Rows that can be claimed: *most* and as many as are asked of; and whether
        there may be others."""
        where, now, limit = self._claimable(claims, types), claims.now, most + claims.asked
        options = {"sort": _RANK, "limit": limit + 1, **self._documents.by("taskpool_ready")}
        rows = self._documents.rows(where, now, _READ_SHORT, **options) if types else []
        if any(row.expires is not None and expiry(readable(row), now) for row in rows):
            options["limit"] += ASIDE_TASKS  # Those are set aside, and told of with all columns.
            rows = self._documents.rows(where, now, **options)
            # A schedule is claimed first, so that its followers are told of a run that ended.
            rows = [row if row.repeat is None else row._replace(expires=None) for row in rows]
        return rows, len(rows) > limit

    def take(self, rows: Sequence[Row], owner: str, now: int) -> list[Row]:
        where = {"taskpool.state": "ready", **_named(row.id for row in rows)}
        taken = self._start(owner, where, now, len(rows) == 1)
        self._claims[owner].took(taken)
        return taken

    def _start(self, owner: str, where: dict[str, Any], now: int, one: bool) -> list[Row]:
        """ready -> running for all that *where* selects, or only for the first (*one*). Returns
        the Rows after that; those that are not to start have been set aside."""
        held = {**where, **_held_by(owner)}
        mine = {**_held_by(owner), "taskpool.ready_at": now, "onGoing": True}
        update = {"$set": mine, "$inc": {"taskpool.claim": 1, "taskpool.attempt": 1}}
        options = {} if "taskpool.id" in where else self._documents.by("taskpool_ready")
        try:
            if one:
                found = self._tasks.find_one_and_update(
                    where, update, _READ, sort=_RANK, return_document=True, **options
                )
                rows = [_row_of(found, found["taskpool"])] if found else []
            else:  # Read after the write: what others changed until then counts.
                self._tasks.update_many(where, update)
                rows = self._documents.rows(held, now, sort=_RANK)
        except Exception as error:
            if getattr(error, "code", None) in _REFUSED:
                raise _Raced from error
            _undecodable(error)
            known = {row.id: row.claim for row in self._claims[owner].rows.values()}
            rows = self._documents.rows(held, now)
            rows = [row for row in rows if known.get(row.id) != row.claim]
        return self._sound(rows, now)

    def _sound(self, rows: list[Row], now: int) -> list[Row]:
        """Set aside those that are not to run. Returns all, as they are told of then."""
        after = [_sorted_out(row, now) for row in rows]
        self.write_all([(row, new) for row, (new, _) in zip(rows, after) if new is not row])
        aside = [told for row, (new, told) in zip(rows, after) if new is not row]
        self._count("expired", filter(is_late, aside))
        return [told for _, told in after]

    def _requeue_unknown(self, owner: str, now: int) -> None:
        """running -> ready, for claims that the server made and could not tell us of."""
        claims = self._claims[owner]
        known = {(row.id, row.claim) for row in claims.rows.values()}
        held = self._documents.rows(_held_by(owner), now, _READ_SHORT)
        unknown = [row for row in held if (row.id, row.claim) not in known]
        self.write_all([(row, checked(requeued, row, now)) for row in unknown])
        claims.in_doubt = False

    def held_by(self, owner: str, outcomes: Sequence[Outcome] | None = None) -> list[Row]:
        if outcomes is None:
            with self._documents.errors():
                return self._documents.rows(_held_by(owner))
        known = self._claims[owner].rows
        sure = {(row.id, row.claim) for row in known.values() if row.state == "running"}
        ids = [outcome.id for outcome in outcomes if outcome[:2] not in sure]
        rows = self._documents.rows({**_named(ids), **_held_by(owner)}) if ids else []
        known.update((row.id, row) for row in rows)
        return [known[o.id] for o in outcomes if o.id in known]

    def _settle(self, owner: str, outcomes: Sequence[Outcome], now: int) -> list[str]:
        claims = self._claims[owner]
        self._now = now
        self._succeeded = {it[:2] for it in outcomes if it.state == "done"}
        try:
            led = super()._settle(owner, list(map(_fitting, outcomes)), now)
        except BaseException:
            claims.unsure.update(outcome[:2] for outcome in outcomes)
            raise
        claims.unsure.difference_update(outcome[:2] for outcome in outcomes)
        for (task_id, claim, *_), became in zip(outcomes, led):
            row = claims.rows.get(task_id)
            if row is not None and row.claim == claim and became != "running":
                del claims.rows[task_id]
        return led

    def _renew(self, owner: str, now: int) -> None:
        super()._renew(owner, now)
        self._finish(now)
        self._requeue_unknown(owner, now)

    # ---- Looking

    def early(self, now: int) -> list[Row]:
        return []  # `promoted_at` keeps these back.

    def next_due(
        self, owner: str, types: Iterable[str], limit: int, now: int, until: int = NEVER
    ) -> list[int]:
        with self.transaction():
            claims = copy.copy(self._at(owner, now, until))  # turn() remembers its own look.
            self._look(claims, types, {}, limit)
            return self._due(claims, {}, limit)

    def _due(self, claims: _Claims, settings: Mapping[str, Setting], most: int) -> list[int]:
        """upcoming(), of the tasks that are remembered."""
        now, dates = claims.now, dict[str, list[int]]()
        for row in claims.ready:
            dates.setdefault(str(row.task_type), []).append(now)
        for row in claims.later:
            dates.setdefault(str(row.task_type), []).append(row.ready_at)
        limited = {name: settings[name] for name in dates if name in settings}
        counted = [name for name, it in limited.items() if it.at_once is not None]
        if not self._running.keys() >= set(counted):
            self.running(counted)
        for name, setting in limited.items():
            starts = openings(setting, len(self._running.get(name, ())), most, now)
            if starts and setting.next_at > starts[0]:
                starts[0] = now  # A clock was set back: a claim is to cut next_at down.
            dates[name] = list(map(max, starts, sorted(dates[name])))
        more = [now] * most if claims.more else []
        return sorted(itertools.chain(more, *dates.values()))[:most]

    def _look(
        self, claims: _Claims, types: Iterable[str], settings: Mapping[str, Setting], most: int
    ) -> None:
        """Read what can start, now and later: at least the first *most* tasks, of each type with
        a limit and of all others."""
        claims.ready, claims.later, claims.looked_at = [], [], claims.now
        found = [self._first(claims, list(types), most)]
        limited = [name for name in types if name in settings]
        if limited and len(found[0]) > most:  # Some types may stand behind others.
            free = [name for name in types if name not in settings]
            found = [self._first(claims, group, most) for group in (*zip(limited), free)]
        for rows in found:
            before = len(claims.ready)
            for row in rows:
                is_ready = row.ready_at <= (claims.clock if row.state == "ready" else claims.now)
                (claims.ready if is_ready else claims.later).append(row)
            claims.more = len(claims.ready) - before > most  # Of all, or of the free ones.

    def _first(self, claims: _Claims, types: Sequence[str], most: int) -> list[Row]:
        rows = self._waiting(claims, [None, "ready", "scheduled"], types, most + 1)
        ready = [row for row in rows if row.state == "ready"]
        if len(rows) > most and ready:  # Scheduled ones may stand behind these.
            return ready + self._waiting(claims, ["scheduled"], types, most)
        return rows

    def _waiting(
        self, claims: _Claims, states: list[Any], types: Sequence[str], most: int
    ) -> list[Row]:
        """The first Rows of these states by date, for each slice of *types*. Before that, new
        documents (state None) become tasks; after that, what is due becomes ready."""
        owner, now, rows = claims.owner, claims.now, list[Row]()
        if claims.in_doubt:
            self._requeue_unknown(owner, now)
        for start in range(0, len(types), _TYPES_AT_ONCE):
            where: dict[str, Any] = {
                "taskpool.state": {"$in": states},
                "taskpool.lane": {"$in": [None, "", owner]},
                "taskType": {"$in": list(types[start : start + _TYPES_AT_ONCE])},
            }
            if claims.until != NEVER:
                where.update(_were_due(claims.until))
            options = {"sort": _BY_DATE, **self._documents.by("taskpool_scheduled")}
            found = self._documents.rows(where, now, _READ_SHORT, limit=most, **options)
            # A task without a date is never due, so it fails here; other faults are found when
            # the task is claimed.
            self._sound([row for row in found if type(row.ready_at) is not int], now)
            found = [row for row in found if type(row.ready_at) is int]
            if any(row.state == "scheduled" and row.ready_at <= now for row in found):
                where.update({"taskpool.state": "scheduled", "taskpool.ready_at": {"$lte": now}})
                due = self._documents.rows(where, now, _READ_SHORT, limit=PROMOTE_TASKS, **options)
                change = {"taskpool.state": "ready", "taskpool.promoted_at": now}
                where.update(_named(row.id for row in due))
                self._tasks.update_many(where, {"$set": change})
            rows += found
        return rows

    def rows(self, query: Query, now: int) -> list[Row]:
        options = {"sort": _RANK[1:], "skip": query.offset, "limit": query.limit or 0}
        where = _selector(query, now)
        if query.limit == 0:
            return []  # For MongoDB this is no limit.
        with self._documents.errors(now if query.ids is None else None):
            rows = self._documents.rows(where, now, **options)
            # Waiters look often and find their tasks, until the end: adopt() only then.
            missed = query.ids is not None and len(rows) < len(set(query.ids))
            if missed and self._documents.adopt(now):
                rows = self._documents.rows(where, now, **options)
            return rows

    def count(self, query: Query, now: int) -> int:
        with self._documents.errors(now):
            return cast(int, self._tasks.count_documents(_selector(query, now)))


@atexit.register
def _close_stores() -> None:
    """At the end of the program: from Python 3.13 on, sqlite3 warns of what nobody closed.

    Registered by the import, so that it comes after the ends of clusters.
    """
    for store in _living(SQLiteStore):
        if store._write_lock.acquire(timeout=EXIT_SECONDS):
            store.close()
            store._write_lock.release()


# --- Calls ---------------------------------------------------------------------------
# How a task's function is called: in a worker, or here by TaskQueue.run_due.

TaskFunction = Callable[..., Any]
Broker = Callable[[Callable[[Any], None], dict[str, Any]], Any]


class _Failure(NamedTuple):
    """An exception on its way to another process."""

    type_name: str
    text: str
    traceback: str
    pickled: bytes | None  # None if it cannot be rebuilt.


def _dumps(value: Any) -> bytes:
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def _cut(text: str, most: int = ERROR_CHARS) -> str:
    text = text[: most + 1].encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else text[:most] + "... (cut)"


def _users_frames(trace: Any) -> Any:
    """The part of a traceback from the first frame that is not of this file on, if it has one."""
    rest, ours = trace, _users_frames.__code__.co_filename
    while rest is not None and rest.tb_frame.f_code.co_filename == ours:
        rest = rest.tb_next
    return rest or trace


def _failure(error: BaseException) -> _Failure:
    """Describe *error*, even if its own methods raise."""
    kind = type(error)
    plain = kind.__module__ in ("builtins", "__main__", "__mp_main__")
    name = _cut(kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}")
    text = _cut(_message(error))
    try:
        lines = traceback.format_exception(kind, error, _users_frames(error.__traceback__))
        trace = _cut("".join(map(_cut, lines)), 4 * ERROR_CHARS)
    except BaseException:
        trace = f"{name}: {text}"
    pickled = None
    if isinstance(error, Exception):  # SystemExit and its like would end the receiver.
        with contextlib.suppress(BaseException):
            attempt = _dumps(error)
            if len(attempt) <= EXCEPTION_BYTES and type(pickle.loads(attempt)) is kind:
                pickled = attempt
    return _Failure(name, text, trace, pickled)


def _error_text(failure: _Failure) -> str:
    """Task.error: type, message, traceback."""
    head = f"{failure.type_name}: {failure.text}" if failure.text else failure.type_name
    return f"{head}\n\n{failure.traceback}" if failure.traceback else head


def _rebuilt(failure: _Failure) -> Exception:
    """The exception of *failure*, or the RemoteError that stands for it."""
    error = None if failure.pickled is None else _loaded(failure.pickled)[0]
    if not isinstance(error, Exception):
        error = RemoteError(failure.type_name, failure.text, failure.traceback)
    # Like `error.__cause__ = ...`, but a __setattr__ of the user's class is not called.
    cause = _RemoteTraceback(failure.traceback)
    BaseException.__dict__["__cause__"].__set__(error, cause)
    return error


# What a run left; bytes or bytearray: its pickled result.
_Left = Union[bytes, bytearray, _Failure, Exception]
_NONE = b""  # Stands for the pickled None, which is what most tasks return.


def _unpacked(left: _Left) -> tuple[Any, Exception | None]:
    """The result and the exception of a run. Unpickling runs code of the user's classes."""
    if isinstance(left, _Failure):
        return None, _rebuilt(left)
    if not isinstance(left, (bytes, bytearray)):
        return None, left
    result, error = _loaded(left) if left else (None, None)
    if error is None:
        return result, None
    failure = _failure(error)
    text = f"the result cannot be unpickled: {failure.type_name}: {failure.text}"
    return None, RemoteError(failure.type_name, text, failure.traceback)


def _signature(function: Any) -> Any:
    """An inspect.Signature, or None where a function does not tell how it is called."""
    import inspect

    options: dict[str, Any] = {}
    default = (inspect.signature.__kwdefaults__ or {}).get("annotation_format")
    if default is not None:  # Python 3.14: annotations may name what is not defined (yet).
        options["annotation_format"] = type(default).FORWARDREF
    with contextlib.suppress(TypeError, ValueError):
        return inspect.signature(function, follow_wrapped=False, **options)
    return None


class _Style(NamedTuple):
    """How a task's function is called: with `job`, and with what else."""

    toggle_ipc: str = ""  # How that is passed: by "name", by "position", or not at all.
    known: frozenset[str] = frozenset()  # Its keyword-only parameters: `data` fills them.
    required: frozenset[str] = frozenset()  # Those without a default.
    takes_rest: bool = False  # **rest takes the other keys of `data`, but for these:
    taken: frozenset[str] = frozenset()

    def submitted(self, data: Any) -> Any:
        """What submit() and map() mean by *data*: None is no data where keywords are filled."""
        if not self.known:
            return data
        if type(data) is _Chunk:
            return _Chunk({} if one is None else one for one in data)
        return _NO_DATA if data is None else data

    def keywords(self, task_type: str, data: Any) -> dict[str, Any]:
        """The arguments that `data` fills. Raises TypeError if *data* do not fit."""
        if not self.known:
            return {}
        if not isinstance(data, dict):
            optional = sorted(f"{name}=" for name in self.known - self.required)
            names = ", ".join([*sorted(self.required), *optional])
            raise _wrong_type("data", data, f"a dict for the parameters of {task_type!r}: {names}")
        unknown = data.keys() - self.known
        if self.takes_rest:  # Pickled data may have keys that are no names.
            unknown = {key for key in unknown if key in self.taken or not isinstance(key, str)}
        for name in sorted(self.required - data.keys()):
            raise TypeError(f"data has no {name!r}, which the function of {task_type!r} needs")
        for name in sorted(map(str, unknown)):
            nearest = _nearest(name, self.known - data.keys())
            raise TypeError(f"data has {name!r}, which {task_type!r} does not take{nearest}")
        return data


_PLAIN = _Style()


def _call_style(function: TaskFunction) -> _Style:
    """How to call a task's function. Raises TypeError if nothing says what a parameter gets.

    A decorator that takes any arguments may pass them on: ask its inner function.
    """
    own: Any = function
    bound = {"toggle_ipc"}
    while isinstance(own, functools.partial):  # Its signature has more keyword-only parameters.
        own, bound = own.func, bound | own.keywords.keys()
    signature, toggle_ipc = _signature(function), ""
    if signature is None or isinstance(function, BuiltinFunctionType):
        signature = _signature(lambda *_, **__: None)  # Only some builtins have one: check none.
    parameters = list(signature.parameters.values())
    anything = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not positional and not any(p.kind is p.VAR_POSITIONAL for p in anything):
        raise TypeError("takes no positional argument")
    inner = getattr(_signature(own), "parameters", {}).values()
    keywords = {p.name for p in inner if p.kind is p.KEYWORD_ONLY} - bound
    keywords &= signature.parameters.keys()
    required = {p.name for p in parameters if p.default is p.empty and p.name in keywords}
    for p in parameters:
        must, named = p.default is p.empty, p.name == "toggle_ipc"
        if p in positional[:1] or p in anything or p.name in keywords:
            continue
        if named and p.kind is not p.POSITIONAL_ONLY:
            toggle_ipc = "name"
        elif p in positional[1:2] and (named or (must and p.name in ("toggleIPC", "ipc"))):
            toggle_ipc = "position"
        elif must or named:
            raise TypeError(f"has {p.name!r}, for which there is no value")
    rest = any(p.kind is p.VAR_KEYWORD for p in anything)
    if toggle_ipc or keywords:
        taken = frozenset(bound.union(p.name for p in positional))
        return _Style(toggle_ipc, frozenset(keywords), frozenset(required), rest, taken)
    if anything and hasattr(own, "__wrapped__"):
        with contextlib.suppress(TypeError):
            style = _call_style(own.__wrapped__)
            if not rest:
                return _Style(style.toggle_ipc)
            left = style._replace(known=style.known - bound, required=style.required - bound)
            return left if style.known else style
    return _PLAIN


def _checked_function(name: str, function: Any) -> _Style:
    """How to call a function that somebody gave as *name*."""
    import inspect

    if not callable(function):
        raise _wrong_type(name, function, "a function")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        allowed = "a function without `yield`: to call this one runs nothing, it makes a generator"
        raise _wrong_type(name, function, allowed)
    try:
        return _call_style(function)
    except TypeError as error:
        allowed = (
            "what can be called as function(job) or function(job, toggle_ipc), where a second "
            "positional parameter is named toggle_ipc, toggleIPC or ipc, or has a default, and "
            f"keyword-only ones are filled from data: this {error}"
        )
        raise _wrong_type(name, function, allowed) from None


def _check_takes(name: str, function: Any, arguments: Sequence[Any], allowed: str) -> None:
    """Raise TypeError if *function*, given as *name*, cannot be called with these arguments."""
    if not callable(function):
        raise _wrong_type(name, function, allowed)
    signature = _signature(function)
    try:
        signature and signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} is {_shown(function)}: {error}; give {allowed}") from None


def _check_broker(broker: Any) -> None:
    if broker is not None:
        allowed = "None or a function of (respond, message)"
        _check_takes("message_broker", broker, (None, None), allowed)


def _checked_message(message: Any) -> Any:
    allowed = 'a dict {"status": int > 1, "data": any}'
    if type(message) is not dict or not {"status"} <= set(message) <= {"status", "data"}:
        raise _wrong_type("message", message, allowed)
    if type(message["status"]) is not int or message["status"] <= 1:
        raise _wrong("status", message["status"], "an int over 1 (0 and 1 are taken)", int)
    return {"status": message["status"], "data": message.get("data")}


def _checked_task_map(task_map: Any) -> tuple[dict[str, TaskFunction], dict[str, _Style]]:
    """A copy of a task map, and how its functions are called."""
    if not isinstance(task_map, Mapping):
        allowed = "a dict of {task_type: function}, or only `queue=`, with declared tasks"
        raise _wrong_type("task_map", task_map, allowed)
    if not task_map:
        raise _wrong_value("task_map", task_map, "at least one {task_type: function}")
    styles = {}
    for task_type, function in task_map.items():
        _checked_text("a key of task_map", task_type)
        styles[task_type] = _checked_function(f"task_map[{task_type!r}]", function)
    return dict(task_map), styles


def _awaited(value: Any) -> Any:
    """The value itself; of a coroutine, what it returns in the end."""
    if type(value) is CoroutineType:
        import asyncio

        loop = None
        with contextlib.suppress(RuntimeError):  # Else the task's errors would show it.
            loop = asyncio.get_running_loop()
        if loop is None:
            return asyncio.run(value)
        # run_due was called inside a running loop: a second one needs another thread.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, value).result()
    return value


def _returned(
    function: TaskFunction, style: _Style, job: Task, toggle_ipc: Callable[[], Any]
) -> Any:
    """What a task's function returns."""
    if style is _PLAIN:
        return function(job)
    keywords = style.keywords(job.task_type, job.data)
    if style.toggle_ipc == "name":
        keywords = {**keywords, "toggle_ipc": toggle_ipc()}
    position = [toggle_ipc()] if style.toggle_ipc == "position" else []
    return function(job, *position, **keywords)


def _result_of(value: Any) -> Any:
    """What a task's function ends with: of a coroutine or a Future, its result."""
    value = _awaited(value)
    while isinstance(value, Future):
        value = value.result()
    return value


def _call(
    function: TaskFunction, style: _Style, job: Task, toggle_ipc: Callable[[], Any],
    begin: Callable[[], Any] | None = None,
) -> Any:  # fmt: skip
    """The result of a task. Of a chunk: the results of its items, one after another; *begin* is
    called before each."""
    if not job._row.items:
        return _result_of(_returned(function, style, job, toggle_ipc))
    row, report = job._row._replace(data="", items=0), job._report
    results, is_plain, known = [], style is _PLAIN, None
    for data in job.data:
        if begin is not None:
            begin()
        item = _new_item(_Item)  # In half of the time of _Item(): the work may be small.
        _set_row(item, row)
        _set_report(item, report)
        _set_data(item, data)
        value = function(item) if is_plain else _returned(function, style, item, toggle_ipc)
        if type(value) is not known:  # Most items give a value of the kind of the last one.
            result = _result_of(value)
            known, value = type(value) if result is value else None, result
        results.append(value)
    return results


def _packed(value: Any) -> bytes:
    try:
        return _dumps(value)
    except Exception as error:
        kind = type(value).__name__
        raise TypeError(f"the result ({kind}) cannot be pickled: {error}") from error


def _kept(row: Row, value: Any) -> tuple[str | None, str | None]:
    """For a task that stays in its store: the result as JSON, and why it cannot be kept."""
    if row.keep_result is None and row.repeat is None:
        return None, None
    try:
        _check_json(value, "result", 0)
        return _encode(value), None
    except (TypeError, ValueError) as error:
        problem = _cut(f"the result is kept as None: {error}")
        return None, None if row.keep_result is None else problem


def _resolve(future: Future[Any], value: Any = None, error: BaseException | None = None) -> None:
    """Resolve *future*, unless it already is."""
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)


_following = threading.local()  # Of each thread: the calls that _follow is making.


def _follow(future: Future[Any], result: Any) -> None:
    """Resolve *future* with *result*. If that is a Future itself, wait for what it ends with."""
    if not isinstance(result, Future):
        _resolve(future, result)
        return

    def copy() -> None:
        cancelled = concurrent.futures.CancelledError() if result.cancelled() else None
        error = cancelled or result.exception()
        if error is not None:
            _resolve(future, error=error)
        else:
            _follow(future, result.result())

    def copy_in_turn(_: Future[Any]) -> None:
        # A long chain of Futures must not nest its calls: the stack would overflow.
        calls: list[Callable[[], None]] = vars(_following).setdefault("calls", [])
        calls.append(copy)
        if len(calls) == 1:
            try:
                for call in calls:  # The list grows meanwhile.
                    call()
            finally:
                calls.clear()

    result.add_done_callback(copy_in_turn)


class _Conversation(Future[Any]):
    """What toggle_ipc(on_message, initialize) returns: the Future of what on_message returns
    for the broker's answer to the one message that `initialize` sends. *begin* registers the
    conversation, and returns the function that sends the pickled message."""

    def __init__(
        self, begin: Callable[[Any], Callable[[bytes], None]], on_message: Any, initialize: Any
    ) -> None:
        if not callable(on_message) or not callable(initialize):
            raise TypeError("toggle_ipc(on_message, initialize) takes two functions")
        super().__init__()
        self.set_running_or_notify_cancel()
        self._on_message, self._ask = on_message, begin(self)
        self._sent = threading.Lock()  # Held from the first send() on.
        try:
            initialize(self.send)
        except Exception as error:
            _resolve(self, error=error)

    def send(self, message: Any) -> None:
        """Send {"status": int > 1, "data": any} to the broker, once."""
        try:
            if not self._sent.acquire(blocking=False):
                raise RuntimeError("send() was called twice in one conversation")
            self._ask(_dumps(_checked_message(message)))
        except Exception as error:
            _resolve(self, error=error)

    def take(self, ok: bool, value: Any) -> None:
        """Take the pickled answer of the broker, or the _Failure that stands for it."""
        try:
            if not ok:
                raise _rebuilt(value)
            _follow(self, _awaited(self._on_message(pickle.loads(value))))
        except BaseException as error:
            _resolve(self, error=error)


def _consult(
    broker: Broker | None, packed: bytes, about: Mapping[str, Any],
    answer: Callable[[bool, Any], None],
) -> None:  # fmt: skip
    """Have the broker answer a pickled message. Raises what the broker raises.

    Calls answer(True, a pickle) or answer(False, a _Failure): once at most, now or later.
    """
    if broker is None:
        text = "there is no message_broker to answer toggle_ipc; give one to Cluster or run_due"
        answer(False, _failure(RuntimeError(text)))
        return
    answered = threading.Lock()  # Held from the first answer on.

    def answer_once(ok: bool, value: bytes | _Failure) -> None:
        if answered.acquire(blocking=False):
            answer(ok, value)

    def respond(value: Any = None) -> None:
        """Answer the message: now or later, from any thread. The first answer counts."""
        try:
            answer_once(True, _dumps(value))
        except Exception as error:
            answer_once(False, _failure(error))
            raise

    try:
        _awaited(broker(respond, {**pickle.loads(packed), **about}))
    except BaseException as error:
        answer_once(False, _failure(error))
        raise


class _Reports:
    """Reports of job.progress on their way out: at most ten a second, and the last one."""

    def __init__(self, send: Callable[[int, str], None], lock: Any = None) -> None:
        self._send = send  # Given the number of the run and the JSON of a Progress.
        # Protects all attributes below. If send() has a lock, this is the same one: with two
        # locks, the timer and a signal handler inside send() could wait for each other.
        self._lock = lock or threading.RLock()
        self._number = -1  # Of the running task, or -1.
        self._unsent: tuple[int, Progress] | None = None
        self._next = 0.0  # Monotonic: when the next report may be sent.
        self._timer: threading.Timer | None = None  # Sends the unsent report then.

    def begin(self, number: int) -> Callable[..., None]:
        """The `job.progress` of a run that begins."""
        self._number = number
        return functools.partial(self._report, number)

    def end(self) -> None:
        """The run has ended: send its last report."""
        if self._unsent is not None or self._timer is not None:
            self.flush()
        self._number = -1

    def _report(
        self, number: int, done: float, total: float | None = None, note: str | None = None
    ) -> None:
        report = _checked_progress(done, total, note)
        with self._lock:
            if number != self._number:
                raise RuntimeError("progress was called after its task had ended")
            self._unsent = number, report
            wait = self._next - time.monotonic()
            if wait <= 0:
                self.flush()
            elif self._timer is None:
                self._timer = threading.Timer(wait, self.flush)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Send the unsent report, if its run has not ended meanwhile."""
        with self._lock:
            timer, self._timer = self._timer, None
            if timer is not None:
                timer.cancel()  # Never twice at a time, by a signal handler: it has a lock.
            unsent = self._unsent
            if unsent is not None:
                if unsent[0] == self._number:
                    self._next = time.monotonic() + REPORT_SECONDS
                    self._send(unsent[0], _encode(unsent[1]))
                if self._unsent is unsent:  # A signal handler may have reported meanwhile.
                    self._unsent = None


class _RunHere:
    """TaskQueue.run_due: a master and its only worker in the caller's thread."""

    def __init__(
        self, queue: TaskQueue, task_map: Mapping[str, TaskFunction], raise_errors: bool,
        broker: Broker | None,
    ) -> None:  # fmt: skip
        self._queue, self._broker = queue, broker
        self._task_map, self._raise_errors = task_map, raise_errors
        self._stores = [queue._store] if _worker else [queue.in_memory._store, queue._store]
        self._owner = _new_owner(0)
        self._numbers = itertools.count()  # Of the runs.
        self._reports = _Reports(self._on_report)
        self._ended: list[Task] = []

    def run(self, until: int | None) -> list[Task]:
        """Run what is due; with *until* also what becomes due, the clock moving along."""
        queue, clock = self._queue, self._queue.clock
        now, last = queue._now(), NEVER
        if until is not None:
            last = until = max(until, now)  # What is due runs in any case.
            # Half a microsecond more: rounding must not set the clock back.
            queue.clock = lambda: (now + 0.5) / 1e6
        try:
            queue._store.recover(self._owner, time.monotonic(), now)
            while True:
                now, due = queue._now() if until is None else now, [NEVER]
                for store in self._stores:  # The last task may have declared more.
                    open_types = dict.fromkeys(self._task_map.keys() - store.paused(), 1.0)
                    # Without limits: it would have to wait.
                    turn = store.turn(self._owner, [], open_types, 1, 1, now, last, settings={})
                    for row in turn.rows:  # One that runs, and any that were set aside.
                        if row.state == "running":
                            self._run(store, row)
                        else:
                            self._failed(not_started(row), Task(row))
                    if turn.rows:
                        break
                    due += turn.due
                else:
                    if until is None or min(due) > until:
                        return self._ended
                    now = max(now, min(due))
        finally:
            queue.clock = clock
            for store in self._stores:
                store.leave(self._owner, now)  # After Ctrl-C this requeues the running task.
                if until is not None:
                    store.put_off(queue._now())

    def _run(self, store: Store, row: Row) -> None:
        self._store, self._row = store, row
        value: Any = None
        job: Task | None = None
        error: BaseException | None = None
        try:
            function = self._task_map[row.task_type]
            job = _job(row, self._reports.begin(next(self._numbers)))
            value = _call(function, _call_style(function), job, self._toggle_ipc)
            _packed(value)  # Raises where a worker would.
            outcome = Outcome(row.id, row.claim, "done", True, 0, *_kept(row, value))
        except KeyboardInterrupt:  # The caller's Ctrl-C: run() requeues the task.
            raise
        except BaseException as raised:
            error = raised
            text = _error_text(_failure(error))
            plan = plan_of(error) if job else Plan(may_retry=False)  # Its data cannot be read.
            outcome = retry_or_fail(row, text, self._queue._now(), plan)
        finally:
            self._reports.end()
        row, now = self._row, self._queue._now()
        outcome = outcome._replace(progress=row.progress, seconds=max(now - row.ready_at, 0) / 1e6)
        (led,) = store.settle(self._owner, [outcome], now)
        count_run(tally := new_tally(), row.task_type, outcome, led)
        store.tally(tally if led else {})
        told = as_told(row, led or outcome.state, outcome, now)
        result = None if error is not None else _kept(row._replace(keep_result=0.0), value)[0]
        ended = Task(told._replace(result=result))
        if error is not None and outcome.charged:
            self._failed(error, ended)
            return
        self._ended.append(ended)
        if error is None:
            self._tell("done", value, Task(told))

    def _failed(self, error: BaseException, task: Task) -> None:
        self._ended.append(task)
        self._tell("error", error, task)
        if self._raise_errors:
            raise error

    def _tell(self, event: str, value: Any, task: Task) -> None:
        listener = self._queue._listeners.get(event)
        try:
            if listener is not None:
                _awaited(listener(value, task))
        except KeyboardInterrupt:
            raise
        except BaseException:
            _log.exception("error in a listener")

    def _on_report(self, number: int, report: str) -> None:
        self._row = row = self._row._replace(progress=report)
        outcome = Outcome(row.id, row.claim, "running", progress=report)
        self._store.settle(self._owner, [outcome], self._queue._now())
        self._tell("progress", Task(row).progress, Task(row))

    def _toggle_ipc(self) -> Callable[..., Future[Any]]:
        row = self._row
        about = {"worker": os.getpid(), "task_id": row.id, "task_type": row.task_type}
        ask = functools.partial(_consult, self._broker, about=about)
        return functools.partial(_Conversation, lambda it: functools.partial(ask, answer=it.take))


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


def _listed(
    name: str, value: Any, choices: Sequence[str] | None = None,
    name_of: Callable[[Any], str] | None = None,
) -> list[str] | None:  # fmt: skip
    """A filter's value, or list of values, as a list of str; None = any. *name_of* says which
    str other values mean."""
    if value is None:
        return None
    values = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
    if name_of is not None:
        values = [item if type(item) is str else name_of(item) for item in values]
    for item in values:
        if type(item) is not str:
            raise _wrong_type(name, item, "a str or a list of str")
        if choices is not None and item not in choices:
            raise _wrong_value(name, item, "one of " + ", ".join(choices))
        if not _is_unicode(item):
            raise _wrong_value(name, item, "text without lone surrogates")
    return values


STATES = ("waiting", "running", "failed", "done")
_FILTERS = ("task_id", "task_type", "state", "due", "held", "after", "before")


def _make_query(
    method: str, filters: Mapping[str, Any], store: Store,
    name_of: Callable[[Any], str] | None = None,
) -> Query:  # fmt: skip
    """The tasks of *store* that these arguments of *method* mean. *name_of* is that of a
    queue, which knows declared functions."""
    for name in filters:
        if name not in _FILTERS:
            raise TypeError(f"{method}() has no filter {name!r}; give {', '.join(_FILTERS)}")
    task_id, task_type, state, due, held, after, before = map(filters.get, _FILTERS)

    def listed(name: str, value: Any) -> list[str] | None:
        return _listed(name, value, None, lambda it: _checked_id(name, it, store.in_memory))

    ids = listed("task_id", task_id)
    if after is not None:
        found = {bond.child for bond in store.bonds(parents=listed("after", after))}
        ids = list(found if ids is None else found.intersection(ids))
    if before is not None:
        found = {bond.parent for bond in store.bonds(children=listed("before", before))}
        ids = list(found if ids is None else found.intersection(ids))
    return Query(
        ids,
        _listed("task_type", task_type, None, name_of),
        _listed("state", state, STATES),
        None if due is None else _checked_bool("due", due),
        paused=() if due is None else store.paused(),
        held=None if held is None else _checked_bool("held", held),
    )


def _told(setting: Setting) -> dict[str, Any]:
    """A Setting as types() tells it."""
    counts, starts = read_counts(setting.counts), setting.starts
    took = list(itertools.accumulate(counts[name] for name in _TOOK))
    done = took[-1] - sum(counts[how] for how in ("failed", "retried", "later"))
    runs: dict[str, Any] = {"done": done, **{how: counts[how] for how in _ENDS}}
    runs.update(seconds=counts["us"] / 1e6, seconds_le=dict(zip(BOUNDS, took)))
    told = {"paused": bool(setting.paused), "at_once": setting.at_once, "runs": runs}
    return {**told, "rate": None if starts is None else (starts, (setting.period or 0) / 1e6)}


_PREDECESSORS = ("after", "after_end")


class _Tasks:
    """The verbs that TaskQueue and TaskQueue.in_memory share.

    A task must fit all filters that are given:

    task_id              an id or a Task, or a list of these
    task_type            a name or a declared function, or a list of these
    state                waiting, running, failed, done, or a list of these
    due                  True: it could run now. False: it waits for its due date or for others,
                         or its type is paused
    held                 whether it waits for others
    after, before        as task_id: the tasks that wait for these; the tasks for which these wait

    A wrong argument raises TypeError or ValueError; a store that fails, StoreError.
    """

    _queue: TaskQueue
    _store: Store

    def _now(self) -> int:
        return int(self._queue.clock() * 1e6)

    def _query(self, method: str, filters: Mapping[str, Any]) -> Query:
        return _make_query(method, filters, self._store, self._queue._name_of)

    def find(
        self, *, limit: int | None = None, offset: int = 0, **filters: Unpack[Filters]
    ) -> list[Task]:
        """The tasks that fit the filters, oldest first: at most *limit*, without the first
        *offset*."""
        query = self._query("find", filters)._replace(
            limit=None if limit is None else _checked_int("limit", limit, 0),
            offset=_checked_int("offset", offset, 0),
        )
        return [Task(row) for row in self._store.find(query, self._now())]

    def find_one(self, **filters: Unpack[Filters]) -> Task | None:
        """The oldest task that fits the filters of find(), or None."""
        found = self.find(limit=1, **filters)
        return found[0] if found else None

    def count(self, **filters: Unpack[Filters]) -> int:
        """How many tasks fit the filters of find()."""
        return self._store.count(self._query("count", filters), self._now())

    def remove(self, **filters: Unpack[Filters]) -> int:
        """Remove the tasks that fit the filters, and return how many.

        A running task ends its run, after which it is neither retried nor repeated.
        Raises ValueError without a filter (say `state=[...]` to mean all).
        """
        _refuse_rerun("remove")
        query = self._query("remove", filters)
        if query == Query():
            states = ", ".join(map(repr, STATES))
            raise ValueError(f"remove() without a filter; to mean all tasks give state=[{states}]")
        removed = self._store.remove(query, self._now())
        self._queue._changed(removed=True, stored=not self._store.in_memory)
        return removed

    def cancel(self, task_id: str | Task) -> bool:
        """Remove a task, given by its id or a Task of it, and end its run if it runs, in
        whatever process that is.

        True if there was one; it may also be held, failed or done. Its cluster kills the worker
        that runs it, at once or within a second; run_due lets the run end. A task may cancel
        itself. A cancelled task is neither retried nor repeated, nor started again if its
        cluster is dead; its run counts nowhere in types(), and its Future is cancelled, unless
        the run came to its end first. What was to replace it is removed, too; what is added
        under its id from then on starts when the run has ended. Tasks that were to start
        `after` it become failed, as by remove(). Raises TypeError and ValueError for a wrong
        id, StoreError if the store failed.
        """
        _refuse_rerun("cancel")
        task_id = _checked_id("task_id", task_id, self._store.in_memory)
        was_there = self._store.cancel(task_id, self._now())
        if was_there:
            self._queue._changed(removed=True, cancelled=True, stored=not self._store.in_memory)
        return was_there

    def retry(self, **filters: Unpack[Filters]) -> int:
        """Put failed tasks that fit the filters back to waiting, due now and with a fresh set of
        attempts; return how many."""
        _refuse_rerun("retry")
        retried = self._store.retry(self._query("retry", filters), self._now())
        self._queue._changed(stored=not self._store.in_memory)
        return retried

    def update(self, task_id: str | Task, **changes: Unpack[Changes]) -> Task:
        """Change a waiting task, given by its id or a Task of it, and return it.

        *changes*: data, priority, due_date, repeat, retries, retry_delay, timeout,
        keep_result and expires, as in add_task. A new *repeat* without *due_date* starts at
        its first slot, as in add_task; repeat=None leaves a single run at the due date. A
        *due_date* without *repeat* moves one run of a schedule, and no slot after it.
        *after* and *after_end* add predecessors to those that it has; None drops all of both,
        so that it waits for its due date only. Raises ValueError if the task is not waiting,
        and for predecessors as add_task does.
        """
        _refuse_rerun("update")
        task_id = _checked_id("task_id", task_id, self._store.in_memory)
        for name in changes.keys() - Changes.__optional_keys__:
            names = ", ".join(sorted(Changes.__optional_keys__))
            raise TypeError(f"update() cannot change {name!r}; give {names}")
        columns = {"due_date": ("due_at", "ready_at"), **dict.fromkeys(_PREDECESSORS, ())}
        if changes.get("repeat") is not None:
            columns["repeat"] = ("repeat", "due_at", "ready_at", "attempt")
        changed = {column for name in changes for column in columns.get(name, (name,))}
        now, in_memory = self._now(), self._store.in_memory
        given = [changes.get(name, ()) for name in _PREDECESSORS]
        follows = _bonds(task_id, in_memory, *given)
        if None in given and follows:
            raise ValueError("after or after_end is None, which drops all; give the others later")
        options = {**cast("dict[str, Any]", changes), **dict.fromkeys(_PREDECESSORS)}
        if isinstance(changes.get("expires"), datetime) and "due_at" not in changed:
            old = self.find_one(task_id=task_id)  # The seconds count from its due date.
            options["due_date"] = old and old.due_date
        row = _make_row(now, "any", **options, in_memory=in_memory)[0]
        values = {column: getattr(row, column) for column in changed}
        if follows or None in given:
            values["after"] = follows
        row = self._store.update(task_id, values, now)
        self._queue._changed(stored=not self._store.in_memory)
        return Task(row)

    def types(self) -> list[dict[str, Any]]:
        """What there is of each task type that has tasks, a history, or a setting: one dict each.

        task_type               its name
        waiting, running,       how many of its tasks there are in each state
        failed, done
        due, held               how many of the waiting could run now, limits apart; how many wait
                                for others
        oldest_due              for how many seconds the first of those due has been so, or None
        next_due                when the next one will be due: a datetime in UTC, or None
        paused, at_once, rate   as they are set
        runs                    how many runs ended as done, failed, retried or later (as a Retry
                                asked that does not count); how many were interrupted, and how
                                many tasks expired; the `seconds` of all that ended; seconds_le:
                                {seconds: how many took at most so long}

        Masters count runs, and add the counts to those in the store every 10 s and when they
        leave; these grow for the life of the store. A cancelled run counts nowhere. Raises
        StoreError if the store failed.
        """
        names = "waiting due running failed done oldest_due next_due held".split()
        settings, types = self._store.settings(all_types=True), []
        lines = {str(name): line for name, *line in self._store.summary(self._now())}
        for name in sorted({*settings, *lines}):
            setting = settings.get(name, Setting())
            if name not in lines and not (setting.counts or is_gate(setting)):
                continue  # A mistyped name that was paused for a while.
            told = dict(zip(names, lines.get(name, (0, 0, 0, 0, 0, None, None, 0))))
            if setting.paused:
                told.update(due=0, oldest_due=None)
            if (later := told["next_due"]) is not None:
                told["next_due"] = _datetime(min(max(later, _YEARS[0]), _YEARS[1]))
            types.append({"task_type": name, **told, **_told(setting)})
        return types

    def pause(self, *types: str | TaskFunction) -> None:
        """Have no cluster start tasks of these types (names or declared functions) until
        resume().

        Runs that have begun go on to their ends. Tasks that are added, retried or come due
        meanwhile wait in order, and count as not due. The pause is stored: no restart ends it.
        (That of `in_memory` ends with this process.) A type may be paused already, or have no
        tasks. On a MongoStore that other masters use, the call takes 1.5 seconds; then all of
        them know of the pause. Raises TypeError or ValueError for a wrong type, and StoreError
        if the store failed or knows no pauses.
        """
        self._set_up("pause", types, {"paused": 1})

    def resume(self, *types: str | TaskFunction) -> None:
        """End the pause of these types. A schedule makes up for the slots that it missed by
        one run. Raises what pause() raises."""
        self._set_up("resume", types, {"paused": 0})

    def limit(
        self, task_type: str | TaskFunction, *, at_once: int | None = _AS_IS,
        rate: tuple[int, float | timedelta] | None = _AS_IS,
    ) -> None:  # fmt: skip
        """Limit how tasks of a type start, in all clusters of this store together.

        *at_once*: at most so many of them run at once. *rate* = (starts, seconds): at most so
        many of them start in so many seconds (a number or a timedelta), evenly spaced: with
        (10, 60) one each six seconds. Each start counts, also that of a retry. Where starts
        would be less than 50 ms apart, they come in groups, one each 50 ms.

        None ends a limit; what is not given stays as it is. Another rate than before counts from
        now on: the next start is at most one spacing of it away. A task that must wait delays no
        other type, and nothing that runs is stopped. Limits are stored, and the call takes as
        long, as with pause(). Raises what pause() raises; TypeError or ValueError for a wrong
        limit, and TypeError if neither is given.
        """
        changes = _checked_limits(at_once, rate)
        if not changes:
            raise TypeError("limit() changes at_once and rate; give one of them")
        self._set_up("limit", [task_type], changes)

    def _set_up(self, method: str, types: Sequence[Any], changes: Mapping[str, Any]) -> None:
        _refuse_rerun(method)
        if not types:
            raise TypeError(f"{method}() takes one task type or more")
        names = [self._queue._name_of(name) for name in types]
        for name in names:
            self._queue._warn_of(name)
        self._store.set_up(names, changes, self._now())
        self._queue._changed(stored=not self._store.in_memory)


class InMemoryTasks(_Tasks):
    """`TaskQueue.in_memory`: the tasks of this process, with the verbs of TaskQueue."""

    def __init__(self, queue: TaskQueue) -> None:
        self._queue, self._memory = queue, MemoryStore()

    @property
    def _store(self) -> Store:  # type: ignore[override]
        if _worker is not None:
            raise RuntimeError(
                "in-memory tasks live in the master process; in a worker, add persistent ones"
            )
        return self._memory

    def find_by_id(self, task_id: str | Task) -> Task | None:
        """The task of that id, or None."""
        return self.find_one(task_id=_checked_id("task_id", task_id, True))

    def remove_by_id(self, task_id: str | Task) -> bool:
        """Remove the task of that id; whether there was one."""
        return self.remove(task_id=_checked_id("task_id", task_id, True)) > 0

    def tasks(self) -> list[Task]:
        """All in-memory tasks, oldest first."""
        return self.find()

    def available_tasks(self) -> list[Task]:
        """Those that could run now, oldest first."""
        return self.find(due=True)


Listener = Callable[[Any, Task], Any]
EVENTS = ("done", "error", "progress")
_F = TypeVar("_F", bound=TaskFunction)


class _Declared(NamedTuple):
    """What queue.task has declared of a task type, beside its function."""

    defaults: dict[str, Any]  # Parameters of add_task.
    schedule: dict[str, Any] | None  # Those of its schedule, if it has one.
    limits: dict[str, Any]  # Columns of its Setting.


def _code_of(function: Any) -> tuple[Any, ...]:
    """The code of a function, and what names it: its file and qualified name."""
    while hasattr(function, "__wrapped__") or isinstance(function, functools.partial):
        function = getattr(function, "__wrapped__", None) or function.func
    if not hasattr(function, "__code__"):
        function = getattr(type(function), "__call__", function)  # noqa: B004 - Its code.
    code, name = getattr(function, "__code__", None), getattr(function, "__qualname__", "")
    file = getattr(code, "co_filename", "")
    with contextlib.suppress(OSError):
        file = os.path.realpath(file)
    return code, file, name, code.co_firstlineno if code and "<" in name else 0


def _is_same(function: Any, other: Any) -> bool:
    """Whether both are one function, perhaps loaded twice: by a reload, or as __main__ and as
    an import. What one load has made out of the same code are different functions."""
    if function is other or (isinstance(function, MethodType) and function == other):
        return True
    (code, *name), (other_code, *other_name) = _code_of(function), _code_of(other)
    return code is not None and code is not other_code and name == other_name


class _TaskTypes(_Tasks):
    """The part of a TaskQueue that knows of task types, declared or in the maps of clusters."""

    in_memory: InMemoryTasks
    _watchers: tuple[Any, ...] = ()  # The dispatchers of running clusters.

    def __init__(self) -> None:
        self._declared: dict[str, _Declared] = {}
        self._functions: dict[str, TaskFunction] = {}  # Of the declared types.
        self._own_styles: dict[str, _Style] = {}  # How they are called.
        self._styles: dict[str, _Style] = {}  # These, and those in task maps of clusters.
        self._last_declared: _Declared | None = None
        self._unknown: set[str] = set()  # Types that nobody here knows, and that were warned of.

    @property
    def task_map(self) -> Mapping[str, TaskFunction]:
        """The declared task types, read only: {name: function}."""
        return MappingProxyType(self._functions)

    @overload
    def task(self, name: _F) -> _F: ...

    @overload
    def task(
        self, name: str | None = None, *, repeat: timedelta | str | Cron | None = None,
        data: Any = ..., at_once: int | None = ...,
        rate: tuple[int, float | timedelta] | None = ..., **defaults: Unpack[TaskDefaults],
    ) -> Callable[[_F], _F]: ...  # fmt: skip

    def task(
        self, name: Any = None, *, repeat: Any = None, data: Any = _NO_DATA, at_once: Any = _AS_IS,
        rate: Any = _AS_IS, **defaults: Any,
    ) -> Any:  # fmt: skip
        """Declare a function as a task type: as @queue.task or @queue.task(...).

        The function is registered under *name* (default: its __name__) and returned
        unchanged. Then add_task, submit and map take it in place of the name; Cluster and
        run_due take all declared functions where they are given no task map. *defaults* are
        parameters of add_task: priority, retries, retry_delay, timeout, keep_result, expires
        and in_memory. They count where a task is added through this queue and the call says
        nothing else. Keyword-only parameters of the function are filled from `data`.

        With *repeat*, as in add_task, one stored task `schedule:NAME` (with *data*) follows
        the code: a cluster that starts on this queue, or run_due, adds, changes or removes
        it. Only another *repeat* moves its due date.

        *at_once* and *rate*, as in limit(), are written to the store when a cluster starts on
        this queue, or before the next claim of one that runs, and count at once for tasks in
        memory; what is not given stays as it is.

        Raises TypeError and ValueError for wrong arguments, for a function that cannot be
        called as function(job), and for a name that another function has. While a worker
        runs your file again, the same is declared there. No store is touched.
        """
        if callable(name) or isinstance(name, staticmethod):
            return self.task()(name)
        if name is not None:
            _checked_text("name", name)
        known = TaskDefaults.__optional_keys__
        for unknown in defaults.keys() - known:
            raise TypeError(f"task() has no default {unknown!r}; give {', '.join(sorted(known))}")
        if isinstance(defaults.get("expires"), datetime):
            allowed = "seconds or a timedelta: it counts from the due date of each task"
            raise _wrong_type("expires", defaults["expires"], allowed)
        schedule = None if repeat is None else {**defaults, "repeat": repeat}
        if data is not _NO_DATA:
            if schedule is None:
                raise TypeError("data is for the schedule of a task; give repeat, too")
            schedule["data"] = data
        if schedule and defaults.get("in_memory"):
            raise _wrong_value("in_memory", True, "False: a schedule is stored")
        _make_row(self._now(), "any", **(schedule or defaults))
        schedule, limits = copy.deepcopy(schedule), _checked_limits(at_once, rate)

        def declare(function: _F) -> _F:
            self._declare(name, function, defaults, schedule, limits)
            return function

        return declare

    def _declare(
        self, name: Any, function: Any, defaults: Any, schedule: Any, limits: dict[str, Any]
    ) -> None:
        if isinstance(function, staticmethod):
            function = function.__func__  # What its class will give for it.
        style = _checked_function("function", function)
        if name is None:
            name = getattr(function, "__name__", "<none>")
            if "<" in name:
                raise ValueError(f"{_shown(function)} has no name of its own; give queue.task one")
        if schedule is not None:
            style.keywords(name, schedule.get("data", {}))
        other = self._functions.get(name)
        if other is not None and not _is_same(function, other):
            code, file, *_ = _code_of(other)
            where = f" of {file}, line {code.co_firstlineno}" if code else ""
            raise _wrong_value("name", name, f"another: {_shown(other)}{where} has it")
        self._declared[name] = self._last_declared = _Declared(defaults, schedule, limits)
        if limits:
            self.in_memory._memory.set_up([name], limits, self._now())
        self._functions[name] = function
        self._own_styles[name] = self._styles[name] = style
        for watcher in self._watchers:
            watcher.cluster._learn_types()
            for stored in (False, True):
                watcher.queue_changed(removed=False, stored=stored)

    def _check_declared(self, in_memory_only: bool) -> int:
        """Raise ValueError or StoreError for what is declared and a cluster cannot heed. Returns
        how many types are declared."""
        declared = list(self._declared.items())
        scheduled = [name for name, it in declared if it.schedule]
        if in_memory_only and scheduled:
            allowed = f"False: the schedule of {scheduled[0]!r} is stored"
            raise _wrong_value("in_memory_only", True, allowed)
        limited = [name for name, it in declared if it.limits]
        if limited and not (in_memory_only or self._store.has_settings):
            lacks = "has no change_setting() for the limits of"
            raise StoreError(f"{self._store!r} {lacks} {limited[0]!r}")
        return len(declared)

    def _name_of(self, task_type: Any) -> str:
        """The name of a task type that is given by its name, or by its declared function."""
        if not callable(task_type):
            return _checked_text("task_type", task_type)
        declared = list(self._functions.items())
        names = [name for name, function in declared if function is task_type]
        names = names or [name for name, function in declared if _is_same(task_type, function)]
        if len(names) != 1:
            allowed = "a function that queue.task has declared, or a name"
            allowed = f"one of its names: {', '.join(map(repr, names))}" if names else allowed
            raise _wrong_value("task_type", task_type, allowed)
        return names[0]

    def _align(self, known: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """Have the stored schedules follow those that are declared; not those that are as in
        *known*: another program may have changed these since. Returns all."""
        schedules = {name: it.schedule for name, it in list(self._declared.items())}
        now, rows = self._now(), dict[str, Union[Row, None]]()
        for name, schedule in schedules.items():
            if known.get(name, ()) != schedule:
                row = schedule and _make_row(now, name, **schedule)[0]._replace(id=SCHEDULE + name)
                rows[SCHEDULE + name] = row or None
        if rows:
            self._store.align(rows, now)
        return schedules

    def _write_limits(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Have the stored limits be those that are declared, but for those that are as in
        *known*: somebody may have changed these since. Returns all."""
        limits = {name: it.limits for name, it in list(self._declared.items()) if it.limits}
        for name, changes in limits.items():
            if known.get(name) != changes:
                self._store.set_up([name], changes, self._now(), wait=False)
        return limits

    def _know(self, styles: Mapping[str, _Style]) -> None:
        """A cluster on this queue has functions that are called so."""
        for name, style in styles.items():
            if self._styles.setdefault(name, style) != style:
                self._styles[name] = _PLAIN  # Of two functions, nobody knows which will run.

    def _addition(
        self, now: int, task_type: Any, data: Any, options: Any, styles: Mapping[str, _Style],
        lane: str = "",
    ) -> tuple[Row, str]:  # fmt: skip
        """The Row of a new task, with what its type declares, and its `if_exists`."""
        if type(task_type) is not str:
            task_type = self._name_of(task_type)
        declared, style = self._declared.get(task_type), styles.get(task_type)
        if not options.keys() <= _ADD_PARAMETERS:
            unknown = min(map(str, options.keys() - _ADD_PARAMETERS))
            hint = _nearest(unknown, _ADD_PARAMETERS)
            if style is not None and unknown in style.known:
                hint = f"; {task_type!r} takes it from data: give {{{unknown!r}: ...}}"
            raise TypeError(f"add_task and submit have no parameter {unknown!r}{hint}")
        if declared is not None and declared.defaults:
            options = {**declared.defaults, **options}
        addition = _make_row(now, task_type, data, lane=lane, **options)
        if style is None:
            self._warn_of(task_type)
        elif style is not _PLAIN:
            for one in data if type(data) is _Chunk else (data,):
                style.keywords(task_type, one)
        return addition

    def _warn_of(self, task_type: str) -> None:
        """Warn once of a type that nobody here knows; another program may know it."""
        if task_type in self._styles or task_type in self._unknown or not self._styles:
            return
        if len(self._unknown) >= 100:
            return  # Names that are made of data have no end.
        self._unknown.add(task_type)
        if _worker is None or task_type not in _worker.task_map:
            nearest = _nearest(task_type, list(self._styles))
            _log.warning("no task type %r is declared or mapped here%s", task_type, nearest)


class TaskQueue(_TaskTypes):
    """Tasks waiting to be run, in a store and in this process's memory.

    *store* is the path of a SQLite file, or a Store; anything else is a TypeError. It is opened
    at first use, and closed by close() or `with`. Any thread may use a TaskQueue; each process
    makes its own, on the same store. Verbs such as `find`, `cancel` and `pause` mean the stored
    tasks; `in_memory` has the same verbs for the tasks in the memory of this process, which must
    be the master (else RuntimeError).

    `clock` may be set to a function like time.time, for tests.
    """

    def __init__(self, store: str | os.PathLike[str] | Store = "taskpool.db") -> None:
        if not isinstance(store, (Store, str, os.PathLike)):
            raise _wrong_type("store", store, "a file name or a Store")
        super().__init__()
        self._queue = self
        self._store = store if isinstance(store, Store) else SQLiteStore(store)
        self.clock = time.time
        self.in_memory = InMemoryTasks(self)
        self._listeners: dict[str, Listener] = {}
        self._ports: list[int] = []  # Where the other masters hear of new tasks.
        self._next_owners = self._next_knock = 0.0  # Monotonic.
        self._running_here = threading.RLock()  # Held by run_due, which has the clock.
        self._key = _register("TaskQueue", self, _caller())

    def __enter__(self) -> TaskQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TaskQueue({self._store!r})"

    def close(self) -> None:
        """Close the store's files and connections; the next use opens them again."""
        self._store.close()

    def _changed(
        self, removed: bool = False, cancelled: bool = False, stored: bool = True
    ) -> None:
        """Called after every change: wakes the clusters, also those of other processes."""
        if _worker is not None:
            _worker.tell("changed")
        for watcher in self._watchers:
            watcher.queue_changed(removed, stored)
        if stored:
            self._wake_others(cancelled)

    def _unwatch(self, cluster: Cluster) -> None:
        self._watchers = tuple(it for it in self._watchers if it.cluster is not cluster)
        self._next_owners = self._next_knock = 0.0  # Ask anew which masters are to be woken.

    def _wake_others(self, cancelled: bool = False) -> None:
        """Have the masters that do not hear of this queue look at the store, so that they need
        not poll it. Of many tasks in a row not each wakes them: a woken master looks twice. But
        each that was *cancelled* does."""
        now = time.monotonic()
        if cancelled or now >= self._next_owners:
            self._next_owners = now + OWNERS_SECONDS
            with contextlib.suppress(StoreError):
                hear = {watcher.owner for watcher in self._watchers}
                self._ports = _ports_of(o for o in self._store.owners() if o not in hear)
        if self._ports and (cancelled or now >= self._next_knock):
            self._next_knock = now + KNOCK_SECONDS
            _ring(self._ports, CANCELLED_BELL if cancelled else b"!")

    # ---- Adding

    def add_task(
        self,
        task_type: str | TaskFunction,
        data: Any = _NO_DATA,
        **options: Unpack[TaskOptions],
    ) -> Task:
        """Store one task and return it. It is safe from then on (P1).

        *task_type* names the function in the cluster's map, or is a function declared with
        queue.task; *data* are JSON values, kept exactly (anything that JSON would alter is
        refused), or with in_memory anything that pickles, copied at once by pickling.
        *options*, with their defaults where queue.task has declared no other:

        priority=1          higher starts first
        task_id=None        a str; None: a fresh one
        due_date=None       the earliest start: a datetime (naive = local time), a timedelta
                            from now, or None = now
        in_memory=False     True: the task lives in this process only
        repeat=None         a timedelta, a cron text (UTC) or a Cron: when a run has ended,
                            however it did, the task waits for its next slot; without
                            due_date the first slot is now, or the cron's next time
        retries=0           so many further starts may follow a failure, ...
        retry_delay=1.0     ... the n-th after retry_delay * 2**(n-1) seconds, at most an hour
        timeout=None        a run that takes longer (seconds) is killed
        keep_result=None    seconds to keep the finished task with its JSON result; None: it
                            is removed at once
        expires=None        seconds after the due date, or a datetime: if the task's turn comes
                            later, it is not started but `failed` (with `repeat` it waits for
                            its next slot). After retry() it starts however late it is
        if_exists="raise"   what a waiting or running task of the same task_id does: "raise"
                            DuplicateTask, "keep" (it is returned, as it is), "replace" (if it
                            is running, the new one follows it), "follow" (if it waits, it
                            stays as it is, but gets the new data, and waits for those of
                            after and after_end, too; if it runs, the new one follows it, or
                            the one that follows already gets the new data; if that has
                            another type: DuplicateTask)
        after=None          a Task, an id, or a list of them: it starts when all of these are
                            done; behind one that failed it waits until that is retried and
                            succeeds; if one is removed, it fails, and a retry starts it. A
                            Task that is gone counts as done. An id that is not there is an
                            error
        after_end=None      the same, but it starts when all have ended, however they did
        connection=None     your own sqlite3.Connection to the same file: the task exists if
                            and only if your transaction commits (begin by BEGIN IMMEDIATE)

        Durations may be timedeltas. Raises TypeError or ValueError, naming the parameter,
        before anything is stored; RuntimeError for *in_memory* in a worker; StoreError if
        the store failed.
        """
        _refuse_rerun("add_task")
        addition = self._addition(self._now(), task_type, data, options, self._styles)
        return Task(self._add([addition], options.get("connection"))[0])

    def add_tasks(self, tasks: Iterable[Mapping[str, Any]]) -> list[Task]:
        """Store many tasks in one transaction: all of them, or none if one is refused.

        Each is a dict with the parameters of add_task as keys. Persistent and in-memory
        tasks cannot be mixed in one call, nor different connections. Raises what add_task
        raises.
        """
        _refuse_rerun("add_tasks")
        if not isinstance(tasks, Iterable) or isinstance(tasks, (str, Mapping)):
            raise _wrong_type("tasks", tasks, "an iterable of dicts of add_task's parameters")
        now = self._now()
        additions, connections = [], []
        for index, task in enumerate(tasks):
            if type(task) is not dict and not isinstance(task, Mapping):
                raise _wrong_type(f"tasks[{index}]", task, "a dict of add_task's parameters")
            options = dict(task)
            try:
                task_type, given = options.pop("task_type", None), options.pop("data", _NO_DATA)
                additions.append(self._addition(now, task_type, given, options, self._styles))
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"tasks[{index}]: {error}") from None
            connections.append(task.get("connection"))
        if not additions:
            return []
        if len({type(row) for row, _ in additions}) > 1:
            raise ValueError("in_memory is True for some tasks; add those in a call of their own")
        if any(connection is not connections[0] for connection in connections):
            raise ValueError("connection differs between tasks; add those in a call of their own")
        return [Task(row) for row in self._add(additions, connections[0])]

    def _add(
        self, additions: list[tuple[Row, str]], connection: sqlite3.Connection | None = None
    ) -> list[Row]:
        row = additions[0][0]
        in_memory = isinstance(row, MemoryRow)
        store = self.in_memory._store if in_memory else self._store
        if connection is None:
            rows = store.add(additions, row.created_at)
        elif not isinstance(store, SQLiteStore):
            raise _wrong_value("connection", connection, "None: this task is not stored in SQLite")
        else:
            rows = store.add_through(connection, additions)
            if connection.in_transaction:
                return rows  # Others see them only after the caller's commit.
        self._changed(stored=not in_memory)
        return rows

    def wait(self, task_id: str | Task, timeout: float | timedelta | None = None) -> Task:
        """Wait until a task, given by its id or a Task of it, has ended, in whatever process it
        runs, and return it: its state is `done` or `failed`.

        Of a task that repeats this is the end of the run that is under way or comes next; its
        state is `waiting` then. A task that is gone (done without keep_result, removed or
        cancelled) counts as done; if it was so from the start, its task_type is "". An id is
        looked for in memory first. Raises TimeoutError after *timeout* seconds (None: never),
        TypeError or ValueError for wrong arguments, and StoreError if the store failed.
        """
        _refuse_rerun("wait")
        place = False if _worker else None  # None: in memory or stored.
        in_memory = task_id.in_memory if isinstance(task_id, Task) else place
        query = Query(ids=[task_id := _checked_id("task_id", task_id, None)])
        seconds = math.inf if timeout is None else _checked_seconds("timeout", timeout, zero=True)
        deadline, pause, before = time.monotonic() + seconds, 0.002, None
        stores = [] if in_memory is False else [self.in_memory._store]
        stores += [] if in_memory else [self._store]
        while True:
            found = None
            for store in stores:
                found = next(iter(store.find(query, self._now())), None)
                if found is not None:
                    stores = [store]  # The other one may get a task of the same id.
                    break
            before = before or found
            if before is None:  # It was never seen.
                return Task(Row(task_id, "", "null", 0, 0, 0, 0, 0, 0.0, None, None, "", "done"))
            became = what_became(before, found)
            if found is None or became == "replaced":
                return Task(before._replace(state="done", owner=""))
            if became:
                return Task(found)
            if found.created_at == before.created_at:
                before = found  # An update may have moved its due date.
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"task {task_id!r} is still {_public_state(found.state)}")
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, 0.1)

    def run_due(
        self,
        task_map: Mapping[str, TaskFunction] | None = None,
        until: datetime | timedelta | None = None,
        *,
        raise_errors: bool = False,
        message_broker: Broker | None = None,
    ) -> list[Task]:
        """Run what is due here and now, in this thread, without workers: for your tests.

        *task_map*: {task_type: function}; default: the declared tasks, `task_map`, whose
        schedules are brought in line first.
        In-memory tasks come first, then persistent ones, each by priority and age; what
        they add runs too, if it is due. Returns a Task for every run, in order: `state`
        tells what became of it (waiting = a retry or repetition follows), `result` and
        `error` how it went. Listeners are called. With *until* also runs what becomes due
        up to then, retries and repetitions included, without waiting: meanwhile `clock`
        stands at the instant when each is due. *raise_errors* raises the first failure,
        after it was recorded, with its own traceback. *message_broker* answers toggle_ipc.
        A `timeout` has no effect here. Raises RuntimeError while another thread is in run_due.
        """
        _refuse_rerun("run_due")
        functions = self.task_map if task_map is None else _checked_task_map(task_map)[0]
        if not functions:
            raise _wrong_value("task_map", None, "a dict, as this queue has declared no task")
        last = None if until is None else _instant(until, self._now(), "until")
        _checked_bool("raise_errors", raise_errors)
        _check_broker(message_broker)
        if not self._running_here.acquire(blocking=False):
            raise RuntimeError("another thread is in run_due of this queue, and sets its clock")
        try:
            self._align()
            return _RunHere(self, functions, raise_errors, message_broker).run(last)
        finally:
            self._running_here.release()

    def add_event_listener(self, event: str, callback: Listener) -> None:
        """Have *callback(value, task)* called for each such event of a cluster on this queue.

        *event* is "done", "error" or "progress"; *value* is the result, the exception, or
        what `job.progress` was given. "error" comes for every failed attempt;
        `task.state` tells whether it waits for a retry or `failed` for good. Listeners are
        called in a thread of their own, after the state was stored; errors that they raise
        are logged. A second listener of an event replaces the first. Master only: does
        nothing while a worker runs your file again.
        """
        _checked_choice("event", event, EVENTS)
        _check_takes("callback", callback, (None, None), "a function of (value, task)")
        if _is_master():
            self._listeners[event] = callback

    def remove_event_listener(self, event: str) -> None:
        """Forget the listener of that event, if there is one."""
        self._listeners.pop(_checked_choice("event", event, EVENTS), None)


# --- Messages ------------------------------------------------------------------------
# What crosses a pipe: tuples whose first item is their kind. Messages to a worker are pickled.
# Messages to the master are packed by struct or marshal, which know no classes: nothing that a
# task writes to the pipe of its worker can run code in the master.
#
#   to a worker   ("boot", _Boot)                      the first message
#                 ("run", number, rows)                numbered from `number` on
#                 ("answer", conversation, ok, value)  ok: a pickle; else a _Failure
#                 ("stop",)
#   to the master: see _SHAPES
#
# Only processes that we started write to these pipes. What is stored is never unpickled (P8):
# a row is sent with whether it is a MemoryRow. Large data of such a row follow the message, as
# messages of their own: its out-of-band buffers.

# In messages to the master these are plain tuples.
_FIELDS: dict[Any, tuple[Any, ...]] = {
    _Failure: (str, str, str, (bytes, _NULL)),
    Plan: (bool, (float, _NULL), bool),
}
_SHAPES: dict[str, tuple[Any, ...]] = {  # Messages to the master: {kind: the other items}.
    "ready": (),
    "boot error": (_Failure,),
    "start": (int,),  # number: of a run that has a timeout
    "progress": (int, str),  # number, JSON of a Progress
    # "done", see _write_message: number, seconds, pickled result (or _NONE), JSON result, why
    # there is none, open conversations
    "fail": (int, float, _Failure, Plan),  # number, seconds: what it is to lead to
    "lacks": (int, _Failure),  # number: this worker has no function for the task
    "ask": (int, int, bytes),  # number, conversation, pickled message
    "changed": (),  # A task changed its queue.
}
_OF_ITS_HEAD = frozenset({"start", "done", "fail", "lacks", "progress"})  # Kinds that name a run.
# A worker sends long messages in pieces of this size; a shorter piece is the last. So a head
# that announces a longer piece is nonsense, and the master need not wait for its end.
_PIECE_BYTES = 1 << 20
_HEAD = struct.Struct("!I")  # Its length: the framing of multiprocessing's Connection.


class _Nonsense(Exception):
    """A worker's pipe brought what no worker sends: a task has written to the pipe."""


# Of "done": a byte with which nothing begins that marshal writes, number, seconds, open
# conversations, length of the JSON result and why there is none.
_DONE = struct.Struct("!xQdIQ")


def _write_message(message: tuple[Any, ...]) -> bytes:
    """A message to the master. The end of a task has a form of its own, as it comes for each,
    and as marshal takes no result of 2 GiB."""
    if message[0] != "done":
        return marshal.dumps(message)
    _, number, seconds, packed, kept, problem, opened = message
    notes = marshal.dumps((kept, problem)) if kept or problem else b""
    return b"".join((_DONE.pack(number, seconds, opened, len(notes)), notes, packed))


def _read_items(items: Any, shape: tuple[Any, ...]) -> list[Any]:
    """The items of a message, if they have this shape. Raises what says how they have not."""
    if len(items) != len(shape):
        raise TypeError("a wrong shape")
    read = []
    for item, kind in zip(items, shape):
        if kind in _FIELDS:
            item = kind(*_read_items(item, _FIELDS[kind]))
        elif not isinstance(item, kind):
            raise TypeError("a wrong shape")
        elif type(item) is str:
            item.encode()  # Raises at a lone surrogate.
        elif type(item) is float and not 0 <= item < math.inf:
            raise ValueError(f"{item} seconds")
        read.append(item)
    return read


def _read_message(packed: bytearray) -> tuple[Any, ...]:
    """A message from a worker. Raises _Nonsense."""
    try:
        if packed[0] == 0:
            number, seconds, opened, size = _DONE.unpack_from(packed)
            if not 0 <= seconds < math.inf:
                raise ValueError(f"{seconds} seconds")
            kept = problem = None
            if size:
                notes = marshal.loads(packed[_DONE.size :])
                kept, problem = _read_items(notes, ((str, _NULL), (str, _NULL)))
            del packed[: _DONE.size + size]  # Copies nothing, however long the result is.
            return "done", number, seconds, packed or _NONE, kept, problem, opened
        kind, *items = marshal.loads(packed)
        message = (kind, *_read_items(items, _SHAPES[kind]))
        if kind == "progress":
            _checked_progress(*_decode(message[2]))
        return message
    except Exception as error:
        raise _Nonsense(f"{type(error).__name__}: {error}") from error


# --- Worker --------------------------------------------------------------------------
# First, how a worker finds its functions and files: what the master sends, and what the
# worker makes of that. Then, how it runs tasks. It knows no store: tasks come down a pipe.


class _Boot(NamedTuple):
    """How a worker finds its task map: see _find_task_map."""

    key: _Key
    home: _Key  # Of the Cluster itself, which has the initializer.
    types: tuple[str, ...]
    path: str | None  # The file of the queue.
    synchronous: str  # Of its SQLiteStore; "" for another kind of store.
    entry: tuple[str, str, str] | None  # __main__: "path" or "module", its name, the file.
    files: dict[str, str]  # {module: file} of the Cluster and of its functions.
    pickled_map: bytes | None
    inherits: bool = False  # The worker is a fork of the master.
    alone: bool = True  # No other Cluster was made in the same place.
    functions: int = 0  # How many the Cluster had then.
    known: _Known = _Known([], set())


class _Arguments:
    """The `initargs` of a Cluster, unpickled when a worker has found its functions.

    Locks and queues of multiprocessing can be pickled only as a process starts, so they are;
    a fork inherits them.
    """

    def __init__(self, values: Sequence[Any] = (), packed: bytes | None = None) -> None:
        self._values, self._packed = values, packed

    def __reduce__(self) -> Any:
        from multiprocessing.reduction import ForkingPickler

        return _Arguments, ((), self._packed or bytes(ForkingPickler.dumps(self._values)))

    def get(self) -> Any:
        return self._values if self._packed is None else pickle.loads(self._packed)


def _queue_of(thing: Any) -> Any:
    """The TaskQueue of a Cluster, or the TaskQueue itself."""
    return getattr(thing, "queue", thing)


def _path_of(thing: Any) -> str | None:
    return getattr(_queue_of(thing)._store, "path", None)


@contextlib.contextmanager
def _as_main(names: Mapping[str, Any]) -> Iterator[None]:
    """Have __main__ be a module of these names for a moment, where it is not: under a profiler."""
    import types

    if vars(sys.modules.get("__main__", object)) is names:
        yield
        return
    main, stand_in = sys.modules.get("__main__"), types.ModuleType("__main__")
    vars(stand_in).update(names)
    sys.modules["__main__"] = stand_in
    try:
        yield
    finally:
        del sys.modules["__main__"]
        if main is not None:
            sys.modules["__main__"] = main


def _entry_of(main: Mapping[str, Any], codes: list[Any]) -> tuple[str, str, str] | None:
    """How to run __main__ again; None if it is in no file. Once the script has ended,
    __file__ is gone, and *codes*, of functions of __main__, tell the file."""
    file = _absolute(str(main.get("__file__") or (codes[0].co_filename if codes else "")))
    # A file that does not exist may be in a zip archive: Python runs the archive.
    path = file if os.path.exists(file) else os.path.dirname(file)
    if not os.path.isfile(path):
        return None
    spec = main.get("__spec__")
    if spec is not None and spec.name not in ("__main__", "__mp_main__"):
        return "module", str(spec.name), file  # A debugger has a subclass of str.
    return "path", path, file


def _boot_now(boot: _Boot) -> _Boot:
    """The _Boot for a worker that starts now."""
    with contextlib.suppress(FileNotFoundError):
        _folders.add(_absolute("."))
    made = [(store._place, store._given, store.path) for store in _living(SQLiteStore)]
    there = sum(ref.key[:3] == boot.key[:3] for ref in _registry.valuerefs())
    return boot._replace(alone=there == 1, known=_Known(made, set(_folders)))


_INITIALIZER = ""  # Its key beside the functions that are sent; no task type is empty.


def _can_be_pickled(function: Any) -> bool:
    try:
        return bool(_dumps(function))
    except Exception:
        return False


def _with_functions(boot: _Boot, cluster: Cluster) -> _Boot:
    """The _Boot with the functions that the Cluster has now.

    Never in the dispatcher: pickling imports, and the thread that imports your module may be
    waiting for a task.
    """
    task_map, home, pickled = dict(cluster.task_map), cluster._home, None
    boot = boot._replace(functions=len(task_map))
    if boot.inherits or not _is_master():
        return boot
    if cluster._options.initializer is not None:
        task_map[_INITIALIZER] = cluster._options.initializer
    module = str(home.get("__name__"))
    in_main, entry = module == "__main__", boot.entry
    with _as_main(home) if in_main else contextlib.nullcontext():
        fit = {name: it for name, it in task_map.items() if _can_be_pickled(it)}  # No lambdas.
        if fit.keys() >= cluster.task_map.keys() or cluster._takes_declared:
            pickled = _dumps(fit)
    spaces: dict[str, Any] = {} if in_main else {module: home}  # {module: its globals}
    own: dict[str, Any] = {}  # {task type: code} of the functions of __main__.
    for task_type, function in task_map.items():
        while isinstance(function, functools.partial):
            function = function.func
        name = str(getattr(function, "__module__", None))
        if name == "__main__":
            own[task_type] = getattr(function, "__code__", None)
        else:
            spaces.setdefault(name, vars(sys.modules.get(name, object)))
    if boot.key[0] != "__main__":
        spaces.setdefault(boot.key[0], vars(sys.modules.get(boot.key[0], object)))
    by_main = b"__main__" in (pickled or b"")
    if entry is None and by_main:
        codes = [code for code in own.values() if code]
        entry = _entry_of(vars(sys.modules.get("__main__", object)), codes)
    if entry is None and task_map and (by_main or (in_main and len(fit) < len(task_map))):
        name = next(iter([*(name for name in task_map if name not in fit), *own, *task_map]))
        what = f"the function of {name!r}" if name else "the initializer"
        raise RuntimeError(
            f"{what} was defined where a worker process cannot find it (python -c, standard "
            "input, an interactive session, or a script that has ended): put it into a file, "
            'or use start_method="fork"'
        )
    paths = {name: space.get("__file__") for name, space in spaces.items()}
    files = {name: _absolute(path) for name, path in paths.items() if isinstance(path, str)}
    return boot._replace(entry=entry, files=files, pickled_map=pickled)


def _boot_of(cluster: Cluster, code: Any) -> _Boot:
    """How the workers of a new Cluster find its functions: in the Cluster, or in its queue if
    that has declared them.

    The Cluster's `_home` has the globals of the *code* that makes it: __main__ forgets its file
    when the script ends, and a profiler puts itself into sys.modules["__main__"].
    """
    home, queue, store = cluster._home, cluster.queue, cluster.queue._store
    key, types = cluster._key, tuple(cluster.task_map)
    if cluster._takes_declared:
        key, types = queue._key, ()
    synchronous = store._synchronous if isinstance(store, SQLiteStore) else ""
    boot = _Boot(key, cluster._key, types, _path_of(cluster), synchronous, None, {}, None)
    if not _is_master():
        return boot
    if cluster._options.start_method == "fork":
        return boot._replace(inherits=True)
    if home.get("__name__") == "__main__":
        boot = boot._replace(entry=_entry_of(home, [code]))
    elif key[0] == "__main__":
        boot = boot._replace(entry=_entry_of(vars(sys.modules.get("__main__", object)), []))
    return boot


class _ByFile:
    """Finds modules that Python does not find, by their files in the master, and the packages
    around them, by their folders."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = {name: file for name, file in files.items() if os.path.exists(file)}

    def find_spec(self, name: str, *_: Any) -> Any:
        from importlib import machinery, util

        for module, file in self._files.items():
            if module == name:
                return util.spec_from_file_location(name, file)
            if module.startswith(name + "."):
                levels = module.count(".") - name.count(".") + file.endswith("__init__.py")
                folder = file.rsplit(os.sep, levels)[0]
                code = os.path.join(folder, "__init__.py")
                if os.path.exists(code):
                    return util.spec_from_file_location(name, code)
                spec = machinery.ModuleSpec(name, None, is_package=True)
                spec.submodule_search_locations = [folder]
                return spec
        return None


def _run_entry(kind: str, name: str) -> None:
    """Run the entry file as __mp_main__, as multiprocessing does."""
    import runpy
    import types

    entry = types.ModuleType("__mp_main__")
    sys.argv = sys.argv or [name]  # runpy needs one.
    if kind == "module":
        vars(entry).update(runpy.run_module(name, run_name="__mp_main__", alter_sys=True))
    else:
        vars(entry).update(runpy.run_path(name, run_name="__mp_main__"))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = entry


def _holder_of(boot: _Boot) -> Any:
    """The Cluster or TaskQueue that holds the functions for which this worker was started, or
    None: never a guess."""
    made = [
        thing
        for key, thing in list(_registry.items())
        if key[:3] == boot.key[:3] and set(thing.task_map) >= set(boot.types)
    ]
    # Those made in a loop share a call site: tell them apart by the files of their queues,
    # as their order may differ here.
    same = [thing for thing in made if _path_of(thing) == boot.path]
    if len(made) == 1 and not same and not boot.alone:
        return None
    made = same or made
    parts = ("__code__", "__defaults__", "__closure__")
    types = boot.types or sorted({name for thing in made for name in thing.task_map})
    functions = [[thing.task_map.get(name) for name in types] for thing in made]
    kinds = [[getattr(f, part, f) for f in fs for part in parts] for fs in functions]
    try:
        return made[0] if made and all(kind == kinds[0] for kind in kinds) else None
    except Exception:  # A comparison may raise, as that of NumPy arrays does.
        return None


def _use_masters_files(boot: _Boot) -> Any:
    """Have the queues that this process made use the files that the master's queues use.
    Returns what holds the functions for which this worker was started, or None."""
    global _known
    _known = boot.known
    for store in _living(SQLiteStore):
        store._move(_masters_path(store, boot.known))
    holder = _holder_of(boot)
    queue = None if holder is None else _queue_of(holder)
    if queue is not None and isinstance(queue._store, SQLiteStore):
        queue._store._move(boot.path or "" if boot.synchronous else "")
        queue._store._synchronous = boot.synchronous or "NORMAL"
    elif queue is not None and boot.synchronous:
        queue._store = SQLiteStore(boot.path or "", synchronous=boot.synchronous)
    return holder


def _find_task_map(boot: _Boot) -> Mapping[str, TaskFunction]:
    """The functions for which this worker was started.

    The master could pickle and send them, or they belong to the Cluster or TaskQueue that is
    registered here when the entry file is run again, or its module is imported. What a queue
    declares here counts beside what was sent.
    """
    import importlib

    global _known
    if boot.inherits:
        _known = boot.known
        return cast(Mapping[str, TaskFunction], _registry[boot.key].task_map)
    sys.meta_path.append(_ByFile(boot.files))
    for name, file in boot.files.items():
        try:
            importlib.import_module(name)
        except ImportError:
            if os.path.exists(file):
                raise
    sent, error, packed = None, None, boot.pickled_map or _dumps(None)
    # multiprocessing does not run __main__ again if the script has ended, or for `python -m
    # package`; under a profiler it runs the profiler's __main__, without our functions.
    main: Any = sys.modules["__main__"]
    ran = main.__name__ == "__mp_main__" and os.path.abspath(getattr(main, "__file__", None) or "")
    entry = None if boot.entry is None or ran == boot.entry[2] else boot.entry
    if entry is None or b"__main__" not in packed:
        sent, error = _loaded(packed)
    is_made = any(key[:3] == boot.key[:3] for key in list(_registry))
    if entry is not None and not sent and not is_made:
        _run_entry(*entry[:2])
        sent, error = _loaded(packed)
    holder = _use_masters_files(boot)
    if holder is None and not sent:
        names = ", ".join(map(repr, boot.types)) or "declared tasks"
        raise error or RuntimeError(
            f"a worker process cannot find the functions of {names}: "
            "the Cluster was not made at the top level of a file, or several that look alike "
            "were made in one line, and its functions cannot be pickled. Use functions defined "
            "at the top level of a module (no lambdas or inner functions), or make the Cluster "
            'there, in a line of its own, or use start_method="fork"'
        )
    return collections.ChainMap(sent or {}, {} if holder is None else holder.task_map)


def _initialize(boot: _Boot, functions: Mapping[str, Any], arguments: _Arguments | None) -> None:
    """Call the Cluster's initializer: what was sent, or that of the Cluster here."""
    if arguments is None:
        return
    function = functions.get(_INITIALIZER)
    if function is None:
        made = [key for key in list(_registry) if key[:3] == boot.home[:3]]
        if boot.inherits:
            made = [boot.home]
        if len(made) != 1:
            raise RuntimeError(
                "a worker process cannot find the initializer: it cannot be pickled, and the "
                "Cluster was not made at the top level of a file, in a line of its own. Define "
                "the initializer at the top level of a module"
            )
        function = _registry[made[0]]._options.initializer
    _awaited(function(*arguments.get()))


_WORKER_NAME = "taskpool-worker-"


def _keep_pipes() -> None:
    """Keep programs that tasks start from inheriting the pipes of this worker: spawn and
    forkserver leave them inheritable, and one more that is multiprocessing's own."""
    with contextlib.suppress(OSError):
        for number in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError):  # listdir() has closed its own.
                if number > 2 and stat.S_ISFIFO(os.fstat(number).st_mode):
                    os.set_inheritable(number, False)


def _keep_signals() -> None:
    """Ctrl-C reaches the whole process group; only the master answers to it. Signals that
    were ignored from the start, as under nohup or in `script &`, stay ignored."""
    # A handler, as a program that a task starts would inherit SIG_IGN or a blocked signal.
    default: Any = signal.SIG_DFL
    handlers = {"SIGINT": lambda *_: None, "SIGTERM": default, "SIGHUP": default}
    signal.set_wakeup_fd(-1)  # A fork inherits that of the master's asyncio loop.
    for name, handler in handlers.items():
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    if os.name == "nt":  # A handler would end the wait for a pipe, and SIG_IGN is not inherited.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        signal.siginterrupt(signal.SIGINT, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


if _is_rerun() and multiprocessing.process.current_process().name.startswith(_WORKER_NAME):
    # Before _worker_main(): the entry file, which runs again now, may start programs, too.
    with contextlib.suppress(ValueError):  # Not in the main thread.
        _keep_signals()
    _keep_pipes()


def _die_with_master(life: Connection) -> None:
    """End this process when the master's end of the life line closes: at its death."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            life.poll(None)  # Readable only at end-of-file.
        os._exit(70)

    threading.Thread(target=watch, name="taskpool-life-line", daemon=True).start()
    with contextlib.suppress(ImportError, AttributeError, OSError):
        # C code that keeps the GIL stops the thread above. On Linux a closed life line also
        # sends SIGIO, whose default action ends the process even then.
        import fcntl

        fcntl.fcntl(life.fileno(), fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(life.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(life.fileno(), fcntl.F_SETFL, flags | os.O_ASYNC)


# The largest message that one os.write sends atomically: PIPE_BUF less the 4 bytes of the head.
_WHOLE_BYTES = getattr(select, "PIPE_BUF", 4) - 4


class _WorkerProcess:
    """A worker's own view: it runs tasks one after another, in the main thread.

    Once a task has opened a conversation, another thread reads the incoming pipe, so that
    answers arrive while the task runs.
    """

    def __init__(self, incoming: Connection, outgoing: Connection, permits: Any) -> None:
        self.task_map: Mapping[str, TaskFunction] = {}
        self._incoming, self._outgoing = incoming, outgoing
        # Messages are written one after another, also one that a signal handler sends while
        # its thread writes another: that one waits in _late.
        self._send_lock, self._sending = threading.RLock(), False
        self._late: collections.deque[bytes] = collections.deque()
        self._permits = permits and permits.fileno()
        self._permit = -1  # The number of the last permit read.
        self._calls: dict[str, tuple[TaskFunction, _Style]] = {}  # By task type.
        self._reader: threading.Thread | None = None
        self._received: _queues.SimpleQueue[Any] = _queues.SimpleQueue()
        self._conversation_ids = itertools.count(1)
        self._conversations: dict[int, _Conversation] = {}
        self._current = -1  # The number of the running task, or -1.
        self._pid = os.getpid()
        self._reports = _Reports(functools.partial(self.tell, "progress"), self._send_lock)

    def send(self, message: tuple[Any, ...]) -> None:
        """Send to the master; called by any thread."""
        packed = _write_message(message)
        with self._send_lock:
            self._late.append(packed)
            if self._sending:  # A signal handler or finalizer inside the loop below.
                return
            self._sending = True
            try:
                while self._late:
                    self._put(self._late.popleft())
            finally:
                self._sending = False

    def _put(self, packed: bytes) -> None:
        if len(packed) < _WHOLE_BYTES:  # What send_bytes does, in two thirds of its time.
            os.write(self._outgoing.fileno(), _HEAD.pack(len(packed)) + packed)
            return
        for start in range(0, len(packed) + 1, _PIECE_BYTES):
            self._outgoing.send_bytes(memoryview(packed)[start : start + _PIECE_BYTES])

    def tell(self, *message: Any) -> None:
        """Send what does not matter any more if the master is gone."""
        with contextlib.suppress(OSError):
            self.send(message)

    def serve(self) -> None:
        """Run what comes down the pipe, until told to stop."""
        while True:
            message = self._received.get() if self._reader else self._receive()
            if message is None or message[0] == "stop":
                return
            _, number, rows = message
            for offset, values in enumerate(rows):  # As _Worker.give() has sent them.
                if self._permitted(number + offset):
                    kind = MemoryRow if values[-1] else Row
                    self._run(number + offset, tuple.__new__(kind, values[:-1]))
            del message, rows, values  # Else the wait for the next task keeps the last in memory.

    def _receive(self) -> Any:
        receive = self._incoming.recv_bytes
        return pickle.loads(receive(), buffers=iter(receive, None))

    def _read(self) -> None:
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    message = self._receive()
                    if message[0] == "answer":
                        self._hear(*message[1:])
                    else:
                        self._received.put(message)
        finally:
            self._received.put(None)

    def _permitted(self, number: int) -> bool:
        """Whether the task may start. The master writes a permit for each task, before the
        task; to take tasks back, it reads their permits itself."""
        if self._permits is None:
            return True
        while self._permit < number:
            try:
                packed = os.read(self._permits, 8)
            except BlockingIOError:
                return False
            if not packed:
                raise EOFError
            self._permit = int.from_bytes(packed, "big")
        return self._permit == number

    def _run(self, number: int, row: Row) -> None:
        """Run one task and report how it ended."""
        call = self._calls.get(row.task_type) or self._find_function(number, row.task_type)
        if call is None:
            return
        task: Task | None = None
        begin = None
        if row.timeout is not None:
            begin = functools.partial(self.send, ("start", number))
            begin()
        self._current = number
        started = time.perf_counter()
        report: tuple[Any, ...]
        try:
            task = _job(row, self._reports.begin(number))
            function, style = call
            value = _call(function, style, task, self._toggle_ipc, begin)
            packed = _NONE if value is None else _packed(value)
            kept, problem = _kept(row, value)
            seconds = max(time.perf_counter() - started, 0.0)  # A task may patch the clock.
            report = ("done", number, seconds, packed, kept, problem)
            del value
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: they end the task, not the worker.
            if os.getpid() != self._pid:
                self._end_fork(error)
            seconds = max(time.perf_counter() - started, 0.0)
            plan = plan_of(error) if task else Plan(may_retry=False)  # Its data cannot be read.
            report = ("fail", number, seconds, tuple(_failure(error)), tuple(plan))
            traceback.clear_frames(error.__traceback__)  # Frees the task's variables.
        if os.getpid() != self._pid:
            self._end_fork(SystemExit())
        self._current = -1
        self._reports.end()
        opened = 0
        if self._conversations:
            opened = sum(not talk.done() for talk in list(self._conversations.values()))
            self._conversations.clear()
        for stream in (sys.stdout, sys.stderr):
            try:  # noqa: SIM105 - Done for every task: suppress() costs more than flush().
                stream.flush()
            except Exception:
                pass
        self.send((*report, opened) if report[0] == "done" else report)

    def _find_function(self, number: int, task_type: str) -> tuple[TaskFunction, _Style] | None:
        """How to call the function of a task type; None, and the master is told, if there is
        none: the type was declared after this worker started, or in the master only."""
        function = self.task_map.get(task_type)
        if function is None:
            error = RuntimeError(
                f"a worker process has no function for {task_type!r}: declare it at the top "
                "level of your file, or of a module that it imports"
            )
            self.send(("lacks", number, tuple(_failure(error))))
            return None
        self._calls[task_type] = call = function, _call_style(function)
        return call

    def _end_fork(self, error: BaseException) -> None:
        """End this process, which a task made by os.fork(), and which is no worker."""
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exception(type(error), error, error.__traceback__)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))

    def _toggle_ipc(self) -> Callable[..., Future[Any]]:
        """The `toggle_ipc` of the running task."""
        number = self._current

        def begin(conversation: _Conversation) -> Callable[[bytes], None]:
            if self._current != number:
                raise RuntimeError("toggle_ipc was called after its task had ended")
            if self._reader is None:
                self._reader = threading.Thread(target=self._read, daemon=True)
                self._reader.start()
            key = next(self._conversation_ids)
            self._conversations[key] = conversation
            return lambda packed: self.send(("ask", number, key, packed))

        return functools.partial(_Conversation, begin)

    def _hear(self, key: int, ok: bool, value: Any) -> None:
        """Take the broker's answer. on_message runs in a thread of its own, as it may wait
        for further conversations, whose answers come through this thread."""
        conversation = self._conversations.get(key)
        if conversation is not None and not conversation.done():
            try:
                threading.Thread(target=conversation.take, args=(ok, value), daemon=True).start()
            except RuntimeError as error:  # There are too many threads.
                _resolve(conversation, error=error)


def _worker_main(
    incoming: Connection, outgoing: Connection, permits: Connection | None, life: Connection,
    arguments: _Arguments | None,
) -> None:  # fmt: skip
    """The life of a worker process, from its first line to its exit."""
    global _worker, _rerunning
    _keep_signals()
    if os.name != "nt" and os.get_inheritable(life.fileno()):  # Not under fork.
        _keep_pipes()
    _worker = worker = _WorkerProcess(incoming, outgoing, permits)
    _die_with_master(life)
    with contextlib.suppress(Exception):
        import faulthandler

        faulthandler.enable()
    with contextlib.suppress(EOFError, OSError):  # The master is gone.
        boot: _Boot = pickle.loads(incoming.recv_bytes())[1]
        _rerunning = True
        try:
            worker.task_map = _find_task_map(boot)
            _rerunning = False
            _initialize(boot, worker.task_map, arguments)
        except BaseException as error:
            worker.send(("boot error", tuple(_failure(error))))
            return
        worker.send(("ready",))
        worker.serve()


# --- Master --------------------------------------------------------------------------
# Code that runs in the parent process. One thread, the dispatcher, decides everything and
# never blocks but in its own wait. Whatever may block has a thread of its own: the store,
# Futures, their callbacks, the listeners, the broker.


# The threads of a dispatcher, by number: all but the last one call code of the user.
_FUTURES, _CALLBACKS, _LISTENER, _BROKER, _STORE = range(5)


class _Thread:
    """A daemon thread that makes the calls posted to it, in order.

    A ThreadPoolExecutor would not do: it takes no calls once the main script has ended, and
    that is when a cluster finishes the due tasks.
    """

    def __init__(self, name: str) -> None:
        self._calls: _queues.SimpleQueue[Callable[[], Any] | None] = _queues.SimpleQueue()
        self.post: Callable[[Callable[[], Any]], None] = self._calls.put
        self.thread = threading.Thread(target=self._work, name=f"taskpool-{name}", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the thread after the calls posted so far. Does not wait."""
        self._calls.put(None)

    def is_current(self) -> bool:
        return threading.current_thread() is self.thread

    def flush(self, timeout: float) -> None:
        """Wait until the calls posted so far were made; not in the thread itself."""
        if self.is_current():
            return
        done, deadline = threading.Event(), time.monotonic() + timeout
        self._calls.put(done.set)
        while not done.wait(0.02):
            # A thread that has ended had made all of its calls.
            if not self.thread.is_alive() or time.monotonic() > deadline:
                return

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            try:
                call()
            except BaseException:
                _log.exception("error in the thread %s", self.thread.name)
            del call


def _disown(end: Any) -> None:
    """Close a file or socket that was among _master_ends."""
    _master_ends.discard(end)
    with contextlib.suppress(OSError):
        end.close()


class _WakeUp:
    """Ends the dispatcher's wait, from any thread: at most one byte is under way.

    Other processes that add or cancel tasks send a datagram to `bell`, a socket on loopback:
    whoever sends one causes a look at the store, no more.
    """

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.bell, self.port = socket.socket(type=socket.SOCK_DGRAM), 0
        with contextlib.suppress(OSError):  # Without a port, `refresh_rate` brings their tasks.
            self.bell.bind(("127.0.0.1", 0))
            self.port = self.bell.getsockname()[1]
        self._pending = False
        for end in (self.reader, self._writer, self.bell):
            end.setblocking(False)
            _master_ends.add(end)

    def set(self) -> None:
        if self._pending:
            return
        try:
            self._pending = True
            self._writer.send(b"!")
        except OSError:
            pass
        except BaseException:  # Ctrl-C before the byte is sent.
            self._pending = False
            raise

    def clear(self) -> None:
        # The byte first: else a set() in between leaves the flag set without a byte.
        with contextlib.suppress(OSError):
            self.reader.recv(64)
        self._pending = False

    def clear_bell(self) -> bool:
        """Whether it told of a cancelled task."""
        told = set()
        with contextlib.suppress(OSError):
            for _ in range(1000):
                told.add(self.bell.recv(64))
        return CANCELLED_BELL in told

    def close(self) -> None:
        for end in (self.reader, self._writer, self.bell):
            _disown(end)


_READ_BYTES = 1 << 18
_PIPE_BYTES = 1 << 20  # The largest size of a pipe that Linux allows to every user.
_SELECTABLE = os.name != "nt"  # Whether a selector can wait for pipes.


def _own(connection: Connection) -> Any:
    """A raw, non-blocking file for the master's end of a pipe, in place of *connection*."""
    descriptor = os.dup(connection.fileno())
    mode = "rb" if connection.readable else "wb"
    connection.close()
    os.set_blocking(descriptor, False)
    with contextlib.suppress(ImportError, AttributeError, OSError):
        # Linux can make a pipe larger than 64 kB: large data then need fewer turns.
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    end = open(descriptor, mode, buffering=0)  # noqa: SIM115
    _master_ends.add(end)
    return end


class _Pipes:
    """The master's ends of a worker's pipes, non-blocking, with buffers for both directions.

    The worker uses multiprocessing's Connection, so messages have its framing; those of the
    worker come in pieces. A small message through a socket would cost three times as much.
    """

    def __init__(self, context: Any) -> None:
        self._ends: list[Any] = []  # The master's.
        self.theirs: list[Any] = []  # The worker's ends: closed here once it has started.
        self._received, self._pieces = bytearray(), bytearray()
        self.unsent: collections.deque[memoryview] = collections.deque()
        self.ended = False  # The worker has closed its end, and all was read.
        try:
            self.outgoing, self._incoming = self._pipe(context, 1), self._pipe(context, 0)
            self._permits = self._pipe(context, 1)
            os.set_blocking(self.theirs[-1].fileno(), False)
            copy = Connection(os.dup(self.theirs[-1].fileno()), writable=False)
            self._unread_permits = _own(copy)
            self._ends.append(self._unread_permits)
            self._pipe(context, 1)  # The life line: it closes when the master ends.
        except BaseException:
            self.close()
            self.close_theirs()
            raise

    def _pipe(self, context: Any, mine: int) -> Any:
        """Make a pipe. Returns the master's end, which reads (0) or writes (1)."""
        ends = context.Pipe(duplex=False)
        self.theirs.append(ends[1 - mine])
        self._ends.append(ends[mine])
        self._ends[-1] = _own(ends[mine])
        return self._ends[-1]

    def fileno(self) -> int:
        return cast(int, self._incoming.fileno())

    def send(self, message: bytes) -> None:
        size = len(message)
        head = _HEAD.pack(size) if size < 1 << 31 else struct.pack("!iQ", -1, size)
        if size < 1 << 14:
            self.unsent.append(memoryview(head + message))
        else:
            self.unsent += (memoryview(head), memoryview(message))
        self.flush()

    def flush(self) -> None:
        try:
            while self.unsent:
                chunk = self.unsent[0]
                sent = self.outgoing.write(chunk)
                if sent is None:
                    return
                if sent < len(chunk):
                    self.unsent[0] = chunk[sent:]
                else:
                    self.unsent.popleft()
        except OSError:  # The worker is gone. Its own messages are still to be read.
            self.unsent.clear()

    def receive(self) -> Iterator[bytearray]:
        """The messages that have arrived: not all of a flood, so that other workers get
        their turn. Raises _Nonsense."""
        try:
            for _ in range(16):
                chunk = self._incoming.read(_READ_BYTES)
                if not chunk:
                    self.ended = self.ended or chunk is not None
                    break
                self._received += chunk
        except OSError:
            self.ended = True
        start, view = 0, self._received
        while len(view) - start >= 4:
            (size,) = _HEAD.unpack_from(view, start)
            if size > _PIECE_BYTES:
                raise _Nonsense(f"a message of {size} bytes")
            body = start + 4
            if len(view) - body < size:
                break
            start = body + size
            if size < _PIECE_BYTES and not self._pieces:
                yield view[body:start]
                continue
            with memoryview(view) as whole:
                self._pieces += whole[body:start]
            if size < _PIECE_BYTES:
                message, self._pieces = self._pieces, bytearray()
                yield message
        del self._received[:start]

    def permit(self, first: int, count: int) -> None:
        """Let the worker begin the runs of these numbers, when it comes to them."""
        with contextlib.suppress(OSError):
            self._permits.write(struct.pack(f"!{count}Q", *range(first, first + count)))

    def revoke(self) -> set[int] | None:
        """Read the permits that the worker has not read, and return their numbers. None if a
        task has read a part of one: then it is unknown which runs may begin."""
        packed = self._unread_permits.read(8 * 4 * AHEAD_TASKS) or b""
        return None if len(packed) % 8 else {n for (n,) in struct.iter_unpack("!Q", packed)}

    def close_theirs(self) -> None:
        for end in filter(None, self.theirs):
            end.close()

    def close(self) -> None:
        for end in self._ends:
            _disown(end)


class _ThreadedPipes(_Pipes):
    """The master's ends where no selector can wait for pipes (Windows): with two threads.

    There are no permits, so a worker gets one task at a time.
    """

    def __init__(self, context: Any, wake: Callable[[], None]) -> None:
        their_incoming, self.outgoing = context.Pipe(duplex=False)
        self._incoming, their_outgoing = context.Pipe(duplex=False)
        their_life, life = context.Pipe(duplex=False)
        self.theirs = [their_incoming, their_outgoing, None, their_life]
        self._ends, self.unsent = [self._incoming, self.outgoing, life], collections.deque()
        self._messages: collections.deque[bytearray] = collections.deque()
        self._wake, self._hung_up, self.ended = wake, False, False
        self._sender = _Thread("send")
        threading.Thread(target=self._read, name="taskpool-receive", daemon=True).start()
        _master_ends.update(self._ends)

    def send(self, message: bytes) -> None:
        def send() -> None:
            with contextlib.suppress(OSError, ValueError):
                self.outgoing.send_bytes(message)

        self._sender.post(send)

    def _read(self) -> None:
        message = bytearray()
        with contextlib.suppress(EOFError, OSError):
            while True:
                piece = self._incoming.recv_bytes(_PIECE_BYTES)  # Raises for a longer one.
                message += piece
                if len(piece) < _PIECE_BYTES:
                    self._messages.append(message)
                    message = bytearray()
                    self._wake()
        self._hung_up = True
        self._wake()

    def receive(self) -> Iterator[bytearray]:
        hung_up = self._hung_up  # Read first: all that came before it is in the deque.
        while self._messages:
            yield self._messages.popleft()
        self.ended = hung_up

    def permit(self, first: int, count: int) -> None:
        pass

    def revoke(self) -> set[int] | None:
        return set()

    def close(self) -> None:
        self._sender.stop()
        super().close()


class _Run:
    """One claim of this master, until the store has recorded how it ended."""

    __slots__ = "asks cost deadline event left number outcome row source verdict".split()
    # Set when the run has ended:
    outcome: Outcome
    event: str | None  # done, error; None: requeued or cancelled.
    left: _Left

    def __init__(self, source: _Source, row: Row, cost: float) -> None:
        self.source, self.row, self.cost = source, row, cost
        self.number = -1  # Of the runs of its worker, from 0.
        self.deadline = math.inf  # Monotonic: when its timeout ends.
        self.asks: dict[int, Any] | None = None  # How to answer its open conversations.
        self.verdict: str | None = None  # Why its worker was killed: timeout, cancel.


def _program() -> str:
    """What a worker process runs: Python."""
    from multiprocessing import spawn

    return os.fsdecode(spawn.get_executable() or "")


def _startable() -> contextlib.AbstractContextManager[None]:
    """Hides from multiprocessing a __main__ that it cannot run again: one that is missing,
    from standard input, of a debugger, or without sys.argv. A worker that needs it runs it
    itself. Raises for what would end the new process without a message."""
    from multiprocessing import spawn

    _absolute(".")  # Raises if the current folder was deleted.
    program = _program()
    able = os.path.isfile(program) and os.access(program, os.X_OK)
    if not able and os.name == "posix":  # On Windows start() raises.
        text = "sys.executable is no program; call multiprocessing.set_executable()"
        raise FileNotFoundError(errno.ENOENT, text, program)
    with contextlib.suppress(KeyError, AttributeError):  # No __main__, or no __spec__ in it.
        data = spawn.get_preparation_data("")
        name, path = map(data.get, ("init_main_from_name", "init_main_from_path"))
        is_there = type(name) is str if path is None else os.path.isfile(path)
        if data["sys_argv"] and (is_there or (name is path is None)):
            return contextlib.nullcontext()
    names = vars(sys.modules["__main__"]) if "__main__" in sys.modules else {}
    return _as_main({**names, "__spec__": None, "__file__": None})


def _start_process(process: Any, method: str) -> None:
    """Start the process, and leave the program's own use of multiprocessing as it was."""
    unset = multiprocessing.get_start_method(allow_none=True) is None
    try:
        with contextlib.nullcontext() if method == "fork" else _startable():
            process.start()
    except (EOFError, ConnectionError) as error:  # The forkserver did not come up.
        raise TaskPoolError(f"{_program()} started no worker process: {error!r}") from error
    finally:
        if unset:  # spawn and forkserver fix the default method as they start.
            multiprocessing.set_start_method(None, force=True)
        # Else a fork of the program sends SIGTERM to our worker as it exits, and
        # active_children() in another thread takes the worker's exit code.
        getattr(multiprocessing.process, "_children", set()).discard(process)


class _Worker:
    """The master's end of one worker process. Used by the dispatcher only."""

    def __init__(self, options: _Options, number: int, boot: _Boot, wake: _WakeUp) -> None:
        packed = _dumps(("boot", boot))
        context: Any = multiprocessing.get_context(options.start_method)
        with _birth_lock:
            pipes: Any = _Pipes(context) if _SELECTABLE else _ThreadedPipes(context, wake.set)
            self.channel = pipes
            try:
                self.process = context.Process(
                    target=_worker_main,
                    args=(*pipes.theirs, options.initargs),
                    name=f"{_WORKER_NAME}{number}",
                    daemon=False,  # So that tasks may start processes.
                )
                _start_process(self.process, context.get_start_method())
            except BaseException:
                pipes.close()
                raise
            finally:
                pipes.close_theirs()
        self.pid: int = self.process.pid
        self.ready = False  # It has found its functions.
        self.open = False  # It is ready, and may get tasks.
        self.stopping = False  # Told to leave, or killed: gets no more tasks.
        self.killed = False  # By us: what it ran without a verdict is requeued.
        self.runs: collections.deque[_Run] = collections.deque()  # The head is running.
        self.reported = False  # The head has progress that the store does not know.
        self.functions = boot.functions  # How many the Cluster had when it started.
        self.load = 0.0  # The sum of the costs of its runs; 1 = no room.
        self.given = 0  # How many tasks it has got so far.
        self.watched = False  # The selector waits until its channel can be written to.
        # Monotonic:
        self.hung_up_at = math.inf  # When it closed its end of the channel.
        self.told_to_end_at = math.inf  # When SIGTERM was seen to have ended it.
        self.since = time.monotonic()  # Since when it is in this state, or runs this head.
        self.kill_at = self.since + BOOT_WARN_SECONDS  # When patience ends.
        self.check_at = self.since  # When to look whether the process has ended.
        self.channel.send(packed)

    def shown(self) -> dict[str, Any]:
        """What Cluster.workers tells of it, in any thread."""
        row = next((run.row for run in list(self.runs)), None)
        since = datetime.now(timezone.utc) - timedelta(seconds=time.monotonic() - self.since)
        return {
            "pid": self.pid, "state": "busy" if row else "idle" if self.ready else "starting",
            "task_id": row and row.id, "task_type": row and row.task_type, "since": since,
        }  # fmt: skip

    def give(self, runs: list[_Run], now: float) -> None:
        if not self.runs:
            self.since = now
        self.runs += runs
        first, self.given = self.given, self.given + len(runs)
        self.channel.permit(first, len(runs))
        rows: list[tuple[Any, ...]] = []
        size = 0
        for number, run in enumerate(runs, first):
            row, run.number = run.row, number
            if row.timeout is not None:
                # A second more, for the way there; set anew when the worker tells the start.
                run.deadline = now + row.timeout + 1.0
            size += len(row.data)
            in_memory = isinstance(row, MemoryRow)
            if in_memory and len(row.data) > MESSAGE_CHARS:
                row = row._replace(data=pickle.PickleBuffer(row.data))  # Sent without a copy.
            rows.append(row + (in_memory,))
            # In several messages the worker can begin while the rest is on its way.
            if size > MESSAGE_CHARS:
                self._send_runs(first, rows)
                first, rows, size = number + 1, [], 0
        if rows:
            self._send_runs(first, rows)

    def _send_runs(self, first: int, rows: list[tuple[Any, ...]]) -> None:
        buffers: list[pickle.PickleBuffer] = []
        self.channel.send(pickle.dumps(("run", first, rows), 5, buffer_callback=buffers.append))
        for buffer in buffers:
            self.channel.send(buffer.raw())

    def take_back(self) -> list[_Run]:
        """The runs that have not begun, and cannot begin any more without their permits."""
        numbers = self.channel.revoke()
        if numbers is None:
            self.end()
        taken = [run for run in self.runs if run.number in numbers] if numbers else []
        for run in taken:
            self.runs.remove(run)
        if taken:
            self.load = sum(run.cost for run in self.runs)
        return taken

    def end_head(self, now: float) -> _Run:
        """The head has ended: the next run is the head."""
        run = self.runs.popleft()
        self.load = self.load - run.cost if self.runs else 0.0
        self.since = now
        return run

    def retire(self, now: float) -> None:
        """Let it end by itself after its last run: with its exit handlers, and its output
        flushed."""
        self.stopping, self.open, self.check_at = True, False, now
        self.kill_at = math.inf if self.runs else now + EXIT_SECONDS
        self.channel.send(_dumps(("stop",)))

    def kill(self) -> None:
        self.stopping = self.killed = True
        self.end()

    def end(self) -> None:
        """Kill the process, as if it died by itself: what it runs fails."""
        self.open, self.check_at, self.kill_at = False, 0.0, math.inf
        with contextlib.suppress(OSError, ValueError):
            self.process.kill()

    def close(self) -> None:
        self.channel.close()
        with contextlib.suppress(ValueError):
            self.process.close()


_load = operator.attrgetter("load")


class _Look(threading.Condition):
    """A Future's lock, waiters and callbacks, created on first use."""

    def __init__(self) -> None:
        super().__init__()
        self.waiters: list[Any] = []
        self.callbacks: list[Any] = []


class _Ended:
    """Instead of a _Look, for all Futures that ended before their first use. Nothing changes
    any more, so its lock need not lock."""

    callbacks = ()

    @property
    def waiters(self) -> _Ended:
        return self

    def _do_nothing(self, *_: object) -> None:
        pass

    append = remove = acquire = release = __enter__ = __exit__ = _do_nothing


_ENDED = _Ended()
_first_looks: dict[TaskFuture, _Look | _Ended] = {}  # Used by TaskFuture._look only.
_unpacking = threading.RLock()  # Held while an unpacked result is stored.
_CANCELLED, _FINISHED = "CANCELLED_AND_NOTIFIED", "FINISHED"  # States of concurrent.futures.


def _call_all(calls: Iterable[Callable[[], Any]]) -> None:
    """Call all callbacks of a Future. Exceptions are logged; the first error that is not an
    Exception, as SystemExit, is raised in the end."""
    raised: BaseException | None = None
    for call in calls:
        try:
            call()
        except BaseException as error:
            if raised is not None or isinstance(error, Exception):
                _log.exception("error in a callback of a Future")
            else:
                raised = error
    if raised is not None:
        raise raised


class TaskFuture(Future[Any]):
    """The Future of a submitted task. `task` is the Task as it was submitted last.

    The result stays pickled until somebody asks for it: only the thread that asks waits for
    the imports and the code of the classes in it. Callbacks have a thread of their own.
    """

    # The state stays PENDING until the end, so that cancel() works at any time; _held says
    # whether the task runs.

    # A Future of concurrent.futures consists of a dozen objects; this is one, as there may be
    # a million, and the garbage collector visits each.
    __slots__ = "_dropped _foreign _futures _held _inside _left _row _state _stored".split()
    _left: Any  # Set when it ends: a _Left; once unpacked, the result and the exception.

    def __init__(self, futures: _Futures, row: Row) -> None:
        self._state = "PENDING"
        self._inside: Any = None  # A _Look, or _ENDED.
        self._row, self._futures = row, futures
        self._held = False  # This master has claimed the task, and its end is not recorded.
        self._stored = False  # TaskQueue._add() has returned.
        self._dropped = False  # Nobody waits for it: its task is removed when it waits.
        self._foreign = ""  # Others may run the task: it was "kept", or its claim "lost".

    def _look(self, made: _Look | _Ended) -> Any:
        """Set `_inside` to *made*, unless another thread has set it; return `_inside`."""
        # setdefault() is one step: all threads that come here before _inside is set get the
        # same object, as its entry is removed only after that.
        made = _first_looks.setdefault(self, made)
        if self._inside is None:
            self._inside = made
        _first_looks.pop(self, None)
        return self._inside

    @property
    def _condition(self) -> Any:  # type: ignore[override]
        inside = self._inside or self._look(_Look())
        if inside is _ENDED:
            self._state = _FINISHED  # _end_unseen() may be just about to set it.
        return inside

    @property
    def _waiters(self) -> Any:  # type: ignore[override]
        return self._condition.waiters

    @property
    def _done_callbacks(self) -> Any:
        return self._condition.callbacks

    @property
    def _result(self) -> Any:  # type: ignore[override]
        return self._unpack()[0]

    @property
    def _exception(self) -> Any:  # type: ignore[override]
        return self._unpack()[1]

    def _unpack(self) -> tuple[Any, Exception | None]:
        """The result and the exception: unpickled in the thread that asks first."""
        if self._state == "PENDING" or self._left is _NONE:
            return None, None
        if type(self._left) is not tuple:
            made = _unpacked(self._left)
            with _unpacking:  # Two threads that ask at once get the same object.
                if type(self._left) is not tuple:
                    self._left = made
        return cast("tuple[Any, Exception | None]", self._left)

    def _end_unseen(self, left: _Left) -> bool:
        """End, if nobody has used `_inside` so far: needs no lock, so it never waits."""
        if self._inside is None:
            self._left = left  # First: who finds _ENDED reads it.
            if self._look(_ENDED) is _ENDED:
                self._state = _FINISHED
                self._futures.discard(self)
                return True
        return False

    def _end(
        self, state: str, left: Any = _NONE, call: Callable[[list[Any]], None] | None = None
    ) -> None:
        """End, unless it has ended. Waiters are told first; then *call* calls the callbacks."""
        with self._condition:
            if self._state != "PENDING":
                return
            inside = self._inside
            self._left, self._state = left, state
            failed = isinstance(left, (Exception, _Failure))
            for waiter in inside.waiters:
                if state == _CANCELLED:
                    waiter.add_cancelled(self)
                else:
                    waiter.add_exception(self) if failed else waiter.add_result(self)
            inside.notify_all()
        self._futures.discard(self)
        if inside.callbacks:
            call = call or self._futures.call_back
            call([functools.partial(callback, self) for callback in inside.callbacks])

    def set_result(self, result: Any) -> None:
        """As Future.set_result; not for you."""
        self._end(_FINISHED, (result, None))

    def set_exception(self, exception: BaseException | None) -> None:
        """As Future.set_exception; not for you."""
        self._end(_FINISHED, exception)

    def _wait(self, timeout: float | None) -> tuple[Any, Exception | None]:
        """The result and the exception, once it has ended: unpacked without the lock."""
        if self._state == "PENDING":
            if self._futures.is_at_work():
                raise RuntimeError("a log handler or finalizer waits in a thread of the cluster")
            inside = self._condition
            with inside:
                if self._state == "PENDING":
                    inside.wait(timeout)
        if self._state != _FINISHED:
            super().result(0)  # Raises TimeoutError or CancelledError.
        return self._unpack()

    def result(self, timeout: float | None = None) -> Any:
        """As Future.result."""
        error = None
        try:
            result, error = self._wait(timeout)
            if error is None:
                return result
            raise error
        finally:
            del self, error  # As its base does: else the error would keep the Future alive.

    def exception(self, timeout: float | None = None) -> Any:
        """As Future.exception."""
        return self._wait(timeout)[1]

    @property
    def task(self) -> Task:
        """The Task, as it was added; with the data that submit(if_exists="follow") gave it."""
        return Task(self._row)

    def running(self) -> bool:
        """Whether this cluster has claimed the task, and its end is not known yet."""
        return self._held and not self.done()

    def cancel(self) -> bool:
        """Remove the task if it waits. False if it runs or is over."""
        return self._remove(_call_all)

    def _remove(self, call: Callable[[list[Any]], None]) -> bool:
        """cancel(), where *call* calls the callbacks."""
        if not self.done() and not self._foreign and self._futures.remove([self._row]):
            self._end(_CANCELLED, call=call)
        return self.cancelled()


class _Futures:
    """The Futures of a cluster that have not ended, by the ids of their tasks.

    A Future waits for an incarnation: an id with the instant of its creation. It ends when
    this master records the end of that task, or a look finds it ended or gone. Used by any
    thread.
    """

    def __init__(self, queue: TaskQueue, is_at_work: Callable[[], bool]) -> None:
        self._queue, self.is_at_work = queue, is_at_work
        self._by_id: dict[str, TaskFuture | list[TaskFuture]] = {}
        self._lock = threading.RLock()  # Protects it. For a moment only.
        # Of a cluster that has started: who ends Futures, and who calls callbacks.
        self.threads: list[_Thread] = []
        self.failure: TaskPoolError | None = None  # Of the dispatcher.
        self.replacements = 0  # Calls of end_replaced().
        self.opened = 0  # Others may have taken stored tasks that were added until then.

    def __bool__(self) -> bool:
        return bool(self._by_id)

    def store_of(self, row: Row) -> Store:
        in_memory = isinstance(row, MemoryRow)
        return self._queue.in_memory._store if in_memory else self._queue._store

    # ---- Who waits

    def add(self, future: TaskFuture) -> None:
        if self._by_id.setdefault(future._row.id, future) is future:
            return  # One step, so most need no lock.
        with self._lock:
            found = self._by_id.setdefault(future._row.id, future)
            if found is not future:  # A new list: others may look at the old one.
                others = found if isinstance(found, list) else [found]
                self._by_id[future._row.id] = [*others, future]

    def discard(self, future: TaskFuture) -> None:
        with self._lock:
            task_id = future._row.id
            found = self._by_id.get(task_id)
            if found is future:
                del self._by_id[task_id]
            elif isinstance(found, list):  # Others look at it meanwhile: it is never missing.
                others = [other for other in found if other is not future]
                self._by_id[task_id] = others if others[1:] else others[0]

    def under(self, task_id: str) -> list[TaskFuture]:
        """Those of all incarnations of an id."""
        found = self._by_id.get(task_id, [])
        return found if isinstance(found, list) else [found]

    def of(self, row: Row) -> list[TaskFuture]:
        """Those that wait for this very task, not for another incarnation of its id.

        Until add() returns, the task of a Future may have got a later `created_at`, as another
        one of its id has the same: then the data tell which it is.
        """
        only = self._by_id.get(row.id)
        if type(only) is TaskFuture and only._stored:  # As most are.
            return [only] if only._row.created_at == row.created_at else []
        found: list[TaskFuture] = []
        for future in self.under(row.id):
            own = future._row
            is_it = own.created_at == row.created_at
            if not future._stored and own.created_at <= row.created_at:
                is_it = (own.lane, own.data) == (row.lane, row.data)
            if is_it:
                found.append(future)
        return found

    def all(self) -> list[TaskFuture]:
        """Those that have not ended."""
        return [future for task_id in list(self._by_id) for future in self.under(task_id)]

    def join(self, future: TaskFuture, stored: Row) -> TaskFuture:
        """The Future of what add() has returned for the task of *future*: of that one, or of
        another that was there, and was kept."""
        own = future._row._replace(created_at=stored.created_at, state=stored.state, after=())
        if stored == own:
            future._row = stored
            return future
        self.discard(future)
        with self._lock:
            for other in self.of(stored):
                other._row = other._row._replace(data=stored.data)  # "follow" has changed it.
                return other
            future._row, future._foreign = stored, "kept"
            self.add(future)
        return future

    # ---- How they end

    def _post(self, thread: int, work: Callable[..., Any], *arguments: Any) -> None:
        """Make a call in that thread; here if the cluster never started."""
        if self.threads:
            self.threads[thread].post(functools.partial(work, *arguments))
            return
        try:
            work(*arguments)
        except BaseException:
            _log.exception("error in a callback of a Future")

    def call_back(self, calls: list[Callable[[], Any]]) -> None:
        self._post(_CALLBACKS, _call_all, calls)

    def end(self, future: TaskFuture, state: str, left: _Left = _NONE) -> None:
        """End a Future from a thread that must not wait for the Future's lock."""
        if state != _FINISHED or not future._end_unseen(left):
            self._post(_FUTURES, future._end, state, left)

    def unknown_end(self, future: TaskFuture) -> tuple[str, _Left]:
        """How a Future ends if the end of its task is never told here: cancelled, unless its
        task may have run."""
        row = future._row
        if self.failure is not None:
            return _FINISHED, self.failure
        if future._foreign == "lost":
            why = "its claim was lost"
        elif not (
            future._foreign or isinstance(row, MemoryRow) or row.created_at > self.opened
        ):
            why = "this cluster had stood still for longer than a lease"
        else:
            return _CANCELLED, _NONE
        known = "another cluster may have run it, and no result is known here"
        return _FINISHED, TaskPoolError(f"task {row.id!r}: {why}; {known}")

    def end_all(self) -> None:
        """The cluster ends."""
        for future in self.all():
            # After what that thread is to do: fail_waiting() knows better how some of them end.
            self._post(_FUTURES, future._end, *self.unknown_end(future))

    def end_replaced(self, task_id: str) -> None:
        """End those of an id whose tasks are no longer there: replaced, or removed."""
        self.replacements += 1  # First: submit() sees this, or here its Future is `_stored`.
        for future in self.under(task_id):
            if future._held or not future._stored:
                continue
            found = self.store_of(future._row).find(Query(ids=[task_id]), self._queue._now())
            became = what_became(future._row, next(iter(found), None))
            if became in ("gone", "replaced") and not future._held:
                future._end(*self.unknown_end(future))

    def fail_waiting(self, error: Exception | _Failure) -> None:
        """No worker can start: end those whose tasks wait here, and remove these tasks."""

        def fail(future: TaskFuture) -> None:
            future._held = True  # A look that finds its task gone must not cancel it.
            with contextlib.suppress(Exception):  # Of the store: then the task stays.
                if not future._foreign:  # Else it is not ours to remove.
                    self.remove([future._row])
            future._end(_FINISHED, error)

        for future in self.all():
            if not future._held:
                self._post(_FUTURES, fail, future)

    def remove(self, rows: Sequence[Row]) -> int:
        """Remove those of these tasks that wait; all are in one store."""
        ids, instants = [row.id for row in rows], [row.created_at for row in rows]
        query = Query(ids=ids, states=["waiting"], created_at=instants)
        store = self.store_of(rows[0])
        before, removed = store.followed, store.remove(query, self._queue._now())
        if store.followed != before:
            self._queue._changed(store.followed[1] != before[1], stored=not store.in_memory)
        return removed

    def drop(self, futures: Iterable[TaskFuture]) -> None:
        """Nobody waits for these any more: remove their tasks, which are in one store, wherever
        they wait, now or later. In the dispatcher, which must not wait meanwhile."""

        def remove(part: Sequence[TaskFuture]) -> None:
            if isinstance(part[0]._row, MemoryRow):  # One by one, each in a moment.
                for future in part:
                    future._remove(self.call_back)
            elif self.remove([future._row for future in part]):
                self._queue._changed(removed=True)  # A look ends the Futures.

        dropped = list(futures)
        for future in dropped:
            future._dropped = True
        for start in range(0, len(dropped), 500):
            self._post(_FUTURES, remove, dropped[start : start + 500])

    def claimed(self, rows: Iterable[Row]) -> None:
        """This master has these tasks now."""
        for row in rows if self._by_id else ():
            for future in self.of(row):
                future._held = True

    def settled(self, run: _Run, led: str) -> None:
        """The store has recorded what became of a run."""
        for future in self.of(run.row) if self._by_id else ():
            if led in ("", "waits"):
                future._held, future._foreign = False, future._foreign or ("" if led else "lost")
                if future._dropped:
                    self.drop([future])
            elif run.event is None or run.verdict == "cancel":
                self.end(future, _CANCELLED)
            else:
                self.end(future, _FINISHED, run.left)

    # ---- Looks

    def look(self, store: Store) -> list[tuple[TaskFuture, Row | None]]:
        """Those whose tasks this master does not hold, with what is stored under their ids."""
        futures = [f for f in self.all() if f._stored and not f._held]
        futures = [f for f in futures if isinstance(f._row, MemoryRow) is store.in_memory]
        found: list[tuple[TaskFuture, Row | None]] = []
        for start in range(0, len(futures), 500):
            part = futures[start : start + 500]
            query = Query(ids=[future._row.id for future in part])
            rows = {row.id: row for row in store.find(query, self._queue._now())}
            found += [(future, rows.get(future._row.id)) for future in part]
        return found

    def compare(self, future: TaskFuture, row: Row | None) -> None:
        """End a Future whose task was found ended or gone; in the dispatcher, after what the
        store said before that."""
        became = what_became(future._row, row)
        if future._held or not became:
            return
        if row is None or became in ("gone", "replaced"):
            kept = future._foreign == "kept"
            self.end(future, *((_FINISHED, _NONE) if kept else self.unknown_end(future)))
        elif became == "done" or row.error is None:
            try:
                left: _Left = _dumps(Task(row).result)
            except Exception as error:  # Written by others; the next ones are to be seen.
                left = StoreError(f"the stored result cannot be decoded: {error!r}")
            self.end(future, _FINISHED, left)
        else:
            name, _, text = row.error.partition("\n")[0].partition(": ")
            ran = row.started_at is not None
            left = RemoteError(name, text, row.error) if ran else not_started(row)
            self.end(future, _FINISHED, left)


class _Options(NamedTuple):
    """The arguments of a Cluster, checked; durations in seconds."""

    max_workers: int
    in_memory_only: bool
    broker: Broker | None
    log_all: bool
    keep_alive: float | str | None
    auto_initialize: bool
    start_method: str
    max_tasks: int | None
    shutdown_timeout: float
    initializer: Callable[..., Any] | None = None
    initargs: _Arguments | None = None


def _warn_followers(store: Store, failed: Sequence[str]) -> None:
    """Say how many tasks wait for these, which have failed for good. In the store's thread."""
    with contextlib.suppress(StoreError):  # What has failed is recorded.
        waiting = collections.Counter(bond.parent for bond in store.bonds(parents=failed))
        for row in store.rows(Query(ids=list(waiting), states=["failed"]), 0) if waiting else ():
            text = "cluster:%s:%s:\t%s for this one: retry or remove it"
            count = _counted(waiting[row.id], "task waits", "tasks wait")
            _log.warning(text, row.task_type, row.id, count)


def _log_start(row: Row) -> None:
    _log.info("cluster:%s:%s:\tstarted", row.task_type, row.id)


class _Crew:
    """The workers: which of them has which runs, and whether there are too few or too many.

    It has no clock, and does I/O only through the worker objects that the engine makes in
    start_worker(). It tells the source of a run what became of it: requeue(), fail(),
    cancelled(); and the engine to hear() and forget_worker() those that ended.
    """

    def __init__(self, options: _Options, types: Collection[str], engine: Any) -> None:
        self.options, self._types, self._engine = options, types, engine
        self.workers: list[_Worker] = []
        self.expected: dict[str, float] = {}  # Seconds, by task type.
        self.shares = dict.fromkeys(types, 1.0)  # Of a worker's room, by task type.
        self.freed = False  # A worker has more room than when the dispatcher last asked.
        self.stopping = False  # Nothing starts any more; SIGTERM fails no run.
        self.failed_boots, self.boot_after = 0, 0.0  # Back-off of dying starts.
        self.boot_error: Exception | _Failure | None = None
        self.last_work = 0.0  # When a task last ran, or could start.
        self.logs_runs = False

    # ---- Room

    def room(self) -> float:
        """How much work may be claimed now, in workers' worth. (P5)"""
        room = 0.0
        for worker in self.workers:
            if worker.open and worker.load < 1.0:
                room += 1.0 - worker.load
        return room

    def runs(self) -> list[_Run]:
        return [run for worker in self.workers for run in worker.runs]

    def costs(self) -> Mapping[str, float]:
        """How much room a task of each type takes."""
        if len(self.shares) < len(self._types):  # The queue has declared more.
            self.shares = {**dict.fromkeys(self._types, 1.0), **self.shares}
        if not _SELECTABLE:
            # Without permits no run can be taken back: each worker gets one at a time.
            return dict.fromkeys(self.shares, 1.0)
        most = self.options.max_tasks
        if most is None:
            return self.shares
        left = [most - worker.given for worker in self.workers if worker.open]
        least = 1.0 / min(left, default=most)
        return {task_type: max(cost, least) for task_type, cost in self.shares.items()}

    def learn(self, row: Row, seconds: float) -> None:
        task_type = row.task_type
        expected = learned(self.expected.get(task_type), seconds / (row.items or 1))
        self.expected[task_type], self.shares[task_type] = expected, share(expected)

    # ---- Events

    def place(self, runs: Sequence[_Run], now: float) -> None:
        """Give runs to the workers with the least load; what finds no room is requeued."""
        workers = [worker for worker in self.workers if worker.open and worker.load < 1.0]
        # A few runs are placed one by one, many in chunks, as choosing a worker takes time.
        step, most = max(1, len(runs) // (4 * len(workers) or 1)), self.options.max_tasks
        batches: dict[_Worker, list[_Run]] = {}
        placed = 0
        while placed < len(runs) and workers:
            worker = min(workers, key=_load)
            batch = batches.setdefault(worker, [])
            for run in runs[placed : placed + step]:
                if worker.load > 1.0 - 1e-9 or worker.given + len(batch) == most:
                    workers.remove(worker)
                    break
                worker.load += run.cost
                batch.append(run)
                placed += 1
        for worker, batch in batches.items():
            if not batch:
                continue
            if self.logs_runs and not worker.runs:
                _log_start(batch[0].row)
            worker.give(batch, now)
            if worker.given == most:
                worker.retire(now)
        for run in runs[placed:]:
            run.source.requeue(run)

    def ended(self, worker: _Worker, seconds: float, now: float) -> _Run:
        """The head of the worker's runs has ended after so many seconds."""
        run = worker.end_head(now)
        self.freed = True
        # Most types are known to be as quick as this counts. Then there is nothing to learn.
        if seconds > LEAST_SECONDS or run.cost > LEAST_SHARE:
            self.learn(run.row, seconds)
        if self.logs_runs and worker.runs:
            _log_start(worker.runs[0].row)
        return run

    def lacks(self, worker: _Worker, failure: _Failure, now: float) -> None:
        """The worker has no function for its head. One that started after the last declaration
        may have it."""
        run, self.freed = worker.end_head(now), True
        if worker.functions >= len(self._types):
            run.source.fail(run, failure, 0.0, _error_text(failure))
            return
        self._take_back(worker)
        if not worker.stopping:
            worker.retire(now)
        run.source.requeue(run)

    def got_ready(self, worker: _Worker, now: float) -> None:
        worker.ready, worker.open, worker.since = True, not worker.stopping, now
        worker.kill_at = math.inf
        self.boot_error, self.failed_boots, self.boot_after, self.freed = None, 0, 0.0, True

    def cancel(self, task_id: str, *places: bool) -> _Run | None:
        """End the run of that task, if there is one; True: in memory, False: stored."""
        runs = (run for run in self.runs() if isinstance(run.row, MemoryRow) in places)
        run = next((run for run in runs if run.row.id == task_id), None)
        self.cancel_runs([] if run is None else [run])
        return run

    def cancel_runs(self, runs: Collection[_Run]) -> None:
        """Take runs back from their workers, or kill the workers if they have begun."""
        for run in runs:
            run.verdict = "cancel"
        for worker in self.workers:
            if any(run in runs for run in worker.runs):
                self._take_back(worker)
                if any(run in runs for run in worker.runs):
                    worker.kill()

    def _take_back(self, worker: _Worker) -> None:
        """Requeue what the worker has not begun, but for what is cancelled."""
        taken, self.freed = worker.take_back(), True
        for run in taken:
            if run.verdict == "cancel":
                run.source.cancelled(run)
            else:
                run.source.requeue(run)

    def excuse(self, late: float) -> None:
        """Move all deadlines by *late* seconds, in which this process was perhaps stopped."""
        for worker in self.workers:
            worker.kill_at += late
            worker.since += late
            for run in worker.runs:
                run.deadline += late

    # ---- What time brings

    def tick(self, now: float, available: int = 0, full: bool = False) -> float:
        """See to timeouts, slow heads and workers that ended; start workers for *available*
        tasks, or as many as are allowed (*full*). Returns when to call tick() again."""
        again, free, works = math.inf, 0, False
        for worker in self.workers[:]:
            head = worker.runs[0] if worker.runs else None
            if head and head.deadline <= now and not worker.killed:
                self._take_back(worker)
                head.verdict = "timeout"
                worker.kill()
            elif head and head.cost < 1.0 and worker.since + SLOW_SECONDS <= now:
                self._let_go(worker, head, now)
            if worker.stopping and not worker.runs and worker.kill_at == math.inf:
                worker.kill_at, worker.check_at = now + EXIT_SECONDS, now
            if worker.kill_at <= now:
                self._lose_patience(worker, now)
            if worker.check_at <= now:
                self._look_at_exit(worker, now)
            again = min(again, worker.kill_at, worker.check_at)
            if head and head.cost < 1.0:
                again = min(again, worker.since + SLOW_SECONDS)
            if head and head.deadline < math.inf and not worker.killed:
                # Often: a late wake-up shows that this process was suspended.
                again = min(again, head.deadline, now + LATE_SECONDS / 10)
            free += not worker.runs and not worker.stopping
            works = works or bool(worker.runs)
        if available or works:
            self.last_work = now
        wanted = self.options.max_workers if full else available - free
        if wanted > 0 and len(self.workers) < self.options.max_workers:
            again = min(again, self._start_workers(wanted, now))
        keep = self.options.keep_alive
        if isinstance(keep, float) and self.workers:
            if self.last_work + keep <= now:
                self.retire_idle(now)
            else:
                again = min(again, self.last_work + keep)
        return again

    def _let_go(self, worker: _Worker, head: _Run, now: float) -> None:
        """The head is slow: requeue what waits behind it."""
        self._take_back(worker)
        if worker.runs and worker.runs[0] is head:  # Else the head had not begun.
            least = self.expected.get(head.row.task_type, 0.0) * (head.row.items or 1)
            self.learn(head.row, max(least, now - worker.since))
            head.cost = worker.load = 1.0

    def _lose_patience(self, worker: _Worker, now: float) -> None:
        """Kill a worker that does not end. One that still runs the file is warned of first."""
        if worker.ready or worker.stopping:
            worker.kill()
            return
        seconds = now - worker.since
        text = (
            f"the worker {worker.pid} is still running your file, or its initializer, after "
            f"{seconds:.0f} s. In your file, what is for the master alone belongs under `if "
            "Cluster.is_master():`"
        )
        if seconds < BOOT_LIMIT_SECONDS:
            worker.kill_at = worker.since + BOOT_LIMIT_SECONDS
            _log.warning("%s; it is killed after %.0f s", text, BOOT_LIMIT_SECONDS)
        else:
            worker.kill()
            self.boot_failed(now, TaskPoolError(text))

    def _look_at_exit(self, worker: _Worker, now: float) -> None:
        """Bury the worker if it ended: by its exit code, as a grandchild may keep its
        pipes open, or by the end of its channel, as somebody else may reap it."""
        code: int | None = worker.process.exitcode
        silent = now - worker.hung_up_at
        if code is None and silent < 1.0:
            if silent >= 0.05:  # It closed its pipe, but lives.
                worker.end()
            ends = silent >= 0 or worker.killed or (worker.stopping and not worker.runs)
            worker.check_at = now + (0.002 if ends else 0.5)
            return
        self._engine.hear(worker)  # The last messages of the worker.
        if code == -signal.SIGTERM and worker.runs and not self.stopping:
            # A service manager sends SIGTERM to the whole group: see if run() hears of it, too.
            worker.stopping, worker.open = True, False
            worker.told_to_end_at = min(worker.told_to_end_at, now)
            worker.check_at = worker.told_to_end_at + 0.2
            if now < worker.check_at:
                return
        self._died(worker, code, now)

    def _died(self, worker: _Worker, code: int | None, now: float) -> None:
        self.workers.remove(worker)
        self._engine.forget_worker(worker)
        self._take_back(worker)
        head = worker.runs[0] if worker.runs else None  # Only the head can have begun.
        spared = worker.killed or (code == -signal.SIGTERM and self.stopping)
        while worker.runs:
            seconds, run = now - worker.since, worker.end_head(now)
            row = run.row
            if run.verdict == "cancel":
                run.source.cancelled(run)
            elif run.verdict == "timeout":
                text = f"{row.task_type!r} task {row.id!r} ran over {row.timeout:g} s"
                run.source.fail(run, TaskTimeout(text), seconds)
            elif spared or run is not head:
                run.source.requeue(run)
            else:
                died = WorkerDied(code, worker.pid, row.task_type, row.id)
                run.source.fail(run, died, seconds)
        if not worker.ready and not worker.stopping:
            if code == 1:  # Python has printed an exception on standard error.
                why = f": standard error has what {_program()} said"
            else:
                why = f", {BOOT_TRIES} times in a row, by {_program()}"
            error = TaskPoolError(f"{WorkerDied(code, worker.pid)}{why}")
            self.boot_failed(now, error, again=code != 1)
        worker.close()

    # ---- Starts that fail

    def boot_failed(self, now: float, error: Exception | _Failure, again: bool = False) -> None:
        """A worker could not start. If there is no other one, *error* is logged once and the
        Futures that wait fail; with *again*, only after BOOT_TRIES in a row."""
        self.failed_boots += 1
        self.boot_after = now + back_off(BOOT_SECONDS, self.failed_boots, BOOT_CAP_SECONDS)
        if again and self.failed_boots < BOOT_TRIES:
            return
        text = error.traceback if isinstance(error, _Failure) else str(error)
        first_line, _, rest = text.partition("\n")
        if any(worker.runs or not worker.stopping for worker in self.workers):
            if self.failed_boots == 1:
                what = "a worker could not start; others go on, or still start: %s"
                _log.warning(what, first_line, lines=rest.rstrip())
            return
        if self.boot_error is None:
            what = "a worker could not start; stored tasks stay waiting: %s"
            _log.error(what, first_line, lines=rest.rstrip())
        self.boot_error = error
        self._engine.futures.fail_waiting(error)

    # ---- How many workers

    def _start_workers(self, wanted: int, now: float) -> float:
        """Returns when to try again."""
        for _ in range(min(wanted, self.options.max_workers - len(self.workers))):
            if self.boot_after > now:
                return self.boot_after
            starting = [worker for worker in self.workers if not worker.stopping]
            if self.failed_boots and starting and not any(worker.ready for worker in starting):
                break  # Another is starting: if that fails, too, there is none.
            try:
                self.workers.append(self._engine.start_worker())
            except Exception as error:
                # No more processes for now; or the interpreter is going down.
                what = "a worker process could not be started: %s: %s"
                _log.error(what, type(error).__name__, error)
                self.boot_failed(now, error, again=True)
                return self.boot_after
        return math.inf

    def retire_idle(self, now: float, needed: int = 0) -> None:
        """Let the workers without work leave, but for as many as are *needed*."""
        for worker in [it for it in self.workers if it.open and not it.runs][needed:]:
            worker.retire(now)

    def dismiss(self, now: float) -> None:
        """The cluster ends: those that are ready retire, the others are killed."""
        for worker in self.workers:
            if not worker.stopping:
                worker.retire(now) if worker.ready else worker.kill()

    def kill_busy(self) -> None:
        """What runs has had its time."""
        for worker in self.workers:
            if worker.runs:
                worker.kill()


class _Watch:
    """What a cluster does with its store beside running tasks: each second it sends its
    heartbeat and looks for clusters whose heartbeats stopped (P3); and it has schedules and
    limits follow the code."""

    def __init__(self, cluster: Cluster, store: Store, owner: str) -> None:
        self._cluster, self._store, self._owner = cluster, store, owner
        # As they were declared when they were last written.
        self._schedules: dict[str, Any] = {}
        self._limits: dict[str, Any] = {}
        self.last_declared: Any = None
        self._clock = _ObserverClock()  # Of the store thread.
        self.next_look = self._next_heartbeat = self._next_warning = self._next_try = 0.0
        self.heard = time.monotonic()  # When observers last heard of this cluster.
        self._strays: set[tuple[str, int]] = set()  # Claims that were unknown here.
        self.tally = new_tally()  # To be written with the next heartbeat.

    def write_counts(self) -> None:
        self._store.tally(self.tally)
        self.tally.clear()

    def follow_code(self, now: float) -> None:
        """In the store thread: what was declared until now counts for the next claim. A
        declaration that cannot be stored holds up nothing else."""
        queue, last = self._cluster.queue, self._cluster.queue._last_declared
        if now < self._next_try:
            return
        try:
            self._schedules = queue._align(self._schedules)
            self._limits = queue._write_limits(self._limits)
            self.last_declared = last
        except StoreError as error:
            self._next_try = now + RENEW_SECONDS
            _log.error("what is declared could not be stored, trying again: %s", error)

    def look(self, now: float, wall: int) -> tuple[list[Row], list[str], list[Row] | None]:
        """In the store thread: the tasks that ended with their masters; the types of which
        tasks are due that no cluster here knows; with a heartbeat, the claims of this cluster."""
        store, foreign = self._store, []
        held: list[Row] | None = None
        try:
            if self._next_heartbeat <= now:
                store.renew(self._owner, wall)
                self.write_counts()
                held = store.held_by(self._owner)
                self.heard, self._next_heartbeat = now, now + RENEW_SECONDS
            if self._next_warning <= now:
                foreign = self._foreign(wall)
                self._next_warning = now + WARN_SECONDS
            seconds = self._clock.look(time.monotonic())
            ended = store.recover(self._owner, seconds, wall)
        except BaseException:
            self._clock.miss()
            self._next_heartbeat = 0.0
            raise
        return ended, foreign, held

    def _foreign(self, wall: int) -> list[str]:
        """The types of due tasks that no cluster here knows, and how to end their schedules."""
        import shlex

        types = self._store.foreign(list(self._cluster.task_map), wall)
        ids = [SCHEDULE + name for name in types if name not in self._cluster.queue._declared]
        scheduled = {row.id for row in self._store.find(Query(ids=ids), wall)} if ids else ()
        path, texts = getattr(self._store, "path", None), []
        paused = self._store.paused() if types else ()
        for name in types:
            task_id, text = SCHEDULE + name, repr(name)
            how = f"queue.remove(task_id={task_id!r})"
            if path:
                how = f"python taskpool.py remove {shlex.quote(path)} {shlex.quote(task_id)}"
            if name in paused:
                text += " (paused)"
            elif task_id in scheduled:
                text += f" (if no program declares its schedule any more, remove that: {how})"
            texts.append(text)
        return texts

    def strays(self, held: Iterable[Row], known: Iterable[_Run]) -> list[Row]:
        """The claims of this cluster that it does not know, at two heartbeats in a row: the
        store made them, and its answer was lost."""
        claims = {(run.row.id, run.row.claim) for run in known}
        unknown = {(row.id, row.claim): row for row in held if (row.id, row.claim) not in claims}
        again, self._strays = self._strays & set(unknown), set(unknown)
        return [unknown[claim] for claim in again]


class _Source:
    """One store as the dispatcher sees it: what ended and is to be recorded there, and when to
    look for more. One call at a time: in the store thread, or at once for the memory.

    A look starts if something *changed*, if it is time (*look_at*, *next_due*), or if there is
    something to record. `changed` is cleared before a look starts: what comes in its midst
    causes another.
    """

    def __init__(self, store: Store, engine: _Dispatcher) -> None:
        self.store, self.engine = store, engine
        self.thread: _Thread | None = None  # None: the calls are made at once.
        self.watch: _Watch | None = None
        if not store.in_memory:
            self.watch = _Watch(engine.cluster, store, engine.owner)
        self.changed = True  # Something may be claimable. Any thread sets it.
        self.eager = False  # Something was added: claim at once. Any thread sets it.
        # Tasks of Futures may be gone, and runs may be cancelled. Any thread sets it.
        self.check_futures = False
        self.look_at, self.looked_at = math.inf, 0.0  # Monotonic: the next and the last one.
        self.again = 0.0  # Monotonic: when advance() is to be called though nothing changed.
        self.due: list[int] = []  # When tasks can start that the last look left.
        self.available = 0  # So many of them could start then.
        self.next_due = NEVER  # The first of the others.
        self.unsettled: list[_Run] = []  # That ended, and are to be recorded.
        self.tally = new_tally()  # How runs have ended, until pass_tally().
        self.busy = False  # A call is under way in the thread.
        # Failed calls in a row; since when; until when the next one waits; the next log line.
        self.failures, self.failing_since, self.retry_at, self.log_at = 0, 0.0, 0.0, 0.0

    def is_given_up(self, now: float) -> bool:
        """Whether a store that fails has had its time, as the cluster ends or is drained."""
        give_up_at = self.failing_since + self.engine.crew.options.shutdown_timeout
        return self.failures > 0 and give_up_at <= now < self.retry_at

    # ---- Calls

    def call_store(self, work: Callable[[], Any], answer: Callable[[Any], None]) -> None:
        """Have *work* call the store. *answer* gets the result, or the exception, after which
        the next call waits."""
        if self.thread is None:
            answer(work())
            return
        self.busy = True
        if not self.failures:
            self.failing_since = time.monotonic()  # If this call fails.

        def call() -> None:
            try:
                result: Any = work()
            except BaseException as error:
                result = error
            self.engine.post(functools.partial(end, result))

        def end(result: Any) -> None:
            self.busy, self.again = False, 0.0
            if isinstance(result, BaseException):
                now, self.failures = time.monotonic(), self.failures + 1
                self.retry_at = now + back_off(STORE_SECONDS, self.failures, STORE_CAP_SECONDS)
                if self.log_at <= now:
                    self.log_at = now + WARN_SECONDS
                    _log.error("the store failed; nothing is lost, trying again: %s", result)
            answer(result)

        self.thread.post(call)

    def advance(self, now: float) -> float:
        """Do what is to be done with the store. Returns when to come again (monotonic)."""
        mode, watch = self.engine.ending.mode, self.watch
        if self.busy or (self.failures and mode == "closing"):  # Then it has had its time.
            return math.inf
        if self.retry_at > now:
            return self.retry_at
        if watch and mode != "closing" and watch.next_look <= now:
            self._look_after_masters(watch, now)
            return math.inf
        due = self.next_due < NEVER and self.next_due <= self.engine.cluster.queue._now()
        if due or self.look_at <= now:
            self.changed, self.look_at, self.next_due = True, math.inf, NEVER
        serves = self.engine.ending.serves
        if self.unsettled or (self.changed and serves):
            self._exchange(serves)
        if self.check_futures and mode != "closing" and not self.busy:
            self._look_after_futures()
        if self.busy:
            return math.inf
        again = self.look_at
        if self.next_due < NEVER:
            seconds = (self.next_due - self.engine.cluster.queue._now()) / 1e6
            again = min(again, now + seconds)
        return min(again, watch.next_look) if watch and mode != "closing" else again

    def _exchange(self, serves: bool) -> None:
        """Settle, claim for the room that there is, and see what comes next."""
        crew, queue = self.engine.crew, self.engine.cluster.queue
        runs, self.unsettled = self.unsettled, []
        eager, self.eager = self.eager or self.available > 0, False
        claims, self.changed = serves and (self.changed or eager), False
        room, costs = crew.room() if claims else 0.0, crew.costs()
        outcomes = [run.outcome for run in runs] if runs else []
        if self.thread is not None:
            costs = dict(costs)  # The other thread sees no change.
        most = crew.options.max_workers if serves else 0
        store, owner, until = self.store, self.engine.owner, self.engine.ending.until
        watch = self.watch

        def work() -> tuple[int, Turn]:
            if serves and watch and watch.last_declared is not queue._last_declared:
                watch.follow_code(time.monotonic())
            now = int(queue.clock() * 1e6)
            before = store.followed
            turn = store.turn(owner, outcomes, costs, room, most, now, until, eager)
            is_limited = turn.limited and any(run.row.task_type in turn.limited for run in runs)
            if is_limited or store.followed != before:
                # Other clusters may have something to start, and Futures wait for what failed.
                queue._changed(store.followed[1] != before[1], stored=not store.in_memory)
            return now, turn

        self.call_store(work, functools.partial(self._on_exchange, runs, costs, room))

    def _on_exchange(
        self, runs: list[_Run], costs: Mapping[str, float], room: float, answer: Any
    ) -> None:
        if isinstance(answer, BaseException):
            # Of the reports of a run, the last one is enough: they come while the store fails.
            last = {run.row.id: run for run in runs if run.outcome.state == "running"}
            ends = [run for run in runs if run.outcome.state != "running"]
            self.unsettled[:0] = [*last.values(), *ends]
            self.changed = True
            return
        now, (led, rows, self.due, limited) = answer
        self.failures, self.looked_at = 0, time.monotonic()
        if self.log_at and (led or rows):  # Only a write proves it: a full disk can be read.
            self.log_at = 0.0
            _log.warning("the store works again")
        self.available = bisect_right(self.due, now)
        self.next_due = [*self.due, NEVER][self.available]
        if runs:
            self._settled(runs, led, now)
        if rows:
            self._hand_out(rows, {**costs, **dict.fromkeys(limited, 1.0)} if limited else costs)
        if self.available and (rows or not room) and self.engine.crew.room() > 0:
            self.changed = True  # A task that is claimed alone may leave room for others.
        if self.check_futures:
            self._look_after_futures()  # Now, as the next turn looks for tasks first.

    def _look_after_masters(self, watch: _Watch, now: float) -> None:
        def answer(result: Any) -> None:
            # Counted from now, so that a slow store has time for other calls.
            watch.next_look = time.monotonic() + WATCH_SECONDS
            if isinstance(result, BaseException):
                return
            cancelled, (ended, foreign, held) = result
            self.engine.crew.cancel_runs(cancelled)
            for row in ended:
                self._ended_elsewhere(row, TaskPoolError(row.error))
            known = [*self.unsettled, *self.engine.crew.runs()]
            for row in [] if held is None else watch.strays(held, known):
                self.requeue(_Run(self, row, 0.0))
            self.changed = True  # Tasks of a dead master may wait again.
            if foreign:
                names = ", ".join(foreign)
                _log.warning("tasks wait that this cluster has no function for: %s", names)

        find, queue = self._find_cancelled(), self.engine.cluster.queue
        self.pass_tally()
        self.call_store(lambda: (find(), watch.look(now, queue._now())), answer)

    def _look_after_futures(self) -> None:
        """End runs that were cancelled, and Futures whose tasks were removed, or ended in
        another cluster."""
        self.check_futures, futures = False, self.engine.futures
        find = self._find_cancelled()

        def answer(result: Any) -> None:
            if isinstance(result, BaseException):
                self.check_futures = True
                return
            cancelled, found = result
            self.engine.crew.cancel_runs(cancelled)
            for future, row in found:
                futures.compare(future, row)

        if futures or self.engine.crew.runs():
            self.call_store(lambda: (find(), futures.look(self.store)), answer)

    def _find_cancelled(self) -> Callable[[], list[_Run]]:
        """A function that asks the store which of the runs that are here now were cancelled."""
        here = self.engine.crew.runs()
        runs = {(run.row.id, run.row.claim): run for run in here if run.source is self}

        def find() -> list[_Run]:
            ids = [task_id for task_id, _ in runs]
            claims = self.store.cancelled(self.engine.owner, ids) if ids else ()
            return [runs[claim] for claim in claims if claim in runs]

        return find

    def give_up(self) -> None:
        """The cluster ends: if the store did not come back, say what is lost by that."""
        what, futures = "the store did not come back", self.engine.futures
        if self.unsettled:
            lost = _counted(len(self.unsettled), "outcome is", "outcomes are")
            _log.error("%s: %s lost; what had run starts again", what, lost)
        for run in self.unsettled:
            for future in futures.of(run.row):
                futures.end(future, _FINISHED, StoreError(f"{what}: the outcome is lost"))
        waiting = sum(not (isinstance(f._row, MemoryRow) or f._held) for f in futures.all())
        if waiting and self.failures:
            stay = _counted(waiting, "submitted task stays", "submitted tasks stay")
            _log.error("%s: %s waiting", what, stay)

    def pass_tally(self) -> None:
        """Have what was counted here added to the totals in the store, sooner or later."""
        tally, self.tally = self.tally, new_tally()
        if self.watch is None:
            self.store.tally(tally)
            return
        for name, counts in tally.items():
            self.watch.tally[name].update(counts)

    def leave(self) -> None:
        now = int(time.time() * 1e6)
        with contextlib.suppress(Exception):  # The dispatcher may have failed by this one.
            now = self.engine.cluster.queue._now()
        # leave() opens a store again that the program has closed.
        with contextlib.suppress(StoreError), contextlib.closing(self.store):
            self.store.leave(self.engine.owner, now)
            self.pass_tally()
            cast(_Watch, self.watch).write_counts()

    # ---- Claims and their ends

    def _hand_out(self, rows: list[Row], costs: Mapping[str, float]) -> None:
        """Have the workers run what was claimed."""
        runs = []
        for row in rows:
            if row.state == "running":
                runs.append(_Run(self, row, cost_of(row, costs)))
            else:  # The store has set it aside.
                self._ended_elsewhere(row, not_started(row))
        self.engine.futures.claimed(rows)
        if self.engine.ending.serves:
            self.engine.crew.place(runs, time.monotonic())
        else:
            for run in runs:
                self.requeue(run)

    def record(
        self, run: _Run, outcome: Outcome, event: str | None = None, left: _Left = _NONE
    ) -> None:
        """Have the store record how a run ended; who waits for it is told after that."""
        if run.verdict == "cancel" and (outcome.state == "ready" or run.row.repeat is not None):
            # It came to its end first, which counts for nothing.
            outcome, event = outcome._replace(state="removed", seconds=None), None
        run.outcome, run.event, run.left = outcome, event, left
        self.unsettled.append(run)

    def requeue(self, run: _Run) -> None:
        """running -> waiting, uncharged, for what has not begun, or must stop."""
        self.record(run, Outcome(run.row.id, run.row.claim, "ready", charged=False))

    def cancelled(self, run: _Run) -> None:
        if self.engine.crew.logs_runs:
            _log.info("cluster:%s:%s:\tcancelled", run.row.task_type, run.row.id)
        self.record(run, Outcome(run.row.id, run.row.claim, "removed"))

    def fail(
        self, run: _Run, error: Exception | _Failure, seconds: float, text: str = "",
        plan: Plan = _ORDINARY,
    ) -> None:  # fmt: skip
        """A start has failed after so many seconds: retry it, or fail it for good."""
        row, now = run.row, self.engine.cluster.queue._now()
        text = text or f"{type(error).__name__}: {error}"
        first_line, _, rest = text.partition("\n")
        outcome = retry_or_fail(row, text, now, plan)._replace(seconds=seconds)
        delay = (outcome.ready_at - now) / 1e6
        if not outcome.charged:
            if self.engine.crew.logs_runs:
                what = "cluster:%s:%s:\tnot now, next in %g s: %s"
                _log.info(what, row.task_type, row.id, delay, first_line)
            self.record(run, outcome)
            return
        if outcome.state == "ready":
            what = f"attempt {row.attempt} of {row.retries + 1} failed, next in {delay:g} s"
            _log.warning("cluster:%s:%s:\t%s: %s", row.task_type, row.id, what, first_line)
        else:
            what = "cluster:%s:%s:\tfailed: %s"
            _log.error(what, row.task_type, row.id, first_line, lines=rest.strip())
        self.record(run, outcome, "error", error)

    def _settled(self, runs: list[_Run], led: list[str], now: int) -> None:
        """The store has recorded *now* how these ended, if their claims were still held."""
        engine, listeners = self.engine, self.engine.cluster.queue._listeners
        settled, failed = engine.futures.settled, list[str]()
        for run, became in zip(runs, led):
            if became == "running":
                continue
            if became:
                count_run(self.tally, run.row.task_type, run.outcome, became)
            else:
                text = "cluster:%s:%s:\tits claim was lost; this outcome is discarded"
                _log.warning(text, run.row.task_type, run.row.id)
            if became == "failed":
                failed.append(run.row.id)
            settled(run, became)
            if listeners and became and run.event in listeners:
                task = Task(as_told(run.row, became, run.outcome, now))
                engine.tell(listeners[run.event], run.left, task)
        if failed:
            warn = functools.partial(_warn_followers, self.store, failed)
            self.thread.post(warn) if self.thread else warn()

    def _ended_elsewhere(self, row: Row, error: TaskPoolError) -> None:
        """Tell of the end of a task that this cluster did not run."""
        _log.error("cluster:%s:%s:\tfailed: %s", row.task_type, row.id, error)
        run = _Run(self, row, 1.0)
        outcome = Outcome(row.id, row.claim, row.state, error=row.error)
        run.outcome, run.event, run.left = outcome, "error", error
        self._settled([run], ["failed" if row.state == "failed" else "repeats"], 0)


class _Ending:
    """How far the end of a cluster is: running -> finishing | stopping -> closing -> closed.

    While finishing, what was due when it began still starts. While stopping, nothing does, and
    what runs is requeued after its time. While closing, only the workers are still to end.
    """

    def __init__(self, engine: _Dispatcher) -> None:
        self._engine = engine
        self.mode, self.serves = "running", True  # It serves while tasks are started.
        self.until = NEVER  # The due date up to which tasks are started.
        self._stop_at = math.inf  # Monotonic: when running tasks are requeued.
        self._stuck_since = math.inf  # Since then all that runs waits for the broker.

    def excuse(self, late: float) -> None:
        self._stop_at += late
        self._stuck_since += late

    def finish(self, until: int, interrupted: bool) -> None:
        if self.mode != "running":
            return
        runs, sources = len(self._engine.crew.runs()), self._engine.sources
        options = self._engine.crew.options
        has_more = runs or any(source.due or source.changed for source in sources)
        if has_more and (interrupted or options.log_all):
            # A user who pressed Ctrl-C inside `with` must see what the end waits for.
            (_log.warning if interrupted else _log.info)(
                "shutting down: %s, and what is due by now is still done; "
                "Ctrl-C (again) starts nothing more and gives running tasks %.1f s",
                *(_counted(runs, "task runs", "tasks run"), options.shutdown_timeout),
            )
        self.mode, self.until = "finishing", until
        for source in sources:  # A store that fails is given time from now on.
            source.changed, source.failing_since = True, time.monotonic()

    def stop(self, at: float) -> None:
        if self.mode in ("running", "finishing"):
            self.mode, self.serves, self._engine.crew.stopping = "stopping", False, True
            for source in self._engine.sources:
                source.failing_since = time.monotonic()
            if self._engine.crew.options.log_all:
                _log.info("stopping: running tasks get %.1f s", max(0.0, at - time.monotonic()))
        self._stop_at = min(self._stop_at, at)

    def advance(self, now: float) -> float:
        """Take the next step, if it is time. Returns when to come again."""
        engine, again = self._engine, math.inf
        works = False
        for worker in engine.crew.workers:
            works = works or bool(worker.runs)
        busy = works
        for source in engine.sources:
            if source.failures:
                give_up_at = source.failing_since + engine.crew.options.shutdown_timeout
                again = give_up_at if give_up_at > now else again
            if source.busy or (source.unsettled and (works or not source.is_given_up(now))):
                busy = True
        if busy is engine.idle.is_set():
            engine.idle.clear() if busy else engine.idle.set()
        if self.mode == "finishing":
            again = min(again, self._end_stuck_conversations(now))
            if not busy and not any(self._has_work(source, now) for source in engine.sources):
                self.mode = "closing"
        elif self.mode == "stopping":
            if self._stop_at <= now:
                engine.crew.kill_busy()
            again = min(again, self._stop_at) if self._stop_at > now else again
            if not busy:
                self.mode = "closing"
        if self.mode == "closing":
            self.serves = False
            engine.crew.dismiss(now)
            if not (engine.crew.workers or any(source.busy for source in engine.sources)):
                self.mode = "closed"
            again = min((worker.check_at for worker in engine.crew.workers), default=again)
        return again

    def _has_work(self, source: _Source, now: float) -> bool:
        """Whether tasks that were due when finishing began may be waiting there."""
        crew = self._engine.crew
        can_run = crew.boot_error is None or any(worker.open for worker in crew.workers)
        return not source.is_given_up(now) and (source.changed or (bool(source.due) and can_run))

    def _end_stuck_conversations(self, now: float) -> float:
        """While finishing, an answer that does not come ends after shutdown_timeout."""
        runs = self._engine.crew.runs()
        if not runs or not all(run.asks for run in runs):
            self._stuck_since = math.inf
            return math.inf
        self._stuck_since = min(self._stuck_since, now)
        ends_at = self._stuck_since + self._engine.crew.options.shutdown_timeout
        if ends_at > now:
            return ends_at
        error = _failure(RuntimeError("the cluster was shut down before the broker answered"))
        for run in runs:
            for answer in list((run.asks or {}).values()):
                answer(False, error)
        return math.inf


_worker_numbers = itertools.count(1)


class _Dispatcher:
    """The engine of a Cluster: one thread that decides, and never blocks but in its own wait.

    All of it belongs to that thread, but for what says otherwise.
    """

    def __init__(self, cluster: Cluster) -> None:
        """Registered, not started."""
        self.cluster, self.owner = cluster, ""
        self.wake: _WakeUp | None = None
        self.inbox: collections.deque[Callable[[], Any]] = collections.deque()  # Any thread.
        self.futures = _Futures(cluster.queue, self.is_at_work)  # Any thread.
        self.crew = _Crew(cluster._options, cluster.task_map, self)
        self.sources: list[_Source] = []  # In memory, then persistent. (P5)
        self.ending = _Ending(self)
        # For Futures, their callbacks, the listeners, the broker, and the store.
        self.threads: list[_Thread] = []
        self.thread: threading.Thread | None = None
        self.closed, self.idle = threading.Event(), threading.Event()  # Idle: for drain().
        self.idle.set()
        self.hungry = True  # New tasks could start at once: adding them ends the wait.
        self.alarm = math.inf  # Monotonic: when the wait ends at the latest.
        self.next_refresh, self.next_report = 0.0, math.inf  # Monotonic.

    # ---- Any thread

    def post(self, call: Callable[[], Any]) -> None:
        """Have the dispatcher make a call."""
        self.inbox.append(call)
        wake = self.wake  # Read once: the cluster may be closing.
        if wake is not None:
            wake.set()

    def queue_changed(self, removed: bool, stored: bool) -> None:
        """Something was added to the queue, removed or changed."""
        for source in self.sources[stored : stored + 1]:
            source.eager = source.changed = True
            if removed:
                source.check_futures = True
        # First `changed`, then `hungry`; the dispatcher sets `hungry` and then reads `changed`.
        wake = self.wake
        if wake is not None and (removed or self.hungry):
            wake.set()

    def is_at_work(self) -> bool:
        """Whether this is the dispatcher or the store thread, where a finalizer may run."""
        current, store = threading.current_thread(), self.threads[_STORE:]
        return current is self.thread or (store != [] and store[0].thread is current)

    def begin_stop(self, seconds: float) -> None:
        self.post(lambda: self.ending.stop(time.monotonic() + seconds))

    def take_name(self) -> _WakeUp:
        """Have an `owner`, which says where to ring."""
        if self.wake is None:
            queue, self.wake = self.cluster.queue, _WakeUp()
            self.owner = _new_owner(self.wake.port)
            self.sources = [_Source(queue.in_memory._memory, self)]
            if not self.crew.options.in_memory_only:
                self.sources.append(_Source(queue._store, self))
        return self.wake

    def start(self) -> None:
        """Start all threads; or none, if that raises."""
        queue, wake = self.cluster.queue, self.take_name()
        with contextlib.ExitStack() as undo:
            undo.callback(self.threads.clear)
            names = ["futures", "callbacks", "listener", "broker", "store"]
            for name in names[: 3 + len(self.sources)]:
                self.threads.append(_Thread(name))
                undo.callback(self.threads[-1].stop)
            self.selector = selectors.DefaultSelector()
            _master_ends.add(self.selector)
            undo.callback(_disown, self.selector)
            self.selector.register(wake.reader, selectors.EVENT_READ, wake.clear)
            for source in self.sources[1:]:
                source.thread = self.threads[_STORE]
                if wake.port:
                    self.selector.register(wake.bell, selectors.EVENT_READ, self._on_bell)
                if self.crew.options.log_all:
                    _log.info("cluster:\tworks on %r", source.store)
            undo.callback(setattr, self, "thread", None)
            undo.callback(self.cluster._unregister)
            queue._watchers += (self,)
            self.thread = threading.Thread(
                target=self._work, name="taskpool-dispatcher", daemon=True
            )  # From here on, other threads do not wait for the start.
            self.thread.start()
            undo.pop_all()  # The thread runs.

    # ---- The loop

    def _work(self) -> None:
        """The body of the thread."""
        self.futures.threads = self.threads[:2]
        if hasattr(signal, "pthread_sigmask"):
            # Workers are born with SIGINT blocked, so that Ctrl-C cannot kill them before
            # they ignore it. The tracker first: starting it may unblock SIGINT here.
            with contextlib.suppress(Exception):
                from multiprocessing import resource_tracker

                resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            while self.ending.mode != "closed":
                self.turn()
        except BaseException as error:
            _log.exception("the dispatcher failed; its tasks start again in another cluster")
            self.futures.failure = TaskPoolError(f"the dispatcher failed: {error!r}")
            self.futures.end_all()
        finally:
            try:
                self._close()
            finally:
                self.cluster._unregister()
                self.idle.set()
                self.closed.set()

    def turn(self) -> None:
        """One pass of the loop: look, decide, hand out; then wait, and hear what came."""
        now, crew, available = time.monotonic(), self.crew, 0
        if now - self.alarm >= LATE_SECONDS:
            self._excuse(now - self.alarm)
        crew.logs_runs = crew.options.log_all and _log.isEnabledFor(logging.INFO)
        while self.inbox:
            self.inbox.popleft()()
        if self.next_refresh <= now:
            self.refresh()
        if self.next_report <= now:
            self._store_reports()
        alarm = min(self.next_refresh, self.next_report)
        freed, crew.freed = crew.freed, False
        for source in self.sources:
            if freed and (source.available or source.busy):
                source.changed = True  # A look that is under way has seen no room.
            if source.changed or source.unsettled or source.check_futures or source.again <= now:
                source.again = source.advance(now)
            alarm = min(alarm, source.again)
            available += source.available
        serves, full = self.ending.serves, crew.options.keep_alive == "always"
        ticks = crew.tick(now, serves and available, full and self.ending.mode == "running")
        self.alarm = max(min(alarm, ticks, self.ending.advance(now)), now)
        if self.ending.mode != "closed":
            self._wait(now)

    def _excuse(self, late: float) -> None:
        """Move all deadlines by *late* seconds, in which this process was perhaps stopped."""
        self.crew.excuse(late)
        self.ending.excuse(late)
        for source in self.sources:
            source.failing_since += late

    def _wait(self, now: float) -> None:
        """The only wait: for workers, other threads, or the alarm. Then hear what came."""
        # When all workers have work, a turn follows soon anyhow: new tasks need not end
        # the wait, and add up meanwhile.
        hungry = len(self.crew.workers) < self.crew.options.max_workers
        for worker in self.crew.workers:
            hungry = hungry or not worker.runs
            if bool(worker.channel.unsent) != worker.watched:
                self._watch_outgoing(worker)
        self.hungry = hungry
        timeout = min(max(0.0, self.alarm - time.monotonic()), WAIT_SECONDS)
        if self.inbox or self.crew.freed:
            timeout = 0.0
        elif hungry and self.ending.serves:
            for source in self.sources:
                if source.changed and not source.busy and source.retry_at <= now:
                    timeout = 0.0
        for key, events in self.selector.select(timeout):
            worker = key.data
            if not isinstance(worker, _Worker):
                worker()
                continue
            if events & selectors.EVENT_WRITE:
                worker.channel.flush()
            if events & selectors.EVENT_READ:
                self.hear(worker)
        if not _SELECTABLE:
            for worker in self.crew.workers:
                self.hear(worker)

    def refresh(self) -> None:
        """Look for what no event announced."""
        now = time.monotonic()
        self.next_refresh = now + self.cluster._refresh
        cast(_WakeUp, self.wake).clear()  # A Ctrl-C may have kept its byte back.
        wall = self.cluster.queue._now()
        self.sources[0].store.renew(self.owner, wall)
        self.sources[0].pass_tally()
        for source in self.sources:
            if source.looked_at + self.cluster._refresh <= now or not source.watch:
                source.changed = True
            source.check_futures = source.check_futures or self.idle.is_set()
            if source.watch and source.watch.heard + LEASE_SECONDS <= now:
                self.futures.opened = wall
        closes = self.crew.options.keep_alive is None and self.ending.mode == "running"
        if closes and not any(source.busy for source in self.sources):
            soon = wall + int(SOON_SECONDS * 1e6)
            due = itertools.chain.from_iterable(source.due for source in self.sources)
            self.crew.retire_idle(now, sum(instant <= soon for instant in due))

    def _on_bell(self) -> None:
        """Another process has added or cancelled a task. It does not ring for each that it adds:
        look again soon."""
        self.queue_changed(cast(_WakeUp, self.wake).clear_bell(), stored=True)
        self.sources[1].look_at = time.monotonic() + 2 * KNOCK_SECONDS

    # ---- Workers

    def start_worker(self) -> _Worker:
        boot, wake = _boot_now(self.cluster._boot), cast(_WakeUp, self.wake)
        worker = _Worker(self.crew.options, next(_worker_numbers), boot, wake)
        if _SELECTABLE:
            self.selector.register(worker.channel, selectors.EVENT_READ, worker)
        return worker

    def _watch_outgoing(self, worker: _Worker) -> None:
        """Begin or cease to wait until the worker reads."""
        worker.watched = not worker.watched
        if worker.watched:
            self.selector.register(worker.channel.outgoing, selectors.EVENT_WRITE, worker)
        else:
            self.selector.unregister(worker.channel.outgoing)

    def forget_worker(self, worker: _Worker) -> None:
        if _SELECTABLE and worker.hung_up_at == math.inf:
            self.selector.unregister(worker.channel)
        if worker.watched:
            self._watch_outgoing(worker)

    def hear(self, worker: _Worker) -> None:
        """Take in what a worker has sent. One that sends nonsense is killed."""
        if worker.hung_up_at < math.inf:
            return
        now = time.monotonic()
        try:
            for packed in worker.channel.receive():
                self._on_message(worker, now, _read_message(packed))
        except _Nonsense as error:
            what = "worker process %d is killed: its pipe brought what no worker sends (%s)"
            _log.warning(what, worker.pid, error)
            worker.end()
            worker.channel.ended = True
        if worker.channel.ended:
            worker.hung_up_at, worker.open, worker.check_at = now, False, 0.0
            if _SELECTABLE:
                self.selector.unregister(worker.channel)

    def _on_message(self, worker: _Worker, now: float, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind in _OF_ITS_HEAD and not (worker.runs and worker.runs[0].number == message[1]):
            raise _Nonsense(f"{kind!r} of a task that it does not run")
        if kind == "done":
            self._on_done(worker, now, message)
        elif kind == "fail":
            _, _, seconds, failure, plan = message
            run = self.crew.ended(worker, seconds, now)
            run.source.fail(run, failure, seconds, _error_text(failure), plan)
        elif kind == "lacks":
            self.crew.lacks(worker, message[2], now)
        elif kind == "start":
            run = worker.runs[0]
            if run.row.timeout is not None:
                run.deadline = time.monotonic() + run.row.timeout
        elif kind == "ask":
            self._on_ask(worker, *message[1:])
        elif kind == "progress":
            self._on_progress(worker, now, message[2])
        elif kind == "changed":
            self.sources[-1].changed = True
        elif worker.ready:
            raise _Nonsense(f"a second {kind!r}")
        elif kind == "ready":
            self.crew.got_ready(worker, now)
        elif kind == "boot error":
            worker.stopping, worker.kill_at = True, math.inf  # Its exit is no second failure.
            self.crew.boot_failed(now, message[1])

    def _on_done(self, worker: _Worker, now: float, message: tuple[Any, ...]) -> None:
        _, _, seconds, packed, kept, problem, opened = message
        run = self.crew.ended(worker, seconds, now)
        row = run.row
        if self.crew.logs_runs:
            ms = round(seconds * 1000)
            _log.info("cluster:%s:%s:\tdone in %d ms", row.task_type, row.id, ms)
        if opened:
            text = "cluster:%s:%s:\tended with %s; return toggle_ipc's Future"
            _log.warning(text, row.task_type, row.id, _counted(opened, "open conversation"))
        end = row.id, row.claim, "done", True, 0, kept, problem, row.progress, seconds
        run.source.record(run, tuple.__new__(Outcome, end), "done", packed)  # As Outcome(*end).

    def _on_progress(self, worker: _Worker, now: float, report: str) -> None:
        run = worker.runs[0]
        run.row = run.row._replace(progress=report)
        worker.reported = True
        self.next_report = min(self.next_report, now + REPORT_STORE_SECONDS)
        listener = self.cluster.queue._listeners.get("progress")
        if listener is not None:
            task = Task(run.row)
            self.tell(listener, _dumps(task.progress), task)

    def _store_reports(self) -> None:
        """Have the stores record what running tasks reported, once a second."""
        self.next_report = math.inf
        for worker in self.crew.workers:
            if worker.runs and worker.reported:
                source, row = worker.runs[0].source, worker.runs[0].row
                report = Outcome(row.id, row.claim, "running", progress=row.progress)
                source.record(_Run(source, row, 0.0), report)
            worker.reported = False

    def tell(self, listener: Listener, left: _Left, task: Task) -> None:
        """Have the listener thread call *listener* with what a task has left."""

        def call() -> None:
            result, error = _unpacked(left)
            _awaited(listener(result if error is None else error, task))

        self.threads[_LISTENER].post(call)

    def _on_ask(self, worker: _Worker, number: int, conversation: int, packed: bytes) -> None:
        """A task opens a conversation with the broker."""
        run = next((run for run in worker.runs if run.number == number), None)
        if run is None:
            return

        def answer(ok: bool, value: Any) -> None:
            message = _dumps(("answer", conversation, ok, value))
            self.post(lambda: pass_on(message))

        def pass_on(message: bytes) -> None:
            if run in worker.runs and run.asks and run.asks.pop(conversation, None):
                worker.channel.send(message)

        run.asks = run.asks or {}
        run.asks[conversation] = answer
        about = {"worker": worker.pid, "task_id": run.row.id, "task_type": run.row.task_type}
        broker = self.crew.options.broker
        self.threads[_BROKER].post(functools.partial(_consult, broker, packed, about, answer))

    def cancel(self, task_id: str, answer: Callable[[_Run | None], None], *places: bool) -> None:
        """Cluster.cancel() of a task that was not waiting in a store."""
        for source in self.sources[1:]:
            if source.busy:  # The claim may be on its way.
                later = functools.partial(self.cancel, task_id, answer, *places)
                self.threads[_STORE].post(functools.partial(self.post, later))
                return
        answer(self.crew.cancel(task_id, *places))

    # ---- The end

    def _close(self) -> None:
        """The dispatcher's last act."""
        self.ending.mode = "closed"  # Futures made from here on are cancelled by submit().
        for source in self.sources:
            source.give_up()
        for worker in self.crew.workers:
            worker.kill()
            worker.close()
        self.crew.workers.clear()
        self.sources[0].pass_tally()
        for source in self.sources[1:]:
            self.threads[_STORE].post(source.leave)
            # A store that has just failed was waited for already.
            self.threads[_STORE].flush(0.0 if source.failures else BUSY_SECONDS)
            self.threads[_STORE].stop()
        types = list(self.cluster.task_map)
        left = self.sources[0].store.count(Query(types=types, states=["waiting"]), 0)
        if left:
            end = _counted(left, "in-memory task ends", "in-memory tasks end")
            _log.warning("%s here, not done before the shutdown", end)
        self.futures.end_all()
        self.threads[_FUTURES].post(self.threads[_CALLBACKS].stop)  # After its own calls.
        for kind in (_FUTURES, _LISTENER, _BROKER):
            self.threads[kind].stop()
        _disown(self.selector)
        wake, self.wake = self.wake, None
        cast(_WakeUp, wake).close()


def _checked_initargs(initializer: Any, initargs: Any, start_method: str) -> _Arguments | None:
    """How the initargs come to a worker; None without an initializer."""
    if not isinstance(initargs, (tuple, list)):
        raise _wrong_type("initargs", initargs, "a tuple")
    if initializer is None:
        return None
    allowed, packed = "None or a function that takes the initargs", None
    _check_takes("initializer", initializer, initargs, allowed)
    try:
        packed = None if start_method == "fork" else _dumps(tuple(initargs))
    except RuntimeError:
        pass  # As of a Lock of multiprocessing.
    except Exception as error:
        raise _wrong_type("initargs", initargs, f"what can be pickled ({error})") from None
    return _Arguments(tuple(initargs), packed)


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


_warned_all_cpus = False


def _allowed_workers(wanted: Any, oversubscribe: bool) -> int:
    """max_available_workers, clamped, with the warnings of the original."""
    global _warned_all_cpus
    cpus = _usable_cpus()
    if wanted is None:
        wanted = cpus
    elif type(wanted) is not int:
        raise _wrong_type("max_available_workers", wanted, "an int or None")
    allowed: int = max(1, wanted if oversubscribe else min(wanted, cpus))
    if not _is_master():
        return allowed
    if wanted < 1:
        _log.warning("max_available_workers is %d; using 1", wanted)
    elif wanted > allowed:
        text = "max_available_workers is %d, more than the %s; using %d (see oversubscribe)"
        _log.warning(text, wanted, _counted(cpus, "CPU"), cpus)
    if allowed == cpus and not _warned_all_cpus:
        _warned_all_cpus = True
        text = "all CPUs are used by workers (%d); leave some for the master and the system"
        _log.warning(text, cpus)
    return allowed


@contextlib.contextmanager
def _signals(act: Callable[[], None]) -> Iterator[None]:
    """Have SIGINT and SIGTERM call *act*: in the main thread, for elsewhere they cannot.
    Not those that are ignored, as SIGINT is in `script &` of a shell script."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A handler may interrupt anything: *act* takes no lock, does no I/O but one byte.
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    previous = {number: signal.signal(number, lambda *_: act()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


_running: set[Cluster] = set()


def _throw(error: Exception) -> None:
    raise error


def _at_exit() -> None:
    """The end of the main script: what leaving `with` does, for clusters still running."""
    for cluster in list(_running):
        engine = cluster._engine
        if engine.thread:  # Not those of the parent, in a fork.
            try:
                cluster.shutdown()
            except KeyboardInterrupt:
                patience = min(cluster._options.shutdown_timeout, WAIT_SECONDS) + EXIT_SECONDS
                try:
                    engine.closed.wait(patience)
                except KeyboardInterrupt:  # The second one: at once.
                    engine.begin_stop(0.0)
                    engine.closed.wait(EXIT_SECONDS)
            except Exception as error:  # Its dispatcher has failed, or the queue's clock.
                engine.post(functools.partial(_throw, error))  # The dispatcher tells of it.
                engine.closed.wait(BUSY_SECONDS)


def _checked_type(cluster: Cluster, task_type: Any, options: Any) -> str:
    """The name of the task type; adds to *options* what this cluster demands."""
    if cluster._options.in_memory_only:
        options.setdefault("in_memory", True)
        if options["in_memory"] is False:
            raise _wrong_value("in_memory", False, "True, as this cluster is in_memory_only")
    if type(task_type) is not str or not task_type:
        task_type = cluster.queue._name_of(task_type)
    if task_type not in cluster.task_map:
        known = ", ".join(map(repr, cluster.task_map)) or "none so far"
        raise _wrong_value("task_type", task_type, f"one of this cluster's: {known}")
    if options.get("connection") is not None:
        raise TypeError("submit() takes no connection; use add_task, and queue.wait for the end")
    return cast(str, task_type)


def _mapped(
    cluster: Cluster, task_type: Any, data: Any, timeout: Any, chunksize: Any, buffersize: Any,
    options: Any,
) -> Iterator[Any]:  # fmt: skip
    """Cluster.map, which has checked nothing."""
    seconds = None if timeout is None else _checked_seconds("timeout", timeout, zero=True)
    deadline = None if seconds is None else time.monotonic() + seconds
    _checked_int("chunksize", chunksize, 1)
    if buffersize is not None:
        _checked_int("buffersize", buffersize, 1)
    known = MapOptions.__optional_keys__
    for unknown in options.keys() - known:
        raise TypeError(f"map() takes no {unknown!r}; give {', '.join(sorted(known))}")
    task_type = _checked_type(cluster, task_type, options)
    row, _ = cluster.queue._addition(0, task_type, _Chunk(), options, cluster._styles)
    try:
        given = iter(data)
    except TypeError:
        raise _wrong_type("data", data, "an iterable") from None
    size, engine = chunksize if isinstance(row, MemoryRow) else 1, cluster._engine
    chunks = iter(lambda: _Chunk(itertools.islice(given, size)), [])
    each = chunks if size > 1 else given
    submitted = (cluster.submit(task_type, one, **options) for one in each)
    futures: collections.deque[TaskFuture] = collections.deque()

    def in_order() -> Iterator[Any]:
        try:
            futures.extend(itertools.islice(submitted, buffersize))
            yield None
            while futures:
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                result = futures[0].result(left)
                results = result if size > 1 else [result]
                del futures[0], result
                futures.extend(itertools.islice(submitted, buffersize and 1))
                results.reverse()
                while results:
                    yield results.pop()  # Nothing here keeps it.
        finally:
            if futures:  # Nobody waits for these. Perhaps in a finalizer, in any thread.
                engine.post(lambda: engine.futures.drop(futures))

    iterator = in_order()
    next(iterator)  # It submits the first ones. From here on its `finally` is sure to run.
    return iterator


class Cluster(concurrent.futures.Executor):
    """Runs the tasks of a queue in worker processes. Also an Executor over task types.

    *task_map* is {task_type: function}; each is called as function(job) or function(job,
    toggle_ipc), is plain, `async def`, or returns a Future; `data` fills its keyword-only
    parameters. None: what *queue* has declared, and declares later. *queue*: default
    TaskQueue("taskpool.db").

    initializer, initargs   initializer(*initargs) is called in each worker before its first
                            task. If it raises, that worker cannot start.
    max_available_workers   default: max_workers(), the usable CPUs. More is lowered to
                            that unless *oversubscribe*; below 1 becomes 1; with warnings.
    refresh_rate            milliseconds between looks for what no event announced.
    in_memory_only          never touch the persistent store.
    message_broker          broker(respond, message): answers `toggle_ipc` (README).
    logs                    "all" or "error"; the logger is "taskpool".
    keep_alive              None: a worker without work is closed at the next refresh, unless
                            a task can start within 2 seconds; a number of milliseconds
                            without an available task after which it is; "always": all
                            workers start now and are kept.
    auto_initialize         False: nothing starts until initialize() or run().
    start_method            "spawn", "forkserver" or "fork".
    max_tasks_per_worker    a worker is replaced after this many tasks. None: never.
    shutdown_timeout        seconds that running tasks get when the cluster must stop.

    While a worker process runs your file again, making a Cluster only registers its
    task map there; so a module-level Cluster and `if Cluster.is_master():` need no other
    guard. Raises TypeError and ValueError for wrong arguments.
    """

    def __init__(
        self,
        task_map: Mapping[str, TaskFunction] | None = None,
        queue: TaskQueue | None = None,
        *,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        max_available_workers: int | None = None,
        refresh_rate: int | timedelta = 1000,
        in_memory_only: bool = False,
        message_broker: Broker | None = None,
        logs: Literal["all", "error"] = "all",
        keep_alive: int | timedelta | Literal["always"] | None = None,
        auto_initialize: bool = True,
        start_method: Literal["spawn", "forkserver", "fork"] = "spawn",
        max_tasks_per_worker: int | None = None,
        oversubscribe: bool = False,
        shutdown_timeout: float | timedelta = 10.0,
    ) -> None:
        if queue is not None and not isinstance(queue, TaskQueue):
            raise _wrong_type("queue", queue, "a TaskQueue or None")
        self._takes_declared = task_map is None and queue is not None
        functions, styles = ({}, {}) if self._takes_declared else _checked_task_map(task_map)
        _check_broker(message_broker)
        self.queue = TaskQueue() if queue is None else queue
        self.queue._know(styles)
        self._styles = self.queue._own_styles if self._takes_declared else styles
        self.task_map = self.queue.task_map if self._takes_declared else functions
        _checked_bool("oversubscribe", oversubscribe)
        self._refresh = _checked_milliseconds("refresh_rate", refresh_rate)
        if max_tasks_per_worker is not None:
            _checked_int("max_tasks_per_worker", max_tasks_per_worker, 1)
        methods = multiprocessing.get_all_start_methods()
        self._options = _Options(
            max_workers=_allowed_workers(max_available_workers, oversubscribe),
            in_memory_only=_checked_bool("in_memory_only", in_memory_only),
            broker=message_broker,
            log_all=_checked_choice("logs", logs, ("all", "error")) == "all",
            keep_alive=_checked_keep_alive(keep_alive),
            auto_initialize=_checked_bool("auto_initialize", auto_initialize),
            start_method=_checked_choice("start_method", start_method, methods),
            max_tasks=max_tasks_per_worker,
            shutdown_timeout=_checked_seconds("shutdown_timeout", shutdown_timeout, zero=True),
            initializer=initializer,
            initargs=_checked_initargs(initializer, initargs, start_method),
        )
        frame = sys._getframe(1)
        self._key = _register("Cluster", self, frame)
        self._home = frame.f_globals
        self._boot = _boot_of(self, frame.f_code)
        self._learn_types()
        self._reset_after_fork()
        _reset_in_forks[id(self)] = self
        if auto_initialize:
            self.initialize()

    def _reset_after_fork(self) -> None:
        """Registered, not started: also what a forked child finds."""
        self.queue._unwatch(self)  # A forked child has to wake its parent's cluster by the bell.
        self._start_lock = threading.Lock()
        self._engine = _Dispatcher(self)

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
        self._raise_failure()
        with self._start_lock:
            if not self._engine.thread:
                self._learn_types()
                self._engine.start()
                _running.add(self)
                atexit.unregister(_at_exit)  # It runs once.
                atexit.register(_at_exit)

    def _learn_types(self) -> None:
        """The queue may have declared more since the last time. Raises ValueError."""
        count = self.queue._check_declared(self._options.in_memory_only)
        self._boot = _with_functions(self._boot, self)
        if len(self.queue._declared) > count:  # By another thread, which may be done.
            self._learn_types()

    def _unregister(self) -> None:
        self.queue._unwatch(self)
        _running.discard(self)

    def set_refresh_rate(self, refresh_rate: int | timedelta) -> None:
        """Change `refresh_rate` (milliseconds). Does nothing in a worker."""
        self._refresh = _checked_milliseconds("refresh_rate", refresh_rate)
        if _is_master():
            self._engine.post(self._engine.refresh)

    def submit(  # type: ignore[override]
        self, task_type: str | TaskFunction, data: Any = None, **options: Unpack[SubmitOptions]
    ) -> TaskFuture:
        """Add a task and return its Future; *options* are those of add_task.

        Only this cluster runs it, while it lives. The Future resolves at the final end,
        after retries (of the first run, if it repeats): with the result, the task's own
        exception (or a RemoteError that tells of it), WorkerDied or TaskTimeout.
        `future.task` is the Task; `future.cancel()` removes it if it waits. In an
        `in_memory_only` cluster the default is in_memory=True. Raises what add_task raises,
        and RuntimeError after shutdown().
        """
        engine, futures = self._engine, self._engine.futures
        if not engine.thread:
            self._use("submit")
            if self._options.auto_initialize:
                self.initialize()  # A fork starts a cluster of its own.
            elif engine.ending.mode == "running":
                with self._start_lock:
                    engine.take_name()  # So that no other cluster runs the task.
        if engine.ending.mode != "running":
            self._raise_failure()
            raise RuntimeError("cannot submit after shutdown")
        task_type = _checked_type(self, task_type, options)
        style = self._styles[task_type]
        if style is not _PLAIN:
            data = style.submitted(data)
        now, owner = self.queue._now(), engine.owner
        row, if_exists = self.queue._addition(now, task_type, data, options, self._styles, owner)
        future, replacements = TaskFuture(futures, row), futures.replacements
        try:
            futures.add(future)  # First: the task may start before _add() returns.
            (stored,) = self.queue._add([(row, if_exists)])
        except BaseException:
            futures.discard(future)
            raise
        if stored is not row:
            future = futures.join(future, stored)
        future._stored = True  # Last: from here on it is compared with the store.
        # Without this one, which may have ended already.
        others = if_exists == "replace" and futures.under(row.id) not in ([], [future])
        if others or replacements != futures.replacements:
            futures.end_replaced(row.id)
        if engine.ending.mode == "closed":  # A stored task stays waiting.
            future._end(*futures.unknown_end(future))
        return future

    def map(  # type: ignore[override]
        self,
        task_type: str | TaskFunction,
        data: Iterable[Any],
        timeout: float | timedelta | None = None,
        *,
        chunksize: int = 1,
        buffersize: int | None = None,
        **options: Unpack[MapOptions],
    ) -> Iterator[Any]:
        """The results of one task for each of *data*, in order, as Executor.map.

        *options* are priority, retries, retry_delay, keep_result and in_memory, of each task.
        Without *buffersize* all are submitted at once; with it, at most so many tasks ahead
        of the results that were taken, so *data* may be endless. With *chunksize* over 1,
        so many data make up one in-memory task, a chunk: its function is called for one
        after another, each as `job.data`, while id, progress and listeners are the chunk's;
        if one fails, the chunk does, and a retry runs all of them. Stored tasks have no
        chunks.

        Raises TypeError and ValueError for wrong arguments, before anything is submitted.
        The iterator raises TimeoutError if a result is not there *timeout* seconds after the
        call, the error of a task, or of *data*. Then, or if it is closed or forgotten, the
        tasks that have not begun are removed.
        """
        self._use("map")
        return _mapped(self, task_type, data, timeout, chunksize, buffersize, options)

    def _stores(self) -> list[Store]:
        stored = [] if self._options.in_memory_only else [self.queue._store]
        return [self.queue.in_memory._store, *stored]

    def cancel(self, task_id: str | Task) -> bool:
        """Remove a waiting task, given by its id or a Task of it, or kill the worker that runs
        it. Its Future is cancelled.

        False if there is no such task, or it runs in another cluster: see TaskQueue.cancel.
        """
        self._use("cancel")
        places = (task_id.in_memory,) if isinstance(task_id, Task) else (True, False)
        task_id = _checked_id("task_id", task_id, None)
        engine, query = self._engine, Query(ids=[task_id], states=["waiting"])
        stores = [store for store in self._stores() if store.in_memory in places]
        if any(store.remove(query, self.queue._now()) for store in stores):
            engine.futures.end_replaced(task_id)
            return True
        if not engine.thread:
            return False
        answer: _queues.SimpleQueue[_Run | None] = _queues.SimpleQueue()
        engine.post(lambda: engine.cancel(task_id, answer.put, *places))
        while not engine.closed.is_set() and not engine.is_at_work():
            with contextlib.suppress(_queues.Empty):
                run = answer.get(timeout=0.1)
                for future in [] if run is None else engine.futures.of(run.row):
                    future._end(_CANCELLED)
                return run is not None
        self._raise_failure()
        return False

    def _is_pending(self, until: int) -> bool:
        """Whether a task due by *until* waits or runs. Asks the stores, in this thread."""
        now, types, owner = self.queue._now(), list(self.task_map), self._engine.owner
        running = Query(types=types, states=["running"], until=until, limit=1)
        return any(
            store.upcoming(owner, types, 1, now, until)
            or store.find(running, now)
            for store in self._stores()
        )

    def drain(self, timeout: float | timedelta | None = None) -> bool:
        """Wait until nothing that was due at the call is waiting or running.

        Retries included, but no task that says "not now"; only types of the map count. False
        after *timeout* seconds. Raises the error of workers that cannot start.
        """
        self._use("drain")
        engine = self._engine
        seconds = math.inf if timeout is None else _checked_seconds("timeout", timeout, zero=True)
        deadline, until = time.monotonic() + seconds, self.queue._now()
        patience = math.inf  # Monotonic: when that with a store that fails ends.
        while not engine.closed.is_set():
            self._raise_boot_error()
            try:
                if engine.idle.is_set() and not self._is_pending(until):
                    break
                patience = math.inf
            except StoreError:
                patience = min(patience, time.monotonic() + self._options.shutdown_timeout)
                if time.monotonic() >= min(patience, deadline):
                    raise
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if engine.is_at_work():
                raise RuntimeError("drain() was called by a finalizer in a thread of the cluster")
            if not engine.idle.wait(min(left, 0.2)):
                continue
            time.sleep(min(left, 0.01))  # Idle, but something waits, or runs elsewhere.
        self._raise_failure()
        self._flush(min(deadline - time.monotonic(), 60.0))
        return True

    def _flush(self, seconds: float) -> None:
        """Wait until callbacks, listeners and the broker were called; not in one of these, as
        two of them could wait for each other."""
        threads = self._engine.threads[:_STORE]
        deadline = time.monotonic() + seconds
        if not any(thread.is_current() for thread in threads):
            for thread in threads:
                thread.flush(max(0.0, deadline - time.monotonic()))

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM, or shutdown() from elsewhere; then stop.

        After the signal nothing is started; running tasks get `shutdown_timeout`, then
        go back to waiting, uncounted. A second signal stops at once. Raises the error of
        workers that cannot start.
        """
        self._use("run")
        self.initialize()
        engine, seconds = self._engine, self._options.shutdown_timeout
        patience = [0.0, seconds]  # Of the second signal, and of the first.
        with _signals(lambda: engine.begin_stop(patience.pop() if patience else 0.0)):
            while not engine.closed.wait(0.5):
                try:
                    self._raise_boot_error()
                except BaseException:
                    engine.begin_stop(0.0)
                    raise
        self._flush(seconds)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._engine.futures.failure is not None:
            raise self._engine.futures.failure

    def _raise_boot_error(self) -> None:
        crew = self._engine.crew
        if crew.boot_error and not any(worker.ready for worker in crew.workers):
            raise cast(Exception, _unpacked(crew.boot_error)[1])

    def workers(self) -> list[dict[str, Any]]:
        """The worker processes: pid, state (starting, idle, busy), task_id, task_type,
        and since when (an aware UTC datetime)."""
        self._use("workers")
        return [worker.shown() for worker in list(self._engine.crew.workers)]

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """Stop. With *wait*: when what runs and what was due before the call is done.

        That is tasks of the map, retries included, but none that says "not now"; the rest
        stays waiting. Without *wait* nothing more is started, and running tasks get
        `shutdown_timeout` seconds before they go back to waiting, uncounted. *cancel_futures*
        removes the waiting tasks of Futures first. Leaving `with` and the end of the main
        script do the same as shutdown(). Called by a listener, broker or Future callback it
        does not wait.
        """
        self._use("shutdown")
        engine, seconds = self._engine, self._options.shutdown_timeout
        if not engine.thread:
            engine.ending.mode = "closed"
            engine.closed.set()
            if left := len(engine.futures.all()):
                end = _counted(left, "Future is cancelled", "Futures are cancelled")
                _log.warning("%s, as initialize() was not called; the tasks stay waiting", end)
            engine.futures.end_all()
            wake, engine.wake = engine.wake, None
            if wake is not None:
                wake.close()
                for source in engine.sources[1:]:
                    source.leave()
            return
        if cancel_futures:
            for future in engine.futures.all():
                future._remove(engine.futures.call_back)
        if not wait:
            engine.begin_stop(seconds)
            return
        interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)  # Inside `with`, say.
        until = self.queue._now()
        engine.post(lambda: engine.ending.finish(until, interrupted))
        if engine.is_at_work() or any(thread.is_current() for thread in engine.threads[:_STORE]):
            return
        try:
            while not engine.closed.wait(0.5):
                pass
        except KeyboardInterrupt:
            engine.begin_stop(seconds)
            raise
        self._flush(seconds)
        self._raise_failure()

    def __enter__(self) -> Cluster:
        self._use("with")
        return self

    def _use(self, what: str) -> None:
        _refuse_rerun(f"Cluster.{what}")
        if _worker is not None:
            raise RuntimeError(f"Cluster.{what} was called in a worker; only the master can")
        self._raise_failure()


OK, FAILURE, USAGE = 0, 1, 2  # Exit codes; argparse exits with 2 itself.


# --- Demo ----------------------------------------------------------------------------
# `python taskpool.py --demo`: the promises on real work.


def _print_where() -> None:
    cpus = _counted(_usable_cpus(), "CPU")
    print(f"taskpool {__version__}, Python {sys.version.split()[0]}, {cpus}")


def _demo_files() -> list[str]:
    """The modules of this Python's standard library that are one file, the largest first."""
    with os.scandir(os.path.dirname(os.__file__)) as entries:
        files = [(-entry.stat().st_size, entry.path) for entry in entries if entry.is_file()]
    return [path for _, path in sorted(files) if path.endswith(".py")]


def _demo_parse(job: Task) -> int:
    """Parse one file, and count its functions."""
    import ast

    with open(job.data, "rb") as file:
        tree = ast.parse(file.read())
    return sum("FunctionDef" in type(node).__name__ for node in ast.walk(tree))


def _demo_talk(job: Task, toggle_ipc: Callable[..., Future[Any]]) -> Future[Any]:
    def ask_again(first: str) -> Future[Any]:
        second = {"status": 3, "data": "and nested?"}
        return toggle_ipc(lambda answer: [first, answer], lambda send: send(second))

    return toggle_ipc(ask_again, lambda send: send({"status": 2, "data": "do you hear me?"}))


async def _demo_odd(job: Task) -> Any:
    """What job.data says: tell the time, sleep, spin for ever, kill its process, fail twice."""
    import asyncio

    while job.data == "spin":
        pass
    if job.data == "kill":
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    if job.data == "fail" and job.attempt < 3:
        raise OSError(f"no luck at attempt {job.attempt}")
    if job.data == "sleep":
        return await asyncio.gather(*(asyncio.sleep(0.05, number) for number in range(5)))
    return time.time() if job.data == "time" else job.attempt


def _demo_note(job: Task) -> None:
    """Append the id to a file, in one write: what really ran, whoever is killed."""
    time.sleep(0.02)
    with open(job.data, "ab", buffering=0) as file:
        file.write(f"{job.id}\n".encode())


_DEMO_MAP: dict[str, TaskFunction] = {
    "parse": _demo_parse, "talk": _demo_talk, "odd": _demo_odd, "note": _demo_note,
}  # fmt: skip


def _demo_doomed_master(path: str) -> None:
    with Cluster(_DEMO_MAP, TaskQueue(path), logs="error") as cluster:
        cluster.drain()


# The parts of the demo. Each returns whether it came out as promised, and what happened.


def _part_parse(cluster: Cluster, folder: str) -> tuple[bool, str]:
    """1. Parse the standard library: stored tasks, and urgent ones in memory first"""
    files, queue, started = _demo_files(), cluster.queue, time.monotonic()
    parsed: dict[str, int] = {}
    queue.add_event_listener("done", lambda count, task: parsed.update({task.data: count}))
    queue.add_tasks({"task_type": "parse", "data": file} for file in files[:-6])
    for file in files[-6:]:
        queue.add_task("parse", file, in_memory=True)
    cluster.initialize()
    while not cluster.drain(0.5):
        print(f"  {len(parsed):,} of {len(files):,} files", flush=True)
    queue.remove_event_listener("done")
    urgent = {*files[-6:]} <= {*list(parsed)[:50]}  # Others mix in on a busy machine.
    counted = f"{sum(parsed.values()):,} functions in {time.monotonic() - started:.1f} s"
    return urgent and len(parsed) == len(files), f"{counted}; urgent first: {urgent}"


def _part_clock(cluster: Cluster, folder: str) -> tuple[bool, str]:
    """2. A task due in a second starts on time; an asyncio task runs meanwhile"""
    clock = cluster.submit("odd", "time", due_date=timedelta(seconds=1))
    numbers = cluster.submit("odd", "sleep").result()
    late = clock.result() - clock.task.due_date.timestamp()
    return 0 <= late < 0.5 and numbers == [0, 1, 2, 3, 4], f"{numbers}, {late * 1000:.1f} ms late"


def _part_talk(cluster: Cluster, folder: str) -> tuple[bool, str]:
    """3. A conversation: the task asks the master, and asks again in the answer"""
    answers = cluster.submit("talk").result()
    return answers[1] == "and nested? yes", repr(answers)


def _part_flaky(cluster: Cluster, folder: str) -> tuple[bool, str]:
    """4. A task that fails twice and then succeeds"""
    attempt = cluster.submit("odd", "fail", retries=2, retry_delay=0.1).result()
    return attempt == 3, f"attempt {attempt} succeeded"


def _part_kill(cluster: Cluster, folder: str) -> tuple[bool, str]:
    """5. A task over its timeout is killed; one kills its own worker; others go on"""
    spin, killed = cluster.submit("odd", "spin", timeout=0.5), cluster.submit("odd", "kill")
    neighbours = list(cluster.map("parse", _demo_files()[-20:]))
    late, dead = spin.exception(), killed.exception()
    good = isinstance(late, TaskTimeout) and isinstance(dead, WorkerDied)
    return good, f"{late}; {dead}; {len(neighbours)} neighbours done"


def _part_restart(cluster: Cluster, folder: str) -> tuple[bool, str]:
    """6. A second master is killed with SIGKILL in mid-work; a third finishes its tasks"""
    path, notes = os.path.join(folder, "restart.db"), os.path.join(folder, "notes")
    with TaskQueue(path) as queue:
        tasks = queue.add_tasks({"task_type": "note", "data": notes} for _ in range(40))
        spawn = multiprocessing.get_context("spawn")
        doomed = spawn.Process(target=_demo_doomed_master, args=(path,))
        doomed.start()
        while doomed.is_alive() and len(_read_text(notes).split()) < 10:
            time.sleep(0.005)
        doomed.kill()
        doomed.join()
        left = queue.count()
        with Cluster(_DEMO_MAP, queue) as third:
            third.drain()
    ran = _read_text(notes).split()
    twice = len(ran) - len({*ran})
    good = {*ran} == {task.id for task in tasks} and left > 0 and twice <= _usable_cpus()
    return good, f"{left} of 40 were left; all ran in the end, {twice} of them twice"


_PARTS = (_part_parse, _part_clock, _part_talk, _part_flaky, _part_kill, _part_restart)


def _demo(options: Any) -> int:
    import tempfile

    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="  log: %(message)s")
    _print_where()
    given: Any = {"keep_alive": "always", "auto_initialize": False}
    given["message_broker"] = lambda respond, message: respond(f"{message['data']} yes")
    broken = []
    with tempfile.TemporaryDirectory(prefix="taskpool-demo-") as folder:
        queue = TaskQueue(os.path.join(folder, "demo.db"))
        with queue, Cluster(_DEMO_MAP, queue, **given) as cluster:
            for part in _PARTS:
                print(f"\n{part.__doc__}", flush=True)
                try:
                    good, result = part(cluster, folder)
                except Exception as error:
                    good, result = False, f"{type(error).__name__}: {error}"
                print(f"  {'->' if good else 'BROKEN:'} {result}", flush=True)
                broken += [] if good else [part.__doc__]
    end = ["NOT as promised:", *broken] if broken else ["All parts came out as promised."]
    print("", *end, sep="\n")
    return FAILURE if broken else OK


# --- Bench ---------------------------------------------------------------------------
# `python taskpool.py bench`: what this machine does. .ci/bench.py runs peers beside it,
# and measures memory and long queues.


def _bench_nothing(job: Task) -> None:
    """The task of which only the queue's own work is seen."""


def _bench_late(job: Task) -> float:
    """Seconds from just before add_task to the start of the function."""
    return time.time() - cast(float, job.data)


def _rate(count: int, work: Callable[[], Any]) -> str:
    started = time.perf_counter()
    work()
    return f"{count / (time.perf_counter() - started):,.0f} a second"


def _bench_lines(folder: str, count: int = 50_000) -> Iterator[tuple[str, str]]:
    """What was measured, and the number, as they come; *count*: of tasks."""
    task_map: dict[str, TaskFunction] = {"nothing": _bench_nothing, "late": _bench_late}
    queue, few = TaskQueue(os.path.join(folder, "bench.db")), count // 10
    cluster = Cluster(task_map, queue, keep_alive="always", auto_initialize=False)

    def add(number: int, in_memory: bool) -> None:
        for _ in range(number):
            queue.add_task("nothing", in_memory=in_memory)

    def submit() -> None:
        for future in [cluster.submit("nothing", in_memory=True) for _ in range(count)]:
            future.result()

    def late(in_memory: bool) -> float:
        time.sleep(0.002)  # An idle cluster, not a busy one.
        return cast(float, cluster.submit("late", time.time(), in_memory=in_memory).result())

    yield "add_task in memory", _rate(count, lambda: add(count, True))
    queue.in_memory.remove(state="waiting")
    yield "add_task", _rate(few, lambda: add(few, False))
    dicts = [{"task_type": "nothing"}] * count
    yield "add_tasks", _rate(count, lambda: queue.add_tasks(dicts))
    cluster.initialize()
    while queue.count() == count + few:  # Workers start first.
        time.sleep(0.001)
    yield "stored tasks run", _rate(queue.count(), cluster.drain)
    yield "submit to result, in memory", _rate(count, submit)
    for in_memory, what in ((False, "stored"), (True, "in memory")):
        median = sorted(late(in_memory) for _ in range(200))[100]
        yield f"until an idle worker starts, {what}", f"{median * 1000:.2f} ms"
    cluster.shutdown()
    queue.close()


def _bench(options: Any) -> int:
    import tempfile

    _print_where()
    with tempfile.TemporaryDirectory(prefix="taskpool-bench-") as folder:
        for what, found in _bench_lines(folder):
            number, _, unit = found.partition(" ")
            print(f"  {what:<40} {number:>10} {unit}", flush=True)
    return OK


# --- Command line --------------------------------------------------------------------
# What an operator asks of a file that others may be working on. Looking changes nothing.

_EPILOG = """\
examples:
  python taskpool.py --demo                         the promises, on real files, in seconds
  python taskpool.py run app:queue                  serve what app.py declares, until Ctrl-C
  python taskpool.py add tasks.db mail '{"to": 5}'  add a task, and print its id
  python taskpool.py status tasks.db --watch        what waits, runs and fails; bars of what runs
  python taskpool.py list tasks.db --state failed   the failed ones, oldest first
  python taskpool.py show tasks.db ID               all of one task, with its error
  python taskpool.py retry tasks.db ID ID           put failed ones back to waiting
  python taskpool.py pause tasks.db mail            no cluster starts that type, until resume
  python taskpool.py limit tasks.db mail --at-once 4 --rate 10/60
  python taskpool.py web tasks.db                   all of it in a browser
  python taskpool.py cron "0 9 * * MON-FRI" --tz Europe/Berlin
  python -c "help(__import__('taskpool').TaskQueue.add_task)"     one call, explained
"""
_BEHIND = "an ID that begins with - goes behind --: show tasks.db -- -ID"
_BEGINNING = "SELECT id FROM taskpool_task WHERE id BETWEEN ? AND ? ORDER BY id LIMIT 4"
# How many tasks wait for one that has failed.
_STUCK = """
SELECT count(DISTINCT child) FROM taskpool_after
CROSS JOIN taskpool_task AS first ON first.id = parent AND first.state = 'failed'
CROSS JOIN taskpool_task AS held ON held.id = child AND held.state = 'held'
"""
_COUNTS = ("waiting", "due", "held", "running", "failed", "done")
_TYPE_COLUMNS = ("task_type", "limits", *_COUNTS, "oldest_wait", "next_due")
_RUN_COLUMNS = ("task_type", "id", "attempt", "where", "since", "progress")
_SHOWN = (
    "id task_type state held data priority due_date starts_at created_at started_at ended_at "
    "attempt retries retry_delay timeout expires repeat progress result error"
).split()
LIST_TASKS = 100  # The command list shows so many.
COLUMN_CHARS = 40  # Widest column of a table.
LAST_CHARS = 60  # The last column is never cut to less.


def _starts_at(row: Row) -> datetime | None:
    """When a task that waits for its date, or for a retry, can start."""
    waits = row.state in ("ready", "scheduled")
    return _datetime(max(row.due_at, row.ready_at)) if waits else None


def _tell(row: Row) -> dict[str, Any]:
    """One task for `--json`. Data that somebody edited by hand may be no JSON."""
    task = Task(row)
    try:
        json.dumps([task.data, task.result], allow_nan=False)
    except (ValueError, RecursionError) as error:
        task = Task(row._replace(data=json.dumps(f"cannot be read: {error}"), result=None))
    told = {name: getattr(task, name, None) for name in _SHOWN}
    told["starts_at"] = _starts_at(row)
    told["repeat"] = task.repeat and str(task.repeat)
    told["progress"] = task.progress and task.progress._asdict()
    return told


def _span(seconds: float) -> str:
    """A duration for people, in one unit.

    >>> [_span(seconds) for seconds in (0.0256, 1, 90, 150, 7200, 200000)]
    ['26 ms', '1.0 s', '90 s', '2 min', '2 h', '2 d']
    """
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _bar(done: float, total: float | None, note: str | None) -> str:
    text = f"{done:,}" if total is None else f"{done:,} of {total:,}"
    if total:
        part = min(done / total, 1.0)
        text = f"[{'#' * int(20 * part):<20}] {int(100 * part):3}%  {text}"
    return f"{text}  {_plain(note)}" if note else text


def _cell(value: Any, now: int) -> str:
    """What is told, for people: an instant as seen from now, progress as a bar."""
    if isinstance(value, datetime):
        seconds = (value - _datetime(now)).total_seconds()
        return f"in {_span(seconds)}" if seconds > 0 else f"{_span(-seconds)} ago"
    if isinstance(value, dict):
        return _bar(*value.values()) if "done" in value else f"pid {value['pid']}"
    if isinstance(value, (int, float)):
        return _span(value) if isinstance(value, float) else f"{value:,}"
    return "-" if value is None else _plain(value)


def _width(text: str) -> int:
    """How many places of a terminal the text needs."""
    import unicodedata

    wide, mark = unicodedata.east_asian_width, unicodedata.combining
    sizes = (0 if mark(char) else 1 + (wide(char) in "WF") for char in text)
    return len(text) if text.isascii() else sum(sizes)


def _fit(text: str, width: int) -> str:
    """The text, or its beginning and "..." if it needs more than *width* places."""
    if _width(text) <= width:
        return text
    text = text[:width]
    while text and _width(text) > width - 3:
        text = text[:-1]
    return text + "..."


def _table(rows: Sequence[Mapping[str, Any]], now: int, width: int = 0) -> list[str]:
    """Lines in columns under their names; numbers to the right. With a *width* the last column
    is cut to fit."""
    head = [name.replace("task_", "").replace("_", " ") for name in rows[0]]
    cells = [head] + [[_cell(value, now) for value in row.values()] for row in rows]
    right = [all(text.replace(",", "").isdigit() for text in c[1:]) for c in zip(*cells)]
    # What is longer than a column may be is shown whole, and moves the rest of its own line.
    widths = [max(w for w in map(_width, c) if w <= COLUMN_CHARS) for c in zip(*cells)]
    lines = []
    for *row, last in cells:
        line = ""
        for text, size, to_right in zip(row, widths, right):
            pad = " " * (size - _width(text))
            line += f"{pad}{text}  " if to_right else f"{text}{pad}  "
        last = _fit(last, max(width - _width(line), LAST_CHARS)) if width else last
        lines.append(f"{line}{last}".rstrip())
    return lines


def _limits(kind: Mapping[str, Any]) -> str:
    """What types() tells of a pause and limits: "paused, 4 at once, 10 per 60 s"."""
    words = ["paused"] * kind["paused"]
    words += [] if kind["at_once"] is None else [f"{kind['at_once']:,} at once"]
    words += ["{:,} per {:.9g} s".format(*kind["rate"])] if kind["rate"] else []
    return ", ".join(words)


# Each of the next four gives what its command prints: for programs, and as lines for people.
_Told = tuple[Any, list[str]]


def _tell_status(view: SQLiteStore, options: Any, now: int, width: int) -> _Told:
    types = TaskQueue(view).types()
    table = [
        {**kind, "limits": _limits(kind) or None, "oldest_wait": kind["oldest_due"]}
        for kind in types
    ]
    # What is not used has no column. One that --watch has shown stays, so that nothing jumps.
    options.columns.update(n for line in table for n in ("limits", "held") if line[n])
    table = [{n: line[n] for n in _TYPE_COLUMNS if n in options.columns} for line in table]
    stuck = view._select(_STUCK)[0][0] if any(kind["held"] for kind in types) else 0
    runs = [
        {**_tell(row), "where": told_owner(row.owner), "since": _datetime(row.ready_at)}
        for row in view.find(Query(states=["running"]), now)
    ]
    total = sum(kind[name] for kind in types for name in ("waiting", *_COUNTS[3:]))
    masters = [told_owner(owner) for owner in view.owners()]
    who = ", ".join(f"pid {m['pid']} ({m['state']})" for m in masters)
    few = _counted(stuck, "waits for failed tasks", "wait for failed tasks")
    lines = [f"{_plain(options.db)}: {_counted(total, 'task')}{'; ' + few if stuck else ''}"]
    lines.append(f"masters: {who or 'none; nothing runs until a Cluster works on this file'}")
    if "(unknown)" in who:
        lines.append("  (unknown: of another machine or container, or a system without /proc)")
    lines += ["", *_table(table, now)] if table else []
    first = [{name: run[name] for name in _RUN_COLUMNS} for run in runs[:20]]
    lines += ["", "running now:", *_table(first, now, width)] if first else []
    lines += [f"... and {len(runs) - 20:,} more"] if runs[20:] else []
    told = {"file": view.path, "tasks": total, "waiting_for_failed": stuck, "types": types}
    return {**told, "running": runs, "masters": masters}, lines


def _tell_list(view: SQLiteStore, options: Any, now: int, width: int) -> _Told:
    query = Query(types=options.type, states=options.state, held=options.held or None)
    total = view.count(query, now)
    limit = options.limit or (total if options.json else LIST_TASKS)
    offset = max(total - limit, 0) if options.newest else 0
    tasks = [_tell(row) for row in view.find(query._replace(limit=limit, offset=offset), now)]
    tasks = tasks[::-1] if options.newest else tasks
    rows = []
    for task in [] if options.json else tasks:
        is_done = task["state"] == "done"
        what = (task["error"] or "").partition("\n")[0] or (not is_done and task["progress"])
        what = what or json.dumps(task["result" if is_done else "data"], ensure_ascii=False)
        row = {name: task[name] for name in ("task_type", "id", "state", "attempt")}
        ended, started = task["ended_at"], task["started_at"]
        took = (ended - started).total_seconds() if ended and started else None
        due, starts = task["due_date"], task["starts_at"]
        is_again = starts is not None and starts > max(due, _datetime(now))
        due = f"again {_cell(starts, now)}" if is_again else due
        rows.append({**row, "due": due, "took": took, "what": what})
    lines = _table(rows, now, width) if rows else ["no tasks"]
    more = f"... {len(tasks):,} of {total:,}; --limit shows more"
    return tasks, lines + [more] * (total > len(tasks))


def _found(view: SQLiteStore, text: str, now: int) -> Row:
    """The task whose id is *text*, else the only one whose id begins so."""
    ids = [text]
    if text and _is_unicode(text):  # The id that is *text* itself is found first.
        found = view._select(_BEGINNING, (text, text + "\U0010ffff"))
        ids = [task_id for (task_id,) in found if type(task_id) is str]
    if len(ids) > 1 and ids[0] != text:
        few = ", ".join(map(_shown, ids[:3])) + ", ..." * (len(ids) > 3)
        raise TaskPoolError(f"{_shown(text)}: several ids begin so: {few}")
    rows = view.find(Query(ids=ids[:1]), now)
    if not rows:
        raise TaskPoolError(f"{_shown(text)}: no such task")
    return rows[0]


def _tell_task(view: SQLiteStore, options: Any, now: int, width: int) -> _Told:
    task, lines, queue = _tell(_found(view, options.id, now)), [], TaskQueue(view)
    others = sorted(queue.find(before=task["id"]), key=lambda other: other.state)  # Failed first.
    task["after"] = {other.id: other.state for other in others}
    task["followed_by"] = queue.count(after=task["id"])
    task["error"] = task.pop("error")  # It is long: the last one.
    for name, value in task.items():
        if isinstance(value, datetime):
            text = f"{value.isoformat()} ({_cell(value, now)})"
        elif value and name == "progress":
            text = _cell(value, now)
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        first, *rest = map(_plain, text.split("\n"))
        lines += [f"{name:<12} {first}", *(f"    {line}" for line in rest)]
    return task, lines


METRIC_TYPES = 500  # Each has 25 lines. All further types are summed up as "(other)".
_METRICS = {
    "tasks": "gauge Tasks by state; each is counted once.",
    "oldest_due_seconds": "gauge How long the oldest task that is due has been so.",
    "paused": "gauge 1 if the type is paused, else 0.",
    "at_once": "gauge How many tasks of the type may run at once.",
    "runs_total": "counter Runs by how they ended.",
    "run_seconds": "histogram How long runs took.",
    "masters": "gauge Clusters that work on these tasks.",
    "build_info": "gauge The version of taskpool.",
    "counted_seconds": "gauge How old these numbers are.",
}
_IN_LABELS = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def metrics_text(
    types: Sequence[Mapping[str, Any]], masters: Iterable[str], version: str, age: float = 0.0
) -> str:
    """What types() said *age* seconds ago, and the states of the masters, for Prometheus: in its
    text format 0.0.4. Where the name of a type has control characters, their codes are told."""
    found: dict[str, float] = {}
    ends = ("done", *_ENDS)

    def put(sample: str, value: float, labels: str) -> None:
        """Types that share a name are added up; of some numbers the largest counts."""
        merge = max if sample in ("oldest_due_seconds", "paused") else operator.add
        sample += f"{{{labels}}}"
        found[sample] = merge(found.get(sample, 0), value)

    for number, kind in enumerate(types):
        name = kind["task_type"] if number < METRIC_TYPES else "(other)"
        name = "\n".join(map(_plain, name.split("\n"))).translate(_IN_LABELS)
        label, runs = f'type="{name}"', kind["runs"]
        counts = {"scheduled": 0, "paused": 0, **{state: kind[state] for state in _COUNTS[1:]}}
        rest = "paused" if kind["paused"] else "scheduled"
        counts[rest] = kind["waiting"] - kind["due"] - kind["held"]
        for state, count in counts.items():
            put("tasks", count, f'{label},state="{state}"')
        put("oldest_due_seconds", kind["oldest_due"] or 0, label)
        put("paused", int(kind["paused"]), label)
        if kind["at_once"] is not None and number < METRIC_TYPES:
            put("at_once", kind["at_once"], label)
        for end in ends:
            put("runs_total", runs[end], f'{label},outcome="{end}"')
        total = sum(runs[end] for end in ends[:4])  # Each run has ended as one of these.
        for most, count in [*runs["seconds_le"].items(), ("+Inf", total)]:
            put("run_seconds_bucket", count, f'{label},le="{most}"')
        put("run_seconds_sum", runs["seconds"], label)
        put("run_seconds_count", total, label)
    states = collections.Counter(masters)
    for state in ("alive", "dead", "unknown"):
        put("masters", states[state], f'state="{state}"')
    put("build_info", 1, f'version="{version}"')
    found["counted_seconds"] = age
    lines = []
    for name, about in _METRICS.items():
        how, _, text = about.partition(" ")
        lines += [f"# HELP taskpool_{name} {text}", f"# TYPE taskpool_{name} {how}"]
        lines += [f"taskpool_{it} {value}" for it, value in found.items() if it.startswith(name)]
    return "\n".join([*lines, ""])


def _tell_metrics(view: SQLiteStore, options: Any, now: int, width: int) -> _Told:
    masters = [told_owner(owner)["state"] for owner in view.owners()]
    return None, metrics_text(TaskQueue(view).types(), masters, __version__).splitlines()


def _look(options: Any) -> int:
    """status, list, show and metrics: print what is told, with --watch each second."""
    import shutil

    able = os.environ.get("TERM", "dumb") != "dumb" or "WT_SESSION" in os.environ
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    while True:
        started, now = time.monotonic(), time.time_ns() // 1000
        width, height = shutil.get_terminal_size() if is_terminal else (0, 0)
        with contextlib.closing(SQLiteStore(options.db, _looking=True)) as view:
            thing, lines = options.tell(view, options, now, width)
        if options.json:
            indent = None if options.watch else 2
            print(json.dumps(thing, default=datetime.isoformat, indent=indent), flush=True)
        elif options.watch and is_terminal and able:  # In place: home, then line over line.
            text = "".join(f"{_fit(line, width - 1)}\x1b[K\n" for line in lines[: height - 1])
            print(f"\x1b[H{text}\x1b[J", end="", flush=True)
        else:
            print(*lines, *[""] * options.watch, sep="\n", flush=True)
        if not options.watch:
            return OK
        # A million tasks take a second: to watch them costs a tenth of a core at most.
        time.sleep(max(1.0, 9 * (time.monotonic() - started)))


# What each command calls for a task, what it says of that, and why the call may do nothing.
_CHANGES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "retry": (TaskQueue.retry, "waiting", "it is {}, not failed"),
    "remove": (TaskQueue.remove, "removed", "no such task"),
    "cancel": (lambda queue, task_id: queue.cancel(task_id), "cancelled", "no such task"),
    "now": (functools.partial(TaskQueue.update, due_date=None, after=None), "due now", ""),
}
BATCH_TASKS = 500  # Read at once.
WRITE_SECONDS = 0.02  # A transaction is to take so long, so that clusters go on meanwhile.
BREAK_SECONDS = 0.03  # Least wait between two of these: SQLite tries again each 25 ms at first.


def _change_all(
    verb: str, queue: TaskQueue, view: Store, filters: dict[str, Any], ids: Any = None
) -> int:
    """Do that to the tasks that fit the filters, or to those of these ids that still do, in
    many transactions. Returns how many. What is added, or fails, meanwhile is not meant."""
    change, query = _CHANGES[verb][0], _make_query(verb, filters, view)
    if verb == "retry":
        if "failed" not in (query.states or STATES):
            return 0
        query = query._replace(states=["failed"])

    def found(before: Any = None) -> Iterator[str]:
        while some := view.newest(query, BATCH_TASKS, before, 0, queue._now()):
            yield from (row.id for row, *_ in some if type(row.id) is str)
            before = some[-1].key

    count, size, some_ids = 0, 50, {} if ids is None else {"task_id": ids}
    if verb == "remove" and filters.get("held") is not False and view.followers():
        # At once, and first: those that they follow may be meant, too, and none is to fail.
        count = change(queue, **{**filters, **some_ids, "held": True})
    left = iter(found() if ids is None else ids)
    while part := list(itertools.islice(left, size)):
        began = time.monotonic()
        if verb in ("retry", "remove"):
            count += change(queue, task_id=part, **filters)
        else:
            count += sum(bool(change(queue, task_id=task_id)) for task_id in part)
        took = max(time.monotonic() - began, 0.001)  # With the wait for other writers.
        if len(part) == size:  # There may be more.
            time.sleep(max(BREAK_SECONDS, took))
        size = max(1, min(int(size * WRITE_SECONDS / took), 2 * size))
    queue._wake_others()
    return count


def _change(options: Any) -> int:
    """retry, remove, cancel and now: say what became of each ID, or how many tasks the filters
    meant."""
    filters = {"task_type": options.type, "state": options.state}
    if any(filters.values()) == bool(options.id):
        options.parser.error("give either IDs, or --type, --state or both")
    (change, word, not_so), missed = _CHANGES[options.command], False
    now, view = time.time_ns() // 1000, SQLiteStore(options.db, _looking=True)
    with contextlib.closing(view), TaskQueue(options.db) as queue:
        view.owners()  # Raises if no file of ours is there to be changed.
        if not options.id and word == "removed":  # At once: also those whose ids are no text.
            print(f"{change(queue, **filters):,} removed")
        elif not options.id:
            count = _change_all(options.command, queue, view, filters)
            print(f"{count:,} {'put back to ' * (word == 'waiting')}{word}")
        for text in dict.fromkeys(options.id):
            try:
                row = _found(view, text, now)
                if not change(queue, task_id=row.id):
                    why = not_so.format(_public_state(row.state))
                    raise TaskPoolError(f"{_shown(row.id)}: {why}")
                end = word
                if row.state == "running" and word == "removed":
                    end = "runs; it is removed at the end of this run"
                if word == "due now" and row.task_type in view.paused():
                    end += f", but it does not start: {_shown(row.task_type)} is paused"
                print(f"{_plain(row.id)}: {end}")
            except (TaskPoolError, ValueError) as error:
                missed = True
                print(f"taskpool.py: {_plain(str(error))}", file=sys.stderr)
    return FAILURE if missed else OK


def _set_types(options: Any) -> int:
    """pause, resume and limit: say what holds for each TYPE from now on."""
    given = {name: v for name, v in vars(options).items() if name in ("at_once", "rate")}
    if options.command == "limit" and not given:
        options.parser.error("give --at-once, --rate or both")
    view = SQLiteStore(options.db, _looking=True)
    with contextlib.closing(view), TaskQueue(options.db) as queue:
        known = [kind["task_type"] for kind in TaskQueue(view).types()]
        for name in dict.fromkeys(options.types):
            getattr(queue, options.command)(name, **given)
            text = _limits(_told(view.settings().get(name, Setting()))) or "no limit"
            if name not in known:
                text += f"; no task here is of that type{_nearest(name, known)}"
            print(_plain(f"{name}: {text}"))
    return OK


def _read_place(text: str) -> str:
    module, _, name = text.partition(":")
    words = f"{module}.{name}".split(".")
    if name and module[-3:] != ".py" and all(map(str.isidentifier, words)):
        return text
    raise ValueError(text)


def _imported(place: str) -> Any:
    """What MODULE:NAME means. The module may be in the current folder."""
    import importlib

    module, _, attributes = place.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(1, os.getcwd())  # Behind the folder of this file.
    try:
        return operator.attrgetter(attributes)(importlib.import_module(module))
    except Exception as error:  # Told in one line.
        last = traceback.extract_tb(error.__traceback__)[-1]
        is_theirs = last.filename != __file__ and os.path.exists(last.filename)
        where = f" ({last.filename}, line {last.lineno})" if is_theirs else ""
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise TaskPoolError(f"{place} cannot be used: {text}{where}") from error


def _queue_at(target: str, is_made: bool) -> TaskQueue:
    """The queue that MODULE:NAME means; or that of a file, which may be made at its use."""
    if not os.path.exists(target):
        with contextlib.suppress(ValueError):
            queue = _imported(_read_place(target))
            if isinstance(queue, TaskQueue):
                return queue
            raise TaskPoolError(str(_wrong_type(target, queue, "a TaskQueue")))
    if not is_made:
        with contextlib.closing(SQLiteStore(target, _looking=True)) as view:
            view.owners()  # Raises if no file of ours is there.
    return TaskQueue(target)


def _add(options: Any) -> int:
    """The command add: store a task, also if its type is declared to be in memory."""
    name = options.task_type
    with _queue_at(options.target, is_made=True) as queue:
        try:
            task = queue.add_task(name, options.data, in_memory=False)
        except TypeError as error:  # The function takes no such data.
            raise ValueError(str(error)) from None
        print(_plain(task.id))
        if queue.task_map and name not in queue.task_map:
            why = f"{_shown(name)} is not declared{_nearest(name, queue.task_map)}"
            print(f"taskpool.py: {_plain(why)}", file=sys.stderr)
    return OK


@lru_cache(maxsize=1)
def _served(place: str) -> tuple[TaskQueue | None, Mapping[str, TaskFunction]]:
    """The TaskQueue that MODULE:NAME means, if it is one, and the task map: in the master and
    in its workers, which log alike."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    thing = _imported(place)
    if not isinstance(thing, TaskQueue):
        try:
            return None, _checked_task_map(thing)[0]
        except (TypeError, ValueError) as error:
            raise TaskPoolError(f"{place} cannot be served: {error}") from error
    if not thing.task_map:
        raise TaskPoolError(f"{place}: this TaskQueue declares no tasks")
    return thing, thing.task_map


class _Served:
    """A function of the task map of MODULE:NAME, pickled by these names: lambdas work, too."""

    def __init__(self, name: str, task_type: str) -> None:
        self._place, self.__wrapped__ = (name, task_type), _served(name)[1][task_type]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.__wrapped__(*arguments, **options)

    def __reduce__(self) -> Any:
        return _Served, self._place


def _serve(options: Any) -> int:
    """The command run: a Cluster on its own."""
    # First: the module may change the folder.
    named = None if options.db is None else TaskQueue(options.db)
    own, functions = _served(options.name)
    if (named is None) == (own is None):
        why = "is a task map: say which DB" if own is None else "has a store: leave DB out"
        options.parser.error(f"{options.name} {why}")
    known = Cluster.__init__.__kwdefaults__ or ()
    said = {name: v for name, v in vars(options).items() if name in known and v is not None}
    with cast(TaskQueue, named or own) as queue:
        task_map = {task_type: _Served(options.name, task_type) for task_type in functions}
        queue.count(task_id="")  # Raises if the file can't be used.
        cluster = Cluster(task_map, queue, auto_initialize=False, **said)
        names, where = ", ".join(map(repr, functions)), options.db or options.name
        if options.logs != "error":
            _log.info("serving %s of %s until Ctrl-C or SIGTERM", names, where)
        cluster.run()
    return OK


def _print_cron(options: Any) -> int:
    cron = Cron(options.text, options.tz)
    print(cron.explain())
    for instant in itertools.islice(cron, options.n):
        print(instant.isoformat(sep=" ", timespec="seconds"))
    return OK


# --- Page ----------------------------------------------------------------------------
# What a browser shows of a queue. The page itself holds nothing of it: its script asks for all,
# with a token that neither other pages nor other users of the machine have.

_STYLE = """\
:root {
  color-scheme: light dark;
  --ink: light-dark(#1c2230, #e4e7ed); --soft: light-dark(#667085, #98a1b2);
  --line: light-dark(#e4e7ec, #2b313c); --paper: light-dark(#fff, #181b22);
  --back: light-dark(#f6f7f9, #101217); --blue: light-dark(#2251cc, #8fb0ff);
  --red: light-dark(#b3261e, #ff8f85); --amber: light-dark(#8f5a00, #e9b558);
}
* { box-sizing: border-box; margin: 0; padding: 0; font: inherit; color: inherit; }
[hidden] { display: none !important; }
body {
  max-width: 86rem; margin: auto; padding: 1rem; background: var(--back); color: var(--ink);
  font: 14px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
}
header, nav, nav > span { display: flex; flex-wrap: wrap; align-items: baseline; gap: .3rem; }
header { padding: 0 .75rem .75rem; column-gap: 1.2rem; }
nav { padding: 1rem 0 .5rem; }
h1 { font-size: 1.25rem; font-weight: 650; overflow-wrap: anywhere; }
#age, #bulk, .acts { margin-left: auto; }
.soft, .card > .row, [data-none=true], dt { color: var(--soft); }
.bad, .types [data-head=failed][data-none=false] { color: var(--red); }
[data-head=limits] { color: var(--amber); }
.stale { opacity: .5; }
button, select, input {
  max-width: 100%; overflow: hidden; text-overflow: ellipsis; padding: .05rem .5rem;
  border: 1px solid var(--line); border-radius: 5px; background: var(--paper);
}
button { color: var(--blue); cursor: pointer; }
button:hover { border-color: currentColor; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: -1px; }
#tabs button, .row > button { color: inherit; background: none; border-color: transparent; }
#tabs button { padding: .25rem .75rem; }
#tabs [aria-pressed=true] { background: var(--paper); border-color: var(--line); }
.row > button { padding: 0; text-align: left; }
.row > button:hover { text-decoration: underline; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
.card > .row { position: sticky; top: 0; background: var(--paper); border-radius: 8px; }
li { list-style: none; border-top: 1px solid var(--line); }
.row {
  display: grid; grid-template-columns: 3fr 1.5fr 5.5rem 7rem 5fr 9rem; gap: 0 1rem;
  padding: .3rem .75rem; align-items: baseline;
}
.row > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; unicode-bidi: isolate; }
.row > .acts { overflow: visible; }
.acts button + button { margin-left: .3rem; }
.types { max-height: 23.2rem; overflow: auto; }
.types .row {
  column-gap: .75rem; grid-template-columns: minmax(5rem, 1fr) repeat(6, minmax(3.7rem, 4.5rem))
    repeat(4, minmax(4.8rem, 5.2rem)) minmax(5rem, 1fr) 8rem;
}
.types .row > :not(:first-child, :nth-child(12)) { text-align: right; }
.types .row > :nth-child(12) { white-space: normal; }
#tasks .row > button, #tasks span:nth-child(5), dd {
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace;
}
#tasks span:nth-child(5) {
  background: linear-gradient(var(--blue) 0 0) 0 100% / calc(100% * var(--part)) 2px no-repeat,
    linear-gradient(var(--line) 0 0) 0 100% / calc(9e9px * var(--part)) 2px no-repeat;
}
dl {
  display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; padding: .25rem 1.5rem 1rem;
}
dd { overflow-wrap: anywhere; white-space: pre-wrap; unicode-bidi: plaintext; }
#empty:not(:empty), #login { padding: 2rem; text-align: center; }
#said:not(:empty) {
  position: fixed; left: 50%; bottom: 1rem; transform: translateX(-50%); max-width: 92vw;
  padding: .5rem 1rem; border-radius: 8px; background: var(--ink); color: var(--paper);
}
@media (max-width: 74rem) {
  body { padding: .75rem .5rem; }
  .row, .types .row { display: flex; flex-wrap: wrap; column-gap: 1rem; padding: .5rem .75rem; }
  .card > .row.row, [data-none=true] { display: none; }
  .row > :first-child { width: 100%; font-weight: 600; }
  .types [data-head]::before { content: attr(data-head) " "; color: var(--soft); }
  #tasks span:nth-child(5) { width: 100%; white-space: normal; }
  button { padding: .3rem .7rem; }
}
"""
_SCRIPT = r"""
"use strict";
const $ = id => document.getElementById(id), number = n => n.toLocaleString("en");
// Signs that nobody sees, or that turn a text around, are shown by their codes.
const UNSEEN = /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const code = sign => "\\u" + sign.charCodeAt(0).toString(16).padStart(4, "0");
const plain = text => String(text ?? "").replace(UNSEEN, code);

// Have an element hold a text, or elements: [tag, name, properties, inside]. What is there by its
// name is never made anew; *still*: none comes or goes.
function fill(node, inside, still) {
  if (!Array.isArray(inside)) {
    if (node.textContent !== plain(inside)) node.textContent = plain(inside);
    return;
  }
  const old = new Map([...node.children].map(child => [child.dataset.name, child]));
  const children = inside.map(([tag, name, about, within]) => {
    const child = Object.assign(old.get(name) ?? document.createElement(tag), about);
    Object.assign(child.dataset, about.data, {name});
    old.delete(name);
    fill(child, within);
    return child;
  });
  if (still) return;
  for (const child of old.values()) child.remove();
  children.forEach((child, i) => child === node.children[i] ||
    node.insertBefore(child, node.children[i] ?? null));
}

const buttons = acts => state.read_only ? [] : Object.entries(acts).map(
  ([text, onclick], i) => ["button", String(i), {onclick}, text]);

// Have a list hold these rows, each with a button before its cells, others behind them, and
// facts below, if it has any.
function rows(list, things, still) {
  const heads = [...list.previousElementSibling.children].map(head => head.textContent);
  const cell = (text, i) => [
    "span", `cell ${i}`, {data: {head: heads[i + 1], none: ["", "0"].includes(text)}}, text];
  fill(list, things.map(({name, cells, press, acts, part = 0, isOpen, facts}) => ["li", name, {}, [
    ["div", "row", {className: "row", style: `--part: ${part}`}, [
      ["button", "name", {onclick: press, ariaExpanded: isOpen}, name],
      ...cells.map(cell), ["span", "acts", {className: "acts"}, buttons(acts)],
    ]],
    ["dl", "facts", {hidden: !isOpen}, facts],
  ]]), still);
}

// ---- Times

let skew = 0;  // How far the server's clock is ahead of this one, in milliseconds.
const age = text => (Date.now() + skew - Date.parse(text)) / 1000;

function span(s) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]])
    if (s >= 2 * size) return `${Math.round(s / size)} ${unit}`;
  return s < 0.9995 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(s < 10 ? 1 : 0)} s`;
}

const about = s => s < 10 ? `${Math.max(Math.round(s), 0)} s` : span(s);
const when = text => !text ? "" : age(text) < -1 ? `in ${about(-age(text))}` :
  age(text) < 1 ? "now" : `${about(age(text))} ago`;

// ---- What the server is asked

let token = "", state = null, page = null, heard = Date.now(), trouble = "", turn = 0, timer = 0;
let tab = "", before = "", moved = true;  // Which list, from which task on; if it is another.
let hush = 0;  // The timer that takes away what was said last.

async function ask(path, wish) {
  const answer = await fetch(path, {
    method: wish ? "POST" : "GET", body: wish && JSON.stringify(wish), cache: "no-store",
    headers: {Authorization: `Bearer ${token}`},
  }).catch(() => { throw new Error("no answer"); });
  if (answer.status === 401) token = "";
  const told = await answer.json().catch(() => ({error: `status ${answer.status}`}));
  if (!answer.ok) throw new Error(told.error);
  return told;
}

async function look() {
  const mine = ++turn;
  clearTimeout(timer);
  if (!token) return;
  try {
    const found = await ask("api/state"), now = Date.now();
    tab ||= found.types.some(type => type.failed) ? "failed" : "running";
    const list = await tasks(found);
    if (mine !== turn) return;
    [state, page, trouble, heard, skew] = [found, list, "", now, Date.parse(found.now) - now];
    showState();
    showTasks();
    for (const {id} of page.tasks) if (unfolded.has(id)) unfold(id);
  } catch (error) {
    if (mine !== turn) return;
    trouble = error.message;
  }
  showAge();
  if (token && $("live").checked && !document.hidden) timer = setTimeout(look, 2000);
}

async function tasks(found) {
  const type = $("type").value, {wish} = TABS[tab];
  if (!wish) return {tasks: found[tab].filter(task => !type || task.type === type)};
  // Asked for again only with new counts: where counting takes long, this may do so, too.
  const query = new URLSearchParams({...wish, type, before}).toString();
  if (page?.query === query && page.counted_at === found.counted_at) return page;
  return {...await ask(`api/tasks?${query}`), query, counted_at: found.counted_at};
}

// What a button does. What removes many, or ends a run, asks first.
async function act(verb, wish, words) {
  const isMuch = verb === "cancel" || (verb === "remove" && wish.ids?.length !== 1);
  if (isMuch && !confirm(`${verb} ${words}?`)) return;
  fill($("said"), `${verb} ${words} ...`);
  const told = await ask("api/do", {...wish, verb}).catch(error => error);
  const meant = wish.ids ? wish.ids.length : wish.state || wish.held ? null : 1;
  const end = told.count === meant ? "done" : told.message ?? number(told.count);
  fill($("said"), `${verb} ${words}: ${end}`);
  clearTimeout(hush);
  hush = setTimeout(() => fill($("said"), ""), 5000);
  [page, moved] = [null, true];
  look();
}

// ---- Types

let looks = [];  // The last ones at the totals, from a minute ago on.

// How many runs of a type ended as done in a minute, and how long the median of all runs took:
// between two looks, if any ended there, else ever.
function rates({task_type, runs}) {
  const first = looks[0].runs.get(task_type) ?? runs, bounds = Object.keys(runs.seconds_le);
  const minutes = (looks[looks.length - 1].at - looks[0].at) / 60_000;
  const ends = it => it ? it.done + it.failed + it.retried + it.later : 0;
  const since = ends(runs) > ends(first) ? first : null, half = (ends(runs) - ends(since)) / 2;
  const within = most => most ? runs.seconds_le[most] - (since?.seconds_le[most] ?? 0) : 0;
  const most = bounds.find(it => within(it) >= half), low = bounds[bounds.indexOf(most) - 1] ?? 0;
  const part = (half - within(low)) / (within(most) - within(low));
  const median = most ? span(low * (1 - part) + most * part) : "> 1 h";
  const speed = number(Math.round((runs.done - first.done) / minutes));
  return [minutes < 0.15 ? "" : speed, half ? median : ""];
}

function typeRow(type) {
  const {task_type: name, paused, at_once, rate, oldest_due, next_due} = type;
  const limits = [paused && "PAUSED", at_once && `${number(at_once)} at once`,
    rate && `${number(rate[0])} per ${rate[1]} s`].filter(Boolean).join(", ");
  const oldest = oldest_due === null ? "" : about(oldest_due);
  const next = age(next_due) > 0 ? "now" : when(next_due);  // The counts may be old.
  const counts = ["waiting", "due", "held", "running", "failed", "done"].map(it => type[it]);
  const cells = [...counts.map(number), oldest, next, ...rates(type), limits];
  const press = () => { $("type").value = $("type").value === name ? "" : name; show(tab); };
  const verb = paused ? "resume" : "pause";
  const acts = {[verb]: () => act(verb, {type: name}, name), limit: () => limit(type)};
  return {name, cells, press, acts};
}

// Ask for the limits of a type. What is no number goes as it is: the server says what is wrong.
function limit({task_type: type, at_once, rate}) {
  const read = text => text === "none" ? null : isFinite(text) ? Number(text) : text;
  const wish = {type};
  for (const [name, words, now] of [["at_once", "how many run at once: N", at_once],
    ["rate", "how many start in how many seconds: N/SECONDS", rate?.join("/")]]) {
    const text = prompt(`${plain(type)}: ${words}, or none`, now ?? "none")?.trim();
    if (text === undefined) return;
    wish[name] = text.includes("/") ? text.split("/").map(read) : read(text);
  }
  act("limit", wish, type);
}

// ---- Lists of tasks

// Of each list the filter of its tasks, the heads of two columns, and what can be done.
const TABS = {
  running: {heads: ["started", "progress"], verbs: ["cancel"]},
  failed: {wish: {state: "failed"}, heads: ["failed", "error"], verbs: ["retry", "remove"]},
  waiting: {wish: {state: "waiting"}, heads: ["due", "data"], verbs: ["now", "remove"]},
  held: {wish: {held: "1"}, heads: ["due", "waits for"], verbs: ["now", "remove"]},
  done: {wish: {state: "done"}, heads: ["ended", "result"], verbs: ["remove"]},
  schedules: {heads: ["next run", "rule"], verbs: ["now", "remove"]},
};
const count = (name, type) => name === "schedules" ? state.schedules.length :
  state.types.reduce((sum, it) => sum + (type && type !== it.task_type ? 0 : it[name]), 0);
const named = ({tasks, count}) => tasks.map(task => `${task.id} (${task.state})`).join(", ") +
  (count > tasks.length ? ` and ${number(count - tasks.length)} more` : "");

// What the last two cells tell of a task.
function tell(task, part) {
  const {done, note} = task.progress ?? {}, far = part ? `${Math.floor(100 * part)} %` : done;
  const after = task.after && `waits for ${named(task.after)}`;
  const isPaused = state.types.some(type => type.paused && type.task_type === task.type);
  const data = (isPaused ? "paused \u00b7 " : "") + task.data;
  const words = [far, note, `pid ${task.master}`].filter(it => it != null).join(" \u00b7 ");
  return {
    running: [task.since, words],
    failed: [task.ended ?? task.due, task.error], done: [task.ended, task.result ?? task.error],
    waiting: [task.due, after ?? data], held: [task.due, after],
    schedules: [task.starts, task.rule + (task.error ? `; last run: ${task.error}` : "")],
  }[tab];
}

function taskRow(task) {
  const {id, type, attempt, due, starts, progress} = task, acts = {};
  const part = progress?.total ? Math.min(progress.done / progress.total, 1) : 0;
  const [date, text] = tell(task, part);
  for (const verb of TABS[tab].verbs)
    acts[verb] = () => act(verb, {...TABS[tab].wish, ids: [id]}, id);
  const press = ({target}) => {
    if (!unfolded.delete(id)) unfold(id);
    target.closest("li").lastChild.hidden = !unfolded.has(id);  // Also of one that has gone.
    showTasks();
  };
  const isAgain = tab === "waiting" && starts > due && age(starts) < -1;
  const start = isAgain ? `again ${when(starts)}` : when(date);
  const cells = [type, attempt > 1 ? `attempt ${attempt}` : "", start, text];
  const shown = {isOpen: unfolded.has(id), facts: unfolded.get(id)};
  return {name: id, cells, press, acts, part: tab === "running" ? part : 0, ...shown};
}

function showTasks() {
  if (!page) return;  // The list is on its way.
  const list = $("tasks"), type = $("type").value, all = number(count(tab, type)), acts = {};
  // While somebody points at the list, or reads in it, nothing there moves.
  const still = !moved && list.querySelector(":hover, :focus-visible, dl:not([hidden])");
  rows(list, page.tasks.map(taskRow), still);
  moved = false;
  fill($("empty"), list.firstChild ? "" : state.types.length ? "none" : "no tasks yet");
  [$("newest").hidden, $("older").hidden] = [!before, !page.before];
  const {verbs, wish} = TABS[tab], ids = [...list.children].map(item => item.dataset.name);
  for (const id of unfolded.keys()) if (!ids.includes(id)) unfolded.delete(id);
  for (const verb of wish && ids.length ? verbs.filter(verb => verb !== "now") : []) {
    acts[`${verb} shown`] = () => act(verb, {...wish, ids}, `${ids.length} ${tab}`);
    acts[`${verb} all ${all}`] = () => act(
      verb, {...wish, ...type && {type}}, `all ${all} ${tab} ${type}`);
  }
  fill($("bulk"), buttons(acts));
}

const unfolded = new Map();  // Of the tasks of which all is shown: what is told of them.

async function unfold(id) {
  if (!unfolded.has(id)) unfolded.set(id, []);
  const task = await ask(`api/task?id=${encodeURIComponent(id)}`)
    .catch(error => ({error: error.message}));
  const date = text => `${new Date(text).toLocaleString()} (${when(text)})`;
  const as = {
    created: date, due: date, since: date, started: date, ended: date, starts: date, timeout: span,
    expires: span, retry_delay: span, keep_result: span, after: named, followed_by: named,
    progress: ({done, total, note}) => `${done} of ${total ?? "?"} ${note ?? ""}`,
  };
  const facts = Object.entries(task).filter(([, fact]) => fact || fact === 0);
  if (unfolded.has(id)) unfolded.set(id, facts.flatMap(([name, fact]) => [
    ["dt", `${name} is`, {}, name.replace("_", " ")], ["dd", name, {}, as[name]?.(fact) ?? fact],
  ]));
  showTasks();
}

// ---- The whole

function showState() {
  const {name, types, masters} = state, names = ["", ...types.map(type => type.task_type)];
  const failed = count("failed"), at = Date.parse(state.counted_at);
  const total = count("waiting") + count("running") + failed + count("done");
  if (looks[looks.length - 1]?.at !== at)
    looks.push({at, runs: new Map(types.map(type => [type.task_type, type.runs]))});
  while (looks.length > 2 && looks[1].at < at - 60_000) looks.shift();
  document.title = plain(failed ? `${name}: ${number(failed)} failed` : name);
  fill($("name"), name);
  fill($("total"), `${number(total)} task${total === 1 ? "" : "s"}`);
  const tellMaster = it => `master ${it.pid}: ${it.state}, ${number(it.running)} running`;
  fill($("masters"), masters.map(tellMaster).join("; ") || "no master: nothing starts");
  rows($("types"), types.map(typeRow));
  $("types").parentNode.hidden = !types.length;
  fill($("type"), names.map(name => ["option", name, {value: name}, name || "all types"]));
  fill($("tabs"), Object.keys(TABS).map(name => [
    "button", name, {onclick: () => show(name), ariaPressed: String(name === tab)}, [
      ["span", "name", {}, `${name} `],
      ["span", "count", {className: name === "failed" && failed ? "bad" : "soft"},
        number(count(name))],
    ],
  ]));
  TABS[tab].heads.forEach((head, i) => fill($("head").children[3 + i], head));
}

// Show a list from its beginning, or from behind a task.
function show(name, key = "") {
  [tab, before, page, moved] = [name, key, null, true];
  unfolded.clear();
  look();
}

function showAge() {
  $("login").hidden = Boolean(token);
  $("main").hidden = !token || !state;
  $("main").className = trouble ? "stale" : "";
  const first = token ? "looking ..." : "";
  const counted = state ? `counted ${about(age(state.counted_at))} ago` : first;
  const since = token ? `, for ${about((Date.now() - heard) / 1000)}` : "";
  fill($("age"), trouble ? trouble + since : counted);
  $("age").className = trouble ? "bad" : "soft";
}

// The token comes behind the # of the address, and stays in this tab.
function takeToken() {
  try {
    token = decodeURIComponent(location.hash.slice(1)) || token || sessionStorage.taskpool || "";
    history.replaceState(null, "", location.pathname);
    sessionStorage.taskpool = token;
  } catch { }  // The browser is told to store nothing.
  showAge();
  look();
}

$("login").onsubmit = () => {
  location.hash = encodeURIComponent($("token").value);
  return false;
};
$("type").onchange = $("newest").onclick = () => show(tab);
$("older").onclick = () => page && show(tab, page.before);  // Else the list is on its way.
$("live").onchange = document.onvisibilitychange = () => document.hidden || look();
onhashchange = takeToken;
setInterval(showAge, 1000);
takeToken();
"""
_PAGE = f"""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>taskpool</title>
<style>{_STYLE}</style>
<header>
  <h1 id="name">taskpool</h1> <span id="total"></span> <span id="masters" class="soft"></span>
  <span id="age" role="status"></span>
  <label class="soft"><input type="checkbox" id="live" checked> live</label>
</header>
<form id="login" hidden>
  This page needs the token that stands behind the # of the address that taskpool.py web printed.
  <input type="password" id="token" aria-label="token" autocomplete="off"> <button>look</button>
</form>
<main id="main" hidden>
  <div class="card types">
    <div class="row"><span>type</span><span>waiting</span><span>due</span><span>held</span>
      <span>running</span><span>failed</span><span>done</span><span>oldest due</span>
      <span>next due</span><span>done/min</span><span>median</span><span>limits</span></div>
    <ul id="types"></ul>
  </div>
  <nav>
    <span id="tabs"></span> <select id="type" aria-label="type"></select> <span id="bulk"></span>
  </nav>
  <div class="card">
    <div class="row" id="head"><span>task</span><span>type</span><span></span><span></span>
      <span></span></div>
    <ul id="tasks"></ul>
    <p id="empty" class="soft"></p>
  </div>
  <nav><button id="newest">newest</button> <button id="older">older</button></nav>
</main>
<output id="said"></output>
<script>{_SCRIPT}</script>
"""

LIST_CHARS, ALL_CHARS = 200, 100_000  # Of the long texts of a task: in a list, and by itself.
SHOWN_TASKS = 100  # That run, that repeat, and that others follow.
COUNT_SHARE = 0.05  # At most this part of the time is spent on counting tasks.
COUNT_SECONDS = 0.05  # Where counting takes longer, the last counts are told at once ...
OLD_SECONDS = 30.0  # ... unless they are much older than this.
BODY_BYTES = 1 << 16  # Of a request.
SOCKET_SECONDS = 10.0  # A connection that is silent for so long is closed.
STRANGERS = 50  # Connections without the token that are open at most: then the oldest is closed.
TOKEN_CHARS = 16  # The fewest of a token that somebody makes up.


class _Shared:
    """Something that it takes time to find: found once for all who ask, in at most COUNT_SHARE
    of the time. An error counts for a second."""

    def __init__(self, find: Callable[[], Any]) -> None:
        self._find, self._lock = find, threading.Lock()
        self._found: tuple[Any, int, float] | Exception = StoreError("not looked for")
        self._again = self._too_old = -math.inf  # Monotonic: when it may be, and must be, found.

    def get(self) -> tuple[Any, int, float]:
        """What was found, the instant of that, and the seconds that it took."""
        with self._lock:
            now = time.monotonic()
            if now >= self._too_old:
                self._look()
            elif now >= self._again:
                self._again = math.inf  # Somebody is looking.
                threading.Thread(target=self._look, daemon=True).start()
            if isinstance(self._found, Exception):
                raise StoreError(str(self._found)) from self._found
            return self._found

    def _look(self) -> None:
        began, at, took = time.monotonic(), time.time_ns() // 1000, 0.0
        try:
            found = self._find()
            took = time.monotonic() - began
            self._found, wait = (found, at, took), took / COUNT_SHARE - took
        except Exception as error:
            self._found, wait = error, 1.0
        self._again = self._too_old = time.monotonic() + wait
        if took > COUNT_SECONDS:
            self._too_old += took + OLD_SECONDS


class _Refused(Exception):
    """The answer to a request: an HTTP status, and a line of text."""


def _read_key(text: str) -> Any:
    """A Seen.key, from JSON."""
    since, last = _decode(text)
    if since is not None:
        _checked_int("", since, -MAX_INT)
    if type(last) is str:
        return [since, _checked_text("", last)]
    return [since, _checked_int("", last, -MAX_INT)]


# What a request may ask for; how some of that is read, and what is allowed.
_ASKED = {
    "/api/tasks": "state type held limit before", "/api/task": "id",
    "/api/do": "verb ids state type held at_once rate",
}  # fmt: skip
_READERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "held": ({"1": True, True: True}.__getitem__, "1"),
    "limit": (lambda text: _checked_int("", int(text), 1), "a whole number, 1 or more"),
    "before": (_read_key, "what `before` was in the last answer"),
}


def _asked(path: str, given: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """What a request to *path* asks for, as it is read. Raises _Refused."""
    asked: dict[str, Any] = {}
    allowed = _ASKED.get(path, "").split()
    for name, value in given:
        if name in asked or name not in allowed:
            how = "is given twice" if name in asked else f"is no parameter of {path}"
            raise _Refused(400, f"{_shown(name)} {how}")
        read, what = _READERS.get(name, (None, ""))
        try:
            asked[name] = value if read is None else read(value)
        except (ValueError, TypeError, LookupError):
            raise _Refused(400, str(_wrong_value(name, value, what))) from None
    return asked


def _in_words(repeat: timedelta | Cron) -> str:
    if isinstance(repeat, Cron):
        return repeat.explain()
    seconds, units = repeat.total_seconds(), {86400: "d", 3600: "h", 60: "min"}
    size = next((size for size in units if seconds % size == 0), 1)
    return f"every {seconds / size:g} {units.get(size, 's')}"


def _told_text(text: Any, length: int) -> str | None:
    """A long text for people: on several lines, if it is JSON and whole."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    if text is not None and length > len(text):
        return f"{text} ... ({length:,} characters)"
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    return cast("str | None", text)


def _brief(row: Row) -> dict[str, Any]:
    """A task in a list, but for its data and result, which may be cut."""
    row = readable(row._replace(data="null", result=None))
    task, runs = Task(row), row.state == "running"
    return {
        "id": task.id, "type": task.task_type, "state": task.state, "held": task.held,
        "attempt": task.attempt, "created": task.created_at, "due": task.due_date,
        "since" if runs else "started": task.started_at, "ended": task.ended_at,
        "starts": _starts_at(row),
        "master": told_owner(row.owner)["pid"] if runs else None,
        "progress": task.progress and task.progress._asdict(),
        "rule": task.repeat and _in_words(task.repeat),
        "error": (task.error or "").partition("\n")[0] or None,
    }  # fmt: skip


def _instant_text(value: Any) -> str:
    """For JSON: an instant; or a text that is not UTF-8."""
    return value.isoformat() if isinstance(value, datetime) else repr(value)


class _Page:
    """What the page shows and does: the answer to each request."""

    def __init__(self, name: str, queue: TaskQueue, token: str, read_only: bool) -> None:
        self._name, self._queue, self._read_only = name, queue, read_only
        self._token = f"Bearer {token}".encode()
        # Views of a file change nothing in it. Two, so that no list waits for the counts.
        views, store = [queue, queue], queue._store
        if isinstance(store, SQLiteStore):
            views = [TaskQueue(SQLiteStore(store.path, _looking=True)) for _ in views]
        self.stores = [view._store for view in views]
        self._store, self._types = self.stores[0], _Shared(views[1].types)
        self._moving = _Shared(self._find_moving)

    # ---- What there is

    def _newest(self, query: Query, most: int, before: Any = None, chars: int = 0) -> list[Seen]:
        return self._store.newest(query, most, before, chars, self._queue._now())

    def _find_moving(self) -> dict[str, Any]:
        """What runs now, who runs it, and what repeats."""
        found = self._newest(Query(states=["running"]), 20 * BATCH_TASKS, None, LIST_CHARS)
        # As text: another program may have written an instant that is no number.
        running = sorted((seen.row for seen in found), key=lambda row: str(row.ready_at))
        count = collections.Counter(row.owner for row in running)
        owners = sorted(self._store.owners())
        return {
            "running": list(map(_brief, running[:SHOWN_TASKS])),
            "masters": [{**told_owner(owner), "running": count[owner]} for owner in owners],
            "schedules": list(map(_brief, self._store.schedules(SHOWN_TASKS))),
        }

    def _state(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        types, counted_at, took = self._types.get()
        return {
            "name": self._name, "version": __version__, "read_only": self._read_only,
            "now": _datetime(self._queue._now()), "counted_at": _datetime(counted_at),
            "took": took, "types": types, **self._moving.get()[0],
        }  # fmt: skip

    def _filters(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The tasks that a request means: of a state, of a type, or those held."""
        state, task_type, held = (asked.get(name) or None for name in ("state", "type", "held"))
        return {"state": state, "task_type": task_type, "held": held}

    def _tasks(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        before, most = asked.get("before"), min(asked.get("limit", 50), BATCH_TASKS)
        query = _make_query("the page", self._filters(asked), self._store)
        found = self._newest(query, most, before, LIST_CHARS)
        after = self._after([row.id for row, *_ in found if row.state == "held"], 5)
        tasks = [
            {**_brief(row), "after": after.get(row.id), "data": row.data, "result": row.result}
            for row, *_ in found
        ]
        more = found and len(found) == most
        return {"tasks": tasks, "before": json.dumps(found[-1].key) if more else None}

    def _listed(self, ids: Sequence[str], most: int) -> dict[str, Any]:
        """How many tasks these are, and some of them, failed ones first."""
        rows = [row for row, *_ in self._newest(Query(ids=ids[: 4 * most]), 4 * most)]
        tasks = [{"id": row.id, "state": _public_state(row.state)} for row in rows]
        tasks.sort(key=lambda task: task["state"] != "failed")
        return {"count": len(ids), "tasks": tasks[:most]}

    def _after(self, ids: Sequence[str], most: int) -> dict[str, Any]:
        """Whom each of these tasks waits for."""
        parents: dict[str, list[str]] = {}
        for bond in self._store.bonds(children=ids) if ids else ():
            parents.setdefault(bond.child, []).append(bond.parent)
        return {child: self._listed(those, most) for child, those in parents.items()}

    def _task(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        task_id = asked.get("id", "")
        found = self._newest(Query(ids=[task_id]), 1, None, ALL_CHARS)
        if not found:
            raise _Refused(404, "there is no such task any more")
        row, told = found[0].row, _brief(found[0].row)
        for name in "priority retries retry_delay timeout expires keep_result".split():
            told[name] = getattr(row, name)
        for name, length in zip(LONG_TEXTS, found[0].lengths):
            told[name] = _told_text(getattr(row, name), length) or told.get(name)
        followers = [bond.child for bond in self._store.bonds(parents=[task_id])]
        told["after"] = self._after([task_id], SHOWN_TASKS).get(task_id)
        told["followed_by"] = self._listed(followers, SHOWN_TASKS) if followers else None
        return told

    def _metrics(self, asked: Mapping[str, Any]) -> str:
        types, counted_at, _ = self._types.get()
        states = [master["state"] for master in self._moving.get()[0]["masters"]]
        age = (time.time_ns() // 1000 - counted_at) / 1e6
        return metrics_text(types, states, __version__, age)

    # ---- What is done

    def _act(self, body: bytes) -> dict[str, Any]:
        if self._read_only:
            raise _Refused(403, "this page was started with --read-only")
        try:
            given = json.loads(body)
            verb = str(given["verb"])
        except (ValueError, TypeError, LookupError, RecursionError):
            raise _Refused(400, "the body is no JSON object with a verb") from None
        wish = _asked("/api/do", given.items())
        self._store.owners()  # Raises if no file of ours is there to be changed.
        if verb in ("pause", "resume", "limit"):
            limits = {name: wish[name] for name in ("at_once", "rate") if name in wish}
            getattr(self._queue, verb)(wish.get("type"), **limits)
            return {"count": 1}
        if verb not in _CHANGES:
            raise _Refused(400, f"the verb is none of {', '.join(_CHANGES)}, pause, resume, limit")
        filters = self._filters(wish)
        ids = _listed("ids", wish["ids"]) or [] if "ids" in wish else None
        if ids is None and not any(filters.values()):
            raise ValueError("give ids, or a type, a state or held")
        return {"count": _change_all(verb, self._queue, self._store, filters, ids)}

    # ---- Requests

    def knows(self, given: str) -> bool:
        """Whether that `Authorization` has the token."""
        import hmac

        return hmac.compare_digest(given.encode(), self._token)

    def answer(self, method: str, target: str, given: str, body: bytes) -> tuple[int, str, str]:
        """The status, the kind and the text that answer a request with that `Authorization`."""
        import urllib.parse

        path, _, text = target.partition("?")
        if (method, path) == ("GET", "/"):
            return 200, "text/html", _PAGE
        if not self.knows(given):
            return self.error(401, "the token is missing or wrong")
        ways: dict[str, Callable[[Any], Any]] = {
            "/api/state": self._state, "/api/tasks": self._tasks, "/api/task": self._task,
            "/metrics": self._metrics, "/api/do": self._act,
        }  # fmt: skip
        try:
            if path not in ways:
                raise _Refused(404, "there is nothing here")
            if (method == "POST") != (path == "/api/do"):
                raise _Refused(405, "not by this method")
            pairs = urllib.parse.parse_qsl(text)
            told = ways[path](body if method == "POST" else _asked(path, pairs))
            if isinstance(told, str):
                return 200, "text/plain; version=0.0.4", told
            return 200, "application/json", json.dumps(told, default=_instant_text)
        except _Refused as refused:
            return self.error(*refused.args)
        except (ValueError, TypeError) as error:
            return self.error(409 if method == "POST" else 400, str(error))
        except Exception as error:
            return self.error(503, str(error) if isinstance(error, StoreError) else repr(error))

    @staticmethod
    def error(status: int, text: str) -> tuple[int, str, str]:
        """The answer that says so, in one line."""
        return status, "application/json", json.dumps({"error": _plain(text)})


def _policy() -> str:
    """The Content-Security-Policy: nothing runs but our script, and it asks nobody but us."""
    import base64
    import hashlib

    hashes = [hashlib.sha256(text.encode()).digest() for text in (_SCRIPT, _STYLE)]
    script, style = (f"'sha256-{base64.b64encode(it).decode()}'" for it in hashes)
    return (
        f"default-src 'none'; connect-src 'self'; script-src {script}; style-src {style}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _page_handler(page: _Page, strangers: dict[Any, None]) -> Any:
    """A class whose objects answer a connection each, and take it off the *strangers*, if it
    has the token."""
    import http.server

    policy = _policy()

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = SOCKET_SECONDS

        def do_GET(self, body: bytes = b"") -> None:
            given = self.headers.get("Authorization", "")
            if page.knows(given):
                strangers.pop(self.connection, None)
            self._send(*page.answer(self.command, self.path, given, body))

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal():
                self._send(*page.error(411, "the length of the body is missing"))
            elif int(length) > BODY_BYTES:
                # Clients that cannot send all of it may read no answer.
                self.rfile.read(min(int(length), 16 * BODY_BYTES))
                self._send(*page.error(413, f"the body has over {BODY_BYTES:,} bytes"))
            else:
                self.do_GET(self.rfile.read(int(length)))

        def _send(self, status: int, kind: str, text: str) -> None:
            content = text.encode()
            self.send_response(status)
            for name, value in (
                ("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(content))),
                ("Content-Security-Policy", policy), ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
            ):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def send_error(self, code: int, message: Any = None, explain: Any = None) -> None:
            status = 405 if code == 501 else code  # No method of ours.
            self._send(*page.error(status, str(message or "not by this method")))

        def version_string(self) -> str:
            return "taskpool"

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass  # Neither requests nor tokens are logged.

    return Handler


def _page_server(page: _Page, family: Any, address: Any) -> Any:
    """A server for the page, which listens at that address."""
    import socketserver

    strangers: Any = collections.OrderedDict()  # Connections; a flood of these does no harm.

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, request_queue_size, address_family = True, 100, family
        allow_reuse_address = os.name != "nt"  # There it would allow others to listen, too.

        def server_bind(self) -> None:
            if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            super().server_bind()

        def process_request(self, request: Any, client_address: Any) -> None:
            strangers[request] = None
            while len(strangers) > STRANGERS:
                with contextlib.suppress(OSError, KeyError):  # It may have ended just now.
                    strangers.popitem(last=False)[0].shutdown(socket.SHUT_RDWR)
            super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            strangers.pop(request, None)
            super().shutdown_request(request)

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # The browser has gone.

    return Server(address, _page_handler(page, strangers))


def _web(options: Any) -> int:
    """The command web: serve the page until Ctrl-C."""
    import ipaddress
    import secrets

    own, host, port = os.environ.get("TASKPOOL_TOKEN", ""), options.host, options.port
    if own and not (len(own) >= TOKEN_CHARS and own.isascii() and own.isprintable()):
        options.parser.error(f"$TASKPOOL_TOKEN needs {TOKEN_CHARS} ASCII characters or more")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        options.parser.error(f"--host {host}: there is no such address here")
    family, _, _, _, address = found[0]
    is_open = not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    if is_open and not own:
        options.parser.error(f"--host {host} is open to others: give a token in $TASKPOOL_TOKEN")
    queue, token = _queue_at(options.target, is_made=False), own or secrets.token_urlsafe(32)
    page = _Page(options.target, queue, token, options.read_only)
    try:
        server = _page_server(page, family, address)
    except OSError as error:
        raise TaskPoolError(f"{host}, port {port}: {error.strerror or error}") from error
    if is_open:
        print("taskpool.py: http is not encrypted: put a TLS proxy before it", file=sys.stderr)
    with server:
        place = f"[{host}]" if ":" in host else host
        end = "$TASKPOOL_TOKEN" if own else token
        print(f"http://{place}:{server.server_address[1]}/#{end}", flush=True)
        try:
            server.serve_forever()
        finally:  # What a thread reads is to end at once.
            for store in page.stores:
                if isinstance(store, SQLiteStore):
                    store.interrupt()
    return OK


# --- Arguments -----------------------------------------------------------------------
# How the command line is read.

_CHOOSING = "--type --state"
_SERVING = "--keep-alive --max-tasks-per-worker --start-method --shutdown-timeout --logs"
# What each command does, its arguments, what it is for, and what _look tells.
_COMMANDS: dict[str, tuple[Callable[[Any], int], str, str, Any]] = {
    "status": (_look, "db --watch --json", "what waits, runs and fails, by type", _tell_status),
    "list": (_look, f"db {_CHOOSING} --held --newest --limit --json", "tasks by age", _tell_list),
    "show": (_look, "db id --json", "all of one task", _tell_task),
    "add": (
        _add, "target task_type data?",
        "add a task, by MODULE:NAME with its declared defaults; a missing file is made", None,
    ),
    "retry": (_change, f"db id* {_CHOOSING}", "put failed tasks back to waiting", None),
    "remove": (_change, f"db id* {_CHOOSING}", "remove tasks; a running one ends its run", None),
    "cancel": (_change, "db id+", "remove tasks; what runs is stopped", None),
    "now": (_change, "db id+", "make tasks due now, held or not; slots of schedules stay", None),
    "pause": (_set_types, "db types+", "start no tasks of a type, in all clusters", None),
    "resume": (_set_types, "db types+", "end a pause", None),
    "limit": (_set_types, "db types+ --at-once --rate", "limit how tasks of a type start", None),
    "metrics": (_look, "db", "numbers for Prometheus", _tell_metrics),
    "run": (
        _serve, f"name db? --workers --oversubscribe {_SERVING}",
        "serve tasks until a signal; a missing file is made", None,
    ),
    "web": (_web, "target --host --port --read-only", "look at a queue in a browser", None),
    "cron": (_print_cron, "text --tz -n", "explain a schedule, and tell its next runs", None),
    "bench": (_bench, "", "what this machine does", None),
}  # fmt: skip


def _read_whole(text: str) -> int:
    return _checked_int("", int(text), 1)


def _read_rate(text: str) -> tuple[int, float]:
    starts, _, seconds = text.partition("/")
    rate = int(starts), float(seconds)
    _checked_limits(_AS_IS, rate)
    return rate


def _arguments() -> dict[str, dict[str, Any]]:
    """How argparse reads each argument."""
    import argparse

    def read(how: Callable[[str], Any], allowed: str, **words: Any) -> Callable[[str], Any]:
        def type_(text: str) -> Any:
            try:
                return words[text] if text in words else how(text)
            except (TypeError, ValueError):
                raise argparse.ArgumentTypeError(f"{_shown(text)} is not {allowed}") from None

        return type_

    whole = read(_read_whole, "a whole number, 1 or more")
    most = read(_read_whole, 'a whole number, 1 or more, or "none"', none=None)
    idle = read(_read_whole, 'a whole number of milliseconds, or "always"', always="always")
    rate = read(_read_rate, 'N/SECONDS, such as 10/60, or "none"', none=None)
    span = read(lambda text: _checked_seconds("", float(text), zero=True), "a number of seconds")
    kind = read(functools.partial(_checked_text, ""), "the name of a task type")
    place = read(_read_place, "MODULE:NAME, such as app:queue")
    port = read(lambda text: range(65536).index(int(text)), "a port")
    flag, count = {"action": "store_true"}, {"type": whole, "metavar": "N"}
    limit = {"default": argparse.SUPPRESS}  # What is not given stays as it is.
    return {
        "db": {"metavar": "DB", "help": "the file of your TaskQueue"},
        "id": {"metavar": "ID", "help": "an id, or its beginning"},
        "types": {"metavar": "TYPE", "type": kind},
        "task_type": {"metavar": "TYPE"},
        "data": {"metavar": "JSON", "type": read(_decode, "JSON"), "default": _NO_DATA},
        "name": {"metavar": "MODULE:NAME", "type": place},
        "target": {"metavar": "TARGET", "help": "a file, or MODULE:NAME of a TaskQueue"},
        "text": {"metavar": "EXPR", "help": 'such as "0 9 * * MON-FRI"'},
        "--host": {"default": "127.0.0.1", "help": "the address that it listens at (%(default)s)"},
        "--json": {**flag, "help": "for programs"},
        "--at-once": {**limit, "type": most, "metavar": "N", "help": "so many run at once"},
        "--held": {**flag, "help": "only those that wait for the end of others"},
        "--limit": {**count, "help": f"at most so many ({LIST_TASKS}; with --json all)"},
        "--newest": {**flag, "help": "the newest first"},
        "--port": {"type": port, "default": 8321, "help": "0: any that is free (%(default)s)"},
        "--read-only": {**flag, "help": "only to look"},
        "--rate": {**limit, "type": rate, "metavar": "N/SECONDS", "help": "so many start"},
        "--state": {"action": "append", "choices": STATES, "help": "only tasks in that state"},
        "--type": {"action": "append", "help": "only tasks of that type"},
        "--tz": {"default": "UTC", "help": "its time zone (%(default)s)"},
        "--watch": {**flag, "help": "each second, until Ctrl-C"},
        "-n": {**count, "default": 5, "help": "how many runs (%(default)s)"},
        # Parameters of Cluster:
        "--workers": {**count, "dest": "max_available_workers", "help": "as many (all CPUs)"},
        "--oversubscribe": {**flag, "help": "also more workers than CPUs"},
        "--keep-alive": {"type": idle, "metavar": "MS", "help": "how long a worker may be idle"},
        "--max-tasks-per-worker": {**count, "help": "after so many it is replaced"},
        "--start-method": {"choices": multiprocessing.get_all_start_methods()},
        "--shutdown-timeout": {"type": span, "metavar": "S", "help": "for running tasks (10)"},
        "--logs": {"choices": ("all", "error")},
    }


def _parser() -> Any:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:  # In one line.
            hint = f"; {_BEHIND}" if self.epilog == _BEHIND else ""
            usage = " ".join(self.format_usage().split())
            self.exit(USAGE, f"{self.prog}: {_plain(message)}{hint}; {usage}\n")

    parser = Parser(
        prog="taskpool.py", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Background jobs in one file: run Python functions later, elsewhere.",
    )  # fmt: skip
    about = "show it at work, on real files"
    parser.add_argument("--demo", action="store_const", dest="act", const=_demo, help=about)
    parser.add_argument("--version", action="version", version=f"taskpool {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    specs = _arguments()
    for name, (act, words, text, tell) in _COMMANDS.items():
        epilog = _BEHIND if " id" in words else None
        about = f"{text[:1].upper()}{text[1:]}."
        added = commands.add_parser(name, help=text, description=about, epilog=epilog)
        added.set_defaults(act=act, tell=tell, parser=added, watch=False, json=False)
        added.set_defaults(type=None, state=None, columns={*_TYPE_COLUMNS} - {"limits", "held"})
        for word in words.split():
            argument = word.rstrip("*?+")
            many: Any = {"nargs": word[-1]} if word != argument else {}
            added.add_argument(argument, **specs[argument], **many)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 for failure, 2 for usage."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # parse_args would not show the usage of the command.
        known = parser if options.command is None else options.parser
        known.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.act is None:
        parser.error("say what to do")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # A terminal that lacks a letter is no error.
            coding = "utf-8" if options.command == "metrics" else None  # As Prometheus asks.
            stream.reconfigure(encoding=coding, errors="backslashreplace")
    try:
        code = cast(int, options.act(options))
        if sys.stdout is not None:  # As under `>&-`.
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # Whoever read our output has enough of it: `| head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return OK if options.command in ("status", "web") else FAILURE
    except (TaskPoolError, OSError, ValueError) as error:
        print(f"taskpool.py: {_plain(str(error))}", file=sys.stderr)
        is_usage = options.command in ("add", "cron") and type(error) is ValueError
        return USAGE if is_usage else FAILURE


def _own_name() -> str:
    """The name by which tasks and your modules import this file."""
    return __spec__.name if __spec__ else os.path.splitext(os.path.basename(__file__))[0]


if __name__ == "__main__":
    if sys.argv[1:2] != ["run"]:
        sys.modules.setdefault(_own_name(), sys.modules["__main__"])  # Never imported twice.
        sys.exit(main())
    if not __spec__:
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # -I and -P leave it out.
    # Workers import this file by its name, and the master must have the same copy.
    sys.exit(__import__(_own_name(), fromlist=["main"]).main())
