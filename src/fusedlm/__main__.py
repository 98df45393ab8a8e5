"""`python -m fusedlm`: the command line, where a module is asked for, as by `torchrun -m`."""

from fusedlm.cli import main

if __name__ == "__main__":
    main()
