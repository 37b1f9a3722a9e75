"""From a request to its key: normalization, canonical identity, fingerprint, and why two keys differ.

The way of a request: `validate` says what is wrong with it; `identify` normalizes the prompt by the
namespace's profile (normalize.py), writes the canonical identity and hashes it (fingerprint.py);
`differences` tells two identities apart (explain.py).
"""

from cacheserver.identity.catalog import compile_catalog_patterns
from cacheserver.identity.explain import FieldDifference, differences, fields_of
from cacheserver.identity.fingerprint import Identifier, Named, canonical_json, identify, key_of, key_of_alike
from cacheserver.identity.normalize import PROFILES, Profile, normalize_prompt
from cacheserver.identity.validation import CHOICES, QUALITIES, validate, validate_prompt

__all__ = [
    "CHOICES",
    "PROFILES",
    "QUALITIES",
    "FieldDifference",
    "Identifier",
    "Named",
    "Profile",
    "canonical_json",
    "compile_catalog_patterns",
    "differences",
    "fields_of",
    "identify",
    "key_of",
    "key_of_alike",
    "normalize_prompt",
    "validate",
    "validate_prompt",
]
