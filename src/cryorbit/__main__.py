"""``python -m cryorbit``: the command, by the interpreter that is named."""

from cryorbit.cli.main import main

if __name__ == "__main__":
    main()
