"""The CPU backend: C functions, compiled by the machine's own compiler when they are first used."""
