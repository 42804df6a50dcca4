"""From label files and images to a batch."""
