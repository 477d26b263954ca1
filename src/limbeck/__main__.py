"""`python -m limbeck`, which is also what torchrun starts: `torchrun --nproc-per-node 2 -m limbeck train recipe.yaml`."""

from limbeck.cli import main

main()
