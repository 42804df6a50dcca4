"""A study without Ray: what it searches (config, space, proposals), what became of it (trials, finalists, on_test), how
it is told.
"""
