"""A run on several processes ends with all of them: who loses one hears of it within seconds, and says which.

A process that died leaves the others waiting in a collective operation until its time limit, and what they then raise
says neither which process is gone nor why. So each process holds a connection to the first one. The system closes it
when a process ends, however it ends (an error, kill -9, out of memory), and the first process tells the others. Each
then says one sentence and ends with status 1. A process that ends by an error of its own says it in that sentence.
What is not noticed so is a machine that vanishes from the network; that ends at the process group's time limit.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rlhf.errors import LAST_WORDS, leave

GRACE = 3.0
"""Seconds that a process has to end by itself (by an error of its own, or by the same one) once another is gone."""
CONNECT = 60.0
"""Seconds in which the processes must have connected."""
DONE = b"done"
"""What a process says that ends in order."""


class Lifeline:
    """This process's connections: of the first one to all others, of each other one to the first.

    Args:
        connections: a connected socket for the rank of each.
        rank, world_size: of this process.
    """

    def __init__(self, connections: dict[int, socket.socket], rank: int, world_size: int) -> None:
        self.connections, self.rank, self.world_size = connections, rank, world_size
        self.lost: str | None = None
        self._ending = False
        self._done: set[int] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._hook = sys.excepthook
        sys.excepthook = self._uncaught
        LAST_WORDS.append(self.tell)
        threading.Thread(target=self._listen, daemon=True, name="lifeline").start()

    def tell(self, why: str) -> None:
        """Tell the others that this process ends, and why."""
        self._ending = True
        self._send(f"process {self.rank} of {self.world_size} ended: {why}".encode())

    def close(self) -> None:
        """End in order: what happens to this process from here on is no concern of the others'."""
        if not self._closed:
            self._closed = True
            self._send(DONE)
            self._let_go()

    def _let_go(self) -> None:
        if self.tell in LAST_WORDS:
            LAST_WORDS.remove(self.tell)
        if sys.excepthook == self._uncaught:
            sys.excepthook = self._hook

    def _send(self, message: bytes) -> None:
        with self._lock:
            for connection in self.connections.values():
                try:
                    connection.sendall(message.replace(b"\n", b" ") + b"\n")
                except OSError:
                    continue  # it has ended already

    def _listen(self) -> None:
        """Until every process is done, or one is gone."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in self.connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    if not self._heard(key.data, key.fileobj):
                        selector.unregister(key.fileobj)

    def _heard(self, rank: int, connection: socket.socket) -> bool:
        """Read what a process says; returns whether more may come from it."""
        try:
            said = connection.recv(65536)
        except OSError:
            said = b""
        lines = said.split(b"\n")[:-1]
        if DONE in lines:
            self._done.add(rank)
            lines.remove(DONE)
        if lines or (not said and rank not in self._done):
            self._end(lines[0].decode(errors="replace") if lines else self._gone(rank))
        return bool(said)

    def _gone(self, rank: int) -> str:
        return (
            f"process {rank} of {self.world_size} ended without a word (killed, or out of memory; its machine's "
            f"log may say which)"
        )

    def _end(self, why: str) -> None:
        """Another process is gone: pass it on, and end this one, unless it does so itself in time."""
        if self._closed:
            return
        self.lost = why
        if self.rank == 0:
            self._send(why.encode())
        time.sleep(GRACE)
        if not self._closed:
            if not self._ending:
                self._say()
            os._exit(1)

    def _say(self) -> None:
        print(
            f"error: {self.lost}; this process (rank {self.rank}) cannot go on without it", file=sys.stderr, flush=True
        )

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """An error that nothing caught: what a lost process leaves behind in this one, or an error of its own."""
        since = time.monotonic()
        while isinstance(error, RuntimeError) and self.lost is None and time.monotonic() - since < GRACE / 2:
            time.sleep(0.05)
        if self.lost is not None:
            self._say()
            sys.stdout.flush()
            os._exit(1)
        self._hook(kind, error, trace)
        self.tell(f"{kind.__name__}: {error}")
        leave(1)


def hold(rank: int, world_size: int, broadcast: Callable[[Any], Any]) -> Lifeline | None:
    """Connect the processes of a run; None where there is one alone.

    Args:
        broadcast: gives what the first process has to all of them.

    A process that can't be reached (a port that a firewall closes) is left out, with a note.
    """
    if world_size == 1:
        return None
    connections: dict[int, socket.socket] = {}
    try:
        if rank == 0:
            with socket.create_server(("", 0), backlog=world_size) as server:
                server.settimeout(CONNECT)
                broadcast((os.environ.get("MASTER_ADDR", "127.0.0.1"), server.getsockname()[1]))
                while len(connections) < world_size - 1:
                    connection, _ = server.accept()
                    connections[int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")] = connection
        else:
            connection = socket.create_connection(broadcast(None), timeout=CONNECT)
            connection.settimeout(None)
            connection.sendall(rank.to_bytes(4, "big"))
            connections[0] = connection
    except OSError as error:
        print(
            f"note: process {rank} has no connection to the others beside the process group's ({error}); should one of "
            f"them end, this is noticed only at the process group's time limit",
            file=sys.stderr,
            flush=True,
        )
    return Lifeline(connections, rank, world_size)
