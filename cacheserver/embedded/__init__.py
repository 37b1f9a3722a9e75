"""Servers of our own: a Valkey and, to try the whole stack on one machine, an S3 server."""
