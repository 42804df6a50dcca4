"""``python -m rafce_ray.report``."""

from rafce_ray.report.command import main

if __name__ == "__main__":
    raise SystemExit(main())
