"""Alarms: figures of the running service that are watched, and who is told when one is out of bounds.

figures.py reads what a rule looks at, watch.py decides whether it rings, webhook.py tells.
"""

from cacheserver.alarms.figures import Counts, Figure, Readings, SharedSpending, Value
from cacheserver.alarms.watch import Alarms, Notices
from cacheserver.alarms.webhook import Webhook

__all__ = ["Alarms", "Counts", "Figure", "Notices", "Readings", "SharedSpending", "Value", "Webhook"]
