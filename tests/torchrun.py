"""Several processes of torchrun on this machine, for tests of training and labelling in parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SECONDS = 300


def torchrun(*command: str | Path, processes: int = 2) -> None:
    """Runs a script, or `-m` and a module, with its options in each process; a failure shows what they printed."""
    # By the loopback address, since a machine's own name need not resolve.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    done = subprocess.run(
        [sys.executable, *launcher, "--nproc-per-node", str(processes), *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout[-6000:]}"
