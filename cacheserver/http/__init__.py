"""The HTTP side: health and metrics, in the same process and event loop as gRPC."""
