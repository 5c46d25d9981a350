"""Chains of commands: order within a chain, never more at once than asked, a failure ends the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from llava_sp.shapes.chains import Chains, Command


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Modules `note` (appends start and end to a file), `fail` and `sleep` for `python -m`."""
    note = "import sys, time\nfor w in ('start', 'end'):\n open(sys.argv[1], 'a').write(f'{w} {sys.argv[2]}\\n'); time.sleep(.3)\n"
    (tmp_path / "note.py").write_text(note + "print('noted\\r', sys.argv[2])\n")
    (tmp_path / "fail.py").write_text("print('what went wrong'); raise SystemExit(3)\n")
    (tmp_path / "sleep.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def chain(folder, name, count=2):
    return [
        Command(f"{name}{i}", ["-m", "note", str(folder / "notes"), f"{name}{i}"], folder / f"{name}{i}.log")
        for i in range(count)
    ]


@pytest.mark.parametrize("jobs", (1, 2))
def test_all_run_in_order_and_no_more_at_once_than_asked(scripts, capsys, jobs):
    Chains(jobs, lambda: "; so far").run({name: chain(scripts, name) for name in "abc"})
    lines = [line.split() for line in (scripts / "notes").read_text().splitlines()]
    assert sorted(name for word, name in lines if word == "end") == ["a0", "a1", "b0", "b1", "c0", "c1"]
    at_once, most = 0, 0
    for word, _ in lines:
        at_once += 1 if word == "start" else -1
        most = max(most, at_once)
    assert most == jobs
    for name in "abc":
        assert lines.index(["end", f"{name}0"]) < lines.index(["start", f"{name}1"])
    shown = capsys.readouterr().out
    assert "== a: a0; so far" in shown and "  c | " in shown
    assert "noted" in (scripts / "b1.log").read_text()


def test_a_failure_ends_the_others_and_names_its_log(scripts, capsys):
    log = scripts / "fail.log"
    started = time.time()
    with pytest.raises(SystemExit) as stopped:
        Chains(2).run(
            {
                "a": [Command("waits", ["-m", "sleep"], scripts / "sleep.log")],
                "b": [Command("fails", ["-m", "fail"], log)],
            }
        )
    assert stopped.value.code == 3 and time.time() - started < 30
    shown = capsys.readouterr().err
    assert "ended with status 3" in shown and str(log) in shown and shown.count("error:") == 1
    assert log.read_text() == "what went wrong\n"


def test_each_command_gets_its_share_of_the_threads(scripts, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("llava_sp.shapes.chains.cores", lambda: 8)
    assert Chains(3).environment["OMP_NUM_THREADS"] == "2"
    assert Chains(16).environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert Chains(3).environment["OMP_NUM_THREADS"] == "5"


def test_ctrl_c_ends_all_and_says_one_line(scripts, repo, monkeypatch):
    """As a terminal sends it, to every process of the group."""
    (scripts / "ready.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    code = (
        "import signal, sys; from pathlib import Path; from llava_sp.common.command import run_command\n"
        "from llava_sp.shapes.chains import Chains, Command\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "chains = {name: [Command('waits', ['-m', 'ready'], Path(sys.argv[1]) / name)] for name in 'ab'}\n"
        "sys.exit(run_command(lambda: Chains(2).run(chains), on_interrupt='interrupted'))"
    )
    command = [sys.executable, "-c", code, str(scripts / "logs")]
    monkeypatch.setenv("PYTHONPATH", f"{repo}:{scripts}")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, **options)
    while not all((scripts / "logs" / name).is_file() for name in "ab"):
        time.sleep(0.02)
    seen = ""
    while seen.count("ready\n") < 2:
        seen += process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "\ninterrupted\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
