"""`python -m stator`, and the command `stator`."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; one line if its extra is not installed."""
    try:
        from stator.cli.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit('the command line needs an extra: pip install "stator[serve]"')
    app()


if __name__ == "__main__":
    main()
