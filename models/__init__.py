"""Models and their training: what the library is for, and what it is tried on. Not in the wheel."""
