"""``python -m rafce_ray VERB`` is ``rafce VERB``."""

from rafce_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
