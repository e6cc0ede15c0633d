"""The ops in plain PyTorch: the specification, the oracle of every kernel, and what has no kernel."""
