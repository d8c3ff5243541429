"""Locks between machines, as an object in a bucket: who writes it first has it, until it is deleted or left alone.

A kernel's lock ends with its process, an object does not. So its holder writes it anew every `RENEWED` seconds, and
another process takes it over when that has not been done for `LEFT` seconds by its own clock, or at once where it sees
that the holder, on the same machine, is gone. Each of these names the generation that it replaces: of two that try, one
succeeds.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pwcrf_jax.runtime import buckets
from pwcrf_jax.runtime.errors import FileError

Say = Callable[[str], object]

RENEWED, LEFT = 15.0, 60.0
_ASKED = 2.0  # seconds between two looks at a lock that another holds


class Held(Exception):
    """Another process has it; the message says which."""


@contextlib.contextmanager
def held(url: str, lost: Say, say: Say, waits: str = "") -> Iterator[None]:
    """In here this process has the lock.

    lost: is called from a thread with the name of the process that took it over while this one was stopped or cut off.
    say: says a line.
    waits: a line to say where another has it, which is then waited for; "": that is refused.

    Raises:
      Held: another has it.
      FileError: it can be neither read nor written.
    """
    mine = json.dumps(_about() | {"token": secrets.token_hex(8)})
    generation = _taken(url, mine, waits, say)
    stop = threading.Event()
    renewal = threading.Thread(target=_renew, args=(url, mine, generation, stop, lost), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        stop.set()
        renewal.join(5)  # it may wait for a service that is gone; what it still writes has the condition not to
        with contextlib.suppress(FileError):  # it is left alone then
            found = _read(url)
            if found and found[1] == mine:
                buckets.delete(url, found[0])


def _taken(url: str, mine: str, waits: str, say: Say) -> str:
    """Generation of the lock, once it is this process'."""
    seen, since, watched = "", time.monotonic(), False
    while True:
        found = _read(url)
        generation, content = found or ("0", "")
        holder = _holder(content)
        if _lives(holder) and not waits:
            raise Held(holder["name"])
        if generation != seen:
            if watched and found and not waits:
                raise Held(holder.get("name", "unknown"))  # it is alive
            watched = watched or bool(seen)
            seen, since = generation, time.monotonic()
        left = not found or _is_gone(holder) or time.monotonic() - since > LEFT
        if left:
            try:
                return buckets.write_over(url, mine.encode(), generation)
            except FileExistsError:  # another was first, or it is ours, of a request that was sent twice
                if (found := _read(url)) and found[1] == mine:
                    return found[0]
                continue
        if not watched:
            watched = True
            say(waits or f"{url} is of {holder.get('name', 'unknown')}: looking whether that still runs, {LEFT:.0f} s")
        time.sleep(_ASKED)


def _renew(url: str, mine: str, generation: str, stop: threading.Event, lost: Say) -> None:
    while not stop.wait(RENEWED):
        try:
            generation = buckets.write_over(url, mine.encode(), generation)
        except FileExistsError:
            with contextlib.suppress(FileError):
                found = _read(url)
                if found and found[1] == mine:  # a request that was sent twice
                    generation = found[0]
                elif not stop.is_set():
                    lost(_holder(found[1] if found else "").get("name", "unknown"))
                    return
        except FileError:
            continue  # it may be reached later


def _read(url: str) -> tuple[str, str] | None:
    """(generation, content); None: nobody has it."""
    with contextlib.suppress(FileNotFoundError):
        generation = buckets.entry(url).generation
        content = buckets.read(url).decode(errors="replace")
        # What was read is of that generation: written in between, it would be of a later one.
        return (generation, content) if buckets.entry(url).generation == generation else _read(url)
    return None


def _about() -> dict[str, Any]:
    """Who this process is, for people and for processes on the same machine."""
    name = f"process {os.getpid()} on {socket.gethostname()}"
    return {"name": name, "machine": _machine(), "process": os.getpid(), "began": _began(os.getpid())}


def _machine() -> str:
    """The same for processes that see one another's numbers; "": not known."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _began(process: int) -> str:
    """When a process began, in ticks since the start of the machine; "": there is none."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{process}/stat") as file:
        state, *fields = file.read().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""


def _holder(content: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
        named = str(found["name"])
        return {**found, "name": named if named.isprintable() else "unknown"}
    except (ValueError, TypeError, KeyError):
        return {}


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether a holder is, or was, a process that could be seen from here."""
    return bool(_machine()) and holder.get("machine") == _machine() and isinstance(holder.get("process"), int)


def _lives(holder: dict[str, Any]) -> bool:
    return _is_here(holder) and _began(holder["process"]) == holder.get("began")


def _is_gone(holder: dict[str, Any]) -> bool:
    return _is_here(holder) and not _lives(holder)
