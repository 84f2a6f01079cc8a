"""`python -m orpo_cli` is the same as the command `orpo`."""

from orpo_cli.cli import main

if __name__ == "__main__":
    main()
