"""A trained model in a folder: written, read, run, measured and asked."""
