"""Parameters in files: arrays read where they lie, written one after another, fitted into a tree.

`models.formats` is what callers use; each file of it is one format, described by a `Format`.
"""
