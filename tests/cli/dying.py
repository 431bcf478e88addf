"""`python dying.py FOLDER NUMBER SECONDS ARGUMENTS...`: the command, killed at its NUMBER-th write below FOLDER.

With SECONDS it lives that much longer, which lands in what compiled code writes. NUMBER 0 kills nothing. At the end
the number of writes is the last line of the standard error.
"""

import os
import signal
import sys
import threading
import time

# Audit events of what changes a folder, and which of their arguments is a path.
EVENTS = {"os.rename": 1, "os.link": 1, "os.mkdir": 0, "os.rmdir": 0, "os.remove": 0}


def kill_at(folder, number, seconds=0.0):
    """Counts the writes of this process below a folder and kills it at one of them; returns the count so far."""
    folder, count = os.path.realpath(folder), [0]

    def end():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def is_write(event, arguments):
        if event == "open":
            return arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return event in EVENTS

    def hook(event, arguments):
        if not is_write(event, arguments):
            return
        path = arguments[EVENTS.get(event, 0)]
        if not isinstance(path, str | bytes | os.PathLike) or not os.path.abspath(os.fsdecode(path)).startswith(
            folder
        ):
            return
        count[0] += 1
        if count[0] == number:
            end() if seconds == 0 else threading.Thread(target=end, daemon=True).start()

    sys.addaudithook(hook)
    return count


if __name__ == "__main__":
    counted = kill_at(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    from fisher_jax.cli.main import main

    code = main(sys.argv[4:])
    sys.stderr.write(f"\n{counted[0]}\n")
    sys.exit(code)
