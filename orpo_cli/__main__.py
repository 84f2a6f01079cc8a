"""The command `orpo`, also as `python -m orpo_cli`: signals have their meaning before anything heavy is imported."""

import os

from orpo_cli import signals


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 failed, 2 wrong input, 130 or 143 stopped by a signal."""
    signals.leave_at_once()
    try:
        from orpo_cli import cli

        cli.main()
    except signals.Leave as left:
        os._exit(left.code)  # the interpreter's own end would wait for the threads of libraries
    finally:
        signals.settled()


if __name__ == "__main__":
    main()
