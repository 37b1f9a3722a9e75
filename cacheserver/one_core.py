"""How the threads of the service share a core, where it has no more than one.

A hit is four messages from grpc's thread to the event loop's. Where both have one core, Linux lets who is woken take it
from who woke it, as often as there is something to say; so a hit is cut into pieces, and half of it is changing over.
As SCHED_BATCH (sched(7)) a thread that is woken waits until the other one has done what it can: then there are several
messages, and they are looked at in one go. A bare server of grpc.aio costs a fifth less so.

With cores to spare who is woken has another one at once, and nothing is set: it would only wait for a core longer than
it has to, where other processes keep them all busy.
"""

from __future__ import annotations

import os
from contextlib import suppress


def set_up() -> None:
    """Set it up, before there are threads: they inherit it. What is not there, or not allowed, is done without."""
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) > 1:
        return
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
