"""Worker processes that do not outlive the process that started them."""

import multiprocessing
import os
import signal
import threading
import time


def end_with_parent(grace_s: float = 0.0) -> None:
    """Make this process end when its parent has ended, however that was: `grace_s` after SIGTERM at the latest."""

    def wait():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(143)

    threading.Thread(target=wait, daemon=True).start()
