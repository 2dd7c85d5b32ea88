"""`r4b publish`: the many small parts of a job become few files of a size, which readers see all at once.

`publisher.py` is the whole flow; `parts.py` reads what a job left, `index.py` says which part goes into which file,
`files.py` writes them, and `versions.py` knows what a target looks like.
"""

from pipeline.publish.publisher import Published, PublishOptions, publish
from pipeline.publish.versions import Target, Version

__all__ = ["PublishOptions", "Published", "Target", "Version", "publish"]
