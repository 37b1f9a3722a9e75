"""The rate limits of all replicas, in one place: each moment is reserved once, and what one learns all know."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from typing import Protocol

import structlog

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import run_script
from cacheserver.interfaces import Limits
from cacheserver.model import Amounts, CallReport, GroupLimits, RateLimit, Slot
from cacheserver.tiers.redis_client import Client

_log = structlog.get_logger(__name__)

_AWAY_S = 1.0
"""After a failure Redis is left alone for so long, so that not every call waits for the timeout."""
_MOST_TOLD = 10**9
_MOST_OWED = 1_000
_AT_ONCE = 24

_COMMON = """
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end
local limit = {}
for i = 1, 6 do limit[i] = tonumber(ARGV[1 + i]) end
local burst, usable = tonumber(ARGV[9]), 1 - tonumber(ARGV[10])
local amounts = {tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])}
local member = ARGV[14]

local s = setmetatable({factor = 1, low = 1, goal = 1, return_s = 45}, {__index = function() return 0 end})
local stored = redis.call('HGETALL', KEYS[1])
for i = 1, #stored, 2 do s[stored[i]] = tonumber(stored[i + 1]) end

local function text(number) return string.format('%.17g', number) end

local function is_only_found()
  return limit[1] + limit[2] + limit[3] + s.told1 + s.told2 + s.told3 == 0
end

local function per_minute()
  if is_only_found() then return {s.found, 0, 0} end
  local known = {}
  for i = 1, 3 do
    local told = s['told' .. i]
    known[i] = limit[i]
    if known[i] == 0 or (told > 0 and told < known[i]) then known[i] = told end
  end
  return known
end

local function units()
  local unit = per_minute()
  for i = 1, 3 do
    if unit[i] > 0 then unit[i] = 60 / (unit[i] * usable * s.factor) end
  end
  for i = 4, 6 do
    unit[i] = limit[i] > 0 and 86400 / (limit[i] * usable) or 0
  end
  return unit
end

local function costs()
  local cost = units()
  for i = 1, 6 do cost[i] = amounts[(i - 1) % 3 + 1] * cost[i] end
  return cost
end

local function slowest(cost) return math.max(cost[1], cost[2], cost[3]) end

local function factor()
  local most, calm = is_only_found() and 1000 or 1, math.max(0, now - s.resumed_at_s)
  if calm >= 600 then return most end
  local past_goal = calm / s.return_s - 1
  local height = past_goal < 0 and s.goal - s.low or s.goal
  return math.min(s.goal + height * past_goal * past_goal * past_goal, most)
end

local function turn_minute()
  if now - s.minute_at_s >= 120 then
    s.minute_at_s, s.minute_images, s.last_minute_images = now, 0, 0
  elseif now - s.minute_at_s >= 60 then
    s.minute_at_s, s.minute_images, s.last_minute_images = s.minute_at_s + 60, 0, s.minute_images
  end
end

local function uncount() s.minute_images = math.max(0, s.minute_images - amounts[1]) end

local function block(moment) s.blocked_until_s = math.max(s.blocked_until_s, moment) end

