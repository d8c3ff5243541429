"""Several processes, one a host or one a device: JAX's multi-controller runtime.

Each process runs the same command, reads its own share of every batch and computes on its own devices; gradients are
summed over all of them. Process 0 writes checkpoints and logs. They agree on what they were started with before the
first step, and end together (`wire`).
"""

import argparse
import contextlib
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from pwcrf_jax.runtime import logs, wire
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.runtime.parallel import device_count

JOIN = 300  # seconds in which all processes must come
_ADDRESSES = 2048  # bytes in which process 0 says where it listens

_wire: wire.Hub | wire.Spoke | None = None  # to the other processes; None: there are none


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """--distributed, or --coordinator, --num_processes and --process_id; --heartbeat."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "One of several processes that JAX finds itself: on Cloud TPU, in SLURM, Open MPI, Kubernetes. "
        "Example: --distributed",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        "",
        "One of several processes, elsewhere: HOST:PORT of process 0. Example: --coordinator 10.0.0.2:29500 "
        "--num_processes 2 --process_id 1",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "With --coordinator: how many processes there are. Example: --num_processes 2",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "process_id",
        None,
        "With --coordinator: which of them this is, from 0. Example: --process_id 0",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "heartbeat",
        30,
        "Of several processes: seconds of silence after which one whose host is gone ends the others. "
        "Example: --heartbeat 60",
        lower_bound=5,
        flag_values=values,
    )


def start() -> None:
    """Joins the processes that the flags name; nothing where they name none. Before anything asks for devices.

    Waits for all of them, `JOIN` seconds at most. From then on they end together.

    Raises:
      ConfigError: flags that do not go together, a port that is in use, processes that do not come.
    """
    options = flags.FLAGS
    try:
        _check(options)
    except ConfigError as error:
        refuse(sys.argv, wire.REFUSED, str(error))
        raise
    if options.coordinator:
        _start_named(options)
    elif options.distributed:
        _start_found(JOIN)
    else:
        return
    device_count()
    logs.only_process(0)


def agree(facts: dict[str, Any] | Callable[[], dict[str, Any]]) -> None:
    """Returns once the facts, {key: JSON value}, are known to be the same in all processes. All must call it.

    facts: or a function that returns them, which one process alone does not call.

    Raises:
      ConfigError: they are not; it names the first key, the processes and their values.
    """
    if _wire:
        _wire.agree(facts() if callable(facts) else facts)


def several() -> bool:
    """Whether there are other processes, which end when this one does."""
    return _wire is not None


def done() -> None:
    """To be called at a good end; an end before is an accident to the other processes."""
    if _wire:
        _wire.done()


def end(code: int, line: str) -> None:
    """Ends all processes with a code, and does not return; returns where there are no others.

    line: says why, and is printed by the others.
    """
    if _wire:
        _wire.end(code, line)


def refuse(argv: Sequence[str], code: int, line: str) -> None:
    """Tells the other processes, which wait for this one or will, that it does not come; for `wire.LATE` seconds.

    argv: the command line; what is wrong with it may be anything.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("coordinator", "num_processes", "process_id", "distributed"):
        parser.add_argument(f"--{name}", f"-{name}", nargs="?", const="true", default="")
    given = parser.parse_known_args(argv[1:])[0]
    number = lambda text, default: int(text) if text.isdecimal() else default
    with contextlib.suppress(ConfigError, OSError):
        if given.coordinator and given.process_id:
            host, port = _address(given)
            index, processes = number(given.process_id, -1), number(given.num_processes, 1024)
            if index:
                wire.Spoke(index, processes, [(host, port)], wire.LATE, end=(code, line))
            else:
                wire.Hub(processes, port).end(code, line)
        elif given.distributed == "true":
            _start_found(wire.LATE)
            end(code, line)


