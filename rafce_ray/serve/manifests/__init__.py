"""Manifests for KubeRay and configurations for Ray Serve, looked through before a cluster sees them."""
