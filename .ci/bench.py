"""How fast taskpool is beside its peers: `python .ci/bench.py [ROUNDS]`. Not a test.

Each number comes from a process of its own. The peers take turns in every round, as the
load of a machine changes; the table has the medians, and the medians of the ratios of
each round. Two workers each. It makes a virtual environment in a temporary folder.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from typing import Any

CI = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(CI))
PEERS = ["huey==3.5.4"] + ["tinyjobs==0.6.0"] * (sys.version_info >= (3, 11))
MEMORY, STORED, MANY, LATE, BIG = 20_000, 5_000, 50_000, 200, 200  # How many tasks.
ITEMS, CHUNK = 100_000, 64  # Of map.

HUEY = """
from huey import SqliteHuey
huey = SqliteHuey(filename="peer.db", results=False, fsync=False)

@huey.task()
def nothing():
    pass

add = nothing
path, left = "peer.db", "SELECT count(*) FROM task"

def work():
    huey.create_consumer(workers=2, worker_type="process", periodic=False, initial_delay=0.01,
                         max_delay=0.05, backoff=1.15).run()
"""

TINYJOBS = """
import asyncio
from tinyjobs import TinyJobs
app = TinyJobs("sqlite:///peer.db")

@app.task
def nothing():
    pass

add = nothing.enqueue
path = "peer.db"
"""


def nothing(job: Any = None) -> None:
    """The task of which only the queue's own work is seen."""


def echo(job: Any) -> Any:
    return getattr(job, "data", job)


def late(added: Any) -> float:
    """Seconds from before the call that added it to its start."""
    return time.time() - getattr(added, "data", added)


