"""The faults of scripts/faults: mistakes that a developer may make, in the rooms where one costs money or a picture."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A mistake: in `file` the text `old`, which is there once, has become `new`."""

    name: str
    room: str
    file: str
    old: str
    new: str


TESTS = {
    "identity": ("tests/test_identity_fingerprint.py", "tests/test_identity_normalize.py"),
    "codec": ("tests/test_codec.py",),
    "flight": ("tests/test_flight.py", "tests/test_cache.py"),
    "canonical": ("tests/test_canonical.py", "tests/test_canonical_negatives.py"),
    "matching": ("tests/test_matching.py", "tests/test_matching_together.py", "tests/test_semantic.py"),
    "lease": ("tests/test_leases.py",),
    "journal": ("tests/test_journal.py", "tests/test_keep.py", "tests/test_keep_journal.py"),
    "budget": ("tests/test_ledger.py", "tests/test_budgets.py"),
}
"""The tests of each room, the quickest first."""

_FINGERPRINT = "cacheserver/identity/fingerprint.py"
_NORMALIZE = "cacheserver/identity/normalize.py"
_CODEC = "cacheserver/tiers/codec.py"
_FLIGHT = "cacheserver/flight.py"
_CANONICAL = "cacheserver/identity/canonical.py"
_CAPITALS = "cacheserver/identity/canonical_capitals.py"
_ENGLISH = "cacheserver/identity/canonical_english.py"
_MATCHING = "cacheserver/matching.py"
_LEASES = "cacheserver/control/leases.py"
_JOURNAL = "cacheserver/journal.py"
_KEEP = "cacheserver/keep.py"
_SCRIPTS = "cacheserver/control/budget_scripts.py"
_BUDGETS = "cacheserver/control/budgets.py"
_ACCOUNTS = "cacheserver/control/accounts.py"
_LEDGER = "cacheserver/accounting/ledger.py"

