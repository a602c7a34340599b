"""Compare bn, ln and ln_pn on Fashion-MNIST: `proxynorm demo`, proxynorm/commands/demo.py."""

from _checkout import run

if __name__ == "__main__":
    run("demo")
