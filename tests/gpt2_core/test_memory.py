import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_core.memory import host_memory, largest_fit, out_of_memory, peak_memory

numbers = st.integers(0, 10**6)


@given(fixed=numbers, each=st.integers(1, 10**6), below=st.integers(2, 5000), available=st.integers(0, 10**9))
def test_of_a_linear_need_the_very_largest_is_found_in_three_tries(fixed, each, below, available):
    tried = []

    def needed(n):
        tried.append(n)
        return fixed + each * n

    found = largest_fit(needed, available, below=below, needed_below=fixed + each * below)
    if fixed + each * below > available:  # or it wouldn't have been asked
        assert found == max(0, (available - fixed) // each if available >= fixed + each else 0)
        assert len(tried) <= 3


@given(bend=st.floats(0.5, 2.0), below=st.integers(2, 5000), share=st.floats(0.0, 0.99))
def test_of_any_growing_need_what_is_found_fits(bend, below, share):
    def needed(n):
        return math.floor(1e6 * n**bend)

    available = math.floor(share * needed(below))
    found = largest_fit(needed, available, below=below, needed_below=needed(below))
    assert found < below and (needed(found) <= available if found else needed(1) > available)


def test_the_sentence_names_what_was_typed_what_there_is_and_what_fits(make_config):
    config = make_config(batch_size=64, accumulation=2)

    def planner(sequences, accumulation):
        return 1_000_000_000 * (2 + sequences + (accumulation > 1))

    error = out_of_memory(config, planner, num_shards=4, available=7_000_000_000, device="H200")
    assert str(error) == (
        "out of memory: --batch_size 64 with --accumulation 2: 8 sequences of 16 tokens at once on each of 4 devices "
        "need about 11.0 GB, and there are 7.0 GB on H200; expected to fit: --batch_size 32 or --accumulation 4"
    )
    # In one part as many as 5 would fit; in several, 4.
    config = make_config(batch_size=20)
    error = out_of_memory(config, planner, num_shards=1, available=7_000_000_000, device="H200")
    assert str(error).endswith("expected to fit: --batch_size 5 or --accumulation 5")
    error = out_of_memory(config, planner, num_shards=1, available=2_000_000_000, device="H200")
    assert "not even one sequence fits" in str(error)


def test_this_machines_memory_is_what_it_has():
    pages = [line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()]
    total = next(int(words[1]) * 1024 for words in pages if words[0] == "MemTotal:")
    assert 0 < host_memory() <= total


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("123456789\n")
    (tmp_path / "memory.limit_in_bytes").write_text("max\n")
    monkeypatch.setattr("gpt2_core.memory.LIMITS", (*tmp_path.iterdir(), tmp_path / "missing"))
    assert host_memory() == 123456789


def test_a_process_counts_its_own_memory_and_not_that_of_the_process_that_started_it():
    block = b"1" * 400_000_000
    assert peak_memory() > len(block)
    program = "from gpt2_core.memory import *; print(peak_memory()); b = b'1' * 300_000_000; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 200_000_000 and after - before > 290_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(("keeps", "least", "most"), [(True, 0, 1000), (False, 40_000, 1_000_000)])
def test_memory_that_is_kept_is_not_mapped_anew(keeps, least, most):
    program = (
        "import ctypes, resource, threading; from gpt2_core.memory import keep_freed_memory\n"
        "ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)\n"  # PR_SET_THP_DISABLE: on some systems a page would be 2 MB
        f"if {keeps}: keep_freed_memory()\n"
        "def work(): b'1' * 200_000_000\n"  # 49,000 pages
        "def anywhere(): thread = threading.Thread(target=work); thread.start(); thread.join()\n"
        "work(); anywhere()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; work(); anywhere()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 2)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most
