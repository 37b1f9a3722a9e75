"""From a request to its key: normalization, canonical identity, fingerprint, and why two keys differ.

The way of a request: `validate` says what is wrong with it; `identify` normalizes the prompt by the
namespace's profile (normalize.py) as the written version has it (versions.py), writes the canonical identity
and hashes it (fingerprint.py); `differences` tells two identities apart (explain.py).
"""

from cacheserver.identity.catalog import compile_catalog_patterns
from cacheserver.identity.explain import FieldDifference, differences, fields_of
from cacheserver.identity.fingerprint import (
    Identifier,
    Named,
    OtherIdentity,
    canonical_json,
    identify,
    key_of,
    key_of_alike,
    lasting_name,
    other_identities,
)
from cacheserver.identity.normalize import PROFILES, Profile, normalize_prompt
from cacheserver.identity.validation import CHOICES, QUALITIES, validate, validate_prompt
from cacheserver.identity.versions import VERSIONS, WRITE_VERSION, Version

__all__ = [
    "CHOICES",
    "PROFILES",
    "QUALITIES",
    "VERSIONS",
    "WRITE_VERSION",
    "FieldDifference",
    "Identifier",
    "Named",
    "OtherIdentity",
    "Profile",
    "Version",
    "canonical_json",
    "compile_catalog_patterns",
    "differences",
    "fields_of",
    "identify",
    "key_of",
    "key_of_alike",
    "lasting_name",
    "normalize_prompt",
    "other_identities",
    "validate",
    "validate_prompt",
]
