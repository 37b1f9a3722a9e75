"""Stored images by URL, in the size and format that is asked for."""
