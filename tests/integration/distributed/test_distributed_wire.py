"""The wire between processes, both ends of it in this one: ends, losses, agreement, and who may join."""

import socket
import threading
import time

import pytest

from pwcrf_jax.runtime import wire
from pwcrf_jax.runtime.errors import ConfigError


def _lose(end):
    """As if its process were killed: its connections close, and nothing of it runs any more."""
    end._ending.acquire(blocking=False)
    if hasattr(end, "_server"):
        end._server.close()
    for channel in [*getattr(end, "_channels", {}).values(), *filter(None, [getattr(end, "_channel", None)])]:
        channel.close()


@pytest.fixture(autouse=True)
def left(monkeypatch):
    """{process: exit code} of those that ended: in place of the exit their connections are closed."""
    codes, made, init = {}, [], wire._Wire.__init__

    def leave(end, code):
        codes[end.index] = code
        _lose(end)
        threading.Event().wait()

    monkeypatch.setattr(wire._Wire, "_leave", leave)
    monkeypatch.setattr(wire._Wire, "__init__", lambda end, *args: (made.append(end), init(end, *args))[1])
    yield codes
    for end in made:
        end._leave = lambda code: None  # of threads that are still at it
        _lose(end)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(wire, "LATE", 0.5)
    monkeypatch.setattr(wire, "_ANSWER", 0.3)


def _join(processes):
    hub = wire.Hub(processes)
    ends = [hub, *(wire.Spoke(i, processes, [("127.0.0.1", hub.port)], 10) for i in range(1, processes))]
    hub.gather(10, port=7)
    assert [end.gather() for end in ends[1:]] == [{"port": 7}] * (processes - 1)
    return ends


def _background(call, *args):
    threading.Thread(target=call, args=args, daemon=True).start()


def _until(said):
    end = time.monotonic() + 30
    while not said():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("processes", "first", "code", "line"),
    [(2, 0, 2, "no room"), (2, 1, 2, "record 9"), (3, 2, 1, "not finite"), (4, 1, 130, "Ctrl-C"), (3, 0, 1, "ü\nx")],
)
def test_one_end_is_the_end_of_all(left, capfd, processes, first, code, line):
    ends = _join(processes)
    _background(ends[first].end, code, line)
    _until(lambda: len(left) == processes)
    assert left == dict.fromkeys(range(processes), code)
    assert capfd.readouterr().err == f"error: process {first} on {ends[0].host}: {line}\n" * (processes - 1)


def test_process_0_goes_last(left, monkeypatch):
    order, leave = [], wire._Wire._leave
    monkeypatch.setattr(wire._Wire, "_leave", lambda end, code: (order.append(end.index), leave(end, code)))
    ends = _join(4)
    _background(ends[2].end, 2, "refused")
    _until(lambda: len(left) == 4)
    assert order[-1] == 0


def test_two_that_end_at_once_keep_their_codes(left):
    ends = _join(3)
    _background(ends[1].end, 2, "refused")
    _background(ends[2].end, 2, "refused as well")
    _until(lambda: len(left) == 3)
    assert left == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize(("processes", "lost"), [(2, 0), (2, 1), (3, 0), (3, 2), (4, 1)])
def test_one_that_is_lost_ends_the_others(left, capfd, processes, lost):
    ends = _join(processes)
    _lose(ends[lost])
    _until(lambda: len(left) == processes - 1)
    assert left == {i: 1 for i in range(processes) if i != lost}
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == processes - 1
    assert all(f"process {lost} " in line and "is gone (killed, out of memory" in line for line in lines)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_connection_that_breaks_after_a_good_end_means_nothing(left, capfd, first):
    ends = _join(3)
    for end in ends:
        end.done()
    for end in ends[1:]:
        _background(end.agree, {})
    ends[0].agree({})  # so all have heard of it
    _until(lambda: all(end._well for end in ends[1:]))
    _lose(ends[first])
    time.sleep(0.2)
    assert not left and not capfd.readouterr().err


