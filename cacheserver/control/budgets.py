"""What may be spent, by day and month: one account of all replicas in Redis, and what this one knows beside it."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import structlog

from cacheserver.control import budget_scripts
from cacheserver.control.accounts import Account, Accounts, DaySpending, Period, Reservation, Sum
from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.replicas import Replicas
from cacheserver.control.scripts import run_script
from cacheserver.errors import CannotAffordError, LedgerUnavailableError, UnknownUpstreamError
from cacheserver.interfaces import Books, Clock
from cacheserver.model import Budget, BudgetPeriod, BudgetState
from cacheserver.tasks import OwnedTasks, every
from cacheserver.tiers.redis_client import Client

_log = structlog.get_logger(__name__)

_TRIES = 5
_KEPT_S = 7 * 86_400
"""How long what lies in Redis outlives its period: whoever settles late still finds it."""


class LocalBudgets:
    """`Budgets` of this process alone, built from its ledger. A limit that is set holds until it ends."""

    def __init__(
        self,
        *,
        budgets: Sequence[Budget],
        spent: Iterable[DaySpending],
        clock: Clock,
        books: Books,
        degrade_at: float = 0.9,
    ) -> None:
        """`spent` is what the ledger knows since the beginning of last month; `degrade_at` a share, 0 to 1."""
        self.accounts = Accounts(budgets=budgets, spent=spent)
        self.overridden: dict[str, int] = {}
        """The limits that are not those of the configuration, by the budget's name."""
        self.degrade_at = degrade_at
        self._budgets = {budget.name: budget for budget in budgets}
        self._clock = clock
        self._books = books

    def replace(self, budgets: Sequence[Budget], spent: Sequence[DaySpending]) -> None:
        """From now on these are the budgets: see `Accounts.replace`. Limits that were set by hand stand."""
        self.accounts.replace(budgets, spent)
        self._budgets = {budget.name: budget for budget in budgets}
        self.overridden = {name: limit for name, limit in self.overridden.items() if name in self._budgets}

    async def reserve(self, attempt_id: str, *, namespace: str, caller: str, microusd: int, degradable: bool) -> None:
        """See `Budgets.reserve`."""

        def left(account: Account) -> int:
            return self.limit(account, degradable=degradable) - self.accounts.own(account).used

        wanted = self.wanted(namespace, caller, microusd, self._clock.now_s())
        self.set_aside(attempt_id, wanted, left)

    async def sent(self, attempt_id: str) -> None:
        """See `Budgets.sent`."""
        self.accounts.send(attempt_id)

    async def settle(self, attempt_id: str, microusd: int, *, upstream: str = "") -> None:
        """See `Budgets.settle`."""
        self.close(attempt_id, microusd, upstream)

    async def release(self, attempt_id: str) -> None:
        """See `Budgets.release`."""
        self.close(attempt_id, 0, "")

    async def states(self) -> list[BudgetState]:
        """See `Budgets.states`."""
        now_s = self._clock.now_s()
        return [self.state(account, self.accounts.own(account)) for account in self.accounts.current(now_s)]

    async def set_limit(self, name: str, limit_microusd: int) -> BudgetState:
        """See `Budgets.set_limit`."""
        self.know(name)
        self.override(name, limit_microusd)
        return next(state for state in await self.states() if state.budget.name == name)

    def month_spend_microusd(self, upstream: str) -> int:
        """See `Budgets.month_spend_microusd`."""
        return self.paid(Period.at(BudgetPeriod.MONTH, self._clock.now_s()), upstream)

    def wanted(self, namespace: str, caller: str, microusd: int, now_s: float) -> Reservation:
        """What is to be set aside, in which accounts."""
        accounts = self.accounts.bounding(namespace, caller, now_s)
        return Reservation(microusd, accounts, Period.at(BudgetPeriod.MONTH, now_s))

    def set_aside(self, attempt_id: str, wanted: Reservation, left: Callable[[Account], int]) -> None:
        """Set `wanted` aside if there is so much `left` in each account.

        Raises:
            CannotAffordError: there is not; it names the account with the least left.
        """
        # No await from here to the end: between looking and taking, another call could take the same money.
        tightest = min(wanted.accounts, key=left, default=None)
        if tightest is not None and left(tightest) < wanted.microusd:
            raise refusal(tightest)
        self.accounts.add(attempt_id, wanted)

    def close(self, attempt_id: str, microusd: int, upstream: str) -> Reservation | None:
        """The attempt is over and cost so much; its reservation, None if that was closed before."""
        closed = self.accounts.close(attempt_id, microusd, upstream)
        if closed is not None and microusd > closed.microusd:
            over_microusd = microusd - closed.microusd
            _log.warning("budget_overrun", attempt=attempt_id, upstream=upstream, over_microusd=over_microusd)
            self._books.budget_overrun(upstream, over_microusd)
        return closed

    def limit(self, account: Account, *, degradable: bool) -> int:
        """The limit in force, or the part of it that the full quality may use."""
        limit = self.overridden.get(account.budget.name, account.budget.limit_microusd)
        return math.floor(limit * self.degrade_at) if degradable else limit

    def know(self, name: str) -> Budget:
        """The budget of this name.

        Raises:
            UnknownUpstreamError: there is none.
        """
        if (budget := self._budgets.get(name)) is None:
            raise UnknownUpstreamError(f"There is no budget {name}; there are: {', '.join(self._budgets) or 'none'}.")
        return budget

    def override(self, name: str, limit_microusd: int) -> None:
        """This limit is in force for a budget."""
        if limit_microusd == self._budgets[name].limit_microusd:
            self.overridden.pop(name, None)
        else:
            self.overridden[name] = limit_microusd

    def state(self, account: Account, used: Sum) -> BudgetState:
        """The budget as callers see it."""
        budget = replace(account.budget, limit_microusd=self.limit(account, degradable=False))
        return BudgetState(budget, used.spent, used.reserved, account.period.end_s)

    def paid(self, month: Period, upstream: str) -> int:
        """What this replica paid an upstream in a month."""
        return self.accounts.paid.get(month, {}).get(upstream, 0)


