"""A wire between the processes of one run, beside JAX's own: who is there, what they agree on, why one of them ends.

Left to JAX, a process that ends with an error leaves the others in a sum for ever, or until its service ends them with
a stack dump. So process 0 (the `Hub`) holds a TCP connection to each of the others (a `Spoke`), and a thread at each
end listens. When a process ends with an error, the others print its line and end with its code, wherever they are; when
one is killed its connection breaks, and they end as well. Process 0 goes last, as JAX's service is in it.

Messages are JSON objects, one a line. Nothing that is received is executed.
"""

import abc
import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pwcrf_jax.runtime.errors import ConfigError

REFUSED, FAILED = 2, 1
LATE = 10.0  # seconds for which a process that ends waits for others that are still on their way
_ANSWER = 5.0  # seconds within which a process that is there answers
_LONGEST = 2**24  # bytes of a message
_LOST = "is gone (killed, out of memory, or its host is down); start all again"


Address = tuple[str, int]
Verdict = tuple[int, str]
"""The exit code and the line with which all processes end."""


class _Channel:
    """One end of a connection."""

    def __init__(self, sock: socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(_ANSWER)
        self._sock, self._file, self._sending = sock, sock.makefile("rb"), threading.Lock()

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError), self._sending:  # `receive` tells that the other end is gone
            self._sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next message; {} where the other end is gone, or is no process of ours."""
        try:
            line = self._file.readline(_LONGEST)
            message = json.loads(line) if line.endswith(b"\n") else {}
        except (OSError, ValueError):
            return {}
        return message if isinstance(message, dict) else {}

    def patient(self) -> None:
        """From here on the other end may be silent."""
        self._sock.settimeout(None)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class _Wire(abc.ABC):
    def __init__(self, index: int, processes: int):
        self.index, self.processes, self.host = index, processes, socket.gethostname()
        self._ending = threading.Lock()  # is held by the one thread that ends this process

    @abc.abstractmethod
    def agree(self, facts: dict[str, Any]) -> None:
        """Returns once all processes have called it with equal facts, {key: JSON value}. All must call it.

        Where they are not equal, process 0 raises a ConfigError that names the first key, the processes and their
        values; it ends the others with that line.
        """

    @abc.abstractmethod
    def done(self) -> None:
        """This process has done what it was for: that its connection breaks means nothing any more."""

    def end(self, code: int, line: str) -> NoReturn:
        """Ends all processes with a code; the others print the line, which this one has printed. Does not return."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is about to end this process
        self._tell(code, f"process {self.index} on {self.host}: {line}")
        self._leave(code)

    @abc.abstractmethod
    def _tell(self, code: int, line: str) -> None:
        """Tells the other processes, or the one that does, that this one ends."""

    def _ended(self, code: int, line: str) -> None:
        """Another process has ended, and so does this one, from the thread that was told of it."""
        if self._ending.acquire(blocking=False):
            os.write(2, f"error: {line}\n".encode())  # sys.stderr may be held by another thread
            self._pass_on(code, line)
            self._leave(code)

    def _pass_on(self, code: int, line: str) -> None:
        self._tell(code, line)

    def _leave(self, code: int) -> NoReturn:
        # Not sys.exit: JAX would wait for processes that do not come any more, and this may not be the main thread.
        if threading.current_thread() is threading.main_thread():
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
        os._exit(code)


