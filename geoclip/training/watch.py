"""The callback of every training run: its epochs, and what stops it before its end."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import lightning
import torch


class Watch(lightning.Callback):
    """Times epochs (`seconds`, of the steps and validation), and remembers and reports what stopped the run.

    lines: print a line after each epoch, for logs without a terminal.
    """

    def __init__(self, checkpoint: Path, lines: bool = False):
        self.checkpoint = checkpoint
        self.seconds: list[float] = []
        self.lines = lines
        self.stopped_by: BaseException | None = None
        self.sigterm = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer, module) -> None:
        # Lightning's handler broadcasts the signal, and waits for ever if a rank is inside another collective
        if trainer.world_size > 1 and "SLURM_JOB_ID" not in os.environ:
            signal.signal(signal.SIGTERM, self.sigterm)

    def on_train_epoch_start(self, trainer, module) -> None:
        self.began = time.monotonic()

    def on_train_epoch_end(self, trainer, module) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(round(time.monotonic() - self.began, 2))
        if self.lines and trainer.is_global_zero:
            metrics = trainer.callback_metrics
            losses = [f"{name} {metrics[name]:.4f}" for name in ("train/loss", "val/loss") if name in metrics]
            about = ", ".join([*losses, f"{self.seconds[-1]} s"])
            print(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {about}", flush=True)

    def on_exception(self, trainer, module, exception) -> None:
        self.stopped_by = exception
        if isinstance(exception, SystemExit | KeyboardInterrupt) and trainer.is_global_zero:
            whole = f"{self.checkpoint} holds its last whole epoch: rerun the command to resume"
            none = "no epoch was complete: rerun the command to start again"
            kept = whole if self.checkpoint.is_file() else none
            print(f"training stopped before its end; {kept}", file=sys.stderr)
        if trainer.world_size > 1:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)  # the ranks that this one started
            timer = threading.Timer(30, os._exit, (getattr(exception, "code", 1),))
            timer.daemon = True  # what remains of the ending may wait for a rank that has ended
            timer.start()
