"""``python -m rafce_ray.serve.manifests``."""

from rafce_ray.serve.manifests.command import main

if __name__ == "__main__":
    raise SystemExit(main())
