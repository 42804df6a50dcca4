"""``python -m rafce_ray.doctor`` is ``rafce doctor``."""

from rafce_ray.cli.doctor import main

if __name__ == "__main__":
    raise SystemExit(main())
