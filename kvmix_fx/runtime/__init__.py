"""What runs in a step: from the caller's arguments to the rewritten graph and back. README.md draws it."""
