"""`python -m invrecon` is the `invrecon` command."""

from invrecon.cli import main_entry

if __name__ == "__main__":
    main_entry()
