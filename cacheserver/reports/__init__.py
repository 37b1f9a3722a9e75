"""Reports: what the service was asked, what it answered from where, and what that cost and saved.

Functions of values: `numbers` adds rows of statistics up, `tables` writes them out, `charts` draws them, `page` puts
both into one HTML file. Only `charts` needs the extra `report`.
"""
