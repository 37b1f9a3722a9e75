"""What callers may see whatever goes wrong, kept from the outside: by what was asked, answered, billed and stored.

A picture is known by its SHA-256, of which no two are alike.

    wrong bytes         a picture was answered that neither the provider made nor a caller put for this prompt
    lost                a picture was answered, from a generation or for a put, and S3 does not have it once all faults
                        have ended and the journals are empty. Not counted: its prompt was purged at any time after the
                        call for it had begun; its object was corrupted by us
    failed              a call that no replica answered in all of its time, which is longer than any fault lasts. Of a
                        hit: the prompt's picture had been answered and not been purged since
    served after purge  a picture whose purge was answered, in the answer to a call that began later than
                            purged + 1 s                     a replica that has Redis
                            purged + `purge.check_s` + 1 s   Redis was silent or lost something meanwhile
                        later still if neither Redis nor S3 answered meanwhile (blind: counted, no breach), and 1 s
                        from when it went on, for a replica that was paused. How late this very process was is added
    paid too often      of all prompts

                            paid - prompts paid for <= purges + corrupted + unknown + unleased + paused + losses

                        purges     attempts at a purge, one for each prompt of theirs that had been asked for
                        corrupted  objects in S3 that we corrupted
                        unknown    rows of the replicas' ledgers that are UNKNOWN or SENT: killed or cut off while out
                        unleased   flights without a lease, by the replicas' own `cacheserver_unleased_total`
                        paused     prompts being asked for while a replica was paused
                        losses     prompts being asked for when a master lost what it had, was killed, or Redis fell
                                   silent under leases that were held

                        and of each prompt, that some fault or purge struck it: nothing is paid twice in peace. A
                        fault strikes what is asked for while it lasts, and some seconds longer, in which replicas
                        still do without Redis
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

CONNECTED_S = 1.0
CHECK_S = 5.0
"""`purge.check_s`."""

_AFTERMATH_S = 10.0

FOREVER = float("inf")


@dataclass(slots=True)
class Span:
    """From when to when, in monotonic seconds; something that goes on has no end yet."""

    from_s: float
    to_s: float = FOREVER

    def meets(self, from_s: float, to_s: float) -> bool:
        """Whether any of it lies there."""
        return self.from_s <= to_s and from_s <= self.to_s


@dataclass(slots=True)
class Purge:
    """An attempt at a purge of one prompt. `took` are the pictures that it took for certain, once it was answered."""

    span: Span
    took: frozenset[str]
    replica: int
    is_answered: bool = False


@dataclass(slots=True)
class Asked:
    """What happened to one prompt.

    `given` says when the call began that a picture was first the answer to, `by` which replica answered.
    """

    namespace: str
    given: dict[str, float] = field(default_factory=dict)
    by: dict[str, int] = field(default_factory=dict)
    put: set[str] = field(default_factory=set)
    purges: list[Purge] = field(default_factory=list)
    calls: list[Span] = field(default_factory=list)
    excuses: Counter[str] = field(default_factory=Counter)
    corrupted: bool = False

    def story(self, since_s: float) -> str:
        """When what happened to it, in seconds since then."""
        events = [
            *((began_s, f"{digest[:12]} given by replica {self.by[digest]}") for digest, began_s in self.given.items()),
            *((each.span.from_s, f"purge begun at replica {each.replica}") for each in self.purges),
            *((each.span.to_s, "answered" if each.is_answered else "failed") for each in self.purges),
        ]
        return ", ".join(f"{at_s - since_s:.2f} {what}" for at_s, what in sorted(events))

    def is_hit(self, now_s: float) -> bool:
        """Whether it is answered from what is stored: whatever was given was not purged, or given again since."""
        ended_s = max((purge.span.to_s for purge in self.purges), default=0.0)
        return any(began_s > ended_s for began_s in self.given.values()) and ended_s < now_s


@dataclass(slots=True)
class Model:
    """All prompts, and all faults as far as they excuse anything."""

    began_s: float
    prompts: dict[str, Asked] = field(default_factory=dict)
    silent_redis: list[Span] = field(default_factory=list)
    silent_s3: list[Span] = field(default_factory=list)
    paused: defaultdict[int, list[Span]] = field(default_factory=lambda: defaultdict(list))
    faults: list[tuple[str, Span]] = field(default_factory=list)
    """All that may cost a call, by what it was."""
    lags: list[Span] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    terms: Counter[str] = field(default_factory=Counter)
    """Of the bound on what is paid."""
    breaches: list[str] = field(default_factory=list)
    answers: list[tuple[str, str]] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    latest_s: dict[str, float] = field(default_factory=dict)
    corrupted: set[str] = field(default_factory=set)

    def asked(self, prompt: str, namespace: str, now_s: float) -> Span:
        """A call for this began; the caller ends the span."""
        span = Span(now_s)
        self.prompts.setdefault(prompt, Asked(namespace)).calls.append(span)
        return span

    def answered(self, prompt: str, replica: int, digest: str, began_s: float, now_s: float) -> None:
        """A replica answered with this picture to a call that began (at this replica) then."""
        asked = self.prompts[prompt]
        self.answers.append((prompt, digest))
        for purge in asked.purges:
            if purge.is_answered and digest in purge.took and began_s > purge.span.to_s:
                self._served_after(purge, replica, began_s, now_s)
        asked.given.setdefault(digest, began_s)
        asked.by.setdefault(digest, replica)

    def _served_after(self, purge: Purge, replica: int, began_s: float, now_s: float) -> None:
        purged_s = purge.span.to_s
        late_s = began_s - purged_s
        lag_s = sum(lag.to_s - lag.from_s for lag in self.lags if lag.meets(purged_s, now_s))
        was_cut = [span for span in self.silent_redis if span.meets(purge.span.from_s, now_s)]
        was_blind = any(
            s3.meets(purge.span.from_s - CHECK_S, now_s) and s3.meets(redis.from_s - CHECK_S, redis.to_s + CHECK_S)
            for redis in was_cut
            for s3 in self.silent_s3
        )
        resumed_s = max((span.to_s for span in self.paused[replica] if span.meets(purged_s, now_s)), default=0.0)
        how = "cut off" if was_cut else "connected"
        bound_s = CONNECTED_S + (CHECK_S if was_cut else 0.0)
        allowed_s = max(purged_s + bound_s, resumed_s + CONNECTED_S) + lag_s
        self.counts[f"purged and served within the bound, {how}"] += began_s <= allowed_s
        self.latest_s[how] = max(self.latest_s.get(how, 0.0), late_s)
        if began_s <= allowed_s:
            return
        if was_blind:
            self.counts["purged and served, blind"] += 1
        else:
            self.breaches.append(
                f"replica {replica}, {how}, served what was purged {late_s:.2f} s before, at {now_s:.2f}"
            )

    def purging(self, prompts: Iterable[str], replica: int, now_s: float) -> list[Purge]:
        """A purge of these begins."""
        purges = []
        for prompt in prompts:
            if (asked := self.prompts.get(prompt)) is not None:
                asked.purges.append(Purge(Span(now_s), frozenset(asked.given), replica))
                asked.excuses["purges"] += 1
                self.terms["purges"] += 1
                purges.append(asked.purges[-1])
        return purges

    def out(self, now_s: float) -> list[str]:
        """The prompts that are being asked for now."""
        return [
            prompt for prompt, asked in self.prompts.items() if any(span.to_s >= now_s for span in asked.calls[-64:])
        ]

    def excuse(self, term: str, prompts: Iterable[str], times: int = 1) -> None:
        """A fault struck these while they were asked for."""
        for prompt in prompts:
            self.prompts[prompt].excuses[term] += times
            if term in {"paused", "losses", "corrupted"}:
                self.terms[term] += times

    def failed(self, prompt: str, what: str, *, was_hit: bool) -> None:
        """No replica answered."""
        kind = "hit" if was_hit else "miss"
        self.failures[kind] += 1
        self.breaches.append(f"a call for a {kind} failed, {prompt!r}: {what}")

    def absent(self, prompt: str, replica: int, now_s: float) -> None:
        """Once all faults had ended, a replica said that it has nothing of this."""
        asked = self.prompts[prompt]
        if asked.is_hit(now_s) and not self.corrupted & asked.given.keys():
            self.breaches.append(f"replica {replica} has nothing of {prompt!r}, which was given and not purged")
        else:
            self.counts["purged or corrupted, and not cached in the end"] += 1

    def check_answers(self, made: dict[str, set[str]]) -> None:
        """Compare all answers with what the provider made, by the SHA-256 of its prompt."""
        wrong = Counter(
            prompt
            for prompt, digest in self.answers
            if digest not in made.get(sha256(prompt.encode()), set()) and digest not in self.prompts[prompt].put
        )
        self.counts["wrong bytes"] = wrong.total()
        self.breaches += [f"{count} answers with wrong bytes: {prompt!r}" for prompt, count in wrong.items()]

    def check_stored(self, stored: Mapping[str, str]) -> None:
        """Compare what was answered with what S3 has, which is told by the names of its objects."""
        for prompt, asked in self.prompts.items():
            purged_s = max((purge.span.to_s for purge in asked.purges), default=0.0)
            for digest, began_s in asked.given.items():
                if digest in stored:
                    self.counts["answered and in S3"] += 1
                elif began_s <= purged_s:
                    self.counts["answered and purged"] += 1
                elif digest in self.corrupted:
                    self.counts["answered and corrupted by us"] += 1
                else:
                    self.counts["answered and lost"] += 1
                    others = {other[:12]: stored[other] for other in asked.given if other in stored}
                    self.breaches.append(
                        f"answered and lost: {prompt!r} {digest[:12]}; {asked.story(self.began_s)}; in S3: {others}"
                    )

    def check_paid(self, billed: Counter[str]) -> None:
        """Compare what was billed, by the SHA-256 of its prompt, with the bound; `terms` must be complete."""
        paid, prompts = billed.total(), len(billed)
        self.counts["paid for"], self.counts["prompts paid for"] = paid, prompts
        self.counts["paid for again"] = paid - prompts
        if paid - prompts > self.terms.total():
            self.breaches.append(f"paid {paid} times for {prompts} prompts, and {self.terms.total()} more are allowed")
        for prompt, asked in self.prompts.items():
            again = billed[sha256(prompt.encode())] - 1
            self.counts["paid for again, not for a purge"] += max(0, again - asked.excuses["purges"])
            struck = [
                name
                for name, fault in self.faults
                if any(call.meets(fault.from_s, fault.to_s + _AFTERMATH_S) for call in asked.calls)
            ]
            # Each replica may have paid under a fault.
            if again > asked.excuses.total() + 2 * len(struck):
                told = [*asked.excuses.elements(), *struck]
                self.breaches.append(f"paid {again + 1} times for {prompt!r}, excused by {told or 'nothing'}")


def sha256(data: bytes) -> str:
    """As text."""
    return hashlib.sha256(data).hexdigest()