-- Keep the state, and tell it: the head, the time, then names and values.
local function answer(granted, start, running)
  local told, kept = {granted, text(start), running, text(now)}, {}
  for name, value in pairs(s) do
    kept[#kept + 1] = name
    kept[#kept + 1] = text(value)
  end
  redis.call('HSET', KEYS[1], unpack(kept))
  for _, value in ipairs(kept) do told[#told + 1] = value end
  return told
end
"""

_RESERVE = f"""{_COMMON}
local lease, spare = tonumber(ARGV[15]), tonumber(ARGV[16])
for i = 17, #ARGV do redis.call('ZREM', KEYS[2], ARGV[i]) end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', text(now))
local running = redis.call('ZCARD', KEYS[2])
if running >= tonumber(ARGV[8]) - spare then return answer(0, 0, running) end

s.factor = factor()
local cost = costs()
local start = math.max(now, s.blocked_until_s)
for i = 1, 6 do
  local size = i > 3 and 86400 or burst
  if cost[i] > 0 then start = math.max(start, s['tat_s' .. i] + cost[i] - math.max(size, cost[i])) end
end
for i = 1, 6 do
  if cost[i] > 0 then s['tat_s' .. i] = math.max(s['tat_s' .. i], start) + cost[i] end
end

s.calm = s.calm + 1
turn_minute()
s.minute_images = s.minute_images + amounts[1]
s.last_start_s = start
redis.call('ZADD', KEYS[2], text(start + lease), member)
return answer(1, start, running + 1)
"""

_RELEASE = f"""{_COMMON}
local start = tonumber(ARGV[15])
if redis.call('ZREM', KEYS[2], member) == 1 then
  local cost, is_of_now = costs(), start >= s.resumed_at_s
  local is_last = is_of_now and start >= s.last_start_s
  for i = 1, 6 do
    if is_last or i > 3 then s['tat_s' .. i] = s['tat_s' .. i] - cost[i] end
  end
  if is_of_now then s.calm = math.max(0, s.calm - 1) end
  uncount()
end
return answer(1, start, 0)
"""

_END = f"""{_COMMON}
local start, limited, retry_after = tonumber(ARGV[15]), ARGV[16] == '1', tonumber(ARGV[17])
local tokens, is_told, told_wait = tonumber(ARGV[18]), ARGV[19] == '1', tonumber(ARGV[23])
local images = tonumber(ARGV[24])
redis.call('ZREM', KEYS[2], member)

local function left(passed) return passed / (passed + 6) end

local function cut(cost)
  local passed = math.max(0, s.calm - 1)
  if cost > 0 then passed = math.min(passed, math.max(0, start - s.resumed_at_s) / cost) end
  s.low = math.max(s.factor * math.max(left(passed) * (1 - 0.1), 0.5), 0.02)
  if passed < 5 then
    s.goal = math.max(s.goal, s.factor)
    s.doublings = math.min(s.doublings + 1, 3)
  else
    s.goal = math.max(s.factor * left(passed + 40), 0.02)
    s.return_s = math.min(math.max(300 * (cost * s.factor / s.goal), 45), 300)
    s.doublings = 0
  end
end

local function refused()
  turn_minute()
  uncount()
  if retry_after then block(now + math.min(retry_after, 900)) end
  if start < s.resumed_at_s then return end
  s.factor = factor()
  if is_only_found() and (s.found == 0 or s.factor > 2 * s.goal) then
    s.found = math.max(10, s.minute_images + s.last_minute_images * (1 - (now - s.minute_at_s) / 60))
    s.low, s.goal, s.return_s = 1, 2, 60
  else
    cut(slowest(costs()))
  end
  s.factor = s.low
  local cost = costs()
  block(now + math.min(math.min(math.max(6 * slowest(cost), 0.25), 15) * 2 ^ s.doublings, 30))
  s.resumed_at_s, s.calm = s.blocked_until_s, 0
  for i = 1, 3 do
    s['tat_s' .. i] = math.max(s['tat_s' .. i], s.resumed_at_s + math.max(0, burst - cost[i]))
  end
end

local function correct(place, more)
  if more == 0 then return end
  local unit, by_day = units(), place + 3
  s['tat_s' .. by_day] = s['tat_s' .. by_day] + more * unit[by_day]
  if start >= s.resumed_at_s then s['tat_s' .. place] = s['tat_s' .. place] + more * unit[place] end
end

if images then
  correct(1, images - amounts[1])
  if not limited then s.minute_images = math.max(0, s.minute_images + images - amounts[1]) end
end
if tokens then correct(3, tokens - amounts[3]) end
if is_told and start >= s.told_at_s then
  for i = 1, 3 do
    local limit_told = tonumber(ARGV[19 + i])
    if limit_told > 0 then s['told' .. i] = limit_told end
  end
  s.told_at_s = start
end
if limited then
  refused()
elseif told_wait and start >= s.last_start_s then
  block(start + math.min(told_wait, 900))
end
return answer(1, start, 0)
"""


class LocalFallback(Limits, Protocol):
    """`Limits` of this process alone, which know what all replicas knew last."""

    def hold(self, slot: Slot, lease_s: float) -> None:
        """Count a slot of ours that was reserved elsewhere among those that run here."""
        ...

    def free(self, slot: Slot) -> bool:
        """Count it no more; whether it was counted."""
        ...

    def adopt(self, group: str, known: Mapping[str, float], *, now_s: float) -> None:
        """Take over what all replicas know of a group, its moments by a clock that stands at `now_s`."""
        ...

    def images_per_minute(self, group: str) -> float | None:
        """The pictures a minute that the group may make now, as learned; None without a limit."""
        ...


class RedisLimits:
    """`Limits` that all replicas share; while Redis is silent, this process works within its part of them.

    The law is that of `generation/limits.py`, in Lua, by the server's clock: one hash per group for what is known of
    it, one sorted set for the places that are taken and when their leases end. After Redis has failed once it is
    asked again a second later; until then, and for slots that were reserved meanwhile, `here` answers.
    """

    def __init__(  # noqa: PLR0913 - all by keyword
        self,
        *,
        client: Client,
        limits: Mapping[str, GroupLimits],
        here: LocalFallback,
        prefix: str,
        monotonic_s: Callable[[], float],
        timeout_s: float = 0.5,
    ) -> None:
        """`client` is closed by whoever made it; `prefix` is that of all our names in Redis.

        `limits` by group, the same that `here` has; a group without any has the default ones.
        """
        self._client = client
        self._limits = limits
        self._here = here
        self._prefix = prefix
        self._monotonic_s = monotonic_s
        self._timeout_s = timeout_s
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._away_until_s = float("-inf")
        self._is_away = False
        self._owed: dict[str, list[str]] = {}

    async def reserve(self, group: str, amounts: Amounts, *, lease_s: float, spare: int = 0) -> Slot | None:
        """Reserve the next moment at which `amounts` may be sent in `group`, and a place; None if none is free."""
        member = uuid.uuid4().hex
        owed = self._owed.pop(group, [])
        answer = None
        try:
            answer = await self._run(_RESERVE, group, amounts, member, repr(float(lease_s)), str(spare), *owed)
        finally:
            if answer is None:
                # It may have been reserved all the same, and nobody would ever end it.
                self._owe(group, *owed, member)
        if answer is None:
            return await self._here.reserve(group, amounts, lease_s=lease_s, spare=spare)
        granted, start_s, running, now_s = answer
        if not granted:
            return None
        slot = Slot(f"{_SHARED}{member}@{start_s!r}", group, amounts, start_s - now_s, int(running))
        self._here.hold(slot, lease_s)
        return slot

    async def release(self, slot: Slot) -> None:
        """Give a slot back unused."""
        if not slot.id.startswith(_SHARED):
            await self._here.release(slot)
        elif self._here.free(slot):
            await self._give_back(_RELEASE, slot)

    async def end(self, slot: Slot, report: CallReport) -> None:
        """Free the slot's place and learn from what its call met. While Redis is silent, that is not learned."""
        if not slot.id.startswith(_SHARED):
            await self._here.end(slot, report)
        else:
            self._here.free(slot)
            await self._give_back(_END, slot, *_report_args(report))

    def next_s(self, group: str) -> float:
        """Seconds until the group's next free moment, as far as this process knows."""
        return self._here.next_s(group)

    def images_per_s(self, group: str) -> float:
        """The pictures a second that the group may make now, as learned; infinity without a limit."""
        return self._here.images_per_s(group)

    def images_per_minute(self, group: str) -> float | None:
        """The same by the minute, for reports; None without a limit."""
        return self._here.images_per_minute(group)

    async def _give_back(self, script: str, slot: Slot, *args: str) -> None:
        member, _, start = slot.id.removeprefix(_SHARED).rpartition("@")
        answer = None
        try:
            answer = await self._run(script, slot.group, slot.amounts, member, start, *args)
        finally:
            if answer is None:
                self._owe(slot.group, member)

    def _owe(self, group: str, *members: str) -> None:
        # Places to be freed as soon as Redis answers; those that are too many come back when their leases end.
        self._owed[group] = [*self._owed.get(group, []), *members][-_MOST_OWED:]

    async def _run(
        self, script: str, group: str, amounts: Amounts, *args: str
    ) -> tuple[bool, float, float, float] | None:
        """What the script answers: whether it granted, the start, how many run, the time. None: Redis is silent."""
        asked_at_s = self._monotonic_s()
        if asked_at_s < self._away_until_s:
            return None
        if self._is_away:
            self._away_until_s = asked_at_s + _AWAY_S  # one call finds out whether it is back, the others go on
        try:
            answer = await self._eval(script, group, amounts, *args)
        except UNREACHABLE as error:
            self._away(error)
            return None
        self._back()
        head, known = [float(value) for value in answer[:4]], answer[4:]
        names, values = known[::2], known[1::2]
        fields = {name.decode(): float(value) for name, value in zip(names, values, strict=True)}
        self._here.adopt(group, fields, now_s=head[3])
        return bool(head[0]), head[1], head[2], head[3]

    async def _eval(self, script: str, group: str, amounts: Amounts, *args: str) -> list[bytes]:
        keys = (f"{self._prefix}{{lg:{group}}}:state", f"{self._prefix}{{lg:{group}}}:running")
        limits = _limit_args(self._limits.get(group, GroupLimits()))
        units = (str(amounts.images), str(amounts.requests), str(amounts.tokens))
        given = (self._now_arg(), *limits, *units, *args)
        async with self._turns:  # redis-py refuses what is beyond its connections
            answer: list[bytes] = await run_script(self._client, script, keys, given, timeout_s=self._timeout_s)
        return answer

    def _now_arg(self) -> str:
        return ""  # the server's own clock; tests say what time it is

    def _away(self, error: BaseException) -> None:
        self._away_until_s = self._monotonic_s() + _AWAY_S
        if not self._is_away:
            _log.warning("limits_unreachable", error=type(error).__name__)
        self._is_away = True

    def _back(self) -> None:
        self._away_until_s = float("-inf")
        if self._is_away:
            _log.info("limits_shared_again")
        self._is_away = False


_SHARED = "shared:"


@cache
def _limit_args(limits: GroupLimits) -> tuple[str, ...]:
    amounts = (
        limits.images_per_minute,
        limits.requests_per_minute,
        limits.tokens_per_minute,
        limits.images_per_day,
        limits.requests_per_day,
        limits.tokens_per_day,
    )
    return (
        *(str(amount or 0) for amount in amounts),
        str(limits.concurrent),
        repr(limits.burst_s),
        repr(limits.headroom),
    )


def _report_args(report: CallReport) -> tuple[str, ...]:
    told = report.told
    limits = (told.images, told.requests, told.tokens) if told else (None, None, None)
    return (
        str(int(report.limited)),
        _number(report.retry_after_s),
        _number(None if report.tokens is None else min(max(report.tokens, 0), _MOST_TOLD)),
        str(int(told is not None)),
        *(_told(limit) for limit in limits),
        _number(told.wait_s if told else None),
        _number(report.images),
    )


def _number(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _told(limit: RateLimit | None) -> str:
    # Some providers send 0 or -1 where they have no limit.
    return str(min(limit.limit, _MOST_TOLD)) if limit and limit.limit and limit.limit > 0 else "0"
