"""Train, tune and serve models that read compound emotions and facial action units from faces."""

__version__ = "0.1.0"
