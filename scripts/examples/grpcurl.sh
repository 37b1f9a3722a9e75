#!/bin/sh
# Calling the cache service from the shell with grpcurl (https://github.com/fullstorydev/grpcurl). The service
# describes itself (server reflection), so no .proto file is needed.
#
#     scripts/examples/grpcurl.sh [HOST:PORT]
#
# With callers configured, set CACHESERVER_TOKEN.
set -eu
address=${1:-${CACHESERVER_ADDRESS:-127.0.0.1:50051}}

call() { # call METHOD MESSAGE
    if [ -n "${CACHESERVER_TOKEN:-}" ]; then
        # grpcurl itself puts the token in, so that it stands in no list of processes.
        # shellcheck disable=SC2016
        grpcurl -plaintext -expand-headers -H 'authorization: Bearer ${CACHESERVER_TOKEN}' -d "$2" "$address" "$1"
    else
        grpcurl -plaintext -d "$2" "$address" "$1"
    fi
}

echo '== What is there'
grpcurl -plaintext "$address" list
grpcurl -plaintext "$address" describe promptcache.v1.GetImageRequest

echo '== An image; its bytes are base64 in JSON'
request='{"spec": {"prompt": "a red fox in the snow", "output_format": "png"}}'
call promptcache.v1.PromptCacheService/GetImage "$request" | cut -c 1-200

echo '== Where it is now'
call promptcache.v1.PromptCacheService/FindCached '{"items": [{"spec": {"prompt": "a red fox in the snow"}}]}'

echo '== How the prompt becomes its key'
call promptcache.v1.PromptCacheService/ExplainKey '{"spec": {"prompt": "A  red fox in the SNOW."}}'

echo '== What the cache saved so far'
call promptcache.v1.PromptCacheService/GetStats '{}'

echo '== An error: the code for programs, the reason and the field for people'
call promptcache.v1.PromptCacheService/GetImage '{"spec": {"prompt": "a fox", "size": "17x99999"}}' || true

echo '== Health: the service, and a tier'
call grpc.health.v1.Health/Check '{}'
call grpc.health.v1.Health/Check '{"service": "tier.redis"}' || true
