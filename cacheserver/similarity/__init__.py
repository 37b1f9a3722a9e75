"""A similar prompt's stored picture as an answer, where a verifier says that both ask for the same picture."""