def rate(count: int, work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def futures(submit: Callable[[], Any]) -> float:
    """Tasks a second from the first submit() to the last result."""
    [result() for result in [submit() for _ in range(100)]]  # Workers have started.
    return rate(MEMORY, lambda: [result() for result in [submit() for _ in range(MEMORY)]])


def big(submit: Callable[[str], Any]) -> float:
    """Tasks a second that take a megabyte of text and return it."""
    text = "x" * 1_000_000
    [future.result() for future in [submit(text) for _ in range(20)]]
    return rate(BIG, lambda: [future.result() for future in [submit(text) for _ in range(BIG)]])


def double(item: Any) -> Any:
    return 2 * getattr(item, "data", item)


def mapped(map_: Callable[[range], Any], count: int = 5 * ITEMS) -> float:
    """Items a second of a few maps, to the last results."""
    list(map_(range(100 * CHUNK)))
    return rate(count, lambda: [list(map_(range(count // 5))) for _ in range(5)])


def latency(submit: Callable[[float], Any]) -> float:
    """Milliseconds until an idle worker starts a task. (Median)"""
    found = []
    for _ in range(LATE):
        time.sleep(0.002)
        found.append(submit(time.time()))
    return 1000 * statistics.median(found)


def measure_pool() -> dict[str, float]:
    import multiprocessing

    with multiprocessing.Pool(2) as pool:
        return {
            "memory": futures(lambda: pool.apply_async(nothing).get),
            "map": mapped(lambda items: pool.imap(double, items, CHUNK)),
            "map singly": mapped(lambda items: pool.imap(double, items), ITEMS),
        }


def measure_executor() -> dict[str, float]:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(2) as pool:
        started = latency(lambda at: pool.submit(late, at).result())
        return {
            "memory": futures(lambda: pool.submit(nothing).result),
            "map": mapped(lambda items: pool.map(double, items, chunksize=CHUNK)),
            "map singly": mapped(lambda items: pool.map(double, items), ITEMS),
            "big": big(lambda text: pool.submit(echo, text)),
            "latency in memory": started,
            "latency stored": started,
        }


def measure_taskpool() -> dict[str, float]:
    from taskpool import Cluster, TaskQueue

    queue = TaskQueue("taskpool.db")
    options: Any = {"keep_alive": "always", "auto_initialize": False, "logs": "error"}
    options.update(max_available_workers=2, oversubscribe=True)
    found: dict[str, float] = {}
    found["add"] = rate(STORED, lambda: [queue.add_task("nothing") for _ in range(STORED)])
    task_map = {"nothing": nothing, "late": late, "echo": echo, "double": double}
    dicts = [{"task_type": "nothing"}] * (MANY - STORED)
    found["add many"] = rate(len(dicts), lambda: queue.add_tasks(dicts))
    with Cluster(task_map, queue, **options) as cluster:
        cluster.initialize()
        while queue.count() > MANY * 0.98:  # Workers have started.
            time.sleep(0.001)
        left = queue.count()
        found["run"] = rate(left, cluster.drain)
        found["memory"] = futures(lambda: cluster.submit("nothing", in_memory=True).result)
        found["map"] = mapped(
            lambda items: cluster.map("double", items, in_memory=True, chunksize=CHUNK)
        )
        found["map singly"] = mapped(
            lambda items: cluster.map("double", items, in_memory=True), ITEMS
        )
        found["big"] = big(lambda text: cluster.submit("echo", text, in_memory=True))
        for name, in_memory in (("latency in memory", True), ("latency stored", False)):
            found[name] = latency(
                lambda at, here=in_memory: cluster.submit("late", at, in_memory=here).result()
            )
    return found


def claims(path: str, waiting: int) -> float:
    """Microseconds for claim and settle of one task while so many others wait. (Median)"""
    from taskpool import Outcome, SQLiteStore, _make_row

    store, now, found = SQLiteStore(path), time.time_ns() // 1000, []
    for task_type, count in (("nothing", waiting // 2), ("foreign", waiting // 2), ("nothing", 1000)):
        for start in range(0, count, 10_000):
            part = range(start, min(start + 10_000, count))
            store.add([_make_row(now, task_type) for _ in part], now)
    for _ in range(1000):
        started = time.perf_counter()
        (row,) = store.claim("bench", ["nothing"], 1, now)
        store.settle("bench", [Outcome(row.id, row.claim, "done")], now)
        found.append(1e6 * (time.perf_counter() - started))
    store.close()
    return statistics.median(found)


def measure_depth() -> dict[str, float]:
    """What many waiting tasks cost."""
    from taskpool import TaskQueue

    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096  # noqa: E731, SIM115
    queue, before = TaskQueue("memory.db"), resident()
    for _ in range(MANY * 4):
        queue.add_task("nothing", in_memory=True)
    found = {"bytes": (resident() - before) / (MANY * 4)}
    for waiting in (1_000, 100_000, 1_000_000):
        found[f"{waiting} waiting"] = claims(f"{waiting}.db", waiting)
    return found


def measure_store(source: str, name: str) -> dict[str, float]:
    """A peer with a SQLite file and a worker program of its own."""
    with open(f"{name}_app.py", "w") as file:
        file.write(source)
    sys.path.insert(0, ".")
    app = __import__(f"{name}_app")
    found = {"add": rate(STORED, lambda: [app.add() for _ in range(STORED)])}
    found["add many"] = rate(MANY - STORED, lambda: [app.add() for _ in range(MANY - STORED)])
    if name == "huey":
        command, left = [sys.executable, "-c", "import huey_app; huey_app.work()"], app.left
    else:
        command = [sys.executable, "-m", "tinyjobs", "worker", "--app", f"{name}_app:app"]
        command += ["--concurrency", "2"]
        left = "SELECT count(*) FROM jobs WHERE status IN ('queued', 'running')"
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with sqlite3.connect(app.path) as db:
        count = lambda: db.execute(left).fetchone()[0]  # noqa: E731
        while count() > MANY * 0.98:
            if worker.poll() is not None:
                raise RuntimeError(f"the worker of {name} ended")
            time.sleep(0.005)
        first = count()

        def wait() -> None:
            while count():
                time.sleep(0.005)

        found["run"] = rate(first, wait)
    worker.send_signal(signal.SIGINT)
    try:
        worker.wait(10)
    except subprocess.TimeoutExpired:
        worker.kill()
    return found


MEASURES: dict[str, Callable[[], dict[str, float]]] = {
    "taskpool": measure_taskpool,
    "multiprocessing.Pool": measure_pool,
    "ProcessPoolExecutor": measure_executor,
    "SqliteHuey, fsync off": lambda: measure_store(HUEY, "huey"),
    "tinyjobs": lambda: measure_store(TINYJOBS, "tinyjobs"),
    "taskpool, many waiting": measure_depth,
}
WHAT = {
    "memory": "in memory, submit to result, tasks/s",
    "map": f"in memory, map in chunks of {CHUNK} (by Pool imap), items/s",
    "map singly": "in memory, map one by one (by Pool imap), items/s",
    "big": "in memory, 1 MB of text there and back, tasks/s",
    "run": "stored tasks run, tasks/s",
    "add": "added one by one, tasks/s",
    "add many": "added by add_tasks (by the others one by one), tasks/s",
    "latency in memory": "until an idle worker starts, in memory, ms",
    "latency stored": "until an idle worker starts, stored (by the other in memory), ms",
    "bytes": "memory of a waiting task in memory, bytes",
    "1000 waiting": "claim and settle one of 1,000 waiting, us",
    "100000 waiting": "claim and settle one of 100,000 waiting, us",
    "1000000 waiting": "claim and settle one of 1,000,000 waiting, us",
}


def once(python: str, name: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="taskpool-bench-") as folder:
        command = [python, os.path.abspath(__file__), "--measure", name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        print(f"{name} failed:\n{done.stderr}", file=sys.stderr)
        return {}
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(rounds: int) -> None:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MEASURES}
    if len(PEERS) < 2:
        del found["tinyjobs"]
    with tempfile.TemporaryDirectory(prefix="taskpool-bench-") as folder:
        venv.create(folder, with_pip=True)
        python = os.path.join(folder, "bin", "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, *PEERS], check=True)
        for _ in range(rounds):
            for name in found:
                found[name].append(once(python, name))
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {rounds} rounds")
    for key, what in WHAT.items():
        ours = [one.get(key) for one in found["taskpool"]]
        print(f"\n{what}")
        for name, all_ in found.items():
            theirs = [one.get(key) for one in all_]
            ratios = [a / b for a, b in zip(ours, theirs) if a and b]
            if any(theirs):
                median = statistics.median(value for value in theirs if value)
                ratio = f"   taskpool / this {statistics.median(ratios):.2f}" if ratios else ""
                print(f"  {name:<24} {median:>12,.2f}{ratio}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(MEASURES[sys.argv[2]]()))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
