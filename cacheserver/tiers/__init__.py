"""The levels of the cache: memory, Redis, a directory, object storage, and the guard around the slow ones."""
