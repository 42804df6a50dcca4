"""The service on Ray Serve: one deployment, the fast path in front of it, and ``rafce serve``."""
