"""``python -m rafce_ray.serve`` is ``rafce serve``."""

from rafce_ray.cli.serve import main

if __name__ == "__main__":
    raise SystemExit(main())
