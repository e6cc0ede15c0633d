"""`python -m kvmix_fx`: the `kvmix` command without its script."""

from kvmix_fx.cli import main

if __name__ == "__main__":
    main()
