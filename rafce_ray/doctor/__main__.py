"""``python -m rafce_ray.doctor``."""

from rafce_ray.doctor.command import main

if __name__ == "__main__":
    raise SystemExit(main())
