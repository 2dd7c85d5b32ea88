"""A server for `benchmarks.scale_store`: an S3 listing of as many parts as you like, made up page by page.

python -m benchmarks.made_up_listing PORT NUM_PARTS PAGE_MS
"""

import asyncio
import sys

from aiohttp import web

PAGE = 1000
PREFIX = "out/data/"


def page(first: int, num_parts: int) -> str:
    """One answer to ListObjectsV2."""
    last = min(first + PAGE, num_parts)
    items = "".join(
        f"<Contents><Key>{PREFIX}{number:032x}.parquet</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{number:032x}&quot;</ETag><Size>9000</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for number in range(first, last)
    )
    more = f"<NextContinuationToken>{last}</NextContinuationToken>" if last < num_parts else ""
    truncated = "true" if more else "false"
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>bucket</Name><Prefix>{PREFIX}</Prefix><IsTruncated>{truncated}</IsTruncated>{more}{items}"
        "</ListBucketResult>"
    )


def main() -> None:
    """Serve on loopback until killed."""
    port, num_parts, page_ms = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

    async def answer(request: web.Request) -> web.Response:
        await asyncio.sleep(page_ms / 1e3)
        text = page(int(request.query.get("continuation-token", 0)), num_parts)
        return web.Response(text=text, content_type="application/xml")

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


if __name__ == "__main__":
    main()
