"""Renditions: stored pictures in another size, format or compression, and what may be answered with one."""
