"""Draw faces whose action units can be set: who, where, which muscles pull, and what the camera sees."""
