"""The processes of a run: how they begin, decide alike, and end together.

What they tell each other outside of compiled programs goes through JAX's coordination service, a store of keys that a
process of its own keeps (gpt2_jax.coordinator). In each process two threads watch: one reads twice a second what the
others have told, one learns from JAX's heartbeats which of them still run. A process that waits for a collective can't
be interrupted, so it is these threads that end a process when another has ended.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import jax

from gpt2_core.errors import STOPPED, Stopped, UserError, reason, report
from gpt2_core.runs.stop import StopRequest, stopped_by_signals
from gpt2_jax.launch import Place

CONNECT_SECONDS = 300
"""How long the processes wait for each other at the start."""
HEARTBEAT_SECONDS = 15
"""A process that sends no heartbeat for so long has ended. A thread of JAX sends them, whatever Python does."""
GRACE_SECONDS = 3
"""When another process has ended with an error, so long a process may take to raise the same one itself."""
CLOSING_SECONDS = 30
"""And so long to close what it has open, once it has raised it."""
_POLL_SECONDS = 0.5
_LOOKS_PER_SECOND = 1000
"""How often the service is asked by all processes together, while they wait for each other."""

T = TypeVar("T")


class Processes:
    """The processes of a run, as one of them sees them. This class is the run of one process; `joined` gives others."""

    count = 1
    index = 0
    on_this_host = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that logs, draws and writes."""
        return self.index == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process (something that JSON can hold), in all of them."""
        return make()

    def together(self, task: str, do: Callable[[], Any]) -> None:
        """Do what all must have done before any goes on; raises an error in all if it fails in one.

        `task` names one thing, once in a run.
        """
        do()

    def meet(self, name: str, task: str) -> None:
        """Return when all are here; raises RuntimeError if `task` has failed in one."""

    def stop_request(self) -> StopRequest:
        return StopRequest()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """A user error that leaves this block is this process's own: it has time to close what is open, whatever the
        others do meanwhile."""
        yield


ALONE = Processes()


@contextlib.contextmanager
def joined(place: Place | None) -> Iterator[Processes]:
    """The processes of a run, connected, for as long as the run lasts: call it before JAX's first use of a device.

    An error in the block ends this process here, after the others have been told. All but the first end here in any
    case: from then on the service may be gone, at which JAX's client would abort the process.
    """
    if place is None:
        yield ALONE
        return
    processes = _Several(place)
    _keep_stdout_from_libraries()
    try:
        with stopped_by_signals(processes.stop_request()):
            processes.connect()
            yield processes
            processes.leave()
    except (UserError, Stopped) as error:
        processes.end(report(error), str(error))
    except BrokenPipeError:  # the reader of the output has ended
        processes.end(1, "its output can't be written")
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError | _EndedElsewhere):
            processes.wait_until_ended()  # most likely the connection to a process that has ended
        traceback.print_exc()
        processes.end(1, f"{type(error).__name__}: {reason(error)}")
    if not processes.is_first:
        os._exit(0)


class _EndedElsewhere(RuntimeError):
    """Another process has ended, and what needs all of them can't be done any more."""


