"""JAX's coordination service in a process of its own: python coordinator.py ADDRESS PROCESSES HEARTBEAT LINGER

Process 0 of a run starts it, and says "done" at the end. Inside process 0 it would die with it, and JAX's client in
every other process would then abort, with a stack trace; here it outlives process 0 for LINGER seconds, in which the
others learn that it is gone. Both times are in seconds.
"""

import os
import signal
import socket
import sys
import time


def main(address: str, processes: int, heartbeat: int, linger: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # schedulers send them to every process; process 0 says what to do
    # The service would share the port with another one that listens there, and each would get some of the connections.
    port, both = int(address.rpartition(":")[2]), socket.has_dualstack_ipv6()
    socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both).close()
    from jaxlib import _jax

    # Recoverable: what a failed process means for the others is decided by gpt2_jax.distributed, not by the service.
    service = _jax.get_distributed_runtime_service(
        address, processes, heartbeat_timeout=heartbeat, shutdown_timeout=linger, recoverable=True
    )
    print("ready", flush=True)
    if sys.stdin.readline() != "done\n":
        time.sleep(linger)
    service.shutdown()


if __name__ == "__main__":
    try:
        main(sys.argv[1], *map(int, sys.argv[2:]))
    except OSError as error:
        print(os.strerror(error.errno), flush=True)
        sys.exit(1)
