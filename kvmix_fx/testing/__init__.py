"""Models, texts and input strategies for tests and benchmarks."""
