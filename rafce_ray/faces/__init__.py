"""From bytes to upright pixels to aligned faces."""
