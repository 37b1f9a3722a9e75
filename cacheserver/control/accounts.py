"""What this replica has set aside and spent: plain arithmetic, from which everything else can be built again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Protocol

from cacheserver.model import Budget, BudgetPeriod, BudgetScope

_DAY_S = 86_400
_KEPT_S = _DAY_S


class DaySpending(Protocol):
    """What one caller of one namespace spent at one upstream in one day (UTC), as the ledger adds it up."""

    @property
    def day_start_s(self) -> int:
        """The day's first second since 1970."""
        ...

    @property
    def namespace(self) -> str:
        """Where it was spent."""
        ...

    @property
    def caller(self) -> str:
        """Who spent it."""
        ...

    @property
    def upstream(self) -> str:
        """Who was paid."""
        ...

    @property
    def microusd(self) -> int:
        """How much, settled and unknown together."""
        ...


@dataclass(frozen=True, slots=True)
class Period:
    """A certain day or month in UTC, from its first second to the first one after it, in seconds since 1970."""

    name: str
    start_s: int
    end_s: int

    @staticmethod
    def at(kind: BudgetPeriod, moment_s: float) -> Period:
        """The day or month that `moment_s` lies in."""
        return _period(kind, int(moment_s // _DAY_S))


@lru_cache(maxsize=256)  # each money question asks for the same few
def _period(kind: BudgetPeriod, day: int) -> Period:
    """The day or month with the day that is so many after 1970-01-01."""
    start = datetime.fromtimestamp(day * _DAY_S, UTC)
    if kind is BudgetPeriod.DAY:
        end = start + timedelta(days=1)
        return Period(f"{start:%Y-%m-%d}", int(start.timestamp()), int(end.timestamp()))
    start = start.replace(day=1)
    end = (start + timedelta(days=31)).replace(day=1)
    return Period(f"{start:%Y-%m}", int(start.timestamp()), int(end.timestamp()))


@dataclass(frozen=True, slots=True)
class Account:
    """A budget in one of its periods."""

    budget: Budget
    period: Period

    @property
    def name(self) -> str:
        """Unlike that of any other account."""
        return f"{self.budget.name}:{self.period.name}"


@dataclass(frozen=True, slots=True)
class Sum:
    """What is spent for good and what is set aside, in micro-dollars."""

    spent: int = 0
    reserved: int = 0

    @property
    def used(self) -> int:
        """Both: what nobody else may spend."""
        return self.spent + self.reserved


@dataclass(frozen=True, slots=True)
class Reservation:
    """Money set aside for one attempt, in every account that bounds it. It ends in the periods it began in."""

    microusd: int
    accounts: tuple[Account, ...]
    month: Period
    is_sent: bool = False


class Accounts:
    """This replica's part of every budget, its open reservations, and what it paid each upstream."""

    def __init__(self, *, budgets: Sequence[Budget], spent: Iterable[DaySpending]) -> None:
        """`spent` is what the ledger knows of this month and the one before."""
        self._set(budgets)
        self.version = 0
        """Grows with every change."""
        self.sums: dict[Account, Sum] = {}
        self.open: dict[str, Reservation] = {}
        self.paid: dict[Period, dict[str, int]] = {}
        """By month and upstream, in micro-dollars."""
        for each in spent:
            for account in self.bounding(each.namespace, each.caller, each.day_start_s):
                self._change(account, spent=each.microusd)
            self._pay(Period.at(BudgetPeriod.MONTH, each.day_start_s), each.upstream, each.microusd)

    def replace(self, budgets: Sequence[Budget], spent: Sequence[DaySpending]) -> None:
        """From now on these are the budgets; of a new one, what the ledger knows is `spent`. What is open stays so."""
        known = set(self._budgets)
        self._set(budgets)
        self.version += 1
        for each in spent:
            for account in self.bounding(each.namespace, each.caller, each.day_start_s):
                if account.budget not in known:
                    # Of one that was removed and has come back, nobody counted what was spent meanwhile.
                    self.sums.pop(account, None)
        for each in spent:
            for account in self.bounding(each.namespace, each.caller, each.day_start_s):
                if account.budget not in known:
                    self._change(account, spent=each.microusd)

    def _set(self, budgets: Sequence[Budget]) -> None:
        # Of two budgets with equally little left, the one that lasts longer is named: it is the one to wait for.
        self._budgets = sorted(budgets, key=_months_first)
        self._by_subject: dict[tuple[BudgetScope, str], list[Budget]] = {}
        for budget in budgets:
            self._by_subject.setdefault((budget.scope, budget.subject), []).append(budget)

    def bounding(self, namespace: str, caller: str, now_s: float) -> tuple[Account, ...]:
        """The accounts that bound what `caller` spends in `namespace` now, months first."""
        subjects = ((BudgetScope.GLOBAL, ""), (BudgetScope.NAMESPACE, namespace), (BudgetScope.CALLER, caller))
        bounding = [budget for subject in subjects for budget in self._by_subject.get(subject, ())]
        return tuple(_accounts(sorted(bounding, key=_months_first), now_s))

    def current(self, now_s: float) -> list[Account]:
        """The account of every budget now."""
        return _accounts(self._budgets, now_s)

    def own(self, account: Account) -> Sum:
        """What this replica spent and set aside in `account`."""
        return self.sums.get(account, Sum())

    def add(self, attempt_id: str, reservation: Reservation) -> None:
        """Set money aside. An attempt that has a reservation keeps that one."""
        if attempt_id in self.open:
            return
        self.version += 1
        self.open[attempt_id] = reservation
        for account in reservation.accounts:
            self._change(account, reserved=reservation.microusd)

    def send(self, attempt_id: str) -> None:
        """The attempt goes upstream."""
        reservation = self.open.get(attempt_id)
        if reservation is not None and not reservation.is_sent:
            self.version += 1
            self.open[attempt_id] = replace(reservation, is_sent=True)

    def close(self, attempt_id: str, microusd: int, upstream: str = "") -> Reservation | None:
        """What was set aside becomes what it cost; the reservation that ends, None if there is none."""
        reservation = self.open.pop(attempt_id, None)
        if reservation is None:
            return None
        self.version += 1
        for account in reservation.accounts:
            self._change(account, spent=microusd, reserved=-reservation.microusd)
        if upstream:
            self._pay(reservation.month, upstream, microusd)
        return reservation

    def _change(self, account: Account, *, spent: int = 0, reserved: int = 0) -> None:
        if account not in self.sums:
            self._forget_before(account.period.start_s - _KEPT_S)
        before = self.own(account)
        self.sums[account] = Sum(before.spent + spent, before.reserved + reserved)

    def _pay(self, month: Period, upstream: str, microusd: int) -> None:
        paid = self.paid.setdefault(month, defaultdict(int))
        paid[upstream] += microusd

    def _forget_before(self, moment_s: float) -> None:
        kept = {account for reservation in self.open.values() for account in reservation.accounts}
        self.sums = {
            account: own for account, own in self.sums.items() if account.period.end_s > moment_s or account in kept
        }
        self.paid = {month: paid for month, paid in self.paid.items() if month.end_s > moment_s}


def _months_first(budget: Budget) -> bool:
    return budget.period is not BudgetPeriod.MONTH


def _accounts(budgets: Iterable[Budget], now_s: float) -> list[Account]:
    periods = {kind: Period.at(kind, now_s) for kind in BudgetPeriod}
    return [Account(budget, periods[budget.period]) for budget in budgets]