FAULTS = (
    Fault(
        "the compression of a lossless format is part of the identity",
        "identity",
        _FINGERPRINT,
        'values["output_compression"] = None',
        "pass",
    ),
    Fault(
        "a whole number that came as a double is another",
        "identity",
        _FINGERPRINT,
        "return int(value) if value.is_integer() else value",
        "return value",
    ),
    Fault(
        "the patterns of a catalog are not part of the identity",
        "identity",
        _FINGERPRINT,
        'values["catalog_patterns"] = patterns',
        "pass",
    ),
    Fault(
        "a looser match level than the profile's is taken, and a tighter one is not",
        "identity",
        _FINGERPRINT,
        "match_level >= own.level",
        "match_level <= own.level",
    ),
    Fault(
        "a prompt is not composed (NFC)",
        "identity",
        _NORMALIZE,
        'written = prompt if prompt.isascii() else unicodedata.normalize("NFC", prompt)',
        "written = prompt",
    ),
    Fault(
        "words that name something else with a capital lose it",
        "identity",
        _NORMALIZE,
        "if lowered in HOMOGRAPHS or ",
        "if ",
    ),
    Fault(
        "an exclamation mark after a number is dropped",
        "identity",
        _NORMALIZE,
        "kept[-1:].isupper() or kept[-1:].isdigit()",
        "kept[-1:].isupper()",
    ),
    Fault(
        "the checksum of an entry's head is not verified",
        "codec",
        _CODEC,
        "if xxh3_128_digest(checked) != checksum:",
        "if not checksum:",
    ),
    Fault(
        "the checksum of an image is not verified",
        "codec",
        _CODEC,
        "if xxh3_128_hexdigest(data) != xxh3:",
        "if not xxh3:",
    ),
    Fault(
        "an entry of the next version is read as one of ours",
        "codec",
        _CODEC,
        "if version > (newest := max(LAYOUTS)):",
        "if version > (newest := max(LAYOUTS)) + 1:",
    ),
    Fault(
        "metadata of exactly the largest size is written and not read",
        "codec",
        _CODEC,
        "if metadata_bytes > MAX_METADATA_BYTES:",
        "if metadata_bytes >= MAX_METADATA_BYTES:",
    ),
    Fault(
        "an entry answers for another partition",
        "codec",
        _CODEC,
        "is_of_key = entry.key.partition == key.partition and ",
        "is_of_key = ",
    ),
    Fault(
        "what was purged answers",
        "codec",
        _CODEC,
        " and not epochs.is_gone(entry.key, entry)",
        "",
    ),
    Fault(
        "half an identity digest is a whole one",
        "codec",
        _CODEC,
        "or len(digest) != 32:",
        "or not digest:",
    ),
    Fault(
        "a picture of another identity is accepted",
        "flight",
        _FLIGHT,
        "if self.key.matches(loaded.entry.key.digest):",
        "if loaded.entry.key.digest:",
    ),
    Fault(
        "a picture exactly as old as is accepted is refused",
        "flight",
        _FLIGHT,
        "loaded.entry.create_time_s >= self.not_before_s",
        "loaded.entry.create_time_s > self.not_before_s",
    ),
    Fault(
        "a flight has the earliest of its waiters' deadlines",
        "flight",
        _FLIGHT,
        "return max(deadlines)",
        "return min(deadlines)",
    ),
    Fault(
        "a refresh joins a generation that began before it",
        "flight",
        _FLIGHT,
        "return not waiter.refresh and all(",
        "return all(",
    ),
    Fault(
        "a load that is paid for is dropped when its callers hang up",
        "flight",
        _FLIGHT,
        "if waiter not in self.waiters or self.spending:",
        "if waiter not in self.waiters:",
    ),
    Fault(
        "a load waits only for the one before it, which may have been dropped while it waited itself",
        "flight",
        _FLIGHT,
        "for earlier in row if earlier.task is not None]",
        "for earlier in row[-1:] if earlier.task is not None]",
    ),
    Fault(
        "callers join a load that has ended",
        "flight",
        _FLIGHT,
        "flight.seal([])",
        "pass",
    ),
    Fault(
        "nobody succeeds a dead holder",
        "lease",
        _LEASES,
        " and tonumber(lease[2]) > now then",
        " then",
    ),
    Fault(
        "a lease taken again keeps the time it is to vanish at",
        "lease",
        _LEASES,
        "redis.call('PERSIST', KEYS[1])\n",
        "",
    ),
    Fault(
        "who looked before a release does not look again, and who looked since does",
        "lease",
        _LEASES,
        "tonumber(lease[3]) <= tonumber(ARGV[3])",
        "tonumber(lease[3]) > tonumber(ARGV[3])",
    ),
    Fault(
        "who was succeeded goes on as the holder",
        "lease",
        _LEASES,
        "if lease[1] and (lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2]) then return {0, 0} end",
        "",
    ),
    Fault(
        "who was succeeded frees its successor's lease",
        "lease",
        _LEASES,
        "if redis.call('HGET', KEYS[1], 'holder') ~= ARGV[1] then return 0 end",
        "",
    ),
    Fault(
        "what was found before another replica was waited for is not looked for again",
        "lease",
        "cacheserver/cache.py",
        "if any(lease.look_again for lease in leases):",
        "if not leases:",
    ),
    Fault(
        "number words and digits are two prompts",
        "canonical",
        _ENGLISH,
        "elif (token in _NUMBER_WORDS or token in _TENS) and",
        "elif token in _TENS and",
    ),
    Fault(
        "whatever asks for text to be drawn is simplified",
        "canonical",
        _CANONICAL,
        "simplified=not is_drawn",
        "simplified=True",
    ),
    Fault(
        "a capital that makes another word is folded",
        "canonical",
        _CAPITALS,
        "return word.istitle() and word.lower() in HOMOGRAPHS and not _is_in_a_name(words, at)",
        "return False",
    ),
    Fault(
        "twenty-one is twenty",
        "canonical",
        _ENGLISH,
        "return str(_TENS[token] + following), position + 2",
        "return str(_TENS[token]), position + 2",
    ),
    Fault(
        "what is shown is sorted with what it looks like",
        "canonical",
        _CANONICAL,
        "segments = [*contents, *(styles if is_open else sorted(set(styles)))]",
        "segments = sorted({*contents, *styles})",
    ),
    Fault(
        "quoted text is folded",
        "canonical",
        _CANONICAL,
        "tokens.append(VERBATIM + _told(part.text.strip()))",
        "tokens.append(VERBATIM + _told(part.text.strip().lower()))",
    ),
    Fault(
        "what an alias points to is believed",
        "matching",
        _MATCHING,
        "return entry.canonical_digest == canonical.digest",
        "return True",
    ),
    Fault(
        "a banned pair answers",
        "matching",
        _MATCHING,
        " and not is_own and not self._epochs.is_banned(key, other)",
        " and not is_own",
    ),
    Fault(
        "an alias may cross partitions",
        "matching",
        _MATCHING,
        "return other.partition == key.partition and not is_own",
        "return not is_own",
    ),
    Fault(
        "what another spelling failed with is told to nobody",
        "matching",
        _MATCHING,
        "failure = None if isinstance(error, QueueFullError) else error",
        "failure = None",
    ),
    Fault(
        "a picture of another prompt is taken for an older one of its own",
        "matching",
        _FLIGHT,
        "return loaded is not None and loaded.matched is None",
        "return loaded is not None",
    ),
    Fault(
        "spellings do not wait for one another at other replicas",
        "matching",
        "cacheserver/cache.py",
        "names.insert(0, lead.canonical_key.identity_name)",
        "pass",
    ),
    Fault(
        "a record is not flushed",
        "journal",
        _JOURNAL,
        "os.fsync(handle)",
        "pass",
    ),
    Fault(
        "what comes does not count for the room that is left",
        "journal",
        _JOURNAL,
        "if self._size_bytes + size_bytes > self.max_bytes:",
        "if self._size_bytes > self.max_bytes:",
    ),
    Fault(
        "the number of the last record is given to the next one",
        "journal",
        _JOURNAL,
        "self._next = found.last + 1",
        "self._next = found.last",
    ),
    Fault(
        "a record is removed before it is there",
        "journal",
        _JOURNAL,
        "await asyncio.wait({record.written})",
        "pass",
    ),
    Fault(
        "what could not be flushed is not flushed the next time",
        "journal",
        _JOURNAL,
        "self._unflushed |= numbers",
        "pass",
    ),
    Fault(
        "a held picture answers for another identity of its name",
        "journal",
        _KEEP,
        " or not key.matches(held.entry.key.digest)",
        "",
    ),
    Fault(
        "a refresh that comes home late takes the place of a newer one",
        "journal",
        _KEEP,
        "holder.create_time_s > held.handed_over_s",
        "holder.create_time_s < held.handed_over_s",
    ),
    Fault(
        "the last of a budget cannot be spent",
        "budget",
        _BUDGETS,
        "left(tightest) < wanted.microusd",
        "left(tightest) <= wanted.microusd",
    ),
    Fault(
        "what was set aside stays so when the call has ended",
        "budget",
        _ACCOUNTS,
        "spent=microusd, reserved=-reservation.microusd",
        "spent=microusd",
    ),
    Fault(
        "the last of a budget in Redis cannot be spent",
        "budget",
        _SCRIPTS,
        "if left < least then",
        "if left <= least then",
    ),
    Fault(
        "what a dead replica had sent is not spent",
        "budget",
        _SCRIPTS,
        "if reservation.state == 'sent' then",
        "if reservation.state == 'settled' then",
    ),
    Fault(
        "a row of the ledger is not flushed before its call is sent",
        "budget",
        _LEDGER,
        "PRAGMA synchronous = FULL",
        "PRAGMA synchronous = NORMAL",
    ),
    Fault(
        "a call that is given up takes the writing of its row with it",
        "budget",
        _LEDGER,
        "failure = await asyncio.shield(written)",
        "failure = await written",
    ),
)
"""Forty."""
