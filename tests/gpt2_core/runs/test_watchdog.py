"""A process in which nothing finishes is ended, with the place where each thread is; one that goes on isn't."""

import subprocess
import sys

PROGRAM = """
import threading, time
from gpt2_core.runs.watchdog import watching

def held_up():
    threading.Event().wait()

threading.Thread(target=held_up, daemon=True).start()
with watching({seconds}) as watchdog:
    for _ in range({steps}):
        time.sleep(0.1)
        watchdog.progress()
    {then}
print("done", flush=True)
"""


def run(seconds, steps, then="pass"):
    code = PROGRAM.format(seconds=seconds, steps=steps, then=then)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_steps_that_take_less_are_left_alone():
    done = run(1.0, 15)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_without_a_timeout_nothing_is_watched():
    assert run(None, 1, "time.sleep(0.5)").returncode == 0


def test_a_process_that_hangs_is_ended_with_a_sentence_and_the_place_of_each_thread():
    done = run(0.5, 2, "time.sleep(30)")
    assert done.returncode == 75 and done.stdout == ""
    lines = done.stderr.splitlines()
    sentence = "nothing has finished for 0.5 s (--hang_timeout); continue with --resume"
    assert lines[0] == f"{sentence}. Where each thread is:" and lines[-1] == sentence
    assert "in held_up" in done.stderr and "in <module>" in done.stderr
