"""`python -m engine.bench`: the same as `memwall bench`, where only the engine is installed."""

import sys

from engine.commands.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
