"""What goes wrong with a request, in OpenAI's shape. Messages say what was given and what is allowed, and no paths."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from accel.engine.jobs import ClosedError, QueueFullError
from accel.errors import ArtifactError, IncompatibleError, OptionError, first_line

log = logging.getLogger("accel.server")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}
# folders in front of a name; the second slash of a URL is not one
_FOLDERS = re.compile(r"(?<![\w:/])(?:[A-Za-z]:)?[/\\](?:[^\s'\"/\\:,;()]+[/\\])+")


class ApiError(Exception):
    """A request that is answered with an error; ``param`` names the field that is to blame."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def api_error(error: BaseException) -> ApiError:
    """The answer to whatever was raised on the way; what nobody foresaw is logged and not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        retry = {"Retry-After": str(max(1, error.retry_after))}
        return ApiError(first_line(error), status=429, headers=retry)
    if isinstance(error, ClosedError):
        return ApiError(without_paths(first_line(error)), status=503, headers={"Retry-After": "1"})
    if isinstance(error, OptionError | ArtifactError | IncompatibleError):
        return ApiError(without_paths(first_line(error)))
    log.error("a request failed", exc_info=error)
    return ApiError("the server failed on this request; its log says why", status=500)


def without_paths(message: str) -> str:
    """A message in which files keep their names and lose their folders."""
    return _FOLDERS.sub("", message)
