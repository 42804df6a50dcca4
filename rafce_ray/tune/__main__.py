"""``python -m rafce_ray.tune`` is ``rafce tune``."""

from rafce_ray.cli.tune import main

if __name__ == "__main__":
    raise SystemExit(main())
