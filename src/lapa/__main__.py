"""`python -m lapa` is `lapa`; torchrun needs this form: `torchrun --nproc-per-node 4 -m lapa latent train ...`."""

import os

from lapa.cli import main
from lapa.subcommand import ORPHAN, record_where_orphaned

if __name__ == "__main__":
    if ORPHAN in os.environ:
        record_where_orphaned()
    main()
