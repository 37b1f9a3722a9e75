"""The composition root: settings become objects, objects become a service. The only room that imports them all.

service.py starts and stops it; tiers.py builds what lies under memory, miss_path.py what makes pictures.
"""

from cacheserver.app.miss_path import build_upstream
from cacheserver.app.service import Service, run, start
from cacheserver.app.tiers import build_tiers

__all__ = ["Service", "build_tiers", "build_upstream", "run", "start"]
