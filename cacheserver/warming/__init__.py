"""Warm-up: filling the cache at low priority, as a job that is planned, bounded, and safe to run again."""

from cacheserver.warming.jobs import Warming
from cacheserver.warming.values import Batch, JobOptions, Progress, WarmItem, WarmOutcome, WarmTotals

__all__ = ["Batch", "JobOptions", "Progress", "WarmItem", "WarmOutcome", "WarmTotals", "Warming"]
