"""What is wrong with a request's body, whoever reads it."""


class BodyError(ValueError):
    """The client's fault; serve.errors and handlers.errors have a class of their own for each.

    status: 400; 413 where a limit is passed; 415 where the kind of body is not served. message: for people, quotes no
    more than a few words of the body. field: the one it is about, if it is about one.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.field, self.status = message, field, status