class _Several(Processes):
    def __init__(self, place: Place) -> None:
        self.count, self.index, self._address = place.processes, place.process_id, place.coordinator
        self._service: subprocess.Popen | None = None
        self._client: Any = None
        self._sent = 0
        self._stop = _AgreedStop(self)
        self._is_closing = self._is_leaving = False
        self._ended: str | None = None
        """Which other process has ended, and why."""
        self._living = self.count
        self._exiting = threading.Lock()

    def stop_request(self) -> StopRequest:
        return self._stop

    # --- begin and end

    def connect(self) -> None:
        """Find the other processes; raises UserError if they don't come."""
        # Not public, so a run of one process doesn't need them. jax.distributed.initialize would run the service here.
        from jax._src import distributed
        from jaxlib import _jax

        if self.is_first:
            self._service = _start_service(self._address, self.count)
        client = _jax.get_distributed_runtime_client(
            self._address,
            self.index,
            init_timeout=2 * CONNECT_SECONDS,  # at its own end it would abort the process
            heartbeat_timeout=HEARTBEAT_SECONDS,
            shutdown_on_destruction=False,
            use_compression=True,
        )
        connecting = ThreadPoolExecutor(1).submit(client.connect)
        deadline = time.monotonic() + CONNECT_SECONDS
        while not wait([connecting], timeout=_POLL_SECONDS).done:  # which a signal can interrupt
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {self.index} of {self.count} has waited {CONNECT_SECONDS} s at {self._address}, and not "
                    "all of the others have come; start them within that time, each with its own number, and with an "
                    "address of process 0 that all of them reach"
                )
        try:
            connecting.result()
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"process {self.index} can't join the others at {self._address} ({reason(error)})"
            ) from error
        self._client, state = client, distributed.global_state
        state.client, state.process_id, state.num_processes = self._client, self.index, self.count
        state.coordinator_address = self._address
        for watch in (self._watch_news, self._watch_heartbeats):
            threading.Thread(target=self._watching, args=(watch,), daemon=True).start()
        self._share_gpus()

    def _share_gpus(self) -> None:
        """Decide which of the GPUs that this process sees are its own."""
        mine = {"host": _host(), "gpus": [] if jax.config.jax_platforms == "cpu" else visible_gpus(os.environ)}
        try:
            self._set(f"host/{self.index}", json.dumps(mine))
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
            raise UserError(f"two processes have the number {self.index} (--process_id); give each its own") from error
        self.meet("hosts", "hosts")
        told = {int(name): json.loads(value) for name, value in self._dir("host/").items()}
        here = [told[number]["gpus"] for number in sorted(told) if told[number]["host"] == mine["host"]]
        self.on_this_host = len(here)
        place = sum(told[number]["host"] == mine["host"] for number in range(self.index))
        if (own := own_gpus(here, place)) is not None:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, own)))

    def leave(self) -> None:
        """Return when all have come to the end of the run, and need nothing of each other any more."""
        self.meet("leave", "leave")
        self._is_leaving = True
        self._end_service()

    def end(self, code: int, why: str) -> None:
        """End this process, and tell the others why."""
        self._is_leaving = True
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if self._client is not None and self._ended is None:
                self._set(f"news/ended/{self.index}", json.dumps({"code": code, "why": why}))
        self._exit(code)

    def wait_until_ended(self) -> None:
        """Wait for the thread that ends this process, as long as it may take to learn that another has ended."""
        time.sleep(2 * HEARTBEAT_SECONDS + GRACE_SECONDS)

    def _exit(self, code: int) -> None:
        self._exiting.acquire()  # never released: another thread that comes here waits for the end
        with contextlib.suppress(Exception):
            self._end_service()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what Python would wait for at its exit may never come: collectives of all processes

    def _end_service(self) -> None:
        """Let the service go when nobody needs it: a process whose client loses it is aborted by JAX."""
        if self._client is None:
            if self._service is not None:
                self._service.kill()
            return
        self._client.key_value_increment("left", 1)
        if self.is_first:
            deadline = time.monotonic() + GRACE_SECONDS + CLOSING_SECONDS
            while self._client.key_value_increment("left", 0) < self._living and time.monotonic() < deadline:
                time.sleep(0.05)
            self._client.shutdown()
            self._service.communicate("done\n")

    # --- what they tell each other

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(key, value)

    def _dir(self, folder: str) -> dict[str, str]:
        return {key.removeprefix(folder): value for key, value in self._client.key_value_dir_get(folder)}

    def from_first(self, make: Callable[[], T]) -> T:
        self._sent += 1
        if self.is_first:
            value = make()
            self._set(f"sent/{self._sent}/value", json.dumps(value))
            return value
        return json.loads(self._until(lambda: self._dir(f"sent/{self._sent}/").get("value")))

    def together(self, task: str, do: Callable[[], Any]) -> None:
        try:
            do()
        except _Failed:
            raise
        except Exception as error:
            self._set(f"failed/{task}/{self.index}", reason(error))
            raise
        self.meet(f"{task}/end", task)

    def meet(self, name: str, task: str, unless: Callable[[], bool] = lambda: False) -> None:
        def came() -> bool:
            if self._client.key_value_increment(f"met/{name}", 0) == self.count or unless():
                return True
            if failed := self._dir(f"failed/{task}/"):
                number, why = min(failed.items())
                raise _Failed(f"in process {number}: {why}")
            return False

        self._client.key_value_increment(f"met/{name}", 1)
        self._until(came)

    def _until(self, look: Callable[[], T | None]) -> T:
        """What `look` finds, when it does; raises _EndedElsewhere if another process ends before."""
        pause = 0.01
        while not (found := look()):
            if self._ended is not None:
                raise _EndedElsewhere(self._ended)
            time.sleep(pause)
            pause = min(2 * pause, max(0.02, self.count / _LOOKS_PER_SECOND))
        return found

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        try:
            yield
        except (UserError, Stopped):
            self._is_closing = True
            raise

    # --- the threads that watch

    def _watching(self, watch: Callable[[], None]) -> None:
        while not self._is_leaving:
            try:
                watch()
            except jax.errors.JaxRuntimeError:
                pass  # if the service is gone, JAX's own client ends the process
            except Exception as error:  # a run whose thread is gone would hang
                traceback.print_exc()
                self.end(1, f"{type(error).__name__}: {reason(error)}")
            time.sleep(_POLL_SECONDS)

    def _watch_news(self) -> None:
        news = self._dir("news/")
        self._stop.exchange(news)
        for key, value in sorted(news.items()):
            if key.startswith("ended/") and key != f"ended/{self.index}":
                ended = json.loads(value)
                how = f"process {key.removeprefix('ended/')} has ended: {ended['why']}"
                self._other_ended(how if ended["code"] == STOPPED else f"error: {how}", ended["code"])

    def _watch_heartbeats(self) -> None:
        everyone = list(range(self.count))
        # Returns when all that live have called it.
        live = self._client.get_live_nodes(everyone)
        if lost := sorted(set(everyone) - set(live)):
            self._living = len(live)
            time.sleep(2 * _POLL_SECONDS)  # one that has said why it ended is for the other thread
            how = f"error: process {lost[0]} is gone, or its host or network, without having said why"
            self._other_ended(f"{how}; continue with --resume", STOPPED)

    def _other_ended(self, how: str, code: int) -> None:
        """End this process, unless it is about to end itself."""
        if self._ended is None:
            self._ended = how
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline and not self._is_leaving:
                time.sleep(0.1)
            deadline = time.monotonic() + CLOSING_SECONDS
            while time.monotonic() < deadline and self._is_closing and not self._is_leaving:
                time.sleep(0.1)
            if not self._is_leaving:
                self._is_leaving = True
                os.write(2, f"{how} (this process, {self.index}, ends too)\n".encode())
                self._exit(code)


