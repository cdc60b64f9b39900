"""The watchdog in a process of its own: it ends the process that it watches."""

import subprocess
import sys
import time

PROGRAM = """
import ctypes, threading, time
from llada_train.training import watchdog
watchdog.LINGER_SECONDS = 0.5

def hangs():
    time.sleep(60)

with watchdog.Watchdog(timeout_seconds=0.5, rank=3) as dog:
"""


def run(*lines: str) -> tuple[int, str, float]:
    """Exit code, stderr, and seconds, of a program that does this within the watchdog's block."""
    begin = time.monotonic()
    code = PROGRAM + "".join(f"    {line}\n" for line in lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stderr, time.monotonic() - begin


def test_a_hang_is_told_with_the_stacks_of_all_threads() -> None:
    code, errors, seconds = run(
        "threading.Thread(target=hangs, name='loader').start()", "dog.beat('step 7')", "time.sleep(60)"
    )
    assert code == 70 and seconds < 10
    lines = errors.splitlines()
    assert all(line.startswith("rank 3: ") for line in lines)
    assert "no progress for 0 s in step 7" in lines[0] or "no progress for 1 s in step 7" in lines[0]
    threads = [line for line in lines if line.startswith("rank 3: thread ")]
    assert sorted(threads) == ["rank 3: thread MainThread", "rank 3: thread loader"]
    assert 'rank 3:   File "<string>", line 7 in hangs' in lines


def test_progress_keeps_it_quiet_and_so_does_the_end() -> None:
    code, errors, seconds = run("for i in range(8):", "    dog.beat('step'); time.sleep(0.2)")
    assert (code, errors) == (0, "") and seconds > 1.6
    # The backstop is off as well: it would have come after 1.5 s.
    assert run("pass\ntime.sleep(2)\nif True:", "pass")[:2] == (0, "")


def test_a_hang_from_the_start_is_one_too() -> None:
    code, errors, _ = run("time.sleep(60)")
    assert code == 70 and " s in starting;" in errors


def test_a_hang_that_keeps_the_interpreters_lock_is_told_by_the_backstop() -> None:
    code, errors, seconds = run("ctypes.PyDLL(None).sleep(60)")
    assert code == 1 and seconds < 10
    assert "Timeout" in errors and 'File "<string>", line 10 in <module>' in errors


def test_what_breaks_while_it_tells_does_not_hide_the_hang() -> None:
    """As when another rank, which hangs too, has ended and the connection to it breaks."""
    code, errors, _ = run("time.sleep(0.7)", "raise RuntimeError('connection closed by peer')")
    assert code == 70 and "connection closed" not in errors


def test_a_mistake_is_told_as_ever() -> None:
    code, errors, _ = run("raise ValueError('mistake')")
    assert code == 1 and errors.endswith("ValueError: mistake\n")
