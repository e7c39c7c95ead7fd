"""What every request and answer of the server passes."""

from __future__ import annotations

import base64
import hmac
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The browser is to ask this server alone, whatever a part of the page would like. Gradio's parts compile templates.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; form-action 'self'"
)

_STARTING = "/startup-events"  # with which Gradio wakes itself


class Guard:
    """Asks for the password where there is one (HTTP Basic, any name), adds the policy to every answer, and refuses
    what would make the server itself fetch from elsewhere. A file that is removed while it is asked for, because its
    tab was closed, is no error of the server."""

    def __init__(self, app: ASGIApp, password: str | None = None) -> None:
        self.app = app
        self.password = password

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.password and not self._knows_it(scope) and not scope["path"].endswith(_STARTING):
            asking = PlainTextResponse("password?", 401, {"WWW-Authenticate": 'Basic realm="R2R", charset="UTF-8"'})
            return await asking(scope, receive, send)
        if "file=http" in scope["path"] or "/proxy=" in scope["path"]:
            return await PlainTextResponse("only files of this server", 403)(scope, receive, send)

        started = False

        async def send_with_policy(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        try:
            return await self.app(scope, receive, send_with_policy)
        except (FileNotFoundError, RuntimeError):  # Starlette raises the one or the other
            _, named, path = scope["path"].partition("/file=")
            if not named or Path(path).exists():
                raise
        if not started:
            await PlainTextResponse("the photo is gone", 404)(scope, receive, send_with_policy)

    def _knows_it(self, scope: Scope) -> bool:
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        if kind.lower() != "basic" or self.password is None:
            return False
        try:
            _, _, password = base64.b64decode(given, validate=True).partition(b":")
        except ValueError:
            return False
        return hmac.compare_digest(password, self.password.encode())
