"""The composition root: settings become objects, objects become a service. The only room that imports them all.

service.py starts and stops it; core.py builds the cache with what lies under it (tiers.py) and behind it
(miss_path.py), front.py the rpcs, watching.py what a service watches about itself.
"""

from cacheserver.app.miss_path import build_upstream
from cacheserver.app.service import Service, run, start
from cacheserver.app.tiers import build_tiers

__all__ = ["Service", "build_tiers", "build_upstream", "run", "start"]
