"""Errors that a person reads: what is wrong, where, and what to do about it."""


class UserError(Exception):
    """A mistake that the person at the keyboard can mend; shown without a traceback, exit code 2.

    Args:
        what: what is wrong and where.
        remedy: the command or edit that mends it.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what if not remedy else f"{what}\n  -> {remedy}")


class RunFailed(Exception):  # noqa: N818  (the state of the run, as in run.json)
    """The run itself failed after it had started (non-finite loss, disk full, out of memory); exit code 1."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA's, torch's on a CPU, or one of cuBLAS and cuDNN."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in words)
