"""`python -m distaya_ext`: the command line, as torchrun starts it."""

from .cli.app import main

if __name__ == "__main__":
    main()
