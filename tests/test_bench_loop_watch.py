"""What a machine does to a service is told apart from what the service does, and never too much of it."""

from __future__ import annotations

import pytest

from scripts.bench.loop_watch import Probe, Ran, elsewhere_ms


@pytest.mark.parametrize(
    ("after", "elsewhere"),
    [
        ([Ran(1, 9), Ran(0, 0)], 9),  # the loop stood ready and nothing of the service ran
        ([Ran(1, 9), Ran(9, 0)], 0),  # it waited for a thread of its own service
        ([Ran(1, 9), Ran(4, 0)], 5),  # in part
        ([Ran(1, 0), Ran(0, 9)], 8),  # what it may have waited for stood ready and nothing ran but the loop
        ([Ran(1, 5), Ran(0, 5)], 5),  # both at once: not twice
        ([Ran(10, 0), Ran(0, 0)], 0),  # it worked
    ],
)
def test_only_a_wait_for_others_than_the_service_itself_is_elsewhere(after: list[Ran], elsewhere: float) -> None:
    assert elsewhere_ms([Ran(0, 0), Ran(0, 0)], after) == elsewhere
    assert (
        elsewhere_ms(
            [Ran(100, 50), Ran(7, 3)],
            [Ran(100 + after[0].ran_ms, 50 + after[0].waited_ms), Ran(7 + after[1].ran_ms, 3 + after[1].waited_ms)],
        )
        == elsewhere
    )


def test_what_was_elsewhere_is_not_the_services_own() -> None:
    assert Probe(at_s=0, ms=12, ran_ms=3, elsewhere_ms=8).own_ms == 4
    assert Probe(at_s=0, ms=12, ran_ms=3, elsewhere_ms=15).own_ms == 0
