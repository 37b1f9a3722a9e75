"""Keys that must never change by accident: every one names pictures somebody paid for.

A key that changes on purpose needs a new profile version first. Then write the file anew by hand, and read
the difference line by line before committing it:

    python -m tests.test_identity_golden
"""

import json
from pathlib import Path
from typing import Any

import pytest

from cacheserver.identity import identify
from cacheserver.model import Identity, ImageRequest, InputImage, InputRole, Namespace

FILE = Path(__file__).parent / "data" / "golden_keys.jsonl"


def read_vectors() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def identity_of(vector: dict[str, Any]) -> Identity:
    fields = dict(vector["request"])
    inputs = tuple(InputImage(InputRole(image["role"]), image["sha256"]) for image in fields.pop("inputs", ()))
    namespace = Namespace(
        "golden",
        partition="golden",
        profile=vector["profile"],
        catalog_patterns=tuple(vector.get("catalog_patterns", ())),
    )
    return identify(ImageRequest(**fields, inputs=inputs), namespace)


VECTORS = read_vectors()


def test_there_are_enough_vectors_and_each_profile_has_some() -> None:
    assert len(VECTORS) >= 80
    assert {vector["profile"] for vector in VECTORS} == {"exact", "standard", "catalog"}


def test_no_vector_is_there_twice() -> None:
    assert len({vector["about"] for vector in VECTORS}) == len(VECTORS)


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["about"] for vector in VECTORS])
def test_the_key_and_the_normalized_prompt_are_what_they_were(vector: dict[str, Any]) -> None:
    identity = identity_of(vector)
    assert identity.normalized_prompt == vector["normalized_prompt"]
    assert identity.key.name == vector["key"]


def rewrite() -> None:
    """Fill in what the vectors' requests come to now."""
    lines = []
    for vector in VECTORS:
        identity = identity_of(vector)
        vector["normalized_prompt"], vector["key"] = identity.normalized_prompt, identity.key.name
        lines.append(legible_json(vector))
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def legible_json(vector: dict[str, Any]) -> str:
    """JSON in which only what cannot be seen is escaped."""
    text = json.dumps(vector, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


if __name__ == "__main__":
    rewrite()
