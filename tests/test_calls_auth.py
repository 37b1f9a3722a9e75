"""Who a bearer token stands for."""

from __future__ import annotations

import hashlib

import pytest

from cacheserver.calls.auth import Authenticator
from cacheserver.errors import UnauthenticatedError
from cacheserver.model import Caller, Permission

SHOP = Caller("shop", frozenset({Permission.READ}))
BLOG = Caller("blog", frozenset({Permission.READ}))
ANYONE = Caller("anonymous", frozenset(Permission))


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


@pytest.fixture
def authenticator() -> Authenticator:
    return Authenticator([(digest("shop-token"), SHOP), (digest("blog-token"), BLOG)], anonymous=None)


@pytest.mark.parametrize(
    ("header", "caller"),
    [("Bearer shop-token", SHOP), ("bearer blog-token", BLOG), ("BEARER  shop-token ", SHOP)],
)
def test_a_token_names_its_caller(authenticator: Authenticator, header: str, caller: Caller) -> None:
    assert authenticator.authenticate({"authorization": header}) is caller


@pytest.mark.parametrize(
    "header",
    ["Bearer other", "Bearer", "Bearer ", "shop-token", "Basic shop-token", "", "Bearer Shop-token", "Bearer ü"],
)
def test_anything_else_is_turned_away_without_repeating_it(authenticator: Authenticator, header: str) -> None:
    with pytest.raises(UnauthenticatedError) as failure:
        authenticator.authenticate({"authorization": header})
    assert "token of one of" in str(failure.value)
    assert "other" not in str(failure.value)


def test_without_a_token_there_is_no_caller(authenticator: Authenticator) -> None:
    with pytest.raises(UnauthenticatedError, match="No token"):
        authenticator.authenticate({})


def test_without_callers_everyone_is_anonymous_whatever_token_they_send() -> None:
    authenticator = Authenticator([], anonymous=ANYONE)
    assert authenticator.authenticate({}) is ANYONE
    assert authenticator.authenticate({"authorization": "Bearer sk-anything"}) is ANYONE


def test_with_callers_an_unknown_token_is_not_anonymous() -> None:
    authenticator = Authenticator([(digest("shop-token"), SHOP)], anonymous=ANYONE)
    assert authenticator.authenticate({}) is ANYONE
    with pytest.raises(UnauthenticatedError):
        authenticator.authenticate({"authorization": "Bearer other"})


def test_a_token_names_its_caller_in_however_many_spellings_it_comes(authenticator: Authenticator) -> None:
    for spaces in range(2_500):
        assert authenticator.authenticate({"authorization": f"Bearer {' ' * spaces}shop-token"}) is SHOP
    assert len(authenticator._lately) <= 1_000
    assert authenticator.authenticate({"authorization": "Bearer blog-token"}) is BLOG
    assert authenticator.authenticate({"authorization": "Bearer shop-token"}) is SHOP
    with pytest.raises(UnauthenticatedError):
        authenticator.authenticate({"authorization": "Basic shop-token"})
