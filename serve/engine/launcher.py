"""Stands between TorchServe and a worker: the zygote forks the worker, this process waits in its place.

TorchServe takes `python -ISB launcher.py ZYGOTE REPORTS PATIENCE PYTHON` for Python and adds the worker's arguments. It
watches this process, kills it to end the worker and takes its exit code for the worker's. Whatever keeps the zygote
from forking costs time only: this process becomes `PYTHON ARGUMENTS...` itself, and the supervisor is told why.

Every start pays for what is imported here: only what is built into the interpreter. `socket` alone, or `typing`, would
double the 19 ms of CPU that this takes.
"""

import _socket
import marshal
import os
import sys
import time

ENDED = "ended: "  # before the folder of a worker that has ended by itself
NO_ANSWER = "the zygote does not answer"
LARGEST = 2**18  # bytes of a start request: more than Linux sends in one message
WORKER = "model_service_worker.py"


def main() -> None:
    zygote, reports, patience, python, *arguments = sys.argv[1:]
    # When this worker's start began, for the handler to tell how long it took.
    os.environ["PALIMPSEST_WORKER_STARTED"] = repr(time.monotonic())
    # TorchServe also makes virtual environments with its Python.
    if arguments and os.path.basename(arguments[0]) == WORKER:
        folder = os.getcwd()
        # A worker is known by its working directory, and this is none.
        os.chdir("/")
        reason = _run_forked(zygote, reports, float(patience), folder, arguments)
        _report(reports, f"{folder}: {reason}")
        os.chdir(folder)
    os.execv(python, [python, *arguments])  # noqa: S606


def _run_forked(address: str, reports: str, patience: float, folder: str, arguments: list[str]) -> str:
    """Ends this process with the worker, or says why there is none. patience: seconds until it must have been forked.

    A zygote that still imports is waited for: importing the same here, beside it, would take longer.
    """
    request = marshal.dumps((arguments, dict(os.environb), folder))
    stdio = b"".join(descriptor.to_bytes(4, sys.byteorder) for descriptor in range(3))
    zygote = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    zygote.settimeout(patience)
    try:
        zygote.connect(address)
        zygote.sendmsg([request], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, stdio)])
        answer = zygote.recv(LARGEST).decode()
        if answer == "forked":
            zygote.settimeout(None)
            # The worker of a zygote that died lives on; its end is seen, its exit code is not.
            answer = zygote.recv(LARGEST).decode() or "ended 1"
    except TimeoutError:
        return NO_ANSWER
    except OSError as error:
        return f"no zygote: {error.strerror}"
    finally:
        # A zygote that forks after all ends that worker at once.
        zygote.close()
    kind, _, text = answer.partition(" ")
    if kind == "ended":
        # Above 128 by a signal, of which the zygote itself tells.
        if int(text) < 128:
            _report(reports, ENDED + folder)
        os._exit(int(text))
    return text or "the zygote ended"


def _report(address: str, text: str) -> None:
    supervisor = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    supervisor.setblocking(False)
    try:
        supervisor.sendto(text.encode(errors="replace"), address)
    except OSError:
        return


if __name__ == "__main__":
    main()
