"""``python -m adapterx``: the command line, where the console script is not on the path."""

from adapterx.cli import main

if __name__ == "__main__":
    main()
