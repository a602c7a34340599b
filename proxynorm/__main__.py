"""`python -m proxynorm NAME …`, as torchrun starts it: torchrun … -m proxynorm train."""

from proxynorm.commands import main

if __name__ == "__main__":
    main()
