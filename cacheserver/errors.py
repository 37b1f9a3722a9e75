"""Every error this service raises on purpose.

CacheServerError                      carries the published reason that callers see
├── InvalidRequestError               INVALID_FIELD: names each field and what is wrong with it
├── MalformedMessageError             MALFORMED_MESSAGE
├── NotImplementedYetError            NOT_IMPLEMENTED
├── UnauthenticatedError              UNAUTHENTICATED
├── PermissionDeniedError             PERMISSION_DENIED
├── NotCachedError                    NOT_CACHED
├── KeyGoneError                      KEY_GONE
├── ImageTooLargeError                IMAGE_TOO_LARGE
├── ImageChangedError                 IMAGE_CHANGED
├── OffsetOutOfRangeError             OFFSET_OUT_OF_RANGE
├── NoSignedUrlsError                 NO_SIGNED_URLS
├── RequestIdRunningError             REQUEST_ID_RUNNING
├── RequestIdSpentError               REQUEST_ID_SPENT
├── VariantsExhaustedError            VARIANTS_EXHAUSTED
├── PromptDeniedError                 PROMPT_DENIED: the namespace's deny-list or moderation refuses the prompt
├── PiiFoundError                     PII_FOUND: the prompt holds personal data
├── CannotAffordError                 BUDGET_EXHAUSTED: names the budget, its end, and what would be cheaper
├── JobBudgetError                    BUDGET_EXHAUSTED: what a job may spend in all its runs is spent
├── TooSlowError                      TOO_SLOW: never reaches a caller, who gets a cheaper picture instead
├── InReviewError                     IN_REVIEW: never reaches a caller, who is told PENDING_REVIEW
├── LedgerUnavailableError            LEDGER_UNAVAILABLE: a call cannot be written down, so it is not made
├── UnknownReviewError                REVIEW_GONE: no such picture waits for review
├── UnknownUpstreamError              UPSTREAM_UNKNOWN: no upstream or budget of this name
├── UnknownCallError                  CALL_UNKNOWN: this replica remembers no such call
├── AccountsUnavailableError          ACCOUNTS_UNAVAILABLE: the figures of all replicas cannot be read now
├── CacheUnknownError                 CACHE_UNKNOWN: the last tier cannot be asked, and we were told not to pay
├── EntryNewerError                   ENTRY_NEWER: it is stored as only a newer release can read it, so nothing is paid
├── TierUnreachableError              TIER_UNREACHABLE: a purge or review that did not reach every tier
├── JournalFullError                  JOURNAL_FULL: what was made is not taken by the last tier, so nothing more is
├── OverloadedError                   OVERLOADED: more calls, input images or images to be read than are taken at a time
├── ShuttingDownError                 SHUTTING_DOWN
├── UpstreamError                     a generation failed
│   ├── PromptRefusedError            PROMPT_REFUSED
│   ├── UpstreamInvalidError          INVALID_FIELD, as the provider judged it
│   ├── UpstreamLimitedError          UPSTREAM_LIMITED
│   ├── UpstreamQuotaError            UPSTREAM_QUOTA_EXHAUSTED
│   ├── UpstreamNotEntitledError      UPSTREAM_NOT_ENTITLED
│   ├── UpstreamDownError             UPSTREAM_DOWN
│   ├── UpstreamBadImageError         UPSTREAM_BAD_IMAGE
│   └── QueueFullError                QUEUE_FULL
└── TierError                         a tier's answer is unknown; never reaches a caller of GetImage
    ├── TierTimeoutError
    ├── TierOpenError                 the breaker answered for the tier
    ├── CorruptEntryError             there is an entry and it is damaged
    ├── NewerEntryError               there is an entry of a codec this release cannot read
    └── EntryTooLargeError            the entry is above the tier's size limit
ConfigError                           the service refuses to start; one line that says what to mend
UnreadableFileError                   a file given to a command is not what it takes; names the file and the line

Messages tell a stranger what happened and what to try. Prompts, tokens and image bytes never enter them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import ClassVar

from cacheserver.model import ImageRequest, RateLimits, TierName


class CacheServerError(Exception):
    """An error with a published reason. `retry_after_s` is when trying again may help, if it may."""

    reason: ClassVar[str] = "INTERNAL"
    retry_after_s: float | None = None


class InvalidRequestError(CacheServerError):
    """One or more fields of a request are out of their range."""

    reason = "INVALID_FIELD"

    def __init__(self, violations: Mapping[str, str]) -> None:
        """`violations` maps a field's path to what is wrong with it and what would be right."""
        super().__init__("; ".join(f"{name}: {text}" for name, text in violations.items()))
        self.violations = dict(violations)


class MalformedMessageError(CacheServerError):
    """The bytes of a call are not the message they should be."""

    reason = "MALFORMED_MESSAGE"


class NotImplementedYetError(CacheServerError):
    """A field or call marked experimental."""

    reason = "NOT_IMPLEMENTED"


