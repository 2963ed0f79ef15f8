"""Who may ask: this machine, by the name it has, with the token; and what a page may load."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tell.serve.listen import LOCAL

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
)
FRAMED = (  # a report, or a page of a run folder from anywhere: no script, nothing loaded, no form
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'self'; sandbox"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # no-referrer would make the Origin of our own forms null
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Refuses other hosts (DNS rebinding), other origins (CSRF) and requests without the token; sets the policy.

    The token comes in the address once (``/?token=``) and is then kept in a cookie, which no other site's page sends.
    """

    def __init__(self, app: ASGIApp, token: str, page: Callable[..., Response]) -> None:
        self.app, self.token, self.page = app, token, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                for name, value in HEADERS.items():
                    MutableHeaders(scope=message).setdefault(name, value)
            await send(message)

        await (self._answer(Request(scope)) or self.app)(scope, receive, guarded)

    def _answer(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        try:
            named = urlsplit(f"//{host}")
            known = named.hostname in LOCAL and named.port == (request.scope.get("server") or ("", None))[1]
        except ValueError:
            known = False
        if not known:
            return PlainTextResponse("This page is 127.0.0.1.", 421)
        if request.method not in ("GET", "HEAD") and request.headers.get("origin") != f"http://{host}":
            return PlainTextResponse("This request comes from another page.", 403)
        name, given = f"tell-ui-{named.port}", request.query_params.get("token", "")  # cookies do not keep ports apart
        if request.method == "GET" and request.url.path == "/" and self._is_token(given):
            home = RedirectResponse("/", 303)
            home.set_cookie(name, self.token, httponly=True, samesite="strict")
            return home
        if request.url.path != "/static/style.css" and not self._is_token(request.cookies.get(name, "")):
            return self.page(
                request,
                "message",
                "Who is asking?",
                {"error": "Open the address that `tell ui` printed: it has the token."},
                status=401,
            )
        return None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())
