"""A run whose process may take only so much more memory than it has when training begins, until its first step has
been taken: `limited_run.py MIB …`."""

import os
import resource
import sys
from pathlib import Path
from typing import Any

from ava_fast import train
from ava_fast.trainer import Trainer

if __name__ == "__main__":
    more = int(sys.argv[1]) * 2**20
    run = Trainer.run

    def limited(trainer: Trainer, *rest: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        step = trainer._step

        def limited_until_taken() -> Any:  # the micro-batch is found in the first; later ones may start threads
            taken = step()
            if trainer.step:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return taken

        trainer._step = limited_until_taken  # type: ignore[method-assign]
        run(trainer, *rest)

    Trainer.run = limited  # type: ignore[method-assign]
    code = train.main(sys.argv[2:])
    sys.stdout.flush()
    os._exit(code)