@pytest.mark.parametrize("processes", [2, 4])
def test_what_is_equal_is_agreed_on(left, processes):
    ends, facts = _join(processes), {"config.seed": 0, "config.crop": (1, 2), "none": None, "share": 0.1}
    for _ in range(3):
        for end in ends[1:]:
            _background(end.agree, dict(reversed(facts.items())))
        ends[0].agree(facts)
    assert not left


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ([{"config.seed": 0}, {"config.seed": 1}], "config.seed: 0 in process 0 on H; 1 in process 1 on H"),
        ([{"a": 1, "b": 2}, {"a": 1}], "b: 2 in process 0 on H; absent in process 1 on H"),
        ([{}, {"a": None}, {}], "a: absent in process 0 on H, 2 on H; null in process 1 on H"),
        ([{"a": (1, 2)}, {"a": [1, 2]}, {"a": [2, 1]}], "a: [1, 2] in process 0 on H, 1 on H; [2, 1] in process 2"),
        ([{"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 1}], "1 on H (and in b); start"),
        ([{"a": 1}, {"a": True}], "a: 1 in process 0 on H; true in process 1"),
        ([{"a": "x" * 10**6}, {"a": "y"}], "x in process 0 on H; "),
        ([{"a": 1}, *[{"a": 2}] * 5], "1 in process 0 on H; 2 in process 1 on H, 2 on H, 3 on H and 2 more; start"),
    ],
)
def test_what_differs_is_named_and_ends_all(left, capfd, facts, said):
    ends = _join(len(facts))
    for end, own in zip(ends[1:], facts[1:], strict=True):
        _background(end.agree, own)
    with pytest.raises(ConfigError) as error:
        ends[0].agree(facts[0])
    assert said.replace("on H", f"on {ends[0].host}") in str(error.value) and len(str(error.value)) < 800
    _until(lambda: len(left) == len(facts) - 1)  # process 0 has the exception
    assert set(left.values()) == {2}
    assert capfd.readouterr().err == f"error: {error.value}\n" * len(left)


def test_one_that_ends_before_it_agrees_ends_those_that_wait(left):
    ends = _join(3)
    _background(ends[0].agree, {})
    _background(ends[1].agree, {})
    _background(ends[2].end, 2, "no such data")
    _until(lambda: len(left) == 3)
    assert set(left.values()) == {2}


def test_those_that_do_not_come_are_named(quick):
    hub = wire.Hub(4)
    wire.Spoke(2, 4, [("127.0.0.1", hub.port)], 1)
    with pytest.raises(ConfigError, match="process 1, 3 of 4 did not come to port"):
        hub.gather(0.1)


def test_process_0_that_does_not_come_is_named(quick):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with pytest.raises(ConfigError, match=rf"did not answer at 127.0.0.1:{address[1]} within . s \(Connection refused"):
        wire.Spoke(1, 2, [address], 0.5)


@pytest.mark.parametrize(
    ("index", "processes", "said"),
    [
        (1, 3, "two processes were started with --process_id=1"),
        (0, 3, "two processes were started with --process_id=0"),
        (2, 4, "was started with --num_processes=4, process 0 on"),
        (3, 4, "was started with --num_processes=4, process 0 on"),
    ],
)
def test_those_that_do_not_go_together_end_all(left, quick, capfd, index, processes, said):
    hub = wire.Hub(3)
    wire.Spoke(1, 3, [("127.0.0.1", hub.port)], 5)
    _background(wire.Spoke, index, processes, [("127.0.0.1", hub.port)], 5)
    _until(lambda: {0, 1, index} <= left.keys())
    assert set(left.values()) == {2}
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all(said in line for line in lines)


def test_a_run_that_is_complete_turns_others_away_and_goes_on(left, capfd):
    ends = _join(2)
    _background(wire.Spoke, 5, 2, [("127.0.0.1", ends[0].port)], 5)
    _until(lambda: left)
    assert left == {5: 2} and "are there already" in capfd.readouterr().err
    _background(ends[1].agree, {})
    ends[0].agree({})


@pytest.mark.parametrize("before", [True, False])
def test_one_that_only_comes_to_tell_its_end(left, quick, capfd, before):
    """Whether it comes before those that are well or after them."""
    hub = wire.Hub(3)
    tell = lambda: wire.Spoke(1, 3, [("127.0.0.1", hub.port)], 5, end=(2, "config.stepz is no key"))
    if before:
        tell()
    _background(wire.Spoke, 2, 3, [("127.0.0.1", hub.port)], 5)
    if not before:
        _until(lambda: 2 in hub._channels)
        tell()
    _until(lambda: {0, 2} <= left.keys())
    assert set(left.values()) == {2}
    assert capfd.readouterr().err.count(f"process 1 on {hub.host}: config.stepz is no key\n") == 2


def test_process_0_tells_those_that_come_later(left, monkeypatch, capfd):
    hub = wire.Hub(3)
    _background(hub.end, 2, "--config is missing")
    for i in (1, 2):
        _background(wire.Spoke, i, 3, [("127.0.0.1", hub.port)], 5)
    _until(lambda: len(left) == 3)
    assert capfd.readouterr().err.count("process 0 on") == 2


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[]\n", b'{"token": "other"}\n', b"{" * 99]
)
def test_strangers_at_the_port_do_no_harm(left, quick, said):
    hub = wire.Hub(2)
    with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
        stranger.sendall(said)
        spoke = wire.Spoke(1, 2, [("127.0.0.1", hub.port)], 5)
        hub.gather(5)
        spoke.gather()
    assert not left


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\n", b"{}\n"])
def test_a_port_that_another_program_has(quick, answer):
    def serve():
        while True:
            connection, _ = server.accept()
            if answer is not None:
                connection.sendall(answer)
                connection.close()
            else:
                held.append(connection)

    held = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        _background(serve)
        with pytest.raises(ConfigError, match="is not process 0 of this run"):
            wire.Spoke(1, 2, [server.getsockname()], 60)
        with pytest.raises(OSError, match="in use"):
            wire.Hub(2, server.getsockname()[1])


def test_the_right_one_of_several_addresses_is_found(quick):
    with socket.create_server(("127.0.0.1", 0)) as other:
        hub = wire.Hub(2, token="ours")
        addresses = [other.getsockname(), ("127.0.0.1", hub.port)]
        spoke = wire.Spoke(1, 2, addresses, 60, token="ours")
        hub.gather(5)
        spoke.gather()
