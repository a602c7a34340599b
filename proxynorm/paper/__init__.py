"""The tables of the paper as data, and the code that plans, runs, collects and reports them."""