class Hub(_Wire):
    """Process 0's end."""

    def __init__(self, processes: int, port: int = 0, token: str = ""):
        """Listens on a port (0: any) of this machine. token: what others must say, where a port alone could be wrong.

        Raises OSError: where it cannot.
        """
        super().__init__(0, processes)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
        self.port, self._token = self._server.getsockname()[1], token
        self._channels: dict[int, _Channel] = {}
        self._hosts = {0: self.host}
        self._heard: dict[int, queue.SimpleQueue] = {i: queue.SimpleQueue() for i in range(1, processes)}
        self._gone: set[int] = set()
        self._verdict: Verdict | None = None
        self._change = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def gather(self, seconds: float, **welcome: Any) -> None:
        """Waits for all other processes, and sends each a welcome.

        Raises ConfigError: some did not come.
        """
        with self._change:
            complete = self._change.wait_for(lambda: len(self._channels) == self.processes - 1, seconds)
        if not complete:
            missing = [str(i) for i in self._heard if i not in self._channels]
            raise ConfigError(
                f"process {', '.join(missing)} of {self.processes} did not come to port {self.port} within "
                f"{seconds:.0f} s; see what became of it, and start all at about the same time, with one --coordinator "
                "that they can reach"
            )
        for channel in self._channels.values():
            channel.send(welcome=welcome)

    def agree(self, facts: dict[str, Any]) -> None:
        every = {0: facts} | {i: heard.get() for i, heard in self._heard.items()}
        if line := difference(every, self._hosts):
            self._tell(REFUSED, line)
            raise ConfigError(line)
        for channel in self._channels.values():
            channel.send(agreed=True)

    def done(self) -> None:
        for channel in self._channels.values():
            channel.send(done=True)

    def _tell(self, code: int, line: str) -> None:
        """To all that are there or come within LATE seconds; waits until they have ended."""
        with self._change:
            self._verdict = self._verdict or (code, line)
            seconds = _ANSWER if len(self._channels) == self.processes - 1 else LATE
            for channel in self._channels.values():
                channel.send(end=self._verdict)
            self._change.wait_for(lambda: len(self._gone) == self.processes - 1, seconds)

    def _accept(self) -> None:
        while self._server.fileno() >= 0:
            with contextlib.suppress(OSError):  # of one that is gone again
                sock, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(_Channel(sock),), daemon=True).start()

    def _serve(self, channel: _Channel) -> None:
        """Listens to one that has come, until it is gone."""
        hello = channel.receive()
        index: Any = hello.get("process")  # some other program may say anything
        host: Any = hello.get("host")
        if hello.get("token") != self._token:  # some other program
            channel.close()
            return
        with self._change:
            new = self._verdict is None and len(self._channels) < self.processes - 1
            problem = self._verdict or self._problem(hello, new)
            if not problem:
                self._channels[index], self._hosts[index] = channel, host
                channel.send(heard=True)
                channel.patient()
                self._change.notify_all()
        if problem:
            channel.send(end=problem)
            channel.receive()  # nothing: it goes
        else:
            well = self._listen(index, channel)
        channel.close()
        with self._change:
            if new or self._verdict:
                self._gone |= {index} & self._heard.keys()
            self._change.notify_all()
        if problem and new:
            self._ended(*problem)
        elif not problem and not well and self._verdict is None:
            self._ended(FAILED, f"process {index} on {host} {_LOST}")

    def _listen(self, index: int, channel: _Channel) -> bool:
        """Until it is gone; whether it had said so before."""
        well = False
        while message := channel.receive():
            if "end" in message:  # in another thread, as this one is to see it go
                threading.Thread(target=self._ended, args=message["end"], daemon=True).start()
            elif "facts" in message:
                self._heard[index].put(message["facts"])
            well |= not {"end", "done"}.isdisjoint(message)
        return well

    def _problem(self, hello: Mapping[str, Any], new: bool) -> Verdict | None:
        """The verdict where a process that says hello cannot be one of the run, else None."""
        index: Any = hello.get("process")
        count, host = hello.get("processes"), hello.get("host")
        who = f"process {index} on {host}"
        if not new:
            return REFUSED, f"{who}: all {self.processes} processes of the run at port {self.port} are there already"
        if hello.get("end"):
            return hello["end"][0], f"{who}: {hello['end'][1]}"
        if count != self.processes:
            return REFUSED, (
                f"{who} was started with --num_processes={count}, process 0 on {self.host} with {self.processes}; "
                "give all the same"
            )
        if index in self._hosts or index not in self._heard:
            return REFUSED, (
                f"two processes were started with --process_id={index}, on {self._hosts.get(index)} and on {host}; "
                f"give each its own, from 0 to {self.processes - 1}"
            )
        return None


