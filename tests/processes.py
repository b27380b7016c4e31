"""Processes that are copies of that of the tests, which spares them the imports."""

import faulthandler
import os
import signal
import socket
import sys
import time

import pytest
from lightning.pytorch import Trainer

NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
MARKS = [pytest.mark.usefixtures("one_thread"), NEEDS_FORK]
PATIENCE = 120  # seconds


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def trainer(root, world, **options):
    """A quiet one, whose data decide what each process gets."""
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        use_distributed_sampler=False,
        enable_progress_bar=False,
        default_root_dir=root,
        **{"logger": False, **options},
    )


class Processes:
    """Started with ``work(rank)``; what one raises is in a file beside the directory ``root``.

    They are one process group, so that one signal reaches all.
    """

    def __init__(self, work, root, world=2):
        directory = root.with_name(f"errors_{root.name}")
        directory.mkdir(parents=True, exist_ok=True)
        self.errors = [directory / f"error.{rank}" for rank in range(world)]
        for path in self.errors:
            path.unlink(missing_ok=True)
        port = free_port()
        ready, go = os.pipe()
        self.children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os.close(go)
                os.read(ready, 1)  # until all have been started, and are of one group
                self._child(work, rank, world, port)
            self.children.append(child)
            os.setpgid(child, self.children[0])
        os.close(go)
        os.close(ready)

    def _child(self, work, rank, world, port):
        status = 1
        place = {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "NODE_RANK": "0"}
        os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 2)
                sys.stdout = sys.stderr = nothing
                with open(self.errors[rank], "w") as late:
                    faulthandler.dump_traceback_later(0.9 * PATIENCE, file=late)  # where it hangs
                    work(rank)
            status = 0
        except BaseException as error:
            self.errors[rank].write_text(f"{type(error).__name__}: {error}")
        finally:
            faulthandler.cancel_dump_traceback_later()
            os._exit(status)  # nothing of the tests runs twice

    def wait(self):
        """How each ended; whoever takes too long is killed."""
        end, codes = time.monotonic() + PATIENCE, [None] * len(self.children)
        while None in codes:
            for number, child in enumerate(self.children):
                if codes[number] is None:
                    pid, status = os.waitpid(child, os.WNOHANG)
                    codes[number] = os.waitstatus_to_exitcode(status) if pid else None
            time.sleep(0.01)
            if time.monotonic() > end:
                self.kill()
                end += PATIENCE
        return codes

    def kill(self):
        """All at once."""
        os.killpg(self.children[0], signal.SIGKILL)

    def said(self):
        """What each has raised."""
        return [path.read_text() if path.exists() else "" for path in self.errors]

    def succeed(self):
        """Wait until all have ended, none by an error."""
        codes = self.wait()
        assert codes == [0] * len(codes), self.said()
