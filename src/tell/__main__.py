"""``python -m tell`` is ``tell``."""

from tell.cli.main import main

if __name__ == "__main__":
    main()
