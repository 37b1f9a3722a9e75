"""The miss path: from a request that no tier could answer to pictures that were paid for."""
