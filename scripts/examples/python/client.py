#!/usr/bin/env python3
"""Calling the cache service from Python with nothing but its .proto file: no package of ours is imported.

    pip install grpcio-tools googleapis-common-protos
    python scripts/examples/python/client.py ["a prompt"] [FILE]

CACHESERVER_ADDRESS is where the service is (127.0.0.1:50051), CACHESERVER_TOKEN the token where it has callers. A
program of yours generates its stubs once, as `stubs` does, and keeps them. Off loopback it connects by
`grpc.secure_channel`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import grpc_tools
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parents[3] / "protos"
SERVICE = "promptcache.v1.PromptCacheService"

GENERATION_S = 120.0
"""Deadline of a call that may have to generate."""
LOOK_S = 10.0
"""Deadline of a call that only looks."""
CALLS_MAX = 4

# UNAVAILABLE is the one code that means "try again". gRPC itself does so for calls with one answer, after the time that
# the service names (grpc-retry-pushback-ms) or, where it names none, after a growing pause.
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE, "method": "GetImage"}],
            "retryPolicy": {
                "maxAttempts": CALLS_MAX,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
OPTIONS = [("grpc.service_config", json.dumps(SERVICE_CONFIG)), ("grpc.max_receive_message_length", 64 * 1024 * 1024)]


def stubs(directory: str) -> tuple[Any, Any]:
    """Generate the messages and the client in `directory`, and import them."""
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    arguments = [f"-I{PROTOS}", f"-I{well_known}", f"--python_out={directory}", f"--grpc_python_out={directory}"]
    if protoc.main(["protoc", *arguments, "promptcache/v1/promptcache.proto"]) != 0:
        raise SystemExit("protoc failed")
    sys.path.insert(0, directory)
    return tuple(importlib.import_module(f"promptcache.v1.promptcache_pb2{name}") for name in ("", "_grpc"))


def why(error: grpc.RpcError) -> dict[str, Any]:
    """What the service says of an error beside its text: for programs. Empty if it never reached the service."""
    trailers = dict(error.trailing_metadata() or ())
    known = {}
    for detail in Status.FromString(trailers.get("grpc-status-details-bin", b"")).details:
        info, retry, bad = ErrorInfo(), RetryInfo(), BadRequest()
        if detail.Unpack(info):
            known["reason"] = info.reason
        if detail.Unpack(retry):
            known["retry_s"] = retry.retry_delay.ToTimedelta().total_seconds()
        if detail.Unpack(bad):
            known["fields"] = [violation.field for violation in bad.field_violations]
    return known


def download(stub: Any, pb: Any, request: Any, file: Path, metadata: Any) -> int:
    """A picture of any size into a file; how many calls it took.

    A call that breaks off is made again. Once the picture is known, the next one asks for it by its key, from the byte
    that is missing, and only if it still has the same digest: it never pays, and never mixes two pictures.
    """
    header, calls = None, 0
    with file.open("wb") as out:
        while True:
            asked = pb.StreamImageRequest(request=request)
            if header is not None:
                by_key = pb.GetImageRequest(key=header.image.key)
                asked = pb.StreamImageRequest(request=by_key, read_offset=out.tell(), if_digest=header.image.digest)
            calls += 1
            try:
                for event in stub.StreamImage(asked, timeout=GENERATION_S, metadata=metadata):
                    match event.WhichOneof("event"):
                        case "progress":
                            print(f"waiting, about {event.progress.estimated_wait.seconds} s more")
                        case "header":
                            header = event.header
                        case "chunk":
                            out.write(event.chunk)
                break
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or calls == CALLS_MAX:
                    raise
                time.sleep(why(error).get("retry_s", 0.2 * 2**calls))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if header is None or header.image.digest != f"sha256:{digest}":
        raise SystemExit("the bytes are not those announced")
    return calls


def main(prompt: str = "a red fox in the snow", path: str = "fox.png") -> None:
    """Ask, ask again, fail on purpose, and download."""
    token = os.environ.get("CACHESERVER_TOKEN")
    metadata = [("authorization", f"Bearer {token}")] if token else []
    address = os.environ.get("CACHESERVER_ADDRESS", "127.0.0.1:50051")
    with tempfile.TemporaryDirectory() as directory, grpc.insecure_channel(address, OPTIONS) as channel:
        pb, pb_grpc = stubs(directory)
        stub = pb_grpc.PromptCacheServiceStub(channel)

        # The first call may generate; the second is a hit, with the very same bytes.
        request = pb.GetImageRequest(spec=pb.ImageSpec(prompt=prompt))
        first = stub.GetImage(request, timeout=GENERATION_S, metadata=metadata)
        again = stub.GetImage(request, timeout=GENERATION_S, metadata=metadata)
        is_same = first.images[0].data == again.images[0].data
        tiers = [pb.Tier.Name(answer.status.tier) for answer in (first, again)]
        print(f"first from {tiers[0]}, again from {tiers[1]}, same bytes: {is_same}")

        # What can go wrong has a code, which says whether to try again, and a published reason.
        missing = pb.GetImageRequest(
            spec=pb.ImageSpec(prompt="never asked before"), cache_policy=pb.CACHE_POLICY_ONLY_IF_CACHED
        )
        wrong = pb.GetImageRequest(spec=pb.ImageSpec(prompt=prompt, size="17x99999"))
        for name, failing in (("only if cached", missing), ("a wrong size", wrong)):
            try:
                stub.GetImage(failing, timeout=LOOK_S, metadata=metadata)
            except grpc.RpcError as error:
                details = why(error)
                print(f"{name}: {error.code().name} {details['reason']} {','.join(details.get('fields', []))}".rstrip())

        # Images of any size: events while they come, into a file.
        calls = download(stub, pb, request, Path(path), metadata)
        print(f"downloaded to {path} in {calls} calls, same bytes: {Path(path).read_bytes() == first.images[0].data}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
