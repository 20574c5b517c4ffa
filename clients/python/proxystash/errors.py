"""What a client raises. No gRPC here, and no message or attribute that holds a credential."""

from __future__ import annotations

from datetime import timedelta

from proxystash.pool_models import Shortage


class ProxystashError(Exception):
    """A call that failed.

    `code` is the name of the gRPC status, e.g. UNAVAILABLE. `reason` is machine-readable: the server's, e.g.
    INVALID_PROXY_URL, else the code. `field` names the field at fault, or is empty. `message` is for people.
    """

    def __init__(self, message: str, *, code: str = "UNKNOWN", reason: str = "", field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason or code
        self.field = field


class InvalidArgumentError(ProxystashError):
    """The request is at fault, and nothing was changed; `field` says where."""


class NotFoundError(ProxystashError):
    """Nothing is stored under the key that was to be changed."""


class FailedPreconditionError(ProxystashError):
    """The server's state is against it: `reason` says what, such as BANNED. Nothing was changed."""


class UnavailableError(ProxystashError):
    """The server could not be reached, is shutting down, or has no working tier.

    `sent` is False when the call is known to have never left this process, for want of a connection.
    """

    def __init__(
        self, message: str, *, code: str = "UNAVAILABLE", reason: str = "", field: str = "", sent: bool = True
    ) -> None:
        super().__init__(message, code=code, reason=reason, field=field)
        self.sent = sent


class DeadlineExceededError(ProxystashError):
    """No answer came in time. A write may have happened all the same."""


class ResourceExhaustedError(ProxystashError):
    """A limit was hit, such as the number of statistics streams or the size of a message."""


class NoProxyError(ProxystashError):
    """No proxy can be lent: `shortage` says why, `retry_after` when the next may come free, if known."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "RESOURCE_EXHAUSTED",
        reason: str = "",
        field: str = "",
        shortage: Shortage | None = None,
        retry_after: timedelta | None = None,
    ) -> None:
        super().__init__(message, code=code, reason=reason or "NO_PROXY", field=field)
        self.shortage = shortage
        self.retry_after = retry_after


class ClientClosedError(ProxystashError):
    """The client was closed before the call or while it ran."""


class InternalError(ProxystashError):
    """The server failed; its log has more under `request_id`, which is empty if it told none."""

    def __init__(
        self, message: str, *, code: str = "INTERNAL", reason: str = "", field: str = "", request_id: str = ""
    ) -> None:
        super().__init__(message, code=code, reason=reason, field=field)
        self.request_id = request_id
