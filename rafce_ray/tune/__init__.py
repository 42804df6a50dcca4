"""``python -m rafce_ray.tune``: sweeps on Ray Tune that finish, resume and can be believed (docs/design.md)."""
