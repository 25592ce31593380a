"""Which processes of a job are still there, so that no wait for one that is gone is for long.

A collective ends by itself only for those that wait for the lost rank, and only with gloo. Others
wait for one that waits, for a key of a store, or inside of NCCL, until the timeout of a collective.
So each rank holds a connection to the next one, around all of them. The kernel closes it with the
process, however that ends, and no thread of Python's need run for that; where a machine goes down
its probes do. Who sees it tells the next one, and so on both ways round:

    rank 0 ——— rank 1 ——— rank 2 ——— rank 3 ——— rank 0
                 |         gone        |
      tells 0 <—— sees it     sees it ——> tells 0

A rank that hears of it and is in a run has `GRACE` seconds to leave it. Then it says what it waits
for and whom it has lost, and ends.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import warnings
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

GRACE = 30.0
"""Seconds in which a rank may leave a run by itself once another is gone: callbacks may do so much
as send their logs, and torchrun waits as long for those that it ends."""
_REACH = 10.0
"""Seconds in which the next rank must answer."""
_PROBES = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
"""Seconds without a word after which a machine is probed, between probes, and their number."""
_AT_ONCE = 1 << 16
_WELCOME = b"ok\n"
"""What a rank answers one that knows its token."""


class Gone(NamedTuple):
    """A rank that is not there any more.

    Attributes:
        who: its rank, process and host, and what is known of its end.
        run: that it has left, by number.
        ever: whether it is gone for all later runs as well.
    """

    who: str
    run: int
    ever: bool

    def is_missed_in(self, run: int) -> bool:
        """Whether a run cannot do without it."""
        return run == self.run or (self.ever and run > self.run)


class _Neighbour:
    """A rank that this one has a connection to.

    Args:
        connection: that is open.
        rank: of the other one.
        who: it is, in words.

    Attributes:
        run: the last that it has ended well.
    """

    def __init__(self, connection: socket.socket, rank: int, who: str) -> None:
        self.connection, self.rank, self.who = connection, rank, who
        self.run = 0
        self._read = b""

    def messages(self) -> list[dict[str, Any]] | None:
        """What it has said since; None if it is gone."""
        try:
            found = self.connection.recv(_AT_ONCE)
        except OSError:
            found = b""
        if not found:
            return None
        *lines, self._read = (self._read + found).split(b"\n")
        return [json.loads(line) for line in lines]

    def tell(self, message: dict[str, Any]) -> None:
        """Say something, if it is there to hear it."""
        with suppress(OSError):
            _send(self.connection, message)


class Presence:
    """Knows when another process of the job is gone. Every rank must make one, at the same place.

    Args:
        timeout: for which a rank waits for the next one to come here.

    Raises:
        RuntimeError: it did not come.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._token = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._gone: list[Gone] = []
        self._run = 0
        self._is_in_run = False
        self._since = 0.0
        self._neighbours: list[_Neighbour] = []
        self._server = _listen()
        self._awake, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._selector.register(self._awake, selectors.EVENT_READ)
        store = dist.PrefixStore("dhellam/presence", _get_default_store())
        host = socket.gethostname()
        card = {
            "addresses": _addresses(host),
            "port": self._server.getsockname()[1],
            "token": self._token,
            "who": f"rank {self._rank} (process {os.getpid()} on {host})",
        }
        self._who = str(card["who"])
        self._thread = threading.Thread(target=self._watch, name="presence", daemon=True)
        self._thread.start()
        _made.append(self)
        store.set(str(self._rank), json.dumps(card))
        following = (self._rank + 1) % self._world
        store.wait([str(following)], timeout)
        self._reach(following, json.loads(store.get(str(following))))

    @property
    def lost(self) -> str | None:
        """Who is gone that this run cannot do without; None while all are there."""
        with self._lock:
            return next((gone.who for gone in self._gone if gone.is_missed_in(self._run)), None)

    def has_lost(self, seconds: float) -> bool:
        """Whether somebody has been gone for so long, of a run that this rank is in."""
        return self.lost is not None and time.monotonic() - self._since > seconds

    def enter(self, run: int) -> None:
        """A run begins, from the end of which on this rank waits for others no more."""
        with self._lock:
            self._run, self._is_in_run, self._since = run, True, time.monotonic()
        self._wake()

    def leave(self, why: str | None) -> None:
        """The run is over for this rank: well, or else for this reason, which others hear."""
        if not self._is_in_run:
            return
        self._is_in_run = False
        if why is None:
            message: dict[str, Any] = {"well": self._run}
        else:
            cause = self.lost or f"{self._who}, which has left the run by {why}"
            message = Gone(cause, self._run, ever=False)._asdict()
        for neighbour in self._others():
            neighbour.tell(message)

    def close(self) -> None:
        """Watch no more, and close what is open."""
        self._is_in_run = False
        with suppress(OSError):
            self._waker.close()
        self._thread.join(_REACH)
        self.forget()

    def forget(self) -> None:
        """Close what is open in this process, as a child must that it has forked."""
        for one in (self._server, self._awake, self._waker, *self._connections()):
            with suppress(OSError):
                one.close()

    def _others(self) -> list[_Neighbour]:
        with self._lock:
            return [*self._neighbours]

    def _connections(self) -> list[socket.socket]:
        return [neighbour.connection for neighbour in self._neighbours]

    def _wake(self) -> None:
        with suppress(OSError):
            self._waker.send(b".")

    def _reach(self, rank: int, card: dict[str, Any]) -> None:
        """Connect to the next rank, by whichever of its addresses it answers."""
        for address in card["addresses"]:
            try:
                connection = socket.create_connection((address, card["port"]), _REACH)
            except OSError:
                continue
            _keep_alive(connection)
            hello = {"token": card["token"], "rank": self._rank, "who": self._who}
            with suppress(OSError):
                _send(connection, hello)
                if connection.recv(len(_WELCOME)):
                    connection.settimeout(None)
                    self._add(_Neighbour(connection, rank, card["who"]))
                    return
            connection.close()
        warnings.warn(
            f"{self._who} cannot reach {card['who']} at {card['addresses']}: if one of them is"
            " lost, the other may wait for as long as the timeout of the strategy",
            stacklevel=2,
        )

    def _add(self, neighbour: _Neighbour) -> None:
        with self._lock:
            self._neighbours.append(neighbour)
        self._selector.register(neighbour.connection, selectors.EVENT_READ, neighbour)
        self._wake()

    def _watch(self) -> None:
        while True:
            for key, _ in self._selector.select(self._left()):
                if key.data is not None:
                    self._listen_to(key.data)
                elif key.fileobj is self._server:
                    self._welcome()
                elif not self._awake.recv(_AT_ONCE):
                    return
            if self._left() == 0.0:
                self._end()

    def _left(self) -> float | None:
        """Seconds until this process must have left its run; None while none is lost."""
        if not self._is_in_run or self.lost is None:
            return None
        return max(0.0, self._since + GRACE - time.monotonic())

    def _welcome(self) -> None:
        """Let the rank before this one in: whoever knows the token."""
        with suppress(OSError, ValueError, KeyError):
            connection, _ = self._server.accept()
            connection.settimeout(_REACH)
            hello = json.loads(connection.recv(_AT_ONCE))
            if hello["token"] != self._token:
                connection.close()
                return
            connection.settimeout(None)
            _keep_alive(connection)
            connection.sendall(_WELCOME)
            self._add(_Neighbour(connection, hello["rank"], hello["who"]))

    def _listen_to(self, neighbour: _Neighbour) -> None:
        messages = neighbour.messages()
        if messages is None:
            self._selector.unregister(neighbour.connection)
            with self._lock:
                self._neighbours.remove(neighbour)
            neighbour.connection.close()
            who = f"{neighbour.who}, which was killed or has ended without a word"
            self._hear(Gone(who, neighbour.run + 1, ever=True), neighbour)
            return
        for message in messages:
            if "well" in message:
                neighbour.run = message["well"]
            else:
                self._hear(Gone(**message), neighbour)

    def _hear(self, gone: Gone, source: _Neighbour) -> None:
        """Remember who is gone, and tell the neighbour that has not said so, once."""
        with self._lock:
            if gone in self._gone:
                return
            if not any(other.is_missed_in(self._run) for other in self._gone):
                self._since = time.monotonic()
            self._gone.append(gone)
        for other in self._others():
            if other is not source:
                other.tell(gone._asdict())

    def _end(self) -> None:
        """Say what this process still waits for, and end it."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        where = "" if frame is None else f", in {frame.f_code.co_name} ({frame.f_code.co_filename})"
        # Not by `print`: the main thread may hold its lock, and waits.
        text = f"{self._who} has waited {GRACE:.0f} s{where} since it lost {self.lost}: it ends\n"
        os.write(2, text.encode())
        os._exit(1)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # known to the kernel, and switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _addresses(host: str) -> list[str]:
    """Where other machines may find this one: by what it has for talking to the first rank's."""
    found = [host]
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with suppress(OSError):
        family, kind, _, _, target = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            found.insert(0, probe.getsockname()[0])
    return found


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out that the other machine is down."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES:
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


_made: list[Presence] = []
"""Those of this process."""
_of_world: tuple[dist.ProcessGroup, Presence] | None = None
"""That of the processes which torch.distributed has now, and their group."""


def presence_of_world(timeout: timedelta) -> Presence | None:
    """The presence of all processes of torch.distributed, made once; None for a process alone.

    Every rank must call this. `timeout` and errors are as `Presence` has them.
    """
    global _of_world
    world = dist.group.WORLD
    assert world is not None, "torch.distributed must be initialised first"
    if _of_world is not None and _of_world[0] is not world:
        _of_world[1].close()
        _of_world = None
    if _of_world is None and dist.get_world_size() > 1:
        _of_world = world, Presence(timeout)
    return None if _of_world is None else _of_world[1]


def _in_child() -> None:
    """A process that this one has forked must not keep connections open that end with this one."""
    global _of_world
    _of_world = None
    for one in _made:
        one.forget()
    _made.clear()


os.register_at_fork(after_in_child=_in_child)
