"""The gRPC front: messages in, values to the cache, messages out. `grpc` is imported here and in client/ only."""
