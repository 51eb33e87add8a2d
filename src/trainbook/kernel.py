"""The notebook's kernel: is a person there, clicks answered while a cell runs, work put off until the cell is done.

The front end sends a click as a message, which the kernel hands on when the cell that runs has ended. Here it is fetched
before: from the shell's socket (ipykernel 6, as on Kaggle and Colab), or from what hands its messages to the main thread
(ipykernel 7). What a future kernel does differently, clicks have to wait for; its interrupt button always works.
"""

import logging
from collections.abc import Callable
from typing import Any

import zmq
from IPython import get_ipython

logger = logging.getLogger("trainbook")

WIDGET_MESSAGES = ("comm_open", "comm_msg", "comm_close")


def is_attended() -> bool:
    """Whether a person sits in front of this notebook: its front end can ask questions, which papermill and nbclient cannot."""
    return bool(getattr(_kernel(), "_allow_stdin", False))


def _kernel() -> Any:
    return getattr(get_ipython(), "kernel", None)


def later(action: Callable[[], None]) -> None:
    """Have something done in the main thread as soon as no cell runs; at once where there is no kernel."""
    kernel = _kernel()
    if kernel is None:
        action()
    else:
        kernel.io_loop.add_callback(action)


def answer_clicks() -> None:
    """Let widgets answer what has been clicked since, in the middle of a cell; everything else waits in its order."""
    kernel = _kernel()
    if kernel is None:
        return
    try:
        thread = getattr(kernel, "shell_channel_thread", None)
        stream = kernel.shell_stream if thread is None else thread.manager.get_shell_channel_to_subshell_pair(None).to_stream
        usual = stream._recv_callback
    except AttributeError:
        logger.debug("this kernel is unknown: clicks wait until the cell has ended")
        return
    stream.on_recv(lambda frames: _answer(kernel, stream, usual, frames), copy=False)
    try:
        stream.flush(zmq.POLLIN)
    finally:
        stream._recv_callback = usual


def _answer(kernel: Any, stream: Any, usual: Callable[[list[Any]], Any], frames: list[Any]) -> None:
    session = kernel.session
    identities, parts = session.feed_identities(frames, copy=False)
    kind = session.unpack(parts[1].bytes)["msg_type"]  # of the header alone; reading the whole counts as having had it
    if kind not in WIDGET_MESSAGES:
        stream._run_callback(usual, frames)
        return
    message = session.deserialize(parts, content=True, copy=False)
    kernel._publish_status("busy", "shell", parent=message)
    try:
        kernel.shell_handlers[kind](stream, identities, message)
    except Exception:  # a mistake in a click is not one of the training
        logger.exception("a click could not be answered")
    kernel._publish_status("idle", "shell", parent=message)
