"""The rpcs of AdminService about similar hits: messages in, `Oversight` asked, messages out."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import structlog

from cacheserver.calls.call import Call
from cacheserver.model import CacheKey, Namespace
from cacheserver.oversight import Oversight
from cacheserver.pb import admin_pb2 as pb
from cacheserver.rpc import admin_replies as replies
from cacheserver.rpc.admin import check_right, read_page
from cacheserver.rpc.messages import Problems

_log = structlog.get_logger(__name__)

_MAX_ID = 64

_NO_KEY = CacheKey("", b"", b"", 0)
"""What stands for a key that could not be read, until the problems are told."""


class AdminMatches:
    """BanMatch, SetSwitch, ListSwitches, ListMatches and ResolveMatch of AdminService."""

    def __init__(self, oversight: Oversight, *, namespaces: Iterable[Namespace]) -> None:
        self._oversight = oversight
        self.replace(namespaces)

    def replace(self, namespaces: Iterable[Namespace]) -> None:
        """From now on these are the namespaces."""
        self._namespaces = {namespace.name for namespace in namespaces}

    async def ban_match(self, message: pb.BanMatchRequest, call: Call) -> bytes:
        """Keep two pictures from answering for one another."""
        check_right(call)
        key, other = _read_pair(message, Problems())
        await self._oversight.ban(key, other)
        _log.info("match_banned", key=key.name, other_key=other.name, caller=call.caller.name)
        return pb.BanMatchResponse().SerializeToString()

    async def set_switch(self, message: pb.SetSwitchRequest, call: Call) -> bytes:
        """Turn similar hits off, or on again."""
        check_right(call)
        problems = Problems()
        if message.switch != pb.SWITCH_SIMILARITY:
            problems.add("switch", "must be SIMILARITY")
        if not message.HasField("on"):
            problems.add("on", "must be set")
        self._check_namespace(message.namespace, problems)
        problems.check()
        await self._oversight.switch_similarity(message.namespace, is_on=message.on)
        switch = pb.Switch.Name(message.switch)
        where = message.namespace or "everywhere"
        _log.info("switch_set", switch=switch, namespace=where, on=message.on, caller=call.caller.name)
        state = pb.SwitchState(switch=message.switch, namespace=message.namespace, on=message.on)
        return pb.SetSwitchResponse(state=state).SerializeToString()

    async def list_switches(self, _: pb.ListSwitchesRequest, call: Call) -> bytes:
        """What is switched off."""
        check_right(call)
        off = [
            pb.SwitchState(switch=pb.SWITCH_SIMILARITY, namespace=name, on=False)
            for name in self._oversight.similarity_off()
        ]
        return pb.ListSwitchesResponse(switches=off).SerializeToString()

    async def list_matches(self, message: pb.ListMatchesRequest, call: Call) -> bytes:
        """A page of the sample."""
        check_right(call)
        problems = Problems()
        self._check_namespace(message.namespace, problems)
        page = read_page(message.page_size, message.page_token, problems)
        found = await self._oversight.page(namespace=message.namespace or None, before=page.after, limit=page.size + 1)
        shown, token = page.cut(found, lambda each: each.id)
        return pb.ListMatchesResponse(matches=map(replies.match, shown), next_page_token=token).SerializeToString()

    async def resolve_match(self, message: pb.ResolveMatchRequest, call: Call) -> bytes:
        """Drop a similar hit from the sample, and ban it if it was wrong."""
        check_right(call)
        problems = Problems()
        if message.decision not in (pb.MATCH_DECISION_RIGHT, pb.MATCH_DECISION_WRONG):
            problems.add("decision", "must be RIGHT or WRONG")
        if not 0 < len(message.id) <= _MAX_ID:
            problems.add("id", "is not an id: pass one from ListMatches, unchanged")
        problems.check()
        match = await self._oversight.resolve(message.id, is_right=message.decision == pb.MATCH_DECISION_RIGHT)
        _log.info(
            "match_resolved",
            key=match.key.name,
            other_key=match.matched_key.name,
            caller=call.caller.name,
            decision=pb.MatchDecision.Name(message.decision),
        )
        return pb.ResolveMatchResponse(match=replies.match(match)).SerializeToString()

    def _check_namespace(self, name: str, problems: Problems) -> None:
        if name and name not in self._namespaces:
            problems.add("namespace", "is not a namespace of this service")


def _read_pair(message: pb.BanMatchRequest, problems: Problems) -> tuple[CacheKey, CacheKey]:
    key = _read_key(message.key, "key", problems)
    other = _read_key(message.other_key, "other_key", problems)
    problems.check()
    if key.partition != other.partition:
        problems.add("other_key", "is of another partition than key: the two never answer for one another")
    elif key.identity_name == other.identity_name:
        problems.add("other_key", "is of the same identity as key: its pictures are of one prompt")
    problems.check()
    return key, other


def _read_key(name: str, path: str, problems: Problems) -> CacheKey:
    key = _NO_KEY
    with suppress(ValueError):
        key = CacheKey.parse(name)
    if key is _NO_KEY or key.is_stand_in or key.is_rendition:
        problems.add(path, "is not a key: pass one that an answer or an explanation told, unchanged")
    return key
