"""Cron.next beside cronsim's, in turns in one run. Exit code 1 if it is not the faster one.

Prints microseconds per call, ours and cronsim's: to read a text anew and get its next run
("first": also with our caches emptied before each), and the next run alone. What must hold
is about the geometric means of common and of sparse texts, which are far from 1.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import sys
import time
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Callable
from zoneinfo import ZoneInfo

from cronsim import CronSim

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import taskpool
from taskpool import Cron

TEXTS = {
    "common": ("* * * * *", "*/5 * * * *", "0 * * * *", "30 2 * * *", "0 9 * * 1-5", "0 0 1 * *"),
    "sparse": ("0 0 29 2 *", "0 0 31 12 *", "0 0 * * 5#5", "0 12 31 12 MON"),
}
ZONES: tuple[tuple[str, tzinfo], ...] = (
    ("UTC", timezone.utc),
    ("Europe/Berlin", ZoneInfo("Europe/Berlin")),
)
ROUNDS, STARTS = 15, 40


def empty_caches() -> None:
    for cached in (taskpool._times, taskpool._month_kind, taskpool._clock_change):
        cached.cache_clear()


def seconds(work: Callable[[], object]) -> float:
    """CPU time, as others may be at work on this machine."""
    start = time.process_time()
    work()
    return time.process_time() - start


def ours_first(text: str, tz: str, starts: list[datetime]) -> None:
    for start in starts:
        empty_caches()
        Cron(text, tz).next(start)


def measure(text: str, tz: str, zone: tzinfo, starts: list[datetime]) -> list[float]:
    """Medians: we first, we anew, cronsim anew, our next, cronsim's next."""
    times: list[list[float]] = [[], [], [], [], []]
    cron = Cron(text, tz)
    for start in starts:
        assert cron.next(start) == next(CronSim(text, start)), (text, tz, start)
    for _ in range(ROUNDS):
        made = [CronSim(text, start) for start in starts]
        emptying = seconds(lambda: [empty_caches() for _ in starts])
        works = (
            lambda: ours_first(text, tz, starts),
            lambda: [Cron(text, tz).next(start) for start in starts],
            lambda: [next(CronSim(text, start)) for start in starts],
            lambda: [cron.next(start) for start in starts],
            lambda: [next(each) for each in made],  # noqa: B023 - Called in this round.
        )
        for number, work in enumerate(works):
            taken = seconds(work) - (emptying if number == 0 else 0.0)
            times[number].append(taken / len(starts) * 1e6)
    return [statistics.median(each) for each in times]


def main() -> int:
    chance = random.Random(7)
    slower = []
    print(f"{'us per call':36}{'first':>8}{'anew':>8}{'cronsim':>9}{'next':>9}{'cronsim':>9}")
    for tz, zone in ZONES:
        base = datetime(2024, 1, 1, tzinfo=timezone.utc)
        starts = [
            (base + timedelta(seconds=chance.randrange(3 * 365 * 86400))).astimezone(zone)
            for _ in range(STARTS)
        ]
        for kind, texts in TEXTS.items():
            logs = [[], [], []]  # type: list[list[float]]
            for text in texts:
                first, anew, sim_anew, ours, sim = measure(text, tz, zone, starts)
                print(
                    f"{kind:8}{tz:14}{text:14}{first:8.1f}{anew:8.1f}{sim_anew:9.1f}"
                    f"{ours:9.1f}{sim:9.1f}"
                )
                for log, ratio in zip(logs, (sim_anew / first, sim_anew / anew, sim / ours)):
                    log.append(math.log(ratio))
            means = [math.exp(statistics.fmean(log)) for log in logs]
            print(
                f"{kind:8}{tz:14}times faster: first {means[0]:.1f}, anew {means[1]:.1f}, "
                f"next {means[2]:.1f}"
            )
            slower += [f"{kind} {tz}"] * any(mean <= 1 for mean in means[1:])
    if slower:
        print(f"slower than cronsim: {', '.join(slower)}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
