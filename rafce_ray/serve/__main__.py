"""``python -m rafce_ray.serve``."""

from rafce_ray.serve.command import main

if __name__ == "__main__":
    raise SystemExit(main())
