"""What every test gets: one thread, no network but this machine, and the hub switched off."""

from __future__ import annotations

import os
import socket

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

_LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


class NetworkBlockedError(Exception):
    """A test tried to leave this machine."""


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Connections end in an error, but those within this machine: several processes of one test may talk."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOOPBACK):
            raise NetworkBlockedError(f"a test connects to {address[0]}; tests run without a network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
