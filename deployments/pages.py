"""The playground's files, with headers that keep everything else out of the page.

Not covered: keys (the page asks for one), and what the page does (`playground/`).
"""

from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "playground"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""What the page may load and do: a model's answer that gets into it as markup could still not send a key anywhere."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",  # asked again each time (304): a release is never mixed with an older one
}


class Pages(StaticFiles):
    """An ASGI app that serves the page."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER, html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """As Starlette's, with our headers."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
