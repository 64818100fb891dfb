"""Run the command line with ``python -m hfbench``, as ``accelerate launch -m hfbench`` does."""

from hfbench.cli.app import main

if __name__ == "__main__":
    main()
