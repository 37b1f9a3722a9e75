"""cacheserver warm: its rows, its result file, and the command against a real service."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cacheserver.cli.journal import JournalError
from cacheserver.cli.warm_history import row_lines
from cacheserver.cli.warm_result import ResultFile, Rows
from cacheserver.cli.warm_rows import BadRow, Defaults, InputError, InputFormat, Source, Template, format_of
from cacheserver.client import (
    AsyncClient,
    AttemptOutcome,
    CachePolicy,
    ImageSpec,
    NotCachedError,
    PromptKind,
    RecordedPrompt,
    TierName,
    WarmItem,
    WarmOutcome,
    WarmResult,
)
from cacheserver.errors import PromptRefusedError
from cacheserver.rpc.server import Listen
from tests.house import House
from tests.rpc_front import Front, open_front
from tests.running import environment, running
from tests.test_cli import Run, command, printed
from tests.waiting import until

ROOT = Path(__file__).parent.parent


def rows(
    tmp_path: Path,
    text: str | bytes,
    form: InputFormat = InputFormat.CSV,
    *,
    template: str | None = None,
    **defaults: Any,
) -> list[WarmItem | BadRow]:
    file = tmp_path / "rows"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(Source(file, form, Defaults(**defaults), template and Template(template)).rows())


def spec_of(row: WarmItem | BadRow) -> ImageSpec:
    assert isinstance(row, WarmItem), row
    assert isinstance(row.prompt, ImageSpec)
    return row.prompt


class TestRows:
    def test_csv_has_a_header_and_a_byte_order_mark_and_windows_lines_and_empty_ones(self, tmp_path: Path) -> None:
        text = '\ufeffprompt,n,quality,tags\r\n"a ""red"" fox, running",2,high,a b\r\n\r\n,,,\r\na blue fox,,,\r\n'
        first, second = rows(tmp_path, text, n=1, spec={"quality": "low"}, tags=("x",))
        assert isinstance(first, WarmItem)
        assert isinstance(second, WarmItem)
        assert (first.row, first.n, first.tags) == (2, 2, ("a", "b"))
        assert spec_of(first) == ImageSpec('a "red" fox, running', quality="high")
        assert (second.row, second.n, second.tags) == (5, 1, ("x",))
        assert spec_of(second).quality == "low"

    def test_a_prompt_of_two_lines_is_one_row(self, tmp_path: Path) -> None:
        found = rows(tmp_path, 'prompt\n"a\nb"\nc\n')
        assert [(row.row, spec_of(row).prompt) for row in found if isinstance(row, WarmItem)] == [(2, "a\nb"), (4, "c")]

    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    def test_columns_lie_between_commas_semicolons_or_tabs(self, tmp_path: Path, delimiter: str) -> None:
        [row] = rows(tmp_path, f"namespace{delimiter}prompt\nshop{delimiter}a fox\n")
        assert isinstance(row, WarmItem)
        assert (row.namespace, spec_of(row).prompt) == ("shop", "a fox")

    def test_everything_a_row_may_say(self, tmp_path: Path) -> None:
        says = {
            "prompt": "a",
            "namespace": "shop",
            "model": "m",
            "size": "64x64",
            "quality": "high",
            "n": 3,
            "background": "opaque",
            "output_format": "webp",
            "output_compression": 50,
            "moderation": "low",
            "seed": 7,
            "extra": {"steps": 20},
            "use": "list",
            "tags": ["a", "b"],
            "candidates": 2,
            "ttl_s": 60,
            "refresh": True,
        }
        spec = ImageSpec("a", "m", "64x64", "high", "opaque", "webp", 50, "low", 7, {"steps": 20})
        want = WarmItem(1, spec, "shop", 3, ("a", "b"), "list", 2, 60, refresh=True)
        assert rows(tmp_path, json.dumps(says), InputFormat.JSONL) == [want]
        as_csv = says | {"extra": '"{""steps"": 20}"', "tags": "a b", "refresh": "yes"}
        [row] = rows(tmp_path, f"{','.join(as_csv)}\n{','.join(map(str, as_csv.values()))}\n")
        assert row == WarmItem(2, spec, "shop", 3, ("a", "b"), "list", 2, 60, refresh=True)

    def test_json_lines_may_be_prompts_alone(self, tmp_path: Path) -> None:
        found = rows(tmp_path, '"a fox"\n\n{"prompt": "an owl"}\n', InputFormat.JSONL)
        assert [(row.row, spec_of(row).prompt) for row in found if isinstance(row, WarmItem)] == [
            (1, "a fox"),
            (3, "an owl"),
        ]

    def test_text_is_a_prompt_a_line(self, tmp_path: Path) -> None:
        found = rows(tmp_path, "a fox, red\r\n\r\n  an owl  \n", InputFormat.TEXT)
        assert [spec_of(row).prompt for row in found] == ["a fox, red", "an owl"]

    @pytest.mark.parametrize(
        ("text", "form", "line", "says"),
        [
            ("prompt,n\na,two\n", "csv", 2, "n: must be a whole number"),
            ("prompt,n\na,3000000000\n", "csv", 2, "n: must be at most 2147483647"),
            ("prompt,n\na,1,2\n", "csv", 2, "has 3 columns, and the header has 2"),
            ('prompt\na\n"b" c\n', "csv", 3, "is no CSV"),
            ("prompt,n\n,1\n", "csv", 2, "prompt: is empty"),
            (b"prompt\nfine\n\xff\xfe\n", "csv", 3, "is not UTF-8"),
            (b"fine\n\xff\n", "text", 2, "is not UTF-8"),
            ('"fine"\n{', "jsonl", 2, "is no JSON"),
            ('"fine"\n' + "[" * 100_000, "jsonl", 2, "is no JSON"),
            ('{"prompt": "a", "extra": "' + "[" * 100_000 + '"}', "jsonl", 1, "extra: must be a JSON object"),
            ('"fine"\n[1]', "jsonl", 2, "must be a JSON object"),
            ('{"prompt": "a", "qualty": "low"}', "jsonl", 1, "qualty: is no column of a warm-up"),
            ('{"prompt": 7}', "jsonl", 1, "prompt: must be text"),
            ('{"prompt": "a", "n": true}', "jsonl", 1, "n: must be a whole number"),
            ('{"prompt": "a", "tags": [1]}', "jsonl", 1, "tags: must be words"),
            ('{"prompt": "a", "extra": "{"}', "jsonl", 1, "extra: must be a JSON object"),
            ('{"prompt": "a", "refresh": "maybe"}', "jsonl", 1, "refresh: must be true or false"),
        ],
    )
    def test_a_bad_row_names_its_line(self, tmp_path: Path, text: str | bytes, form: str, line: int, says: str) -> None:
        [bad] = [row for row in rows(tmp_path, text, InputFormat(form)) if isinstance(row, BadRow)]
        assert bad.line == line
        assert bad.text.startswith(says)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("prompt,qualty\na,low\n", "line 1: qualty is no column of a warm-up"),
            ("product\nfox\n", "line 1: no column prompt; there are: product"),
            ("prompt,prompt\na,b\n", "line 1: two columns have one name"),
        ],
    )
    def test_a_header_that_cannot_be_used_is_told_at_once(self, tmp_path: Path, text: str, says: str) -> None:
        with pytest.raises(InputError) as raised:
            rows(tmp_path, text)
        assert str(raised.value).startswith(says)

    def test_the_format_is_told_by_the_name(self) -> None:
        names = {"a.CSV": "csv", "a.tsv": "csv", "a.jsonl": "jsonl", "a.ndjson": "jsonl", "a.txt": "text", "a": "text"}
        assert {name: format_of(Path(name)).value for name in names} == names
        with pytest.raises(InputError, match="--input-format"):
            format_of(Path("a.parquet"))

    def test_the_digest_is_of_the_rows_and_of_what_decides_them(self, tmp_path: Path) -> None:
        file = tmp_path / "a.csv"
        file.write_text("prompt\na\n")
        plain = Source(file, InputFormat.CSV, Defaults())
        assert plain.digest() == Source(file, InputFormat.CSV, Defaults()).digest()
        others = {
            plain.digest("redis"),
            Source(file, InputFormat.CSV, Defaults(n=2)).digest(),
            Source(file, InputFormat.CSV, Defaults(spec={"quality": "low"})).digest(),
            Source(file, InputFormat.CSV, Defaults(), Template("{prompt}")).digest(),
        }
        file.write_text("prompt\nb\n")
        assert len({*others, plain.digest()} - {Source(file, InputFormat.CSV, Defaults(n=3)).digest()}) == 5


class TestTemplate:
    def test_each_row_fills_the_places(self, tmp_path: Path) -> None:
        text = "product,style\nchair,oak\ntable, walnut \n"
        found = rows(tmp_path, text, template="studio photo of {product}, {style} {{sale}}")
        assert [spec_of(row).prompt for row in found] == [
            "studio photo of chair, oak {sale}",
            "studio photo of table, walnut {sale}",
        ]

    def test_numbers_of_json_are_text_too(self, tmp_path: Path) -> None:
        [row] = rows(tmp_path, '{"size": 42}', InputFormat.JSONL, template="a shoe, size {size}")
        assert spec_of(row).prompt == "a shoe, size 42"

    def test_a_variable_that_no_column_has_is_told_by_line(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="line 1: no column colour, which the template names"):
            rows(tmp_path, "product\nchair\n", template="{product} {colour}")
        [bad] = rows(tmp_path, '{"product": "chair"}', InputFormat.JSONL, template="{product} {colour}")
        assert isinstance(bad, BadRow)
        assert (bad.line, bad.text.partition(":")[0]) == (1, "colour")

    def test_an_empty_variable_is_told_by_line(self, tmp_path: Path) -> None:
        _, bad = rows(tmp_path, "product,style\nchair,oak\ntable, \n", template="{product} {style}")
        assert isinstance(bad, BadRow)
        assert (bad.line, bad.text.partition(":")[0]) == (3, "style")

    @pytest.mark.parametrize("text", ["{}", "{0.a}", "{a[0]}", "{a!r}", "{a:>9}", "{a", "a}", "no place"])
    def test_what_is_no_template_is_refused(self, text: str) -> None:
        with pytest.raises(InputError, match="--template: "):
            Template(text)


def outcome(row: int, result: WarmResult = WarmResult.GENERATED, cost: int = 5) -> WarmOutcome:
    return WarmOutcome(row, result, ("v1.key",), TierName.UPSTREAM, cost)


class TestResultFile:
    def test_it_goes_on_where_it_was(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        with ResultFile(path, digest="d", job="j") as file:
            file.add([outcome(3), outcome(4, WarmResult.FAILED, 2), outcome(5, WarmResult.CACHED, 0)])
        with ResultFile(path, digest="d", job="j") as file:
            assert [row in file.done for row in (3, 4, 5, 6)] == [True, False, True, False]
            assert file.spent_microusd == 7
            file.add([outcome(4)])
        with ResultFile(path, digest="d", job="j") as file:
            assert 4 in file.done
        first, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert first == {"warm": 1, "input": "d", "job": "j"}
        assert lines[0] == {
            "row": 3,
            "status": "generated",
            "keys": ["v1.key"],
            "tier": "upstream",
            "cost_microusd": 5,
            "error": None,
        }

    @given(cut=st.integers(0, 400), count=st.integers(0, 5))
    def test_wherever_it_was_torn_off_it_goes_on(
        self, tmp_path_factory: pytest.TempPathFactory, cut: int, count: int
    ) -> None:
        path = tmp_path_factory.mktemp("torn") / "r.jsonl"
        with ResultFile(path, digest="d", job="j") as file:
            for row in range(count):
                file.add([outcome(row)])
        whole = path.read_bytes()
        path.write_bytes(whole[:cut])
        with ResultFile(path, digest="d", job="j") as file:
            known = len(file.done)
            lines = whole.splitlines()  # one that lacks nothing but its end is whole
            assert known == max(0, sum(whole[:cut].splitlines().count(line) for line in lines) - 1)
            file.add([outcome(9)])
        with ResultFile(path, digest="d", job="j") as file:
            assert len(file.done) == known + 1

    def test_another_inputs_result_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        with ResultFile(path, digest="d", job="j") as file:
            file.add([outcome(1)])
        for says, digest, job in (("another input", "e", "j"), ("another job", "d", "k")):
            with pytest.raises(JournalError, match=says):
                ResultFile(path, digest=digest, job=job)
        for text in ('{"hello": 1}\n', '{"hello": 1}', "my notes", '{"row": 1}\n{"row": 2', '{"warm": 2'):
            path.write_text(text)
            with pytest.raises(JournalError, match="name another file"):
                ResultFile(path, digest="d", job="j")
            assert path.read_text() == text

    def test_one_of_a_job_that_was_not_run_is_in_nobodys_way(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        ResultFile(path, digest="d", job="j").__exit__()
        with ResultFile(path, digest="e", job="j") as file:
            file.add([outcome(1)])
        assert json.loads(path.read_text().splitlines()[0])["input"] == "e"

    def test_a_damaged_line_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        with ResultFile(path, digest="d", job="j") as file:
            file.add([outcome(1)])
        with path.open("a") as file_:
            file_.write("damaged\n")
        with pytest.raises(JournalError, match="line 3"):
            ResultFile(path, digest="d", job="j")

    def test_two_processes_do_not_write_one_file(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        with ResultFile(path, digest="d", job="j"), pytest.raises(JournalError, match="another process writes it"):
            ResultFile(path, digest="d", job="j")

    @given(st.lists(st.integers(0, 100_000)))
    def test_rows_are_a_set_of_numbers(self, numbers: list[int]) -> None:
        found = Rows()
        for number in numbers:
            found.add(number)
        assert len(found) == len(set(numbers))
        assert all((number in found) == (number in numbers) for number in {*numbers, 5, 77, 100_001})


@pytest.fixture(autouse=True)
def _quiet_service() -> Iterator[None]:
    with capture_logs():
        yield


@pytest.fixture
async def front(house: House) -> AsyncIterator[Front]:
    async with open_front(house) as front:
        yield front


@pytest.fixture
def run(front: Front) -> Run:
    return lambda *args, **options: command(*args, address=f"127.0.0.1:{front.server.port}", **options)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,n\na red fox,1\nA red fox.,1\na blue fox,2\n")
    return file


class TestCommand:
    async def test_a_plan_is_told_and_nothing_is_spent(self, run: Run, front: Front, prompts: Path) -> None:
        plan = await run("warm", str(prompts), "--plan")
        assert plan.exit_code == 0, plan.output
        assert "rows          3\n" in plan.stdout
        assert "duplicates    1, once they are normalized\n" in plan.stdout
        assert "to generate   3 pictures\n" in plan.stdout
        assert "cost          at most $" in plan.stdout
        facts = printed(await run("warm", str(prompts), "--plan", "--json"))["plan"]
        assert (facts["rows"], facts["to_generate"], facts["cached"]) == (3, 3, {})
        assert front.house.upstream.calls == 0
        assert not _has_lines(prompts.with_name("prompts.csv.warm.jsonl"), 1)

    async def test_nothing_is_spent_that_nobody_agreed_to(self, run: Run, front: Front, prompts: Path) -> None:
        refused = await run("warm", str(prompts))
        assert (refused.exit_code, front.house.upstream.calls) == (2, 0)
        assert "pass --yes; nothing was spent" in refused.stderr
        assert "to generate   3 pictures" in refused.stderr

    async def test_a_job_is_run_and_told_and_run_again_for_nothing(self, run: Run, front: Front, prompts: Path) -> None:
        facts = printed(await run("warm", str(prompts), "--yes", "--json"))
        assert (facts["done"], facts["failed"], facts["spent_microusd"]) == (3, 0, 3 * 53_000)
        assert facts["statuses"] == {"generated": 2, "duplicate": 1}
        assert [facts["plan"][name] for name in ("rows", "done", "duplicates", "to_generate")] == [3, 0, 1, 3]
        result = prompts.with_name("prompts.csv.warm.jsonl")
        lines = [json.loads(line) for line in result.read_text().splitlines()[1:]]
        assert {line["row"]: line["status"] for line in lines} == {2: "generated", 3: "duplicate", 4: "generated"}
        again = await run("warm", str(prompts), "--yes")
        assert (again.exit_code, front.house.upstream.images) == (0, 3)
        assert "cost          at most $0.0000\n" in again.stderr
        assert "3 of 3 rows are done, 0 failed; spent $0.0000" in again.stdout
        elsewhere = prompts.parent / "elsewhere.jsonl"
        anew = printed(await run("warm", str(prompts), "--result", str(elsewhere), "--json"))  # nothing to agree to
        assert anew["statuses"] == {"cached": 2, "duplicate": 1}

    async def test_a_row_that_failed_is_tried_again(self, run: Run, front: Front, prompts: Path) -> None:
        front.house.upstream.fail_next(PromptRefusedError("No.", after_seeing=True))
        first = await run("warm", str(prompts), "--yes", "--concurrency", "1")
        assert first.exit_code == 3
        assert "line 2: PROMPT_REFUSED: No." in first.stderr
        again = await run("warm", str(prompts), "--yes", "--json")
        assert (again.exit_code, printed(again)["statuses"]) == (0, {"generated": 1})

    async def test_when_nothing_works_the_command_fails(self, run: Run, front: Front, tmp_path: Path) -> None:
        file = tmp_path / "p.txt"
        file.write_text("a red fox\n")
        front.house.upstream.fail_next(PromptRefusedError("No."))
        assert (await run("warm", str(file), "--yes")).exit_code == 1

    async def test_a_budget_bounds_all_runs_together(self, run: Run, front: Front, tmp_path: Path) -> None:
        file = tmp_path / "p.txt"
        file.write_text("".join(f"prompt {i}\n" for i in range(20)))
        args = ("warm", str(file), "--yes", "--budget", "1.00", "--json", "--concurrency", "2")
        first, second = await run(*args), await run(*args)
        assert (first.exit_code, second.exit_code) == (3, 3)
        assert 0 < front.house.upstream.images < 20
        assert printed(first)["spent_microusd"] == front.house.upstream.images * 53_000 <= 1_000_000
        assert "BUDGET_EXHAUSTED" in (await run(*args[:-3])).stderr

    async def test_bad_rows_stop_it_before_anything_is_spent(self, run: Run, front: Front, tmp_path: Path) -> None:
        file = tmp_path / "p.csv"
        file.write_text("prompt,n,size\na red fox,1,\na,x,\nb,1,huge\n")
        ours = await run("warm", str(file), "--yes")
        assert (ours.exit_code, front.house.upstream.calls) == (2, 0)
        assert "line 3: n: must be a whole number" in ours.stderr
        file.write_text("prompt,n,size\na red fox,1,\nb,1,huge\n")
        theirs = await run("warm", str(file), "--yes")
        assert (theirs.exit_code, front.house.upstream.calls) == (2, 0)
        assert "line 3: spec.size: must be" in theirs.stderr
        file.write_text("prompt,n,size\na red fox,1,\na,x,\nb,1,huge\n")
        skipped = await run("warm", str(file), "--yes", "--skip-bad-rows")
        assert (skipped.exit_code, front.house.upstream.calls) == (3, 1)
        assert "1 of 3 rows are done, 2 failed" in skipped.stdout

    async def test_a_result_of_another_input_is_refused(self, run: Run, front: Front, prompts: Path) -> None:
        await run("warm", str(prompts), "--yes")
        refused = await run("warm", str(prompts), "--yes", "--quality", "low")
        assert (refused.exit_code, front.house.upstream.images) == (2, 3)
        assert "is of another input or other options" in refused.stderr

    async def test_prompts_may_come_by_standard_input(
        self, run: Run, front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        typed = await run("warm", "-", "--yes", "--json", text="a red fox\nan owl\n")
        assert printed(typed)["statuses"] == {"generated": 2}
        assert printed(await run("warm", "-", "--yes", "--json", text="a red fox\nan owl\n"))["statuses"] == {}
        assert front.house.upstream.calls == 2

    async def test_a_template_makes_a_prompt_of_each_row(self, run: Run, front: Front, tmp_path: Path) -> None:
        file = tmp_path / "products.csv"
        file.write_text("product,style\nchair,oak\ntable,walnut\n")
        args = ("--template", "photo of {product}, {style}", "--vars", str(file), "--quality", "low", "--yes")
        assert (await run("warm", *args)).exit_code == 0
        asked = {(request.prompt, request.quality) for request, _ in front.house.upstream.asked}
        assert asked == {("photo of chair, oak", "low"), ("photo of table, walnut", "low")}

    async def test_redis_is_filled_with_rows_or_with_everything(self, run: Run, front: Front, tmp_path: Path) -> None:
        house = front.house
        for prompt in ("a red fox", "an owl", "a hen"):
            await house.get(prompt)
        await house.settle()
        for prompt in ("a red fox", "an owl", "a hen"):
            await house.redis.delete(house.identity(prompt)[1].key)
        file = tmp_path / "p.txt"
        file.write_text("a red fox\nnowhere\n")
        some = await run("warm", str(file), "--tier", "redis", "--json")
        assert (some.exit_code, printed(some)["statuses"]) == (3, {"filled": 1, "absent": 1})
        everything = await run("warm", "--tier", "redis")
        assert everything.exit_code == 0
        assert "3 pictures: 2 copied into redis, 1 there before, 0 failed" in everything.stdout
        assert house.upstream.calls == 3

    @pytest.mark.parametrize(
        "args",
        [
            (),
            ("p.csv", "--template", "{a}"),
            ("--template", "{a}"),
            ("--vars", "p.csv"),
            ("p.csv", "--template", "{a}", "--vars", "v.csv"),
            ("p.csv", "--tier", "redis", "--plan"),
            ("p.csv", "--from-history"),
            ("p.csv", "--budget", "a lot"),
            ("--template", "{}", "--vars", "p.csv"),
            ("p.parquet",),
        ],
    )
    async def test_wrong_use_is_told(
        self, run: Run, args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("p.csv", "v.csv", "p.parquet"):
            (tmp_path / name).write_text("prompt,a\na fox,1\n", encoding="utf-8")
        wrong = await run("warm", *args)
        assert (wrong.exit_code, "no such file" in wrong.stderr) == (2, False)

    async def test_a_file_that_is_not_there_is_named(self, run: Run) -> None:
        missing = await run("warm", "/nowhere/p.csv")
        assert (missing.exit_code, "/nowhere/p.csv" in missing.stderr) == (2, True)

    async def test_it_goes_on_when_the_service_is_back(
        self, house: House, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cacheserver.cli.warm_job._FIRST_WAIT_S", 0.05)
        house.upstream.hold()
        async with open_front(house) as front:
            port = front.server.port
            job = asyncio.create_task(command("warm", str(prompts), "--yes", "--json", address=f"127.0.0.1:{port}"))
            await house.upstream.arrived(2)
        async with open_front(house, listen=Listen(port=port)):
            house.upstream.release()
            result = await job
        assert (result.exit_code, printed(result)["done"]) == (0, 3)
        assert house.upstream.images == 3


class TestHistory:
    def test_each_kind_becomes_the_row_that_betters_it(self, tmp_path: Path) -> None:
        spec = ImageSpec("a fox", size="64x64", extra={"steps": 20})
        kinds = [PromptKind.MISSED, PromptKind.EXPIRING, PromptKind.REROLLED, PromptKind.TURNED_AWAY]
        lines = "".join(row_lines(RecordedPrompt(spec, "shop", 2, kind, 1.0, None) for kind in kinds))
        found = rows(tmp_path, lines, InputFormat.JSONL)
        assert [(row.n, row.refresh) for row in found if isinstance(row, WarmItem)] == [
            (2, False),
            (2, True),
            (3, False),
            (2, False),
        ]
        assert {row.namespace for row in found if isinstance(row, WarmItem)} == {"shop"}
        assert spec_of(found[0]) == spec

    async def test_what_callers_missed_is_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        config = "[namespaces.default]\nstore_prompts = true\n"
        async with (
            running(environment(tmp_path, redis__embedded="false"), config) as service,
            AsyncClient(service.grpc_address) as client,
        ):
            nothing = await command("warm", "--from-history", address=service.grpc_address)
            assert (nothing.exit_code, nothing.stdout) == (0, "nothing is recorded that could be warmed\n")
            with pytest.raises(NotCachedError):
                await client.get_image("a red fox", size="64x64", cache_policy=CachePolicy.ONLY_IF_CACHED)
            args = ("warm", "--from-history", "--kind", "missed", "--yes", "--json")
            made = await command(*args, address=service.grpc_address)
            facts = printed(made)
            assert (made.exit_code, facts["statuses"]) == (0, {"generated": 1})
            assert facts["job"].startswith("history-20")
            hit = await client.get_image("a red fox", size="64x64", cache_policy=CachePolicy.ONLY_IF_CACHED)
            assert hit.tier is TierName.MEMORY


@pytest.mark.timeout(180)
async def test_a_client_that_is_killed_again_and_again_pays_once_for_each_picture(tmp_path: Path) -> None:
    """The command in a process of its own, before a real service that paints."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\n" + "".join(f"prompt {i}\n" for i in range(40)))
    chance = random.Random(7)  # noqa: S311 - when to kill
    result = tmp_path / "prompts.csv.warm.jsonl"
    async with running(environment(tmp_path, redis__embedded="false")) as service:
        args = [sys.executable, "-c", "from cacheserver.cli import main; main()", "warm", str(prompts), "--yes"]
        env = {**os.environ, "CACHESERVER_ADDRESS": service.grpc_address, "PYTHONPATH": str(ROOT)}
        for _ in range(3):
            client = await asyncio.create_subprocess_exec(*args, "--size", "64x64", env=env)
            enough = _lines(result) + chance.randrange(3, 9)
            await until(partial(_has_lines, result, enough), within_s=30)
            client.send_signal(signal.SIGKILL)
            await client.wait()
        client = await asyncio.create_subprocess_exec(*args, "--size", "64x64", env=env)
        assert await client.wait() == 0
        async with AsyncClient(service.grpc_address) as admin:
            bought = [row async for row in admin.admin.list_ledger()]
    # What was cancelled while its row was written was never sent.
    made = [row for row in bought if row.outcome is AttemptOutcome.SETTLED]
    assert {row.outcome for row in bought} <= {AttemptOutcome.SETTLED, AttemptOutcome.NOT_BILLED}
    assert len(made) == sum(row.images for row in made) == 40
    assert {row.tags for row in bought} == {(f"job:{json.loads(result.read_text().splitlines()[0])['job']}",)}
    lines = [json.loads(line) for line in result.read_text().splitlines()[1:]]
    assert {line["row"] for line in lines} == set(range(2, 42))


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _has_lines(file: Path, count: int) -> bool:
    return _lines(file) >= count


def test_the_script_sets_up_what_it_needs_and_is_the_command(tmp_path: Path) -> None:
    scripts, bin_ = tmp_path / "scripts", tmp_path / ".venv" / "bin"
    scripts.mkdir()
    bin_.mkdir(parents=True)
    (scripts / "warm_cache.py").write_bytes((ROOT / "scripts" / "warm_cache.py").read_bytes())
    for path, line in ((scripts / "venv", 'echo "venv $*"'), (bin_ / "cacheserver", 'echo "command $*"')):
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    ran = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, str(scripts / "warm_cache.py"), "p.csv", "--plan"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == ["venv ", "command warm p.csv --plan"]
