"""`torchrun` that ends with the benchmark that has started it."""

from __future__ import annotations

import os

from torch.distributed.run import main

from lightning_dhellam.bench.processes import end_with_parent, of_this

if __name__ == "__main__":
    end_with_parent()
    os.environ |= of_this()
    main()
