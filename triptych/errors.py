"""The two kinds of failure: one ends a request, the other ends an instance."""


class TriptychError(Exception):
    """Base of every error that Triptych raises on purpose."""


class RequestError(TriptychError):
    """Ends one request and nothing else.

    `status` is the HTTP status the client gets, `param` the field of its request that is to blame
    (`messages[0].content[1].image_url`), or None where no single field is, `code` a short machine-readable word,
    `retry_after_s` when it is worth asking again (sent as the Retry-After header).
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


def shutting_down() -> RequestError:
    return RequestError("the server is shutting down", status=503, code="shutting_down", retry_after_s=2)


class ConfigError(TriptychError):
    """The server cannot start as asked: a bad flag, or a checkpoint that cannot be served exactly. Exit code 2."""


class InstanceError(TriptychError):
    """Ends one instance: it died, hangs, or cannot be reached."""


EXIT_FAILED = 1
EXIT_REFUSED = 2  # a ConfigError: asked for something that cannot be, no fault of the program
