"""The runner without a model: sharding, batching by length, SIGKILL and resume, changing numbers of processes."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_sp.common.processes import Processes
from llava_sp.eval.base import Item
from llava_sp.eval.run.answer_log import AnswerLog, read_logs
from llava_sp.eval.run.runner import LOGS, MERGED, ahead, generate_answers, merge

FAKE = Path(__file__).with_name("fake.py")
_spec = importlib.util.spec_from_file_location("eval_fake", FAKE)
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


def run_all(output: Path, count: int, world: int = 1, batch_size: int = 4) -> bytes:
    items = fake.make_items(count)
    for rank in range(world):
        generate_answers(
            fake.Fake(),
            items,
            fake.Echo(),
            output,
            batch_size=batch_size,
            processes=Processes(rank, world, rank),
            progress=False,
        )
    merge(fake.Fake(), items, output, model_id="fake", settings_id="settings")
    return (output / MERGED).read_bytes()


@pytest.mark.parametrize("count", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_item_once_for_any_count_and_world(tmp_path, count, world):
    merged = run_all(tmp_path / "a", count, world)
    assert merged == run_all(tmp_path / "b", count)
    lines = [json.loads(line) for line in merged.decode().splitlines()]
    assert [line["question_id"] for line in lines] == [1000 + i for i in range(count)]
    logged = [json.loads(line) for path in (tmp_path / "a" / LOGS).iterdir() for line in path.open()]
    assert len(logged) == len({line["key"] for line in logged}) == count


def test_answer_lines_are_llavas(tmp_path):
    run_all(tmp_path, 2)
    line = json.loads((tmp_path / MERGED).read_text().splitlines()[0])
    assert list(line) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert line["metadata"] == {} and line["model_id"] == "fake" and line["text"].startswith("écho\nof question 0")


def test_batches_are_sorted_by_length_longest_first(tmp_path):
    items, echo = fake.make_items(20), fake.Echo()
    generate_answers(fake.Fake(), items, echo, tmp_path, batch_size=6, processes=Processes(), progress=False)
    assert [len(batch) for batch in echo.batches] == [6, 6, 6, 2]
    lengths = {item.key: len(item.text) for item in items}
    order = [lengths[key] for batch in echo.batches for key in batch]
    assert order == sorted(order, reverse=True)


def test_nothing_left_loads_no_model(tmp_path):
    first = run_all(tmp_path, 9, world=2)

    must_not_be_called = object()  # without `prepare` and `answer`
    for world in (1, 4):
        for rank in range(world):
            answered = generate_answers(
                fake.Fake(), fake.make_items(9), must_not_be_called, tmp_path,
                batch_size=4, processes=Processes(rank, world, rank), progress=False,
            )  # fmt: skip
            assert answered == 0
    merge(fake.Fake(), fake.make_items(9), tmp_path, model_id="fake", settings_id="settings")
    assert (tmp_path / MERGED).read_bytes() == first


def test_answers_of_other_settings_are_refused(tmp_path):
    items, log = fake.make_items(4), tmp_path / LOGS / "rank-00000.jsonl"

    def run(settings: str) -> int:
        about = {"settings": settings}
        return generate_answers(
            fake.Fake(), items, fake.Echo(), tmp_path, batch_size=2, processes=Processes(), progress=False, about=about
        )

    assert (run("a"), run("a")) == (4, 0)
    with pytest.raises(ValueError, match="rank-00000.jsonl, line 1 was answered with other settings"):
        run("b")
    with pytest.raises(ValueError, match="line 1 was answered with other settings"):
        merge(fake.Fake(), items, tmp_path, model_id="fake", settings_id="b")
    log.write_text('{"text": "no key"}\n')
    with pytest.raises(ValueError, match="rank-00000.jsonl, line 1 has no key; it has text"):
        run("a")


def test_other_images_under_the_same_names_are_refused(tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(b"1234")
    items = [Item(i, f"question {i}", (image,)) for i in range(3)]

    def run(count: int) -> int:
        return generate_answers(
            fake.Fake(),
            items[:count],
            fake.Echo(),
            tmp_path / "out",
            batch_size=2,
            processes=Processes(),
            progress=False,
        )

    assert run(2) == 2
    image.write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"question 0 was answered with images of \[4\] bytes, now they have \[5\]"):
        run(3)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_half_written_last_line_is_repaired(tmp_path, cut):
    whole = run_all(tmp_path / "whole", 10)
    run_all(tmp_path / "cut", 10)
    log = tmp_path / "cut" / LOGS / "rank-00000.jsonl"
    log.write_bytes(log.read_bytes()[:-cut])
    assert len(read_logs(log.parent)) == 9
    assert run_all(tmp_path / "cut", 10) == whole
    assert len(log.read_text().splitlines()) == 10


def test_half_line_of_a_process_that_no_longer_exists(tmp_path):
    whole = run_all(tmp_path / "whole", 10)
    run_all(tmp_path / "cut", 10, world=3)
    log = tmp_path / "cut" / LOGS / "rank-00002.jsonl"
    log.write_bytes(log.read_bytes()[:-5])
    assert run_all(tmp_path / "cut", 10, world=2) == whole


def test_same_command_twice_at_once_is_refused(tmp_path):
    with AnswerLog(tmp_path / LOGS / "rank-00000.jsonl"), pytest.raises(ValueError, match="written by another process"):
        run_all(tmp_path, 3)


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks(tmp_path, monkeypatch, capsys, reason):
    def flock(*_):
        raise OSError(reason, os.strerror(reason))

    whole = run_all(tmp_path / "whole", 5)
    monkeypatch.setattr(fcntl, "flock", flock)
    assert run_all(tmp_path / "out", 5, world=2) == whole
    assert capsys.readouterr().err.count("has no file locks") == 1


def test_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"cannot lock .*rank-00000.jsonl: Input/output error"):
        run_all(tmp_path, 3)


def test_merge_names_what_is_missing(tmp_path):
    items = fake.make_items(7)
    generate_answers(fake.Fake(), items[:2], fake.Echo(), tmp_path, batch_size=2, processes=Processes(), progress=False)
    with pytest.raises(ValueError, match=r"5 of 7 items lack an answer \(1002, 1003, 1004, \.\.\.\)"):
        merge(fake.Fake(), items, tmp_path, model_id="fake", settings_id="s")


def test_error_while_preparing_reaches_the_caller(tmp_path):
    class Bad(fake.Echo):
        def prepare(self, items):
            if len(self.batches) >= 1:
                raise ValueError("image 5 is broken")
            return items

    with pytest.raises(ValueError, match="image 5 is broken"):
        generate_answers(
            fake.Fake(), fake.make_items(40), Bad(), tmp_path, batch_size=4, processes=Processes(), progress=False
        )
    kept = len(read_logs(tmp_path / LOGS))
    assert kept >= 4 and kept % 4 == 0


def test_ahead_keeps_order_and_is_lazy():
    taken = []

    def values():
        for value in range(10):
            taken.append(value)
            yield value

    results = ahead(lambda value: value * value, values(), count=2)
    assert next(results) == 0
    assert len(taken) == 3
    assert [0, *results] == [value * value for value in range(10)]


def start(output: Path, count: int, seconds: float, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(FAKE.parents[2]), **environment}
    return subprocess.Popen([sys.executable, str(FAKE), str(output), str(count), "3", str(seconds)], env=environment)


def written(output: Path) -> int:
    """Bytes in the logs."""
    return sum(path.stat().st_size for path in (output / LOGS).glob("*"))


def test_killed_at_random_gives_the_same_file(tmp_path):
    count = 60
    whole = run_all(tmp_path / "whole", count, batch_size=3)
    output, rng, kills = tmp_path / "killed", random.Random(0), 0
    while True:
        before = written(output)
        process = start(output, count, 0.02)
        while process.poll() is None and written(output) == before:  # however long a slow machine takes to start
            time.sleep(0.01)
        try:
            assert process.wait(timeout=rng.random() * 0.4) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            assert kills < 100
    assert (output / MERGED).read_bytes() == whole
    logged = [json.loads(line)["key"] for path in (output / LOGS).iterdir() for line in path.open()]
    assert len(logged) == len(set(logged)) == count


def test_full_disk_is_reported_and_the_run_continues_later(tmp_path):
    """A limit of two blocks on the size of files stands for the full disk: the write fails in the middle of a line."""
    whole = run_all(tmp_path / "whole", 30, batch_size=3)
    output = tmp_path / "full"
    limited = f"ulimit -f 2; exec {sys.executable} {FAKE} {output} 30 3 0"
    environment = {**os.environ, "PYTHONPATH": str(FAKE.parents[2])}
    failed = subprocess.run(["bash", "-c", limited], env=environment, capture_output=True, text=True)
    assert failed.returncode != 0 and "cannot write" in failed.stderr and "continues from here" in failed.stderr
    assert 0 < len(read_logs(output / LOGS)) < 30
    assert run_all(output, 30, batch_size=3) == whole


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_world(output: Path, count: int, world: int, seconds: float = 0.0) -> list[subprocess.Popen]:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    return [start(output, count, seconds, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(world)]


def test_processes_killed_then_resumed_by_another_number(tmp_path):
    """Two gloo processes are killed in the middle; three finish the work; the file is that of one undisturbed process."""
    count = 90
    whole = run_all(tmp_path / "whole", count, batch_size=3)
    output = tmp_path / "killed"
    processes = start_world(output, count, 2, seconds=0.2)
    deadline = time.monotonic() + 600
    while len(read_logs(output / LOGS)) < 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 20 <= len(read_logs(output / LOGS)) < count
    assert [process.wait(timeout=600) for process in start_world(output, count, 3)] == [0, 0, 0]
    assert (output / MERGED).read_bytes() == whole


def test_a_rank_that_cannot_be(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="RANK is 5 in the environment"):
        Processes.from_environment()


def test_fewer_items_than_processes(tmp_path):
    whole = run_all(tmp_path / "whole", 1)
    assert [process.wait(timeout=600) for process in start_world(tmp_path / "many", 1, 3)] == [0, 0, 0]
    assert (tmp_path / "many" / MERGED).read_bytes() == whole
