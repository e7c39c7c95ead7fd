"""`python -m r2r` is `r2r`."""

from r2r.cli import main

if __name__ == "__main__":
    main()
