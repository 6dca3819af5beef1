"""`python -m lapa` is `lapa`; torchrun needs this form: `torchrun --nproc-per-node 4 -m lapa latent train ...`."""

from lapa.cli import main

if __name__ == "__main__":
    main()
