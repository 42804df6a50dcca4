"""``python -m rafce_ray.predict`` is ``rafce predict``."""

from rafce_ray.cli.predict import main

if __name__ == "__main__":
    raise SystemExit(main())
