"""One training run, without Ray: its state, its loop, its folder."""