class Spoke(_Wire):
    """The end of a process other than 0."""

    def __init__(
        self,
        index: int,
        processes: int,
        addresses: Sequence[Address],
        seconds: float,
        token: str = "",
        end: Verdict | None = None,
    ):
        """Goes to process 0.

        addresses: (host, port) of process 0, those to try.
        end: that of a process which comes only to tell that it ends.

        Raises ConfigError: process 0 is not there within these seconds, or another program is.
        """
        super().__init__(index, processes)
        self._heard: queue.SimpleQueue = queue.SimpleQueue()
        self._answered, self._well = threading.Event(), False
        hello = dict(process=index, processes=processes, host=self.host, token=token, end=end)
        self._channel, answer = _meet(addresses, hello, seconds)
        if end:
            self._channel.close()
            return
        if "end" in answer:
            self._ended(*answer["end"])
        self._channel.patient()
        threading.Thread(target=self._listen, daemon=True).start()

    def gather(self) -> dict[str, Any]:
        """Waits for all others, and returns the welcome of process 0."""
        return self._heard.get()["welcome"]

    def agree(self, facts: dict[str, Any]) -> None:
        self._channel.send(facts=facts)
        self._heard.get()  # where they do not, the listening thread ends this process

    def done(self) -> None:
        self._channel.send(done=True)

    def _tell(self, code: int, line: str) -> None:
        self._channel.send(end=(code, line))
        self._answered.wait(LATE)

    def _pass_on(self, code: int, line: str) -> None:
        pass  # process 0 knows

    def _listen(self) -> None:
        while message := self._channel.receive():
            if "end" in message:
                self._answered.set()
                self._ended(*message["end"])
            elif "done" in message:
                self._well = True
            else:
                self._heard.put(message)
        self._answered.set()
        if not self._well:
            self._ended(FAILED, f"process 0 {_LOST}")


def _meet(addresses: Sequence[Address], hello: dict[str, Any], seconds: float) -> tuple[_Channel, dict[str, Any]]:
    """(channel, answer) of process 0."""
    since, stranger, why = time.monotonic(), None, ""
    while (passed := time.monotonic() - since) < (min(LATE, seconds) if stranger else seconds):
        for address in addresses:
            try:
                channel = _Channel(socket.create_connection(address, timeout=_ANSWER))
            except OSError as error:
                why = error.strerror or str(error)
                continue
            channel.send(**hello)
            if {"heard", "end"} & (answer := channel.receive()).keys():
                return channel, answer
            channel.close()
            stranger, since = address, since if stranger else time.monotonic()
        time.sleep(0.2)
    tried = ", ".join(f"{host}:{port}" for host, port in addresses)
    if stranger:
        raise ConfigError(
            f"what answers at {tried} is not process 0 of this run; end that program, or name another port"
        )
    raise ConfigError(
        f"process 0 did not answer at {tried} within {passed:.0f} s ({why}); see what became of it, and start all "
        "at about the same time"
    )


def difference(facts: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> str | None:
    """A sentence on the first key whose values are not the same in all processes; None: there is none.

    facts: {process: {key: JSON value}}; hosts: {process: name of its machine}.
    """
    told = {i: {key: json.dumps(value, sort_keys=True) for key, value in facts[i].items()} for i in sorted(facts)}
    known = dict.fromkeys(key for values in told.values() for key in values)
    keys = [key for key in known if len({values.get(key) for values in told.values()}) > 1]
    if not keys:
        return None
    groups: dict[str, list[str]] = {}
    for i, values in told.items():
        groups.setdefault(values.get(keys[0], "absent"), []).append(f"{i} on {hosts[i]}")
    named = lambda group: ", ".join(group[:3]) + (f" and {len(group) - 3} more" if group[3:] else "")
    said = "; ".join(f"{value[:200]} in process {named(group)}" for value, group in groups.items())
    others = f" (and in {', '.join(keys[1:4])}{', ...' if keys[4:] else ''})" if keys[1:] else ""
    return f"the processes differ in {keys[0]}: {said}{others}; start all with the same"
