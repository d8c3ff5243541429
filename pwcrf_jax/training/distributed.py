"""Several processes, one a host or one a device: JAX's multi-controller runtime.

Each process runs the same command, reads its own share of every batch and computes on its own devices; gradients are
summed over all of them. Process 0 writes checkpoints and logs.
"""

import jax
from absl import flags

from pwcrf_jax.training import logs
from pwcrf_jax.training.config import ConfigError, device_count


def define_flags() -> None:
    """--distributed, or --coordinator, --num_processes and --process_id; --heartbeat."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "One of several processes that JAX finds itself: on Cloud TPU, in SLURM, Open MPI, Kubernetes. "
        "Example: --distributed",
    )
    flags.DEFINE_string(
        "coordinator",
        "",
        "One of several processes, elsewhere: HOST:PORT of process 0. Example: --coordinator 10.0.0.2:29500 "
        "--num_processes 2 --process_id 1",
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "With --coordinator: how many processes there are. Example: --num_processes 2",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "process_id",
        None,
        "With --coordinator: which of them this is, from 0. Example: --process_id 0",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "heartbeat",
        30,
        "Of several processes: seconds after which one that is gone ends the others. Example: --heartbeat 60",
        lower_bound=5,
    )


def start() -> None:
    """Joins the processes that the flags name; nothing where they name none. Before anything asks for devices.

    Waits for all of them, five minutes at most. A process that is lost later ends the others once it has been silent
    for --heartbeat seconds, with an error of JAX's own: a run is then started again as a whole, and goes on.

    Raises:
      ConfigError: flags that do not go together.
    """
    options = flags.FLAGS
    given = [name for name in ("num_processes", "process_id") if options[name].value is not None]
    if options.distributed and (options.coordinator or given):
        raise ConfigError("--distributed finds the processes by itself: give it alone, or --coordinator and its flags")
    if options.coordinator and len(given) < 2 or given and not options.coordinator:
        raise ConfigError("--coordinator, --num_processes and --process_id belong together: give all three")
    if not options.distributed and not options.coordinator:
        return
    named = {}
    if options.coordinator:
        host, _, port = options.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(f"--coordinator={options.coordinator} must be HOST:PORT, such as 10.0.0.2:29500")
        if options.process_id >= options.num_processes:
            raise ConfigError(
                f"--process_id={options.process_id} must be below --num_processes={options.num_processes}: they "
                "count from 0"
            )
        named = dict(
            coordinator_address=options.coordinator,
            num_processes=options.num_processes,
            process_id=options.process_id,
        )
    try:
        jax.distributed.initialize(**named, heartbeat_timeout_seconds=options.heartbeat)
    except ValueError as error:  # of --distributed where there is no cluster
        raise ConfigError(
            f"--distributed: JAX finds no cluster here ({str(error).splitlines()[0]}); name the processes with "
            "--coordinator, --num_processes and --process_id"
        ) from None
    device_count()
    logs.only_process(0)
