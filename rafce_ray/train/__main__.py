"""``python -m rafce_ray.train`` is ``rafce train``."""

from rafce_ray.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
