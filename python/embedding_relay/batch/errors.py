"""What callers are refused with, and what makes a worker stop: work that was taken over, a disk that fails."""


class Refusal(Exception):
    """The caller's mistake, or a file that cannot be used: an HTTP status and a sentence. Nothing has changed."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class UnknownSession(Refusal):
    def __init__(self, session_id: str) -> None:
        super().__init__(404, f"there is no session {session_id!r}: it was deleted, it expired, or it never existed")


class Unreadable(Refusal):
    """A file that is not what it should be: damaged, of another kind, or without anything to ask."""

    def __init__(self, detail: str) -> None:
        super().__init__(400, detail)


class TooLarge(Refusal):
    def __init__(self, detail: str) -> None:
        super().__init__(413, detail)


class OpenAIRefusal(Refusal):
    """A refusal in the form of OpenAI's API, which names the parameter at fault."""

    def __init__(self, status: int, detail: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, detail)
        self.param = param
        self.code = code


class StaleJob(Exception):
    """A worker works on a part that is over or that another worker has taken over: it must stop, changing nothing."""


class NotWhatWasSaved(Exception):
    """What was read back is not what was written: the disk is full or failing, or somebody else changed it."""
