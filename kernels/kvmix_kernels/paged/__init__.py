"""Packed caches of many sequences in pages of one pool: where things lie, attention over them, writing."""
