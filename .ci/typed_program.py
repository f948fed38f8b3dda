"""A user's program for `mypy --strict`. Each line that ignores an error is wrong on purpose:
mypy complains if it does not find that error."""

from __future__ import annotations

from datetime import timedelta

from taskpool import Cluster, Task, TaskFuture, TaskQueue

queue = TaskQueue("tasks.db")


@queue.task
def plain(job: Task) -> int:
    return job.attempt


@queue.task(name="mail", retries=3, retry_delay=timedelta(2), repeat="@daily", data={"to": "ann"})
def mail(job: Task, *, to: str, subject: str = "hello") -> str:
    return to + subject


@queue.task(retrys=3)  # type: ignore[call-overload, untyped-decorator]
def wrong(job: Task) -> None: ...


def main(cluster: Cluster, job: Task) -> None:
    length: str = mail(job, to="ann")  # Checkers see the undecorated function.
    number: str = plain(job)  # type: ignore[assignment]
    mail(job)  # type: ignore[call-arg]
    task = queue.add_task(mail, {"to": "ann"}, priority=2, if_exists="keep")
    queue.add_task("mail", if_exists="kep")  # type: ignore[arg-type]
    queue.add_task("mail", retrys=1)  # type: ignore[call-arg]
    queue.add_task("mail", timeout="5")  # type: ignore[arg-type]
    future: TaskFuture = cluster.submit(plain, 5, retries=1, due_date=timedelta(seconds=1))
    cluster.submit("mail", retrys=1)  # type: ignore[call-arg]
    list(cluster.map(plain, [1, 2], chunksize=2, buffersize=5, retries=1))
    cluster.map(plain, [1, 2], chunk=2)  # type: ignore[call-arg]
    cluster.submit("mail", connection=None)  # type: ignore[call-arg]
    print(length, number, future.task.id, future.result(timeout=5), task.due_date.isoformat())
    queue.find(state=["failed", "done"], task_type="mail", limit=5)
    queue.find(task_type=[mail, "x"], task_id=task, after=[task, "t"])
    queue.find(state="fialed")  # type: ignore[arg-type]
    queue.count(taskid="x")  # type: ignore[call-arg]
    queue.update(task.id, priority=3)
    queue.update(task.id, in_memory=True)  # type: ignore[call-arg]
    if task.state == "waitin":  # type: ignore[comparison-overlap]
        pass


if __name__ == "__main__":
    with Cluster(queue=queue, start_method="spawn", logs="error", keep_alive="always") as made:
        main(made, queue.find()[0])
    Cluster(queue=queue, start_method="spwan")  # type: ignore[arg-type]
    Cluster(queue=queue, logs="none")  # type: ignore[arg-type]
