"""The rules of the built-in tasks: which responses are correct, partial credit, and canonical forms."""
