"""cacheserver explain: how a request becomes its key."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from cacheserver.cli.options import Inputs, Link, Namespace, Spec
from cacheserver.cli.session import session
from cacheserver.client import ExplainResult, Explanation, ImageSpec


def explain(  # noqa: PLR0913 - one parameter per option
    prompt: Annotated[str, typer.Argument(help="The prompt to explain.")],
    other: Annotated[str | None, typer.Argument(help="A second prompt to compare it with.")] = None,
    *,
    spec: Spec,
    inputs: Inputs,
    namespace: Namespace = None,
    link: Link,
) -> None:
    """Show how a request becomes its key and, for two, why their keys differ."""
    with session(link) as (client, output):
        options = spec.options(inputs.named())
        second = None if other is None else ImageSpec(other, **options)
        result = client.explain(ImageSpec(prompt, **options), second, namespace=namespace)
        facts = asdict(result) | {"same_key": None if other is None else not result.differences}
        output.result(facts, lambda console: _draw(result, console))


def _draw(result: ExplainResult, console: Console) -> None:
    for each in filter(None, (result.explanation, result.other)):
        _draw_one(each, console)
    if result.other is not None and not result.differences:
        console.print("same key", style="bold green")
    if result.differences and _are_one_picture(result):
        console.print("one picture: the same canonical form, and no other difference", style="bold green")
    for difference in result.differences:
        console.print(f"differs in {difference.field}:", style="bold yellow")
        console.print(f"  {difference.value}")
        console.print(f"  {difference.other_value}")


def _are_one_picture(result: ExplainResult) -> bool:
    forms = [each.canonical_prompt for each in (result.explanation, result.other) if each is not None]
    is_of_prompt_alone = all(difference.field == "prompt" for difference in result.differences)
    return is_of_prompt_alone and bool(forms[0]) and forms[0] == forms[-1]


def _draw_one(explanation: Explanation, console: Console) -> None:
    console.print(f"prompt    {explanation.normalized_prompt}")
    if explanation.canonical_prompt:
        console.print(f"canonical {explanation.canonical_prompt}")
    console.print(f"profile   {explanation.profile}")
    console.print(f"identity  {explanation.canonical_identity}")
    console.print(f"key       {explanation.key}")
    console.print()
