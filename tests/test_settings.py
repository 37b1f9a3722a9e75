"""Settings: what is set where, what is refused and in which words, and that the example file is complete."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

import cacheserver
from cacheserver.errors import ConfigError
from cacheserver.machine import Room
from cacheserver.model import Caller, MatchLevel, Permission, Priority, TierName
from cacheserver.settings import Settings, environment_names, is_loopback, load_settings, setting_names, warnings
from cacheserver.settings.changes import needing_restart

EXAMPLE = Path(cacheserver.__file__).with_name("config.example.toml")
TOKEN_SHA256 = hashlib.sha256(b"secret").hexdigest()
MIB = 1024 * 1024
KEY = {"OPENAI_API_KEY": "sk-very-secret"}

Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str) -> Path:
        file = tmp_path / "config.toml"
        file.write_text(text)
        return file

    return write_file


# ---- Defaults


def test_nothing_configured_is_a_painter_on_loopback_with_our_own_valkey_and_a_directory() -> None:
    settings = load_settings(None, {})
    assert [upstream.kind for upstream in settings.upstreams] == ["painter"]
    assert settings.model == "painter"
    assert settings.tier_names == (TierName.MEMORY, TierName.REDIS, TierName.DISK)
    assert settings.runs_own_valkey
    assert settings.disk_path == Path(".cacheserver/images")
    assert warnings(settings) == []


def test_a_small_memory_takes_an_eighth_of_itself_per_image() -> None:
    settings = load_settings(None, {"CACHESERVER_MEMORY_MAX_BYTES": "8000"})
    assert settings.memory.sizes(None) == (8000, 1000)


@pytest.mark.parametrize(
    ("limit_mib", "is_container", "max_mib"),
    [(2048, True, 512), (65_536, True, 16_384), (64, True, 16), (65_536, False, 256), (512, False, 128)],
)
def test_unless_it_is_set_memory_is_a_quarter_of_the_container_or_a_little_of_the_machine(
    limit_mib: int,
    is_container: bool,  # noqa: FBT001 - a table's column
    max_mib: int,
) -> None:
    room = Room(limit_mib * MIB, is_container=is_container, used_bytes=lambda: 0)
    assert load_settings(None, {}).memory.sizes(room) == (max_mib * MIB, min(max_mib * MIB // 8, 32 * MIB))
    assert load_settings(None, {"CACHESERVER_MEMORY_MAX_BYTES": "8000"}).memory.sizes(room) == (8000, 1000)


def test_where_nobody_knows_how_much_memory_there_is_memory_is_256_mib() -> None:
    assert load_settings(None, {}).memory.sizes(None) == (256 * MIB, 32 * MIB)


@pytest.mark.parametrize(
    ("env", "tiers"),
    [
        ({}, ["memory", "redis", "disk"]),
        ({"CACHESERVER_S3_BUCKET": "b"}, ["memory", "redis", "s3"]),
        ({"CACHESERVER_REDIS__EMBEDDED": "false"}, ["memory", "disk"]),
        ({"CACHESERVER_REDIS__EMBEDDED": "false", "CACHESERVER_REDIS_URL": "redis://r"}, ["memory", "redis", "disk"]),
        ({"CACHESERVER_SERVER__GRPC_HOST": "0.0.0.0", "CACHESERVER_INSECURE": "true"}, ["memory", "disk"]),
        ({"CACHESERVER_TIERS": "memory, disk, s3", "CACHESERVER_S3_BUCKET": "b"}, ["memory", "disk", "s3"]),
    ],
)
def test_the_tiers_follow_from_what_is_configured(env: dict[str, str], tiers: list[str]) -> None:
    assert list(load_settings(None, KEY | env).tier_names) == tiers


def test_local_s3_counts_as_embedded() -> None:
    settings = load_settings(None, {}, local_s3=True)
    assert settings.s3.local
    assert settings.tier_names[-1] == TierName.S3
    assert settings.model == "painter"


# ---- Where settings come from


def test_the_environment_overrides_the_file(write: Write) -> None:
    file = write("data_dir = 'a'\n[redis]\nttl_s = 5\nprefix = 'p:'")
    settings = load_settings(file, {"CACHESERVER_REDIS__TTL_S": "7", "CACHESERVER_DATA_DIR": "b"})
    assert (settings.redis.ttl_s, settings.redis.prefix, settings.data_dir) == (7.0, "p:", Path("b"))


def test_the_public_environment_names_work() -> None:
    env = {
        "CACHESERVER_GRPC_PORT": "1",
        "CACHESERVER_HTTP_PORT": "2",
        "CACHESERVER_DATA_DIR": "/d",
        "CACHESERVER_MEMORY_MAX_BYTES": "3",
        "CACHESERVER_REDIS_URL": "redis://r",
        "CACHESERVER_S3_BUCKET": "b",
        "CACHESERVER_S3_ENDPOINT": "http://s3",
        "CACHESERVER_S3_PREFIX": "p/",
    }
    settings = load_settings(None, KEY | env)
    assert (settings.server.grpc_port, settings.server.http_port, settings.memory.max_bytes) == (1, 2, 3)
    assert settings.data_dir == Path("/d")
    assert settings.redis.url is not None
    assert settings.redis.url.get_secret_value() == "redis://r"
    assert (settings.s3.bucket, settings.s3.endpoint, settings.s3.prefix) == ("b", "http://s3", "p/")


def test_a_variable_that_is_set_to_nothing_is_unset() -> None:
    assert load_settings(None, {"CACHESERVER_REDIS_URL": "", "OPENAI_API_KEY": ""}).redis.url is None


def test_the_config_file_is_found_in_the_working_directory_or_where_the_environment_says(tmp_path: Path) -> None:
    (tmp_path / "cacheserver.toml").write_text("data_dir = 'here'")
    (tmp_path / "other.toml").write_text("data_dir = 'there'")
    assert load_settings(None, {}).data_dir == Path("here")
    assert load_settings(None, {"CACHESERVER_CONFIG": "other.toml"}).data_dir == Path("there")


def test_repeated_tables_can_come_from_the_environment_as_json() -> None:
    upstreams = [{"name": "a", "api_key": "k", "models": ["m"]}]
    settings = load_settings(None, {"CACHESERVER_UPSTREAMS": json.dumps(upstreams)})
    assert settings.upstreams[0].models == {"m": "m"}


def test_a_namespace_from_the_environment_joins_those_of_the_file(write: Write) -> None:
    file = write("[namespaces.a]\nttl_s = 1\nmax_variants = 3\n[namespaces.b]")
    namespaces = load_settings(file, {"CACHESERVER_NAMESPACES": '{"a": {"ttl_s": 2}, "c": {}}'}).namespaces
    assert set(namespaces) == {"default", "a", "b", "c"}
    assert (namespaces["a"].ttl_s, namespaces["a"].max_variants) == (2.0, 3)


def test_settings_made_by_hand_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHESERVER_DATA_DIR", "elsewhere")
    assert Settings.model_validate({"default_model": "x"}).data_dir == Path(".cacheserver")


def test_an_openai_key_in_the_environment_is_an_upstream() -> None:
    settings = load_settings(None, KEY | {"OPENAI_BASE_URL": "http://relay/v1"})
    (upstream,) = settings.upstreams
    assert (upstream.kind, upstream.base_url, upstream.key()) == ("openai", "http://relay/v1", "sk-very-secret")
    assert settings.model == "gpt-image-2"


def test_a_configured_upstream_wins_over_the_openai_key(write: Write) -> None:
    file = write("[[upstreams]]\nname = 'mine'\nbase_url = 'http://gpu/v1'\nmodels = { fast = 'flux' }")
    settings = load_settings(file, KEY)
    assert [(upstream.name, upstream.key(), upstream.models) for upstream in settings.upstreams] == [
        ("mine", "", {"fast": "flux"})
    ]


def test_keys_and_tokens_come_from_files_and_variables(write: Write, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\n")
    (tmp_path / "token").write_text("secret\n")
    file = write("""
        [[upstreams]]
        name = "a"
        api_key_file = "key"
        models = ["a"]
        [[upstreams]]
        name = "b"
        api_key_env = "MY_KEY"
        models = ["b"]
        [[callers]]
        name = "shop"
        token_file = "token"
    """)
    settings = load_settings(file, {"MY_KEY": "from-env"})
    assert [upstream.key() for upstream in settings.upstreams] == ["from-file", "from-env"]
    ((digest, _),) = settings.caller_tokens
    assert digest.hex() == TOKEN_SHA256


# ---- What settings become


def test_callers_become_callers(write: Write) -> None:
    file = write(f"""
        [[callers]]
        name = "shop"
        token_sha256 = "{TOKEN_SHA256}"
        allow = ["read", "put"]
        namespaces = ["default", "shop"]
        max_priority = "batch"
        [[callers]]
        name = "ops"
        token_sha256 = "{"0" * 64}"
        namespaces = ["*"]
        [namespaces.shop]
    """)
    (digest, shop), (_, ops) = load_settings(file, KEY).caller_tokens
    assert digest == hashlib.sha256(b"secret").digest()
    assert shop == Caller(
        "shop", frozenset({Permission.READ, Permission.PUT}), frozenset({"default", "shop"}), Priority.BATCH
    )
    assert ops.namespaces is None
    assert ops.permissions == {Permission.READ, Permission.GENERATE}


def test_namespaces_become_namespaces_and_default_is_always_there(write: Write) -> None:
    file = write("""
        [namespaces.shop]
        partition = "pictures"
        profile = "catalog"
        catalog_patterns = ['SKU-\\d+']
        default_priority = "batch"
        ttl_s = 60
    """)
    namespaces = load_settings(file, {}).namespaces
    assert set(namespaces) == {"default", "shop"}
    assert (namespaces["default"].partition, namespaces["default"].default_model) == ("default", "painter")
    shop = namespaces["shop"]
    assert (shop.name, shop.partition, shop.profile, shop.catalog_patterns) == (
        "shop",
        "pictures",
        "catalog",
        (r"SKU-\d+",),
    )
    assert (shop.default_priority, shop.ttl_s, shop.max_ttl_s) == (Priority.BATCH, 60.0, None)


def test_where_similarity_is_not_enabled_every_namespace_is_exact(write: Write) -> None:
    text = "[namespaces.shop]\nsimilarity = 'canonical'\n[namespaces.strict]\nsimilarity = 'exact'"
    levels = {name: each.similarity for name, each in load_settings(write(text), {}).namespaces.items()}
    assert levels == {
        "default": MatchLevel.CANONICAL,
        "shop": MatchLevel.CANONICAL,
        "strict": MatchLevel.EXACT,
    }
    off = load_settings(write(f"{text}\n[similarity]\nenabled = false"), {}).namespaces
    assert {each.similarity for each in off.values()} == {MatchLevel.EXACT}


def test_similarity_is_enabled_and_disabled_without_a_restart_and_its_sample_is_not(write: Write) -> None:
    running = load_settings(None, {})
    read = load_settings(write("[similarity]\nenabled = false\nreview_percent = 5"), {})
    assert needing_restart(running, read) == ["similarity.review_percent"]


def test_what_is_wrong_everywhere_is_watched_without_a_word(write: Write) -> None:
    rules = load_settings(None, {}).alarm_rules
    assert [(rule.name, str(rule.kind)) for rule in rules] == [
        ("breakers", "breaker_open"),
        ("errors", "error_rate_above"),
        ("unsaved", "unsaved_age_above"),
        ("journal", "journal_share_above"),
    ]
    assert load_settings(write("[alerting]\nbuilt_in = false"), {}).alarm_rules == ()


def test_an_alarm_takes_the_place_of_the_built_in_one_of_its_name(write: Write) -> None:
    file = write("""
        [alerting]
        min_requests = 7
        runbook_base_url = "https://wiki/book"
        [[alarms]]
        name = "errors"
        kind = "error_rate_above"
        threshold = 0.5
        [[alarms]]
        name = "dear"
        kind = "spend_per_hour_above"
        threshold = 20
        runbook_url = "https://wiki/dear"
    """)
    rules = {rule.name: rule for rule in load_settings(file, {}).alarm_rules}
    assert list(rules) == ["breakers", "errors", "unsaved", "journal", "dear"]
    assert (rules["errors"].threshold, rules["errors"].min_requests) == (0.5, 7)
    assert rules["errors"].runbook_url == "https://wiki/book#cacheservererrorrateabove"
    assert rules["dear"].runbook_url == "https://wiki/dear"


def test_the_token_of_the_webhook_comes_from_the_environment(write: Write) -> None:
    file = write("[alerting]\nwebhook_url = 'https://h/very-secret'\nwebhook_token_env = 'T'")
    alerting = load_settings(file, {"T": "very-secret"}).alerting
    assert alerting.webhook_token is not None
    assert alerting.webhook_token.get_secret_value() == "very-secret"
    assert "very-secret" not in repr(alerting)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.com", False),
        ("", False),
    ],
)
def test_loopback_is_told_without_asking_dns(host: str, loopback: bool) -> None:  # noqa: FBT001 - a table's column
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "insecure = true\n[server]\ngrpc_host = '0.0.0.0'",
            ["everything travels in the clear", "insecure", "no Redis"],
        ),
        (
            f"[server]\ngrpc_host = '::'\n[[callers]]\nname = 'a'\ntoken_sha256 = '{TOKEN_SHA256}'",
            ["tokens travel in the clear", "no Redis"],
        ),
        (
            f"[server]\nhttp_host = '::'\n[[callers]]\nname = 'a'\ntoken_sha256 = '{TOKEN_SHA256}'",
            ["http_host: without http_tls_cert_file callers' tokens travel in the clear", "no Redis"],
        ),
        ("[namespaces.a]\nstale_if_error_s = 9", ["namespaces.a.stale_if_error_s: without ttl_s an image has no end"]),
        ("[namespaces.a]\nttl_s = 9\nstale_if_error_s = 9", []),
        ("[limit_groups.openai]\nimages_per_minute = 271", ["100 calls at a time make 270 images a minute"]),
        ("[limit_groups.openai]\nimages_per_minute = 270", []),
        ("[limit_groups.openai]\nconcurrent = 1", []),
        ("[redis]\nurl = 'redis://shared'", ["delivery.url_secret_file"]),
        (f"[redis]\nurl = 'redis://shared'\n[delivery]\nurl_secret = '{'s' * 32}'", []),
        ("[redis]\nurl = 'redis://shared'\n[delivery]\nurl_secret_file = 'secrets'", []),
    ],
)
def test_what_works_and_may_not_be_meant_is_warned_of(write: Write, text: str, words: list[str]) -> None:
    lines = warnings(load_settings(write(text), KEY))
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


# ---- What is refused

_CALLER = f"[[callers]]\nname = 'a'\ntoken_sha256 = '{TOKEN_SHA256}'\n"
_ALARM = "[[alarms]]\nname = 'a'\n"
_REFUSED: list[tuple[str, dict[str, str], str]] = [
    # Typos name the nearest setting, in the same table if there is one.
    ("[redis]\ntimeout = 1", {}, r"redis\.timeout: there is no such setting; did you mean redis\.timeout_s\?"),
    ("[sever]\ngrpc_port = 1", {}, r"sever: .* did you mean server\?"),
    ("datadir = 'x'", {}, r"datadir: .* did you mean data_dir\?"),
    ("Data_Dir = 'x'", {}, r"Data_Dir: .* did you mean data_dir\?"),
    ("[Redis]", {}, r"Redis: .* did you mean redis\?"),
    ("[[upstreams]]\nname = 'a'\nbaseurl = 'x'", {}, r"upstreams\[0\]\.baseurl: .* upstreams\[\]\.base_url\?"),
    ("[namespaces.shop]\nttl = 1", {}, r"namespaces\.shop\.ttl: .* namespaces\.NAME\.ttl_s\?"),
    ("", {"CACHESERVER_GRCP_PORT": "1"}, r"CACHESERVER_GRCP_PORT: .* did you mean CACHESERVER_GRPC_PORT\?"),
    ("", {"CACHESERVER_REDIS": '{"ttl_s": 1}'}, r"CACHESERVER_REDIS: there is no such environment variable"),
    ("", {"CACHESERVER_NAMESPACES__A__TTL_S": "1"}, r"CACHESERVER_NAMESPACES__A__TTL_S: there is no such environment"),
    ("", {"CACHESERVER_REDIS__TLL_S": "1"}, r"CACHESERVER_REDIS__TLL_S: .* CACHESERVER_REDIS__TTL_S\?"),
    # Values out of range say what would be right, and where the value came from.
    ("[redis]\ntimeout_s = 0", {}, r"redis\.timeout_s: should be greater than 0\. It is: Seconds to connect"),
    ("", {"CACHESERVER_GRPC_PORT": "70000"}, r"server\.grpc_port \(set by CACHESERVER_GRPC_PORT\): .* 65535"),
    ("", {"CACHESERVER_MEMORY_MAX_BYTES": "1 GB"}, r"memory\.max_bytes \(set by .*\): should be a valid integer"),
    ("[memory]\npolicy = 'lfu'", {}, r"memory\.policy: should be 'lru' or 'value'"),
    ("[memory]\nhigh_water = 90", {}, r"memory\.high_water: should be less than or equal to 1\. It is: Share of"),
    ("[generation]\nwhen_unknown = 'ask'", {}, r"generation\.when_unknown: should be 'pay' or 'refuse'"),
    ("[redis]\nurl = 'http://r'", KEY, r"redis\.url: should begin with one of redis://"),
    ("[s3]\nbucket = 'b'\nendpoint = 's3.example.com'", KEY, r"s3\.endpoint: should be a URL"),
    ("[s3]\nbucket = 'b'\nendpoint = 'http://u:pw@s3'", KEY, r"s3\.endpoint: should not hold a user or password"),
    ("redis = 3", {}, r"redis: should be a table; write \[redis\]"),
    ("redis = 3", {"CACHESERVER_REDIS__TTL_S": "1"}, r"redis: should be a table"),
    ("[namespaces.'Bad Name']", {}, r"namespaces\.Bad Name.*: should be 1 to 63 characters"),
    ("[namespaces.a]\ncatalog_patterns = ['(']", {}, r"namespaces\.a\.catalog_patterns: .* is no regular expression"),
    ("[namespaces.a]\ncatalog_patterns = ['x*']", {}, r"namespaces\.a\.catalog_patterns: .* matches the empty text"),
    ("[namespaces.a]\nprofile = 'catalogue'", {}, r"namespaces\.a\.profile: should be one of exact, standard, catalog"),
    ("[namespaces.a]\nttl_s = 9\nmax_ttl_s = 8", {}, r"namespaces\.a: ttl_s should not be above max_ttl_s"),
    (
        "[s3]\nbucket = 'b'\nlifecycle_rule = true\n[namespaces.a]\nttl_s = 9",
        KEY,
        r"namespaces\.(a|default)\.max_ttl_s: not set, so its images may have no end, .*",
    ),
    ('[namespaces.a]\nexpiry = "sliding"', {}, r"namespaces\.a: .*needs ttl_s or max_ttl_s"),
    ('[namespaces.a]\nexpiry = "sliding"\nttl_s = 9\nmode = "observe"', {}, r"namespaces\.a: .*needs mode serve"),
    ('[namespaces.a]\nmode = "observe"\nstale_if_error_s = 8', {}, r"namespaces\.a: .*need mode serve"),
    ("[namespaces.a]\nstale_while_revalidate_s = -1", {}, r"namespaces\.a\.stale_while_revalidate_s: .*"),
    # Settings that do not go together.
    ("[server]\ntls_cert_file = 'x'", {}, r"server: one of tls_cert_file and tls_key_file is set and"),
    ("[server]\nupload_memory_bytes = 1000", {}, r"server: upload_memory_bytes is less than three times"),
    ("[server]\nmax_receive_bytes = 100_000_000", {}, r"less than three times max_receive_bytes; raise it"),
    ("[server]\ntls_cert_file = 'x'\ntls_key_file = 'x'", {}, r"server\.tls_cert_file: x cannot be read"),
    ("[s3]\naccess_key = 'x'", {}, r"s3: one of access_key and secret_key is set and the"),
    ("[s3]\nendpoint = 'http://s3'", {}, r"s3: endpoint is set and bucket is not"),
    ("[s3]\nlocal = true\nbucket = 'b'", KEY, r"s3: local \(--local-s3\) runs its own server"),
    ("", {"CACHESERVER_REDIS_URL": "redis://a", "CACHESERVER_REDIS__URL": "redis://b"}, r"sets the same; remove one"),
    ("", {"OPENAI_BASE_URL": "http://x"}, r"OPENAI_BASE_URL: is set without OPENAI_API_KEY"),
    ("", KEY | {"OPENAI_BASE_URL": "x"}, r"upstreams\[0\]\.base_url \(set by OPENAI_BASE_URL\): should be a URL"),
    ("", {"CACHESERVER_UPSTREAMS": "sk-very-secret"}, r"CACHESERVER_UPSTREAMS: is not JSON"),
    (
        "",
        {"CACHESERVER_UPSTREAMS": '"sk-very-secret"'},
        r"upstreams \(set by CACHESERVER_UPSTREAMS\): should be a list",
    ),
    # Callers.
    ("[server]\ngrpc_host = '0.0.0.0'", KEY, r"server\.grpc_host: 0\.0\.0\.0 can be reached .* add \[\[callers\]\]"),
    ("[server]\nhttp_host = '::'", KEY, r"server\.http_host: :: can be reached"),
    ("[[callers]]\nname = 'a'", KEY, r"callers\[0\]: set one of token_sha256 and token_file, or certificate"),
    ("[[callers]]\nname = 'a'\ntoken_sha256 = 'very-secret'", KEY, r"callers\[0\]\.token_sha256: .*64 hexadecimal"),
    ("[[callers]]\nname = 'a'\ntoken_file = 'gone'", KEY, r"callers\[0\]\.token_file: gone cannot be read: No such"),
    (_CALLER + _CALLER, KEY, r"callers\[1\]\.name: another caller has this name"),
    (_CALLER + _CALLER.replace("'a'", "'b'"), KEY, r"callers\[1\]\.token_sha256: another caller has this token"),
    (_CALLER + "namespaces = ['shop']", KEY, r"callers\[0\]\.namespaces: there is no namespace shop; add \[namespaces"),
    (_CALLER + "allow = ['write']", KEY, r"callers\[0\]\.allow\[0\]: should be 'read', 'generate'"),
    # Tiers.
    ("tiers = ['memory', 's3']", {}, r"s3\.bucket is not set"),
    ("tiers = ['memory', 'disk']\n[s3]\nbucket = 'b'", KEY, r'tiers: lacks "s3"'),
    ("tiers = ['redis', 'memory']", {}, r'tiers: should begin with "memory"'),
    ("tiers = ['memory', 'memory']", {}, r'tiers: should begin with "memory"'),
    ("tiers = ['memory', 'upstream']", {}, r"tiers\[1\]: should be one of memory, redis, disk, s3"),
    ("", {"CACHESERVER_TIERS": "memory,s4"}, r"tiers\[1\] \(set by CACHESERVER_TIERS\): should be one of"),
    ("tiers = ['disk']", {}, r'tiers: should begin with "memory"'),
    ("tiers = ['memory', 'redis']\n[redis]\nembedded = false", {}, r'tiers: has "redis", redis\.url is not set'),
    # A placeholder never reaches production.
    ("[redis]\nurl = 'redis://r'", {}, r"upstreams: there is none; set OPENAI_API_KEY"),
    ("[s3]\nbucket = 'b'", {}, r"upstreams: there is none"),
    (_CALLER, {}, r"upstreams: there is none"),
    ("insecure = true\n[server]\ngrpc_host = '0.0.0.0'", {}, r"upstreams: there is none"),
    (
        _CALLER + "[[upstreams]]\nname = 'p'\nkind = 'painter'\nmodels = ['painter']",
        {},
        r"upstreams\[0\]\.kind: the pa",
    ),
    ("[[upstreams]]\nname = 'p'\nkind = 'painter'\nmodels = ['gpt-image-2']", {}, r"upstreams\[0\]\.kind: the painter"),
    # Upstreams.
    ("[[upstreams]]\nname = 'a'\napi_key_env = 'GONE'", {}, r"api_key_env: GONE is not set in the environment"),
    (
        "[[upstreams]]\nname = 'a'\napi_key_env = 'A'\napi_key = 'very-secret'",
        {},
        r"upstreams\[0\]: set one of api_key",
    ),
    ("[[upstreams]]\nname = 'a'\nmodels = []", {}, r"upstreams\[0\]\.models: "),
    ("[[upstreams]]\nname = 'a'\n[[upstreams]]\nname = 'a'", {}, r"upstreams\[1\]\.name: another upstream is called a"),
    ("[limit_groups.b]\nimages_per_minute = 5", KEY, r"limit_groups\.b: no upstream is in this group"),
    ("[generation]\nladder = ['best']", KEY, r"generation\.ladder\[0\]: best should be a quality"),
    ("[generation]\nladder = ['dall-e-9:low']", KEY, r"generation\.ladder\[0\]: dall-e-9:low should be a quality"),
    (
        "[namespaces.shop]\nquality_by_use = { list = 'best' }",
        KEY,
        r"namespaces\.shop\.quality_by_use\.list: best is no quality",
    ),
    ("default_model = 'x'", KEY, r"default_model: no upstream serves x; there is gpt-image-2"),
    ("[namespaces.a]\ndefault_model = 'x'", {}, r"namespaces\.a\.default_model: no upstream serves x"),
    # Alarms.
    ("[[alarms]]\nname = 'a'\nkind = 'hits'", {}, r"alarms\[0\]\.kind: should be 'hit_rate_below'"),
    (_ALARM + "kind = 'hit_rate_below'", {}, r"alarms\[0\]: threshold should be set"),
    (_ALARM + "kind = 'similar_rate_below'", {}, r"alarms\[0\]: threshold should be set"),
    (_ALARM + "kind = 'similar_rate_above'\nthreshold = 80", {}, r"alarms\[0\]: threshold should be 0 to 1"),
    ("[similarity]\nreview_percent = 101", {}, r"similarity\.review_percent: "),
    (_ALARM + "kind = 'hit_rate_above'\nthreshold = 80", {}, r"alarms\[0\]: threshold should be 0 to 1"),
    (_ALARM + "kind = 'breaker_open'\nnamespace = 'default'", {}, r"alarms\[0\]: namespace has no meaning for breaker"),
    (_ALARM + "kind = 'spend_per_hour_above'\ntarget = 's3'", {}, r"alarms\[0\]: target has no meaning for spend_per"),
    (
        _ALARM + "kind = 'breaker_open'\ntarget = 's3'",
        {},
        r"alarms\[0\]\.target: no tier .* there are redis, disk",
    ),
    (
        _ALARM + "kind = 'error_rate_above'\nnamespace = 'shop'",
        {},
        r"alarms\[0\]\.namespace: there is no namespace shop",
    ),
    (2 * (_ALARM + "kind = 'breaker_open'\n"), {}, r"alarms\[1\]\.name: another alarm is called a"),
    ("[alerting]\nwebhook_url = 'hooks/very-secret'", {}, r"alerting\.webhook_url: should be a URL"),
    ("[alerting]\nwebhook_token = 'very-secret'", {}, r"alerting\.webhook_token: is set and webhook_url is not"),
    ("[alerting]\nwebhook_token_env = 'GONE'", {}, r"alerting\.webhook_token_env: GONE is not set in the environment"),
    (
        "[alerting]\nwebhook_url = 'http://h'\nwebhook_token_env = 'T'",
        {"T": "very-secret\n"},
        r"alerting\.webhook_token: has characters that no header may carry",
    ),
    # Files.
    ("a = b", {}, r"config\.toml: is not TOML: .*line 1"),
]


@pytest.mark.parametrize(("text", "env", "message"), _REFUSED)
def test_what_cannot_work_is_refused_in_one_line(write: Write, text: str, env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load_settings(write(text), env)
    assert "\n" not in str(refused.value)
    assert "very-secret" not in str(refused.value)


def test_an_empty_secret_file_is_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(" \n")
    with pytest.raises(ConfigError, match=r"upstreams\[0\]\.api_key_file: key is empty"):
        load_settings(write("[[upstreams]]\nname = 'a'\napi_key_file = 'key'"), {})
    (tmp_path / "key").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"upstreams\[0\]\.api_key_file: key cannot be read: it is not text"):
        load_settings(write("[[upstreams]]\nname = 'a'\napi_key_file = 'key'"), {})


def test_a_config_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gone: there is no such file; give --config or CACHESERVER_CONFIG the path"):
        load_settings(None, {"CACHESERVER_CONFIG": "gone"})
    with pytest.raises(ConfigError, match="gone: there is no such file"):
        load_settings(tmp_path / "gone", {})
    with pytest.raises(ConfigError, match="there is no such file"):
        load_settings(tmp_path, {})


def test_a_config_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "cacheserver.toml").touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"cacheserver\.toml: cannot be read: Permission denied; mend"):
        load_settings(None, {})


def test_secrets_stay_out_of_the_representation(write: Write) -> None:
    file = write("""
        [redis]
        url = "redis://:very-secret@r"
        [s3]
        bucket = "b"
        access_key = "very-secret"
        secret_key = "very-secret"
        [[upstreams]]
        name = "a"
        api_key = "very-secret"
    """)
    assert "very-secret" not in repr(load_settings(file, {}))


# ---- The example file


def _uncommented() -> dict[str, Any]:
    return tomllib.loads(re.sub(r"(?m)^#(?=[a-z0-9_]+ =|\[)", "", EXAMPLE.read_text()))


def _named_in_full(document: dict[str, Any]) -> dict[str, Any]:
    """The settings of the uncommented example by their full names, in their order."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in document.items():
        if name in {"namespaces", "limit_groups"}:
            tables[f"{name}.NAME."] = next(iter(value.values()))
        elif isinstance(value, list) and isinstance(value[0], dict):
            tables[f"{name}[]."] = value[0]
        elif isinstance(value, dict):
            tables[f"{name}."] = value
        else:
            tables.setdefault("", {})[name] = value
    return {prefix + name: value for prefix, table in tables.items() for name, value in table.items()}


