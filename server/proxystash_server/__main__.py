"""`python -m proxystash_server`: the same as the command `proxystash-server`."""

from proxystash_server.cli import main

if __name__ == "__main__":
    main()
