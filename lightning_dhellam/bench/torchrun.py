"""`torchrun` that ends with the benchmark that has started it."""

from __future__ import annotations

from torch.distributed.run import main

from lightning_dhellam.bench.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    main()