def test_the_example_file_as_it_is_changes_nothing() -> None:
    assert load_settings(EXAMPLE, {}) == load_settings(None, {})


def test_the_example_file_has_every_setting_and_no_other() -> None:
    assert list(_named_in_full(_uncommented())) == list(setting_names())


def test_every_value_that_the_example_file_shows_would_be_taken() -> None:
    document = _uncommented()
    for name in ("api_key_env", "api_key_file"):  # one of the three ways to give a key
        del document["upstreams"][0][name]
    del document["callers"][0]["token_file"]
    del document["alerting"]["webhook_token_env"]
    del document["delivery"]["url_secret_file"]
    del document["alarms"][0]["namespace"]  # what it watches has none
    assert Settings.model_validate(document).s3.bucket == "images"


@pytest.mark.parametrize(("name", "field"), setting_names().items())
def test_the_example_file_says_what_a_setting_is_and_shows_its_default(name: str, field: FieldInfo) -> None:
    assert field.description
    text = EXAMPLE.read_text().replace("\n# ", " ").replace("# ", "\n")
    assert field.description in text
    shown = _named_in_full(_uncommented())[name]
    if field.is_required():
        return
    if field.default is None:
        assert "nset:" in field.description or "needs " in field.description or name in _OPTIONAL
    else:
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        assert shown == (str(default) if isinstance(default, Path) else default)


_OPTIONAL = {
    "server.grpc_unix_socket",
    "upstreams[].api_key",
    "upstreams[].api_key_env",
    "upstreams[].api_key_file",
    "callers[].token_sha256",
    "callers[].token_file",
}


def test_every_setting_has_its_environment_variable() -> None:
    variables = {setting: variable for variable, setting in environment_names().items()}
    assert variables["data_dir"] == "CACHESERVER_DATA_DIR"
    tables = {name.split("[")[0].split(".")[0] for name in setting_names() if "[]" in name or "NAME" in name}
    for name in setting_names():
        assert name in variables or re.split(r"[.\[]", name)[0] in tables