class _LostError(Exception):
    """Redis does not answer: this replica goes by what it knows."""


@dataclass(frozen=True, slots=True)
class _Standing:
    """An account as Redis showed it: all replicas together, and of that our own."""

    total: Sum
    own: Sum

    @property
    def others(self) -> Sum:
        return Sum(self.total.spent - self.own.spent, self.total.reserved - self.own.reserved)


_NOTHING = _Standing(Sum(), Sum())


class _Wish(NamedTuple):
    """What a reservation is made for."""

    namespace: str
    caller: str
    microusd: int
    degradable: bool


class RedisBudgets:
    """`Budgets` that all replicas share. Each writes its own part, which it can always write anew.

    The truth of a replica's own part is in its memory and its ledger; Redis is where the parts meet. Whenever
    the two may differ (Redis was lost or emptied, a script was cut off, others took us for dead) the replica
    tells Redis everything it knows under a new *life*; scripts of an earlier life that arrive late do nothing.
    What it knows is also what replicas that are gone had spent. Whom the others took for dead and buried has lost
    what it had set aside and not sent: that is set aside anew, or refused, when it is to be sent.

    While Redis is lost: with "share" a replica spends, beyond what it had, its fair share of what was left in
    each budget when it last looked. If all lose Redis at once that keeps every limit, but for what they spent
    since the last look, a second ago; one that is cut off alone may exceed a limit by its share and by what it had
    set aside before. With "refuse" nothing that a budget bounds is bought; nor is it with "share" by a replica that
    has not seen Redis since it started, and so cannot know what its share is.
    """

    def __init__(  # noqa: PLR0913 - settings, each with its default
        self,
        *,
        client: Client,
        here: LocalBudgets,
        replicas: Replicas,
        clock: Clock,
        prefix: str,
        redis_lost: Literal["share", "refuse"] = "share",
        look_every_s: float = 1.0,
        timeout_s: float = 0.5,
        max_concurrency: int = 32,
    ) -> None:
        """`client` is closed by whoever made it; `prefix` is that of all our names in Redis.

        At most `max_concurrency` scripts run at a time, and more wait: redis-py refuses what is beyond its connections.
        """
        self._client = client
        self._here = here
        self._replicas = replicas
        self._clock = clock
        self._prefix = f"{prefix}{{budget}}:"
        self._redis_lost = redis_lost
        self._look_every_s = look_every_s
        self._timeout_s = timeout_s
        self._turns = asyncio.Semaphore(max_concurrency)
        self._tasks = OwnedTasks()
        self._server_ahead_s = 0.0
        self._is_lost = False

        self._process = secrets.token_hex(4)
        self._lives = itertools.count(1)
        self._life: str | None = None
        """The life under which Redis knows us; None: in doubt, so everything is to be told first."""
        self._life_in_redis = ""
        """The life that Redis told us it knows."""
        self._telling = asyncio.Lock()
        self._told_version = -1
        """What our accounts had come to when they were last told."""
        self._running = 0
        """Scripts on their way."""

        self._unsent: dict[str, _Wish] = {}
        """What each reservation that is not sent yet was made for."""
        self._buried: set[str] = set()
        """Those of them that others have freed, as they took us for dead."""

        self._has_seen = False
        """Whether we ever saw what the others have spent."""
        self._epoch: bytes | None = None
        self._standing: dict[Account, _Standing] = {}
        self._spent_by_others: dict[Account, dict[str, int]] = {}
        """What each of the other replicas had spent when we last looked, those that are gone included."""
        self._others_before_loss: dict[Account, int] = {}
        """What the others had used when we last looked before Redis lost all it knew."""
        self._paid_by_others: tuple[Period, dict[str, int]] | None = None

    async def start(self) -> None:
        """Tell Redis what we know, and from now on look every second how things stand there."""
        await self.look()
        looking = every(self._look_every_s, self.look, clock=self._clock, name="budgets")
        self._tasks.own(looking, "budgets")

    def replace(self, budgets: Sequence[Budget], spent: Sequence[DaySpending]) -> None:
        """See `LocalBudgets.replace`. Redis is told before anything else is asked of it."""
        self._here.replace(budgets, spent)
        self._doubt("the budgets changed")

    async def aclose(self) -> None:
        """Look no more."""
        await self._tasks.aclose(0)

    async def reserve(self, attempt_id: str, *, namespace: str, caller: str, microusd: int, degradable: bool) -> None:
        """See `Budgets.reserve`.

        Raises:
            CannotAffordError: a budget does not allow it.
            LedgerUnavailableError: Redis is lost, and then nothing is to be bought.
        """
        await self._set_aside(attempt_id, _Wish(namespace, caller, microusd, degradable))

    async def sent(self, attempt_id: str) -> None:
        """See `Budgets.sent`."""
        try:
            await self._send_in_redis(attempt_id)
        except _LostError:
            if attempt_id in self._buried:  # this was the last that we heard of Redis
                await self.sent(attempt_id)
                return
            reservation = self._here.accounts.open.get(attempt_id)
            if reservation is not None and reservation.accounts and self._redis_lost == "refuse":
                raise _cannot_be_checked() from None
        self._unsent.pop(attempt_id, None)
        self._here.accounts.send(attempt_id)

    async def settle(self, attempt_id: str, microusd: int, *, upstream: str = "") -> None:
        """See `Budgets.settle`."""
        self._unsent.pop(attempt_id, None)
        self._buried.discard(attempt_id)
        if (closed := self._here.close(attempt_id, microusd, upstream)) is not None:
            month = closed.month
            keys = [self._periods, self._month_name(month), *map(self._name, closed.accounts)]
            args = [attempt_id, closed.microusd, microusd, upstream, month.end_s]
            await self._change(budget_scripts.CLOSE, keys, args)

    async def release(self, attempt_id: str) -> None:
        """See `Budgets.release`."""
        await self.settle(attempt_id, 0)

    async def states(self) -> list[BudgetState]:
        """See `Budgets.states`. While Redis is lost: the others as they stood when it last answered."""
        await self.look()
        states = []
        for account in self._here.accounts.current(self._now_s()):
            others, own = self._seen(account).others, self._here.accounts.own(account)
            used = Sum(others.spent + own.spent, others.reserved + own.reserved)
            states.append(self._here.state(account, used))
        return states

    async def set_limit(self, name: str, limit_microusd: int) -> BudgetState:
        """See `Budgets.set_limit`.

        Raises:
            UnknownUpstreamError: there is no such budget.
            LedgerUnavailableError: Redis is lost, so the other replicas cannot be told.
        """
        self._here.know(name)
        try:
            await self._ask(budget_scripts.SET_LIMIT, [self._limits], [name, limit_microusd])
        except _LostError:
            raise LedgerUnavailableError(
                "Redis does not answer, so the limit cannot be changed in every replica. Try again."
            ) from None
        self._here.override(name, limit_microusd)
        return next(state for state in await self.states() if state.budget.name == name)

    def month_spend_microusd(self, upstream: str) -> int:
        """See `Budgets.month_spend_microusd`: our own payments now, those of others a second ago."""
        month = Period.at(BudgetPeriod.MONTH, self._now_s())
        seen, by_others = self._paid_by_others or (month, {})
        return self._here.paid(month, upstream) + (by_others.get(upstream, 0) if seen == month else 0)

    async def look(self) -> None:
        """Look how everything stands, bury the dead, and come back to a Redis that answers again. Never raises."""
        try:
            if self._is_lost:
                await self._come_back()
            await self._look()
        except _LostError:
            pass  # noted where it was found

    # ---- reserving

    async def _set_aside(self, attempt_id: str, wish: _Wish) -> None:
        try:
            await self._reserve_in_redis(attempt_id, wish)
        except _LostError:
            wanted = self._here.wanted(wish.namespace, wish.caller, wish.microusd, self._now_s())
            if wanted.accounts and (self._redis_lost == "refuse" or not self._has_seen):
                raise _cannot_be_checked() from None

            def left(account: Account) -> int:
                return self._share_left(account, degradable=wish.degradable)

            self._here.set_aside(attempt_id, wanted, left)
        self._unsent[attempt_id] = wish

    async def _send_in_redis(self, attempt_id: str) -> None:
        """Say in Redis that the attempt is sent. What others have freed meanwhile is set aside anew first."""
        for _ in range(_TRIES):
            if attempt_id in self._buried:
                self._buried.discard(attempt_id)
                await self._set_aside(attempt_id, self._unsent[attempt_id])
            reservation = self._here.accounts.open.get(attempt_id)
            if reservation is None or reservation.is_sent:
                return
            # Our own accounts follow: should we be buried before Redis has heard of it, this counts as not sent.
            args = [attempt_id, self._spelled(replace(reservation, is_sent=True))]
            answer = await self._ask(budget_scripts.SENT, [self._open()], args)
            if answer[0] == "done":
                return
            if attempt_id not in self._buried:
                self._doubt("a reservation is missing")
        raise self._lost("it does not keep what it is told")

    def _bury(self) -> None:
        """Others took us for dead: what was set aside and not sent is theirs to spend."""
        for attempt_id, reservation in list(self._here.accounts.open.items()):
            if not reservation.is_sent:
                self._here.accounts.close(attempt_id, 0)
                self._buried.add(attempt_id)

    async def _reserve_in_redis(self, attempt_id: str, wish: _Wish) -> None:
        share = self._here.degrade_at if wish.degradable else 1.0
        for _ in range(_TRIES):
            life = await self._present_life()
            wanted = self._here.wanted(wish.namespace, wish.caller, wish.microusd, self._now_s())
            keys = [self._open(), self._limits, self._periods, self._epoch_name, *map(self._name, wanted.accounts)]
            args = self._reserve_args(attempt_id, wanted, share)
            if (answer := await self._run(budget_scripts.RESERVE, keys, args, life)) is None:
                continue
            word, now_s, *rest = answer
            # No await from here to the end: what Redis has set aside is in our accounts before we tell it anything.
            self._set_server_time(now_s)
            if word == "period":
                continue
            self._see(wanted.accounts, rest[0])
            if word == "refused":
                raise refusal(wanted.accounts[rest[1] - 1])
            self._here.accounts.add(attempt_id, wanted)
            return
        raise self._lost("it does not keep what it is told")

    def _reserve_args(self, attempt_id: str, wanted: Reservation, share: float) -> list[Any]:
        day = Period.at(BudgetPeriod.DAY, self._now_s())
        args = [attempt_id, self._spelled(wanted), wanted.microusd, repr(share), day.start_s, day.end_s]
        args.append(self._replicas.dead_after_s)
        for account in wanted.accounts:
            others_were = self._others_before_loss.get(account, 0)
            args += [account.budget.name, account.budget.limit_microusd, account.period.end_s, others_were]
        return args

    def _share_left(self, account: Account, *, degradable: bool) -> int:
        """How much more this replica may set aside while nobody can ask Redis."""
        seen = self._seen(account)
        left_then = self._here.limit(account, degradable=degradable) - seen.total.used
        fair_share = left_then // self._replicas.live if left_then > 0 else left_then
        return seen.own.used + fair_share - self._here.accounts.own(account).used

    def _seen(self, account: Account) -> _Standing:
        """The account when we last looked. If its period began after that, nothing was spent; nor if we never did."""
        return self._standing.get(account, _NOTHING)

    # ---- talking to Redis

    async def _change(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> None:
        """Tell Redis of a change that our own accounts have had already."""
        try:
            answer = await self._ask(script, [self._open(), *keys], args, version=self._here.accounts.version)
        except _LostError:
            return  # told with everything else when Redis is back
        if answer[0] == "missing":
            # Redis forgot a reservation of ours, as a server does that lost its last second in a crash.
            self._doubt("a reservation is missing")

    async def _ask(
        self, script: str, keys: Sequence[str], args: Sequence[Any], *, version: int | None = None
    ) -> list[Any]:
        """The answer of a script that ran in our present life.

        With `version` the script tells of a change that our accounts had when they came to that version: it is
        not run if all of them have been told since.
        """
        for _ in range(_TRIES):
            life = await self._present_life()
            if version is not None and version <= self._told_version:
                return ["told"]
            if (answer := await self._run(script, keys, args, life)) is not None:
                return answer
        raise self._lost("it does not keep what it is told")

    async def _present_life(self) -> str:
        if self._is_lost:
            raise _LostError
        async with self._telling:
            if self._is_lost:
                raise _LostError
            return self._life or await self._tell()

    async def _run(self, script: str, keys: Sequence[str], args: Sequence[Any], life: str) -> list[Any] | None:
        """The script's answer; None if it is to be run again, in the next life."""
        answer = await self._run_in_turn(script, [self._lives_name, *keys], [self._replicas.id, life, *args], life)
        # Worth nothing if everything was, or is being, told meanwhile: what the script changed was overwritten by
        # what our accounts held before its answer came.
        if answer is None or self._life != life or self._telling.locked():
            return None
        if answer[0] == "stranger":
            self._meet_stranger(answer[1])
            return None
        return answer

    async def _run_in_turn(self, script: str, keys: Sequence[str], args: Sequence[Any], life: str) -> list[Any] | None:
        self._running += 1
        try:
            async with self._turns:
                # Whoever waited for a turn while Redis was lost does not wait for its silence too.
                return await self._eval(script, keys, args) if self._life == life else None
        except UNREACHABLE as error:
            if self._life == life:
                raise self._lost(type(error).__name__) from error
            return None
        except BaseException:
            self._doubt("a call was cut off")
            raise
        finally:
            self._running -= 1

    async def _eval(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> list[Any]:
        word, *rest = await run_script(self._client, script, keys, args, timeout_s=self._timeout_s)
        return [word.decode(), *rest]

    # ---- telling everything

    async def _tell(self) -> str:
        """Write all we know over what Redis knows of us, and begin a new life. Only under `_telling`."""
        life = f"{self._process}.{next(self._lives)}"
        keys = [self._lives_name, self._open(), self._epoch_name, self._periods]
        keys += [self._replicas.name_in_redis, self._limits]
        self._life = None
        epoch = self._epoch.decode() if self._epoch else ""
        for _ in range(_TRIES):
            version, knowledge = self._here.accounts.version, json.dumps(self._knowledge())
            try:
                word, *rest = await self._eval(
                    budget_scripts.TELL, keys, [self._replicas.id, self._life_in_redis, life, knowledge, epoch]
                )
            except UNREACHABLE as error:
                raise self._lost(type(error).__name__) from error
            if word == "buried":
                _log.warning("budgets_buried", cause="other replicas took this one for dead")
                self._bury()
                epoch = ""
                continue
            if word == "done":
                self._set_server_time(rest[0])
                self._enter_epoch(rest[1])
                self._life = self._life_in_redis = life
                self._told_version = version
                return life
            self._meet_stranger(rest[0])
        raise self._lost("it does not keep what it is told")

    async def _come_back(self) -> None:
        async with self._telling:
            version = self._here.accounts.version
            await self._tell()
            # Whoever asks from now on waits for us. What was changed here while we told was told to nobody.
            self._is_lost = False
            if self._here.accounts.version != version:
                await self._tell()
        _log.info("budgets_back")

    def _knowledge(self) -> dict[str, Any]:
        accounts = self._here.accounts
        return {
            # Of the present ones those too in which we have nothing: Redis may know of something.
            "accounts": [self._part(account) for account in {*accounts.sums, *accounts.current(self._now_s())}],
            "open": {attempt_id: self._spelled(reservation) for attempt_id, reservation in accounts.open.items()},
            "paid": [
                {"name": self._month_name(month), "end_s": month.end_s, "upstreams": paid}
                for month, paid in accounts.paid.items()
            ],
            "limits": self._here.overridden,
        }

    def _part(self, account: Account) -> dict[str, Any]:
        own, end_s = self._here.accounts.own(account), account.period.end_s
        others = self._spent_by_others.get(account, {})
        part = {"name": self._name(account), "end_s": end_s, "spent": own.spent, "reserved": own.reserved}
        return part | {"others": others}

    def _enter_epoch(self, epoch: bytes) -> None:
        """The state in Redis began at this time of the server."""
        if self._epoch not in {None, epoch}:
            _log.warning("budgets_rebuilt", cause="Redis lost what it knew")
            others_were = {account: standing.others.used for account, standing in self._standing.items()}
            # Lost again before all had told: what we saw since was not all.
            for account, used in self._others_before_loss.items() if self._is_young(self._epoch) else ():
                others_were[account] = max(used, others_were.get(account, 0))
            self._others_before_loss = others_were
        self._epoch = epoch

    def _is_young(self, epoch: bytes | None) -> bool:
        return epoch is not None and self._now_s() - float(epoch) < self._replicas.dead_after_s

    def _meet_stranger(self, life_in_redis: bytes) -> None:
        """Redis knows us by another life, or not at all."""
        self._life_in_redis = life_in_redis.decode()
        self._doubt("Redis does not know us")
        was_told = self._told_version >= 0
        if was_told and self._life_in_redis and not self._life_in_redis.startswith(f"{self._process}."):
            _log.warning("replica_id_taken_over", replica=self._replicas.id, life=self._life_in_redis)

    def _doubt(self, cause: str) -> None:
        """Redis may know of us what is not so: tell it everything before anything else."""
        if self._life is not None:
            _log.info("budgets_in_doubt", cause=cause)
        self._life = None

    def _lost(self, cause: str) -> _LostError:
        if not self._is_lost:
            _log.warning("budgets_lost", cause=cause, until_back=self._redis_lost)
        self._is_lost = True
        self._life = None
        return _LostError()

    # ---- looking

    async def _look(self) -> None:
        for _ in range(_TRIES):
            accounts = self._here.accounts.current(self._now_s())
            await self._look_at(accounts)
            if accounts == self._here.accounts.current(self._now_s()):
                return
            # By the server's clock it is another day.

    async def _look_at(self, accounts: Sequence[Account]) -> None:
        month = Period.at(BudgetPeriod.MONTH, self._now_s())
        keys = [self._limits, self._periods, self._replicas.name_in_redis, self._month_name(month)]
        args = [self._open(""), self._replicas.dead_after_s, _KEPT_S]
        args += itertools.chain.from_iterable((each.budget.name, each.budget.limit_microusd) for each in accounts)
        version, is_quiet = self._here.accounts.version, self._running == 0

        answer = await self._ask(budget_scripts.LOOK, [*keys, *map(self._name, accounts)], args)
        _, now_s, standing, paid, parts = answer
        self._set_server_time(now_s)
        self._standing = {}
        self._see(accounts, standing)
        self._see_paid(month, paid)
        self._spent_by_others = {
            account: self._spent_in(fields) for account, fields in zip(accounts, parts, strict=True)
        }
        # Only when nothing was on its way can the two be compared.
        is_quiet = is_quiet and self._running == 0 and self._here.accounts.version == version
        if is_quiet and any(self._standing[each].own != self._here.accounts.own(each) for each in accounts):
            self._doubt("Redis has other sums")
            await self._present_life()

    def _see(self, accounts: Sequence[Account], rows: Sequence[Sequence[int]]) -> None:
        self._has_seen = True
        for account, (limit, spent, reserved, own_spent, own_reserved) in zip(accounts, rows, strict=False):
            self._here.override(account.budget.name, limit)
            self._standing[account] = _Standing(Sum(spent, reserved), Sum(own_spent, own_reserved))

    def _see_paid(self, month: Period, fields: Sequence[bytes]) -> None:
        by_others: dict[str, int] = {}
        for field, microusd in zip(fields[::2], fields[1::2], strict=True):
            replica, _, upstream = field.decode().partition(":")
            if replica != self._replicas.id:
                by_others[upstream] = by_others.get(upstream, 0) + int(microusd)
        self._paid_by_others = (month, by_others)

    def _spent_in(self, fields: Sequence[bytes]) -> dict[str, int]:
        """What each other replica spent, of an account as it lies in Redis."""
        spent: dict[str, int] = {}
        for field, microusd in zip(fields[::2], fields[1::2], strict=True):
            kind, _, replica = field.decode().partition(":")
            if kind == "s" and replica != self._replicas.id:
                spent[replica] = int(microusd)
        return spent

    # ---- names and time

    def _now_s(self) -> float:
        """The time by the server's clock, as it was when it last told us."""
        return self._clock.now_s() + self._server_ahead_s

    def _set_server_time(self, now_s: int) -> None:
        # It tells whole seconds; within them ours may run.
        if not now_s <= self._now_s() < now_s + 1:
            self._server_ahead_s = now_s - self._clock.now_s()

    def _spelled(self, reservation: Reservation) -> str:
        names = [self._name(account) for account in reservation.accounts]
        state = "sent" if reservation.is_sent else "reserved"
        return json.dumps({"microusd": reservation.microusd, "accounts": names, "state": state})

    def _name(self, account: Account) -> str:
        return self._prefix + account.name

    def _month_name(self, month: Period) -> str:
        return f"{self._prefix}upstreams:{month.name}"

    def _open(self, replica_id: str | None = None) -> str:
        return f"{self._prefix}open:{self._replicas.id if replica_id is None else replica_id}"

    @property
    def _lives_name(self) -> str:
        return f"{self._prefix}lives"

    @property
    def _epoch_name(self) -> str:
        return f"{self._prefix}epoch"

    @property
    def _limits(self) -> str:
        return f"{self._prefix}limits"

    @property
    def _periods(self) -> str:
        return f"{self._prefix}periods"


def _cannot_be_checked() -> LedgerUnavailableError:
    return LedgerUnavailableError(
        "Redis does not answer, so budgets cannot be checked now; what is cached is served. Try again."
    )


def refusal(account: Account) -> CannotAffordError:
    """Why nothing more can be bought from `account`, and until when."""
    return CannotAffordError(account.budget.name, reset_time_s=account.period.end_s)
