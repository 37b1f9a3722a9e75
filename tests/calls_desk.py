"""What both fronts stand on, over a whole cache: the reception of calls, and asking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cacheserver.calls.asking import Asking
from cacheserver.calls.auth import Authenticator
from cacheserver.calls.reception import Reception
from cacheserver.calls.sampling import Sampler
from cacheserver.interfaces import Prompts
from cacheserver.model import Caller, Namespace
from cacheserver.precheck import PromptPolicy
from cacheserver.recall import Recall
from tests.house import MODEL, House


@dataclass(frozen=True, slots=True)
class Desk:
    """Those who receive calls and ask for them."""

    reception: Reception
    asking: Asking
    recall: Recall


def desk(
    house: House,
    *,
    callers: Sequence[tuple[bytes, Caller]],
    anonymous: Caller | None,
    namespaces: Sequence[Namespace],
    max_concurrent_calls: int,
    policies: Mapping[str, PromptPolicy],
    prompts: Prompts | None,
    sampler: Sampler | None = None,
    gone: tuple[type[Exception], ...] = (),
) -> Desk:
    """As a service has them, over `house`."""
    recall = Recall()
    reception = Reception(
        authenticator=Authenticator(callers, anonymous=anonymous),
        books=house.books,
        clock=house.clock,
        max_in_progress=max_concurrent_calls,
        recall=recall,
    )
    asking = Asking(
        cache=house.cache,
        namespaces=(house.namespace, *namespaces),
        default_model=MODEL,
        books=house.books,
        clock=house.clock,
        policies=policies,
        prompts=prompts,
        sampler=sampler,
        gone=gone,
    )
    return Desk(reception, asking, recall)
