"""A study without Ray: what is searched, what became of each trial, and how reliable the results are."""