class _Failed(RuntimeError):
    """What all processes do has failed in one of them."""


class _AgreedStop(StopRequest):
    """Whether a signal to any process has told the run to stop: the same answer in all of them, without waiting.

    All processes ask in the same places, in the same order, and each counts them. When one is told to stop, the
    watching thread of each offers the number of the first place that it hasn't passed, and the run stops at the largest
    of these numbers. A process that comes to the place it has offered waits until that is known: for threads only, so
    it is known soon, whatever the processes are doing.
    """

    def __init__(self, processes: _Several) -> None:
        super().__init__()
        self._processes = processes
        self._lock = threading.Lock()
        self._passed = 0
        self._offered: int | None = None
        self._wished = False
        self._place: int | None = None
        self._known = threading.Event()
        self._results: list[Future[Any]] = []

    def __bool__(self) -> bool:
        with self._lock:
            here = self._passed
            if self._offered is None:
                self._passed += 1
                return False
        self._known.wait()
        self._passed += 1
        return here >= self._place

    def result(self, future: Future[T]) -> T:
        """As for one process; returns when all have theirs. One that went on to a collective couldn't be stopped."""
        while not self._done(future) and not self._is_here():
            pass
        if future not in self._results:
            self._results.append(future)
            self._processes.meet(f"result {len(self._results)}", "result", unless=self._is_here)
        self.check()
        return future.result()

    def _is_here(self) -> bool:
        """Whether the run is to stop at the place that is asked for next."""
        return self._known.is_set() and self._passed >= self._place

    def exchange(self, news: dict[str, str]) -> None:
        """Tell the others what this process was told, and learn from the `news` what they were."""
        processes, me = self._processes, self._processes.index
        if self._by is not None and not self._wished:
            self._wished = True
            processes._set(f"news/stop/{me}", self._by)
        wishes = {key.removeprefix("stop/"): by for key, by in news.items() if key.startswith("stop/")}
        if wishes and self._offered is None:
            with self._lock:
                self._offered = self._passed
            processes._set(f"news/place/{me}", str(self._offered))
        places = [int(value) for key, value in news.items() if key.startswith("place/")]
        if len(places) == processes.count and not self._known.is_set():
            self._place = max(places)
            self._wished = True
            by, first = next((by, number) for number, by in sorted(wishes.items()))
            self.tell(f"{by} to process {first}")
            self._known.set()


