"""``python -m rafce_ray.report`` is ``rafce report``."""

from rafce_ray.cli.report import main

if __name__ == "__main__":
    raise SystemExit(main())
