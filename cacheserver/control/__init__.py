"""Control state in Redis: what must survive eviction, restarts and replicas, judged by the server's own clock.

None of it carries a Redis TTL: a full Redis evicts keys that have one. The deadline lies beside the value, is
compared in Lua with server time, and the dead are swept a few at a time by whoever writes next. What one script
touches shares a hash tag, so that it works in a Cluster. While Redis is silent each kind of state falls back to
what this process knows.
"""
