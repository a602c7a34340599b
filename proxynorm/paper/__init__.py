"""The paper's tables as data, and what plans, runs, collects and reports them."""