def _keep_stdout_from_libraries() -> None:
    """Gloo prints a line for every group of devices that it connects, in every process."""
    out = sys.stdout
    sys.stdout = open(  # noqa: SIM115
        os.dup(out.fileno()), "w", encoding=out.encoding, errors=out.errors, buffering=1 if out.line_buffering else -1
    )
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, out.fileno())
    os.close(nowhere)


# --- what a host has


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"


def visible_gpus(environment: os._Environ | dict[str, str]) -> list[str]:
    """The GPUs that this process sees, each by a name that is the same in all processes of the host."""
    try:
        query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return found
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return [found[int(name)] if name.isdigit() and int(name) < len(found) else name for name in names]


def own_gpus(of_host: Sequence[Sequence[str]], place: int) -> list[int] | None:
    """Which of the GPUs that it sees a process uses, as numbers among these; None: all.

    `of_host` are the GPUs that each process of this host sees, `place` is this one's. A scheduler may have given each
    process its own (srun --gpus-per-task), or all of them all, and then they share them equally.
    """
    mine = set(of_host[place])
    sharing = [number for number, seen in enumerate(of_host) if mine & set(seen)]
    if len(sharing) <= 1:
        return None
    if any(set(of_host[number]) != mine for number in sharing):
        raise UserError(
            "the processes of this host see some of the same GPUs and some different ones (CUDA_VISIBLE_DEVICES); let "
            "each see its own, or all of them all"
        )
    share, rest = divmod(len(mine), len(sharing))
    if rest or not share:
        raise UserError(
            f"{len(sharing)} processes of this host see the same {len(mine)} GPUs and can't share them equally; start "
            "one process on each host, or as many as it has GPUs"
        )
    first = sharing.index(place) * share
    return list(range(first, first + share))


def _start_service(address: str, processes: int) -> subprocess.Popen:
    """Start the coordination service at the port of `address`; raises UserError if it is taken."""
    port = address.rpartition(":")[2]
    linger = 2 * HEARTBEAT_SECONDS + GRACE_SECONDS + CLOSING_SECONDS
    arguments = (f"[::]:{port}", processes, HEARTBEAT_SECONDS, linger)
    service = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("coordinator.py")), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # or Ctrl-C would reach it
    )
    answer = service.stdout.readline().strip()
    if answer != "ready":
        raise UserError(
            f"port {port} of this host can't be listened at ({answer or 'the coordination service has ended'}); name "
            f"another port, or wait {linger} s if a process 0 was killed here"
        )
    return service


# --- a folder that all see


def check_shared(folder: Path, processes: Processes) -> None:
    """Raise UserError in a process that doesn't see a folder of the first one's."""
    if processes.count == 1:
        return
    name = processes.from_first(lambda: f".{secrets.token_hex(8)}.tmp")
    if processes.is_first:
        (folder / name).touch()
    processes.from_first(lambda: True)
    deadline = time.monotonic() + 10
    while not (folder / name).exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"--run_dir {folder}: process {processes.index} on {socket.gethostname()} doesn't see what process 0 "
                "writes there; name a folder on a file system that all hosts share"
            )
        time.sleep(0.1)
    processes.meet("shared", "shared")
    if processes.is_first:
        (folder / name).unlink()
