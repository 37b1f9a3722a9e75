"""From a request to its key: normalization, canonical identity, fingerprint, and why two keys differ.

The way of a request: `validate` says what is wrong with it; `identify` normalizes the prompt by the
namespace's profile (normalize.py) as the written version has it (versions.py), writes the canonical identity
and hashes it (fingerprint.py); `differences` tells two identities apart (explain.py). What other prompts ask for the
same picture is told by `canonical_key`, which all of them share (canonical.py).
"""

from cacheserver.identity.canonical import canonical, canonical_form, same_picture
from cacheserver.identity.catalog import compile_catalog_patterns
from cacheserver.identity.explain import FieldDifference, differences, fields_of
from cacheserver.identity.fingerprint import (
    Identifier,
    Named,
    OtherIdentity,
    canonical_json,
    canonical_key,
    canonical_prompt,
    group_of,
    identify,
    key_of,
    key_of_alike,
    lasting_name,
    other_identities,
)
from cacheserver.identity.normalize import PROFILES, Profile, normalize_prompt
from cacheserver.identity.typos import load_dictionary
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
    "canonical",
    "canonical_form",
    "canonical_json",
    "canonical_key",
    "canonical_prompt",
    "compile_catalog_patterns",
    "differences",
    "fields_of",
    "group_of",
    "identify",
    "key_of",
    "key_of_alike",
    "lasting_name",
    "load_dictionary",
    "normalize_prompt",
    "other_identities",
    "same_picture",
    "validate",
    "validate_prompt",
]
