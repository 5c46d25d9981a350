"""One process, and several over gloo: their place, and problems that end all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from llava_sp.common.processes import Processes, ReportedElsewhere


def test_places_from_the_environment(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert Processes.from_environment() == Processes(0, 1, 0) and Processes().is_main and not Processes().name
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    place = Processes.from_environment()
    assert place == Processes(3, 8, 1) and place.name == "process 3: " and not (place.is_main or place.is_local_main)
    for bad in ("", "x", "-1", "9" * 5000, "1.5"):
        monkeypatch.setenv("RANK", bad)
        with pytest.raises(ValueError, match=r"RANK is "):
            Processes.from_environment()
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(ValueError, match=r"RANK is 8 .* WORLD_SIZE \(8\)"):
        Processes.from_environment()


def test_one_process_needs_no_torch(repo):
    code = (
        "import sys; from llava_sp.common.processes import Processes\n"
        "with Processes.from_environment().group() as p, p.together(): assert p.from_main(7) == 7\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=repo).returncode == 0


def test_problems_of_one_process_are_raised():
    with pytest.raises(ValueError, match="mine"), Processes().together():
        raise ValueError("mine")
    with pytest.raises(ZeroDivisionError), Processes().together():
        raise ZeroDivisionError


SEVERAL = """
import sys
from llava_sp.common.processes import Processes, ReportedElsewhere
with Processes.from_environment().group() as processes:
    with processes.together():
        pass
    assert processes.from_main(processes.rank + 5) == 5
    try:
        with processes.together():
            if processes.rank == 1:
                raise OSError("the disk is full")
        sys.exit("nothing was raised")
    except ReportedElsewhere as error:
        assert processes.rank == 0 and str(error) == "the disk is full"
    except OSError as error:
        assert processes.rank == 1 and str(error) == "the disk is full"
"""


def test_a_problem_of_one_ends_the_block_on_all(repo):
    assert issubclass(ReportedElsewhere, ValueError)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "PYTHONPATH": str(repo), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SEVERAL], env={**shared, "RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=600)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
