"""``python -m rafce_ray.data`` is ``rafce data``."""

from rafce_ray.cli.data import main

if __name__ == "__main__":
    raise SystemExit(main())
