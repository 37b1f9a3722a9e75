"""What a prompt must pass before anything is looked up: deny-list, personal data, moderation.

`PromptPolicy` (policy.py) is a namespace's: it asks the deny-list (deny.py), looks for personal data (pii.py)
and, where the namespace opted in, an endpoint that moderates. What it returns is the prompt that is keyed.
"""

from cacheserver.precheck.deny import DenyList
from cacheserver.precheck.pii import Redaction, redact
from cacheserver.precheck.policy import Moderation, PiiPolicy, PromptPolicy

__all__ = ["DenyList", "Moderation", "PiiPolicy", "PromptPolicy", "Redaction", "redact"]
