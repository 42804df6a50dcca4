"""The network: trunk, heads, losses, optimiser."""
