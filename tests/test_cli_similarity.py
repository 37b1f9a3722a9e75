"""cacheserver similarity: figures for judged pairs, and what a log would merge, read from files alone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.test_cli import command, printed

PAIRS = [
    {"a": "A red fox.", "b": "a red fox", "same": True, "kind": "case"},
    {"a": "please draw a red fox, 8k", "b": "red fox", "same": True, "kind": "wrap"},
    {"a": "3 cats", "b": "5 cats", "same": False, "kind": "number"},
    {"a": "a fox in snow", "b": "a wolf in snow", "same": False, "kind": "subject"},
]


def written(path: Path, lines: list[object]) -> Path:
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
async def test_eval_tells_what_each_level_takes_for_the_same_kind_by_kind(tmp_path: Path, name: str) -> None:
    pairs = written(tmp_path / name, list(PAIRS))
    facts = printed(await command("similarity", "eval", str(pairs), "--json"))
    taken = {
        row["kind"]: (row["taken"]["exact"], row["taken"]["standard"], row["taken"]["canonical"])
        for row in facts["kinds"]
    }
    assert taken == {"case": (0, 1, 1), "wrap": (0, 0, 1), "number": (0, 0, 0), "subject": (0, 0, 0)}
    same, other = facts["all"]
    assert (same["pairs"], same["taken"]["canonical"]) == (2, 2)
    assert (other["pairs"], other["taken"]["canonical"], other["taken"]["semantic, unverified"]) == (2, 0, 1)


async def test_eval_shows_found_and_wrong_pairs_in_tables_of_their_own(tmp_path: Path) -> None:
    shown = await command("similarity", "eval", str(written(tmp_path / "pairs.jsonl", list(PAIRS))))
    assert shown.exit_code == 0
    found, wrong = shown.stdout.split("Other pictures: wrongly taken for the same")
    assert "100.0%" in found
    assert "number" in wrong


async def test_mine_tells_what_would_merge_beyond_what_repeats_and_shows_it(tmp_path: Path) -> None:
    log = written(
        tmp_path / "log",
        [
            "a red fox",
            "A red fox.",
            "please draw a red fox, 8k",
            {"prompt": "two dogs"},
            {"prompt": "2 dogs"},
            "an owl",
        ],
    )
    facts = printed(await command("similarity", "mine", str(log), "--json"))
    assert (facts["prompts"], facts["repeats"], facts["merged"]) == (6, 1, 2)
    assert [group["form"] for group in facts["groups"]] == ["red fox", "2 dogs"]
    shown = await command("similarity", "mine", str(log))
    assert "please draw a red fox, 8k" in shown.stdout


async def test_mine_takes_quality_words_for_different_where_told(tmp_path: Path) -> None:
    log = written(tmp_path / "log", ["a red fox", "a red fox, 8k"])
    assert printed(await command("similarity", "mine", str(log), "--json"))["merged"] == 1
    assert printed(await command("similarity", "mine", str(log), "--quality-words", "--json"))["merged"] == 0


async def test_mine_finds_prompts_where_it_is_told_they_are(tmp_path: Path) -> None:
    log = written(tmp_path / "log", [{"request": {"text": "two dogs"}}, {"request": {"text": "2 dogs"}}])
    facts = printed(await command("similarity", "mine", str(log), "--field", "request.text", "--json"))
    assert facts["merged"] == 1


@pytest.mark.parametrize(
    ("lines", "args", "said"),
    [
        (['{"prompt": 7}'], ["mine"], "line 1 has no text under prompt: name it with --field"),
        (['{"a": "x"}'], ["eval"], 'line 1 is no object with "a", "b" and "same"'),
        (['{"a": "x", "b": "y", "same": "yes"}'], ["eval"], '"same" true or false'),
    ],
)
async def test_a_file_that_is_not_what_it_should_be_is_named_with_its_line(
    tmp_path: Path, lines: list[object], args: list[str], said: str
) -> None:
    log = written(tmp_path / "log", lines)
    shown = await command("similarity", *args, str(log))
    assert shown.exit_code == 2
    assert str(log) in shown.stderr.replace("\n", "")
    assert said in " ".join(shown.stderr.split())


async def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    shown = await command("similarity", "mine", str(tmp_path / "none"))
    assert shown.exit_code == 2
    assert "No such file" in shown.stderr