class UnauthenticatedError(CacheServerError):
    """No bearer token, or one nobody knows."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(CacheServerError):
    """The caller may not use the namespace or the operation."""

    reason = "PERMISSION_DENIED"


class NotCachedError(CacheServerError):
    """A cache-only read found nothing."""

    reason = "NOT_CACHED"


class KeyGoneError(CacheServerError):
    """No tier has the picture a key names."""

    reason = "KEY_GONE"


class ImageTooLargeError(CacheServerError):
    """The picture does not fit an inline answer. It is kept."""

    reason = "IMAGE_TOO_LARGE"


class ImageChangedError(CacheServerError):
    """The picture a download began with is not the one stored now."""

    reason = "IMAGE_CHANGED"


class OffsetOutOfRangeError(CacheServerError):
    """A download was to resume beyond the end of the picture."""

    reason = "OFFSET_OUT_OF_RANGE"


class NoSignedUrlsError(CacheServerError):
    """A URL was asked for and no tier can sign one."""

    reason = "NO_SIGNED_URLS"


class RequestIdRunningError(CacheServerError):
    """A NO_STORE call with this request_id still runs."""

    reason = "REQUEST_ID_RUNNING"


class RequestIdSpentError(CacheServerError):
    """This request_id was used before, and what it made was not kept or was for another request."""

    reason = "REQUEST_ID_SPENT"


class VariantsExhaustedError(CacheServerError):
    """The request has all the variants its namespace allows."""

    reason = "VARIANTS_EXHAUSTED"


class PromptDeniedError(CacheServerError):
    """The namespace's deny-list, or the moderation it asks, refuses the prompt. Nothing was looked up or spent."""

    reason = "PROMPT_DENIED"


class PiiFoundError(CacheServerError):
    """The prompt holds personal data, and the namespace refuses such prompts. Names the kinds, never the text."""

    reason = "PII_FOUND"


class CannotAffordError(CacheServerError):
    """A budget does not allow the generation. `rungs` are cheaper requests of the same picture, dearest first.

    `budget` is the budget's name, `reset_time_s` (seconds since 1970) when its period ends.
    """

    reason = "BUDGET_EXHAUSTED"

    def __init__(self, budget: str, *, reset_time_s: float, rungs: Sequence[ImageRequest] = ()) -> None:
        resets = datetime.fromtimestamp(reset_time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        super().__init__(f"Budget {budget} is used up; it starts anew at {resets}. Ask cheaper, or raise the budget.")
        self.budget = budget
        self.reset_time_s = reset_time_s
        self.rungs = tuple(rungs)


class JobBudgetError(CacheServerError):
    """A job's own budget does not allow the generation. `budget` is the budget's name; no period ends."""

    reason = "BUDGET_EXHAUSTED"

    def __init__(self, job: str, limit_microusd: int) -> None:
        dollars = f"${limit_microusd / 1_000_000:,.2f}"
        super().__init__(f"Job {job} may spend {dollars} in all its runs, and not this too. Run it with more.")
        self.budget = f"job:{job}"


class TooSlowError(CacheServerError):
    """The picture is not expected within a caller's max_wait, and the caller accepts one of the cheaper `rungs`."""

    reason = "TOO_SLOW"

    def __init__(self, rungs: Sequence[ImageRequest]) -> None:
        super().__init__("Not expected within max_wait.")
        self.rungs = tuple(rungs)


class InReviewError(CacheServerError):
    """The picture is made and waits for a person's approval."""

    reason = "IN_REVIEW"


class LedgerUnavailableError(CacheServerError):
    """The ledger on this machine's disk cannot be written, so nothing is bought. What is cached is served."""

    reason = "LEDGER_UNAVAILABLE"
    retry_after_s = 5.0


class UnknownReviewError(CacheServerError):
    """No picture of this key, or similar hit of this id, waits for review: it was resolved, or never did."""

    reason = "REVIEW_GONE"


class UnknownUpstreamError(CacheServerError):
    """There is no upstream, or no budget, of this name."""

    reason = "UPSTREAM_UNKNOWN"


class UnknownCallError(CacheServerError):
    """This replica remembers no call of this id, or it was somebody else's."""

    reason = "CALL_UNKNOWN"


class AccountsUnavailableError(CacheServerError):
    """The figures that all replicas share cannot be read or written now. Nothing is lost: they are told later."""

    reason = "ACCOUNTS_UNAVAILABLE"
    retry_after_s = 5.0


class CacheUnknownError(CacheServerError):
    """Whether the picture is stored cannot be told now, and the service is set not to pay then."""

    reason = "CACHE_UNKNOWN"
    retry_after_s = 5.0


class EntryNewerError(CacheServerError):
    """The picture is stored, in a codec of a newer release: another replica may read it, and none has to pay again."""

    reason = "ENTRY_NEWER"
    retry_after_s = 1.0


class TierUnreachableError(CacheServerError):
    """A purge, the resolution of a review, a ban or a switch did not reach these tiers."""

    reason = "TIER_UNREACHABLE"
    retry_after_s = 5.0

    def __init__(self, tiers: Sequence[TierName], message: str = "") -> None:
        super().__init__(message or f"not purged in: {', '.join(tiers)}. Purge again when they are back.")
        self.tiers = tuple(tiers)


class JournalFullError(CacheServerError):
    """The journal has no room for another picture: nothing is made or stored until the last tier takes some of it."""

    reason = "JOURNAL_FULL"
    retry_after_s = 5.0


class OverloadedError(CacheServerError):
    """More calls are in progress, or more input images or images to be read in memory, than the service takes."""

    reason = "OVERLOADED"
    retry_after_s = 1.0


class ShuttingDownError(CacheServerError):
    """The service is going down and starts nothing new."""

    reason = "SHUTTING_DOWN"
    retry_after_s = 1.0


class UpstreamError(CacheServerError):
    """A generation failed. Shared by all who wait for it, and forgotten.

    `cost_microusd` is what the failed call cost: 0 where the provider bills nothing for it, None where nobody
    knows. `upstream_request_id` is the provider's own id of the call, if it gave one. `stated_wait_s` is the wait
    that the provider asked for, None if it did not say; `told` the rate limits that its answer told of.
    """

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        cost_microusd: int | None = 0,
        upstream_request_id: str = "",
    ) -> None:
        super().__init__(message)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s
        self.stated_wait_s = retry_after_s
        self.cost_microusd = cost_microusd
        self.upstream_request_id = upstream_request_id
        self.told: RateLimits | None = None


