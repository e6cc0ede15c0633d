"""The graph pass: find idioms, assign layers, rewrite, verify, report. See README.md beside this."""
