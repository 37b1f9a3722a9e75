"""cacheserver report-wrong: a picture that answered for another prompt, and should not have."""

from __future__ import annotations

from typing import Annotated

import typer

from cacheserver.cli.options import Link
from cacheserver.cli.session import session


def report_wrong(
    key: Annotated[str, typer.Argument(help="The key that was asked for; `explain` tells that of a prompt.")],
    other_key: Annotated[str, typer.Argument(help="The key of the picture that answered.")],
    *,
    link: Link,
) -> None:
    """Keep the pictures of two keys from answering for one another, in every replica and for good.

    Needs the permission admin.
    """
    with session(link) as (client, output):
        client.admin.ban_match(key, other_key)
        output.result(
            {"key": key, "other_key": other_key},
            lambda console: console.print("they answer for one another no more", style="bold"),
        )
