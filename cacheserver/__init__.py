"""A multi-level prompt cache in front of image models: memory, Redis, object storage, then generation."""
