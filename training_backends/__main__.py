"""`python -m training_backends` is the command line."""

from training_backends.cli.main import main

if __name__ == "__main__":
    main()
