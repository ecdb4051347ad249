"""`python -m quantflow.torchrun …`: torchrun with the exit code of its worker, where torchrun ends with 1 itself.

python -m quantflow.torchrun --nproc-per-node 4 -m quantflow recipe=…
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from quantflow.errors import EXIT_CRASH, EXIT_INTERRUPTED, EXIT_PASSED


def run(arguments: Sequence[str]) -> int:
    """Runs torchrun's command line. The exit code of the worker that failed first; 1 where a signal killed it."""
    try:
        torchrun.run(torchrun.parse_args(list(arguments)))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else EXIT_CRASH
    except (SignalException, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_PASSED


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