def _check(options: flags.FlagValues) -> None:
    given = [name for name in ("num_processes", "process_id") if options[name].value is not None]
    if options.distributed and (options.coordinator or given):
        raise ConfigError("--distributed finds the processes by itself: give it alone, or --coordinator and its flags")
    if options.coordinator and len(given) < 2 or given and not options.coordinator:
        raise ConfigError("--coordinator, --num_processes and --process_id belong together: give all three")
    if options.coordinator:
        _address(options)
        if options.process_id >= options.num_processes:
            raise ConfigError(
                f"--process_id={options.process_id} must be below --num_processes={options.num_processes}: they "
                "count from 0"
            )


def _address(options: Any) -> tuple[str, int]:
    """(host, port) of --coordinator."""
    host, _, port = options.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator={options.coordinator} must be HOST:PORT, such as 10.0.0.2:29500")
    return host.strip("[]"), int(port)


def _start_named(options: flags.FlagValues) -> None:
    """The wire has the port that is named, and JAX's service one that is free: so what is missing is told in a line."""
    global _wire
    (host, port), index, number = _address(options), options.process_id, options.num_processes
    if number > 1 and index == 0:
        try:
            _wire = wire.Hub(number, port)
        except OSError as error:
            with contextlib.suppress(ConfigError):
                wire.Spoke(0, number, [("127.0.0.1", port)], 1)  # ends here where another process 0 has it
            raise ConfigError(
                f"--coordinator={options.coordinator}: process 0 cannot listen on port {port} "
                f"({os.strerror(error.errno or 0)}); end the program that has it, or name another port, in all "
                "processes"
            ) from None
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        _wire.gather(JOIN, port=port)
    elif number > 1:
        _wire = wire.Spoke(index, number, [(host, port)], JOIN)
        port = _wire.gather()["port"]
    named = f"{options.coordinator.rpartition(':')[0]}:{port}"
    _initialize(coordinator_address=named, num_processes=number, process_id=index)


def _start_found(seconds: float) -> None:
    """JAX knows where its service is, but does not say so: process 0 tells the others where the wire is."""
    global _wire
    with _in_time(seconds):
        _initialize()
        try:
            device_count()
        except ConfigError as error:
            # Not by an exception: Python's end would wait for the others, which wait for the devices of this one.
            os.write(2, f"error: {error}\n".encode())
            os._exit(wire.REFUSED)
        index, number, token = jax.process_index(), jax.process_count(), secrets.token_hex(16)
        if number == 1:
            return
        hub = wire.Hub(number, token=token) if index == 0 else None
        about = json.dumps([_names(), hub.port, token]) if hub else ""
        sent = np.frombuffer(about.encode().ljust(_ADDRESSES), np.uint8)
        names, port, token = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))))
    if hub:
        _wire = hub
        hub.gather(seconds)
    else:
        _wire = wire.Spoke(index, number, [(name, port) for name in names], seconds, token)
        _wire.gather()


def _initialize(**named: Any) -> None:
    try:
        # A limit of JAX's own ends in a stack dump; ours comes before it.
        heartbeat: Any = flags.FLAGS["heartbeat"].value  # or its default, where flags are not read yet
        jax.distributed.initialize(**named, heartbeat_timeout_seconds=heartbeat, initialization_timeout=2 * JOIN)
    except ValueError as error:  # of --distributed where there is no cluster
        raise ConfigError(
            f"--distributed: JAX finds no cluster here ({str(error).splitlines()[0]}); name the processes with "
            "--coordinator, --num_processes and --process_id"
        ) from None
    except RuntimeError as error:  # its port is in use
        raise ConfigError(
            f"JAX cannot connect the processes ({' '.join(str(error).split())}); start all again"
        ) from None


@contextlib.contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    """Ends this process with a line where what is done in here takes longer: it waits for others in C++."""

    def give_up() -> None:
        os.write(2, f"error: not all processes came within {seconds:.0f} s; see what became of the others\n".encode())
        os._exit(wire.REFUSED)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _names() -> list[str]:
    """Names and addresses by which other machines may know this one."""
    names = [socket.getfqdn(), socket.gethostname()]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("192.0.2.1", 9))  # sends nothing; tells the address of the interface to elsewhere
        names.append(sender.getsockname()[0])
    with contextlib.suppress(OSError):
        names += [str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None)]
    return list(dict.fromkeys(names))[:10]
