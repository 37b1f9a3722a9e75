"""Fixtures that all tests share."""

from __future__ import annotations

import pytest

from tests.fakes import FakeClock
from tests.servers import own_s3, own_valkey, s3_server, valkey_server

__all__ = ["own_s3", "own_valkey", "s3_server", "valkey_server"]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
