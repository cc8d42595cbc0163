import random
import threading
import time

import pytest

from gpt2_core.errors import UserError
from gpt2_jax.distributed import _AgreedStop, own_gpus, visible_gpus

ALL = [["a", "b", "c", "d"]] * 4
BOUND = [["a"], ["b"], ["c"], ["d"]]


@pytest.mark.parametrize(
    ("of_host", "own"),
    [
        ([["a", "b", "c", "d"]], [None]),  # one process a host
        (ALL, [[0], [1], [2], [3]]),  # one a GPU, which all see
        (BOUND, [None] * 4),  # one a GPU, which alone it sees: --gpus-per-task=1
        ([["a", "b", "c", "d"]] * 2, [[0, 1], [2, 3]]),  # two processes share four
        ([["a", "b"], ["c", "d"]], [None, None]),  # --gpus-per-task=2
        ([[], []], [None, None]),  # no GPU, or none that can be named
    ],
)
def test_a_process_uses_its_share_of_what_it_sees(of_host, own):
    assert [own_gpus(of_host, place) for place in range(len(of_host))] == own


@pytest.mark.parametrize(
    ("of_host", "words"),
    [
        ([["a", "b", "c"]] * 2, "2 processes of this host see the same 3 GPUs and can't share them equally"),
        ([["a"]] * 2, "2 processes of this host see the same 1 GPUs"),
        ([["a", "b"], ["b", "c"]], "see some of the same GPUs and some different ones"),
    ],
)
def test_what_cannot_be_shared_is_an_error_in_all(of_host, words):
    for place in range(len(of_host)):
        with pytest.raises(UserError, match=words):
            own_gpus(of_host, place)


def test_gpus_are_named_alike_whatever_numbers_a_process_sees_them_by(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU-a\\nGPU-b\\nGPU-c\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert visible_gpus({}) == ["GPU-a", "GPU-b", "GPU-c"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,0"}) == ["GPU-c", "GPU-a"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-b"}) == ["GPU-b"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    program.unlink()
    assert visible_gpus({}) == []


class Store:
    """What the processes of these tests share instead of JAX's coordination service."""

    def __init__(self, count):
        self.count, self.news = count, {}

    def process(self, index):
        process = type("Process", (), {})()
        process.count, process.index = self.count, index
        process._set = lambda key, value: self.news.__setitem__(key.removeprefix("news/"), value)
        return process


@pytest.mark.parametrize("seed", range(20))
def test_all_processes_stop_at_the_same_place_wherever_each_is(seed):
    """Each process asks at its own speed; one or more are told at a moment of their own."""
    moments = random.Random(seed)
    count = moments.choice([2, 3, 5])
    store = Store(count)
    stops = [_AgreedStop(store.process(index)) for index in range(count)]
    places = [None] * count
    over = threading.Event()

    def ask(index, seconds):
        place = 0
        while not stops[index]:
            place += 1
            time.sleep(seconds)
        places[index] = place
        assert stops[index]  # and it stays so

    def watch(index, seconds):
        while not over.is_set():
            stops[index].exchange(dict(store.news))
            time.sleep(seconds)

    speeds = [moments.choice([0.001, 0.003, 0.01]) for _ in range(count)]
    asking = [threading.Thread(target=ask, args=(index, speed)) for index, speed in enumerate(speeds)]
    watching = [
        threading.Thread(target=watch, args=(index, moments.choice([0.001, 0.02])), daemon=True)
        for index in range(count)
    ]
    for thread in asking + watching:
        thread.start()
    time.sleep(moments.random() * 0.05)
    for index in moments.sample(range(count), moments.choice([1, count])):
        stops[index].tell("SIGTERM")
    for thread in asking:
        thread.join(timeout=20)
    over.set()
    assert None not in places and len(set(places)) == 1