class PromptRefusedError(UpstreamError):
    """The upstream's moderation refuses the prompt or what came of it.

    `after_seeing`: it looked at the picture, so another picture of the same prompt may pass. `cached`: the
    refusal is an earlier call's, remembered for a while.
    """

    reason = "PROMPT_REFUSED"

    def __init__(
        self,
        message: str,
        *,
        after_seeing: bool = False,
        cached: bool = False,
        cost_microusd: int | None = 0,
        upstream_request_id: str = "",
    ) -> None:
        super().__init__(message, cost_microusd=cost_microusd, upstream_request_id=upstream_request_id)
        self.after_seeing = after_seeing
        self.cached = cached


class UpstreamInvalidError(UpstreamError):
    """The upstream says a parameter is wrong; `field` names it where the upstream did. `cached`: a while ago."""

    reason = "INVALID_FIELD"

    def __init__(self, message: str, *, field: str = "", cached: bool = False, upstream_request_id: str = "") -> None:
        super().__init__(message, upstream_request_id=upstream_request_id)
        self.field = field
        self.cached = cached


class UpstreamLimitedError(UpstreamError):
    """The upstream's rate limit."""

    reason = "UPSTREAM_LIMITED"
    retry_after_s = 5.0


class UpstreamQuotaError(UpstreamError):
    """The upstream account's credit or spend limit is used up; a person must act."""

    reason = "UPSTREAM_QUOTA_EXHAUSTED"


class UpstreamNotEntitledError(UpstreamError):
    """The upstream does not accept our key, or not for this model; a person must act."""

    reason = "UPSTREAM_NOT_ENTITLED"


class UpstreamDownError(UpstreamError):
    """The upstream failed, did not answer in time, or cannot be reached."""

    reason = "UPSTREAM_DOWN"
    retry_after_s = 2.0


class UpstreamBadImageError(UpstreamError):
    """The upstream answered with something that is not the image it should be."""

    reason = "UPSTREAM_BAD_IMAGE"
    retry_after_s = 2.0


class QueueFullError(UpstreamError):
    """More generations wait than the queue holds."""

    reason = "QUEUE_FULL"
    retry_after_s = 5.0


class TierError(CacheServerError):
    """A tier could not say what it has. Unknown is not absent."""

    reason = "TIER_UNKNOWN"


class TierTimeoutError(TierError):
    """A tier did not answer within its deadline."""


class TierOpenError(TierError):
    """A tier failed too often and is not asked for a while."""


class CorruptEntryError(TierError):
    """A tier has an entry under this key and it is damaged; overwriting it is right."""


class NewerEntryError(TierError):
    """A tier has an entry written by a newer release; it must not be overwritten."""


class EntryTooLargeError(TierError):
    """An entry is above a tier's size limit. The tier is well; trying again will not help."""


class ConfigError(Exception):
    """The configuration cannot work. The message is one line: the setting, what is wrong, how to mend it."""


class UnreadableFileError(Exception):
    """A file given to a command cannot be read or is not what the command takes: names the file, line and field."""


def cut_off(error: BaseException | None) -> None:
    """Cut an error off from where it was raised: those frames hold calls with all their images, and hold it too."""
    while error is not None and error.__traceback__ is not None:  # causes may lead back to where they began
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
