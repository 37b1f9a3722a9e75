"""OpenAI's images API, in front of the cache."""
