"""The views of `guarded_app`, in a Flask app with the extension."""

from __future__ import annotations

import functools
from typing import Any

import flask
import guarded_app

from tokenscope import current_token
from tokenscope.integrations._request import current_request
from tokenscope.integrations.flask import TokenScope, cancellable


def make(say: Any) -> Any:
    """Build the app."""
    guarded_app.listen(say)
    app = flask.Flask(__name__)
    TokenScope(app)

    def view(name: str, number: str = "") -> flask.Response:
        request = current_request()
        assert request is not None
        request.endpoint = f"{flask.request.method} {flask.request.path}"  # the tests tell requests apart
        environ = flask.request.environ
        body = guarded_app.call(say, environ)
        whole = isinstance(body, list)
        return flask.Response(b"".join(body) if whole else body, mimetype="text/plain")

    late = cancellable(timeout=guarded_app.HURRY)(functools.partial(view, "late_stream"))
    app.add_url_rule("/late_stream/<number>", "late_stream", late)
    for rule in ("/<name>", "/<name>/<number>"):
        app.add_url_rule(rule, rule, view, methods=["GET", "POST"])

    def outermost(environ: dict[str, Any], start_response: Any) -> Any:
        if current_token() is not guarded_app.OUTSIDE:
            say("leaked", path=environ["PATH_INFO"])
        return app(environ, start_response)

    return outermost
